"""Bicubic resampling as MATLAB's `imresize` does it, which the field's small pictures were made with.

Keys' kernel with a = -1/2, stretched when shrinking so that it averages (antialiasing), mirrored borders, rows before
columns; 8-bit pictures are rounded between the two passes, which is what makes results equal MATLAB's to the bit.
Axes: B batch, H W picture, h w result, K taps.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def _kernel(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0))


@functools.lru_cache(maxsize=64)
def taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """(weights f64[out K], indices int[out K]): result i is the sum over k of weights[i, k] x input[indices[i, k]]."""
    scale = out / size
    stretch = min(scale, 1.0)
    width = 4 / stretch
    centre = (np.arange(out) + 0.5) / scale - 0.5
    left = np.floor(centre - width / 2).astype(int)
    at = left[:, None] + np.arange(int(np.ceil(width)) + 2)
    weights = _kernel(stretch * (centre[:, None] - at))
    weights /= weights.sum(1, keepdims=True)
    at = at % (2 * size)  # mirrored, the border pixel twice
    at = np.where(at < size, at, 2 * size - 1 - at)
    some = (weights != 0).any(0)
    return weights[:, some], at[:, some]


def bicubic(pixels: UInt8[np.ndarray, "H W C"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w C"]:
    """An 8-bit picture at (height, width), equal to MATLAB's to the bit."""
    for axis in (0, 1):
        summed = _along(np, pixels.astype(np.float64), axis, size[axis])
        pixels = np.floor(np.clip(summed, 0, 255) + 0.5).astype(np.uint8)
    return pixels


def bicubic_f32(x: Float[Array, "B H W C"], size: tuple[int, int]) -> Float[Array, "B h w C"]:
    """The same for numbers of any range, without rounding; differentiable."""
    return _along(jnp, _along(jnp, x, 1, size[0]), 2, size[1])


def bicubic_8bit(x: Float[Array, "B H W C"], size: tuple[int, int]) -> Float[Array, "B h w C"]:
    """`bicubic` for pictures in 0..1 whose values are those of 8 bits. Rounding passes its gradient through."""
    x = 255 * x
    for axis in (1, 2):
        smooth = _along(jnp, x, axis, size[axis - 1])
        x = smooth + jax.lax.stop_gradient(jnp.floor(jnp.clip(smooth, 0, 255) + 0.5) - smooth)
    return x / 255


def _along(xp: ModuleType, x: Any, axis: int, out: int) -> Any:
    if x.shape[axis] == out:
        return x
    weights, at = taps(x.shape[axis], out)
    shape = [1] * x.ndim
    shape[axis] = out
    columns = zip(weights.T, at.T, strict=True)
    return sum(xp.take(x, i, axis=axis) * w.reshape(shape).astype(x.dtype) for w, i in columns)
