"""AVI files of JPEG pictures (Motion JPEG) that can be read at any moment and continued after a kill.

The container follows Microsoft's AVI RIFF format, with OpenDML's further RIFF parts for files above a gigabyte. The
same pictures always give the same bytes, however often the writing was interrupted. No codec is needed.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from common import UserError

__all__ = ["AviWriter", "count_frames"]

LARGEST_PART = 1 << 30  # bytes of a RIFF part; players read up to 2 GiB
_SCALE = 1000  # frame rates are kept in thousandths
# Where the numbers that grow are in the file.
_TOTAL_AT, _LENGTH_AT, _ALL_AT, _HEADER = 48, 140, 232, 248


class AviWriter:
    """Appends pictures to an AVI file. `add` leaves a file that players read; `close` adds the index for seeking."""

    def __init__(
        self, path: str | os.PathLike, width: int, height: int, fps: float, keep: int = 0, part_size: int = LARGEST_PART
    ):
        """keep: the pictures of an existing file that stay; pictures after them are cut off. part_size: the largest
        size of a RIFF part."""
        self.path, self.frames, self._part_size = Path(path), 0, part_size
        self._index: list[tuple[int, int]] = []  # (offset, size) of the pictures of the first part
        self._part = 0  # where the part that grows begins
        self._first_frames = 0  # pictures of the first part, which players without OpenDML show
        header = _header(width, height, fps)
        if keep:
            self._file = open(path, "r+b")  # noqa: SIM115
            self._file.truncate(self._walk(keep, header))
        else:
            self._file = open(path, "w+b")  # noqa: SIM115
            self._file.write(header)
        self._file.seek(0, os.SEEK_END)
        self._update()

    def add(self, jpeg: bytes) -> None:
        """Appends a picture, a JPEG file."""
        if (
            self._file.tell() + len(jpeg) + 8 - self._part > self._part_size
            and self._file.tell() > self._movi_at() + 12
        ):
            self._end_part()
            self._part = self._file.tell()
            self._file.write(struct.pack("<4sI4s4sI4s", b"RIFF", 16, b"AVIX", b"LIST", 4, b"movi"))
        if self._part == 0:
            self._index.append((self._file.tell() - self._movi_at() - 8, len(jpeg)))
            self._first_frames += 1
        self._file.write(struct.pack("<4sI", b"00dc", len(jpeg)) + jpeg + b"\0" * (len(jpeg) % 2))
        self.frames += 1
        self._update()

    def close(self) -> None:
        self._end_part()
        self._file.close()

    def _movi_at(self) -> int:
        """Where the list of pictures of the part that grows begins."""
        return self._part + (_HEADER - 12 if self._part == 0 else 12)

    def _end_part(self) -> None:
        if self._part == 0:
            entries = b"".join(struct.pack("<4sIII", b"00dc", 0x10, *entry) for entry in self._index)
            self._file.write(struct.pack("<4sI", b"idx1", len(entries)) + entries)
            self._put(4, self._file.tell() - 8)
        self._file.flush()

    def _update(self) -> None:
        """Writes the sizes and numbers of pictures so far."""
        end = self._file.tell()
        self._put(self._part + 4, end - self._part - 8)
        self._put(self._movi_at() + 4, end - self._movi_at() - 8)
        self._put(_TOTAL_AT, self._first_frames)
        self._put(_LENGTH_AT, self.frames)
        self._put(_ALL_AT, self.frames)
        self._file.flush()

    def _put(self, at: int, value: int) -> None:
        end = self._file.tell()
        self._file.seek(at)
        self._file.write(struct.pack("<I", value))
        self._file.seek(end)

    def _walk(self, keep: int, header: bytes) -> int:
        """Takes up an existing file after `keep` pictures; returns where these end."""
        self._file.seek(0)
        if _fixed(self._file.read(_HEADER)) != _fixed(header):
            raise UserError(f"{self.path} is a video of another size or frame rate: move it away, or choose --output")
        end = _HEADER
        for part, offset, size in _pictures(self._file):
            if self.frames == keep:
                break
            self._part, end = part, offset + 8 + size + size % 2
            if part == 0:
                self._index.append((offset - self._movi_at() - 8, size))
                self._first_frames += 1
            self.frames += 1
        if self.frames < keep:
            raise ValueError(f"{self.path} has {self.frames} pictures, not {keep}")
        return end


def count_frames(path: str | os.PathLike) -> int:
    """How many whole pictures a file of `AviWriter` has, however its writing ended; 0 if there is no such file."""
    try:
        with open(path, "rb") as f:
            return sum(1 for _ in _pictures(f))
    except FileNotFoundError:
        return 0


def _pictures(file) -> Iterator[tuple[int, int, int]]:
    """(start of its RIFF part, its own start, size without head) of each whole picture."""
    length, part, at = os.fstat(file.fileno()).st_size, 0, _HEADER
    while at + 8 <= length:
        file.seek(at)
        name, size = struct.unpack("<4sI", file.read(8))
        if name == b"00dc":
            if at + 8 + size + size % 2 > length:
                return
            yield part, at, size
        elif name == b"RIFF":
            part, at = at, at + 24
            continue
        elif name != b"idx1":
            return
        at += 8 + size + size % 2


def _fixed(header: bytes) -> bytes:
    """A header without the numbers that grow."""
    fixed = bytearray(header)
    for at in (4, _TOTAL_AT, _LENGTH_AT, _ALL_AT, _HEADER - 8):
        fixed[at : at + 4] = bytes(4)
    return bytes(fixed)


def _header(width: int, height: int, fps: float) -> bytes:
    rate = max(1, round(fps * _SCALE))
    main = struct.pack(
        "<14I", round(1e6 * _SCALE / rate), 0, 0, 0x10, 0, 0, 1, width * height * 3, width, height, 0, 0, 0, 0
    )
    stream = struct.pack(
        "<4s4sIHHIIIIIIII4H", b"vids", b"MJPG", 0, 0, 0, 0, _SCALE, rate, 0, 0, width * height * 3, 0xFFFFFFFF, 0,
        0, 0, min(width, 65535), min(height, 65535),
    )  # fmt: skip
    picture = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", width * height * 3, 0, 0, 0, 0)
    lists = _list(b"strl", _chunk(b"strh", stream) + _chunk(b"strf", picture))
    lists = _list(b"hdrl", _chunk(b"avih", main) + lists + _list(b"odml", _chunk(b"dmlh", bytes(4))))
    head = b"RIFF" + bytes(4) + b"AVI " + lists
    return head + struct.pack("<4sI4s", b"LIST", 4, b"movi")


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI", name, len(content)) + content


def _list(name: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI4s", b"LIST", len(content) + 4, name) + content
