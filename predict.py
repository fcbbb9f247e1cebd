"""Running trained models: predictors, from Python or for whole data sets, and evaluations during training.

from predict import load_predictor
predictor = load_predictor("train_log/run", ["TEST.RESULT_SCORE_THRESH=0.5"])
found = predictor("photo.jpg")  # boxes, scores, labels, masks … in the frame of the photo
print([predictor.class_names[label - 1] for label in found.labels])
"""

import contextlib
import csv
import json
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from common import UserError, atomic_write, logger
from config import Config
from data import inference_batches, read_image, resize_for_test, stack_images
from dataset_build import COCO_KEYPOINTS, mirrored_keypoints
from dataset_split import DatasetSplit
from detections import Detections, coco_results, to_original_frame
from eval import evaluate_proposals
from inference import Predictor, inference_callable
from predict_devices import inference_devices, predict_in_turn
from predict_tiles import ImageParts, detect_tiled, in_tiles, open_parts, reduced, reduced_detections, tiled_images
from run_start import STRICT, Fitting, Model, load_model, weight_loader, with_classes
from training_best import scored_kinds
from training_validation import images_with_losses, loss_callable, validation_losses
from tta import AugmentedPredictor
from utils import ranks
from utils.coco_format import read_truth
from utils.polygons import orient_outer, rle_to_rings
from viz import CSV_HEADER, Drawing, cut_out, prediction_entry, prediction_rows, show_window, write_prediction

__all__ = [
    "EvaluationStopped", "LoadedPredictor", "build_predictor", "evaluate_split", "evaluation_builder",
    "found_in_files", "keypoint_flip", "load_predictor", "merge_shards", "predict_files", "score", "write_cut_outs",
]  # fmt: skip


class EvaluationStopped(Exception):
    """An evaluation was stopped before its last image."""


# (index of the image in its split, its COCO results or the reason why it cannot be read)
ImageResults = tuple[int, list[dict[str, Any]] | str]
LARGEST_PICTURE = 1 << 25  # pixels of a picture with detections of an image that was seen in tiles
GraphPredictor = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]  # (image, image_shape) -> outputs


# ---------------------------------------------------------------------------------------------------------- predictors
def build_predictor(
    cfg: Config, load: Callable[[Any], None], meta: dict[str, Any] | None = None, device: str | None = None
) -> Predictor | AugmentedPredictor:
    """The predictor that the TEST settings describe; load(sess) assigns the weights in its session, meta comes from
    their file; device: "/cpu:0" or "/gpu:1", by default the first GPU if there is one."""
    if cfg.TEST.AUG_SHORT_EDGES:
        sizes = ", ".join(map(str, cfg.TEST.AUG_SHORT_EDGES))
        mirrored = ", each also mirrored" if cfg.TEST.AUG_FLIP else ""
        logger.info(f"test-time augmentation: short edges {sizes}{mirrored}")
        return AugmentedPredictor(cfg, load, keypoint_flip(cfg, meta), device)
    return Predictor(cfg, load, device)


def keypoint_flip(cfg: Config, meta: dict[str, Any] | None) -> list[int]:
    """For each keypoint of the model, its number in a mirrored image; [] if that is not needed."""
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


