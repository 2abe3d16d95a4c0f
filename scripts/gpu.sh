#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and nothing to fetch: build the library in place, run what needs the GPU, and write
# down what was found in benchmarks/results/<gpu>/<commit>-status.json after every part, failures with their tracebacks.
# Installs nothing and asks for nothing but bash, python3 and PyTorch: what else is missing is skipped.
#
#   scripts/gpu.sh [all|tests|bench|cpu]
#
#   all    build, tests that need a GPU, kernels on the GPU, self-test, sanitizers, benchmarks; under 9 minutes
#   tests  the same without the benchmarks
#   bench  build and benchmarks, into benchmarks/results/<gpu>/<commit>.json
#   cpu    build and the tests that need no GPU, as many as 9 minutes hold
#
# Environment: PYTHON (default python3), CLIPFAST_COMMIT (what names the file where there is no git), CUDA_HOME,
# TORCH_CUDA_ARCH_LIST (default: this card, and PTX).
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
