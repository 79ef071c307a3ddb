"""What files cost: work counted in the file equals the formulas, others' output is read, bad input is one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from hypervl_jax import cli, cost
from hypervl_jax.export import bench, costs
from hypervl_jax.export.bench import BenchError, Device

ROOT = Path(__file__).parents[2]
# What benchmark_model prints, by its source; the figures are made up, so that each is told from the others.
PRINTED = ROOT / "tests" / "golden" / "benchmark_model.txt"


def test_operations_are_those_of_the_formulas(exported, tiny_config):
    """Encoder and decoder: counted in the files, and by arithmetic on the shapes of the model."""
    cfg = tiny_config.model
    for branch in ("base", "large"):
        assert bench.work(exported / f"encoder_{branch}.tflite")["vision"].flops == sum(cost.tile_flops(cfg, branch))
        encoder, projector = cost.tile_flops(cfg, branch)
        assert bench.projector_share(cfg, branch) == pytest.approx(projector / (encoder + projector))
    found, c, room = bench.work(exported / "decoder.tflite"), cfg.llm, 192
    heads, head = c.heads * c.head_dim, 2 * c.width * c.vocab
    linear = cost.llm_flops(c, 1) - c.depth * 4 * heads  # of one token, without attention
    assert found["decode"].flops == linear + head + c.depth * 4 * heads * room
    last = (
        2 * (c.width * heads * 2 + 3 * c.width * c.mlp) + 4 * heads * room
    )  # of the last layer keys and values remain
    assert found["prefill_96"].flops == 96 * (linear + c.depth * 4 * heads * room - last)


def test_bytes_are_weights_as_stored_and_rows_of_tables(exported, tiny_model):
    rows = bench.work(exported / "embedder.tflite")["embed"]
    assert rows.weights == 4 * tiny_model.config.llm.width
    decode = bench.work(exported / "decoder.tflite")["decode"]
    weights = sum(x.nbytes for x in jax.tree.leaves(tiny_model.params["llm"]))
    assert weights <= decode.weights < 1.1 * weights
    assert decode.bytes > decode.weights


def test_the_whole_picture_costs_what_one_large_tile_costs(tiny_config):
    from hypervl_jax.bench import as_one_tile

    cfg = tiny_config.model
    for row in bench.whole(cfg, "base", (32, 128)):
        assert row["whole_flops"] == cost.tile_flops(as_one_tile(cfg, row["side"]), "base")[0]
        assert row["tiled_flops"] == row["tiles"] * cost.tile_flops(cfg, "base")[0]
        assert row["whole_scores"] == row["tiled_scores"] * row["tiles"] ** 2


@pytest.fixture(scope="module")
def measured(exported, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out"
    cli.main(["bench", str(exported), "--out", str(out), "--repeats", "1", "--threads", "1"])
    return out


def test_the_verb_measures_and_writes_both(measured):
    [found] = json.loads((measured / "bench.json").read_text())["folders"]
    assert [(w["branch"], w["vrc"]) for w in found["ways"]] == [
        (b, v) for b in ("base", "large") for v in (False, True)
    ]
    for way in found["ways"]:
        assert tuple(way["seconds"]) == bench.STAGES
        assert all(s > 0 for k, s in way["seconds"].items() if k != "vrc")
        assert (way["seconds"]["vrc"] > 0) == way["vrc"]
        assert 2**25 < way["peak_bytes"] < 2**31
    assert {"decoder decode", "decoder prefill_96", "encoder_base vision", "vrc vrc"} < set(found["entries"])
    assert all(e["seconds"] > 0 and e["init_seconds"] > 0 for e in found["entries"].values())
    page = (measured / "bench.html").read_text()
    assert page.count("<svg") >= 11
    assert "proxy for power" in page
    assert "http" not in re.sub(r'<meta[^>]*>|xmlns="[^"]*"', "", page)


def test_the_table_says_how_long_prompts_and_answers_were():
    """Ways are only beside each other where their answers are as long."""
    way = {"branch": "base", "vrc": True, "tiles": 3, "prompt": 77, "answer": 5, "peak_bytes": 1e6, "joules": None}
    found = {"folder": "phone", "entries": {}, "ways": [way | {"seconds": dict.fromkeys(bench.STAGES, 0.5)}]}
    head, row, *_ = costs.table([found])
    cells = dict(zip(re.split(r"  +", head), re.split(r"  +", row), strict=True))
    assert (cells["way"], cells["tiles"], cells["prompt"], cells["answer"]) == ("base + VRC", "3", "77", "5")
    assert (cells["decode ms"], cells["all ms"], cells["joules"]) == ("500.0", "3000.0", "-")


def test_a_process_that_measures_imports_no_jax(exported):
    job = {"folder": str(exported), "entries": ["vrc vrc"], "repeats": 1, "threads": 1, "picture": None}
    code = f"{bench._MEASURE}\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, json.dumps(job)], check=True, capture_output=True)


def test_energy_counters_are_read_and_may_begin_anew(tmp_path):
    for i, (name, at) in enumerate({"intel-rapl:0": 900, "intel-rapl:0:0": 5, "intel-rapl:1": 7}.items()):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{at}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("999\n")
        assert len(bench.energy(tmp_path)) == (1, 1, 2)[i]
    before = bench.energy(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("107")
    assert bench.joules(before, bench.energy(tmp_path), 2) == pytest.approx((200 + 100) / 1e6 / 2)
    assert bench.joules({}, {}, 1) is None
    assert bench.energy(tmp_path / "none") == {}


# --- a phone ---------------------------------------------------------------------------------------------------------


def test_what_benchmark_model_prints_is_read(tmp_path):
    log, said = tmp_path / "phone.log", PRINTED.read_text()
    older = said[: said.index("INFO: Overall peak")]  # tells only what was added, and that not on every system
    least = older[: older.index("INFO: Note")].replace("INFO: ", "")
    log.write_text(f"== vrc vrc\n{said}== decoder decode\n{older}== decoder prefill_96\n{least}")
    times = {"init_seconds": 0.0125, "seconds": 1.25}
    peaks = {"vrc vrc": 50.5 * 2**20, "decoder decode": 46.25 * 2**20, "decoder prefill_96": 0}
    assert bench.phone(log) == {name: times | {"peak_bytes": peak} for name, peak in peaks.items()}
    log.write_text("== vrc vrc\nERROR: no such signature\n")
    with pytest.raises(BenchError, match="vrc vrc was not measured: benchmark_model said 'ERROR: no such signature'"):
        bench.phone(log)
    log.write_text("words")
    with pytest.raises(BenchError, match=r"not a log of launch/android_bench\.sh"):
        bench.phone(log)


@pytest.fixture
def adb(tmp_path):
    """Stands for adb: it prints what was recorded, and notes what it was asked for."""
    (tmp_path / "bin").mkdir()
    script = f"""#!/bin/bash
