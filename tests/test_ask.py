"""One picture, one question: the same answer as the batched evaluation gives. Nothing is read twice."""

import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import ask, evaluate, generate, lengths, plan, text
from hypervl_jax.generate import GREEDY, Sampler
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
        pieces = list(ask.answer(tiny_model, [seen], QUESTION, new=evaluate.NEW))
        assert "".join(pieces).strip() == said
    assert any(said for (said,) in want)


def test_pieces_come_as_they_are_known(tiny_model, pictures):
    seen = ask.see(tiny_model, pictures[0], "base", vrc=False)
    stream = ask.answer(tiny_model, [seen], QUESTION, new=8)
    first = next(stream)
    rest = list(stream)
    assert first
    assert rest
    assert first + "".join(rest) == "".join(ask.answer(tiny_model, [seen], QUESTION, new=8))


def test_a_seed_and_a_temperature(tiny_model, pictures):
    seen = ask.see(tiny_model, pictures[1], "base", vrc=False)
    hot = Sampler(5.0)
    how = [(GREEDY,), (GREEDY,), (hot, 1), (hot, 1), (hot, 2), (hot,), (hot,)]
    greedy, same, hot, again, *others = ("".join(ask.answer(tiny_model, [seen], QUESTION, 8, *h)) for h in how)
    assert greedy == same
    assert hot == again
    assert len({greedy, hot, *others}) == 5  # without a seed another one each time


@pytest.mark.parametrize(("tokens", "ended"), [(3, True), (4, False)])
def test_it_says_whether_the_answer_ended(tiny_model, pictures, monkeypatch, tokens, ended):
    seen = ask.see(tiny_model, pictures[1], "base", vrc=False)
    tok = tiny_model.tokenizer
    ids = [*tok.encode("1234")[:tokens], tok.special("<|im_end|>")][:4]
    monkeypatch.setattr(generate, "stream", lambda params, cfg, state, *_: ((i, state) for i in ids))
    stream = ask.answer(tiny_model, [seen], QUESTION, new=4)
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
    got, want = seen.features, np.asarray(together).reshape(seen.features.shape)
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


def test_a_view_is_its_pixels_plan_and_branch(tiny_model, pictures):
    first = ask.view(tiny_model, pictures[0], "base", vrc=False)
    assert first == ask.view(tiny_model, pictures[0].copy(), "base", vrc=False)
    other = pictures[0].copy()
    other[0, 0, 0] ^= 1
    turned = np.ascontiguousarray(pictures[0].reshape(pictures[0].shape[1], -1, 3))  # the same bytes, another shape
    different = [
        ("base", True, pictures[0]),
        ("large", False, pictures[0]),
        ("base", False, other),
        ("base", False, turned),
    ]
    assert all(first != ask.view(tiny_model, p, branch, vrc) for branch, vrc, p in different)


# --- reading what is new ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tiny_model, pictures):
    return [ask.see(tiny_model, p, "base", vrc=False) for p in pictures]


