"""AIDN: one pair for every scale between 1 and 4, whole or not (Xing et al., TIP 2023).

Two EDSR-like networks, one a direction. Both are told the scale: by convolutions that are mixed from experts, and by a
sampler that reads its features where each pixel of the result lies and filters them pixel by pixel. Nothing is drawn;
restoring is deterministic. Batch norm is run with its stored statistics.
Axes: B batch, H W picture, h w small picture, C channels, D channels inside, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from hypervl_jax.model.layers import Linear
from hypervl_jax.model.vrc import EPS, convolve
from hypervl_jax.rescale.layers import ZEROS, Conv
from hypervl_jax.rescale.pairs import Key, Params

MEAN = (0.4488, 0.4371, 0.4040)  # DIV2K's colours
KERNEL = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default
EXPERTS = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)
Map = Float[Array, "B _ _ _"]


class StoredNorm(nn.Module):
    """Batch norm with the statistics of training, plain leaves of the parameters."""

    @nn.compact
    def __call__(self, x: Map) -> Map:
        weight, var = (self.param(name, nn.initializers.ones, (x.shape[-1],)) for name in ("weight", "running_var"))
        bias, mean = (self.param(name, ZEROS, (x.shape[-1],)) for name in ("bias", "running_mean"))
        return (x - mean) * (weight * lax.rsqrt(var + EPS)) + bias


class Adapt(nn.Module):
    """x + a convolution mixed for the scale, where a mask wants it."""

    ratio: float  # of the size of the input to that of the result
    experts: int = 4

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        width, mask = x.shape[-1], x
        for i, features in enumerate([width // 4] * 3 + [1]):
            mask = StoredNorm(name=f"mask.{3 * i + 1}")(Conv(features, init=KERNEL, name=f"mask.{3 * i}")(mask))
            mask = nn.relu(mask) if i < 3 else nn.sigmoid(mask)
        told = jnp.full((1, 2), self.ratio)
        mix = Linear(self.experts, name="adapt.routing.2")(nn.relu(Linear(width, name="adapt.routing.0")(told)))
        pool = self.param("adapt.weight_pool", EXPERTS, (self.experts, 3, 3, width, width))
        return x + convolve(x, jnp.tensordot(nn.softmax(mix)[0], pool, 1)) * mask


class Sample(nn.Module):
    """[B h w C] -> [B H W C]: features where each pixel lies plus a learnt offset, filtered by a mix of experts."""

    scale: float  # of the size of the result to that of the input
    size: tuple[int, int]
    experts: int = 8

    @nn.compact
    def __call__(self, x: Map) -> Map:
        b, width, inner = len(x), x.shape[-1], x.shape[-1] // 8
        at = [(np.arange(n, dtype=np.float32) + np.float32(0.5)) / np.float32(self.scale) for n in self.size]
        rows, columns = np.meshgrid(*(a - np.float32(0.5) for a in at), indexing="ij")
        within = np.meshgrid(*(a - np.floor(a + np.float32(1e-3)) - np.float32(0.5) for a in at), indexing="ij")
        told = np.stack([np.full(self.size, 1 / self.scale, np.float32)] * 2 + list(within), -1)
        here = jnp.broadcast_to(jnp.stack([jnp.array(columns), jnp.array(rows)], -1), (b, *self.size, 2))
        y = jnp.concatenate([jnp.broadcast_to(told, (b, *told.shape)), bilinear(x, here)], -1)
        for name in ("body.0", "body.2"):
            y = nn.relu(Conv(width, 1, KERNEL, name=name)(y))
        x = bilinear(x, here + Conv(2, 1, KERNEL, name="offset")(y))
        mix = nn.sigmoid(Conv(self.experts, 1, KERNEL, name="routing.0")(y))
        compress = self.param("weight_compress", EXPERTS, (self.experts, 1, 1, width, inner))[:, 0, 0]
        expand = self.param("weight_expand", EXPERTS, (self.experts, 1, 1, inner, width))[:, 0, 0]
        # Experts first and their mix after, instead of a matrix a pixel: the same numbers in a fraction of the memory
        few = jnp.einsum("bhwe,bhwed->bhwd", mix, jnp.einsum("bhwc,ecd->bhwed", x, compress))
        return x + jnp.einsum("bhwe,bhwec->bhwc", mix, jnp.einsum("bhwd,edc->bhwec", few, expand))


def bilinear(x: Map, at: Float[Array, "B H W 2"]) -> Map:
    """`x` at (column, row) in its pixels, 0 outside; PyTorch's grid_sample with align_corners=True."""
    h, w = x.shape[1:3]
    corner = jnp.floor(at)
    out = jnp.zeros(())
    for right in (0, 1):
        for below in (0, 1):
            column, row = (corner[..., i] + step for i, step in ((0, right), (1, below)))
            share = (1 - jnp.abs(at[..., 0] - column)) * (1 - jnp.abs(at[..., 1] - row))
            inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
            index = jnp.clip(row, 0, h - 1).astype(int) * w + jnp.clip(column, 0, w - 1).astype(int)
            pixel = jax.vmap(lambda image, i: image[i])(x.reshape(len(x), h * w, -1), index)
            out = out + jnp.where(inside, share, 0)[..., None] * pixel
    return out


class Edsr(nn.Module):
    """One direction: [B _ _ 3] -> [B *size 3]."""

    scale: float
    size: tuple[int, int]
    width: int
    blocks: int

    @nn.compact
    def __call__(self, x: Map) -> Map:
        mean = jnp.array(MEAN)
        first = x = Conv(self.width, init=KERNEL, name="head.0")(x - mean)
        for i in range(self.blocks):
            y = nn.relu(Conv(self.width, init=KERNEL, name=f"body.{i}.body.0")(x))
            x = x + Conv(self.width, init=KERNEL, name=f"body.{i}.body.2")(y)
            if i % 4 == 3:
                x = Adapt(1 / self.scale, name=f"sa_adapt.{i // 4}")(x)
        x = first + Conv(self.width, init=KERNEL, name=f"body.{self.blocks}")(x)
        x = Sample(self.scale, self.size, name="sa_sample")(x)
        return Conv(3, init=KERNEL, name="tail.1")(x) + mean


@dataclass(frozen=True)
class Aidn:
    """The pair at one scale; the weights are the same for all. `size` is that of the large picture, which a small one
    does not tell where the scale is not whole; without it, restored pictures have `scale` times the small one's."""

    scale: float
    size: tuple[int, int] | None = None
    width: int = 64
    blocks: int = 16

    def net(self, scale: float, size: tuple[int, int]) -> Edsr:
        return Edsr(scale, size, self.width, self.blocks)

    def init(self, key: Array) -> Params:
        x = jnp.zeros((1, 4, 4, 3))
        down, up = jax.random.split(key)
        return {name: self.net(1.0, (4, 4)).init(k, x)["params"] for name, k in (("down_net", down), ("up_net", up))}

    def down(self, params: Params, hr: Float[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
        """Of ceil(side / scale)."""
        ratio = 1 / self.scale
        net = self.net(ratio, (math.ceil(hr.shape[1] * ratio), math.ceil(hr.shape[2] * ratio)))
        return net.apply({"params": params["down_net"]}, hr)  # type: ignore

    def up(self, params: Params, lr: Float[Array, "B h w 3"], key: Key = None) -> Float[Array, "B H W 3"]:
        size = self.size or (round(lr.shape[1] * self.scale), round(lr.shape[2] * self.scale))
        return self.net(self.scale, size).apply({"params": params["up_net"]}, lr)  # type: ignore
