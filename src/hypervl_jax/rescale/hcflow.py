"""HCFlow x4: a hierarchical conditional flow (Liang et al., ICCV 2021), its rescaling variant.

Two levels, each Haar and eight steps that keep the small picture's three channels apart from detail; then the level
lets go of half its channels (all but three in the last), and a conditional flow says what they are likely to be, given
what is kept. Restoring draws them from that. The official network clips both its pictures to 0..1; here whoever stores
or shows them does. ActNorm starts as the identity.
Axes: B batch, H W picture, h w small picture, C channels, D channels out.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hypervl_jax.model.vrc import convolve
from hypervl_jax.rescale.layers import XAVIER, ZEROS, Conv, DenseBlock, haar, unhaar
from hypervl_jax.rescale.pairs import Key, Params, keys, noise, shrunk

WIDTH = 64  # of conditions and hidden layers
Map = Float[Array, "B _ _ _"]


def _scale(raw: Map) -> Map:
    """exp of a soft limit: between 0.6 and 1.65."""
    return jnp.exp(0.318 * jnp.arctan(2 * raw))


class ActNorm(nn.Module):
    """(x + bias) exp(logs), a number a channel."""

    @nn.compact
    def __call__(self, x: Map, inverse: bool = False) -> Map:
        bias, logs = (self.param(name, ZEROS, (x.shape[-1],)) for name in ("bias", "logs"))
        return x * jnp.exp(-logs) - bias if inverse else (x + bias) * jnp.exp(logs)


class Mix(nn.Module):
    """An invertible matrix over the channels."""

    @nn.compact
    def __call__(self, x: Map, inverse: bool = False) -> Map:
        weight = self.param("weight", nn.initializers.orthogonal(), (x.shape[-1],) * 2)
        return x @ (jnp.linalg.inv(weight) if inverse else weight).T


class ConvNorm(nn.Module):
    """A convolution with an ActNorm for its bias."""

    features: int
    kernel: int

    @nn.compact
    def __call__(self, x: Map) -> Map:
        weight = self.param("weight", XAVIER, (self.kernel, self.kernel, x.shape[-1], self.features))
        return ActNorm(name="actnorm")(x @ weight[0, 0] if self.kernel == 1 else convolve(x, weight))


class ConvZeros(nn.Module):
    """A convolution that starts as 0, times exp(3 logs)."""

    features: int

    @nn.compact
    def __call__(self, x: Map) -> Map:
        weight = self.param("weight", ZEROS, (3, 3, x.shape[-1], self.features))
        bias, logs = (self.param(name, ZEROS, (self.features,)) for name in ("bias", "logs"))
        return (convolve(x, weight) + bias) * jnp.exp(3 * logs)


class Plain(nn.Module):
    """The subnet of conditional steps."""

    features: int

    @nn.compact
    def __call__(self, x: Map) -> Map:
        x = nn.relu(ConvNorm(WIDTH, 3, name="conv1")(x))
        return ConvZeros(self.features, name="conv3")(nn.relu(ConvNorm(WIDTH, 1, name="conv2")(x)))


class Step(nn.Module):
    """ActNorm, and a coupling of the small picture's channels with the rest: an `even` step lets those three shift and
    scale the rest, an odd one lets the rest shift them. What a subnet says alternates between shift and scale."""

    even: bool

    @nn.compact
    def __call__(self, x: Map, inverse: bool = False) -> Map:
        norm, rest = ActNorm(name="actnorm"), x.shape[-1] - 3
        f = DenseBlock(2 * rest if self.even else 3, name="affine.f")
        x = x if inverse else norm(x)
        low, detail = x[..., :3], x[..., 3:]
        if self.even:
            detail = _affine(f(low), detail, inverse)
        else:
            low = low - f(detail) if inverse else low + f(detail)
        x = jnp.concatenate([low, detail], -1)
        return norm(x, inverse=True) if inverse else x


class ConditionalStep(nn.Module):
    """ActNorm, a matrix, and a coupling of two halves that sees the condition."""

    @nn.compact
    def __call__(self, x: Map, condition: Map, inverse: bool = False) -> Map:
        norm, mix, half = ActNorm(name="actnorm"), Mix(name="permute"), x.shape[-1] // 2
        f = Plain(2 * (x.shape[-1] - half), name="affine.f")
        x = x if inverse else mix(norm(x))
        first, second = x[..., :half], x[..., half:]
        x = jnp.concatenate([first, _affine(f(jnp.concatenate([first, condition], -1)), second, inverse)], -1)
        return norm(mix(x, inverse=True), inverse=True) if inverse else x


def _affine(said: Map, x: Map, inverse: bool) -> Map:
    shift, scale = said[..., ::2], _scale(said[..., 1::2])
    return x / scale - shift if inverse else (x + shift) * scale


class Residual(nn.Module):
    """RRDB: three residual dense blocks in a residual (Wang et al. 2018)."""

    @nn.compact
    def __call__(self, x: Map) -> Map:
        y = x
        for i in (1, 2, 3):
            y = y + 0.2 * DenseBlock(WIDTH, 16, XAVIER, name=f"RDB{i}")(y)
        return x + 0.2 * y


class Conditional(nn.Module):
    """What a level let go <-> noise, given what it kept. Returns that and the condition, for the level before."""

    channels: int  # let go
    steps: int

    @nn.compact
    def __call__(self, x: Map, kept: Map, inverse: bool = False) -> tuple[Map, Map]:
        first = condition = Conv(WIDTH, name="conv_first")(kept)
        for name in ("RRDB_trunk0.0", "RRDB_trunk0.1", "RRDB_trunk1.0"):
            condition = Residual(name=name)(condition)
        condition = first + Conv(WIDTH, name="trunk_conv1")(condition)
        said = ConvZeros(2 * self.channels, name="f")(condition)
        mean, scale = said[..., ::2], _scale(said[..., 1::2])
        steps = [ConditionalStep(name=f"additional_flow_steps.{i}") for i in range(self.steps)]
        if inverse:
            x = mean + scale * x
        for step in reversed(steps) if inverse else steps:
            x = step(x, condition, inverse)
        return x if inverse else (x - mean) / scale, condition


class Flow(nn.Module):
    """[B H W 3] <-> small picture [B h w 3] and the noise of both levels, [B 2h 2w 6] and [B h w 21]."""

    steps: int
    conditional: int

    def setup(self):
        self.levels = [
            [Step(k % 2 == 0, name=f"layers.{at + k}") for k in range(self.steps)] for at in (1, self.steps + 3)
        ]
        self.outer = Conditional(6, self.conditional, name="level0_condFlow")
        self.inner = Conditional(21, self.conditional, name="level1_condFlow")

    def down(self, x: Float[Array, "B H W 3"]) -> tuple[Map, Map, Map, Map]:
        """(small picture, what level 0 kept, what level 0 and level 1 let go)"""
        x = haar(x)
        for step in self.levels[0]:
            x = step(x)
        kept, outer = x[..., :6], x[..., 6:]
        x = haar(kept)
        for step in self.levels[1]:
            x = step(x)
        return x[..., :3], kept, outer, x[..., 3:]

    def __call__(self, x: Float[Array, "B H W 3"]) -> tuple[Map, Map, Map]:
        small, kept, outer, inner = self.down(x)
        z_inner, condition = self.inner(inner, small)
        z_outer, _ = self.outer(outer, _joined(kept, condition))
        return small, z_outer, z_inner

    def up(self, small: Map, z_outer: Map, z_inner: Map) -> Float[Array, "B H W 3"]:
        inner, condition = self.inner(z_inner, small, inverse=True)
        x = jnp.concatenate([small, inner], -1)
        for step in reversed(self.levels[1]):
            x = step(x, inverse=True)
        kept = unhaar(x)
        outer, _ = self.outer(z_outer, _joined(kept, condition), inverse=True)
        x = jnp.concatenate([kept, outer], -1)
        for step in reversed(self.levels[0]):
            x = step(x, inverse=True)
        return unhaar(x)


def _joined(kept: Map, condition: Map) -> Map:
    """What level 0 kept, and the condition of level 1 at its size."""
    return jnp.concatenate([kept, condition.repeat(2, 1).repeat(2, 2)], -1)


@dataclass(frozen=True)
class HcFlow:
    """The pair; as it stands, the published x4."""

    steps: int = 8  # a level
    conditional: int = 6  # steps of a conditional flow

    @property
    def scale(self) -> int:
        return 4

    def apply(self, params: Params, *x: Array, method: str = "__call__") -> Array | tuple[Array, ...]:
        """`Flow`, whose weights' names begin with "flow" in published files."""
        net = Flow(self.steps, self.conditional)
        return net.apply({"params": params["flow"]}, *x, method=method)  # type: ignore

    def init(self, key: Array) -> Params:
        net = Flow(self.steps, self.conditional)
        return {"flow": net.init(key, jnp.zeros((1, 4, 4, 3)))["params"]}

    def forward(self, params: Params, hr: Float[Array, "B H W 3"]) -> tuple[Map, Map, Map]:
        """Small picture and both noises, what training looks at."""
        shrunk(hr, 4)
        return self.apply(params, hr)  # type: ignore

    def inverse(self, params: Params, small: Map, z_outer: Map, z_inner: Map) -> Float[Array, "B H W 3"]:
        return self.apply(params, small, z_outer, z_inner, method="up")  # type: ignore

    def down(self, params: Params, hr: Float[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
        shrunk(hr, 4)
        return self.apply(params, hr, method="down")[0]  # type: ignore

    def up(self, params: Params, lr: Float[Array, "B h w 3"], key: Key = None) -> Float[Array, "B H W 3"]:
        b, h, w, _ = lr.shape
        two = (None, None) if key is None else jax.vmap(jax.random.split, out_axes=1)(keys(key, b))
        return self.inverse(params, lr, noise(two[0], (b, 2 * h, 2 * w, 6)), noise(two[1], (b, h, w, 21)))
