"""Decoding: one program, a stream and a full forward for every token give the same answer; padding gives nothing; what
is drawn from is what a float64 oracle draws from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import generate, plan, presets, text
from hypervl_jax.config import LlmConfig
from hypervl_jax.generate import GREEDY, Sampler, SamplerError
from hypervl_jax.model import hypervl, llm
from hypervl_jax.model.layers import unstack

NEW = 8
NEVER = 511  # an end that cannot come: it is forbidden


@pytest.fixture(scope="module")
def prompts(tiny_config, tiny_tokenizer):
    """Two questions of different length about pictures of different size, as ids and slots."""
    m = tiny_config.model
    out = []
    for size, question in [((40, 30), "what is this?"), ((30, 30), "where is the thing at the top?")]:
        p = plan.make(size, 1.0, m.policy)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = text.render(messages, [p], tiny_tokenizer, m.text)
        out.append((prompt.ids, prompt.slots))
    assert len(out[0][0]) != len(out[1][0])
    return out


@pytest.fixture(scope="module")
def features():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 48)), jnp.float32)


@pytest.fixture(scope="module")
def length(prompts):
    return max(len(ids) for ids, _ in prompts)


@pytest.fixture(scope="module")
def batch(prompts, features, length, tiny_params):
    """(embedded prompts [2 L D], left padding [2])."""
    ids, slots, pads = generate.pad_left(prompts, length, 0)
    return hypervl.embed(tiny_params, jnp.asarray(ids), jnp.asarray(slots), features), jnp.asarray(pads)


@pytest.fixture(scope="module")
def run(tiny_params, tiny_config):
    def run(x, pads, forbidden=(), end=NEVER, sampler=GREEDY, seed=0, drive=generate.generate, seen=None):
        banned = jnp.zeros(512, bool).at[jnp.array([*forbidden, NEVER])].set(True)
        return drive(tiny_params, tiny_config.model, x, pads, banned, jax.random.key(seed), sampler, end, NEW, seen)

    return run


@pytest.fixture(scope="module")
def streamed(tiny_params, tiny_config):
    """The stream as a driver like the loop: prefill, then one token after another, without the end."""

    def drive(params, cfg, x, pads, banned, key, sampler, end, new, seen=None):
        state = generate.prefill(params, cfg, x, pads, key, x.shape[1] + new, seen)
        said = [token for token, _ in generate.stream(params, cfg, state, banned, sampler, end, new)]
        return said[:-1] if said[-1] == end else said

    return drive


@pytest.fixture(scope="module")
def answers(run, batch):
    return np.asarray(run(*batch))


def test_greedy_equals_a_full_forward_for_every_token(
    answers, batch, prompts, features, tiny_params, tiny_config, length
):
    """Logits of every step, and the tokens; the full forward sees a row alone, without padding or cache."""
    cfg = tiny_config.model

    @jax.jit
    def next_logits(features, ids, slots, n):
        at = jnp.arange(ids.shape[1])[None]
        row = features, ids, slots, at, jnp.where(at < n, 0, -1)
        return llm.logits(tiny_params["llm"], hypervl.hidden(tiny_params, cfg, *row)[0, n - 1])

    banned = jnp.zeros(512, bool).at[NEVER].set(True)
    step = jax.jit(generate.sample_step, static_argnums=(1, 3, 5))
    state = generate.prefill(tiny_params, cfg, *batch, jax.random.key(0), length + NEW)
    cached, tokens = [state.logits], []
    for _ in range(NEW):
        state, token = step(tiny_params, cfg, state, GREEDY, banned, NEVER)
        cached.append(state.logits)
        tokens.append(token)
    assert answers.tolist() == np.stack(tokens, 1).tolist()

    for b, (ids, slots) in enumerate(prompts):
        row = np.zeros((1, length + NEW + 1), np.int32)
        at = np.full((1, length + NEW + 1), -1, np.int32)
        row[0, : len(ids)], at[0, : len(ids)] = ids, slots
        for k in range(NEW + 1):
            n = len(ids) + k
            want = np.asarray(next_logits(features[b : b + 1], jnp.asarray(row), jnp.asarray(at), n))
            np.testing.assert_allclose(cached[k][b], want, rtol=0, atol=1e-5 * np.abs(want).max())
            row[0, n] = np.where(banned, -np.inf, want).argmax()
        assert answers[b].tolist() == row[0, len(ids) : len(ids) + NEW].tolist()


@pytest.mark.parametrize("row", [0, 1])
def test_the_stream_yields_the_same_tokens(row, run, batch, answers, streamed):
    """And a row alone says what it says in a batch of other lengths."""
    x, pads = (a[row : row + 1] for a in batch)
    assert run(x, pads, drive=streamed) == answers[row].tolist()


def test_padding_on_the_left_has_no_effect(prompts, features, tiny_params, tiny_config, length, batch):
    """Neither how much of it there is nor what it holds."""
    ids, slots = prompts[0]
    prefill = jax.jit(generate.prefill, static_argnums=(1, 5))

    def logits(length, pad_id):
        i, s, pads = generate.pad_left([(ids, slots)], length, pad_id)
        x = hypervl.embed(tiny_params, jnp.asarray(i), jnp.asarray(s), features[:1])
        state = prefill(tiny_params, tiny_config.model, x, jnp.asarray(pads), jax.random.key(0), length + 4)
        return np.asarray(state.logits)

    want, padded = logits(len(ids), 0), logits(len(ids) + 5, 0)
    np.testing.assert_allclose(padded, want, rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(logits(len(ids) + 5, 17), padded)


def test_rows_that_ended_repeat_the_end_and_wait_for_the_others(run, batch, answers, streamed):
    """The end is a token that one row says and the other does not."""
    end = next(int(t) for t in answers[0] if t not in answers[1])
    at = answers[0].tolist().index(end)
    got = np.asarray(run(*batch, end=end))
    assert got[0].tolist() == answers[0, :at].tolist() + [end] * (NEW - at)
    assert got[1].tolist() == answers[1].tolist()
    x, pads = (a[:1] for a in batch)
    assert run(x, pads, end=end, drive=streamed) == answers[0, :at].tolist()


def test_forbidden_tokens_are_never_said(run, batch, answers):
    said = set(answers.ravel().tolist())
    got = np.asarray(run(*batch, forbidden=said))
    assert said.isdisjoint(got.ravel().tolist())


def test_sampling_is_a_function_of_its_key(run, batch, streamed):
    x, pads = (a[:1] for a in batch)
    hot = Sampler(temperature=2.0, top_k=40, top_p=0.9)
    a, b, c = (np.asarray(run(x, pads, sampler=hot, seed=s)).tolist()[0] for s in (1, 1, 2))
    assert a == b != c
    assert run(x, pads, sampler=hot, seed=1, drive=streamed) == a


def test_a_prompt_that_does_not_fit_is_an_error_with_its_length(prompts, length):
    with pytest.raises(ValueError, match=f"{length} tokens, more than {length - 1}"):
        generate.pad_left(prompts, length - 1, 0)


# --- reading in pieces -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 40])
def test_a_prompt_read_in_padded_pieces_is_the_prompt_read_at_once(room, prompts, features, tiny_params, tiny_config):
    """Runs of 16 with padding after what they hold, in a cache that grows in between."""
    cfg, (ids, slots), length = tiny_config.model, prompts[0], 16
    x = hypervl.embed(tiny_params, jnp.asarray(ids[None]), jnp.asarray(slots[None]), features[:1])
    none, key = jnp.zeros(1, jnp.int32), jax.random.key(0)
    want = generate.prefill(tiny_params, cfg, x, none, key, len(ids))
    extend = jax.jit(generate.extend, static_argnums=1)
    state = generate.start(cfg, 1, 64, np.dtype(np.float32))
    for start in range(0, len(ids), length - 3):
        piece = x[:, start : start + length - 3]
        count = piece.shape[1]
        piece = jnp.pad(piece, ((0, 0), (0, length - count), (0, 0)), constant_values=7)
        state = extend(tiny_params, cfg, generate.grow(state, 64 + room) if start else state, piece, count)
    assert int(state.at) == len(ids)
    np.testing.assert_allclose(state.logits, want.logits, rtol=0, atol=1e-5 * np.abs(want.logits).max())
    for got, cache in zip(jax.tree.leaves(state.caches), jax.tree.leaves(want.caches), strict=True):
        np.testing.assert_allclose(got[:, :, : len(ids)], cache, rtol=0, atol=1e-5 * np.abs(cache).max())


# --- choosing --------------------------------------------------------------------------------------------------------


def oracle(logits, seen, forbidden, s):
    """The distribution over the vocabulary, float64, one row at a time, by the definitions."""
    out = np.zeros(logits.shape)
    for row, mark, p in zip(logits.astype(np.float64), seen, out, strict=True):
        row = np.where(mark, np.where(row > 0, row / s.penalty, row * s.penalty), row)
        row = np.where(forbidden, -np.inf, row) / s.temperature
        order = np.argsort(-row, kind="stable")
        order = order[: s.top_k or len(order)]
        weight = np.exp(row[order] - row[order[0]])
        weight /= weight.sum()
        enough = next(n for n in range(1, len(order) + 1) if n == len(order) or weight[:n].sum() >= s.top_p)
        p[order[:enough]] = weight[:enough] / weight[:enough].sum()
    return out


SAMPLERS = [
    Sampler(1.0),
    Sampler(0.7, top_k=5),
    Sampler(0.7, top_k=1),
    Sampler(1.3, top_p=0.8),
    Sampler(1.0, top_p=1e-9),
    Sampler(1.0, penalty=1.7),
    Sampler(0.9, top_k=12, top_p=0.7, penalty=1.3),
    Sampler(2.0, top_k=1000, top_p=0.999, penalty=0.8),
]


@pytest.fixture(scope="module")
def drawn_from():
    """Logits of three rows, the tokens that each has seen, and those that none may say."""
    rng = np.random.default_rng(0)
    seen, forbidden = rng.random((3, 64)) < 0.3, rng.random(64) < 0.2
    return (3 * rng.normal(size=(3, 64))).astype(np.float32), seen, forbidden


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_what_is_drawn_from_is_the_oracles_distribution(sampler, drawn_from):
    got = jax.nn.softmax(generate.choices(*map(jnp.asarray, drawn_from), sampler), axis=-1)
    want = oracle(*drawn_from, sampler)
    np.testing.assert_array_equal(np.asarray(got) > 0, want > 0)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_what_is_drawn_from_is_that_of_transformers(sampler, drawn_from):
    """Their processors, in their order. What is forbidden is so before them here: rows they never see."""
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    theirs = pytest.importorskip("transformers", reason="needs the parity extra")
    logits, seen, _ = drawn_from
    chain = [
        theirs.RepetitionPenaltyLogitsProcessor(sampler.penalty),
        theirs.TemperatureLogitsWarper(sampler.temperature),
    ]
    chain += [theirs.TopKLogitsWarper(sampler.top_k)] if sampler.top_k else []
    chain += [theirs.TopPLogitsWarper(sampler.top_p)] if sampler.top_p < 1 else []
    got = generate.choices(jnp.asarray(logits), jnp.asarray(seen), jnp.zeros(64, bool), sampler)
    for row, mark, scores in zip(logits, seen, np.asarray(got), strict=True):
        want = torch.tensor(row[None])
        for process in chain:
            want = process(torch.tensor(np.flatnonzero(mark)[None]), want)
        want = want.numpy()[0]
        np.testing.assert_array_equal(np.isfinite(scores), np.isfinite(want))
        np.testing.assert_allclose(scores[np.isfinite(want)], want[np.isfinite(want)], rtol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS[::3], ids=str)
def test_samples_follow_the_oracles_distribution(sampler, drawn_from):
    """Pearson's chi-square of 4,000 draws, with a fixed key, below its 99.9 % quantile (Wilson and Hilferty)."""
    n, row = 4_000, [np.repeat(a[:1], 4_000, 0) for a in drawn_from[:2]]
    state = generate.choices(*map(jnp.asarray, (*row, drawn_from[2])), sampler)
    drawn = np.asarray(jax.random.categorical(jax.random.key(7), state))
    want = n * oracle(*(a[:1] for a in drawn_from[:2]), drawn_from[2], sampler)[0]
    count = np.bincount(drawn, minlength=64)
    assert not count[want == 0].any()
    small = (want > 0) & (want < 5)  # together, as the test needs
    bins = [(count[i], want[i]) for i in np.flatnonzero(want >= 5)] + [(count[small].sum(), want[small].sum())]
    chi = sum((o - e) ** 2 / e for o, e in bins if e > 0)
    free = sum(e > 0 for _, e in bins) - 1
    assert chi < (free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3 if free else 1e-9)


