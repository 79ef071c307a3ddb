"""A down/up pair: two functions of frozen weights, behind which every network that rescales pictures looks alike.

A network is a frozen value with a `scale` and

    init(key) -> params
    down(params, hr) -> lr          f32[B H W 3] in 0..1 -> f32[B H/s W/s 3], neither clipped nor rounded by us
    up(params, lr, key) -> hr       what the weights do not know is drawn from `key`; None takes the likeliest, 0

and a `Pair` is a network with its weights, a pytree. HCD, tiling and evaluation know nothing else, so a network of your
own needs these lines and no more.
Axes: B batch, H W picture, h w small picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from hypervl_jax.rescale.resample import bicubic_8bit, bicubic_f32

Params = dict[str, Any]
Key = Array | None  # one key, or one an image


@runtime_checkable
class Network(Protocol):
    """See the top of this module. Hashable: programs are compiled for it."""

    @property
    def scale(self) -> int | float: ...
    def init(self, key: Array) -> Params: ...
    def down(self, params: Params, hr: Float[Array, "B H W 3"]) -> Float[Array, "B h w 3"]: ...
    def up(self, params: Params, lr: Float[Array, "B h w 3"], key: Key = None) -> Float[Array, "B H W 3"]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pair:
    """A network with its weights."""

    net: Network = field(metadata={"static": True})
    params: Params = field(default_factory=dict)

    @property
    def scale(self) -> int | float:
        return self.net.scale

    def down(self, hr: Float[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
        return self.net.down(self.params, hr)

    def up(self, lr: Float[Array, "B h w 3"], key: Key = None) -> Float[Array, "B H W 3"]:
        return self.net.up(self.params, lr, key)


@dataclass(frozen=True)
class Bicubic:
    """Bicubic both ways: MATLAB's 8-bit picture down, unrounded up. No weights."""

    scale: int

    def init(self, key: Array) -> Params:
        return {}

    def down(self, params: Params, hr: Float[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
        return bicubic_8bit(hr, shrunk(hr, self.scale))

    def up(self, params: Params, lr: Float[Array, "B h w 3"], key: Key = None) -> Float[Array, "B H W 3"]:
        return bicubic_f32(lr, (lr.shape[1] * self.scale, lr.shape[2] * self.scale))


def quantise(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Clipped to 0..1 and rounded to 8 bits; the gradient passes through both (the official code masks nothing)."""
    return x + jax.lax.stop_gradient(jnp.round(255 * jnp.clip(x, 0, 1)) / 255 - x)


def keys(key: Array, images: int) -> Array:
    """One key an image: `key` itself if it is that, else drawn from it. Raises `ValueError` for another number."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # the older form, `jax.random.PRNGKey`
    if key.ndim and len(key) != images:
        raise ValueError(f"{len(key)} keys for {images} images: pass one key, or one an image")
    return key if key.ndim else jax.random.split(key, images)


def noise(key: Key, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """N(0, 1) of [B ...], each image from its own key, so that a batch equals its images one by one; 0 without key."""
    if key is None:
        return jnp.zeros(shape)
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys(key, shape[0]))


def shrunk(hr: Shaped[Array | np.ndarray, "B H W C"], scale: int) -> tuple[int, int]:
    """(height, width) of the small picture. Raises `ValueError` where sides are no multiples of `scale`."""
    h, w = hr.shape[1:3]
    if h % scale or w % scale:
        raise ValueError(f"{w} x {h} px is no multiple of {scale} each way: crop or pad the picture")
    return h // scale, w // scale
