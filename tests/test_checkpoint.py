"""Weights survive writing and reading, damage is noticed, and what does not fit is named (utils/checkpoint.py)."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from weight_mutations import damaged_copies, native_weights, outcome, save_checkpoint

from common import UserError
from utils import checkpoint
from utils.checkpoint import (
    assign_weights,
    checkpoint_writer,
    fit_weights,
    load_weights,
    match_weights,
    save_npz,
    save_tf_checkpoint,
)
from utils.weight_files import read_tensor_index


def some_variables(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "conv0/W": (7, 7, 3, 8),
        "conv0/bn/mean/EMA": (8,),
        "fastrcnn/outputs/class/W": (16, 5),
        "rpn/box/b": (12,),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def assert_same(got, want):
    assert sorted(got) == sorted(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
        assert got[name].dtype == want[name].dtype


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory with checkpoints of steps 1 to 3; `w` of step k is filled with k."""
    from utils.tf_v1 import tf

    directory = tmp_path_factory.mktemp("run")
    with tf.Graph().as_default(), tf.Session() as sess:
        w = tf.get_variable("conv0/W", [300, 70], initializer=tf.zeros_initializer())
        tf.get_variable("conv0/W/Momentum", [300, 70], initializer=tf.ones_initializer())
        step = tf.train.create_global_step()
        sess.run(tf.global_variables_initializer())
        write = checkpoint_writer(tf.global_variables())
        for k in range(1, 6):
            sess.run([w.assign(tf.fill([300, 70], float(k))), step.assign(k)])
            save_tf_checkpoint(write, sess, directory, k, {"step": k, "settings": {"MODE_FPN": True}}, keep=3)
    return directory


def test_a_checkpoint_has_the_bytes_that_tensorflows_saver_writes(tmp_path):
    from utils.tf_v1 import tf

    with tf.Graph().as_default(), tf.Session() as sess:
        for name, value in some_variables().items():
            tf.get_variable(name, initializer=value)
        tf.train.create_global_step()
        variables = tf.global_variables()
        write = checkpoint_writer(reversed(variables))
        sess.run(tf.global_variables_initializer())
        sess.run([v.assign_add(tf.ones_like(v)) for v in variables])
        write(sess, str(tmp_path / "own"))
        tf.train.Saver(variables).save(sess, str(tmp_path / "saver"), write_meta_graph=False, write_state=False)
    for end in (".index", ".data-00000-of-00001"):
        assert (tmp_path / f"own{end}").read_bytes() == (tmp_path / f"saver{end}").read_bytes()


@pytest.fixture
def copied_run(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "copy")


@pytest.mark.quick
def test_npz_returns_every_variable_and_the_meta(tmp_path):
    variables = some_variables()
    meta = checkpoint.make_meta({"BACKBONE.NORM": None, "FPN.ANCHOR_STRIDES": [4, 8]}, ["cat", "Ω"], 7)
    save_npz(tmp_path / "a.npz", variables, meta)
    got, got_meta = load_weights(tmp_path / "a.npz")
    assert_same(got, variables)
    assert got_meta == meta
    assert got_meta["versions"]["numpy"] == np.__version__ and got_meta["step"] == 7


@pytest.mark.quick
def test_failed_npz_write_leaves_the_old_file(tmp_path):
    save_npz(tmp_path / "a.npz", some_variables(1), None)
    with pytest.raises(TypeError):
        save_npz(tmp_path / "a.npz", some_variables(2), {"not": {1, 2}})
    got, meta = load_weights(tmp_path / "a.npz")
    assert_same(got, some_variables(1))
    assert meta is None
    assert os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.quick
