"""Decoding: prefill, one `sample_step`, and two drivers over it, a compiled loop and a stream.

Prompts of a batch are padded on the left, so that all rows write their next token at the same cache position.
Axes: B batch, L prompt, S cache, V vocabulary, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hypervl_jax.config import ModelConfig
from hypervl_jax.model import llm
from hypervl_jax.model.llm import KVCache


class Sampler(NamedTuple):
    """How the next token is chosen. Temperature 0 is greedy."""

    temperature: float = 0.0


class DecodeState(NamedTuple):
    """Everything the next token depends on."""

    logits: Float[Array, "B V"]
    caches: tuple[KVCache, ...]
    at: Int[Array, ""]  # cache position of the next token
    pads: Int[Array, " B"]  # left padding of each row
    done: Bool[Array, " B"]
    key: Array


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


def prefill(
    params: dict,
    cfg: ModelConfig,
    x: Float[Array, "B L D"],
    pads: Int[Array, " B"],
    key: Array,
    cache_length: int,
) -> DecodeState:
    """Runs the embedded prompts (`hypervl.embed`) and fills a cache of `cache_length` >= L positions."""
    b, length = x.shape[:2]
    at = jnp.arange(length)
    visible = (jnp.arange(cache_length) <= at[:, None]) & (jnp.arange(cache_length) >= pads[:, None, None])
    positions = jnp.maximum(at - pads[:, None], 0)
    empty = llm.init_cache(cfg.llm, b, cache_length, x.dtype)
    out: Any = llm.Llm(cfg.llm, scan=False).apply({"params": params["llm"]}, x, positions, visible, empty, jnp.int32(0))
    hidden, caches = out
    logits = llm.logits(params["llm"], hidden[:, -1])
    return DecodeState(logits, caches, jnp.int32(length), pads, jnp.zeros(b, bool), key)


def sample_step(
    params: dict, cfg: ModelConfig, state: DecodeState, sampler: Sampler, forbidden: Bool[Array, " V"], end: int
) -> tuple[DecodeState, Int[Array, " B"]]:
    """Chooses a token a row from `state.logits` and advances the decoder by it. Rows that are done repeat `end`."""
    logits = jnp.where(forbidden, -jnp.inf, state.logits)
    key, now = jax.random.split(state.key)
    if sampler.temperature > 0:
        token = jax.random.categorical(now, logits / sampler.temperature)
    else:
        token = jnp.argmax(logits, -1)
    token = jnp.where(state.done, end, token).astype(jnp.int32)
    x = llm.embed(params["llm"], token[:, None])
    at = jnp.arange(state.caches[0].k.shape[2])
    visible = ((at <= state.at) & (at >= state.pads[:, None]))[:, None]
    out: Any = llm.Llm(cfg.llm, scan=False).apply(
        {"params": params["llm"]}, x, (state.at - state.pads)[:, None], visible, state.caches, state.at
    )
    hidden, caches = out
    logits = llm.logits(params["llm"], hidden[:, 0])
    return DecodeState(logits, caches, state.at + 1, state.pads, state.done | (token == end), key), token


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
) -> Int[Array, "B new"]:
    """Up to `new` tokens a row, one program: stops when every row has ended. What follows an end is `end`."""
    state = prefill(params, cfg, x, pads, key, x.shape[1] + new)
    out = jnp.full((x.shape[0], new), end, jnp.int32)

    def body(carry):
        n, out, state = carry
        state, token = sample_step(params, cfg, state, sampler, forbidden, end)
        return n + 1, out.at[:, n].set(token), state

    return jax.lax.while_loop(lambda c: (c[0] < new) & ~c[2].done.all(), body, (0, out, state))[1]


_prefill = jax.jit(prefill, static_argnames=("cfg", "cache_length"))
_sample_step = jax.jit(sample_step, static_argnames=("cfg", "sampler", "end"), donate_argnames="state")


def stream(
    params: dict,
    cfg: ModelConfig,
    x: Float[Array, "1 L D"],
    pads: Int[Array, "1"],
    forbidden: Bool[Array, " V"],
    key: Array,
    sampler: Sampler,
    end: int,
    new: int,
) -> Iterator[int]:
    """The same tokens as `generate`, one at a time as they are known, without the end."""
    state = _prefill(params, cfg, x, pads, key, x.shape[1] + new)
    for _ in range(new):
        state, token = _sample_step(params, cfg, state, sampler, forbidden, end)
        if state.done[0]:
            return
        yield int(token[0])
