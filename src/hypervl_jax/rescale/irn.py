"""IRN: rescaling by an invertible network (Xiao et al., ECCV 2020; IJCV 2022), and its light sibling FIRN.

Every stage halves the picture by Haar and mixes it with coupling blocks; three channels of the result are the small
picture, the rest is detail. The inverse puts noise in the place of the detail, as the weights were taught to bear.
Axes: B batch, H W picture, h w small picture, C channels of a stage, D channels out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hypervl_jax.rescale.layers import Conv, DenseBlock, haar, leaky, unhaar
from hypervl_jax.rescale.pairs import Key, Params, noise, shrunk

Kind = Literal["dense", "light"]


class LightBlock(nn.Module):
    """FIRN's subnet: three distilling steps and pixel attention, of int(C * factor) channels (Zhao et al. 2020)."""

    features: int
    factor: float

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        width = int(x.shape[-1] * self.factor)
        if self.factor > 1:
            x = leaky(Conv(width, name="expandconv")(x))
        distilled = []
        for i in (1, 2, 3):
            distilled.append(leaky(Conv(width, 1, name=f"c{i}_d")(x)))
            x = leaky(Conv(x.shape[-1], name=f"c{i}_r")(x) + x)
        distilled.append(leaky(Conv(width, name="c4")(x)))
        y = Conv(self.features, 1, name="c5")(jnp.concatenate(distilled, -1))
        return y * nn.sigmoid(Conv(self.features, 1, name="PA.conv")(y))


class Coupling(nn.Module):
    """y1 = x1 + F(x2), y2 = x2 exp(s(y1)) + G(y1), and back (IRN, eq. 2 and 3); x1 is the first three channels."""

    kind: Kind = "dense"
    growth: int = 32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], inverse: bool = False) -> Float[Array, "B H W C"]:
        low, detail = x[..., :3], x[..., 3:]
        width, light = detail.shape[-1], self.kind == "light"
        if light:
            f, g, h = (LightBlock(n, w, name=k) for n, w, k in ((3, 0.5, "F"), (width, 3.0, "G"), (width, 3.0, "H")))
        else:
            f, g, h = (DenseBlock(n, self.growth, name=k) for n, k in ((3, "F"), (width, "G"), (width, "H")))
        thin = Conv(width // 2, 1, name="reduce_conv.0")

        def shift(detail: Array) -> Array:
            return f(leaky(thin(detail)) if light else detail)

        if not inverse:
            low = low + shift(detail)
        s = jnp.tanh(h(low) / 2)
        detail = (detail - g(low)) / jnp.exp(s) if inverse else detail * jnp.exp(s) + g(low)
        if inverse:
            low = low - shift(detail)
        return jnp.concatenate([low, detail], -1)


class Flow(nn.Module):
    """[B H W 3] -> [B h w 3 s^2] (small picture first) and back; `blocks` counts the couplings of each stage."""

    blocks: tuple[int, ...]
    kind: Kind
    growth: int

    @nn.compact
    def __call__(self, x: Float[Array, "B _ _ C"], inverse: bool = False) -> Float[Array, "B _ _ D"]:
        at, steps = 0, []
        for n in self.blocks:  # numbered as in published weights, where Haar has a number too
            steps += [None, *(Coupling(self.kind, self.growth, name=f"operations.{at + 1 + i}") for i in range(n))]
            at += 1 + n
        for step in reversed(steps) if inverse else steps:
            if step is None:
                x = unhaar(x) if inverse else haar(x)
            else:
                x = step(x, inverse)
        return x


@dataclass(frozen=True)
class Irn:
    """The pair. `blocks` (8,), (8, 8), (8, 8, 8) are the published x2, x4, x8; `firn()` is FIRN x4."""

    blocks: tuple[int, ...] = (8, 8)
    kind: Kind = "dense"
    growth: int = 32  # of the dense blocks
    noise: float = 1.0  # spread of what stands for the detail on the way up, as the weights were taught; 0: none

    @property
    def scale(self) -> int:
        return 2 ** len(self.blocks)

    @property
    def flow(self) -> Flow:
        return Flow(self.blocks, self.kind, self.growth)

    def init(self, key: Array) -> Params:
        return self.flow.init(key, jnp.zeros((1, self.scale, self.scale, 3)))["params"]  # type: ignore

    def forward(self, params: Params, hr: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        """Small picture and detail, what training looks at."""
        shrunk(hr, self.scale)
        return self.flow.apply({"params": params}, hr)  # type: ignore

    def inverse(self, params: Params, x: Float[Array, "B h w D"]) -> Float[Array, "B H W 3"]:
        return self.flow.apply({"params": params}, x, inverse=True)  # type: ignore

    def down(self, params: Params, hr: Float[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
        return self.forward(params, hr)[..., :3]

    def up(self, params: Params, lr: Float[Array, "B h w 3"], key: Key = None) -> Float[Array, "B H W 3"]:
        z = self.noise * noise(key if self.noise else None, (*lr.shape[:3], 3 * (self.scale**2 - 1)))
        return self.inverse(params, jnp.concatenate([lr, z], -1))

    def flops(self, side: int) -> int:
        """Of one direction over a square picture, by formula: two a multiply-add of its kernels."""
        shapes = jax.tree.leaves_with_path(jax.eval_shape(self.init, jax.random.key(0)))
        total, at = 0, 0
        for stage, n in enumerate(self.blocks, 1):
            mine = {f"operations.{at + 1 + i}" for i in range(n)}
            kernels = sum(leaf.size for path, leaf in shapes if leaf.ndim == 4 and path[0].key in mine)
            total, at = total + 2 * kernels * (side // 2**stage) ** 2, at + 1 + n
        return total


def firn() -> Irn:
    """FIRN x4 (qwopqwop200/Fast-Invertible-Rescaling-Net): IRN's flow with a fourteenth of its weights."""
    return Irn((8, 8), "light")
