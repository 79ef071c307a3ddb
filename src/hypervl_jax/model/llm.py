"""Qwen3 decoder: embeddings (+ cache) -> hidden states, cache; hidden states -> logits (HyperVL 3.1; Qwen3 report).

Grouped-query attention with an RMS norm on queries and keys before the rotary embedding, SwiGLU, tied head.
Axes: B batch, L sequence, S cache length, H heads, K kv heads, d head width, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from hypervl_jax.config import LlmConfig
from hypervl_jax.model.layers import Linear, RMSNorm, Stack, Weight, attention, blockwise, cpu_attention, matmul, take
from hypervl_jax.quantize import Quantized


class KVCache(NamedTuple):
    """Keys and values of one layer, [B K S d] each. A decoder's cache is a tuple of these, one a layer."""

    k: Float[Array, "B K S d"]
    v: Float[Array, "B K S d"]


def init_cache(cfg: LlmConfig, batch: int, length: int, dtype: jnp.dtype = jnp.float32) -> tuple[KVCache, ...]:
    """An empty cache of `length` positions."""
    shape = (batch, cfg.kv_heads, length, cfg.head_dim)
    return tuple(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(cfg.depth))


def rotary(positions: Int[Array, "B L"], dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine tables f32[B 1 L dim/2] of the half-split rotation."""
    freq = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle = positions[:, None, :, None].astype(jnp.float32) * freq
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B H L d"], cos: Array, sin: Array) -> Float[Array, "B H L d"]:
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def segment_mask(segments: Int[Array, "B L"]) -> Bool[Array, "B L L"]:
    """Who sees whom in a row of several questions about one picture: causal, and only the shared prefix (segment 0) and
    one's own segment.

        segments 0 0 1 1 2      query 2 of segment 1 sees 0 0 1
                                query 4 of segment 2 sees 0 0     2
    """
    n = segments.shape[1]
    causal = jnp.arange(n)[:, None] >= jnp.arange(n)
    q, k = segments[:, :, None], segments[:, None, :]
    return causal & ((k == 0) | (k == q)) & (k >= 0)


class Block(nn.Module):
    cfg: LlmConfig
    attend: ClassVar = staticmethod(attention)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], cache: KVCache | None, cos: Array, sin: Array, mask: Array, start
    ) -> tuple[Array, KVCache | None]:
        c = self.cfg
        y = RMSNorm(c.eps, name="norm1")(x)
        heads = {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}
        q, k, v = (
            rearrange(Linear(n * c.head_dim, bias=False, name=name)(y), "b l (h d) -> b h l d", d=c.head_dim)
            for name, n in heads.items()
        )
        if c.qk_norm:
            q, k = RMSNorm(c.eps, name="q_norm")(q), RMSNorm(c.eps, name="k_norm")(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            at = (0, 0, start, 0)
            k = jax.lax.dynamic_update_slice(cache.k, k.astype(cache.k.dtype), at, allow_negative_indices=False)
            v = jax.lax.dynamic_update_slice(cache.v, v.astype(cache.v.dtype), at, allow_negative_indices=False)
            cache = KVCache(k, v)
        y = rearrange(self.attend(q, k, v, mask), "b h l d -> b l (h d)")
        x = x + Linear(c.width, bias=False, name="o")(y)
        y = RMSNorm(c.eps, name="norm2")(x)
        y = jax.nn.silu(Linear(c.mlp, bias=False, name="gate")(y)) * Linear(c.mlp, bias=False, name="up")(y)
        return x + Linear(c.width, bias=False, name="down")(y), cache


class CpuBlock(Block):
    """For decoding on a CPU; the same numbers."""

    attend: ClassVar = staticmethod(cpu_attention)


@functools.cache
def in_blocks(size: int) -> type[Block]:
    """The block of a decoder that attends `size` queries and keys at a time; its mask is the segments of the row."""

    class InBlocks(Block):
        attend: ClassVar = staticmethod(functools.partial(blockwise, size=size))

    return InBlocks


class Llm(nn.Module):
    """The decoder stack. Embedding table and head are parameters used by the plain functions `embed` and `logits`."""

    cfg: LlmConfig
    scan: bool = True
    remat: bool | str = False
    block: type[Block] = Block

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        mask: Bool[Array, "B L S"] | Int[Array, "B L"],
        caches: tuple[KVCache, ...] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B L D"], tuple[KVCache, ...] | None]:
        """Hidden states after the final norm. With `caches`, keys and values of these L positions are written at
        `start` and `mask` runs over all S cached positions; S must be at least start + L (the write would clamp).
        Blocks of `in_blocks` take the segments of the row for a mask."""
        c = self.cfg
        self.param("embed", nn.initializers.normal(c.width**-0.5), (c.vocab, c.width))
        if not c.tied:
            self.param("head", nn.initializers.normal(c.width**-0.5), (c.vocab, c.width))
        cos, sin = rotary(positions, c.head_dim, c.rope_theta)
        x, caches = Stack(self.block, c, c.depth, self.scan, self.remat, name="blocks")(
            x, caches, cos, sin, mask, start
        )
        return RMSNorm(c.eps, name="norm")(x), caches


def embed(params: dict, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Rows of the embedding table; ids outside the vocabulary clip."""
    rows = take(params["embed"], ids)
    return rows.astype(dtype(params)) if isinstance(params["embed"], Quantized) else rows


def dtype(params: dict) -> jnp.dtype:
    """What the decoder computes in and keeps in its cache: the dtype of its norms, which are never quantised."""
    return params["norm"]["weight"].dtype


def head(params: dict) -> Weight:
    """The output table [V D]: the embedding where they are tied."""
    return params["head"] if "head" in params else params["embed"]


def logits(params: dict, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """f32 next-token logits through the head."""
    return matmul(hidden, head(params)).astype(jnp.float32)
