#!/usr/bin/env bash
# One host, a process a stage, a GPU a stage where there are GPUs:  STAGES=4 launch/torchrun.sh [CONFIG] [--section.key value]
set -euo pipefail

stages=${STAGES:-4}
exec torchrun --standalone --nproc-per-node "$stages" \
  -m dnipipe train --pipeline.stages "$stages" "$@"
