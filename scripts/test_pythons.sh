#!/usr/bin/env bash
# Runs the quick tests under several Pythons: scripts/test_pythons.sh [interpreter …]
#
# Without arguments: python3.10 to python3.13 of the PATH and of ~/.pyenv, those that are there. Each gets its own
# environment under $ENVIRONMENTS (default build/pythons), installed from the pinned requirements and kept for next time.
set -euo pipefail
cd "$(dirname "$0")/.."
environments=${ENVIRONMENTS:-build/pythons}

interpreters=("$@")
if [ ${#interpreters[@]} -eq 0 ]; then
    for version in 3.10 3.11 3.12 3.13; do
        for candidate in ~/.pyenv/versions/"$version".*/bin/python "$(command -v "python$version" || true)"; do
            if [ -x "$candidate" ] && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
                interpreters+=("$candidate")
                break
            fi
        done
    done
fi
if [ ${#interpreters[@]} -eq 0 ]; then
    echo "test_pythons: no Python 3.10 to 3.13 found; name the interpreters as arguments" >&2
    exit 2
fi

summary=()
failed=0
for interpreter in "${interpreters[@]}"; do
    version=$("$interpreter" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
    echo "== Python $version ($interpreter)"
    if make --no-print-directory venv VENV="$environments/$version" PYTHON="$interpreter" &&
        line=$("$environments/$version/bin/python" -m pytest -m quick -p no:cacheprovider 2>&1 | tee /dev/stderr | tail -n 1); then
        summary+=("Python $version: $line")
    else
        summary+=("Python $version: FAILED ${line:-while installing}")
        failed=1
    fi
    line=
done
echo
printf '%s\n' "${summary[@]}"
exit $failed
