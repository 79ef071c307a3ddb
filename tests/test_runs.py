"""What a run says of itself, and what differs when it is gone on with."""

import json
from dataclasses import replace

import pytest

from hypervl_jax import config, runs
from hypervl_jax.config import ConfigError
from hypervl_jax.runs import TrainError


def test_what_differs_is_named_with_both_values():
    was = {"a": {"b": 1, "c": [1, 2]}, "d": "x", "gone": 0}
    now = {"a": {"b": 2, "c": [1, 2]}, "d": "y", "new": {"e": 1}}
    assert config.differences(was, now) == [
        "a.b was 1, is 2", "d was 'x', is 'y'", "gone is not in this one", "new is not in that one",
    ]  # fmt: skip
    assert config.differences(was, was) == []
    assert config.differences(None, {"a": 1}, "config") == ["config was None, is {'a': 1}"]


def test_settings_that_differ_are_named(tiny_config, tmp_path):
    cfg, path = tiny_config, tmp_path / "config.json"
    runs.same_config(path, cfg)
    runs.same_config(path, cfg)
    runs.same_config(path, replace(cfg, train=replace(cfg.train, keep=9, skips=7)))  # of how it is watched
    other = replace(cfg, train=replace(cfg.train, lr=0.5, b1=0.5), data=replace(cfg.data, batch=2))
    with pytest.raises(ConfigError) as e:
        runs.same_config(path, other)
    for said in ("data.batch was 4, is 2", "train.lr was 0.001, is 0.5", "train.b1 was 0.9, is 0.5"):
        assert said in str(e.value)
    long = "; ".join(f"{n}" for n in range(6)) + " and 3 more"
    assert runs.some([str(n) for n in range(9)]) == long


def test_a_run_may_grow_and_vrc_may_change_and_data_may_not(tiny_config, tmp_path):
    cfg, path, about = tiny_config, tmp_path / "train.json", {"data": {"digest": "ab"}}
    runs.same_run(path, cfg, about)
    runs.same_run(path, replace(cfg, train=replace(cfg.train, steps=99), vrc=replace(cfg.vrc, steps=9)), about)
    with pytest.raises(TrainError, match=r"data\.digest was 'ab', is 'cd'"):
        runs.same_run(path, cfg, {"data": {"digest": "cd"}})
    old = json.loads(path.read_text())
    del old["config"]["train"]["skips"]  # as a version wrote it that did not know the setting
    path.write_text(json.dumps(old))
    runs.same_run(path, cfg, about)
    for damaged in ("[]", '{"config": 3}', '{"config": {"train": []}}'):
        path.write_text(damaged)
        with pytest.raises(TrainError, match="other settings"):
            runs.same_run(path, cfg, about)


def test_a_checkpoint_says_what_it_is_of(tiny_config):
    about = runs.about(tiny_config, {"classes": ["x"]}, 12, {"loss_base": 1.0, "loss_large": 2.0})
    assert (about["step"], about["seed"], about["loss"]) == (12, tiny_config.train.seed, 1.5)
    assert about["config_hash"] == config.config_hash(tiny_config)
    assert set(about["versions"]) >= {"hypervl_jax", "jax", "orbax-checkpoint"}
    assert "loss" not in runs.about(tiny_config, {}, 1, {})
    saved = json.loads(json.dumps(about))
    assert runs.changed(saved, tiny_config) == []
    assert runs.changed({}, tiny_config) == []
    saved["versions"]["jax"] = "0.1"
    longer = replace(tiny_config, train=replace(tiny_config.train, steps=9))
    said = runs.changed(saved, longer)
    assert said[0] == "config.train.steps was 4, is 9"
    assert said[1].startswith("versions.jax was '0.1', is ")
