#!/usr/bin/env bash
# Install, start and stop training on one machine. tpu_pod.sh and gpu_box.sh run this script through
# ssh; it can also be used directly, in the root of a checkout:
#
#   EXTRA=cuda launch/worker.sh install        creates the virtual environment .venv with mea_jax
#   launch/worker.sh start -- --config configs/mea_125m.py --workdir runs/mea_125m
#   launch/worker.sh logs                      follows runs/train.log
#   launch/worker.sh stop
#
# Options: --dry-run prints every command and runs none; --help.
#
# Training continues when the terminal or the ssh connection closes. VAR=value before the arguments
# of training set its environment.
#
# Variables:
#   EXTRA    install: tpu or cuda, the extra of pyproject.toml; empty for a CPU
#   BUCKET   Cloud Storage bucket to mount, without gs://; it must have a hierarchical namespace,
#            because folders are renamed when data or a checkpoint are complete
#   MOUNT    where it is mounted; default /mnt/bucket
#   PYTHON   start: interpreter; default .venv/bin/python
#   TAIL     logs: number of past lines to print first; default 100
#
# Mounting: https://cloud.google.com/storage/docs/cloud-storage-fuse/install and .../cli-options
# uv: https://docs.astral.sh/uv/

# shellcheck source=common.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "install start stop logs" "$@"
cd "$root"
check_bucket
log=runs/train.log
pid_file=runs/train.pid

# absent PROGRAM: succeeds if it has to be installed, and in a dry run, which prints the commands.
absent() {
  ((dry_run)) || ! command -v "$1" >/dev/null
}

install() {
  local target=.${EXTRA:+[$EXTRA]}
  export PATH="$HOME/.local/bin:$PATH"
  # uv installs Python: TPU VMs have Ubuntu 22.04's Python 3.10, and mea_jax needs 3.11.
  if absent uv; then
    tool curl "sudo apt-get install curl"
    run bash -o pipefail -c 'curl -LsSf https://astral.sh/uv/install.sh | sh'
  fi
  if [[ ! -x .venv/bin/python ]] || ((dry_run)); then
    run uv venv --python '>=3.11' .venv
  fi
  run uv pip install --python .venv/bin/python --editable "$target"
  if [[ -n ${BUCKET:-} ]]; then
    mount_bucket
  fi
}

mount_bucket() {
  local source='https://packages.cloud.google.com/apt' key=/usr/share/keyrings/cloud.google.asc
  if absent gcsfuse; then
    run bash -o pipefail -c "curl -fsSL $source/doc/apt-key.gpg | sudo tee $key >/dev/null"
    run bash -c "echo \"deb [signed-by=$key] $source gcsfuse-\$(lsb_release -c -s) main\" \
| sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null"
    run sudo apt-get update
    run sudo apt-get install -y gcsfuse
  fi
  if ((dry_run)) || ! mountpoint -q "$MOUNT"; then
    run sudo mkdir -p "$MOUNT"
    run sudo chown "$(id -u):$(id -g)" "$MOUNT"
    # File metadata is not cached, because several machines write and each must see others' files.
    run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
      "$BUCKET" "$MOUNT"
  fi
}

# running: prints the process id of the training that was started here; fails if it has ended.
running() {
  local pid
  [[ -f $pid_file ]] && pid=$(<"$pid_file") && grep -qas mea_jax.train "/proc/$pid/cmdline" &&
    printf '%s' "$pid"
}

start() {
  local pid
  training
  if [[ -n ${BUCKET:-} ]]; then
    ((dry_run)) || mountpoint -q "$MOUNT" ||
      die "$MOUNT is not mounted: run install with BUCKET=$BUCKET"
    # This comes first, so that MEA_JAX_CACHE among the arguments overrides it.
    environment=("MEA_JAX_CACHE=$MOUNT/mea_jax_cache" "${environment[@]}")
  fi
  if ((!dry_run)) && pid=$(running); then
    die "training is already running as process $pid: stop it first"
  fi
  run mkdir -p runs
  # A separate session, so that closing the connection does not end it.
  run bash -c "setsid nohup \"\$@\" >>$log 2>&1 </dev/null & echo \$! >$pid_file" start \
    env "${environment[@]}" "${PYTHON:-.venv/bin/python}" -u -m mea_jax.train "${args[@]}"
}

stop() {
  local pid
  if ((dry_run)); then
    run bash -c "kill -TERM -- -\$(<$pid_file)"
    return
  fi
  pid=$(running) || {
    echo "no training is running here"
    return
  }
  run kill -TERM -- "-$pid" # the entire process group, including data readers
  for _ in {1..60}; do
    running >/dev/null || return 0
    sleep 1
  done
  die "process $pid did not end within a minute: run kill -9 -- -$pid"
}

[[ $command == start ]] || no_args
case $command in
  install) install ;;
  start) start ;;
  stop) stop ;;
  logs) run tail -n "${TAIL:-100}" -F "$log" ;;
esac