class LoadedPredictor:
    """A trained model: predictor(image) -> `Detections`."""

    def __init__(
        self, model: Model, fitting: Fitting = STRICT, device: str | None = None, all_devices: bool = False
    ):  # fmt: skip
        """all_devices: it has a predictor for each device of this process (`predictors`), not for the first alone."""
        self.cfg = with_classes(model.cfg, model.weights)
        self.class_names: list[str] = self.cfg.DATA.CLASS_NAMES
        ids = (model.meta or {}).get("category_ids") or []
        # Category id of each class in the annotations used for training; None if --config gave other classes.
        self.category_ids: list[int | str] | None = ids if len(ids) == len(self.class_names) else None
        if self.cfg.MODE_RPN_ONLY:
            self.category_ids = None
        load = weight_loader(model.weights, model.origin, fitting)
        devices = inference_devices(self.cfg) if all_devices else [device]
        self.predictors = [build_predictor(self.cfg, load, model.meta, one) for one in devices]
        self.predict_batch = self.predictors[0]

    def __call__(self, image: str | os.PathLike | np.ndarray) -> Detections:
        """Detects the objects of an image: a file, or pixels uint8 [H,W,3] in OpenCV's order BGR."""
        if in_tiles(self.cfg):
            return detect_tiled(self.predictors, open_parts(image), self.cfg)
        pixels = image if isinstance(image, np.ndarray) else read_image(image)
        return next(self.detect([([resize_for_test(pixels, self.cfg)], [pixels.shape[:2]])]))[0]

    def detect(
        self, batches: Iterable[tuple[Sequence[np.ndarray], Sequence[tuple[int, int]]]]
    ) -> Iterator[list[Detections]]:
        """The objects of each batch (images after `resize_for_test`, heights and widths of the images before it), in
        the frame of the images before it."""

        def stacked() -> Iterator[dict[str, Any]]:
            for resized, sizes in batches:
                image, shapes = stack_images(resized, self.cfg)
                yield {"image": image, "image_shape": shapes, "sizes": sizes}

        for batch, outputs in predict_in_turn(self.predictors, stacked()):
            yield [
                to_original_frame({k: v[n] for k, v in outputs.items()}, batch["image_shape"][n], size)
                for n, size in enumerate(batch["sizes"])
            ]

    def close(self) -> None:
        """Frees the weights."""
        for predictor in self.predictors:
            predictor.close()


def load_predictor(
    path: str | os.PathLike,
    settings: Sequence[str] = (),
    fitting: Fitting = STRICT,
    trusted: Sequence[str] = (),
    device: str | None = None,
    all_devices: bool = False,
) -> LoadedPredictor:
    """The predictor of a run directory, checkpoint or .npz; `settings` are KEY=VAL as after --config, `trusted` modules
    as after --trust-code."""
    return LoadedPredictor(load_model(str(path), settings, trusted), fitting, device, all_devices)


def predict_files(
    predictor: LoadedPredictor,
    files: Sequence[str],
    output: str,
    window: bool,
    drawing: Drawing = Drawing(),  # noqa: B008
) -> None:
    """Writes a picture of each file with its detections into the folder `output`, and predictions.json and
    predictions.csv with all detections. With `window` a single picture is also shown. Files that cannot be read are
    left out and named in a UserError at the end."""
    cfg, names = predictor.cfg, predictor.class_names
    target, started = Path(output) / "predictions.json", time.time()
    done, unreadable = 0, []
    threshold = cfg.TEST.RESULT_SCORE_THRESH_VIS
    truth = Truth(drawing.truth, names) if drawing.truth else None

    def leave_out(index: int, reason: UserError) -> None:
        logger.warning(f"{reason}; this image is left out")
        unreadable.append(files[index])

    with _growing_list(target) as append, _table(target.with_suffix(".csv")) as add_rows:
        for index, size, detections, parts in found_in_files(predictor, files, leave_out):
            entry = prediction_entry(files[index], size, detections, names, predictor.category_ids)
            known = truth.find(files[index]) if truth else None
            if known:
                entry["image_id"] = known["id"]
            append(entry)
            add_rows(prediction_rows(entry))
            annotations = truth.annotations(known) if truth and known else None
            picture, drawn, annotations, unit = _to_draw(parts, detections, annotations, threshold, cfg)
            path = write_prediction(
                output, files[index], drawn, names, threshold, drawing.style._replace(unit=unit), annotations, picture
            )  # fmt: skip
            if drawing.cut_outs:
                write_cut_outs(Path(output) / "cut_outs", path.stem, files[index], detections, names, threshold)
            done += 1
            shown = int((detections.scores >= threshold).sum())
            below = len(detections.scores) - shown
            hidden = f", {below} more below score {threshold:g}" if below else ""
            if parts is not None and len(detections.scores) == cfg.TEST.TILE_RESULTS_PER_IM:
                hidden += "; there may be more: raise TEST.TILE_RESULTS_PER_IM"
            rate = (time.time() - started) / done
            logger.info(f"{done}/{len(files)} {path}: {shown} object{'s' * (shown != 1)}{hidden} ({rate:.2f} s/image)")
            if window and len(files) == 1:
                show_window(path)
    logger.info(f"pictures in {output}/, everything found in {target}")
    if unreadable:
        raise UserError(f"{_some(unreadable)} of {len(files)} images could not be read and were left out")


