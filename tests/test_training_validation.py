"""The losses on the validation sets: those of the training graph, of whole images, the same however they are shared."""

import json

import cv2
import numpy as np
import pytest

from common import UserError
from config import default_config, finalize_config
from data import read_split_image, training_keys
from dataset import load_split
from tests.graph import make_batch, tiny_config
from tests.tiny import COCO_MINI, TINY_MODEL
from training_validation import images_with_losses, loss_batch, loss_callable, still_settings, validation_losses

AUGMENTED = [
    "PREPROC.RANDOM_CROP=[0.5,0.9]", "PREPROC.PHOTOMETRIC=1.0", "PREPROC.COPY_PASTE=1.0", "PREPROC.FLIP=True",
    "PREPROC.SCALE_JITTER=[0.5,2.0]",
]  # fmt: skip


def mini(*settings, training=False):
    """Settings and the validation split of tests/data."""
    cfg = default_config().update_args([*TINY_MODEL, f"DATA.BASEDIR={COCO_MINI}", *settings])
    split = load_split(cfg, "coco_val2017")
    cfg.DATA.CLASS_NAMES, cfg.DATA.NUM_CATEGORY = split.class_names, len(split.class_names)
    return finalize_config(cfg), split


# ------------------------------------------------------------------------------------------------------------ batches
def test_a_batch_is_a_whole_image_at_the_size_of_evaluation_whatever_the_augmentation(tmp_path):
    cfg, split = mini(*AUGMENTED)
    batch = dict(zip(training_keys(cfg), loss_batch(still_settings(cfg), split, 1)))
    height, width = batch["image_shape"][0]
    assert min(height, width) == cfg.PREPROC.TEST_SHORT_EDGE_SIZE
    want = cv2.resize(read_split_image(split, 1), (int(width), int(height)), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(batch["image"][0, :height, :width], want)
    scale = np.tile(np.array([width, height]) / split.image_size(1)[::-1], 2)
    np.testing.assert_allclose(batch["gt_boxes"][0], split.objects(1).boxes * scale, rtol=1e-5)


def test_the_random_choices_of_an_image_depend_on_its_number_alone():
    batches = []
    for seed in (1, 2):  # of two runs
        cfg, split = mini(*AUGMENTED, f"TRAIN.SEED={seed}")
        cfg = still_settings(cfg)
        batches += [loss_batch(cfg, split, i) for i in (0, 1, 0)]
    for a, b in ((0, 2), (0, 3), (1, 4)):
        assert all(np.array_equal(x, y) for x, y in zip(batches[a], batches[b]))
    seeds = [int(b[training_keys(cfg).index("image_seed")][0]) for b in batches]
    assert seeds[0] != seeds[1]


def without_objects(folder, *, outlines):
    """Settings of the two validation images; the first has no object (or only objects without outlines)."""
    content = json.loads((COCO_MINI / "annotations/instances_val2017.json").read_text())
    first = content["images"][0]["id"]
    for a in content["annotations"]:
        if a["image_id"] == first and not outlines:
            a["segmentation"] = []
    if outlines:
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]
    (folder / "some.json").write_text(json.dumps(content))
    return f"DATA.DATASETS={{'some':['{folder}/some.json','{COCO_MINI}/val2017']}}"


@pytest.mark.parametrize("outlines", [True, False], ids=["without objects", "with objects without outlines"])
def test_images_that_training_would_leave_out_are_left_out_unless_it_keeps_empty_ones(tmp_path, outlines):
    spec = without_objects(tmp_path, outlines=outlines)
    for filtered, want in ((True, [1]), (False, [0, 1])):
        cfg, _ = mini(spec, f"DATA.FILTER_EMPTY={filtered}")
        split, images = images_with_losses(cfg, load_split(cfg, "some", cfg.DATA.CLASS_NAMES))
        assert images.tolist() == want
        assert split.objects(0).is_crowd.all()


def test_a_set_without_any_object_is_named(tmp_path):
    content = json.loads((COCO_MINI / "annotations/instances_val2017.json").read_text())
    (tmp_path / "none.json").write_text(json.dumps({**content, "annotations": []}))
    cfg, _ = mini(f"DATA.DATASETS={{'none':['{tmp_path}/none.json','{COCO_MINI}/val2017']}}")
    with pytest.raises(
        UserError, match="TRAIN.VAL_LOSS=True: none has no image with an object.*DATA.FILTER_EMPTY=False"
    ):
        images_with_losses(cfg, load_split(cfg, "none", cfg.DATA.CLASS_NAMES))


# -------------------------------------------------------------------------------------------------------------- means
def brightness(batch):
    return {"total_loss": float(np.float32(batch[0].mean())), "part": float(batch[1][0, 0])}


