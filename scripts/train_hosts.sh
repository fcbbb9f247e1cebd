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
#   --interface NAME network between the machines (EC2: ens5, eth0); default: the one that leads to the first HOST
#   --port N         of the first machine; default: a free one
#   --ssh-port N     --identity FILE     how to log in
#   --grace S        seconds that SIGTERM leaves for the checkpoint (default 50)
#   --dry-run        print the command of each machine and end
#
# Run it on the first machine, which the others must reach as it is named here. Before: this directory, its environment
# (with Horovod), the data and the weights at the same paths on every machine (a shared file system, or rsync -a), and
# ssh from the first to the others without a question. --logdir is written by the first machine's rank 0 alone. Between
# the machines any TCP port must be open (EC2: a security group that admits itself). Each machine is asked for all of
# this before the start. Environment variables such as NCCL_*, FI_*, HOROVOD_* and LD_LIBRARY_PATH of the first machine
# hold on all of them. Exit code 75: a machine is lost or not there; the same command without it, or with another, continues.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

hosts=
interface=
ssh_port=
identity=
port=
grace=50
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            usage "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --interface | --ssh-port | --identity | --grace | --port)
            [ -n "${2:-}" ] || die "$1 needs a value"
            case $1 in
                --interface) interface=$2 ;;
                --ssh-port) ssh_port=$2 ;;
                --identity) identity=$2 ;;
                --grace) grace=$2 ;;
                --port) port=$2 ;;
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
[[ $port =~ ^[0-9]*$ ]] || die "--port needs a number"
make_train_command

names=()
slots=()
IFS=, read -ra entries <<<"$hosts"
for entry in "${entries[@]}"; do
    [[ $entry =~ ^([A-Za-z0-9._-]+):([1-9][0-9]*)$ ]] || die "'$entry' is not of the form HOST:GPUS"
    names+=("${BASH_REMATCH[1]}")
    slots+=("${BASH_REMATCH[2]}")
done

login=(ssh -o BatchMode=yes -o ConnectTimeout=10 -o StrictHostKeyChecking=accept-new -o LogLevel=ERROR)
[ -z "$ssh_port" ] || login+=(-p "$ssh_port")
[ -z "$identity" ] || login+=(-i "$identity")

# Sets `command` to what machine $1 runs.
make_machine_command() {
    command=("$python" "$repository/scripts/horovod_node.py" --nodes "${#names[@]}" --node-rank "$1"
        --master "${names[0]}" --port "$port" --slots "${slots[$1]}" --grace "$grace" --wait 120)
    [ -z "$interface" ] || command+=(--interface "$interface")
    command+=(-- "${train_command[@]}")
}

# Sets `command` to how machine $1 is started from here.
make_login_command() {
    local variable environment=()
    for variable in $(compgen -e | grep -E '^(NCCL_|HOROVOD_|PACKRCNN_|OMP_|FI_|CUDA_|TF_(GPU|XLA|ENABLE)_|LD_LIBRARY_PATH$)'); do
        environment+=("$variable=${!variable}")
    done
    make_machine_command "$1"
    # A connection that is cut must not keep this end waiting.
    command=("${login[@]}" -n -o ServerAliveInterval=10 -o ServerAliveCountMax=3 "${names[$1]}"
        "cd $(show "$repository") && exec $(show env ${environment[@]+"${environment[@]}"} "${command[@]}")")
}

if [ "$dry_run" = 1 ]; then
    port=${port:-PORT}
    make_machine_command 0
    show "${command[@]}"
    for ((i = 1; i < ${#names[@]}; i++)); do
        make_login_command "$i"
        show "${command[@]}"
    done
    exit 0
fi
need_horovod
port=$("$python" - "${names[0]}" "${port:-0}" 2>&1 <<'PY'
import socket, sys

host, port = sys.argv[1], int(sys.argv[2])
try:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((host, port))
        print(s.getsockname()[1])
except OSError as e:
    sys.exit(f"{e.strerror} (port {port})" if port and e.errno == 98 else "it is not an address of this machine")
PY
) || die "the first machine, ${names[0]}, must be this one: $port"

# What must be the same everywhere, as "what: sum"; run here and there.
fingerprint="cd $(show "$repository") && sha256sum train.py config.py scripts/horovod_node.py | sha256sum | cut -c1-16 &&
    $(show "$python") -c 'import importlib.metadata as m; print(m.version(\"horovod\"), m.version(\"numpy\"))'"
[ -z "$data" ] || fingerprint+=" && ls -d $(show "$data")"
[ -z "$weights" ] || fingerprint+=" && ls -d $(show "$weights")"
here=$(bash -c "$fingerprint" 2>&1) || die "this machine is not ready: $(tail -n 1 <<<"$here")"
for name in "${names[@]:1}"; do
    code=0
    there=$("${login[@]}" -n "$name" "$fingerprint" 2>&1) || code=$?
    if [ $code = 255 ]; then # of ssh itself
        echo "$launcher: $name is not there: $(tail -n 1 <<<"$there")" >&2
        exit 75
    fi
    [ $code = 0 ] || die "$name is not ready: $(tail -n 1 <<<"$there")"
    [ "$there" = "$here" ] ||
        die "$name has another version of the code or of its packages than this machine: bring them in line"
done
cd "$repository"
for ((i = 1; i < ${#names[@]}; i++)); do
    make_login_command "$i"
    "${command[@]}" &
done
make_machine_command 0
# Replaces this shell, so that signals reach it; it informs the other machines.
exec "${command[@]}"
