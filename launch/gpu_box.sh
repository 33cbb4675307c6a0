#!/usr/bin/env bash
# Train on one machine with NVIDIA GPUs: this machine, or SSH_HOST through ssh.
#
#   export SSH_HOST=ubuntu@203.0.113.7
#   launch/gpu_box.sh install
#   launch/gpu_box.sh run -- --config configs/mea_125m.py --workdir runs/mea_125m
#   launch/gpu_box.sh logs
#   launch/gpu_box.sh stop
#
# Subcommands:
#   install  copies the code (with SSH_HOST) and creates the virtual environment; run it again
#            after a change of the code
#   run      starts training in the background. After -- come VAR=value for its environment, then
#            arguments of mea_jax.train. One process uses all GPUs, so --distributed is not needed;
#            begin with CUDA_VISIBLE_DEVICES=0,1 to use some of them
#   logs     follows the log
#   stop     stops the training; `run` again resumes from the last checkpoint
#
# Options: --dry-run prints every command and runs none; --help.
#
# Variables (none is required):
#   SSH_HOST     user@machine, or a name from ~/.ssh/config; default: this machine, in this checkout
#   EXTRA    install: extra of pyproject.toml; default cuda (CUDA 13: NVIDIA driver 580 or later)
#   REPO     install with SSH_HOST: git repository to clone; default: the files of this checkout
#   COMMIT   install with SSH_HOST: its commit or tag
#
# https://docs.jax.dev/en/latest/installation.html (drivers)

# shellcheck source=common.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "install run logs stop" "$@"
export EXTRA=${EXTRA-cuda}

on_machines() {
  run ssh "$SSH_HOST" "$1"
}

copy_to_machines() {
  run scp "$1" "$SSH_HOST:$2"
}

# worker SUBCOMMAND [-- WORDS]: runs worker.sh on the machine.
worker() {
  if [[ -n ${SSH_HOST:-} ]]; then
    on_machines "cd mea_jax && $(quote env EXTRA="$EXTRA" launch/worker.sh "$@")"
  else
    local_worker "$@"
  fi
}

if [[ $command == run ]]; then
  training
else
  no_args
fi
if [[ -n ${SSH_HOST:-} ]]; then
  tool ssh "install OpenSSH, such as with sudo apt-get install openssh-client"
  check_code
elif [[ -n ${REPO:-} ]]; then
  die "REPO=$REPO has no effect on this machine: set SSH_HOST, or clone it here"
elif [[ $command == install || $command == run ]]; then
  tool nvidia-smi "install the NVIDIA driver, https://docs.nvidia.com/datacenter/tesla"
fi

case $command in
  install)
    [[ -z ${SSH_HOST:-} ]] || send_code
    worker install
    ;;
  run) worker start -- "${environment[@]}" "${args[@]}" ;;
  logs) worker logs ;;
  stop) worker stop ;;
esac
