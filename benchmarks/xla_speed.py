"""What XLA makes of a training step: backbone and pyramid, with their gradients, compiled by it or not.

  python benchmarks/xla_speed.py                    R50-FPN, short edge 256
  python benchmarks/xla_speed.py --parts backbone heads

Both steps start from the same weights and are timed in alternation in one process. The rest of a step cannot be
compiled: proposals, sampling and the RoIs of a level have sizes that depend on values. Each new size of a padded image
compiles anew, so first steps are reported too. The programs' CPU seconds stand beside the time on the clock.
"""

import import_path

import argparse
import functools
import sys
import time

import numpy as np
from tabulate import tabulate

# Functions of model_rcnn.py whose operations are marked for compilation.
PARTS = {"backbone": ["backbone_features"], "heads": ["rpn_head", "fastrcnn_head", "mask_head"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, choices=(256, 800))
    parser.add_argument("--parts", nargs="+", default=["backbone"], choices=PARTS)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    import model_rcnn
    from benchmarks.train_speed import CASES, synthetic_batch, training_step
    from utils.tf_v1 import tf

    def compiled(function):
        @functools.wraps(function)
        def call(*arguments, **options):
            with tf.xla.experimental.jit_scope(separate_compiled_gradients=True):
                return function(*arguments, **options)

        return call

    size, settings = CASES[args.size]
    batch = synthetic_batch(1, *size)
    sessions, weights, rows = {}, {}, []
    for kind in ("ordinary", "compiled"):
        if kind == "compiled":
            for name in (n for part in args.parts for n in PARTS[part]):
                setattr(model_rcnn, name, compiled(getattr(model_rcnn, name)))
        with tf.Graph().as_default():
            pairs, update, _ = training_step(["MODE_FPN=True", *settings], batch)
            norm = tf.linalg.global_norm([tf.convert_to_tensor(g) for g, _ in pairs])
            session = tf.Session()
            session.run(tf.global_variables_initializer())
            if weights:  # random numbers inside a compiled part are others
                for variable in tf.global_variables():
                    variable.load(weights[variable.op.name], session)
            else:
                weights = session.run({v.op.name: v for v in tf.global_variables()})
            clock, cpu = time.perf_counter(), time.process_time()
            first_norm = session.run((norm, update))[0]
            rows.append([kind, first_norm, time.perf_counter() - clock, time.process_time() - cpu])
            session.run(update)
            sessions[kind] = session, update
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in sessions}
    for _ in range(args.rounds):
        for kind, (session, update) in sessions.items():
            clock, cpu = time.perf_counter(), time.process_time()
            session.run(update)
            times[kind].append((time.perf_counter() - clock, time.process_time() - cpu))
    for row in rows:
        row += np.median(times[row[0]], 0).tolist()
    rows.append(["compiled / ordinary", *(b / a for a, b in zip(rows[0][1:], rows[1][1:]))])
    headers = ["", "gradient norm", "first step s", "its CPU s", "step s", "its CPU s"]
    print(tabulate(rows, headers, "github", floatfmt=".4g"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
