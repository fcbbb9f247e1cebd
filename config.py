"""All settings of PackRCNN: defaults, allowed values and meaning; then how settings depend on each other.

To add a setting, add one line to SETTINGS and run `python tools/settings_doc.py`. The checks, `--print-config` and
docs/SETTINGS.md come from that line. The functions that describe values (`whole`, `number`, `one_of`, …) are in
config_check.py. RELATIONS states how settings depend on each other.

A `Config` holds the values as attributes (`cfg.RPN.BATCH_PER_IM`). Functions get the `cfg` they need as an argument;
there is no instance of the module.
"""

import copy
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from common import UserError
from config_check import (
    Setting,
    anchors,
    automatic,
    backbone,
    class_names,
    datasets,
    edges,
    either,
    exactly,
    flag,
    function_or,
    list_of,
    metric,
    names,
    number,
    one_of,
    optional,
    pairs,
    parse_literal,
    pattern,
    pixels,
    read_value,
    schedule,
    shown,
    span,
    steps,
    targets,
    text,
    whole,
)
from config_names import ALIASES, unknown_key
from utils.efficientnet_lite import NETWORKS as LITE

__all__ = [
    "DOUBTS", "PREDICTION_RELATIONS", "RELATIONS", "SETTINGS", "TRAINING_DOUBTS", "TRAINING_RELATIONS", "Config",
    "default_config", "doubts", "explain", "finalize_config",
]  # fmt: skip

# Values that several settings take.
_COUNT = whole(1, 10**6)
_CHANNELS = whole(1, 65536)
_RATE = number(0, 100)
_PATH = text("a path")
_PATH_OR_NONE = either(one_of(""), _PATH, 'a path, or "" for none')
_SHARE = number(0, 1)
_OVERLAP = number(0, 1)
_SCORE = number(0, below=1)
_WEIGHT = number(0, 10**6)
_ROI_SIZE = whole(1, 64)
_BOX_LOSS = one_of("smooth_l1", "giou")
_RGB = "a list of three numbers, for R, G and B"
_FOUR_WEIGHTS = list_of(number(0.01, 1000), 4, says="a list of four numbers from 0.01 to 1000")

