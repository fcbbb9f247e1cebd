"""config.py: keys, types, literals, aliases, schedules."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from random_settings import draw_settings

from common import UserError
from config import (
    DOUBTS,
    PREDICTION_RELATIONS,
    RELATIONS,
    SETTINGS,
    TRAINING_DOUBTS,
    TRAINING_RELATIONS,
    default_config,
    doubts,
    explain,
    finalize_config,
)
from config_names import ALIASES, TENSORPACK
from tools import settings_doc

pytestmark = pytest.mark.quick


ALL_RELATIONS = [*RELATIONS, *TRAINING_RELATIONS, *PREDICTION_RELATIONS, *DOUBTS, *TRAINING_DOUBTS]


def make(*args, training=True):
    return finalize_config(default_config().update_args(args), training)


def refusal(*args, training=True):
    with pytest.raises(UserError) as error:
        make(*args, training=training)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def test_values_parse_as_literals_and_else_as_strings():
    cfg = make("MODE_FPN=True", "DATA.BASEDIR=~/data/coco", "RPN.ANCHOR_RATIOS=(0.5,1.0)", "TRAIN.BASE_LR=1e-3")
    assert cfg.MODE_FPN is True
    assert cfg.DATA.BASEDIR == "~/data/coco"
    assert cfg.RPN.ANCHOR_RATIOS == [0.5, 1.0]
    assert cfg.TRAIN.BASE_LR == 1e-3


def test_a_value_is_never_executed(tmp_path):
    target = tmp_path / "touched"
    make(f"DATA.BASEDIR=__import__('pathlib').Path('{target}').touch()")
    assert not target.exists()


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("RPN.BATCHPERIM=3", "RPN.BATCH_PER_IM"),
        ("MODE_FNP=True", "MODE_FPN"),
        ("BATCH_PER_IM=3", "BATCH_PER_IM"),
        ("FRCNN=3", "FRCNN.BATCH_PER_IM"),
        ("MODE_FPN", "KEY=VAL"),
        ("TRAIN.BASE_LR=fast", "TRAIN.BASE_LR"),
        ("MODE_FPN=maybe", "MODE_FPN"),
        ("TRAIN.BASE_LR=1e999", "TRAIN.BASE_LR"),
        ("BACKBONE.NORM=FrezeBN", "FreezeBN"),
        ("TRAIN.LR_SCHEDULE=12x", "TRAIN.LR_SCHEDULE"),
        ("TRAIN.LR_SCHEDULE=auto:12x", "TRAIN.LR_SCHEDULE"),
        ("TRAIN.LR_SCHEDULE=[5,3]", "TRAIN.LR_SCHEDULE"),
        ("PREPROC.MAX_SIZE=100", "PREPROC.MAX_SIZE"),
        ("FPN.CASCADE=True", "MODE_FPN=True"),
        ("FRCNN.BBOX_LOSS=giuo", "giou"),
        ("RPN.FG_RATIO=50", "RPN.FG_RATIO"),
        ("RPN.POSITIVE_ANCHOR_THRESH=0.2", "RPN.POSITIVE_ANCHOR_THRESH=0.2"),
        ("RPN.TEST_FPN_NMS_TOPK=0", "RPN.TEST_FPN_NMS_TOPK"),
        ("FRCNN.BG_THRESH_HI=0.6", "FRCNN.FG_THRESH (0.5)"),
        ("FRCNN.BG_THRESH_LO=0.5", "FRCNN.BG_THRESH_LO"),
        ("FPN.PROPOSAL_MODE=joint", "Joint"),
        ("FRCNN.ROI_OP=roipool", "pool"),
        ("RPN.BBOX_LOSS_WEIGHT=-1", "RPN.BBOX_LOSS_WEIGHT"),
        ("DATA.DATASETS={'a':'b'}", "DATA.DATASETS"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_the_key_and_the_fix(argument, hint):
    assert hint in refusal(argument)


@pytest.mark.parametrize(
    "line",
    [
        "MODE_MASK=False MODE_FPN=True DATA.BASEDIR=/coco BACKBONE.WEIGHTS=/path/ImageNet-R50-AlignPadding.npz",
        "MODE_FPN=True FPN.NORM=GN BACKBONE.NORM=GN FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_gn_head "
        "FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head PREPROC.TRAIN_SHORT_EDGE_SIZE=[640,800] TRAIN.LR_SCHEDULE=9x",
        "MODE_FPN=True FPN.CASCADE=True BACKBONE.RESNET_NUM_BLOCKS=[3,4,23,3] TEST.RESULT_SCORE_THRESH=1e-4 "
        "PREPROC.TEST_SHORT_EDGE_SIZE=800 PREPROC.TRAIN_SHORT_EDGE_SIZE=[640,800]",
        "TRAINER=horovod MODE_FPN=True FRCNN.BATCH_PER_IM=64 PREPROC.SHORT_EDGE_SIZE=600 PREPROC.MAX_SIZE=1024 "
        "TRAIN.LR_SCHEDULE=[150000,230000,280000] BACKBONE.RESNET_NUM_BLOCK=[3,4,6,3]",
    ],
)
def test_command_lines_of_the_ancestors_are_understood(line):
    make(*line.split())


def test_aliases_reach_the_canonical_key():
    assert make("BACKBONE.RESNET_NUM_BLOCKS=[3,4,23,3]").BACKBONE.RESNET_NUM_BLOCK == [3, 4, 23, 3]
    assert make("TRAIN.STEPS_PER_EPOCH=500").TRAIN.PERIOD_STEPS == 500
    assert make("PREPROC.TRAIN_SHORT_EDGE_SIZE=[640,800]").PREPROC.SHORT_EDGE_SIZE == [640, 800]


def test_named_schedules_keep_the_last_two_drops_of_long_ones():
    assert make("TRAIN.LR_SCHEDULE=1x").TRAIN.LR_SCHEDULE == [120000, 160000, 180000]
    assert make("TRAIN.LR_SCHEDULE=2x").TRAIN.LR_SCHEDULE == [240000, 320000, 360000]
    assert make().TRAIN.LR_SCHEDULE == make("TRAIN.LR_SCHEDULE=auto:2x").TRAIN.LR_SCHEDULE == "auto"
    assert make("TRAIN.LR_SCHEDULE=auto:9x").TRAIN.LR_SCHEDULE == "auto:9x"
    assert make("TRAIN.LR_SCHEDULE=3x").TRAIN.LR_SCHEDULE == [420000, 500000, 540000]
    assert make("TRAIN.LR_SCHEDULE=9x").TRAIN.LR_SCHEDULE == [1500000, 1580000, 1620000]


def test_settings_survive_json_unchanged():
    cfg = make("MODE_FPN=True", "DATA.DATASETS={'a':['x.json','imgs']}", "TRAIN.GRADIENT_CLIP=1", "BACKBONE.NORM=None")
    stored = json.loads(json.dumps(cfg.to_dict()))
    again = finalize_config(default_config().update_from_dict(stored, "stored"))
    assert again.to_dict() == cfg.to_dict()
    assert again.DATA.DATASETS == {"a": ["x.json", "imgs"]}
    assert again.BACKBONE.NORM is None


def test_finalising_leaves_the_callers_settings_as_they_are():
    cfg = default_config().update_args(["MODE_RPN_ONLY=True", "DATA.TRAIN=mine"])
    before = cfg.to_dict()
    final = finalize_config(cfg)
    assert cfg.to_dict() == before and cfg.MODE_MASK and not final.MODE_MASK
    cfg.RPN.ANCHOR_SIZES.append(1024.0)
    cfg.TRAIN.BASE_LR = 1.0
    assert final.RPN.ANCHOR_SIZES[-1] == 512.0 and final.TRAIN.BASE_LR == 0.01


def test_every_default_is_a_value_that_its_setting_takes():
    for setting in SETTINGS.values():
        read = setting.allowed.read(setting.default)
        assert read == setting.default
        assert setting.allowed.read(read) == read  # a value that was read once can be stored and read again


def test_relations_and_explanations_name_settings_that_exist():
    texts = [sentence for _, _, sentence in ALL_RELATIONS] + [s.about for s in SETTINGS.values()]
    named = {k for t in texts for k in re.findall(r"\b[A-Z]+\.[A-Z][A-Z_0-9]*\b", t)} | {k for k, _, _ in ALL_RELATIONS}
    assert len(named) > 20 and named <= set(SETTINGS)
    assert set(ALIASES.values()) <= set(SETTINGS)


def test_the_explained_settings_are_those_of_the_command_line_again():
    cfg = make("MODE_FPN=True", "DATA.DATASETS={'a':['x.json','imgs']}", "BACKBONE.NORM=None", "DATA.BASEDIR=a b#c")
    lines = explain(cfg).splitlines()
    assert make(*(line for line in lines if line and not line.startswith("#"))).to_dict() == cfg.to_dict()
    assert max(map(len, lines)) <= 120
    above = lines[lines.index("MODE_FPN=True") - 1]
    assert "Feature pyramid" in above and "Default: False" in above


def test_the_document_of_settings_is_current():
    assert settings_doc.DOCUMENT.read_text() == settings_doc.document(), "run: python tools/settings_doc.py"
    for key in SETTINGS:
        assert f"| `{key}` |" in settings_doc.document()


def test_a_finalised_config_cannot_be_changed_but_its_copy_can():
    cfg = make()
    with pytest.raises(AttributeError):
        cfg.TRAIN.BASE_LR = 1.0
    copy = cfg.copy()
    copy.TRAIN.BASE_LR = 1.0
    assert cfg.TRAIN.BASE_LR == 0.01


@pytest.mark.parametrize(
    "settings",
    [
        ["MODE_FPN=True", "RPN.CELL_ANCHORS=[[[0,0,1,1]]]"],
        ["RPN.CELL_ANCHORS=[1,2]"],
        ["RPN.ANCHOR_SIZES=[32]", "RPN.CELL_ANCHORS=[[[0,0,4,4],[0,0,4,0],[0,0,4,4]]]"],
        ["RPN.ANCHOR_SIZES=[32]", "RPN.CELL_ANCHORS=[[[0,0,4,4],[0,0,4],[0,0,4,4]]]"],
    ],
)
def test_cell_anchors_of_a_wrong_form_are_refused_with_the_form_wanted(settings):
    with pytest.raises(UserError, match=r"RPN.CELL_ANCHORS.*\[x1,y1,x2,y2\]"):
        make(*settings)


# ------------------------------------------------------------------------------------------- which values are allowed
@pytest.mark.parametrize(
    ("argument", "allowed"),
    [
        ("TRAIN.BASE_LR=-0.01", "from 0 to 100"),
        ("TRAIN.BASE_LR=nan", "from 0 to 100"),
        ("TRAIN.MOMENTUM=1", "from 0 to below 1"),
        ("TRAIN.WEIGHT_DECAY=-1", "from 0 to 1"),
        ("TRAIN.GRADIENT_CLIP=0", "from 0.0001 to 1000000, or None"),
        ("TRAIN.WARMUP=-5", "from 0 to"),
        ("TRAIN.WARMUP_INIT_LR=-1", "from 0 to 100"),
        ("TRAIN.MAX_STEPS=0", "from 1 to"),
        ("TRAIN.SEED=-1", "from 0 to 2147483647, or None"),
        ("TRAIN.SEED=1.5", "from 0 to 2147483647, or None"),
        ("DATA.NUM_WORKERS=-1", "from 0 to 256"),
        ("DATA.PREFETCH=0", "from 1 to 255"),
        ("TRAIN.KEEP_CHECKPOINTS=0", "from 1 to"),
        ("TRAIN.CHECKPOINT_PERIOD=0", "above 0"),
        ("PREPROC.SHORT_EDGE_SIZE=[800,600]", "lo <= hi"),
        ("PREPROC.SHORT_EDGE_SIZE=None", "pixels from 16"),
        ("PREPROC.MAX_SIZE=0", "from 16 to 16384"),
        ("PREPROC.PIXEL_STD=[1,0,1]", "from 0.001 to 1000"),
        ("PREPROC.PIXEL_MEAN=['a','b','c']", "R, G and B"),
        ("RPN.ANCHOR_SIZES=[]", "from 1 to 16384"),
        ("RPN.ANCHOR_SIZES=[32,-64,128,256,512]", "from 1 to 16384"),
        ("RPN.ANCHOR_SIZES=['a']", "from 1 to 16384"),
        ("RPN.ANCHOR_RATIOS=[0]", "from 0.01 to 100"),
        ("FRCNN.BBOX_REG_WEIGHTS=[10,10,5]", "four numbers from 0.01 to 1000"),
        ("FRCNN.BBOX_REG_WEIGHTS=[0,10,5,5]", "four numbers from 0.01 to 1000"),
        ("CASCADE.BBOX_REG_WEIGHTS=[[1,1,1,-1]]", "four numbers from 0.01 to 1000"),
        ("CASCADE.IOUS=[0.5,2]", "at most 1"),
        ("TRAIN.FREEZE_PATTERN=conv[", "regular expression, or None (unterminated character set"),
        ("FPN.ANCHOR_STRIDES=[8,16,32,64,128]", "follows from the network"),
        ("RPN.ANCHOR_STRIDE=8", "16, which follows from the network"),
        ("DATA.BASEDIR=", "a path"),
        ("TRAIN.BASE_LR=" + "9" * 500, "from 0 to 100"),
        ("TRAIN.SEED=0x" + "f" * 9000, "from 0 to"),
        ("DATA.BASEDIR='a\\x00b'", "a path"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_the_range(argument, allowed):
    for training in (True, False):
        message = refusal(argument, training=training)
        assert message.startswith(f"--config: {argument.partition('=')[0]}=") and allowed in message


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("PREPROC.TEST_SHORT_EDGE_SIZE=1400", "PREPROC.MAX_SIZE (1333)"),
        ("MODE_FPN=True FPN.NORM=GN FPN.NUM_CHANNEL=48", "multiple of 32"),
        ("MODE_FPN=True FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_gn_head FPN.FRCNN_CONV_HEAD_DIM=48", "multiple of 32"),
        ("MODE_FPN=True FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head MRCNN.HEAD_DIM=48", "multiple of 32"),
        ("BACKBONE.NORM=GN BACKBONE.NUM_GROUPS=5 BACKBONE.WIDTH_PER_GROUP=4", "BACKBONE.NUM_GROUPS (5)"),
        ("FRCNN.BATCH_PER_IM=3", "no foreground"),
        ("RPN.BATCH_PER_IM=1", "no foreground"),
        ("MODE_FPN=True FPN.CASCADE=True CASCADE.IOUS=[0.5,0.6]", "each stage of CASCADE.IOUS ([0.5, 0.6])"),
    ],
)
def test_values_that_do_not_go_together_are_refused(arguments, hint):
    assert hint in refusal(*arguments.split())


@pytest.mark.parametrize(
    ("arguments", "training"),
    [
        ("PREPROC.MAX_SIZE=600 PREPROC.TEST_SHORT_EDGE_SIZE=480", False),  # the short edge of training is larger
        ("PREPROC.MAX_SIZE=600 TEST.AUG_SHORT_EDGES=[480,640]", False),
        ("PREPROC.MAX_SIZE=600 PREPROC.SHORT_EDGE_SIZE=480 TRAIN.EVAL_PERIOD=0", True),  # nothing is tested
        ("PREPROC.MAX_SIZE=600 PREPROC.SHORT_EDGE_SIZE=480 DATA.VAL=[]", True),
        ("PREPROC.SCALE_JITTER=[0.1,2.0] PREPROC.MAX_SIZE=640 PREPROC.TEST_SHORT_EDGE_SIZE=480", True),
        ("CASCADE.IOUS=[0.5,0.6]", True),  # no cascade
        ("FPN.NORM=GN FPN.NUM_CHANNEL=48 FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head MRCNN.HEAD_DIM=48", True),  # C4
        ("MODE_FPN=True MODE_MASK=False FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head MRCNN.HEAD_DIM=48", True),
        ("RPN.ANCHOR_SIZES=[32]", True),  # C4
        ("MODE_RPN_ONLY=True FRCNN.ROI_OP=crop_and_resize FRCNN.ROI_SAMPLES=0 FRCNN.BATCH_PER_IM=1", True),
        ("MODE_RPN_ONLY=True FPN.CASCADE=True MODE_KEYPOINT=True", True),
        ("TRAIN.ACCUMULATION=2 TRAIN.TOTAL_BATCH=8", False),
        ("RPN.POSITIVE_ANCHOR_THRESH=0.2 FRCNN.BG_THRESH_LO=0.9", False),
        ("BACKBONE.NAME=a:b MODE_FPN=True BACKBONE.FREEZE_AT=2 BACKBONE.NORM=GN BACKBONE.STEM_CHANNELS=5", False),
    ],
)
def test_a_setting_that_plays_no_part_blocks_nothing(arguments, training):
    make(*arguments.split(), training=training)


@given(rng=st.randoms(use_true_random=False), training=st.booleans())
@hypothesis_settings(max_examples=400)
def test_random_settings_are_taken_as_they_are_or_refused_in_one_line(rng, training):
    words = [f"{key}={value!r}" for key, value in draw_settings(rng).items()]
    try:
        cfg = make(*words, training=training)
    except UserError as e:
        assert "\n" not in str(e) and any(word.partition("=")[0] in str(e) for word in words)
        return
    again = finalize_config(
        default_config().update_from_dict(json.loads(json.dumps(cfg.to_dict(), allow_nan=False)), "stored"), training
    )
    assert again.to_dict() == cfg.to_dict()
    numbers = [v for v in cfg.to_dict().values() if isinstance(v, (int, float))]
    assert all(math.isfinite(v) for v in numbers)


def test_what_is_probably_a_mistake_is_warned_of():
    assert doubts(make()) == doubts(make("PREPROC.PIXEL_MEAN=[0,0,0]", "PREPROC.PIXEL_STD=[1,1,1]")) == []
    small = doubts(make("PREPROC.PIXEL_STD=[0.229,0.224,0.225]", "PREPROC.PIXEL_MEAN=[0.485,0.456,0.406]"))
    assert len(small) == 2 and all("multiply it by 255" in d for d in small)
    assert doubts(make("TRAIN.BASE_LR=0", "TRAIN.WARMUP=0")) == ["setting TRAIN.BASE_LR=0.0 trains nothing"]
    assert "TRAIN.WARMUP_INIT_LR=0.0033" in doubts(make("TRAIN.BASE_LR=0.001"))[0]
    assert not doubts(make("TRAIN.BASE_LR=0.001", "TRAIN.WARMUP=0")) + doubts(make("TRAIN.BASE_LR=0"), training=False)


# ---------------------------------------------------------------------------------------------- what was probably meant
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("TRAIN.LR", "TRAIN.BASE_LR?"), ("LR", "TRAIN.BASE_LR?"), ("LEARNING_RATE", "TRAIN.BASE_LR?"),
        ("learning_rate", "TRAIN.BASE_LR?"), ("SOLVER.BASE_LR", "TRAIN.BASE_LR?"), ("train.base_lr", "TRAIN.BASE_LR?"),
        ("BATCH_SIZE", "TRAIN.BATCH_SIZE_PER_GPU"), ("TRAIN.BATCH_SIZE", "TRAIN.TOTAL_BATCH"),
        ("SOLVER.IMS_PER_BATCH", "TRAIN.TOTAL_BATCH"), ("NUM_GPUS", "CUDA_VISIBLE_DEVICES"),
        ("EPOCHS", "TRAIN.EPOCHS?"), ("TRAIN.MAX_EPOCH", "TRAIN.EPOCHS?"), ("MAX_ITER", "TRAIN.MAX_STEPS"),
        ("NUM_CLASSES", "DATA.CLASS_NAMES"), ("MODEL.MASK_ON", "MODE_MASK?"), ("OUTPUT_DIR", "--logdir"),
        ("mode_fpn", "MODE_FPN?"), ("MODE-FPN", "MODE_FPN?"), ("FP16", "TRAIN.PRECISION"),
        ("SCORE_THRESHOLD", "TEST.RESULT_SCORE_THRESH?"), ("IMAGE_SIZE", "PREPROC.SHORT_EDGE_SIZE"),
        ("TRAIN.LR_SCHEDUL", "TRAIN.LR_SCHEDULE?"), ("LEARNINGRATE", "TRAIN.BASE_LR?"), ("q\nx", "--print-config"),
        *((key, hint[-30:]) for key, hint in TENSORPACK.items()), ("DATA.ABSOLUTE_COORD", "normalised=True"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_answered_by_its_meaning(key, meant):
    message = refusal(f"{key}=1")
    assert message.rstrip("?").endswith(meant.rstrip("?")) or meant in message


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("MODE_FPN=true", "did you mean True?"), ("MODE_FPN=no", "did you mean False?"),
        ("MODE_FPN='True'", "did you mean True?"), ("TRAIN.BASE_LR='0.01'", "did you mean 0.01?"),
        ("TRAIN.SEED=none", "did you mean None?"), ("RPN.ANCHOR_RATIOS=1.0", "did you mean [1.0]?"),
        ("BACKBONE.NORM=freezebn", "did you mean FreezeBN?"), ("TEST.NMS=gaussian", "did you mean soft_gaussian?"),
        ("DATA.TRAIN=[a,b]", "put quotes around"), ("DATA.CLASS_NAMES=['BG','person']", "leave 'BG' out"),
        ("BACKBONE.NAME=resnet50", "did you mean resnet?"), ("BACKBONE.NAME=ResNet", "did you mean resnet?"),
        ("BACKBONE.NAME=EfficientNetB0", "did you mean keras:EfficientNetB0?"),
        ("BACKBONE.NAME=kears:EfficientNetB0", "did you mean keras:EfficientNetB0?"),
        ("BACKBONE.NAME=Keras:MobileNetV2", "did you mean keras:MobileNetV2?"),
        ("BACKBONE.NAME=keras.MobileNetV2", "did you mean keras:MobileNetV2?"),
    ],
)  # fmt: skip
def test_a_mistyped_value_is_answered_by_the_right_one(argument, meant):
    assert meant in refusal(argument)


def test_tensorpacks_words_have_their_meaning():
    cfg = make("BACKBONE.NORM='None'", "FPN.NORM='None'", "DATA.FILTER_EMPTY_ANNOTATIONS=False", "RPN.MIN_SIZE=0")
    assert cfg.BACKBONE.NORM is None and cfg.FPN.NORM is None and cfg.DATA.FILTER_EMPTY is False


def test_class_names_of_data_may_begin_with_a_background():
    stored = make().to_dict() | {"DATA.CLASS_NAMES": ["BG", "(other)"]}
    assert finalize_config(default_config().update_from_dict(stored, "run")).DATA.CLASS_NAMES == ["BG", "(other)"]
