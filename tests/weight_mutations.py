"""Small valid files of weights of every format that is read, and damaged copies of them, for test_weight_files.py.

By hand:  PYTHONPATH=.:tests python tests/weight_mutations.py COUNT SEED [KIND …]   prints what became of them.
"""

import io
import os
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch_files import save_pickled_tensors, save_stream, save_zip, tensors

from common import UserError
from tools.convert import convert
from utils.checkpoint import load_weights, make_meta, save_npz

INTERESTING = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
]


# ------------------------------------------------------------------------------------------------------ valid files
def small_resnet() -> dict[str, np.ndarray]:
    """A ResNet of one basic block per stage as torchvision names it, narrow."""
    rng = np.random.default_rng(0)
    weights = {"conv1.weight": rng.standard_normal((8, 3, 7, 7)), "fc.weight": np.ones((5, 64)), "fc.bias": np.ones(5)}
    norms = {"bn1": 8}
    for stage, width in enumerate((8, 16, 32, 64)):
        block, before = f"layer{stage + 1}.0", max(8, width // 2)
        weights[f"{block}.conv1.weight"] = rng.standard_normal((width, before, 3, 3))
        weights[f"{block}.conv2.weight"] = rng.standard_normal((width, width, 3, 3))
        norms |= {f"{block}.bn1": width, f"{block}.bn2": width}
        if stage:
            weights[f"{block}.downsample.0.weight"] = rng.standard_normal((width, before, 1, 1))
            norms[f"{block}.downsample.1"] = width
    for norm, width in norms.items():
        weights |= {f"{norm}.{leaf}": np.ones(width) for leaf in ("weight", "bias", "running_mean", "running_var")}
    return {name: value.astype(np.float32) for name, value in weights.items()}


def native_weights() -> dict[str, np.ndarray]:
    kernels = {f"group{g}/block0/conv{k}/W": 2 << g for g in range(4) for k in (1, 2)}
    kernels |= {f"group{g}/block0/convshortcut/W": 2 << g for g in (1, 2, 3)} | {"conv0/W": 2, "rpn/box/b": 2}
    return {name: np.full((3, 3, 2, width), 0.5, np.float32) for name, width in kernels.items()}


def valid_files(folder: Path) -> dict[str, list[Path]]:
    """{kind: the file to read first, and those beside it}."""
    weights = small_resnet()
    made = {}
    for name, save in (("zip", save_zip), ("stream", save_stream), ("nested", save_pickled_tensors)):
        made[name] = [folder / f"{name}.pth"]
        save(made[name][0], {"model": tensors(weights), "epoch": 3, "args": {"lr": 0.1, "names": ["a", "b"]}})
    for protocol in (0, 2, 4):
        made[f"pickle{protocol}"] = [folder / f"protocol{protocol}.pkl"]
        made[f"pickle{protocol}"][0].write_bytes(pickle.dumps({"model": weights, "epoch": 3}, protocol))
    made["npz"] = [folder / "native.npz"]
    meta = make_meta({"MODE_FPN": True}, ["cat"], 5) | {"category_ids": [3], "total_batch": 8, "keypoint_flip": [1, 0]}
    save_npz(made["npz"][0], native_weights(), meta)
    made["packed npz"] = [folder / "packed.npz"]
    np.savez_compressed(made["packed npz"][0], **native_weights())
    made["hdf5"] = [folder / "keras.h5"]
    save_keras(made["hdf5"][0], {"conv1_conv": weights["conv1.weight"], "conv2_block1_1_conv": np.ones((1, 1, 8, 8))})
    return made


def save_keras(path: Path, kernels: dict[str, np.ndarray]) -> None:
    import h5py

    with h5py.File(path, "w") as f:
        for layer, kernel in kernels.items():
            options = {"compression": "gzip", "shuffle": True} if kernel.ndim == 4 and kernel.shape[0] > 1 else {}
            f.create_dataset(f"{layer}/{layer}/kernel:0", data=kernel, **options)


def save_checkpoint(folder: Path) -> list[Path]:
    from utils.tf_v1 import tf

    prefix = folder / "model-5"
    with tf.Graph().as_default(), tf.Session() as session:
        for name, value in native_weights().items():
            tf.get_variable(name, initializer=value)
        session.run(tf.global_variables_initializer())
        tf.train.Saver().save(session, str(prefix), write_meta_graph=False, write_state=False)
    Path(f"{prefix}.meta.json").write_text('{"settings": {"MODE_FPN": true}, "class_names": ["cat"], "step": 5}')
    return [Path(f"{prefix}{end}") for end in (".index", ".data-00000-of-00001", ".meta.json")]


# ----------------------------------------------------------------------------------------------------- damaged copies
def mutated(content: bytes, rng: random.Random) -> bytes:
    """A copy with one to three kinds of damage."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not data:
            break
        at, kind = rng.randrange(len(data)), rng.randrange(7)
        size = min(rng.choice((1, 2, 4, 8, 16, 64)), len(data) - at)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            form = rng.choice(("<I", ">I", "<Q", "<H", "<B"))
            number = struct.pack(form, rng.choice(INTERESTING) & ((1 << 8 * struct.calcsize(form)) - 1))
            data[at : at + len(number)] = number
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = rng.randbytes(size)
        elif kind == 4:
            del data[at : at + size]
        elif kind == 5:
            other = rng.randrange(len(data))
            data[at : at + size] = data[other : other + size]
        else:
            data[at : at + size] = bytes([rng.choice((0, 255, 46, 40, 82))]) * size
    return bytes(data)


def mutated_archive(content: bytes, rng: random.Random) -> bytes:
    """A zip archive one entry of which is damaged, with the checksum of the damage."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as target:
        entries = source.infolist()
        victim = rng.choice(entries).filename
        # An entry's beginning (a program, a header of an array) matters more than its numbers.
        for entry in entries:
            data = source.read(entry)
            if entry.filename == victim:
                head = rng.choice((80, 400, len(data)))
                data = mutated(data[:head], rng) + data[head:]
            target.writestr(entry.filename, data, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return out.getvalue()


def damaged_copies(folder: Path, count: int, seed: int, kinds: Sequence[str] = ()) -> Iterator[tuple[str, Path]]:
    """Yields (kind, path of a damaged copy) of all kinds but TensorFlow's checkpoints, or of `kinds`; a copy is
    overwritten by the next one of its kind."""
    rng = random.Random(seed)
    (folder / "valid").mkdir()
    (folder / "copy").mkdir()
    files = valid_files(folder / "valid")
    if "checkpoint" in kinds:
        files["checkpoint"] = save_checkpoint(folder / "valid")
    contents = {p: p.read_bytes() for paths in files.values() for p in paths}
    kinds = list(kinds or files)
    for k in range(count):
        kind = kinds[k % len(kinds)]
        victim = rng.choice(files[kind])
        for path in files[kind]:
            content = contents[path]
            if path == victim:
                zipped = content.startswith(b"PK") and rng.random() < 0.7
                content = (mutated_archive if zipped else mutated)(content, rng)
            (folder / "copy" / path.name).write_bytes(content)
        yield kind, folder / "copy" / files[kind][0].name


def outcome(read: Callable, path: Path) -> str:
    """ "read", "refused", or what went wrong."""
    try:
        read(path)
    except UserError as e:
        return "refused" if "\n" not in str(e) and len(str(e)) < 1000 else f"a message of several lines: {e}"
    except BaseException as e:
        return f"{type(e).__name__}: {e}"
    return "read"


def main() -> None:
    count, seed, kinds = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # A copy that ends the process in C leaves its place behind.
    folder = Path(tempfile.mkdtemp(prefix="mutations"))
    print(f"copies are in {folder}")
    outcomes: dict[str, Counter] = {}
    slowest = 0.0
    for number, (kind, path) in enumerate(damaged_copies(folder, count, seed, kinds)):
        for read in (load_weights, convert):
            started = time.perf_counter()
            result = outcome(read, path)
            slowest = max(slowest, time.perf_counter() - started)
            outcomes.setdefault(f"{kind} {read.__name__}", Counter())[result] += 1
            if result not in ("read", "refused"):
                print(f"number {number}, {kind}, {read.__name__}: {result}", flush=True)
    for name, counter in outcomes.items():
        print(f"{name:24}", dict(counter))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{count} copies; slowest {slowest:.2f} s; peak memory of the process {peak} MB")


if __name__ == "__main__":
    main()
