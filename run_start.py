"""What a run starts from: its settings, collected from files and the command line; its weights; its run directory."""

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common import UserError, logger
from config import Config, default_config, doubts, finalize_config
from trust import check_trust
from utils import ranks
from utils.checkpoint import (
    assign_weights,
    fit_weights,
    is_model_tensor,
    load_weights,
    newest_checkpoint,
    read_checkpoint_meta,
    read_description,
    read_meta,
    start_averages,
    stored_step,
    without_averages,
)

__all__ = [
    "STRICT", "Fitting", "Model", "Start", "begin", "begin_with_the_others", "check_plan", "inference_settings",
    "load_model", "training_settings", "weight_loader", "with_classes",
]  # fmt: skip

# Settings that shape the network: taken from the file given to --load also when training.
_MODEL_SETTINGS = re.compile(
    r"^(MODE_|BACKBONE\.(?!WEIGHTS|FREEZE)|FPN\.|CASCADE\.BBOX|RPN\.(ANCHOR_|CELL_|STRIDE_|HEAD_DIM)|FRCNN\.(CLASS_AGN|BBOX_REG|ROI)"
    r"|MRCNN\.HEAD_DIM|KRCNN\.|PREPROC\.PIXEL_)"
)
# Settings that MODE_RPN_ONLY forces, so that a file with it does not say what a whole detector should be.
_SECOND_STAGE_SETTINGS = ("MODE_MASK", "MODE_KEYPOINT", "FPN.CASCADE")
# Settings that belong to pretrained weights of a backbone: taken from the file that BACKBONE.WEIGHTS names.
_BACKBONE_SETTINGS = re.compile(r"^(BACKBONE\.(?!WEIGHTS|FREEZE)|PREPROC\.PIXEL_)")
# Settings that a run may change when it is continued: how long it goes on and what it uses, not what it computes.
_FREE_SETTINGS = re.compile(
    r"^(TRAIN\.(MAX_STEPS|EVAL_PERIOD|CHECKPOINT_PERIOD|KEEP_CHECKPOINTS)|DATA\.(NUM_WORKERS|PREFETCH|VAL$|BASEDIR)|TEST\.)"
)
# Settings that follow from the data.
_DERIVED_SETTINGS = ("DATA.NUM_CATEGORY", "DATA.CLASS_NAMES")


# ------------------------------------------------------------------------------------------------------------ settings
def training_settings(
    arguments: Sequence[str], meta: dict[str, Any] | None = None, origin: str = "", trusted: Sequence[str] = ()
) -> Config:
    """Settings of a new run: the defaults, then those that shape the network as stored with the weights (of `origin`,
    else of BACKBONE.WEIGHTS), then the KEY=VAL arguments. trusted: modules that stored settings may name."""
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
        # A run without evaluations may have stored more. Images come out the same: their long edge limits them.
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
    """What the file that the arguments give as BACKBONE.WEIGHTS says about the network it contains, if anything."""
    path = os.path.expanduser(default_config().update_args(arguments).BACKBONE.WEIGHTS)
    meta = read_meta(path) if os.path.isfile(path) and not path.endswith((".h5", ".hdf5")) else None
    return {k: v for k, v in ((meta or {}).get("settings") or {}).items() if _BACKBONE_SETTINGS.match(k)}


def with_classes(cfg: Config, weights: dict[str, Any] | None = None, class_names: Sequence[str] = ()) -> Config:
    """Fills in the classes: the settings', else the data's, else numbers. Proposals have one class, "object"."""
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
    """What becomes of weights that do not fit the model; without any of these they are refused."""

    trim_heads: bool = False  # initialise the tensors whose size depends on the classes
    partial: bool = False  # load what fits and initialise the rest


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
    weights: dict[str, Any], origin: str, fitting: Fitting = STRICT, expect: str = "all"
) -> Callable[[Any], None]:  # fmt: skip
    """load(sess): checks the weights against the graph of `sess`, prints what became of each, and assigns them."""

    def load(sess: Any) -> None:
        from utils.tf_v1 import tf

        with sess.graph.as_default():
            variables = tf.global_variables()
        shapes = {v.op.name: tuple(v.shape.as_list()) for v in variables}
        values, report = fit_weights(weights, shapes, trim=fitting.trim_heads, expect=expect, origin=origin)
        logger.info(f"weights of {origin}\n{report.table()}")
        report.check(allow_partial=fitting.partial)
        if report.missing or report.mismatched or report.reinitialised:
            sess.run(tf.variables_initializer([v for v in variables if v.op.name not in values]))
        assign_weights(sess, values, variables)

    return load


