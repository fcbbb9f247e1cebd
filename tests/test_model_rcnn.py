"""The whole graph at tiny widths: hard inputs, batches against single images, and losses per image."""

import numpy as np
import pytest

import model_box
import model_rcnn
from common import UserError
from model_frcnn import BOX_HEADS
from model_mrcnn import MASK_HEADS
from tests.graph import constants, make_batch, tiny_config
from utils.tf_v1 import graphs_for_gpu, tf

pytestmark = pytest.mark.usefixtures("unoptimised_graphs")
KINDS = {
    "fpn": ["MODE_FPN=True", "MODE_KEYPOINT=True", "KRCNN.HEAD_DIM=8", "KRCNN.NUM_KEYPOINT=3"],
    "cascade": ["MODE_FPN=True", "FPN.CASCADE=True"],
    "c4": ["MODE_FPN=False", "RPN.HEAD_DIM=16", "RPN.ANCHOR_SIZES=[16,32]", "RPN.TRAIN_PRE_NMS_TOPK=100",
           "RPN.TRAIN_POST_NMS_TOPK=50", "RPN.TEST_PRE_NMS_TOPK=60", "RPN.TEST_POST_NMS_TOPK=30"],
}  # fmt: skip
COMMON = ["RPN.TRAIN_FPN_NMS_TOPK=60", "TEST.RESULTS_PER_IM=20"]


def placeholders(batch):
    """One for each entry; only the number of images is fixed."""
    return {
        key: tf.placeholder(tf.as_dtype(value.dtype), [len(value), *[None] * (value.ndim - 1)][: value.ndim])
        for key, value in batch.items()
    }


def with_known_ends(inputs, cfg):
    inputs["image"].set_shape([None, None, None, 3])
    inputs["gt_boxes"].set_shape([None, None, 4])
    if "gt_edges" in inputs:
        inputs["gt_edges"].set_shape([None, None, None, 4])
    if "gt_keypoints" in inputs:
        inputs["gt_keypoints"].set_shape([None, None, cfg.KRCNN.NUM_KEYPOINT, 3])
    return inputs


class Detector:
    """A tiny detector of one kind and batch size, with a session: train(batch) and predict(batch)."""

    def __init__(self, kind, size, *settings):
        self.cfg = tiny_config(*KINDS[kind], *COMMON, *settings)
        self.graph = tf.Graph()
        with self.graph.as_default():
            tf.set_random_seed(3)
            example = make_batch([(32, 32)] * size, [[]] * size, self.cfg)
            self.inputs = with_known_ends(placeholders(example), self.cfg)
            self.losses, _ = model_rcnn.build_training(self.inputs, self.cfg)
            total = tf.add_n(list(self.losses.values()))
            variables = tf.trainable_variables()
            gradients = tf.gradients(total, variables)
            assert all(g is not None for g in gradients)
            self.gradients = {v.op.name: g for v, g in zip(variables, gradients)}
            with tf.variable_scope(tf.get_variable_scope(), reuse=True):
                image, shape = self.inputs["image"], self.inputs["image_shape"]
                self.outputs = model_rcnn.build_inference(image, shape, self.cfg)
            self.session = tf.Session()
            self.session.run(tf.global_variables_initializer())

    def train(self, batch):
        return self.session.run((self.losses, self.gradients), {self.inputs[k]: batch[k] for k in self.inputs})

    def predict(self, batch):
        return self.session.run(self.outputs, {self.inputs[k]: batch[k] for k in ("image", "image_shape")})

    def fill(self, name, value):
        """Fills a variable with one value -> its old content."""
        with self.graph.as_default():
            variable = next(v for v in tf.global_variables() if v.op.name == name)
            old = self.session.run(variable)
            variable.load(np.full_like(old, value) if np.isscalar(value) else value, self.session)
        return old

    def batch(self, shapes, objects, **options):
        return make_batch(shapes, objects, self.cfg, **options)