def test_tensorpack_npz_names_become_native(tmp_path):
    one = np.ones(4, np.float32)
    names = {
        "conv0/W:0": "conv0/W",
        "fpn/gn_c2/gamma:0": "fpn/lateral_1x1_c2/gn/gamma",
        "fpn/gn_p5/beta": "fpn/posthoc_3x3_p5/gn/beta",
        "fastrcnn/gn0/gamma": "fastrcnn/conv0/gn/gamma",
        "cascade_rcnn_stage2/head/gn3/beta": "cascade_rcnn_stage2/head/conv3/gn/beta",
        "maskrcnn/gn1/beta": "maskrcnn/fcn1/gn/beta",
        "group0/block0/conv1/gn/gamma": "group0/block0/conv1/gn/gamma",
    }
    np.savez(tmp_path / "tp.npz", **dict.fromkeys(names, one))
    assert sorted(load_weights(tmp_path / "tp.npz")[0]) == sorted(names.values())


@pytest.mark.quick
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.npz", None, "do not exist"),
        ("text.npz", b"hello", "cannot be read"),
        ("empty.npz", b"", "is empty"),
        ("model.pkl", b"\x80\x04.", "tools/convert.py"),
        ("model.pth", b"PK", "tools/convert.py"),
        ("model.txt", b"x", "neither"),
        ("model-5", None, "do not exist"),
    ],
)
def test_unusable_files_are_one_line_errors(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        load_weights(tmp_path / name)
    assert "\n" not in str(e.value) and name in str(e.value)


@pytest.mark.quick
@pytest.mark.parametrize("url", ["https://host/folder/R50.npz", "s3://bucket/model.pkl"])
@pytest.mark.parametrize("kind", [str, Path])
def test_urls_are_not_fetched_and_the_message_says_what_to_do(url, kind):
    from tools.convert import convert

    for read in (load_weights, convert):
        with pytest.raises(UserError, match=re.escape(f"{url} is a URL") + ".*download.*docs/WEIGHTS.md"):
            read(kind(url))


@pytest.mark.quick
def test_truncated_npz_and_pickled_arrays_are_refused(tmp_path):
    save_npz(tmp_path / "a.npz", some_variables(), None)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "c.npz", x=np.array([{"a": 1}], dtype=object))
    middle = bytearray(whole)
    middle[2000] ^= 255
    (tmp_path / "d.npz").write_bytes(bytes(middle))
    for name in "bcd":
        with pytest.raises(UserError, match="cannot be read|of type object, not numbers"):
            load_weights(tmp_path / f"{name}.npz")


@pytest.mark.quick
def test_missing_file_error_names_what_is_there(tmp_path):
    save_npz(tmp_path / "right.npz", some_variables(), None)
    with pytest.raises(UserError, match=r"right\.npz"):
        load_weights(tmp_path / "wrong.npz")


def test_only_the_newest_checkpoints_are_kept_with_their_meta(run_dir):
    names = set(os.listdir(run_dir))
    expected = {f"model-{k}.{end}" for k in (3, 4, 5) for end in ("index", "data-00000-of-00001", "meta.json")}
    assert names == expected | {"checkpoint"}


def test_tensorflow_agrees_on_the_newest_checkpoint(run_dir):
    from utils.tf_v1 import tf

    assert tf.train.latest_checkpoint(str(run_dir)) == str(run_dir / "model-5")
    assert checkpoint.newest_checkpoint(run_dir) == str(run_dir / "model-5")
    state = tf.train.get_checkpoint_state(str(run_dir))
    assert [os.path.basename(p) for p in state.all_model_checkpoint_paths] == ["model-3", "model-4", "model-5"]


def test_checkpoint_loads_by_prefix_index_data_file_and_directory(run_dir):
    for path in ("model-4", "model-4.index", "model-4.data-00000-of-00001"):
        variables, meta = load_weights(run_dir / path)
        assert variables["conv0/W"][0, 0] == 4 and variables["global_step"] == 4 and meta["step"] == 4
    variables, meta = load_weights(run_dir)
    assert variables["conv0/W"][0, 0] == 5 and meta["settings"] == {"MODE_FPN": True}
    assert "conv0/W/Momentum" in variables


