"""model_syncbn.py under Horovod: ranks together equal one process with the joined batch, forward and backward."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("horovod", reason="horovod is not installed: make horovod")

from jobs import CLEAN, HOROVODRUN, REPOSITORY
from test_model_syncbn import GRADIENT, PIXELS, VALID, X, assert_close, run

ENVIRONMENT = {**CLEAN, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}

PROGRAM = """
import sys
import numpy as np
from test_model_syncbn import GRADIENT, VALID, differently_padded, normalised
from utils import ranks
from utils.tf_v1 import tf

rank, size = ranks.start()
hvd = ranks.horovod()
x, gradient, pixels = differently_padded(GRADIENT * VALID[..., None])[1][rank]
y, dx, parameters = normalised(x, gradient, lambda t: hvd.allreduce(t, op=hvd.Sum), pixels)
averages = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    y, dx, parameters, averages = session.run([y, dx, parameters, averages])
np.savez(f"{sys.argv[1]}/{rank}.npz", y=y, dx=dx, parameters=parameters, averages=averages)
"""


def test_ranks_with_other_padding_equal_the_joined_batch(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [*HOROVODRUN, "--gloo", "-np", "2", "-H", "localhost:2"]
    done = subprocess.run(
        [*launcher, sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (dict(np.load(tmp_path / f"{rank}.npz")) for rank in (0, 1))
    (y,), (dx,), parameters, [averages] = run((X, GRADIENT * VALID[..., None], PIXELS))
    for name, want in (("y", y), ("dx", dx)):
        assert_close(first[name][0], want[0, :4, :5])
        assert_close(second[name][VALID[1:]], want[1:][VALID[1:]])
    assert_close(first["parameters"] + second["parameters"], parameters)
    assert_close(first["averages"], averages)
    np.testing.assert_array_equal(first["averages"], second["averages"])
