#!/usr/bin/env bash
# Builds and checks Horovod for the TensorFlow that is installed, and installs it beside it (`make horovod`).
#
#   scripts/install_horovod.sh [--python PYTHON] [--nccl] [--force] [--check]
#
#   --python PYTHON  interpreter (and so the environment) to install into; default $PYTHON, .venv/bin/python, python3
#   --nccl           reduce on GPUs with NCCL; the same as HOROVOD_GPU_OPERATIONS=NCCL. Needs nvcc and NCCL's headers,
#                    which are taken from the package nvidia-nccl-cu12 of requirements-gpu.txt if HOROVOD_NCCL_HOME,
#                    or HOROVOD_NCCL_INCLUDE and HOROVOD_NCCL_LIB, name no other place
#   --force          build again even when this Horovod is installed or cached
#   --check          only check the Horovod that is installed
#
# Needs a C++ compiler and make, and cmake, which comes from the package index where the machine has none. Exit code 3:
# the compiler or make is missing, which an administrator must install; 1: anything else.
#
# Returns at once when it is installed already. The wheel is kept in ${XDG_CACHE_HOME:-~/.cache}/packrcnn, under a name
# that holds the versions of Horovod, TensorFlow, Python, the C library, the machine type and the kind of GPU reduction,
# so that the next environment needs seconds instead of minutes. A wheel is cached and installed only after it has
# passed the check: two processes that reduce in a TensorFlow graph over gloo.
#
# Why a build of our own: Horovod's last release does not compile against TensorFlow's current headers because of its
# optional operators inside XLA programs; without that one source file it does. Four more places are amended, for
# newer Python, for checkpoints on SIGTERM and the exit code after it, and for hosts whose name resolves to a loopback
# address (see `build` below).
# PyTorch, MXNet and MPI are left out.

set -euo pipefail

VERSION=0.28.1
SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
CMAKE=cmake==3.31.10 # for machines that have none
# Horovod's imports. cffi, which it also lists, serves PyTorch alone.
RUNTIME=(cloudpickle==3.1.2 PyYAML==6.0.3 psutil packaging)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
    echo "install_horovod: $*" >&2
    exit 1
}

missing() {
    echo "install_horovod: $*" >&2
    exit 3
}

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

python=${PYTHON:-}
gpu=${HOROVOD_GPU_OPERATIONS:-}
force=0
only_check=0
only_nccl=0
while [ $# -gt 0 ]; do
    case $1 in
        --python)
            python=${2:-}
            [ -n "$python" ] || die "--python needs the path of an interpreter"
            shift
            ;;
        --nccl) gpu=NCCL ;;
        --force) force=1 ;;
        --check) only_check=1 ;;
        --show-nccl) only_nccl=1 ;; # prints what find_nccl has found; for the tests
        -h | --help) usage; exit 0 ;;
        *) die "unknown option $1; --help lists them" ;;
    esac
    shift
done
if [ -z "$python" ]; then
    python=python3
    [ ! -x "$here/../.venv/bin/python" ] || python=$here/../.venv/bin/python
