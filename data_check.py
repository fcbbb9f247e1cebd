"""Checks image files before a training run fails on them: all files (tools/check_data.py), or a sample at its start."""

import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np

from common import UserError, logger
from utils.archives import is_folder, read_file
from utils.image_header import decode_bytes, meant_file

__all__ = ["Finding", "ImageFacts", "look_at_image", "quick_check"]


class Finding(NamedTuple):
    check: str  # a key of CHECKS
    data: str  # name of the set
    image_id: Any
    annotation_id: Any
    detail: str


class ImageFacts(NamedTuple):
    """What was found in one image file; `problem` is a key of CHECKS or empty."""

    problem: str
    detail: str
    height: int
    width: int
    digest: bytes  # of the file's content
    thumbnail: np.ndarray | None  # uint8 [16, 16], grey


def look_at_image(path: str, declared: tuple[int, int]) -> ImageFacts:
    """Decodes one image and compares it with the declared (height, width)."""

    def bad(problem: str, detail: str) -> ImageFacts:
        return ImageFacts(problem, detail, 0, 0, b"", None)

    try:
        content = read_file(path)
    except FileNotFoundError:
        folder, name = os.path.split(path)
        while name and folder and not is_folder(folder):
            folder, parent = os.path.split(folder)
            name = os.path.join(parent, name)
        return bad("image missing", f"{path}{meant_file(folder, name)}")
    except (OSError, ValueError, UserError) as e:
        return bad("image unreadable", f"{path}: {getattr(e, 'strerror', None) or e}")
    if _cut_off(content.tobytes()):
        return bad("image cut off", f"{path} ends before its last line")
    try:
        image = decode_bytes(content, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, path)
    except UserError as e:
        return bad("image unreadable", str(e))
    height, width = image.shape[:2]
    digest = hashlib.sha256(content).digest()
    grey = cv2.cvtColor(cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)
    problem, detail = "", _unused_bits(content, image, path)
    if detail:
        problem = "image uses few of its bits"
    if (height, width) != declared and (
        # Annotations may refer to the image as rotated by EXIF.
        decode_bytes(content, cv2.IMREAD_COLOR, path).shape[:2] != declared
    ):
        problem = "image size differs"
        detail = f"{path} is {width}x{height}, declared {declared[1]}x{declared[0]} (width x height)"
    return ImageFacts(problem, detail, height, width, digest, grey)


def _unused_bits(content: np.ndarray, image: np.ndarray, path: str) -> str:
    """A message for a 16-bit image whose values use only 10, 12 or 14 bits: converted to 8 bits it is nearly black."""
    if not 0 < image.max() < 64:
        return ""
    deep = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if deep is None or deep.dtype != np.uint16:
        return ""
    bits = int(deep.max()).bit_length()
    return (
        f"{path} has 16 bits a channel, of which its values use {bits}: training sees 0 to {image.max()} of 255; "
        f"multiply its values by {1 << (16 - bits)}"
    )


def _cut_off(content: bytes) -> bool:
    """Whether a JPEG has no end marker or a PNG no last chunk: decoders refuse such files or fill the rest with
    grey."""
    if content.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in content[-1024:] and b"\xff\xd9" not in content[-(len(content) // 4) :]
    return content.startswith(b"\x89PNG") and b"IEND" not in content[-64:]


def quick_check(split: Any, number: int = 48, seed: int = 0) -> list[Finding]:
    """Opens a random sample of a DatasetSplit's images, which takes a fraction of a second.

    Annotations were already checked when the set was loaded. Findings are also logged as warnings.
    """
    chosen = random.Random(seed).sample(range(len(split)), min(number, len(split)))

    def look(i: int) -> ImageFacts:
        return look_at_image(split.image_file(i), split.image_size(i))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        facts = list(pool.map(look, chosen))
    findings = [
        Finding(fact.problem, split.name, split.image_id(i), None, fact.detail)
        for i, fact in zip(chosen, facts)
        if fact.problem
    ]
    for f in findings:
        logger.warning(
            f"{f.data}: image id {f.image_id!r}: {f.check}: {f.detail}; tools/check_data.py checks all images"
        )
    return findings
