#!/usr/bin/env bash
# TPU slices in Google Kubernetes Engine, through XPK: a cluster, and workloads that run on it.
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
#   create          makes a cluster with the slices; what follows -- goes to `xpk cluster create`,
#                   such as -- --default-pool-cpu-machine-type=n2-standard-16
#   storage         attaches BUCKET to the cluster, as the storage mea-jax
#   run             makes an image of this checkout and starts a workload; what follows -- are
#                   VAR=value words for its environment, then arguments of mea_jax.train, after
#                   --distributed --workdir
#   study           starts JOBS workloads, WORKLOAD-0, -1, ..., on a slice of one host each, which
#                   share a grid of runs (docs/studies.md); what follows -- are VAR=value words,
#                   then arguments of `mea_jax.study run`, after --out and --shard. Started again
#                   (delete them first), they go on with what is left
#   list            workloads of the cluster
#   logs            follows the log of one worker of the workload
#   delete          deletes the workload
#   delete-cluster  deletes the cluster
#
# Options: --dry-run prints every command and runs none; --yes deletes without a question; --help.
#
# Variables (required unless a default is given; the same for every subcommand):
#   CLUSTER        name of the cluster
#   ZONE           its zone, such as us-east5-b
#   TPU_TYPE       create, run, study: such as v6e-64, v5litepod-16, v5p-8 or tpu7x-8
#   WORKLOAD       run, study, logs, delete: name of the workload: small letters, digits and -
#   JOBS           study: number of workloads
#   BUCKET         storage, run, study: Cloud Storage bucket, without gs://, with a hierarchical
#                  namespace; not required for run if WORKDIR is given
#   MOUNT          where it is mounted; default /mnt/bucket
#   BUCKET_SIZE    storage: size of the volume in GB, which Kubernetes asks for; default 1000
#   WORKDIR        run: run directory, which all hosts must share; study: folder of its rows; default
#                  $MOUNT/runs/$WORKLOAD
#   PROJECT        default: that of gcloud's configuration
#   SLICES         number of slices; default 1
#   SPOT           create: 1 for capacity that may be taken back; default 0: on demand
#   RESERVATION    create: reservation to take the capacity from; default none
#   IMAGE          run: image that has mea_jax and configs/ in its working folder; default: made
#                  from BASE_IMAGE and this checkout, installed when it starts
#   BASE_IMAGE     run: default python:3.12
#   MAX_RESTARTS   run: how often a failed workload starts again, to resume; default 10
#   SLICE, WORKER  logs: default 0 and 0
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
  # Nothing is remembered about files: several hosts write, and each must see the others'.
  run xpk storage attach "$storage" "${where[@]}" --type gcsfuse --bucket "$BUCKET" \
    --size "${BUCKET_SIZE:-1000}" --mount-point "$MOUNT" --readonly false --auto-mount false \
    --mount-options implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
}

check_run() {
  training
  [[ -n ${BUCKET:-} ]] || need WORKDIR "folder that all hosts share; or set BUCKET" /mnt/nfs/mea
  WORKDIR=${WORKDIR:-$MOUNT/runs/$WORKLOAD}
  check_folder WORKDIR
  if [[ -n ${BUCKET:-} ]]; then
    environment=("MEA_JAX_CACHE=$MOUNT/mea_jax_cache" "${environment[@]}")
  fi
}

start() {
  local install="" image=(--docker-image "${IMAGE:-}") copy=$root/build/image i
  if [[ -z ${IMAGE:-} ]]; then
    # XPK copies a folder into the image, where it is the working folder, and installs nothing.
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

# workload NAME SLICES MODULE WORDS: creates one that runs a module of Python; image and install
# are those of `start`.
workload() {
  run xpk workload create "${where[@]}" --workload "$1" --tpu-type "$TPU_TYPE" \
    --num-slices "$2" --max-restarts "${MAX_RESTARTS:-10}" "${image[@]}" \
    ${BUCKET:+--storage "$storage"} --command "$install$(quote env "${environment[@]}" \
      python -u -m "${@:3}")"
}

logs() {
  local jobset=jobset.sigs.k8s.io
  # XPK's clusters belong to the region of the zone.
  run gcloud container clusters get-credentials "$CLUSTER" --location="${ZONE%-*}" \
    ${PROJECT:+--project="$PROJECT"}
  local pod=$jobset/jobset-name=$WORKLOAD,$jobset/job-index=${SLICE:-0}
  pod+=,batch.kubernetes.io/job-completion-index=${WORKER:-0}
  run kubectl logs --follow --tail=100 --container=jax-tpu --selector="$pod"
}

# All that can be refused is refused before anything is done.
case $command in
  create | run | study) need TPU_TYPE "type of the slices" v6e-64 ;;
esac
case $command in
  run | study | logs | delete) need WORKLOAD "name of the workload" mea-1b ;;
  storage) need BUCKET "Cloud Storage bucket, without gs://" my-bucket ;;
esac
case $command in
  create)
    if enabled SPOT && [[ -n ${RESERVATION:-} ]]; then die "set SPOT=1 or RESERVATION, not both"; fi
    ;;
  run) check_run ;;
  study)
    need JOBS "number of workloads" 4
    [[ $JOBS =~ ^[1-9][0-9]*$ ]] || die "JOBS=$JOBS must be a number, 1 or more"
    check_run
    ;;
  *) no_args ;;
esac
if [[ $command == logs ]]; then
  tool gcloud "https://cloud.google.com/sdk/docs/install"
  tool kubectl "gcloud components install kubectl gke-gcloud-auth-plugin"
else
  tool xpk "python -m pip install xpk, in an environment of its own"
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
