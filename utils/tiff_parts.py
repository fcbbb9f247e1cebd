"""Parts of large TIFF files, tiled or in strips (TIFF 6.0 and BigTIFF), without decoding the rest.

A file's tiles or strips are compressed one by one. Each that is needed becomes a small TIFF file in memory with the
same tags, which OpenCV decodes: so every kind that OpenCV reads can be read in parts, with the same pixels.
"""

import os
import struct
from collections import OrderedDict
from typing import Any, NamedTuple

import cv2
import numpy as np

__all__ = ["TiffParts", "open_tiff"]

_WIDTH, _HEIGHT, _COMPRESSION, _ORIENTATION, _PLANAR = 256, 257, 259, 274, 284
_STRIP_AT, _STRIP_ROWS, _STRIP_BYTES, _TILE_W, _TILE_H, _TILE_AT, _TILE_BYTES = 273, 278, 279, 322, 323, 324, 325
# Tags that say how pixels are stored: bits, compression, colours, samples, predictor, palette, JPEG's tables, YCbCr.
_COPIED = (258, 259, 262, 266, 277, 284, 317, 320, 338, 339, 347, 529, 530, 531, 532)
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_WHOLE = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_LARGEST_PIECE = 1 << 27  # pixels of a tile or strip that is worth decoding alone
_STRIP_PIXELS = 1 << 22  # of strips without compression, which can be cut
_CACHE = 1 << 28  # bytes of decoded pieces that are kept: the strips of one row of tiles are needed many times


class _Tag(NamedTuple):
    kind: int
    values: int
    content: bytes


