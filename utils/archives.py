"""Files that may lie in a .zip or .tar archive, read without unpacking: photos.zip/sub/a.jpg is a member of photos.zip.

Each process opens an archive once and keeps the places of its members; reads use offsets of their own (pread), so that
threads do not disturb each other. The places in a large tar are written to <archive>.index beside it, where that is
possible, since finding them means to read a block before every member. A zip holds a list of its own.
"""

import contextlib
import json
import os
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import UserError, atomic_write

__all__ = [
    "exists", "find_folder", "is_file", "is_folder", "list_folder", "read_file", "read_start", "split_path",
    "time_stamp", "walk_files",
]  # fmt: skip

SUFFIXES = (".zip", ".tar")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
LARGEST_MEMBER = 1 << 30  # bytes
_INDEX_FROM = 1000  # members of a tar that get an index file
_BLOCK = 512  # of a tar


class _Member(NamedTuple):
    offset: int  # of the content; in a zip of the header before it
    size: int
    packed: int  # bytes in the archive
    method: int  # 0 stored, 8 deflated
    crc: int | None


class _Archive(NamedTuple):
    path: str
    descriptor: int
    length: int  # bytes
    is_zip: bool
    members: dict[str, _Member]
    folders: dict[str, list[str]]  # names in each folder
    top: str  # the only folder, in which everything lies; "" if there is none


_open_archives: dict[str, _Archive] = {}
_lock = threading.Lock()


def split_path(path: str | os.PathLike) -> tuple[str, str] | None:
    """(archive, member) of a path that leads into an archive, member "" for the archive itself; None for others."""
    path = os.fspath(path)
    for suffix in SUFFIXES:
        at = path.find(suffix)
        while at >= 0:
            end = at + len(suffix)
            if (end == len(path) or path[end] == "/") and _is_regular(path[:end]):
                member = os.path.normpath(path[end:].lstrip("/")) if path[end:].strip("/") else ""
                return path[:end], "" if member == "." else member
            at = path.find(suffix, end)
    return None


def _is_regular(path: str) -> bool:
    if path in _open_archives:
        return True
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


# ------------------------------------------------------------------------------------------------ as if they were files
def read_file(path: str | os.PathLike) -> np.ndarray:
    """The content, uint8 [n]. OSError where a file cannot be read, UserError where an archive is damaged."""
    place = split_path(path)
    if place is None:
        return np.fromfile(path, np.uint8)
    return np.frombuffer(_read_member(*place), np.uint8)


def read_start(path: str | os.PathLike, length: int) -> bytes:
    """The first bytes of the content, at most `length`; errors as for `read_file`."""
    place = split_path(path)
    if place is not None:
        return _read_member(*place, length)
    with open(path, "rb") as f:
        return f.read(length)


def is_folder(path: str | os.PathLike) -> bool:
    """Whether it is a directory, an archive, or a folder in one. A compressed tar is a UserError."""
    path = os.fspath(path)
    if path.endswith(_COMPRESSED) and _is_regular(path):
        raise UserError(
            f"{path} is a compressed archive, in which single images cannot be found; unpack it, or use an "
            "uncompressed .tar or a .zip"
        )
    place = split_path(path)
    return os.path.isdir(path) if place is None else _folder_of(*place)[1] is not None


def is_file(path: str | os.PathLike) -> bool:
    """Whether it is a file, also in an archive."""
    place = split_path(path)
    if place is None or not place[1]:
        return os.path.isfile(path)
    return _find(_opened(place[0]), place[1]) is not None


def exists(path: str | os.PathLike) -> bool:
    """Whether it is a file or a folder, also in an archive."""
    return is_file(path) or is_folder(path)


def find_folder(base: Path, places: Sequence[str], packed: Sequence[str] = ()) -> Path | None:
    """The first of the places in `base` that is a folder, or is one in an archive that bears the name of a folder on
    its way: leftImg8bit/train may lie in leftImg8bit.zip or leftImg8bit/train.tar, with or without leftImg8bit/ in it.

    packed: further names of archives, without their suffixes, that may hold the places. A UserError names an archive
    that would hold one if it were not compressed as a whole.
    """
    for place in places:
        if is_folder(base / place):
            return base / place
    compressed = None
    for place in places:
        parts = place.split("/")
        ways = [("/".join(parts[:n]), "/".join(parts[n:])) for n in range(len(parts), 0, -1)]
        for stem, rest in [*ways, *((name, place) for name in packed)]:
            for archive in (base / f"{stem}{suffix}" for suffix in SUFFIXES):
                if _is_regular(str(archive)):
                    found = next((p for p in (archive / rest, archive / place) if is_folder(p)), None)
                    if found:
                        return found
            tars = (base / f"{stem}{suffix}" for suffix in _COMPRESSED)
            compressed = compressed or next((p for p in tars if _is_regular(str(p))), None)
    if compressed:
        is_folder(compressed)
    return None


