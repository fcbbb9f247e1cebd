"""Parameters and multiply-adds against published figures and against sums by hand (tools/flops.py)."""

import json

import pytest

from config import default_config, finalize_config
from model_flops import count, count_training
from tests.tiny import TINY_MODEL
from tools.flops import main

FPN = ["MODE_FPN=True", "MODE_MASK=False"]


def settings(*args):
    return finalize_config(default_config().update_args(args))


# torchvision publishes, for ImageNet models at 224x224 with their classifier of 1000 classes, parameters and GFLOPs:
@pytest.mark.parametrize(
    "backbone, parameters, gflops, features",
    [
        (["BACKBONE.RESNET_NUM_BLOCK=[3,4,6,3]"], 25_557_032, 4.089, 2048),
        (["BACKBONE.RESNET_NUM_BLOCK=[3,4,23,3]"], 44_549_160, 7.801, 2048),
        (["BACKBONE.NUM_GROUPS=32", "BACKBONE.WIDTH_PER_GROUP=4"], 25_028_904, 4.230, 2048),
        (["BACKBONE.BLOCK=basic", "BACKBONE.RESNET_NUM_BLOCK=[2,2,2,2]"], 11_689_512, 1.814, 512),
        (["BACKBONE.BLOCK=basic"], 21_797_672, 3.664, 512),
    ],
)
def test_backbones_have_the_published_size_and_cost_without_their_classifier(backbone, parameters, gflops, features):
    got = count(settings(*FPN, *backbone), 224, 224)["parts"]["backbone"]
    assert got["parameters"] == parameters - (features + 1) * 1000
    assert got["macs"] / 1e9 == pytest.approx(gflops - features * 1000 / 1e9, abs=6e-4)


def test_faster_rcnn_has_what_detectron2_counts():
    """Its tests assert for R50-FPN (tests/test_model_analysis.py): 41,699,936 parameters, of them 26,799,296 in
    backbone and FPN, where frozen norms are none; 117 GFLOPs of backbone, FPN and RPN for an image of 800x800."""
    got = count(settings(*FPN, "BACKBONE.STRIDE_1X1=True"), 800, 800)
    parts = got["parts"]
    norms = 2 * 26560  # gamma and beta of ResNet-50's norms
    assert parts["backbone"]["parameters"] + parts["FPN"]["parameters"] == 26_799_296 + norms
    unused_background_boxes = 4 * 1024 + 4
    assert got["parameters"] == 41_699_936 + norms + unused_background_boxes
    assert int(sum(parts[p]["macs"] for p in ("backbone", "FPN", "RPN")) / 1e9) == 117


