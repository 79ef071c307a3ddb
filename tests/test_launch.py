"""The scripts of `launch/`: what they start and with what in the environment, and what becomes of its exit code. The
commands they call (hypervl, srun, scontrol, gcloud) are stand-ins that write down how they were called; no other
command of this machine is in their PATH."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hypervl_jax import cli, mesh, needs

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p.name for p in (ROOT / "launch").iterdir() if p.name != "android_bench.sh")  # that starts no run
TOOLS = ("bash", "cat", "dirname", "env", "sed", "sleep")
MESHED = ["train", "configs/tiny.py", "--out", "runs/a b", "--mesh", "fsdp=2"]

pytestmark = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="needs bash and its tools")

# Writes down how it was called; then says and exits as the next line of NAME.says wants it: "CODE WORDS".
STAND_IN = """#!/usr/bin/env bash
name=${0##*/}
printf '%q ' "$name" "$@" >> "$BOX/calls"; echo >> "$BOX/calls"
[ -s "$BOX/$name.says" ] || exit 0
read -r code words < "$BOX/$name.says"
sed -i 1d "$BOX/$name.says"
[ -z "$words" ] || echo "$words"
exit "$code"
"""


@pytest.fixture
def box(tmp_path):
    """A machine with the commands it is given. `begin` starts a script, `run` waits for its end."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        (path / tool).symlink_to(shutil.which(tool))

    def has(name, text=STAND_IN, says=()):
        (path / name).write_text(text)
        (path / name).chmod(0o755)
        (tmp_path / f"{name}.says").write_text("".join(f"{line}\n" for line in says))

    def begin(script, *argv, **more):
        env = {"PATH": str(path), "BOX": str(tmp_path), "HOME": str(tmp_path), "HYPERVL": "hypervl"} | more
        command, pipe = [str(ROOT / "launch" / script), *argv], subprocess.PIPE
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    def run(script, *argv, **more):
        process = begin(script, *argv, **more)
        out, err = process.communicate(timeout=60)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    def calls(name=None):
        file = tmp_path / "calls"
        found = [shlex.split(s) for s in file.read_text().splitlines()] if file.exists() else []
        return [words[1:] for words in found if words[0] == name] if name else found

    return SimpleNamespace(path=tmp_path, has=has, begin=begin, run=run, calls=calls)


def examples(script):
    """The commands of `hypervl` in a script's help, lines that go on joined."""
    text = re.sub(r"\n#    +(?=--)", " ", (ROOT / "launch" / script).read_text())
    return re.findall(r"^#   .*(train configs/[^|\n]*)", text, re.M)


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_sound(script):
    path = ROOT / "launch" / script
    assert os.access(path, os.X_OK)
    assert f"launch/{script} " in (ROOT / "docs" / "training.md").read_text()
    assert "\nset -euo pipefail\n" in path.read_text()
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_how_and_names_every_variable(script, box):
    told, bare = box.run(script, "--help"), box.run(script)
    assert (told.code, told.err, bare.code, bare.out) == (0, "", 2, "")
    assert told.out == bare.err
    assert f"launch/{script}" in told.out
    assert not re.search(r"set -euo|#SBATCH -", told.out)
    block = re.findall(r'^(?:export )?([A-Z_]+)="\$\{\1', (ROOT / "launch" / script).read_text(), re.M)
    described = [*re.findall(r"^([A-Z_]+) +\S", told.out, re.M), "DRY", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]
    assert block
    assert set(block) <= set(described)


@pytest.mark.parametrize("script", SCRIPTS)
def test_examples_are_commands(script, monkeypatch):
    """Of those that are there: their config loads, their mesh is one, and nothing in them is unknown."""
    from hypervl_jax import quickstart

    seen = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(mesh, "start", lambda: None)
    monkeypatch.setattr(quickstart, "make_model", lambda cfg, *_, watch, on: seen.append((cfg, on)))
    for line in examples(script):
        cli.main(shlex.split(line))
        cfg, on = seen.pop()
        mesh.check(cfg, on)
        assert cfg.data == needs.load_config(line.split()[1]).data
    assert examples(script)


@pytest.mark.parametrize(
    ("script", "argv", "more", "says"),
    [
        ("local.sh", MESHED, {"HYPERVL": "nowhere"}, "nowhere is not there: make setup"),
        ("multiprocess.sh", ["many", *MESHED], {}, "many processes: give their number first"),
        ("multiprocess.sh", ["0", *MESHED], {}, "0 processes: give their number first"),
        ("multiprocess.sh", ["2", "ask"], {}, "train is the verb of several processes, not 'ask'"),
        ("multiprocess.sh", ["2", "train", "configs/no.py", *MESHED[2:]], {}, "configs/no.py: no such config"),
        ("multiprocess.sh", ["2", *MESHED[:4]], {}, "several processes need --mesh"),
        ("multiprocess.sh", ["2", *MESHED], {"HYPERVL": "nowhere"}, "nowhere is not there: make setup"),
        ("multiprocess.sh", ["2", *MESHED], {"TOTAL": "4"}, "TOTAL=4, of which 2 here: ADDRESS=host:port"),
        ("slurm.sbatch", MESHED, {}, "this is a batch script: sbatch launch/slurm.sbatch train"),
        ("slurm.sbatch", MESHED, {"SLURM_JOB_ID": "7"}, "srun is not there"),
        ("slurm.sbatch", ["ask"], {"SLURM_JOB_ID": "7"}, "train is the verb"),
        ("slurm.sbatch", ["train", "configs/no.py"], {"SLURM_JOB_ID": "7"}, "configs/no.py: no such config under"),
        ("slurm.sbatch", MESHED[:4], {"SLURM_JOB_ID": "7"}, "several processes need --mesh"),
        ("tpu_pod.sh", MESHED, {"ZONE": "z"}, "gcloud is not there: https://"),
        ("tpu_pod.sh", ["begin"], {}, "'begin': setup, train, stop or delete"),
        ("tpu_pod.sh", ["delete", "x"], {}, "delete stands alone"),
        ("tpu_pod.sh", ["train", "configs/no.py"], {}, "configs/no.py: no such config"),
        ("tpu_pod.sh", MESHED[:4], {}, "several processes need --mesh"),
        ("gke.sh", ["ask"], {}, "train is the verb"),
        ("gke.sh", ["train", "configs/no.py"], {}, "configs/no.py: no such config"),
        ("gke.sh", MESHED[:4], {}, "several processes need --mesh"),
        ("gke.sh", MESHED, {"CLAIM": "c"}, "IMAGE is needed"),
        ("gke.sh", MESHED, {"IMAGE": "i"}, "CLAIM is needed"),
        ("gke.sh", MESHED, {"IMAGE": "i", "CLAIM": "c", "TOPOLOGY": "large"}, "such as 16x16 or 4x4x4"),
        ("gke.sh", MESHED, {"IMAGE": "i", "CLAIM": "c", "TOPOLOGY": "1x2"}, "2 chips, which is no whole number"),
    ],
)
def test_what_cannot_be_is_one_line_and_starts_nothing(script, argv, more, says, box):
    got = box.run(script, *argv, **more)
    assert (got.code, got.out) == (1, "")
    assert got.err.startswith(f"launch/{script}: ")
    assert says in got.err
    assert got.err.count("\n") == 1
    assert box.calls() == []


# --- on this machine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 75])
def test_local_is_the_process_itself(code, box):
    box.has("hypervl", says=[f"{code} its words"])
    got = box.run("local.sh", *MESHED)
    assert (got.code, got.out) == (code, "its words\n")
    assert box.calls() == [["hypervl", *MESHED]]


SAYS_WHERE = """#!/usr/bin/env bash
echo "$JAX_PROCESS_ID $JAX_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS ${CUDA_VISIBLE_DEVICES-all} $*"
"""


def test_several_processes_know_each_other(box):
    box.has("hypervl", SAYS_WHERE)
    got = box.run("multiprocess.sh", "3", *MESHED)
    lines = sorted(got.out.splitlines())
    address = lines[0].split()[2]
    assert got.code == 0
    assert re.fullmatch(r"127\.0\.0\.1:2\d{4}", address)
    assert lines == [f"{i} 3 {address} all {' '.join(MESHED)}" for i in range(3)]


def test_the_share_of_one_machine(box):
    box.has("hypervl", SAYS_WHERE)
    got = box.run("multiprocess.sh", "2", *MESHED, ADDRESS="first:4711", TOTAL="4", FIRST="2", GPUS="1")
    assert sorted(got.out.splitlines()) == [f"{2 + i} 4 first:4711 {i} {' '.join(MESHED)}" for i in range(2)]


@pytest.mark.parametrize(("codes", "code"), [((0, 0), 0), ((75, 75), 75), ((75, 0), 75), ((75, 3), 3)])
def test_all_must_end_well(codes, code, box):
    box.has("hypervl", f"#!/usr/bin/env bash\ncodes=({codes[0]} {codes[1]})\nexit ${{codes[$JAX_PROCESS_ID]}}\n")
    assert box.run("multiprocess.sh", "2", *MESHED).code == code


def test_where_one_fails_the_others_are_ended(box):
    box.has("hypervl", '#!/usr/bin/env bash\n[ "$JAX_PROCESS_ID" = 1 ] && exit 3\nexec sleep 100\n')
    got = box.run("multiprocess.sh", "3", *MESHED)
    assert got.code == 3
    assert "a process left with 3; the others are ended" in got.err


WAITS = """#!/usr/bin/env bash
trap 'sleep 0.1; echo "$JAX_PROCESS_ID saved"; exit 75' TERM
echo > "$BOX/ready-$JAX_PROCESS_ID"
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on(number, box):
    box.has("hypervl", WAITS)
    process = box.begin("multiprocess.sh", "2", *MESHED)
    until = time.monotonic() + 30
    while len(list(box.path.glob("ready-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (75, "")
    assert sorted(out.splitlines()) == ["0 saved", "1 saved"]


# --- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "again"), [(0, []), (1, []), (75, [["requeue", "7"]])])
def test_a_slurm_job_that_saved_queues_again(code, again, box):
    box.has("hypervl")
    box.has("srun", says=[f"{code} words"])
    box.has("scontrol")
    got = box.run("slurm.sbatch", *MESHED, SLURM_JOB_ID="7")
    assert got.code == code
    assert box.calls("srun") == [["--kill-on-bad-exit=0", "--wait=300", "hypervl", *MESHED]]
    assert box.calls("scontrol") == again


def test_what_slurm_is_asked_for():
    """What stands before the first command, where sbatch reads; and SIGTERM goes to the processes, not to the shell."""
    head = (ROOT / "launch" / "slurm.sbatch").read_text().split("\nset ")[0]
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", head, re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"].startswith("TERM@")
    assert {"requeue", "open-mode"} <= set(asked)
    assert not {"gpus-per-task", "gpu-bind"} & set(asked)


# --- TPU -------------------------------------------------------------------------------------------------------------

AT = ["--zone=z", "--project=p"]
ON = ["compute", "tpus", "tpu-vm", "ssh", "mine", *AT, "--worker=all"]
SLICE = ["compute", "tpus", "queued-resources"]
CREATE = [
    *SLICE, "create", "mine", *AT, "--node-id=mine", "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
]  # fmt: skip
TPU = {
    "TPU": "mine", "ZONE": "z", "PROJECT": "p", "TYPE": "v5litepod-16", "FOLDER": "/mnt/f", "PREPARE": "mount /mnt/f",
    "POLL": "0",
}  # fmt: skip
LOOK = [*SLICE, "describe", "mine", *AT, "--format=value(state.state)"]
RUN = (
    "cd /mnt/f && JAX_COMPILATION_CACHE_DIR=/mnt/f/.cache/jax/run .venv/bin/hypervl "
    r"train configs/tiny.py --out runs/a\ b --mesh fsdp=2 "
)


def test_a_slice_is_asked_for_and_waited_for(box):
    box.has("gcloud", says=["1 ", "0 made", "0 WAITING_FOR_RESOURCES", "0 ACTIVE", "0 prepared", "0 trained"])
    got = box.run("tpu_pod.sh", *MESHED, **TPU)
    assert (got.code, "mine is NONE" in got.err, "mine is WAITING_FOR_RESOURCES" in got.err) == (0, True, True)
    want = [LOOK, CREATE, LOOK, LOOK, [*ON, "--command=mount /mnt/f"], [*ON, f"--command={RUN}"]]
    assert box.calls("gcloud") == want


def test_a_slice_that_is_taken_away_is_asked_for_again(box):
    begun, gone = ["0 ACTIVE", "0 prepared"], ["0 SUSPENDED", "0 SUSPENDED", "0 deleted", "1 ", "0 made"]
    box.has("gcloud", says=[*begun, "255 lost", *gone, *begun, "0 trained"])
    got = box.run("tpu_pod.sh", *MESHED, **TPU)
    assert got.code == 0
    made = [c for c in box.calls("gcloud") if c[3] in ("create", "delete")]
    assert made == [[*SLICE, "delete", "mine", *AT, "--force", "--quiet"], CREATE]
    assert [c for c in box.calls("gcloud") if c[-1] == f"--command={RUN}"] == [[*ON, f"--command={RUN}"]] * 2


@pytest.mark.parametrize("code", [1, 75, 255])
def test_on_a_slice_that_is_there_the_run_decides(code, box):
    box.has("gcloud", says=["0 ACTIVE", "0 prepared", f"{code} ", "0 ACTIVE"])
    assert box.run("tpu_pod.sh", *MESHED, **TPU).code == code
    assert len(box.calls("gcloud")) == 4


def test_a_slice_that_failed_is_looked_at_by_people(box):
    box.has("gcloud", says=["0 FAILED"])
    got = box.run("tpu_pod.sh", *MESHED, **TPU)
    assert got.code == 1
    assert "queued-resources describe mine --zone=z --project=p says why" in got.err
    assert box.calls("gcloud") == [LOOK]


def test_a_host_that_cannot_be_prepared_stops_it(box):
    box.has("gcloud", says=["0 ACTIVE", "32 "])
    assert box.run("tpu_pod.sh", *MESHED, **TPU).code == 32
    assert len(box.calls("gcloud")) == 2


def test_setup_stop_and_delete(box):
    box.has("gcloud", says=["0 ACTIVE"])
    assert [box.run("tpu_pod.sh", verb, **TPU).code for verb in ("setup", "stop", "delete")] == [0, 0, 0]
    _, prepared, made, told, gone = box.calls("gcloud")
    assert prepared == [*ON, "--command=mount /mnt/f"]
    assert made[-2:] == [
        "--worker=0",
        "--command=cd /mnt/f && make setup PYTHON=python3.11 && .venv/bin/pip install --quiet 'jax[tpu]'",
    ]
    assert told == [*ON, "--command=pkill -TERM -f '[h]ypervl train' || true"]
    assert gone == [*SLICE, "delete", "mine", *AT, "--force", "--quiet"]


def test_a_dry_run_says_what_it_would_send(box):
    box.has("gcloud")
    got = box.run("tpu_pod.sh", *MESHED, **TPU, DRY="1", SPOT="")
    assert (got.code, box.calls()) == (0, [])
    sent = [shlex.split(s) for s in got.out.splitlines()]
    assert sent == [["gcloud", *c] for c in (CREATE[:-1], [*ON, "--command=mount /mnt/f"], [*ON, f"--command={RUN}"])]


# --- GKE -------------------------------------------------------------------------------------------------------------


def test_a_job_set(box):
    yaml = pytest.importorskip("yaml", reason="flax brings it")
    argv = [*MESHED, "--start", 'a "model" \\ here']
    got = box.run("gke.sh", *argv, IMAGE="r/hypervl:1", CLAIM="mine", TOPOLOGY="4x4x4", ACCELERATOR="tpu-v5p-slice")
    assert (got.code, got.err) == (0, "")
    made = yaml.safe_load(got.out)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = made["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (16, 16, 0)  # 64 chips, 4 a host
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 300)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert container["command"] == [".venv/bin/hypervl", *argv]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert [m["name"] for m in container["volumeMounts"]] == [v["name"] for v in pod["volumes"]]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "mine"}
