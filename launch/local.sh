#!/usr/bin/env bash
# One process on this machine, with all devices it has: the environment and the start, nothing else.
#
#   launch/local.sh VERB ARGUMENTS...
#   launch/local.sh train configs/tiny.py --out runs/tiny
#   launch/local.sh train configs/stage1_align.py --start assembled --out runs/stage1 --mesh fsdp=8 --accumulate 16
#
# The last trains on eight GPUs, for which JAX needs: .venv/bin/pip install 'jax[cuda13]'. A run that was told to stop
# (Ctrl-C, SIGTERM, --max-hours) has saved and exits with 75: the same command goes on. To go on by itself:
#
#   until launch/local.sh train ...; do [ $? = 75 ] || exit 1; done
#
# HYPERVL                      the command [.venv/bin/hypervl]
# JAX_COMPILATION_CACHE_DIR    where compiled programs are kept, so that a second start compiles nothing anew [.cache]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
HYPERVL="${HYPERVL:-.venv/bin/hypervl}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax/run}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}"

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/local.sh; }
fail() { echo "launch/local.sh: $*" >&2; exit 1; }

case "${1:-}" in
  "") usage >&2; exit 2 ;;
  -h | --help) usage; exit ;;
esac
command -v "$HYPERVL" >/dev/null || fail "$HYPERVL is not there: make setup makes it, or say where it is with HYPERVL="
exec "$HYPERVL" "$@"