_built = {}


def detector(kind, size, *settings):
    key = kind, size, settings
    if key not in _built:
        _built[key] = Detector(*key[:2], *settings)
    return _built[key]


@pytest.fixture(scope="module", autouse=True)
def close_sessions():
    yield
    for built in _built.values():
        built.session.close()
    _built.clear()


def check_outputs(outputs, cfg, shapes):
    size, limit = len(shapes), cfg.TEST.RESULTS_PER_IM
    assert outputs["boxes"].shape == (size, limit, 4)
    assert outputs["labels"].dtype == np.int32 and outputs["count"].dtype == np.int32
    for row, (h, w) in enumerate(shapes):
        count = outputs["count"][row]
        assert np.isfinite(outputs["boxes"][row]).all()
        assert (outputs["boxes"][row] >= 0).all() and (outputs["boxes"][row] <= [w, h, w, h]).all()
        assert (outputs["labels"][row, :count] > 0).all() and not outputs["labels"][row, count:].any()
        assert (np.diff(outputs["scores"][row, :count]) <= 0).all()
    if cfg.MODE_MASK:
        m = 28 if cfg.MODE_FPN else 14
        assert outputs["masks"].shape == (size, limit, m, m)
        assert (outputs["masks"] >= 0).all() and (outputs["masks"] <= 1).all()
    if cfg.MODE_KEYPOINT:
        assert outputs["keypoints"].shape == (size, limit, cfg.KRCNN.NUM_KEYPOINT, 3)
        assert np.isfinite(outputs["keypoints"]).all()


def many_objects(count=500, seed=0):
    corner = np.random.RandomState(seed).uniform(0, 80, [count, 2])
    return [(x, y, x + 5 + i % 13, y + 4 + i % 7, 1 + i % 3) for i, (x, y) in enumerate(corner)]


