#!/usr/bin/env python3
"""Train, evaluate and run Faster, Mask and Cascade R-CNN. `./train.py --help` explains every flag."""

import argparse
import dataclasses
import os
import re
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "--verbose-tf" in sys.argv:
    os.environ["PACKRCNN_VERBOSE_TF"] = "1"

try:
    from common import UserError, logger, read_json, without_nan, write_json
except ModuleNotFoundError as e:
    sys.exit(f"train.py: the Python package {e.name} is missing here; run `make venv`, then `. .venv/bin/activate`")
from config import Config, default_config, explain, finalize_config
from utils import ranks

# Settings that shape the network: taken from the file given to --load also when training.
_MODEL_SETTINGS = re.compile(
    r"^(MODE_|BACKBONE\.(?!WEIGHTS|FREEZE)|FPN\.|CASCADE\.BBOX|RPN\.(ANCHOR_|CELL_|STRIDE_|HEAD_DIM)|FRCNN\.(CLASS_AGN|BBOX_REG|ROI)"
    r"|MRCNN\.HEAD_DIM|KRCNN\.|PREPROC\.PIXEL_)"
)
# Settings that MODE_RPN_ONLY forces, so that a file with it does not say what a whole detector should be.
_SECOND_STAGE_SETTINGS = ("MODE_MASK", "MODE_KEYPOINT", "FPN.CASCADE")
# Settings that belong to pretrained weights of a backbone: taken from the file that BACKBONE.WEIGHTS names.
_BACKBONE_SETTINGS = re.compile(r"^(BACKBONE\.(?!WEIGHTS|FREEZE)|PREPROC\.PIXEL_)")
# Settings that say where a run goes on or what it may use, not what it computes.
_FREE_SETTINGS = re.compile(
    r"^(TRAIN\.(MAX_STEPS|EVAL_PERIOD|CHECKPOINT_PERIOD|KEEP_CHECKPOINTS)|DATA\.(NUM_WORKERS|PREFETCH|VAL$|BASEDIR)|TEST\.)"
)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a detector, or run one: --predict for pictures, --evaluate for scores.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  ./train.py --config MODE_FPN=True DATA.BASEDIR=~/data/coco BACKBONE.WEIGHTS=R50.npz --logdir train_log/r50-fpn
  ./train.py --resume --logdir train_log/r50-fpn
  ./train.py --predict photo.jpg folder/ --load train_log/r50-fpn --output pictures
  ./train.py --evaluate results.json --load train_log/r50-fpn --config DATA.BASEDIR=~/data/coco""",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VAL",
        help="settings; --print-config lists them",
    )
    parser.add_argument(
        "--load",
        metavar="PATH",
        help="weights to start from or to run: a TensorFlow checkpoint, a run directory (its newest checkpoint) or an "
        ".npz; their settings come along, --config wins",
    )
    parser.add_argument("--logdir", metavar="DIR", help="where a run lives; training in the same one continues it")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --logdir with its own settings, changed by --config",
    )
    parser.add_argument(
        "--partial-load",
        action="store_true",
        help="load what fits and start the rest anew, instead of stopping at a tensor that is missing or differs",
    )
    parser.add_argument(
        "--trim-heads",
        action="store_true",
        help="fine-tune on other classes: re-initialise exactly the tensors whose size depends on the classes",
    )
    parser.add_argument("--predict", nargs="+", metavar="IMAGE", help="images or folders to draw detections on")
    parser.add_argument("--evaluate", metavar="OUT.json", help="score on DATA.VAL and write the results there")
    parser.add_argument(
        "--output", default="predictions", metavar="DIR", help="where --predict writes (default: %(default)s)"
    )
    parser.add_argument("--no-window", action="store_true", help="--predict: never open a window")
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings in effect with explanations and stop"
    )
    parser.add_argument("--verbose-tf", action="store_true", help="show TensorFlow's start-up messages")
    args = parser.parse_args(argv)
    if args.predict and args.evaluate:
        parser.error("--predict and --evaluate exclude each other")
    if (args.predict or args.evaluate) and not (args.load or args.logdir):
        parser.error("--predict and --evaluate need --load")
    if args.resume and not args.logdir:
        parser.error("--resume needs --logdir")
    if args.resume and args.load:
        parser.error("--resume continues the newest checkpoint of --logdir; leave out --load")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 something the user can fix, 3 the loss is not finite, 4 another rank ended,
    130/143 stopped by a signal after saving, 1 anything else."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if args.print_config:
            print(explain(_settings(args, *_load(args))[0]))
        elif args.predict:
            predict(args)
        elif args.evaluate:
            evaluate(args)
        else:
            return train(args)
    except UserError as e:
        logger.error(str(e))
        return 2
    except FloatingPointError as e:
        logger.error(str(e))
        return 3
    except ranks.LostRank as e:
        logger.error(str(e))
        return 4
    except BrokenPipeError:
        return 1
    return 0


# ------------------------------------------------------------------------------------------------------------ settings
def _load(args: argparse.Namespace) -> tuple[dict | None, dict | None]:
    """(weights, meta) of --load, or (None, None)."""
    if not args.load:
        return None, None
    from utils.checkpoint import load_weights

    return load_weights(args.load)


def _settings(args: argparse.Namespace, weights: dict | None, meta: dict | None) -> tuple[Config, dict | None]:
    """Defaults, then the settings stored with the weights (--load, else BACKBONE.WEIGHTS), then --config."""
    cfg = default_config()
    backbone = {} if weights else _settings_of_backbone(args)
    cfg.update_from_dict(backbone, "settings stored in BACKBONE.WEIGHTS")
    if meta:
        training = not (args.predict or args.evaluate)
        stored = meta.get("settings") or {}
        if training:
            second = _SECOND_STAGE_SETTINGS if stored.get("MODE_RPN_ONLY") else ()
            stored = {k: v for k, v in stored.items() if _MODEL_SETTINGS.match(k) and k not in second}
        cfg.update_from_dict(stored, f"settings stored in {args.load}")
        if not training and meta.get("class_names"):
            cfg.DATA.CLASS_NAMES = list(meta["class_names"])
            cfg.DATA.NUM_CATEGORY = len(meta["class_names"])
    cfg = finalize_config(cfg.update_args(args.config))
    if cfg.BACKBONE.NAME != "resnet":
        from model_backbones import check_backbone

        check_backbone(cfg)
    defaults = default_config()
    taken = [f"{k}={v}" for k, v in backbone.items() if cfg.get(k) == v != defaults.get(k)]
    if taken:
        logger.info(f"settings stored in {cfg.BACKBONE.WEIGHTS}: {', '.join(taken)}")
    return cfg, meta


def _settings_of_backbone(args: argparse.Namespace) -> dict[str, Any]:
    """What the file that --config gives as BACKBONE.WEIGHTS says of the network it holds, if anything."""
    from utils.checkpoint import load_weights

    path = os.path.expanduser(default_config().update_args(args.config).BACKBONE.WEIGHTS)
    meta = load_weights(path)[1] if os.path.isfile(path) and not path.endswith((".h5", ".hdf5")) else None
    return {k: v for k, v in ((meta or {}).get("settings") or {}).items() if _BACKBONE_SETTINGS.match(k)}


# ------------------------------------------------------------------------------------------------------------- running
def _weight_loader(weights: dict, origin: str, args: argparse.Namespace, expect: str = "all") -> Callable[[Any], None]:
    """load(sess): checks the weights against the graph of `sess`, prints what became of each, and assigns them."""
    from utils.checkpoint import assign_weights, fit_weights
    from utils.tf_v1 import tf

    def load(sess: Any) -> None:
        with sess.graph.as_default():
            variables = tf.global_variables()
        shapes = {v.op.name: tuple(v.shape.as_list()) for v in variables}
        values, report = fit_weights(weights, shapes, trim=args.trim_heads, expect=expect, origin=origin)
        logger.info(f"weights of {origin}\n{report.table()}")
        report.check(allow_partial=args.partial_load)
        if report.missing or report.mismatched or report.reinitialised:
            sess.run(tf.variables_initializer([v for v in variables if v.op.name not in values]))
        assign_weights(sess, values, variables)

    return load


def _of_this_model(weights: dict, cfg: Config, origin: str) -> dict:
    """The weights to run or train a model from: the averaged ones, where there are any and TEST.USE_EMA, and without
    those of the second stage if the model has none."""
    from utils.checkpoint import without_averages

    weights, count = without_averages(weights, cfg.TEST.USE_EMA)
    if count and cfg.TEST.USE_EMA:
        logger.info(f"{origin}: {count} averaged weights are used; TEST.USE_EMA=False takes those of the last step")
    if not cfg.MODE_RPN_ONLY:
        return weights
    stage = r"^(fastrcnn|maskrcnn|keypointrcnn|cascade_rcnn_stage\d+)/" + ("" if cfg.MODE_FPN else r"|^group3/")
    kept = {name: value for name, value in weights.items() if not re.match(stage, name)}
    if len(kept) < len(weights):
        left = len(weights) - len(kept)
        logger.info(f"{origin}: {left} of its tensors belong to the second stage and are left out (MODE_RPN_ONLY)")
    return kept


def _completed(weights: dict, backbone: dict, origin: str, backbone_origin: str) -> dict:
    """The weights, and of the backbone's those that they lack: an RPN of a C4 model has no last stage."""
    added = {k: v for k, v in backbone.items() if k not in weights and re.match(r"(conv0|group\d+|backbone)/", k)}
    if added:
        logger.info(f"{len(added)} of the backbone's tensors, which {origin} lacks, come from {backbone_origin}")
    return {**added, **weights}


