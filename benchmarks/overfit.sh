#!/usr/bin/env bash
# Over-fits R50-FPN Mask R-CNN, from scratch with group norm, on 8 images of COCO, and scores it on the same images.
# Usage: benchmarks/overfit.sh [COCO-like folder] [log directory]; about 15 minutes on 2 idle cores.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$(realpath "${1:-../shared/data/coco_tiny}")
logdir=${2:-train_log/overfit}
python=${PYTHON:-.venv/bin/python}
[ -d "$data/train2017" ] || { echo "overfit.sh: $data holds no train2017; give a COCO folder as first argument" >&2; exit 2; }
mkdir -p build
$python tools/subset.py "$data/annotations/instances_train2017.json" build/eight.json \
  --images 8 --max-objects 6 --min-area 4000
$python train.py --logdir "$logdir" --config \
  MODE_FPN=True BACKBONE.NORM=GN FPN.NORM=GN BACKBONE.FREEZE_AT=0 \
  "DATA.DATASETS={'eight':['$PWD/build/eight.json','$data/train2017']}" DATA.TRAIN=eight DATA.VAL=eight \
  PREPROC.SHORT_EDGE_SIZE=192 PREPROC.TEST_SHORT_EDGE_SIZE=192 PREPROC.MAX_SIZE=320 PREPROC.FLIP=False \
  FRCNN.BATCH_PER_IM=128 TRAIN.LR_SCALING=none TRAIN.BASE_LR=0.01 TRAIN.WARMUP=200 \
  TRAIN.LR_SCHEDULE=[1100,1400,1500] TRAIN.MAX_STEPS=750 TRAIN.GRADIENT_CLIP=10 \
  TRAIN.PERIOD_STEPS=250 TRAIN.EVAL_PERIOD=1 TRAIN.KEEP_CHECKPOINTS=2 DATA.NUM_WORKERS=1