def found_in_files(
    predictor: LoadedPredictor, files: Sequence[str], leave_out: Callable[[int, UserError], None]
) -> Iterator[tuple[int, tuple[int, int], Detections, ImageParts | None]]:
    """(index, height and width, detections, the image if it was seen in tiles) of each file that can be read."""
    cfg = predictor.cfg
    if in_tiles(cfg):
        for index, parts, detections in tiled_images(predictor.predictors, files, cfg, (0, 1), leave_out):
            yield index, (parts.height, parts.width), detections, parts
        return
    left_out: set[int] = set()
    waiting: dict[int, tuple[tuple[int, int], Detections, None]] = {}
    turn = 0

    def note(index: int, reason: UserError) -> None:
        left_out.add(index)
        leave_out(index, reason)

    # Batches are made of images that are padded to one size, so images may come out of their order.
    for batch, outputs in predict_in_turn(predictor.predictors, inference_batches(files, cfg, (0, 1), note)):
        for n, index in enumerate(batch["indices"]):
            size = batch["original_shapes"][n]
            one = {k: v[n] for k, v in outputs.items()}
            waiting[index] = size, to_original_frame(one, batch["image_shape"][n], size), None
        while turn in waiting or turn in left_out:
            if turn in waiting:
                yield turn, *waiting.pop(turn)
            turn += 1


def _to_draw(
    parts: ImageParts | None, detections: Detections, annotations: dict[str, Any] | None, threshold: float, cfg: Config
) -> tuple[np.ndarray | None, Detections, dict[str, Any] | None, float]:
    """What is drawn of an image that was seen in tiles: if it is very large, a smaller one with everything in it. The
    last value is that of `Style.unit`: lines as thin as in a picture of one tile."""
    if parts is None or max(parts.height, parts.width) <= cfg.TEST.TILE:
        return None, detections, annotations, 0
    times = math.ceil(math.sqrt(parts.height * parts.width / LARGEST_PICTURE))
    unit = max(cfg.TEST.TILE / times, 320)
    if times == 1:
        return None, detections, annotations, unit
    kept = np.flatnonzero(detections.scores >= threshold)
    drawn = Detections(
        detections.boxes[kept], detections.scores[kept], detections.labels[kept],
        None if detections.masks is None else [detections.masks[i] for i in kept.tolist()],
        None if detections.keypoints is None else detections.keypoints[kept],
    )  # fmt: skip
    if annotations is not None:
        rings = [[ring / times for ring in part] for part in annotations["rings"]]
        annotations = {**annotations, "boxes": annotations["boxes"] / times, "rings": rings}
        if annotations["keypoints"] is not None:
            annotations["keypoints"] = annotations["keypoints"] / (times, times, 1)
    return reduced(parts, times), reduced_detections(drawn, times), annotations, unit


