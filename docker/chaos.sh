#!/usr/bin/env bash
# Break the demo while it trains, and say what that cost:  docker/chaos.sh
#
# Trains twice, in a compose project of its own: undisturbed, then with eight faults, each stage hit twice.
# SECONDS_BETWEEN  from a fault to the next [12]
# SECONDS_LONG     how long a pause, a cut or a slow time lasts [5]
# The run files stay in the volume dnipipe-chaos_runs; docker/README.md says how to draw them.
set -euo pipefail
cd "$(dirname "$0")"

between=${SECONDS_BETWEEN:-12} long=${SECONDS_LONG:-5} project=dnipipe-chaos
faults=$(mktemp)
if docker compose version >/dev/null 2>&1; then program=(docker compose); else program=(docker-compose); fi
compose() { "${program[@]}" -p "$project" -f compose.yaml "$@"; }
container() { compose ps -q "stage$1"; }
finish() { rm -f "$faults"; compose down --timeout 5 >/dev/null 2>&1; }
trap finish EXIT

# From within: after `docker kill` the engine would not start the container again. Process 1 (init) stays, and ends with status 137.
kill_stage() { docker exec "$(container "$1")" sh -c 'kill -9 -1' || true; }
pause_stage() { docker pause "$(container "$1")" >/dev/null; sleep "$long"; docker unpause "$(container "$1")" >/dev/null; }
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
  [ "$(id -u)" = 0 ] && command -v nsenter tc >/dev/null && modprobe --quiet sch_netem 2>/dev/null
}

fault() { # KIND STAGE: make it, and write down when it began and ended
  local begin; begin=$(date +%s.%N)
  echo "fault   $1 stage $2"
  "$1_stage" "$2"
  echo "{\"fault\": \"$1\", \"stage\": $2, \"begin\": $begin, \"end\": $(date +%s.%N)}" >>"$faults"
}
until_it_trains() {
  for _ in $(seq 180); do
    docker exec "$(container 3)" test -s "/runs/$RUN/metrics/stage-3.jsonl" 2>/dev/null && return
    sleep 1
  done
  compose logs --tail 20
  echo "chaos: stage 3 wrote no metrics within 180 s" >&2
  exit 1
}
until_it_ends() { compose logs -f --no-color stage0 | grep -E 'loss|stage' || true; }

compose down --volumes >/dev/null 2>&1
RUN=undisturbed compose up -d
export RUN=undisturbed && until_it_trains && until_it_ends
compose down >/dev/null 2>&1
export RUN=disturbed
compose up -d
until_it_trains
sleep "$between"
last="kill 2"
if can_delay; then last="delay 2"; else echo "fault   delay: this host offers none (root, tc, nsenter and the kernel's sch_netem); a kill instead"; fi
for each in "kill 1" "pause 2" "cut 3" "slow 0" "kill 3" "kill 0" "pause 1" "$last"; do
  [ -n "$(docker ps -q --filter "id=$(container 0)")" ] || { echo "chaos: the run ended before '$each'" >&2; break; }
  # shellcheck disable=SC2086 # two words
  fault $each
  sleep "$between"
done
until_it_ends
docker run --rm -i -v "${project}_runs:/runs" dnipipe sh -c 'cat >/runs/disturbed/faults.jsonl' <"$faults"
docker run --rm -i -v "${project}_runs:/runs:ro" dnipipe python - /runs/disturbed /runs/undisturbed <report.py
