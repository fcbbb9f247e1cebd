"""Time and memory of PackRCNN beside torchvision's and detectron2's Mask R-CNN on this machine.

  python benchmarks/peers.py measure OUT                        everything, in turns, at most an hour on 2 idle cores
  python benchmarks/peers.py measure OUT --works step-256 data  some of it
  python benchmarks/peers.py table OUT
  python benchmarks/peers.py environment                        only installs what the peers need (5.5 GB)

The same work for each: R50-FPN on random weights, 80 classes, the same images, objects, numbers of proposals and RoIs.
Each system is a process of its own, which does one piece of work when told to; they take turns, so that a slow moment
of the machine meets all, and a ratio is the median over the rounds. Memory is the peak of such a process. With large
images PackRCNN in float32 takes turns with one other at a time, for the memory's sake. torch and torchvision are
installed in an environment of their own (--env); detectron2 takes part when --detectron2 names the folder of its
sources.
"""

import import_path

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask as coco_mask
from tabulate import tabulate

from common import UserError, errors_in_one_line, logger, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent

PEERS_SIDE = str(ROOT / "benchmarks" / "peers_torch.py")
OWN_SIDE = str(ROOT / "benchmarks" / "peers_packrcnn.py")
TORCH = ["torch==2.14.1", "torchvision==0.29.1", "numpy", "pillow", "pycocotools"]  # these two fit each other on a CPU
# What detectron2 0.6 imports; its own sources come from --detectron2.
DETECTRON2 = ["fvcore", "iopath", "yacs", "omegaconf", "hydra-core", "cloudpickle", "tabulate", "termcolor", "tqdm",
              "matplotlib", "setuptools<81"]  # fmt: skip
OURS = ("packrcnn", "float32")
SIZES = {800: (800, 1088, 512, 2), 256: (256, 352, 64, 0)}  # short edge -> padded image, RoIs, FREEZE_AT
ANCHORS = [32, 64, 128, 256, 512]
PROPOSALS = 2000
MINI = ROOT / "tests" / "data" / "coco_mini"


class Work(NamedTuple):
    kind: str  # as in WORKS of peers_torch.py and peers_packrcnn.py
    size: int = 800
    images: int = 1
    rounds: int = 5
    precisions: Sequence[str] = ("float32", "bfloat16")
    text: str = ""
    in_pairs: bool = False


WORKS = {
    "step-800": Work("step", 800, 1, 4, text="training step, 800 x 1088, 1 image", in_pairs=True),
    "step-800-2": Work("step", 800, 2, 3, text="training step, 800 x 1088, 2 images", in_pairs=True),
    "step-800-4": Work("step", 800, 4, 1, text="training step, 800 x 1088, 4 images (one step)", in_pairs=True),
    "step-256": Work("step", 256, 1, 7, text="training step, 256 x 352, 1 image"),
    "step-256-2": Work("step", 256, 2, 7, text="training step, 256 x 352, 2 images"),
    "predict": Work("predict", 800, 1, 5, text="prediction, 800 x 1333, 1 image, 100 masks", in_pairs=True),
    "predict-2": Work("predict", 800, 2, 3, text="prediction, 800 x 1333, 2 images", in_pairs=True),
    "data": Work("data", 800, 1, 9, ("float32",), "reading the training images of coco_mini, one process"),
    "score": Work("score", 800, 1, 5, ("float32",), "COCO's scores, 100 images, boxes and masks"),
}


# --------------------------------------------------------------------------------------------- the peers' environment
def add_environment_options(parser: argparse.ArgumentParser) -> None:
    home = Path.home() / ".cache" / "packrcnn" / "peers"
    parser.add_argument("--env", type=Path, default=home, help="environment of torch and torchvision (%(default)s)")
    parser.add_argument("--detectron2", type=Path, metavar="DIR", help="folder of detectron2's sources")