def build_predictor(cfg: Config, load: Callable[[Any], None], meta: dict | None = None):
    """The predictor that TEST asks for; meta: what came with the weights."""
    if cfg.TEST.AUG_SHORT_EDGES:
        from tta import AugmentedPredictor

        sizes = ", ".join(map(str, cfg.TEST.AUG_SHORT_EDGES))
        logger.info(f"each image in views of short edge {sizes}{', mirrored too' * cfg.TEST.AUG_FLIP}")
        return AugmentedPredictor(cfg, load, _keypoint_flip(cfg, meta))
    from inference import Predictor

    return Predictor(cfg, load)


def _keypoint_flip(cfg: Config, meta: dict | None) -> list[int]:
    """The keypoint that each of the model's becomes in a mirrored image; [] where that is not known nor needed."""
    from dataset_build import COCO_KEYPOINTS, mirrored_keypoints

    count = cfg.KRCNN.NUM_KEYPOINT
    if not (cfg.MODE_KEYPOINT and cfg.TEST.AUG_FLIP):
        return []
    known = (meta or {}).get("keypoint_flip") or []
    if len(known) != count and count == len(COCO_KEYPOINTS):
        known = mirrored_keypoints([], count).tolist()
    if len(known) != count:
        raise UserError(
            f"TEST.AUG_FLIP=True: the weights do not say which of their {count} keypoints are left and right; set "
            "TEST.AUG_FLIP=False"
        )
    return known


