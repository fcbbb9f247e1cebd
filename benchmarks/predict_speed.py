"""Latency of a prediction by stage: the graph, pasting the masks into the image, encoding them as COCO RLE.

  python benchmarks/predict_speed.py                              100 synthetic masks in an 800x1333 image, one core
  python benchmarks/predict_speed.py --graph --config MODE_FPN=True    with the graph, on random weights
  python benchmarks/predict_speed.py --load MODEL [--image a.jpg]      a trained model, from the file to the RLEs
  python benchmarks/predict_speed.py --graph --image a.jpg --augment 400 600 …    test-time augmentation against plain
  python benchmarks/predict_speed.py --nms                             hard and soft NMS of 1000 RoIs x 80 classes
  python benchmarks/predict_speed.py --throughput --config MODE_FPN=True DATA.BASEDIR=coco  evaluation and --predict on
                                                                       the images of DATA.VAL against the graph alone

Pasting runs in one thread and is timed by that thread's CPU clock. It is compared, in alternation in the same process,
with the usual way: every pixel of the box is resampled, and the bitmap of the whole image is encoded. Both must give
the same masks.
"""

import import_path

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # NumPy's; TensorFlow has its own

import cv2
import numpy as np
import pycocotools.mask as coco_mask
from tabulate import tabulate

import detections
from common import UserError, logger
from config import default_config, finalize_config
from config_files import settings_words
from data import inference_batches
from dataset import load_validation_splits
from run_start import load_model, weight_loader, with_classes
from utils import polygons

ROOT = Path(__file__).resolve().parent.parent

HEIGHT, WIDTH, COUNT = 800, 1333, 100


def median_ms(functions: dict[str, Callable], repeats: int, clock: Callable = time.perf_counter) -> dict[str, float]:
    """Median milliseconds per call of each function, called in turn, so that other load affects all of them equally."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if round_number:  # the first call is not timed
                times[name].append(1e3 * (clock() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def make_masks(count: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Probabilities of lobed shapes with soft borders and a little noise, as a mask head gives them: [count, M, M]."""
    y, x = (np.indices((cells, cells)) + 0.5) / cells * 2 - 1
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    lobes = rng.integers(1, 6, count)[:, None, None]
    border = 0.75 + 0.2 * np.sin(lobes * angle + rng.uniform(0, 6, (count, 1, 1)))
    logits = 12 * (border - radius) + rng.normal(0, 0.5, (count, cells, cells))
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def make_boxes(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "whole image":
        return np.tile(np.array([[0, 0, WIDTH, HEIGHT]], np.float64), (count, 1))
    low, high = {"4 to 1333 px": (4, 1333), "4 to 64 px": (4, 64), "100 to 600 px": (100, 600)}[kind]
    size = np.minimum(np.exp(rng.uniform(np.log(low), np.log(high), (count, 2))), [WIDTH, HEIGHT])
    corner = rng.uniform(0, 1, (count, 2)) * ([WIDTH, HEIGHT] - size)
    return np.concatenate([corner, corner + size], 1)


def usual_way(masks: np.ndarray, boxes: np.ndarray) -> list[dict]:
    """Resamples every pixel of each box and encodes bitmaps of the whole image."""
    rles = []
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        left, top = max(0, int(x1)), max(0, int(y1))
        right, bottom = min(WIDTH, int(np.ceil(x2))), min(HEIGHT, int(np.ceil(y2)))
        u = ((np.arange(left, right) + 0.5 - x1) / (x2 - x1) * mask.shape[1] - 0.5).astype(np.float32)
        v = ((np.arange(top, bottom) + 0.5 - y1) / (y2 - y1) * mask.shape[0] - 0.5).astype(np.float32)
        across = np.maximum(0, 1 - np.abs(u[:, None] - np.arange(mask.shape[1], dtype=np.float32)))
        down = np.maximum(0, 1 - np.abs(v[:, None] - np.arange(mask.shape[0], dtype=np.float32)))
        bitmap = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        bitmap[top:bottom, left:right] = down @ mask @ across.T >= 0.5
        rle = coco_mask.encode(bitmap)
        rles.append({"size": rle["size"], "counts": rle["counts"].decode()})
    return rles


def paste_report(cells: int, repeats: int) -> str:
    rng = np.random.default_rng(0)
    masks = make_masks(COUNT, cells, rng)
    rows = []
    for kind in ("4 to 1333 px", "100 to 600 px", "4 to 64 px", "whole image"):
        boxes = make_boxes(kind, COUNT, rng)
        counts = detections.paste_counts(masks, boxes, HEIGHT, WIDTH)
        stages = {
            "paste": lambda b=boxes: detections.paste_counts(masks, b, HEIGHT, WIDTH),
            "encode": lambda c=counts: [polygons.encode_runs(x, HEIGHT, WIDTH) for x in c],
            "together": lambda b=boxes: detections.paste_masks(masks, b, HEIGHT, WIDTH),
            "usual": lambda b=boxes: usual_way(masks, b),
        }
        ms = median_ms(stages, repeats, time.thread_time)
        pairs = zip(detections.paste_masks(masks, boxes, HEIGHT, WIDTH), usual_way(masks, boxes))
        # float32 decides a pixel whose probability is 0.5 to the last bit either way.
        worst = min(float(coco_mask.iou([a], [b], [0])[0, 0]) if coco_mask.area(b) else 1.0 for a, b in pairs)
        rows.append([kind, *(f"{value:.1f}" for value in ms.values()), f"{worst:.4f}"])
    headers = ["box sides", "paste ms", "encode ms", "together ms", "usual way ms", "least IoU"]
    return tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * 5)


