"""Weights come out of pickles and PyTorch files bit by bit, and hostile ones run nothing (utils/safe_pickle.py)."""

import os
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
from torch_files import Tensor, save_pickled_tensors, save_stream, save_zip, tensors

from common import UserError
from utils.safe_pickle import read_pickle
from utils.weight_files import file_kind

pytestmark = pytest.mark.quick
GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).resolve().parent.parent / "../shared/golden"))


def dumped(tmp_path, content, protocol=2):
    path = tmp_path / "content.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_containers_of_every_protocol(tmp_path, protocol):
    rng = np.random.default_rng(0)
    content = {
        "f32": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "fortran": np.asfortranarray(rng.standard_normal((3, 5))),
        "big endian": np.arange(4, dtype=">f4"),
        "strided": np.arange(24, dtype=np.int16).reshape(4, 6)[::2, ::3],
        "empty": np.zeros((0, 4), np.float32),
        "zero-d": np.array(2.5),
        "scalar": np.float32(1.5),
        "bool": np.array([True, False]),
        "text": np.array(["ab", "c"]),
        "half": np.arange(3, dtype=np.float16),
        "plain": [1, 2.5, None, "text", b"bytes", b"", bytearray(b"x"), {3}, frozenset([4]), (5, (6,)), True, 1j],
        "ordered": OrderedDict(a=1, b=np.ones(2)),
        "counter": Counter("aab"),
        "default": defaultdict(list, x=[1]),
    }
    got = read_pickle(dumped(tmp_path, content, protocol))
    assert list(got) == list(content)
    for key, want in content.items():
        if isinstance(want, (np.ndarray, np.generic)):
            np.testing.assert_array_equal(got[key], want)
            assert got[key].dtype == want.dtype.newbyteorder("=") and type(got[key]) is type(want)
    assert got["plain"] == content["plain"]
    assert list(got["ordered"]) == ["a", "b"] and isinstance(got["ordered"], OrderedDict)
    assert got["counter"] == {"a": 2, "b": 1} and got["default"] == {"x": [1]}


def test_python2_pickle_of_arrays(tmp_path):
    # protocol 2 as Python 2 wrote it: byte strings, and the array's bytes as a str
    program = (
        b"\x80\x02}U\x06conv_wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x08\x00\x00\x80?\x00\x00\x00\xc0tbs."
    )
    (tmp_path / "a.pkl").write_bytes(program)
    got = read_pickle(tmp_path / "a.pkl")
    assert got["conv_w"].tolist() == [1.0, -2.0] and got["conv_w"].dtype == np.float32


def test_shared_and_cyclic_containers_keep_their_identity(tmp_path):
    inner = [np.ones(2)]
    content = {"a": inner, "b": inner}
    content["self"] = content
    got = read_pickle(dumped(tmp_path, content))
    assert got["a"] is got["b"] and got["self"] is got


@pytest.mark.parametrize("save", [save_zip, save_stream, save_pickled_tensors])
def test_tensors_of_every_type_and_stride(tmp_path, save):
    rng = np.random.default_rng(1)
    base = rng.standard_normal(60).astype(np.float32)
    halves = rng.standard_normal((3, 2)).astype(np.float16)
    state = {
        "weight": Tensor(base.reshape(3, 4, 5)),
        "transposed": Tensor(np.empty((4, 3)), "<f4", base, (1, 4), 2),
        "same storage": Tensor(np.empty(7), "<f4", base, (8,), 3),
        "half": Tensor(halves),
        "bfloat16": Tensor(np.empty(4), "bfloat16", np.array([1.0, -2.5, 3e38, 0.0], np.float32)),
        "double": Tensor(np.array([1.0, 2.0])),
        "count": Tensor(np.array(7, np.int64)),
        "flags": Tensor(np.array([True, False])),
        "none": Tensor(np.zeros((0, 3), np.float32)),
    }
    path = tmp_path / "state.pth"
    save(path, {"model": OrderedDict(state), "iteration": 90000, "lr": 0.1})
    got = read_pickle(path)
    model = got["model"]
    assert got["iteration"] == 90000 and got["lr"] == 0.1
    np.testing.assert_array_equal(model["weight"], base.reshape(3, 4, 5))
    np.testing.assert_array_equal(model["transposed"], base[2:14].reshape(3, 4).T)
    np.testing.assert_array_equal(model["same storage"], base[3:52:8])
    np.testing.assert_array_equal(model["half"], halves)
    np.testing.assert_allclose(model["bfloat16"], [1.0, -2.5, 3e38, 0.0], rtol=2**-7)
    assert model["count"] == 7 and model["count"].dtype == np.int64 and model["count"].shape == ()
    assert model["flags"].tolist() == [True, False] and model["double"].dtype == np.float64
    assert model["none"].shape == (0, 3)
    assert all(array.flags.c_contiguous for array in model.values())


def test_only_torch_zips_are_taken_for_them(tmp_path):
    save_zip(tmp_path / "a.pth", tensors({"w": np.ones(3, np.float32)}))
    np.savez(tmp_path / "b.npz", w=np.ones(3))
    assert file_kind(tmp_path / "a.pth") == "torch" and file_kind(tmp_path / "b.npz") == "npz"