def environment(folder: Path, detectron2: Path | None = None) -> Path:
    """Installs what the peers need into a virtual environment in `folder`, unless it is there -> its Python."""
    if detectron2 is not None and not (detectron2 / "detectron2" / "__init__.py").exists():
        raise UserError(f"--detectron2 {detectron2}: no detectron2/__init__.py in it; name the folder of its sources")
    packages = TORCH + (DETECTRON2 if detectron2 is not None else [])
    python, record = folder / "bin" / "python", folder / "installed.json"
    have = read_json(record, "record of the environment") if record.exists() else []
    missing = [p for p in packages if p not in have]
    if not missing:
        return python
    logger.info(f"installing {', '.join(missing)} into {folder}")
    try:
        if not python.exists():
            venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *missing], check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        raise UserError(f"--env {folder}: the packages could not be installed ({e}); see pip's message above") from e
    write_json(record, have + missing)
    return python


def peers_command(env: Path, detectron2: Path | None, job: Path) -> list[str]:
    """Starts the peers' side with a job; detectron2's sources are on its path."""
    path = [f"PYTHONPATH={detectron2}"] if detectron2 is not None else []
    return ["env", *path, str(environment(env, detectron2)), "-W", "ignore", PEERS_SIDE, str(job)]


# ----------------------------------------------------------------------------------------------------------- processes
class Side:
    """One system at work in a process of its own."""

    def __init__(self, command: Sequence[str], log: Path, cores: Sequence[int] = ()):
        self.log = log
        pinned = (lambda: os.sched_setaffinity(0, cores)) if cores else None
        with open(log, "w") as errors:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                preexec_fn=pinned,
            )  # fmt: skip
        self.notes: dict[str, Any] = {}

    def _answer(self, key: str) -> Any:
        for line in self._process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                content = json.loads(line)
                if isinstance(content, dict) and key in content:
                    return content[key]
        last = (self.log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{self.log.name}: the process ended before its answer ({last})")

    def wait_until_ready(self) -> None:
        self.notes = self._answer("ready")

    def run(self) -> float:
        """Does the work once -> the seconds it took."""
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer says why
        return self._answer("seconds")

    def finish(self) -> float:
        """Ends the process -> its peak memory in MiB."""
        self._process.stdin.close()
        peak = self._answer("peak_mib")
        self._process.wait()
        return peak

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def in_turns(sides: dict[Any, Side], rounds: int) -> tuple[dict[Any, list[float]], dict[Any, float]]:
    """Runs each side once untimed, then `rounds` times in turn -> seconds and peak memory of each."""
    try:
        for side in sides.values():  # one after the other, so that no start disturbs another
            side.wait_until_ready()
        for side in sides.values():
            side.run()
        seconds: dict[Any, list[float]] = {key: [] for key in sides}
        for _ in range(rounds):
            for key, side in sides.items():
                seconds[key].append(side.run())
        return seconds, {key: side.finish() for key, side in sides.items()}
    finally:
        for side in sides.values():
            side.stop()


# ------------------------------------------------------------------------------------------------- inputs of the work
def training_batch(work: Work) -> dict[str, np.ndarray]:
    from benchmarks.train_speed import synthetic_batch

    height, width, _, _ = SIZES[work.size]
    return synthetic_batch(work.images, height, width)


def pictures(work: Work) -> dict[str, np.ndarray]:
    """Blurred noise: white noise has no structures that give proposals."""
    rng = np.random.default_rng(0)
    noise = [cv2.GaussianBlur(rng.integers(0, 256, (800, 1333, 3), np.uint8), (0, 0), 7) for _ in range(work.images)]
    return {"image": np.stack([cv2.normalize(n, None, 0, 255, cv2.NORM_MINMAX) for n in noise])}


def results_to_score(folder: Path, images: int = 100, objects: int = 7, found: int = 40, classes: int = 80) -> None:
    """Writes truth.json and results.json: ellipses, and detections some of which lie beside them."""
    rng = np.random.default_rng(0)
    truth: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": c, "name": f"class {c}"} for c in range(1, classes + 1)]
    results, angle = [], np.linspace(0, 2 * np.pi, 24, endpoint=False)
    for image in range(1, images + 1):
        truth["images"].append({"id": image, "file_name": f"{image}.jpg", "height": 480, "width": 640})
        size = np.exp(rng.uniform(np.log(16), np.log(300), (objects, 2)))
        center = rng.uniform([0, 0], [640, 480], (objects, 2))
        labels = rng.integers(1, classes + 1, objects)
        for n in range(found):
            one = n % objects
            exact = n < objects
            near = center[one] + (0 if exact else rng.normal(0, 0.15, 2)) * size[one]
            label = int(labels[one] if exact or rng.random() < 0.6 else rng.integers(1, classes + 1))
            ring = near + size[one] / 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
            ring = np.clip(ring, 0, [640, 480])
            x, y = ring.min(0)
            width, height = ring.max(0) - (x, y)
            box = [float(x), float(y), float(width), float(height)]
            entry: dict[str, Any] = {"image_id": image, "category_id": label, "bbox": box}
            if exact:
                truth["annotations"].append(entry | {
                    "id": len(truth["annotations"]) + 1, "iscrowd": 0, "area": box[2] * box[3] * np.pi / 4,
                    "segmentation": [ring.reshape(-1).tolist()],
                })  # fmt: skip
            else:
                rle = coco_mask.frPyObjects([ring.reshape(-1).tolist()], 480, 640)[0]
                rle = {"size": rle["size"], "counts": rle["counts"].decode()}
                results.append(entry | {"score": float(rng.random()), "segmentation": rle})
    write_json(folder / "truth.json", truth)
    write_json(folder / "results.json", results)


def job_of(work: Work, system: str, precision: str, folder: Path) -> dict[str, Any]:
    _, _, rois, freeze_at = SIZES[work.size]
    job: dict[str, Any] = {
        "work": work.kind, "system": system, "precision": precision, "seed": 1, "batch": str(folder / "batch.npz"),
        "model": {
            "masks": True, "classes": 80, "norm": "FrozenBN", "freeze_at": freeze_at, "anchor_sizes": ANCHORS,
            "rois": rois, "proposals": PROPOSALS, "short_edge": work.size, "max_size": 1333,
        },
    }  # fmt: skip
    if work.kind == "score":
        job |= {"annotations": str(folder / "truth.json"), "results": str(folder / "results.json")}
    if work.kind == "data":
        truth = str(MINI / "annotations" / "instances_train2017.json")
        job |= {"annotations": truth, "images": {truth: str(MINI / "train2017")}}
    return job


def write_inputs(work: Work, folder: Path) -> None:
    if work.kind == "score":
        results_to_score(folder)
    elif work.kind != "data":
        np.savez(folder / "batch.npz", **(training_batch(work) if work.kind == "step" else pictures(work)))


# ---------------------------------------------------------------------------------------------------------- measurement
def groups(systems: Sequence[str], precisions: Sequence[str], in_pairs: bool) -> list[list[tuple[str, str]]]:
    """Who takes turns with whom; PackRCNN in float32 is always among them, first."""
    others = [(s, p) for s in systems for p in precisions if (s, p) != OURS]
    return [[OURS, other] for other in others] if in_pairs else [[OURS, *others]]


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """-> {work, pairs: [{system, precision, seconds of it, seconds of PackRCNN in float32}], peak memory of each}."""
    work = WORKS[name]
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    systems = ["packrcnn", "torchvision"] + ["detectron2"] * (args.detectron2 is not None)
    record: dict[str, Any] = {"work": name, "cores": len(cores), "pairs": [], "peak_mib": {}, "notes": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(work, folder)
        for group in groups(systems, work.precisions, work.in_pairs):
            sides = {}
            for system, precision in group:
                path = folder / f"{system}-{precision}.json"
                write_json(path, job_of(work, system, precision, folder))
                command = [sys.executable, OWN_SIDE, str(path)]
                if system != "packrcnn":
                    command = peers_command(args.env, args.detectron2, path)
                sides[system, precision] = Side(command, args.out / f"{name}-{path.stem}.log", cores)
            logger.info(f"{name}: {', '.join(map(' '.join, group))}")
            seconds, peaks = in_turns(sides, args.rounds or work.rounds)
            for key, peak in peaks.items():
                label = " ".join(key)
                record["peak_mib"].setdefault(label, []).append(peak)
                record["notes"][label] = sides[key].notes
            for key in group[1:]:
                pair = {"system": key[0], "precision": key[1], "seconds": seconds[key], "ours": seconds[OURS]}
                record["pairs"].append(pair)
    return record


def versions(python: Path, detectron2: Path | None) -> dict[str, str]:
    """Of the programs and the machine that the figures stand for."""
    code = "import torch, torchvision; print(torch.__version__, torchvision.__version__)"
    torch, torchvision = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    own = "import importlib.metadata as m; print(m.version('tensorflow'))"
    tensorflow = subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, check=True).stdout.strip()
    found = {"TensorFlow": tensorflow, "torch": torch, "torchvision": torchvision}
    if detectron2 is not None:
        text = (detectron2 / "detectron2" / "__init__.py").read_text()
        found["detectron2"] = text.partition('__version__ = "')[2].partition('"')[0]
    return found | {"Python": platform.python_version(), "processor": _processor()}


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        special = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
        return ", ".join([fields.get("model name", platform.machine()), *special])
    return platform.machine()


# -------------------------------------------------------------------------------------------------------------- tables
def rows_of(record: dict[str, Any]) -> list[list[str]]:
    """A row for each system and precision: seconds, their ratio to PackRCNN's in float32 in the same rounds, memory."""
    pairs, peaks = record["pairs"], record["peak_mib"]
    ours = float(np.median([s for pair in pairs for s in pair["ours"]]))
    base = float(np.median(peaks[" ".join(OURS)]))
    rows = [[*OURS, f"{ours:.2f}", "1", f"{base / 1024:.2f}", "1"]]
    for pair in pairs:
        ratio = float(np.median(np.divide(pair["seconds"], pair["ours"])))
        peak = float(np.median(peaks[f"{pair['system']} {pair['precision']}"]))
        rows.append([
            pair["system"], pair["precision"], f"{np.median(pair['seconds']):.2f}", f"{ratio:.2f}",
            f"{peak / 1024:.2f}", f"{peak / base:.2f}",
        ])  # fmt: skip
    return rows


def table(records: Sequence[dict[str, Any]]) -> str:
    """Everything that was measured, works in the order of WORKS."""
    rows = []
    for record in sorted(records, key=lambda r: list(WORKS).index(r["work"])):
        text = WORKS[record["work"]].text
        for row in rows_of(record):
            if len(WORKS[record["work"]].precisions) == 1:
                row[1] = ""
            rows.append([text, *row])
            text = ""
    headers = ["work", "system", "precision", "s", "/ PackRCNN float32", "peak GiB", "/ PackRCNN float32"]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def read_records(out: Path) -> list[dict[str, Any]]:
    records = [read_json(out / f"{name}.json", "measurement") for name in WORKS if (out / f"{name}.json").exists()]
    if not records:
        raise UserError(f"{out} holds no measurement; `measure {out}` makes them")
    return records


@errors_in_one_line
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "table", "environment"])
    parser.add_argument("out", type=Path, nargs="?", help="folder of the measurements; a finished one is kept")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK", help=", ".join(WORKS))
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds of each (default: by the work, 1 to 9)")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="processor cores of each system (all)")
    add_environment_options(parser)
    args = parser.parse_args(arguments)
    if args.what == "environment":
        print(environment(args.env, args.detectron2))
        return 0
    if args.out is None:
        raise UserError(f"{args.what} needs the folder of the measurements: peers.py {args.what} OUT")
    if args.what == "measure":
        args.out.mkdir(parents=True, exist_ok=True)
        for name in args.works:
            path = args.out / f"{name}.json"
            if not path.exists():
                write_json(path, measure(name, args), indent=1)
        found = versions(environment(args.env, args.detectron2), args.detectron2)
        print("; ".join(f"{name} {value}" for name, value in found.items()) + "\n")
    print(table(read_records(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
