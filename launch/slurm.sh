#!/usr/bin/env bash
# Train on GPU nodes under Slurm. Run this in a checkout on a file system that all nodes and the
# login node share:
#
#   export NODES=2 GPUS_PER_NODE=8 WORKDIR=/shared/runs/mea_1b
#   launch/slurm.sh install
#   launch/slurm.sh submit -- --config configs/mea_1b.py
#   TASKS=16 GPUS_PER_NODE=1 WORKDIR=/shared/lr launch/slurm.sh study -- --config configs/lr_study.py
#   JOB=1234 launch/slurm.sh logs
#   JOB=1234 launch/slurm.sh cancel
#
# Subcommands:
#   install  creates the virtual environment .venv in the checkout
#   submit   submits a batch script. After -- come VAR=value for the environment of training, then
#            arguments of mea_jax.train, to which the script adds --distributed and --workdir
#   study    submits an array of TASKS jobs, which share a grid of runs (docs/studies.md). After --
#            come VAR=value, then arguments of `mea_jax.study run`, to which the script adds --out
#            and --shard. Submit it again to continue with the remaining runs
#   logs     follows the log of a job; JOB=1234_3 is task 3 of an array
#   cancel   cancels a job
#
# Options: --dry-run prints every command, including the batch script, and runs none; --yes cancels
# without asking; --help.
#
# Variables (required unless a default is given):
#   GPUS_PER_NODE   submit: GPUs per node; study: GPUs per task, shared by the task's runs
#   WORKDIR         submit: run directory, on the shared file system; study: folder for its rows
#   TASKS           study: jobs of the array; jobs beyond the number of grid cells would be idle
#   JOB             logs, cancel: number of the job, which submit prints
#   NODES           submit: number of nodes; default 1
#   CPUS_PER_TASK   cores for each process and its data loading; default 4
#   JOB_NAME        default mea_jax
#   PARTITION, ACCOUNT, TIME   options of sbatch; default: the cluster's. sbatch reads others from
#                   the environment: SBATCH_QOS, SBATCH_CONSTRAINT, SBATCH_RESERVATION, ...
#   SETUP           first command of every job, such as "module load cuda"; default none
#   PYTHON          interpreter; default .venv/bin/python in the checkout
#   EXTRA           install: extra of pyproject.toml; default cuda
#
# Prepared data are cached in ~/.cache/mea_jax. If nodes do not share the home folder, each prepares
# its own copy, unless the arguments begin with MEA_JAX_CACHE=/shared/cache.
#
# A job that is preempted or loses a node is requeued and resumes from its checkpoint.
#
# https://slurm.schedmd.com/sbatch.html  https://slurm.schedmd.com/srun.html
# https://docs.jax.dev/en/latest/_autosummary/jax.distributed.initialize.html

# shellcheck source=common.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "install submit study logs cancel" "$@"
export EXTRA=${EXTRA-cuda}
NODES=${NODES:-1}
CPUS_PER_TASK=${CPUS_PER_TASK:-4}

# batch_script: prints the batch script. It starts one process per GPU, because
# jax.distributed.initialize() expects that under Slurm (jax/_src/clusters/slurm_cluster.py,
# cluster.py): process i of a node takes the i-th of the GPUs that it sees, and no other. So each
# process must see all GPUs of its node, which --gpus-per-task would prevent.
batch_script() {
  printf '#!/bin/bash\n'
  printf '#SBATCH %s\n' "--job-name=${JOB_NAME:-mea_jax}" --gpus-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="$CPUS_PER_TASK" --open-mode=append --requeue
  if [[ $command == study ]]; then
    printf '#SBATCH %s\n' --nodes=1 --ntasks-per-node=1 --array="0-$((TASKS - 1))" \
      --output="$root/runs/slurm-%A_%a.log"
  else
    printf '#SBATCH %s\n' --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" \
      --output="$root/runs/slurm-%j.log"
  fi
  if [[ -n ${PARTITION:-} ]]; then printf '#SBATCH --partition=%s\n' "$PARTITION"; fi
  if [[ -n ${ACCOUNT:-} ]]; then printf '#SBATCH --account=%s\n' "$ACCOUNT"; fi
  if [[ -n ${TIME:-} ]]; then printf '#SBATCH --time=%s\n' "$TIME"; fi
  printf 'set -eo pipefail\n' # without -u, because module files read variables that are not set
  printf 'cd %s\n' "$(quote "$root")"
  if [[ -n ${SETUP:-} ]]; then printf '%s\n' "$SETUP"; fi
  # Since Slurm 22.05, srun does not inherit --cpus-per-task from sbatch.
  local start=(srun --kill-on-bad-exit=1 --label --cpus-per-task="$CPUS_PER_TASK"
    env "${environment[@]}" "${PYTHON:-.venv/bin/python}" -u -m)
  if [[ $command == study ]]; then
    # One process uses all GPUs of its node.
    # shellcheck disable=SC2016 # the job expands it
    printf '%s --shard="$SLURM_ARRAY_TASK_ID/%s" %s\n' \
      "$(quote "${start[@]}" mea_jax.study run --out "$WORKDIR")" "$TASKS" "$(quote "${args[@]}")"
  else
    printf '%s\n' \
      "$(quote "${start[@]}" mea_jax.train --distributed --workdir "$WORKDIR" "${args[@]}")"
  fi
}

check_submit() {
  need GPUS_PER_NODE "number of GPUs per node" 8
  need WORKDIR "run directory on a file system that all nodes share" /shared/runs/mea_1b
  check_folder WORKDIR
  local name numbers=(NODES GPUS_PER_NODE CPUS_PER_TASK)
  if [[ $command == study ]]; then
    need TASKS "number of jobs of the array" 16
    numbers+=(TASKS)
    NODES=1
  fi
  for name in "${numbers[@]}"; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] ||
      die "$name=${!name} is not a positive integer: must be 1 or more"
  done
  # sbatch splits its option lines at blanks, and not all of them can be quoted.
  [[ $root${JOB_NAME:-} != *[[:space:]]* ]] ||
    die "JOB_NAME=${JOB_NAME:-} or checkout $root contains blanks, which sbatch does not accept: \
rename it"
  training
}

submit() {
  run mkdir -p "$root/runs"
  if ((dry_run)); then
    printf "sbatch --parsable <<'END_OF_JOB'\n%s\nEND_OF_JOB\n" "$(batch_script)"
  else
    printf '+ sbatch --parsable\n%s\n' "$(batch_script)" >&2
    batch_script | sbatch --parsable
  fi
}

case $command in
  install) no_args ;;
  submit | study)
    check_submit
    tool sbatch "run this on a login node of the cluster"
    ;;
  logs)
    no_args
    need JOB "number of the job" 1234
    ;;
  cancel)
    no_args
    need JOB "number of the job" 1234
    tool scancel "run this on a login node of the cluster"
    ;;
esac

case $command in
  install) local_worker install ;;
  submit | study) submit ;;
  logs) run tail -n 100 -F "$root/runs/slurm-$JOB.log" ;;
  cancel)
    confirm "Cancel job $JOB?"
    run scancel "$JOB"
    ;;
esac
