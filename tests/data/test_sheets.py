"""Sheets: what is named is there, held-out art is not."""

import numpy as np
import pytest

from hypervl_jax.data import sheets
from hypervl_jax.data.assets import Assets
from hypervl_jax.presets import nano, quickstart

ASSETS, CFG = Assets.load(), quickstart().data.screens


@pytest.fixture(scope="module")
def some():
    return [sheets.record(ASSETS, CFG, "train", i) for i in range(60)]


def test_a_sheet_depends_on_its_index_alone(some):
    again = sheets.record(ASSETS, CFG, "train", 7)
    np.testing.assert_array_equal(again.image, some[7].image)
    assert again.things == some[7].things
    assert not (some[7].image == some[8].image).all()


@pytest.mark.parametrize("cfg", [CFG, nano().data.screens], ids=lambda c: c.name)
def test_things_are_inside_named_and_apart(cfg):
    words = set(ASSETS.words[: cfg.concepts])
    for sheet in (sheets.record(ASSETS, cfg, "train", i) for i in range(60)):
        assert sheet.image.shape == (cfg.sheet_side, cfg.sheet_side, 3)
        assert 1 <= sum(len(t.concept) if t.kind == "digit" else 1 for t in sheet.things) <= sheets.most(cfg.sheet_side)
        taken = np.zeros(sheet.image.shape[:2], int)
        for t in sheet.things:
            x0, y0, x1, y1 = map(int, t.box)
            assert 0 <= x0 < x1 <= cfg.sheet_side
            assert 0 <= y0 < y1 <= cfg.sheet_side
            assert (
                (1 <= len(t.concept) <= cfg.digits and t.concept.isdigit()) if t.kind == "digit" else t.concept in words
            )
            taken[y0:y1, x0:x1] += 1
        assert taken.max() == 1


def test_training_sheets_show_no_held_out_art(some):
    held = {*ASSETS.held_out, *ASSETS.fonts[1]}
    assert not held & {t.artist for s in some for t in s.things}
    test = [sheets.record(ASSETS, CFG, "test_unseen", i) for i in range(30)]
    assert {t.artist for s in test for t in s.things if t.kind == "picture"} <= set(ASSETS.held_out)


def test_things_can_be_seen(some):
    """Inside its box a thing differs from a flat colour."""
    for sheet in some:
        for t in sheet.things:
            x0, y0, x1, y1 = map(int, t.box)
            assert sheet.image[y0:y1, x0:x1].reshape(-1, 3).std(0).max() > 3


def test_without_reading_there_are_no_digits():
    from dataclasses import replace

    blind = replace(nano().data.screens, tasks=("name",))
    assert all(t.kind == "picture" for i in range(10) for t in sheets.record(ASSETS, blind, "train", i).things)