@pytest.mark.parametrize("end", ["index", "data-00000-of-00001"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_half_written_newest_falls_back_to_the_one_before(copied_run, end, part, caplog):
    file = copied_run / f"model-5.{end}"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])
    checkpoint.logger.addHandler(caplog.handler)
    try:
        variables, meta = load_weights(copied_run)
    finally:
        checkpoint.logger.removeHandler(caplog.handler)
    assert variables["conv0/W"][0, 0] == 4 and meta["step"] == 4
    assert "model-5 is damaged or incomplete" in caplog.text
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_weights(copied_run / "model-5")


def test_a_flipped_bit_in_the_data_is_noticed(copied_run):
    file = copied_run / "model-5.data-00000-of-00001"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(bytes(content))
    assert load_weights(copied_run)[0]["conv0/W"][0, 0] == 4


def test_data_without_index_and_missing_state_file_are_survived(copied_run):
    # What a kill between the two renames, or before the state file's replacement, leaves behind.
    os.unlink(copied_run / "model-5.index")
    assert load_weights(copied_run)[0]["global_step"] == 4
    os.unlink(copied_run / "checkpoint")
    assert load_weights(copied_run)[0]["global_step"] == 4


def test_state_file_wins_over_a_higher_step_and_moves_with_the_run(copied_run):
    (copied_run / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/run/model-4"\n')
    assert load_weights(copied_run)[0]["global_step"] == 4
    os.truncate(copied_run / "model-4.data-00000-of-00001", 10)
    assert load_weights(copied_run)[0]["global_step"] == 3


def test_no_readable_checkpoint_is_an_error(copied_run, tmp_path):
    for k in (3, 4, 5):
        os.truncate(copied_run / f"model-{k}.index", 10)
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        load_weights(copied_run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_weights(tmp_path / "empty")


@pytest.mark.parametrize("crash_at", range(6))
def test_save_interrupted_at_any_file_operation_leaves_a_loadable_run(copied_run, crash_at, monkeypatch):
    from utils.tf_v1 import tf

    class Killed(BaseException):
        pass

    calls = {"n": 0}

    def interrupting(original):
        def call(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] > crash_at:
                raise Killed
            return original(*args, **kwargs)

        return call

    with tf.Graph().as_default(), tf.Session() as sess:
        tf.get_variable("conv0/W", [300, 70], initializer=tf.constant_initializer(6.0))
        sess.run(tf.global_variables_initializer())
        write = checkpoint_writer(tf.global_variables())
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupting(os.replace))
            patch.setattr(os, "unlink", interrupting(os.unlink))
            try:
                save_tf_checkpoint(write, sess, copied_run, 6, {"step": 6}, keep=3)
                finished = True
            except Killed:
                finished = False
        loaded, meta = load_weights(copied_run)
        assert loaded["conv0/W"][0, 0] == meta["step"]
        assert meta["step"] in ((6,) if crash_at >= 4 else (5, 6))
        if not finished:
            save_tf_checkpoint(write, sess, copied_run, 7, {"step": 7}, keep=3)
        assert load_weights(copied_run)[1]["step"] == (6 if finished else 7)
        assert not (copied_run / ".saving").exists()


def test_rolled_back_run_keeps_the_later_checkpoint_but_loads_its_own(copied_run):
    from utils.tf_v1 import tf

    with tf.Graph().as_default(), tf.Session() as sess:
        tf.get_variable("conv0/W", [3], initializer=tf.constant_initializer(-1.0))
        sess.run(tf.global_variables_initializer())
        save_tf_checkpoint(checkpoint_writer(tf.global_variables()), sess, copied_run, 4, {"step": 4}, keep=1)
    assert load_weights(copied_run)[0]["conv0/W"].tolist() == [-1.0] * 3
    assert (copied_run / "model-5.index").exists() and not (copied_run / "model-3.index").exists()


GRAPH = {
    "conv0/W": (7, 7, 3, 8),
    "conv0/bn/gamma": (8,),
    "group0/block0/conv1/W": (1, 1, 8, 8),
    "fastrcnn/outputs/class/W": (16, 5),
    "fastrcnn/outputs/class/b": (5,),
    "maskrcnn/conv/b": (4,),
    "global_step": (),
    "conv0/W/Momentum": (7, 7, 3, 8),
    "fastrcnn/outputs/class/W/Momentum": (16, 5),
}


def zeros_like_graph(**changes):
    shapes = {**GRAPH, **changes}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape is not None}


