"""Image files before they are decoded: sizes from headers, and the file that a wrong name probably means.

JPEG and PNG headers are read here, not with Pillow, so that untrusted files do not reach the parsers of Pillow's forty
formats, some of which are far slower.
"""

import difflib
import os
import struct
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np

from common import UserError
from utils.archives import list_folder, read_file, read_start
from utils.threads import in_threads

__all__ = [
    "IMAGE_SUFFIXES",
    "LARGEST_IMAGE",
    "decode_bytes",
    "decode_image",
    "header_sizes",
    "image_header_size",
    "meant_file",
]

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".avif", ".tif", ".tiff", ".gif", ".ppm", ".pgm",
)  # fmt: skip
LARGEST_IMAGE = 1 << 30  # the most pixels that OpenCV decodes
MOST_PIXELS_PER_BYTE = 9000  # of a PNG of one bit, at deflate's best (1032:1); a JPEG holds fewer


def decode_image(path: str | os.PathLike, flags: int, what: str = "") -> np.ndarray:
    """The image decoded by cv2.imdecode; its name may hold any bytes. A UserError names `what` if it cannot be
    decoded."""
    what = what or f"image {path}"
    try:
        content = read_file(path)
    except OSError as e:
        raise UserError(f"{what} cannot be read: {e.strerror or e}") from None
    return decode_bytes(content, flags, what)


def decode_bytes(content: np.ndarray, flags: int, what: str) -> np.ndarray:
    """As `decode_image`, from the file's bytes uint8 [n]."""
    size = _size_in(content[: 1 << 20].tobytes())
    if size and size[0] * size[1] > LARGEST_IMAGE:
        raise UserError(f"{what} has {size[1]}x{size[0]} pixels; at most {LARGEST_IMAGE} can be read: make it smaller")
    if size and size[0] * size[1] > MOST_PIXELS_PER_BYTE * len(content):
        # OpenCV would allocate memory for all pixels before it finds the damage.
        raise UserError(f"{what} is damaged: its {len(content)} bytes cannot hold {size[1]}x{size[0]} pixels")
    if _longest_png_chunk(content) > len(content) + 2**26:
        raise UserError(
            f"{what} is damaged: a part of it claims to be longer than the file"
        )  # OpenCV would allocate it
    try:
        image = cv2.imdecode(content, flags) if len(content) else None
    except cv2.error as e:
        if "pixels" in str(e):
            raise UserError(
                f"{what} has more than {LARGEST_IMAGE} pixels, which cannot be read: make it smaller"
            ) from None
        image = None
    if image is None:
        raise UserError(f"{what} is not an image that OpenCV can read, or it is damaged")
    return image


def _longest_png_chunk(content: np.ndarray) -> int:
    """The declared size in bytes of a PNG's longest chunk; 0 for other files."""
    longest, at = 0, 8
    if content[:8].tobytes() != b"\x89PNG\r\n\x1a\n":
        return 0
    while at + 8 <= len(content):
        length = int.from_bytes(content[at : at + 4].tobytes(), "big")
        longest, at = max(longest, length), at + 12 + length
    return longest


def image_header_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a JPEG or PNG from its header; other kinds, and damaged headers, are decoded."""
    try:
        # A JPEG's frame header comes after its metadata, which may hold pictures of their own.
        for length in (1 << 12, 1 << 20):
            size = _size_in(read_start(path, length))
            if size is not None:
                return size
    except OSError as e:
        raise UserError(f"image {path} cannot be read: {e.strerror}") from None
    return decode_image(path, cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION).shape[:2]


def _size_in(start: bytes) -> tuple[int, int] | None:
    """(height, width) from a file's first bytes; None if they do not contain it."""
    if start.startswith(b"\x89PNG\r\n\x1a\n") and len(start) >= 24:
        width, height = struct.unpack(">II", start[16:24])
        return height, width
    return _jpeg_size(start) if start.startswith(b"\xff\xd8") else None


def _jpeg_size(start: bytes) -> tuple[int, int] | None:
    """Walks the segments to the frame header (SOF0 to SOF15 without the tables DHT, JPG and DAC)."""
    at = 2
    while at + 4 <= len(start):
        if start[at] != 0xFF:
            return None
        if start[at + 1] == 0xFF:  # fill byte
            at += 1
            continue
        if 0xC0 <= start[at + 1] <= 0xCF and start[at + 1] not in (0xC4, 0xC8, 0xCC):
            return struct.unpack(">HH", start[at + 5 : at + 9]) if at + 9 <= len(start) else None
        at += 2 + struct.unpack(">H", start[at + 2 : at + 4])[0]
    return None


def header_sizes(files: Sequence[str]) -> np.ndarray:
    """int32 [n, 2] heights and widths; several files at once, since reading them is mostly waiting."""
    return np.array(in_threads(image_header_size, files, 16, "sizes of images"), np.int32).reshape(-1, 2)


def meant_file(folder: str | os.PathLike, name: str) -> str:
    """ " (did you mean …?)" with the file that a name which is not there most likely means; "" if there is none."""
    near = _similar_file(Path(folder), name)
    if not near:
        return ""
    plain, given = os.path.basename(near), os.path.basename(name)
    accents = plain != given and unicodedata.normalize("NFC", plain) == unicodedata.normalize("NFC", given)
    how = "composed" if plain == unicodedata.normalize("NFC", plain) else "decomposed"
    return f" (did you mean {near}{f', whose accents are {how}' if accents else ''}?)"


def _similar_file(folder: Path, name: str) -> str:
    """As the name, but with / for \\, without %20, with other accents, .JPG for .jpg or another suffix, in the folder
    itself, or spelled a little differently."""
    plain = name.replace("\\", "/")
    for candidate in dict.fromkeys([plain, unquote(plain)]):
        for relative in dict.fromkeys([candidate, candidate.partition("/")[2], os.path.basename(candidate)]):
            parent, wanted = folder / os.path.dirname(relative), _folded(os.path.basename(relative))
            try:
                there = sorted(list_folder(parent)) if wanted else []
            except (OSError, ValueError, UserError):
                continue
            stem = os.path.splitext(wanted)[0]
            found = [e for e in there if _folded(e) == wanted]
            found += [e for e in there if os.path.splitext(_folded(e))[0] == stem]
            if not found and len(there) <= 20000 and not any(c.isdigit() for c in wanted):
                found = difflib.get_close_matches(os.path.basename(relative), there, 1, 0.8)
            if found:
                return os.fspath(parent / found[0])
    return ""


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
