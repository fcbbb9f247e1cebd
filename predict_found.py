"""What a model finds in one image, and the kinds of images, for programs that use PackRCNN from Python."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from common import UserError, atomic_write
from data import read_image
from detections import Detections, Rle, coco_results
from utils.archives import is_folder
from utils.image_header import decode_bytes
from utils.polygons import decode_mask
from viz import Style, draw_detections, prediction_entry

__all__ = ["Found", "FoundObject", "Image", "pixels_of"]

# A file's name, a file's bytes, pixels, or an image of PIL, which need not be installed.
Image = Any  # str | os.PathLike | bytes | np.ndarray | PIL.Image.Image
ORDERS = ("bgr", "rgb")


def pixels_of(image: Image, order: str | None = None) -> np.ndarray:
    """uint8 [H, W, 3] in the order BGR of any kind of image; `order` is that of colour arrays."""
    if order is not None and order not in ORDERS:
        raise UserError(f'order={order!r}: must be "bgr" (OpenCV) or "rgb" (PIL, matplotlib, imageio)')
    if isinstance(image, (str, os.PathLike)):
        if is_folder(image):
            raise UserError(f"image {os.fspath(image)} is a folder; give a list of its files")
        return read_image(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode_bytes(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR, "the image given as bytes")
    if "PIL.Image" in sys.modules and isinstance(image, sys.modules["PIL.Image"].Image):
        return _pixels_of_pil(image)
    if not hasattr(image, "__array__"):
        raise UserError(
            f"an image is a file's name, a file's bytes, an array or an image of PIL, not of the type "
            f"{type(image).__name__}"
        )
    return _pixels_of_array(np.asarray(image), order)


def _pixels_of_array(array: np.ndarray, order: str | None) -> np.ndarray:
    is_grey = array.ndim == 2 or array.ndim == 3 and array.shape[2] == 1
    if not (is_grey or array.ndim == 3 and array.shape[2] in (3, 4)) or 0 in array.shape:
        raise UserError(f"an image array is [H,W,3], [H,W,4] or [H,W], not {list(array.shape)}")
    if array.dtype != np.uint8:
        hint = "; of values from 0 to 1: (255 * image).astype('uint8')" if array.dtype.kind == "f" else ""
        raise UserError(f"an image array has values from 0 to 255 of the type uint8, not {array.dtype}{hint}")
    if is_grey:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    if order is None:
        raise UserError(
            'say in which order the colours of an array are: order="rgb" (PIL, matplotlib, imageio) or order="bgr" '
            "(OpenCV)"
        )
    array = array[:, :, :3]  # transparency is left out
    return np.ascontiguousarray(array[:, :, ::-1] if order == "rgb" else array)


def _pixels_of_pil(image: Any) -> np.ndarray:
    """As an image viewer shows it, like `data.read_image`."""
    from PIL import ImageOps

    if image.mode[0] in "IF":  # 16 or 32 bits, which PIL would cut off at 255
        raise UserError(f"an image of PIL's mode {image.mode} has no range of 0 to 255; give the file's name instead")
    return np.ascontiguousarray(np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[:, :, ::-1])


class FoundObject(NamedTuple):
    """One object."""

    box: np.ndarray  # float32 [4], x1 y1 x2 y2
    score: float
    name: str  # of its class
    label: int  # number of its class, from 1
    category_id: int | str  # of its class in the annotations of the training data
    rle: Rle | None = None  # its mask
    keypoints: np.ndarray | None = None  # float32 [K, 3], x y score

    @property
    def mask(self) -> np.ndarray | None:
        """bool [H, W]."""
        return None if self.rle is None else decode_mask(self.rle)


@dataclass(frozen=True, eq=False, repr=False)
class Found:
    """The objects found in one image, by descending score, in pixels of the image as it was given.

    len(found), iteration and found[0] give single objects (`FoundObject`); found[:3], found[found.scores > 0.9] and
    `filter` give a Found of some of them. Nothing is changed in place.
    """

    detections: Detections
    class_names: list[str]
    size: tuple[int, int]  # height and width of the image
    category_ids: list[int | str] | None = None  # of the classes, where the model knows them
    file: str | None = None  # the image, if it was given as a file
    order: str | None = None  # of the image's colours, if it was given as an array

    @property
    def boxes(self) -> np.ndarray:
        """float32 [D, 4], x1 y1 x2 y2; the image reaches from 0 to its width and height."""
        return self.detections.boxes

    @property
    def scores(self) -> np.ndarray:
        """float32 [D]."""
        return self.detections.scores

    @property
    def labels(self) -> np.ndarray:
        """int32 [D], numbers of the classes, from 1."""
        return self.detections.labels

    @property
    def names(self) -> list[str]:
        """The class of each object."""
        return [self.class_names[label - 1] for label in self.labels.tolist()]

    @property
    def rles(self) -> list[Rle] | None:
        """Masks in COCO's run-length encoding: {"size": [H, W], "counts": text}; None if the model has no masks."""
        return self.detections.masks

    @property
    def masks(self) -> np.ndarray | None:
        """bool [D, H, W], made at each call; None if the model has no masks."""
        if self.rles is None:
            return None
        masks = np.zeros((len(self), *self.size), bool)
        for mask, rle in zip(masks, self.rles):
            mask[:] = decode_mask(rle)
        return masks

    @property
    def keypoints(self) -> np.ndarray | None:
        """float32 [D, K, 3], x y score; None if the model has no keypoints."""
        return self.detections.keypoints

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[FoundObject]:
        return (self._object(i) for i in range(len(self)))

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, (int, np.integer)):
            if not -len(self) <= which < len(self):
                raise IndexError(f"there are {len(self)} objects")
            return self._object(int(which) % len(self))
        numbers = np.arange(len(self))[which]
        boxes, scores, labels, masks, points = self.detections
        chosen = Detections(
            boxes[numbers], scores[numbers], labels[numbers], None if masks is None else [masks[i] for i in numbers],
            None if points is None else points[numbers],
        )  # fmt: skip
        return replace(self, detections=chosen)

    def __repr__(self) -> str:
        height, width = self.size
        image = f"{self.file} ({width}x{height})" if self.file else f"an image of {width}x{height}"
        what = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common(8))
        return f"<{len(self)} object{'s' * (len(self) != 1)} in {image}{': ' * bool(what)}{what}>"

    def _object(self, i: int) -> FoundObject:
        boxes, scores, labels, masks, points = self.detections
        label = int(labels[i])
        return FoundObject(
            boxes[i], float(scores[i]), self.class_names[label - 1], label, self._category_id(label),
            None if masks is None else masks[i], None if points is None else points[i],
        )  # fmt: skip

    def _category_id(self, label: int) -> int | str:
        return label if self.category_ids is None else self.category_ids[label - 1]

    def filter(self, score: float = 0.0, classes: Sequence[str] | str | None = None) -> "Found":
        """Only objects with at least this score, and of these classes."""
        keep = self.scores >= score
        if classes is not None:
            wanted = [classes] if isinstance(classes, str) else list(classes)
            for name in wanted:
                if name not in self.class_names:
                    raise UserError(f"classes: the model has no class {name!r}; it has {', '.join(self.class_names)}")
            keep &= np.isin(self.labels, [self.class_names.index(name) + 1 for name in wanted])
        return self[keep]

    def draw(
        self, image: Image | None = None, *, order: str | None = None, score: float = 0.0, style: Style | None = None
    ) -> np.ndarray:
        """The image, uint8 [H, W, 3], with these objects.

        Args:
            image: as for the model; may be left out if the model was given a file.
            order: of the result, and of an `image` that is an array: "rgb" or "bgr". Left out: as the array that the
                model was given, else "rgb".
            score: objects with a lower score are left out.
            style: how objects are drawn, a `viz.Style`.
        """
        if image is None and self.file is None:
            raise UserError("draw: the model was given no file, so give the image: found.draw(image)")
        order = order or self.order or "rgb"
        pixels = pixels_of(self.file if image is None else image, order)
        if pixels.shape[:2] != self.size:
            raise UserError(
                f"draw: these objects are of an image of {self.size}, this one has {pixels.shape[:2]} pixels"
            )
        picture = draw_detections(pixels, self.detections, self.class_names, score, style or Style())
        return picture if order == "bgr" else np.ascontiguousarray(picture[:, :, ::-1])

    def save(self, path: str | os.PathLike, image: Image | None = None, **how: Any) -> Path:
        """Writes `draw`'s picture into a file, .jpg or .png, and returns its path."""
        path = Path(path)
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            raise UserError(f"save {path}: must end in .jpg or .png")
        picture = self.draw(image, **how)
        if (how.get("order") or self.order or "rgb") == "rgb":
            picture = np.ascontiguousarray(picture[:, :, ::-1])
        try:
            with atomic_write(path, "wb") as f:
                f.write(cv2.imencode(path.suffix.lower(), picture)[1].tobytes())
        except OSError as e:
            raise UserError(f"save {path}: {e.strerror}") from None
        return path

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """Entries of a COCO results file, for tools/score.py, pycocotools and others."""
        return coco_results(self.detections, image_id, self._category_id)

    def to_dict(self) -> dict[str, Any]:
        """What --predict writes of an image into predictions.json (docs/OUTPUTS.md)."""
        return prediction_entry(self.file or "", self.size, self.detections, self.class_names, self.category_ids)

    def to_supervision(self) -> Any:
        """As `supervision.Detections`; class_id is the place of the class in `class_names`, from 0."""
        try:
            import supervision
        except ImportError:
            raise UserError(
                "to_supervision: the Python package supervision is missing; pip install supervision"
            ) from None
        return supervision.Detections(
            xyxy=self.boxes, mask=self.masks, confidence=self.scores, class_id=self.labels - 1,
            data={"class_name": np.array(self.names, str)},
        )  # fmt: skip
