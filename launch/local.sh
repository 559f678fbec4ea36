#!/usr/bin/env bash
# Runs a command as several processes of one job on this machine: a pod, small.
#
#   launch/local.sh --processes=4 --devices=2 -- \
#       python -m lmm_jax.train --config=configs/quickstart.py
#
# --processes=N  as many as a pod has hosts
# --devices=N    of each process; on a CPU they are virtual
# --grace=S      seconds that the others have once one has failed; by themselves they
#                notice a lost one when they next need it
# --dry-run      prints the commands
#
# Every line of output has the number of its process in front. SIGTERM or Ctrl-C to this
# script goes to process 0 alone, which tells the others.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

processes=2 devices=1 grace=150
parse "$@"
((${#rest[@]})) || fail "no command: launch/local.sh [FLAGS] -- COMMAND"
if [[ ${dry_run:-} == true ]]; then
  port=PORT
else
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

pids=()
trap 'trap - TERM INT; kill -TERM "${pids[0]}"' TERM INT

# PJRT_NPROC: XLA's threads. Each collective of each virtual device waits in one; with as
# few as a small machine has cores, devices may wait for each other for ever.
for ((i = 0; i < processes; i++)); do
  job=(env "LMM_JAX_COORDINATOR=127.0.0.1:$port" "LMM_JAX_PROCESSES=$processes"
    "LMM_JAX_PROCESS_ID=$i"
    "XLA_FLAGS=--xla_force_host_platform_device_count=$devices ${XLA_FLAGS:-}"
    "PJRT_NPROC=${PJRT_NPROC:-32}"
    "${rest[@]}")
  if [[ ${dry_run:-} == true ]]; then
    run "${job[@]}"
    continue
  fi
  "${job[@]}" > >(sed -u "s/^/[$i] /") 2>&1 &
  pids+=($!)
done

status=0
while ((${#pids[@]})); do
  code=0
  wait -n -p ended "${pids[@]}" || code=$?
  # A signal to this script ends the wait, and no process.
  [[ -n ${ended:-} ]] || continue
  for i in "${!pids[@]}"; do
    [[ ${pids[i]} == "$ended" ]] && unset "pids[i]" && number=$i
  done
  if ((code && !status)); then
    status=$code
    echo "process $number ended with code $code; the others have $grace s" >&2
    # Killed, it leaves its sleep behind, which must not hold on to our output.
    (sleep "$grace" && kill -KILL "${pids[@]}") >/dev/null 2>&1 &
    watchdog=$!
  fi
done
[[ -z ${watchdog:-} ]] || kill "$watchdog" 2>/dev/null || true
exit "$status"
