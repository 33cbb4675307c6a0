#!/usr/bin/env bash
# Create a cluster of TPU slices in Google Kubernetes Engine through XPK, and run workloads on it.
#
#   export CLUSTER=mea ZONE=us-east5-b TPU_TYPE=v6e-64 BUCKET=my-bucket WORKLOAD=mea-1b
#   launch/gke_xpk.sh create
#   launch/gke_xpk.sh storage
#   launch/gke_xpk.sh run -- --config configs/mea_1b.py
#   JOBS=4 TPU_TYPE=v6e-8 launch/gke_xpk.sh study -- --config configs/lr_study.py
#   launch/gke_xpk.sh logs
#   launch/gke_xpk.sh delete
#   launch/gke_xpk.sh delete-cluster
#
# Subcommands:
#   create          creates a cluster with the slices; arguments after -- go to
#                   `xpk cluster create`, such as -- --default-pool-cpu-machine-type=n2-standard-16
#   storage         attaches BUCKET to the cluster, as the storage mea-jax
#   run             builds an image of this checkout and starts a workload. After -- come VAR=value
#                   for its environment, then arguments of mea_jax.train, to which the script adds
#                   --distributed and --workdir
#   study           starts JOBS workloads, WORKLOAD-0, -1, ..., each on a slice of one host, which
#                   share a grid of runs (docs/studies.md). After -- come VAR=value, then arguments
#                   of `mea_jax.study run`, to which the script adds --out and --shard. To continue
#                   with the remaining runs, delete the workloads and start the study again
#   list            lists the workloads of the cluster
#   logs            follows the log of one worker of the workload
#   delete          deletes the workload
#   delete-cluster  deletes the cluster
#
# Options: --dry-run prints every command and runs none; --yes deletes without asking; --help.
#
# Variables (required unless a default is given; the same for every subcommand):
#   CLUSTER        name of the cluster
#   ZONE           its zone, such as us-east5-b
#   TPU_TYPE       create, run, study: type of a slice, such as v6e-64, v5litepod-16 or tpu7x-8
#   WORKLOAD       run, study, logs, delete: name of the workload: lowercase letters, digits and -
#   JOBS           study: number of workloads
#   BUCKET         storage, run, study: Cloud Storage bucket, without gs://, with a hierarchical
#                  namespace; not required for run if WORKDIR is given
#   MOUNT          where it is mounted; default /mnt/bucket
#   BUCKET_SIZE    storage: size of the volume in GB, which Kubernetes requires; default 1000
#   WORKDIR        run: run directory, which all hosts must share; study: folder for its rows;
#                  default $MOUNT/runs/$WORKLOAD
#   PROJECT        Google Cloud project; default: that of gcloud's configuration
#   SLICES         number of slices; default 1
#   SPOT           create: 1 for spot capacity, which can be reclaimed; default 0: on demand
#   RESERVATION    create: reservation that provides the capacity; default none
#   IMAGE          run, study: image with mea_jax and configs/ in its working folder; default: built
#                  from BASE_IMAGE and this checkout, which is installed when the workload starts
#   BASE_IMAGE     run, study: default python:3.12
#   MAX_RESTARTS   run, study: how often a failed workload restarts and resumes; default 10
#   SLICE, WORKER  logs: slice and worker to follow; default 0 and 0
#
# https://github.com/AI-Hypercomputer/xpk/tree/main/docs/usage (written for XPK 1.16)

