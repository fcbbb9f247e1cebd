"""Recognises weight files by their content; reads .npz, HDF5 and TensorFlow's index within limits.

Weights may come from untrusted sources, so declared sizes are compared with the file's size before memory is allocated,
and damage gives an error of one line. Reading a file takes at most `MULTIPLE` times its size plus
`ALLOWANCE` (docs/SAFETY.md); this stops deflated zeros, shapes without data, and data shared by many tensors.
"""

import contextlib
import math
import os
import re
import stat
import struct
import tokenize
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from common import UserError

__all__ = [
    "Budget", "TensorEntry", "check_hdf5", "check_regular", "check_tensor_name", "file_kind", "is_number_type",
    "one_line", "open_archive", "read_entry", "read_hdf5", "read_npz", "read_tensor_index",
]  # fmt: skip

MULTIPLE = 8
ALLOWANCE = 64 << 20  # bytes

# Formats that cannot be read here, by the first bytes of their files and by suffix.
_EXPORTS = "save the weights it was exported from (.pth, .pkl, .h5 or .npz) and convert those"
_CAFFE = "convert Caffe2's or detectron2's .pkl of the same model"
_SAFETENSORS = "torch.save(safetensors.torch.load_file(FILE), 'model.pth') makes a file of it that is read"
_KERAS3 = "convert the legacy .h5 of Keras applications instead (…_notop.h5)"
_PACKED = "unpack it first"
_FOREIGN = {
    ".caffemodel": ("a Caffe model", _CAFFE),
    ".prototxt": ("a Caffe network description without weights", _CAFFE),
    ".keras": ("a Keras 3 archive", _KERAS3),
    ".safetensors": ("a safetensors file", _SAFETENSORS),
    ".onnx": ("an ONNX model", _EXPORTS),
    ".pb": ("a TensorFlow graph", _EXPORTS),
    ".pbtxt": ("a TensorFlow graph", _EXPORTS),
    ".tflite": ("a TensorFlow Lite model", _EXPORTS),
    ".mlmodel": ("a Core ML model", _EXPORTS),
    ".engine": ("a TensorRT engine", _EXPORTS),
    ".plan": ("a TensorRT engine", _EXPORTS),
    ".params": ("an MXNet file", _EXPORTS),
    ".pdparams": ("a PaddlePaddle file", _EXPORTS),
    ".weights": ("a Darknet file", _EXPORTS),
    ".gguf": ("a GGUF file", _EXPORTS),
    ".msgpack": ("a Flax file", _EXPORTS),
    ".gz": ("a compressed file", _PACKED),
    ".tar": ("a tar archive", _PACKED),
    ".7z": ("a compressed file", _PACKED),
    ".xz": ("a compressed file", _PACKED),
    ".bz2": ("a compressed file", _PACKED),
    ".html": ("a web page", "download the file itself"),
}
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_HDF5_FILTERS = {1, 2, 3, 32000}  # deflate, shuffle, fletcher32, lzf: others would be loaded as plug-ins
_MAX_NAME = 1024  # characters of a tensor's name


class Budget:
    """The memory in bytes that reading a file may still take."""

    def __init__(self, path: str | os.PathLike):
        self.origin = str(path)
        self.left = MULTIPLE * os.stat(path).st_size + ALLOWANCE

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise UserError(
                f"{self.origin} is refused: its content would take more than {MULTIPLE} times its size (and "
                f"{ALLOWANCE >> 20} MB); no file of weights does, get it from a source you trust"
            )


@contextlib.contextmanager
def one_line(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Turns any error in the block into a UserError that names the file and its expected format."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory; use a machine that has more") from None
    except Exception as e:
        # For a hostile or damaged file a reader may raise any exception.
        reason = " ".join(str(getattr(e, "message", None) or e).split())
        if not reason or isinstance(e, (LookupError, TypeError, AttributeError)):
            reason = f"{type(e).__name__} {reason}".strip()
        raise UserError(f"{path} cannot be read as {what} ({reason[:160]}); copy it again") from None


# ------------------------------------------------------------------------------------------------------ recognition
def refuse_url(path: str | os.PathLike) -> None:
    """Raises UserError if `path`, which names weights, is a URL."""
    text = re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+):/+", r"\1://", os.fspath(path))  # Path() leaves one slash
    if "://" in text and not os.path.exists(path):
        raise UserError(
            f"{text} is a URL, and weights are not fetched: download the file (curl -LO {text}) and give its path; "
            "docs/WEIGHTS.md lists public weights"
        )


