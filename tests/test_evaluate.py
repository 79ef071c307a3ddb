"""What an answer is worth, and that batching changes none."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import evaluate, image, plan, text
from hypervl_jax.data.screens import Question, Screen
from hypervl_jax.evaluate import Accuracy, Answer, Job
from hypervl_jax.model import hypervl, llm

BLANK = np.zeros((50, 100, 3), np.uint8)


def screen(*questions, pixels=BLANK):
    return Screen(pixels, (), questions, "", 0.0)


# --- worth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval(correct, n, low, high):
    """The last row is Newcombe's worked example (1998, table I)."""
    got = evaluate.wilson(correct, n)
    assert got.mean == correct / n
    assert got.n == n
    assert (got.low, got.high) == pytest.approx((low, high), abs=2e-4)


def test_wilson_of_nothing_is_everything():
    assert evaluate.wilson(0, 0) == Accuracy(0.0, 0, 0.0, 1.0)


def test_point_is_the_centre_of_its_cell():
    assert evaluate.point("0 0", (50, 200), 100) == (1.0, 0.25)
    assert evaluate.point("99 99", (50, 200), 100) == (199.0, 49.75)
    assert evaluate.point(" 7  8 ", (100, 100), 100) == (7.5, 8.5)
    p = plan.make((50, 200), 1.0)
    assert evaluate.point("37 52", (50, 200), 100) == p.to_pixels((37, 52), 100)


@pytest.mark.parametrize("said", ["", "37", "37 52 1", "100 5", "5 100", "-1 5", "a b", "3.5 2", "٣ ٤", "³ 4"])
def test_what_is_no_point(said):
    assert evaluate.point(said, (50, 200), 100) is None


def test_right_is_exact_or_inside_the_box():
    name = Question("name", "what is it?", "anchor", None)
    assert evaluate.right(name, "anchor", (50, 100), 100)
    assert not evaluate.right(name, "anchors", (50, 100), 100)
    find = Question("find", "where is it?", "15 25", (10.0, 10.0, 20.0, 20.0))
    inside = {(x, y) for x in range(100) for y in range(100) if evaluate.right(find, f"{x} {y}", (50, 100), 100)}
    assert inside == {(x, y) for x in range(10, 20) for y in range(20, 40)}  # one cell is 1 x 0.5 pixels
    assert not evaluate.right(find, "here", (50, 100), 100)
    assert not evaluate.right(find._replace(box=None), "15 25", (50, 100), 100)


def test_accuracy_per_task():
    answers = [evaluate.Answer(0, "name", "a", "a", True), evaluate.Answer(1, "name", "b", "a", False)]
    answers.append(evaluate.Answer(1, "count", "2", "2", True))
    assert evaluate.accuracy(answers) == {"name": evaluate.wilson(1, 2), "count": evaluate.wilson(1, 1)}


