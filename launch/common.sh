# Shared by the launch scripts: plain errors, flags, and a dry run.
# shellcheck shell=bash
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

# Words as they would be typed: quoted where they must be.
typed() {
  local word words=()
  for word; do
    [[ $word =~ ^[[:alnum:]_./:=@%+,~[-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

# Runs a command, or with --dry-run prints it.
run() {
  if [[ ${dry_run:-} == true ]]; then
    typed "$@"
  else
    "$@"
  fi
}

# --some-name=value sets some_name, if the script has given it a default; what follows
# `--`, or the first word that is no flag, is left in `rest`.
parse() {
  rest=()
  while (($#)); do
    case $1 in
      --) shift && rest=("$@") && return ;;
      --help) usage && exit 0 ;;
      --dry-run) dry_run=true ;;
      --*=*)
        local _flag=${1%%=*}
        _flag=${_flag#--}
        _flag=${_flag//-/_}
        [[ -v $_flag ]] || fail "unknown flag ${1%%=*}; --help shows those there are"
        printf -v "$_flag" %s "${1#*=}"
        ;;
      --*) fail "$1 needs a value: $1=VALUE; --help shows the flags" ;;
      *) rest=("$@") && return ;;
    esac
    shift
  done
}

# The comment at the top of a script is its help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}
