"""One picture, one question: the same answer as the batched evaluation gives."""

import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import ask, evaluate, generate, plan
from hypervl_jax.model import hypervl

QUESTION = "what is at the top left?"


@pytest.fixture(scope="module")
def pictures(tiny_source):
    """One of several tiles, one of a single tile."""
    sizes = tiny_source.sizes
    several = int(np.argmax(sizes.prod(1)))
    assert sizes[several].min() > 32 or sizes[several].max() > 64
    return [tiny_source[several].image, tiny_source[several].image[:30, :30].copy()]


@pytest.mark.parametrize("branch", ["base", "large"])
def test_it_answers_as_evaluation_does(branch, tiny_model, pictures):
    jobs = [evaluate.Job(p, r, (QUESTION,)) for p in pictures for r in (1.0,)]
    want = evaluate.answer(tiny_model, branch, jobs, batch=4)
    for picture, (said,) in zip(pictures, want, strict=True):
        seen = ask.see(tiny_model, picture, branch, vrc=False)
        pieces = list(ask.answer(tiny_model, seen, QUESTION, new=evaluate.NEW))
        assert "".join(pieces).strip() == said
    assert any(said for (said,) in want)


def test_pieces_come_as_they_are_known(tiny_model, pictures):
    seen = ask.see(tiny_model, pictures[0], "base", vrc=False)
    stream = ask.answer(tiny_model, seen, QUESTION, new=8)
    first = next(stream)
    rest = list(stream)
    assert first
    assert rest
    assert first + "".join(rest) == "".join(ask.answer(tiny_model, seen, QUESTION, new=8))


def test_a_seed_and_a_temperature(tiny_model, pictures):
    seen = ask.see(tiny_model, pictures[1], "base", vrc=False)
    how = [(0.0,), (0.0,), (5.0, 1), (5.0, 1), (5.0, 2), (5.0,), (5.0,)]
    greedy, same, hot, again, *others = ("".join(ask.answer(tiny_model, seen, QUESTION, 8, *h)) for h in how)
    assert greedy == same
    assert hot == again
    assert len({greedy, hot, *others}) == 5  # without a seed another one each time


@pytest.mark.parametrize(("tokens", "ended"), [(3, True), (4, False)])
def test_it_says_whether_the_answer_ended(tiny_model, pictures, monkeypatch, tokens, ended):
    seen = ask.see(tiny_model, pictures[1], "base", vrc=False)
    monkeypatch.setattr(generate, "stream", lambda *_: iter(tiny_model.tokenizer.encode("1234")[:tokens]))
    stream = ask.answer(tiny_model, seen, QUESTION, new=4)
    assert "".join(next(stream) for _ in range(tokens)) == "1234"[:tokens]
    with pytest.raises(StopIteration) as stopped:
        next(stream)
    assert stopped.value.value is ended


def test_tiles_one_by_one_are_the_tiles_together(tiny_model, pictures):
    from hypervl_jax import image

    seen, cfg = ask.see(tiny_model, pictures[0], "large", vrc=False), tiny_model.config
    assert seen.plan.n_tiles > 1
    tiles, mask = image.prepare(pictures[0], seen.plan), seen.plan.patch_mask()
    together = hypervl.encode_batch(tiny_model.params, cfg, "large", jnp.asarray(tiles), jnp.asarray(mask))
    got, want = np.asarray(seen.features[0]), np.asarray(together).reshape(seen.features.shape[1:])
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_vrc_chooses_the_ratio_of_the_plan(tiny_model, pictures):
    ratio = ask.ratio_of(tiny_model, pictures[0])
    seen = ask.see(tiny_model, pictures[0], "base", vrc=True)
    assert tiny_model.config.vrc.min_ratio <= ratio <= 1
    assert seen.plan == plan.make(pictures[0].shape[:2], ratio, tiny_model.config.policy)
    full = ask.see(tiny_model, pictures[0], "base", vrc=False)
    assert full.plan.ratio == 1
    scaled = tiny_model._replace(info={"vrc_scale": tiny_model.info["vrc_scale"] / 2})
    assert ask.ratio_of(scaled, pictures[0]) < ratio or ratio == tiny_model.config.vrc.min_ratio
