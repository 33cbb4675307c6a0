#!/usr/bin/env bash
# One machine with NVIDIA GPUs: the one this runs on, or SSH_HOST through ssh.
#
#   export SSH_HOST=ubuntu@203.0.113.7
#   launch/gpu_box.sh install
#   launch/gpu_box.sh run -- --config configs/mea_125m.py --workdir runs/mea_125m
#   launch/gpu_box.sh logs
#   launch/gpu_box.sh stop
#
# Subcommands:
#   install  puts the code there (with SSH_HOST) and makes its environment; again after a change
#   run      starts training in the background; what follows -- are VAR=value words for its
#            environment, then arguments of mea_jax.train. One process drives all the GPUs, so
#            --distributed is not needed; CUDA_VISIBLE_DEVICES=0,1 first takes some of them
#   logs     follows the log
#   stop     ends the training; `run` again resumes from the last checkpoint
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

# worker SUBCOMMAND [-- WORDS]: worker.sh on the machine.
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
  tool ssh "install OpenSSH, such as sudo apt-get install openssh-client"
  check_code
elif [[ -n ${REPO:-} ]]; then
  die "REPO=$REPO is for another machine: set SSH_HOST, or clone it here"
elif [[ $command == install || $command == run ]]; then
  tool nvidia-smi "install NVIDIA's driver, https://docs.nvidia.com/datacenter/tesla"
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
