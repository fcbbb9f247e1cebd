"""Measures the dataflow: images per second and worker core, bytes shipped per image, memory with COCO's full size.

python benchmarks/data_speed.py [--basedir ../shared/data/coco_tiny]     speed on real images at short edge 800
python benchmarks/data_speed.py --augment                                what each augmentation costs
python benchmarks/data_speed.py --synthetic 118287                       load time and memory of so many images
"""

import import_path

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import psutil
from tabulate import tabulate

from common import UserError, logger
from config import Config, default_config, finalize_config
from data_workers import training_dataflow
from dataset import load_training_split

ANNOTATIONS_PER_IMAGE = 7.27  # train2017
MEGABYTE = 2**20


def settings(basedir: Path, *args: str) -> Config:
    cfg = default_config().update_args(["MODE_FPN=True", f"DATA.BASEDIR={basedir}", *args])
    return finalize_config(cfg)


def write_synthetic(basedir: Path, images: int, seed: int = 0) -> Path:
    """A train2017 of this many 640x480 images (hard links to one) and 7.27 annotations each, as long as COCO's."""
    rng = np.random.default_rng(seed)
    folder = basedir / "train2017"
    folder.mkdir(parents=True)
    cv2.imwrite(str(basedir / "image.jpg"), cv2.resize(rng.integers(0, 255, (30, 40, 3), np.uint8), (640, 480)))
    names = [f"{i:012d}.jpg" for i in range(images)]
    for i, name in enumerate(names):
        if i % 50000 == 0:  # file systems limit the links to one file
            os.replace(basedir / "image.jpg", folder / name)
            source = folder / name
            (basedir / "image.jpg").write_bytes(source.read_bytes())
        else:
            os.link(source, folder / name)
    path = basedir / "annotations" / "instances_train2017.json"
    path.parent.mkdir()
    count = int(images * ANNOTATIONS_PER_IMAGE)
    with open(path, "w") as f:
        f.write('{"info": {}, "licenses": [], "images": [')
        for i, name in enumerate(names):
            entry = {
                "license": 3, "file_name": name, "coco_url": f"http://images.cocodataset.org/train2017/{name}",
                "height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45",
                "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg", "id": i,
            }  # fmt: skip
            f.write(", " * (i > 0) + json.dumps(entry))
        f.write('], "annotations": [')
        owners = rng.integers(0, images, count)
        categories = rng.integers(1, 81, count)
        sizes = np.clip(rng.geometric(1 / 23, count), 3, 400)  # vertices: 23 on average
        for a in range(count):
            angles = np.linspace(0, 2 * np.pi, sizes[a], endpoint=False)
            points = np.stack([320 + 200 * np.cos(angles), 240 + 150 * np.sin(angles)], 1) + rng.random(2) * 30
            low, high = points.min(0), points.max(0)
            entry = {
                "segmentation": [np.round(points, 2).ravel().tolist()], "area": 94247.78, "iscrowd": 0,
                "image_id": int(owners[a]), "bbox": np.round([*low, *(high - low)], 2).tolist(),
                "category_id": int(categories[a]), "id": 1000000 + a,
            }  # fmt: skip
            f.write(", " * (a > 0) + json.dumps(entry))
        kinds = [{"supercategory": "thing", "id": i + 1, "name": f"class {i + 1}"} for i in range(80)]
        f.write('], "categories": ' + json.dumps(kinds) + "}")
    return path


def memory(pid: int) -> list[float]:
    """Resident and private (unique set) megabytes."""
    info = psutil.Process(pid).memory_full_info()
    return [info.rss / MEGABYTE, info.uss / MEGABYTE]


def measure_memory(images: int) -> None:
    before = memory(os.getpid())
    with tempfile.TemporaryDirectory() as temporary:
        path = write_synthetic(Path(temporary), images)
        cfg = settings(temporary, "DATA.NUM_WORKERS=4")
        size = path.stat().st_size / MEGABYTE
        started, busy = time.time(), time.process_time()
        split = load_training_split(cfg)
        loaded, busy, after = time.time() - started, time.process_time() - busy, memory(os.getpid())
        flow = training_dataflow(split, cfg)
        started = time.time()
        batches = iter(flow)
        next(batches)
        first = time.time() - started
        for _ in islice(batches, 200):
            pass
        rows = [["before loading", *before], ["after loading", *after], ["while training", *memory(os.getpid())]]
        rows += [[f"worker {n}", *memory(pid)] for n, pid in enumerate(flow.worker_pids)]
        print(f"{images} images, {split.class_counts()[0].sum()} annotations, json of {size:.0f} MB")
        print(
            f"loaded in {loaded:.1f} s ({busy:.1f} s of CPU), first batch {first:.1f} s after the workers were started"
        )
        print(f"peak of the training process while loading: {peak():.0f} MB")
        print(tabulate(rows, ["process", "resident MB", "private MB"], floatfmt=".0f", tablefmt="pipe"))
        batches.close()
        plain = "import json, sys, time; json.load(open(sys.argv[1])); print(f'{time.process_time():.1f} s of CPU'); "
        plain += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        output = subprocess.run([sys.executable, "-c", plain, str(path)], capture_output=True, text=True, check=True)
        busy, kilobytes = output.stdout.splitlines()
        print(f"for comparison, json.load of the file alone: {busy}, peak {int(kilobytes) / 1024:.0f} MB")


def peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure_speed(basedir: Path, count: int) -> None:
    rows = []
    for workers, batch in ((0, 1), (1, 1), (1, 2), (1, 4)):
        found = measure(settings(basedir, f"DATA.NUM_WORKERS={workers}", f"TRAIN.BATCH_SIZE_PER_GPU={batch}"), count)
        rows.append([workers, batch, *found])
    head = ["workers", "batch", "images/s", "images per CPU second of a worker", "CPU ms/image in the training process",
            "MB/image", "/ uint8 batch", "/ unpadded pixels"]  # fmt: skip
    print(tabulate(rows, head, floatfmt=".2f", tablefmt="pipe"))


def measure(cfg: Config, count: int) -> list:
    """The columns of `measure_speed` from "images/s" on."""
    flow = training_dataflow(load_training_split(cfg), cfg)
    batches = iter(flow)
    for _ in islice(batches, 8):
        pass
    processes = [psutil.Process(p) for p in flow.worker_pids] or [psutil.Process()]
    parent = psutil.Process()
    busy = sum(sum(p.cpu_times()[:2]) for p in processes)
    parent_busy, shipped, pixels, valid, images = sum(parent.cpu_times()[:2]), 0, 0, 0, 0
    started = time.time()
    for parts in islice(batches, count // cfg.TRAIN.BATCH_SIZE_PER_GPU):
        images += len(parts[0])
        shipped += sum(p.nbytes for p in parts)
        pixels += parts[0].nbytes
        valid += int((parts[1][:, 0] * parts[1][:, 1]).sum()) * 3
    seconds = time.time() - started
    busy = sum(sum(p.cpu_times()[:2]) for p in processes) - busy
    parent_busy = sum(parent.cpu_times()[:2]) - parent_busy
    batches.close()
    return [
        images / seconds, images / busy, 1e3 * parent_busy / images if cfg.DATA.NUM_WORKERS else None,
        shipped / images / 1e6, shipped / pixels, shipped / valid,
    ]  # fmt: skip


AUGMENTATIONS = {
    "none": [],
    "RANDOM_CROP=[0.6,1.0]": ["PREPROC.RANDOM_CROP=[0.6,1.0]"],
    "PHOTOMETRIC=1.0": ["PREPROC.PHOTOMETRIC=1.0"],
    "SCALE_JITTER=[0.1,2.0], 1024x1024": ["PREPROC.SCALE_JITTER=[0.1,2.0]"],
    "COPY_PASTE=1.0": ["PREPROC.COPY_PASTE=1.0"],
    "SCALE_JITTER=[0.1,2.0], COPY_PASTE=0.5": ["PREPROC.SCALE_JITTER=[0.1,2.0]", "PREPROC.COPY_PASTE=0.5"],
}


def measure_augmentation(basedir: Path, count: int) -> None:
    """One process that augments, in CPU seconds, which other work on the machine disturbs least; best of 3 rounds."""
    rates: dict[str, list] = {name: [] for name in AUGMENTATIONS}
    for _ in range(3):
        for name, augmentation in AUGMENTATIONS.items():
            rates[name].append(measure(settings(basedir, "DATA.NUM_WORKERS=0", *augmentation), count)[1:])
    best = {name: max(found) for name, found in rates.items()}
    rows = [[name, found[0], best["none"][0] / found[0], found[2]] for name, found in best.items()]
    head = ["PREPROC", "images per CPU second", "time / that of none", "MB/image"]
    print(tabulate(rows, head, floatfmt=".2f", tablefmt="pipe"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--basedir", type=Path, default=Path(__file__).resolve().parents[2] / "shared/data/coco_tiny")
    parser.add_argument("--images", type=int, default=400, help="images to time in each row")
    parser.add_argument("--synthetic", type=int, metavar="N", help="measure memory with N made-up images instead")
    parser.add_argument("--augment", action="store_true", help="measure the augmentations instead")
    args = parser.parse_args()
    cv2.setNumThreads(0)  # also without workers: per core
    logger.setLevel("WARNING")
    try:
        if args.synthetic:
            measure_memory(args.synthetic)
        elif not (args.basedir / "annotations").is_dir():
            raise UserError(f"--basedir: {args.basedir} has no annotations/; give a directory in COCO's layout")
        else:
            (measure_augmentation if args.augment else measure_speed)(args.basedir, args.images)
    except UserError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