def time_stamp(path: str | os.PathLike) -> int:
    """When something in the folder was last added or removed, in nanoseconds; of a folder in an archive, when the
    archive was written."""
    place = split_path(path)
    return os.stat(path if place is None else place[0]).st_mtime_ns


def list_folder(path: str | os.PathLike) -> list[str]:
    """Names of files and folders in a folder; OSError where there is none."""
    place = split_path(path)
    if place is None:
        return os.listdir(path)
    names = _folder_of(*place)[1]
    if names is None:
        raise FileNotFoundError(2, "No such folder in the archive", os.fspath(path))
    return names


def walk_files(folder: str | os.PathLike, inside: str = "") -> list[str]:
    """Names of the files in a folder and in its subfolders, relative to it."""
    if split_path(folder) is None:
        found = [os.path.join(parent, n) for parent, _, names in os.walk(os.fspath(folder)) for n in names]
        return [os.path.relpath(f, folder) for f in found]
    names = [os.path.join(inside, n) for n in list_folder(os.path.join(folder, inside))]
    deeper = {n for n in names if is_folder(os.path.join(folder, n))}
    return [n for n in names if n not in deeper] + [f for n in deeper for f in walk_files(folder, n)]


# ------------------------------------------------------------------------------------------------ archives
def _folder_of(path: str, folder: str) -> tuple[_Archive, list[str] | None]:
    archive = _opened(path)
    if not folder and archive.top:
        folder = archive.top
    names = archive.folders.get(folder)
    return archive, archive.folders.get(f"{archive.top}/{folder}") if names is None and archive.top else names


def _find(archive: _Archive, name: str) -> _Member | None:
    """The member; names may leave out the only folder of the archive."""
    member = archive.members.get(name)
    return archive.members.get(f"{archive.top}/{name}") if member is None and archive.top else member


def _read_member(path: str, name: str, length: int | None = None) -> bytes:
    archive = _opened(path)
    member = _find(archive, name)
    if member is None:
        raise FileNotFoundError(2, "not in the archive", f"{path}/{name}")
    try:
        return _content(archive, name, member, length)
    except (OSError, ValueError, zlib.error, struct.error) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"archive {path}: its member {name} is damaged: {reason}; copy or download it again") from None


def _content(archive: _Archive, name: str, member: _Member, length: int | None) -> bytes:
    if member.size > LARGEST_MEMBER:
        raise ValueError(f"it has {member.size} bytes, at most {LARGEST_MEMBER} can be read")
    part = length is not None and length < member.size
    wanted = length if part else member.size
    if not archive.is_zip:
        return _exactly(archive, member.offset, wanted)
    # The header's name and extra field may be longer than those of the list, so a second read may be needed.
    packed = min(member.packed, wanted + 1024) if part else member.packed
    if member.offset + member.packed > archive.length:
        raise ValueError("the archive ends before it does")
    guess = 30 + len(name.encode(errors="surrogateescape")) + 64
    data = os.pread(archive.descriptor, guess + packed, member.offset)
    if data[:4] != b"PK\x03\x04" or len(data) < 30:
        raise ValueError("its header is missing")
    start = 30 + sum(struct.unpack("<HH", data[26:30]))
    data = data[start : start + packed] if start <= guess else _exactly(archive, member.offset + start, packed)
    if len(data) < packed:
        raise ValueError("the archive ends before it does")
    if member.method == 8:
        inflater = zlib.decompressobj(-15)
        data = inflater.decompress(data, wanted)
        if part:
            return data
        if not inflater.eof and inflater.decompress(inflater.unconsumed_tail, 1):
            raise ValueError("it is longer than the archive's list says")
    elif member.method == 0:
        data = data[:wanted]
    else:
        raise ValueError(f"it is compressed by method {member.method}, only 0 (stored) and 8 (deflate) are supported")
    if not part and (len(data) != member.size or zlib.crc32(data) != member.crc):
        raise ValueError("its checksum is wrong")
    return data


def _exactly(archive: _Archive, offset: int, length: int) -> bytes:
    data = os.pread(archive.descriptor, length, offset)
    if len(data) < length:
        raise ValueError("the archive ends before it does")
    return data


def _opened(path: str) -> _Archive:
    archive = _open_archives.get(path)
    if archive is not None:
        return archive
    with _lock:
        if path not in _open_archives:
            _open_archives[path] = _open(path)
        return _open_archives[path]


