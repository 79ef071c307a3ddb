"""Decoding: prefill, one `sample_step`, and two drivers over it, a compiled loop and a stream.

Prompts of a batch are padded on the left, so that all rows write their next token at the same cache position. A
conversation is one row: `extend` reads more of it into the cache it has.
Axes: B batch, L prompt, S cache, V vocabulary, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hypervl_jax.config import ModelConfig
from hypervl_jax.model import llm
from hypervl_jax.model.llm import KVCache


class SamplerError(ValueError):
    """A setting of the sampler that cannot be; the message begins with its name."""


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen; as it stands, the likeliest one. See `choices` for what each does.

    Raises `SamplerError` for a value that makes no sense.
    """

    temperature: float = 0.0  # 0 is greedy, 1 draws as the model predicts
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability; 1: all
    penalty: float = 1.0  # of tokens that stand in the prompt or the answer already; 1: none

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SamplerError(f"temperature {self.temperature}: 0 is greedy, 1 samples as the model predicts")
        if self.top_k < 0:
            raise SamplerError(f"top_k {self.top_k}: choose 1 or more tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise SamplerError(f"top_p {self.top_p}: choose a probability above 0, up to 1 for all tokens")
        if not (math.isfinite(self.penalty) and self.penalty > 0):
            raise SamplerError(f"penalty {self.penalty}: 1 is none, 1.1 is usual, below 1 invites repetition")


GREEDY = Sampler()


class DecodeState(NamedTuple):
    """Everything the next token depends on."""

    logits: Float[Array, "B V"]
    caches: tuple[KVCache, ...]
    at: Int[Array, ""]  # cache position of the next token
    pads: Int[Array, " B"]  # left padding of each row
    done: Bool[Array, " B"]
    key: Array
    seen: Bool[Array, "B V"]  # tokens of prompt and answer, for the repetition penalty


def pad_left(rows: list[tuple[np.ndarray, np.ndarray]], length: int, pad_id: int) -> tuple[np.ndarray, ...]:
    """(ids, slots) of each prompt -> (ids i32[B L], slots i32[B L], pads i32[B]). Raises `ValueError` with the length
    needed if one does not fit."""
    longest = max(len(ids) for ids, _ in rows)
    if longest > length:
        raise ValueError(f"a prompt has {longest} tokens, more than {length}")
    ids = np.full((len(rows), length), pad_id, np.int32)
    slots = np.full((len(rows), length), -1, np.int32)
    for b, (i, s) in enumerate(rows):
        ids[b, length - len(i) :], slots[b, length - len(i) :] = i, s
    return ids, slots, np.array([length - len(i) for i, _ in rows], np.int32)


# --- reading ---------------------------------------------------------------------------------------------------------


def start(cfg: ModelConfig, batch: int, length: int, dtype: np.dtype) -> DecodeState:
    """The state that has read nothing, with a cache of `length` positions."""
    return DecodeState(
        jnp.zeros((batch, cfg.llm.vocab), jnp.float32),
        llm.init_cache(cfg.llm, batch, length, dtype),
        jnp.int32(0),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
        jax.random.key(0),
        jnp.zeros((batch, cfg.llm.vocab), bool),
    )


def extend(
    params: dict, cfg: ModelConfig, state: DecodeState, x: Float[Array, "B L D"], count: Int[Array, ""] | int
) -> DecodeState:
    """Reads `count` more embedded tokens, those of `x`; what follows them in `x` is padding. S must be at least
    `state.at` + L: padding is written too, and is written over before anyone may see it."""
    at = state.at + jnp.arange(x.shape[1])
    slots = jnp.arange(state.caches[0].k.shape[2])
    visible = (slots <= at[:, None]) & (slots >= state.pads[:, None, None])
    positions = jnp.maximum(at - state.pads[:, None], 0)
    net = llm.Llm(cfg.llm, scan=False, block=llm.CpuBlock if jax.default_backend() == "cpu" else llm.Block)
    out: Any = net.apply({"params": params["llm"]}, x, positions, visible, state.caches, state.at)
    hidden, caches = out
    last = jax.lax.dynamic_index_in_dim(hidden, count - 1, 1, keepdims=False)
    return state._replace(logits=llm.logits(params["llm"], last), caches=caches, at=state.at + count)


def prefill(
    params: dict,
    cfg: ModelConfig,
    x: Float[Array, "B L D"],
    pads: Int[Array, " B"],
    key: Array,
    cache_length: int,
    seen: Bool[Array, "B V"] | None = None,
) -> DecodeState:
    """Runs the embedded prompts (`hypervl.embed`) and fills a cache of `cache_length` >= L positions. `seen` marks
    their tokens (`tokens_in`), where they are to be penalised."""
    state = start(cfg, x.shape[0], cache_length, x.dtype)._replace(pads=pads, key=key)
    return extend(params, cfg, state if seen is None else state._replace(seen=seen), x, x.shape[1])


def tokens_in(rows: list[np.ndarray], vocab: int) -> Bool[np.ndarray, "B V"]:
    """Which tokens of the vocabulary stand in each row of ids."""
    out = np.zeros((len(rows), vocab), bool)
    for seen, ids in zip(out, rows, strict=True):
        seen[ids] = True
    return out


def grow(state: DecodeState, length: int) -> DecodeState:
    """The same state with room for `length` positions."""
    more = length - state.caches[0].k.shape[2]
    longer = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, more), (0, 0))), state.caches)
    return state._replace(caches=longer)


