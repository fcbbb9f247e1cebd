# shellcheck shell=bash disable=SC2034
# Shared by the launchers: turns the arguments of a training run into the train.py command.
#
# A launcher sources this, passes every argument that it does not know to `training_word`, and calls
# `make_train_command`.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
launcher=$(basename "$0")

recipe=
data=
weights=
logdir=
load=
python=
dry_run=0
settings=()
train_script=$repository/train.py
train_command=()

die() {
    echo "$launcher: $*" >&2
    exit 2
}

# The comment at the top of the launcher, which is its manual.
usage() { awk 'NR > 1 && !/^#/ {exit} NR > 1 && !/^#SBATCH/ {sub(/^# ?/, ""); print}' "$1"; }

# Takes one word of the command line, and its value where it has one; sets `taken` to the number of words it used.
training_word() {
    taken=2
    case $1 in
        --dry-run) dry_run=1 taken=1 ;;
        --data) data=${2:-} ;;
        --weights) weights=${2:-} ;;
        --logdir) logdir=${2:-} ;;
        --load) load=${2:-} ;;
        --python) python=${2:-} ;;
        -*) die "unknown option $1; --help lists them" ;;
        *=*) settings+=("$1") taken=1 ;;
        *)
            [ -z "$recipe" ] || die "one recipe is enough: $recipe or $1?"
            recipe=$1 taken=1
            ;;
    esac
    [ "$taken" = 1 ] || [ -n "${2:-}" ] || die "$1 needs a value"
}

# The settings of a recipe, on one line.
recipe_settings() {
    awk -v name="$1" '$1 == name {$1 = ""; sub(/^ +/, ""); print; found = 1} END {exit !found}' \
        "$repository/scripts/recipes.txt" && return
    die "unknown recipe '$1': one of $(awk '!/^#/ && NF {printf "%s%s", s, $1; s = ", "}' "$repository/scripts/recipes.txt")"
}

# Sets `train_command` from what was read, with `train_script`, the path of train.py where it will run.
make_train_command() {
    local of_recipe
    [ -n "$recipe" ] || die "name a recipe: one of those in scripts/recipes.txt; --help explains"
    of_recipe=$(recipe_settings "$recipe") || exit 2
    if [ -z "$python" ]; then
        python=python3
        [ ! -x "$repository/.venv/bin/python" ] || python=$repository/.venv/bin/python
    fi
    # A fixed directory for each recipe: the same command again continues the run.
    logdir=${logdir:-train_log/$recipe}
    train_command=("$python" "$train_script" --config TRAINER=horovod)
    # shellcheck disable=SC2206 # settings of recipes have no spaces inside
    train_command+=($of_recipe)
    [ -z "$data" ] || train_command+=("DATA.BASEDIR=$data")
    [ -z "$weights" ] || train_command+=("BACKBONE.WEIGHTS=$weights")
    train_command+=(${settings[@]+"${settings[@]}"})
    [ -z "$load" ] || train_command+=(--load "$load")
    train_command+=(--logdir "$logdir")
}

# Prints a command as one line that a shell reads back as the same words.
show() {
    local word line=
    for word in "$@"; do
        # Words of plain characters stay readable; brackets need quotes, since a shell may take them for file names.
        if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then line+=" $word"; else line+=" '${word//\'/\'\\\'\'}'"; fi
    done
    echo "${line# }"
}

need_horovod() {
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("horovod") is None)' ||
        die "horovod is missing in $python: run \`make horovod\`"
}
