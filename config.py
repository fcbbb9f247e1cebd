"""Every setting of PackRCNN with its default and its reason, and the code that reads KEY=VAL and checks them.

A `Config` is a tree of attributes (`cfg.RPN.BATCH_PER_IM`). Keys cannot be invented: an unknown key is an error that
names the nearest known one, and a value must have the type of the default. Functions get the `cfg` they need as an
argument; there is no module-global instance.
"""

import ast
import copy
import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from common import UserError

__all__ = ["Config", "default_config", "finalize_config", "COCO_SCHEDULE_1X"]


class Config:
    """A node of the settings tree. Leaves are plain Python literals (bool, int, float, str, None, list, dict)."""

    def __init__(self, entries: dict[str, Any] | None = None):
        object.__setattr__(self, "_frozen", False)
        for key, value in (entries or {}).items():
            self.__dict__[key] = Config(value) if isinstance(value, dict) and value and key.isupper() else value

    def __setattr__(self, key: str, value: Any) -> None:
        if self._frozen:
            raise AttributeError(f"settings are frozen: {key} cannot be set now")
        if key not in self.__dict__:
            raise UserError(f"unknown setting {key}")
        self.__dict__[key] = value

    def freeze(self, frozen: bool = True) -> "Config":
        object.__setattr__(self, "_frozen", frozen)
        for value in self.__dict__.values():
            if isinstance(value, Config):
                value.freeze(frozen)
        return self

    def copy(self) -> "Config":
        return copy.deepcopy(self).freeze(False)

    # ---------------------------------------------------------------- as flat KEY -> value
    def items(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yields (dotted key, value) for every leaf, in declaration order."""
        for key, value in self.__dict__.items():
            if key == "_frozen":
                continue
            if isinstance(value, Config):
                yield from value.items(prefix + key + ".")
            else:
                yield prefix + key, value

    def to_dict(self) -> dict[str, Any]:
        """Flat {dotted key: value}; JSON-serialisable. The inverse is `update_from_dict`."""
        return dict(self.items())

    def get(self, dotted_key: str) -> Any:
        node = self
        for part in _canonical(dotted_key).split("."):
            node = node.__dict__[part]
        return node

    def set(self, dotted_key: str, value: Any, origin: str = "--config") -> None:
        """Sets one leaf after checking the key's existence and the value's type."""
        canonical = _canonical(dotted_key)
        node, parts = self, canonical.split(".")
        for part in parts[:-1]:
            node = node.__dict__.get(part)
            if not isinstance(node, Config):
                raise UserError(_unknown_key_message(dotted_key, self, origin))
        if parts[-1] not in node.__dict__ or parts[-1] == "_frozen":
            raise UserError(_unknown_key_message(dotted_key, self, origin))
        old = node.__dict__[parts[-1]]
        if isinstance(old, Config):
            inside = ", ".join(f"{canonical}.{k}" for k, _ in list(old.items())[:4])
            raise UserError(f"{origin}: {dotted_key} is a group of settings; set one of its members, e.g. {inside}")
        setattr(node, parts[-1], _coerce(canonical, old, value, origin))

    def update_args(self, args: Iterable[str], origin: str = "--config") -> "Config":
        """Applies `KEY=VAL` strings; VAL is parsed as a Python literal, otherwise taken as a string."""
        for arg in args:
            key, sep, text = arg.partition("=")
            if not sep or not key:
                raise UserError(f"{origin}: '{arg}' is not of the form KEY=VAL (e.g. MODE_FPN=True)")
            self.set(key.strip(), _parse_literal(text), origin)
        return self

    def update_from_dict(self, flat: dict[str, Any], origin: str) -> "Config":
        for key, value in flat.items():
            self.set(key, value, origin)
        return self

    def __str__(self) -> str:
        return "\n".join(f"{key}={value!r}" for key, value in self.items())


# Spellings of newer versions of the systems this one replaces -> the canonical key.
_ALIASES = {
    "BACKBONE.RESNET_NUM_BLOCKS": "BACKBONE.RESNET_NUM_BLOCK",
    "PREPROC.TRAIN_SHORT_EDGE_SIZE": "PREPROC.SHORT_EDGE_SIZE",
}

# Iterations of the "1x" schedule at a total batch of 8 images (Detectron: 90k iterations of 16 images).
COCO_SCHEDULE_1X = [120000, 160000, 180000]

_OPTIONAL_TYPES = {
    # Settings whose default is None, or that take more than one type: the types they accept besides None.
    "DATA.TRAIN": (list, str),
    "DATA.VAL": (list, str),
    "DATA.CLASS_NAMES": (list,),
    "TRAIN.LR_SCHEDULE": (list, str),
    "PREPROC.SHORT_EDGE_SIZE": (list, int),
    "PREPROC.TEST_SHORT_EDGE_SIZE": (int,),
    "TRAIN.GRADIENT_CLIP": (float,),
    "TRAIN.MAX_STEPS": (int,),
    "TRAIN.TOTAL_BATCH": (int,),
    "BACKBONE.NORM": (str,),
    "FPN.NORM": (str,),
    "TRAIN.SEED": (int,),
    "TRAIN.FREEZE_PATTERN": (str,),
    "FRCNN.BG_THRESH_HI": (float,),
}


def default_config() -> Config:
    """A fresh, unfrozen tree of the defaults below."""
    return Config(
        {
            # "replicated" = this machine's GPUs (or the CPU); "horovod" = one process per GPU, any number of machines.
            "TRAINER": "replicated",
            "MODE_MASK": True,  # Mask R-CNN instead of Faster R-CNN
            "MODE_FPN": False,  # feature pyramid instead of C4
            "MODE_KEYPOINT": False,  # keypoint branch; with MODE_FPN
            # The region proposal network alone: trains for, predicts and scores class-agnostic proposals. Switches
            # MODE_MASK, MODE_KEYPOINT and FPN.CASCADE off, whatever they are.
            "MODE_RPN_ONLY": False,
            "DATA": {
                "BASEDIR": "data/coco",  # holds annotations/ and train2017/, val2017/ (or the 2014 names)
                "TRAIN": ["coco_train2017"],  # names of one or more registered sets, concatenated
                "VAL": ["coco_val2017"],  # each is scored on its own
                # {name: [annotation json, image folder]}: any COCO-format data, paths relative to BASEDIR or absolute.
                # [format, path, split or folder, options]: the other formats of dataset_formats.py.
                "DATASETS": {},
                "SAMPLING": "uniform",  # uniform | repeat_factor (LVIS) | class_aware: for long-tailed classes
                "REPEAT_THRESHOLD": 0.001,  # repeat_factor: classes in a smaller share of the images are repeated
                "NUM_CATEGORY": 0,  # foreground classes; filled from the annotations or the checkpoint
                "CLASS_NAMES": [],  # foreground class names, class id 1 first; filled likewise
                "NUM_WORKERS": 2,  # processes that decode, augment and batch; 0 = in the training process
                "PREFETCH": 4,  # batches each worker may be ahead
                "FILTER_EMPTY": True,  # leave images without a usable object out of training
                "KEEP_MISSING_IMAGES": False,  # True: train without the images that are missing on disk
            },
            "PREPROC": {
                "SHORT_EDGE_SIZE": [800, 800],  # training: uniform in [lo, hi], or one of a list of more than two
                "MAX_SIZE": 1333,
                "TEST_SHORT_EDGE_SIZE": 800,
                "FLIP": True,  # horizontal, with probability 0.5
                # [lo, hi]: train on a part of the image whose sides are random shares of its sides, e.g. [0.6, 1.0].
                "RANDOM_CROP": [],
                # Large-scale jitter (Ghiasi et al. 2021), e.g. [0.1, 2.0]: instead of SHORT_EDGE_SIZE and MAX_SIZE the
                # image is resized to a random multiple of what fits into CROP_SIZE, of which a random part is taken.
                "SCALE_JITTER": [],
                "CROP_SIZE": [1024, 1024],  # of SCALE_JITTER: height, width
                # Objects of which a crop leaves less than this share of the box, or a pasted object less than this
                # share of the pixels, are not trained.
                "MIN_VISIBLE": 0.1,
                # Probability with which objects of another training image, in a random view of its own, are pasted
                # over an image (Simple Copy-Paste, Ghiasi et al. 2021). Needs outlines, also without MODE_MASK.
                "COPY_PASTE": 0.0,
                # 0 to 1: random brightness, contrast, saturation and hue, at 1 as strong as in SSD (Liu et al. 2016).
                "PHOTOMETRIC": 0.0,
                "PIXEL_MEAN": [123.675, 116.28, 103.53],  # R, G, B on the 0..255 scale (ImageNet)
                "PIXEL_STD": [58.395, 57.12, 57.375],
            },
            "BACKBONE": {
                # resnet: the settings below. With FPN also: keras:EfficientNetB0 or another of tf_keras.applications;
                # module:function, your own function(normalised image [N,H,W,3], cfg) -> [C2,C3,C4,C5].
                "NAME": "resnet",
                # keras: the layers of strides 4, 8, 16 and 32 that give C2 to C5; []: the last block of each stride.
                "FEATURE_LAYERS": [],
                # .npz of ImageNet weights (native or tensorpack names), for keras its …_notop.h5; "" = from scratch
                "WEIGHTS": "",
                "RESNET_NUM_BLOCK": [3, 4, 6, 3],  # ResNet-50; [3,4,23,3] = 101, [3,8,36,3] = 152
                "BLOCK": "bottleneck",  # basic: two 3x3 convolutions; [2,2,2,2] = ResNet-18, [3,4,6,3] = ResNet-34
                "NORM": "FreezeBN",  # FreezeBN | SyncBN | GN | None
                "FREEZE_AFFINE": False,  # do not train gamma and beta of frozen batch norms
                "FREEZE_AT": 2,  # 0 nothing, 1 the stem, 2 stem and first stage, … 5 everything
                "TF_PAD_MODE": False,  # TensorFlow's SAME padding (asymmetric at stride 2) instead of Caffe's symmetric
                "STRIDE_1X1": False,  # stride 2 in the first 1x1 of a bottleneck (Caffe) instead of its 3x3
                "STEM_CHANNELS": 64,  # width of conv0; a stage's output is 4 * 2^stage times it (basic: 2^stage)
                "NUM_GROUPS": 1,  # ResNeXt: 32
                "WIDTH_PER_GROUP": 64,  # ResNeXt-50 32x4d: 4; bottleneck width of stage 0 is groups * width
                "BN_EPSILON": 1e-5,
            },
            "TRAIN": {
                "BASE_LR": 0.01,  # at a total batch of 8 images
                "WARMUP": 1000,  # steps of linear warm-up, in steps of this run, from WARMUP_INIT_LR
                "WARMUP_INIT_LR": 0.01 * 0.33,  # at a total batch of 8 images
                "WEIGHT_DECAY": 1e-4,
                "MOMENTUM": 0.9,
                # step: the rate drops by 10 at the iterations of LR_SCHEDULE; cosine: half a cosine from the end of the
                # warm-up to the last of them (Loshchilov & Hutter 2017). MAX_STEPS cuts either, without changing it.
                "LR_POLICY": "step",
                "LR_FINAL": 0.0,  # cosine: the last rate, as a share of the first
                # Iterations at a total batch of 8 at which the rate drops by 10; the last is the end. '1x' … '9x'.
                "LR_SCHEDULE": "2x",
                "LR_SCALING": "linear",  # linear: rate ~ total batch, steps ~ 1 / total batch; none: as written
                "BATCH_SIZE_PER_GPU": 1,
                "CPU_REPLICAS": 1,  # replicas on logical CPU devices when there is no GPU: to try data parallelism
                "ACCUMULATION": 1,  # micro-batches whose gradients are averaged into one update
                # Images of an update, reached by accumulation on however many replicas there are, so that a run may go
                # on with more or fewer of them; a multiple of replicas * BATCH_SIZE_PER_GPU. None: what they give.
                "TOTAL_BATCH": None,
                # Losses of RoIs: mean of the images' means, so that spreading a batch over devices changes nothing;
                # False: one mean over the RoIs of a device's batch (detectron2).
                "LOSS_PER_IMAGE": True,
                # Compute type of convolutions and products: float32 | bfloat16 | float16; for comparisons float64, then
                # the type of variables too.
                "PRECISION": "float32",
                "SEED": 42,  # None: a new one each run
                "GRADIENT_CLIP": None,  # global norm to clip at
                # Decay per update of averaged weights, which are trained beside the weights and used by evaluation and
                # prediction (TEST.USE_EMA), e.g. 0.9998; in the first updates it is (1 + t) / (10 + t). 0: none.
                "EMA_DECAY": 0.0,
                "MAX_STEPS": None,  # stop after this many updates whatever the schedule says
                "STEPS_PER_EPOCH": 500,  # updates between progress summaries, checkpoints being every EPOCH too
                "EVAL_PERIOD": 50,  # evaluate every so many epochs, and at the end; 0 = never
                "CHECKPOINT_PERIOD": 1,  # epochs
                "KEEP_CHECKPOINTS": 10,
                "FREEZE_PATTERN": None,  # regular expression: variables whose names match are not trained
            },
            "RPN": {
                "ANCHOR_STRIDE": 16,  # C4
                "ANCHOR_SIZES": [32, 64, 128, 256, 512],
                "ANCHOR_RATIOS": [0.5, 1.0, 2.0],  # height / width
                # Per level a list of [x1,y1,x2,y2] around a cell's corner, instead of those of sizes and ratios: other
                # systems round and shift theirs. C4 has one level.
                "CELL_ANCHORS": [],
                # True: the distance of anchors is the padded image's side // the map's side (torchvision): at P6 not
                # the stride where P5 has an odd side.
                "STRIDE_FROM_SIZE": False,
                "POSITIVE_ANCHOR_THRESH": 0.7,
                "NEGATIVE_ANCHOR_THRESH": 0.3,
                "FG_RATIO": 0.5,  # foreground is at most this share of a batch
                "BATCH_PER_IM": 256,
                "MIN_SIZE": 0.0,  # proposals with a side of this many pixels or less are dropped
                "PROPOSAL_NMS_THRESH": 0.7,
                "CROWD_OVERLAP_THRESH": 9.99,  # anchors that overlap a crowd region this much are ignored; > 1 = off
                "TRAIN_ON_PADDING": False,  # True: anchors centred in the batch padding count as negatives (detectron2)
                "HEAD_DIM": 1024,  # C4
                # smooth_l1, of the deltas | giou: 1 - generalised IoU of the decoded boxes (Rezatofighi et al. 2019).
                "BBOX_LOSS": "smooth_l1",
                "BBOX_LOSS_WEIGHT": 1.0,
                "SMOOTH_L1_BETA": 1.0 / 9,  # 0 = L1
                "TRAIN_PRE_NMS_TOPK": 12000,  # C4, and FPN.PROPOSAL_MODE=Joint: best anchors of an image before NMS
                "TRAIN_POST_NMS_TOPK": 2000,  # and kept after it
                "TEST_PRE_NMS_TOPK": 6000,
                "TEST_POST_NMS_TOPK": 1000,
                "TRAIN_PER_LEVEL_NMS_TOPK": 2000,  # FPN.PROPOSAL_MODE=Level: kept before NMS on each level
                "TRAIN_FPN_NMS_TOPK": 2000,  # kept after NMS per image, over all levels
                "TEST_PER_LEVEL_NMS_TOPK": 1000,
                "TEST_FPN_NMS_TOPK": 1000,
            },
            "FRCNN": {
                "BATCH_PER_IM": 512,
                "FG_THRESH": 0.5,  # IoU from which a RoI is foreground (a cascade: CASCADE.IOUS)
                # IoU from which and below which a RoI is background; those in neither class are not trained on. None:
                # all below the foreground's. Fast R-CNN had 0.1 to 0.5, which prefers the hard ones (Girshick 2015).
                "BG_THRESH_LO": 0.0,
                "BG_THRESH_HI": None,
                "FG_RATIO": 0.25,  # foreground is at most this share of a batch
                "BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
                "BBOX_LOSS": "smooth_l1",  # smooth_l1 | giou, as in the RPN; of all stages of a cascade
                "BBOX_LOSS_WEIGHT": 1.0,
                "SMOOTH_L1_BETA": 1.0,  # 0 = L1
                "CLASS_AGNOSTIC": False,
                # align: RoIAlign | pool: Fast R-CNN's quantised bins and maxima | crop_and_resize: TensorFlow's samples
                # on a grid over the box, edges included, and the largest of ROI_SAMPLES^2 (detectors before RoIAlign).
                "ROI_OP": "align",
                # RoIAlign samples per bin and axis, 1 to 4. 0: as many as a bin has feature cells, rounded up, which
                # detectron2's models are trained with; in prediction alone (training then takes 2), and slower.
                "ROI_SAMPLES": 2,
                # False: without the half-pixel shift, and RoIs of one feature cell at least (Detectron, torchvision).
                "ROI_ALIGNED": True,
                # Background RoIs that a crowd region covers this much are not trained on; > 1 = off
                "CROWD_OVERLAP_THRESH": 9.99,
                # True: a class takes part in an image's softmax only if people looked for it there, and a box with
                # several labels is each of them. For Open Images and LVIS, whose images are annotated for some classes.
                "FEDERATED_LOSS": False,
                # True: RoIs end at x2 - 1, y2 - 1, the index of their last pixel (Detectron, maskrcnn-benchmark).
                "ROI_TO_LAST_PIXEL": False,
            },
            "FPN": {
                "ANCHOR_STRIDES": [4, 8, 16, 32, 64],
                # Level: top-k and NMS on each level, then the best of all (Detectron) | Joint: one top-k and one NMS
                # over the anchors of all levels, by RPN.*_PRE_NMS_TOPK and RPN.*_POST_NMS_TOPK (tensorpack).
                "PROPOSAL_MODE": "Level",
                "NUM_CHANNEL": 256,
                "NORM": None,  # None | GN
                # True: pyramid and gn heads have biases, and normalise after the ReLU (tensorpack's GN models).
                "GN_AFTER_RELU": False,
                "FRCNN_HEAD_FUNC": "fastrcnn_2fc_head",
                "FRCNN_CONV_HEAD_DIM": 256,
                "FRCNN_FC_HEAD_DIM": 1024,
                "MRCNN_HEAD_FUNC": "maskrcnn_up4conv_head",
                "CASCADE": False,
            },
            "MRCNN": {
                "HEAD_DIM": 256,
                "LOSS_WEIGHT": 1.0,
            },
            "KRCNN": {
                "NUM_KEYPOINT": 17,  # per object; COCO's persons have 17
                "HEAD_DIM": 512,
                "LOSS_WEIGHT": 1.0,
            },
            "CASCADE": {
                "IOUS": [0.5, 0.6, 0.7],
                "BBOX_REG_WEIGHTS": [[10.0, 10.0, 5.0, 5.0], [20.0, 20.0, 10.0, 10.0], [30.0, 30.0, 15.0, 15.0]],
            },
            "TEST": {
                "BATCH_SIZE": 1,
                "USE_EMA": True,  # averaged weights (TRAIN.EMA_DECAY) where the model has them; also by --load to train
                # hard: a box is dropped where a better one of its class overlaps it more than FRCNN_NMS_THRESH.
                # soft_linear, soft_gaussian: its score is lowered instead, times 1 - IoU beyond that threshold, or
                # times exp(-IoU^2 / SOFT_NMS_SIGMA) (Bodla et al. 2017).
                "NMS": "hard",
                "NMS_CLASS_AGNOSTIC": False,  # True: boxes of different classes suppress each other too
                "FRCNN_NMS_THRESH": 0.5,
                "SOFT_NMS_SIGMA": 0.5,
                "RESULT_SCORE_THRESH": 0.05,  # boxes enter NMS with scores above it
                # Lowered scores count down to here (or to RESULT_SCORE_THRESH, if that is lower).
                "SOFT_NMS_MIN_SCORE": 0.001,
                "RESULT_SCORE_THRESH_VIS": 0.5,  # what pictures show
                "RESULTS_PER_IM": 100,
                # Test-time augmentation of --predict and --evaluate, e.g. [400,600,800,1000,1200]: each image is looked
                # at with these short edges instead of TEST_SHORT_EDGE_SIZE, and what was seen is merged (tta.py).
                # Evaluations while training look once. The features of all views of a batch wait in host memory.
                "AUG_SHORT_EDGES": [],
                "AUG_MAX_SIZE": 4000,  # long edge of a view at most
                "AUG_FLIP": True,  # with AUG_SHORT_EDGES: each of them mirrored too
            },
        }
    )


_CHOICES = {
    "TRAINER": ["replicated", "horovod"],
    "DATA.SAMPLING": ["uniform", "repeat_factor", "class_aware"],
    "BACKBONE.BLOCK": ["bottleneck", "basic"],
    "BACKBONE.NORM": ["FreezeBN", "SyncBN", "GN", None],
    "FPN.NORM": ["GN", None],
    "FPN.PROPOSAL_MODE": ["Level", "Joint"],
    "RPN.BBOX_LOSS": ["smooth_l1", "giou"],
    "FRCNN.BBOX_LOSS": ["smooth_l1", "giou"],
    "FRCNN.ROI_OP": ["align", "pool", "crop_and_resize"],
    "FPN.FRCNN_HEAD_FUNC": ["fastrcnn_2fc_head", "fastrcnn_4conv1fc_head", "fastrcnn_4conv1fc_gn_head"],
    "FPN.MRCNN_HEAD_FUNC": ["maskrcnn_up4conv_head", "maskrcnn_up4conv_gn_head"],
    "TEST.NMS": ["hard", "soft_linear", "soft_gaussian"],
    "TRAIN.PRECISION": ["float32", "bfloat16", "float16", "float64"],
    "TRAIN.LR_SCALING": ["linear", "none"],
    "TRAIN.LR_POLICY": ["step", "cosine"],
}


def finalize_config(cfg: Config) -> Config:
    """Checks the settings against each other, fills in derived forms, freezes and returns `cfg`.

    After it: DATA.TRAIN and DATA.VAL are lists, PREPROC.SHORT_EDGE_SIZE is a list, TRAIN.LR_SCHEDULE is a list; with
    MODE_RPN_ONLY the branches of the second stage are off.
    """

    def check(good: bool, key: str, wants: str) -> None:
        if not good:
            raise UserError(f"setting {key}={cfg.get(key)!r}: {wants}")

    cfg.freeze(False)
    if cfg.MODE_RPN_ONLY:
        cfg.MODE_MASK = cfg.MODE_KEYPOINT = cfg.FPN.CASCADE = False
    for key, choices in _CHOICES.items():
        value = cfg.get(key)
        if value not in choices:
            near = difflib.get_close_matches(str(value), [str(c) for c in choices], 1, 0.4)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"setting {key}={value!r}: must be one of {', '.join(map(str, choices))}{hint}")
    for key in ("DATA.TRAIN", "DATA.VAL"):
        value = cfg.get(key)
        cfg.set(key, [] if value is None or value == "" else [value] if isinstance(value, str) else value)
    for name, entry in cfg.DATA.DATASETS.items():
        texts = isinstance(entry, list) and all(isinstance(e, str) for e in entry)
        # A list that starts with a word, not a file, names another format (dataset_formats.py).
        if not (texts and len(entry) >= 2 and (len(entry) == 2 or not entry[0].endswith(".json"))):
            raise UserError(f"setting DATA.DATASETS: '{name}' must map to ['annotations.json', 'image folder']")
    edges = cfg.PREPROC.SHORT_EDGE_SIZE
    edges = [edges, edges] if isinstance(edges, int) else list(edges)
    cfg.PREPROC.SHORT_EDGE_SIZE = [edges[0]] * 2 if len(edges) == 1 else edges
    check(len(edges) > 0 and min(edges) >= 16, "PREPROC.SHORT_EDGE_SIZE", "sizes are pixels, 16 or more")
    check(max(edges) <= cfg.PREPROC.MAX_SIZE, "PREPROC.MAX_SIZE", "must be at least the largest short edge")
    check(cfg.PREPROC.TEST_SHORT_EDGE_SIZE >= 16, "PREPROC.TEST_SHORT_EDGE_SIZE", "a number of pixels, 16 or more")
    _check_augmentation(cfg, check)
    schedule = cfg.TRAIN.LR_SCHEDULE
    if isinstance(schedule, str):
        good = len(schedule) == 2 and schedule[0] in "123456789" and schedule[1] == "x"
        check(good, "TRAIN.LR_SCHEDULE", "'1x' … '9x', or a list of iterations like [120000,160000,180000]")
        factor = int(schedule[0])
        last = COCO_SCHEDULE_1X[-1] * factor
        # Long schedules spend the extra time at the first rate (He et al., Rethinking ImageNet Pre-training, 2018).
        cfg.TRAIN.LR_SCHEDULE = (
            [v * factor for v in COCO_SCHEDULE_1X] if factor <= 2 else [last - 120000, last - 40000, last]
        )
    milestones = cfg.TRAIN.LR_SCHEDULE
    check(
        len(milestones) > 0
        and all(isinstance(m, int) and m > 0 for m in milestones)
        and milestones == sorted(set(milestones)),
        "TRAIN.LR_SCHEDULE",
        "iterations must be positive and increasing",
    )
    check(0 <= cfg.TRAIN.LR_FINAL <= 1, "TRAIN.LR_FINAL", "a share of the first rate, 0 to 1")
    check(0 <= cfg.TRAIN.EMA_DECAY < 1, "TRAIN.EMA_DECAY", "0 (none) or a decay below 1, e.g. 0.9998")
    for key in (
        "TRAIN.BATCH_SIZE_PER_GPU",
        "TRAIN.CPU_REPLICAS",
        "TRAIN.ACCUMULATION",
        "TEST.BATCH_SIZE",
        "TEST.RESULTS_PER_IM",
        "TRAIN.STEPS_PER_EPOCH",
    ):
        check(cfg.get(key) >= 1, key, "must be 1 or more")
    total = cfg.TRAIN.TOTAL_BATCH
    check(total is None or total >= 1, "TRAIN.TOTAL_BATCH", "a number of images, or None")
    check(
        total is None or cfg.TRAIN.ACCUMULATION == 1,
        "TRAIN.ACCUMULATION",
        "follows from TRAIN.TOTAL_BATCH: set it to 1",
    )
    for key in ("TEST.RESULT_SCORE_THRESH", "TEST.SOFT_NMS_MIN_SCORE"):
        check(0 <= cfg.get(key) < 1, key, "a score, from 0 to below 1")
    check(0 <= cfg.TEST.FRCNN_NMS_THRESH <= 1, "TEST.FRCNN_NMS_THRESH", "an overlap, from 0 to 1")
    check(cfg.TEST.SOFT_NMS_SIGMA > 0, "TEST.SOFT_NMS_SIGMA", "must be above 0")
    edges = cfg.TEST.AUG_SHORT_EDGES
    check(all(type(e) is int and e >= 16 for e in edges), "TEST.AUG_SHORT_EDGES", "a list of pixels, 16 or more each")
    check(not (edges and cfg.MODE_RPN_ONLY), "TEST.AUG_SHORT_EDGES", "must be [] with MODE_RPN_ONLY: nothing is merged")
    check(max(edges, default=0) <= cfg.TEST.AUG_MAX_SIZE, "TEST.AUG_MAX_SIZE", "at least the largest short edge")
    check(0 <= cfg.BACKBONE.FREEZE_AT <= 5, "BACKBONE.FREEZE_AT", "must be 0 to 5")
    check(len(cfg.BACKBONE.RESNET_NUM_BLOCK) == 4, "BACKBONE.RESNET_NUM_BLOCK", "four numbers, e.g. [3,4,6,3]")
    if cfg.BACKBONE.NAME != "resnet":
        _check_other_backbone(cfg, check)
    if cfg.BACKBONE.BLOCK == "basic":
        check(cfg.BACKBONE.NUM_GROUPS == 1, "BACKBONE.NUM_GROUPS", "BACKBONE.BLOCK=basic has no groups, must be 1")
        wants = "BACKBONE.BLOCK=basic is as wide as BACKBONE.STEM_CHANNELS says, must be 64"
        check(cfg.BACKBONE.WIDTH_PER_GROUP == 64, "BACKBONE.WIDTH_PER_GROUP", wants)
        check(not cfg.BACKBONE.STRIDE_1X1, "BACKBONE.STRIDE_1X1", "BACKBONE.BLOCK=basic has no 1x1, must be False")
    if cfg.BACKBONE.NORM == "GN":
        wants = "BACKBONE.NORM=GN needs a multiple of 32 channels"
        check(cfg.BACKBONE.STEM_CHANNELS % 32 == 0, "BACKBONE.STEM_CHANNELS", wants)
    check(len(cfg.PREPROC.PIXEL_MEAN) == 3, "PREPROC.PIXEL_MEAN", "three numbers: R, G, B")
    check(len(cfg.PREPROC.PIXEL_STD) == 3 and min(cfg.PREPROC.PIXEL_STD) > 0, "PREPROC.PIXEL_STD", "three numbers > 0")
    if cfg.MODE_FPN:
        sizes, strides = cfg.RPN.ANCHOR_SIZES, cfg.FPN.ANCHOR_STRIDES
        check(len(sizes) == len(strides), "RPN.ANCHOR_SIZES", f"needs one size for each of the strides {strides}")
    if cfg.RPN.CELL_ANCHORS:
        _check_cell_anchors(cfg)
    _check_sampling(cfg, check)
    for key in ("RPN.BBOX_LOSS_WEIGHT", "FRCNN.BBOX_LOSS_WEIGHT"):
        check(cfg.get(key) >= 0, key, "must be 0 or more")
    check(0 <= cfg.FRCNN.ROI_SAMPLES <= 4, "FRCNN.ROI_SAMPLES", "1 to 4, or 0 for the size of a bin")
    adaptive_crops = cfg.FRCNN.ROI_OP == "crop_and_resize" and cfg.FRCNN.ROI_SAMPLES == 0
    check(not adaptive_crops, "FRCNN.ROI_SAMPLES", "must be 1 to 4 with FRCNN.ROI_OP=crop_and_resize")
    check(not cfg.FPN.CASCADE or cfg.MODE_FPN, "FPN.CASCADE", "needs MODE_FPN=True")
    check(not cfg.MODE_KEYPOINT or cfg.MODE_FPN, "MODE_KEYPOINT", "needs MODE_FPN=True")
    check(cfg.KRCNN.NUM_KEYPOINT >= 1, "KRCNN.NUM_KEYPOINT", "must be 1 or more")
    check(
        len(cfg.CASCADE.IOUS) == len(cfg.CASCADE.BBOX_REG_WEIGHTS),
        "CASCADE.BBOX_REG_WEIGHTS",
        "needs one group of four per stage of CASCADE.IOUS",
    )
    return cfg.freeze()


def _check_augmentation(cfg: Config, check: Callable[[bool, str, str], None]) -> None:
    preproc = cfg.PREPROC

    def is_range(values: list, most: float) -> bool:
        numbers = len(values) == 2 and all(type(v) in (int, float) for v in values)
        return not values or (numbers and 0 < values[0] <= values[1] <= most)

    check(is_range(preproc.RANDOM_CROP, 1), "PREPROC.RANDOM_CROP", "[lo,hi] with 0 < lo <= hi <= 1, or [] for none")
    check(is_range(preproc.SCALE_JITTER, 100), "PREPROC.SCALE_JITTER", "[lo,hi] with 0 < lo <= hi, or [] for none")
    size = preproc.CROP_SIZE
    check(
        len(size) == 2 and all(type(v) is int and v >= 16 for v in size),
        "PREPROC.CROP_SIZE",
        "height and width in pixels, 16 or more",
    )
    check(0 <= preproc.MIN_VISIBLE < 1, "PREPROC.MIN_VISIBLE", "a share, 0 or more and below 1")
    check(0 <= preproc.COPY_PASTE <= 1, "PREPROC.COPY_PASTE", "a probability, 0 to 1")
    check(0 <= preproc.PHOTOMETRIC <= 1, "PREPROC.PHOTOMETRIC", "a strength, 0 to 1")


def _check_sampling(cfg: Config, check: Callable[[bool, str, str], None]) -> None:
    """Which anchors and RoIs are trained on, and how many proposals there are."""
    for group in ("RPN", "FRCNN"):
        check(cfg.get(f"{group}.BATCH_PER_IM") >= 1, f"{group}.BATCH_PER_IM", "must be 1 or more")
        check(0 < cfg.get(f"{group}.FG_RATIO") <= 1, f"{group}.FG_RATIO", "a share, above 0 and up to 1")
    for phase in ("TRAIN", "TEST"):
        for name in ("PRE_NMS", "POST_NMS", "PER_LEVEL_NMS", "FPN_NMS"):
            key = f"RPN.{phase}_{name}_TOPK"
            check(cfg.get(key) >= 1, key, "must be 1 or more")
    check(0 <= cfg.RPN.PROPOSAL_NMS_THRESH <= 1, "RPN.PROPOSAL_NMS_THRESH", "an overlap, from 0 to 1")
    low, high = cfg.RPN.NEGATIVE_ANCHOR_THRESH, cfg.RPN.POSITIVE_ANCHOR_THRESH
    check(0 <= low <= high <= 1, "RPN.NEGATIVE_ANCHOR_THRESH", f"from 0 to RPN.POSITIVE_ANCHOR_THRESH={high}, up to 1")
    foreground, name = cfg.FRCNN.FG_THRESH, "FRCNN.FG_THRESH"
    check(0 < foreground <= 1, name, "an overlap, above 0 and up to 1")
    if cfg.FPN.CASCADE:
        foreground, name = cfg.CASCADE.IOUS[0], "the first of CASCADE.IOUS"
    high = foreground if cfg.FRCNN.BG_THRESH_HI is None else cfg.FRCNN.BG_THRESH_HI
    check(0 < high <= foreground, "FRCNN.BG_THRESH_HI", f"an overlap above 0, up to {name} ({foreground}), or None")
    check(0 <= cfg.FRCNN.BG_THRESH_LO < high, "FRCNN.BG_THRESH_LO", f"an overlap, from 0 to below {high}")


def _check_other_backbone(cfg: Config, check: Callable[[bool, str, str], None]) -> None:
    """What can be said about BACKBONE.NAME without building it; model_backbones.check_backbone says the rest."""
    backbone = cfg.BACKBONE
    kind, colon, name = backbone.NAME.partition(":")
    check(bool(kind and colon and name), "BACKBONE.NAME", "must be resnet, keras:NETWORK or module:function")
    check(cfg.MODE_FPN, "BACKBONE.NAME", "only ResNets have a C4 model; set MODE_FPN=True")
    layers = backbone.FEATURE_LAYERS
    if kind != "keras":
        check(layers == [], "BACKBONE.FEATURE_LAYERS", "is for keras networks, must be []")
        check(
            backbone.FREEZE_AT == 0,
            "BACKBONE.FREEZE_AT",
            "must be 0: a function of your own freezes with trainable=False, or name variables in TRAIN.FREEZE_PATTERN",
        )
        return
    named = all(isinstance(layer, str) for layer in layers)
    check(len(layers) in (0, 4) and named, "BACKBONE.FEATURE_LAYERS", "four layers' names, or [] for the usual ones")
    wants = "keras networks have their own norms: FreezeBN (statistics of the weights) or SyncBN (of the batch)"
    check(backbone.NORM in ("FreezeBN", "SyncBN"), "BACKBONE.NORM", wants)
    double = backbone.NORM == "SyncBN" and cfg.TRAIN.PRECISION == "float64"
    check(not double, "TRAIN.PRECISION", "keras networks with BACKBONE.NORM=SyncBN compute in float32 or less")
    defaults = default_config()
    for key in (
        "BACKBONE.RESNET_NUM_BLOCK", "BACKBONE.BLOCK", "BACKBONE.TF_PAD_MODE", "BACKBONE.STRIDE_1X1",
        "BACKBONE.STEM_CHANNELS", "BACKBONE.NUM_GROUPS", "BACKBONE.WIDTH_PER_GROUP", "BACKBONE.BN_EPSILON",
        "PREPROC.PIXEL_MEAN", "PREPROC.PIXEL_STD",
    ):  # fmt: skip
        wants = f"is for ResNets, {backbone.NAME} brings its own; leave it at {defaults.get(key)}"
        check(cfg.get(key) == defaults.get(key), key, wants)


def _check_cell_anchors(cfg: Config) -> None:
    """RPN.CELL_ANCHORS must be lists of boxes, as many of each level as sizes and ratios ask for."""
    rpn = cfg.RPN
    levels = len(cfg.FPN.ANCHOR_STRIDES) if cfg.MODE_FPN else 1
    per_cell = len(rpn.ANCHOR_RATIOS) * (1 if cfg.MODE_FPN else len(rpn.ANCHOR_SIZES))
    wants = f"{levels} list{'s' * (levels > 1)} (one per level) of {per_cell} [x1,y1,x2,y2] with x1 < x2 and y1 < y2"

    def is_box(box: Any) -> bool:
        numbers = isinstance(box, list) and all(type(v) in (int, float) and math.isfinite(v) for v in box)
        return numbers and len(box) == 4 and box[0] < box[2] and box[1] < box[3]

    cells = rpn.CELL_ANCHORS
    if len(cells) != levels or not all(
        isinstance(level, list) and len(level) == per_cell and all(map(is_box, level)) for level in cells
    ):
        shown = repr(cells) if len(repr(cells)) < 80 else f"{repr(cells)[:77]}..."
        raise UserError(f"setting RPN.CELL_ANCHORS={shown}: needs {wants}; or [] for those of RPN.ANCHOR_SIZES")


def _canonical(key: str) -> str:
    return _ALIASES.get(key, key)


def _unknown_key_message(key: str, root: Config, origin: str) -> str:
    known = [k for k, _ in root.items()] + list(_ALIASES)
    near = difflib.get_close_matches(key, known, 1, 0.5) or difflib.get_close_matches(
        key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in known], 1, 0.5
    )
    if near and near[0] not in known:
        near = [k for k in known if k.rsplit(".", 1)[-1] == near[0]]
    hint = f"; did you mean {near[0]}?" if near else "; --print-config lists them all"
    return f"{origin}: unknown setting {key}{hint}"


def _parse_literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _coerce(key: str, old: Any, value: Any, origin: str) -> Any:
    """The value in the type of the default `old`; UserError when that is not possible."""
    value = _plain(value)
    accepted = _OPTIONAL_TYPES.get(key)
    if accepted is not None:
        if value is None or type(value) in accepted:
            return value
        if float in accepted and type(value) is int:
            return float(value)
        wants = " or ".join(["None"] + [t.__name__ for t in accepted])
        raise UserError(f"{origin}: {key}={value!r} must be {wants}")
    if isinstance(old, bool):
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
    elif isinstance(old, int):
        if type(value) is int:
            return value
        if type(value) is float and value.is_integer():
            return int(value)
    elif isinstance(old, float):
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif isinstance(old, str):
        if isinstance(value, str):
            return value
    elif isinstance(old, (list, dict)) and type(value) is type(old):
        return value
    raise UserError(f"{origin}: {key}={value!r} must be {type(old).__name__}, like the default {old!r}")


def _plain(value: Any) -> Any:
    """Tuples as lists, recursively, so that a setting survives JSON unchanged."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def dump_json(cfg: Config) -> str:
    return json.dumps(cfg.to_dict(), indent=1)
