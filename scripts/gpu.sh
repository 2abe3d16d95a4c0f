#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and nothing to fetch: build the library in place, run all tests and benchmarks, and
# write benchmarks/results/<gpu>/<commit>.json. Installs nothing; works with the Python packages that are there.
#
#   scripts/gpu.sh [all|tests|bench]
#
# Environment: PYTHON (default python3), CLIPFAST_COMMIT (what names the file where there is no git).
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
