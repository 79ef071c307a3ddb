"""Batches over eight simulated devices, against the same pictures one by one on one."""

import jax
import numpy as np
import pytest

from hypervl_jax.rescale import hcd, many
from hypervl_jax.rescale.hcd import HcdConfig

CONFIG = HcdConfig(2, 2)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (11, 16, 12, 3), np.uint8)  # no multiple of eight


@pytest.fixture(scope="module")
def each():
    return jax.random.split(jax.random.key(3), 11)


def one_device(fn, pictures, each):
    """Results picture by picture, on the first device alone."""
    first = many.over(jax.devices()[:1])
    return np.concatenate([fn(pictures[i : i + 1], each[i : i + 1], first) for i in range(len(pictures))])


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8
    assert many.over().size == 8


@pytest.mark.parametrize("config", [None, CONFIG], ids=["plain", "hcd"])
def test_small_pictures_equal_those_made_alone(config, tiny_pair, pictures, each):
    got = many.down(tiny_pair, pictures, config, each)
    want = one_device(lambda x, key, first: many.down(tiny_pair, x, config, key, first), pictures, each)
    assert got.shape == (11, 8, 6, 3)
    assert np.abs(got.astype(int) - want).max() <= 1  # a value between two levels may fall to either
    assert (got != want).mean() < 0.002


def test_restored_pictures_equal_those_made_alone(tiny_pair, pictures, each):
    small = many.down(tiny_pair, pictures)
    got = many.up(tiny_pair, small, each)
    want = one_device(lambda x, key, first: many.up(tiny_pair, x, key, first), small, each)
    assert got.shape == pictures.shape
    assert np.abs(got.astype(int) - want).max() <= 1
    assert (got != want).mean() < 0.002


def test_every_device_has_its_share_and_the_step_no_traffic(tiny_pair, pictures, each):
    """A step's program on one device holds its pictures alone and exchanges nothing but the sum of losses."""
    pair, x, key = many._placed(many.over(), tiny_pair, pictures, each)
    assert {s.data.shape for s in x.addressable_shards} == {(2, 16, 12, 3)}
    assert {s.device for s in x.addressable_shards} == set(jax.devices())
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(pair))
    result = hcd.descend(pair, x, CONFIG, key)
    assert {s.data.shape for s in result.lr.addressable_shards} == {(2, 8, 6, 3)}
    scene = hcd.Scene(pair, x, x, jax.numpy.float32(1), key)
    text = hcd.WHOLE.look.lower(scene, hcd.step_of(CONFIG, "hr"), "hr", x, 0).compile().as_text()
    moved = [line for line in text.splitlines() if any(f" {op}(" in line for op in ("all-gather", "all-to-all"))]
    assert not moved
