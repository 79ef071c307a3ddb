"""Pixels and a plan -> tiles, and back. Pure, for numpy on the host and for `jax.numpy` under `jit` (plan static).

Imports neither, so that a host without JAX can use it.

Axis letters: R C grid rows and columns, N tiles, T tile side, h w the resized picture.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from jaxtyping import Shaped

from hypervl_jax.plan import PlanError, VisionPlan


def tile(pixels: Shaped[Any, "h w 3"], plan: VisionPlan) -> Shaped[Any, "RC T T 3"]:
    """Lay the resized picture on the plan's black canvas and cut it, row-major; the thumbnail is not made here.

    Any dtype; padding is 0. Raises `PlanError` where the pixels are not of size `plan.resized`.
    """
    if pixels.shape[:2] != plan.resized:
        raise PlanError(f"pixels of {pixels.shape[:2]} where the plan wants {plan.resized}: resize them to it first")
    xp = pixels.__array_namespace__()  # numpy or jax.numpy, tracers included
    t, (rows, cols), (top, left), (h, w) = plan.policy.tile, plan.grid, plan.offset, plan.resized
    canvas = xp.pad(pixels, ((top, rows * t - top - h), (left, cols * t - left - w), (0, 0)))
    return rearrange(canvas, "(R h) (C w) c -> (R C) h w c", R=rows, C=cols)


def untile(tiles: Shaped[Any, "N T T 3"], plan: VisionPlan) -> Shaped[Any, "h w 3"]:
    """The exact inverse of `tile`: the resized picture. A thumbnail at the end of `tiles` is ignored.

    Raises `PlanError` where the number or side of the tiles is not the plan's.
    """
    (rows, cols), (top, left), (h, w), t = plan.grid, plan.offset, plan.resized, plan.policy.tile
    if tiles.shape[0] not in (rows * cols, plan.n_tiles) or tiles.shape[1] != t:
        raise PlanError(f"tiles of shape {tiles.shape} where the plan has {rows} x {cols} tiles of {t} px")
    canvas = rearrange(tiles[: rows * cols], "(R C) h w c -> (R h) (C w) c", R=rows, C=cols)
    return canvas[top : top + h, left : left + w]
