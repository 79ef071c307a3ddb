#!/usr/bin/env bash
# A training run on a TPU slice of any number of hosts, from a machine that has gcloud: asks for the slice and waits for
# it, starts the same process on every host, and where a spot slice is taken away begins again. Do that under tmux.
#
#   launch/tpu_pod.sh setup                  get the slice, and install the clone at FOLDER, once
#   launch/tpu_pod.sh train CONFIG --out OUT --mesh SIZES ...
#   launch/tpu_pod.sh train configs/stage1_align.py --start assembled --out runs/stage1 --mesh fsdp=256
#   launch/tpu_pod.sh stop                   tell a run to save and leave: it exits with 75
#   launch/tpu_pod.sh delete                 give the slice back; it costs money until then
#
# SIZES must have the number of all chips as their product: hypervl plan says before you pay what fits. FOLDER is a clone of
# this repository on a file system that every host mounts (Filestore, NFS), which is also where OUT and data are: hosts
# come and go, it stays.
#
# The script exits as the run did: 75 is told to stop and saved, the same command goes on. If the connection breaks (255)
# the run may still go on; stop it before you start it again. DRY=1 prints what would be sent, and sends nothing.
#
# TPU        name of the slice [hypervl]
# ZONE       such as us-west4-a; needed
# PROJECT    [the one that gcloud is set to]
# TYPE       accelerator type: so many cores (v5p, v4) or chips (v5e, v6e) [v5litepod-256]
# VERSION    image of the hosts [v2-alpha-tpuv5-lite]
# SPOT       1: cheaper, and may be taken away at any time; empty: not [1]
# FOLDER     the clone, as the hosts see it [/mnt/hypervl]
# PREPARE    what each host does first, such as mount FOLDER: sudo mount -t nfs 10.0.0.2:/share/hypervl /mnt/hypervl
#            [install Python 3.11 where it is not]
# POLL       seconds between looks at a slice that is not there yet [60]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
TPU="${TPU:-hypervl}"
ZONE="${ZONE:-}"
PROJECT="${PROJECT:-}"
TYPE="${TYPE:-v5litepod-256}"
VERSION="${VERSION:-v2-alpha-tpuv5-lite}"
SPOT="${SPOT-1}"
FOLDER="${FOLDER:-/mnt/hypervl}"
PREPARE="${PREPARE:-command -v python3.11 >/dev/null || sudo apt-get -qq install -y python3.11-venv >/dev/null}"
POLL="${POLL:-60}"
DRY="${DRY:-}"

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/tpu_pod.sh; }
fail() { echo "launch/tpu_pod.sh: $*" >&2; exit 1; }
note() { echo "launch/tpu_pod.sh: $*" >&2; }

case "${1:-}" in
  "") usage >&2; exit 2 ;;
  -h | --help) usage; exit ;;
  setup | stop | delete) [ $# = 1 ] || fail "$1 stands alone" ;;
  train)
    case "${2:-}" in *.py) [ -f "$2" ] || fail "$2: no such config" ;; esac
    [[ " $* " == *" --mesh"[\ =]* ]] || fail "several processes need --mesh, with the number of all chips as its product"
    ;;
  *) fail "'$1': setup, train, stop or delete; --help says more" ;;
esac
command -v gcloud >/dev/null || fail "gcloud is not there: https://cloud.google.com/sdk/docs/install"
[ -n "$ZONE" ] || fail "ZONE is needed, such as ZONE=us-west4-a"
where=(--zone="$ZONE")
if [ -n "$PROJECT" ]; then where+=(--project="$PROJECT"); fi

send() {
  if [ -z "$DRY" ]; then "$@"; else printf '%q ' "$@" && echo; fi
}
on() { # which worker, what
  send gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker="$1" --command="$2"
}
state() { # ACTIVE, or how far it is; NONE
  if [ -n "$DRY" ]; then echo ACTIVE; return; fi
  gcloud compute tpus queued-resources describe "$TPU" "${where[@]}" --format="value(state.state)" 2>/dev/null || echo NONE
}
delete() { send gcloud compute tpus queued-resources delete "$TPU" "${where[@]}" --force --quiet; }
create() {
  send gcloud compute tpus queued-resources create "$TPU" "${where[@]}" --node-id="$TPU" --accelerator-type="$TYPE" \
    --runtime-version="$VERSION" ${SPOT:+--spot}
}
ready() { # asks for the slice where there is none, and waits for it
  local now
  if [ -n "$DRY" ]; then create; fi
  while now=$(state) && [ "$now" != ACTIVE ]; do
    note "$TPU is $now"
    case $now in
      NONE) create ;;
      SUSPENDED) delete ;; # it was taken away; what is left of it is in the way
      FAILED) fail "$TPU: gcloud compute tpus queued-resources describe $TPU ${where[*]} says why; then delete it" ;;
    esac
    sleep "$POLL"
  done
  on all "$PREPARE"
}

case $1 in
  delete) delete ;;
  stop) on all "pkill -TERM -f '[h]ypervl train' || true" ;;
  setup)
    ready
    on 0 "cd $FOLDER && make setup PYTHON=python3.11 && .venv/bin/pip install --quiet 'jax[tpu]'"
    ;;
  train)
    printf -v command '%q ' "$@"
    while :; do
      ready
      status=0
      on all "cd $FOLDER && JAX_COMPILATION_CACHE_DIR=$FOLDER/.cache/jax/run .venv/bin/hypervl $command" || status=$?
      if [ "$status" = 0 ] || [ -n "$DRY" ]; then exit "$status"; fi
      sleep "$POLL" # a slice that is taken away takes its time to say so
      now=$(state)
      [ "$now" != ACTIVE ] || exit "$status"
      note "$TPU is $now: the run goes on when there is another"
    done
    ;;
esac
