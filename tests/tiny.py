"""Settings of a detector small enough to train for a few steps in a test, on the photographs of tests/data."""

from pathlib import Path

COCO_MINI = Path(__file__).parent / "data" / "coco_mini"

TINY_MODEL = [
    "MODE_FPN=True",
    "BACKBONE.RESNET_NUM_BLOCK=[1,1,1,1]",
    "BACKBONE.STEM_CHANNELS=8",
    "BACKBONE.FREEZE_AT=0",
    "FPN.NUM_CHANNEL=16",
    "FPN.FRCNN_FC_HEAD_DIM=32",
    "MRCNN.HEAD_DIM=16",
    "RPN.TRAIN_PER_LEVEL_NMS_TOPK=100",
    "RPN.TRAIN_FPN_NMS_TOPK=100",
    "RPN.TEST_PER_LEVEL_NMS_TOPK=50",
    "RPN.TEST_FPN_NMS_TOPK=50",
    "FRCNN.BATCH_PER_IM=32",
    "PREPROC.SHORT_EDGE_SIZE=[96,128]",
    "PREPROC.MAX_SIZE=192",
    "PREPROC.TEST_SHORT_EDGE_SIZE=96",
]

# The region proposal network of a C4 model alone, a third of the graph: for tests that the model does not matter to.
RPN_ALONE = ["MODE_FPN=False", "MODE_MASK=False", "MODE_RPN_ONLY=True", "RPN.HEAD_DIM=32"]

TINY_TRAINING = [
    *TINY_MODEL,
    f"DATA.BASEDIR={COCO_MINI}",
    "DATA.NUM_WORKERS=0",
    "TRAIN.EVAL_PERIOD=0",
    "TRAIN.BASE_LR=0.001",
    "TRAIN.WARMUP=2",
    "TRAIN.LR_SCALING=none",
    "TRAIN.GRADIENT_CLIP=1.0",
]
