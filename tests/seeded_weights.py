"""Random weights of a whole detector, drawn from the names and shapes of its tensors alone, so that an expectation
recorded elsewhere needs no weights beside it."""

import re
import zlib

import numpy as np

_GAINS = [  # regular expression on name and shape -> factor on the weights' scale; the first that matches
    (r"^conv_rpn_w", 0.1),  # C4's features are larger than a pyramid's
    (r"(cls_score|bbox_pred|conv5_mask)_w.*2048", 0.15),
    (r"^conv1_(w|conv)", 1 / 57),  # these systems' images keep the scale of pixels
    (r"rpn.*(cls_logits|objectness)", 0.5),
    (r"rpn.*bbox_pred", 0.2),
    (r"cls_score", 3.0),
    (r"bbox_pred", 0.5),
    (r"fpn", 0.15),
]


def seeded_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values for a tensor of PyTorch (OIHW) or Caffe2, such that activations keep their size from layer to
    layer; norms of frozen statistics are near the identity, those that end a residual branch at 0.4 of it."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if re.search(r"(running_var|moving_variance)", name):
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    values = random.standard_normal(shape)
    if len(shape) < 2:
        scale = re.search(r"(bn\d|downsample\.1|(_blocks|_head)\.\d\.1)\.weight$|_bn_s$|gamma$", name)
        last = re.search(r"bn3|branch2c|_3_bn", name)
        values = (0.4 if last else 1.0) * (1 + 0.1 * values) if scale else 0.1 * values
        return values.astype(np.float32)
    gain = next((g for pattern, g in _GAINS if re.search(pattern, f"{name} {shape}")), 1.0)
    return (values * gain * np.sqrt(2.0 / np.prod(shape[1:]))).astype(np.float32)


def seeded_image(height: int, width: int) -> np.ndarray:
    """uint8 BGR [height,width,3] of blocks of 8 pixels, with some noise."""
    random = np.random.RandomState(7)
    blocks = random.randint(0, 256, (-(-height // 8), -(-width // 8), 3))
    image = blocks.repeat(8, 0).repeat(8, 1)[:height, :width] + random.randint(-20, 21, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)
