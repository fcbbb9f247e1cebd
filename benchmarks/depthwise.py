"""Times depthwise convolutions of EfficientNet-Lite0 on the CPU, forward and for both gradients.

    python benchmarks/depthwise.py

Forms: TensorFlow's depthwise operation with TensorFlow's gradient; the same with this project's gradient; a grouped
convolution; a sum of shifted products. Two images of 256 x 320; every depthwise layer of the network once. Each
operation is timed alone, the best of five runs counts.
"""

import import_path

import time

import numpy as np
from tabulate import tabulate

from basemodel import grouped_conv
from utils.efficientnet_lite import blocks
from utils.tf_v1 import tf

__all__ = ["main"]

IMAGES, HEIGHT, WIDTH = 2, 256, 320


def tensorflow(x, kernel, stride):
    kernel = tf.transpose(kernel, [0, 1, 3, 2])
    return tf.nn.depthwise_conv2d(x, kernel, [1, stride, stride, 1], "SAME")


def project(x, kernel, stride):
    return grouped_conv(x, kernel, stride, "SAME", int(x.shape[3]))


def grouped(x, kernel, stride):
    return tf.nn.conv2d(x, kernel, strides=stride, padding="SAME")


def shifted(x, kernel, stride):
    k = int(kernel.shape[0])
    sides = [-(-int(side) // stride) for side in x.shape[1:3]]
    missing = [max((o - 1) * stride + k - int(side), 0) for o, side in zip(sides, x.shape[1:3])]
    x = tf.pad(x, [[0, 0], *([m // 2, m - m // 2] for m in missing), [0, 0]])
    rows, columns = ((o - 1) * stride + 1 for o in sides)
    return tf.add_n(
        [
            x[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j, 0]
            for i in range(k)
            for j in range(k)
        ]
    )  # fmt: skip


FORMS = {"TensorFlow": tensorflow, "this project": project, "grouped": grouped, "shifted products": shifted}


def layers():
    """(height, width, channels, kernel, stride) of each depthwise layer."""
    height, width = HEIGHT // 2, WIDTH // 2
    for block in blocks("efficientnet_lite0"):
        yield height, width, block.inner, block.kernel, block.stride
        height, width = height // block.stride, width // block.stride


def milliseconds(session, operation):
    session.run(operation)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        session.run(operation)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def measure(form, layer, dtype):
    """Milliseconds of the forward pass, the gradient of the input and the gradient of the filter."""
    height, width, channels, kernel, stride = layer
    random, kind = np.random.RandomState(0), tf.as_dtype(dtype).as_numpy_dtype
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(0)
        x = tf.Variable(random.standard_normal([IMAGES, height, width, channels]).astype(kind))
        filters = tf.Variable(random.standard_normal([kernel, kernel, 1, channels]).astype(kind))
        y = FORMS[form](x, filters, stride)
        dy = tf.Variable(random.standard_normal(y.shape.as_list()).astype(kind))
        parts = [y, *(tf.gradients(y, [v], [dy])[0] for v in (x, filters))]
        session.run(tf.global_variables_initializer())
        return [milliseconds(session, part.op) for part in parts]


def main():
    for dtype in ("float32", "bfloat16"):
        totals = {form: np.sum([measure(form, layer, dtype) for layer in layers()], 0) for form in FORMS}
        rows = [[form, *(round(v, 1) for v in total), round(total.sum(), 1)] for form, total in totals.items()]
        headers = [f"{dtype}, ms", "forward", "input gradient", "filter gradient", "sum"]
        print(tabulate(rows, headers, "github"), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