def _load_model(args: argparse.Namespace) -> tuple[Config, dict, dict | None]:
    """The settings, weights and meta of the model to run."""
    args.load = args.load or args.logdir
    weights, meta = _load(args)
    if meta is None:
        logger.warning(f"{args.load} carries no settings: the defaults and --config must describe its model")
    cfg = _settings(args, weights, meta)[0]
    return cfg, _of_this_model(weights, cfg, args.load), meta


def _class_count_from_weights(cfg: Config, weights: dict) -> int:
    """Foreground classes of weights without settings, from the classifier's bias."""
    for name in ("fastrcnn/outputs/class/b", "fastrcnn/class/b", "cascade_rcnn_stage1/outputs/class/b"):
        if name in weights:
            return int(weights[name].shape[0]) - 1
    return cfg.DATA.NUM_CATEGORY


def predict(args: argparse.Namespace) -> None:
    from data import inference_batches, list_images
    from detections import to_original_frame
    from viz import prediction_entry, show_window, write_prediction

    files = list_images(args.predict)
    cfg, weights, meta = _load_model(args)
    cfg = _with_classes(cfg, weights, [])
    logger.info(f"{len(files)} images; building the model")
    predictor = build_predictor(cfg, _weight_loader(weights, args.load, args), meta)
    category_ids = (meta or {}).get("category_ids") or []
    # Other classes were given by --config, or none matter.
    if len(category_ids) != cfg.DATA.NUM_CATEGORY or cfg.MODE_RPN_ONLY:
        category_ids = None
    entries, started = [], time.time()
    for batch in inference_batches(files, cfg, (0, 1)):
        outputs = predictor(batch["image"], batch["image_shape"])
        for n, index in enumerate(batch["indices"]):
            one = {k: v[n] for k, v in outputs.items()}
            detections = to_original_frame(one, batch["image_shape"][n], batch["original_shapes"][n])
            path = write_prediction(
                args.output, files[index], detections, cfg.DATA.CLASS_NAMES, cfg.TEST.RESULT_SCORE_THRESH_VIS
            )
            size = batch["original_shapes"][n]
            entries.append(prediction_entry(files[index], size, detections, cfg.DATA.CLASS_NAMES, category_ids))
            shown = int((detections.scores >= cfg.TEST.RESULT_SCORE_THRESH_VIS).sum())
            rate = (time.time() - started) / len(entries)
            logger.info(f"{len(entries)}/{len(files)} {path}: {shown} objects ({rate:.2f} s/image)")
            if not args.no_window and len(files) == 1:
                show_window(path)
    target = Path(args.output) / "predictions.json"
    write_json(target, entries, indent=1)
    logger.info(f"pictures in {args.output}/, everything found in {target}")