def test_questions_about_one_screen_count_for_what_they_are_worth():
    """The same answers: four screens all right or all wrong tell less than sixteen screens asked once."""
    hits = [i < 4 for i in range(8)]
    alone = [Answer(i, "name", "a", "a", hits[i]) for i in range(8)]
    alike = [Answer(i // 4, "name", "a", "a", hits[i]) for i in range(8)]
    assert evaluate.accuracy(alone)["name"] == pytest.approx(evaluate.wilson(4, 8))
    assert evaluate.accuracy(alike)["name"] == pytest.approx(evaluate.wilson(4, 8, effective=2.0))
    spread = [Answer(i % 2, "name", "a", "a", hits[i]) for i in range(8)]  # every screen half right
    assert evaluate.accuracy(spread)["name"] == pytest.approx(evaluate.wilson(4, 8))  # never more than were asked
    sure = [Answer(i // 4, "name", "a", "a", True) for i in range(8)]
    assert evaluate.accuracy(sure)["name"] == pytest.approx(evaluate.wilson(8, 8, effective=2.0))


def test_majority_is_the_best_that_one_answer_can_do():
    named = [Question("name", "?", a, None) for a in ("cat", "cat", "dog")]
    boxes = [(0.0, 0.0, 30.0, 30.0), (20.0, 20.0, 50.0, 50.0), (80.0, 0.0, 100.0, 10.0)]
    found = [Question("find", "?", "", b) for b in boxes]
    screens = [screen(n, f) for n, f in zip(named, found, strict=True)]
    got = evaluate.majority(screens, 100)
    best = max(
        sum(evaluate.right(f, f"{x} {y}", (50, 100), 100) for f in found) / 3 for x in range(100) for y in range(100)
    )
    assert got == pytest.approx({"name": 2 / 3, "find": best})
    assert best == pytest.approx(2 / 3)


def test_tile_buckets_hold_every_plan(tiny_config):
    cfg = tiny_config.model
    sizes = evaluate.tile_buckets(cfg)
    assert sizes[0] == 1
    assert sizes[-1] == cfg.policy.max_tiles + cfg.policy.thumbnail
    assert list(sizes) == sorted(set(sizes))
    assert all(b <= 2 * a or b == 3 for a, b in pairwise(sizes))


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screens(tiny_source):
    """Of one tile and of several, by turns."""
    order = np.argsort(tiny_source.sizes.prod(1))
    return [tiny_source[i] for pair in zip(order[:3], order[-3:], strict=True) for i in pair]


def test_answers_of_a_batch_are_those_one_by_one(tiny_model, screens):
    """However a picture is grouped, padded and filled up, its answers are its own, in the order asked."""
    shrink = (1.0, 0.5, 0.8, 1.0, 0.3, 1.0)
    asked = ("what is this?", "how many hammer?", "where is the anchor at the top left, or the bottom right?")
    jobs = [Job(s.image, r, asked[: 1 + i % 3]) for i, (s, r) in enumerate(zip(screens, shrink, strict=True))]
    together = evaluate.answer(tiny_model, "base", jobs, batch=4)
    assert len({plan.make(j.image.shape[:2], j.ratio, tiny_model.config.policy).n_tiles for j in jobs}) > 1
    assert [len(a) for a in together] == [len(j.questions) for j in jobs]
    for job, answers in zip(jobs, together, strict=True):
        alone = [
            evaluate.answer(tiny_model, "base", [job._replace(questions=(q,))], batch=1)[0][0] for q in job.questions
        ]
        assert list(answers) == alone
    assert len(set(together)) > 1


def test_shuffled_shows_the_next_picture_at_its_own_ratio(tiny_model, screens, monkeypatch):
    seen = []

    def answer(model, branch, jobs, progress):
        seen.extend(jobs)
        return [tuple(j.questions) for j in jobs]

    monkeypatch.setattr(evaluate, "answer", answer)
    shrink = np.linspace(0.5, 1, len(screens))
    got = evaluate.run(tiny_model, "base", screens, shrink, shuffled=True)
    for i, job in enumerate(seen):
        nxt = (i + 1) % len(screens)
        assert job.image is screens[nxt].image
        assert job.ratio == shrink[nxt]
        assert job.questions == tuple(q.text for q in screens[i].questions)
    assert [(a.screen, a.truth) for a in got] == [(i, q.answer) for i, s in enumerate(screens) for q in s.questions]


def test_losses_of_true_answers(tiny_model, screens):
    """Against one screen and one question at a time, written out."""
    shrink = (1.0, 0.5, 1.0, 1.0, 0.7, 1.0)
    got = evaluate.answer_losses(tiny_model, "base", screens, shrink, 4)
    assert np.isnan(got[:, 3]).all()  # tiny screens have three questions at most
    for i in (0, 1):
        s, r = screens[i], shrink[i]
        for j, q in enumerate(s.questions):
            assert got[i, j] == pytest.approx(direct(tiny_model, "base", s.image, r, q), rel=1e-3)


def direct(model, branch, pixels, ratio, question):
    """Mean nats a token of the answer and its end, from the probabilities of a plain forward pass."""
    cfg, tok = model.config, model.tokenizer
    p = plan.make(pixels.shape[:2], ratio, cfg.policy)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
        {"role": "assistant", "content": question.answer},
    ]
    row = text.render(messages, [p], tok, cfg.text, add_generation_prompt=False)

    @jax.jit
    def logits(params, tiles, mask):
        features = hypervl.encode_batch(params, cfg, branch, tiles, mask)
        rows = (jnp.asarray(a)[None] for a in (row.ids, row.slots, row.positions, row.segments))
        return llm.logits(
            params["llm"], hypervl.hidden(params, cfg, features.reshape(1, -1, features.shape[-1]), *rows)
        )

    chance = jax.nn.log_softmax(
        logits(model.params, jnp.asarray(image.prepare(pixels, p)), jnp.asarray(p.patch_mask()))[0]
    )
    nats = [-chance[t - 1, row.ids[t]] for t in np.flatnonzero(row.loss)]
    assert len(nats) >= 2
    return float(np.mean(nats))


def test_worth_averages_to_the_mean_over_tasks():
    """Three easy questions and a hard one: by questions 3 of 4 are right, by tasks a half."""
    answers = [evaluate.Answer(i, "name", "", "", True) for i in (0, 0, 1)]
    answers.append(evaluate.Answer(2, "read", "", "", False))
    found = evaluate.worth(answers, 4)
    assert found.mean() == pytest.approx(0.5)
    assert (found > 0).tolist() == [True, True, False, False]


def test_drift_is_the_divergence_of_the_answers_tokens(tiny_model, tiny_source):
    """Row by row in float64, from logits of one row at a time."""
    from hypervl_jax import ask, text
    from hypervl_jax.model import hypervl, llm

    cfg, screens = tiny_model.config, [tiny_source[i] for i in range(3)]
    norm = {"weight": tiny_model.params["llm"]["norm"]["weight"] * 0.8}
    other = tiny_model.params | {"llm": tiny_model.params["llm"] | {"norm": norm}}
    found = evaluate.drift(tiny_model, other, "base", screens)
    for got, s in zip(found, screens, strict=True):
        seen = ask.see(tiny_model, s.image, vrc=False)
        pairs = [(q.text, q.answer) for q in s.questions]
        row = text.render_questions(seen.plan, pairs, tiny_model.tokenizer, cfg.text)
        args = (
            jnp.asarray(seen.features)[None],
            *(jnp.asarray(x)[None] for x in (row.ids, row.slots, row.positions, row.segments)),
        )
        p, q = (
            np.asarray(llm.logits(w["llm"], hypervl.hidden(w, cfg, *args)), np.float64)[0]
            for w in (tiny_model.params, other)
        )
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        answers = np.flatnonzero(row.loss) - 1
        np.testing.assert_allclose(got[0], (np.exp(p) * (p - q)).sum(-1)[answers].sum(), rtol=1e-3)
        assert got[1] == (p.argmax(-1) == q.argmax(-1))[answers].sum()
        assert got[2] == len(answers)
    np.testing.assert_allclose(evaluate.drift(tiny_model, tiny_model.params, "base", screens)[:, 0], 0, atol=1e-5)