def _open(path: str) -> _Archive:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise UserError(f"archive {path} cannot be read: {e.strerror}") from None
    try:
        is_zip = path.endswith(".zip")
        members = _zip_members(path) if is_zip else _tar_members(path, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    folders: dict[str, dict[str, None]] = {"": {}}
    for name in members:
        while name:  # up to the first folder that is known
            parent, _, last = name.rpartition("/")
            known = parent in folders
            folders.setdefault(parent, {})[last] = None
            name = "" if known else parent
    first = list(folders[""])
    top = first[0] if len(first) == 1 and first[0] in folders else ""
    return _Archive(
        path, descriptor, os.fstat(descriptor).st_size, is_zip, members, {k: list(v) for k, v in folders.items()}, top
    )


def _plain_name(name: str) -> str:
    """Without ./ and / in front; "" for names that lead out of the archive."""
    name = os.path.normpath(name).lstrip("/") if name else ""
    return "" if name in (".", "..") or name.startswith("../") else name


def _zip_members(path: str) -> dict[str, _Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as e:
        raise UserError(f"archive {path} is damaged, or not a zip file: {e}; copy or download it again") from None
    members = {}
    for entry in entries:
        name = _plain_name(entry.filename)
        if entry.filename.endswith("/") or not name:
            continue
        method = -1 if entry.flag_bits & 1 else entry.compress_type  # 1: encrypted
        members[name] = _Member(entry.header_offset, entry.file_size, entry.compress_size, method, entry.CRC)
    return members


def _tar_members(path: str, descriptor: int) -> dict[str, _Member]:
    state = os.fstat(descriptor)
    stamp = [state.st_size, state.st_mtime_ns]
    places = _read_index(path, stamp)
    if places is None:
        places = _walk_tar(path, descriptor, state.st_size)
        if len(places) >= _INDEX_FROM:
            with contextlib.suppress(OSError), atomic_write(f"{path}.index") as f:
                json.dump({"stamp": stamp, "members": places}, f)
    return {name: _Member(offset, size, size, 0, None) for name, (offset, size) in places.items()}


def _read_index(path: str, stamp: list[int]) -> dict[str, list[int]] | None:
    """The places {name: [offset, size]} that an earlier process wrote; None if the archive has changed since."""
    try:
        with open(f"{path}.index") as f:
            content: Any = json.load(f)
        if content["stamp"] != stamp:
            return None
        for offset, size in content["members"].values():
            if type(offset) is not int or type(size) is not int or not 0 <= offset <= offset + size <= stamp[0]:
                return None
        return content["members"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _walk_tar(path: str, descriptor: int, length: int) -> dict[str, list[int]]:
    """{name: [offset, size]} of a tar's files (POSIX ustar and pax, GNU), from the header before each."""
    places: dict[str, list[int]] = {}
    at, longer, extra = 0, "", {}

    def damaged(reason: str) -> UserError:
        last = f" after its member {next(reversed(places))}" if places else ""
        return UserError(f"archive {path} is damaged{last}: {reason}; copy or download it again")

    while at < length:
        header = os.pread(descriptor, _BLOCK, at)
        if not header.strip(b"\0"):
            break
        if at == 0 and header[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
            raise UserError(f"archive {path} is compressed; unpack it, or use an uncompressed .tar or a .zip")
        size = _tar_number(header[124:136])
        if len(header) < _BLOCK or _tar_number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise damaged(f"no header at byte {at}")
        kind, content = header[156:157], at + _BLOCK
        if "size" in extra and kind not in b"LKxg":
            size = int(extra["size"]) if extra["size"].isdecimal() and len(extra["size"]) < 20 else -1
        if size < 0 or content + size > length:
            raise damaged(f"at byte {at} something is {size} bytes long, which it cannot be")
        if kind in (b"L", b"x"):
            if size > 1 << 20:
                raise damaged(f"at byte {at} a name is {size} bytes long")
            text = os.pread(descriptor, size, content)
            if kind == b"L":
                longer = os.fsdecode(text.rstrip(b"\0"))
            else:
                extra = _pax(text)
        elif kind not in (b"K", b"g"):
            name = os.fsdecode(header[:100].split(b"\0")[0])
            if header[257:262] == b"ustar" and header[263:265] != b" \0" and header[345]:
                name = f"{os.fsdecode(header[345:500].split(bytes(1))[0])}/{name}"
            name = _plain_name(extra.get("path") or longer or name)
            if kind in (b"0", b"\0", b"7") and name:
                places[name] = [content, size]
            longer, extra = "", {}
        at = content + -(-size // _BLOCK) * _BLOCK
    return places


def _tar_number(field: bytes) -> int:
    """Octal digits, or GNU's base 256; -1 for neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.split(b"\0")[0].strip()
    return int(digits or b"0", 8) if all(48 <= c < 56 for c in digits) else -1


def _pax(text: bytes) -> dict[str, str]:
    """The records "length key=value" of an extended header."""
    found, at = {}, 0
    while at < len(text):
        digits = text[at : at + 20].split(b" ")[0]
        if not digits.isdigit() or not 0 < int(digits) <= len(text) - at:
            break
        key, _, value = text[at + len(digits) + 1 : at + int(digits) - 1].partition(b"=")
        found[os.fsdecode(key)] = os.fsdecode(value)
        at += int(digits)
    return found