def _with_classes(cfg: Config, weights: dict | None, splits: list) -> Config:
    """Fills in the classes: the checkpoint's, else the data's, else numbers. Proposals are of one class, "object"."""
    if cfg.MODE_RPN_ONLY:
        cfg = cfg.copy()
        cfg.DATA.CLASS_NAMES, cfg.DATA.NUM_CATEGORY = ["object"], 1
        return cfg.freeze()
    if cfg.DATA.CLASS_NAMES and len(cfg.DATA.CLASS_NAMES) == cfg.DATA.NUM_CATEGORY:
        return cfg
    cfg = cfg.copy()
    names = list(cfg.DATA.CLASS_NAMES) or (list(splits[0].class_names) if splits else [])
    count = len(names) or (_class_count_from_weights(cfg, weights) if weights else 0)
    cfg.DATA.CLASS_NAMES = names or [f"class {i + 1}" for i in range(count)]
    cfg.DATA.NUM_CATEGORY = count
    return cfg.freeze()


def evaluate(args: argparse.Namespace) -> None:
    from dataset import load_validation_splits
    from eval import write_results
    from predict import evaluate_split

    cfg, weights, meta = _load_model(args)
    splits = load_validation_splits(cfg)
    if not splits:
        raise UserError("--evaluate: DATA.VAL names no data set; give one, e.g. --config DATA.VAL=coco_val2017")
    cfg = _with_classes(cfg, weights, splits)
    rank, size = ranks.start()
    predictor = build_predictor(cfg, _weight_loader(weights, args.load, args), meta)
    out = Path(args.evaluate)
    every = {}
    for split in splits:
        path = out if len(splits) == 1 else out.with_name(f"{out.stem}-{split.name}{out.suffix or '.json'}")
        with ranks.lost_rank_in_one_line(size):
            results = evaluate_split(predictor, split, cfg, (rank, size), ranks.gather if size > 1 else None)
        if rank > 0:
            continue
        write_results(path, results)
        logger.info(f"{split.name}: {len(results)} {'proposals' if cfg.MODE_RPN_ONLY else 'detections'} in {path}")
        # Data sets whose challenge takes another format.
        if hasattr(split, "write_submission") and not cfg.MODE_RPN_ONLY:
            logger.info(f"for submission: {', '.join(split.write_submission(path, results))}")
        metrics = _score(split, results, cfg)
        every.update(metrics if len(splits) == 1 else {f"{split.name}/{k}": v for k, v in metrics.items()})
    if rank == 0:
        target = out.with_name(f"{out.stem}.metrics.json")
        write_json(target, without_nan(every), indent=1)
        logger.info(f"scores in {target}")