# -------------------------------------------------------------------------------------------------------- the settings
SETTINGS: dict[str, Setting] = {
    "TRAINER": Setting(
        "replicated", one_of("replicated", "horovod"),
        "replicated: the GPUs of this machine, or its CPU. horovod: one process per GPU, on any number of machines.",
    ),
    "MODE_MASK": Setting(True, flag, "Mask R-CNN instead of Faster R-CNN."),
    "MODE_FPN": Setting(False, flag, "Feature pyramid network instead of C4."),
    "MODE_KEYPOINT": Setting(False, flag, "Adds the keypoint branch."),
    "MODE_RPN_ONLY": Setting(
        False, flag,
        "The region proposal network alone: trains for, predicts and scores class-agnostic proposals. Turns MODE_MASK, "
        "MODE_KEYPOINT and FPN.CASCADE off.",
    ),
    # ------------------------------------------------------------------------------------------------------------ data
    "DATA.BASEDIR": Setting(
        "data/coco", _PATH, "Folder with annotations/ and train2017/, val2017/ (or the 2014 names)."
    ),
    "DATA.TRAIN": Setting(["coco_train2017"], names, "Data sets to train on; several are concatenated."),
    "DATA.VAL": Setting(["coco_val2017"], names, "Data sets to evaluate on; each is scored on its own."),
    "DATA.DATASETS": Setting(
        {}, datasets,
        "Your own data sets by name, for DATA.TRAIN and DATA.VAL. COCO format: [annotation json, image folder], paths "
        "relative to DATA.BASEDIR or absolute. Other formats: [format, path, split or folder]. Options come last, "
        "e.g. 'normalised=True' for boxes in 0..1.",
        names_code=True,
    ),
    "DATA.SAMPLING": Setting(
        "uniform", one_of("uniform", "repeat_factor", "class_aware"),
        "How often an image is seen. repeat_factor (LVIS) and class_aware show rare classes more often.",
    ),
    "DATA.REPEAT_THRESHOLD": Setting(
        0.001, number(above=0, high=1),
        "DATA.SAMPLING=repeat_factor: classes found in a smaller share of the images are repeated.",
    ),
    "DATA.NUM_CATEGORY": Setting(
        0, whole(0, 100000), "Number of foreground classes; filled in from the annotations or the checkpoint."
    ),
    "DATA.CLASS_NAMES": Setting(
        [], class_names,
        "Names of the foreground classes, class id 1 first; filled in from the annotations or the checkpoint.",
    ),
    "DATA.NUM_WORKERS": Setting(
        2, whole(0, 256), "Processes that decode, augment and batch images; 0 does this in the training process."
    ),
    "DATA.PREFETCH": Setting(4, whole(1, 255), "Batches that each worker prepares in advance."),
    "DATA.WORKER_TIMEOUT": Setting(
        300.0, number(1), "Seconds after which a worker that delivers nothing is replaced; its successor must deliver."
    ),
    "DATA.FILTER_EMPTY": Setting(True, flag, "Leaves images without a usable object out of training."),
    "DATA.KEEP_MISSING_IMAGES": Setting(
        False, flag, "True: images missing on disk are left out of training. False: they stop the start of a run."
    ),
    # --------------------------------------------------------------------------------------- image sizes, augmentation
    "PREPROC.SHORT_EDGE_SIZE": Setting(
        [800, 800], edges,
        "Short edge of training images: drawn from lo to hi, or one of a list of more than two.",
    ),
    "PREPROC.MAX_SIZE": Setting(1333, pixels, "Long edge of an image at most, in training and testing."),
    "PREPROC.TEST_SHORT_EDGE_SIZE": Setting(800, pixels, "Short edge of images in evaluation and prediction."),
    "PREPROC.FLIP": Setting(True, flag, "Mirrors a training image left to right with probability 0.5."),
    "PREPROC.RANDOM_CROP": Setting(
        [], span(1),
        "Trains on a part of the image whose sides are random shares of the image's sides, e.g. [0.6, 1.0].",
    ),
    "PREPROC.SCALE_JITTER": Setting(
        [], span(100),
        "Large-scale jitter, e.g. [0.1, 2.0] (Ghiasi et al. 2021). Replaces PREPROC.SHORT_EDGE_SIZE and "
        "PREPROC.MAX_SIZE in training: the image is resized to a random multiple of the size that fits into "
        "PREPROC.CROP_SIZE, and a random part of it is taken.",
    ),
    "PREPROC.CROP_SIZE": Setting(
        [1024, 1024], list_of(pixels, 2, says="a list of height and width in pixels, each from 16 to 16384"),
        "Size of training images with PREPROC.SCALE_JITTER.",
    ),
    "PREPROC.MIN_VISIBLE": Setting(
        0.1, number(0, below=1),
        "Objects are not trained when a crop leaves less than this share of their box, or pasted objects less than "
        "this share of their pixels.",
    ),
    "PREPROC.COPY_PASTE": Setting(
        0.0, _SHARE,
        "Probability that objects of another training image are pasted over an image (Simple Copy-Paste, Ghiasi et al. "
        "2021). Needs outlines, also without MODE_MASK.",
    ),
    "PREPROC.PHOTOMETRIC": Setting(
        0.0, _SHARE,
        "Strength of random brightness, contrast, saturation and hue; 1 is as strong as in SSD (Liu et al. 2016).",
    ),
    "PREPROC.PIXEL_MEAN": Setting(
        [123.675, 116.28, 103.53], list_of(number(-1000, 1000), 3, says=f"{_RGB}, each from -1000 to 1000"),
        "Subtracted from an image's R, G and B values, which are 0 to 255. The default is ImageNet's mean.",
    ),
    "PREPROC.PIXEL_STD": Setting(
        [58.395, 57.12, 57.375], list_of(number(0.001, 1000), 3, says=f"{_RGB}, each from 0.001 to 1000"),
        "Standard deviations by which R, G and B are divided after that.",
    ),
    # -------------------------------------------------------------------------------------------------------- backbone
    "BACKBONE.NAME": Setting(
        "resnet", backbone,
        "resnet: a ResNet as the settings below describe it. efficientnet_lite0 to efficientnet_lite4: these small, "
        "fast networks. keras:EfficientNetB0 or another network of "
        "tf_keras.applications. module:function: your own function(normalised image [N,H,W,3], cfg) -> [C2,C3,C4,C5].",
        names_code=True,
    ),
    "BACKBONE.FEATURE_LAYERS": Setting(
        [], either(list_of(text(), 0), list_of(text(), 4), "a list of four layers' names, or [] for the usual ones"),
        "keras: the layers of strides 4, 8, 16 and 32 that give C2 to C5. []: the last block of each stride.",
    ),
    "BACKBONE.WEIGHTS": Setting(
        "", _PATH_OR_NONE,
        "ImageNet weights to start from: an .npz with native or tensorpack names; for keras also its …_notop.h5. "
        'package: those of an installed package (docs/WEIGHTS.md). "" trains from scratch.',
    ),
    "BACKBONE.RESNET_NUM_BLOCK": Setting(
        [3, 4, 6, 3], list_of(whole(1, 1000), 4, says="a list of four whole numbers from 1 to 1000"),
        "Blocks of each stage: [3,4,6,3] is ResNet-50, [3,4,23,3] ResNet-101, [3,8,36,3] ResNet-152.",
    ),
    "BACKBONE.BLOCK": Setting(
        "bottleneck", one_of("bottleneck", "basic"),
        "basic has two 3x3 convolutions: ResNet-18 with blocks [2,2,2,2], ResNet-34 with [3,4,6,3].",
    ),
    "BACKBONE.NORM": Setting(
        "FreezeBN", one_of("FreezeBN", "SyncBN", "GN", None),
        "FreezeBN: batch norm with the statistics of the weights. SyncBN: with those of the batch over all replicas. "
        "GN: group norm. None: biases instead.",
    ),
    "BACKBONE.FREEZE_AFFINE": Setting(False, flag, "Does not train gamma and beta of frozen batch norms."),
    "BACKBONE.FREEZE_AT": Setting(
        2, whole(0, 5), "What is not trained: 0 nothing, 1 the stem, 2 the stem and the first stage, … 5 everything."
    ),
    "BACKBONE.TF_PAD_MODE": Setting(
        False, flag, "TensorFlow's SAME padding, asymmetric at stride 2, instead of Caffe's symmetric one."
    ),
    "BACKBONE.STRIDE_1X1": Setting(
        False, flag, "Stride 2 in the first 1x1 convolution of a bottleneck (Caffe) instead of in its 3x3."
    ),
    "BACKBONE.STEM_CHANNELS": Setting(
        64, whole(1, 4096), "Channels of conv0. A stage has 4 * 2^stage times as many (basic blocks: 2^stage times)."
    ),
    "BACKBONE.NUM_GROUPS": Setting(1, whole(1, 4096), "Groups of the 3x3 convolutions; ResNeXt has 32."),
    "BACKBONE.WIDTH_PER_GROUP": Setting(
        64, whole(1, 4096), "Bottleneck channels per group in the first stage; ResNeXt-50 32x4d has 4."
    ),
    "BACKBONE.BN_EPSILON": Setting(1e-5, number(0, 1), "Added to the variance in batch norms."),
    # -------------------------------------------------------------------------------------------------------- training
    "TRAIN.BASE_LR": Setting(0.01, _RATE, "Learning rate at a total batch of 8 images."),
    "TRAIN.WARMUP": Setting(
        "auto", automatic(whole(0, 10**9)),
        "Steps of this run in which the rate rises from TRAIN.WARMUP_INIT_LR. auto: 1000. With auto, and with "
        "TRAIN.EPOCHS, at most a tenth of the run.",
    ),
    "TRAIN.WARMUP_INIT_LR": Setting(0.01 * 0.33, _RATE, "Learning rate of the first step, at a total batch of 8."),
    "TRAIN.WEIGHT_DECAY": Setting(1e-4, number(0, 1), "L2 decay of the weights of convolutions and dense layers."),
    "TRAIN.WEIGHT_DECAY_BIAS": Setting(
        0.0, optional(number(0, 1)), "L2 decay of biases. None: that of TRAIN.WEIGHT_DECAY (detectron2)."
    ),
    "TRAIN.WEIGHT_DECAY_NORM": Setting(
        0.0, optional(number(0, 1)), "L2 decay of the norms' gamma and beta. None: that of TRAIN.WEIGHT_DECAY."
    ),
    "TRAIN.MOMENTUM": Setting(0.9, number(0, below=1), "Momentum of SGD."),
    "TRAIN.LR_POLICY": Setting(
        "step", one_of("step", "cosine"),
        "step: the rate drops by 10 at the iterations of TRAIN.LR_SCHEDULE. cosine: half a cosine from the end of the "
        "warm-up to the last of them (Loshchilov & Hutter 2017). TRAIN.MAX_STEPS cuts either without changing it.",
    ),
    "TRAIN.LR_FINAL": Setting(0.0, _SHARE, "TRAIN.LR_POLICY=cosine: the last rate, as a share of the first."),
    "TRAIN.LR_SCHEDULE": Setting(
        "auto", schedule,
        "Iterations at which the rate drops by 10, at a total batch of 8; the last one is the end. auto: 2x for 50,000 "
        "images or more and for runs with TRAIN.MAX_STEPS. Fewer images: 24 epochs; small sets are shown up to 50 "
        "times, until 24,000 images were shown; never fewer than 500 updates. auto:1x (to 9x): with 1x instead of "
        "2x.",
    ),
    "TRAIN.EPOCHS": Setting(
        None, optional(number(above=0, high=10**6)),
        "Length of the run in epochs (passes over the training images), instead of that of TRAIN.LR_SCHEDULE. The rate "
        "drops by 10 after 2/3 and 8/9 of it, as in the 1x schedule.",
    ),
    "TRAIN.LR_SCALING": Setting(
        "linear", one_of("linear", "none"),
        "linear: the rate is proportional to the total batch, the number of steps to its inverse. none: as written.",
    ),
    "TRAIN.BATCH_SIZE_PER_GPU": Setting(1, whole(1, 1024), "Images in the batch of each replica."),
    "TRAIN.CPU_REPLICAS": Setting(
        1, whole(1, 64), "Number of replicas on the CPU of a machine without GPUs, to try out data parallelism."
    ),
    "TRAIN.ACCUMULATION": Setting(1, whole(1, 65536), "Micro-batches whose gradients are averaged into one update."),
    "TRAIN.TOTAL_BATCH": Setting(
        None, optional(_COUNT),
        "Images of an update, reached by accumulation on any number of replicas, so that a run can go on with more or "
        "fewer of them. A multiple of replicas * TRAIN.BATCH_SIZE_PER_GPU. None: what these and TRAIN.ACCUMULATION "
        "give.",
    ),
    "TRAIN.LOSS_PER_IMAGE": Setting(
        True, flag,
        "Losses of RoIs are the mean of the images' means, so that the spread of a batch over devices changes nothing. "
        "False: one mean over all RoIs of a device's batch (detectron2).",
    ),
    "TRAIN.PRECISION": Setting(
        "float32", one_of("float32", "bfloat16", "float16", "float64"),
        "Type in which convolutions and products are computed. float64 is for comparisons and stores variables too.",
    ),
    "TRAIN.TF32": Setting(
        True, flag,
        "GPUs from Ampere on round the factors of float32 convolutions and products to 10 bits, which is several times "
        "faster. False: all of float32's 23 bits.",
    ),
    "TRAIN.DETERMINISTIC": Setting(
        False, flag,
        "Two runs on GPUs of the same kind and number give equal weights, bit for bit; slower. CPUs do so in any case.",
    ),
    "TRAIN.SEED": Setting(
        42, optional(whole(0, 2**31 - 1)), "Seed of initial weights, order and augmentation. None: a new one each run."
    ),
    "TRAIN.GRADIENT_CLIP": Setting(
        None, optional(number(0.0001, 10**6)), "Gradients of a larger global norm are scaled down to it."
    ),
    "TRAIN.SKIP_BAD_STEPS": Setting(
        0, whole(0, 10**6),
        "Goes on past at most so many steps with a loss, gradient or weight that is not finite, without their updates. "
        "Each leaves a folder LOGDIR/incident-STEP (docs/INCIDENTS.md); the next one ends the run.",
    ),
    "TRAIN.INCIDENT_GRAD_FACTOR": Setting(
        None, optional(number(1.0, 10**9)),
        "A gradient norm of more than this many times its median in the 101 steps before is treated like one that is "
        "not finite.",
    ),
    "TRAIN.EMA_DECAY": Setting(
        0.0, number(0, below=1),
        "Decay per update of averaged weights, e.g. 0.9998, which evaluation and prediction use (TEST.USE_EMA). In the "
        "first updates t the decay is (1 + t) / (10 + t). 0: no averaging.",
    ),
    "TRAIN.MAX_STEPS": Setting(
        None, optional(steps), "Ends the run after this many updates, whatever the schedule says."
    ),
    "TRAIN.EVAL_PERIOD": Setting(
        "auto", automatic(number(0, 10**9)),
        "Evaluates after every so many epochs (0.5: twice in each), and at the end. 0: never. auto: 15 times, with 20 "
        "steps or more in between.",
    ),
    "TRAIN.CHECKPOINT_PERIOD": Setting(
        "auto", automatic(number(above=0, high=10**9)),
        "Writes a checkpoint after every so many epochs, and at the end. auto: 15 times or more, with 20 to 500 steps "
        "in between, among them those of TRAIN.EVAL_PERIOD=auto; with TRAIN.PERIOD_STEPS: 1.",
    ),
    "TRAIN.PERIOD_STEPS": Setting(
        None, optional(steps),
        "The unit of TRAIN.EVAL_PERIOD and TRAIN.CHECKPOINT_PERIOD in steps instead of epochs; 1 counts both in steps.",
    ),
    "TRAIN.KEEP_CHECKPOINTS": Setting(10, _COUNT, "Number of newest checkpoints that are kept."),
    "TRAIN.VAL_LOSS": Setting(
        False, flag,
        "Each evaluation also computes the training losses on the sets of DATA.VAL, without augmentation: "
        "val/total_loss and its parts (docs/VALIDATION.md).",
    ),
    "TRAIN.BEST_METRIC": Setting(
        "auto", optional(either(one_of("auto"), metric, f"auto, {metric.says}")),
        "The metric whose best checkpoint is kept as model-best, which --load RUN/best takes; -val_loss for the "
        "validation loss. auto: the first of segm/AP, bbox/AP, keypoints/AP and the data set's own that there is. "
        "None: no best checkpoint is kept.",
    ),
    "TRAIN.PATIENCE": Setting(
        None, optional(_COUNT),
        "Ends the run after so many evaluations in a row without improvement of TRAIN.BEST_METRIC.",
    ),
    "TRAIN.MIN_DELTA": Setting(
        0.0, number(0, 10**6), "TRAIN.PATIENCE: a score is an improvement if it is better by more than this."
    ),
    "TRAIN.TARGET": Setting(
        {}, targets,
        "Ends the run once an evaluation reaches all of these scores, e.g. {'bbox/AP':0.377,'segm/AP':0.339}.",
    ),
    "TRAIN.PICTURES": Setting(
        8, whole(0, 1000),
        "Pictures for TensorBoard and LOGDIR/pictures: so many images of each validation set at each evaluation, "
        "annotations beside predictions, and so many of the first training batch. 0: none.",
    ),
    "TRAIN.WANDB": Setting(
        None, optional(text("a project, or entity/project")),
        "Project at Weights & Biases that also gets scalars, settings and pictures. Needs `pip install wandb`.",
    ),
    "TRAIN.MLFLOW": Setting(
        None, optional(text("URI/experiment")),
        "MLflow's tracking URI and an experiment that also get them, e.g. http://localhost:5000/apples or "
        "sqlite:///mlflow.db/apples. Needs `pip install mlflow`.",
    ),
    "TRAIN.FREEZE_PATTERN": Setting(
        None, optional(pattern), "Regular expression; variables whose names match it are not trained."
    ),
    # --------------------------------------------------------------------------------------- region proposals, anchors
    "RPN.ANCHOR_STRIDE": Setting(16, exactly(16), "C4: stride of the anchors in pixels."),
    "RPN.ANCHOR_SIZES": Setting(
        [32.0, 64.0, 128.0, 256.0, 512.0], list_of(number(1, 16384), says="a list of numbers from 1 to 16384"),
        "Anchor sizes in pixels, the square root of the area. FPN: one for each stride. C4: all at one stride.",
    ),
    "RPN.ANCHOR_RATIOS": Setting(
        [0.5, 1.0, 2.0], list_of(number(0.01, 100), says="a list of numbers from 0.01 to 100"),
        "Anchor heights divided by widths.",
    ),
    "RPN.CELL_ANCHORS": Setting(
        [], anchors,
        "Anchors relative to a cell's corner, a list per level (C4 has one level). Replaces sizes and ratios: "
        "some systems round or shift their anchors.",
    ),
    "RPN.STRIDE_FROM_SIZE": Setting(
        False, flag,
        "True: the anchor stride is the padded image's side // the feature map's side, as in torchvision; it differs "
        "from the nominal stride at P6 if P5 has an odd side.",
    ),
    "RPN.POSITIVE_ANCHOR_THRESH": Setting(0.7, _OVERLAP, "IoU from which an anchor is foreground."),
    "RPN.NEGATIVE_ANCHOR_THRESH": Setting(0.3, _OVERLAP, "IoU below which an anchor is background."),
    "RPN.FG_RATIO": Setting(0.5, number(above=0, high=1), "Share of a batch that is foreground at most."),
    "RPN.BATCH_PER_IM": Setting(256, _COUNT, "Anchors per image that are sampled for training."),
    "RPN.MIN_SIZE": Setting(0.0, number(0, 16384), "Proposals with a side of this many pixels or less are dropped."),
    "RPN.PROPOSAL_NMS_THRESH": Setting(0.7, _OVERLAP, "IoU above which the worse of two proposals is dropped."),
    "RPN.CROWD_OVERLAP_THRESH": Setting(
        9.99, number(0, 100), "Anchors of which a crowd region covers more than this share are ignored; off from 1 on."
    ),
    "RPN.TRAIN_ON_PADDING": Setting(
        False, flag, "True: anchors centred in the padding of a batch count as negatives (detectron2)."
    ),
    "RPN.HEAD_DIM": Setting(1024, _CHANNELS, "C4: channels of the RPN's convolutions."),
    "RPN.NUM_CONVS": Setting(
        1, whole(1, 16), "3x3 convolutions of the RPN before its outputs; torchvision's v2 detectors have 2."
    ),
    "RPN.BBOX_LOSS": Setting(
        "smooth_l1", _BOX_LOSS,
        "smooth_l1: of the deltas. giou: 1 - generalised IoU of the decoded boxes (Rezatofighi et al. 2019).",
    ),
    "RPN.BBOX_LOSS_WEIGHT": Setting(1.0, _WEIGHT, "Weight of the RPN's box loss."),
    "RPN.SMOOTH_L1_BETA": Setting(1 / 9, number(0, 100), "Where the smooth L1 loss becomes linear; 0 is the L1 loss."),
    "RPN.TRAIN_PRE_NMS_TOPK": Setting(
        12000, _COUNT, "C4 and FPN.PROPOSAL_MODE=Joint: best anchors of an image that enter NMS in training."
    ),
    "RPN.TRAIN_POST_NMS_TOPK": Setting(2000, _COUNT, "Proposals of an image kept after that NMS in training."),
    "RPN.TEST_PRE_NMS_TOPK": Setting(6000, _COUNT, "As RPN.TRAIN_PRE_NMS_TOPK, in evaluation and prediction."),
    "RPN.TEST_POST_NMS_TOPK": Setting(1000, _COUNT, "As RPN.TRAIN_POST_NMS_TOPK, in evaluation and prediction."),
    "RPN.TRAIN_PER_LEVEL_NMS_TOPK": Setting(
        2000, _COUNT, "FPN.PROPOSAL_MODE=Level: best anchors of each level that enter NMS in training."
    ),
    "RPN.TRAIN_FPN_NMS_TOPK": Setting(2000, _COUNT, "Proposals of an image kept from all levels in training."),
    "RPN.TRAIN_TOPK_OF_BATCH": Setting(
        False, flag,
        "True: in training the proposals of all images of a device's batch are chosen together, as many as otherwise "
        "of one image (Detectron's FPN, maskrcnn-benchmark).",
    ),
    "RPN.TEST_PER_LEVEL_NMS_TOPK": Setting(
        1000, _COUNT, "As RPN.TRAIN_PER_LEVEL_NMS_TOPK, in evaluation and prediction."
    ),
    "RPN.TEST_FPN_NMS_TOPK": Setting(1000, _COUNT, "As RPN.TRAIN_FPN_NMS_TOPK, in evaluation and prediction."),
    # ------------------------------------------------------------------------------------------------------------ RoIs
    "FRCNN.BATCH_PER_IM": Setting(512, _COUNT, "RoIs per image that are sampled for training."),
    "FRCNN.FG_THRESH": Setting(
        0.5, number(above=0, high=1), "IoU from which a RoI is foreground. A cascade has CASCADE.IOUS instead."
    ),
    "FRCNN.BG_THRESH_LO": Setting(
        0.0, _OVERLAP,
        "Lowest IoU of a background RoI. RoIs that are neither foreground nor background are not trained. Fast R-CNN "
        "used 0.1 to 0.5, which prefers hard negatives (Girshick 2015).",
    ),
    "FRCNN.BG_THRESH_HI": Setting(
        None, optional(number(above=0, high=1)),
        "IoU below which a RoI is background. None: the foreground's threshold.",
    ),
    "FRCNN.FG_RATIO": Setting(0.25, number(above=0, high=1), "Share of a batch that is foreground at most."),
    "FRCNN.BBOX_REG_WEIGHTS": Setting(
        [10.0, 10.0, 5.0, 5.0], _FOUR_WEIGHTS, "Factors of the box deltas dx, dy, dw and dh."
    ),
    "FRCNN.BBOX_LOSS": Setting("smooth_l1", _BOX_LOSS, "As RPN.BBOX_LOSS; for all stages of a cascade."),
    "FRCNN.BBOX_LOSS_WEIGHT": Setting(1.0, _WEIGHT, "Weight of the box loss."),
    "FRCNN.SMOOTH_L1_BETA": Setting(1.0, number(0, 100), "Where the smooth L1 loss becomes linear; 0 is the L1 loss."),
    "FRCNN.CLASS_AGNOSTIC": Setting(False, flag, "Predict one box for all classes instead of one for each."),
    "FRCNN.ROI_OP": Setting(
        "align", one_of("align", "pool", "crop_and_resize"),
        "align: RoIAlign. pool: Fast R-CNN's quantised bins and maxima. crop_and_resize: TensorFlow's samples on a "
        "grid over the box, edges included, and the largest of FRCNN.ROI_SAMPLES^2 (detectors before RoIAlign).",
    ),
    "FRCNN.ROI_SAMPLES": Setting(
        2, whole(0, 4),
        "Samples of a bin along each axis. 0: as many as the bin has feature cells, rounded up, which detectron2's "
        "models are trained with; it is slower.",
    ),
    "FRCNN.ROI_ALIGNED": Setting(
        True, flag,
        "False: the first RoIAlign, without half-pixel shift, and RoIs of at least one feature cell (Detectron, "
        "maskrcnn-benchmark, torchvision; detectron2's ROIAlign, whose ROIAlignV2 is True).",
    ),
    "FRCNN.CROWD_OVERLAP_THRESH": Setting(
        9.99, number(0, 100),
        "Background RoIs of which a crowd region covers more than this share are not trained; off from 1 on.",
    ),
    "FRCNN.FEDERATED_LOSS": Setting(
        False, flag,
        "True: a class takes part in an image's softmax only if annotators looked for it there, and a box with several "
        "labels belongs to each of them. For Open Images and LVIS.",
    ),
    "FRCNN.ROI_SIZE": Setting(
        7, _ROI_SIZE,
        "Side of a RoI's features in the box head. C4 pools twice as many and its stage 5 halves them; masks then have "
        "twice this side. Weights of FPN's box heads fit one size only.",
    ),
    "FRCNN.ROI_TO_LAST_PIXEL": Setting(
        False, flag, "True: RoIs end at x2 - 1, y2 - 1, the index of their last pixel (Detectron, maskrcnn-benchmark)."
    ),
    # --------------------------------------------------------------------------------------------------------- pyramid
    "FPN.ANCHOR_STRIDES": Setting([4, 8, 16, 32, 64], exactly([4, 8, 16, 32, 64]), "Strides of the levels P2 to P6."),
    "FPN.PROPOSAL_MODE": Setting(
        "Level", one_of("Level", "Joint"),
        "Level: top-k and NMS on each level, then the best of all (Detectron). Joint: one top-k and one NMS over the "
        "anchors of all levels, by the settings RPN.…_PRE_NMS_TOPK and RPN.…_POST_NMS_TOPK (tensorpack).",
    ),
    "FPN.NUM_CHANNEL": Setting(256, _CHANNELS, "Channels of the pyramid."),
    "FPN.NORM": Setting(None, one_of("GN", None), "Norm of the pyramid."),
    "FPN.GN_AFTER_RELU": Setting(
        False, flag,
        "True: convolutions with group norm in the pyramid and the heads have biases, and the norm follows the ReLU "
        "(tensorpack's GN models).",
    ),
    "FPN.FRCNN_HEAD_FUNC": Setting(
        "fastrcnn_2fc_head",
        function_or(one_of("fastrcnn_2fc_head", "fastrcnn_4conv1fc_head", "fastrcnn_4conv1fc_gn_head")),
        "Head that classifies RoIs and refines their boxes. module:function: your own head(RoI features [R,7,7,C], "
        "cfg) -> [R,D], as in demo/own_head.py.",
        names_code=True,
    ),
    "FPN.FRCNN_CONV_HEAD_DIM": Setting(256, _CHANNELS, "Channels of the convolutions of 4conv1fc heads."),
    "FPN.FRCNN_FC_HEAD_DIM": Setting(1024, _CHANNELS, "Outputs of the fully connected layers of box heads."),
    "FPN.MRCNN_HEAD_FUNC": Setting(
        "maskrcnn_up4conv_head", function_or(one_of("maskrcnn_up4conv_head", "maskrcnn_up4conv_gn_head")),
        "Head that predicts masks. module:function: your own head(RoI features [F,14,14,C], classes, cfg) -> mask "
        "logits [F,28,28,classes].",
        names_code=True,
    ),
    "FPN.CASCADE": Setting(False, flag, "Cascade R-CNN: box heads in a row, each with a higher IoU threshold."),
    # ------------------------------------------------------------------------------------------------------ the heads
    "MRCNN.HEAD_DIM": Setting(256, _CHANNELS, "Channels of the mask head."),
    "MRCNN.ROI_SIZE": Setting(
        14, _ROI_SIZE, "FPN: side of a RoI's features in the mask head; masks have twice this side."
    ),
    "MRCNN.LOSS_WEIGHT": Setting(1.0, _WEIGHT, "Weight of the mask loss."),
    "MRCNN.CLASS_AGNOSTIC": Setting(False, flag, "Predict one mask for all classes instead of one for each."),
    "KRCNN.NUM_KEYPOINT": Setting(17, whole(1, 1000), "Keypoints of an object; COCO's persons have 17."),
    "KRCNN.FLIP_PAIRS": Setting(
        [], pairs,
        "Keypoints that change places in a mirrored image; found by names such as left_eye, LeftEye, l_eye if empty.",
    ),
    "KRCNN.OKS_SIGMAS": Setting(
        [], list_of(number(0.0001, 10), least=0, says="a list of numbers from 0.0001 to 10, one for each keypoint"),
        "Falloff of each keypoint's similarity (OKS) in the scores; COCO's for its 17 points if empty.",
    ),
    "KRCNN.HEAD_DIM": Setting(512, _CHANNELS, "Channels of the keypoint head."),
    "KRCNN.ROI_SIZE": Setting(
        14, _ROI_SIZE, "Side of a RoI's features in the keypoint head; its maps have four times this side."
    ),
    "KRCNN.LOSS_WEIGHT": Setting(1.0, _WEIGHT, "Weight of the keypoint loss."),
    "CASCADE.IOUS": Setting(
        [0.5, 0.6, 0.7], list_of(number(above=0, high=1), says="a list of numbers above 0, at most 1"),
        "Foreground IoU of each stage.",
    ),
    "CASCADE.BBOX_REG_WEIGHTS": Setting(
        [[10.0, 10.0, 5.0, 5.0], [20.0, 20.0, 10.0, 10.0], [30.0, 30.0, 15.0, 15.0]],
        list_of(_FOUR_WEIGHTS, says="a list with four numbers from 0.01 to 1000 for each stage"),
        "As FRCNN.BBOX_REG_WEIGHTS, for each stage.",
    ),
    # -------------------------------------------------------------------------------------------------------- testing
    "TEST.PRECISION": Setting(
        None, optional(one_of("float32", "bfloat16", "float16")),
        "Type in which evaluation and prediction compute convolutions and products. None: TRAIN.PRECISION.",
    ),
    "TEST.BATCH_SIZE": Setting(
        1, whole(1, 1024),
        "Most images of a batch in evaluation and prediction. Only images that are padded to the same size share one.",
    ),
    "TEST.USE_EMA": Setting(
        True, flag, "Uses the averaged weights (TRAIN.EMA_DECAY) if the model has them, also to train from --load."
    ),
    "TEST.NMS": Setting(
        "hard", one_of("hard", "soft_linear", "soft_gaussian"),
        "hard: a box is dropped where a better one of its class overlaps it by more than TEST.FRCNN_NMS_THRESH. "
        "soft_linear, soft_gaussian: its score is lowered instead, times 1 - IoU beyond that threshold, or times "
        "exp(-IoU^2 / TEST.SOFT_NMS_SIGMA) (Bodla et al. 2017).",
    ),
    "TEST.NMS_CLASS_AGNOSTIC": Setting(False, flag, "True: boxes of different classes suppress each other too."),
    "TEST.FRCNN_NMS_THRESH": Setting(0.5, _OVERLAP, "IoU above which boxes of a class suppress each other."),
    "TEST.SOFT_NMS_SIGMA": Setting(0.5, number(0.001, 1000), "Width of soft_gaussian; larger lowers scores less."),
    "TEST.RESULT_SCORE_THRESH": Setting(0.05, _SCORE, "Only boxes with scores above this enter NMS."),
    "TEST.SOFT_NMS_MIN_SCORE": Setting(
        0.001, _SCORE,
        "Soft NMS drops boxes with a lowered score below this, or below TEST.RESULT_SCORE_THRESH if that is lower.",
    ),
    "TEST.RESULT_SCORE_THRESH_VIS": Setting(0.5, _SHARE, "Objects with at least this score are drawn in pictures."),
    "TEST.RESULTS_PER_IM": Setting(100, _COUNT, "Largest number of objects reported for an image."),
    "TEST.ASYNC": Setting(
        False, flag,
        "Evaluations during training run in another process while training goes on. One evaluation waits at most: a "
        "newer one replaces it.",
    ),
    "TEST.ASYNC_DEVICE": Setting(
        "cpu", either(one_of("cpu"), whole(0, 63), "cpu, or the number of a GPU that the run does not train on"),
        "TEST.ASYNC: where evaluations run.",
    ),
    "TEST.ASYNC_THREADS": Setting(
        None, optional(whole(1, 1024)),
        "TEST.ASYNC: threads with which TensorFlow evaluates; the process has the lowest priority. None: one per core.",
    ),
    "TEST.AUG_SHORT_EDGES": Setting(
        [], list_of(pixels, least=0, says="a list of numbers of pixels from 16 to 16384; [] for none"),
        "Test-time augmentation of --predict and --evaluate, e.g. [400,600,800,1000,1200]: each image is seen with "
        "these short edges instead of PREPROC.TEST_SHORT_EDGE_SIZE, and the results are merged. Evaluations during "
        "training do not use it. The features of all views of a batch are kept in host memory.",
    ),
    "TEST.AUG_MAX_SIZE": Setting(4000, pixels, "Largest long edge of a view."),
    "TEST.AUG_FLIP": Setting(True, flag, "With TEST.AUG_SHORT_EDGES: each view is also used mirrored."),
    "TEST.TILE": Setting(
        0, either(exactly(0), whole(64, 16384), "0, or a whole number from 64 to 16384"),
        "Large images in --predict and --evaluate: an image longer than this many pixels is seen as overlapping tiles "
        "of this size. Each is resized as an image would be, and the results are merged (docs/TILES.md). 0: no tiles.",
    ),
    "TEST.TILE_OVERLAP": Setting(0.25, number(0, 0.9), "Share of a tile's side by which neighbouring tiles overlap."),
    "TEST.TILE_WHOLE": Setting(
        True, flag, "With TEST.TILE: the whole image is seen too, for objects that are larger than a tile."
    ),
    "TEST.TILE_RESULTS_PER_IM": Setting(
        1000, _COUNT, "With TEST.TILE: largest number of objects of an image; TEST.RESULTS_PER_IM is that of a tile."
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------- how settings depend on each other
# (setting, test that its value is allowed, what it needs). The message adds the values of settings that the sentence
# names. A setting that is not used by what the program does is never refused.
Relation = tuple[str, Callable[["Config"], bool], str]


def _is_keras(cfg: "Config") -> bool:
    return cfg.BACKBONE.NAME.startswith("keras:")


def _is_lite(cfg: "Config") -> bool:
    return cfg.BACKBONE.NAME in LITE


def _is_own_function(cfg: "Config") -> bool:
    return cfg.BACKBONE.NAME != "resnet" and not _is_keras(cfg) and not _is_lite(cfg)


def _is_basic(cfg: "Config") -> bool:
    return cfg.BACKBONE.NAME == "resnet" and cfg.BACKBONE.BLOCK == "basic"


def _has_group_norm(cfg: "Config") -> bool:
    return cfg.BACKBONE.NAME == "resnet" and cfg.BACKBONE.NORM == "GN"


def _bottleneck_width(cfg: "Config") -> int:
    """Channels inside the bottlenecks of the first stage."""
    backbone = cfg.BACKBONE
    plain = backbone.BLOCK == "basic" or (backbone.NUM_GROUPS == 1 and backbone.WIDTH_PER_GROUP == 64)
    return backbone.STEM_CHANNELS if plain else backbone.NUM_GROUPS * backbone.WIDTH_PER_GROUP


def _of_resnets(key: str) -> Relation:
    default = SETTINGS[key].default
    sentence = f"applies to ResNets only, not to keras networks and EfficientNet-Lite; leave it at {default}"
    return key, lambda c: not (_is_keras(c) or _is_lite(c)) or c.get(key) == default, sentence


def _cell_anchors_fit(cfg: "Config") -> bool:
    rpn, sizes = cfg.RPN, 1 if cfg.MODE_FPN else len(cfg.RPN.ANCHOR_SIZES)
    levels = len(cfg.FPN.ANCHOR_STRIDES) if cfg.MODE_FPN else 1
    fits = len(rpn.CELL_ANCHORS) == levels and {len(c) for c in rpn.CELL_ANCHORS} == {sizes * len(rpn.ANCHOR_RATIOS)}
    return fits or not rpn.CELL_ANCHORS


def _background_below(cfg: "Config") -> float:
    """The IoU below which a RoI is background."""
    return cfg.FRCNN.BG_THRESH_HI or (cfg.CASCADE.IOUS[0] if cfg.FPN.CASCADE else cfg.FRCNN.FG_THRESH)


def _evaluates(cfg: "Config") -> bool:
    """Whether a run evaluates while it trains."""
    return bool(cfg.TRAIN.EVAL_PERIOD and cfg.DATA.VAL)


def _names_val_loss(metrics: Any) -> bool:
    """Whether one of these metrics, or this one, is a loss on the validation sets."""
    return any(re.search(r"(^-?|/)val/", name) for name in ([metrics] if isinstance(metrics, str) else metrics or ()))


_GN = "must be a multiple of 32 with"
_TEST_EDGE: Relation = (
    "PREPROC.TEST_SHORT_EDGE_SIZE",
    lambda c: c.PREPROC.TEST_SHORT_EDGE_SIZE <= c.PREPROC.MAX_SIZE,
    "must be at most PREPROC.MAX_SIZE",
)

RELATIONS: list[Relation] = [
    ("MODE_KEYPOINT", lambda c: not c.MODE_KEYPOINT or c.MODE_FPN, "needs MODE_FPN=True"),
    ("FPN.CASCADE", lambda c: not c.FPN.CASCADE or c.MODE_FPN, "needs MODE_FPN=True"),
    ("FPN.FRCNN_HEAD_FUNC", lambda c: ":" not in c.FPN.FRCNN_HEAD_FUNC or c.MODE_FPN, "needs MODE_FPN=True"),
    ("FPN.MRCNN_HEAD_FUNC", lambda c: ":" not in c.FPN.MRCNN_HEAD_FUNC or c.MODE_FPN, "needs MODE_FPN=True"),
    # ------------------------------------------------------------------------------------------------- backbone
    ("BACKBONE.NAME", lambda c: c.BACKBONE.NAME == "resnet" or c.MODE_FPN, "needs MODE_FPN=True"),
    (
        "BACKBONE.FEATURE_LAYERS",
        lambda c: not c.BACKBONE.FEATURE_LAYERS or not (_is_own_function(c) or _is_lite(c)),
        "is for keras networks; set it to []",
    ),
    (
        "BACKBONE.NORM",
        lambda c: not (_is_keras(c) or _is_lite(c)) or c.BACKBONE.NORM in ("FreezeBN", "SyncBN"),
        "does not fit keras networks and EfficientNet-Lite, which have their own norms: FreezeBN (statistics of the "
        "weights) or SyncBN (of the batch)",
    ),
    (
        "BACKBONE.WEIGHTS",
        lambda c: c.BACKBONE.WEIGHTS != "package" or _is_lite(c),
        "is for BACKBONE.NAME=efficientnet_lite0, 1 or 2, whose weights there are as packages; give a file",
    ),
    (
        "TRAIN.PRECISION",
        lambda c: not _is_keras(c) or c.BACKBONE.NORM != "SyncBN" or c.TRAIN.PRECISION != "float64",
        "is not supported by keras networks with BACKBONE.NORM=SyncBN; use float32 or less",
    ),
    *map(_of_resnets, (
        "BACKBONE.RESNET_NUM_BLOCK", "BACKBONE.BLOCK", "BACKBONE.TF_PAD_MODE", "BACKBONE.STRIDE_1X1",
        "BACKBONE.STEM_CHANNELS", "BACKBONE.NUM_GROUPS", "BACKBONE.WIDTH_PER_GROUP", "BACKBONE.BN_EPSILON",
        "PREPROC.PIXEL_MEAN", "PREPROC.PIXEL_STD",
    )),
    (
        "BACKBONE.NUM_GROUPS",
        lambda c: not _is_basic(c) or c.BACKBONE.NUM_GROUPS == 1,
        "must be 1 with BACKBONE.BLOCK=basic",
    ),
    (
        "BACKBONE.WIDTH_PER_GROUP",
        lambda c: not _is_basic(c) or c.BACKBONE.WIDTH_PER_GROUP == 64,
        "must stay 64 with BACKBONE.BLOCK=basic; BACKBONE.STEM_CHANNELS sets the width",
    ),
    (
        "BACKBONE.STRIDE_1X1",
        lambda c: not _is_basic(c) or not c.BACKBONE.STRIDE_1X1,
        "must be False with BACKBONE.BLOCK=basic, which has no 1x1 convolution",
    ),
    (
        "BACKBONE.STEM_CHANNELS",
        lambda c: not _has_group_norm(c) or c.BACKBONE.STEM_CHANNELS % 32 == 0,
        f"{_GN} BACKBONE.NORM=GN",
    ),
    (
        "BACKBONE.WIDTH_PER_GROUP",
        lambda c: not _has_group_norm(c) or _bottleneck_width(c) % 32 == 0,
        f"times BACKBONE.NUM_GROUPS {_GN} BACKBONE.NORM=GN",
    ),
    # ------------------------------------------------------------------------------------------ pyramid and heads
    (
        "FPN.NUM_CHANNEL",
        lambda c: not (c.MODE_FPN and c.FPN.NORM == "GN") or c.FPN.NUM_CHANNEL % 32 == 0,
        f"{_GN} FPN.NORM=GN",
    ),
    (
        "FPN.FRCNN_CONV_HEAD_DIM",
        lambda c: not (c.MODE_FPN and not c.MODE_RPN_ONLY and c.FPN.FRCNN_HEAD_FUNC == "fastrcnn_4conv1fc_gn_head")
        or c.FPN.FRCNN_CONV_HEAD_DIM % 32 == 0,
        f"{_GN} FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_gn_head",
    ),
    (
        "MRCNN.HEAD_DIM",
        lambda c: not (c.MODE_FPN and c.MODE_MASK and c.FPN.MRCNN_HEAD_FUNC == "maskrcnn_up4conv_gn_head")
        or c.MRCNN.HEAD_DIM % 32 == 0,
        f"{_GN} FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head",
    ),
    (
        "FRCNN.ROI_SAMPLES",
        lambda c: c.MODE_RPN_ONLY or c.FRCNN.ROI_OP != "crop_and_resize" or c.FRCNN.ROI_SAMPLES > 0,
        "must be 1 to 4 with FRCNN.ROI_OP=crop_and_resize",
    ),
    (
        "CASCADE.BBOX_REG_WEIGHTS",
        lambda c: not c.FPN.CASCADE or len(c.CASCADE.IOUS) == len(c.CASCADE.BBOX_REG_WEIGHTS),
        "needs one group of four for each stage of CASCADE.IOUS",
    ),
    # -------------------------------------------------------------------------------------------------- anchors
    (
        "RPN.ANCHOR_SIZES",
        lambda c: not c.MODE_FPN or len(c.RPN.ANCHOR_SIZES) == len(c.FPN.ANCHOR_STRIDES),
        "needs one size for each of FPN.ANCHOR_STRIDES",
    ),
    (
        "RPN.CELL_ANCHORS",
        lambda c: not c.MODE_FPN or _cell_anchors_fit(c),
        "needs one list for each of FPN.ANCHOR_STRIDES, with as many [x1,y1,x2,y2] as RPN.ANCHOR_RATIOS has numbers",
    ),
    (
        "RPN.CELL_ANCHORS",
        lambda c: c.MODE_FPN or _cell_anchors_fit(c),
        "needs one list with an anchor [x1,y1,x2,y2] for each pair of RPN.ANCHOR_SIZES and RPN.ANCHOR_RATIOS",
    ),
    # -------------------------------------------------------------------------------------------------- testing
    (
        "TEST.AUG_SHORT_EDGES",
        lambda c: not (c.TEST.AUG_SHORT_EDGES and c.MODE_RPN_ONLY),
        "must be [] with MODE_RPN_ONLY, which does not support test-time augmentation",
    ),
    (
        "TRAIN.PATIENCE",
        lambda c: c.TRAIN.PATIENCE is None or c.TRAIN.BEST_METRIC is not None,
        "needs TRAIN.BEST_METRIC",
    ),
    (
        "TEST.AUG_MAX_SIZE",
        lambda c: max(c.TEST.AUG_SHORT_EDGES, default=0) <= c.TEST.AUG_MAX_SIZE,
        "must be at least the largest of TEST.AUG_SHORT_EDGES",
    ),
    (
        "TEST.TILE",
        lambda c: not (c.TEST.TILE and c.MODE_RPN_ONLY),
        "must be 0 with MODE_RPN_ONLY, which does not support tiles",
    ),
]  # fmt: skip

# Relations that are checked only for training.
TRAINING_RELATIONS: list[Relation] = [
    (
        "PREPROC.MAX_SIZE",
        lambda c: bool(c.PREPROC.SCALE_JITTER) or max(c.PREPROC.SHORT_EDGE_SIZE) <= c.PREPROC.MAX_SIZE,
        "must be at least the largest of PREPROC.SHORT_EDGE_SIZE",
    ),
    (
        _TEST_EDGE[0],
        lambda c: not (c.TRAIN.EVAL_PERIOD and c.DATA.VAL) or _TEST_EDGE[1](c),
        f"{_TEST_EDGE[2]}, or TRAIN.EVAL_PERIOD must be 0",
    ),
    (
        "BACKBONE.FREEZE_AT",
        lambda c: not _is_own_function(c) or c.BACKBONE.FREEZE_AT == 0,
        "must be 0 with a function of your own; to freeze variables use trainable=False in it or TRAIN.FREEZE_PATTERN",
    ),
    *(
        (key, lambda c, key=key: not c.get(key) or _evaluates(c), "needs TRAIN.EVAL_PERIOD above 0 and DATA.VAL")
        for key in ("TRAIN.PATIENCE", "TRAIN.TARGET", "TRAIN.VAL_LOSS", "TEST.ASYNC")
    ),
    (
        "TEST.PRECISION",
        lambda c: c.TEST.PRECISION is None or c.TRAIN.PRECISION != "float64" or not _evaluates(c),
        "must be None with TRAIN.PRECISION=float64, whose variables the evaluations share",
    ),
    (
        "TRAIN.BEST_METRIC",
        lambda c: c.TRAIN.BEST_METRIC in (None, "auto") or _evaluates(c),
        "needs TRAIN.EVAL_PERIOD above 0 and DATA.VAL",
    ),
    *(
        (key, lambda c, key=key: c.TRAIN.VAL_LOSS or not _names_val_loss(c.get(key)), "needs TRAIN.VAL_LOSS=True")
        for key in ("TRAIN.BEST_METRIC", "TRAIN.TARGET")
    ),
    (
        "TRAIN.ACCUMULATION",
        lambda c: c.TRAIN.TOTAL_BATCH is None or c.TRAIN.ACCUMULATION == 1,
        "must be 1 with TRAIN.TOTAL_BATCH, which determines the accumulation",
    ),
    (
        "RPN.POSITIVE_ANCHOR_THRESH",
        lambda c: c.RPN.NEGATIVE_ANCHOR_THRESH <= c.RPN.POSITIVE_ANCHOR_THRESH,
        "must be at least RPN.NEGATIVE_ANCHOR_THRESH",
    ),
    (
        "RPN.FG_RATIO",
        lambda c: int(c.RPN.BATCH_PER_IM * c.RPN.FG_RATIO) > 0,
        "leaves no foreground in a batch of RPN.BATCH_PER_IM",
    ),
    (
        "FRCNN.FG_RATIO",
        lambda c: c.MODE_RPN_ONLY or int(c.FRCNN.BATCH_PER_IM * c.FRCNN.FG_RATIO) > 0,
        "leaves no foreground in a batch of FRCNN.BATCH_PER_IM",
    ),
    (
        "FRCNN.BG_THRESH_HI",
        lambda c: c.MODE_RPN_ONLY or c.FPN.CASCADE or (c.FRCNN.BG_THRESH_HI or 0) <= c.FRCNN.FG_THRESH,
        "must be at most FRCNN.FG_THRESH, or None",
    ),
    (
        "FRCNN.BG_THRESH_HI",
        lambda c: not c.FPN.CASCADE or (c.FRCNN.BG_THRESH_HI or 0) <= c.CASCADE.IOUS[0],
        "must be at most the first of CASCADE.IOUS, or None",
    ),
    (
        "FRCNN.BG_THRESH_LO",
        lambda c: c.MODE_RPN_ONLY or _background_below(c) > c.FRCNN.BG_THRESH_LO,
        "must be below FRCNN.BG_THRESH_HI, or below the foreground's threshold where that is None",
    ),
]

# Relations that are checked only for evaluation and prediction.
PREDICTION_RELATIONS: list[Relation] = [
    (_TEST_EDGE[0], lambda c: bool(c.TEST.AUG_SHORT_EDGES) or _TEST_EDGE[1](c), _TEST_EDGE[2]),
]

# Values that are allowed but probably a mistake: these give warnings.
DOUBTS: list[Relation] = [
    (
        "PREPROC.PIXEL_STD",
        lambda c: max(c.PREPROC.PIXEL_STD) >= 1,
        "looks like the scale 0 to 1, but images are on the scale 0 to 255: multiply it by 255",
    ),
    (
        "PREPROC.PIXEL_MEAN",
        lambda c: not 0 < max(c.PREPROC.PIXEL_MEAN) <= 1,
        "looks like the scale 0 to 1, but images are on the scale 0 to 255: multiply it by 255",
    ),
]
TRAINING_DOUBTS: list[Relation] = [
    ("TRAIN.BASE_LR", lambda c: c.TRAIN.BASE_LR > 0, "trains nothing"),
    (
        "TRAIN.WARMUP_INIT_LR",
        lambda c: c.TRAIN.WARMUP == 0 or c.TRAIN.WARMUP_INIT_LR <= c.TRAIN.BASE_LR,
        "is above TRAIN.BASE_LR, so the learning rate may fall during the warm-up",
    ),
]


# ----------------------------------------------------------------------------------------------------- reading them
class Config:
    """A node of the settings tree. Leaves are plain Python literals (bool, int, float, str, None, list, dict)."""

    def __init__(self, values: dict[str, Any]):
        """values: {dotted key: value}."""
        object.__setattr__(self, "_frozen", False)
        groups: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            group, dot, rest = key.partition(".")
            if dot:
                groups.setdefault(group, {})[rest] = value
                self.__dict__.setdefault(group, None)
            else:
                self.__dict__[key] = value
        self.__dict__.update({group: Config(members) for group, members in groups.items()})

    if TYPE_CHECKING:

        def __getattr__(self, key: str) -> Any: ...

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
        for part in ALIASES.get(dotted_key, dotted_key).split("."):
            node = node.__dict__[part]
        return node

    def set(self, dotted_key: str, value: Any, origin: str = "--config") -> None:
        """Sets one leaf. Raises UserError, naming `origin`, for an unknown key or a value that is not allowed."""
        key = ALIASES.get(dotted_key, dotted_key)
        if key not in SETTINGS:
            raise UserError(f"{origin}: {unknown_key(dotted_key, list(SETTINGS))}")
        group, _, name = key.rpartition(".")
        node = getattr(self, group) if group else self
        setattr(node, name, read_value(key, SETTINGS[key], value, origin))

    def update_args(self, args: Iterable[str], origin: str = "--config") -> "Config":
        """Applies `KEY=VAL` strings; VAL is parsed as a Python literal, otherwise taken as a string."""
        for arg in args:
            key, sep, given = arg.partition("=")
            if not sep or not key:
                raise UserError(f"{origin}: {shown(arg)} is not of the form KEY=VAL (e.g. MODE_FPN=True)")
            self.set(key.strip(), parse_literal(given), origin)
            if key.strip() == "DATA.CLASS_NAMES" and self.DATA.CLASS_NAMES[:1] == ["BG"]:
                raise UserError(
                    f"{origin}: leave 'BG' out of DATA.CLASS_NAMES; the background is not listed as a class"
                )
        return self

    def update_from_dict(self, flat: dict[str, Any], origin: str) -> "Config":
        for key, value in flat.items():
            self.set(key, value, origin)
        return self


def default_config() -> Config:
    """A fresh, unfrozen tree of the defaults."""
    return Config({key: copy.deepcopy(setting.default) for key, setting in SETTINGS.items()})


def finalize_config(cfg: Config, training: bool = True) -> Config:
    """A checked and frozen copy, with every value in its canonical form. UserError where a setting is wrong.

    In the copy, DATA.TRAIN, DATA.VAL, PREPROC.SHORT_EDGE_SIZE and TRAIN.LR_SCHEDULE (unless it is auto) are lists; with
    MODE_RPN_ONLY the branches of the second stage are off. training=False: the settings are for evaluation and
    prediction.
    """
    cfg = cfg.copy()
    for key, value in cfg.to_dict().items():
        cfg.set(key, value, "setting")
    if cfg.MODE_RPN_ONLY:
        cfg.MODE_MASK = cfg.MODE_KEYPOINT = cfg.FPN.CASCADE = False
    for sentence in _broken([*RELATIONS, *(TRAINING_RELATIONS if training else PREDICTION_RELATIONS)], cfg):
        raise UserError(sentence)
    return cfg.freeze()


def inference_precision(cfg: Config) -> Config:
    """The settings for a graph that predicts: TRAIN.PRECISION, which graphs are computed in, is what TEST.PRECISION
    says."""
    if cfg.TEST.PRECISION in (None, cfg.TRAIN.PRECISION):
        return cfg
    cfg = cfg.copy()
    cfg.TRAIN.PRECISION = cfg.TEST.PRECISION
    return cfg.freeze()


def doubts(cfg: Config, training: bool = True) -> list[str]:
    """Warnings about settings that are allowed but probably a mistake."""
    return _broken([*DOUBTS, *(TRAINING_DOUBTS if training else [])], cfg)


def _broken(relations: list[Relation], cfg: Config) -> list[str]:
    """A message for each relation that does not hold."""
    return [
        f"setting {key}={shown(cfg.get(key))} {_with_values(sentence, cfg)}"
        for key, holds, sentence in relations
        if not holds(cfg)
    ]


def explain(cfg: Config) -> str:
    """The settings as lines KEY=VALUE, with comments that explain each."""
    lines, group = [], ""
    for key, value in cfg.items():
        setting = SETTINGS[key]
        if key.partition(".")[0] != group and "." in key:
            lines.append("")
        group = key.partition(".")[0]
        about = setting.about if setting.allowed is flag else f"{setting.about} Takes {setting.allowed.says}."
        if value != setting.allowed.read(setting.default):
            about += f" Default: {setting.default}."
        lines += textwrap.wrap(about, 120, initial_indent="# ", subsequent_indent="#   ")
        lines.append(f"{key}={value!r}")
    return "\n".join(lines)


def _with_values(sentence: str, cfg: Config) -> str:
    """The sentence, with the value added to each setting that it names without one."""

    def add(match: re.Match) -> str:
        key = match[0]
        return f"{key} ({shown(cfg.get(key))})" if key in SETTINGS else key

    return re.sub(r"\b[A-Z_0-9]+\.[A-Z_0-9]*[A-Z0-9]\b(?!=)", add, sentence)
