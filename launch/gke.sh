#!/usr/bin/env bash
# A training run on a TPU slice of a GKE cluster, as a JobSet: prints the manifest, and starts nothing.
#
#   launch/gke.sh train CONFIG --out OUT --mesh SIZES ... | kubectl apply -f -
#   launch/gke.sh train configs/stage1_align.py --start assembled --out runs/stage1 --mesh fsdp=256
#
# SIZES must have the number of all chips as their product. The cluster has JobSet (https://jobset.sigs.k8s.io) and a
# node pool of the slice; IMAGE is this repository with its .venv at /hypervl and jax[tpu] in it; CLAIM is a volume that
# all pods may write to, and becomes /hypervl/runs: data and OUT belong there.
#
# A pod that is evicted or told to stop has five minutes to finish its step and save, and leaves with 75. A pod that
# fails, in whatever way, ends all others, and all are started again: the run goes on from what was saved last. After
# RESTARTS of them the JobSet fails. kubectl delete jobset NAME ends it.
#
# NAME           of the JobSet [hypervl]
# IMAGE          container image; needed
# CLAIM          PersistentVolumeClaim, ReadWriteMany; needed
# ACCELERATOR    label of the node pool [tpu-v5-lite-podslice]
# TOPOLOGY       of the slice [16x16]
# CHIPS          of a host [4]
# RESTARTS       [100]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NAME="${NAME:-hypervl}"
IMAGE="${IMAGE:-}"
CLAIM="${CLAIM:-}"
ACCELERATOR="${ACCELERATOR:-tpu-v5-lite-podslice}"
TOPOLOGY="${TOPOLOGY:-16x16}"
CHIPS="${CHIPS:-4}"
RESTARTS="${RESTARTS:-100}"

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/gke.sh; }
fail() { echo "launch/gke.sh: $*" >&2; exit 1; }

case "${1:-}" in
  "") usage >&2; exit 2 ;;
  -h | --help) usage; exit ;;
  train) ;;
  *) fail "train is the verb of several processes, not '$1'" ;;
esac
case "${2:-}" in *.py) [ -f "$2" ] || fail "$2: no such config" ;; esac
[[ " $* " == *" --mesh"[\ =]* ]] || fail "several processes need --mesh, with the number of all chips as its product"
[ -n "$IMAGE" ] || fail "IMAGE is needed: a container image with this repository at /hypervl"
[ -n "$CLAIM" ] || fail "CLAIM is needed: a PersistentVolumeClaim that all pods may write to (ReadWriteMany)"
[[ "$TOPOLOGY" =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "TOPOLOGY $TOPOLOGY: such as 16x16 or 4x4x4"
chips=$((${TOPOLOGY//x/ * }))
[ $((chips % CHIPS)) = 0 ] || fail "TOPOLOGY $TOPOLOGY has $chips chips, which is no whole number of hosts of $CHIPS"

arguments=""
for argument in "$@"; do
  argument=${argument//\\/\\\\}
  arguments+=", \"${argument//\"/\\\"}\""
done
cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $RESTARTS
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: $((chips / CHIPS))
        completions: $((chips / CHIPS))
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
            containers:
            - name: hypervl
              image: $IMAGE
              workingDir: /hypervl
              command: [".venv/bin/hypervl"${arguments}]
              env:
              - name: JAX_COMPILATION_CACHE_DIR
                value: /hypervl/runs/.compiled
              resources:
                limits:
                  google.com/tpu: $CHIPS
              volumeMounts:
              - name: runs
                mountPath: /hypervl/runs
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: $CLAIM
YAML
