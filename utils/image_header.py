"""Sizes of image files from their headers, without decoding them."""

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from common import UserError
from utils.threads import in_threads

__all__ = ["header_sizes", "image_header_size"]


def image_header_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a JPEG or PNG from its header; other kinds, and damaged headers, are decoded."""
    try:
        with open(path, "rb") as f:
            start = f.read(26)
            if start.startswith(b"\x89PNG\r\n\x1a\n") and len(start) >= 24:
                width, height = struct.unpack(">II", start[16:24])
                return height, width
            if start.startswith(b"\xff\xd8"):
                size = _jpeg_size(f)
                if size is not None:
                    return size
    except OSError as e:
        raise UserError(f"image {path} cannot be read: {e.strerror}") from None
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise UserError(f"image {path} is not a readable image")
    return image.shape[:2]


def _jpeg_size(f) -> tuple[int, int] | None:
    """Walks the segments to the frame header (SOF0 to SOF15 without the tables DHT, JPG and DAC)."""
    f.seek(2)
    while True:
        head = f.read(4)
        if len(head) < 4 or head[0] != 0xFF:
            return None
        if head[1] == 0xFF:  # fill byte
            f.seek(-3, os.SEEK_CUR)
            continue
        length = struct.unpack(">H", head[2:])[0]
        if 0xC0 <= head[1] <= 0xCF and head[1] not in (0xC4, 0xC8, 0xCC):
            frame = f.read(5)
            return struct.unpack(">HH", frame[1:]) if len(frame) == 5 else None
        f.seek(length - 2, os.SEEK_CUR)


def header_sizes(files: Sequence[str]) -> np.ndarray:
    """int32 [n, 2] heights and widths; several files at once, since reading them is mostly waiting."""
    return np.array(in_threads(image_header_size, files, 16, "sizes of images"), np.int32).reshape(-1, 2)