# --- choosing --------------------------------------------------------------------------------------------------------


def choices(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], forbidden: Bool[Array, " V"], sampler: Sampler
) -> Float[Array, "B V"]:
    """Logits of the distribution that the next token is drawn from, -inf for what it cannot be.

    As in transformers, in this order: logits of `seen` tokens are divided by the penalty where positive, else
    multiplied by it (CTRL, Keskar et al. 2019, 4.1); forbidden tokens go; the temperature divides; all but the k
    likeliest go; and of those that are left all but the fewest likeliest whose probabilities sum to top_p or more
    (nucleus sampling, Holtzman et al. 2020).
    Equal logits stay or go together.
    """
    if sampler.penalty != 1:
        less = jnp.where(logits > 0, logits / sampler.penalty, logits * sampler.penalty)
        logits = jnp.where(seen, less, logits)
    logits = jnp.where(forbidden, -jnp.inf, logits)
    if sampler.temperature == 0:
        return logits
    logits = logits / sampler.temperature
    if 0 < sampler.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampler.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampler.top_p < 1:
        ranked = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # 0 for the likeliest, which always stays
        least = jnp.where(before < sampler.top_p, ranked, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def sample_step(
    params: dict, cfg: ModelConfig, state: DecodeState, sampler: Sampler, forbidden: Bool[Array, " V"], end: int
) -> tuple[DecodeState, Int[Array, " B"]]:
    """Chooses a token a row from `state.logits` and advances the decoder by it. Rows that are done repeat `end`."""
    logits = choices(state.logits, state.seen, forbidden, sampler)
    key, now = jax.random.split(state.key)
    if sampler.temperature > 0:
        token = jax.random.categorical(now, logits)
    else:
        token = jnp.argmax(logits, -1)
    token = jnp.where(state.done, end, token).astype(jnp.int32)
    if sampler.penalty != 1:
        state = state._replace(seen=state.seen.at[jnp.arange(token.shape[0]), token].set(True))
    state = extend(params, cfg, state, llm.embed(params["llm"], token[:, None]), 1)
    return state._replace(done=state.done | (token == end), key=key), token


# --- two drivers -----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("cfg", "sampler", "end", "new"))
def generate(
    params: dict,
    cfg: ModelConfig,
    x: Float[Array, "B L D"],
    pads: Int[Array, " B"],
    forbidden: Bool[Array, " V"],
    key: Array,
    sampler: Sampler,
    end: int,
    new: int,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B new"]:
    """Up to `new` tokens a row, one program: stops when every row has ended. What follows an end is `end`."""
    state = prefill(params, cfg, x, pads, key, x.shape[1] + new, seen)
    out = jnp.full((x.shape[0], new), end, jnp.int32)

    def body(carry):
        n, out, state = carry
        state, token = sample_step(params, cfg, state, sampler, forbidden, end)
        return n + 1, out.at[:, n].set(token), state

    return jax.lax.while_loop(lambda c: (c[0] < new) & ~c[2].done.all(), body, (0, out, state))[1]


_sample_step = jax.jit(sample_step, static_argnames=("cfg", "sampler", "end"), donate_argnames="state")


def stream(
    params: dict,
    cfg: ModelConfig,
    state: DecodeState,
    forbidden: Bool[Array, " V"],
    sampler: Sampler,
    end: int,
    new: int,
) -> Iterator[tuple[int, DecodeState]]:
    """The same tokens as `generate`, one row from a state that has read the prompt (of `prefill`), one at a time as
    they are known, the end among them. Each state's buffers are given to the next step, the first one's too: keep only
    the latest."""
    for _ in range(new):
        state, token = _sample_step(params, cfg, state, sampler, forbidden, end)
        said = token.item()
        yield said, state
        if said == end:
            return
