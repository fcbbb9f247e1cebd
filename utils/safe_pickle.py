"""Reads pickles and PyTorch files (.pkl, .pth: zip, or the older stream) without running any code they contain.

A pickle is a program: it may call whatever it can import. Here it can import a fixed list of names, each of which is
bound to a function of this file or to a built-in container, so NumPy's and PyTorch's own unpickling code never sees
the file. Arrays, dtypes and tensors are rebuilt from their recorded bytes after the program has ended.
"""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from common import UserError

__all__ = ["read_pickle", "is_torch_zip"]

# The first object of PyTorch's stream format (before version 1.6), and the version this reader knows.
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_PROTOCOL = 1001

_PLAIN = {"set", "frozenset", "list", "dict", "tuple", "int", "float", "complex", "bool", "str", "bytes",
          "bytearray"}  # fmt: skip
_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "c8", "c16"}
_TORCH_DTYPES = {
    "float16": "<f2", "half": "<f2", "bfloat16": "bfloat16", "float32": "<f4", "float": "<f4", "float64": "<f8",
    "double": "<f8", "uint8": "u1", "int8": "i1", "int16": "<i2", "short": "<i2", "int32": "<i4", "int": "<i4",
    "int64": "<i8", "long": "<i8", "bool": "b1", "complex64": "<c8", "complex128": "<c16",
}  # fmt: skip
_TORCH_STORAGES = {
    "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "FloatStorage": "float32", "DoubleStorage": "float64",
    "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32",
    "LongStorage": "int64", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip


def read_pickle(path: str | os.PathLike) -> Any:
    """The object stored in a pickle or PyTorch file, of plain containers, numbers, strings and NumPy arrays.

    Tensors become contiguous arrays of their type (bfloat16 becomes float32). Python 2 strings are read as latin-1.
    A file that refers to anything else is refused with a UserError that names it; nothing of it has run then.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f:
            if is_torch_zip(path):
                return _read_zip(path)
            return _read_stream(f, str(path))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    except Exception as e:
        # A hostile or damaged program can make the unpickler fail in any way.
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise UserError(f"{path} is not a readable pickle or PyTorch file ({reason[:160]}); copy it again") from None


def is_torch_zip(path: str | os.PathLike) -> bool:
    """Whether `path` is a zip archive as torch.save writes it (an .npz is a zip archive too, without data.pkl)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/data.pkl") or name == "data.pkl" for name in archive.namelist())


# ------------------------------------------------------------------------------------------------------- containers
def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        program = next(n for n in sorted(names) if n.endswith("/data.pkl") or n == "data.pkl")
        root = program[: -len("data.pkl")]
        if f"{root}constants.pkl" in names:
            raise UserError(f"{path} is a TorchScript program, not weights: save its state_dict() and convert that")
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else "little"
        if order not in ("little", "big"):
            raise UserError(f"{path}: unknown byte order {order!r}")

        def storage_of(key: str, dtype: str, numel: int) -> _Storage:
            name = f"{root}data/{key}"
            if name not in names:
                raise UserError(f"{path}: the storage {name} is missing; copy the file again")
            return _Storage(dtype, numel, archive.read(name), order)

        reader = _Reader(io.BytesIO(archive.read(program)), str(path), storage_of)
        return _resolve(reader.load(), {})


def _read_stream(f: IO[bytes], origin: str) -> Any:
    """A plain pickle, or PyTorch's stream: magic, protocol, machine facts, object, storage keys, raw storages."""
    first = _Reader(f, origin, None).load()
    if not (isinstance(first, int) and first == _STREAM_MAGIC):
        return _resolve(first, {})
    protocol = _Reader(f, origin, None).load()
    machine = _Reader(f, origin, None).load()
    if protocol != _STREAM_PROTOCOL or not isinstance(machine, dict):
        raise UserError(
            f"{origin}: unknown version {protocol!r} of PyTorch's format; save it again with PyTorch >= 1.6"
        )
    order = "little" if machine.get("little_endian", True) else "big"
    storages: dict[str, _Storage] = {}

    def storage_of(key: str, dtype: str, numel: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, numel, None, order))

    content = _Reader(f, origin, storage_of).load()
    for key in _Reader(f, origin, None).load():
        storage = storages[key]
        (numel,) = struct.unpack("<q" if order == "little" else ">q", f.read(8))
        if numel != storage.numel:
            raise UserError(f"{origin}: storage {key} has {numel} values, {storage.numel} expected; copy it again")
        storage.raw = f.read(numel * storage.itemsize)
    return _resolve(content, {})


