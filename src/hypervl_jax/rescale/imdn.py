"""Bicubic down, IMDN up: a plain super-resolution network (Hui et al., ACM MM 2019) as a pair.

Its upscaler never saw an adapted small picture and draws no noise; HCD needs no more of a pair than that.
Axes: B batch, H W picture, h w small picture, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from hypervl_jax.rescale.layers import Conv, leaky, pixel_shuffle
from hypervl_jax.rescale.pairs import Bicubic, Key, Params

SLOPE = 0.05  # of its LeakyReLUs


class Distill(nn.Module):
    """IMDB: every convolution keeps a quarter of its channels and hands on the rest; contrast weighs the channels."""

    width: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        keep, kept, y = self.width // 4, [], x
        for i in (1, 2, 3):
            y = leaky(Conv(self.width, name=f"c{i}")(y), SLOPE)
            kept, y = [*kept, y[..., :keep]], y[..., keep:]
        y = jnp.concatenate([*kept, Conv(keep, name="c4")(y)], -1)
        mean = y.mean((1, 2), keepdims=True)
        # sqrt has no gradient at 0: a channel without contrast passes none
        var = ((y - mean) ** 2).mean((1, 2), keepdims=True)
        contrast = jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1)), 0)
        weigh = nn.relu(Conv(self.width // 16, 1, name="cca.conv_du.0")(contrast + mean))
        y = y * nn.sigmoid(Conv(self.width, 1, name="cca.conv_du.2")(weigh))
        return x + Conv(self.width, 1, name="c5")(y)


class Upscaler(nn.Module):
    """[B h w 3] -> [B hs ws 3]"""

    scale: int
    width: int = 64
    blocks: int = 6

    @nn.compact
    def __call__(self, x: Float[Array, "B h w 3"]) -> Float[Array, "B H W 3"]:
        first = x = Conv(self.width, name="fea_conv")(x)
        out = []
        for i in range(self.blocks):
            x = Distill(self.width, name=f"IMDB{i + 1}")(x)
            out.append(x)
        x = leaky(Conv(self.width, 1, name="c.0")(jnp.concatenate(out, -1)), SLOPE)
        x = first + Conv(self.width, name="LR_conv")(x)
        return pixel_shuffle(Conv(3 * self.scale**2, name="upsampler.0")(x), self.scale)


@dataclass(frozen=True)
class Imdn:
    """The pair; published at x2, x3 and x4."""

    scale: int
    width: int = 64
    blocks: int = 6

    @property
    def net(self) -> Upscaler:
        return Upscaler(self.scale, self.width, self.blocks)

    def init(self, key: Array) -> Params:
        return self.net.init(key, jnp.zeros((1, 4, 4, 3)))["params"]  # type: ignore

    def down(self, params: Params, hr: Float[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
        return Bicubic(self.scale).down({}, hr)

    def up(self, params: Params, lr: Float[Array, "B h w 3"], key: Key = None) -> Float[Array, "B H W 3"]:
        return self.net.apply({"params": params}, lr)  # type: ignore
