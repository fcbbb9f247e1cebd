#!/usr/bin/env bash
# Trains small detectors from scratch on two small public sets of photographs, on a CPU, and draws the curves:
#   benchmarks/real_data.sh balloon   Mask R-CNN on balloons (61 training images, outlines)
#   benchmarks/real_data.sh bccd      Faster R-CNN on blood cells (292 training images, boxes)
# The sets are expected under ../shared/data or $REAL_DATA, in COCO's format; settings may follow the name.
# Results: train_log/NAME/{log.jsonl,curves.png,results.metrics.json,predictions/}. docs/REAL_DATA.md has those reached.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
name=${1:-}
case $name in
balloon)
    model=(
        MODE_MASK=True MRCNN.HEAD_DIM=32
        RPN.ANCHOR_SIZES=[16,32,64,128,256]
        PREPROC.SHORT_EDGE_SIZE=[160,256] PREPROC.TEST_SHORT_EDGE_SIZE=224 PREPROC.MAX_SIZE=384
        TRAIN.LR_SCHEDULE=[1000,1150,1200] RPN.CROWD_OVERLAP_THRESH=0.7
    )
    ;;
bccd)
    model=(
        MODE_MASK=False
        RPN.ANCHOR_SIZES=[16,32,64,128,256]
        PREPROC.SHORT_EDGE_SIZE=[224,288] PREPROC.TEST_SHORT_EDGE_SIZE=256 PREPROC.MAX_SIZE=640
        TRAIN.LR_SCHEDULE=[1500,1800,2000]
    )
    ;;
*)
    echo "real_data: name a set: balloon or bccd" >&2
    exit 2
    ;;
esac
shift
data=${REAL_DATA:-../shared/data}/$name
if [ ! -d "$data/annotations" ]; then
    echo "real_data: $data/annotations is not there; point REAL_DATA at the folder that holds $name/" >&2
    exit 2
fi
sets='{"train": ["annotations/instances_train.json", "images/train"], "val": ["annotations/instances_val.json", "images/val"]}'
logdir=train_log/$name
"$python" train.py --logdir "$logdir" --config MODE_FPN=True "DATA.BASEDIR=$data" "DATA.DATASETS=$sets" \
    DATA.TRAIN=train DATA.VAL=val DATA.NUM_WORKERS=1 \
    BACKBONE.RESNET_NUM_BLOCK=[1,1,2,1] BACKBONE.STEM_CHANNELS=32 BACKBONE.WIDTH_PER_GROUP=32 \
    BACKBONE.NORM=GN BACKBONE.FREEZE_AT=0 FPN.NORM=GN FPN.NUM_CHANNEL=64 FPN.FRCNN_FC_HEAD_DIM=128 \
    TRAIN.BATCH_SIZE_PER_GPU=4 TRAIN.LR_SCALING=none TRAIN.BASE_LR=0.04 TRAIN.WARMUP=200 TRAIN.WARMUP_INIT_LR=0.002 \
    TRAIN.GRADIENT_CLIP=5.0 TRAIN.PERIOD_STEPS=200 TRAIN.EVAL_PERIOD=1 TEST.BATCH_SIZE=4 \
    RPN.TRAIN_PER_LEVEL_NMS_TOPK=500 RPN.TRAIN_FPN_NMS_TOPK=500 RPN.TEST_PER_LEVEL_NMS_TOPK=500 \
    RPN.TEST_FPN_NMS_TOPK=500 FRCNN.BATCH_PER_IM=128 "${model[@]}" "$@"
"$python" train.py --evaluate "$logdir/results.json" --load "$logdir"
"$python" train.py --predict "$data/images/val" --load "$logdir" --output "$logdir/predictions" --no-window
"$python" tools/curves.py "$logdir" --out "$logdir/curves.png"
