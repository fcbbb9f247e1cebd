"""What 1 and 2 training processes take on this machine, and what follows from it for up to 512 GPUs.

  python benchmarks/scaling.py measure     real train.py runs on this idle machine, minutes -> benchmarks/scaling.json
      --rates 2000 1000 500                as root: also between two network namespaces, joined by a cable of each rate
  python benchmarks/scaling.py tables      from that file: measured, and predicted by benchmarks/scaling_model.py

A rank is pinned to one core, so that 2 ranks have twice the processor of 1.
"""

import import_path

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scaling_model import tables
from common import UserError, logger, read_json, write_json
from config import default_config, finalize_config
from dataset import load_training_split

ROOT = Path(__file__).resolve().parent.parent

MEASURED = ROOT / "benchmarks" / "scaling.json"
OWN = [sys.executable, str(Path(__file__).resolve())]
# R50-FPN Mask R-CNN as the recipe trains it (FREEZE_AT=2), on small images. The learning rate is almost 0, since frozen
# norms without weights do not train; that changes no shape and no byte.
MODEL = ["MODE_FPN=True"]
SMALL = ["PREPROC.SHORT_EDGE_SIZE=[256,256]", "PREPROC.MAX_SIZE=427", "FRCNN.BATCH_PER_IM=64"]
QUIET = ["DATA.NUM_WORKERS=0", "TRAIN.EVAL_PERIOD=0", "TRAIN.BASE_LR=1e-8", "TRAIN.WARMUP_INIT_LR=1e-8"]
SETTLING = 3  # first steps of a run, which prepare what later ones use, are left out
MESSAGE_SIZES = [2**n for n in (12, 16, 20, 22, 24, 25, 26, 27)]
ADDRESSES = ["10.213.7.1", "10.213.7.2"]


# ------------------------------------------------------------------------------------------- what runs in each process
def pin(core: int = 0) -> int:
    """Keeps this process and its threads to come on one core, that of its rank if it has one -> the core's number."""
    cores, core = sorted(os.sched_getaffinity(0)), int(os.environ.get("HOROVOD_RANK", core))
    os.sched_setaffinity(0, {cores[core % len(cores)]})
    return core


def train_rank(record: Path, arguments: list[str]) -> int:
    """train.py with its arguments; appends the time of the end of each step to `record`."""
    import train
    from utils.tensorpack_import import Callbacks

    trigger_step = Callbacks.trigger_step

    def trigger_and_record(self):
        try:
            trigger_step(self)  # raises after the last step
        finally:
            with open(record, "a") as f:
                f.write(f"{time.monotonic()}\n")

    Callbacks.trigger_step = trigger_and_record
    return train.main(arguments)


