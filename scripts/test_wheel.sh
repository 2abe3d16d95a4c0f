#!/usr/bin/env bash
# Installs a wheel in a fresh environment and runs the tests against it and not against this tree.
#
#   scripts/test_wheel.sh WHEEL [pytest's arguments]     without any: -m "not slow and not exhaustive and not gpu"
#
# Tests and benchmarks are copied to where no other clipfast is; the tests of building, which read the sources, are left
# out. That PyTorch is the same before and after is one of the checks.
# Environment: PYTHON (default python3), CLIPFAST_TORCH (default "torch==2.13.0", the release of the rivals of the parity
# tests; with another one those are skipped), CLIPFAST_ENV (an environment that has a PyTorch, in place of a fresh one).
set -euo pipefail
tree=$(cd "$(dirname "$0")/.." && pwd)
[ -f "${1:-}" ] || {
    sed -n '2,4p' "$0" >&2
    echo "WHEEL: got '${1:-}', expected a file; make wheel makes one" >&2
    exit 2
}
wheel=$(realpath "$1")
shift
[ $# -gt 0 ] || set -- -m "not slow and not exhaustive and not gpu"
unset PYTHONPATH PYTHONHOME
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

environment=${CLIPFAST_ENV:+$(realpath "$CLIPFAST_ENV")}
if [ -z "$environment" ]; then
    environment=$work/env
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check "${CLIPFAST_TORCH:-torch==2.13.0}"
fi
python=$environment/bin/python
pip=("$python" -m pip install --quiet --disable-pip-version-check)
# of PyTorch, its files too: an install of the same version over it would be a change
torch() { "$python" -c '
import importlib.metadata as m
d = m.distribution("torch")
print(d.version, d.locate_file("torch/__init__.py").stat().st_ino, d.locate_file("torch/__init__.py").stat().st_mtime_ns)'; }

before=$(torch)
"${pip[@]}" --force-reinstall --no-deps "$wheel"
"${pip[@]}" "$wheel"
after=$(torch)
[ "$before" = "$after" ] || {
    echo "error: installing clipfast changed PyTorch: $before, then $after" >&2
    exit 1
}

# the rivals want one release of PyTorch, and the interpreter of the Triton that belongs to older ones an older NumPy
printf 'torch==%s\n' "${before%% *}" >"$work/constraints.txt"
case $before in
    2.13.*)
        "${pip[@]}" --constraint "$work/constraints.txt" "$wheel[test]"
        "${pip[@]}" --no-deps --requirement "$tree/tests/rivals.txt"
        ;;
    *)
        "${pip[@]}" --constraint "$work/constraints.txt" "$wheel[demo]" "pytest>=8" "hypothesis>=6.100" "numpy<2.4"
        export CLIPFAST_SKIP_MISSING=1
        ;;
esac

cp -r "$tree/tests" "$tree/benchmarks" "$tree/pyproject.toml" "$tree/README.md" "$work"
cd "$work"
"$python" - "$environment" <<'EOF'
import sys

import clipfast
import torch

assert clipfast.__file__.startswith(sys.argv[1]), f"not the installed clipfast: {clipfast.__file__}"
print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, {clipfast.__file__}", flush=True)
EOF
sources=(test_wheel.py test_install.py test_sdist.py test_plan_training.py train/test_examples.py)
sources+=(kernels/test_compile.py ops/test_cuda_build.py ops/test_contrastive_loss_kernels.py)
"$python" -m pytest "${sources[@]/#/--ignore=tests/}" "$@"
