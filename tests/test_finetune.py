"""A model from other people's conversations: from the annotation on disk to the commands that ask it."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from hypervl_jax import checkpoint, cli, config, finetune, mesh, tensors, train, watch
from hypervl_jax.config import ConfigError, Rule
from hypervl_jax.runs import TrainError

pytest.importorskip("tensorflow_datasets", reason="needs the train extra")
pytest.importorskip("grain", reason="needs the train extra")


def write(folder, n, answer="a thing"):
    """An annotation of n records, of one picture, of text alone and of two turns."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        said = [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": answer}]
        if i % 3:
            Image.fromarray(rng.integers(0, 256, (24 + i, 30, 3), np.uint8)).save(folder / f"{i}.png")
            said[0]["value"] = "<image>\n" + said[0]["value"]
        if i % 3 == 2:
            said += [{"from": "human", "value": "and now?"}, {"from": "gpt", "value": "nothing"}]
        rows.append({"id": str(i), "conversations": said} | ({"image": f"{i}.png"} if i % 3 else {}))
    (folder / "train.json").write_text(json.dumps(rows))
    cli.main(["data", "build", str(folder / "train.json"), "--out", str(folder / "prepared")])
    return folder / "prepared"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "mine", 9)


@pytest.fixture(scope="module")
def tiny(tiny_config):
    """Two steps in one program."""
    how = replace(tiny_config.train, steps=2, save_every=1, log_every=1, optimizer="adamw", scan=False)
    shapes = replace(tiny_config.data, batch=4, tile_buckets=(4,), lengths=(96,))
    return replace(tiny_config, train=how, data=shapes, dcl=replace(tiny_config.dcl, schedule="joint", weight=0.0))


@pytest.fixture(scope="module")
def cfg(tiny):
    """The same of one layer, of which little learns: quick to compile."""
    parts = {part: replace(getattr(tiny.model, part), depth=1) for part in ("base", "large", "llm")}
    rules = (Rule(r".*\.vit\..*|llm\.blocks\..*|names_.*", 0.0), Rule(r".*"))
    return replace(tiny, model=replace(tiny.model, **parts), train=replace(tiny.train, rules=rules))


@pytest.fixture(scope="module")
def made(cfg, data, tmp_path_factory):
    """(folder, model) of a run that was stopped after its first step, and went on."""
    out = tmp_path_factory.mktemp("made") / "a run"
    with pytest.raises(watch.Stopped, match=r"--max-hours at step 1 of 2"):
        finetune.make_model(cfg, data, out, how=watch.Watch(progress=False, stop_at=0.0))
    return out, finetune.make_model(cfg, data, out, how=watch.QUIET)


def test_a_model_is_made_and_can_be_asked(made, cfg, capsys):
    out, model = made
    assert [json.loads(s)["step"] for s in (out / "train" / "log.jsonl").read_text().splitlines()] == [0, 1]
    assert config.from_dict(config.Config, model.info["config"]) == finetune.adapted(cfg)
    assert finetune.adapted(cfg).train.name_weight == finetune.adapted(cfg).train.stage0_steps == 0
    before = tensors.flatten(train.init_state(finetune.adapted(cfg), 1).params)
    moved = {k.split(".")[0] for k, v in tensors.flatten(model.params).items() if k in before and
             np.abs(np.asarray(v, np.float32) - np.asarray(before[k])).max() > 1e-3}  # fmt: skip
    assert moved == {"base", "large", "llm"}
    program, verb, *argv = shlex.split(watch.commands(out, vrc=False)[0])[2:]
    assert (program, verb) == ("hypervl", "ask")
    capsys.readouterr()
    cli.main([verb, *argv])
    assert capsys.readouterr().out.endswith("\n")


def test_a_finished_run_is_not_trained_again(made, cfg, data):
    out, model = made
    log = (out / "train" / "log.jsonl").read_bytes()
    again = finetune.make_model(cfg, data, out, how=watch.QUIET)
    assert (out / "train" / "log.jsonl").read_bytes() == log
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_other_data_or_settings_are_refused(made, cfg, tmp_path):
    out, _ = made
    other = write(tmp_path / "other", 9, answer="something else")
    with pytest.raises(TrainError, match=r"other settings \(data\.digest was"):
        finetune.make_model(cfg, other, out, how=watch.QUIET)
    with pytest.raises(ConfigError, match=r"train\.lr was 0\.001, is 0\.5"):
        finetune.make_model(replace(cfg, train=replace(cfg.train, lr=0.5)), other, out, how=watch.QUIET)


@pytest.fixture
def mine(cfg, tmp_path):
    """A folder with the config as a file."""
    (tmp_path / "mine.json").write_text(json.dumps(config.to_dict(cfg)))
    (tmp_path / "mine.py").write_text(CONFIG.format(str(tmp_path / "mine.json")))
    return tmp_path


CONFIG = """import json
from hypervl_jax import config


def get_config():
    return config.from_dict(config.Config, json.load(open({!r})))
"""


def like(out, model, made):
    """Whether a run went as another: losses, and weights, which are stored in 16 bits."""
    logs = ((o / "train" / "log.jsonl").read_text().splitlines() for o in (out, made[0]))
    got, want = ([{k: v for k, v in json.loads(s).items() if k != "time"} for s in lines] for lines in logs)
    assert len(got) == 2
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    leaves = tensors.flatten(made[1].params)
    for path, leaf in tensors.flatten(model.params).items():
        np.testing.assert_allclose(leaf, leaves[path], rtol=2e-3, atol=1e-5, err_msg=path)


