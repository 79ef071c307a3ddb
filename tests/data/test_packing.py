"""Packed rows: nothing is cut, lost or seen by its neighbour; a schedule is a function of its seed."""

import dataclasses
import io
import json
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hypervl_jax import plan, presets, text
from hypervl_jax.config import PlanPolicy, TextConfig
from hypervl_jax.data import packing
from hypervl_jax.data.check import shown, too_much
from hypervl_jax.data.conversations import Conversation, DataError, Picture

TINY = presets.tiny()
MODEL = TINY.model
DATA = replace(TINY.data, batch=2, tile_buckets=(3, 8), lengths=(80, 160))
few = settings(max_examples=40, deadline=None)
sides = st.integers(8, 90)


def picture(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return Picture(f"{seed}.png", buffer.getvalue(), (height, width))


def conversation(i, *sizes, answer="a thing"):
    shown = [{"type": "image"}] * len(sizes)
    messages = [
        {"role": "user", "content": [*shown, {"type": "text", "text": f"what is {i}?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return Conversation(str(i), messages, [picture(*s, i) for s in sizes], "set", i + 1)


class Records(NamedTuple):
    held: list
    repeat: float = 1.0

    def __getitem__(self, index):
        return self.held[index]

    def __len__(self):
        return len(self.held)


MIXED = Records([conversation(i, *[(20 + i, 30)] * (i % 3)) for i in range(9)])


@pytest.fixture(scope="module")
def measured(tiny_tokenizer):
    (m,), _ = packing.measure([MIXED], MODEL, DATA, tiny_tokenizer, progress=False)
    return m


def newline(tokenizer):
    return len(tokenizer.encode("\n"))


# --- measuring -------------------------------------------------------------------------------------------------------


@few
@given(
    sizes=st.lists(st.tuples(sides, sides), max_size=3),
    ratio=st.floats(0.1, 1),
    mode=st.sampled_from(["native_pad", "grid_match", "grid_pad"]),
    layout=st.sampled_from(["rowcol", "plain"]),
)
def test_a_row_is_as_long_as_measured_at_every_ratio(sizes, ratio, mode, layout, tiny_tokenizer):
    policy, cfg = PlanPolicy(tile=32, patch=8, max_tiles=9, min_side=8, mode=mode), TextConfig(layout=layout, coords=9)
    c, n = conversation(0, *sizes), newline(tiny_tokenizer)
    model = replace(MODEL, policy=policy, text=cfg)
    wide = replace(DATA, tile_buckets=(40,), lengths=(4096,))
    (m,), _ = packing.measure([Records([c])], model, wide, tiny_tokenizer, progress=False)
    seen = shown(c, sizes, ratio, policy, cfg, tiny_tokenizer)
    assert len(seen.prompt.ids) == m.words[0] + sum(packing.picture_tokens(p, cfg, n) for p in seen.plans)


def test_what_fits_no_row_is_in_the_ledger_and_not_in_the_schedule(tiny_tokenizer):
    long = conversation(2, answer="a thing " * 200)
    many = conversation(4, *[(90, 90)] * 3)
    source = Records([MIXED[0], MIXED[1], long, MIXED[2], many])
    (m,), ledger = packing.measure([source], MODEL, DATA, tiny_tokenizer, 0.5, progress=False)
    assert [(f.line, f.kind) for f in ledger.faults] == [(3, "too-long"), (5, "too-many-tiles")]
    assert list(m.usable) == [0, 1, 3]
    specs = packing.schedule([m], MODEL, DATA, newline(tiny_tokenizer), 0, 20)
    assert {i.index for s in specs for row in s.rows for i in row} == {0, 1, 3}
    with pytest.raises(DataError, match=r"set:3: too-long: .*2 of 5 records \(40.00%\)"):
        packing.measure([source], MODEL, DATA, tiny_tokenizer, 0.3, progress=False)


# --- schedule --------------------------------------------------------------------------------------------------------


@few
@given(
    st.lists(st.tuples(st.integers(5, 60), st.lists(st.tuples(sides, sides), max_size=2)), min_size=1, max_size=30),
    st.integers(1, 4), st.sampled_from([0.0, 0.5]), st.integers(0, 9),
)  # fmt: skip
def test_rows_hold_whole_conversations_in_the_shapes_of_their_bucket(records, batch, shrink, seed):
    """Whatever the lengths: no row is longer, or of more tiles, than its bucket, and no record comes twice before each
    that can be used came once, but for rows that still grow."""
    cfg = replace(DATA, batch=batch, shrink_prob=shrink)
    words, sizes = np.array([w for w, _ in records], np.int32), [s for _, s in records]

    def cost(index, ratio):
        plans = [plan.make(s, ratio, MODEL.policy) for s in sizes[index]]
        seen = sum(packing.picture_tokens(p, MODEL.text, 1) for p in plans)
        return int(words[index]) + seen, sum(p.n_tiles for p in plans)

    usable = np.array([i for i in range(len(words)) if not too_much(*cost(i, 1.0), cfg)], np.int32)
    m = packing.Measured(words, sizes, usable, 1.0)
    if not len(usable):
        with pytest.raises(DataError, match="no conversation"):
            packing.schedule([m], MODEL, cfg, 1, seed, 3)
        return
    specs = packing.schedule([m], MODEL, cfg, 1, seed, 8)
    assert len(specs) == 8
    for spec in specs:
        assert len(spec.rows) == batch
        for row in spec.rows:
            costs = [cost(item.index, item.ratio) for item in row]
            assert row
            assert sum(t for t, _ in costs) <= cfg.lengths[spec.bucket]
            assert sum(n for _, n in costs) <= cfg.tile_buckets[spec.bucket]
    assert specs[:5] == packing.schedule([m], MODEL, cfg, 1, seed, 5)


def test_an_epoch_shows_each_record_as_often_as_its_source_says():
    """Over many epochs: 3 records, 1 and 1/4 times an epoch; rows and batches that wait may hold some back."""
    n, every = np.full(8, 10, np.int32), np.arange(8, dtype=np.int32)
    sources = [packing.Measured(n, [[]] * 8, every, repeat) for repeat in (3.0, 1.0, 0.25)]
    cfg = replace(DATA, batch=2, lengths=(40, 40), shrink_prob=0.0)
    rng = np.random.default_rng(0)
    shown = Counter((i.source, i.index) for _ in range(100) for i in packing._epoch(sources, cfg, rng))
    assert all(shown[0, i] == 300 and shown[1, i] == 100 for i in range(8))
    assert sum(shown[2, i] for i in range(8)) == 200
    assert all(10 <= shown[2, i] <= 42 for i in range(8))
    specs = packing.schedule(sources, MODEL, cfg, 1, 0, 400)
    of = Counter(i.source for s in specs for row in s.rows for i in row)
    assert of[0] / of[1] == pytest.approx(3, rel=0.05)
    assert of[2] / of[1] == pytest.approx(0.25, rel=0.1)


def test_a_fraction_of_a_few_records_is_shown_now_and_then():
    """Never to draw one would wait forever."""
    m = packing.Measured(np.full(2, 10, np.int32), [[]] * 2, np.arange(2, dtype=np.int32), 0.1)
    assert len(packing.schedule([m], MODEL, DATA, 1, 0, 3)) == 3


def test_rows_are_well_filled():
    """What first fit is for: lengths of 5 to 59 in rows of 128 (one each would fill a quarter)."""
    rng = np.random.default_rng(0)
    n = 2000
    m = packing.Measured(rng.integers(5, 60, n).astype(np.int32), [[]] * n, np.arange(n, dtype=np.int32), 1.0)
    cfg = replace(DATA, batch=8, tile_buckets=(1,), lengths=(128,))
    specs = packing.schedule([m], MODEL, cfg, 1, 0, 50)
    fill = [sum(m.words[i.index] for i in row) / 128 for s in specs for row in s.rows]
    assert np.mean(fill) > 0.95


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_packed_row_answers_as_each_conversation_alone(tiny_tokenizer, tiny_params):
    """Logits and features of a row of three (one of text alone, one of two pictures), against one row each."""
    from hypervl_jax import train
    from hypervl_jax.data.pipeline import Batch

    cfg = dataclasses.replace(TINY, data=DATA)
    # one shape for all, so that one program will do
    held = [MIXED[0], MIXED[2], MIXED[4]]
    data = replace(DATA, tile_buckets=(8,), lengths=(160,))
    rows = [[(c, 1.0) for c in held], *([(c, 1.0)] for c in held)]
    batch = packing.collate(rows, MODEL, data, 0, tiny_tokenizer)

    @jax.jit
    def logits(b):
        seen = train.patches(tiny_params, cfg, "base", b)
        return train.row_logits(tiny_params, cfg, train.features(tiny_params, cfg, "base", seen), b)

    found = np.asarray(logits(Batch(*map(jax.numpy.asarray, batch))))
    assert np.isfinite(found).all()
    start = 0
    for k in range(3):
        n = int((batch.segments[k + 1] == 1).sum())
        assert (batch.segments[0][start : start + n] == k + 1).all()
        want = found[k + 1, :n]
        np.testing.assert_allclose(found[0, start : start + n], want, rtol=0, atol=1e-5 * np.abs(want).max())
        start += n
    assert (batch.segments[0][start:] == -1).all()


def test_a_packed_row_is_the_rows_of_its_conversations(tiny_tokenizer):
    held = [MIXED[1], MIXED[3], MIXED[5]]
    data = replace(DATA, tile_buckets=(9,), lengths=(160,))
    row = list(zip(held, (1.0, 0.5, 0.3), strict=True))
    batch = packing.collate([row], MODEL, data, 0, tiny_tokenizer)
    start = used = 0
    per = MODEL.policy.tokens_per_tile
    for c, ratio in row:
        plans = [plan.make(p.size, ratio, MODEL.policy) for p in c.pictures]
        alone = text.render(c.messages, plans, tiny_tokenizer, MODEL.text, add_generation_prompt=False)
        at = slice(start, start + len(alone.ids))
        np.testing.assert_array_equal(batch.ids[0, at], alone.ids)
        np.testing.assert_array_equal(batch.loss[0, at], alone.loss)
        np.testing.assert_array_equal(batch.positions[0, at], alone.positions)
        np.testing.assert_array_equal(batch.slots[0, at], np.where(alone.slots >= 0, alone.slots + used * per, -1))
        for p, q in zip(c.pictures, plans, strict=True):
            from hypervl_jax import image

            np.testing.assert_array_equal(batch.tiles[0, used : used + q.n_tiles], image.prepare(p.load(), q))
            np.testing.assert_array_equal(batch.mask[0, used : used + q.n_tiles], q.patch_mask())
            used += q.n_tiles
        start = at.stop


def test_a_packed_batch_is_one_that_training_takes(tiny_batches, tiny_tokenizer):
    batch = packing.collate([[(MIXED[0], 1.0), (MIXED[2], 1.0)]], MODEL, DATA, 1, tiny_tokenizer)
    for name, ours, theirs in zip(batch._fields, batch, tiny_batches[0], strict=True):
        assert (ours.dtype, ours.ndim) == (theirs.dtype, theirs.ndim), name
    assert ours.shape[2] == batch.tiles.shape[1] * MODEL.policy.patches_per_side**2
    assert (batch.names == -1).all()


def test_hosts_share_every_batch_and_any_step_can_be_the_first(measured, tiny_tokenizer):
    pytest.importorskip("grain", reason="needs the train extra")
    specs = packing.schedule([measured], MODEL, DATA, newline(tiny_tokenizer), 0, 6)
    args = [MIXED], specs, MODEL, DATA, tiny_tokenizer
    whole = list(packing.batches(*args))
    assert len(whole) == 6
    for start in (0, 1, 5):
        for a, b in zip(whole[start:], packing.batches(*args, start=start), strict=True):
            jax.tree.map(np.testing.assert_array_equal, a, b)
    for rows in ((0,), (1,), (1, 0)):
        for a, b in zip(whole, packing.batches(*args, rows=rows), strict=True):
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[list(rows)], y), a, b)  # noqa: B023


def test_prepared_records_are_packed(tmp_path, tiny_tokenizer):
    pytest.importorskip("tensorflow_datasets", reason="needs the train extra")
    from hypervl_jax.data import prepared, readers

    for i, c in enumerate(MIXED.held[:4]):
        for p in c.pictures:
            (tmp_path / f"{i}.png").write_bytes(p.source)
    rows = [
        {"id": c.id, "images": [f"{i}.png"] * len(c.pictures), "messages": c.messages}
        for i, c in enumerate(MIXED.held[:4])
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared.build(readers.parts([tmp_path / "a.jsonl"]), tmp_path / "out", progress=False)
    records = prepared.Records(tmp_path / "out", "a")
    (m,), _ = packing.measure([records], MODEL, DATA, tiny_tokenizer, progress=False)
    (want,), _ = packing.measure([Records(MIXED.held[:4])], MODEL, DATA, tiny_tokenizer, progress=False)
    np.testing.assert_array_equal(m.words, want.words)
    assert [[tuple(s) for s in sizes] for sizes in m.sizes] == want.sizes
    rows = [[(records[i], 1.0)] for i in range(3)], [[(MIXED[i], 1.0)] for i in range(3)]
    a, b = (packing.collate(r, MODEL, DATA, 1, tiny_tokenizer) for r in rows)
    jax.tree.map(np.testing.assert_array_equal, a, b)
