"""PackRCNN from Python, and the command `packrcnn` of the installed package.

from packrcnn import load
model = load("train_log/run", score_threshold=0.5)
found = model("photo.jpg")  # boxes, scores, names, masks, keypoints in pixels of the photo
found.save("found.jpg")

TensorFlow is imported by the first `load`, and left as your program has it: eager execution stays on, nothing is
configured, and each model has a graph and a session of its own.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import itertools
import logging
import os
import re
import runpy
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np

from common import UserError, logger
from config import Config
from data import padded_size, resize_for_test
from detections import Detections
from predict_found import Found, FoundObject, Image, pixels_of
from predict_tiles import detect_tiled, in_tiles, open_parts
from run_start import load_model
from utils.guest import be_guest

__all__ = ["Found", "FoundObject", "Model", "UserError", "load"]

_BUILDING = threading.Lock()  # one model is built at a time; they predict side by side


def load(
    path: str | os.PathLike,
    *,
    score_threshold: float | None = None,
    precision: str | None = None,
    device: str | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int | None = None,
    order: str | None = None,
    settings: Sequence[str] | Mapping[str, Any] = (),
    trust_code: Sequence[str] = (),
    verbose: bool = False,
) -> "Model":
    """The trained model of a run directory, checkpoint or .npz, with the settings stored in it.

    Args:
        path: as for --load.
        score_threshold: objects with a lower score are not found (default: the stored TEST.RESULT_SCORE_THRESH, 0.05).
        precision: "float32", "bfloat16" or "float16": what convolutions are computed in (default: as trained).
        device: "cpu", "gpu", "gpu:1", or "all" for all GPUs, to which images of a list and tiles are dealt; by default
            the first GPU if TensorFlow has one.
        class_names: other names for its classes, in their order.
        batch_size: how many images of a list are predicted together (default: the stored TEST.BATCH_SIZE, 1).
        order: of the colours of arrays, "rgb" or "bgr"; may also be said in each call.
        settings: others, as {"TEST.RESULTS_PER_IM": 20} or ["TEST.RESULTS_PER_IM=20"].
        trust_code: modules of your own that stored settings may name; without it stored settings run no code.
        verbose: log what is loaded; otherwise only warnings.

    UserError if anything is wrong with the file or an argument, with one line that says what.
    """
    be_guest()
    arguments = _arguments(settings)
    for key, value in (
        ("TEST.RESULT_SCORE_THRESH", score_threshold), ("TEST.PRECISION", precision),
        ("TEST.BATCH_SIZE", batch_size), ("DATA.CLASS_NAMES", None if class_names is None else list(class_names)),
    ):  # fmt: skip
        if value is not None:
            arguments.append(f"{key}={value!r}")
    if isinstance(trust_code, str):
        trust_code = [trust_code]
    pixels_of(np.zeros((1, 1, 3), np.uint8), order or "bgr")  # says what is wrong with `order` before the work
    with _BUILDING, contextlib.nullcontext() if verbose else _quiet():
        where = os.path.expanduser(os.fspath(path))
        model = load_model(where, arguments, trust_code)
        known = (model.meta or {}).get("class_names")
        if class_names is not None and known and len(known) != len(class_names):
            raise UserError(f"class_names: {where} has {len(known)} classes, here are {len(class_names)} names")

        from predict import LoadedPredictor

        return Model(LoadedPredictor(model, device=_tf_device(device), all_devices=device == "all"), where, order)


def _arguments(settings: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """KEY=VAL as after --config."""
    if isinstance(settings, str):
        return [settings]
    return [f"{k}={v!r}" for k, v in settings.items()] if isinstance(settings, Mapping) else list(settings)


def _tf_device(name: str | None) -> str | None:
    if name is None or name == "all":
        return None
    found = re.fullmatch(r"/?(cpu|gpu|cuda)(?::(\d+))?", name.lower())
    if found is None or found[1] == "cpu" and int(found[2] or 0) > 0:
        raise UserError(f'device={name!r}: must be "cpu", "gpu" or, of several, "gpu:1" or "all"')
    if found[1] == "cpu":
        return "/cpu:0"

    from utils.tf_v1 import gpu_count, gpu_problem

    if int(found[2] or 0) >= gpu_count():
        problem = gpu_problem() or f"TensorFlow has {gpu_count()} GPUs here, counted from 0"
        raise UserError(f"device={name!r}: {problem}")
    return f"/gpu:{found[2] or 0}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back this thread's messages below warnings, and TensorFlow's about the old functions used here."""
    me = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        least = logging.WARNING if record.name == logger.name else logging.ERROR
        return record.levelno >= least or record.thread != me

    loggers = (logger, logging.getLogger("tensorflow"))
    for one in loggers:
        one.addFilter(passes)
    try:
        yield
    finally:
        for one in loggers:
            one.removeFilter(passes)