def test_the_command_on_eight_devices(made, mine, data):
    """As people start it, in a process of its own."""
    argv = ["train", "mine.py", "--data", str(data), "--out", "out", "--mesh", "data=2,fsdp=2,tensor=2"]
    command = [sys.executable, "-m", "hypervl_jax.cli", *argv]
    done = subprocess.run(command, cwd=mine, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hypervl ask" in done.stdout
    like(mine / "out", checkpoint.load_model(mine / "out" / "model"), made)


@pytest.mark.slow
def test_several_processes_as_launched(made, mine, data):
    """By the script that people use; told to stop after a step, and started again."""
    hypervl = mine / "hypervl"
    hypervl.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hypervl_jax.cli "$@"\n')
    hypervl.chmod(0o755)
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"] + "-processes"
    env = os.environ | {"HYPERVL": str(hypervl), "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": cache}
    script = [str(Path(__file__).parents[1] / "launch" / "multiprocess.sh"), "2", "train", str(mine / "mine.py")]
    command = [*script, "--data", str(data), "--out", str(mine / "out"), "--mesh", "fsdp=2"]
    first = subprocess.run([*command, "--max-hours", "1e-9"], env=env, capture_output=True, text=True)
    assert first.returncode == 75, first.stderr
    assert "--max-hours at step 1 of 2; it is saved" in first.stderr
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hypervl ask") == 1  # the first one says it
    like(mine / "out", checkpoint.load_model(mine / "out" / "model"), made)


def test_it_begins_with_the_model_it_is_given(tiny, data, tiny_folder, tiny_model, tmp_path, monkeypatch):
    """Its words and its VRC stay."""
    seen = []

    def run(cfg, feed, out, how, start, on):
        seen.append((feed.tokenizer.encode("what is this? 37"), start is not None))
        return train.State(0, {k: start[k] for k in ("base", "large", "llm")}, {})

    monkeypatch.setattr(train, "run", run)
    model = finetune.make_model(tiny, data, tmp_path / "out", tiny_folder, how=watch.QUIET)
    assert seen == [(tiny_model.tokenizer.encode("what is this? 37"), True)]
    assert model.info["vrc_scale"] == tiny_model.info["vrc_scale"]
    old = tensors.flatten(tiny_model.params["vrc"])
    for path, leaf in tensors.flatten(model.params["vrc"]).items():
        np.testing.assert_array_equal(leaf, np.asarray(old[path]).astype(np.float16).astype(np.float32), path)
    with pytest.raises(ConfigError, match=r"began from .*model: give that as --start"):
        finetune.make_model(tiny, data, tmp_path / "out", how=watch.QUIET)


def test_the_verb(data, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(finetune, "make_model", lambda *a: seen.append(a))
    monkeypatch.setattr(mesh, "start", lambda: None)  # devices are there already
    argv = ["train", "tiny", "--data", str(data), "--splits", "train", "--out", str(tmp_path)]
    cli.main([*argv, "--max-hours", "2", "--sample-every", "0", "--profile", "3", "--mesh", "data=2,fsdp=4"])
    ((_, folder, out, start, splits, how, on),) = seen
    assert (folder, out, start, splits) == (data, tmp_path, None, ("train",))
    assert on == mesh.MeshConfig(2, 4)
    assert (how.sample_every, how.profile) == (0, 3)
    assert how.stop_at is not None
    said = capsys.readouterr().out
    assert all(f"hypervl {verb}" in said for verb in ("ask", "eval", "export"))
    assert "--no-vrc" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-hours", "0"], "--max-hours 0: above 0"),
        (["--profile", "-1"], "at least 0"),
        (["--splits", "train"], "give it as --data"),
        (["--mesh", "8"], "write sizes of data, fsdp, tensor, such as fsdp=8"),
        (["--data", "nowhere"], "give the folder of one prepared data set"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(more, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "tiny", "--out", str(tmp_path / "out"), *more])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_processes_that_are_told_of_each_other_need_a_mesh(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "tiny", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 1
    assert "say with --mesh how several processes train together" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_told_to_stop_the_command_says_so_with_a_code_of_its_own(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise watch.Stopped("runs/x: SIGTERM at step 3 of 9; it is saved, the same command goes on")

    monkeypatch.setattr(finetune, "make_model", stopped)
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "tiny", "--data", "x", "--out", str(tmp_path)])
    assert left.value.code == 75
    assert capsys.readouterr().err == "hypervl: runs/x: SIGTERM at step 3 of 9; it is saved, the same command goes on\n"


def test_a_model_of_the_folder_is_checked_before_the_data(tiny, tiny_folder, tmp_path):
    other = replace(tiny, model=replace(tiny.model, llm=replace(tiny.model.llm, mlp=64)))
    with pytest.raises(ConfigError, match="its llm differ from those of config tiny"):
        finetune.make_model(other, tmp_path / "none", tmp_path / "out", tiny_folder)
    assert not (tmp_path / "out").exists()
    assert checkpoint.load_config(tiny_folder) == tiny.model
