"""Reads pickles and PyTorch files (.pkl, .pth: zip, or the older stream) without running any code they contain.

A pickle is a program for a small stack machine, which can call anything that it can import. This file has its own stack
machine (opcodes as documented in Python's pickletools). It imports only a fixed list of names, each mapped to a
function of this file, builds plain containers, and charges every step to the budget of the file, so that a program of a
few bytes can neither take gigabytes nor run for hours. Arrays and tensors are rebuilt from their recorded bytes after
the program has ended.
"""

import codecs
import io
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from common import UserError
from utils.weight_files import Budget, file_kind, one_line, open_archive, read_entry

__all__ = ["read_pickle"]

# The first object of PyTorch's stream format (before version 1.6), and the version that this reader supports.
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_PROTOCOL = 1001

_STEP = 64  # bytes charged for each step of a program: the size of a small object
_MAX_INTEGER = 64  # bytes of an integer
_MAX_KEY = 16  # most members of a tuple used as a key

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

    Tensors become contiguous arrays of their type (bfloat16 becomes float32). They may share memory, so do not write to
    them. Python 2 strings are read as latin-1. A file that refers to anything else is refused with a UserError that
    names it, and nothing of it is run. Memory is limited as described in utils/weight_files.py.
    """
    path = Path(path)
    kind = file_kind(path)
    budget = Budget(path)
    if kind == "torch":
        return _read_zip(path, budget)
    if kind not in ("pickle", "unknown"):
        raise UserError(f"{path} is neither a pickle nor a PyTorch file but {kind}; give it that ending")
    with one_line(path, "a pickle or PyTorch file"), open(path, "rb") as f:
        return _read_stream(f, budget)


# ------------------------------------------------------------------------------------------------------- containers
def _read_zip(path: Path, budget: Budget) -> Any:
    with open_archive(path, budget) as archive, one_line(path, "a PyTorch file"):
        names = set(archive.namelist())
        program = next(n for n in sorted(names) if n.endswith("/data.pkl") or n == "data.pkl")
        root = program[: -len("data.pkl")]
        if f"{root}constants.pkl" in names:
            raise UserError(f"{path} is a TorchScript program, not weights: save its state_dict() and convert that")
        byte_order = read_entry(archive, f"{root}byteorder", budget) if f"{root}byteorder" in names else b"little"
        order = byte_order[:20].decode("latin1")
        if order not in ("little", "big"):
            raise UserError(f"{path}: unknown byte order {order!r}")
        storages: dict[str, _Storage] = {}

        def storage_of(key: str, dtype: str, numel: int) -> _Storage:
            if key not in storages:
                name = f"{root}data/{key}"
                if name not in names:
                    raise UserError(f"{path}: the storage {name[:80]!r} is missing; copy the file again")
                storages[key] = _Storage(dtype, numel, read_entry(archive, name, budget), order)
            return storages[key]

        content = _Program(io.BytesIO(read_entry(archive, program, budget)), budget, storage_of).run()
        return _resolve(content, budget, {})


def _read_stream(f: IO[bytes], budget: Budget) -> Any:
    """A plain pickle, or PyTorch's stream: magic, protocol, machine facts, object, storage keys, raw storages."""
    first = _Program(f, budget).run()
    if not (isinstance(first, int) and first == _STREAM_MAGIC):
        return _resolve(first, budget, {})
    origin = budget.origin
    protocol = _Program(f, budget).run()
    machine = _Program(f, budget).run()
    if protocol != _STREAM_PROTOCOL or not isinstance(machine, dict):
        raise UserError(f"{origin}: unknown version of PyTorch's format; save it again with PyTorch >= 1.6")
    order = "little" if machine.get("little_endian", True) else "big"
    storages: dict[str, _Storage] = {}

    def storage_of(key: str, dtype: str, numel: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, numel, None, order))

    content = _Program(f, budget, storage_of).run()
    for key in _Program(f, budget).run():
        storage = storages[key]
        (numel,) = struct.unpack("<q" if order == "little" else ">q", f.read(8))
        if numel != storage.numel:
            raise UserError(f"{origin}: storage {key} has {numel} values, {storage.numel} expected; copy it again")
        storage.raw = _take(f, numel * storage.itemsize, budget)
    return _resolve(content, budget, {})


