"""Decoding: one program, a stream and a full forward for every token give the same answer; padding gives nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import generate, plan, text
from hypervl_jax.generate import Sampler
from hypervl_jax.model import hypervl, llm

NEW = 8
NEVER = 511  # an end that cannot come: it is forbidden
GREEDY = Sampler()


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
    def run(x, pads, forbidden=(), end=NEVER, sampler=GREEDY, seed=0, drive=generate.generate):
        banned = jnp.zeros(512, bool).at[jnp.array([*forbidden, NEVER])].set(True)
        return drive(tiny_params, tiny_config.model, x, pads, banned, jax.random.key(seed), sampler, end, NEW)

    return run


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
            np.testing.assert_allclose(cached[k][b], want, rtol=0, atol=1e-4 * np.abs(want).max())
            row[0, n] = np.where(banned, -np.inf, want).argmax()
        assert answers[b].tolist() == row[0, len(ids) : len(ids) + NEW].tolist()


@pytest.mark.parametrize("row", [0, 1])
def test_the_stream_yields_the_same_tokens(row, run, batch, answers):
    x, pads = (a[row : row + 1] for a in batch)
    assert list(run(x, pads, drive=generate.stream)) == answers[row].tolist()


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


def test_rows_that_ended_repeat_the_end_and_wait_for_the_others(run, batch, answers):
    """The end is a token that one row says and the other does not."""
    end = next(int(t) for t in answers[0] if t not in answers[1])
    at = answers[0].tolist().index(end)
    got = np.asarray(run(*batch, end=end))
    assert got[0].tolist() == answers[0, :at].tolist() + [end] * (NEW - at)
    assert got[1].tolist() == answers[1].tolist()
    x, pads = (a[:1] for a in batch)
    assert list(run(x, pads, end=end, drive=generate.stream)) == answers[0, :at].tolist()


def test_forbidden_tokens_are_never_said(run, batch, answers):
    said = set(answers.ravel().tolist())
    got = np.asarray(run(*batch, forbidden=said))
    assert said.isdisjoint(got.ravel().tolist())


def test_sampling_is_a_function_of_its_key(run, batch):
    x, pads = (a[:1] for a in batch)
    hot = Sampler(temperature=2.0)
    a, b, c = (np.asarray(run(x, pads, sampler=hot, seed=s)).tolist()[0] for s in (1, 1, 2))
    assert a == b != c
    assert list(run(x, pads, sampler=hot, seed=1, drive=generate.stream)) == a


def test_a_prompt_that_does_not_fit_is_an_error_with_its_length(prompts, length):
    with pytest.raises(ValueError, match=f"{length} tokens, more than {length - 1}"):
        generate.pad_left(prompts, length - 1, 0)
