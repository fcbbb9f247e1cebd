"""Finds the setting that an unknown key probably means: other spellings, names used by other systems, typing errors."""

import re

from config_check import nearest, shown

__all__ = ["ALIASES", "TENSORPACK", "unknown_key"]

# Other spellings that are accepted: those of tensorpack's example and of earlier versions.
ALIASES = {
    "BACKBONE.RESNET_NUM_BLOCKS": "BACKBONE.RESNET_NUM_BLOCK",
    "PREPROC.TRAIN_SHORT_EDGE_SIZE": "PREPROC.SHORT_EDGE_SIZE",
    "DATA.FILTER_EMPTY_ANNOTATIONS": "DATA.FILTER_EMPTY",
    "TRAIN.STEPS_PER_EPOCH": "TRAIN.PERIOD_STEPS",
}

# Settings of tensorpack's example that do not exist here, and what to do instead.
TENSORPACK = {
    "DATA.ABSOLUTE_COORD": "boxes are absolute pixels; for boxes in 0 to 1 end the entry in DATA.DATASETS with "
    "'normalised=True'",
    "DATA.NUM_CLASS": "it follows from the data; leave it out",
    "FPN.RESOLUTION_REQUIREMENT": "it follows from the network; leave it out",
    "MRCNN.ACCURATE_PASTE": "masks are always pasted accurately; leave it out",
    "RPN.NUM_ANCHOR": "it follows from RPN.ANCHOR_SIZES and RPN.ANCHOR_RATIOS; leave it out",
    "TRAIN.NUM_GPUS": "all visible GPUs are used; choose some with CUDA_VISIBLE_DEVICES in the environment "
    "(TRAIN.CPU_REPLICAS is for machines without GPUs)",
    "TRAIN.STARTING_EPOCH": "leave it out; --resume continues a run at its last checkpoint",
}

