#!/usr/bin/env bash
# Trains on a Kubernetes cluster, with one pod per machine and one Horovod process per GPU; no operator is needed.
#
#   scripts/train_kubernetes.sh PODS GPUS RECIPE --image IMAGE [KEY=VAL ...] [options]
#   scripts/train_kubernetes.sh 4 8 r50-fpn --image registry/packrcnn:1 --claim coco --data /data/coco \
#       --weights /data/R50.npz --logdir /data/runs/r50-fpn
#
#   PODS GPUS        machines, and GPUs of each (0: one process on the CPU, to test the cluster)
#   RECIPE           a name of scripts/recipes.txt
#   --image IMAGE    holds the repository in --directory (default /packrcnn) with its environment and Horovod
#   --name NAME      of the Job and its Service (default packrcnn-RECIPE)
#   --claim CLAIM    PersistentVolumeClaim (ReadWriteMany) that is mounted at /data
#   --retries N      how often a failed pod is started again (default 5); preempted ones always are
#   KEY=VAL          further settings, which win over the recipe's
#   --data DIR       DATA.BASEDIR        --weights FILE  BACKBONE.WEIGHTS
#   --logdir DIR     where checkpoints go (default /data/train_log/RECIPE); put it on the claim: restarts continue there
#   --load FILE      a model to start from
#   --python PYTHON  interpreter in the image (default .venv/bin/python of the repository)
#   --dry-run        print the command of a pod (as a comment) and the manifest, and end
#
# Makes a Service without an address, so that pods find pod 0 by name, and a Job that numbers its pods; each runs
# scripts/horovod_node.py. When one pod ends, all end, and all are started again and continue from the last checkpoint.
# `kubectl logs -f job/NAME` follows pod 0 of it; `kubectl delete job,service NAME` stops the run with a checkpoint.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

numbers=()
image=
name=
claim=
retries=5
directory=/packrcnn
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            usage "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --image | --name | --claim | --retries | --directory)
            [ -n "${2:-}" ] || die "$1 needs a value"
            declare "${1#--}=$2"
            shift 2
            continue
            ;;
    esac
    if [ ${#numbers[@]} -lt 2 ] && [[ $1 =~ ^[0-9]+$ ]]; then
        numbers+=("$1")
        shift
        continue
    fi
    training_word "$@"
    shift "$taken"
done
if [ ${#numbers[@]} != 2 ] || [ "${numbers[0]}" = 0 ]; then die "say how many pods and GPUs: PODS GPUS; --help explains"; fi
[ -n "$image" ] || die "--image is missing: the container image with the repository and its environment"
[[ $retries =~ ^[0-9]+$ ]] || die "--retries needs a number"
pods=${numbers[0]}
gpus=${numbers[1]}
python=${python:-$directory/.venv/bin/python}
logdir=${logdir:-/data/train_log/$recipe}
train_script=$directory/train.py
make_train_command
name=${name:-packrcnn-$recipe}
[[ $name =~ ^[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?$ ]] || die "--name $name: small letters, digits and '-', up to 52"

slots=$((gpus > 0 ? gpus : 1))
command=("$python" "$directory/scripts/horovod_node.py" --nodes "$pods" --master "$name-0.$name" --port 23456
    --slots "$slots" --grace 100 -- "${train_command[@]}")

# A word as a YAML string in single quotes.
quoted() { printf "'%s'" "${1//\'/\'\'}"; }

manifest() {
    local word
    cat <<YAML
apiVersion: v1
kind: Service
metadata:
  name: $name
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    job-name: $name
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $name
spec:
  completionMode: Indexed
  completions: $pods
  parallelism: $pods
  backoffLimit: $((pods * retries))
  podFailurePolicy:
    rules:
    # A mistake in the command line or the data stays one.
    - action: FailJob
      onExitCodes: {containerName: train, operator: In, values: [2]}
    - action: Ignore
      onPodConditions:
      - {type: DisruptionTarget, status: 'True'}
  template:
    spec:
      subdomain: $name
      restartPolicy: Never
      terminationGracePeriodSeconds: 120
      containers:
      - name: train
        image: $(quoted "$image")
        workingDir: $(quoted "$directory")
        command:
YAML
    for word in "${command[@]}"; do echo "        - $(quoted "$word")"; done
    if [ "$gpus" -gt 0 ]; then
        printf '        resources:\n          limits:\n            nvidia.com/gpu: %s\n' "$gpus"
    fi
    # Data workers and NCCL share memory through /dev/shm, of which a container has 64 MB only.
    printf '        volumeMounts:\n        - {name: shm, mountPath: /dev/shm}\n'
    [ -z "$claim" ] || printf '        - {name: data, mountPath: /data}\n'
    printf '      volumes:\n      - {name: shm, emptyDir: {medium: Memory}}\n'
    [ -z "$claim" ] || printf '      - name: data\n        persistentVolumeClaim: {claimName: %s}\n' "$(quoted "$claim")"
    # One pod per machine: GPUs of one pod would otherwise be split over the network for nothing.
    cat <<YAML
      affinity:
        podAntiAffinity:
          preferredDuringSchedulingIgnoredDuringExecution:
          - weight: 100
            podAffinityTerm:
              topologyKey: kubernetes.io/hostname
              labelSelector: {matchLabels: {job-name: $name}}
YAML
}

if [ "$dry_run" = 1 ]; then
    echo "# $(show "${command[@]}")"
    manifest
    exit 0
fi
command -v kubectl >/dev/null || die "kubectl is missing; --dry-run prints the manifest for another machine to apply"
manifest | kubectl apply -f -
