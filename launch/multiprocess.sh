#!/usr/bin/env bash
# Several processes that train as one, started and ended together: all of a run, or the share that this machine has in it.
#
#   launch/multiprocess.sh N train CONFIG --out OUT --mesh SIZES ...
#   launch/multiprocess.sh 2 train configs/tiny.py --out runs/two --mesh data=2
#   GPUS=1 launch/multiprocess.sh 8 train configs/stage1_align.py --start assembled --out runs/stage1 --mesh fsdp=8
#       --accumulate 16
#
# The first is two processes on the CPU, the second a process a GPU; all GPUs of one machine need no more than one process
# (launch/local.sh). Machines without a scheduler: the same command on each, with FIRST counting on. Of two with eight
# GPUs, this is the second, and on the first FIRST is 0:
#
#   ADDRESS=gpu-0:4711 TOTAL=16 FIRST=8 GPUS=1 launch/multiprocess.sh 8 train configs/stage1_align.py --start assembled
#       --out runs/stage1 --mesh data=2,fsdp=8 --accumulate 8
#
# SIZES must have the number of all devices as their product, and every process must see OUT. Ctrl-C and SIGTERM are
# handed on: all finish their step, save and leave with 75, as does this script; the same command goes on. A second one
# ends them at once. Where a process fails the others are ended, and the script exits as it did. To go on by itself:
#
#   until launch/multiprocess.sh ...; do [ $? = 75 ] || exit 1; done
#
# ADDRESS                      host:port of the first process, as all machines reach it [a free port of this machine]
# TOTAL                        processes on all machines together [N]
# FIRST                        number of the first process on this machine [0]
# GPUS                         1: to each process here the GPU of its number, from 0 [all see all]
# HYPERVL                      the command [.venv/bin/hypervl]
# JAX_COMPILATION_CACHE_DIR    where compiled programs are kept, so that a second start compiles nothing anew [.cache]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ADDRESS="${ADDRESS:-}"
TOTAL="${TOTAL:-${1:-}}"
FIRST="${FIRST:-0}"
GPUS="${GPUS:-}"
HYPERVL="${HYPERVL:-.venv/bin/hypervl}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax/run}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}"

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/multiprocess.sh; }
fail() { echo "launch/multiprocess.sh: $*" >&2; exit 1; }

case "${1:-}" in
  "") usage >&2; exit 2 ;;
  -h | --help) usage; exit ;;
  *[!0-9]* | 0) fail "$1 processes: give their number first, then the command" ;;
esac
count=$1
shift
[ "${1:-}" = train ] || fail "train is the verb of several processes, not '${1:-}'"
case "${2:-}" in *.py) [ -f "$2" ] || fail "$2: no such config" ;; esac
[[ " $* " == *" --mesh"[\ =]* ]] || fail "several processes need --mesh, with the number of all devices as its product"
[ -n "$ADDRESS" ] || [ "$TOTAL" = "$count" ] ||
  fail "TOTAL=$TOTAL, of which $count here: ADDRESS=host:port of the first process is needed"
command -v "$HYPERVL" >/dev/null || fail "$HYPERVL is not there: make setup makes it, or say where it is with HYPERVL="
if [ -z "$ADDRESS" ]; then
  port=$((20000 + RANDOM % 10000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  ADDRESS=127.0.0.1:$port
fi

pids=() told=0 code=0
# shellcheck disable=SC2317 # called by the trap
tell() {
  told=$((told + 1))
  kill "$([ "$told" = 1 ] && echo -TERM || echo -KILL)" "${pids[@]}" 2>/dev/null || true
}
trap tell INT TERM
export JAX_COORDINATOR_ADDRESS=$ADDRESS JAX_NUM_PROCESSES=$TOTAL
for ((i = 0; i < count; i++)); do
  if [ "$GPUS" = 1 ]; then export CUDA_VISIBLE_DEVICES=$i; fi
  JAX_PROCESS_ID=$((FIRST + i)) "$HYPERVL" "$@" &
  pids+=($!)
done
while [ -n "$(jobs -rp)" ]; do
  status=0
  { wait -n || status=$?; } 2>/dev/null
  case $status in 0 | 75) continue ;; esac
  [ "$told" = 0 ] || continue # the signal ended the waiting, not a process
  code=$status told=1
  echo "launch/multiprocess.sh: a process left with $status; the others are ended" >&2
  kill -KILL "${pids[@]}" 2>/dev/null || true
done
for pid in "${pids[@]}"; do
  status=0
  { wait "$pid" || status=$?; } 2>/dev/null # bash would say what was killed, which is known
  case $code in 0 | 75) if [ "$status" != 0 ]; then code=$status; fi ;; esac # a failure says more than 75
done
exit "$code"
