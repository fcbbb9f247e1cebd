"""Predictions of torchvision's detectors for tests/test_converted_models.py, in float64. Needs torch, torchvision and
NumPy, nothing of this project but tests/seeded_weights.py:

    python tests/torchvision_reference.py MODEL DIRECTORY [narrow]

reads DIRECTORY/images.npz (uint8 BGR arrays) and writes MODEL.pth (a state_dict) and MODEL.npz: what it finds in each
image, the shapes of the weights, and those weights that seeded_tensor does not give. narrow: on a ResNet-18 with 64
channels in pyramid and heads.
"""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from seeded_weights import seeded_tensor
from torchvision.models import detection, resnet18
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, RPNHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor


def narrow_v2(num_classes, channels=64, **limits):
    """The structure of maskrcnn_resnet50_fpn_v2, smaller."""
    norm = torch.nn.BatchNorm2d
    backbone = _resnet_fpn_extractor(resnet18(norm_layer=norm), 5, norm_layer=norm)
    backbone.fpn = type(backbone.fpn)([64, 128, 256, 512], channels, backbone.fpn.extra_blocks, norm)
    backbone.out_channels = channels
    head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [96], norm_layer=norm)
    return MaskRCNN(
        backbone, rpn_head=RPNHead(channels, 3, conv_depth=2), box_head=head,
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(96, num_classes),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=norm),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes), **limits,
    )  # fmt: skip


def as_input(image):
    """uint8 BGR [H,W,3] -> float64 RGB [3,H,W] in 0..1."""
    return torch.from_numpy(image[..., ::-1].transpose(2, 0, 1).copy()).double() / 255


def spread_scores(model, image):
    """Random features have much in common, so that one class would win everywhere: moves and scales the classes' logits
    to mean 0 and standard deviation 1.5 over the proposals of an image."""
    layer, seen = model.roi_heads.box_predictor.cls_score, []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model([image])
        hook.remove()
        scale = 1.5 / seen[0].std(0)
        layer.bias.copy_((layer.bias - seen[0].mean(0)) * scale)
        layer.weight.mul_(scale[:, None])


def main(name, directory, narrow=False):
    with np.load(directory / "images.npz") as content:
        images = {key: content[key] for key in content.files}
    short = {min(image.shape[:2]) for image in images.values()}
    limits = {"min_size": short.pop(), "max_size": 4096, "rpn_post_nms_top_n_test": 300, "box_detections_per_img": 40}
    if short:
        raise SystemExit("images of one short edge, please: nothing is resized here")
    classes = 2 if "keypoint" in name else 7 if narrow else 91
    build = narrow_v2 if narrow else functools.partial(getattr(detection, name), weights=None, weights_backbone=None)
    model = build(num_classes=classes, **limits)
    state = {key: torch.from_numpy(seeded_tensor(key, tuple(v.shape))) for key, v in model.state_dict().items()}
    model.load_state_dict(state)
    if not name.endswith("v2"):
        overwrite_eps(model, 0.0)  # as torchvision does for its published weights
    model.double().eval()
    first = next(iter(images.values()))
    spread_scores(model, as_input(first))
    model.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    torch.save({key: value.float() for key, value in model.state_dict().items()}, directory / f"{name}.pth")
    found = {f"weights/{key}": value.float().numpy() for key, value in model.state_dict().items() if "cls_score" in key}
    found |= {"shapes": np.array(json.dumps({key: list(value.shape) for key, value in state.items()}))}
    probabilities = []
    model.roi_heads.register_forward_hook(
        lambda module, inputs, outputs: probabilities.append([d.get("masks") for d in outputs[0]])
    )
    with torch.no_grad():
        for key, image in images.items():
            answer = model([as_input(image)])[0]
            found.update({f"{key}/{part}": value.numpy() for part, value in answer.items() if part != "masks"})
            if "masks" in answer:
                found[f"{key}/masks"] = probabilities[-1][0][:, 0].numpy()
                found[f"{key}/pasted"] = np.packbits((answer["masks"][:, 0] > 0.5).numpy(), axis=None)
    np.savez_compressed(directory / f"{name}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] == ["narrow"])
