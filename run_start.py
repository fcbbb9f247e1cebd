"""The start of a run: its settings from files and the command line, its weights, and its run directory."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common import UserError, atomic_write, check_output_folder, logger
from config import Config, default_config, doubts, finalize_config
from dataset_split import DatasetSplit
from training_pictures import drop_pictures_after
from trust import check_trust
from utils import ranks
from utils.checkpoint import (
    assign_weights,
    fit_weights,
    is_model_tensor,
    is_training_state,
    load_weights,
    newest_checkpoint,
    read_checkpoint_meta,
    read_description,
    read_meta,
    start_averages,
    stored_step,
    without_averages,
)
from utils.class_tensors import depends_on_classes, has_shared_masks, keep_classes
from utils.efficientnet_lite import NETWORKS, load_torch, package_file
from utils.event_files import drop_events_after
from utils.run_lock import LOCK_NAME, RunLock

__all__ = [
    "STRICT", "Fitting", "Model", "Request", "Start", "begin", "begin_with_the_others", "check_plan",
    "data_fingerprint", "inference_settings", "load_model", "training_settings", "weight_loader", "with_classes",
]  # fmt: skip

# Settings that determine the network: taken from the file given to --load also for training.
_MODEL_SETTINGS = re.compile(
    r"^(MODE_|BACKBONE\.(?!WEIGHTS|FREEZE)|FPN\.|CASCADE\.BBOX|RPN\.(ANCHOR_|CELL_|STRIDE_|HEAD_DIM)|FRCNN\.(CLASS_AGN|BBOX_REG|ROI)"
    r"|MRCNN\.HEAD_DIM|KRCNN\.|PREPROC\.PIXEL_)"
)
# Settings that MODE_RPN_ONLY forces: a file of such a model does not give them for a whole detector.
_SECOND_STAGE_SETTINGS = ("MODE_MASK", "MODE_KEYPOINT", "FPN.CASCADE")
# Settings that belong to pretrained weights of a backbone: taken from the file that BACKBONE.WEIGHTS names.
_BACKBONE_SETTINGS = re.compile(r"^(BACKBONE\.(?!WEIGHTS|FREEZE)|PREPROC\.PIXEL_)")
# Settings that may change when a run is continued: its length and the resources it uses, not what it computes.
_FREE_SETTINGS = re.compile(
    r"^(TRAIN\.(MAX_STEPS|EVAL_PERIOD|CHECKPOINT_PERIOD|PERIOD_STEPS|KEEP_CHECKPOINTS|SKIP_BAD_STEPS|VAL_LOSS|BEST_METRIC|PATIENCE|MIN_DELTA|TARGET|PICTURES|WANDB|MLFLOW)|DATA\.(NUM_WORKERS|PREFETCH|WORKER_TIMEOUT|VAL$|BASEDIR)|TEST\.)"
)
# Settings whose default lets the program choose: a run that is continued keeps what it was told when it began.
_CHOSEN_SETTINGS = (
    "TRAIN.LR_SCHEDULE", "TRAIN.WARMUP", "TRAIN.EVAL_PERIOD", "TRAIN.CHECKPOINT_PERIOD", "TRAIN.PERIOD_STEPS",
)  # fmt: skip
# Settings that follow from the data.
_DERIVED_SETTINGS = ("DATA.NUM_CATEGORY", "DATA.CLASS_NAMES")


# ------------------------------------------------------------------------------------------------------------ settings
def training_settings(
    arguments: Sequence[str], meta: dict[str, Any] | None = None, origin: str = "", trusted: Sequence[str] = ()
) -> Config:
    """Settings of a new run: the defaults, then the network's settings stored with the weights (of `origin`, else of
    BACKBONE.WEIGHTS), then the KEY=VAL arguments. trusted: modules that stored settings may name."""
    stored = (meta or {}).get("settings") or {}
    second = _SECOND_STAGE_SETTINGS if stored.get("MODE_RPN_ONLY") else ()
    stored = {k: v for k, v in stored.items() if _MODEL_SETTINGS.match(k) and k not in second}
    return _settings(arguments, stored, origin, trusted, None, training=True)


def inference_settings(
    arguments: Sequence[str],
    meta: dict[str, Any] | None = None,
    origin: str = "",
    trusted: Sequence[str] = (),
    uses_data: bool = False,
) -> Config:
    """Settings to run a model with: all of those stored with its weights, its classes, then the KEY=VAL arguments.
    trusted: modules that stored settings may name; uses_data: whether the data sets of DATA.VAL will be loaded."""
    meta = meta or {}
    stored = meta.get("settings") or {}
    return _settings(arguments, stored, origin, trusted, meta.get("class_names"), training=False, uses_data=uses_data)


def _settings(
    arguments: Sequence[str],
    stored: dict[str, Any],
    origin: str,
    trusted: Sequence[str],
    class_names: Sequence[str] | None,
    training: bool,
    uses_data: bool = True,
) -> Config:
    cfg = default_config()
    backbone = {} if origin else _settings_of_backbone(arguments)
    cfg.update_from_dict(backbone, "settings stored in BACKBONE.WEIGHTS")
    cfg.update_from_dict(stored, f"settings stored in {origin}")
    if class_names:
        cfg.DATA.CLASS_NAMES, cfg.DATA.NUM_CATEGORY = list(class_names), len(class_names)
    if not training:
        # The stored short edge may be above the limit of the long edge. Lowering it does not change the size of images.
        cfg.PREPROC.TEST_SHORT_EDGE_SIZE = min(cfg.PREPROC.TEST_SHORT_EDGE_SIZE, cfg.PREPROC.MAX_SIZE)
    cfg.update_args(arguments)
    datasets = None if training else cfg.DATA.VAL if uses_data else ()
    check_trust(cfg, arguments, origin or cfg.BACKBONE.WEIGHTS, trusted, datasets)
    cfg = finalize_config(cfg, training)
    for doubt in doubts(cfg, training):
        logger.warning(doubt)
    if any(":" in cfg.get(key) for key in ("BACKBONE.NAME", "FPN.FRCNN_HEAD_FUNC", "FPN.MRCNN_HEAD_FUNC")):
        from model_rcnn import check_own_parts  # imports TensorFlow

        check_own_parts(cfg)
    defaults = default_config()
    taken = [f"{k}={v}" for k, v in backbone.items() if cfg.get(k) == v != defaults.get(k)]
    if taken:
        logger.info(f"settings stored in {cfg.BACKBONE.WEIGHTS}: {', '.join(taken)}")
    return cfg


def _settings_of_backbone(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings stored in the file that the arguments give as BACKBONE.WEIGHTS, if any."""
    path = os.path.expanduser(default_config().update_args(arguments).BACKBONE.WEIGHTS)
    without = path == "package" or path.endswith((".h5", ".hdf5", ".pth"))
    meta = read_meta(path) if os.path.isfile(path) and not without else None
    return {k: v for k, v in ((meta or {}).get("settings") or {}).items() if _BACKBONE_SETTINGS.match(k)}