def check_regular(path: str | os.PathLike) -> None:
    """Raises UserError unless `path` is a file with content; opening a pipe or a device would wait or never end."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path} is a folder; name the file of weights")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no regular file (a pipe or device); name the file of weights")
    if status.st_size == 0:
        raise UserError(f"{path} is empty; copy it again")


def file_kind(path: str | os.PathLike) -> str:
    """One of "npz", "torch" (a zip archive of torch.save), "hdf5", "pickle" (a plain one or PyTorch's older stream) and
    "unknown" (which may be a pickle of protocol 0, as text).

    The content decides; the suffix is used only if the content is not recognised. UserError for formats that are not
    read here, for damaged downloads, and if it is not a regular file.
    """
    path = Path(path)
    check_regular(path)
    try:
        with open(path, "rb") as f:
            head = f.read(512)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    if head.startswith(_HDF5_MAGIC):
        return "hdf5"
    if head.startswith(b"\x80") and head[1:2] <= b"\x05":
        return "pickle"
    foreign = _foreign_content(head, path.stat().st_size)
    if foreign is None and zipfile.is_zipfile(path):
        with open_archive(path, Budget(path)) as archive:
            names = archive.namelist()
        if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
            return "torch"
        if "model.weights.h5" not in names:
            return "npz"
        foreign = _FOREIGN[".keras"]
    foreign = foreign or _FOREIGN.get(path.suffix.lower())
    if foreign:
        raise UserError(f"{path} is {foreign[0]}, which is not read here: {foreign[1]}")
    return "unknown"


def _foreign_content(head: bytes, size: int) -> tuple[str, str] | None:
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the file that was to be downloaded", "download it again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself", "run `git lfs pull` where it comes from"
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8:
        return _FOREIGN[".safetensors"]
    # ONNX: field 1 (version) then 2 (producer) of a protocol buffer.
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b"\x3a", b"\x42"):
        return _FOREIGN[".onnx"]
    if head[4:8] == b"TFL3":
        return _FOREIGN[".tflite"]
    if head[:4] == b"GGUF":
        return _FOREIGN[".gguf"]
    if head[257:262] == b"ustar":
        return _FOREIGN[".tar"]
    if head.startswith((b"\x1f\x8b", b"\xfd7zXZ\x00", b"BZh", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")):
        return _FOREIGN[".gz"]
    return None


def is_number_type(dtype: np.dtype) -> bool:
    """Whether arrays of the type can be weights: booleans, integers, floats (bfloat16 too)."""
    return dtype.kind in "biuf" or dtype.name == "bfloat16"


def check_tensor_name(name: str, origin: str | os.PathLike) -> str:
    if not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
        raise UserError(f"{origin}: the tensor name {name[:40]!r} is not a valid variable name; copy the file again")
    return name


# ----------------------------------------------------------------------------------------------------- zip and .npz
@contextlib.contextmanager
def open_archive(path: Path, budget: Budget) -> Iterator[zipfile.ZipFile]:
    """Opens the zip archive and checks that its entries do not overlap and are stored or deflated."""
    with one_line(path, "a zip archive"):
        # zipfile makes an object for each entry, which takes only 46 bytes and a name in the file.
        budget.spend(16 * _directory_size(path))
    with one_line(path, "a zip archive"), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(e.compress_size for e in entries) > path.stat().st_size:
            raise UserError(f"{path} is refused: its entries overlap, or are cut off; copy it again")
        if len({e.filename for e in entries}) < len(entries):
            raise UserError(f"{path} is refused: it holds an entry twice; save it again")
        odd = next((e for e in entries if e.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)), None)
        if odd or any(e.flag_bits & 1 for e in entries):
            raise UserError(f"{path} is refused: its entries are encrypted or packed in an unusual way; save it again")
        yield archive


def _directory_size(path: Path) -> int:
    """Size in bytes of the archive's list of entries; the largest size that zipfile may read."""
    with open(path, "rb") as f:
        f.seek(max(0, os.stat(path).st_size - (1 << 17)))
        tail = f.read()
    sizes = [0]
    for at in {len(tail) - 22, tail.rfind(b"PK\x05\x06")}:
        if at >= 0 and len(tail) >= at + 22:
            sizes.append(struct.unpack_from("<L", tail, at + 12)[0])
        long = tail.rfind(b"PK\x06\x06", 0, max(at, 0))
        if long >= 0 and len(tail) >= long + 56:
            sizes.append(struct.unpack_from("<Q", tail, long + 40)[0])
    # A size larger than the file is refused by zipfile.
    return max(size for size in sizes if size <= os.stat(path).st_size)


def read_entry(archive: zipfile.ZipFile, name: str, budget: Budget) -> bytes:
    """The content of one entry, charged to the budget before it is read; zipfile stops at the declared size and checks
    the CRC."""
    budget.spend(archive.getinfo(name).file_size)
    return archive.read(name)


def read_npz(
    path: Path, wanted: Callable[[str], bool] = lambda name: True, text: str = ""
) -> tuple[dict[str, np.ndarray], str | None]:
    """({name: array} of the wanted arrays, the text stored under the name `text`) of an .npz file."""
    budget = Budget(path)
    arrays: dict[str, np.ndarray] = {}
    stored = None
    with open_archive(path, budget) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if text and name == text:
                with one_line(f"{path}: {name}", "an array"):
                    stored = str(_read_npy(archive, entry, budget, f"{path}: {name}", is_text=True))
            elif wanted(check_tensor_name(name, path)):
                with one_line(f"{path}: {name}", "an array"):
                    arrays[name] = _read_npy(archive, entry, budget, f"{path}: {name}")
    return arrays, stored


def _read_npy(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, budget: Budget, origin: str, is_text: bool = False
) -> np.ndarray:
    with archive.open(entry) as f:
        shape, fortran, dtype = _npy_header(f)
        good = (dtype.kind == "U" and shape == ()) if is_text else is_number_type(dtype)
        if not good:
            raise UserError(f"{origin} is of type {dtype.name}, not {'text' if is_text else 'numbers'}; save it again")
        size = math.prod(shape) * dtype.itemsize
        if not 0 <= size <= entry.file_size:
            raise UserError(f"{origin} declares {size} bytes and has {entry.file_size}; copy the file again")
        budget.spend(size)
        flat = np.empty(math.prod(shape), dtype)
        left = memoryview(flat.view(np.uint8) if size else np.empty(0, np.uint8))
        while left:
            # Deflated data arrives in small pieces; larger requests would copy the data repeatedly.
            piece = f.read(min(len(left), 1 << 20))
            if not piece:
                raise UserError(f"{origin} is cut off; copy the file again")
            left[: len(piece)] = piece
            left = left[len(piece) :]
        if f.read(1):  # and the CRC is checked at the end
            raise UserError(f"{origin} is longer than its shape says; copy the file again")
    return flat.reshape(shape, order="F" if fortran else "C")


def _npy_header(f: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(f)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"unknown version {version}")
    try:
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return read(f)
    except (tokenize.TokenError, SyntaxError):
        raise ValueError("its header is damaged") from None


# -------------------------------------------------------------------------------------------------------------- HDF5
def check_hdf5(path: Path) -> None:
    """Raises UserError if reading the HDF5 file would exceed its budget or access other files."""
    _walk_hdf5(path, lambda name, item: None)


def read_hdf5(path: Path, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """{path inside the file: array} of the wanted data sets of numbers."""
    arrays: dict[str, np.ndarray] = {}

    def visit(name: str, item: Any) -> None:
        if wanted(check_tensor_name(name, path)) and is_number_type(item.dtype):
            arrays[name] = item[()]

    _walk_hdf5(path, visit)
    return {name: np.asarray(value) for name, value in arrays.items()}


def _walk_hdf5(path: Path, visit: Callable[[str, Any], None]) -> None:
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path} is an HDF5 file: pip install h5py to read it") from None
    check_regular(path)
    budget = Budget(path)

    def check(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        properties = item.id.get_create_plist()
        filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
        if item.external or item.is_virtual or not filters <= _HDF5_FILTERS:
            raise UserError(f"{path}: {name[:80]!r} is kept in other files or packed in an unusual way; save it again")
        # HDF5 unpacks whole chunks, which can be larger than the data set.
        chunk = math.prod(item.chunks or ()) * item.dtype.itemsize
        budget.spend(max(item.id.get_space().get_simple_extent_npoints() * item.dtype.itemsize, chunk))
        visit(name, item)

    with one_line(path, "HDF5"), h5py.File(path, "r") as f:
        f.visititems(check)


# ------------------------------------------------------------------------------------------- TensorFlow's checkpoints
@dataclass(frozen=True)
class TensorEntry:
    """A tensor's entry in the index of a TensorFlow checkpoint. `dtype` is TensorFlow's type number."""

    dtype: int
    shape: tuple[int, ...]
    size: int  # bytes


_TABLE_MAGIC = 0xDB4775248B80FB57
_MAX_SHARDS = 1000


def read_tensor_index(prefix: str) -> dict[str, TensorEntry]:
    """{name: entry} of the checkpoint `prefix`, every entry of which lies inside its data files.

    TensorFlow does not check an index: it aborts the process for an impossible shape and allocates memory for any
    other. The index is a sorted table of LevelDB's format, its values are protocol buffers.
    """
    # Not at the top of the file: the other formats do not need TensorFlow.
    from utils.tf_v1 import tensor_bundle_pb2

    index = Path(f"{prefix}.index")
    check_regular(index)
    entries: dict[str, TensorEntry] = {}
    with one_line(index, "the index of a checkpoint"):
        budget = Budget(index)
        table = _read_table(index.read_bytes(), budget)
        key, value = next(table, (None, b""))
        if key != b"":
            raise ValueError("no header")
        header = tensor_bundle_pb2.BundleHeaderProto.FromString(value)
        if not 0 <= header.num_shards <= _MAX_SHARDS or header.endianness != header.LITTLE:
            raise ValueError("unknown kind of checkpoint")
        shards = []
        for k in range(header.num_shards):
            shard = f"{prefix}.data-{k:05d}-of-{header.num_shards:05d}"
            # A checkpoint without tensors has an empty one.
            if not os.path.isfile(shard):
                raise UserError(f"{shard} is missing, a part of the checkpoint; copy it there")
            shards.append(os.path.getsize(shard))
        total = 0
        for key, value in table:
            budget.spend(512)  # memory of an entry in this program
            name = check_tensor_name(key.decode(), index)
            entry = tensor_bundle_pb2.BundleEntryProto.FromString(value)
            shape = tuple(d.size for d in entry.shape.dim)
            if entry.slices:
                raise UserError(f"{index}: {name} is stored in slices; save it as one variable")
            if entry.shape.unknown_rank or len(shape) > 32 or min(shape, default=0) < 0 or math.prod(shape) >= 1 << 62:
                raise UserError(f"{index}: {name} has the impossible shape {list(shape)[:8]}; copy the file again")
            within = 0 <= entry.shard_id < len(shards) and min(entry.offset, entry.size) >= 0
            if not within or entry.offset + entry.size > shards[entry.shard_id]:
                raise UserError(f"{index}: {name} lies outside the data file; copy both files again")
            total += entry.size
            entries[name] = TensorEntry(entry.dtype, shape, entry.size)
        if total > sum(shards):
            raise UserError(f"{index} is refused: its tensors overlap; copy the checkpoint again")
    return entries


def _read_table(content: bytes, budget: Budget) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of a LevelDB table, in ascending order of keys."""
    if len(content) < 48 or struct.unpack("<Q", content[-8:])[0] != _TABLE_MAGIC:
        raise ValueError("it is cut off or damaged")
    # Two handles (offset and size of a block): of one that is not used, and of the one that lists the blocks.
    numbers, at = [], 0
    for _ in range(4):
        number, at = _varint(content[-48:-8], at)
        numbers.append(number)
    last = None
    for _key, handle in _read_block(content, numbers[2], numbers[3], budget):
        start, at = _varint(handle, 0)
        size, _at = _varint(handle, at)
        for key, value in _read_block(content, start, size, budget):
            if last is not None and key <= last:
                raise ValueError("its entries are not in order")
            last = key
            yield key, value


def _read_block(content: bytes, offset: int, size: int, budget: Budget) -> Iterator[tuple[bytes, bytes]]:
    if offset + size + 5 > len(content) or size < 4:
        raise ValueError("a block lies outside the file")
    if content[offset + size] != 0:
        raise ValueError("a packed block")
    budget.spend(size)
    block = content[offset : offset + size]
    end = size - 4 - 4 * struct.unpack("<I", block[-4:])[0]
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        fresh, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + fresh + length > end or shared + fresh > 4 * _MAX_NAME:
            raise ValueError("a damaged entry")
        key = key[:shared] + block[at : at + fresh]
        at += fresh
        yield key, block[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, position behind it)."""
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a damaged number")