def test_heads_by_hand():
    got = count(settings("MODE_FPN=True", "MODE_KEYPOINT=True"), 800, 1333)
    assert got["size"] == [800, 1344]
    macs = {part: numbers["macs"] for part, numbers in got["parts"].items()}
    cells = sum((800 // s) * (1344 // s) for s in (4, 8, 16, 32)) + 13 * 21
    assert macs["RPN"] == cells * (9 * 256 * 256 + 256 * 3 + 256 * 12)
    assert macs["box head"] == 1000 * (7 * 7 * 256 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 81))
    assert macs["mask head"] == 100 * (4 * 14 * 14 * 9 * 256 * 256 + 14 * 14 * 256 * 4 * 256 + 28 * 28 * 256 * 80)
    assert macs["keypoint head"] == 100 * 14 * 14 * (9 * 256 * 512 + 7 * 9 * 512 * 512 + 16 * 512 * 17)
    assert got["macs"] == sum(macs.values())
    fewer = count(settings("MODE_FPN=True", "MODE_KEYPOINT=True"), 800, 1333, proposals=10, detections=5)["parts"]
    assert fewer["box head"]["macs"] * 100 == macs["box head"]
    assert fewer["mask head"]["macs"] * 20 == macs["mask head"]


def test_c4_runs_stage_5_on_proposals_for_boxes_and_on_detections_for_masks():
    got = count(settings("DATA.NUM_CATEGORY=3"), 800, 800)["parts"]
    c5 = 14 * 14 * 1024 * 512 + 7 * 7 * (9 * 512 * 512 + 512 * 2048 + 1024 * 2048)
    c5 += 2 * 7 * 7 * (2048 * 512 + 9 * 512 * 512 + 512 * 2048)
    assert got["box head"]["macs"] == 1000 * (c5 + 2048 * (4 + 16))
    assert got["mask head"]["macs"] == 100 * (c5 + 7 * 7 * 2048 * 4 * 256 + 14 * 14 * 256 * 3)


def test_cascade_counts_every_stage():
    one = count(settings(*FPN, "FRCNN.CLASS_AGNOSTIC=True"), 320, 320)["parts"]["box head"]
    three = count(settings(*FPN, "FPN.CASCADE=True"), 320, 320)["parts"]["box head"]
    assert three == {key: 3 * number for key, number in one.items()}


def test_trained_parameters_follow_the_settings():
    got = count(settings(*FPN, "BACKBONE.FREEZE_AT=1", "TRAIN.FREEZE_PATTERN=^fpn/"), 64, 64)["parts"]
    assert got["backbone"]["parameters"] == 23_508_032
    assert got["backbone"]["trainable"] == 23_508_032 - 7 * 7 * 3 * 64 - 2 * 64
    assert got["FPN"]["trainable"] == 0 and got["FPN"]["parameters"] == 3_344_384
    assert got["RPN"]["trainable"] == got["RPN"]["parameters"]


# MobileNetV2: 3,504,872 parameters and 0.301 GFLOPs with the last convolution and the classifier (torchvision);
# EfficientNet-B0: 5,288,548 and 0.386. ConvNeXt-Tiny: 28,589,128 and 4.456 with the classifier.
@pytest.mark.parametrize(
    "network, parameters, gflops, after",
    [
        ("MobileNetV2", 3_504_872, 0.301, (320 * 1280, 2 * 1280, 1280)),
        ("EfficientNetB0", 5_288_548, 0.386, (320 * 1280, 2 * 1280, 1280)),
        pytest.param("ConvNeXtTiny", 28_589_128, 4.456, (0, 0, 768), marks=pytest.mark.slow),
    ],
)
def test_keras_networks_have_the_published_size_and_cost_without_what_follows_the_features(
    network, parameters, gflops, after
):
    conv, norm, features = after
    got = count(settings(*FPN, f"BACKBONE.NAME=keras:{network}"), 224, 224)["parts"]["backbone"]
    assert got["parameters"] == parameters - conv - norm - (features + 1) * 1000
    assert got["macs"] / 1e9 == pytest.approx(gflops - (conv * 49 + features * 1000) / 1e9, rel=0.01)


def test_command_prints_a_table_and_writes_json(tmp_path, capsys):
    out = tmp_path / "flops.json"
    assert main(["--config", *TINY_MODEL, "--size", "100", "160", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    counted = json.loads(out.read_text())
    assert counted["size"] == [128, 160]
    total = printed.splitlines()[-1].split()
    assert total[0] == "total" and float(total[3]) == pytest.approx(counted["macs"] / 1e9, abs=0.005)
    assert float(total[4]) == pytest.approx(2 * counted["macs"] / 1e9, abs=0.005)
    assert main(["--config", "MODE_FPN=Tru"]) == 2
    assert main(["--size", "0", "5"]) == 2


def test_training_costs_three_products_of_what_learns_and_one_of_what_is_frozen():
    """Against the counts of a prediction, part by part: an image of 256 x 256, 512 RoIs, 128 of them foreground."""
    rois = {"proposals": 512, "detections": 128}
    whole = count(settings("MODE_FPN=True"), 256, 256, **rois)["macs"]
    learning = count_training(settings("MODE_FPN=True", "BACKBONE.FREEZE_AT=0"))
    first = 128 * 128 * 7 * 7 * 3 * 64  # the first convolution needs no gradient of the image
    assert sum(learning.of_image(256 * 256).values()) == 3 * whole - first
    frozen = count_training(settings("MODE_FPN=True", "BACKBONE.FREEZE_AT=2"))
    # Stage 2: three bottlenecks of 64 channels with 256 outputs, and a shortcut, on 64 x 64 cells.
    stage = 64 * 64 * (64 * 64 + 2 * 256 * 64 + 3 * (9 * 64 * 64 + 64 * 256) + 64 * 256)
    shortcut_of_stage_3 = 32 * 32 * 256 * 512  # it or the first convolution beside it is the first that learns
    got = sum(frozen.of_image(256 * 256).values())
    assert got - (3 * whole - 2 * first - 2 * stage) in (-shortcut_of_stage_3, -(64 * 64 * 256 * 128))
    heads = count(settings("MODE_FPN=True"), 256, 256, **rois)["parts"]
    assert sum(frozen.of_rois.values()) == 3 * (heads["box head"]["macs"] + heads["mask head"]["macs"])


def test_a_training_image_of_twice_the_pixels_costs_twice_as_much_outside_the_heads():
    counted = count_training(settings("MODE_FPN=True", "MODE_MASK=False"))
    one, two = counted.of_image(1000), counted.of_image(2000)
    for large in (False, True):
        assert two[large] - one[large] == pytest.approx(1000 * counted.of_pixel[large])
    assert count_training(settings(*FPN), 512).of_pixel[True] == pytest.approx(counted.of_pixel[True], rel=0.01)


def test_c4_training_computes_the_last_stage_once_for_boxes_and_masks():
    masks, boxes = count_training(settings()), count_training(settings("MODE_MASK=False"))
    deconvolution = 128 * (14 * 14 * 256 * 80 + 7 * 7 * 4 * 2048 * 256)
    assert sum(masks.of_rois.values()) - sum(boxes.of_rois.values()) == 3 * deconvolution
