#!/usr/bin/env bash
# Create one or several Cloud TPU slices, from one host to a pod, install, train, and delete them.
#
#   export TPU_NAME=mea ZONE=us-east5-b TPU_TYPE=v6e-64 BUCKET=my-bucket
#   launch/tpu_pod.sh create
#   launch/tpu_pod.sh install
#   launch/tpu_pod.sh run -- --config configs/mea_1b.py --config.batch_size=2432
#   launch/tpu_pod.sh logs
#   launch/tpu_pod.sh delete
#
# Subcommands:
#   create   creates the slice; arguments after -- go to gcloud, such as -- --network=my-network
#   status   prints the state of the slice
#   install  copies the code, creates the virtual environment and mounts BUCKET, on every worker;
#            run it again after a change of the code, or a restart of the machines
#   run      starts training in the background on every worker. After -- come VAR=value for its
#            environment, then arguments of mea_jax.train, to which the script adds --distributed
#            and --workdir
#   logs     follows the log of one worker
#   stop     stops the training on every worker; `run` again resumes from the last checkpoint
#   delete   deletes the slice
#   all      create, wait until the slice is ready, install, run, logs
#
# Options: --dry-run prints every command and runs none; --yes deletes without asking; --help.
#
# Variables (required unless a default is given; the same for every subcommand):
#   TPU_NAME   name of the slice
#   ZONE       its zone, such as us-east5-b
#   TPU_TYPE   create: accelerator type, such as v6e-64 or v5litepod-16
#   BUCKET     Cloud Storage bucket, without gs://, mounted on every worker for the run and data;
#              not required if WORKDIR is given
#   MOUNT      where it is mounted; default /mnt/bucket
#   WORKDIR    run directory, which all workers must share; default $MOUNT/runs/$TPU_NAME
#   PROJECT    Google Cloud project; default: that of gcloud's configuration
#   RUNTIME    create: software version; default: the one for TPU_TYPE
#   QUEUED     1: request the slice as a queued resource, and wait for capacity; default 0
#   SLICES     number of slices; more than 1 implies QUEUED=1; default 1
#   SPOT       create: 1 for spot capacity, which can be reclaimed; default 0
#   REPO       install: git repository to clone; default: the files of this checkout
#   COMMIT     install: its commit or tag
#   WORKER     logs: worker to follow; default 0
#   SLICE      logs: slice to follow, if there are several; default 0
#
# gcloud connects to all workers at the same time: run `ssh-add ~/.ssh/google_compute_engine` first.
# TPU7x and later are not in this API: use gke_xpk.sh.
#
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources
# https://docs.cloud.google.com/tpu/docs/jax-pods
# https://cloud.google.com/tpu/docs/runtimes (software versions)

# shellcheck source=common.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "create status install run logs stop delete all" "$@"
need TPU_NAME "name of the TPU slice" mea
need ZONE "zone of the TPU slice" us-east5-b
SLICES=${SLICES:-1}
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || die "SLICES=$SLICES is not a positive integer: must be 1 or more"
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
queued=0
if enabled QUEUED || ((SLICES > 1)); then queued=1; fi
tpus=(gcloud compute tpus tpu-vm)
everywhere=(--worker=all)
if ((queued)); then
  tpus=(gcloud compute tpus queued-resources)
  everywhere+=(--node=all)
fi

on_machines() {
  run "${tpus[@]}" ssh "$TPU_NAME" "${where[@]}" "${everywhere[@]}" --command="$1"
}

copy_to_machines() {
  run "${tpus[@]}" scp "$1" "$TPU_NAME:$2" "${where[@]}" "${everywhere[@]}"
}

check_create() {
  need TPU_TYPE "accelerator type" v6e-64
  if [[ -z ${RUNTIME:-} ]]; then
    case $TPU_TYPE in
      v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
      v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
      v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
      v2-* | v3-* | v4-*) RUNTIME=tpu-ubuntu2204-base ;;
      *) need RUNTIME "software version for $TPU_TYPE" v2-alpha-tpuv6e ;;
    esac
  fi
}

create() { # [arguments for gcloud]
  local spot=()
  if enabled SPOT; then spot=(--spot); fi
  if ((!queued)); then
    run "${tpus[@]}" create "$TPU_NAME" "${where[@]}" --accelerator-type="$TPU_TYPE" \
      --version="$RUNTIME" "${spot[@]}" "$@"
  elif ((SLICES == 1)); then
    run "${tpus[@]}" create "$TPU_NAME" "${where[@]}" --accelerator-type="$TPU_TYPE" \
      --runtime-version="$RUNTIME" --node-id="$TPU_NAME" "${spot[@]}" "$@"
  else
    run "${tpus[@]}" create "$TPU_NAME" "${where[@]}" --accelerator-type="$TPU_TYPE" \
      --runtime-version="$RUNTIME" --node-count="$SLICES" --node-prefix="$TPU_NAME" \
      "${spot[@]}" "$@"
  fi
}

status() {
  local field=state
  if ((queued)); then field=state.state; fi # the state of a queued resource is a nested message
  run "${tpus[@]}" describe "$TPU_NAME" "${where[@]}" --format="value($field)"
}

# await: waits for a queued resource, which can take hours. Without a queue, the slice is ready when
# create returns.
await() {
  local state
  ((queued)) || return 0
  if ((dry_run)); then
    status
    return
  fi
  while true; do
    state=$(status) || die "queued resource $TPU_NAME has no state: see the message above"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPEND*) die "queued resource $TPU_NAME is $state: delete it and create it again" ;;
    esac
    sleep 60
  done
}

install() {
  send_code
  on_machines "cd mea_jax && $(quote env EXTRA=tpu BUCKET="${BUCKET:-}" MOUNT="$MOUNT" \
    launch/worker.sh install)"
}

check_run() {
  training
  check_bucket
  [[ -n ${BUCKET:-} ]] || need WORKDIR "folder that all workers share (or set BUCKET)" /mnt/nfs/mea
  WORKDIR=${WORKDIR:-$MOUNT/runs/$TPU_NAME}
  check_folder WORKDIR
}

start() {
  on_machines "cd mea_jax && $(quote env BUCKET="${BUCKET:-}" MOUNT="$MOUNT" \
    launch/worker.sh start -- "${environment[@]}" --distributed --workdir "$WORKDIR" "${args[@]}")"
}

logs() {
  local which=(--worker="${WORKER:-0}")
  if ((queued)); then which+=(--node="${SLICE:-0}"); fi
  run "${tpus[@]}" ssh "$TPU_NAME" "${where[@]}" "${which[@]}" \
    --command="cd mea_jax && launch/worker.sh logs"
}

delete() {
  local force=()
  if ((queued)); then force=(--force); fi # required for a queued resource that has slices
  confirm "Delete $TPU_NAME in $ZONE?"
  run "${tpus[@]}" delete "$TPU_NAME" "${where[@]}" "${force[@]}" --quiet
}

# All checks come before the first action.
case $command in
  create) check_create ;;
  run) check_run ;;
  install)
    no_args
    check_code
    check_bucket
    ;;
  all)
    check_create
    check_code
    check_run
    ;;
  *) no_args ;;
esac
tool gcloud "https://cloud.google.com/sdk/docs/install"

case $command in
  create) create "${args[@]}" ;;
  status) status ;;
  install) install ;;
  run) start ;;
  logs) logs ;;
  stop) on_machines 'cd mea_jax && launch/worker.sh stop' ;;
  delete) delete ;;
  all)
    create
    await
    install
    start
    logs
    ;;
esac
