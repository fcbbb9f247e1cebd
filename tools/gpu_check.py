#!/usr/bin/env python3
"""Checks training and prediction on this machine's first GPU, and writes one report to read or to send.

  make gpu-check                              all checks, about a quarter of an hour
  python -m tools.gpu_check --quick           the same on a tiny model, without the recording: minutes
  python -m tools.gpu_check --device cpu      tries this program itself where there is no GPU; implies --quick

Checks: where the operations of a step are placed; losses, gradients and detections against the CPU and against a
recording of detectron2; half precision against float32; 100 steps of training; images per second at batches of 1 to 8;
where a step's time goes. FOLDER/gpu-check.md is the report, FOLDER/gpu-check.json the same as numbers,
FOLDER/gpu-check-trace.json one step for chrome://tracing. The exit code is 0 if every check passed, 1 if one failed
(the others ran all the same), 2 if there is no GPU or the folder cannot be written.
"""

import import_path

import argparse
import functools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from common import (
    UserError,
    atomic_write,
    check_output_folder,
    describe_error,
    errors_in_one_line,
    logger,
    path_argument,
    without_nan,
    write_json,
)
from config import default_config, finalize_config
from tools import env, parity

__all__ = ["CHECKS", "Result", "Settings", "busy_share", "main", "markdown", "placement_in", "run_checks"]

RECORDING = Path(__file__).resolve().parent.parent / "tests" / "data" / "golden_mask_r50_fpn.npz.xz"
BATCH_SIZES = (1, 2, 4, 8)
# Operations that are not kernels: their place does not matter.
_NO_WORK = {"Const", "NoOp", "Placeholder", "PlaceholderWithDefault", "VarHandleOp", "_Arg", "_Retval"}


class Settings(NamedTuple):
    """The device as TensorFlow names it, and the sizes of what is run."""

    device: str
    quick: bool

    @property
    def model(self) -> list[str]:
        """Settings of a model that learns from scratch."""
        scratch = ["MODE_FPN=True", "DATA.NUM_CATEGORY=80", "BACKBONE.NORM=GN", "BACKBONE.FREEZE_AT=0"]
        if not self.quick:
            return [*scratch, "FPN.NORM=GN"]
        return [
            *scratch, "BACKBONE.RESNET_NUM_BLOCK=[1,1,1,1]", "BACKBONE.STEM_CHANNELS=32", "FPN.NUM_CHANNEL=32",
            "FPN.FRCNN_FC_HEAD_DIM=32", "MRCNN.HEAD_DIM=16", "FRCNN.BATCH_PER_IM=32",
            "RPN.TRAIN_PER_LEVEL_NMS_TOPK=100", "RPN.TRAIN_FPN_NMS_TOPK=100",
        ]  # fmt: skip

    @property
    def speed_model(self) -> list[str]:
        """The model whose speed is measured: R50-FPN Mask R-CNN with frozen norms, as published tables have it."""
        return self.model if self.quick else ["MODE_FPN=True", "DATA.NUM_CATEGORY=80"]

    @property
    def small_image(self) -> tuple[int, int]:
        return (64, 96) if self.quick else (320, 416)

    @property
    def image(self) -> tuple[int, int]:
        return (64, 96) if self.quick else (800, 1344)

    @property
    def steps(self) -> int:
        return 5 if self.quick else 100


class Result(NamedTuple):
    """What one check found; passed=None: it only measures, or was left out."""

    name: str
    passed: bool | None
    summary: str
    table: str = ""
    numbers: dict[str, Any] = {}


