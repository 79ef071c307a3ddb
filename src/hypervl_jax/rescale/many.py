"""Many pictures of one size at once, spread over devices: each holds the weights and a share of the pictures.

Pictures do not meet in any of this, so each comes out as it does alone, on however many devices.
Axes: B batch, H W picture, h w small picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt8

from hypervl_jax.rescale import hcd, metrics
from hypervl_jax.rescale.hcd import HcdConfig
from hypervl_jax.rescale.pairs import Pair, keys, quantise


def down(
    pair: Pair,
    hr: UInt8[np.ndarray, "B H W 3"],
    config: HcdConfig | None = None,
    key: Array | None = None,
    mesh: Mesh | None = None,
) -> UInt8[np.ndarray, "B h w 3"]:
    """The small pictures: by HCD if there is a config, else as the pair makes them. `key` is one (default: seed 0) or
    one an image; `mesh` is `over()` if not given. Raises `ValueError` as `hcd.descend` does."""
    whole, x, each = _placed(mesh or over(), pair, hr, key)
    if config is None:
        small = _down(whole, x)
    else:
        small = hcd.descend(whole, x, config, each).lr
    return metrics.to_u8(np.asarray(small)[: len(hr)])


def up(
    pair: Pair,
    lr: UInt8[np.ndarray, "B h w 3"],
    key: Array | None = None,
    mesh: Mesh | None = None,
) -> UInt8[np.ndarray, "B H W 3"]:
    """The restored pictures; `key` and `mesh` as in `down`."""
    whole, x, each = _placed(mesh or over(), pair, lr, key)
    return metrics.to_u8(np.asarray(_up(whole, x, each))[: len(lr)])


def over(devices: Sequence[Any] | None = None) -> Mesh:
    """These devices, or all there are, side by side."""
    return Mesh(np.array(jax.devices() if devices is None else devices), ("pictures",))


def _placed(mesh: Mesh, pair: Pair, pictures: np.ndarray, key: Array | None) -> tuple[Pair, Array, Array]:
    """(weights, on every device; pictures in 0..1 and their keys, spread). The last picture fills up what is missing
    of a share for every device."""
    spread, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("pictures",), ()))
    each = keys(jax.random.key(0) if key is None else key, len(pictures))
    at = np.minimum(np.arange(-(-len(pictures) // mesh.size) * mesh.size), len(pictures) - 1)
    x = pictures[at].astype(np.float32) / 255
    return jax.device_put(pair, everywhere), jax.device_put(x, spread), jax.device_put(each[jnp.asarray(at)], spread)


@jax.jit
def _down(pair: Pair, hr: Array) -> Array:
    return quantise(pair.down(hr))


@jax.jit
def _up(pair: Pair, lr: Array, key: Array) -> Array:
    return pair.up(lr, key)
