# shellcheck shell=bash disable=SC2034 # the scripts that source this use its variables
# Shared by the launchers, which source it: options, messages, commands that --dry-run only prints.
# Needs bash 4.4 or later (macOS: brew install bash).

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # of the checkout
command="" dry_run=0 assume_yes=0
args=()        # what follows --
environment=() # VAR=value words that come first in it, once `training` has set them apart

# die MESSAGE: one line, and the exit status of a mistake of the user's.
die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  die "bash $BASH_VERSION is too old: 4.4 or later is needed"

# usage: the comment at the top of the script.
usage() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

# parse SUBCOMMANDS "$@": sets command, dry_run, assume_yes and args.
parse() {
  local known=$1
  shift
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) dry_run=1 ;;
      --yes) assume_yes=1 ;;
      --)
        shift
        args=("$@")
        break
        ;;
      -*) die "unknown option $1: there are --dry-run, --yes and --help; others come after --" ;;
      *)
        [[ -z $command ]] || die "unexpected argument $1 after $command: others come after --"
        [[ " $known " == *" $1 "* ]] || die "unknown subcommand $1: one of ${known// /, }"
        command=$1
        ;;
    esac
    shift
  done
  [[ -n $command ]] || die "no subcommand: one of ${known// /, }; see --help"
}

# need NAME MEANING EXAMPLE: refuses to go on without the variable.
need() {
  [[ -n ${!1:-} ]] || die "missing variable $1: $2, such as $1=$3"
}

# enabled NAME: whether the variable is 1.
enabled() {
  case ${!1:-0} in
    0) return 1 ;;
    1) return 0 ;;
    *) die "$1=${!1} must be 1 or 0" ;;
  esac
}

# tool NAME INSTALLATION: refuses to go on without the program; a dry run needs none.
tool() {
  ((dry_run)) || command -v "$1" >/dev/null || die "$1 is not installed: $2"
}

# no_args: refuses what follows -- where it would be ignored.
no_args() {
  ((${#args[@]} == 0)) || die "$command takes nothing after --, but got ${args[0]}"
}

# training: splits args into environment and arguments of mea_jax.train, of which it wants some.
training() {
  environment=()
  while ((${#args[@]})) && [[ ${args[0]} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; do
    environment+=("${args[0]}")
    args=("${args[@]:1}")
  done
  ((${#args[@]})) ||
    die "no training arguments: add them after --, such as -- --config configs/mea_1b.py"
  # A line break would end a line of a batch script or of a pod's YAML.
  [[ "${environment[*]} ${args[*]}" != *$'\n'* ]] || die "a training argument holds a line break"
}

# check_folder NAME: the trainer takes folders only, so that a bucket is mounted first.
check_folder() {
  [[ ${!1} != *://* ]] ||
    die "$1=${!1} must be a folder: set BUCKET, and the bucket is mounted as one"
}

# quote WORDS: a command line that a shell reads back as exactly these words.
quote() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  printf '%s' "${words[*]}"
}

# run WORDS: runs a command that is shown first; a dry run prints it, to be pasted, and no more.
run() {
  if ((dry_run)); then
    printf '%s\n' "$(quote "$@")"
  else
    printf '+ %s\n' "$(quote "$@")" >&2
    "$@"
  fi
}

# local_worker SUBCOMMAND [-- WORDS]: worker.sh on this machine; it prints its own dry run.
local_worker() {
  local dry=() subcommand=$1
  shift
  if ((dry_run)); then dry=(--dry-run); fi
  "$root/launch/worker.sh" "$subcommand" "${dry[@]}" "$@"
}

# confirm QUESTION: goes on only after a "yes"; --yes asks nothing.
confirm() {
  local reply=""
  ((dry_run || assume_yes)) && return
  printf '%s [yes/no] ' "$1" >&2
  read -r reply || true
  [[ $reply == yes ]] || die "not confirmed, nothing was done; --yes asks nothing"
}

# check_bucket: BUCKET is a name and MOUNT a path, where every machine has it.
check_bucket() {
  MOUNT=${MOUNT:-/mnt/bucket}
  [[ ${BUCKET:-} != gs://* ]] || die "BUCKET=$BUCKET must be a name without gs://"
  [[ $MOUNT == /* ]] || die "MOUNT=$MOUNT must begin with /"
}

# check_code: REPO and COMMIT come together.
check_code() {
  [[ -z ${REPO:-} ]] || need COMMIT "commit or tag of REPO to run" v0.1.0
}

# What git tracks or would track, as it is in the checkout: no runs, environments or caches.
archive="cd $(quote "$root") && git ls-files -z --cached --others --exclude-standard \
| tar --null -T -"

# send_code: this checkout, or REPO at COMMIT, as the folder mea_jax of the other machines. The
# script that calls it defines on_machines COMMAND and copy_to_machines FILE NAME.
send_code() {
  local file=$root/build/mea_jax.tgz
  if [[ -n ${REPO:-} ]]; then
    on_machines "test -d mea_jax || git clone $(quote "$REPO") mea_jax; git -C mea_jax fetch \
--tags origin && git -C mea_jax checkout --detach $(quote "$COMMIT")"
    return
  fi
  run mkdir -p "$root/build"
  run bash -o pipefail -c "$archive -czf $(quote "$file")"
  copy_to_machines "$file" mea_jax.tgz
  # Modules that are gone from the checkout must not stay importable there.
  on_machines "rm -rf mea_jax/mea_jax mea_jax/configs && mkdir -p mea_jax && \
tar -xzf mea_jax.tgz -C mea_jax"
}