# ------------------------------------------------------------------------------------------------------- the program
class _Reader(pickle.Unpickler):
    """Runs a pickle program in which every importable name is one of `_importable`.

    The names are bound to functions made for this one reader: what a program might set as their attributes is gone
    with it, and none of them is a class whose attributes could be changed.
    """

    def __init__(self, file: IO[bytes], origin: str, storage_of: Callable[[str, str, int], "_Storage"] | None):
        super().__init__(file, encoding="latin1")
        self._origin = origin
        self._storage_of = storage_of
        self._names = _importable(origin)

    def find_class(self, module: str, name: str) -> Any:
        found = self._names.get((_MODULE_ALIASES.get(module, module), name))
        if found is None:
            raise UserError(
                f"{self._origin} is refused: it asks for {module}.{name}, which has no place in a file of weights. "
                "Nothing of it was executed; get the weights from a source you trust, as a plain state_dict"
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self._storage_of is None:
            raise UserError(f"{self._origin} refers to tensors outside itself; save it again with torch.save")
        kind, storage_type, key, _location, numel, *view = pid
        if kind != "storage" or not isinstance(storage_type, _TorchType):
            raise UserError(f"{self._origin}: unknown kind of stored object {kind!r}")
        storage = self._storage_of(str(key), storage_type.name, int(numel))
        if view and view[0] is not None:
            _view_key, offset, size = view[0]
            return _StorageView(storage, int(offset), int(size))
        return storage


_MODULE_ALIASES = {
    "__builtin__": "builtins", "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
}  # fmt: skip


def _importable(origin: str) -> dict[tuple[str, str], Any]:
    """(module, name) -> what a program gets when it imports it."""

    def reconstruct(_subtype, _shape, _typecode):
        return _Array(origin)

    def from_buffer(buffer, dtype, shape, order):
        array = _Array(origin)
        array.__setstate__((1, shape, dtype, order == "F", buffer))
        return array

    def scalar(dtype, raw=None):
        array = _Array(origin)
        array.__setstate__((1, (), dtype, False, raw))
        array.is_scalar = True
        return array

    def make_dtype(name, _align=False, _copy=False):
        return _DType(name, origin)

    def encode(text, codec="latin1"):
        if codec not in ("latin1", "latin-1"):
            raise UserError(f"{origin}: unexpected text codec {codec!r}")
        return text.encode("latin1")

    def rebuild_tensor(storage, offset, size, stride, *_flags):
        return _Tensor(storage, offset, size, stride, None, origin)

    def rebuild_tensor_of_type(storage, offset, size, stride, _grad, _hooks, dtype, *_metadata):
        return _Tensor(storage, offset, size, stride, dtype, origin)

    def rebuild_parameter(data, *_flags):
        return data

    def rebuild_from_type(rebuild, _type, arguments, _state):
        return rebuild(*arguments)

    def storage_from_bytes(raw):
        return _read_stream(io.BytesIO(raw), origin)

    def nothing(*_args):
        return None

    def counter(counts=(), /):
        return dict(counts)

    def default_dict(_factory=None, /, *rest):
        return dict(*rest)

    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "Counter"): counter,
        ("collections", "defaultdict"): default_dict,
        ("_codecs", "encode"): encode,
        ("numpy", "ndarray"): nothing,
        ("numpy", "dtype"): make_dtype,
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy.core.multiarray", "scalar"): scalar,
        ("numpy.core.numeric", "_frombuffer"): from_buffer,
        ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v3"): rebuild_tensor_of_type,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): rebuild_from_type,
        ("torch.storage", "_load_from_bytes"): storage_from_bytes,
        ("torch", "Tensor"): nothing,
        ("torch.nn.parameter", "Parameter"): nothing,
        ("torch", "Size"): tuple,
        ("torch", "device"): lambda *description: ":".join(map(str, description)),
        ("torch.storage", "UntypedStorage"): _TorchType("uint8"),
    }
    builtin = vars(__builtins__) if not isinstance(__builtins__, dict) else __builtins__
    names.update({("builtins", name): builtin[name] for name in _PLAIN})
    names.update({("torch", name): _TorchType(dtype) for name, dtype in _TORCH_STORAGES.items()})
    names.update({("torch", name): _TorchType(name) for name in _TORCH_DTYPES})
    return names


