"""Files of weights from anywhere are read within limits, or refused in one line (utils/weight_files.py)."""

import contextlib
import io
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torch_files import Tensor, save_zip, tensors
from weight_mutations import damaged_copies, mutated, mutated_archive, native_weights, outcome

from common import UserError
from tools.convert import convert
from utils.checkpoint import load_weights, read_description, read_meta, save_npz, stored_step
from utils.safe_pickle import read_pickle
from utils.weight_files import ALLOWANCE, MULTIPLE, check_hdf5, file_kind, read_hdf5

pytestmark = pytest.mark.quick
HERE = Path(__file__).resolve().parent
MB = 1 << 20


def refused(read, path, message=""):
    with pytest.raises(UserError, match=message) as e:
        read(path)
    assert "\n" not in str(e.value) and Path(path).name in str(e.value)
    return str(e.value)


# ------------------------------------------------------------------------------------------------- hostile pickles
def doubled(start: bytes, step: bytes, end: bytes) -> bytes:
    """60 times: an object that holds the one before it twice."""
    return b"\x80\x04" + start + b"q\x000" + step * 60 + end


HOSTILE_PROGRAMS = {
    "zeros": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "list of zeros": b"\x80\x02(" + b"cbuiltins\nbytearray\nJ\xff\xff\xff\x3f\x85R" * 50 + b"l.",
    "bytes": b"\x80\x02cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.",
    "number of a memo": b"\x80\x02]r\xff\xff\xff\xff]r\xff\xff\xff\xfea.",
    "length of a text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
    "length of bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "length of a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 34) + b"x.",
    "length of a frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "integer": b"\x80\x02\x8b" + struct.pack("<i", 4 * MB) + b"\x7f" * (4 * MB) + b".",
    "decimal": b"I" + b"9" * (4 * MB) + b"\n.",
    "sets": b"\x80\x04(" + b"\x8f" * (4 * MB) + b"t.",
    "lists": b"\x80\x04(" + b"]" * (4 * MB) + b"t.",
    "marks": b"\x80\x04" + b"(" * (4 * MB) + b".",
    "depth": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "copies of a list": b"\x80\x02(" + b"N" * 100_000 + b"lq\x000(" + b"cbuiltins\nlist\nh\x00\x85R" * 10_000 + b"l.",
    "copies of a text": b"\x80\x02X" + struct.pack("<I", MB) + b"x" * MB + b"q\x000("
    + b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" * 10_000 + b"l.",
    "text of doubled lists": doubled(b"]", b"](h\x00h\x00eq\x000", b"cbuiltins\nstr\nh\x00\x85R."),
    "key of doubled tuples": doubled(b")", b"h\x00h\x00\x86q\x000", b"}h\x00Ns."),
    "member of doubled tuples": doubled(b")", b"h\x00h\x00\x86q\x000", b"\x8f(h\x00\x90."),
    "keys of one hash": b"\x80\x02}("
    + b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(100_000)) + b"u.",
    "nested streams": b"\x80\x02(" + b"ctorch.storage\n_load_from_bytes\nC\x02N.\x85R" * 30_000 + b"l.",
    "type without end": b"\x80\x02cnumpy\ndtype\nU\x06S65535\x85R.\x80",
}  # fmt: skip


@pytest.mark.parametrize("which", list(HOSTILE_PROGRAMS))
def test_hostile_programs_take_neither_memory_nor_time(tmp_path, which):
    path = tmp_path / "model.pkl"
    path.write_bytes(HOSTILE_PROGRAMS[which])
    peak = peak_memory(convert, path)
    assert peak < MULTIPLE * path.stat().st_size + ALLOWANCE + SLACK, f"{peak / MB:.0f} MB"


SLACK = 48 * MB  # of the interpreter's own, and pages of libraries, which a fork maps anew when it needs them