def reduce_rank(out: Path, repeats: int) -> None:
    """Times Horovod's fused all-reduce of four tensors for several sizes -> JSON {ranks, sizes, seconds, cpu, idle}.

    cpu is the processor time of this process; idle its share while Horovod only asks the others what is ready.
    """
    from utils.tf_v1 import tf

    # isort: split
    import horovod.tensorflow as hvd

    hvd.init()
    found: dict[str, Any] = {"ranks": hvd.size(), "sizes": MESSAGE_SIZES, "seconds": [], "cpu": []}
    for size in MESSAGE_SIZES:
        with tf.Graph().as_default(), tf.Session() as session:
            tensors = [tf.Variable(tf.ones([size // 16])) for _ in range(4)]
            sums = hvd.grouped_allreduce([t.read_value() for t in tensors], op=hvd.Sum)
            fetched = [s[:1] for s in sums]  # a reduction whose result nobody reads would be left out
            session.run(tf.global_variables_initializer())
            session.run(fetched)
            times = []
            for _ in range(repeats if size >= 2**22 else 4 * repeats):
                start, cpu = time.perf_counter(), time.process_time()
                session.run(fetched)
                times.append((time.perf_counter() - start, time.process_time() - cpu))
            seconds, cpu = np.median(times, axis=0)
            found["seconds"].append(float(seconds))
            found["cpu"].append(float(cpu))
    cpu = time.process_time()
    time.sleep(1)
    found["idle"] = time.process_time() - cpu
    if hvd.rank() == 0:
        write_json(out, found)


def gradient_schedule(settings: Sequence[str], height: int, width: int, repeats: int) -> dict[str, Any]:
    """When in a step each gradient exists: {names, sizes, ready, tail} in bytes and seconds since the begin of the
    step; tail is from the last gradient to the end of the update. Medians of `repeats` steps."""
    from benchmarks.train_speed import synthetic_batch, training_step
    from utils.tf_v1 import tf

    with tf.Graph().as_default(), tf.Session() as session:
        pairs, update, _ = training_step([*settings, "TRAIN.EVAL_PERIOD=0"], synthetic_batch(1, height, width))
        producers = [g.op.name for g, _ in pairs]
        session.run(tf.global_variables_initializer())
        # Fetched, so that TensorFlow's optimisation leaves the operations that make the gradients.
        fetches = [[g for g, _ in pairs], update]
        options = tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE)
        rows = []
        for _ in range(repeats + 1):
            trace = tf.RunMetadata()
            session.run(fetches, options=options, run_metadata=trace)
            nodes = [node for device in trace.step_stats.dev_stats for node in device.node_stats]
            begin = min(node.all_start_micros for node in nodes)
            ends = {node.node_name: (node.all_start_micros + node.op_end_rel_micros - begin) * 1e-6 for node in nodes}
            # An operation that equals another one is left out; then there is only the fetch of its output.
            fetched = {name.rpartition("_")[0]: end for name, end in ends.items() if name.startswith("_retval_")}
            ready = [ends[name] if name in ends else fetched[f"_retval_{name}_0"] for name in producers]
            rows.append([*ready, max(ends.values())])
    *ready, total = np.median(rows[1:], axis=0)
    return {
        "names": [v.op.name for _, v in pairs],
        "sizes": [v.shape.num_elements() * v.dtype.size for _, v in pairs],
        "ready": [round(float(r), 6) for r in ready],
        "tail": float(total - max(ready)),
    }


# -------------------------------------------------------------------------------------------------- starting processes
@contextlib.contextmanager
def cable() -> Iterator[list[str]]:
    """Two network namespaces with an address each, joined by a virtual cable; yields their names."""
    names = [f"packrcnn{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        ends = f"eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}"
        subprocess.run(["ip", "link", "add", *ends.split()], check=True)
        for name, address in zip(names, ADDRESSES):
            for words in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def two_ranks(hosts: Sequence[str], megabits: int | None, command: list) -> list[list]:
    """The commands that start two ranks of `command`: on this machine, or one on each of two hosts at a rate."""
    node = [sys.executable, ROOT / "scripts" / "horovod_node.py"]
    if not megabits:
        return [[*node, "--slots", "2", "--", *command]]
    for name in hosts:
        words = f"qdisc replace dev eth0 root tbf rate {megabits}mbit burst 1mb latency 50ms"
        subprocess.run(["tc", "-n", name, *words.split()], check=True)
    node += ["--master", ADDRESSES[0], "--nodes", "2"]
    return [["ip", "netns", "exec", h, *node, "--node-rank", i, "--", *command] for i, h in enumerate(hosts)]


def run_together(commands: Sequence[list], log: Path, seconds: float = 900) -> None:
    """Runs the commands at the same time, to their end; ends all of them when one fails or takes too long."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HOROVOD_")} | {"CUDA_VISIBLE_DEVICES": "-1"}
    with open(log, "ab") as f:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": f, "stderr": f, "env": environment}
        jobs = [subprocess.Popen([*map(str, command)], **streams) for command in commands]
    try:
        for job in jobs:
            if job.wait(seconds):
                raise UserError(f"{' '.join(job.args[:12])} … failed: {log.read_text()[-300:]}")
    finally:
        for job in jobs:
            if job.poll() is None:
                job.terminate()
                job.wait()


# ----------------------------------------------------------------------------------------------------- the measurement
def padded_areas(data: Path) -> np.ndarray:
    """Pixels of each training image at the default size (800, at most 1333), padded as in a batch, relative to their
    mean."""
    cfg = finalize_config(default_config().update_args([*MODEL, f"DATA.BASEDIR={data}"]))
    sizes = load_training_split(cfg).image_sizes()
    scale = np.minimum(800 / sizes.min(1), 1333 / sizes.max(1))
    areas = np.prod(np.ceil(np.round(sizes * scale[:, None]) / 32) * 32, axis=1)
    return areas / areas.mean()


def steps_of(record: Path) -> list[float]:
    """Seconds of each step that a rank has recorded, without the first ones."""
    return np.diff(np.array(record.read_text().split(), float)[SETTLING:]).round(4).tolist()


def measure(args: argparse.Namespace, folder: Path, hosts: Sequence[str]) -> dict[str, Any]:
    """What benchmarks/scaling.json holds; two ranks train here, and on the two hosts at each rate if there are any."""
    networks = {"2 ranks": None} | {f"2 ranks, {r} Mbit/s": r for r in args.rates if hosts}
    areas = padded_areas(args.data)
    log, schedules, reductions, arms = folder / "log.txt", {}, {}, {}
    for name, *words in (("256", *SMALL, 256, 352, 5), ("800", 800, 1088, 2)):
        logger.info(f"when gradients are ready, short edge {name}")
        run_together([[*OWN, "schedule", folder / name, *MODEL, *words]], log)
        schedules[name] = read_json(folder / name, "schedule")
    for name, rate in networks.items():
        logger.info(f"all-reduce: {name}")
        run_together(two_ranks(hosts, rate, [*OWN, "reduce", folder / "reduced", 3 if rate else 6]), log)
        reductions[name] = read_json(folder / "reduced", "all-reduce times")
    settings = [*MODEL, *SMALL, *QUIET, "TRAIN.LR_SCALING=none", f"DATA.BASEDIR={args.data.resolve()}"]
    settings.append(f"TRAIN.MAX_STEPS={args.steps + SETTLING + 1}")
    # Back and forth, so that a machine that slows down gradually treats all alike.
    names = ["1 process", "2 separate processes", *networks]
    for number, name in enumerate([*names, *names[::-1]]):
        logger.info(f"training: {name}")
        rate, ranks = networks.get(name), 1 if name == "1 process" else 2
        own, trainer = [*OWN, "train", folder / str(number)], "horovod" if name in networks else "replicated"
        more = ["--config", *settings, f"TRAINER={trainer}"]
        commands = [[*own, core, "--logdir", folder / f"run-{number}-{core}", *more] for core in range(ranks)]
        run_together(two_ranks(hosts, rate, commands[0]) if name in networks else commands, log)
        arm = arms.setdefault(name, {"ranks": ranks, "megabits": rate, "seconds": [[] for _ in range(ranks)]})
        for rank in range(ranks):
            arm["seconds"][rank] += steps_of(folder / f"{number}-{rank}")
    return {
        "settings": [*MODEL, *SMALL], "data": args.data.name, "areas": areas.round(4).tolist(),
        "schedules": schedules, "reductions": reductions, "arms": arms,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- command
def main(argv: list[str]) -> int:
    kind, words = argv[:1], argv[2:]
    if kind in (["train"], ["reduce"], ["schedule"]):  # what `measure` starts, in processes of their own
        core, out = pin(int(words[0]) if kind == ["train"] else 0), Path(argv[1])
        if kind == ["train"]:
            return train_rank(out.with_name(f"{out.name}-{core}"), words[1:])
        if kind == ["reduce"]:
            reduce_rank(out, int(words[0]))
        else:
            write_json(out, gradient_schedule(words[:-3], *map(int, words[-3:])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="measure | tables")
    measuring = commands.add_parser("measure", help="train.py with 1 and 2 ranks here")
    measuring.add_argument("--data", type=Path, default=ROOT / "tests" / "data" / "coco_mini", metavar="DIR")
    measuring.add_argument("--steps", type=int, default=8, help="of each of two runs of each kind")
    measuring.add_argument("--rates", type=int, nargs="+", default=[], metavar="MBIT", help="of networks, as root")
    measuring.add_argument("--out", type=Path, default=MEASURED)
    commands.add_parser("tables", help="print the tables").add_argument("--measured", type=Path, default=MEASURED)
    args = parser.parse_args(argv)
    if args.command == "tables":
        for name, table in tables(read_json(args.measured, "measurements")).items():
            print(f"{name}\n{table}\n")
        return 0
    if len(os.sched_getaffinity(0)) < 2:
        raise UserError("the measurement needs two cores")
    if args.rates and not (os.geteuid() == 0 and shutil.which("tc")):
        raise UserError("--rates needs root and iproute2, for network namespaces")
    with tempfile.TemporaryDirectory() as folder, cable() if args.rates else contextlib.nullcontext([]) as hosts:
        write_json(args.out, measure(args, Path(folder), hosts))
    logger.info(f"measurements in {args.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        logger.error(str(e))
        sys.exit(2)
