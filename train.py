#!/usr/bin/env python3
"""Train, evaluate and run Faster, Mask and Cascade R-CNN. `./train.py --help` explains every flag."""

import argparse
import os
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # until `main` has its own handlers
        signal.signal(number, lambda n, _: (os.write(2, b"train.py: stopped before it began\n"), os._exit(128 + n)))
    if "--verbose-tf" in sys.argv:
        os.environ["PACKRCNN_VERBOSE_TF"] = "1"

# Modules that import TensorFlow are imported late, after errors in the command line and in files were reported.
try:
    from command_line import parse_args, warn_without_effect
    from common import (
        UserError,
        check_output_file,
        check_output_folder,
        git_revision,
        logger,
        project_version,
        without_nan,
        write_json,
    )
    from config import Config, explain
    from config_files import settings_words
    from config_recipes import listing, recipe_settings
    from data import batch_images, list_images, training_keys
    from data_check import quick_check
    from data_workers import training_dataflow
    from dataset import class_count_table, load_training_split, load_validation_splits
    from dataset_split import DatasetSplit
    from eval import write_results
    from predict_devices import inference_devices
    from predict_tiles import in_tiles
    from predict_video import open_views, predict_videos
    from replay import replay
    from report import write_report
    from report_files import problem_of_split
    from run_start import (
        Fitting,
        Request,
        Start,
        begin,
        begin_with_the_others,
        check_plan,
        data_fingerprint,
        inference_settings,
        load_model,
        training_settings,
        weight_loader,
        with_classes,
    )
    from training_async import check_device
    from training_best import Scores, check_metrics, make_rule, shown_score
    from training_find_batch import find_batch, outcome
    from training_trackers import check_trackers
    from trust import trust_options
    from utils import ranks
    from utils.checkpoint import best_score, make_meta, newest_step, read_meta
    from utils.processor import computes_bfloat16
    from utils.stopping import Stopped, stop_by_exception
    from video_options import VideoOptions, idle_options, video_options
    from video_source import find_sources, open_source
    from viz import Drawing, Style
except ModuleNotFoundError as e:
    sys.exit(f"train.py: the Python package {e.name} is missing; run `make venv`, then `. .venv/bin/activate`")


# Shorter runs are over before an estimate of their time would help.
LONG_ENOUGH = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 an error that the user can fix, 3 values are not finite, 4 another rank ended, 129/130/143
    stopped by a signal after saving, 1 any other error."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    fitting = Fitting(args.trim_heads, args.partial_load, args.match_classes)
    try:
        with stop_by_exception():
            return _run(args, fitting)
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
    except KeyboardInterrupt as e:
        if isinstance(e, Stopped):
            logger.warning(f"stopped by {e}; there was nothing to save yet")
            return 128 + e.number
        logger.warning("stopped by a second Ctrl-C, without saving")
        return 128 + signal.SIGINT


def _run(args: argparse.Namespace, fitting: Fitting) -> int:
    if args.version:
        print_version()
        return 0
    if args.recipe == "list":
        print(listing())
        return 0
    if args.recipe:
        logger.info(f"recipe {args.recipe}: {' '.join(recipe_settings(args.recipe))}")
    args.config = settings_words(args.config, args.trust_code, args.recipe)
    if args.print_config:
        print_config(args)
    else:
        warn_without_effect(args)
        if args.replay:
            return replay(Path(args.replay), args.config, args.trust_code)
        model, output = args.load or args.logdir, args.output or "predictions"
        if args.predict:
            style = Style(args.draw, args.contour, args.colors, smallest=320)
            drawing = Drawing(style, args.truth, args.cut_outs)
            window, videos = not args.no_window, video_options(args)
            instead = "benchmark" if args.benchmark else "raw" if args.raw else ""
            return predict(
                args.predict, model, args.config, output, window, fitting, args.trust_code, drawing, videos, instead
            )
        elif args.find_batch:
            plan_batch(args)
        elif args.evaluate:
            evaluate(Path(args.evaluate), model, args.config, fitting, args.report, args.trust_code)
        else:
            checkpoint = args.resume if isinstance(args.resume, str) else None
            resume, trusted = bool(args.resume), args.trust_code
            settings = [*args.config, "TRAIN.EVAL_PERIOD=0"] if args.find_lr else args.config
            return train(Request(settings, args.load, args.logdir, resume, checkpoint, fitting, trusted, args.find_lr))
    return 0


def print_version() -> None:
    revision = git_revision()
    print(f"packrcnn {project_version()}" + (f" (git {revision})" if revision != "unknown" else ""))


def print_config(args: argparse.Namespace) -> None:
    meta = read_meta(args.load) if args.load else None
    if args.predict or args.evaluate:
        cfg = inference_settings(args.config, meta, args.load or "", args.trust_code, uses_data=bool(args.evaluate))
    else:
        cfg = training_settings(args.config, meta, args.load or "", args.trust_code)
    print(explain(cfg))