def test_equal_logits_stay_or_go_together():
    logits, none = jnp.asarray([[1.0, 2.0, 2.0, 0.0]]), jnp.zeros((1, 4), bool)
    for sampler in (Sampler(1.0, top_k=1), Sampler(1.0, top_p=0.3)):
        kept = np.isfinite(generate.choices(logits, none, none[0], sampler))
        assert kept.tolist() == [[False, True, True, False]]


def test_the_penalty_counts_prompt_and_answer(run, batch, prompts, streamed, answers):
    """A heavy one: nothing is said twice, and nothing that the prompt says; alike in a batch and alone, in both
    drivers."""
    x, pads = batch
    seen = jnp.asarray(generate.tokens_in([ids for ids, _ in prompts], 512))
    heavy = Sampler(penalty=1e6)
    got = np.asarray(run(x, pads, sampler=heavy, seen=seen))
    assert any(len(set(row)) < NEW for row in answers.tolist())  # without it some row repeats itself
    for b, row in enumerate(got.tolist()):
        assert len(set(row)) == NEW
        assert not set(row) & set(prompts[b][0].tolist())
        assert run(x[b : b + 1], pads[b : b + 1], sampler=heavy, seen=seen[b : b + 1], drive=streamed) == row


@pytest.mark.parametrize(
    ("bad", "why"),
    [({"temperature": -1.0}, "temperature -1.0"), ({"temperature": float("nan")}, "temperature nan"),
     ({"top_k": -1}, "top_k -1"), ({"top_p": 0.0}, "top_p 0.0"), ({"top_p": 1.1}, "top_p 1.1"),
     ({"penalty": 0.0}, "penalty 0.0"), ({"penalty": float("inf")}, "penalty inf")],
)  # fmt: skip
def test_a_sampler_that_cannot_be_is_refused(bad, why):
    with pytest.raises(SamplerError, match=why):
        Sampler(**bad)


def test_a_step_copies_no_cache():
    """By the compiler's account: beside its arguments a step needs less than one of the caches it was given."""
    c = LlmConfig(vocab=64, width=32, depth=2, heads=4, kv_heads=2, head_dim=32, mlp=64)
    cfg = dataclasses.replace(presets.tiny().model, llm=c)
    one = jnp.zeros((1, 1), jnp.int32)
    args = jnp.zeros((1, 1, c.width)), one, jnp.ones((1, 1, 1), bool)
    params = jax.eval_shape(lambda key: unstack(llm.Llm(c).init(key, *args)["params"]), jax.random.key(0))
    state = jax.eval_shape(lambda: generate.start(cfg, 1, 4096, jnp.dtype("float32")))

    def step(params, state):
        return generate.sample_step({"llm": params}, cfg, state, generate.GREEDY, jnp.zeros(c.vocab, bool), -1)

    memory = jax.jit(step, donate_argnums=1).lower(params, state).compile().memory_analysis()
    cache = state.caches[0].k
    assert memory.temp_size_in_bytes < cache.size * cache.dtype.itemsize