def _score(split: Any, results: list[dict], cfg: Config) -> dict[str, float]:
    """By the data set's own protocol, or the recall of proposals."""
    from eval import evaluate_proposals

    return evaluate_proposals(split, results) if cfg.MODE_RPN_ONLY else split.evaluate(results)


# ------------------------------------------------------------------------------------------------------------ training
def _open_logdir(args: argparse.Namespace, cfg: Config) -> tuple[Path, Config, str | None]:
    """The run directory, the settings in force, and the checkpoint to continue from.

    A directory is never deleted or overwritten: a run in it is continued, or refused with the ways to go on.
    """
    from utils.checkpoint import newest_checkpoint, read_checkpoint_meta

    logdir = Path(args.logdir or f"train_log/{time.strftime('%Y%m%d-%H%M%S')}")
    settings = logdir / "settings.json"
    if not logdir.exists() or not any(logdir.iterdir()):
        if args.resume:
            raise UserError(f"--resume: there is no run in {logdir}; leave out --resume to start one")
        return logdir, cfg, None
    if not settings.exists():
        raise UserError(f"--logdir {logdir} is not empty and holds no run of this program; choose another directory")
    stored = read_json(settings, "settings of the run")["settings"]
    newest = newest_checkpoint(logdir)
    if args.resume:
        cfg = default_config().update_from_dict(stored, str(settings)).update_args(args.config)
        return logdir, finalize_config(cfg), newest
    before = finalize_config(default_config().update_from_dict(stored, str(settings))).to_dict()
    derived = ("DATA.NUM_CATEGORY", "DATA.CLASS_NAMES")
    changed = [
        f"{k}: {before.get(k)!r} -> {v!r}"
        for k, v in cfg.to_dict().items()
        if before.get(k) != v and k not in derived and not _FREE_SETTINGS.match(k)
    ]
    if changed and newest:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"--logdir {logdir} holds a run with other settings ({'; '.join(changed[:3])}{more}); "
            "continue it with --resume (its settings, changed by --config), or choose another --logdir"
        )
    if newest and args.load:
        raise UserError(
            f"--logdir {logdir} holds a run: continue it with --resume instead of --load, or choose another --logdir"
        )
    if newest and read_checkpoint_meta(newest) is None:
        logger.warning(f"{newest} has no description beside it; its settings are taken from {settings}")
    return logdir, cfg, newest


@dataclasses.dataclass
class _Start:
    """What a run begins with."""

    cfg: Config
    logdir: Path
    step: int = 0
    weights: dict | None = None
    origin: str = ""  # of the weights
    expect: str = "all"  # what the weights must hold
    total_batch: int | None = None  # images of each update so far, where that is known


