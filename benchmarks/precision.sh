#!/usr/bin/env bash
# Trains the demo in float32 with two seeds and in bfloat16, and draws the curves into one picture:
#   benchmarks/precision.sh [PICTURE [PRECISION:SEED …]]     (default: train_log/precision.png)
# On a CPU half precision is emulated: this shows that it trains alike, not how fast. A quarter of an hour and more.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
picture=${1:-train_log/precision.png}
[ $# -gt 1 ] && shift || set -- float32:42 float32:43 bfloat16:42
runs=()
for run in "$@"; do
    precision=${run%:*} seed=${run#*:}
    logdir=train_log/precision-$precision-$seed
    "$python" -m demo.run --logdir "$logdir" --config "TRAIN.PRECISION=$precision" "TRAIN.SEED=$seed" \
        TRAIN.PERIOD_STEPS=200 TRAIN.EVAL_PERIOD=1
    runs+=("$logdir")
done
"$python" tools/curves.py "${runs[@]}" --keys total_loss bbox/AP50 segm/AP50 --out "$picture"
for run in "${runs[@]}"; do
    "$python" -c 'import json, sys
m = json.load(open(sys.argv[1] + "/metrics.json"))
names = ["bbox/AP50", "segm/AP50", "bbox/AP", "segm/AP", "seconds_training", "peak_memory_mib"]
print(sys.argv[1], *(f"{n} {m[n]:.4g}" for n in names))' "$run"
done
