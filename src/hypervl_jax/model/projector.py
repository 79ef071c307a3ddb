"""Pixel shuffle and a two-layer MLP: patch features -> decoder embeddings, a quarter as many (HyperVL 3.1; InternVL).

Axes: N tiles, P patches a tile, M = P / merge^2 tokens a tile, D encoder width, E decoder width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
from einops import rearrange
from jaxtyping import Array, Float

from hypervl_jax.model.layers import LayerNorm, Linear


def pixel_shuffle(x: Float[Array, "N P D"], merge: int) -> Float[Array, "N M C"]:
    """Folds each merge x merge square of patches into one token, channels in the order (row, column, channel)."""
    side = round(x.shape[1] ** 0.5)
    return rearrange(x, "n (r p c q) d -> n (r c) (p q d)", r=side // merge, p=merge, c=side // merge, q=merge)


class Projector(nn.Module):
    width: int  # of the decoder
    merge: int = 2
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N M E"]:
        y = LayerNorm(self.eps, name="norm")(pixel_shuffle(x, self.merge))
        return Linear(self.width, name="fc2")(jax.nn.gelu(Linear(self.width, name="fc1")(y), approximate=True))