class Calls:
    """Pickles into a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_programs(witness):
    command = f"touch {witness}"
    return {
        "os.system": Calls(os.system, command),
        "eval": Calls(eval, f"open({str(witness)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(witness)!r}, 'w')"),
        "getattr": Calls(getattr, [], "append"),
        "import": Calls(__import__, "os"),
        "open": Calls(open, str(witness), "w"),
        "partial": Calls(__import__("functools").partial, os.system, command),
        "map": Calls(map, os.system, [command]),
        "numpy load": Calls(np.load, "x.npz"),
        "runstring": Calls(__import__("subprocess").getoutput, command),
        "object array": np.array([Calls(os.system, command)], dtype=object),
        "path": Path("/etc/passwd"),
    }


@pytest.mark.parametrize("which", list(hostile_programs("")))
@pytest.mark.parametrize("container", ["pickle", "zip", "stream"])
def test_hostile_programs_are_refused_and_execute_nothing(tmp_path, which, container):
    witness = tmp_path / "executed"
    content = {"model": {"weight": np.ones(3)}, "extra": hostile_programs(witness)[which]}
    path = tmp_path / "model.pth"
    if container == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif container == "zip":
        save_zip(path, content)
    else:
        save_stream(path, content)
    with pytest.raises(UserError, match="is refused: it asks for|no place in a file of weights") as e:
        read_pickle(path)
    assert not witness.exists()
    assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch WITNESS'\ntR.",
        b"(S'touch WITNESS'\nios\nsystem\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x0cstr.__class__\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x13ndarray.__setstate__\x93.",
        b"\x80\x02ccopy_reg\n_reconstructor\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02cnumpy\ndtype\nU\x01O\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03)tR.",
        b"\x80\x02X\x01\x00\x00\x00aQ.",
        b"\x80\x02",
        b"garbage",
        b"",
    ],
)
def test_handwritten_programs_never_get_through(tmp_path, program):
    witness = tmp_path / "executed"
    path = tmp_path / "a.pkl"
    path.write_bytes(program.replace(b"WITNESS", str(witness).encode()))
    with pytest.raises(UserError, match=r"a\.pkl") as e:
        read_pickle(path)
    assert not witness.exists() and "\n" not in str(e.value)


def test_attributes_set_by_a_program_do_not_outlive_it(tmp_path):
    # BUILD with a (None, slots) state sets attributes of whatever is on the stack, here of an importable function.
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x0c__defaults__K\x01\x85s\x86b.")
    for _ in range(2):
        read_pickle(path)
    save_zip(tmp_path / "b.pth", tensors({"w": np.arange(3.0)}))
    assert read_pickle(tmp_path / "b.pth")["w"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "shape, strides, offset",
    [((10,), (1,), 1), ((2, 6), (5, 1), 0), ((1000000,), (0,), 0), ((3,), (-1,), 5), ((3,), (1,), -1)],
)
def test_tensors_that_reach_outside_their_storage_are_refused(tmp_path, shape, strides, offset):
    bad = Tensor(np.empty(1), "<f4", np.zeros(10, np.float32), strides, offset)
    bad.shape = shape
    save_zip(tmp_path / "a.pth", {"w": bad})
    with pytest.raises(UserError, match="exceeds its storage|an impossible shape"):
        read_pickle(tmp_path / "a.pth")


@pytest.mark.parametrize("save", [save_zip, save_stream])
def test_truncated_files_are_refused(tmp_path, save):
    save(tmp_path / "a.pth", tensors({"w": np.ones(4000, np.float32)}))
    whole = (tmp_path / "a.pth").read_bytes()
    for part in (0.1, 0.5, 0.99):
        (tmp_path / "b.pth").write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(UserError, match=r"b\.pth|cut off"):
            read_pickle(tmp_path / "b.pth")


def test_torchscript_and_missing_files_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}))
        archive.writestr("m/constants.pkl", pickle.dumps(()))
    with pytest.raises(UserError, match="TorchScript"):
        read_pickle(tmp_path / "script.pt")
    with pytest.raises(UserError, match="does not exist"):
        read_pickle(tmp_path / "nothing.pkl")


def test_big_endian_archives(tmp_path):
    save_zip(tmp_path / "a.pth", tensors({"w": np.arange(3, dtype=np.float32)}))
    with zipfile.ZipFile(tmp_path / "a.pth") as source, zipfile.ZipFile(tmp_path / "b.pth", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("byteorder"):
                content = b"big"
            elif "/data/" in name:
                content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
            target.writestr(name, content)
    assert read_pickle(tmp_path / "b.pth")["w"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.skipif(not (GOLDEN / "mask_r50_fpn.pth").exists(), reason=f"no recorded files in {GOLDEN} (set GOLDEN)")
def test_files_of_pytorch_itself_equal_the_recorded_arrays():
    with np.load(GOLDEN / "mask_r50_fpn.weights.npz") as want:
        for name in ("mask_r50_fpn.pkl", "mask_r50_fpn.pth"):
            got = read_pickle(GOLDEN / name)["model"]
            assert set(want.files) <= set(got)
            for key in want.files:
                np.testing.assert_array_equal(got[key], want[key])
                assert got[key].dtype == want[key].dtype


def test_reading_needs_no_pytorch(tmp_path, monkeypatch):
    save_zip(tmp_path / "a.pth", tensors({"w": np.ones(2, np.float32)}))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert read_pickle(tmp_path / "a.pth")["w"].tolist() == [1.0, 1.0]
