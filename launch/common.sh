# shellcheck shell=bash disable=SC2034 # the scripts that source this use its variables
# Functions for the launchers, which source this file: options, messages, and commands that
# --dry-run only prints. Needs bash 4.4 or later (macOS: brew install bash).

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # root of the checkout
command="" dry_run=0 assume_yes=0
args=()        # arguments after --
environment=() # leading VAR=value arguments, once `training` has moved them out of args

# die MESSAGE: prints a one-line error and exits with status 2.
die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  die "bash $BASH_VERSION is too old: install bash 4.4 or later"

# usage: prints the comment at the top of the script.
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
      -*) die "unknown option $1: use --dry-run, --yes or --help, and put other options after --" ;;
      *)
        [[ -z $command ]] || die "unexpected argument $1 after $command: put it after --"
        [[ " $known " == *" $1 "* ]] || die "unknown subcommand $1: choose one of ${known// /, }"
        command=$1
        ;;
    esac
    shift
  done
  [[ -n $command ]] || die "no subcommand: choose one of ${known// /, }; see --help"
}

# need NAME MEANING EXAMPLE: exits with an error if the variable is not set.
need() {
  [[ -n ${!1:-} ]] || die "missing variable $1: set it to the $2, such as $1=$3"
}

# enabled NAME: succeeds if the variable is 1, fails if it is 0 or not set.
enabled() {
  case ${!1:-0} in
    0) return 1 ;;
    1) return 0 ;;
    *) die "$1=${!1} must be 1 or 0" ;;
  esac
}

# tool NAME INSTALLATION: exits with an error if the program is missing, except in a dry run.
tool() {
  ((dry_run)) || command -v "$1" >/dev/null || die "$1 is not installed: $2"
}

# no_args: exits with an error if there are arguments after --, for subcommands that ignore them.
no_args() {
  ((${#args[@]} == 0)) || die "$command takes nothing after --: remove ${args[0]}"
}

# training: splits args into environment and arguments of mea_jax.train, at least one.
training() {
  environment=()
  while ((${#args[@]})) && [[ ${args[0]} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; do
    environment+=("${args[0]}")
    args=("${args[@]:1}")
  done
  ((${#args[@]})) ||
    die "no training arguments: add them after --, such as -- --config configs/mea_1b.py"
  # A line break would end a line of a batch script or of a pod's YAML.
  [[ "${environment[*]} ${args[*]}" != *$'\n'* ]] ||
    die "a training argument contains a line break: remove it"
}

# check_folder NAME: exits with an error for a URL. The trainer takes folders only, so a bucket must
# be mounted.
check_folder() {
  [[ ${!1} != *://* ]] ||
    die "$1=${!1} is a URL: give a folder, or set BUCKET to mount the bucket as a folder"
}

# quote WORDS: prints a command line that a shell parses into exactly these words.
quote() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  printf '%s' "${words[*]}"
}

# run WORDS: prints a command and runs it. A dry run only prints it, quoted for pasting.
run() {
  if ((dry_run)); then
    printf '%s\n' "$(quote "$@")"
  else
    printf '+ %s\n' "$(quote "$@")" >&2
    "$@"
  fi
}

# local_worker SUBCOMMAND [-- WORDS]: runs worker.sh on this machine, which prints its own dry run.
local_worker() {
  local dry=() subcommand=$1
  shift
  if ((dry_run)); then dry=(--dry-run); fi
  "$root/launch/worker.sh" "$subcommand" "${dry[@]}" "$@"
}

# confirm QUESTION: exits unless the answer is "yes"; with --yes it does not ask.
confirm() {
  local reply=""
  ((dry_run || assume_yes)) && return
  printf '%s [yes/no] ' "$1" >&2
  read -r reply || true
  [[ $reply == yes ]] || die "not confirmed, nothing was done: answer yes, or add --yes"
}

# check_bucket: sets the default of MOUNT, where every machine mounts the bucket, and exits with an
# error unless BUCKET is a name and MOUNT an absolute path.
check_bucket() {
  MOUNT=${MOUNT:-/mnt/bucket}
  [[ ${BUCKET:-} != gs://* ]] || die "BUCKET=$BUCKET is a URL: give the name without gs://"
  [[ $MOUNT == /* ]] || die "MOUNT=$MOUNT is not an absolute path: must begin with /"
}

# check_code: exits with an error if REPO is set without COMMIT.
check_code() {
  [[ -z ${REPO:-} ]] || need COMMIT "commit or tag of REPO to run" v0.1.0
}

# The files that git tracks or would track, with local changes: no runs, environments or caches.
archive="cd $(quote "$root") && git ls-files -z --cached --others --exclude-standard \
| tar --null -T -"

# send_code: copies this checkout, or clones REPO at COMMIT, to the folder mea_jax of the other
# machines. The script that calls it defines on_machines COMMAND and copy_to_machines FILE NAME.
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
  # Modules that were deleted from the checkout must not stay importable there.
  on_machines "rm -rf mea_jax/mea_jax mea_jax/configs && mkdir -p mea_jax && \
tar -xzf mea_jax.tgz -C mea_jax"
}
