#!/usr/bin/env bash
# Several hosts, the same line on each:  HEAD=10.0.0.1:29500 NODES=2 launch/multinode.sh [CONFIG] --output.dir /shared/runs --security.keys /shared/keys
#
# HEAD             host and port of the rendezvous, served by the host it names (c10d: a private network only)
# NODES            how many hosts
# STAGES_PER_NODE  stages on each: its GPUs [1]
# RESTARTS         how often all start again when one has died, from the newest checkpoint (checkpoint.every), or anew without one [3]
# RUN_ID           what tells two runs at one HEAD apart [dnipipe]
# ADDRESS          this host's address, where its name does not lead the others to it
#
# Once, before: dnipipe keys new /shared/keys --stages K; or, on a private network, --security.private_network true instead.
# Stages go to the hosts in the order of their names (or ADDRESSes); only the first reads the data.
set -euo pipefail

: "${HEAD:?HEAD=HOST:PORT names the host that serves the rendezvous}"
: "${NODES:?NODES=N says how many hosts there are}"
each=${STAGES_PER_NODE:-1}
exec torchrun --nnodes "$NODES" --nproc-per-node "$each" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-dnipipe}" ${ADDRESS:+--local-addr "$ADDRESS"} \
  -m dnipipe train --pipeline.stages "$((NODES * each))" "$@"
