"""Parts that the losses of several branches share: usable boxes, random samples, box losses and loss weights."""

from model_box import decode_boxes, encode_boxes, generalized_iou, long_top_k
from utils.tf_v1 import tf

__all__ = ["box_losses", "loss_weights", "sample_per_image", "smooth_l1", "usable_gt"]


def usable_gt(batch):
    """bool [N,G]: real boxes that are not crowd regions."""
    return tf.logical_and(batch["gt_labels"] > 0, tf.logical_not(batch["gt_is_crowd"]))


def sample_per_image(candidates, count, image_seed, salt):
    """Indices of up to `count` random true entries in each row, in random order.

    candidates bool [N,A], N static; count int; image_seed int32 [N]: the choice depends only on the image's seed and
    `salt`, not on its place in a batch or among replicas -> index int64 [N,k], valid bool [N,k], k <= count.
    """
    total = tf.shape(candidates)[1]
    rows = [
        tf.random.stateless_uniform([total], tf.stack([image_seed[i], salt])) for i in range(int(candidates.shape[0]))
    ]
    priority = tf.where_v2(candidates, tf.stack(rows), -1.0)  # [N, A]
    best, index = long_top_k(priority, tf.minimum(count, total))
    return tf.cast(index, tf.int64), best >= 0  # GPUs leave arithmetic on int32 to the host


def smooth_l1(error, beta):
    """0.5 x²/β where |x| < β, |x| − β/2 beyond (Girshick 2015, eq. 3); β = 0 is L1. Same shape."""
    absolute = tf.abs(error)
    if beta < 1e-5:
        return absolute
    return tf.where_v2(absolute < beta, 0.5 / beta * tf.square(error), absolute - 0.5 * beta)


def box_losses(deltas, references, targets, kind, beta, weights=(1.0, 1.0, 1.0, 1.0)):
    """The loss of the boxes decoded from `deltas` and `references` against `targets`: [..., 4] each, see
    `decode_boxes`.

    kind "smooth_l1": of each delta, [..., 4]; "giou": 1 - generalised IoU of the decoded box, not clipped to the
    image, [..., 1]. A box's loss is the sum over the last axis.
    """
    if kind == "giou":
        return 1.0 - generalized_iou(decode_boxes(deltas, references, weights), targets)[..., None]
    return smooth_l1(deltas - encode_boxes(targets, references, weights), beta)


def loss_weights(members, per_image):
    """Weights [N,R] that make a sum over RoIs the mean over `members` (bool [N,R]).

    per_image: the mean of the images' means, which does not depend on how images are spread over devices; otherwise
    one mean over the whole batch. Images without members have weight 0.
    """
    weights = tf.cast(members, tf.float32)
    if per_image:
        count = tf.reduce_sum(weights, 1, keepdims=True)
        return weights / (tf.maximum(count, 1.0) * tf.cast(tf.shape(members)[0], tf.float32))
    return weights / tf.maximum(tf.reduce_sum(weights), 1.0)
