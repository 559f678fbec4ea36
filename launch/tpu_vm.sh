#!/usr/bin/env bash
# A TPU slice of Compute Engine: create it, run a training on all of its hosts, delete it.
#
#   launch/tpu_vm.sh create --name=pod --zone=us-west4-a --type=v5litepod-256
#   launch/tpu_vm.sh setup  --name=pod --zone=us-west4-a
#   launch/tpu_vm.sh run    --name=pod --zone=us-west4-a -- \
#       --config=configs/deepstack.py --config.workdir=gs://bucket/run
#   launch/tpu_vm.sh keep   ... as create and run: until the run has ended
#   launch/tpu_vm.sh stop   --name=pod --zone=us-west4-a
#   launch/tpu_vm.sh delete --name=pod --zone=us-west4-a
#
# `setup` installs this checkout, as it is committed, on all hosts. `run` starts `python -m lmm_jax.train` with what follows `--`; the same command again
# goes on from the last checkpoint. `stop` saves and ends it. `keep` starts it again after
# each preemption, on a new slice if it must.
#
# --name=NAME        of the slice and of its queued resource
# --zone=ZONE        where such slices are offered and there is quota
# --project=ID       gcloud's own by default
# --type=TYPE        accelerator type, such as v5litepod-256 or v5p-128
# --version=VERSION  of the runtime image; it must know the type
# --spot=BOOL        cheaper, and may be taken away at any time; runs survive it
# --data=BUCKET      mounted as ~/lmm_jax/data on each host, empty for none
# --wait=SECONDS     between two looks of `create` and `keep`
# --dry-run          prints the commands

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

what=${1:-}
[[ $what =~ ^(create|setup|run|keep|stop|delete)$ ]] || { usage && exit 2; }
shift
name='' zone='' project='' type=v5litepod-256 version=v2-alpha-tpuv5-lite
spot=true data='' wait=60
parse "$@"
[[ $name && $zone ]] || fail "--name=NAME and --zone=ZONE say which slice"

place=("--zone=$zone")
[[ -z $project ]] || place+=("--project=$project")

# A line on every host at once.
everywhere() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

# Of the queued resource: ACTIVE when there is a slice.
state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

# Queued, because large slices are rarely free at once.
create() {
  local kind=()
  [[ $spot != true ]] || kind=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" \
    --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
    "${kind[@]}"
  until [[ ${dry_run:-} == true || $(state) == ACTIVE ]]; do
    sleep "$wait"
  done
}

# The same on every host; done again it changes nothing.
setup() {
  local archive=lmm_jax.tar.gz
  run git archive --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:" "${place[@]}" --worker=all
  local line='mkdir -p ~/lmm_jax && tar xzf ~/lmm_jax.tar.gz -C ~/lmm_jax'
  line+=' && python3 -m venv ~/venv && ~/venv/bin/pip install -q -e ~/lmm_jax[tpu]'
  if [[ $data ]]; then
    # Images are read as files; gcsfuse is part of the runtime images.
    line+=" && cd ~/lmm_jax && mkdir -p data"
    line+=" && { mountpoint -q data || gcsfuse --implicit-dirs $data data; }"
  fi
  everywhere "$line"
}

train() {
  ((${#rest[@]})) || fail "no arguments for lmm_jax.train after --"
  local line='cd ~/lmm_jax && LMM_JAX_DISTRIBUTED=1 exec ~/venv/bin/python -m lmm_jax.train'
  everywhere "$line $(typed "${rest[@]}")"
}

delete() {
  # --force takes the slice with it.
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

case $what in
  create) create ;;
  setup) setup ;;
  run) train ;;
  stop) everywhere 'pkill -TERM -f lmm_jax.train' ;;
  delete) delete ;;
  keep)
    until
      [[ ${dry_run:-} != true && $(state) == ACTIVE ]] || { delete || true && create && setup; }
      train
    do
      echo "ended early; starting again in $wait s" >&2
      sleep "$wait"
    done
    ;;
esac
