"""Running a model over a data set: COCO results of every image."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from common import UserError
from data import inference_batches
from detections import coco_results, to_original_frame

__all__ = ["ImageResults", "evaluate_split", "merge_shards"]

ImageResults = tuple[int, list[dict[str, Any]]]  # index of the image in its split, its COCO results


def evaluate_split(
    predict: Callable | Sequence[Callable],
    split: Any,
    cfg: Any,
    shard: tuple[int, int] = (0, 1),
    gather: Callable[[list[list[ImageResults]]], list[list[list[ImageResults]]]] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """COCO results of every image of a `DatasetSplit`, in the order of the split.

    Args:
        predict: the predictor, or one for each device of this process; the images are dealt to them in turn.
        shard: (rank, number of processes) that evaluate together.
        gather: given this process's parts, returns those of all processes; needed with more than one.
    """
    predictors = [predict] if callable(predict) else list(predict)
    rank, size = shard
    if size > 1 and gather is None:
        raise ValueError("evaluation over several processes needs a way to gather their results")

    def run(i: int) -> list[ImageResults]:
        part = (rank * len(predictors) + i, size * len(predictors))
        return _evaluate_shard(predictors[i], split, cfg, part, progress and rank == 0 and i == 0)

    with ThreadPoolExecutor(len(predictors)) as pool:
        parts = list(pool.map(run, range(len(predictors))))
    if gather is not None:
        parts = [part for process in gather(parts) for part in process]
    return merge_shards(parts, len(split))


def _evaluate_shard(
    predict: Callable, split: Any, cfg: Any, shard: tuple[int, int], progress: bool
) -> list[ImageResults]:
    """Results of every `size`-th image; one thread pastes and encodes a batch while the next is predicted."""

    def convert(batch: dict, outputs: dict) -> list[ImageResults]:
        results = []
        for n, (index, original_hw) in enumerate(zip(batch["indices"], batch["original_shapes"])):
            image_id = split.image_id(index)
            try:
                one = {key: value[n] for key, value in outputs.items()}
                detections = to_original_frame(one, batch["image_shape"][n], original_hw)
            except UserError as e:
                raise UserError(f"image {image_id}: {e}") from None
            results.append((index, coco_results(detections, image_id, split.label_to_category_id)))
        return results

    results: list[ImageResults] = []
    waiting: deque = deque()
    total = len(range(shard[0], len(split), shard[1]))
    # In a log file a bar that redraws ten times a second is noise.
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
        for batch in inference_batches(split, cfg, shard):
            waiting.append(pool.submit(convert, batch, predict(batch["image"], batch["image_shape"])))
            while len(waiting) > 2:
                results += waiting.popleft().result()
            bar.update(len(batch["indices"]))
        for job in waiting:
            results += job.result()
    return results


def merge_shards(shards: Iterable[Iterable[ImageResults]], num_images: int) -> list[dict[str, Any]]:
    """The results of all shards in the order of the split, which does not depend on how it was divided.

    Every image must be there exactly once, images without detections included.
    """
    by_image: list[list[dict[str, Any]] | None] = [None] * num_images
    for part in shards:
        for index, results in part:
            if by_image[index] is not None:
                raise ValueError(f"image number {index} was evaluated by two shards")
            by_image[index] = results
    missing = [i for i, results in enumerate(by_image) if results is None]
    if missing:
        raise ValueError(f"{len(missing)} of {num_images} images were evaluated by no shard, e.g. number {missing[0]}")
    return [entry for results in by_image for entry in results or ()]
