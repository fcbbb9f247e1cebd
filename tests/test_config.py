"""config.py: keys, types, literals, aliases, schedules."""

import json
import re

import pytest

from common import UserError
from config import ALIASES, RELATIONS, SETTINGS, default_config, explain, finalize_config
from tools import settings_doc

pytestmark = pytest.mark.quick


def make(*args):
    return finalize_config(default_config().update_args(args))


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
    with pytest.raises(UserError) as error:
        make(argument)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


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
    assert make("PREPROC.TRAIN_SHORT_EDGE_SIZE=[640,800]").PREPROC.SHORT_EDGE_SIZE == [640, 800]


def test_named_schedules_keep_the_last_two_drops_of_long_ones():
    assert make("TRAIN.LR_SCHEDULE=1x").TRAIN.LR_SCHEDULE == [120000, 160000, 180000]
    assert make().TRAIN.LR_SCHEDULE == [240000, 320000, 360000]
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
    for key, setting in SETTINGS.items():
        read = setting.allowed.read(setting.default)
        assert read == setting.default or key == "TRAIN.LR_SCHEDULE"
        assert setting.allowed.read(read) == read  # a value that was read once can be stored and read again


def test_relations_and_explanations_name_settings_that_exist():
    texts = [sentence for _, _, sentence in RELATIONS] + [s.about for s in SETTINGS.values()]
    named = {k for t in texts for k in re.findall(r"\b[A-Z]+\.[A-Z][A-Z_0-9]*\b", t)} | {k for k, _, _ in RELATIONS}
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