def peak_memory(read, *arguments) -> int:
    """Bytes by which a process grows while it runs read(*arguments), which may end in a UserError; in 60 s of CPU."""

    def status(what: str) -> int:
        return int(Path("/proc/self/status").read_text().partition(f"{what}:")[2].split()[0]) << 10

    receive, send = os.pipe()
    child = os.fork()
    if child == 0:  # whose peak begins at the memory that it shares with this process
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
            before = status("VmRSS")
            with contextlib.suppress(UserError):
                read(*arguments)
            os.write(send, str(status("VmHWM") - before).encode())
        except BaseException as e:
            os.write(send, f"{type(e).__name__}: {e}".encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as f:
        answer = f.read()
    _, code = os.waitpid(child, 0)
    assert code == 0 and answer.lstrip("-").isdigit(), (code, answer)
    return int(answer)


# ------------------------------------------------------------------------------------------ archives, .npz, tensors
def header(shape: tuple, dtype: str = "<f4") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


def write_archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def hostile_archive(which: str, folder: Path) -> Path:
    zeros = bytes(100 * MB)
    if which == "deflated zeros":
        return write_archive(folder / "a.npz", {"conv0/W.npy": header((25 * MB,)) + zeros})
    if which == "many deflated arrays":
        return write_archive(folder / "a.npz", {f"w{k}.npy": header((MB,)) + zeros[: 4 * MB] for k in range(25)})
    if which == "shape without data":
        return write_archive(folder / "a.npz", {"conv0/W.npy": header((1 << 40,)) + b"1234"})
    if which == "huge text":
        return write_archive(folder / "a.npz", {"__meta__.npy": header((), f"<U{25 * MB}") + zeros})
    if which == "bzip2":
        return write_archive(folder / "a.npz", {"w.npy": header((25 * MB,)) + zeros}, zipfile.ZIP_BZIP2)
    if which == "deflated storage":
        plain, out = folder / "plain.pth", folder / "a.pth"
        save_zip(plain, {"w": Tensor(np.zeros(25 * MB, np.float32))})
        with zipfile.ZipFile(plain) as source:
            return write_archive(out, {name: source.read(name) for name in source.namelist()})
    if which == "250 tensors of one storage":
        base = np.zeros(MB // 2, np.float32)
        save_zip(folder / "a.pth", {f"w{k}": Tensor(base, storage=base) for k in range(250)})
        return folder / "a.pth"
    if which == "a million entries":
        entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0)
        directory = b"".join(entry + b"%07x" % k for k in range(MB))
        start, size = 16, len(directory)
        long = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, MB, MB, size, start)
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + size, 1)
        last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        (folder / "a.npz").write_bytes(b"PK\x03\x04" + bytes(12) + directory + long + locator + last)
        return folder / "a.npz"
    assert which == "entries over one another"
    content = header((MB,)) + zeros[: 4 * MB]
    path = write_archive(folder / "a.npz", {"w0.npy": content}, zipfile.ZIP_STORED)
    raw = path.read_bytes()
    at = raw.rindex(b"PK\x01\x02")
    end = raw.rindex(b"PK\x05\x06")
    directory = b"".join(raw[at:end].replace(b"w0.npy", f"w{k:x}.npy".encode()) for k in range(16))
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 16, 16, len(directory), at, 0)
    path.write_bytes(raw[:at] + directory + tail)
    return path


@pytest.mark.parametrize(
    "which, message",
    [
        ("deflated zeros", "more than 8 times its size"),
        ("many deflated arrays", "more than 8 times its size"),
        ("shape without data", "declares .* bytes and has"),
        ("huge text", "more than 8 times its size"),
        ("bzip2", "packed in an unusual way"),
        ("deflated storage", "more than 8 times its size"),
        ("250 tensors of one storage", "more than 8 times its size"),
        ("entries over one another", "overlap"),
        ("a million entries", "more than 8 times its size"),
    ],
)
def test_hostile_archives_take_no_more_memory_than_their_size_allows(tmp_path, which, message):
    path = hostile_archive(which, tmp_path)
    assert "a.npz" in refused(convert, path, message) or path.suffix == ".pth"
    peak = peak_memory(convert, path)
    assert peak < MULTIPLE * path.stat().st_size + ALLOWANCE + SLACK, f"{peak / MB:.0f} MB"


