"""Training over several ranks: what 1 and 2 processes take here, and what that and published GPU times predict for 512.

  python benchmarks/scaling.py measure --out benchmarks/scaling.json   real train.py runs on this machine, minutes
  python benchmarks/scaling.py simulate                                tables: model against measurement; predictions
  python benchmarks/scaling.py plot --out docs/scaling.png
  python benchmarks/scaling.py report                                  the tables into docs/SCALING.md, RESULTS.md

A rank is pinned to one core, so that 2 ranks have twice the processor of 1. All training processes of `measure` start
together and are then stopped (SIGSTOP); the arms of the comparison take turns by being continued for some seconds each,
so that slow moments of the machine meet all of them. Steps that a turn's begin or end cuts are not counted. As root,
ranks also train in two network namespaces joined by a cable of given rates.
"""

import argparse
import contextlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.scaling_model import (  # noqa: E402
    Cluster,
    Cost,
    Link,
    coordination_seconds,
    expected_slowest,
    fit_link,
    reduced_step,
    ring_bytes,
    ring_seconds,
    spread_of_batches,
    sync_bn_bytes,
    sync_bn_seconds,
)
from common import UserError, atomic_write, logger, read_json, write_json  # noqa: E402

MEASURED = ROOT / "benchmarks" / "scaling.json"
# Documents with the tables that they show.
DOCUMENTS = {
    ROOT / "docs" / "SCALING.md": [
        "measured", "reductions", "validation", "published", "predictions", "syncbn", "devices",
    ],
    ROOT / "benchmarks" / "RESULTS.md": ["measured"],
}  # fmt: skip
# R50-FPN Mask R-CNN as the recipe trains it (FREEZE_AT=2), on small images. The learning rate is almost 0, since frozen
# norms without weights do not train; that changes no shape and no byte.
MODEL = ["MODE_FPN=True"]
SMALL = ["PREPROC.SHORT_EDGE_SIZE=[256,256]", "PREPROC.MAX_SIZE=427", "FRCNN.BATCH_PER_IM=64"]
QUIET = ["DATA.NUM_WORKERS=0", "TRAIN.EVAL_PERIOD=0", "TRAIN.BASE_LR=1e-8", "TRAIN.WARMUP_INIT_LR=1e-8"]
MESSAGE_SIZES = [2**n for n in (12, 16, 20, 22, 24, 25, 26, 27)]
QUIET_SHARE = 0.1  # of the machine: what other programs may use for a time to count as that of the arm
ADDRESSES = ["10.213.7.1", "10.213.7.2"]


# ------------------------------------------------------------------------------------------- what runs in each process
def pin(core: int | None) -> None:
    """This process and its threads to come on one core: the given one, or that of the rank."""
    cores = sorted(os.sched_getaffinity(0))
    number = core if core is not None else int(os.environ.get("HOROVOD_RANK", "0"))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


def sent_bytes(interface: str) -> int:
    """Bytes sent so far through a network interface, as this process's network namespace sees it."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise UserError(f"no network interface is called {interface}")


def train_rank(out: Path, interface: str, arguments: list[str]) -> int:
    """train.py with its arguments; appends to `out` the time and the bytes sent after each step."""
    import train
    import training

    recorded = training.ProgressLog._trigger_step

    def record(self):
        recorded(self)
        with open(out, "a") as f:
            f.write(f"{time.monotonic()} {sent_bytes(interface)}\n")

    training.ProgressLog._trigger_step = record
    return train.main(arguments)


def reduce_rank(out: Path, repeats: int) -> None:
    """Times Horovod's fused all-reduce of four tensors for several sizes -> JSON {sizes, seconds, cpu, idle}.

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


def schedule_process(out: Path, settings: list[str], height: int, width: int, repeats: int) -> None:
    """When in a step each gradient exists -> JSON {names, sizes, ready, tail}: bytes, seconds since the step's begin,
    and seconds from the last gradient to the end of the update. Medians of `repeats` steps."""
    from benchmarks.train_speed import synthetic_batch
    from config import default_config, finalize_config
    from model_rcnn import build_training
    from training import DetectionOptimizer
    from utils.tf_v1 import tf

    cfg = finalize_config(default_config().update_args([*settings, "DATA.NUM_CATEGORY=80"]))
    batch = synthetic_batch(1, height, width)
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(1)
        inputs = {k: tf.placeholder_with_default(v, [1, *[None] * (v.ndim - 1)], name=k) for k, v in batch.items()}
        inputs["image"].set_shape([1, None, None, 3])
        losses, _ = build_training(inputs, cfg)
        optimizer = DetectionOptimizer(1e-8, 0.9, 1e-4, None, False)
        pairs = [p for p in optimizer.compute_gradients(tf.add_n(list(losses.values()))) if p[0] is not None]
        producers = [g.op.name for g, _ in pairs]
        update = optimizer.apply_gradients(pairs)
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
            rows.append([*(ends[name] for name in producers), max(ends.values())])
        *ready, total = np.median(rows[1:], axis=0)
        write_json(
            out,
            {
                "names": [v.op.name for _, v in pairs],
                "sizes": [v.shape.num_elements() * v.dtype.size for _, v in pairs],
                "ready": [round(float(r), 6) for r in ready],
                "tail": float(total - max(ready)),
            },
        )


