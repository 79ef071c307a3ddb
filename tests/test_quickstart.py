"""The recipe: what is done stays done, what is interrupted goes on, and the whole of it at the tiny size."""

import dataclasses
import json
import math
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from hypervl_jax import compress, config, evaluate, judge, quickstart, runs, train
from hypervl_jax.config import ConfigError
from hypervl_jax.export.lower import ExportUnavailable
from hypervl_jax.quickstart import Stages
from hypervl_jax.tensors import flatten


def test_a_run_goes_on_under_settings_that_came_later_if_they_have_their_defaults(tiny_config, tmp_path):
    path, values = tmp_path / "config.json", config.to_dict(tiny_config)
    del values["model"]["llm"]["qk_norm"]
    path.write_text(json.dumps(values))
    runs.same_config(path, tiny_config)
    llm = replace(tiny_config.model.llm, qk_norm=False)
    for other in (replace(tiny_config, name="x"), replace(tiny_config, model=replace(tiny_config.model, llm=llm))):
        with pytest.raises(ConfigError, match="other settings"):
            runs.same_config(path, other)
    path.write_text(json.dumps(values | {"unknown": 1}))
    with pytest.raises(ConfigError, match="other settings"):
        runs.same_config(path, tiny_config)


def test_what_vrc_learns_from_may_change_until_it_has(tiny_config, tmp_path):
    path, stages, vrc = tmp_path / "config.json", tmp_path / "stages", tiny_config.vrc
    longer = replace(tiny_config, vrc=replace(vrc, steps=vrc.steps + 1))
    coarser = replace(tiny_config, vrc=replace(vrc, ratios=(0.5, 1.0)))
    stages.mkdir()
    for cfg in (tiny_config, coarser, longer):
        runs.same_config(path, cfg)
        assert json.loads(path.read_text()) == json.loads(json.dumps(config.to_dict(cfg)))
    (stages / "labels.json").touch()
    with pytest.raises(ConfigError, match="other settings"):
        runs.same_config(path, coarser)
    runs.same_config(path, tiny_config)
    (stages / "vrc.json").touch()
    with pytest.raises(ConfigError, match="other settings"):
        runs.same_config(path, longer)
    runs.same_config(path, tiny_config)


def test_a_stage_is_computed_once(tmp_path, capsys):
    calls = []
    first = Stages(tmp_path)("a", lambda: calls.append(1) or {"x": [1, 2]})
    again = Stages(tmp_path)
    assert again("a", lambda: calls.append(1)) == first == {"x": [1, 2]}
    assert len(calls) == 1
    assert set(again.seconds) == {"a"}
    assert "done before" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_stage_that_stops_leaves_no_result(stop, tmp_path):
    def burst():
        raise stop

    with pytest.raises(stop):
        Stages(tmp_path)("a", burst)
    assert Stages(tmp_path)("a", lambda: 7) == 7


def test_seconds_count_every_attempt(tmp_path):
    def slow(stop=False):
        time.sleep(0.05)
        if stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path)("a", lambda: slow(stop=True))
    stage = Stages(tmp_path)
    stage("a", slow)
    assert stage.seconds["a"] > 0.09
    assert stage.peak_rss_gb > 0
    assert [p.name for p in (tmp_path / "stages").iterdir()] == ["a.json"]


def test_damaged_files_of_a_run_are_named_with_the_cure(tiny_config, tiny_model, tiny_source, tmp_path):
    words = tmp_path / "tokenizer.json"
    words.write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json.*delete it"):
        quickstart.words(tiny_config, tiny_source, words)
    labels = tmp_path / "labels.npz"
    labels.write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"labels\.npz.*delete it and .*labels\.json"):
        quickstart._vrc(tiny_model, tiny_config, tiny_source, labels, tmp_path / "model")
    trunk, net = tmp_path / "trunk.npz", tiny_model.params["vrc"]
    np.savez(trunk, **flatten(net))
    jax.tree.map(np.testing.assert_array_equal, quickstart._load_tree(trunk, net, "sight"), net)
    whole = trunk.read_bytes()
    np.savez(trunk, **{k: v for k, v in flatten(net).items() if k != "out.bias"})
    for bad in (whole[: len(whole) // 2], b"", b"PK", trunk.read_bytes()):
        trunk.write_bytes(bad)
        with pytest.raises(ConfigError, match=r"trunk\.npz.*delete it and .*sight\.json"):
            quickstart._load_tree(trunk, net, "sight")


def test_a_damaged_result_is_named(tmp_path):
    Stages(tmp_path)("a", lambda: 7)
    path = tmp_path / "stages" / "a.json"
    path.write_text(path.read_text()[:9])
    with pytest.raises(ConfigError, match=r"a\.json: damaged .* delete it and run again"):
        Stages(tmp_path)("a", lambda: 7)


def test_json_has_no_word_for_nan():
    values = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, 2, "x", None, True)}]}
    assert quickstart.finite(values) == {"a": None, "b": [1.5, None, {"c": [None, 2, "x", None, True]}]}
    json.dumps(quickstart.finite(values), allow_nan=False)


