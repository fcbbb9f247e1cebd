"""Writes PyTorch's file formats without PyTorch, for the tests: the zip of torch.save, its older stream, and pickles
that hold tensors. The zip is laid out like a recorded file that PyTorch itself wrote; the stream as documented.
"""

import contextlib
import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from unittest import mock

import numpy as np

STORAGES = {"<f4": "FloatStorage", "<f2": "HalfStorage", "<f8": "DoubleStorage", "<i8": "LongStorage",
            "|u1": "ByteStorage", "|b1": "BoolStorage", "bfloat16": "BFloat16Storage"}  # fmt: skip


class Tensor:
    """An array to be written as a tensor; `strides`, `offset` and `storage` (a flat array) describe a view."""

    def __init__(self, array, kind=None, storage=None, strides=None, offset=0):
        self.kind = kind or array.dtype.str
        self.shape = array.shape
        self.storage = np.ascontiguousarray(array).reshape(-1) if storage is None else storage
        self.offset = offset
        step = np.cumprod([1, *array.shape[:0:-1]])[::-1] if array.ndim else ()
        self.strides = tuple(int(s) for s in step) if strides is None else strides

    def raw(self):
        if self.kind == "bfloat16":
            return (self.storage.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        return self.storage.tobytes()


class _Storage:
    def __init__(self, tensor):
        self.tensor = tensor


@contextlib.contextmanager
def _torch_names():
    """Modules with the names that PyTorch's pickles refer to, importable inside the block."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils", "torch.storage")}

    def add(module, name, value):
        value.__module__, value.__qualname__, value.__name__ = module, name, name
        setattr(modules[module], name, value)

    for name in STORAGES.values():
        add("torch", name, type(name, (), {}))
    add("torch._utils", "_rebuild_tensor_v2", lambda *a: None)
    add("torch.storage", "_load_from_bytes", lambda b: None)
    with mock.patch.dict(sys.modules, modules):
        yield modules


class _Pickler(pickle.Pickler):
    """`storages`: key -> tensor, filled in; None: storages become nested streams, as pickle.dump of a tensor does."""

    def __init__(self, file, modules, storages, with_views=False):
        super().__init__(file, protocol=2)
        self.modules, self.storages, self.keys, self.with_views = modules, storages, {}, with_views

    def persistent_id(self, obj):
        if self.storages is None or not isinstance(obj, _Storage):
            return None
        tensor = obj.tensor
        key = self.keys.setdefault(id(tensor.storage), str(len(self.keys)))
        self.storages[key] = tensor
        kind = getattr(self.modules["torch"], STORAGES[tensor.kind])
        pid = ("storage", kind, key, "cpu", tensor.storage.size)
        return (*pid, None) if self.with_views else pid

    def reducer_override(self, obj):
        if isinstance(obj, Tensor):
            parts = (_Storage(obj), obj.offset, obj.shape, obj.strides, False, OrderedDict())
            return self.modules["torch._utils"]._rebuild_tensor_v2, parts
        if isinstance(obj, _Storage):
            return self.modules["torch.storage"]._load_from_bytes, (_stream(obj, self.modules),)
        return NotImplemented


def _stream(content, modules):
    out = io.BytesIO()
    for header in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(header, out, protocol=2)
    storages = {}
    _Pickler(out, modules, storages, with_views=True).dump(content)
    pickle.dump(sorted(storages), out, protocol=2)
    for key in sorted(storages):
        out.write(struct.pack("<q", storages[key].storage.size) + storages[key].raw())
    return out.getvalue()


def save_zip(path, content, root="archive"):
    """As torch.save since 1.6."""
    storages, program = {}, io.BytesIO()
    with _torch_names() as modules:
        _Pickler(program, modules, storages).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", program.getvalue())
        archive.writestr(f"{root}/byteorder", "little")
        for key, tensor in storages.items():
            archive.writestr(f"{root}/data/{key}", tensor.raw())
        archive.writestr(f"{root}/version", "3\n")


def save_stream(path, content):
    """As torch.save before 1.6."""
    with _torch_names() as modules, open(path, "wb") as f:
        f.write(_stream(content, modules))


def save_pickled_tensors(path, content):
    """As pickle.dump of an object that holds tensors."""
    with _torch_names() as modules, open(path, "wb") as f:
        _Pickler(f, modules, None).dump(content)


def tensors(arrays):
    """{name: array} with the arrays as tensors, in an OrderedDict like a state_dict."""
    return OrderedDict((name, Tensor(np.asarray(value))) for name, value in arrays.items())
