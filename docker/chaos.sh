#!/usr/bin/env bash
# Break the demo while it trains, and say what that cost:  docker/chaos.sh
#
# Trains twice, in a compose project of its own: undisturbed, then with eight faults, each stage hit twice.
# BATCHES  of each run [2000]; a fault comes every tenth of them, when the one before is over
# LONG     seconds that a pause, a cut or a slow time lasts [8]
# What it cost is printed, and stays in chaos.md; the status is 1 if it was too much (report.py). The run files stay in the
# volume dnipipe-chaos_runs; docker/README.md says how to draw them.
set -euo pipefail
cd "$(dirname "$0")"

batches=${BATCHES:-2000} long=${LONG:-8} project=dnipipe-chaos
limit=600 # seconds without progress
export SETTINGS="--train.batches $batches"
faults=$(mktemp) containers=()
if docker compose version >/dev/null 2>&1; then program=(docker compose); else program=(docker-compose); fi
compose() { "${program[@]}" -p "$project" -f compose.yaml "$@"; }
start() { # RUN; whose containers keep their ids, though their engine starts them again
  local stage
  export RUN=$1 && compose up -d
  for stage in 0 1 2 3; do containers[stage]=$(compose ps -aq "stage$stage"); done
}
container() { echo "${containers[$1]}"; }
finish() { rm -f "$faults"; compose down --timeout 5 >/dev/null 2>&1; }
trap finish EXIT

# From within: after `docker kill` the engine would not start the container again. Process 1 (init) stays, and ends with status 137.
kill_stage() { docker exec "$(container "$1")" sh -c 'kill -9 -1' || true; }
pause_stage() { docker pause "$(container "$1")" >/dev/null && sleep "$long" && docker unpause "$(container "$1")" >/dev/null; }
cut_stage() {
  local id; id=$(container "$1")
  docker network disconnect "${project}_pipeline" "$id"
  sleep "$long"
  docker network connect --alias "stage$1" "${project}_pipeline" "$id" # its name went with the network
}
slow_stage() {
  docker update --cpus 0.1 "$(container "$1")" >/dev/null
  sleep "$long"
  docker update --cpus "$(nproc)" "$(container "$1")" >/dev/null
}
delay_stage() { # of everything the stage sends
  local inside; inside=(nsenter --net --target "$(docker inspect -f '{{.State.Pid}}' "$(container "$1")")" tc qdisc)
  "${inside[@]}" add dev eth0 root netem delay 50ms
  sleep "$long"
  "${inside[@]}" del dev eth0 root
}
can_delay() {
  [ "$(id -u)" = 0 ] && type nsenter tc >/dev/null 2>&1 && modprobe --quiet sch_netem 2>/dev/null
}

fault() { # KIND STAGE: make it, and write down when it began and ended
  local begin; begin=$(date +%s.%N)
  echo "fault   $1 stage $2"
  "$1_stage" "$2"
  echo "{\"fault\": \"$1\", \"stage\": $2, \"begin\": $begin, \"end\": $(date +%s.%N)}" >>"$faults"
}
until_trained() { # BATCH: by the last stage, as its ledger says
  local last=0 before=0 end=$((SECONDS + limit))
  while [ "${last:-0}" -lt "$1" ]; do
    [ "${last:-0}" = "$before" ] || { before=${last:-0} end=$((SECONDS + limit)); }
    [ "$SECONDS" -lt "$end" ] || give_up "stage 3 has stood at batch $before for $limit s, before batch $1"
    sleep 1
    last=$(docker exec "$(container 3)" tail -n 20 "/runs/$RUN/stage-3/ledger.jsonl" 2>/dev/null |
      sed -n 's/^{"begun": \([0-9]*\),.*/\1/p' | tail -n 1) || true
  done
}
until_ended() {
  local stage said before="" end=$((SECONDS + limit))
  for stage in 0 1 2 3; do
    until [ "$(docker inspect -f '{{.State.Status}} {{.State.ExitCode}}' "$(container "$stage")")" = "exited 0" ]; do
      said=$(docker logs --tail 1 "$(container 0)" 2>&1)
      [ "$said" = "$before" ] || { before=$said end=$((SECONDS + limit)); }
      [ "$SECONDS" -lt "$end" ] || give_up "stage $stage did not end, and stage 0 has said nothing new for $limit s"
      sleep 1
    done
  done
  compose logs --no-color --tail 4 stage0
}
give_up() {
  compose logs --no-color --tail 20
  echo "chaos: $1" >&2
  exit 1
}

compose down --volumes >/dev/null 2>&1
start undisturbed
until_ended
compose down >/dev/null 2>&1

start disturbed
last="kill 2"
if can_delay; then last="delay 2"; else echo "fault   delay: not on this host (root, tc, nsenter and the kernel's sch_netem); a kill instead"; fi
number=0
for each in "kill 1" "pause 2" "cut 3" "slow 0" "kill 3" "kill 0" "pause 1" "$last"; do
  until_trained $((++number * batches / 10))
  # shellcheck disable=SC2086 # two words
  fault $each
done
until_ended
docker run --rm -i -v "${project}_runs:/runs" dnipipe sh -c 'cat >/runs/disturbed/faults.jsonl' <"$faults"
docker run --rm -i -v "${project}_runs:/runs:ro" dnipipe python - /runs/disturbed /runs/undisturbed <report.py | tee chaos.md