def plan_batch(args: argparse.Namespace) -> None:
    """--find-batch: prints which batches fit, and how fast they train."""
    meta = read_meta(args.load) if args.load else None
    cfg = training_settings(args.config, meta, args.load or "", args.trust_code)
    limit = None if args.memory_limit is None else int(args.memory_limit * 1e9)
    print(outcome(find_batch(cfg, args.find_batch, limit)))


# ------------------------------------------------------------------------------------------------------------- running
def predict(
    images: Sequence[str],
    load: str,
    settings: Sequence[str],
    output: str,
    window: bool,
    fitting: Fitting,
    trusted: Sequence[str],
    drawing: Drawing = Drawing(),  # noqa: B008
    videos: VideoOptions = VideoOptions(),  # noqa: B008
    instead: str = "",
) -> int:
    """Runs the model on images, on all images of folders and on videos, and draws its detections; returns the exit
    code. instead: "benchmark" measures the time that it takes, "raw" draws proposals and scores of several classes."""
    check_output_folder(output, "--output")
    images, sources = find_sources(images, videos.frames)
    files = list_images(images) if images else []
    if not sources and (idle := idle_options(videos)):
        logger.warning(f"without effect on images: {', '.join(idle)}")
    if instead and sources:
        raise UserError(f"--{instead} takes images and folders of them, not videos: {sources[0].name}")
    if sources and (idle := ["--truth"] * bool(drawing.truth) + ["--cut-outs"] * bool(drawing.cut_outs)):
        logger.warning(f"without effect on videos: {', '.join(idle)}")
    opened = [open_source(source, videos.fps) for source in sources]  # so that errors come before expensive work
    model = load_model(load, settings, trusted)
    if instead == "raw":
        from predict_raw import RawReader, predict_raw

        predict_raw(RawReader(model, fitting), files, output)
        return 0

    from predict import LoadedPredictor, predict_files

    if instead == "benchmark":
        from predict_benchmark import benchmark_files

        benchmark_files(LoadedPredictor(model, fitting), files, output)
        return 0

    views = open_views(videos if sources else VideoOptions())
    try:
        what = [f"{len(files)} images"] * bool(files) + [s.name for s in sources[:5]] + ["…"] * (len(sources) > 5)
        logger.info(f"{', '.join(what)}; building the model")
        one_by_one = videos.realtime or all(o.live for o in opened)  # each frame is predicted as it comes
        several = bool(files) or in_tiles(model.cfg) or not one_by_one
        predictor = LoadedPredictor(model, fitting, all_devices=several)
        if files:
            predict_files(predictor, files, output, window, drawing)
        return predict_videos(predictor, sources, output, videos, drawing.style, views, load)
    finally:
        views.close()


def evaluate(
    out: Path,
    load: str,
    settings: Sequence[str],
    fitting: Fitting,
    report: str | None = None,
    trusted: Sequence[str] = (),
) -> None:
    """Scores the model on each data set of DATA.VAL; report: a folder for an evaluation report."""
    check_output_file(out, "--evaluate")
    if report:
        check_output_folder(report, "--report")
    model = load_model(load, settings, trusted, uses_data=True)
    if report and model.cfg.MODE_RPN_ONLY:
        raise UserError("--report: a report needs detections, but MODE_RPN_ONLY gives proposals; leave --report out")
    splits = load_validation_splits(model.cfg)
    if not splits:
        raise UserError("--evaluate: DATA.VAL names no data set; give one, e.g. --config DATA.VAL=coco_val2017")
    cfg = with_classes(model.cfg, model.weights, splits[0].class_names)

    from predict import build_predictor, evaluate_split, score

    rank, size = ranks.start()
    load_weights = weight_loader(model.weights, model.origin, fitting)
    predictors = [build_predictor(cfg, load_weights, model.meta, d) for d in inference_devices(cfg, size)]
    every: dict[str, float] = {}
    unreadable: list[str] = []
    for split in splits:
        path = out if len(splits) == 1 else out.with_name(f"{out.stem}-{split.name}{out.suffix or '.json'}")
        with ranks.lost_rank_in_one_line(size):
            gather = ranks.gather if size > 1 else None
            results = evaluate_split(predictors, split, cfg, (rank, size), gather, unreadable=unreadable)
        if rank > 0:
            continue
        write_results(path, results)
        logger.info(f"{split.name}: {len(results)} {'proposals' if cfg.MODE_RPN_ONLY else 'detections'} in {path}")
        # Data sets with a submission format of their own.
        if hasattr(split, "write_submission") and not cfg.MODE_RPN_ONLY:
            logger.info(f"for submission: {', '.join(split.write_submission(path, results))}")
        metrics = score(split, results, cfg)
        every.update(metrics if len(splits) == 1 else {f"{split.name}/{k}": v for k, v in metrics.items()})
        target = out.with_name(f"{out.stem}.metrics.json")
        write_json(target, without_nan(every), indent=1)  # before the report, which may fail
        logger.info(f"scores in {target}")
        if report:
            write_split_report(split, results, path.stem, cfg, Path(report) / ("" if len(splits) == 1 else split.name))
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of the images could not be read, so the scores are too low: {unreadable[0]}"
        )