def _begin(args: argparse.Namespace) -> _Start:
    """From the command line, and from the run directory where it holds a run."""
    from utils.checkpoint import load_weights

    weights, meta = _load(args)
    cfg, _ = _settings(args, weights, meta)
    logdir, cfg, resume_from = _open_logdir(args, cfg)
    if cfg.TRAIN.SEED is None:  # chosen once, so that the run can be resumed and repeated
        cfg = cfg.copy()
        cfg.TRAIN.SEED = int.from_bytes(os.urandom(3), "little")
        cfg.freeze()
    if resume_from is not None:
        weights, meta = load_weights(logdir)
        step, total_batch = int(weights["global_step"]), (meta or {}).get("total_batch")
        return _Start(cfg, logdir, step, weights, f"{logdir} at step {step}", total_batch=total_batch)
    weights = weights and _of_this_model(weights, cfg, args.load)
    if cfg.BACKBONE.WEIGHTS and (weights is None or args.partial_load):
        if cfg.BACKBONE.NAME.startswith("keras:"):
            from model_backbones import load_backbone_weights

            backbone = load_backbone_weights(cfg)
        else:
            backbone, _ = load_weights(os.path.expanduser(cfg.BACKBONE.WEIGHTS))
        backbone = _of_this_model(backbone, cfg, cfg.BACKBONE.WEIGHTS)
        if weights is None:
            return _Start(cfg, logdir, 0, backbone, cfg.BACKBONE.WEIGHTS, "backbone")
        weights = _completed(weights, backbone, args.load, cfg.BACKBONE.WEIGHTS)
    if weights is not None:
        return _Start(cfg, logdir, 0, weights, args.load)
    if cfg.BACKBONE.NORM == "FreezeBN":
        norm = "SyncBN" if cfg.BACKBONE.NAME.startswith("keras:") else "GN"
        logger.warning(
            "BACKBONE.NORM=FreezeBN without weights normalises nothing: give BACKBONE.WEIGHTS or --load, "
            f"or train from scratch with BACKBONE.NORM={norm} BACKBONE.FREEZE_AT=0"
        )
    return _Start(cfg, logdir)


def _begin_with_the_others(args: argparse.Namespace, rank: int) -> _Start:
    """As `_begin` on rank 0, whose settings, step and weights are everybody's: other machines may not see its files."""
    start = _begin(args) if rank == 0 else None
    flat, logdir, step = ranks.from_first((start.cfg.to_dict(), start.logdir, start.step) if start else None)
    if start:
        return start
    return _Start(finalize_config(default_config().update_from_dict(flat, "settings of rank 0")), logdir, step)


def train(args: argparse.Namespace) -> int:
    started = time.time()
    rank, size = ranks.start()
    with ranks.lost_rank_in_one_line(size):
        return _train(args, rank, size, started)