_LENGTH = "TRAIN.LR_SCHEDULE, whose last number is the length in iterations, or TRAIN.MAX_STEPS or TRAIN.EPOCHS"
_SIZES = "PREPROC.SHORT_EDGE_SIZE (training), PREPROC.TEST_SHORT_EDGE_SIZE and PREPROC.MAX_SIZE"
# Setting to use -> last words of the keys that other systems have for it.
_OTHER_WORDS = {
    "TRAIN.BASE_LR": "LR LEARNING_RATE LEARNINGRATE INITIAL_LR INIT_LR LR0 LRATE",
    "TRAIN.BATCH_SIZE_PER_GPU (images of a replica), TRAIN.TOTAL_BATCH (images of an update) or TEST.BATCH_SIZE":
    "BATCH_SIZE BATCH BATCHSIZE IMS_PER_BATCH IMAGES_PER_BATCH IMGS_PER_GPU IMS_PER_GPU IMAGES_PER_GPU SAMPLES_PER_GPU "
    "TOTAL_BATCH_SIZE",
    _LENGTH: "MAX_ITER MAX_ITERS ITERATIONS "
    "NUM_ITERS STEPS NUM_STEPS TOTAL_STEPS MAX_ITERATIONS",
    "TRAIN.EPOCHS": "EPOCHS EPOCH NUM_EPOCHS MAX_EPOCH MAX_EPOCHS TRAIN_EPOCHS TOTAL_EPOCHS",
    "TRAIN.LR_SCHEDULE and TRAIN.LR_POLICY": "SCHEDULER LR_SCHEDULER SCHEDULE LR_STEPS MILESTONES LR_DECAY",
    "TRAIN.WARMUP": "WARMUP_STEPS WARMUP_ITERS WARMUP_ITERATIONS WARMUP_EPOCHS",
    "TRAIN.WARMUP_INIT_LR": "WARMUP_LR WARMUP_FACTOR",
    "TRAIN.GRADIENT_CLIP": "CLIP GRAD_CLIP CLIP_GRAD CLIP_GRADIENTS CLIP_NORM GRADIENT_CLIPPING MAX_NORM",
    "TRAIN.PRECISION=bfloat16 or float16": "AMP FP16 BF16 HALF MIXED_PRECISION DTYPE",
    "TRAIN.EMA_DECAY": "EMA MODEL_EMA",
    "TRAIN.MOMENTUM; SGD with momentum is the only optimiser": "OPTIMIZER OPTIM SOLVER",
    "TRAIN.CHECKPOINT_PERIOD": "SAVE_PERIOD SAVE_EVERY SNAPSHOT",
    "CUDA_VISIBLE_DEVICES in the environment; all visible GPUs are used":
    "GPUS GPU NUM_GPU NUM_GPUS NGPUS DEVICE DEVICES GPU_IDS",
    "--resume": "RESUME START_EPOCH",
    "--logdir": "OUTPUT_DIR LOG_DIR LOGDIR WORK_DIR OUTPUT SAVE_DIR",
    "BACKBONE.WEIGHTS for a backbone, --load for a whole detector":
    "WEIGHTS CHECKPOINT INIT_CHECKPOINT PRETRAINED PRETRAINED_WEIGHTS LOAD INIT_WEIGHTS LOAD_FROM",
    "DATA.CLASS_NAMES to choose some classes; their number is read from the data": "NUM_CLASSES CLASSES NC NAMES",
    "DATA.TRAIN and DATA.VAL": "DATASET DATASETS_TRAIN TRAIN_SET VAL_SET TRAIN_DATASET VAL_DATASET",
    "DATA.BASEDIR": "BASE_DIR DATA_DIR DATADIR DATA_ROOT ROOT DATASET_DIR DATA_PATH",
    "DATA.NUM_WORKERS": "WORKERS NUM_THREADS THREADS WORKERS_PER_GPU",
    _SIZES: "IMAGE_SIZE IMG_SIZE IMGSZ INPUT_SIZE MIN_SIZE_TRAIN IMAGE_MIN_SIDE SHORT_EDGE MIN_SIDE RESIZE IMG_SCALE",
    "PREPROC.TEST_SHORT_EDGE_SIZE": "MIN_SIZE_TEST",
    "PREPROC.MAX_SIZE": "MAX_SIZE_TRAIN MAX_SIZE_TEST LONG_EDGE MAX_SIDE",
    "PREPROC.FLIP": "HFLIP RANDOM_FLIP FLIPLR HORIZONTAL_FLIP",
    "PREPROC.PIXEL_MEAN": "MEAN IMAGE_MEAN",
    "PREPROC.PIXEL_STD": "STD IMAGE_STD",
    "BACKBONE.RESNET_NUM_BLOCK": "DEPTH LAYERS RESNET_DEPTH NUM_LAYERS",
    "BACKBONE.NORM=SyncBN": "SYNC_BN SYNCBN",
    "BACKBONE.FREEZE_AT": "FROZEN_STAGES FREEZE FREEZE_BACKBONE",
    "MODE_MASK": "MASK MASK_ON",
    "MODE_KEYPOINT": "KEYPOINT KEYPOINTS KEYPOINT_ON",
    "TEST.RESULT_SCORE_THRESH": "SCORE_THRESH SCORE_THRESHOLD SCORE_THRESH_TEST SCORE_THR CONF CONFIDENCE THRESHOLD",
    "TEST.FRCNN_NMS_THRESH": "NMS_THRESH NMS_THRESH_TEST NMS_THRESHOLD NMS_IOU",
    "TEST.RESULTS_PER_IM": "DETECTIONS_PER_IMAGE DETECTIONS_PER_IM MAX_DETECTIONS MAX_DETS MAX_PER_IMG",
}  # fmt: skip


def unknown_key(key: str, known: list[str]) -> str:
    """The error message for an unknown key."""
    key = shown(key)[1:-1]
    written = re.sub(r"[\s-]+", "_", key.strip().upper())
    members = [k for k in known if k.startswith(f"{written}.")]
    if members:
        return f"{key} is a group of settings; set one of its members, e.g. {', '.join(members[:4])}"
    if written in TENSORPACK:
        return f"there is no setting {key}: {TENSORPACK[written]}"
    meant = _meant(written, [*known, *ALIASES])
    hint = f"did you mean {meant}?" if meant in known else f"use {meant}" if meant else "--print-config lists them all"
    return f"unknown setting {key}; {hint}"


def _meant(key: str, known: list[str]) -> str:
    """The settings probably meant: with the same letters, the same last word or a synonym of it, or similar letters."""
    meanings = {word: meaning for meaning, words in _OTHER_WORDS.items() for word in words.split()}
    names: dict[str, list[str]] = {}
    for k in known:
        names.setdefault(k.rpartition(".")[2], []).append(k)
    name = key.rpartition(".")[2]
    if key in known:
        return key
    if name in meanings:
        return meanings[name]
    if name in names:
        return " or ".join(names[name])
    for cutoff in (0.8, 0.6):
        for near in nearest(key, known, cutoff):
            return near
        for near in nearest(name, [*names, *meanings], cutoff):
            return " or ".join(names[near]) if near in names else meanings[near]
    return ""