fi
command -v "$python" >/dev/null || die "$python is missing: name the interpreter with --python"
python=$(command -v "$python")
python=$(cd "$(dirname "$python")" && pwd)/${python##*/} # absolute: the check and the build run in other directories
[ -z "$gpu" ] || [ "$gpu" = NCCL ] || die "HOROVOD_GPU_OPERATIONS=$gpu: only NCCL is supported"
# Tools that pip installed (cmake) lie beside the interpreter, whether its environment is activated or not.
PATH=$(dirname "$python"):$PATH
export PYTHONNOUSERSITE=1

# "<distribution's version>" or nothing; reads metadata only, so that nothing slow is imported.
installed() {
    "$python" - "$@" <<'PY'
import importlib.metadata, sys
for name in sys.argv[1:]:
    try:
        print(importlib.metadata.version(name))
        break
    except importlib.metadata.PackageNotFoundError:
        pass
PY
}

tensorflow=$(installed tensorflow tensorflow-cpu)
[ -n "$tensorflow" ] || die "TensorFlow is missing in $python: install the project's requirements first"
# r5: the version of the recipe in `build`; raise it when a change must replace what is cached and installed.
local_version=tf$tensorflow${gpu:+.nccl}.r5
wanted=$VERSION+$local_version

# The package's folders are not where cmake looks, and its library has no name without a version, as linkers want it:
# a folder with links to both becomes HOROVOD_NCCL_HOME. TensorFlow loads the same library, at run time from the place
# that is written into Horovod's module, relative to it, so that the wheel serves other environments too.
find_nccl() {
    local home=$1 package library
    [ -z "${HOROVOD_NCCL_HOME:-}${HOROVOD_NCCL_INCLUDE:-}" ] || return 0
    package=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/nccl
    library=$(find "$package/lib" -name 'libnccl.so.*' -print -quit 2>/dev/null || true)
    if [ ! -f "$package/include/nccl.h" ] || [ -z "$library" ]; then
        # cmake looks into the system's and CUDA's folders itself.
        [ -f /usr/include/nccl.h ] || [ -f "${HOROVOD_CUDA_HOME:-/usr/local/cuda}/include/nccl.h" ] || die \
            "NCCL's headers are missing: pip install -r requirements-gpu.txt (nvidia-nccl-cu12), or set HOROVOD_NCCL_HOME"
        return 0
    fi
    mkdir -p "$home/lib"
    ln -s "$package/include" "$home/include"
    ln -s "$library" "$home/lib/libnccl.so"
    export HOROVOD_NCCL_HOME=$home HOROVOD_NCCL_LINK=SHARED
    export LDFLAGS="${LDFLAGS:+$LDFLAGS }'-Wl,-rpath,\$ORIGIN/../../nvidia/nccl/lib'"
}

# Checks what `$python` imports as horovod (PYTHONPATH may point it elsewhere); prints why it fails.
check() {
    local log=$1
    (
        cd "$(dirname "$log")"
        cat >allreduce.py <<'PY'
import os
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
import horovod.tensorflow as hvd
import tensorflow.compat.v1 as tf

tf.disable_v2_behavior()
hvd.init()
x = tf.constant([1.0, 2.0, 3.0]) * (hvd.rank() + 1)
summed, gathered, sent = hvd.allreduce(x, op=hvd.Sum), hvd.allgather(x[None]), hvd.broadcast(x, root_rank=1)
with tf.Session() as session:
    summed, gathered, sent = session.run([summed, gathered, sent])
assert hvd.size() == 2 and summed.tolist() == [3, 6, 9], summed
assert gathered.tolist() == [[1, 2, 3], [2, 4, 6]] and sent.tolist() == [2, 4, 6], (gathered, sent)
print("allreduce correct")
PY
        run=("$python" -c "from horovod.runner.launch import run_commandline; run_commandline()")
        "${run[@]}" --check-build >check-build.txt 2>>"$log" || { echo "horovodrun --check-build fails"; exit 1; }
        grep -q '\[X\] TensorFlow' check-build.txt || { echo "it was built without TensorFlow"; exit 1; }
        grep -q '\[X\] Gloo' check-build.txt || { echo "it was built without gloo"; exit 1; }
        [ -z "$gpu" ] || grep -q '\[X\] NCCL' check-build.txt || { echo "it was built without NCCL"; exit 1; }
        # The limit is generous: importing TensorFlow twice at once on a busy machine takes a while.
        timeout 300 "${run[@]}" --gloo -np 2 -H localhost:2 "$python" allreduce.py >allreduce.txt 2>&1 || true
        cat allreduce.txt >>"$log"
        [ "$(grep -c 'allreduce correct' allreduce.txt)" = 2 ] || { echo "two processes do not reduce correctly"; exit 1; }
    )
}

work=$(mktemp -d "${TMPDIR:-/tmp}/install_horovod.XXXXXX")
trap 'rm -rf "$work"' EXIT
log=$work/log
: >"$log"

# Shows the end of the log and stops, with the reason as the last line.
fail() {
    tail -n 25 "$log" | cut -c1-300 | sed 's/^/  | /' >&2
    die "$*"
}

if [ $only_nccl = 1 ]; then
    find_nccl "$work/nccl"
    echo "${HOROVOD_NCCL_HOME:-}"
    [ ! -d "$work/nccl" ] || readlink -e "$work/nccl/include/nccl.h" "$work/nccl/lib/libnccl.so"
    echo "${LDFLAGS:-}"
    exit 0
fi
have=$(installed horovod)
if [ $only_check = 1 ]; then
    [ "$have" = "$wanted" ] || die "horovod is '${have:-missing}' where $wanted is needed: run scripts/install_horovod.sh"
    reason=$(check "$log") || fail "the check of horovod $have failed: $reason"
    echo "horovod $have reduces correctly"
    exit 0
fi
if [ $force = 0 ] && [ "$have" = "$wanted" ]; then
    echo "horovod $have is installed"
    exit 0
fi

platform=$("$python" -c "
import platform, sys, sysconfig
print(f'{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{\"\".join(platform.libc_ver())}')")
if [ -n "$gpu" ]; then
    find_nccl "$work/nccl"
    nvcc=${HOROVOD_CUDA_HOME:+$HOROVOD_CUDA_HOME/bin/}nvcc
    command -v "$nvcc" >/dev/null || die "nvcc is missing: install the CUDA toolkit, put its bin on PATH or set HOROVOD_CUDA_HOME"
    platform=$platform-cuda$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
fi
cache=${XDG_CACHE_HOME:-$HOME/.cache}/packrcnn/horovod-$wanted-$platform
mkdir -p "$cache"
if command -v flock >/dev/null; then
    exec 9>"$cache/.lock"
    flock -w 3600 9 || die "another build holds $cache/.lock for an hour: end it, or remove the file"
fi

# Unpacks the wheel aside, without touching the environment, and checks it there.
accept() {
    rm -rf "$work/site"
    "$python" -m pip install -q --disable-pip-version-check --no-deps --no-index --target "$work/site" "$1" \
        >>"$log" 2>&1 || { echo "pip cannot unpack it"; return 1; }
    PYTHONPATH=$work/site check "$log"
}

# Edits a file of the source with a sed script, which must change it.
amend() {
    local file=$work/horovod-$VERSION/$1
    cp "$file" "$work/before"
    sed -i "$2" "$file"
    ! cmp -s "$work/before" "$file" || die "$1 of horovod $VERSION is not as expected: $2 changes nothing"
}

build() {
    local cmake=${HOROVOD_CMAKE:-cmake} release
    command -v "${CXX:-g++}" >/dev/null || missing "${CXX:-g++} is missing: apt-get install g++ (8 or newer)"
    command -v make >/dev/null || missing "make is missing: apt-get install make"
    if ! command -v "$cmake" >/dev/null; then
        [ -z "${HOROVOD_CMAKE:-}" ] || die "HOROVOD_CMAKE=$HOROVOD_CMAKE is not a program"
        echo "cmake is missing on this machine: taking $CMAKE from the package index for this build"
        "$python" -m pip install -q --disable-pip-version-check --target "$work/cmake" "$CMAKE" >>"$log" 2>&1 ||
            fail "pip cannot install $CMAKE: apt-get install cmake, or make the package index reachable"
        cmake=$work/cmake/cmake/data/bin/cmake
    fi
    release=$("$cmake" --version | sed -n '1s/.*version \([0-9]*\.[0-9]*\).*/\1/p')
    [ "$(printf '3.13\n%s\n' "$release" | sort -V | head -n 1)" = 3.13 ] || die "cmake is $release and must be 3.13 or newer"
    echo 'int main() { if constexpr (true) return 0; }' >"$work/probe.cc"
    "${CXX:-g++}" -std=c++17 "$work/probe.cc" -o "$work/probe" 2>>"$log" ||
        fail "${CXX:-g++} cannot compile a C++17 program: install g++ 8 or newer with its standard library"

    # Build tools of their own, so that those of the environment are neither needed nor changed.
    "$python" -m pip install -q --disable-pip-version-check --target "$work/tools" 'setuptools==80.9.0' 'packaging' \
        >>"$log" 2>&1 || fail "pip cannot install setuptools: is the package index reachable?"
    mkdir "$work/sdist"
    if [ -n "${HOROVOD_SDIST:-}" ]; then
        cp "$HOROVOD_SDIST" "$work/sdist/" || die "HOROVOD_SDIST=$HOROVOD_SDIST cannot be read"
        echo "$SHA256  $work/sdist/$(basename "$HOROVOD_SDIST")" | sha256sum --check --status ||
            die "HOROVOD_SDIST=$HOROVOD_SDIST is not horovod-$VERSION.tar.gz as released"
    else
        echo "horovod==$VERSION --hash=sha256:$SHA256" >"$work/source.txt"
        PYTHONPATH=$work/tools "$python" -m pip download -q --disable-pip-version-check --no-deps --no-build-isolation \
            --no-binary horovod --dest "$work/sdist" -r "$work/source.txt" >>"$log" 2>&1 ||
            fail "pip cannot download horovod $VERSION (offline? point HOROVOD_SDIST at horovod-$VERSION.tar.gz)"
    fi
    tar -xzf "$work"/sdist/*.tar.gz -C "$work"
    amend horovod/tensorflow/CMakeLists.txt '/xla_mpi_ops\.cc/d'
    # distutils left Python with 3.12.
    amend horovod/runner/js_run.py \
        's/^from distutils\.spawn import find_executable$/from shutil import which as find_executable/'
    # horovodrun lets a stopped process live for 5 s, which no checkpoint is written in: let the environment say more.
    amend horovod/runner/common/util/safe_shell_exec.py \
        's/^\(GRACEFUL_TERMINATION_TIME_S\) = 5$/\1 = int(os.environ.get("HOROVOD_\1", "5"))/'
    # The exit code of a stopped job must be no accident. The shell of a process is frozen before it is ended, although
    # its process has ended and it is about to: then it lives until it is killed. And psutil's wait() for the shell
    # races with the wait() that reports how it ended: where it wins, the job seems to have finished, with 0 not 143.
    amend horovod/runner/common/util/safe_shell_exec.py \
        's/^        p\.send_signal(signal\.SIGSTOP)$/        if alive:\n    &/'
    amend horovod/runner/common/util/safe_shell_exec.py \
        '/^        p\.wait(timeout=GRACEFUL_TERMINATION_TIME_S)$/c\
        deadline = time.monotonic() + GRACEFUL_TERMINATION_TIME_S\
        while p.is_running() and p.status() != psutil.STATUS_ZOMBIE:\
            if time.monotonic() > deadline:\
                raise psutil.TimeoutExpired(GRACEFUL_TERMINATION_TIME_S, pid)\
            time.sleep(0.1)\
    except psutil.NoSuchProcess:\
        pass'
    # The interface chosen for gloo is forgotten for process sets, the one of all ranks included. They then take the
    # address of the host's name, which on many machines is 127.0.0.1 or 127.0.1.1: no two hosts would find each other.
    amend horovod/common/gloo/gloo_context.cc \
        '/InitializeForProcessSet/,/^}/s/^  device_attr\.iface = gloo_iface_;$/  gloo_iface_ = global_context.gloo_iface_;\n&/'

    echo "building horovod $wanted with cmake $release (minutes) ..."
    (
        cd "$work/horovod-$VERSION"
        export PYTHONPATH=$work/tools TF_CPP_MIN_LOG_LEVEL=3
        export HOROVOD_LOCAL_VERSION=$local_version HOROVOD_CMAKE=$cmake
        export HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITH_GLOO=1
        export HOROVOD_WITHOUT_MPI=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1
        if [ -n "$gpu" ]; then export HOROVOD_GPU_OPERATIONS=$gpu; else unset HOROVOD_GPU_OPERATIONS; fi
        # gloo asks for policies of cmake 2.8, which cmake 4 grants only to those who say so.
        export CMAKE_POLICY_VERSION_MINIMUM=${CMAKE_POLICY_VERSION_MINIMUM:-3.5}
        # A compiler process takes about 1.5 GB.
        local jobs memory
        jobs=$(nproc)
        memory=$(awk '/MemAvailable/ {print int($2 / 1500000)}' /proc/meminfo 2>/dev/null || echo "$jobs")
        [ "$memory" -ge 1 ] || memory=1
        export MAKEFLAGS=${MAKEFLAGS:--j$((jobs < memory ? jobs : memory))}
        "$python" -m pip wheel -v --disable-pip-version-check --no-deps --no-build-isolation --no-cache-dir \
            --wheel-dir "$work/wheel" . >>"$log" 2>&1
    ) || {
        [ -z "${HOROVOD_BUILD_LOG:-}" ] || cp "$log" "$HOROVOD_BUILD_LOG"
        reason=$(sed -nE '/(Could NOT find|fatal error|: error:|Killed)/{s/^ +//p;q}' "$log")
        fail "horovod does not compile${reason:+: $reason} (HOROVOD_BUILD_LOG=FILE keeps the whole log)"
    }
}

"$python" -m pip install -q --disable-pip-version-check "${RUNTIME[@]}" >>"$log" 2>&1 ||
    fail "pip cannot install ${RUNTIME[*]}: is the package index reachable?"

wheel=$(find "$cache" -maxdepth 1 -name 'horovod-*.whl' -print -quit)
if [ -n "$wheel" ] && [ $force = 0 ] && ! reason=$(accept "$wheel"); then
    echo "install_horovod: the cached wheel is not usable here ($reason); building it again" >&2
    wheel=
fi
if [ -z "$wheel" ] || [ $force = 1 ]; then
    build
    built=$(find "$work/wheel" -name 'horovod-*.whl' -print -quit)
    reason=$(accept "$built") || fail "horovod $wanted was built, but $reason"
    wheel=$cache/$(basename "$built")
    cp "$built" "$wheel.part"
    mv -f "$wheel.part" "$wheel"
fi
"$python" -m pip install -q --disable-pip-version-check --no-deps --no-index --force-reinstall "$wheel" >>"$log" 2>&1 ||
    fail "pip cannot install $wheel"
echo "horovod $wanted is installed and reduces correctly (wheel: $wheel)"