# shellcheck source=common.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "create storage run study list logs delete delete-cluster" "$@"
need CLUSTER "name of the GKE cluster" mea
need ZONE "zone of the cluster" us-east5-b
check_bucket
storage=mea-jax
where=(--cluster "$CLUSTER" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"})

create() {
  local capacity=(--on-demand)
  if enabled SPOT; then capacity=(--spot); fi
  if [[ -n ${RESERVATION:-} ]]; then capacity=(--reservation "$RESERVATION"); fi
  run xpk cluster create "${where[@]}" --tpu-type "$TPU_TYPE" --num-slices "${SLICES:-1}" \
    "${capacity[@]}" ${BUCKET:+--enable-gcsfuse-csi-driver} "${args[@]}"
}

attach() {
  # File metadata is not cached, because several hosts write and each must see the others' files.
  run xpk storage attach "$storage" "${where[@]}" --type gcsfuse --bucket "$BUCKET" \
    --size "${BUCKET_SIZE:-1000}" --mount-point "$MOUNT" --readonly false --auto-mount false \
    --mount-options implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
}

check_run() {
  training
  [[ -n ${BUCKET:-} ]] || need WORKDIR "folder that all hosts share (or set BUCKET)" /mnt/nfs/mea
  WORKDIR=${WORKDIR:-$MOUNT/runs/$WORKLOAD}
  check_folder WORKDIR
  if [[ -n ${BUCKET:-} ]]; then
    environment=("MEA_JAX_CACHE=$MOUNT/mea_jax_cache" "${environment[@]}")
  fi
}

start() {
  local install="" image=(--docker-image "${IMAGE:-}") copy=$root/build/image i
  if [[ -z ${IMAGE:-} ]]; then
    # XPK copies a folder into the image as the working folder. It does not install the package.
    run rm -rf "$copy"
    run mkdir -p "$copy"
    run bash -o pipefail -c "$archive -cf - | tar -xf - -C $(quote "$copy")"
    install="pip install --quiet --editable '.[tpu]' && "
    image=(--base-docker-image "${BASE_IMAGE:-python:3.12}" --script-dir "$copy")
  fi
  if [[ $command == run ]]; then
    workload "$WORKLOAD" "${SLICES:-1}" mea_jax.train --distributed --workdir "$WORKDIR" "${args[@]}"
    return
  fi
  for ((i = 0; i < JOBS; i++)); do
    workload "$WORKLOAD-$i" 1 mea_jax.study run --out "$WORKDIR" --shard "$i/$JOBS" "${args[@]}"
  done
}

# workload NAME SLICES MODULE WORDS: creates a workload that runs a Python module, with the
# variables image and install of `start`.
workload() {
  run xpk workload create "${where[@]}" --workload "$1" --tpu-type "$TPU_TYPE" \
    --num-slices "$2" --max-restarts "${MAX_RESTARTS:-10}" "${image[@]}" \
    ${BUCKET:+--storage "$storage"} --command "$install$(quote env "${environment[@]}" \
      python -u -m "${@:3}")"
}

logs() {
  local jobset=jobset.sigs.k8s.io
  # XPK creates clusters in the region of the zone.
  run gcloud container clusters get-credentials "$CLUSTER" --location="${ZONE%-*}" \
    ${PROJECT:+--project="$PROJECT"}
  local pod=$jobset/jobset-name=$WORKLOAD,$jobset/job-index=${SLICE:-0}
  pod+=,batch.kubernetes.io/job-completion-index=${WORKER:-0}
  run kubectl logs --follow --tail=100 --container=jax-tpu --selector="$pod"
}

# All checks come before the first action.
case $command in
  create | run | study) need TPU_TYPE "type of the slices" v6e-64 ;;
esac
case $command in
  run | study | logs | delete) need WORKLOAD "name of the workload" mea-1b ;;
  storage) need BUCKET "Cloud Storage bucket, without gs://" my-bucket ;;
esac
case $command in
  create)
    if enabled SPOT && [[ -n ${RESERVATION:-} ]]; then
      die "SPOT=1 and RESERVATION=$RESERVATION exclude each other: set SPOT=1 or RESERVATION"
    fi
    ;;
  run) check_run ;;
  study)
    need JOBS "number of workloads" 4
    [[ $JOBS =~ ^[1-9][0-9]*$ ]] || die "JOBS=$JOBS is not a positive integer: must be 1 or more"
    check_run
    ;;
  *) no_args ;;
esac
if [[ $command == logs ]]; then
  tool gcloud "https://cloud.google.com/sdk/docs/install"
  tool kubectl "gcloud components install kubectl gke-gcloud-auth-plugin"
else
  tool xpk "python -m pip install xpk, in a separate environment"
fi

case $command in
  create) create ;;
  storage) attach ;;
  run | study) start ;;
  list) run xpk workload list "${where[@]}" ;;
  logs) logs ;;
  delete)
    confirm "Delete workload $WORKLOAD of cluster $CLUSTER?"
    run xpk workload delete "${where[@]}" --workload "$WORKLOAD" --force
    ;;
  delete-cluster)
    confirm "Delete cluster $CLUSTER?"
    run xpk cluster delete "${where[@]}" --force
    ;;
esac