class TiffParts:
    """An open TIFF file: `read` gives any part of it, uint8 BGR."""

    def __init__(self, path: str | os.PathLike, order: str, tags: dict[int, _Tag]):
        """Raises ValueError where the file cannot be read in parts."""
        self.path, self._order, self._tags = path, order, tags
        self.width, self.height = self._number(_WIDTH), self._number(_HEIGHT)
        if self._number(_ORIENTATION, 1) != 1 or self._number(_PLANAR, 1) != 1 or min(self.width, self.height) < 1:
            raise ValueError("turned, or one colour after the other")
        if _TILE_AT in tags:
            self._piece_w, self._piece_h = self._number(_TILE_W), self._number(_TILE_H)
            self._at, self._bytes = self._numbers(_TILE_AT), self._numbers(_TILE_BYTES)
        else:
            self._piece_w, self._piece_h = self.width, min(self._number(_STRIP_ROWS, self.height), self.height)
            self._at, self._bytes = self._numbers(_STRIP_AT), self._numbers(_STRIP_BYTES)
            self._cut_strips()
        self._columns = -(-self.width // max(self._piece_w, 1))
        pieces = self._columns * -(-self.height // max(self._piece_h, 1))
        if len(self._at) != pieces or len(self._bytes) != pieces:
            raise ValueError("wrong number of pieces")
        if self._piece_w * self._piece_h > _LARGEST_PIECE:
            raise ValueError("one piece")
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._piece(0)  # shows whether OpenCV can decode it

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """uint8 BGR [height, width, 3] of the rectangle, which lies in the image. ValueError for a damaged piece."""
        part = np.empty((height, width, 3), np.uint8)
        for row in range(y // self._piece_h, -(-(y + height) // self._piece_h)):
            for column in range(x // self._piece_w, -(-(x + width) // self._piece_w)):
                left, top = column * self._piece_w, row * self._piece_h
                piece = self._piece(row * self._columns + column)
                x1, y1 = max(x, left), max(y, top)
                x2, y2 = min(x + width, left + piece.shape[1]), min(y + height, top + piece.shape[0])
                part[y1 - y : y2 - y, x1 - x : x2 - x] = piece[y1 - top : y2 - top, x1 - left : x2 - left]
        return part

    def _cut_strips(self) -> None:
        """Strips without compression are cut into strips of few rows."""
        if self._number(_COMPRESSION, 1) != 1 or len(self._at) != -(-self.height // max(self._piece_h, 1)):
            return
        rows = max(1, min(self._piece_h, _STRIP_PIXELS // self.width))
        at, size = [], []
        for strip, (start, length) in enumerate(zip(self._at, self._bytes)):
            count = min(self._piece_h, self.height - strip * self._piece_h)
            if length % count or count % rows and strip + 1 < len(self._at):
                return
            row = length // count
            for first in range(0, count, rows):
                at.append(start + first * row)
                size.append(min(rows, count - first) * row)
        self._at, self._bytes, self._piece_h = at, size, rows

    def _piece(self, number: int) -> np.ndarray:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        with open(self.path, "rb") as f:
            f.seek(self._at[number])
            content = f.read(self._bytes[number])
        height = self._piece_h
        if _TILE_AT not in self._tags:  # the last strip is shorter
            height = min(height, self.height - number * height)
        log = cv2.utils.logging
        level = log.setLogLevel(log.LOG_LEVEL_SILENT)  # else libtiff would warn about every piece
        try:
            piece = cv2.imdecode(np.frombuffer(self._small_file(content, height), np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:
            piece = None
        finally:
            log.setLogLevel(level)
        if piece is None or piece.shape[:2] != (height, self._piece_w):
            raise ValueError(f"a part of it ({self._piece_w}x{height} pixels) cannot be decoded")
        self._cache[number] = piece
        while len(self._cache) > 1 and sum(p.nbytes for p in self._cache.values()) > _CACHE:
            self._cache.popitem(last=False)
        return piece

    def _small_file(self, content: bytes, height: int) -> bytes:
        """A TIFF file of one strip."""
        tags = {n: self._tags[n] for n in _COPIED if n in self._tags}
        for number, value in (
            (_WIDTH, self._piece_w), (_HEIGHT, height), (_STRIP_ROWS, height), (_STRIP_BYTES, len(content)),
            (_STRIP_AT, 8),
        ):  # fmt: skip
            tags[number] = _Tag(4, 1, struct.pack(self._order + "I", value))
        body = content + bytes(len(content) % 2)
        extra, entries = b"", b""
        after = 8 + len(body) + 2 + 12 * len(tags) + 4
        for number in sorted(tags):
            tag = tags[number]
            field = tag.content
            if len(field) > 4:
                field = struct.pack(self._order + "I", after + len(extra))
                extra += tag.content + bytes(len(tag.content) % 2)
            entries += struct.pack(self._order + "HHI", number, tag.kind, tag.values) + field.ljust(4, b"\0")
        mark = b"II" if self._order == "<" else b"MM"
        head = mark + struct.pack(self._order + "HI", 42, 8 + len(body))
        return head + body + struct.pack(self._order + "H", len(tags)) + entries + bytes(4) + extra

    def _numbers(self, number: int) -> list[int]:
        tag = self._tags.get(number)
        if tag is None or tag.kind not in _WHOLE:
            raise ValueError(f"no tag {number}")
        return list(struct.unpack(f"{self._order}{tag.values}{_WHOLE[tag.kind]}", tag.content))

    def _number(self, number: int, default: int | None = None) -> int:
        if number not in self._tags and default is not None:
            return default
        return self._numbers(number)[0]


def open_tiff(path: str | os.PathLike) -> TiffParts | None:
    """The file, if it is a TIFF that can be read in parts; None for all other files, damaged ones included."""
    try:
        with open(path, "rb") as f:
            return TiffParts(path, *_read_tags(f))
    except (OSError, ValueError, IndexError, struct.error, OverflowError, MemoryError):
        return None


def _read_tags(file: Any) -> tuple[str, dict[int, _Tag]]:
    """(byte order, tags of the first image)."""
    length = os.fstat(file.fileno()).st_size
    mark = file.read(4)
    order = {b"II": "<", b"MM": ">"}.get(mark[:2], "")
    version = struct.unpack(order + "H", mark[2:])[0] if order and len(mark) == 4 else 0
    if version == 42:
        count, entry, inline, word = "H", 12, 4, "I"
        at = struct.unpack(order + "I", file.read(4))[0]
    elif version == 43:
        count, entry, inline, word = "Q", 20, 8, "Q"
        size, _, at = struct.unpack(order + "HHQ", file.read(12))
        if size != 8:
            raise ValueError("unknown BigTIFF")
    else:
        raise ValueError("no TIFF")
    file.seek(at)
    number = struct.unpack(order + count, file.read(struct.calcsize(count)))[0]
    if number > 4096:
        raise ValueError("too many tags")
    table = file.read(number * entry)
    tags = {}
    for i in range(number):
        part = table[i * entry : (i + 1) * entry]
        tag, kind, values = struct.unpack(order + "HH" + word, part[: entry - inline])
        size = _SIZES.get(kind, 1) * values
        content = part[entry - inline :][:size]
        if size > inline:
            place = struct.unpack(order + word, part[entry - inline :])[0]
            if place + size > length:
                raise ValueError("a tag lies beyond the end")
            file.seek(place)
            content = file.read(size)
        tags[tag] = _Tag(kind, values, content)
    return order, tags
