#!/usr/bin/env bash
# A training on GPU nodes of a SLURM cluster.
#
#   launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 -- \
#       --config=configs/deepstack.py --config.workdir=/scratch/run
#
# Submits `python -m lmm_jax.train` with what follows `--`, in the environment and the
# directory of this shell. Before its time ends it saves, and goes back into the queue.
#
# --nodes=N         machines
# --gpus=N          of a machine; one process each, as JAX numbers them
# --cpus=N          cores for each process, which decode images
# --time=HH:MM:SS   of one stay; the training resumes in the next
# --grace=S         seconds before its end in which it saves
# --partition=NAME  of the cluster, its own default if empty
# --name=NAME       of the job
# --dry-run         prints the command

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

nodes=1 gpus=8 cpus=8 time=24:00:00 grace=300 partition='' name=lmm_jax
parse "$@"
((${#rest[@]})) || fail "no arguments for lmm_jax.train after --"

where=()
[[ -z $partition ]] || where=(--partition="$partition")
# A process that ends takes the others of the step with it, and 143 says that it saved.
job="LMM_JAX_DISTRIBUTED=1 srun --kill-on-bad-exit=1 python -m lmm_jax.train $(typed "${rest[@]}")"
# shellcheck disable=SC2016 # for the shell of the job
job+=' || { [ $? -eq 143 ] && scontrol requeue $SLURM_JOB_ID; }'
run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" \
  --gpus-per-node="$gpus" --cpus-per-task="$cpus" --time="$time" "${where[@]}" \
  --signal="TERM@$grace" --requeue --open-mode=append --output="$name-%j.log" \
  --wrap="$job"