def _train(args: argparse.Namespace, rank: int, size: int, started: float) -> int:
    chief = rank == 0
    start = _begin(args) if size == 1 else _begin_with_the_others(args, rank)
    cfg, logdir = start.cfg, start.logdir
    if size > 1 and cfg.TRAINER != "horovod":
        raise UserError(f"{size} processes were launched to train together, which needs --config TRAINER=horovod")

    from data import batch_image_ids, training_keys
    from data_check import quick_check
    from data_workers import training_dataflow
    from dataset import class_count_table, load_training_split, load_validation_splits

    split = load_training_split(cfg)
    cfg = _training_classes(cfg, split)
    validation = load_validation_splits(cfg) if cfg.TRAIN.EVAL_PERIOD else []
    for data in (split, *validation):
        quick_check(data)
    if size > 1:
        mine = len(split), zlib.crc32(split.image_sizes().tobytes())
        if ranks.from_first(mine) != mine:
            raise UserError(f"rank {rank} finds {len(split)} other training images than rank 0: copy DATA.BASEDIR anew")
    logger.info(f"{len(split)} training images of {', '.join(cfg.DATA.TRAIN)}\n{class_count_table(split)}")

    from training import Interrupted, local_devices, make_plan, make_trainer, run_training
    from utils.checkpoint import make_meta, start_averages

    devices = local_devices(cfg)
    plan = make_plan(cfg, size * len(devices), len(split))
    trainer = make_trainer(cfg, plan, devices)
    if chief:
        logger.info(f"plan\n{plan.table(cfg)}")
        if plan.warning(cfg):
            logger.warning(plan.warning(cfg))
    if start.total_batch not in (None, plan.total_batch):
        raise UserError(
            f"{start.origin} was trained with a total batch of {start.total_batch} images and would go on with "
            f"{plan.total_batch}, where a step means something else: keep it with --resume --config "
            f"TRAIN.TOTAL_BATCH={start.total_batch}, or start a new run with --load {logdir}"
        )
    if start.step >= plan.total_steps:
        # Not an error: a job that is killed after its last step, and started again by itself, has nothing left to do.
        if chief:
            more = "raise TRAIN.MAX_STEPS or TRAIN.LR_SCHEDULE to train longer"
            logger.info(f"{logdir} has finished its {start.step} steps; {more}")
            if validation and not (logdir / "metrics.json").exists():
                logger.warning(f"its model is not scored yet: ./train.py --evaluate results.json --load {logdir}")
        return 0
    if start.step:
        logger.info(f"continuing {start.origin}")
    run_meta = make_meta(cfg.to_dict(), cfg.DATA.CLASS_NAMES, start.step)
    run_meta["total_batch"] = plan.total_batch
    run_meta["category_ids"] = [split.label_to_category_id(i + 1) for i in range(len(split.class_names))]
    if cfg.MODE_KEYPOINT:
        run_meta["keypoint_flip"] = split.keypoint_flip.tolist()
    if chief:
        logdir.mkdir(parents=True, exist_ok=True)
        write_json(logdir / "settings.json", run_meta, indent=1)

    def load(sess: Any) -> None:
        if start.weights is not None:
            _weight_loader(start.weights, start.origin, args, start.expect)(sess)
        if start.step == 0:
            from utils.tf_v1 import tf

            with sess.graph.as_default():
                sess.run(tf.train.get_or_create_global_step().initializer)
        start_averages(sess, start.weights or ())

    per_step = plan.accumulation * len(devices)
    dataflow = training_dataflow(
        split, cfg, start_batch=start.step * per_step, shard=(rank, size), batches_per_step=per_step
    )

    def describe_batch(step: int) -> str:
        ids = batch_image_ids(split, cfg, (step - 1) * per_step, per_step, (rank, size))
        return ", ".join(map(str, ids))

    try:
        metrics = run_training(
            cfg, plan, dataflow, training_keys(cfg), devices, trainer, logdir, run_meta, load,
            describe_batch, _evaluation_builder(cfg, validation, devices, trainer, rank, size) if validation else None,
        )  # fmt: skip
    except Interrupted as e:
        if chief:
            logger.warning(f"stopped by {e}; continue with: ./train.py --resume --logdir {logdir}")
        return 128 + e.signal_number
    if chief:
        if metrics:
            write_json(logdir / "metrics.json", without_nan(metrics), indent=1)
        logger.info(
            f"finished {plan.total_steps} steps in {(time.time() - started) / 60:.1f} min; the model is {logdir}"
        )
    return 0


def _training_classes(cfg: Config, split: Any) -> Config:
    cfg = cfg.copy()
    cfg.DATA.CLASS_NAMES = list(split.class_names)
    cfg.DATA.NUM_CATEGORY = len(split.class_names)
    return cfg.freeze()


def _evaluation_builder(
    cfg: Config, splits: list, devices: list[str], trainer: Any, rank: int, size: int
) -> Callable[[], Callable[[Any], dict[str, float]]]:
    """build() adds one inference graph per replica, sharing its variables -> evaluate(sess) -> metrics."""
    from inference import inference_callable
    from predict import evaluate_split

    if cfg.TEST.AUG_SHORT_EDGES:
        if rank == 0:
            logger.info("evaluations while training look once at each image; --evaluate heeds TEST.AUG_SHORT_EDGES")
        cfg = cfg.copy()
        cfg.TEST.AUG_SHORT_EDGES = []
        cfg.freeze()

    def build() -> Callable[[Any], dict[str, float]]:
        attach = [
            inference_callable(cfg, device if len(devices) > 1 else None, f"tower{i}" if i else "", reuse=True)
            for i, device in enumerate(devices)
        ]

        def evaluate(sess: Any) -> dict[str, float]:
            predictors = [a(sess) for a in attach]
            metrics = {}
            for split in splits:
                results = evaluate_split(predictors, split, cfg, (rank, size), ranks.gather if size > 1 else None)
                if rank == 0:
                    scores = _score(split, results, cfg)
                    metrics.update(scores if len(splits) == 1 else {f"{split.name}/{k}": v for k, v in scores.items()})
            return metrics

        return evaluate

    return build


if __name__ == "__main__":
    sys.exit(main())