def _of_this_model(weights: dict[str, Any], cfg: Config, origin: str) -> dict[str, Any]:
    """The weights to run or train a model from: the averaged ones, where there are any and TEST.USE_EMA, and without
    those of the second stage if the model has none."""
    weights, count = without_averages(weights, cfg.TEST.USE_EMA)
    if count and cfg.TEST.USE_EMA:
        logger.info(f"{origin}: {count} averaged weights are used; TEST.USE_EMA=False takes those of the last step")
    if not cfg.MODE_RPN_ONLY:
        return weights
    stage = r"^(fastrcnn|maskrcnn|keypointrcnn|cascade_rcnn_stage\d+)/" + ("" if cfg.MODE_FPN else r"|^group3/")
    kept = {name: value for name, value in weights.items() if not re.match(stage, name)}
    if len(kept) < len(weights):
        left = len(weights) - len(kept)
        logger.info(f"{origin}: {left} tensors of the second stage are left out (MODE_RPN_ONLY)")
    return kept


def _completed(weights: dict[str, Any], backbone: dict[str, Any], origin: str, backbone_origin: str) -> dict[str, Any]:
    """Fills backbone tensors missing from `weights` with those of the backbone file (an RPN-only C4 model has no
    stage 5)."""
    added = {k: v for k, v in backbone.items() if k not in weights and re.match(r"(conv0|group\d+|backbone)/", k)}
    if added:
        logger.info(f"{len(added)} backbone tensors missing from {origin} were loaded from {backbone_origin}")
    return {**added, **weights}


# ----------------------------------------------------------------------------------------------------- a training run
@dataclass
class Start:
    """What a training run starts with."""

    cfg: Config
    logdir: Path
    step: int = 0
    weights: dict[str, Any] | None = None
    origin: str = ""  # of the weights
    expect: str = "all"  # what the weights must contain
    total_batch: int | None = None  # images of each update so far, where that is known

    def loader(self, fitting: Fitting) -> Callable[[Any], None]:
        """load(sess): puts the weights, and for a continued run its whole state, into a session of initial values."""

        def load(sess: Any) -> None:
            from utils.tf_v1 import tf

            if self.weights is not None:
                weight_loader(self.weights, self.origin, fitting, self.expect)(sess)
            if self.step == 0:
                with sess.graph.as_default():
                    sess.run(tf.train.get_or_create_global_step().initializer)
            start_averages(sess, self.weights or ())

        return load


def begin(
    arguments: Sequence[str],
    load: str | None,
    logdir: str | None,
    resume: bool,
    fitting: Fitting = STRICT,
    trusted: Sequence[str] = (),
) -> Start:
    """Settings, weights and directory of a run, new or continued.

    Args:
        arguments: KEY=VAL settings of the command line.
        load: checkpoint, run directory or .npz to start from.
        logdir: the run directory; None for a new one under train_log/.
        resume: continue the run in `logdir` with its own settings.
        trusted: modules that stored settings may name.
    """
    weights, meta = load_weights(load, is_model_tensor) if load else (None, None)
    cfg = training_settings(arguments, meta, load or "", trusted)
    directory = Path(logdir or f"train_log/{time.strftime('%Y%m%d-%H%M%S')}")
    cfg, resume_from = _open_logdir(directory, cfg, arguments, load, resume, trusted)
    if cfg.TRAIN.SEED is None:  # chosen once, so that the run can be resumed and repeated
        cfg = cfg.copy()
        cfg.TRAIN.SEED = int.from_bytes(os.urandom(3), "little")
        cfg.freeze()
    if resume_from is not None:
        weights, meta = load_weights(directory)
        step, total_batch = stored_step(weights, directory), (meta or {}).get("total_batch")
        return Start(cfg, directory, step, weights, f"{directory} at step {step}", total_batch=total_batch)
    weights = weights and _of_this_model(weights, cfg, load)
    if cfg.BACKBONE.WEIGHTS and (weights is None or fitting.partial):
        backbone = _of_this_model(_backbone_weights(cfg), cfg, cfg.BACKBONE.WEIGHTS)
        if weights is None:
            return Start(cfg, directory, 0, backbone, cfg.BACKBONE.WEIGHTS, "backbone")
        weights = _completed(weights, backbone, load, cfg.BACKBONE.WEIGHTS)
    if weights is not None:
        return Start(cfg, directory, 0, weights, load)
    if cfg.BACKBONE.NORM == "FreezeBN":
        norm = "SyncBN" if cfg.BACKBONE.NAME.startswith("keras:") else "GN"
        logger.warning(
            "BACKBONE.NORM=FreezeBN without weights normalises nothing: give BACKBONE.WEIGHTS or --load, "
            f"or train from scratch with BACKBONE.NORM={norm} BACKBONE.FREEZE_AT=0"
        )
    return Start(cfg, directory)


