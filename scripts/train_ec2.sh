#!/usr/bin/env bash
# Trains on the GPUs of one machine, such as an EC2 instance, with one Horovod process per GPU.
#
#   scripts/train_ec2.sh GPUS RECIPE [KEY=VAL ...] [options]
#   scripts/train_ec2.sh 8 r50-fpn --data /data/coco --weights /data/R50.npz TRAIN.LR_SCHEDULE=1x
#
#   GPUS            number of processes; "all" for every GPU of the machine (p3.16xlarge, p4d.24xlarge: 8, g5.12xlarge: 4)
#   RECIPE          a name of scripts/recipes.txt
#   KEY=VAL         further settings, which win over the recipe's
#   --data DIR      DATA.BASEDIR        --weights FILE  BACKBONE.WEIGHTS
#   --logdir DIR    where checkpoints go (default train_log/RECIPE); the same command again continues from the newest
#   --load FILE     a model to start from
#   --python PYTHON interpreter (default .venv/bin/python)
#   --cpu           processes on the CPU: a test of the launch, not a way to train
#   --grace S       seconds that SIGTERM leaves for the checkpoint (default 50; a spot instance gives 120)
#   --dry-run       print the command and end
#
# Before: an image with the NVIDIA driver (AWS Deep Learning Base), then once `make venv REQUIREMENTS=requirements-gpu.txt` and
# `HOROVOD_GPU_OPERATIONS=NCCL make horovod`. Keep the data and --logdir on a volume that survives the instance (EBS,
# FSx): a new spot instance with the same command continues the run.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

gpus=
cpu=0
grace=50
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            usage "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --cpu)
            cpu=1
            shift
            continue
            ;;
        --grace)
            grace=${2:-}
            [[ $grace =~ ^[0-9]+$ ]] || die "--grace needs a number of seconds"
            shift 2
            continue
            ;;
    esac
    if [ -z "$gpus" ] && [[ $1 =~ ^([0-9]+|all)$ ]]; then
        gpus=$1
        shift
        continue
    fi
    training_word "$@"
    shift "$taken"
done
[ -n "$gpus" ] || die "say how many GPUs: $launcher GPUS RECIPE; --help explains"
make_train_command

count_gpus() { { nvidia-smi --list-gpus 2>/dev/null || true; } | awk '/^GPU/ {n++} END {print n + 0}'; }
if [ $cpu = 0 ] && { [ "$dry_run" = 0 ] || [ "$gpus" = all ]; }; then
    present=$(count_gpus)
    [ "$gpus" != all ] || gpus=$present
    [ "$present" -gt 0 ] || die "this machine has no GPU that nvidia-smi lists (--cpu tests the launch without one)"
    [ "$gpus" -le "$present" ] || die "$gpus GPUs were asked for and this machine has $present"
fi
[[ $gpus =~ ^[1-9][0-9]*$ ]] || die "GPUS=$gpus must be 1 or more"

command=("$python" "$repository/scripts/horovod_node.py" --slots "$gpus" --grace "$grace" -- "${train_command[@]}")
if [ "$dry_run" = 1 ]; then
    show "${command[@]}"
    exit 0
fi
need_horovod
[ $cpu = 0 ] || export CUDA_VISIBLE_DEVICES=-1
cd "$repository"
exec "${command[@]}"