def test_means_do_not_depend_on_how_images_are_shared_and_unreadable_ones_are_left_out(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    content = json.loads((COCO_MINI / "annotations/instances_train2017.json").read_text())
    for n, image in enumerate(content["images"]):
        data = (COCO_MINI / "train2017" / image["file_name"]).read_bytes()
        (tmp_path / "images" / image["file_name"]).write_bytes(data[:100] if n == 2 else data)
    (tmp_path / "train.json").write_text(json.dumps(content))
    cfg, val = mini(f"DATA.DATASETS={{'some':['{tmp_path}/train.json','{tmp_path}/images']}}")
    sets = [(val, np.arange(2)), (load_split(cfg, "some", cfg.DATA.CLASS_NAMES), np.arange(6))]
    alone = validation_losses([brightness], cfg, sets)
    assert "1 of 6 images of some have no validation loss" in capsys.readouterr().err
    still = still_settings(cfg)
    values = {s.name: [brightness(loss_batch(still, s, i)) for i in n if (s, i) != (sets[1][0], 2)] for s, n in sets}
    for key in ("total_loss", "part"):
        numbers = {name: [v[key] for v in found] for name, found in values.items()}
        assert alone[f"some/val/{key}"] == pytest.approx(np.mean(numbers["some"]), rel=1e-12)
        assert alone[f"val/{key}"] == pytest.approx(np.mean([*numbers["coco_val2017"], *numbers["some"]]), rel=1e-12)

    # Three ranks of two devices each: what the others give for the first and the second set.
    parts = [[], []]
    for rank in range(3):
        kept = iter(parts)
        validation_losses([brightness] * 2, cfg, sets, (rank, 3), lambda mine, kept=kept: next(kept).append(mine) or [])
    gathered = iter(parts)
    assert validation_losses([brightness] * 2, cfg, sets, (0, 3), lambda mine: next(gathered)) == alone


def test_it_stops_when_asked():
    cfg, split = mini()
    with pytest.raises(KeyError):
        validation_losses([brightness], cfg, [(split, np.arange(2))], should_stop=lambda: True, stopped=KeyError)


# ------------------------------------------------------------------------------------------------------- in the graph
MODELS = {
    "cascade with masks": ["FPN.CASCADE=True"],
    "keypoints": ["MODE_MASK=False", "MODE_KEYPOINT=True"],
    "C4 with masks": ["MODE_FPN=False"],
    "proposals": ["MODE_RPN_ONLY=True"],
}
OBJECTS = {
    "objects": [(10, 10, 60, 50, 1), (40, 30, 90, 80, 3), (5, 50, 40, 90, 2, True)],
    "crowds alone": [(10, 10, 60, 50, 1, True)],
    "nothing": [],
}


@pytest.mark.parametrize("model", MODELS)
def test_losses_equal_those_of_the_training_graph_on_the_same_batch(model):
    from tests.graph import tf
    from trainers import DetectionModel
    from training_plan import make_plan

    cfg = tiny_config(*MODELS[model], "TRAIN.EMA_DECAY=0.9")
    keys = training_keys(cfg)
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(0)
        described = DetectionModel(cfg, make_plan(cfg, 1, 10), keys)
        inputs = [tf.placeholder(spec.dtype, spec.shape) for spec in described.inputs()]
        described.build_graph(*inputs)
        variables = [v.op.name for v in tf.global_variables()]
        kernel = next(v for v in tf.trainable_variables() if v.op.name == "rpn/conv0/W")
        with tf.variable_scope("", reuse=tf.AUTO_REUSE):
            average = tf.get_variable(f"EMA/{kernel.op.name}", kernel.shape, initializer=tf.zeros_initializer())
        losses, averaged = loss_callable(cfg)(session), loss_callable(cfg, averages=True)(session)
        assert [v.op.name for v in tf.global_variables() if v is not average] == variables  # shared
        assert not tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        session.run(tf.global_variables_initializer())
        for name, objects in OBJECTS.items():
            batch = make_batch([(96, 128)], [objects], cfg)
            batch = [batch[key] for key in keys]
            want = session.run(described.losses, dict(zip(inputs, batch)))
            got = losses(batch)
            assert got.keys() == want.keys()
            for key, value in want.items():
                assert got[key] == pytest.approx(value, rel=1e-6, abs=1e-6), (name, key)
            assert np.isfinite(list(got.values())).all()
        assert averaged(batch)["rpn/class_loss"] != got["rpn/class_loss"]
        session.run(average.assign(kernel))
        assert averaged(batch) == pytest.approx(got, rel=1e-6)