def _backbone_weights(cfg: Config) -> dict[str, Any]:
    if cfg.BACKBONE.NAME.startswith("keras:"):
        from model_backbones import load_backbone_weights  # imports TensorFlow

        return load_backbone_weights(cfg)
    return load_weights(os.path.expanduser(cfg.BACKBONE.WEIGHTS))[0]


def begin_with_the_others(
    arguments: Sequence[str],
    load: str | None,
    logdir: str | None,
    resume: bool,
    fitting: Fitting,
    rank: int,
    trusted: Sequence[str] = (),
) -> Start:
    """As `begin` on rank 0, whose settings, step and weights are everybody's: other machines may not see its files."""
    start = begin(arguments, load, logdir, resume, fitting, trusted) if rank == 0 else None
    flat, directory, step = ranks.from_first((start.cfg.to_dict(), start.logdir, start.step) if start else None)
    if start:
        return start
    return Start(finalize_config(default_config().update_from_dict(flat, "settings of rank 0")), directory, step)


def _open_logdir(
    logdir: Path, cfg: Config, arguments: Sequence[str], load: str | None, resume: bool, trusted: Sequence[str]
) -> tuple[Config, str | None]:
    """The settings in effect and the checkpoint to continue from.

    A directory is never deleted or overwritten: a run in it is continued, or refused with the ways to go on.
    """
    settings = logdir / "settings.json"
    if not logdir.exists() or not any(logdir.iterdir()):
        if resume:
            raise UserError(f"--resume: there is no run in {logdir}; leave out --resume to start one")
        return cfg, None
    if not settings.exists():
        raise UserError(f"--logdir {logdir} is not empty and contains no run of this program; choose another directory")
    stored = read_description(settings).get("settings") or {}
    newest = newest_checkpoint(logdir)
    if resume:
        cfg = default_config().update_from_dict(stored, str(settings)).update_args(arguments)
        check_trust(cfg, arguments, str(settings), trusted)
        return finalize_config(cfg), newest
    before = finalize_config(default_config().update_from_dict(stored, str(settings))).to_dict()
    changed = [
        f"{k}: {before.get(k)!r} -> {v!r}"
        for k, v in cfg.to_dict().items()
        if before.get(k) != v and k not in _DERIVED_SETTINGS and not _FREE_SETTINGS.match(k)
    ]
    if changed and newest:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"--logdir {logdir} contains a run with other settings ({'; '.join(changed[:3])}{more}); "
            "continue it with --resume (its settings, changed by --config), or choose another --logdir"
        )
    if newest and load:
        raise UserError(
            f"--logdir {logdir} contains a run: continue it with --resume instead of --load, or choose another --logdir"
        )
    if newest and read_checkpoint_meta(newest) is None:
        logger.warning(f"{newest} has no description beside it; its settings are taken from {settings}")
    return cfg, newest


def check_plan(start: Start, total_batch: int) -> None:
    """Refuses to continue a run with another total batch, where a step means something else."""
    if start.total_batch not in (None, total_batch):
        raise UserError(
            f"{start.origin} was trained with a total batch of {start.total_batch} images and would go on with "
            f"{total_batch}, where a step means something else: keep it with --resume --config "
            f"TRAIN.TOTAL_BATCH={start.total_batch}, or start a new run with --load {start.logdir}"
        )