def write_split_report(split: DatasetSplit, results: list[dict[str, Any]], name: str, cfg: Config, out: Path) -> None:
    known = [r for r in results if r["category_id"] is not None]
    write_report(problem_of_split(split, known, cfg.to_dict()), {name: known}, out)


# ------------------------------------------------------------------------------------------------------------ training
def train(request: Request) -> int:
    """Trains a new run, or continues one; returns the exit code."""
    started = time.time()
    rank, size = ranks.start()
    with ranks.lost_rank_in_one_line(size):
        start = begin(request) if size == 1 else begin_with_the_others(request, rank)
        try:
            if request.find_lr:
                return _find_lr(start, request.fitting, request.find_lr, rank, size)
            return _train(start, request.fitting, rank, size, started)
        finally:
            if start.lock is not None:
                start.lock.release()


def _train(start: Start, fitting: Fitting, rank: int, size: int, started: float) -> int:
    chief, logdir = rank == 0, start.logdir
    if size > 1 and start.cfg.TRAINER != "horovod":
        raise UserError(f"{size} processes were launched to train together, which needs --config TRAINER=horovod")
    if chief:
        check_trackers(start.cfg)
    cfg, split, validation = _load_data(start.cfg, rank, size)

    from utils.tf_v1 import take_over

    take_over()  # also of a process that has only predicted so far (packrcnn.py)
    from predict import evaluation_builder
    from trainers import describe_devices, local_devices, make_trainer
    from training import Interrupted, run_training
    from training_incidents import describe_skipped
    from training_plan import make_plan

    devices = local_devices(cfg)
    plan = make_plan(cfg, size * len(devices), len(split), start.plan)
    trainer = make_trainer(cfg, plan, devices)
    if chief:
        where = describe_devices(devices) + (f", on each of {size} ranks" if size > 1 else "")
        logger.info(f"plan, on {where}\n{plan.table(cfg)}")
        for note in plan.notes(cfg):
            logger.info(note)
        for warning in plan.warnings(cfg):
            logger.warning(warning)
    check_plan(start, plan.total_batch)
    check_metrics(cfg, validation)
    if chief:
        check_device(cfg)
    scores = Scores(make_rule(cfg, [v.name for v in validation]), start.meta)
    if size > 1:
        scores = ranks.from_first(scores)
    unscored = bool(validation and scores.pending) and (cfg.TEST.ASYNC or start.step in scores.pending)
    if 0 < start.step < plan.total_steps and not unscored and (reason := scores.why_finished()):
        if chief:
            logger.info(f"{logdir} has ended at step {start.step}: {reason}; change these settings to train longer")
        return 0
    if not start.step and plan.total_steps >= LONG_ENOUGH:
        _tell_estimate(cfg, plan, split, devices, chief)
    if start.step >= plan.total_steps and not unscored:
        # Not an error: a job that was killed after its last step may be started again automatically.
        if chief:
            more = "raise TRAIN.MAX_STEPS, TRAIN.EPOCHS or TRAIN.LR_SCHEDULE to train longer"
            logger.info(f"{logdir} has finished its {start.step} steps; {more}")
            if validation and not (logdir / "metrics.json").exists():
                command = f"./train.py --evaluate results.json --load {logdir}{trust_options(cfg)}"
                logger.warning(f"its model is not scored yet: {command}")
        return 0
    if start.step:
        logger.info(f"continuing {start.origin}")
    meta = make_meta(cfg.to_dict(), cfg.DATA.CLASS_NAMES, start.step)
    meta["total_batch"], meta["plan"] = plan.total_batch, plan.record(cfg)
    meta["category_ids"] = [split.label_to_category_id(i + 1) for i in range(len(split.class_names))]
    if cfg.MODE_KEYPOINT:
        meta["keypoint_flip"] = split.keypoint_flip.tolist()
    meta["data"] = data_fingerprint(split)
    load = start.loader(fitting, cfg.DATA.CLASS_NAMES)
    if chief:
        start.check_data(meta["data"])
        start.prepare_logdir()
        write_json(logdir / "settings.json", meta, indent=1)

    per_step = plan.accumulation * len(devices)
    dataflow = training_dataflow(
        split, cfg, start_batch=start.step * per_step, shard=(rank, size), batches_per_step=per_step
    )

    def describe_batches(step: int) -> list[list[dict[str, Any]]]:
        return batch_images(split, cfg, (step - 1) * per_step, per_step, (rank, size))

    try:
        stopped = run_training(
            cfg, plan, dataflow, training_keys(cfg), devices, trainer, logdir, meta, load, describe_batches,
            (rank, size), evaluation_builder(cfg, validation, devices, rank, size) if validation else None, scores,
            start.meta,
        )  # fmt: skip
    except Interrupted as e:
        if chief:
            logger.warning(f"stopped by {e}; continue with: ./train.py --resume --logdir {logdir}{trust_options(cfg)}")
        return 128 + e.signal_number
    finally:
        dataflow.stop()
    if chief:
        minutes = (time.time() - started) / 60
        if stopped:
            logger.info(f"ended before step {plan.total_steps}: {stopped}")
        steps = newest_step(logdir) if stopped else plan.total_steps
        skipped = describe_skipped(meta)
        logger.info(f"finished {steps} steps in {minutes:.1f} min{skipped}; the model is {logdir}")
        if best := best_score(logdir):
            shown = shown_score(best["metric"], best["score"])
            logger.info(f"the best model is {logdir}/best: {shown} at step {best['step']}")
    return 0


