#!/usr/bin/env bash
# Tests the op library of this tree beside CUDA builds of PyTorch, on a machine without a GPU.
#
#   scripts/test_cuda_build.sh [pytest's arguments]
#
# That the library loads, that it finds what lies in libtorch_cuda, that every CUDA operator is registered, and that fake
# tensors of a card go to it. Each release has an environment of its own in build/, which is kept: 5 to 7 GB each, a
# minute each to install where the network is quick.
# Environment: PYTHON (default python3), CLIPFAST_CUDA_TORCH (releases; default "2.10.0 2.11.0 newest": the oldest that is
# served, that of the GPU machines, and the newest that installs).
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$PWD
unset PYTHONPATH PYTHONHOME
tests=(tests/ops/test_cuda_entry_points.py tests/test_host_path_cuda_build.py tests/ops/test_cuda_build.py tests/ops/test_library.py)
[ -f clipfast/libclipfast.so ] || {
    echo "there is no clipfast/libclipfast.so: make test-cuda-build builds it, or pip install -e ." >&2
    exit 1
}

# what the wheel holds, where the library's folder is one package with the kernels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/site"
cp -r clipfast "$work/site"
cp -r kernels "$work/site/clipfast/kernels"
cp -r tests csrc setup.py pyproject.toml "$work"

failed=()
for release in ${CLIPFAST_CUDA_TORCH:-2.10.0 2.11.0 newest}; do
    environment=$tree/build/cuda-build-$release
    python=$environment/bin/python
    # the last step of an installation leaves the stamp
    [ -f "$environment/installed" ] || {
        echo "making $environment"
        rm -rf "$environment"
        "${PYTHON:-python3}" -m venv "$environment"
        wanted=torch
        [ "$release" = newest ] || wanted="torch==$release"
        "$python" -m pip install --quiet --disable-pip-version-check "$wanted" "numpy<2.4" "pytest>=8" \
            "typer>=0.12" "pillow>=10" "safetensors>=0.4" "tokenizers>=0.21.4" "ftfy>=6.1"
        touch "$environment/installed"
    }
    "$python" -W ignore - <<'EOF' || { failed+=("$release"); continue; }
import sys

import torch

print(f"PyTorch {torch.__version__}", flush=True)
if torch.version.cuda is None:
    sys.exit("this PyTorch is built without CUDA, and shows nothing")
EOF
    # no GPU, even where there is one: the tests on cards are `make gpu`
    (cd "$work" && CUDA_VISIBLE_DEVICES='' PYTHONPATH="$work/site" CLIPFAST_SKIP_MISSING=1 \
        "$python" -m pytest -p no:cacheprovider -m "not slow and not exhaustive and not gpu" "${tests[@]}" "$@") ||
        failed+=("$release")
    said=$(cd "$work" && CUDA_VISIBLE_DEVICES='' PYTHONPATH="$work/site" \
        "$python" -c "from clipfast.cli import app; app()" doctor) || failed+=("$release")
    echo "$said" | grep -m 1 '^CUDA entry points: ' || true
    echo "$said" | grep -qx 'CUDA entry points: found' || failed+=("$release")
done
[ ${#failed[@]} = 0 ] || {
    printf 'error: failed beside PyTorch %s\n' "$(printf '%s\n' "${failed[@]}" | sort -u | xargs)" >&2
    exit 1
}
