"""SigLIP2 vision encoder for one tile size; Base and Large are two configs of it (HyperVL 3.1; SigLIP 2, 2502.14786).

Pre-norm blocks with biases, tanh GELU, learned absolute positions, no class token, features after the final norm.
Axes: N tiles, T tile side in pixels, P patches a tile, H heads, D width.
"""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Num

from hypervl_jax.config import VitConfig
from hypervl_jax.model.layers import LayerNorm, Linear, Stack, attention, cpu_attention


class Block(nn.Module):
    cfg: VitConfig
    attend: ClassVar = staticmethod(attention)

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"], cache: None, mask: Bool[Array, "N 1 P"]) -> tuple[Array, None]:
        c = self.cfg
        y = LayerNorm(c.eps, name="norm1")(x)
        q, k, v = (rearrange(Linear(c.width, name=n)(y), "n p (h d) -> n h p d", h=c.heads) for n in ("q", "k", "v"))
        x = x + Linear(c.width, name="o")(rearrange(self.attend(q, k, v, mask), "n h p d -> n p (h d)"))
        y = LayerNorm(c.eps, name="norm2")(x)
        return x + Linear(c.width, name="fc2")(jax.nn.gelu(Linear(c.mlp, name="fc1")(y), approximate=True)), cache


class CpuBlock(Block):
    """For one tile on a CPU; the same numbers."""

    attend: ClassVar = staticmethod(cpu_attention)


def one_tile() -> type[Block]:
    """The block that encodes a single tile fastest on this backend."""
    return CpuBlock if jax.default_backend() == "cpu" else Block


class Vit(nn.Module):
    """Tiles -> patch features. `mask` says which patches touch real pixels; the others are black, whatever they hold,
    and hidden as attention keys."""

    cfg: VitConfig
    scan: bool = True
    remat: bool | str = False
    block: type[Block] = Block

    @nn.compact
    def __call__(self, tiles: Num[Array, "N T T 3"], mask: Bool[Array, "N P"]) -> Float[Array, "N P D"]:
        """`tiles`: u8, or float in 0..1."""
        c = self.cfg
        if jnp.issubdtype(tiles.dtype, jnp.integer):
            tiles = tiles.astype(jnp.float32) / 255
        patches = rearrange(tiles * 2 - 1, "n (r p) (c q) k -> n (r c) (p q k)", p=c.patch, q=c.patch)
        patches = jnp.where(mask[..., None], patches, -1)
        pos = self.param("pos", nn.initializers.normal(0.02), (c.patches, c.width))
        x = Linear(c.width, name="patch")(patches.astype(pos.dtype)) + pos
        x, _ = Stack(self.block, c, c.depth, self.scan, self.remat, name="blocks")(x, None, mask[:, None])
        return LayerNorm(c.eps, name="norm")(x)
