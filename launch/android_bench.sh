#!/usr/bin/env bash
# Every entry point of exported files on the phone at the other end of adb, by LiteRT's own benchmark_model.
#   BENCHMARK_MODEL=./benchmark_model launch/android_bench.sh phone phone.log
#   hypervl bench phone --phone phone.log
# BENCHMARK_MODEL is the tool's binary for the phone; THREADS (4), RUNS (20), FLAGS (such as --use_gpu=true) may be set.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
fail() { echo "android_bench: $*" >&2; exit 1; }
[ $# -eq 2 ] || fail "usage: BENCHMARK_MODEL=FILE launch/android_bench.sh FOLDER LOG"
folder="$1" log="$2" remote="/data/local/tmp/hypervl.$$"
[ -f "${BENCHMARK_MODEL:-}" ] || fail "BENCHMARK_MODEL: no such file '${BENCHMARK_MODEL:-}'; build or download LiteRT's benchmark_model for the phone"
command -v adb >/dev/null || fail "adb is not installed (Android platform-tools)"
adb get-state >/dev/null 2>&1 || fail "no phone: connect one, allow debugging, see \`adb devices\`"
python="${PYTHON:-$here/.venv/bin/python}"
entries="$("$python" -c 'import sys
from hypervl_jax.export import bench, manifest
try:
    print("\n".join(bench.entries(sys.argv[1])))
except manifest.ManifestError as e:
    sys.exit("android_bench: " + str(e))' "$folder")" || exit 1
part="$log.part"
trap 'rm -f "$part"; adb shell "rm -rf $remote" >/dev/null 2>&1 || true' EXIT
adb shell "mkdir -p $remote" >/dev/null
adb push "$BENCHMARK_MODEL" "$remote/benchmark_model" >/dev/null || fail "benchmark_model cannot be pushed"
adb shell "chmod 755 $remote/benchmark_model"
: >"$part"
pushed=""
while read -r file name signature <&3; do
    if [ "$file" != "$pushed" ]; then
        adb push "$folder/$file" "$remote/$file" >/dev/null || fail "$file cannot be pushed"
        pushed="$file"
    fi
    echo "$name $signature" >&2
    echo "== $name $signature" >>"$part"
    flags="--num_threads=${THREADS:-4} --num_runs=${RUNS:-20} --report_peak_memory_footprint=true ${FLAGS:-}"
    adb shell "$remote/benchmark_model --graph=$remote/$file --signature_to_run_for=$signature $flags" </dev/null 2>&1 | tr -d '\r' >>"$part" ||
        fail "$name $signature: benchmark_model failed: $(tail -n 1 "$part")"
done 3<<<"$entries"
mv "$part" "$log"
echo "wrote $log; hypervl bench $folder --phone $log" >&2
