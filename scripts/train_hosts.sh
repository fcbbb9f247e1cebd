#!/usr/bin/env bash
# Trains on several machines that log in to each other with ssh, with one Horovod process per GPU.
#
#   scripts/train_hosts.sh HOST:GPUS,HOST:GPUS,... RECIPE [KEY=VAL ...] [options]
#   scripts/train_hosts.sh 10.0.0.1:8,10.0.0.2:8 r50-fpn --data /data/coco --weights /data/R50.npz --interface ens5
#
#   RECIPE           a name of scripts/recipes.txt
#   KEY=VAL          further settings, which win over the recipe's
#   --data DIR       DATA.BASEDIR        --weights FILE  BACKBONE.WEIGHTS
#   --logdir DIR     where checkpoints go (default train_log/RECIPE); the same command again continues from the newest
#   --load FILE      a model to start from
#   --python PYTHON  interpreter, of the same path on every machine (default .venv/bin/python)
#   --interface NAME network between the machines (EC2: ens5, eth0); Horovod finds one that reaches all when not given
#   --ssh-port N     --identity FILE     how to log in
#   --grace S        seconds that SIGTERM leaves for the checkpoint (default 50)
#   --dry-run        print the command and end
#
# Run it on the first machine. Before: this directory, its environment (with Horovod), the data and the weights at the
# same paths on every machine (a shared file system, or rsync -a), and ssh from the first to the others without a
# question. --logdir is written by the first machine's rank 0 alone. Between the machines any TCP port must be open
# (EC2: a security group that admits itself). Each machine is asked for all of this before the start.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

hosts=
interface=
ssh_port=
identity=
grace=50
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            usage "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --interface | --ssh-port | --identity | --grace)
            [ -n "${2:-}" ] || die "$1 needs a value"
            case $1 in
                --interface) interface=$2 ;;
                --ssh-port) ssh_port=$2 ;;
                --identity) identity=$2 ;;
                --grace) grace=$2 ;;
            esac
            shift 2
            continue
            ;;
    esac
    if [ -z "$hosts" ] && [[ $1 =~ ^[A-Za-z0-9._-]+:[0-9] ]]; then
        hosts=$1
        shift
        continue
    fi
    training_word "$@"
    shift "$taken"
done
[ -n "$hosts" ] || die "name the machines and their GPUs: HOST:GPUS,HOST:GPUS; --help explains"
[[ $grace =~ ^[0-9]+$ ]] || die "--grace needs a number of seconds"
make_train_command

total=0
names=()
IFS=, read -ra entries <<<"$hosts"
for entry in "${entries[@]}"; do
    [[ $entry =~ ^([A-Za-z0-9._-]+):([1-9][0-9]*)$ ]] || die "'$entry' is not of the form HOST:GPUS"
    names+=("${BASH_REMATCH[1]}")
    total=$((total + BASH_REMATCH[2]))
done

find_horovodrun
command=("$horovodrun" --gloo -np "$total" -H "$hosts")
[ -z "$interface" ] || command+=(--network-interfaces "$interface")
[ -z "$ssh_port" ] || command+=(-p "$ssh_port")
[ -z "$identity" ] || command+=(-i "$identity")
command+=("${train_command[@]}")
if [ "$dry_run" = 1 ]; then
    show "${command[@]}"
    exit 0
fi
need_horovod

login=(ssh -o BatchMode=yes -o ConnectTimeout=10 -o StrictHostKeyChecking=no)
[ -z "$ssh_port" ] || login+=(-p "$ssh_port")
[ -z "$identity" ] || login+=(-i "$identity")
# What must be the same everywhere, as "what: sum"; run here and there.
fingerprint="cd $(show "$repository") && sha256sum train.py config.py | sha256sum | cut -c1-16 &&
    $(show "$python") -c 'import importlib.metadata as m; print(m.version(\"horovod\"), m.version(\"numpy\"))'"
[ -z "$data" ] || fingerprint+=" && ls -d $(show "$data")"
[ -z "$weights" ] || fingerprint+=" && ls -d $(show "$weights")"
here=$(bash -c "$fingerprint" 2>&1) || die "this machine is not ready: $here"
for name in "${names[@]}"; do
    there=$("${login[@]}" "$name" "$fingerprint" 2>&1) || die "$name is not ready: $(tail -n 1 <<<"$there")"
    [ "$(grep -v '^Warning: Permanently added' <<<"$there")" = "$here" ] ||
        die "$name has another version of the code or of its packages than this machine: bring them in line"
done
export HOROVOD_GRACEFUL_TERMINATION_TIME_S=$grace
cd "$repository"
exec "${command[@]}"