def rendered(model, seen, *said):
    """A conversation whose first question shows the pictures."""
    first = {"role": "user", "content": [*[{"type": "image"}] * len(seen), {"type": "text", "text": said[0]}]}
    rest = [{"role": ("user", "assistant")[n % 2], "content": words} for n, words in enumerate(said[1:], 1)]
    return text.render([first, *rest], [s.plan for s in seen], model.tokenizer, model.config.text)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_second_turn_reads_what_is_new_and_gives_the_logits_of_reading_all(count, tiny_model, seen):
    """Also where the cache has to grow in between."""
    shown = seen[:count]
    prompt = rendered(tiny_model, shown, QUESTION)
    one = ask.read(tiny_model, prompt, shown, 8)
    assert one.fed == len(prompt.ids) == int(one.state.at)
    long = rendered(tiny_model, shown, QUESTION, "it is a thing", "and what is that? " * 9)
    whole = ask.read(tiny_model, long, shown, 200)
    two = ask.read(tiny_model, long, shown, 200, one)
    assert two.room == whole.room > 128
    assert two.fed == len(long.ids) - len(prompt.ids)
    assert (whole.fed, whole.marks) == (len(long.ids), two.marks)
    want = np.asarray(whole.state.logits)
    np.testing.assert_allclose(two.state.logits, want, rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(two.state.seen, whole.state.seen)


def test_what_was_said_is_not_read_again(tiny_model, seen):
    """An answer that the tokenizer writes as the model did stands in the cache already."""
    prompt = rendered(tiny_model, seen, QUESTION)
    said = list(ask.say(tiny_model, ask.read(tiny_model, prompt, seen, 8), 8))
    answer, said = "".join(piece for piece, _ in said), said[-1][1]
    longer = rendered(tiny_model, seen, QUESTION, answer, QUESTION)
    whole = ask.read(tiny_model, longer, seen, 8)
    same = next((n for n, (a, b) in enumerate(zip(said.marks, whole.marks, strict=False)) if a != b), len(said.marks))
    again = ask.read(tiny_model, longer, seen, 8, said)
    assert again.fed == len(longer.ids) - same < len(longer.ids) - len(prompt.ids)
    want = np.asarray(whole.state.logits)
    np.testing.assert_allclose(again.state.logits, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_another_picture_in_the_same_place_is_read(tiny_model, pictures, seen):
    """Token ids and slots are alike; what they stand for is not."""
    other = ask.see(tiny_model, np.ascontiguousarray(255 - pictures[1]), "base", vrc=False)
    assert other.plan == seen[1].plan
    prompt = rendered(tiny_model, [other], QUESTION)
    before = ask.read(tiny_model, rendered(tiny_model, [seen[1]], QUESTION), [seen[1]], 8)
    whole = ask.read(tiny_model, prompt, [other], 8)
    got = ask.read(tiny_model, prompt, [other], 8, before)
    assert got.fed > len(prompt.ids) - int((prompt.slots >= 0).argmax()) - 1
    np.testing.assert_allclose(
        got.state.logits, whole.state.logits, rtol=0, atol=1e-5 * np.abs(whole.state.logits).max()
    )


def test_the_same_prompt_again_reads_its_last_token(tiny_model, seen):
    prompt = rendered(tiny_model, seen[1:], QUESTION)
    first = ask.read(tiny_model, prompt, seen[1:], 8)
    want = np.asarray(first.state.logits)
    again = ask.read(tiny_model, prompt, seen[1:], 8, first)
    assert again.fed == 1
    np.testing.assert_allclose(again.state.logits, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert not first.whole  # its buffers were given away ...
    assert ask.read(tiny_model, prompt, seen[1:], 8, first).fed == len(prompt.ids)  # ... so all is read


def test_programs_are_one_a_length_whatever_the_pictures(tiny_model, seen):
    """Prompts of other lengths and pictures run through the same programs."""
    ask._feed.clear_cache()
    shapes = set()
    for shown in (seen[1:], seen, seen[:1], []):
        for extra in range(3):
            prompt = rendered(tiny_model, shown, QUESTION + " is it" * extra)
            ask.read(tiny_model, prompt, shown, 8)
            layout = ask.lay_out(prompt, [s.view for s in shown], 8)
            shapes |= {(length, layout.room) for _, length in layout.runs}
    assert {length for length, _ in shapes} < set(lengths.PREFILL)
    assert ask._feed._cache_size() == len(shapes) <= 4


def test_saying_more_than_there_is_room_for_is_refused(tiny_model, seen):
    read = ask.read(tiny_model, rendered(tiny_model, seen[1:], QUESTION), seen[1:], 8)
    with pytest.raises(ValueError, match="no room for 500 more"):
        next(ask.say(tiny_model, read, 500))


def test_stop_strings_end_an_answer(tiny_model, seen):
    whole = "".join(ask.answer(tiny_model, seen[1:], QUESTION, new=8))
    at = len(whole) // 2
    stop = whole[at : at + 2]
    prompt = ask.read(tiny_model, rendered(tiny_model, seen[1:], QUESTION), seen[1:], 8)
    said = list(ask.say(tiny_model, prompt, 8, stops=[stop]))
    assert "".join(piece for piece, _ in said) == whole[: whole.index(stop)]
    assert said[-1][1].ended
    assert len(said) < 8  # what comes after it is not computed
