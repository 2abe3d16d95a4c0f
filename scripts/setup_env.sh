#!/usr/bin/env bash
# Makes .venv beside this checkout, with clipfast installed in it for development and what the named extras need.
#
#   scripts/setup_env.sh demo|test|bench ...
#   scripts/setup_env.sh wheel                what `make wheel` builds with, and no clipfast
#
# Where no NVIDIA GPU is found, PyTorch is the release that the tests are proven with, whose CPU build is small.
# Environment: PYTHON (default python3), CLIPFAST_TORCH (what to install instead, such as "torch==2.11.0").
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "clipfast needs Python 3.10 or newer; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3." >&2
    exit 1
}
[ -x .venv/bin/python ] || {
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv
}

# what was installed, and from which versions of these files
state=$(cat pyproject.toml setup.py tests/rivals.txt scripts/setup_env.sh scripts/editable.py $(find csrc -type f | sort) | cksum)
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    if [ -n "${CLIPFAST_TORCH:-}" ]; then
        wanted=$CLIPFAST_TORCH
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        wanted="torch>=2.10"
    else
        wanted="torch==2.13.0"
    fi
    echo "installing $wanted"
    "${pip[@]}" "$wanted"
fi

if [ "$*" = wheel ]; then
    "${pip[@]}" --requirement scripts/build_requirements.txt
    exit 0
fi

for extra in "$@"; do
    stamp=.venv/.clipfast-$extra
    [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && continue
    echo "installing clipfast[$extra]"
    "${pip[@]}" "setuptools>=77" wheel
    # PyTorch is pinned to what is there: no dependency may replace it
    torch=$(.venv/bin/python -c 'import torch; print(torch.__version__)')
    printf 'torch==%s\n' "$torch" >.venv/constraints.txt
    "${pip[@]}" --constraint .venv/constraints.txt --no-build-isolation --editable ".[$extra]"
    [ "$extra" = test ] && "${pip[@]}" --no-deps --requirement tests/rivals.txt
    printf '%s' "$state" >"$stamp"
done
.venv/bin/python -c 'from clipfast.ops import library; print("op library:", library.unavailable() or "built")'