def test_a_log_line_cut_short_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    assert [r["step"] for r in quickstart.curves(tmp_path / "log.jsonl")] == [0, 2]


def test_what_made_a_summary():
    found = quickstart._origin()
    assert {"jax", "flax", "numpy"} <= set(found["versions"])
    assert found["command"]


@pytest.fixture
def cheap(monkeypatch):
    """The recipe without its arithmetic: steps, losses and VRC are stand-ins, everything on disk is real."""
    steps = []

    def step(state, batch, job):
        steps.append(int(state.step))
        return state._replace(step=state.step + 1), {"loss_base": 1.0}

    rng = np.random.default_rng(0)
    monkeypatch.setattr(train, "compiled", lambda cfg, grid=None: step)
    monkeypatch.setattr(evaluate, "answer_losses", lambda m, b, screens, r, q: rng.uniform(1, 2, (len(screens), q)))
    monkeypatch.setattr(compress, "train", lambda key, params, *_: (params, np.zeros(4)))
    monkeypatch.setattr(quickstart, "_calibrate", lambda *_: 0.7)
    return steps


def test_a_recipe_without_screens_to_label_is_refused_at_once(tiny_config, tmp_path):
    screens = replace(tiny_config.data.screens, label=0)
    with pytest.raises(ConfigError, match=r"data\.screens\.label"):
        quickstart.make_model(replace(tiny_config, data=replace(tiny_config.data, screens=screens)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_uncalibrated_vrc_is_said_and_recorded(tiny_model, tiny_config, monkeypatch, capsys):
    def fails(*_):
        raise compress.CompressError("no factor")

    monkeypatch.setattr(judge, "tables", lambda *_: (np.ones(1), np.ones(1)))
    monkeypatch.setattr(evaluate, "ratios", lambda *_: None)
    monkeypatch.setattr(compress, "calibrate", fails)
    assert quickstart._calibrate(tiny_model, tiny_config, []) is None
    assert "no factor" in capsys.readouterr().out


def test_the_shuffled_control_is_the_better_branch(tiny_model, tiny_source, monkeypatch):
    """One screen has no other picture to be shown."""

    def run(model, branch, screens, shuffled, progress):
        return [evaluate.Answer(0, "name", "", "", branch == "base")]

    monkeypatch.setattr(evaluate, "run", run)
    monkeypatch.setattr(evaluate, "majority", lambda screens, coords: {"name": 0.1})
    tests = {"test_known": [tiny_source[0], tiny_source[1]], "test_unseen": [tiny_source[2]]}
    found = judge.without_looking(tiny_model, tests)
    assert found["shuffled"] == {"name_known": 1.0}
    assert found["majority"] == {"name_known": 0.1, "name_unseen": 0.1}


def interrupted(monkeypatch, module, name, when):
    """`module.name` raises KeyboardInterrupt at its call number `when`, once."""
    real, calls = getattr(module, name), []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, stop)


def test_interrupted_runs_go_on(cheap, tiny_config, tmp_path, monkeypatch):
    """Stopped in training, in labelling and in VRC: each time the next call goes on from what is there."""
    step = train.compiled(tiny_config)

    def once(state, batch, job):
        if int(state.step) == 3 and 3 not in once.stopped:
            once.stopped.append(3)
            raise KeyboardInterrupt
        return step(state, batch, job)

    once.stopped = []
    monkeypatch.setattr(train, "compiled", lambda cfg, grid=None: once)
    with pytest.raises(KeyboardInterrupt):
        quickstart.make_model(tiny_config, tmp_path)
    assert cheap == [0, 1, 2]
    assert not (tmp_path / "model").exists()
    interrupted(monkeypatch, compress, "label_images", 1)
    with pytest.raises(KeyboardInterrupt):
        quickstart.make_model(tiny_config, tmp_path)
    assert cheap == [0, 1, 2, 2, 3]  # from the checkpoint of step 2, tiny's `save_every`
    rows = quickstart.curves(tmp_path / "train" / "log.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    interrupted(monkeypatch, compress, "train", 1)
    with pytest.raises(KeyboardInterrupt):
        quickstart.make_model(tiny_config, tmp_path)
    assert not (tmp_path / "model").exists()
    model = quickstart.make_model(tiny_config, tmp_path)
    assert len(cheap) == 5
    assert model.info["vrc_scale"] == 0.7
    assert config.from_dict(config.Config, model.info["config"]) == tiny_config
    done = {p.stem for p in (tmp_path / "stages").iterdir()}
    assert done == {"data", "train", "labels", "vrc"}
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    quickstart.make_model(tiny_config, tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    other = dataclasses.replace(tiny_config, dcl=dataclasses.replace(tiny_config.dcl, weight=0.0))
    with pytest.raises(ConfigError, match="other settings"):
        quickstart.make_model(other, tmp_path)


def test_a_run_begins_with_the_model_it_is_given_and_remembers_it(
    cheap, tiny_config, tiny_folder, tiny_model, tmp_path
):
    """The stand-in steps change no weight, so the result is what the run began with, in 16 bits."""
    out = tmp_path / "run"
    model = quickstart.make_model(tiny_config, out, tiny_folder)
    assert len(cheap) == tiny_config.train.steps
    assert model.tokenizer.encode("what is this? 37") == tiny_model.tokenizer.encode("what is this? 37")
    before = flatten(tiny_model.params)
    for path, leaf in flatten(model.params).items():
        np.testing.assert_array_equal(leaf, np.asarray(before[path]).astype(np.float16).astype(np.float32), path)
    quickstart.make_model(tiny_config, out, tiny_folder)
    with pytest.raises(ConfigError, match=r"began from .*model: give that as --start, or choose another --out"):
        quickstart.make_model(tiny_config, out)


def test_a_model_that_stands_still_gets_its_vrc_alone(cheap, tiny_config, tiny_folder, tiny_model, tmp_path):
    cfg = replace(tiny_config, train=replace(tiny_config.train, steps=0, stage0_steps=0))
    with pytest.raises(ConfigError, match=r"train\.steps 0: the model stands still; give it as --start"):
        quickstart.make_model(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model = quickstart.make_model(cfg, tmp_path / "run", tiny_folder)
    assert cheap == []
    assert {p.stem for p in (tmp_path / "run" / "stages").iterdir()} == {"data", "labels", "vrc"}
    assert model.info["vrc_scale"] == 0.7
    before = flatten(tiny_model.params)
    for path, leaf in flatten(model.params).items():
        np.testing.assert_array_equal(leaf, np.asarray(before[path]).astype(np.float16).astype(np.float32), path)


def test_a_run_from_nothing_is_not_gone_on_with_from_a_model(tiny_config, tiny_folder, tmp_path):
    (tmp_path / "stages").mkdir()  # as a run has it that is older than `start.json`
    with pytest.raises(ConfigError, match=r"began from nothing: leave out --start"):
        quickstart.make_model(tiny_config, tmp_path, tiny_folder)


def test_a_model_of_other_sizes_is_refused_before_anything_is_written(tiny_config, tiny_folder, tmp_path):
    m = tiny_config.model
    other = replace(m, llm=replace(m.llm, mlp=64), policy=replace(m.policy, max_tiles=4))
    with pytest.raises(ConfigError, match=r"model: its llm differ from those of config tiny"):
        quickstart.make_model(replace(tiny_config, model=other), tmp_path / "run", tiny_folder)
    assert not (tmp_path / "run").exists()


def test_words_of_a_run_are_made_once(tiny_config, tiny_source, tmp_path):
    path = tmp_path / "tokenizer.json"
    first = quickstart.words(tiny_config, tiny_source, path)
    path.with_suffix(".part").write_text("an interrupted one")
    again = quickstart.words(tiny_config, tiny_source, path)
    assert first.encode("where is the anchor?") == again.encode("where is the anchor?")


def test_the_whole_of_it(tiny_config, tmp_path, capsys, monkeypatch):
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    tiny_config = replace(tiny_config, vrc=replace(tiny_config.vrc, sight_steps=2))
    summary = quickstart.run(tiny_config, tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    tasks = {f"{t}_{s}" for t in ("name", "find", "yesno") for s in ("known", "unseen")}
    for way in ("accuracy", "accuracy_vrc", "accuracy_litert", "accuracy_litert_vrc"):
        assert set(summary[way]) == {"base", "large"}
        assert tasks <= set(summary[way]["base"])
        assert all(0 <= a["low"] <= a["mean"] <= a["high"] <= 1 for b in summary[way].values() for a in b.values())
    assert tasks <= set(summary["controls"]["majority"])
    assert tasks <= set(summary["controls"]["shuffled"])
    assert 0 <= summary["vrc"]["tokens_saved"] < 1
    assert "retained" in summary["vrc"]
    assert summary["export"]["same_answers"] > 0.95
    assert summary["export"]["max_relative_error"] < 1e-4
    assert summary["seconds"]["total"] == pytest.approx(sum(v for k, v in summary["seconds"].items() if k != "total"))
    assert summary["peak_rss_gb"] > 0
    assert {"versions", "config_hash", "command", "machine"} <= set(summary)
    assert "<svg" in (tmp_path / "report.html").read_text()
    capsys.readouterr()
    again = quickstart.run(tiny_config, tmp_path)
    assert again["accuracy"] == summary["accuracy"]
    said = capsys.readouterr().out
    assert said.count("done before") == len(summary["seconds"])  # one more, what made it; and one is their total
    assert " ...\n" not in said
    other = dataclasses.replace(tiny_config, name="other")
    with pytest.raises(ConfigError, match="other settings"):
        quickstart.run(other, tmp_path)

    def no_wheel(*_):
        raise ExportUnavailable("no converter here")

    monkeypatch.setattr(quickstart, "_export", no_wheel)
    (tmp_path / "stages" / "export.json").unlink()
    bare = quickstart.run(tiny_config, tmp_path)
    assert bare["accuracy"] == summary["accuracy"]
    assert not {"export", "accuracy_litert"} & set(bare)
    assert "not exported: no converter here" in capsys.readouterr().out
