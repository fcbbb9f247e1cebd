"""Times Open Images at full size on synthetic files: scoring a results file, loading the training annotations, and
starting train.py on them with all images on disk.

    python benchmarks/oid_speed.py score --images 125000 --detections 100 --classes 500
    python benchmarks/oid_speed.py load --rows 14600000
    python benchmarks/oid_speed.py start --rows 14600000

All write their files into a temporary folder first (not timed) and print tables of seconds and peak memory.
"""

import import_path

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.csv
from tabulate import tabulate

from dataset_openimages import load_openimages
from utils.oid_eval import evaluate, read_detections, read_truth


def peak_gib() -> float:
    # Not getrusage, whose maximum a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def image_names(number: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.sort(np.array([f"{v:016x}" for v in rng.integers(0, 2**63, number)], object))


def write_classes(folder: Path, classes: int) -> list[str]:
    """Class list and a three-level hierarchy: ten groups, each with nine sub-groups of the other classes."""
    labels = [f"/m/{i:05x}" for i in range(classes)]
    (folder / "class-descriptions-boxable.csv").write_text("".join(f"{m},class {i}\n" for i, m in enumerate(labels)))
    nodes = {i: {"LabelName": m, "Subcategory": []} for i, m in enumerate(labels)}
    for i in range(classes - 1, 9, -1):
        nodes[i % 10 if i < 100 else 10 + i % 90]["Subcategory"].append(nodes[i])
    tree = {"LabelName": "/m/0bl9f", "Subcategory": [nodes[i] for i in range(min(10, classes))]}
    (folder / "bbox_labels_hierarchy.json").write_text(json.dumps(tree))
    return labels


def random_boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    centre, size = rng.uniform(0.1, 0.9, (number, 2)), rng.uniform(0.02, 0.6, (number, 2))
    return np.clip(np.concatenate([centre - size / 2, centre + size / 2], 1), 0, 1)


def write_boxes(path: Path, images, image, labels, label, boxes, extra: dict) -> None:
    table = pa.table(
        {
            "ImageID": pa.DictionaryArray.from_arrays(pa.array(image.astype(np.int32)), pa.array(images)).cast(
                "string"
            ),
            "LabelName": pa.DictionaryArray.from_arrays(pa.array(label.astype(np.int32)), pa.array(labels)).cast(
                "string"
            ),
            **{name: boxes[:, i].round(6) for i, name in ((0, "XMin"), (2, "XMax"), (1, "YMin"), (3, "YMax"))},
            **extra,
        }
    )
    pa.csv.write_csv(table, path, pa.csv.WriteOptions(quoting_style="none"))


def flags(rng: np.random.Generator, number: int) -> dict:
    names = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
    return {name: (rng.random(number) < 0.05).astype(np.int8) for name in names}