def test_reading_a_file_of_weights_takes_little_more_memory_than_its_size(tmp_path):
    values = {f"group0/block{k}/conv1/W": np.random.default_rng(k).random((1024, 1024), np.float32) for k in range(16)}
    save_npz(tmp_path / "a.npz", values, None)
    save_zip(tmp_path / "a.pth", tensors(values))
    size = (tmp_path / "a.npz").stat().st_size
    # In a new process: what is read could lie in memory that tests before this one have freed, or between it.
    program = (
        "from test_weight_files import *\n"
        "print(peak_memory(load_weights, 'a.npz'), peak_memory(read_pickle, Path('a.pth')),\n"
        "      peak_memory(load_weights, 'a.npz', lambda name: 'block7/' in name))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    native, pickled, part = map(int, done.stdout.split())
    assert 0.9 * size < native < 1.4 * size
    assert 0.9 * size < pickled < 1.4 * size
    assert part < 0.4 * size


def test_compressed_weights_are_read(tmp_path):
    rng = np.random.default_rng(0)
    values = {"conv0/W": rng.standard_normal(1000), "conv0/W/Momentum": np.zeros(1000), "rpn/box/b": np.zeros((0, 3))}
    values["fortran"] = np.asfortranarray(rng.standard_normal((3, 5)))
    np.savez_compressed(tmp_path / "a.npz", **values)
    got, meta = load_weights(tmp_path / "a.npz")
    assert meta is None and list(got) == list(values)
    for name, value in values.items():
        np.testing.assert_array_equal(got[name], value)
    assert list(load_weights(tmp_path / "a.npz", lambda name: name == "conv0/W")[0]) == ["conv0/W"]


def test_tensors_that_share_a_storage_share_its_memory(tmp_path):
    base = np.arange(1000, dtype=np.float32)
    content = {"a": Tensor(base, storage=base), "b": Tensor(base[:10], storage=base, strides=(1,), offset=5)}
    save_zip(tmp_path / "a.pth", content)
    got = read_pickle(tmp_path / "a.pth")
    assert np.shares_memory(got["a"], got["b"]) and got["b"].tolist() == list(range(5, 15))


# ------------------------------------------------------------------------------------------------------------- HDF5
@pytest.mark.parametrize(
    "which", ["shape without data", "deflated zeros", "large chunks", "other files", "texts", "plug-in"]
)
def test_hostile_hdf5_files(tmp_path, which):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as f:
        if which == "shape without data":
            f.create_dataset("l/kernel:0", shape=(1 << 20, 1 << 20), dtype="f4")
        elif which == "deflated zeros":
            f.create_dataset("l/kernel:0", data=np.zeros(25 * MB, np.float32), compression="gzip", chunks=(MB,))
        elif which == "large chunks":
            f.create_dataset("l/kernel:0", (1,), "f4", chunks=(50 * MB,), maxshape=(None,), compression="gzip")
        elif which == "other files":
            (tmp_path / "secret").write_bytes(b"1234")
            f.create_dataset("l/kernel:0", shape=(1,), dtype="f4", external=[(tmp_path / "secret", 0, 4)])
        elif which == "texts":
            f.create_dataset("l/kernel:0", data=["text"] * 3, dtype=h5py.string_dtype())
        else:
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_chunk((4,))
            properties.set_filter(305, h5py.h5z.FLAG_OPTIONAL)
            space = h5py.h5s.create_simple((4,))
            h5py.h5d.create(f.id, b"kernel", h5py.h5t.IEEE_F32LE, space, properties)
    refused(convert, path, "more than 8 times its size|other files|not a Keras applications")
    assert peak_memory(convert, path) < MULTIPLE * path.stat().st_size + ALLOWANCE + SLACK


def test_keras_files_are_checked_before_keras_reads_them(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["kernel:0"] = np.ones(3)
    check_hdf5(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as f:
        f.create_dataset("l/kernel:0", shape=(1 << 20, 1 << 20), dtype="f4")
    refused(check_hdf5, tmp_path / "a.h5", "more than 8 times its size")


def test_links_out_of_an_hdf5_file_are_not_followed(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as f:
        f["kernel:0"] = np.ones(3)
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["outside"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "kernel:0")
        f["loop"] = h5py.SoftLink("/")
        f["mine"] = np.ones(2)
    assert list(read_hdf5(tmp_path / "a.h5", lambda name: True)) == ["mine"]


# --------------------------------------------------------------------------------------------- what a file may be else
FOREIGN = {
    "safetensors": struct.pack("<Q", 2) + b"{}",
    "ONNX": b"\x08\x07\x12\x07pytorch\x1a\x03" + bytes(50),
    "Lite": b"\x1c\0\0\0TFL3" + bytes(50),
    "GGUF": b"GGUF\x03" + bytes(50),
    "compressed": b"\x1f\x8b\x08" + bytes(50),
    "web page": b"\n<!DOCTYPE html><html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


@pytest.mark.parametrize("what", list(FOREIGN))
@pytest.mark.parametrize("suffix", [".pth", ".npz", ".bin"])
def test_other_systems_are_recognised_by_content(tmp_path, what, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(FOREIGN[what])
    for read in (convert, load_weights):
        assert "damaged" not in refused(read, path, what)


@pytest.mark.parametrize(
    "name, what",
    [
        ("a.caffemodel", "Caffe"), ("a.safetensors", "safetensors"), ("a.onnx", "ONNX"), ("a.pb", "TensorFlow graph"),
        ("a.tflite", "Lite"), ("a.keras", "Keras 3"), ("a.ENGINE", "TensorRT"), ("a.weights", "Darknet"),
    ],
)  # fmt: skip
def test_other_systems_are_recognised_by_suffix(tmp_path, name, what):
    (tmp_path / name).write_bytes(b"\x0a\x05hello" * 10)
    for read in (convert, load_weights):
        assert "not read here: " in refused(read, tmp_path / name, what)


def test_a_keras_archive_is_no_npz(tmp_path):
    write_archive(tmp_path / "a.npz", {"config.json": b"{}", "model.weights.h5": b"\x89HDF"})
    refused(convert, tmp_path / "a.npz", "Keras 3")


def test_a_suffix_does_not_make_a_readable_file_foreign(tmp_path):
    (tmp_path / "a.weights").write_bytes(pickle.dumps({}))
    assert file_kind(tmp_path / "a.weights") == "pickle"


@pytest.mark.parametrize("read", [load_weights, convert, read_pickle])
def test_what_is_no_file(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.npz")
    refused(read, tmp_path / "pipe.npz", "no regular file")
    (tmp_path / "empty.npz").touch()
    refused(read, tmp_path / "empty.npz", "is empty")
    (tmp_path / "folder.npz").mkdir()
    refused(read, tmp_path / "folder.npz", "no checkpoint|is a folder")
    refused(read, tmp_path / "missing.npz", "do not exist|does not exist")
    with pytest.raises(UserError, match="regular"):
        read("/dev/zero")


# ------------------------------------------------------------------------------------------------------ descriptions
@pytest.mark.parametrize(
    "change, message",
    [
        ({"settings": [1]}, "settings must be an object"), ({"settings": "MODE_FPN"}, "settings must be an object"),
        ({"class_names": {"a": 1}}, "class_names must be a list of texts"),
        ({"class_names": ["a", 3]}, "class_names must be a list of texts"),
        ({"class_names": "cat"}, "class_names must be a list of texts"),
        ({"category_ids": [[1]]}, "category_ids must be"), ({"category_ids": 3}, "category_ids must be"),
        ({"total_batch": "8"}, "total_batch must be"), ({"total_batch": True}, "total_batch must be"),
        ({"total_batch": 0}, "total_batch must be"), ({"step": 1.5}, "step must be"), ({"step": -1}, "step must be"),
        ({"keypoint_flip": [0, 7]}, "keypoint_flip must be"), ({"keypoint_flip": {"0": 1}}, "keypoint_flip must be"),
        ({"versions": []}, "versions must be"), ({"data": "x"}, "data must be"),
        ({"smooth": {"loss": []}}, "smooth must be"), ({"smooth": [1]}, "smooth must be"),
    ],
)  # fmt: skip
def test_descriptions_of_a_wrong_type_are_one_line(tmp_path, change, message):
    save_npz(tmp_path / "a.npz", native_weights(), {"settings": {}, "class_names": ["cat"], **change})
    refused(load_weights, tmp_path / "a.npz", message)
    refused(read_meta, tmp_path / "a.npz", message)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", "[" * 100_000, '{"step": ' + "9" * 10_000 + "}"])
def test_descriptions_that_are_no_objects(tmp_path, text):
    np.savez(tmp_path / "a.npz", **native_weights(), __meta__=np.array(text))
    refused(load_weights, tmp_path / "a.npz", "JSON")


def test_a_description_of_many_megabytes(tmp_path):
    (tmp_path / "settings.json").write_text("[" + "[]," * (3 * MB) + "[]]")
    refused(read_description, tmp_path / "settings.json", "has 9 MB")
    os.mkfifo(tmp_path / "pipe.json")
    refused(read_description, tmp_path / "pipe.json", "no regular file")


def test_null_in_a_description_is_nothing(tmp_path):
    save_npz(tmp_path / "a.npz", native_weights(), {"settings": None, "smooth": {"a": None, "b": 2}, "step": 3})
    assert load_weights(tmp_path / "a.npz")[1] == {"step": 3, "smooth": {"b": 2}} == read_meta(tmp_path / "a.npz")


@pytest.mark.parametrize("step", [None, np.array([1, 2]), np.array(1.5), np.array(-3)])
def test_a_step_that_is_none(step):
    with pytest.raises(UserError, match="run says no step"):
        stored_step({} if step is None else {"global_step": step}, "run")
    assert stored_step({"global_step": np.array(7)}, "run") == 7


# -------------------------------------------------------------------------------------------------------------- fuzz
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    pytest.importorskip("h5py")
    resource_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = {"read": 0, "refused": 0}
    for number, (kind, path) in enumerate(damaged_copies(tmp_path, 450, seed=7)):
        for read in (load_weights, convert):
            result = outcome(read, path)
            assert result in counts, f"copy {number} of {kind}, {read.__name__}: {result}"
            counts[result] += 1
    assert min(counts.values()) > 20, counts
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resource_before < 200 << 10


def test_damage_is_damage():
    rng = random.Random(0)
    content = b"".join(bytes([k]) for k in range(256))
    assert sum(mutated(content, rng) != content for _ in range(100)) > 80
    out = io.BytesIO()
    np.savez(out, a=np.arange(9))
    assert zipfile.ZipFile(io.BytesIO(mutated_archive(out.getvalue(), rng))).testzip() is None
