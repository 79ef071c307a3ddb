"""One training gradient, four ways to run it: plain, `jit` over a sharded batch, `pmap`, `shard_map`.

The losses are means over answers and over named things. `jit` sees the whole batch, so its mean is the global one
whatever the rows hold. Under `pmap` and `shard_map` each device takes the mean of its own rows, and the mean over
devices is the global mean only where devices count alike: there, every row has one answer and one thing.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hypervl_jax import train
from hypervl_jax.data import pipeline
from hypervl_jax.train import Job

DEVICES = 8
JOB = Job(("base",))  # both encoders, both terms of DCL, gradients into Base, decoder and names


@pytest.fixture(scope="module")
def cfg(tiny_config):
    return replace(tiny_config, data=replace(tiny_config.data, batch=DEVICES, tile_buckets=(3,), lengths=(96,)))


@pytest.fixture(scope="module")
def params(cfg, tiny_params, tiny_classes):
    table = np.random.default_rng(9).normal(size=(len(tiny_classes), 48)).astype(np.float32)
    cells = 0.1 * table[: cfg.model.policy.tokens_per_tile]
    names = {"base": 0.1 * table[:, :32], "large": 0.1 * table}
    names = {f"names_{b}": {"names": names[b], "cells": cells} for b in names}
    return jax.tree.map(jnp.asarray, {**tiny_params, **names})


@pytest.fixture(scope="module")
def ragged(cfg, tiny_source, tiny_tokenizer, tiny_classes):
    """Eight screens as they come."""
    m = cfg.model
    small = [s for s in tiny_source.records if max(s.image.shape) <= 64 and s.image.shape[1] <= 32][:DEVICES]
    small = (small * DEVICES)[:DEVICES]
    source = type(tiny_source).__new__(type(tiny_source))
    source.records, source.sizes = small, np.array([s.image.shape[:2] for s in small])
    d = replace(cfg.data, shrink_prob=0.0)
    feed = pipeline.batches(source, d, m.policy, m.text, tiny_tokenizer, tiny_classes, 0, 1)
    return jax.tree.map(jnp.asarray, next(feed))


@pytest.fixture(scope="module")
def even(ragged):
    """The same screens with the same count in every row: one answer and one thing each, and every token real."""
    loss = ragged.loss & (ragged.segments == 1)
    first = jnp.arange(ragged.names.shape[1]) == 0
    names = jnp.where(first, jnp.maximum(ragged.names, 0), -1)
    words = jnp.where(first[:, None], jnp.maximum(ragged.words, 0), -1)
    assert loss.any(1).all()
    return ragged._replace(loss=loss, names=names, words=words, mask=jnp.ones_like(ragged.mask))


@pytest.fixture(scope="module")
def gradients(cfg):
    return lambda params, batch: train.gradients(params, cfg, JOB, batch)


@pytest.fixture(scope="module")
def expected(gradients, params, even):
    """Plain: no transformation around it."""
    return gradients(params, even)


@pytest.fixture(scope="module")
def mesh():
    assert jax.device_count() == DEVICES
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.abs(b).max())))


def test_jit_over_a_sharded_batch(gradients, params, even, ragged, expected, mesh):
    """Also where rows count differently, which is the product's case."""
    jitted = jax.jit(gradients)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    got = jitted(everywhere, jax.device_put(even, rows))
    assert len({s.device for s in jax.tree.leaves(got)[0].addressable_shards}) == DEVICES
    close(got, expected)
    assert len(set(np.asarray(ragged.segments.max(1)).tolist())) > 1
    close(jitted(everywhere, jax.device_put(ragged, rows)), gradients(params, ragged))


def test_pmap(gradients, params, even, expected):
    @partial(jax.pmap, axis_name="data", in_axes=(None, 0), out_axes=None)
    def step(params, batch):
        return jax.lax.pmean(gradients(params, batch), "data")

    close(step(params, jax.tree.map(lambda a: a.reshape(DEVICES, 1, *a.shape[1:]), even)), expected)


def test_shard_map(gradients, params, even, expected, mesh):
    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec())
    def step(params, batch):
        params = jax.lax.pcast(params, "data", to="varying")  # a copy each: the mean is taken here, not by autodiff
        return jax.lax.pmean(gradients(params, batch), "data")

    close(step(params, even), expected)


# --- losses in chunks, micro-batches ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four():
    """Two rows a device: a micro-batch each."""
    return jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])


@pytest.fixture(scope="module")
def in_parts(cfg):
    """The same gradients, the loss a block of the vocabulary at a time and the rows in two micro-batches."""
    how = replace(cfg, train=replace(cfg.train, loss_chunk=100, accumulate=2))
    return lambda params, batch: train.gradients(params, how, JOB, batch)


def test_jit_in_chunks_and_micro_batches(in_parts, gradients, params, even, ragged, expected, four):
    jitted, rows = jax.jit(in_parts), NamedSharding(four, PartitionSpec("data"))
    everywhere = jax.device_put(params, NamedSharding(four, PartitionSpec()))
    close(jitted(everywhere, jax.device_put(even, rows)), expected)
    close(jitted(everywhere, jax.device_put(ragged, rows)), gradients(params, ragged))


def test_pmap_in_chunks_and_micro_batches(in_parts, params, even, expected):
    @partial(jax.pmap, axis_name="data", in_axes=(None, 0), out_axes=None, devices=jax.devices()[:4])
    def step(params, batch):
        return jax.lax.pmean(in_parts(params, batch), "data")

    close(step(params, jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), even)), expected)


def test_shard_map_in_chunks_and_micro_batches(in_parts, params, even, expected, four):
    """Unchecked: the checker would have the zeros that every loop begins with be cast, as each device's own."""
    specs = PartitionSpec(), PartitionSpec("data")

    @jax.jit
    @partial(jax.shard_map, mesh=four, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    def step(params, batch):
        return jax.lax.pmean(in_parts(params, batch), "data")

    close(step(params, even), expected)
