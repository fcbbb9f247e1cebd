"""Images on their way into the graph: reading, augmenting and batching.

Batches contain uint8 images and compact annotations; everything else is computed from them in the graph. The content of
a training step depends only on (TRAIN.SEED, step, total batch), not on the number of workers, devices or processes, or
on whether the run was interrupted.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from augment import (
    Layer,
    Scene,
    View,
    draw_view,
    jitter_colours,
    paste_objects,
    place_objects,
    resize_into,
    resized_shape,
)
from common import UserError, logger
from config import Config
from data_sampling import StepPlan, training_images
from dataset_split import DatasetSplit
from utils import polygons
from utils.archives import is_file, is_folder, list_folder
from utils.image_header import IMAGE_SUFFIXES, decode_image
from utils.tiff_parts import open_tiff

__all__ = [
    "BatchMaker",
    "batch_images",
    "inference_batches",
    "list_images",
    "make_batch",
    "padded_size",
    "read_image",
    "read_split_image",
    "resize_for_test",
    "stack_images",
    "training_keys",
]

# ------------------------------------------------------------------------------------------------ images


def read_image(path: str | os.PathLike) -> np.ndarray:
    """uint8 BGR [H, W, 3] as an image viewer shows it: rotated by its EXIF data, with grey and transparent images
    converted."""
    return decode_image(path, cv2.IMREAD_COLOR)


def read_split_image(split: DatasetSplit, i: int) -> np.ndarray:
    """uint8 BGR [H, W, 3] in the orientation of the annotations.

    Annotations may refer to the image as stored or as rotated by its EXIF data; the size in the json tells which.
    """
    file, size = split.image_file(i), split.image_size(i)
    what = f"image {file} (id {split.image_id(i)!r})"
    image = decode_image(file, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, what)
    if image.shape[:2] == size:
        return image
    turned = decode_image(file, cv2.IMREAD_COLOR, what)
    if turned.shape[:2] == size:
        return turned
    raise UserError(
        f"{what} is {image.shape[1]}x{image.shape[0]} pixels but the annotations say {size[1]}x{size[0]} (width x "
        "height); correct the json or the file"
    )


def list_images(paths: Sequence[str | os.PathLike]) -> list[str]:
    """The given image files, and those in the given directories (without subdirectories), sorted for each directory."""
    files = []
    for path in map(Path, paths):
        if is_folder(path):
            inside = sorted(p for p in map(path.joinpath, list_folder(path)) if is_file(p) and p.name[0] != ".")
            found = [str(p) for p in inside if p.suffix.lower() in IMAGE_SUFFIXES]
            if not found:
                raise UserError(f"directory {path} has no image ({', '.join(IMAGE_SUFFIXES)})")
            if other := [p.name for p in inside if p.suffix.lower() not in IMAGE_SUFFIXES]:
                logger.info(f"{path}: {len(other)} other files are left out, e.g. {other[0]}")
            files += found
        elif is_file(path):
            files.append(str(path))
        else:
            raise UserError(f"image {path} does not exist")
    if len(files) == 1 and open_tiff(files[0]) is None:  # a large TIFF is read in parts
        read_image(files[0])  # checked now, so that the error comes before expensive work
    return files


# ------------------------------------------------------------------------------------------------ training batches
def training_keys(cfg: Config) -> list[str]:
    """Names of a training batch's components, in order."""
    keys = ["image", "image_shape", "image_seed", "gt_boxes", "gt_labels", "gt_is_crowd"]
    keys += ["gt_edges"] * bool(cfg.MODE_MASK) + ["gt_keypoints"] * bool(cfg.MODE_KEYPOINT)
    return keys + ["class_verified"] * bool(cfg.FRCNN.FEDERATED_LOSS)