class Model:
    """A trained model: model(image) -> `Found`. It may be called from several threads at once."""

    def __init__(self, predictor: Any, origin: str, order: str | None):
        """Use `load`."""
        self._predictor = predictor
        self.origin = origin
        self.cfg: Config = predictor.cfg
        self.class_names: list[str] = list(predictor.class_names)
        self.category_ids: list[int | str] | None = predictor.category_ids
        self._order = order

    def __call__(self, images: Any, *, order: str | None = None, batch_size: int | None = None) -> Any:
        """What is in an image: a `Found`; or in each of several, a list of them in their order.

        Args:
            images: a file's name, a file's bytes, an array uint8 [H,W,3] ([H,W] if grey), an image of PIL; or a list,
                tuple, iterator or array [N,H,W,3] of such.
            order: of the colours of arrays, "rgb" or "bgr".
            batch_size: how many are predicted together.

        UserError if one of them cannot be read.
        """
        several = isinstance(images, (list, tuple, Iterator)) or getattr(images, "ndim", 0) == 4
        found = list(self.each(images if several else [images], order=order, batch_size=batch_size))
        return found if several else found[0]

    def each(
        self, images: Iterable[Image], *, order: str | None = None, batch_size: int | None = None
    ) -> Iterator[Found]:
        """As a call with several images, one result after the other: neither all images nor all results need to be in
        memory."""
        size = self.cfg.TEST.BATCH_SIZE if batch_size is None else batch_size
        if not (isinstance(size, int) and size > 0):
            raise UserError(f"batch_size={size!r}: must be a whole number, 1 or more")
        predictor, order = self._get(), order or self._order
        numbered = enumerate(images)
        if in_tiles(self.cfg):
            for number, image in numbered:
                with _named(number, image):
                    parts = open_parts(_file(image) or pixels_of(image, order))
                yield self._found(detect_tiled(predictor.predictors, parts, self.cfg), parts[:2], image, order)
            return

        def prepare(entry: tuple[int, Image]) -> tuple[np.ndarray, tuple[int, int]]:
            """(the image in the size for the network, its own height and width)."""
            with _named(*entry):
                pixels = pixels_of(entry[1], order)
            return resize_for_test(pixels, self.cfg), (pixels.shape[0], pixels.shape[1])

        devices = len(predictor.predictors)
        with ThreadPoolExecutor(2) as pool:
            # Only images that are padded to the same size are predicted together: then each is padded as it is alone.
            while window := list(itertools.islice(numbered, 1 if size == devices == 1 else 4 * size * devices)):
                ready = list(pool.map(prepare, window))
                groups: dict[tuple[int, int], list[int]] = {}
                for n, (resized, _) in enumerate(ready):
                    groups.setdefault(padded_size([resized.shape[:2]], self.cfg), []).append(n)
                batches = [some[k : k + size] for some in groups.values() for k in range(0, len(some), size)]
                found = predictor.detect(tuple(zip(*(ready[n] for n in batch))) for batch in batches)
                results = dict(zip(itertools.chain(*batches), itertools.chain.from_iterable(found)))
                for n, (_, image) in enumerate(window):
                    yield self._found(results[n], ready[n][1], image, order)

    def _found(self, detections: Detections, size: tuple[int, int], image: Image, order: str | None) -> Found:
        is_array = hasattr(image, "__array__") and not hasattr(image, "convert")  # which PIL's images have
        return Found(
            detections, self.class_names, size, self.category_ids, _file(image), order if is_array else None
        )  # fmt: skip

    def _get(self) -> Any:
        if self._predictor is None:
            raise UserError(f"the model of {self.origin} is closed")
        return self._predictor

    def close(self) -> None:
        """Frees the weights; the model cannot be used any more."""
        predictor, self._predictor = self._predictor, None
        if predictor is not None:
            predictor.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<model of {self.origin}: {len(self.class_names)} classes{', closed' * (self._predictor is None)}>"


def _file(image: Image) -> str | None:
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else None


@contextlib.contextmanager
def _named(number: int, image: Image) -> Iterator[None]:
    """An error names the image by its number, unless its file is named already."""
    try:
        yield
    except UserError as e:
        raise UserError(str(e) if number == 0 or _file(image) else f"image {number}: {e}") from None


def command() -> None:
    """The command `packrcnn`, which is the program of the module `train`; modules of your own are found in the working
    directory."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    runpy.run_module(f"{__package__}.train".lstrip("."), run_name="__main__", alter_sys=True)


class _Checkout:
    """In the checkout `packrcnn.viz` is the module `viz`, so that code for the installed package works there too."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        own = name.removeprefix("packrcnn.")
        if own == name or importlib.util.find_spec(own) is None:
            return None
        return importlib.machinery.ModuleSpec(name, _Checkout)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(spec.name.removeprefix("packrcnn."))
        spec.loader_state = module.__spec__
        return module

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state


if __name__ == "packrcnn" and not __package__:
    __path__: list[str] = []  # what makes it a package
    sys.meta_path.insert(0, _Checkout)  # before the finder of files, which would load utils/ a second time

if __name__ == "__main__":
    command()
