"""The model as a sentence: the paper's sizes, tiles one by one or at once, features in their places, shared rows."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import checkpoint, config, image, plan, presets, tensors, text, tokens, train
from hypervl_jax.model import hypervl, llm

BRANCHES = config.BRANCHES


# --- the paper's sizes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper():
    return presets.preset("hypervl_1p7b").model


@pytest.fixture(scope="module")
def paper_shapes(paper):
    return jax.eval_shape(lambda k: hypervl.init(k, paper), jax.random.key(0))


def test_parameter_counts_are_the_papers(paper_shapes):
    count = {
        f"{group}.{part}": sum(prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for group in BRANCHES
        for part, tree in paper_shapes[group].items()
    }
    assert count == {
        "base.vit": 86_433_024,
        "base.projector": 10_496_000,
        "large.vit": 304_147_456,
        "large.projector": 12_595_200,
    }
    assert sum(prod(leaf.shape) for leaf in jax.tree.leaves(paper_shapes["llm"])) == 1_720_574_976
    assert paper_shapes["llm"]["embed"].shape == (151_936, 2048)
    assert sum(prod(leaf.shape) for leaf in jax.tree.leaves(paper_shapes["vrc"])) == pytest.approx(1.75e6, rel=0.02)


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_papers_encoder_compiles(branch, paper, paper_shapes):
    """One tile of 512 px through the whole tower, as a program, without a weight in memory."""
    tiles, mask = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 1024), bool)
    lowered = jax.jit(hypervl.encode_batch, static_argnums=(1, 2)).lower(paper_shapes, paper, branch, tiles, mask)
    assert lowered.out_info.shape == (1, 256, 2048)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 1e9  # a tile's work, far from the tower's weights


def test_the_papers_decoder_compiles_and_traces_a_training_step(paper, paper_shapes):
    b, n, length = 1, 3, 1024

    def row(dtype):
        return jax.ShapeDtypeStruct((b, length), dtype)

    features = jax.ShapeDtypeStruct((b, n * 256, 2048), jnp.float32)
    ids = row(jnp.int32)
    forward = jax.jit(hypervl.hidden, static_argnums=1).lower(paper_shapes, paper, features, ids, ids, ids, ids)
    assert forward.out_info.shape == (b, length, 2048)
    forward.compile()

    patches = 1024
    batch = train.Batch(
        tiles=jax.ShapeDtypeStruct((b, n, 512, 512, 3), jnp.uint8),
        mask=jax.ShapeDtypeStruct((b, n, patches), bool),
        ids=ids, slots=ids, loss=row(bool), positions=ids, segments=ids,
        names=jax.ShapeDtypeStruct((b, 4), jnp.int32),
        words=jax.ShapeDtypeStruct((b, 4), jnp.int32),
        weights=jax.ShapeDtypeStruct((b, 4, n * patches), jnp.float32),
    )  # fmt: skip
    cfg = presets.preset("hypervl_1p7b")
    shapes = {b: {"names": (74, paper.vit(b).width), "cells": (256, paper.llm.width)} for b in BRANCHES}
    params = {g: tree for g, tree in paper_shapes.items() if g != "vrc"}
    params |= {f"names_{b}": {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes[b].items()} for b in BRANCHES}
    grads, parts = jax.eval_shape(lambda p, b: train.gradients(p, cfg, train.Job(BRANCHES), b), params, batch)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    assert set(parts) == {"kl", *(f"{part}_{b}" for part in ("name", "word", "cell", "loss") for b in BRANCHES)}


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encode():
    return jax.jit(hypervl.encode_batch, static_argnums=(1, 2))


@pytest.fixture(scope="module")
def picture(tiny_config):
    """(plan, tiles) of 40 x 70 px of noise: two rows of three tiles, most of them partly padding, and a thumbnail."""
    p = plan.make((40, 70), 1.0, tiny_config.model.policy)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    return p, jnp.asarray(image.prepare(pixels, p))


@pytest.fixture(scope="module")
def features(encode, tiny_params, tiny_config, picture):
    p, tiles = picture
    return np.asarray(encode(tiny_params, tiny_config.model, "base", tiles, p.patch_mask()))


def test_features_are_a_quarter_of_the_patches_in_the_decoders_width(features, picture, tiny_config):
    p, _ = picture
    assert p.n_tiles == 7
    assert features.shape == (7, 4, tiny_config.model.llm.width)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_serial_tiles_equal_one_batch(batch_size, features, picture, tiny_params, tiny_config):
    """Also where the number of tiles is no multiple of the batch."""
    p, tiles = picture
    serial = jax.jit(hypervl.encode_tiles, static_argnums=(1, 2, 5))
    got = serial(tiny_params, tiny_config.model, "base", tiles, jnp.asarray(p.patch_mask()), batch_size)
    np.testing.assert_allclose(got, features, rtol=1e-5, atol=1e-5)


def test_one_tile_changed_leaves_the_other_tiles_features_bit_equal(
    encode, features, picture, tiny_params, tiny_config
):
    p, tiles = picture
    got = np.asarray(encode(tiny_params, tiny_config.model, "base", tiles.at[1].add(100), p.patch_mask()))
    others = np.arange(7) != 1
    np.testing.assert_array_equal(got[others], features[others])
    assert np.abs(got[1] - features[1]).max() > 0.1


def test_padding_has_no_effect_on_kept_cells(encode, features, picture, tiny_params, tiny_config):
    """Noise in every patch that holds no picture, in cells that are kept for their other patches too."""
    p, tiles = picture
    patch, side = p.policy.patch, p.policy.patches_per_side
    outside = ~p.patch_mask().reshape(-1, side, 1, side, 1)
    outside = np.broadcast_to(outside, (p.n_tiles, side, patch, side, patch)).reshape(tiles.shape[:3])
    noise = np.random.default_rng(1).integers(0, 256, tiles.shape, np.uint8)
    got = encode(tiny_params, tiny_config.model, "base", jnp.where(outside[..., None], noise, tiles), p.patch_mask())
    assert outside.any()
    for i in range(p.n_tiles):
        np.testing.assert_allclose(got[i, p.cells(i)], features[i, p.cells(i)], rtol=0, atol=1e-6)


def test_empty_tiles_that_fill_a_bucket_have_no_effect(encode, features, picture, tiny_params, tiny_config):
    p, tiles = picture
    more, mask = jnp.pad(tiles, ((0, 2), *[(0, 0)] * 3)), np.pad(p.patch_mask(), ((0, 2), (0, 0)))
    got = np.asarray(encode(tiny_params, tiny_config.model, "base", more, mask))
    np.testing.assert_allclose(got[:7], features, rtol=1e-5, atol=1e-5)
    assert np.isfinite(got).all()


def test_branches_differ(encode, features, picture, tiny_params, tiny_config):
    p, tiles = picture
    large = encode(tiny_params, tiny_config.model, "large", tiles, p.patch_mask())
    assert np.abs(large - features).max() > 0.1


def test_init_makes_every_expected_weight(tiny_config):
    params = hypervl.init(jax.random.key(1), tiny_config.model)
    flat = tensors.flatten(params)
    assert {k: v.shape for k, v in flat.items()} == checkpoint.expected(tiny_config.model)
    assert all(np.isfinite(v).all() for v in flat.values())
    drawn = [k for k in flat if k.endswith("weight") and "norm" not in k]
    assert min(np.std(flat[k]) for k in drawn) > 0.01


# --- rows ------------------------------------------------------------------------------------------------------------


def test_features_stand_at_their_slots(tiny_params):
    ids = jnp.array([[5, 7, 7, 9], [5, 6, 7, 8]])
    slots = jnp.array([[-1, 2, 0, -1], [-1, -1, 1, -1]])
    features = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 48)), jnp.float32)
    got = hypervl.embed(tiny_params, ids, slots, features)
    table = tiny_params["llm"]["embed"]
    want = np.array(table[ids])
    want[0, 1], want[0, 2], want[1, 2] = features[0, 2], features[0, 0], features[1, 1]
    np.testing.assert_array_equal(got, want)


def test_a_row_of_questions_equals_each_question_alone(features, picture, tiny_params, tiny_config, tiny_tokenizer):
    """One picture read once for all of its questions: the logits of each are those of the one-question row."""
    p, _ = picture
    cfg = tiny_config.model
    questions = [("what is this?", "pizza"), ("how many pizza?", "2"), ("what is the number?", "4071")]
    rows = [text.render_questions(p, qs, tiny_tokenizer, cfg.text) for qs in (questions, *([q] for q in questions))]
    length = max(len(r.ids) for r in rows) + 3
    batch = text.stack(rows, length, tiny_tokenizer.special(tokens.PAD))

    @jax.jit
    def run(params, features, ids, slots, positions, segments):
        return llm.logits(params["llm"], hypervl.hidden(params, cfg, features, ids, slots, positions, segments))

    flat = jnp.broadcast_to(features.reshape(1, -1, 48), (4, features.shape[0] * features.shape[1], 48))
    row = map(jnp.asarray, (batch.ids, batch.slots, batch.positions, batch.segments))
    got = np.asarray(run(tiny_params, flat, *row))
    prefix = batch.segments[0] == 0
    for k in (1, 2, 3):
        shared_row = got[0][prefix | (batch.segments[0] == k)]
        alone = got[k][batch.segments[k] >= 0]
        np.testing.assert_allclose(shared_row, alone, rtol=0, atol=1e-5 * np.abs(alone).max())