# --------------------------------------------------------------------------------------------------------------- model
class Model:
    """A training step on one constant batch, on a device, in a graph and a session of its own.

    Weights are functions of a seed, so two models with the same settings start from the same weights on any device.
    """

    def __init__(self, settings: Sequence[str], images: int, size: tuple[int, int], device: str):
        from benchmarks.train_speed import synthetic_batch
        from model_rcnn import build_training
        from trainers import DetectionOptimizer, session_config
        from utils.tf_v1 import tf

        cfg = finalize_config(default_config().update_args(settings))
        self.tf, self.graph = tf, tf.Graph()
        with self.graph.as_default(), tf.device(device):
            tf.set_random_seed(1)
            inputs = {
                k: tf.placeholder_with_default(v, [images, *[None] * (v.ndim - 1)], name=k)
                for k, v in synthetic_batch(images, *size).items()
            }
            inputs["image"].set_shape([images, None, None, 3])
            self.losses, _ = build_training(inputs, cfg)
            self.loss = tf.add_n(list(self.losses.values()))
            optimizer = DetectionOptimizer(0.002, 0.9, 1e-4, 10.0, cfg.TRAIN.PRECISION == "float16")
            pairs = [(g, v) for g, v in optimizer.compute_gradients(self.loss) if g is not None]
            self.update = optimizer.apply_gradients(pairs)
            proposal_loss = tf.add_n([v for k, v in self.losses.items() if k.startswith("rpn")])
            kernels = [v for _, v in pairs if v.op.name.startswith("rpn/")]
            self.proposal_gradients = tf.gradients(proposal_loss, kernels)
            self._initialise = tf.global_variables_initializer()
            self.session = tf.Session(config=session_config())

    def restart(self) -> "Model":
        """Back to the weights of the seed."""
        self.session.run(self._initialise)
        return self

    def time_step(self) -> float:
        start = time.perf_counter()
        self.session.run(self.update)
        return time.perf_counter() - start


_kept_model = functools.lru_cache(maxsize=2)(Model)  # checks that follow each other use the same ones


def _model(settings: Sequence[str], images: int, size: tuple[int, int], device: str) -> Model:
    return _kept_model(tuple(settings), images, size, device).restart()


# -------------------------------------------------------------------------------------------------------------- checks
def check_placement(settings: Settings) -> Result:
    """Where the kernels of a training step run, after TensorFlow's optimiser."""
    model = _model(settings.model, 2, settings.small_image, settings.device)
    meta = model.tf.RunMetadata()
    options = model.tf.RunOptions(output_partition_graphs=True)
    model.session.run(model.update, options=options, run_metadata=meta)
    return placement_in(meta.partition_graphs, settings.device.strip("/").partition(":")[0].upper())


def placement_in(graphs: Iterable[Any], kind: str) -> Result:
    """graphs: the GraphDefs that ran, one for each device; kind: GPU or CPU, where they should."""
    count, elsewhere, crossings = Counter[str](), Counter[str](), 0
    for graph in graphs:
        for node in graph.node:
            place = node.device.rpartition("device:")[2].partition(":")[0] or "?"
            if node.op in ("_Send", "_HostSend"):
                crossings += 1
            if node.op in _NO_WORK or node.op.startswith(("_Send", "_Recv", "_Host")):
                continue
            count[place] += 1
            if place != kind:
                elsewhere[node.op] += 1
    share = count[kind] / max(sum(count.values()), 1)
    products = [op for op in elsewhere if "Conv2D" in op or "MatMul" in op]
    summary = f"{count[kind]} of {sum(count.values())} kernels on the {kind} ({share:.0%}), {crossings} tensors sent"
    if products:
        summary += f"; on another device: {', '.join(products)}"
    table = tabulate(elsewhere.most_common(15), ["kernels on another device", "number"], "github") if elsewhere else ""
    numbers = {"kernels": dict(count), "elsewhere": dict(elsewhere), "sent": crossings}
    return Result("placement", share > 0.5 and not products, summary, table, numbers)