def _find_lr(start: Start, fitting: Fitting, steps: int, rank: int, size: int) -> int:
    """--find-lr: trains `steps` steps while the rate rises, from the weights and with the batches of a run; writes a
    chart into the new directory, and no checkpoint."""
    cfg, split, _ = _load_data(start.cfg, rank, size)

    from trainers import local_devices, make_trainer
    from training_find_lr import find_rate, rising, suggestion, write_found
    from training_plan import make_plan

    devices = local_devices(cfg)
    plan = rising(make_plan(cfg, size * len(devices), len(split)), steps)
    per_step = plan.accumulation * len(devices)
    dataflow = training_dataflow(split, cfg, shard=(rank, size), batches_per_step=per_step)
    load = start.loader(fitting, cfg.DATA.CLASS_NAMES)
    trainer = make_trainer(cfg, plan, devices)
    try:
        records = find_rate(cfg, plan, dataflow, training_keys(cfg), devices, trainer, load)
    finally:
        dataflow.stop()
    if rank == 0:
        for sentence in write_found(records, suggestion(records), plan, cfg, start.logdir):
            logger.info(sentence)
    return 0


def _tell_estimate(cfg: Config, plan: Any, split: DatasetSplit, devices: list[str], chief: bool) -> None:
    """Says what the run will take on this CPU, and what another precision would do; all ranks measure at once, as they
    will train."""
    from training_estimate import estimate_step, gpu_advice, precision_advice, precisions_to_measure
    from training_plan import told_time
    from utils.tf_v1 import compute_capability

    if not devices[0].startswith("/cpu"):
        if chief and (advice := gpu_advice(cfg.TRAIN.PRECISION, compute_capability())):
            logger.info(advice)
        return
    has_bfloat16 = computes_bfloat16()
    precisions = precisions_to_measure(cfg.TRAIN.PRECISION, has_bfloat16)
    every = estimate_step(cfg, plan, split.image_sizes(), devices, precisions)
    if chief:
        seconds = every[cfg.TRAIN.PRECISION]
        whole = seconds * plan.total_steps
        logger.info(f"estimate for this CPU: {seconds:.2g} s/step, {told_time(whole)} in all without evaluations")
        if advice := precision_advice(every, has_bfloat16):
            logger.info(advice)
        if warning := plan.long_run(cfg, whole):
            logger.warning(warning)


def _load_data(cfg: Config, rank: int, size: int) -> tuple[Config, DatasetSplit, list[DatasetSplit]]:
    """(settings with the classes of the data, training split, splits to evaluate on while training)."""
    split = load_training_split(cfg)
    cfg = cfg.copy()
    cfg.DATA.CLASS_NAMES, cfg.DATA.NUM_CATEGORY = list(split.class_names), len(split.class_names)
    cfg.freeze()
    validation = load_validation_splits(cfg) if cfg.TRAIN.EVAL_PERIOD else []
    for data in (split, *validation):
        quick_check(data)
    if size > 1:
        mine = len(split), zlib.crc32(split.image_sizes().tobytes())
        if ranks.from_first(mine) != mine:
            raise UserError(
                f"rank {rank} and rank 0 see different training sets ({len(split)} images here): make DATA.BASEDIR "
                "identical on all machines"
            )
    logger.info(f"{len(split)} training images of {', '.join(cfg.DATA.TRAIN)}\n{class_count_table(split)}")
    return cfg, split, validation


if __name__ == "__main__":
    sys.exit(main())
