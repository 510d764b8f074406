#!/usr/bin/env bash
# One host, a process a stage, a GPU a stage where there are GPUs:  STAGES=4 launch/torchrun.sh [CONFIG] [--section.key value]
#
# STAGES    how many [4]
# RESTARTS  how often all start again when one has died, from the newest checkpoint (checkpoint.every), or anew without one [3]
set -euo pipefail

stages=${STAGES:-4}
exec torchrun --standalone --nproc-per-node "$stages" --max-restarts "${RESTARTS:-3}" \
  -m dnipipe train --pipeline.stages "$stages" "$@"