def check_equality(settings: Settings) -> Result:
    """Losses and gradients of one step, on the device and on the CPU, from the same weights.

    The RPN's must be equal to rounding. Behind it stand decisions between near-equal proposals, which rounding may
    turn in a model without training: there the losses may differ by a few percent, and the recording decides.
    """
    from utils.tf_v1 import allow_tf32

    allow_tf32(False)
    found = []
    for device in ("/cpu:0", settings.device):
        model = _model(settings.model, 2, settings.small_image, device)
        found.append(model.session.run((model.losses, model.proposal_gradients)))
    (losses, gradients), (own_losses, own_gradients) = found
    rows = []
    for name, value in losses.items():
        limit = 1e-3 if name.startswith("rpn") else 0.05
        rows.append((f"loss {name}", abs(own_losses[name] - value) / max(abs(float(value)), 1e-3), limit))
    a, b = (np.concatenate([np.ravel(g) for g in each]) for each in (own_gradients, gradients))
    rows.append(("gradients of the RPN's losses", float(np.linalg.norm(a - b) / np.linalg.norm(b)), 1e-2))
    return _compared("equality with the CPU", rows)


def check_recording(settings: Settings) -> Result:
    """Losses, gradients and detections of a recorded detectron2 model, in float32 with all its bits."""
    name = "recording of detectron2"
    if settings.quick or not RECORDING.exists():
        reason = "it is for the whole model" if settings.quick else "no tests/data here"
        return Result(name, None, f"left out: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        parity.unpack_recording(RECORDING, Path(folder))
        golden = parity.load_golden(folder, "mask_r50_fpn")
        variables, first = parity.convert_weights(golden.weights), {"b0": [0]}
        rows = [
            *parity.compare_inference(golden, variables, first),
            *parity.compare_training(golden, variables, first),
        ]
    # Rounding to float32 turns decisions of half-open masks; what counts is told by the rest.
    rows = [row for row in rows if "mask" not in row.quantity]
    return _compared(name, [(f"{r.quantity}, {r.batch}", r.error, r.tolerance) for r in rows])


def check_precision(settings: Settings) -> Result:
    """The first losses in TF32, bfloat16 and float16 against float32, and whether some steps stay finite."""
    from utils.tf_v1 import allow_tf32

    kinds = ["bfloat16"] if settings.quick else ["TF32", "bfloat16", "float16"]
    rows, reference = [], None
    for kind in ("float32", *kinds):
        allow_tf32(kind == "TF32")
        kind_words = [] if kind in ("float32", "TF32") else [f"TRAIN.PRECISION={kind}"]
        model = _model([*settings.model, *kind_words], 2, settings.small_image, settings.device)
        losses = model.session.run(model.losses)
        value = float(sum(v for k, v in losses.items() if k.startswith("rpn")))
        for _ in range(3 if settings.quick else 20):
            model.session.run(model.update)
        last = float(model.session.run(model.loss))
        if reference is None:
            reference = value
        rows.append((f"RPN losses in {kind}", abs(value - reference) / reference, 0.05))
        rows.append((f"loss not finite after some steps in {kind}", float(not np.isfinite(last)), 0.0))
    allow_tf32(False)
    return _compared("precision", rows)


def check_steps(settings: Settings) -> Result:
    """A model from scratch learns one batch by heart: losses stay finite and fall."""
    losses = []
    model = _model(settings.model, 2, settings.small_image, settings.device)
    for _ in range(settings.steps):
        losses.append(float(model.session.run((model.loss, model.update))[0]))
    some = max(1, settings.steps // 10)
    first, last = float(np.mean(losses[:some])), float(np.mean(losses[-some:]))
    passed = bool(np.isfinite(losses).all() and (settings.quick or last < 0.9 * first))
    summary = f"{settings.steps} steps: loss {first:.3f} at the beginning, {last:.3f} at the end"
    return Result("training", passed, summary, numbers={"losses": losses})


def check_speed(settings: Settings) -> Result:
    """Images per second of whole training steps, by images in the batch and precision."""
    from utils.tf_v1 import allow_tf32, tf

    warm, timed = (1, 2) if settings.quick else (4, 10)
    numbers: dict[str, dict[int, float | None]] = {}
    for kind in ["float32"] if settings.quick else ["float32", "TF32", "float16"]:
        allow_tf32(kind == "TF32")
        numbers[kind] = {}
        kind_words = [] if kind in ("float32", "TF32") else [f"TRAIN.PRECISION={kind}"]
        for images in BATCH_SIZES[:2] if settings.quick else BATCH_SIZES:
            try:
                model = _model([*settings.speed_model, *kind_words], images, settings.image, settings.device)
                seconds = [model.time_step() for _ in range(warm + timed)][warm:]
            except tf.errors.ResourceExhaustedError:
                numbers[kind][images] = None  # does not fit
                break
            numbers[kind][images] = images / float(np.median(seconds))
    allow_tf32(False)
    rows = [[kind, *("does not fit" if v is None else v for v in speed.values())] for kind, speed in numbers.items()]
    best = max((v, images, kind) for kind, s in numbers.items() for images, v in s.items() if v is not None)
    height, width = settings.image
    summary = f"at best {best[0]:.2f} images/s of {height}x{width}, in {best[2]} with {best[1]} per batch"
    headers = ["images/s", *(f"batch {n}" for n in BATCH_SIZES)]
    return Result("speed", None, summary, tabulate(rows, headers, "github", floatfmt=".2f"), numbers)


def check_profile(settings: Settings, trace: Path | None = None) -> Result:
    """Where the time of one step goes; trace: a file for chrome://tracing."""
    from tensorflow.python.client.timeline import Timeline

    model = _model(settings.speed_model, 2, settings.image, settings.device)
    for _ in range(1 if settings.quick else 5):
        model.session.run(model.update)
    seconds = model.time_step()
    meta = model.tf.RunMetadata()
    options = model.tf.RunOptions(trace_level=model.tf.RunOptions.FULL_TRACE)
    model.session.run(model.update, options=options, run_metadata=meta)
    types = {op.name: op.type for op in model.graph.get_operations()}
    if trace is not None:
        with atomic_write(trace) as f:
            f.write(Timeline(meta.step_stats).generate_chrome_trace_format())
    streams = [d for d in meta.step_stats.dev_stats if "stream:all" in d.device.lower()]
    by_type, spans = Counter[str](), []
    for device in streams or meta.step_stats.dev_stats:
        for node in device.node_stats:
            start = node.all_start_micros + node.op_start_rel_micros
            spans.append((start, start + node.op_end_rel_micros - node.op_start_rel_micros))
            by_type[types.get(node.node_name.partition(":")[0], "other")] += spans[-1][1] - spans[-1][0]
    total, busy = max(sum(by_type.values()), 1), busy_share(spans)
    rows = [[kind, t * 1e-3, t / total] for kind, t in by_type.most_common(15)]
    table = tabulate(rows, ["operation", "ms", "share"], "github", floatfmt=(None, ".2f", ".1%"))
    what = "the GPU computes" if streams else "some thread computes"
    summary = f"a step takes {seconds * 1e3:.1f} ms and has {len(spans)} kernels; {what} {busy:.0%} of the traced time"
    numbers = {"seconds": seconds, "kernels": len(spans), "busy": busy, "milliseconds": {r[0]: r[1] for r in rows}}
    return Result("profile", None, summary, table, numbers)


def busy_share(spans: list[tuple[int, int]]) -> float:
    """The share of the time from the first start to the last end of [(start, end)] that is inside one of them."""
    if not spans:
        return 0.0
    busy, reach = 0, min(start for start, _ in spans)
    first = reach
    for start, end in sorted(spans):
        busy += max(end - max(start, reach), 0)
        reach = max(reach, end)
    return busy / max(reach - first, 1)


def _compared(name: str, rows: list[tuple[str, float, float]]) -> Result:
    """rows: (quantity, error, the largest error that is allowed); of a quantity's several errors the worst counts."""
    worst_of: dict[str, tuple[float, float]] = {}
    for what, error, limit in rows:
        if what not in worst_of or not error <= worst_of[what][0]:
            worst_of[what] = float(error), limit
    rows = [(what, *pair) for what, pair in worst_of.items()]
    missed = [row for row in rows if not row[1] <= row[2]]
    worst = max(rows, key=lambda r: r[1] / r[2] if r[2] else float(r[1] > 0))
    summary = (
        f"{len(rows)} differences, {len(missed)} too large; the worst: {worst[0]} {worst[1]:.1e} of {worst[2]:.1e}"
    )
    shown = [
        [what, f"{error:.1e}", f"{limit:.1e}", "" if error <= limit else "TOO LARGE"] for what, error, limit in rows
    ]
    table = tabulate(shown, ["quantity", "error", "allowed", ""], "github", disable_numparse=True)
    return Result(name, not missed, summary, table, {what: [error, limit] for what, error, limit in rows})


CHECKS: list[Callable[[Settings], Result]] = [
    check_placement, check_equality, check_recording, check_precision, check_steps, check_speed, check_profile,
]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- report
def run_checks(settings: Settings, checks: list[Callable[[Settings], Result]]) -> Iterator[Result]:
    """Runs each check; one that fails with an error does not keep the next from running."""
    for check in checks:
        start = time.perf_counter()
        try:
            result = check(settings)
        except Exception as e:  # whatever TensorFlow raises on a device that nobody has tried
            result = Result(check.__name__.removeprefix("check_"), False, describe_error(e))
        seconds = time.perf_counter() - start
        logger.info(f"{_word(result)}: {result.name} ({seconds:.0f} s): {result.summary}")
        yield result


def _word(result: Result) -> str:
    return {True: "passed", False: "FAILED", None: "measured"}[result.passed]


def markdown(results: list[Result], facts: list[tuple[str, str]], device: str) -> str:
    """The report."""
    failed = [r.name for r in results if r.passed is False]
    parts = [
        f"# Check of {device}",
        f"Failed: {', '.join(failed)}." if failed else "Every check passed.",
        tabulate([[r.name, _word(r), r.summary] for r in results], ["check", "", "found"], "github"),
    ]
    parts += [f"## {r.name}\n{r.summary}\n\n{r.table}" for r in results if r.table]
    parts += ["## Machine\n" + tabulate(facts, ["", ""], "github", disable_numparse=True)]
    return "\n\n".join(parts) + "\n"


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps, no recording")
    parser.add_argument(
        "--output", type=path_argument, default="gpu-check", metavar="FOLDER", help="for the report (gpu-check)"
    )
    args = parser.parse_args(argv)
    check_output_folder(args.output, "--output")
    from utils.tf_v1 import gpu_count, gpu_problem

    if args.device == "gpu" and not gpu_count():
        raise UserError(
            f"no GPU is seen, so nothing was checked: {gpu_problem() or 'this machine has no NVIDIA driver'}; "
            "--device cpu tries this program itself"
        )
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    facts = list(env.report())
    settings = Settings(f"/{args.device}:0", args.quick or args.device == "cpu")
    with_trace = [*CHECKS[:-1], lambda s: check_profile(s, out / "gpu-check-trace.json")]
    with_trace[-1].__name__ = CHECKS[-1].__name__
    results = list(run_checks(settings, with_trace))
    _kept_model.cache_clear()
    with atomic_write(out / "gpu-check.md") as f:
        f.write(markdown(results, facts, settings.device))
    checks = {r.name: {"passed": r.passed, "summary": r.summary, "numbers": r.numbers} for r in results}
    passed = all(r.passed is not False for r in results)
    content = {"device": settings.device, "quick": settings.quick, "passed": passed, "checks": checks,
               "machine": dict(facts)}  # fmt: skip
    write_json(out / "gpu-check.json", without_nan(content), indent=1)
    logger.info(f"the report is {out / 'gpu-check.md'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
