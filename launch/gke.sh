#!/usr/bin/env bash
# A training on TPU slices of a GKE cluster, as a JobSet.
#
#   launch/gke.sh run --name=deepstack --image=IMAGE --topology=16x16 -- \
#       lmm_jax.train --config=configs/deepstack.py --config.workdir=gs://bucket/run
#   launch/gke.sh logs   --name=deepstack
#   launch/gke.sh delete --name=deepstack
#
# With XPK the same is: xpk workload create --workload=deepstack --tpu-type=v5litepod-256
#   --docker-image=IMAGE --command="LMM_JAX_DISTRIBUTED=1 python -m lmm_jax.train ..."
#
# --name=NAME         of the JobSet; lower case, digits and dashes
# --image=IMAGE       built with launch/Dockerfile
# --accelerator=NAME  label of the nodes: tpu-v5-lite-podslice, tpu-v5p-slice,
#                     tpu-v6e-slice
# --topology=XxY      of a slice
# --chips=N           of a host: 4, or 8 in single-host slices of v5e and v6e
# --slices=N          that train together; each is one replica
# --restarts=N        before the JobSet gives up; every preemption takes one
# --dry-run           prints the manifest and the commands

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

what=${1:-}
[[ $what =~ ^(run|logs|delete)$ ]] || { usage && exit 2; }
shift
# shellcheck disable=SC2034 # the manifest reads them by name
name='' image='' accelerator=tpu-v5-lite-podslice topology=16x16 chips=4
# shellcheck disable=SC2034
slices=1 restarts=100
parse "$@"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail "--name=$name: lower case, digits and dashes, a letter first"

# The manifest with every ${word} replaced by the variable of that name.
# shellcheck disable=SC2034
manifest() {
  [[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "--topology=$topology: use 16x16, 4x4x8 ..."
  local total=$((${topology//x/*}))
  local hosts=$((total / chips)) args text word
  ((hosts)) || fail "--topology=$topology has $total chips, fewer than --chips=$chips"
  # JSON is YAML; words are passed as they are, without a shell.
  args=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "${rest[@]}")
  text=$(<"$(dirname "$0")/jobset.yaml")
  for word in name image accelerator topology chips slices restarts hosts args; do
    text=${text//"\${$word}"/"${!word}"}
  done
  echo "$text"
}

case $what in
  run)
    [[ $image ]] || fail "--image=IMAGE: build one with launch/Dockerfile"
    ((${#rest[@]})) || fail "no command after --, such as lmm_jax.train --config=..."
    [[ ${dry_run:-} != true ]] || manifest
    filled=$(manifest)
    run kubectl apply --filename=- <<<"$filled"
    ;;
  logs) run kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$name" --prefix ;;
  delete) run kubectl delete jobset "$name" ;;
esac
