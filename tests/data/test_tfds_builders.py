"""The prepared set equals composition on the fly, is reused, and is read without TensorFlow."""

import dataclasses
import pickle
import socket
import sys

import numpy as np
import pytest

from hypervl_jax.config import ScreensConfig
from hypervl_jax.data import screens
from hypervl_jax.data.assets import Assets
from hypervl_jax.presets import tiny

pytest.importorskip("tensorflow_datasets", reason="preparing screens needs the train extra")
from hypervl_jax.data import tfds_builders as T

CFG = dataclasses.replace(tiny().data.screens, train=12, label=3, test_known=2, test_unseen=2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screens")
    return folder, T.build(CFG, folder, progress=False)


def test_records_are_the_composed_screens(prepared):
    for split, source in prepared[1].items():
        assert len(source) == getattr(CFG, split) == len(source.sizes)
        for i in range(len(source)):
            stored, composed = source[i], T.record(Assets.load(), CFG, split, i)
            np.testing.assert_array_equal(stored.image, composed.image)
            assert stored[1:] == composed[1:]
            assert tuple(source.sizes[i]) == composed.image.shape[:2]


def test_tensorflow_is_not_imported(prepared):
    assert "tensorflow" not in sys.modules


def test_built_once(prepared, monkeypatch):
    def fail(*args):
        raise AssertionError("composed again")

    monkeypatch.setattr(screens, "record", fail)
    again = T.build(CFG, prepared[0], progress=False)
    np.testing.assert_array_equal(again["train"].sizes, prepared[1]["train"].sizes)
    assert len(T.source(CFG, prepared[0], "label")) == 3


def test_other_settings_are_another_set(prepared):
    other = dataclasses.replace(CFG, seed=1)
    assert T.name_of(other) != T.name_of(CFG)
    with pytest.raises(FileNotFoundError, match="build"):
        T.source(other, prepared[0], "train")


def test_an_interrupted_build_is_not_taken_for_a_set(tmp_path, monkeypatch):
    cfg = dataclasses.replace(CFG, seed=2, train=5)
    real = screens.record

    def interrupted(assets, cfg, split, index):
        if index == 3:
            raise KeyboardInterrupt
        return real(assets, cfg, split, index)

    monkeypatch.setattr(screens, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        T.build(cfg, tmp_path, progress=False)
    with pytest.raises(FileNotFoundError):
        T.source(cfg, tmp_path, "train")
    monkeypatch.setattr(screens, "record", real)
    assert len(T.build(cfg, tmp_path, progress=False)["train"]) == 5


def test_a_source_travels_to_worker_processes(prepared):
    source = prepared[1]["train"]
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[4].image, source[4].image)


def test_settings_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(screens.ScreenError, match="concepts"):
        T.build(dataclasses.replace(CFG, concepts=1000), tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_array_record_the_same_screens_are_composed_when_asked_for(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(T, "_stored", lambda: False)
    with pytest.raises(FileNotFoundError, match="build"):
        T.source(CFG, tmp_path, "label")
    composed = T.build(CFG, tmp_path, progress=False)
    assert composed.keys() == prepared[1].keys()
    for split, source in composed.items():
        np.testing.assert_array_equal(source.sizes, prepared[1][split].sizes)
        np.testing.assert_array_equal(source[1].image, prepared[1][split][1].image)
        assert len(T.source(CFG, tmp_path, split)) == len(source)
    monkeypatch.setattr(T, "record", None)  # sizes are kept
    assert len(T.build(CFG, tmp_path, progress=False)["train"].sizes) == CFG.train


def test_nothing_is_fetched(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("a set is composed from what ships, without a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert T.build(dataclasses.replace(CFG, seed=1), tmp_path, progress=False)


def test_default_settings_can_be_built(tmp_path):
    """TFDS refuses a config that is named as one that it lists."""
    assert T._builder(ScreensConfig(), tmp_path, progress=False).builder_config.name.startswith("nano-")