def _take(f: IO[bytes], size: int, budget: Budget) -> bytes:
    """The next `size` bytes, charged to the budget before they are read."""
    if size < 0:
        raise ValueError("a negative length")
    budget.spend(size)
    data = f.read(size)
    if len(data) < size:
        raise UserError(f"{budget.origin} is cut off; copy the file again")
    return data


# ------------------------------------------------------------------------------------------------------- the program
class _Mark:
    """Marks the start of a group of items on the stack."""


class _Program:
    """Runs one pickle program read from `file`, up to its STOP.

    storage_of(key, type, number of values) returns the storage of a persistent id; None: there are no storages.
    """

    def __init__(
        self, file: IO[bytes], budget: Budget, storage_of: Callable[[str, str, int], "_Storage"] | None = None
    ):
        self.file, self.budget, self.storage_of = file, budget, storage_of
        self.origin = budget.origin
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names = _importable(budget)

    def run(self) -> Any:
        read, steps, spend = self.file.read, _STEPS, self.budget.spend
        while True:
            code = read(1)
            if code == b".":
                return self.stack.pop()
            step = steps.get(code)
            if step is None:
                raise ValueError(f"unknown instruction {code!r}" if code else "it is cut off")
            spend(_STEP)
            step(self)

    # ---------------------------------------------------------------- reading
    def take(self, size: int) -> bytes:
        return _take(self.file, size, self.budget)

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> bytes:
        """The text up to the end of the line."""
        line = self.file.readline()
        self.budget.spend(len(line))
        if not line.endswith(b"\n"):
            raise ValueError("it is cut off")
        return line[:-1]

    # ---------------------------------------------------------------- the stack
    def items(self) -> list[Any]:
        """Removes the last mark and the items above it, and returns these."""
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _Mark:
                items = self.stack[at + 1 :]
                del self.stack[at:]
                self.budget.spend(8 * len(items))
                return items
        raise ValueError("a mark is missing")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    # ---------------------------------------------------------------- containers
    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("items are added to an object that is not a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("entries are added to an object that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.budget.spend(_STEP)
            target[self.key(key)] = value

    def add_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not set:
            raise ValueError("members are added to an object that is not a set")
        self.budget.spend(_STEP * len(items))
        self.stack[-1].update(map(self.key, items))

    def key(self, value: Any) -> Any:
        return _key(value, self.budget)

    # ---------------------------------------------------------------- names and calls
    def find(self, module: str, name: str) -> Any:
        found = self.names.get((_MODULE_ALIASES.get(module, module), name))
        if found is None:
            raise UserError(
                f"{self.origin} is refused: it asks for {_shown(module)}.{_shown(name)}, which has no place in a file "
                "of weights. Nothing of it was executed; get the weights from a source you trust, as a plain state_dict"
            )
        return found

    def call(self, function: Any, arguments: Any) -> None:
        if type(function) is not _Function or type(arguments) is not tuple:
            raise ValueError("a call of an object that is not a function")
        self.push(function.body(*arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        # The state of any other object holds attributes, such as the _metadata of a state_dict, which are ignored.
        if isinstance(target, (_Array, _DType)):
            target.set_state(state)

    def persistent(self, pid: Any) -> None:
        if self.storage_of is None:
            raise UserError(f"{self.origin} refers to tensors outside itself; save it again with torch.save")
        kind, storage_type, key, _location, numel, *view = pid
        if kind != "storage" or not isinstance(storage_type, _TorchType) or type(numel) is not int or numel < 0:
            raise ValueError("an unknown kind of stored object")
        if type(key) not in (str, int):
            raise ValueError("a storage without a name")
        storage = self.storage_of(str(key), storage_type.name, numel)
        if view and view[0] is not None:
            _view_key, offset, size = view[0]
            self.push(_StorageView(storage, offset, size))
        else:
            self.push(storage)


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 80 else repr(name[:80])


def _key(value: Any, budget: Budget) -> Any:
    """`value`, if it may be a key: hashing it and comparing it with others must be cheap."""
    if type(value) in (str, bytes, float, bool, type(None)):
        return value
    # From 2^61 - 1 on, any number of integers can have the same hash.
    if type(value) is int and abs(value) < (1 << 61) - 1:
        return value
    if type(value) is tuple and len(value) <= _MAX_KEY and not any(type(v) is tuple for v in value):
        budget.spend(64 * _STEP)  # tuples with equal hashes are easy to construct, too
        return tuple(_key(v, budget) for v in value)
    raise ValueError(f"an unusual key of type {type(value).__name__}")


def _integer(data: bytes) -> int:
    if len(data) > _MAX_INTEGER:
        raise ValueError(f"an integer of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _decimal(text: bytes) -> int:
    return _integer_text(text.rstrip(b"L"))


def _integer_text(text: bytes) -> int:
    if len(text) > 2 * _MAX_INTEGER:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _quoted(text: bytes) -> str:
    """A Python 2 string as its repr."""
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise ValueError("a string without quotes")
    return codecs.escape_decode(text[1:-1])[0].decode("latin1")


def _boolean_or_integer(text: bytes) -> int | bool:
    return text == b"01" if text in (b"00", b"01") else _integer_text(text)


def _steps() -> dict[bytes, Callable[[_Program], Any]]:
    """Instruction -> its function."""

    def constant(make: Callable[[], Any]) -> Callable[[_Program], None]:
        return lambda p: p.push(make())

    def number(form: str) -> Callable[[_Program], None]:
        return lambda p: p.push(p.number(form))

    def data(form: str, make: Callable[[bytes], Any]) -> Callable[[_Program], None]:
        """Data preceded by its length."""

        def step(p: _Program) -> None:
            value = make(p.take(p.number(form)))
            if type(value) is str and not value.isascii():
                p.budget.spend(3 * len(value))  # one wide character makes a Python string store all characters wide
            p.push(value)

        return step

    def line(make: Callable[[bytes], Any]) -> Callable[[_Program], None]:
        return lambda p: p.push(make(p.line()))

    def last(count: int) -> Callable[[_Program], None]:
        """The last `count` items as a tuple."""

        def step(p: _Program) -> None:
            if len(p.stack) < count:
                raise ValueError("too few items")
            items = tuple(p.stack[len(p.stack) - count :])
            del p.stack[len(p.stack) - count :]
            p.push(items)

        return step

    def with_last(use: Callable[[_Program, list], None]) -> Callable[[_Program], None]:
        return lambda p: use(p, [p.stack.pop()])

    def with_pair(p: _Program) -> None:
        value, key = p.stack.pop(), p.stack.pop()
        p.set_items([key, value])

    def from_items(make: Callable[[list], Any]) -> Callable[[_Program], None]:
        return lambda p: p.push(make(p.items()))

    def make_dict(p: _Program) -> None:
        items = p.items()
        p.push({})
        p.set_items(items)

    def make_frozenset(p: _Program) -> None:
        items = p.items()
        p.budget.spend(_STEP * (3 + len(items)))
        p.push(frozenset(map(p.key, items)))

    def empty_set(p: _Program) -> None:
        p.budget.spend(3 * _STEP)  # size of an empty set
        p.push(set())

    def put(number_of: Callable[[_Program], int]) -> Callable[[_Program], None]:
        def step(p: _Program) -> None:
            p.memo[number_of(p)] = p.stack[-1]

        return step

    def get(number_of: Callable[[_Program], int]) -> Callable[[_Program], None]:
        return lambda p: p.push(p.memo[number_of(p)])

    def text_of(value: Any) -> str:
        if type(value) is not str:
            raise ValueError("a name that is not a text")
        return value

    def import_line(p: _Program) -> None:
        module, name = p.line().decode(), p.line().decode()
        p.push(p.find(module, name))

    def import_stack(p: _Program) -> None:
        name, module = text_of(p.stack.pop()), text_of(p.stack.pop())
        p.push(p.find(module, name))

    def call(p: _Program) -> None:
        arguments, function = p.stack.pop(), p.stack.pop()
        p.call(function, arguments)

    def call_with_names(p: _Program) -> None:
        named, arguments, function = p.stack.pop(), p.stack.pop(), p.stack.pop()
        if named != {}:
            raise ValueError("a call with named arguments")
        p.call(function, arguments)

    def call_line(p: _Program) -> None:
        function = p.find(p.line().decode(), p.line().decode())
        p.call(function, tuple(p.items()))

    def call_items(p: _Program) -> None:
        function, *arguments = p.items()
        p.call(function, tuple(arguments))

    def pop(p: _Program) -> None:
        p.stack.pop()

    def utf8(raw: bytes) -> str:
        return raw.decode("utf-8", "surrogatepass")

    def latin1(raw: bytes) -> str:
        return raw.decode("latin1")

    byte, two, four, eight = "<B", "<H", "<I", "<Q"
    return {
        b"\x80": lambda p: p.take(1), b"\x95": lambda p: p.take(8) and None,
        b"N": constant(lambda: None), b"\x88": constant(lambda: True), b"\x89": constant(lambda: False),
        b"I": line(_boolean_or_integer), b"L": line(_decimal), b"F": line(float),
        b"J": number("<i"), b"K": number(byte), b"M": number(two), b"G": number(">d"),
        b"\x8a": data(byte, _integer), b"\x8b": data("<i", _integer),
        b"S": line(_quoted), b"T": data("<i", latin1), b"U": data(byte, latin1),
        b"V": line(lambda raw: raw.decode("raw-unicode-escape")),
        b"\x8c": data(byte, utf8), b"X": data(four, utf8), b"\x8d": data(eight, utf8),
        b"C": data(byte, bytes), b"B": data(four, bytes), b"\x8e": data(eight, bytes), b"\x96": data(eight, bytearray),
        b"]": constant(list), b")": constant(tuple), b"}": constant(dict), b"\x8f": empty_set,
        b"l": from_items(list), b"t": from_items(tuple), b"d": make_dict, b"\x91": make_frozenset,
        b"\x85": last(1), b"\x86": last(2), b"\x87": last(3),
        b"a": with_last(_Program.append), b"e": lambda p: p.append(p.items()),
        b"s": with_pair, b"u": lambda p: p.set_items(p.items()), b"\x90": lambda p: p.add_items(p.items()),
        b"(": lambda p: p.push(_Mark), b"0": pop, b"1": lambda p: p.items() and None,
        b"2": lambda p: p.push(p.stack[-1]),
        b"p": put(lambda p: _integer_text(p.line())), b"q": put(lambda p: p.number(byte)),
        b"r": put(lambda p: p.number(four)), b"\x94": put(lambda p: len(p.memo)),
        b"g": get(lambda p: _integer_text(p.line())), b"h": get(lambda p: p.number(byte)),
        b"j": get(lambda p: p.number(four)),
        b"c": import_line, b"\x93": import_stack, b"i": call_line, b"o": call_items,
        b"R": call, b"\x81": call, b"\x92": call_with_names, b"b": _Program.build,
        b"P": lambda p: p.persistent(p.line().decode()), b"Q": lambda p: p.persistent(p.stack.pop()),
    }  # fmt: skip


_STEPS = _steps()

_MODULE_ALIASES = {
    "__builtin__": "builtins", "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
}  # fmt: skip


class _Function:
    """The value of an imported name: it can only be called."""

    __slots__ = ("body",)

    def __init__(self, body: Callable):
        self.body = body


def _importable(budget: Budget) -> dict[tuple[str, str], Any]:
    """(module, name) -> the value that a program gets by importing it."""
    origin = budget.origin

    def reconstruct(_subtype, _shape, _typecode):
        return _Array(budget)

    def from_buffer(buffer, dtype, shape, order):
        array = _Array(budget)
        array.set_state((1, shape, dtype, order == "F", buffer))
        return array

    def scalar(dtype, raw=None):
        array = _Array(budget)
        array.set_state((1, (), dtype, False, raw))
        array.is_scalar = True
        return array

    def make_dtype(name, _align=False, _copy=False):
        return _DType(name, origin)

    def encode(text, codec="latin1"):
        if codec not in ("latin1", "latin-1") or type(text) is not str:
            raise UserError(f"{origin}: unexpected text codec {_shown(str(codec)[:80])}")
        budget.spend(len(text))
        return text.encode("latin1")

    def rebuild_tensor(storage, offset, size, stride, *_flags):
        return _Tensor(storage, offset, size, stride, None, budget)

    def rebuild_tensor_of_type(storage, offset, size, stride, _grad, _hooks, dtype, *_metadata):
        return _Tensor(storage, offset, size, stride, dtype, budget)

    def rebuild_parameter(data, *_flags):
        return data

    def rebuild_from_type(rebuild, _type, arguments, _state):
        if type(rebuild) is not _Function or type(arguments) is not tuple:
            raise ValueError("a tensor of an unknown type")
        return rebuild.body(*arguments)

    def storage_from_bytes(raw):
        budget.spend(100 * _STEP)  # programs of their own, whatever little they do
        return _read_stream(io.BytesIO(raw), budget)

    def nothing(*_args):
        return None

    def plain(kind: type) -> Callable:
        """int(x), str(x) and the like for small values, or values that already have that type."""

        def make(*arguments):
            if len(arguments) > 1 or any(type(a) not in (str, int, float, complex, bool) for a in arguments):
                raise ValueError(f"an unusual {kind.__name__}")
            budget.spend(sum(len(a) for a in arguments if type(a) is str))
            return kind(*arguments)

        return make

    def complex_number(real=0, imaginary=0):
        if type(real) not in (int, float) or type(imaginary) not in (int, float):
            raise ValueError("an unusual complex number")
        return complex(real, imaginary)

    def raw_bytes(kind: type) -> Callable:
        def make(content=b"", codec="latin1"):
            if type(content) is str:
                content = encode(content, codec)
            if type(content) is list and all(type(v) is int for v in content):
                budget.spend(len(content))
            elif type(content) not in (bytes, bytearray):  # of a number it would be that many zeros
                raise ValueError(f"unusual {kind.__name__}")
            budget.spend(len(content))
            return kind(content)

        return make

    def container(kind: type) -> Callable:
        def make(content=()):
            if type(content) not in (list, tuple, set, frozenset):
                raise ValueError(f"an unusual {kind.__name__}")
            budget.spend(_STEP * (3 + len(content)))
            return kind(content if kind in (list, tuple) else (_key(v, budget) for v in content))

        return make

    def dictionary(kind: type) -> Callable:
        def make(content=()):
            result = kind()
            pairs = content.items() if isinstance(content, dict) else content
            if not isinstance(content, (dict, list, tuple)):
                raise ValueError("an unusual dictionary")
            for key, value in pairs:
                budget.spend(2 * _STEP)
                result[_key(key, budget)] = value
            return result

        return make

    def default_dict(_factory=None, content=()):
        return dictionary(dict)(content)

    functions: dict[tuple[str, str], Callable] = {
        ("collections", "OrderedDict"): dictionary(OrderedDict),
        ("collections", "Counter"): dictionary(dict),
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
        ("torch", "Size"): container(tuple),
        ("torch", "device"): lambda *description: ":".join(str(d)[:20] for d in description if type(d) in (str, int)),
        ("builtins", "complex"): complex_number,
        ("builtins", "dict"): dictionary(dict),
    }
    functions |= {("builtins", kind.__name__): container(kind) for kind in (set, frozenset, list, tuple)}
    functions |= {("builtins", kind.__name__): plain(kind) for kind in (int, float, bool, str)}
    functions |= {("builtins", kind.__name__): raw_bytes(kind) for kind in (bytes, bytearray)}
    names: dict[tuple[str, str], Any] = {name: _Function(body) for name, body in functions.items()}
    names[("torch.storage", "UntypedStorage")] = _TorchType("uint8")
    names.update({("torch", name): _TorchType(dtype) for name, dtype in _TORCH_STORAGES.items()})
    names.update({("torch", name): _TorchType(name) for name in _TORCH_DTYPES})
    return names


class _TorchType:
    """Represents torch.float32 and the like, or a typed storage class."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class _DType:
    """A NumPy type as recorded: a type name, then its byte order in the state."""

    def __init__(self, name: Any, origin: str):
        if type(name) is not str or len(name) > 10:
            raise UserError(f"{origin}: an array of an unknown type has no place in a file of weights")
        order, name = (name[0], name[1:]) if name[:1] in "<>|=" else ("=", name)
        text_like = name[:1] in ("S", "U") and name[1:].isdigit() and int(name[1:]) < 1 << 16
        if name not in _DTYPES and not text_like:
            raise UserError(f"{origin}: arrays of type {name!r} have no place in a file of weights")
        self._name, self._order, self._origin = name, order, origin

    def set_state(self, state: Any) -> None:
        order, names = state[1], state[3]
        if order not in ("<", ">", "|", "=") or names is not None:
            raise UserError(f"{self._origin}: structured array types have no place in a file of weights")
        self._order = order

    def numpy(self) -> np.dtype:
        return np.dtype(self._order + self._name)


class _Array:
    """An array as recorded: shape, type, order and bytes."""

    is_scalar = False

    def __init__(self, budget: Budget):
        self._budget = budget
        self._content: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        _version, shape, dtype, fortran, raw = state
        origin = self._budget.origin
        if isinstance(raw, str):
            self._budget.spend(len(raw))
            raw = raw.encode("latin1")
        if not isinstance(dtype, _DType) or type(raw) not in (bytes, bytearray):
            raise UserError(f"{origin}: arrays of Python objects have no place in a file of weights")
        flat = np.frombuffer(raw, dtype.numpy())
        self._content = flat.reshape(_sizes(shape), order="F" if fortran else "C")

    def content(self) -> Any:
        if self._content is None:
            raise UserError(f"{self._budget.origin}: an array without content; copy the file again")
        # Many arrays may share their bytes, but computing with them takes memory for each.
        self._budget.spend(self._content.nbytes)
        native = self._content.astype(self._content.dtype.newbyteorder("="), copy=False)
        return native[()] if self.is_scalar else native


def _sizes(shape: Any) -> tuple[int, ...]:
    shape = (shape,) if type(shape) is int else shape
    if type(shape) not in (tuple, list) or len(shape) > 32 or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("an impossible shape")
    return tuple(shape)


class _Storage:
    """A flat run of `numel` values of a PyTorch type; `raw` may be filled in after the program has run."""

    def __init__(self, dtype: str, numel: int, raw: bytes | None, order: str):
        self.dtype, self.numel, self.raw, self.order = dtype, numel, raw, order
        self.itemsize = 2 if dtype == "bfloat16" else np.dtype(_TORCH_DTYPES[dtype]).itemsize

    def values(self, dtype: str | None = None) -> np.ndarray:
        """All values as stored; bfloat16 as uint16 bits."""
        dtype = dtype or self.dtype
        if self.raw is None or len(self.raw) < self.numel * self.itemsize:
            raise UserError("a tensor's data is cut off; copy the file again")
        raw = memoryview(self.raw)[: self.numel * self.itemsize]
        kind = np.dtype("<u2" if dtype == "bfloat16" else _TORCH_DTYPES[dtype])
        return np.frombuffer(raw, kind.newbyteorder("<" if self.order == "little" else ">"))


class _StorageView:
    """`size` values of a storage from `offset` on."""

    def __init__(self, storage: _Storage, offset: Any, size: Any):
        self.storage, (self.offset, self.size) = storage, _sizes((offset, size))
        self.dtype = storage.dtype

    def values(self, dtype: str | None = None) -> np.ndarray:
        return self.storage.values(dtype)[self.offset : self.offset + self.size]


class _Tensor:
    """A strided view of a storage, resolved once the storage's bytes are read."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any, budget: Budget):
        self._storage, self._size, self._stride = storage, _sizes(size), _sizes(stride)
        (self._offset,) = _sizes(offset)
        self._dtype = dtype.name if isinstance(dtype, _TorchType) else None
        self._budget = budget

    def content(self) -> np.ndarray:
        storage, offset, size, stride = self._storage, self._offset, self._size, self._stride
        if isinstance(storage, np.ndarray):
            values, dtype = storage, None
        elif isinstance(storage, (_Storage, _StorageView)):
            dtype = self._dtype or storage.dtype
            values = storage.values(dtype)
        else:
            raise ValueError("a tensor without a storage")
        count = math.prod(size)
        if count == 0:
            return np.zeros(size, _native(values[:0], dtype).dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        # Each value may be used at most once: a tensor with zero strides could otherwise claim any amount of memory.
        if len(size) != len(stride) or last >= values.size or count > values.size:
            raise UserError(
                f"{self._budget.origin}: a tensor of shape {list(size)} exceeds its storage; copy the file again"
            )
        # Many tensors may share a storage, but computing with them takes memory for each.
        self._budget.spend(count * max(values.itemsize, 4 * (dtype == "bfloat16")))
        steps = tuple(s * values.itemsize for s in stride)
        view = np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)
        return np.ascontiguousarray(_native(view, dtype)).reshape(size)


def _native(values: np.ndarray, dtype: str | None) -> np.ndarray:
    """Values of a storage in this machine's byte order; bfloat16, which is the upper half of float32, becomes
    float32."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _resolve(content: Any, budget: Budget, done: dict[int, Any]) -> Any:
    """The content with every recorded array and tensor rebuilt; shared and cyclic containers keep their identity."""
    if isinstance(content, (str, bytes, int, float)) or content is None:
        return content
    if id(content) in done:
        return done[id(content)][1]
    budget.spend(3 * _STEP)
    result: Any = content
    if isinstance(content, (_Array, _Tensor)):
        result = content.content()
    elif isinstance(content, (_Storage, _StorageView)):
        result = _native(content.values(), content.dtype)
        budget.spend(result.nbytes)
    elif isinstance(content, (_DType, _TorchType)):
        result = str(content.numpy()) if isinstance(content, _DType) else content.name
    elif isinstance(content, dict):
        result = type(content)()
        done[id(content)] = (content, result)
        for key, value in content.items():
            budget.spend(_STEP)
            result[key] = _resolve(value, budget, done)
    elif isinstance(content, list):
        result = []
        done[id(content)] = (content, result)
        budget.spend(8 * len(content))
        result.extend(_resolve(value, budget, done) for value in content)
    elif isinstance(content, tuple):
        budget.spend(8 * len(content))
        result = tuple(_resolve(value, budget, done) for value in content)
    elif isinstance(content, _Function) or content is _Mark:
        result = None
    # The content is kept with its result, so that its id is not reused.
    done[id(content)] = (content, result)
    return result