echo "$@" >> {tmp_path}/asked
case "$*" in *--graph=*decode*FAIL*) exit 1;; *--graph=*) cat {PRINTED};; esac
"""
    (tmp_path / "bin" / "adb").write_text(script)
    (tmp_path / "bin" / "adb").chmod(0o755)
    (tmp_path / "benchmark_model").write_bytes(b"")
    env = os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "BENCHMARK_MODEL": str(tmp_path / "benchmark_model"),
        "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip

    def run(*argv, **more):
        command = [str(ROOT / "launch" / "android_bench.sh"), *map(str, argv)]
        return subprocess.run(command, env=env | more, capture_output=True, text=True)

    return run


def test_the_script_runs_every_entry_point_and_its_log_is_read(adb, exported, tmp_path):
    done = adb(exported, tmp_path / "phone.log")
    assert done.returncode == 0, done.stderr
    found = bench.phone(tmp_path / "phone.log")
    assert [*found] == [line.split(" ", 1)[1] for line in bench.entries(exported)]
    asked = (tmp_path / "asked").read_text()
    assert asked.count("push") == 6  # the tool, and each file once
    assert "--signature_to_run_for=prefill_96 --num_threads=4" in asked
    assert "rm -rf /data/local/tmp/hypervl." in asked.splitlines()[-1]


def test_the_script_fails_in_one_line_and_leaves_no_log(adb, exported, tmp_path):
    log = tmp_path / "phone.log"
    for argv, env, says in (
        ((exported,), {}, "usage: "),
        ((tmp_path / "none", log), {}, "not an exported model: no manifest.json"),
        ((exported, log), {"BENCHMARK_MODEL": "/none"}, "BENCHMARK_MODEL: no such file '/none'"),
        ((exported, log), {"FLAGS": "decode FAIL"}, "vrc vrc: benchmark_model failed: "),
    ):
        done = adb(*argv, **env)
        assert done.returncode == 1
        assert says in done.stderr.splitlines()[-1]
        assert not list(tmp_path.glob("phone.log*"))


# --- devices and bad input -------------------------------------------------------------------------------------------


def test_a_device_that_is_too_small_or_lacks_operators_is_told(tmp_path):
    found = {"folder": "phone", "ways": [{"peak_bytes": 3e9}], "ops": {"vrc": ["CONV_2D", "TANH"], "decoder": ["ADD"]}}
    assert bench.warnings(found, Device("mine", 8)) == []
    assert bench.warnings(found, Device("mine", 4, ("ADD", "CONV_2D"))) == [
        "phone: needs 3.00 GB here, more than half of mine's 4 GB",
        "phone: vrc leaves mine's accelerator for TANH",
    ]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "ram_gb": 4, "ops": ["ADD"]}))
    assert bench.device(path) == Device("mine", 4.0, ("ADD",))
    for bad in (
        "",
        "[]",
        "{}",
        '{"name": 1, "ram_gb": 1}',
        '{"name": "a", "ram_gb": -1}',
        '{"name": "a", "ram_gb": 1, "x": 1}',
    ):
        path.write_text(bad)
        with pytest.raises(BenchError, match=r"mine\.json: a device is"):
            bench.device(path)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "give a folder that hypervl export wrote"),
        (["NONE"], "not an exported model: no manifest.json"),
        (["HERE", "--repeats", "0"], "--repeats: 1 to 1000"),
        (["HERE", "HERE"], "two folders of that name"),
        (["HERE", "--out", "FILE"], "a file is there; choose another --out"),
        (["HERE", "--image", "FILE"], "file"),
        (["HERE", "--device", "FILE"], "a device is"),
        (["HERE", "--phone", "FILE"], "not a log of launch/android_bench.sh"),
        (["HERE", "--phone", "NONE"], "cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(argv, says, exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("words")
    places = {"NONE": str(tmp_path / "none"), "HERE": str(exported), "FILE": str(tmp_path / "file")}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *(places.get(a, a) for a in argv)])
    said = capsys.readouterr()
    assert (stopped.value.code, said.out) == (1, "")
    assert said.err.startswith("hypervl: ")
    assert said.err.count("\n") == 1
    assert says in said.err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
