"""utils/ranks.py as far as one process can tell; tests/distributed has the rest."""

import pytest

from utils import ranks
from utils.tf_v1 import tf


@pytest.mark.quick
@pytest.mark.parametrize(
    "message",
    [
        "Horovod has been shut down. This was caused by an exception on one of the ranks",
        "[/build/gloo/transport/tcp/pair.cc:589] Read error [10.0.0.2]:1246: Connection reset by peer",
        "NCCL async error: remote process exited or there was a network error",
        "ncclAllReduce failed: unhandled system error (run with NCCL_DEBUG=INFO for details)",
    ],
)
def test_a_reduction_without_a_rank_that_is_gone_is_told_in_one_line(message):
    with pytest.raises(ranks.LostRank, match="another process"), ranks.lost_rank_in_one_line(2):
        raise tf.errors.UnknownError(None, None, message)


@pytest.mark.quick
def test_other_failures_of_a_rank_keep_their_traceback():
    with pytest.raises(tf.errors.OpError, match="out of memory"), ranks.lost_rank_in_one_line(2):
        raise tf.errors.ResourceExhaustedError(None, None, "out of memory")