class Truth:
    """Annotations of the images that --predict draws; images are matched by the last parts of their paths."""

    def __init__(self, path: str, class_names: Sequence[str]):
        content = read_truth(path)
        names = {c["id"]: c["name"] for c in content["categories"]}
        self.labels = {i: class_names.index(n) + 1 for i, n in names.items() if n in class_names}
        self.images: dict[str, list[dict[str, Any]]] = {}  # by the last part of their names
        for image in content["images"]:
            self.images.setdefault(os.path.basename(str(image.get("file_name", ""))), []).append(image)
        self.objects: dict[Any, list[dict]] = {}
        for a in content["annotations"]:
            if a["category_id"] in self.labels:
                self.objects.setdefault(a["image_id"], []).append(a)
        if not self.labels:
            raise UserError(f"--truth {path}: none of its classes is one of the model's, e.g. {class_names[0]}")

    def find(self, file: str) -> dict[str, Any] | None:
        """The image whose name ends as the file's path does, by most parts; None if there is none or no one of them."""
        own = Path(os.path.abspath(file)).parts[::-1]

        def agreement(image: dict[str, Any]) -> int:
            parts = Path(str(image["file_name"])).parts[::-1]
            return next((n for n, (a, b) in enumerate(zip(parts, own)) if a != b), min(len(parts), len(own)))

        found = sorted(self.images.get(os.path.basename(file), []), key=agreement)
        if not found or len(found) > 1 and agreement(found[-2]) == agreement(found[-1]):
            return None
        return found[-1]

    def annotations(self, image: dict[str, Any]) -> dict[str, Any]:
        """The annotations in the form that viz.draw_annotations takes."""
        objects = self.objects.get(image["id"], [])
        boxes = np.array([a["bbox"] for a in objects], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        rings = []
        for a in objects:
            parts: list[np.ndarray] = []
            outline = a["segmentation"] or []
            for part in [outline] if isinstance(outline, dict) else outline:
                if isinstance(part, dict):
                    parts += rle_to_rings(part, image["height"], image["width"])
                else:
                    parts.append(orient_outer(np.reshape(part, (-1, 2)).astype(np.float32)))
            rings.append(parts)
        points = [a.get("keypoints") or () for a in objects]
        count = max(map(len, points), default=0) // 3
        keypoints = np.zeros((len(objects), count, 3))
        for row, values in zip(keypoints, points):
            row[: len(values) // 3] = np.reshape(values, (-1, 3))
        keypoints[:, :, :2] += 0.5  # numbers of pixels become their centres
        return {
            "keypoints": keypoints if count else None,
            "boxes": boxes, "labels": np.array([self.labels[a["category_id"]] for a in objects], int),
            "is_crowd": np.array([a["iscrowd"] for a in objects], bool), "rings": rings,
        }  # fmt: skip


def write_cut_outs(
    folder: Path, stem: str, file: str, detections: Detections, names: Sequence[str], threshold: float
) -> None:
    """Writes each object with a mask and a score of at least `threshold` as a PNG with alpha,
    <stem>_<number>_<class>.png."""
    if detections.masks is None:
        return
    image = read_image(file)
    for number, i in enumerate(np.flatnonzero(detections.scores >= threshold).tolist(), 1):
        pixels = cut_out(image, detections.masks[i])
        if pixels is not None:
            label = re.sub(r"[^\w-]+", "_", names[detections.labels[i] - 1])[:60]
            with atomic_write(folder / f"{stem}_{number}_{label}.png", "wb") as f:
                f.write(cv2.imencode(".png", pixels)[1].tobytes())


@contextlib.contextmanager
def _table(path: Path) -> Iterator[Callable[[list[list[Any]]], None]]:
    """Yields add(rows), which writes rows of a csv file. The file is in place when the block ends without an error."""
    with atomic_write(path) as f:
        writer = csv.writer(f)
        writer.writerow(CSV_HEADER)
        yield writer.writerows


def _some(names: Sequence[str], most: int = 5) -> str:
    """ "7 (a.jpg, b.jpg, … and 2 more)"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} ({', '.join(names[:most])}{more})"


@contextlib.contextmanager
def _growing_list(path: Path) -> Iterator[Callable[[Any], None]]:
    """Yields append(entry), which adds to the list in the JSON file `path`, written when the block ends without an
    error.

    Until then the entries are in `path`.partial, one per line, even if the process is killed.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists():
        earlier = partial.with_name(f"{partial.name}.old")
        os.replace(partial, earlier)
        logger.warning(f"the results of an unfinished run are in {earlier}, one image per line")
    with open(partial, "w") as f:

        def append(entry: Any) -> None:
            f.write(json.dumps(entry) + "\n")
            f.flush()

        logger.info(f"until the end, results are written to {partial}, one image per line")
        yield append
    with atomic_write(path) as whole, open(partial) as lines:
        whole.write("[")
        for number, line in enumerate(lines):
            whole.write((",\n" if number else "\n") + line.rstrip("\n"))
        whole.write("\n]\n")
    partial.unlink()


# ---------------------------------------------------------------------------------------------------------- data sets
def evaluate_split(
    predict: GraphPredictor | Sequence[GraphPredictor],
    split: DatasetSplit,
    cfg: Config,
    shard: tuple[int, int] = (0, 1),
    gather: Callable[[list[list[ImageResults]]], list[list[list[ImageResults]]]] | None = None,
    progress: bool = True,
    unreadable: list[str] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[dict[str, Any]]:
    """COCO results of every image of a `DatasetSplit`, in the order of the split. An image that cannot be read gives a
    warning and no results.

    Args:
        predict: the predictor, or one for each device of this process; the images are dealt to them in turn.
        shard: (rank, number of processes) that evaluate together.
        gather: given this process's parts, returns those of all processes; needed with more than one.
        unreadable: a list to which the reasons of all unreadable images are added.
        should_stop: called before each batch; if it returns True, EvaluationStopped is raised.
    """
    predictors = [predict] if callable(predict) else list(predict)
    rank, size = shard
    if size > 1 and gather is None:
        raise ValueError("evaluation over several processes needs `gather`")

    def run(i: int) -> list[ImageResults]:
        part = (rank * len(predictors) + i, size * len(predictors))
        return _evaluate_shard(predictors[i], split, cfg, part, progress and rank == 0 and i == 0, stops)

    failed = threading.Event()

    def stops() -> bool:
        return failed.is_set() or should_stop is not None and should_stop()

    with ThreadPoolExecutor(len(predictors)) as pool:
        try:
            parts = list(pool.map(run, range(len(predictors))))
        except BaseException:  # e.g. Ctrl-C: otherwise the threads of the pool would finish the whole data set first
            failed.set()
            raise
    if gather is not None:
        parts = [part for process in gather(parts) for part in process]
    reasons: list[str] = []
    results = merge_shards(parts, len(split), reasons)
    if reasons:
        logger.warning(
            f"{len(reasons)} of {len(split)} images of {split.name} could not be read and are scored as images without "
            f"detections: {'; '.join(reasons[:5])}{' …' * (len(reasons) > 5)}"
        )
    if reasons and len(reasons) == len(split):
        raise UserError(f"none of the {len(split)} images of {split.name} can be read: {reasons[0]}")
    if unreadable is not None:
        unreadable += reasons
    return results


def _evaluate_shard(
    predict: GraphPredictor,
    split: DatasetSplit,
    cfg: Config,
    shard: tuple[int, int],
    progress: bool,
    should_stop: Callable[[], bool],
) -> list[ImageResults]:
    """Results of every `size`-th image. Batches are read and stacked, predicted, pasted and encoded at the same time,
    in threads of their own."""

    def convert(batch: dict, outputs: dict) -> list[ImageResults]:
        results: list[ImageResults] = []
        for n, (index, original_hw) in enumerate(zip(batch["indices"], batch["original_shapes"])):
            image_id = split.image_id(index)
            try:
                one = {key: value[n] for key, value in outputs.items()}
                detections = to_original_frame(one, batch["image_shape"][n], original_hw)
            except UserError as e:
                raise UserError(f"image {image_id}: {e}") from None
            results.append((index, coco_results(detections, image_id, split.label_to_category_id)))
        return results

    def leave_out(index: int, reason: UserError) -> None:
        left_out.append((index, str(reason)))

    results: list[ImageResults] = []
    left_out: list[ImageResults] = []
    waiting: deque = deque()
    total = len(range(shard[0], len(split), shard[1]))
    # In a log file, a progress bar that is redrawn ten times per second fills the log.
    every = 0.1 if sys.stderr.isatty() else 30
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(
            total=total,
            desc=f"evaluate {split.name}",
            unit="image",
            disable=not progress,
            mininterval=every,
            dynamic_ncols=True,
        ) as bar,
    ):
        if in_tiles(cfg):
            for index, _, found in tiled_images(predict, split, cfg, shard, leave_out):
                if should_stop():
                    raise EvaluationStopped
                results.append((index, coco_results(found, split.image_id(index), split.label_to_category_id)))
                bar.update(1)
            return results + left_out
        for batch, outputs in predict_in_turn([predict], inference_batches(split, cfg, shard, leave_out)):
            if should_stop():
                raise EvaluationStopped
            waiting.append(pool.submit(convert, batch, outputs))
            while len(waiting) > 2:
                results += waiting.popleft().result()
            bar.update(len(batch["indices"]))
        for job in waiting:
            results += job.result()
    return results + left_out


def merge_shards(
    shards: Iterable[Iterable[ImageResults]], num_images: int, unreadable: list[str] | None = None
) -> list[dict[str, Any]]:
    """The results of all shards in the order of the split, independent of how it was divided.

    Every image must occur exactly once, including images without detections. Reasons of unreadable images are added to
    `unreadable`.
    """
    by_image: list[list[dict[str, Any]] | str | None] = [None] * num_images
    for part in shards:
        for index, results in part:
            if by_image[index] is not None:
                raise ValueError(f"image number {index} was evaluated by two shards")
            by_image[index] = results
    missing = [i for i, results in enumerate(by_image) if results is None]
    if missing:
        raise ValueError(f"{len(missing)} of {num_images} images were evaluated by no shard, e.g. number {missing[0]}")
    if unreadable is not None:
        unreadable += [results for results in by_image if isinstance(results, str)]
    return [entry for results in by_image if isinstance(results, list) for entry in results]


def score(split: DatasetSplit, results: list[dict[str, Any]], cfg: Config) -> dict[str, float]:
    """The scores of results by the data set's own protocol, or the recall of proposals."""
    if cfg.MODE_RPN_ONLY:
        return evaluate_proposals(split, results)
    # Without any result nothing else says what is scored.
    return split.evaluate(results) if results else split.evaluate(results, iou_types=scored_kinds(cfg))


def evaluation_builder(
    cfg: Config, splits: Sequence[DatasetSplit], devices: Sequence[str], rank: int, size: int, reuse: bool = True
) -> Callable[[], Callable[..., dict[str, float]]]:
    """build() adds one inference graph per replica, sharing its variables (reuse=False: with variables of its own), and
    with TRAIN.VAL_LOSS one of the losses -> evaluate(sess, should_stop, on_results) -> metrics.

    on_results(split, results) is called on rank 0 with the COCO results of each set, in the order of its images.
    Several processes that evaluate together do not stop in the middle, since the others would wait for the stopped one.
    """
    if cfg.TEST.AUG_SHORT_EDGES or cfg.TEST.TILE:
        if rank == 0:
            what = "test-time augmentation is" if cfg.TEST.AUG_SHORT_EDGES else "TEST.TILE is"
            logger.info(f"{what} off for evaluation during training; --evaluate uses it")
        cfg = cfg.copy()
        cfg.TEST.AUG_SHORT_EDGES, cfg.TEST.TILE = [], 0
        cfg.freeze()
    loss_sets = [images_with_losses(cfg, split) for split in splits] if cfg.TRAIN.VAL_LOSS else []

    def build() -> Callable[..., dict[str, float]]:
        replicas = [
            (device if len(devices) > 1 else None, f"tower{i}" if i else "") for i, device in enumerate(devices)
        ]
        attach = [inference_callable(cfg, device, scope, reuse) for device, scope in replicas]
        attach_losses = []
        if loss_sets:
            averages = reuse and cfg.TEST.USE_EMA
            attach_losses = [loss_callable(cfg, device, scope, averages) for device, scope in replicas]

        def evaluate(
            sess: Any,
            should_stop: Callable[[], bool] | None = None,
            on_results: Callable[[DatasetSplit, list[dict[str, Any]]], None] | None = None,
        ) -> dict[str, float]:
            predictors = [a(sess) for a in attach]
            gather, stop = (ranks.gather, None) if size > 1 else (None, should_stop)
            metrics = {}
            for split in splits:
                results = evaluate_split(predictors, split, cfg, (rank, size), gather, should_stop=stop)
                if rank == 0:
                    if on_results is not None:
                        on_results(split, results)
                    scores = score(split, results, cfg)
                    metrics.update(scores if len(splits) == 1 else {f"{split.name}/{k}": v for k, v in scores.items()})
            if attach_losses:
                functions = [a(sess) for a in attach_losses]
                losses = validation_losses(functions, cfg, loss_sets, (rank, size), gather, stop, EvaluationStopped)
                metrics.update(losses)
                if rank == 0:
                    logger.info(f"validation {', '.join(f'{k} {v:.3f}' for k, v in losses.items())}")
            return metrics

        return evaluate

    return build
