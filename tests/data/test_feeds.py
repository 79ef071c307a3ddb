"""What training is fed with: any step can be the first, and what is said to be shown is what is shown."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from hypervl_jax.data import feeds
from hypervl_jax.data.conversations import DataError

pytest.importorskip("grain", reason="needs the train extra")


def _like(name):
    """What another test file composes."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


packed = _like("test_packing")


@pytest.fixture(scope="module")
def cfg(tiny_config):
    how = replace(tiny_config.train, steps=6, stage0_steps=0, name_weight=0.0)
    return replace(tiny_config, data=packed.DATA, train=how)


@pytest.fixture(scope="module")
def talk(cfg, tiny_tokenizer):
    return feeds.Conversations(cfg, [packed.MIXED], tiny_tokenizer, progress=False)


@pytest.fixture(scope="module")
def screens(tiny_config, tiny_source, tiny_sheets, tiny_tokenizer, tiny_classes):
    cfg = replace(tiny_config, train=replace(tiny_config.train, steps=6, stage0_steps=2))
    return feeds.Screens(cfg, tiny_source, tiny_sheets, tiny_tokenizer, tiny_classes)


@pytest.mark.parametrize("name", ["talk", "screens"])
def test_any_step_can_be_the_first(name, request):
    feed: feeds.Feed = request.getfixturevalue(name)
    feed.check(progress=False)
    whole = list(feed.batches(0))
    assert len(whole) == 6
    for start in (1, 2, 5, 6):
        for a, b in zip(whole[start:], feed.batches(start), strict=True):
            jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", ["talk", "screens"])
def test_processes_that_share_the_rows_see_the_batch_together(name, request):
    feed: feeds.Feed = request.getfixturevalue(name)
    for step, (a, b) in enumerate(zip(feed.batches(1), feed.batches(1, rows=[1]), strict=True), 1):
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1:2], y), a, b)
        every = range(len(a.ids))
        assert feed.shown(step) == [said for row in every for said in feed.shown(step, [row])]
        assert len(feed.shown(step, [1])) < len(feed.shown(step))


def test_what_is_said_to_be_shown_is_shown(talk, screens, tiny_source, tiny_sheets):
    for step, batch in enumerate(screens.batches(0)):
        said = [line.split() for line in screens.shown(step)]
        assert [kind for kind, *_ in said] == ["sheet" if step < 2 else "screen"] * len(batch.ids)
        source = tiny_sheets if step < 2 else tiny_source
        for row, (_, i, _, ratio) in enumerate(said):
            if ratio == "1" and max(source[int(i)].image.shape[:2]) <= 32:
                h, w = source[int(i)].image.shape[:2]
                np.testing.assert_array_equal(batch.tiles[row, 0, :h, :w], source[int(i)].image)
    for step, batch in enumerate(talk.batches(0)):
        rows = talk.specs[step].rows
        assert [int(b.max()) for b in batch.segments] == [len(row) for row in rows]
        assert talk.shown(step) == [f"0:{i.index} at {i.ratio:g}" for row in rows for i in row]


def test_feeds_of_other_data_say_so(cfg, talk, screens, tiny_tokenizer, tiny_classes):
    assert screens.about == {"classes": list(tiny_classes)}
    assert talk.about == feeds.Conversations(cfg, [packed.MIXED], tiny_tokenizer, progress=False).about
    held = [*packed.MIXED.held[:-1], packed.conversation(8, answer="another thing")]
    for other in (packed.Records(held), packed.Records(packed.MIXED.held, 2.0), packed.Records(packed.MIXED.held[1:])):
        assert feeds.Conversations(cfg, [other], tiny_tokenizer, progress=False).about != talk.about
    json.dumps(talk.about)


def test_conversations_name_nothing(cfg, tiny_tokenizer):
    for named in ({"stage0_steps": 1}, {"name_weight": 0.5}):
        bad = replace(cfg, train=replace(cfg.train, **named))
        with pytest.raises(DataError, match=r"train\.stage0_steps and train\.name_weight must be 0"):
            feeds.Conversations(bad, [packed.MIXED], tiny_tokenizer, progress=False)


def test_as_many_may_be_left_out_as_the_config_says(cfg, tiny_tokenizer):
    source = packed.Records([*packed.MIXED.held, packed.conversation(9, answer="a thing " * 200)])
    with pytest.raises(DataError, match="too-long"):
        feeds.Conversations(cfg, [source], tiny_tokenizer, progress=False)
    loose = replace(cfg, data=replace(cfg.data, max_rate=0.2))
    feed = feeds.Conversations(loose, [source], tiny_tokenizer, progress=False)
    assert feed.ledger.lost == 1


def test_examples_are_first_turns(talk, screens, tiny_source):
    asked = talk.examples(3)
    assert [e.question for e in asked] == ["what is 0?", "what is 1?", "what is 2?"]
    assert [len(e.images) for e in asked] == [0, 1, 2]
    assert {e.truth for e in asked} == {"a thing"}
    first, second = screens.examples(2)
    assert first.question == tiny_source[0].questions[0].text
    assert second.truth == tiny_source[1].questions[1].answer
    assert screens.examples(100)
    assert list(feeds.texts([packed.MIXED]))[:2] == ["what is 0?", "a thing"]