class _TorchType:
    """Stands for torch.float32 and the like, or for a typed storage class."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class _DType:
    """A NumPy type as recorded: a type name, then by __setstate__ its byte order."""

    def __init__(self, name: Any, origin: str):
        name = str(name)
        order, name = (name[0], name[1:]) if name[:1] in "<>|=" else ("=", name)
        text_like = name[:1] in ("S", "U") and name[1:].isdigit() and int(name[1:]) < 1 << 16
        if name not in _DTYPES and not text_like:
            raise UserError(f"{origin}: arrays of type {name!r} have no place in a file of weights")
        self._name, self._order, self._origin = name, order, origin

    def __setstate__(self, state: tuple) -> None:
        order, names = state[1], state[3]
        if order not in ("<", ">", "|", "=") or names is not None:
            raise UserError(f"{self._origin}: structured array types have no place in a file of weights")
        self._order = order

    def numpy(self) -> np.dtype:
        return np.dtype(self._order + self._name)


class _Array:
    """An array as recorded: shape, type, order and bytes."""

    is_scalar = False

    def __init__(self, origin: str):
        self._origin = origin
        self._content: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, fortran, raw = state
        if isinstance(raw, str):
            raw = raw.encode("latin1")
        if not isinstance(dtype, _DType) or not isinstance(raw, (bytes, bytearray, memoryview, pickle.PickleBuffer)):
            raise UserError(f"{self._origin}: arrays of Python objects have no place in a file of weights")
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        flat = np.frombuffer(raw, dtype.numpy())
        self._content = flat.reshape(shape, order="F" if fortran else "C").copy()

    def content(self) -> Any:
        if self._content is None:
            raise UserError(f"{self._origin}: an array without content; copy the file again")
        native = self._content.astype(self._content.dtype.newbyteorder("="), copy=False)
        return native[()] if self.is_scalar else native


class _Storage:
    """A flat run of `numel` values of a PyTorch type; `raw` may be filled in after the program has run."""

    def __init__(self, dtype: str, numel: int, raw: bytes | None, order: str):
        self.dtype, self.numel, self.raw, self.order = dtype, numel, raw, order
        self.itemsize = 2 if dtype == "bfloat16" else np.dtype(_TORCH_DTYPES[dtype]).itemsize

    def values(self, dtype: str | None = None) -> np.ndarray:
        dtype = dtype or self.dtype
        if self.raw is None or len(self.raw) < self.numel * self.itemsize:
            raise UserError("a tensor's data is cut off; copy the file again")
        raw = memoryview(self.raw)[: self.numel * self.itemsize]
        mark = "<" if self.order == "little" else ">"
        if dtype == "bfloat16":
            # The upper half of a float32.
            upper = np.frombuffer(raw, mark + "u2").astype(np.uint32)
            return (upper << 16).view(np.float32)
        kind = np.dtype(_TORCH_DTYPES[dtype]).newbyteorder(mark)
        return np.frombuffer(raw, kind).astype(kind.newbyteorder("="), copy=False)


class _StorageView:
    """`size` values of a storage from `offset` on."""

    def __init__(self, storage: _Storage, offset: int, size: int):
        self.storage, self.offset, self.size = storage, offset, size

    def values(self, dtype: str | None = None) -> np.ndarray:
        if self.offset < 0 or self.size < 0:
            raise UserError("a storage view outside its storage; copy the file again")
        return self.storage.values(dtype)[self.offset : self.offset + self.size]


class _Tensor:
    """A strided view of a storage, resolved once the storage's bytes are there."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any, origin: str):
        self._parts = storage, offset, size, stride, dtype
        self._origin = origin

    def content(self) -> np.ndarray:
        storage, offset, size, stride, dtype = self._parts
        values = storage if isinstance(storage, np.ndarray) else storage.values(dtype.name if dtype else None)
        size, stride, offset = tuple(map(int, size)), tuple(map(int, stride)), int(offset)
        count = int(np.prod(size, dtype=object))
        if count == 0:
            return np.zeros(size, values.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        # Each value is used at most once: a tensor repeated by zero strides could claim any amount of memory.
        inside = len(size) == len(stride) and min((offset, *size, *stride)) >= 0 and last < values.size
        if not inside or count > values.size:
            raise UserError(f"{self._origin}: a tensor of shape {list(size)} exceeds its storage; copy the file again")
        steps = tuple(s * values.itemsize for s in stride)
        return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False).copy()


def _resolve(content: Any, done: dict[int, Any]) -> Any:
    """The content with every recorded array and tensor rebuilt; shared and cyclic containers keep their identity."""
    if id(content) in done:
        return done[id(content)][1]
    result: Any = content
    if isinstance(content, (_Array, _Tensor)):
        result = content.content()
    elif isinstance(content, (_Storage, _StorageView)):
        result = content.values()
    elif isinstance(content, (_DType, _TorchType)):
        result = str(content.numpy()) if isinstance(content, _DType) else content.name
    elif isinstance(content, dict):
        result = type(content)()
        done[id(content)] = (content, result)
        for key, value in content.items():
            result[_resolve(key, done)] = _resolve(value, done)
    elif isinstance(content, list):
        result = []
        done[id(content)] = (content, result)
        result.extend(_resolve(value, done) for value in content)
    elif isinstance(content, tuple):
        result = tuple(_resolve(value, done) for value in content)
    elif callable(content):
        result = None
    # The content is kept with its result, so that its id stays taken.
    done[id(content)] = (content, result)
    return result