# ------------------------------------------------------------------------------------------------- starting processes
def own_command(*words: Any) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), *map(str, words)]


def launcher(ranks: int) -> list[str]:
    found = Path(sys.executable).parent / "horovodrun"
    if not found.exists():
        raise UserError("horovodrun is missing in this environment; run `make horovod`")
    return [str(found), "--gloo", "-np", str(ranks), "-H", f"localhost:{ranks}"]


def node_launcher(name: str, node: int, port: int) -> list[str]:
    node_script = str(ROOT / "scripts" / "horovod_node.py")
    options = f"--nodes 2 --node-rank {node} --master {ADDRESSES[0]} --port {port} --".split()
    return ["ip", "netns", "exec", name, sys.executable, node_script, *options]


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


def set_rate(names: Sequence[str], megabits: int) -> None:
    for name in names:
        words = f"qdisc replace dev eth0 root tbf rate {megabits}mbit burst 1mb latency 50ms"
        subprocess.run(["tc", "-n", name, *words.split()], check=True)


ENVIRONMENT = {
    # A turn of the other arms must not look like a lost rank.
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "3600",
    "HOROVOD_STALL_CHECK_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
}


def start(command: list[str], log: Path) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HOROVOD_")} | ENVIRONMENT
    with open(log, "ab") as f:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip


def finish(processes: Sequence[subprocess.Popen], log: Path, seconds: float = 600) -> None:
    try:
        for process in processes:
            if process.wait(seconds):
                raise UserError(f"{' '.join(process.args[:12])} … failed: {log.read_text()[-300:]}")
    finally:
        end(processes)


def end(processes: Sequence[subprocess.Popen], seconds: float = 20) -> None:
    """Ends those that still run, with what they have started: SIGTERM, `seconds` to react, SIGKILL."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


class Rank:
    """One process of an arm: its pid, and the record of its steps."""

    def __init__(self, folder: Path, name: str, number: int):
        self.folder, self.name, self.number = folder, name, number

    def _path(self, kind: str) -> Path:
        return self.folder / f"{self.name}-{self.number}.{kind}"

    def steps(self) -> np.ndarray:
        """[k, 2]: time of each step's end, bytes sent until then."""
        path = self._path("steps")
        lines = path.read_text().splitlines() if path.exists() else []
        return np.array([line.split() for line in lines], float).reshape(-1, 2)

    def pid(self) -> int:
        return int(self._path("pid").read_text())

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid(), number)


class Arm(NamedTuple):
    """What takes turns: some ranks that train at the same time; a rate of the cable between them."""

    name: str
    ranks: list[Rank]
    rate: int | None = None