@pytest.mark.quick
def test_a_complete_match_has_no_problem():
    report = match_weights(GRAPH, zeros_like_graph()).check()
    assert sorted(report.loaded) == sorted(GRAPH)
    assert not (report.mismatched or report.missing or report.unused)


@pytest.mark.quick
def test_training_state_is_never_a_problem():
    weights = zeros_like_graph()
    for name in ("global_step", "conv0/W/Momentum", "fastrcnn/outputs/class/W/Momentum"):
        del weights[name]
    for name in ("learning_rate", "rpn/conv0/W/AccGrad", "EMA/total_loss", "conv9/W/Adam_1", "loss_scale"):
        weights[name] = np.zeros(3, np.float32)
    report = match_weights(GRAPH, weights).check()
    assert not report.missing and not report.unused
    assert len(report.missing_state) == 3 and len(report.unused_state) == 5
    assert "optimizer slots" in report.table()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["conv0/bn/mean/EMA", "conv0/bn/variance/EMA", "rpn/class/W", "fastrcnn/fc6/b"])
def test_model_variables_are_not_taken_for_training_state(name):
    assert not checkpoint.is_training_state(name)


@pytest.mark.quick
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conv0/W": (3, 3, 3, 8)}, r"conv0/W has shape \[3, 3, 3, 8\], this model wants \[7, 7, 3, 8\]"),
        ({"fastrcnn/outputs/class/W": (16, 3), "fastrcnn/outputs/class/b": (3,)}, "number of classes differs"),
        ({"maskrcnn/conv/b": None}, "does not contain 1 tensor of this model, e.g. maskrcnn/conv/b.*MODE_MASK=False"),
        (
            {"group0/block1/conv1/W": (1, 1, 8, 8)},
            "contains 1 tensor this model does not use, e.g. group0/block1/conv1/W",
        ),
        ({"conv0/bn/gamma": None, "conv0/gn/gamma": (8,)}, "BACKBONE.NORM=GN"),
    ],
)
def test_check_names_the_first_difference_and_partial_loading_accepts_it(changes, message):
    report = match_weights(GRAPH, zeros_like_graph(**changes), origin="x.npz")
    with pytest.raises(UserError, match=message) as e:
        report.check()
    assert "\n" not in str(e.value) and "x.npz" in str(e.value)
    report.check(allow_partial=True)


@pytest.mark.quick
def test_deeper_backbone_is_named_by_its_setting():
    names = {f"group{g}/block{b}/conv1/W": (1,) for g, n in enumerate([3, 4, 6, 3]) for b in range(n)}
    deeper = {f"group{g}/block{b}/conv1/W": (1,) for g, n in enumerate([3, 4, 23, 3]) for b in range(n)}
    with pytest.raises(UserError, match=r"RESNET_NUM_BLOCK=\[3,4,23,3\]"):
        match_weights(names, deeper).check()


@pytest.mark.quick
@pytest.mark.parametrize("ours, theirs, hint", [(2, 3, "bottleneck"), (3, 2, "basic")])
def test_other_kind_of_block_is_named_by_its_setting(ours, theirs, hint):
    def names(convolutions):
        return {f"group{g}/block0/conv{k + 1}/W": (1,) for g in range(4) for k in range(convolutions)}

    with pytest.raises(UserError, match=f"set BACKBONE.BLOCK={hint}"):
        match_weights(names(ours), names(theirs)).check()


@pytest.mark.quick
def test_unused_heads_are_shown_but_allowed():
    report = match_weights(GRAPH, zeros_like_graph(**{"maskrcnn/fcn0/W": (3, 3, 8, 8)})).check()
    assert report.unused == ["maskrcnn/fcn0/W"]
    assert "maskrcnn/fcn0/W" in report.table()