def with_classes(cfg: Config, weights: dict[str, Any] | None = None, class_names: Sequence[str] = ()) -> Config:
    """Fills in the class names from the settings, else from the data, else numbers. Proposals have one class,
    "object"."""
    if cfg.MODE_RPN_ONLY:
        cfg = cfg.copy()
        cfg.DATA.CLASS_NAMES, cfg.DATA.NUM_CATEGORY = ["object"], 1
        return cfg.freeze()
    if cfg.DATA.CLASS_NAMES and len(cfg.DATA.CLASS_NAMES) == cfg.DATA.NUM_CATEGORY:
        return cfg
    cfg = cfg.copy()
    names = list(cfg.DATA.CLASS_NAMES) or list(class_names)
    count = len(names) or (_class_count_from_weights(cfg, weights) if weights else 0)
    cfg.DATA.CLASS_NAMES = names or [f"class {i + 1}" for i in range(count)]
    cfg.DATA.NUM_CATEGORY = count
    return cfg.freeze()


def _class_count_from_weights(cfg: Config, weights: dict[str, Any]) -> int:
    """Foreground classes of weights without settings, from the classifier's bias."""
    for name in ("fastrcnn/outputs/class/b", "fastrcnn/class/b", "cascade_rcnn_stage1/outputs/class/b"):
        if name in weights:
            return int(weights[name].shape[0]) - 1
    return cfg.DATA.NUM_CATEGORY