def prepare_score(folder: Path, images: int, per_image: int, classes: int) -> None:
    rng = np.random.default_rng(0)
    labels, names = write_classes(folder, classes), image_names(images)
    number = images * 6
    image = np.sort(rng.integers(0, images, number))
    label = (classes * rng.random(number) ** 3).astype(int)  # a long tail, as in Open Images
    boxes = random_boxes(rng, number)
    write_boxes(folder / "validation-annotations-bbox.csv", names, image, labels, label, boxes, flags(rng, number))
    extra = 4 * images
    table = {
        "ImageID": np.concatenate([names[image], names[rng.integers(0, images, extra)]]),
        "LabelName": np.array(labels)[np.concatenate([label, rng.integers(0, classes, extra)])],
        "Confidence": np.repeat([1, 0], [number, extra]),
    }
    path = folder / "validation-annotations-human-imagelabels-boxable.csv"
    pa.csv.write_csv(pa.table(table), path, pa.csv.WriteOptions(quoting_style="none"))
    total = images * per_image
    det_image, det_label = rng.integers(0, images, total), (classes * rng.random(total) ** 3).astype(int)
    det_boxes = random_boxes(rng, total)
    near = rng.integers(0, number, total // 3)  # a third of the detections lie near an object
    det_image[: len(near)], det_label[: len(near)] = image[near], label[near]
    det_boxes[: len(near)] = boxes[near] + rng.normal(0, 0.02, (len(near), 4))
    score = {"Score": rng.random(total).round(6)}
    write_boxes(folder / "detections.csv", names, det_image, labels, det_label, det_boxes, score)


def prepare_load(folder: Path, rows: int) -> np.ndarray:
    """-> the image ids."""
    rng = np.random.default_rng(0)
    labels, names = write_classes(folder, 601), image_names(max(1, rows * 1743042 // 14610229))
    image = np.sort(rng.integers(0, len(names), rows))
    label = (601 * rng.random(rows) ** 3).astype(int)
    more = {"Confidence": np.ones(rows, np.int8), **flags(rng, rows)}
    write_boxes(folder / "train-annotations-bbox.csv", names, image, labels, label, random_boxes(rng, rows), more)
    sizes = {"ImageID": names, "Width": np.full(len(names), 1024), "Height": np.full(len(names), 768)}
    pa.csv.write_csv(pa.table(sizes), folder / "train-image-sizes.csv", pa.csv.WriteOptions(quoting_style="none"))
    return names


def prepare_start(folder: Path, rows: int) -> None:
    """Images are hard links to 64 JPEGs, in the sixteen folders that the published archives unpack to; their sizes
    are read from the files. 5.2 image labels per image, as published (8,996,795)."""
    names = prepare_load(folder, rows)
    (folder / "train-image-sizes.csv").unlink()
    rng = np.random.default_rng(2)
    number = int(5.16 * len(names))
    table = {
        "ImageID": names[np.sort(rng.integers(0, len(names), number))],
        "Source": np.repeat("verification", number),
        "LabelName": np.array([f"/m/{i:05x}" for i in range(601)])[(601 * rng.random(number) ** 3).astype(int)],
        "Confidence": rng.integers(0, 2, number),
    }
    path = folder / "train-annotations-human-imagelabels-boxable.csv"
    pa.csv.write_csv(pa.table(table), path, pa.csv.WriteOptions(quoting_style="none"))
    (folder / "pixels").mkdir()
    for i in range(64):
        cv2.imwrite(str(folder / f"pixels/{i}.jpg"), rng.integers(0, 256, (768, 1024, 3), np.uint8))
    for digit in "0123456789abcdef":
        (folder / f"train_{digit}").mkdir()
    for i, name in enumerate(names):
        os.link(folder / f"pixels/{i % 64}.jpg", folder / f"train_{name[0]}" / f"{name}.jpg")


def time_score(folder: Path) -> None:
    table, start = [], (time.perf_counter(), time.process_time())

    def lap(step: str) -> None:
        nonlocal start
        table.append((step, time.perf_counter() - start[0], time.process_time() - start[1], peak_gib()))
        start = time.perf_counter(), time.process_time()

    truth = read_truth(folder)
    lap(f"read {len(truth.image)} boxes and {len(truth.label_image)} image labels of {len(truth.image_ids)} images")
    detections = read_detections(folder / "detections.csv", truth)
    lap(f"read {len(detections.image)} detections")
    v2 = evaluate(truth, detections, "v2")
    lap(f"V2 metric, {len(truth.class_ids)} classes (mAP {v2['mAP']:.4f})")
    challenge = evaluate(truth, detections, "challenge", expand_detections=True)
    scored = sum(challenge["num_scored_detections"].values())
    lap(f"challenge metric, all expanded: {scored} scored (mAP {challenge['mAP']:.4f})")
    print(tabulate(table, ["step", "seconds", "CPU seconds", "peak memory GiB"], floatfmt=".2f"))


def time_load(folder: Path) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    split = load_openimages("oid", folder, "train", check_images=False)
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
    boxes = sum(len(split.annotations(i)["labels"]) for i in range(0, len(split), max(1, len(split) // 1000)))
    row = (len(split), boxes, seconds, cpu, peak_gib())
    print(
        tabulate([row], ["images", "boxes of 1000 images", "seconds", "CPU seconds", "peak memory GiB"], floatfmt=".2f")
    )


def time_start(folder: Path, *settings: str) -> None:
    """Seconds from the command to what train.py prints, up to its plan, after which training begins."""
    root = Path(__file__).resolve().parents[1]
    sets = f"DATA.DATASETS={{'oid': ['openimages', '{folder}', 'train']}}"
    with tempfile.TemporaryDirectory() as logdir:
        command = [sys.executable, str(root / "train.py"), "--logdir", logdir, "--config", sets, "DATA.TRAIN=oid",
                   "MODE_MASK=False", "BACKBONE.NORM=GN", "TRAIN.EVAL_PERIOD=0", *settings]  # fmt: skip
        start, table = time.perf_counter(), []
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stderr:
                what = line[9:].strip()
                shown = {"oid:": "the annotations", "training images": "the counts of classes", "plan": "the plan"}
                found = next((v for k, v in shown.items() if what.startswith(k) or f" {k} of oid" in what), None)
                if found:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
                    table.append((found, time.perf_counter() - start, peak))
                if " ERROR " in line:
                    print(line)
                if what == "plan":
                    break
            process.kill()
    print(tabulate(table, ["train.py printed", "seconds", "peak memory GiB"], floatfmt=".2f"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["score", "load", "start", "time-score", "time-load"])
    parser.add_argument("--images", type=int, default=125000)
    parser.add_argument("--detections", type=int, default=100, help="per image")
    parser.add_argument("--classes", type=int, default=500)
    parser.add_argument("--rows", type=int, default=14_600_000)
    parser.add_argument("--folder", type=Path, help="with time-score and time-load: the prepared files")
    args = parser.parse_args()
    if args.what == "time-score":
        return time_score(args.folder)
    if args.what == "time-load":
        return time_load(args.folder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The files are made in this process and timed in others, whose peak memory is then their own.
        if args.what == "score":
            prepare_score(folder, args.images, args.detections, args.classes)
        elif args.what == "load":
            prepare_load(folder, args.rows)
        else:
            prepare_start(folder, args.rows)
        for file in sorted(f for f in folder.iterdir() if f.is_file()):
            print(f"{file.name}: {os.path.getsize(file) / 2**20:.1f} MiB", flush=True)
        if args.what == "start":
            for settings in ([], [], ["DATA.SAMPLING=repeat_factor", "FRCNN.FEDERATED_LOSS=True"]):
                print(f"start {' '.join(settings)}", flush=True)
                time_start(folder, *settings)
            return
        for _ in range(1 if args.what == "score" else 2):  # the second load finds the cache
            subprocess.run([sys.executable, __file__, f"time-{args.what}", "--folder", str(folder)], check=True)


if __name__ == "__main__":
    main()
