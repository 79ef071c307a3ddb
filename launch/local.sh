#!/usr/bin/env bash
# One machine: set the environment and start the process; everything else is the config's business.
#   launch/local.sh train configs/tiny.py --out runs/tiny
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax/run}" # a second start compiles nothing anew
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}"
exec .venv/bin/hypervl "$@"