def graph_report(args: argparse.Namespace) -> str:
    """Stages of one image through the model that --load and --config describe."""
    from predict import build_predictor

    cfg, load = _model(args)
    if args.image:

        def read():
            return next(iter(inference_batches([args.image], cfg, (0, 1))))

        batch, stages = read(), {"read and resize": read}
    else:
        rng = np.random.default_rng(0)
        # Blurred noise: white noise has no structures that give proposals.
        noise = cv2.GaussianBlur(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8), (0, 0), 7)
        image = np.zeros((1, -(-HEIGHT // 32) * 32, -(-WIDTH // 32) * 32, 3), np.uint8)
        image[0, :HEIGHT, :WIDTH] = cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX)
        batch = {"image": image, "image_shape": np.int32([[HEIGHT, WIDTH]]), "original_shapes": [(HEIGHT, WIDTH)]}
        stages = {}
    predict = build_predictor(cfg, load)
    one = {key: value[0] for key, value in predict(batch["image"], batch["image_shape"]).items()}
    size, original = batch["image_shape"][0], batch["original_shapes"][0]
    found = detections.to_original_frame(one, size, original)
    stages["graph"] = lambda: predict(batch["image"], batch["image_shape"])
    stages["paste and encode masks"] = lambda: detections.to_original_frame(one, size, original)
    stages["results entries"] = lambda: detections.coco_results(found, 1, int)
    ms = median_ms(stages, args.repeats)
    ms["together"] = sum(ms.values())
    rows = [[name, f"{value:.1f}", f"{100 * value / ms['together']:.1f}%"] for name, value in ms.items()]
    title = f"{size[1]}x{size[0]} for the graph, {original[1]}x{original[0]} the image, {len(found.scores)} detections"
    return f"{title}\n" + tabulate(rows, ["stage", "ms", "share"], disable_numparse=True, stralign="right")


def _model(args: argparse.Namespace) -> tuple:
    """Settings and weights as train.py --predict takes them; without --load random weights that find 100 objects."""
    from utils.tf_v1 import tf

    if args.load:
        model = load_model(args.load, settings_words(args.config, args.trust_code), args.trust_code)
        return with_classes(model.cfg, model.weights), weight_loader(model.weights, model.origin)
    cfg = finalize_config(default_config().update_args(["DATA.NUM_CATEGORY=80", *settings_words(args.config)]))

    def load(sess) -> None:
        with sess.graph.as_default():
            sess.run(tf.global_variables_initializer())
            # Untrained scores are all about 1/81: with larger weights some classes are likely, and there are 100 masks.
            for variable in tf.global_variables():
                if variable.op.name.endswith("class/W") and "rpn" not in variable.op.name:
                    variable.load(30 * sess.run(variable), sess)

    return cfg, load


def augmentation_report(args: argparse.Namespace) -> str:
    """An image's prediction in several views against a plain one, in alternation."""
    from predict import build_predictor

    cfg, load = _model(args)
    plain, one, both = cfg.copy(), cfg.copy(), cfg.copy()
    one.TEST.AUG_SHORT_EDGES, one.TEST.AUG_FLIP = [cfg.PREPROC.TEST_SHORT_EDGE_SIZE], False
    both.TEST.AUG_SHORT_EDGES = args.augment
    names = ["plain", "one view of the same size", f"{args.augment} and mirrored"]
    functions, found = {}, []
    for name, settings in zip(names, (plain, one, both)):
        predict, batch = build_predictor(settings, load), next(iter(inference_batches([args.image], settings)))
        found.append(int(predict(batch["image"], batch["image_shape"])["count"][0]))
        functions[name] = lambda p=predict, b=batch: p(b["image"], b["image_shape"])
    ms = median_ms(functions, args.repeats)
    rows = [[n, f"{ms[n]:.0f}", f"{ms[n] / ms['plain']:.2f}", count] for n, count in zip(names, found)]
    return tabulate(rows, ["prediction", "ms", "times plain", "detections"], disable_numparse=True, stralign="right")


def throughput_report(args: argparse.Namespace) -> str:
    """Images per second of the graph alone, batch after batch that are in memory already, of an evaluation and of
    --predict with its pictures and files, in alternation."""
    from predict import build_predictor, evaluate_split, predict_files

    cfg, load = _model(args)
    if not cfg.DATA.VAL:
        raise UserError("--throughput needs a data set: set DATA.VAL and DATA.BASEDIR after --config")
    split = load_validation_splits(cfg)[0]
    predict = build_predictor(cfg, load)
    batches = list(inference_batches(split, cfg))
    files = [split.image_file(i) for i in range(len(split))]
    names = cfg.DATA.CLASS_NAMES or [f"class {i}" for i in range(1, cfg.DATA.NUM_CATEGORY + 1)]
    model = SimpleNamespace(cfg=cfg, predictors=[predict], class_names=names, category_ids=None)
    with tempfile.TemporaryDirectory() as folder:
        functions = {
            "graph alone": lambda: [predict(b["image"], b["image_shape"]) for b in batches],
            "evaluation": lambda: evaluate_split(predict, split, cfg, progress=False),
            "--predict": lambda: predict_files(model, files, folder, False),
        }
        logger.setLevel("WARNING")
        ms = median_ms(functions, args.repeats)
    found = [int(sum(o["count"])) for o in functions["graph alone"]()]
    rows = [[n, f"{1e3 * len(split) / ms[n]:.3f}", f"{ms['graph alone'] / ms[n]:.3f}"] for n in ms]
    title = f"{len(split)} images, {sum(found) / len(split):.0f} detections each, batches of {cfg.TEST.BATCH_SIZE}"
    return f"{title}\n" + tabulate(rows, ["", "images/s", "of the graph's"], disable_numparse=True, stralign="right")


def nms_report(repeats: int) -> str:
    """Every kind of final NMS on boxes and scores like a trained model's, and with every class a candidate."""
    from model_frcnn import decode_detections
    from utils.tf_v1 import tf

    rng, (rois, classes, objects) = np.random.default_rng(0), (1000, 80, 60)
    near = rng.integers(0, objects, rois)
    corner = rng.uniform(0, 1000, (objects, 2))[near] + rng.normal(0, 10, (rois, 2))
    corners = np.concatenate([corner, corner + rng.uniform(30, 200, (objects, 2))[near]], 1)
    boxes = (corners[None, :, None] + rng.normal(0, 2, (1, rois, classes, 4))).astype(np.float32)
    logits = rng.normal(0, 1, (rois, classes + 1))
    logits[:, -1] += 4  # background
    logits[np.arange(rois), rng.integers(0, classes, objects)[near]] += rng.uniform(0, 8, rois)
    scores = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[None, :, :-1].astype(np.float32)
    functions = {}
    for threshold in (0.05, 0.0):
        for kind in ("hard", "soft_linear", "soft_gaussian"):
            for agnostic in (False, True):
                cfg = default_config().update_args([f"TEST.NMS={kind}", f"TEST.NMS_CLASS_AGNOSTIC={agnostic}"])
                cfg.TEST.RESULT_SCORE_THRESH = threshold
                with tf.Graph().as_default():
                    inputs = [tf.placeholder(tf.float32, x.shape) for x in (boxes, scores)]
                    valid, size = tf.ones([1, rois], tf.bool), tf.constant([[1300, 1300]])
                    outputs = list(decode_detections(*inputs, valid, size, finalize_config(cfg)))
                    call = tf.Session().make_callable(outputs, inputs)
                name = f"{kind}{', across classes' * agnostic}", f"{threshold}, {(scores > threshold).sum()}"
                functions[name] = lambda c=call: c(boxes, scores)
    rows = [[*name, f"{value:.1f}"] for name, value in median_ms(functions, repeats).items()]
    return tabulate(rows, ["NMS", "threshold, candidates", "ms"], disable_numparse=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", action="store_true", help="also time the graph, on random weights")
    parser.add_argument("--load", help="also time the graph of this checkpoint, run directory or .npz")
    parser.add_argument("--trust-code", action="append", default=[], metavar="MODULE", help="as for train.py")
    parser.add_argument("--image", help="time this image file, reading and resizing included")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VAL", help="settings of the model")
    parser.add_argument("--augment", nargs="+", type=int, metavar="EDGE", help="short edges of augmented predictions")
    parser.add_argument("--nms", action="store_true", help="time the kinds of NMS alone")
    parser.add_argument("--throughput", action="store_true", help="evaluation and --predict against the graph alone")
    parser.add_argument("--cells", type=int, default=28, help="side of the synthetic masks (C4 models: 14)")
    parser.add_argument("--repeats", type=int, default=10, help="calls that a median is taken of")
    args = parser.parse_args()
    if args.augment and not args.image:
        parser.error("--augment needs --image")
    cv2.setNumThreads(1)
    if args.nms:
        print(nms_report(args.repeats))
        return 0
    try:
        if args.throughput:
            print(throughput_report(args))
            return 0
        print(f"{COUNT} masks of {args.cells}x{args.cells} into {WIDTH}x{HEIGHT}, one core")
        print(paste_report(args.cells, args.repeats))
        if args.graph or args.load:
            print("\n" + (augmentation_report if args.augment else graph_report)(args))
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