def whole_steps(stamps: np.ndarray, turns: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Seconds and bytes of the steps that lie wholly in one of the turns. stamps [k, 2]: time, bytes at their ends."""
    seconds, sent = [], []
    for begin, end in turns:
        inside = stamps[(stamps[:, 0] >= begin) & (stamps[:, 0] <= end)]
        seconds += np.diff(inside[:, 0]).tolist()
        sent += np.diff(inside[:, 1]).tolist()
    return seconds, sent


def padded_areas(data: Path) -> np.ndarray:
    """Pixels of each training image at the default size (800, at most 1333), padded as in a batch, relative to their
    mean."""
    from config import default_config, finalize_config
    from dataset import load_training_split

    cfg = finalize_config(default_config().update_args([*MODEL, f"DATA.BASEDIR={data}"]))
    sizes = load_training_split(cfg).image_sizes()
    scale = np.minimum(800 / sizes.min(1), 1333 / sizes.max(1))
    areas = np.prod(np.ceil(np.round(sizes * scale[:, None]) / 32) * 32, axis=1)
    return areas / areas.mean()


def busy_seconds(ranks: Sequence[Rank]) -> tuple[float, float]:
    """Processor seconds that everything on the machine has used, and the ranks of them."""
    import psutil

    times = psutil.cpu_times()
    own = [psutil.Process(rank.pid()).cpu_times() for rank in ranks]
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice, sum(t.user + t.system for t in own)


def turn(arm: Arm, seconds: float, hosts: Sequence[str]) -> tuple[tuple[float, float], float]:
    """Continues the (stopped) ranks of an arm for some seconds -> (begin, end) and the share of the machine's processor
    time that other programs used meanwhile."""
    if arm.rate:
        set_rate(hosts, arm.rate)
    everything, own = busy_seconds(arm.ranks)
    for rank in arm.ranks:
        rank.signal(signal.SIGCONT)
    begin = time.monotonic()
    time.sleep(seconds)
    end = time.monotonic()
    for rank in arm.ranks:
        rank.signal(signal.SIGSTOP)
    everything_then, own_then = busy_seconds(arm.ranks)
    others = (everything_then - everything) - (own_then - own)
    return (begin, end), max(0.0, others / (end - begin) / os.cpu_count())


def take_turns(
    arms: Sequence[Arm], rounds: int, seconds: float, hosts: Sequence[str], quiet: float, patience: float
) -> dict[str, dict]:
    """-> {arm: {ranks, seconds of steps, bytes of steps, others: share of the machine that other programs used}}.

    A turn in which others used more than `quiet` of the machine is repeated, for an equal share of `patience` seconds;
    the quietest counts.
    """
    turns: dict[str, list] = {arm.name: [] for arm in arms}
    for number in range(rounds):
        # Back and forth, so that a machine that slows down gradually treats the arms alike.
        for arm in arms if number % 2 == 0 else arms[::-1]:
            tried = [turn(arm, seconds, hosts)]
            while tried[-1][1] > quiet and len(tried) * seconds * rounds * len(arms) <= patience:
                tried.append(turn(arm, seconds, hosts))
            turns[arm.name].append(min(tried, key=lambda t: t[1]))
        logger.info(f"round {number + 1} of {rounds}")
    found = {}
    for arm in arms:
        measured = [whole_steps(rank.steps(), [t for t, _ in turns[arm.name]]) for rank in arm.ranks]
        if not all(s for s, _ in measured):
            raise UserError(f"{arm.name}: no whole step in {seconds:.0f} s; lengthen --turn")
        found[arm.name] = {
            "ranks": len(arm.ranks),
            "megabits": arm.rate,
            "seconds": [[round(x, 4) for x in s] for s, _ in measured],
            "sent": float(np.median([b for _, sent in measured for b in sent])),
            "others": round(float(np.mean([others for _, others in turns[arm.name]])), 3),
        }
    return found


def measure(args: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UserError("the measurement needs two cores")
    if not (args.data / "annotations").is_dir():
        raise UserError(f"--data {args.data} is no data set in COCO's layout: annotations/ is missing")
    rates = args.rates if os.geteuid() == 0 and shutil.which("tc") else []
    if args.rates and not rates:
        logger.warning("no rates are measured: network namespaces need root and iproute2")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hosts = stack.enter_context(cable()) if rates else []
        log = folder / "log.txt"
        schedules = {}
        sizes = {"256": (SMALL, 256, 352, 5), "800": ([], 800, 1088, 2)}
        for name, (settings, height, width, repeats) in sizes.items():
            logger.info(f"when gradients are ready, short edge {name}")
            out = folder / f"schedule-{name}.json"
            options = ["--core", 0, "--size", height, width, "--repeats", repeats]
            options += ["--config", *MODEL, *settings, *args.config]
            finish([start(own_command("schedule-process", out, *options), log)], log)
            schedules[name] = read_json(out, "schedule")
        devices = {}
        for count in (2, 4):
            logger.info(f"sums over {count} devices of one process")
            options = ["--devices", count, "--schedule", folder / "schedule-800.json", "--repeats", 9]
            finish([start(own_command("devices-process", folder / "devices.json", *options), log)], log)
            devices[count] = read_json(folder / "devices.json", "times")
        reductions = _measure_reductions(folder, log, hosts, rates, args.four)
        arms = _measure_training(args, folder, log, hosts, rates)
    found = {
        "machine": {
            "cores": len(cores),
            "python": sys.version.split()[0],
            **{p: importlib.metadata.version(p) for p in ("tensorpack", "horovod")},
        },
        "settings": [*MODEL, *SMALL, *args.config],
        "data": args.data.name,
        "areas": padded_areas(args.data).round(4).tolist(),
        "schedules": schedules,
        "devices": {str(k): v for k, v in devices.items()},
        "reductions": reductions,
        "arms": arms,
    }
    write_json(args.out, found)
    logger.info(f"measurements in {args.out}")
    for name in ("measured", "reductions", "validation"):
        print(f"{name}\n{tables(found)[name]}\n")


def _measure_reductions(folder: Path, log: Path, hosts: Sequence[str], rates: Sequence[int], four: bool) -> dict:
    """{"2 ranks", "4 ranks", "2 ranks, 1000 Mbit/s", …: what `reduce_rank` found}."""
    found = {}
    for ranks in (2, 4) if four else (2,):
        logger.info(f"all-reduce of {ranks} ranks on this machine")
        out = folder / f"reduce-{ranks}.json"
        finish([start([*launcher(ranks), *own_command("reduce-rank", out, "--repeats", 6)], log)], log)
        found[f"{ranks} ranks"] = read_json(out, "all-reduce times")
    for rate in rates:
        logger.info(f"all-reduce over {rate} Mbit/s")
        set_rate(hosts, rate)
        out = folder / f"reduce-{rate}.json"
        command = own_command("reduce-rank", out, "--repeats", 3)
        finish([start([*node_launcher(h, i, 23461), *command], log) for i, h in enumerate(hosts)], log)
        found[f"2 ranks, {rate} Mbit/s"] = read_json(out, "all-reduce times")
    return found


def _measure_training(
    args: argparse.Namespace, folder: Path, log: Path, hosts: Sequence[str], rates: Sequence[int]
) -> dict[str, dict]:
    def training(name: str, interface: str, *options: Any, trainer: str = "replicated") -> list[str]:
        config = [*MODEL, *SMALL, *QUIET, *args.config, f"DATA.BASEDIR={args.data.resolve()}", f"TRAINER={trainer}"]
        words = ["train-rank", folder / name, "--interface", interface, *options, "--arguments"]
        return own_command(*words, "--logdir", folder / f"run-{name}", "--config", *config)

    alone = [Rank(folder, f"alone{i}", 0) for i in range(4 if args.four else 2)]
    local = [Rank(folder, "local", i) for i in range(2)]
    apart = [Rank(folder, "apart", i) for i in range(2)] if rates else []
    local4 = [Rank(folder, "local4", i) for i in range(4)] if args.four else []
    everyone = [*alone, *local, *apart, *local4]
    arms = [Arm("1 process", alone[:1]), Arm("2 separate processes", alone[:2]), Arm("2 ranks", local)]
    arms += [Arm(f"2 ranks, {rate} Mbit/s", apart, rate) for rate in rates]
    if args.four:
        arms += [Arm("4 separate processes", alone), Arm("4 ranks", local4)]
    processes = []
    logger.info(f"{len(everyone)} training processes start")
    try:
        for i, _ in enumerate(alone):
            processes.append(start(training(f"alone{i}", "lo", "--core", i), log))
        processes.append(start([*launcher(2), *training("local", "lo", trainer="horovod")], log))
        for i, host in enumerate(hosts if rates else []):
            command = training("apart", "eth0", trainer="horovod")
            processes.append(start([*node_launcher(host, i, 23462), *command], log))
        if args.four:
            processes.append(start([*launcher(4), *training("local4", "lo", trainer="horovod")], log))
        deadline = time.monotonic() + 900
        waiting = list(everyone)
        while waiting:
            for rank in [r for r in waiting if len(r.steps()) >= 3]:
                waiting.remove(rank)
            for group in (alone, local, apart, local4):  # what has warmed up makes room for the others
                if group is alone:
                    ready = [r for r in alone if r not in waiting]
                else:
                    ready = [] if any(r in waiting for r in group) else group
                for rank in ready:
                    rank.signal(signal.SIGSTOP)
            if time.monotonic() > deadline or any(p.poll() is not None for p in processes):
                raise UserError(f"a training process did not start: {log.read_text()[-500:]}")
            time.sleep(0.3)
        return take_turns(arms, args.rounds, args.turn, hosts, args.quiet, args.patience)
    finally:
        for rank in everyone:
            with contextlib.suppress(FileNotFoundError):
                rank.signal(signal.SIGKILL)
        end(processes)


# ------------------------------------------------------------------------------------- the model against measurements
def without_interruptions(seconds: Sequence[float]) -> np.ndarray:
    """Step times but for those over twice the median, in which something else had the processor."""
    seconds = np.asarray(seconds, float)
    return seconds[seconds <= 2 * np.median(seconds)]


def arm_step(arm: dict) -> float:
    """Mean seconds per step of an arm; its ranks take steps together, or are separate processes of equal weight."""
    return float(np.mean([without_interruptions(s).mean() for s in arm["seconds"]]))


def stretched(schedule: dict, seconds: float) -> tuple[np.ndarray, float]:
    """The schedule's ready times and tail for a step of so many seconds."""
    factor = seconds / (max(schedule["ready"]) + schedule["tail"])
    return np.array(schedule["ready"]) * factor, schedule["tail"] * factor


def measured_cost(reduction: dict) -> Callable[[float], Cost]:
    wall = fit_link(reduction["sizes"], reduction["seconds"])
    cpu = fit_link(reduction["sizes"], reduction["cpu"])

    def cost(size: float) -> Cost:
        seconds = wall.latency + size / wall.bandwidth
        return Cost(seconds, min(seconds, cpu.latency + size / cpu.bandwidth))

    return cost


def predicted_arm(found: dict, name: str) -> float:
    """Seconds per step of ranks that communicate, from the all-reduce's times and from the steps of as many separate
    processes."""
    ranks = found["arms"][name]["ranks"]
    separate = found["arms"][f"{ranks} separate processes"]
    samples = np.concatenate([without_interruptions(s) for s in separate["seconds"]])
    compute = expected_slowest(samples, ranks)
    reduction = found["reductions"][name]
    ready, tail = stretched(found["schedules"]["256"], compute / (1 - reduction["idle"]))
    return reduced_step(ready, found["schedules"]["256"]["sizes"], tail, measured_cost(reduction))


def markdown(rows: Sequence[Sequence], headers: Sequence[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def measured_table(found: dict) -> str:
    arms = found["arms"]
    one = arm_step(arms["1 process"])
    counted = sum(found["schedules"]["256"]["sizes"])
    rows = []
    for name, arm in arms.items():
        step = arm_step(arm)
        separate = arms.get(f"{arm['ranks']} separate processes", arms["1 process"])
        shared = arm["ranks"] / min(arm["ranks"], found["machine"]["cores"])
        values = np.concatenate([without_interruptions(s) for s in arm["seconds"]])
        spread = values.std() / values.mean()
        communicates = "rank" in name
        rows.append(
            [
                name, str(len(arm["seconds"][0])), f"{arm['others']:.0%}", f"{step:.3f}", f"{spread:.0%}",
                f"{arm['ranks'] / step:.2f}", f"{one * shared / step:.2f}",
                f"{arm_step(separate) / step:.2f}" if communicates else "",
                f"{ring_bytes(counted, arm['ranks']) / 1e6:.1f}" if communicates else "",
                f"{arm['sent'] / (arm['ranks'] if arm['megabits'] is None else 1) / 1e6:.1f}" if communicates else "",
            ]
        )  # fmt: skip
    headers = "|steps|other programs|s/step|spread|images/s|efficiency|without contention"
    headers += "|MB sent per rank and step, counted|measured"
    return markdown(rows, headers.split("|"))


def reduction_table(found: dict) -> str:
    rows = []
    for name, reduction in found["reductions"].items():
        wall, cpu = (fit_link(reduction["sizes"], reduction[k]) for k in ("seconds", "cpu"))
        bus = ring_bytes(1, reduction["ranks"]) * wall.bandwidth
        rows.append(
            [name, f"{wall.latency * 1e3:.1f}", f"{wall.bandwidth / 1e6:.0f}", f"{bus / 1e6:.0f}",
             f"{wall.bandwidth / cpu.bandwidth:.0%}", f"{reduction['idle']:.1%}"]
        )  # fmt: skip
    headers = ["", "latency ms", "MB/s reduced", "MB/s sent per rank", "processor busy", "processor, nothing to reduce"]
    return markdown(rows, headers)


def validation_table(found: dict) -> str:
    rows = []
    for name, arm in found["arms"].items():
        if name in found["reductions"]:
            measured, predicted = arm_step(arm), predicted_arm(found, name)
            difference = f"{predicted / measured - 1:+.1%}"
            rows.append([name, f"{arm['others']:.0%}", f"{measured:.3f}", f"{predicted:.3f}", difference])
    return markdown(rows, ["", "other programs", "measured s/step", "predicted s/step", "difference"])


def devices_table(found: dict) -> str:
    rows = [
        [str(n), *(f"{times[k] * 1e3:.0f}" for k in ("mean", "collective"))] for n, times in found["devices"].items()
    ]
    return markdown(rows, ["devices", "each sum on one device ms", "CollectiveReduce ms"])


# ------------------------------------------------------------------------------------------------- many GPUs, predicted
# Assumptions, with their origin; docs/SCALING.md repeats them.
NVLINK = Link(3.4e-6, 120e9)  # latency of a round: NCCL's tuner; all-reduce bandwidth: 8 V100 of a DGX-1
ROUND_LATENCY = 14e-6  # of a ring through the network: NCCL's tuner
WIRE_SHARE = 0.8  # of a network's nominal bandwidth that all-reduces reach
MESSAGE_LATENCY = 25e-6  # from process to process over TCP, for Horovod's coordination
BUSY = 0.1  # share of an all-reduce's time that it takes from the computation (its kernels use the same GPU)
GIGABITS = (25, 100, 400)


class Gpu(NamedTuple):
    """A published time per step, of `ranks` GPUs of one machine with `images` each."""

    name: str
    images: int
    step: float
    ranks: int = 8


# 50 images/s: github.com/tensorpack/benchmarks/tree/master/MaskRCNN (TRAINER=horovod).
SINGLE = Gpu("V100, float32, 1 image", 1, 8 / 50)
# Training times of 12 and 24 epochs: github.com/aws-samples/mask-rcnn-tensorflow; their differences know no start-up.
# 117,266 images; machines of 8 V100 with 100 Gbit/s.
EPOCHS_HOURS = {8: 9.78 - 5.09, 16: 5.60 - 3.11, 32: 3.33 - 1.94}
AWS_STEPS = {n: hours * 3600 / (12 * 117266 / (4 * n)) for n, hours in EPOCHS_HOURS.items()}
FOUR = Gpu("V100, float16, 4 images", 4, AWS_STEPS[8])
FASTER = Gpu("a GPU 4 times as fast, 4 images", 4, AWS_STEPS[8] / 4)


def gpu_cluster(gigabits: float) -> Cluster:
    return Cluster(8, NVLINK, Link(ROUND_LATENCY, WIRE_SHARE * gigabits * 1e9 / 8))


def gpu_step(
    found: dict, compute: float, images: int, ranks: int, cluster: Cluster, share: float = 1.0
) -> tuple[float, float]:
    """Seconds per step, and those of them in which the computation of the slowest rank runs; `compute` is the mean
    computation of a rank, whose images differ in area; `share` of the gradients' bytes are sent."""
    slowest = compute * expected_slowest(spread_of_batches(found["areas"], images), ranks)
    schedule = found["schedules"]["800"]
    ready, tail = stretched(schedule, slowest)

    def cost(size: float) -> Cost:
        seconds = ring_seconds(size, ranks, cluster)
        return Cost(seconds, BUSY * seconds)

    if ranks == 1:
        return slowest, slowest
    coordination = coordination_seconds(ranks, MESSAGE_LATENCY)
    return reduced_step(ready, share * np.array(schedule["sizes"]), tail, cost, coordination), slowest


def calibrated(found: dict, gpu: Gpu) -> float:
    """The mean computation of a rank with which the model gives the published step."""
    low, high = 0.0, gpu.step
    cluster = gpu_cluster(GIGABITS[0])  # of one machine: its network is not used
    for _ in range(50):
        middle = (low + high) / 2
        if gpu_step(found, middle, gpu.images, gpu.ranks, cluster)[0] < gpu.step:
            low = middle
        else:
            high = middle
    return low


def prediction_table(found: dict) -> str:
    rows = []
    for gpu in (SINGLE, FOUR, FASTER):
        compute = calibrated(found, gpu)
        for ranks in (8, 64, 512):
            for gigabits in GIGABITS if ranks > 8 else GIGABITS[:1]:
                cluster = gpu_cluster(gigabits)
                step, slowest = gpu_step(found, compute, gpu.images, ranks, cluster)
                halved, _ = gpu_step(found, compute, gpu.images, ranks, cluster, share=0.5)
                rows.append(
                    [
                        gpu.name, str(ranks), f"{gigabits} Gbit/s" if ranks > 8 else "NVLink", f"{step * 1e3:.0f}",
                        f"{(slowest - compute) * 1e3:.0f}", f"{(step - slowest) * 1e3:.0f}",
                        f"{ranks * gpu.images / step:,.0f}", f"{compute / step:.0%}", str(ranks * gpu.images),
                        f"{halved * 1e3:.0f}",
                    ]
                )  # fmt: skip
    headers = "|GPUs|between machines|step ms|slowest rank ms|communication ms|images/s|efficiency|total batch"
    headers += "|step ms if gradients were sent as float16"
    return markdown(rows, headers.split("|"))


def sync_bn_table() -> str:
    stages = [(64, 3), (128, 4), (256, 6), (512, 3)]
    channels = [64] + [c for width, blocks in stages for c in [4 * width, *[width, width, 4 * width] * blocks]]
    rows = [
        [str(ranks), f"{sync_bn_bytes(channels, ranks) / 1e6:.2f}",
         f"{sync_bn_seconds(channels, ranks, gpu_cluster(100), MESSAGE_LATENCY):.2f}"]
        for ranks in (8, 64, 512)
    ]  # fmt: skip
    return markdown(rows, ["GPUs", "MB sent per rank and step", "s/step"])


def published_table(found: dict) -> str:
    compute = calibrated(found, FOUR)
    rows = []
    for ranks, published in AWS_STEPS.items():
        step, _ = gpu_step(found, compute, 4, ranks, gpu_cluster(100))
        note = "calibrated" if ranks == 8 else f"{step / published - 1:+.1%}"
        rows.append([str(ranks), f"{published * 1e3:.0f}", f"{step * 1e3:.0f}", note])
    return markdown(rows, ["GPUs", "published step ms", "predicted step ms", "difference"])


def tables(found: dict) -> dict[str, str]:
    return {
        "measured": measured_table(found),
        "reductions": reduction_table(found),
        "validation": validation_table(found),
        "devices": devices_table(found),
        "published": published_table(found),
        "predictions": prediction_table(found),
        "syncbn": sync_bn_table(),
    }


def fill_document(text: str, found: dict, names: Sequence[str]) -> str:
    """The document with each of these tables between its marks, `<!-- name -->` and `<!-- end -->`, made anew."""
    made = tables(found)
    for name in names:
        table = made[name]
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            raise UserError(f"the document has no place for the table '{name}': <!-- {name} --> … <!-- end -->")
        text = mark.sub(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text)
    return text


def plot(found: dict, out: Path) -> None:
    """Three panels: steps here over the rate of the cable, measured and predicted; efficiency over numbers of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (here, one, four) = pyplot.subplots(1, 3, figsize=(12.5, 3.9))
    arms = {n: a for n, a in found["arms"].items() if n in found["reductions"] and a["ranks"] == 2}
    names = sorted(arms, key=lambda n: arms[n]["megabits"] or np.inf)
    here.plot([predicted_arm(found, n) for n in names], "o--", color="C0", mfc="none", markersize=9, label="predicted")
    for color, label, wanted in (("C1", "measured", False), ("0.6", "measured, machine busy", True)):
        at = [i for i, n in enumerate(names) if (arms[n]["others"] > QUIET_SHARE) == wanted]
        if at:
            here.plot(at, [arm_step(arms[names[i]]) for i in at], "s", color=color, markersize=5, label=label)
    here.set_xticks(range(len(names)), [f"{arms[n]['megabits'] or 'unlimited'}" for n in names])
    here.axhline(arm_step(found["arms"]["2 separate processes"]), color="0.5", linewidth=1, label="no communication")
    here.set_ylim(bottom=0)
    here.set_xlabel("network between the processes, Mbit/s")
    here.set_ylabel("seconds per step")
    here.set_title("Measured here: 2 processes, 1 core each")
    counts = 2 ** np.arange(10)
    for panel, gpu in ((one, SINGLE), (four, FOUR)):
        compute = calibrated(found, gpu)
        slowest = [gpu_step(found, compute, gpu.images, int(n), gpu_cluster(400))[1] for n in counts]
        panel.plot(counts, compute / np.array(slowest), color="0.5", linewidth=1, label="free communication")
        for color, gigabits in zip(("C2", "C0", "C3"), reversed(GIGABITS)):
            cluster = gpu_cluster(gigabits)
            steps = [gpu_step(found, compute, gpu.images, int(n), cluster)[0] for n in counts]
            panel.plot(counts, compute / np.array(steps), ".-", color=color, label=f"{gigabits} Gbit/s, predicted")
        if gpu is FOUR:
            published = list(AWS_STEPS)
            panel.plot(
                published, [compute / AWS_STEPS[n] for n in published], "s", color="C1", label="published, 100 Gbit/s"
            )
        else:
            panel.plot([8], [compute / SINGLE.step], "s", color="C1", label="published, NVLink")
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts[::3], counts[::3])
        panel.set_ylim(0, 1.05)
        panel.set_xlabel("GPUs, 8 per machine")
        panel.set_ylabel("efficiency")
        panel.set_title(f"{gpu.name} per GPU")
    for panel in (here, one, four):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    with atomic_write(out, "wb") as f:
        figure.savefig(f, format=out.suffix.lstrip(".") or "png", dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------- several devices
def devices_process(out: Path, sizes: Sequence[int], devices: int, repeats: int) -> None:
    """Times the mean over logical CPU devices of gradients of so many bytes, as the replicated trainer takes it and by
    CollectiveReduce, in alternation -> JSON {mean, collective}: medians in seconds."""
    from training import _mean_over_devices, session_config
    from utils.tf_v1 import tf

    names = [f"/cpu:{i}" for i in range(devices)]
    with tf.Graph().as_default(), tf.Session(config=session_config(devices)) as session:
        gradients = []
        for name in names:
            with tf.device(name):
                gradients.append([tf.Variable(tf.ones([size // 4])) for size in sizes])
        read = []
        for name, own in zip(names, gradients):
            with tf.device(name):
                read.append([v.read_value() for v in own])
        means = _mean_over_devices(read, gradients[0], names)
        updates = {"mean": [], "collective": []}
        for i, name in enumerate(names):
            with tf.device(name):
                for k, variable in enumerate(gradients[i]):
                    updates["mean"].append(variable.assign(means[k]).op)
                    total = tf.raw_ops.CollectiveReduce(
                        input=read[i][k], group_size=devices, group_key=1, instance_key=k + 1, merge_op="Add",
                        final_op="Id", subdiv_offsets=[0],
                    )  # fmt: skip
                    updates["collective"].append(variable.assign(total * (1.0 / devices)).op)
        ops = {kind: tf.group(*of_kind) for kind, of_kind in updates.items()}
        session.run(tf.global_variables_initializer())
        times: dict[str, list] = {kind: [] for kind in ops}
        for _ in range(repeats + 1):
            for kind, op in ops.items():
                begin = time.perf_counter()
                session.run(op)
                times[kind].append(time.perf_counter() - begin)
        write_json(out, {kind: float(np.median(seconds[1:])) for kind, seconds in times.items()})


# ------------------------------------------------------------------------------------------------------------- command
def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="measure | simulate | plot | report")
    measure_parser = commands.add_parser("measure", help="train.py with 1 and 2 ranks here")
    measure_parser.add_argument("--data", type=Path, default=ROOT / "tests" / "data" / "coco_mini", metavar="DIR")
    measure_parser.add_argument("--rounds", type=int, default=3, help="turns of each arm (default %(default)s)")
    measure_parser.add_argument("--turn", type=float, default=12, metavar="S", help="seconds of a turn (%(default)s)")
    measure_parser.add_argument(
        "--quiet", type=float, default=QUIET_SHARE, metavar="SHARE", help="other programs may use so much"
    )
    measure_parser.add_argument(
        "--patience", type=float, default=300, metavar="S", help="to repeat turns of less quiet"
    )
    measure_parser.add_argument("--rates", type=int, nargs="*", default=[2000, 1000, 500], metavar="MBIT")
    measure_parser.add_argument("--four", action="store_true", help="4 ranks as well, two per core")
    measure_parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VAL", help="settings to change")
    measure_parser.add_argument("--out", type=Path, default=MEASURED)
    for name, text in (("simulate", "print the tables"), ("report", "write them into the documents")):
        commands.add_parser(name, help=text).add_argument("--measured", type=Path, default=MEASURED)
    plot_parser = commands.add_parser("plot", help="draw the predictions and what was measured")
    plot_parser.add_argument("--measured", type=Path, default=MEASURED)
    plot_parser.add_argument("--out", type=Path, default=ROOT / "docs" / "scaling.png")
    # What `measure` starts.
    for name in ("train-rank", "reduce-rank", "schedule-process", "devices-process"):
        own = commands.add_parser(name)
        own.add_argument("out", type=Path)
        own.add_argument("--core", type=int)
        own.add_argument("--repeats", type=int, default=3)
        own.add_argument("--interface", default="lo")
        own.add_argument("--size", type=int, nargs=2)
        own.add_argument("--devices", type=int, default=2)
        own.add_argument("--schedule", type=Path)
        own.add_argument("--config", nargs="+", default=[])
        own.add_argument("--arguments", nargs=argparse.REMAINDER, default=[])
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.command == "measure":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending what it started
        measure(args)
    elif args.command == "simulate":
        for name, table in tables(read_json(args.measured, "measurements")).items():
            print(f"{name}\n{table}\n")
    elif args.command == "report":
        found = read_json(args.measured, "measurements")
        for path, names in DOCUMENTS.items():
            text = fill_document(path.read_text(), found, names)
            with atomic_write(path) as f:
                f.write(text)
    elif args.command == "plot":
        plot(read_json(args.measured, "measurements"), args.out)
    elif args.command == "devices-process":
        devices_process(args.out, read_json(args.schedule, "schedule")["sizes"], args.devices, args.repeats)
    else:
        pin(args.core)
        if args.command == "train-rank":
            rank = os.environ.get("HOROVOD_RANK", "0")
            args.out.with_name(f"{args.out.name}-{rank}.pid").write_text(str(os.getpid()))
            return train_rank(args.out.with_name(f"{args.out.name}-{rank}.steps"), args.interface, args.arguments)
        if args.command == "reduce-rank":
            reduce_rank(args.out, args.repeats)
        else:
            schedule_process(args.out, args.config, *args.size, args.repeats)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        logger.error(str(e))
        sys.exit(2)