@pytest.mark.quick
def test_nothing_fits_is_an_error_even_for_partial_loading():
    with pytest.raises(UserError, match="tools/convert.py"):
        match_weights(GRAPH, {"backbone.stem.conv1.weight": np.zeros(3)}).check(allow_partial=True)


@pytest.mark.quick
def test_backbone_weights_may_lack_the_heads_but_not_a_backbone_tensor():
    weights = {name: value for name, value in zeros_like_graph().items() if name.startswith(("conv0", "group"))}
    weights["linear/W"] = np.zeros((16, 1000), np.float32)
    report = match_weights(GRAPH, weights, expect="backbone").check()
    assert sorted(report.loaded) == ["conv0/W", "conv0/W/Momentum", "conv0/bn/gamma", "group0/block0/conv1/W"]
    assert "linear" not in report.table()
    del weights["conv0/bn/gamma"]
    with pytest.raises(UserError, match="does not contain .* conv0/bn/gamma"):
        match_weights(GRAPH, weights, expect="backbone").check()


@pytest.mark.quick
def test_fit_keeps_every_tensor_but_the_class_dependent_ones():
    weights = zeros_like_graph(
        **{
            "fastrcnn/outputs/class/W": (16, 81),
            "fastrcnn/outputs/class/b": (81,),
            "maskrcnn/conv/b": (80,),
            "fastrcnn/outputs/class/W/Momentum": (16, 81),
        }
    )
    values, report = fit_weights(weights, GRAPH)
    report.check()
    trimmed = {"fastrcnn/outputs/class/W", "fastrcnn/outputs/class/b", "maskrcnn/conv/b"}
    assert {name for name, _, _ in report.reinitialised} == trimmed
    assert set(values) == set(GRAPH) - trimmed - {"fastrcnn/outputs/class/W/Momentum"}
    assert all(name in report.table() for name in trimmed)
    with pytest.raises(UserError, match="number of classes differs"):
        fit_weights(weights, GRAPH, trim=False)[1].check()


@pytest.mark.quick
def test_fit_does_not_excuse_other_shape_differences():
    _, report = fit_weights(zeros_like_graph(**{"group0/block0/conv1/W": (1, 1, 8, 16)}), GRAPH)
    with pytest.raises(UserError, match="group0/block0/conv1/W"):
        report.check()


@pytest.mark.parametrize("use_resource", [True, False])
def test_assign_sets_values_of_a_finalized_graph(use_resource):
    from utils.tf_v1 import tf

    with tf.Graph().as_default() as graph, tf.Session() as sess:
        shared = tf.fill([2, 3], 1.0)
        variables = [
            tf.Variable(shared, name="a", use_resource=use_resource),
            tf.Variable(shared, name="b", use_resource=use_resource),
            tf.get_variable("c/W", [4], initializer=tf.ones_initializer(), use_resource=use_resource),
        ]
        step = tf.train.create_global_step()
        sess.run(tf.global_variables_initializer())
        graph.finalize()
        values = {"a": np.full((2, 3), 5.0), "b": np.full((2, 3), 6.0, np.float32), "global_step": np.int32(9)}
        assert assign_weights(sess, values) == 3
        got = sess.run([*variables, step])
        assert got[0][0, 0] == 5 and got[1][0, 0] == 6 and got[2].tolist() == [1] * 4 and got[3] == 9
        with pytest.raises(UserError, match="c/W has shape"):
            assign_weights(sess, {"c/W": np.zeros(3)})


@pytest.mark.quick
def test_meta_is_json():
    meta = checkpoint.make_meta({"A": [1.5, None, "x"]}, ["a"], np.int64(3))
    assert json.loads(json.dumps(meta)) == meta
    assert meta["versions"]["packrcnn"] != "unknown" and meta["git_revision"]


