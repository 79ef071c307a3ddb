"""Which screens make up which step, and what a batch holds."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervl_jax import image, plan, presets, text, tiling, tokens
from hypervl_jax.data import pipeline
from hypervl_jax.data.screens import Thing

TINY = presets.tiny()
POLICY = TINY.model.policy
sides = st.integers(16, 64)
sizes_of = st.lists(st.tuples(sides, sides), min_size=1, max_size=40).map(np.array)
few = settings(max_examples=40, deadline=None)


def data(**changes):
    return replace(TINY.data, tile_buckets=(1, 3, 5), **changes)


# --- schedule --------------------------------------------------------------------------------------------------------


@few
@given(sizes_of, st.integers(1, 6), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 9))
def test_batches_are_full_of_one_bucket_at_the_ratios_asked_for(sizes, batch, shrink, seed):
    cfg = data(batch=batch, shrink_prob=shrink, shrink_min=0.25)
    specs = pipeline.schedule(sizes, cfg, POLICY, seed, 12)
    assert len(specs) == 12
    for spec in specs:
        assert len(spec.indices) == len(spec.ratios) == batch
        for i, ratio in zip(spec.indices, spec.ratios, strict=True):
            tiles = plan.make(tuple(map(int, sizes[i])), ratio, POLICY).n_tiles
            assert pipeline.bucket_of(tiles, cfg) == spec.bucket
            assert ratio == 1 or (shrink and 0.25 <= ratio <= 1)


@few
@given(sizes_of, st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_every_screen_comes_once_an_epoch(sizes, batch, epochs, seed):
    """After so many epochs a screen has come that often, save those that wait for their bucket to fill a batch."""
    cfg = data(batch=batch, shrink_prob=0.0)
    bucket = [pipeline.bucket_of(plan.make(tuple(map(int, s)), 1.0, POLICY).n_tiles, cfg) for s in sizes]
    members = Counter(bucket)
    steps = sum(epochs * n // batch for n in members.values())
    seen = Counter(i for spec in pipeline.schedule(sizes, cfg, POLICY, seed, steps) for i in spec.indices)
    missing = Counter()
    for i, b in enumerate(bucket):
        assert seen[i] <= epochs
        missing[b] += epochs - seen[i]
    assert missing == Counter({b: epochs * n % batch for b, n in members.items()})


def test_an_epoch_that_divides_into_batches_is_exactly_one_of_each():
    sizes = np.full((12, 2), 30)
    specs = pipeline.schedule(sizes, data(batch=4, shrink_prob=0.0), POLICY, 0, 9)
    epochs = [sum((s.indices for s in specs[k : k + 3]), ()) for k in (0, 3, 6)]
    assert [sorted(e) for e in epochs] == [list(range(12))] * 3
    assert len(set(epochs)) == 3  # each in an order of its own


@few
@given(sizes_of, st.integers(0, 9), st.integers(1, 20), st.integers(0, 20))
def test_the_schedule_is_a_function_of_the_seed_and_its_start_of_no_length(sizes, seed, steps, more):
    cfg = data(batch=3)
    short = pipeline.schedule(sizes, cfg, POLICY, seed, steps)
    assert short == pipeline.schedule(sizes.copy(), cfg, POLICY, seed, steps)
    assert short == pipeline.schedule(sizes, cfg, POLICY, seed, steps + more)[:steps]


def test_seeds_differ_and_about_the_asked_share_is_shrunk():
    sizes = np.full((500, 2), 60)
    a, b = (pipeline.schedule(sizes, data(batch=5, shrink_prob=0.3), POLICY, seed, 90) for seed in (0, 1))
    assert a != b
    ratios = np.array([r for spec in a for r in spec.ratios])
    assert 0.23 < (ratios < 1).mean() < 0.37


def test_what_fits_no_bucket_is_an_error_that_names_the_setting():
    with pytest.raises(ValueError, match=r"6 tiles, data\.tile_buckets end at 5"):
        pipeline.bucket_of(6, data())
    with pytest.raises(ValueError, match="empty"):
        pipeline.schedule(np.zeros((0, 2), int), data(), POLICY, 0, 1)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_from_a_later_start_are_the_same(tiny_batches, tiny_config, tiny_source, tiny_tokenizer, tiny_classes):
    m, d = tiny_config.model, tiny_config.data
    late = list(pipeline.batches(tiny_source, d, m.policy, m.text, tiny_tokenizer, tiny_classes, 0, 6, start=4))
    assert len(late) == 2
    for a, b in zip(late, tiny_batches[4:], strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_batch_holds_what_its_spec_says(tiny_batches, tiny_config, tiny_source, tiny_tokenizer):
    m, d = tiny_config.model, tiny_config.data
    specs = pipeline.schedule(tiny_source.sizes, d, m.policy, 0, 6)
    for spec, batch in zip(specs, tiny_batches, strict=True):
        n, length = d.tile_buckets[spec.bucket], d.lengths[spec.bucket]
        assert batch.tiles.shape == (d.batch, n, 32, 32, 3)
        assert batch.ids.shape == (d.batch, length)
        assert batch.weights.shape == (d.batch, batch.names.shape[1], n * m.policy.patches_per_side**2)
        for b, (i, ratio) in enumerate(zip(spec.indices, spec.ratios, strict=True)):
            screen = tiny_source[i]
            p = plan.make(screen.image.shape[:2], ratio, m.policy)
            np.testing.assert_array_equal(batch.tiles[b, : p.n_tiles], image.prepare(screen.image, p))
            np.testing.assert_array_equal(batch.mask[b, : p.n_tiles], p.patch_mask())
            assert not batch.tiles[b, p.n_tiles :].any()
            assert not batch.mask[b, p.n_tiles :].any()
            asked = [(q.text, q.answer) for q in screen.questions]
            row = text.pad(
                text.render_questions(p, asked, tiny_tokenizer, m.text), length, tiny_tokenizer.special(tokens.PAD)
            )
            for got, want in zip(batch[2:7], row, strict=True):
                np.testing.assert_array_equal(got[b], want)


def test_names_are_classes_and_weights_shares(tiny_batches, tiny_classes, tiny_tokenizer):
    names = np.concatenate([b.names.ravel() for b in tiny_batches])
    assert names.max() < len(tiny_classes)
    assert (names >= 0).any()
    for batch in tiny_batches:
        total = batch.weights.sum(-1)
        np.testing.assert_allclose(total[batch.names >= 0], 1, rtol=1e-5)
        assert not total[batch.names < 0].any()
        for name, (answer, inside) in zip(batch.names.ravel(), batch.words.reshape(-1, 2), strict=True):
            if name < 0:
                assert answer == inside == -1
                continue
            word = tiny_classes[name]
            assert answer == tiny_tokenizer.encode(word)[0]
            if word.isdigit():  # digits stand alone wherever they are
                assert inside == answer
            else:
                assert (
                    inside == tiny_tokenizer.encode(f"where is the {word}?")[len(tiny_tokenizer.encode("where is the"))]
                )


# --- shares ----------------------------------------------------------------------------------------------------------


@few
@given(st.tuples(sides, sides), st.data())
def test_a_share_is_the_part_of_the_box_in_each_patch(size, draw):
    """Counted pixel by pixel: white where the thing is, tiled as the picture is."""
    h, w = size
    x0, y0 = draw.draw(st.integers(0, w - 11)), draw.draw(st.integers(0, h - 11))
    x1, y1 = draw.draw(st.integers(x0 + 10, w)), draw.draw(st.integers(y0 + 10, h))
    p = plan.make(size, 1.0, POLICY)
    shares = list(pipeline._shares(Thing("cat", "picture", (x0, y0, x1, y1), ""), p, {"cat": 3}))
    white = np.zeros((h, w, 3))
    white[y0:y1, x0:x1] = 1
    side = p.policy.patches_per_side
    patches = tiling.tile(white, p)[..., 0].reshape(-1, side, p.policy.patch, side, p.policy.patch)
    want = patches.sum((2, 4)).reshape(-1) / white[..., 0].sum()
    name, share = shares[0]
    assert name == 3
    np.testing.assert_allclose(share, want, atol=1e-6)
    assert all(s.sum() == pytest.approx(1) for _, s in shares)
    if len(shares) == 2:  # the thumbnail's, in the patches that the box touches there
        assert not shares[1][1][: -(side**2)].any()
        grid, last = shares[1][1][-(side**2) :].reshape(side, side), p.tiles[-1]
        ends = np.array([[x0, x1], [y0, y1]]) * [[last.width / w], [last.height / h]]
        for axis, (start, stop) in enumerate(ends):
            touched = np.flatnonzero(grid.sum(axis) > 1e-6)
            assert touched[0] == math.floor(start / p.policy.patch + 1e-6)
            assert touched[-1] == math.ceil(stop / p.policy.patch - 1e-6) - 1


def test_a_number_counts_as_its_digits_side_by_side():
    p = plan.make((32, 32), 1.0, POLICY)
    index = {d: int(d) for d in pipeline.DIGITS}
    shares = list(pipeline._shares(Thing("71", "digit", (0.0, 0.0, 32.0, 16.0), ""), p, index))
    assert [name for name, _ in shares] == [7, 1]
    want = np.zeros((2, 4, 4))
    want[0, :2, :2] = want[1, :2, 2:] = 1 / 4
    np.testing.assert_allclose([s.reshape(4, 4) for _, s in shares], want, atol=1e-6)


def test_a_thing_too_small_to_see_at_this_ratio_is_not_asked_for():
    box, index = (0.0, 0.0, 9.0, 9.0), {"cat": 0}
    thing = Thing("cat", "picture", box, "")
    assert len(list(pipeline._shares(thing, plan.make((32, 32), 1.0, POLICY), index))) == 1
    assert not list(pipeline._shares(thing, plan.make((32, 32), 0.25, POLICY), index))
    assert not list(pipeline._shares(thing, plan.make((32, 32), 1.0, POLICY), {"dog": 0}))