def padded_size(sizes: Sequence[tuple[int, int]], cfg: Config) -> tuple[int, int]:
    """Height and width that contain all sizes; with FPN, multiples of its coarsest stride."""
    stride = cfg.FPN.ANCHOR_STRIDES[3] if cfg.MODE_FPN else 1
    height, width = (-(-max(s[axis] for s in sizes) // stride) * stride for axis in (0, 1))
    return height, width


def _short_edge(cfg: Config, rng: np.random.Generator) -> int:
    edges = cfg.PREPROC.SHORT_EDGE_SIZE
    return int(rng.integers(edges[0], edges[1], endpoint=True) if len(edges) == 2 else rng.choice(edges))


def new_image_memory(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.uint8)


def make_batch(
    split: DatasetSplit,
    images: Sequence[int],
    seeds: Sequence[Sequence[int]],
    cfg: Config,
    new_image: Callable[[tuple[int, ...]], np.ndarray] = new_image_memory,
    partners: Sequence[int] = (),
) -> list[np.ndarray]:
    """A training batch of these images of the split, in the order of `training_keys`.

    Args:
        seeds: for each image, the numbers that determine its random choices.
        new_image: allocates a uint8 array of a given shape; its content is overwritten.
        partners: images from which objects may be pasted (PREPROC.COPY_PASTE).

    image uint8 [N, H, W, 3] BGR zero-padded at the bottom and right, image_shape int32 [N, 2], image_seed int32 [N]
    for the random choices that the graph makes for an image, gt_boxes float32 [N, G, 4], gt_labels int32 [N, G] with 0
    for padding, gt_is_crowd bool [N, G], gt_edges float32 [N, G, E, 4] without vertical edges and those of crowds,
    zero-length edges padding, gt_keypoints float32 [N, G, K, 3], class_verified bool [N, C + 1].
    """
    pictures = []
    for i, seed in zip(images, seeds):
        picture = _draw_picture(split, i, np.random.default_rng(seed), cfg)
        partner, rng = paste_partner(seed, partners, cfg)
        pictures.append(picture if partner is None else _paste(picture, split, partner, rng, cfg))
    batch = new_image((len(images), *padded_size([p.canvas for p in pictures], cfg), 3))
    for target, picture in zip(batch, pictures):
        height, width = picture.canvas
        _paint(target[:height, :width], picture, cfg)
        target[height:] = 0
        target[:height, width:] = 0
    objects = [_pack_objects(p.scene, cfg) for p in pictures]
    batches = {
        "image": batch,
        "image_shape": np.array([p.canvas for p in pictures], np.int32),
        "image_seed": np.array([p.seed for p in pictures], np.int32),
        **{key: _stack_padded([o[key] for o in objects]) for key in objects[0]},
    }
    if cfg.FRCNN.FEDERATED_LOSS:
        batches["class_verified"] = np.stack([split.verified_classes(i) for i in images])
    return [batches[key] for key in training_keys(cfg)]


class _Picture(NamedTuple):
    """An image on its way into a batch."""

    pixels: np.ndarray  # uint8 [h, w, 3] of the file that are shown
    view: View
    scene: Scene
    seed: int  # for random choices in the graph
    canvas: tuple[int, int]  # height and width in the batch, at least those of the view
    pasted: tuple[Any, tuple[int, int], list[Layer]] | None  # pasted image, its position, and the pixels to copy


def _draw_picture(
    split: DatasetSplit, i: int, rng: np.random.Generator, cfg: Config, limit: tuple[int, int] | None = None
) -> _Picture:
    """Image i of the split in a random view with random colours; for `limit` see `draw_view`."""
    image, objects = read_split_image(split, i), split.objects(i)
    shape = image.shape[:2]
    short_edge = _short_edge(cfg, rng)
    flip = bool(rng.random() < 0.5) and cfg.PREPROC.FLIP
    seed = rng.integers(2**31)
    view = draw_view(shape, objects.boxes[~objects.is_crowd], short_edge, flip, rng, cfg, limit)
    image = image[view.y : view.y + view.height, view.x : view.x + view.width]
    if cfg.PREPROC.PHOTOMETRIC:
        image = jitter_colours(image, cfg.PREPROC.PHOTOMETRIC, rng)
    outlines = cfg.MODE_MASK or cfg.PREPROC.COPY_PASTE > 0
    scene = place_objects(objects, shape, view, split.keypoint_flip, cfg.PREPROC.MIN_VISIBLE, outlines)
    return _Picture(image, view, scene, seed, view.size, None)


def paste_partner(
    seed: Sequence[int], partners: Sequence[int], cfg: Config
) -> tuple[int | None, np.random.Generator | None]:
    """The image from which objects are pasted into the image of this seed (None: no pasting), and the generator for all
    other choices."""
    if not cfg.PREPROC.COPY_PASTE:
        return None, None
    rng = np.random.default_rng([*seed, 1])
    return (int(rng.choice(partners)) if rng.random() < cfg.PREPROC.COPY_PASTE else None), rng


def _paste(picture: _Picture, split: DatasetSplit, partner: int, rng: np.random.Generator, cfg: Config) -> _Picture:
    """The picture with objects pasted from image `partner`, which is augmented like any training image."""
    limit = None if cfg.PREPROC.SCALE_JITTER else picture.view.size
    other = _draw_picture(split, partner, rng, cfg, limit)
    scene, canvas, corner, layers = paste_objects(
        picture.scene, picture.view.size, other.scene, other.view.size, rng, cfg.PREPROC.MIN_VISIBLE
    )
    return picture._replace(scene=scene, canvas=canvas, pasted=(other, corner, layers))


def _paint(target: np.ndarray, picture: _Picture, cfg: Config) -> None:
    """Writes the picture into `target` [h, w, 3], which has the size of its canvas."""
    height, width = picture.view.size
    resize_into(target[:height, :width], picture.pixels, picture.view.flip)
    if picture.pasted is None:
        return
    mean = np.round(cfg.PREPROC.PIXEL_MEAN[::-1])
    target[height:] = mean
    target[:height, width:] = mean
    other, (y, x), layers = picture.pasted
    pixels = np.empty((*other.view.size, 3), np.uint8)
    resize_into(pixels, other.pixels, other.view.flip)
    for layer in layers:
        height, width = layer.mask.shape
        source = pixels[layer.y - y : layer.y - y + height, layer.x - x : layer.x - x + width]
        below = target[layer.y : layer.y + height, layer.x : layer.x + width]
        cv2.copyTo(source, layer.mask.view(np.uint8), below)


def _pack_objects(scene: Scene, cfg: Config) -> dict[str, np.ndarray]:
    """The entries of a batch for one image's annotations."""
    packed = {"gt_boxes": scene.boxes.astype(np.float32), "gt_labels": scene.labels, "gt_is_crowd": scene.is_crowd}
    if cfg.MODE_MASK:
        packed["gt_edges"] = polygons.pack_edges(scene.edges, scene.owners, len(scene.labels))
    if cfg.MODE_KEYPOINT:
        packed["gt_keypoints"] = scene.keypoints
    return packed


def _stack_padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[N, ...] of the arrays, each axis zero-padded to the largest and to at least 1."""
    shape = [max(1, *(a.shape[axis] for a in arrays), 1) for axis in range(arrays[0].ndim)]
    stacked = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for target, array in zip(stacked, arrays):
        target[tuple(map(slice, array.shape))] = array
    return stacked


class BatchMaker:
    """Makes any batch of one process's sequence. A worker and the training process make equal batches."""

    def __init__(self, split: DatasetSplit, cfg: Config, shard: tuple[int, int], batches_per_step: int):
        if cfg.TRAIN.SEED is None:
            raise ValueError("TRAIN.SEED must be chosen before data are read")
        self.split, self.cfg = split, cfg
        self.rank, self.size = shard
        self.batches_per_step = batches_per_step
        self.images = training_images(split, cfg)
        self.partners = self.images[np.isin(self.images, split.outlined_images())] if cfg.PREPROC.COPY_PASTE else ()
        if cfg.PREPROC.COPY_PASTE and len(self.partners) == 0:
            raise UserError(
                f"setting PREPROC.COPY_PASTE={cfg.PREPROC.COPY_PASTE}: {split.name} has no object with an outline to "
                "paste; copy-paste needs masks, set it to 0"
            )
        sizes = split.image_sizes()[self.images]
        total = cfg.TRAIN.BATCH_SIZE_PER_GPU * batches_per_step * self.size
        self.plan = StepPlan(sizes[:, 0] > sizes[:, 1], total, cfg.TRAIN.SEED)

    def members(self, batch: int) -> tuple[np.ndarray, list[list[int]]]:
        """The images of a batch, and the seeds of each: (seed, step, place in the step)."""
        step, part = divmod(batch, self.batches_per_step)
        each = self.cfg.TRAIN.BATCH_SIZE_PER_GPU
        places = np.arange(part * each, (part + 1) * each) * self.size + self.rank
        return self.images[self.plan.images(step)[places]], [[self.cfg.TRAIN.SEED, 1, step, p] for p in places.tolist()]

    def make(
        self, batch: int, new_image: Callable[[tuple[int, ...]], np.ndarray] = new_image_memory
    ) -> list[np.ndarray]:
        return make_batch(self.split, *self.members(batch), self.cfg, new_image, self.partners)

    def ids(self, batch: int) -> list[int | str]:
        """Ids of the images of a batch, including those from which objects are pasted."""
        images, seeds = self.members(batch)
        pasted = [paste_partner(seed, self.partners, self.cfg)[0] for seed in seeds]
        return [self.split.image_id(i) for i in [*images, *(p for p in pasted if p is not None)]]


def batch_images(
    split: DatasetSplit, cfg: Config, first_batch: int, batches_per_step: int, shard: tuple[int, int] = (0, 1)
) -> list[list[dict[str, Any]]]:
    """For each batch that this process reads for the step that begins with `first_batch`: {id, file} of each image,
    with `pasted`, the same of the image from which objects are pasted into it."""
    maker = BatchMaker(split, cfg, shard, batches_per_step)

    def describe(i: int) -> dict[str, Any]:
        return {"id": split.image_id(i), "file": split.image_file(i)}

    batches = []
    for batch in range(first_batch, first_batch + batches_per_step):
        images, seeds = maker.members(batch)
        partners = [paste_partner(seed, maker.partners, cfg)[0] for seed in seeds]
        pasted = [{} if p is None else {"pasted": describe(p)} for p in partners]
        batches.append([{**describe(i), **other} for i, other in zip(images.tolist(), pasted)])
    return batches


# ------------------------------------------------------------------------------------------------ inference
_WAITING = 4  # batches of images that wait for others of their size


def resize_for_test(image: np.ndarray, cfg: Config) -> np.ndarray:
    """The image in the size in which the network sees it; test-time augmentation resizes by itself."""
    if cfg.TEST.AUG_SHORT_EDGES:
        return image
    height, width = _test_size(image.shape[0], image.shape[1], cfg)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _test_size(height: int, width: int, cfg: Config) -> tuple[int, int]:
    """Height and width of an image after `resize_for_test`."""
    if cfg.TEST.AUG_SHORT_EDGES:
        return height, width
    return resized_shape(height, width, cfg.PREPROC.TEST_SHORT_EDGE_SIZE, cfg.PREPROC.MAX_SIZE)


def stack_images(images: Sequence[np.ndarray], cfg: Config) -> tuple[np.ndarray, np.ndarray]:
    """N images uint8 [h, w, 3] -> image [N, H, W, 3] zero-padded at the bottom and right, image_shape int32 [N, 2]."""
    shapes = [image.shape[:2] for image in images]
    batch = np.zeros((len(images), *padded_size(shapes, cfg), 3), np.uint8)
    for target, image in zip(batch, images):
        target[: image.shape[0], : image.shape[1]] = image
    return batch, np.array(shapes, np.int32)


def inference_batches(
    images: DatasetSplit | Sequence[str],
    cfg: Config,
    shard: tuple[int, int] = (0, 1),
    unreadable: Callable[[int, UserError], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Batches of at most TEST.BATCH_SIZE images, each image of this shard exactly once, read ahead by threads.

    Images are resized to TEST_SHORT_EDGE_SIZE, or keep the size of their files for test-time augmentation. Only images
    that are padded to the same size share a batch, so that each is seen exactly as it is alone. So images come out of
    their order, but no image waits for more than a few batches.

    Args:
        images: a split, whose images are sorted by size, or files.
        shard: (rank, size): every size-th image from the rank-th on.
        unreadable: called with the index of each image that cannot be read and the reason; the image is left out. None:
            an unreadable image is an error.

    Yields image uint8 [N, H, W, 3] BGR zero-padded, image_shape int32 [N, 2] valid heights and widths, indices (N ints
    into `images`), original_shapes (N pairs of height, width).
    """
    mine = np.arange(shard[0], len(images), shard[1])
    most = cfg.TEST.BATCH_SIZE
    if isinstance(images, DatasetSplit) and most > 1:
        keys = [_same_padding(_test_size(h, w, cfg), cfg) for h, w in images.image_sizes()[mine].tolist()]
        mine = mine[sorted(range(len(mine)), key=lambda n: keys[n])]

    def read(i: int) -> tuple[np.ndarray, tuple[int, int]]:
        image = read_split_image(images, i) if isinstance(images, DatasetSplit) else read_image(images[i])
        return resize_for_test(image, cfg), image.shape[:2]

    def stacked(images: list[tuple[int, np.ndarray, tuple[int, int]]]) -> dict[str, Any]:
        indices, resized, originals = map(list, zip(*images))
        batch, shapes = stack_images(resized, cfg)
        return {"image": batch, "image_shape": shapes, "indices": indices, "original_shapes": originals}

    todo, ahead = iter(mine.tolist()), deque()
    waiting: dict[tuple[int, int], list[tuple[int, np.ndarray, tuple[int, int]]]] = {}  # the oldest sizes first
    with ThreadPoolExecutor(2) as pool:
        try:
            while True:
                ahead.extend((i, pool.submit(read, i)) for i in itertools.islice(todo, 3 * most - len(ahead)))
                if not ahead:
                    break
                index, job = ahead.popleft()
                try:
                    image, original = job.result()
                except UserError as e:
                    if unreadable is None:
                        raise
                    unreadable(index, e)
                    continue
                key = _same_padding(image.shape[:2], cfg)
                waiting.setdefault(key, []).append((index, image, original))
                if len(waiting[key]) == most:
                    yield stacked(waiting.pop(key))
                elif sum(map(len, waiting.values())) >= _WAITING * most:
                    yield stacked(waiting.pop(next(iter(waiting))))
            while waiting:
                yield stacked(waiting.pop(next(iter(waiting))))
        finally:
            for _, job in ahead:
                job.cancel()


def _same_padding(size: tuple[int, int], cfg: Config) -> tuple[int, int]:
    """Images for the network with the same of these are padded in a common batch as each is alone."""
    return size if cfg.TEST.AUG_SHORT_EDGES else padded_size([size], cfg)