# ---------------------------------------------------------------------------------------------------- hostile indices
def table(entries: list[tuple[bytes, bytes]]) -> bytes:
    """A LevelDB table of one block, as TensorFlow's index is."""

    def block(pairs: list[tuple[bytes, bytes]]) -> bytes:
        body = b"".join(b"\0" + varint(len(k)) + varint(len(v)) + k + v for k, v in pairs)
        return body + struct.pack("<II", 0, 1)

    def with_trailer(content: bytes) -> bytes:
        crc = crc32c(content + b"\0")
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        return content + b"\0" + struct.pack("<I", masked)

    data = block(entries)
    index = block([(b"\xff", varint(0) + varint(len(data)))])
    content = with_trailer(data) + with_trailer(block([])) + with_trailer(index)
    handles = b"".join(map(varint, (len(data) + 5, 8, len(data) + 18, len(index))))
    return content + handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def tensor(shape: list[int], size: int, offset: int = 0, dtype: int = 1, shard: int = 0, crc: int = 0) -> bytes:
    """A BundleEntryProto."""

    def field(number: int, value: int) -> bytes:
        return varint(number << 3) + varint(value % (1 << 64))

    dims = b"".join(b"\x12" + varint(len(field(1, n))) + field(1, n) for n in shape)
    numbers = field(3, shard) + field(4, offset) + field(5, size)
    return field(1, dtype) + b"\x12" + varint(len(dims)) + dims + numbers + b"\x35" + struct.pack("<I", crc)


HEADER = (b"", b"\x08\x01")  # one data file


@pytest.mark.parametrize(
    "entries, message",
    [
        ([(b"w", tensor([1 << 31, 1 << 31, 1 << 31], 16))], "impossible shape"),
        ([(b"w", tensor([-5], 16))], "impossible shape"),
        ([(b"w", tensor([1 << 38], 16))], "takes 16 bytes"),
        ([(b"w", tensor([1 << 38], 1 << 40))], "outside the data file"),
        ([(b"w", tensor([4], 16, 64))], "outside the data file"),
        ([(b"w", tensor([4], 16, -64))], "outside the data file"),
        ([(b"w", tensor([4], 16, shard=7))], "outside the data file"),
        ([(f"w{k:03d}".encode(), tensor([16], 64)) for k in range(250)], "overlap"),
        ([(b"w", tensor([16], 64)), (b"w", tensor([16], 64))], "not in order"),
        ([(b"w\n", tensor([16], 64))], "not a valid variable name"),
        ([(b"w", tensor([16], 64, dtype=999))], "damaged or incomplete"),
        ([(b"w", b"\xff\xff\xff")], "damaged or incomplete"),
        ([(b"w", tensor([16], 64, crc=1))], "damaged or incomplete"),
    ],
)  # fmt: skip
def test_hostile_indices_of_checkpoints(tmp_path, entries, message):
    (tmp_path / "model-5.index").write_bytes(table([HEADER, *entries]))
    (tmp_path / "model-5.data-00000-of-00001").write_bytes(bytes(64))
    for path in ("model-5", "model-5.index"):
        with pytest.raises(UserError, match=message) as e:
            load_weights(tmp_path / path)
        assert "model-5" in str(e.value) and "\n" not in str(e.value)


def test_the_index_of_a_checkpoint_is_read_as_tensorflow_wrote_it(tmp_path):
    prefix = str(save_checkpoint(tmp_path)[0]).removesuffix(".index")
    entries = read_tensor_index(prefix)
    want = native_weights()
    assert {name: entry.shape for name, entry in entries.items()} == {name: v.shape for name, v in want.items()}
    assert all(entry.size == want[name].nbytes for name, entry in entries.items())
    got = load_weights(prefix, lambda name: name.startswith("conv0"))[0]
    assert list(got) == ["conv0/W"] and (got["conv0/W"] == want["conv0/W"]).all()


def test_damaged_checkpoints_are_read_or_refused_in_one_line(tmp_path):
    for number, (kind, path) in enumerate(damaged_copies(tmp_path, 150, seed=3, kinds=["checkpoint"])):
        result = outcome(load_weights, path)
        assert result in ("read", "refused"), f"copy {number} of {kind}: {result}"
