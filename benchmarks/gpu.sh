#!/usr/bin/env bash
# The whole story of GPUs on one machine: tests of what runs there, correctness against a CPU, then what it costs.
# Needs torch with CUDA, and dnipipe with its test extra; two GPUs or more let nccl run as it is meant to.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export OMP_NUM_THREADS=1
"$python" -m pytest -q tests/gpu tests/transport/test_contract.py -k "gpu or (nccl and not over)" "$@"
"$python" -m benchmarks.gpu