CASES = {
    "no objects": ([(96, 96)] * 2, [[], []]),
    "objects in one image only": ([(96, 96), (64, 90)], [[(5, 5, 60, 60, 1)], []]),
    "crowds only": ([(96, 96)] * 2, [[(0, 0, 96, 96, 1, True)], [(5, 5, 60, 60, 2, True)]]),
    "one pixel": ([(96, 96)] * 2, [[(40, 40, 41, 41, 1)], [(0, 0, 1, 1, 2), (95, 95, 96, 96, 3)]]),
    "border": ([(96, 96)] * 2, [[(-10, -5, 30, 30, 1), (80, 80, 110, 130, 2)], [(0, 0, 96, 96, 3)]]),
    "empty boxes": ([(96, 96)] * 2, [[(40, 40, 40, 40, 1)], [(50, 20, 40, 60, 2), (10, 10, 50, 50, 1)]]),
    "1 x 1000": ([(1, 1000), (3, 900)], [[(10, 0, 400, 1, 1)], [(0, 0, 900, 3, 2)]]),
    "one pixel images": ([(1, 1), (1, 2)], [[(0, 0, 1, 1, 1)], []]),
    "500 objects": ([(96, 96)] * 2, [many_objects(), many_objects(3, 1)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_hard_inputs_train_and_predict_without_nan(kind, case):
    shapes, objects = CASES[case]
    for size in (1, 2):
        built = detector(kind, size)
        batch = built.batch(shapes[:size], objects[:size])
        losses, gradients = built.train(batch)
        assert all(np.isfinite(v) for v in losses.values()), losses
        assert all(np.isfinite(g).all() for g in gradients.values())
        if case in ("no objects", "crowds only"):
            assert losses["mrcnn/mask_loss"] == 0 and losses["rpn/box_loss"] == 0
        check_outputs(built.predict(batch), built.cfg, shapes[:size])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2])
def test_no_proposals_and_no_detections_are_fine(kind, size):
    """A bias that is not a number makes every proposal absent: a diverged model, but no crash."""
    built = detector(kind, size)
    shapes, objects = [(96, 96)] * size, [[(5, 5, 60, 60, 1)]] * size
    batch = built.batch(shapes, objects)
    bias = built.fill("rpn/box/b", np.nan)
    try:
        outputs = built.predict(batch)
        assert not outputs["count"].any()
        check_outputs(outputs, built.cfg, shapes)
        built.fill("rpn/box/b", -1e4)  # every proposal far outside: empty once clipped
        outputs = built.predict(batch)
        assert not outputs["count"].any()
        check_outputs(outputs, built.cfg, shapes)
        losses, gradients = built.train(batch)  # the ground truth alone is sampled
        assert all(np.isfinite(v) for v in losses.values())
        assert all(np.isfinite(g).all() for g in gradients.values())
    finally:
        built.fill("rpn/box/b", bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_two_equals_its_images_one_by_one(kind):
    pair, single = detector(kind, 2), detector(kind, 1)
    objects = [[(5, 5, 60, 60, 1), (30, 20, 90, 80, 2)], [(10, 30, 70, 90, 3)]]
    batch = pair.batch([(96, 96), (96, 96)], objects)
    together = pair.predict(batch)
    assert together["count"].min() > 0
    for row in range(2):
        alone = single.predict({key: value[row : row + 1] for key, value in batch.items()})
        assert alone["count"][0] == together["count"][row]
        for key in together:
            np.testing.assert_allclose(together[key][row], alone[key][0], rtol=1e-4, atol=2e-4, err_msg=key)


@pytest.mark.parametrize("kind", KINDS)
def test_with_losses_per_image_a_batch_of_two_is_the_mean_of_its_images(kind):
    """What makes an update independent of how images are spread over devices."""
    pair, single = detector(kind, 2), detector(kind, 1)
    objects = [[(5, 5, 60, 60, 1), (30, 20, 90, 80, 2)], [(10, 30, 70, 90, 3)]]
    batch = pair.batch([(96, 96), (96, 96)], objects)
    losses, gradients = pair.train(batch)
    halves = [single.train({key: value[row : row + 1] for key, value in batch.items()}) for row in range(2)]
    for key, value in losses.items():
        assert value == pytest.approx((halves[0][0][key] + halves[1][0][key]) / 2, rel=1e-5, abs=1e-7), key
    for name, gradient in gradients.items():
        mean = (halves[0][1][name] + halves[1][1][name]) / 2
        assert np.abs(gradient - mean).max() <= 1e-5 * max(np.abs(mean).max(), 1e-2), name


@pytest.mark.parametrize("kind", ["cascade", "fpn"])
def test_classes_nobody_looked_for_get_no_gradient_in_any_stage(kind):
    built = detector(kind, 2, "FRCNN.FEDERATED_LOSS=True")
    batch = built.batch([(96, 96)] * 2, [[(5, 5, 60, 60, 1)], [(10, 30, 70, 90, 1)]])
    names = [f"cascade_rcnn_stage{s}/outputs/class/b" for s in (1, 2, 3)] if kind == "cascade" else [
        "fastrcnn/outputs/class/b"]  # fmt: skip
    batch["class_verified"] = np.array([[True, True, False, False], [True, True, True, False]])
    _, gradients = built.train(batch)
    for name in names:
        assert (gradients[name][:3] != 0).all() and gradients[name][3] == 0
        assert (gradients[name.replace("/b", "/W")][:, 3] == 0).all()


def test_c4_masks_work_inside_a_tower():
    """The scope of a replica: variables of the branches are found under it."""
    cfg = tiny_config(*KINDS["c4"], *COMMON)
    batch = make_batch([(32, 32)], [[(2, 2, 30, 30, 1)]], cfg)
    with tf.Graph().as_default(), tf.variable_scope("tower1"):
        tf.set_random_seed(0)
        model_rcnn.build_training(constants(batch), cfg)
        names = {v.op.name for v in tf.global_variables()}
        with tf.variable_scope(tf.get_variable_scope(), reuse=True):
            model_rcnn.build_inference(tf.constant(batch["image"]), tf.constant(batch["image_shape"]), cfg)
        assert {v.op.name for v in tf.global_variables()} == names
        assert all(name.startswith("tower1/") and "//" not in name for name in names)


@pytest.mark.parametrize("case", ["border", "empty boxes", "one pixel", "objects in one image only"])
def test_giou_losses_of_a_cascade_are_bounded_and_reach_every_stage(case):
    built = detector("cascade", 2, "FRCNN.BBOX_LOSS=giou", "RPN.BBOX_LOSS=giou", "MODE_MASK=False")
    shapes, objects = CASES[case]
    batch = built.batch(shapes, objects)
    losses, gradients = built.train(batch)
    assert all(np.isfinite(g).all() for g in gradients.values())
    for stage in (1, 2, 3):
        assert 0 < losses[f"cascade_rcnn_stage{stage}/box_loss"] < 2
        assert gradients[f"cascade_rcnn_stage{stage}/outputs/box/W"].any()
    assert 0 < losses["rpn/box_loss"] < 2 and gradients["rpn/box/W"].any()
    bias = built.fill("rpn/box/b", -1e4)  # every proposal far outside and of no size
    try:
        losses, gradients = built.train(batch)
        assert all(np.isfinite(v) for v in losses.values()) and losses["rpn/box_loss"] <= 2
        assert all(np.isfinite(g).all() for g in gradients.values())
    finally:
        built.fill("rpn/box/b", bias)


OLDER_ROI_FEATURES = {
    "fpn": (["FRCNN.ROI_OP=pool"], ["fastrcnn/fc6", "maskrcnn/fcn0", "keypointrcnn/conv0"]),
    "c4": (["FRCNN.ROI_OP=pool"], ["group3/block0/conv1"]),
    "cascade": (["FRCNN.ROI_OP=crop_and_resize", "MODE_MASK=False"], ["cascade_rcnn_stage3/head/fc6"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_older_roi_features_train_and_predict_in_every_branch(kind):
    settings, first_layers = OLDER_ROI_FEATURES[kind]
    built = detector(kind, 2, *settings)
    for case in ("border", "no objects", "1 x 1000", "one pixel images"):
        shapes, objects = CASES[case]
        batch = built.batch(shapes, objects)
        losses, gradients = built.train(batch)
        assert all(np.isfinite(v) for v in losses.values()), case
        assert all(np.isfinite(g).all() for g in gradients.values()), case
        check_outputs(built.predict(batch), built.cfg, shapes)
        if case == "border":
            for name in first_layers:
                assert gradients[f"{name}/W"].any(), name


def test_adaptive_samples_pass_the_loss_on_to_the_pyramid():
    cfg = tiny_config("MODE_FPN=True", "FRCNN.ROI_SAMPLES=0")
    with tf.Graph().as_default(), tf.Session() as session:
        maps = [tf.ones([1, size, size, 3]) for size in (32, 16, 8, 4, 2)]
        boxes = tf.constant([[10.0, 5, 60, 50], [0, 0, 128, 128]])  # both of the finest level, far from its border
        pooled = model_rcnn.make_roi_pooler(maps, cfg)(boxes, tf.zeros([2], tf.int32), 7)
        gradients = session.run(tf.gradients(tf.reduce_sum(pooled), maps[:4]))
    assert sum(g.sum() for g in gradients) == pytest.approx(2 * 7 * 7 * 3, rel=1e-5)  # every mean hands on its whole 1


@pytest.mark.parametrize("fpn", [True, False])
@pytest.mark.parametrize("operation", ["align", "pool", "crop_and_resize"])
def test_the_pooler_is_the_operation_of_the_settings_on_the_maps_of_its_strides(operation, fpn):
    cfg = tiny_config(f"FRCNN.ROI_OP={operation}", f"MODE_FPN={fpn}", "FRCNN.ROI_TO_LAST_PIXEL=True")
    random = np.random.RandomState(0)
    sizes, strides = ([32, 16, 8, 4, 2], [4, 8, 16, 32]) if fpn else ([8], [16])
    features = [random.randn(1, size, size, 3).astype(np.float32) for size in sizes]
    boxes = np.array([[10, 5, 60, 50], [0, 0, 128, 128], [3, 3, 9, 120]], np.float32)
    plain = {"pool": model_box.roi_pool, "crop_and_resize": model_box.roi_crop_and_resize}

    def make():
        maps = [tf.constant(f) for f in features]
        index = tf.zeros([3], tf.int32)
        pooled = model_rcnn.make_roi_pooler(maps, cfg)(tf.constant(boxes), index, 7)
        level = model_box.fpn_level_of(tf.constant(boxes), len(strides))
        alone = []
        for own, stride in zip(maps, strides):
            rois = tf.constant(boxes - [0, 0, 1, 1], tf.float32)
            if operation == "align":
                alone.append(model_box.roi_align(model_box.pad_for_roi_align(own), rois, index, 1 / stride, 7))
            else:
                alone.append(plain[operation](own, rois, index, 1 / stride, 7))
        return pooled, tf.gather(tf.stack(alone, 1), level, batch_dims=1)

    with tf.Graph().as_default(), tf.Session() as session:
        pooled, expected = session.run(make())
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


# --------------------------------------------------------------------------------------------------- your own functions
def flat_masks(features, num_classes, cfg):
    return tf.reshape(model_rcnn.mask_head(features, num_classes, tiny_config()), [-1, 28 * 28 * num_classes])


def small_masks(features, num_classes, cfg):
    return model_rcnn.mask_head(features, num_classes, tiny_config())[:, ::2, ::2]


def whole_map(features, cfg):
    return features


def one_row(features, cfg):
    return tf.reduce_mean(features, [0, 1, 2])[None]


def whole_numbers(features, cfg):
    return tf.argmax(features[:, 0], 1)


def fails(features, cfg):
    return features + features[0, 0, 0, 0, 0]


def nothing(features, cfg):
    return None


NOT_CALLABLE = 3
HERE = "tests.test_model_rcnn"


@pytest.mark.quick
@pytest.mark.parametrize(
    "given, message",
    [
        (["FPN.FRCNN_HEAD_FUNC=fastrcnn_2fc"], r"must be one of .*mean fastrcnn_2fc_head"),
        (["FPN.FRCNN_HEAD_FUNC=demo.own_head:box_hed"], "own_head:box_hed: .*no attribute 'box_hed'.*module:function"),
        (["FPN.FRCNN_HEAD_FUNC=demo.absent:head"], "demo.absent:head: No module named 'demo.absent'"),
        (["FPN.FRCNN_HEAD_FUNC=demo.own_head:"], "must be one of"),
        (["FPN.FRCNN_HEAD_FUNC=demo.own_head:box_head", "MODE_FPN=False"], "needs MODE_FPN=True"),
        ([f"FPN.FRCNN_HEAD_FUNC={HERE}:NOT_CALLABLE"], "is not a function, its type is int"),
        ([f"FPN.FRCNN_HEAD_FUNC={HERE}:whole_map"], r"float tensor \[R,D\] .*\[R,7,7,16\].* float32 \[2, 7, 7, 16\]"),
        ([f"FPN.FRCNN_HEAD_FUNC={HERE}:one_row"], r"for 2 RoIs it returned float32 \[1, 16\]"),
        ([f"FPN.FRCNN_HEAD_FUNC={HERE}:whole_numbers"], r"returned int64 \[2, 16\]"),
        ([f"FPN.FRCNN_HEAD_FUNC={HERE}:fails"], r"raised .*\(test_model_rcnn.py:\d+\)"),
        ([f"FPN.FRCNN_HEAD_FUNC={HERE}:nothing"], "returned NoneType"),
        ([f"FPN.FRCNN_HEAD_FUNC={HERE}:small_masks"], "raised TypeError: .*missing 1 required positional argument"),
        ([f"FPN.MRCNN_HEAD_FUNC={HERE}:small_masks"], r"\[R,28,28,3\] .*\[R,14,14,16\].* float32 \[2, 14, 14, 3\]"),
        ([f"FPN.MRCNN_HEAD_FUNC={HERE}:flat_masks"], r"\[R,28,28,3\] .* float32 \[2, 2352\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_head_is_named_in_one_line(given, message):
    with pytest.raises(UserError, match=message) as error:
        model_rcnn.check_own_parts(tiny_config(*given))
    assert "\n" not in str(error.value) and given[0].split("=")[0] in str(error.value)


@pytest.mark.quick
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_your_own_heads_are_called_for_every_stage_of_a_cascade(precision):
    cfg = tiny_config(
        "FPN.CASCADE=True", "FPN.FRCNN_HEAD_FUNC=demo.own_head:box_head", "FPN.MRCNN_HEAD_FUNC=demo.own_head:mask_head",
        "FPN.FRCNN_CONV_HEAD_DIM=24", f"TRAIN.PRECISION={precision}",
    )  # fmt: skip
    model_rcnn.check_own_parts(cfg)
    with tf.Graph().as_default():
        inputs = with_known_ends(placeholders(make_batch([(32, 32)], [[]], cfg)), cfg)
        model_rcnn.build_training(inputs, cfg)
        names = {v.op.name for v in tf.trainable_variables()}
    assert {f"cascade_rcnn_stage{stage}/head/conv/W" for stage in (1, 2, 3)} | {"maskrcnn/logits/W"} <= names
    assert not [n for n in names if "fc6" in n or "fcn" in n]


@pytest.mark.quick
def test_a_head_that_plays_no_part_is_not_called():
    settings = ["FPN.MRCNN_HEAD_FUNC=demo.absent:head", "MODE_MASK=False"]
    model_rcnn.check_own_parts(tiny_config(*settings))
    model_rcnn.check_own_parts(tiny_config("FPN.FRCNN_HEAD_FUNC=demo.absent:head", "MODE_RPN_ONLY=True"))


@pytest.mark.quick
def test_the_settings_offer_the_heads_there_are():
    for key, heads in (("FPN.FRCNN_HEAD_FUNC", BOX_HEADS), ("FPN.MRCNN_HEAD_FUNC", MASK_HEADS)):
        for name in heads:
            assert tiny_config(f"{key}={name}", "MRCNN.HEAD_DIM=32").get(key) == name
        with pytest.raises(UserError, match=f"must be one of {', '.join(heads)}"):
            tiny_config(f"{key}=another")


def test_the_form_for_gpus_trains_and_predicts_the_same():
    one = detector("fpn", 2)
    with graphs_for_gpu(True):
        other = Detector("fpn", 2)
    _built["form for GPUs"] = other
    with one.graph.as_default():
        values = one.session.run({v.op.name: v for v in tf.global_variables()})
    for name, value in values.items():
        other.fill(name, value)
    types = [{op.type for op in built.graph.get_operations()} for built in (one, other)]
    assert "CombinedNonMaxSuppression" in types[0] - types[1]
    for case in ("objects in one image only", "500 objects", "no objects"):
        shapes, objects = CASES[case]
        batch = one.batch(shapes, objects)
        (losses, gradients), (other_losses, other_gradients) = one.train(batch), other.train(batch)
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(other_gradients[name], gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())
        outputs, other_outputs = one.predict(batch), other.predict(batch)
        for key, value in outputs.items():
            np.testing.assert_allclose(other_outputs[key], value, rtol=1e-4, atol=1e-4)