# ------------------------------------------------------------------------------------------------------------- weights
class Fitting(NamedTuple):
    """How to treat weights that do not fit the model; without any of these they are refused."""

    trim_heads: bool = False  # initialise the tensors that have entries for each class
    partial: bool = False  # load what fits and initialise the rest
    match_classes: bool = False  # in tensors with entries for each class, keep those of classes with the same name


STRICT = Fitting()


class Model(NamedTuple):
    """A trained model as its files describe it."""

    cfg: Config
    weights: dict[str, Any]
    meta: dict[str, Any] | None
    origin: str


def load_model(
    path: str, arguments: Sequence[str] = (), trusted: Sequence[str] = (), uses_data: bool = False
) -> Model:  # fmt: skip
    """The model to run from a checkpoint, run directory or .npz; its settings are changed by KEY=VAL arguments.
    trusted, uses_data: as for `inference_settings`."""
    weights, meta = load_weights(path, is_model_tensor)
    if meta is None:
        logger.warning(f"{path} contains no settings: the defaults and --config must describe its model")
    cfg = inference_settings(arguments, meta, path, trusted, uses_data)
    return Model(cfg, _of_this_model(weights, cfg, path), meta, path)


def weight_loader(
    weights: dict[str, Any],
    origin: str,
    fitting: Fitting = STRICT,
    expect: str = "all",
    classes: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Callable[[Any], None]:
    """Returns load(sess), which checks the weights against the graph of `sess`, prints a report, and assigns them.

    classes: the names that the weights and the graph have, for `fitting.match_classes`.
    """

    def load(sess: Any) -> None:
        from utils.tf_v1 import tf

        with sess.graph.as_default():
            variables = tf.global_variables()
        shapes = {v.op.name: tuple(v.shape.as_list()) for v in variables}
        given = weights
        shared = has_shared_masks({name: value.shape for name, value in weights.items()})

        def of_classes(name: str) -> bool:
            mask_for_all = shared and name.startswith("maskrcnn/") and weights[name].shape == shapes[name]
            return depends_on_classes(name, shapes[name]) and not mask_for_all

        if fitting.match_classes and classes:
            outputs = [v for v in variables if v.op.name in weights and of_classes(v.op.name)]
            sess.run(tf.variables_initializer(outputs))
            initial = sess.run({v.op.name: v for v in outputs})
            given = {**weights, **{n: keep_classes(n, weights[n], v, *classes) for n, v in initial.items()}}
        values, report = fit_weights(given, shapes, trim=fitting.trim_heads, expect=expect, origin=origin)
        if fitting.trim_heads:  # also if the old and the new data have the same number of classes
            trimmed = [name for name in report.loaded if of_classes(name)]
            report.loaded = [name for name in report.loaded if name not in trimmed]
            report.reinitialised += [(name, shapes[name], shapes[name]) for name in trimmed]
            values = {name: value for name, value in values.items() if name not in trimmed}
        logger.info(f"weights of {origin}\n{report.table()}")
        report.check(allow_partial=fitting.partial)
        if report.missing or report.mismatched or report.reinitialised:
            sess.run(tf.variables_initializer([v for v in variables if v.op.name not in values]))
        assign_weights(sess, values, variables)

    return load


def _of_this_model(weights: dict[str, Any], cfg: Config, origin: str) -> dict[str, Any]:
    """The weights for running or training a model: averaged ones if they exist and TEST.USE_EMA is set; without the
    second stage's if the model has none."""
    weights, count = without_averages(weights, cfg.TEST.USE_EMA)
    if count and cfg.TEST.USE_EMA:
        logger.info(f"{origin}: {count} averaged weights are used; TEST.USE_EMA=False takes those of the last step")
    if not cfg.MODE_RPN_ONLY:
        return weights
    stage = r"^(fastrcnn|maskrcnn|keypointrcnn|cascade_rcnn_stage\d+)/" + ("" if cfg.MODE_FPN else r"|^group3/")
    kept = {name: value for name, value in weights.items() if not re.match(stage, name)}
    if len(kept) < len(weights):
        left = len(weights) - len(kept)
        logger.info(f"{origin}: tensors of the second stage left out because of MODE_RPN_ONLY: {left}")
    return kept


def _completed(weights: dict[str, Any], backbone: dict[str, Any], origin: str, backbone_origin: str) -> dict[str, Any]:
    """Fills backbone tensors missing from `weights` with those of the backbone file (an RPN-only C4 model has no
    stage 5)."""
    added = {k: v for k, v in backbone.items() if k not in weights and re.match(r"(conv0|group\d+|backbone)/", k)}
    if added:
        logger.info(f"backbone tensors missing from {origin} and loaded from {backbone_origin}: {len(added)}")
    return {**added, **weights}


# ----------------------------------------------------------------------------------------------------- a training run
class Request(NamedTuple):
    """A training run as requested on the command line."""

    settings: Sequence[str] = ()  # KEY=VAL
    load: str | None = None  # checkpoint, run directory or .npz to start from
    logdir: str | None = None  # the run directory; None for a new one under train_log/
    resume: bool = False  # continue the run in `logdir` with its own settings
    checkpoint: str | None = None  # the checkpoint of that run to continue from, by default its newest
    fitting: Fitting = STRICT
    trusted: Sequence[str] = ()  # modules that stored settings may name
    find_lr: int | None = None  # look for a learning rate in so many steps, in a new directory


@dataclass
class Start:
    """Everything that a training run needs to start."""

    cfg: Config
    logdir: Path
    step: int = 0
    weights: dict[str, Any] | None = None
    origin: str = ""  # of the weights
    expect: str = "all"  # what the weights must contain
    class_names: Sequence[str] = ()  # of the weights
    meta: dict[str, Any] | None = None  # description of the checkpoint that is continued
    plan: dict[str, Any] | None = None  # the plan of the run that is continued (`TrainingPlan.record`)
    lock: RunLock | None = None

    def loader(self, fitting: Fitting, class_names: Sequence[str]) -> Callable[[Any], None]:
        """Returns load(sess), which assigns the weights, and for a continued run its whole state, after initialisation.

        class_names: the classes of the training data.
        """
        classes = None
        if not self.step and self.class_names and not fitting.trim_heads:
            classes = (list(self.class_names), list(class_names))
            known = sum(n in self.class_names for n in class_names)
            if fitting.match_classes:
                logger.info(f"{self.origin}: {known} of {len(class_names)} classes are kept by their names")
            elif classes[0] != classes[1]:
                how = "in another order" if sorted(classes[0]) == sorted(classes[1]) else f"{known} are the same"
                logger.warning(
                    f"{self.origin} was trained on {len(classes[0])} classes ({_some(classes[0])}), this data has "
                    f"{len(classes[1])} ({_some(classes[1])}; {how}): --match-classes keeps what was learnt about "
                    "classes of the same name, --trim-heads initialises all of them"
                )
        elif fitting.match_classes and not self.step and self.weights is not None and self.expect == "all":
            raise UserError(f"--match-classes: {self.origin} does not name its classes; use --trim-heads")

        def load(sess: Any) -> None:
            from utils.tf_v1 import tf

            if self.weights is not None:
                weight_loader(self.weights, self.origin, fitting, self.expect, classes)(sess)
                if self.step == 0:
                    with sess.graph.as_default():
                        sess.run(tf.train.get_or_create_global_step().initializer)
            start_averages(sess, self.weights or ())

        return load

    def check_data(self, fingerprint: dict[str, Any]) -> None:
        """Warns if the training data has changed since the run began."""
        before = (self.meta or {}).get("data") or {}
        changed = [k.replace("_", " ") for k, v in fingerprint.items() if k in before and before[k] != v]
        if changed:
            count = f"{before.get('images')} images then, {fingerprint['images']} now"
            logger.warning(f"{self.origin}: the training data has changed since ({', '.join(changed)}; {count})")

    def prepare_logdir(self) -> None:
        """Removes log entries later than the checkpoint from which the run continues, so that the logs have every step
        once, and makes that checkpoint the newest."""
        if not self.step:
            return
        log = self.logdir / "log.jsonl"
        if log.exists():
            lines = log.read_text(errors="replace").splitlines()
            again = (self.meta or {}).get("pending_evaluations") or ()  # may have been logged before a kill

            def stays(line: str) -> bool:
                step = _step_of_line(line)
                return step is not None and step <= self.step and (step not in again or '"total_loss"' in line)

            kept = [line for line in lines if stays(line)]
            if len(kept) < len(lines):
                with atomic_write(log) as f:
                    f.writelines(f"{line}\n" for line in kept)
        drop_events_after(self.logdir, self.step)
        drop_pictures_after(self.logdir, self.step)
        if (self.logdir / f"model-{self.step}.index").exists():
            with atomic_write(self.logdir / "checkpoint") as f:
                f.write(f'model_checkpoint_path: "model-{self.step}"\n')


def _step_of_line(line: str) -> int | None:
    """The step of a line of log.jsonl; None for one that a killed process left unfinished."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def data_fingerprint(split: DatasetSplit) -> dict[str, Any]:
    """A fingerprint of a training set: its number of images and digests of its parts."""

    def digest(*keys: str) -> str:
        state = hashlib.blake2b(digest_size=8)
        for key in keys:
            column = split.columns[key]
            for part in column if isinstance(column, tuple) else (column,):
                if part is not None:
                    state.update(str(part.shape).encode())
                    state.update(part.data.cast("B") if part.flags.c_contiguous and part.size else part.tobytes())
        return state.hexdigest()

    return {
        "images": len(split), "image_ids": digest("id"), "image_sizes": digest("sizes"),
        "annotations": digest("boxes", "labels", "crowd", "vertices", "first_object", "first_vertex", "keypoints"),
    }  # fmt: skip


def begin(request: Request) -> Start:
    """Settings, weights and directory of a run, new or continued. The caller releases `Start.lock`."""
    load, fitting = request.load, request.fitting
    weights, meta = load_weights(load, is_model_tensor) if load else (None, None)
    cfg = training_settings(request.settings, meta, load or "", request.trusted)
    logdir = Path(request.logdir or f"train_log/{'find-lr-' * bool(request.find_lr)}{time.strftime('%Y%m%d-%H%M%S')}")
    if request.find_lr and logdir.exists() and any(logdir.iterdir()):
        raise UserError(f"--find-lr never touches a run, and --logdir {logdir} is not empty; choose another directory")
    if request.resume and not logdir.exists():
        raise UserError(f"--resume: there is no run in {logdir}; leave out --resume to start one")
    check_output_folder(logdir, "--logdir")
    lock = RunLock(logdir)
    try:
        cfg, resume_from = _open_logdir(logdir, cfg, request)
        if cfg.TRAIN.SEED is None:  # chosen once, so that the run can be resumed and repeated
            cfg = cfg.copy()
            cfg.TRAIN.SEED = int.from_bytes(os.urandom(3), "little")
            cfg.freeze()
        if resume_from is not None:
            weights, meta = load_weights(resume_from)
            step = stored_step(weights, resume_from)
            plan = (meta or {}).get("plan")
            return Start(cfg, logdir, step, weights, f"{logdir} at step {step}", meta=meta, plan=plan, lock=lock)
        start = Start(cfg, logdir, lock=lock)
        if weights is not None:
            weights = _of_this_model(weights, cfg, str(load))
            # A new run starts with the weights only: momentum and loss scale belong to the old run.
            start.weights = {n: v for n, v in weights.items() if not is_training_state(n)}
            start.origin, start.class_names = str(load), (meta or {}).get("class_names") or ()
        if cfg.BACKBONE.WEIGHTS and (start.weights is None or fitting.partial):
            _add_backbone(start)
        if start.weights is None and cfg.BACKBONE.NORM == "FreezeBN":
            of_batch = cfg.BACKBONE.NAME.startswith("keras:") or cfg.BACKBONE.NAME in NETWORKS
            norm = "SyncBN" if of_batch else "GN"
            logger.warning(
                "BACKBONE.NORM=FreezeBN without weights normalises nothing: give BACKBONE.WEIGHTS or --load, "
                f"or train from scratch with BACKBONE.NORM={norm} BACKBONE.FREEZE_AT=0"
            )
        return start
    except BaseException:
        lock.release()
        raise


def _add_backbone(start: Start) -> None:
    """Weights of BACKBONE.WEIGHTS for a run without weights, or to complete weights with --partial-load."""
    cfg = start.cfg
    stored = _backbone_weights(cfg)
    backbone = _of_this_model(stored, cfg, cfg.BACKBONE.WEIGHTS)
    if start.weights is not None:
        start.weights = _completed(start.weights, backbone, start.origin, cfg.BACKBONE.WEIGHTS)
        return
    if any(re.match(r"(rpn|fastrcnn|cascade_rcnn_stage1)/", name) for name in stored):
        logger.warning(
            f"BACKBONE.WEIGHTS={cfg.BACKBONE.WEIGHTS} is a whole detector: only its backbone is used and the heads "
            "start from random values; --load takes all of it"
        )
    start.weights, start.origin, start.expect = backbone, cfg.BACKBONE.WEIGHTS, "backbone"


def _backbone_weights(cfg: Config) -> dict[str, Any]:
    if cfg.BACKBONE.NAME.startswith("keras:"):
        from model_backbones import load_backbone_weights  # imports TensorFlow

        return load_backbone_weights(cfg)
    path = os.path.expanduser(cfg.BACKBONE.WEIGHTS)
    if cfg.BACKBONE.NAME in NETWORKS and (path == "package" or path.endswith(".pth")):
        return load_torch(cfg.BACKBONE.NAME, package_file(cfg.BACKBONE.NAME) if path == "package" else path)
    return load_weights(path, is_model_tensor)[0]


def begin_with_the_others(request: Request, rank: int) -> Start:
    """`begin` on rank 0, whose settings, step, plan and weights go to all ranks, because other machines may not see its
    files."""
    start = begin(request) if rank == 0 else None
    mine = (start.cfg.to_dict(), start.logdir, start.step, start.plan) if start else None
    flat, logdir, step, plan = ranks.from_first(mine)
    if start:
        return start
    cfg = finalize_config(default_config().update_from_dict(flat, "settings of rank 0"))
    return Start(cfg, logdir, step, plan=plan)


def _open_logdir(logdir: Path, cfg: Config, request: Request) -> tuple[Config, Path | None]:
    """The settings in effect and the directory or checkpoint to continue from.

    A directory is never deleted or overwritten: a run in it is continued, or an error names the options.
    """
    settings = logdir / "settings.json"
    if all(p.name == LOCK_NAME for p in logdir.iterdir()):
        if request.resume:
            raise UserError(f"--resume: there is no run in {logdir}; leave out --resume to start one")
        return cfg, None
    if not settings.exists():
        raise UserError(f"--logdir {logdir} is not empty and contains no run of this program; choose another directory")
    stored = read_description(settings).get("settings") or {}
    newest = newest_checkpoint(logdir)
    before = default_config().update_from_dict(stored, str(settings))
    if request.resume:
        changed_cfg = before.copy().update_args(request.settings)
        check_trust(changed_cfg, request.settings, str(settings), request.trusted)
        cfg = finalize_config(changed_cfg)
        if newest is None:
            return cfg, None
        cfg = _with_classes_of_run(cfg, before, logdir)
        return cfg, _chosen_checkpoint(logdir, request.checkpoint) if request.checkpoint else logdir
    known = finalize_config(before).to_dict()
    if newest is not None:
        cfg = _with_choices_of_run(cfg, known)
    changed = [
        f"{k}: {known.get(k)!r} -> {v!r}"
        for k, v in cfg.to_dict().items()
        if known.get(k) != v and k not in _DERIVED_SETTINGS and not _FREE_SETTINGS.match(k)
    ]
    if changed and newest:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"--logdir {logdir} contains a run with other settings ({'; '.join(changed[:3])}{more}); "
            "continue it with --resume (its settings, changed by --config), or choose another --logdir"
        )
    if newest is None:
        return cfg, None
    if request.load:
        raise UserError(
            f"--logdir {logdir} contains a run: continue it with --resume instead of --load, or choose another --logdir"
        )
    if read_checkpoint_meta(newest) is None:
        logger.warning(f"{newest} has no description beside it; its settings are taken from {settings}")
    return _with_classes_of_run(cfg, before, logdir), logdir


def _with_choices_of_run(cfg: Config, known: dict[str, Any]) -> Config:
    """The settings with what the run was told for those that are left to the program now."""
    cfg = cfg.copy()
    defaults = default_config()
    for key in _CHOSEN_SETTINGS:
        if cfg.get(key) == defaults.get(key):
            cfg.set(key, known[key])
    return cfg.freeze()


def _with_classes_of_run(cfg: Config, before: Config, logdir: Path) -> Config:
    """The settings with the classes of the run; a run cannot be continued with other classes."""
    names, given = list(before.DATA.CLASS_NAMES), list(cfg.DATA.CLASS_NAMES)
    if given and names and given != names:
        raise UserError(
            f"--logdir {logdir} contains a run with other classes ({_some(names)}) than DATA.CLASS_NAMES gives "
            f"({_some(given)}); start a new run with --load {logdir} --match-classes and another --logdir"
        )
    cfg = cfg.copy()
    cfg.DATA.CLASS_NAMES, cfg.DATA.NUM_CATEGORY = names, before.DATA.NUM_CATEGORY
    return cfg.freeze()


def _chosen_checkpoint(logdir: Path, given: str) -> Path:
    """The checkpoint of the run that is given by its step or path."""
    steps = sorted(int(p.stem.split("-")[1]) for p in logdir.glob("model-*.index") if p.stem.split("-")[1].isdigit())
    name = f"model-{given}" if given.isdigit() else re.sub(r"\.(index|meta\.json|data-.*)$", "", Path(given).name)
    if not (logdir / f"{name}.index").exists():
        raise UserError(f"--resume {given}: {logdir} has no such checkpoint; it has those of steps {steps}")
    return logdir / name


def check_plan(start: Start, total_batch: int) -> None:
    """Refuses to continue a run with another total batch, for which the same step is another point of the schedule."""
    before = (start.meta or {}).get("total_batch")
    if before not in (None, total_batch):
        raise UserError(
            f"{start.origin} was trained with a total batch of {before} images and would go on with "
            f"{total_batch}, where a step means something else: keep it with --resume --config "
            f"TRAIN.TOTAL_BATCH={before}, or start a new run with --load {start.logdir}"
        )
