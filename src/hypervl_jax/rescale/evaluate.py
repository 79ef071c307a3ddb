"""What a pair and HCD reach on a picture: small ones made in several ways, restored, compared with the original.

The procedure is that of `metrics`: cut to a multiple of the scale, `scale` pixels of border left out.
Axes: H W picture, h w small picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, UInt8

from hypervl_jax.rescale import metrics, tiles
from hypervl_jax.rescale.hcd import HcdConfig
from hypervl_jax.rescale.pairs import Pair
from hypervl_jax.rescale.resample import bicubic
from hypervl_jax.rescale.tiles import TILE, Tick

Ways = dict[str, HcdConfig | None]  # a name -> how the small picture is made; None: as the pair makes it
Figures = dict[str, float]  # psnr_y, ssim_y, psnr_rgb of the restored picture; lr_psnr: the small one beside the plain


class Outcome(NamedTuple):
    small: UInt8[np.ndarray, "h w 3"]
    restored: UInt8[np.ndarray, "H W 3"]


def ways(config: HcdConfig | None) -> Ways:
    """Plain; the small picture moved alone; both moved: those of them that `config` has steps for."""
    out: Ways = {"plain": None}
    if config is not None and config.lr_steps:
        out[f"LR{config.lr_steps}"] = dataclasses.replace(config, hr_steps=0)
    if config is not None and config.hr_steps:
        out[f"HR{config.hr_steps}" + (f"+LR{config.lr_steps}" if config.lr_steps else "")] = config
    return out


def outcomes(
    pair: Pair,
    hr: UInt8[np.ndarray, "H W 3"],
    some: Ways,
    key: Array | None = None,
    tile: int = TILE,
    tick: Tick = lambda: None,
) -> dict[str, Outcome]:
    """Each way's small and restored picture, of the same starts and noise. Raises `ValueError` where sides are no
    multiples of the pair's scale."""
    found = {}
    for way, config in some.items():
        if config is None:
            small = tiles.down(pair, hr, tile, tick)
        else:
            small = tiles.descend(pair, hr, config, key, tile, tick)
        found[way] = Outcome(small, tiles.up(pair, small, key, tile, tick))
    return found


def both_ways(hr: UInt8[np.ndarray, "H W 3"], scale: int) -> Outcome:
    """Bicubic down and bicubic up, which needs no weights."""
    small = bicubic(hr, (hr.shape[0] // scale, hr.shape[1] // scale))
    return Outcome(small, bicubic(small, (hr.shape[0], hr.shape[1])))


def figures(hr: UInt8[np.ndarray, "H W 3"], found: dict[str, Outcome], border: int) -> dict[str, Figures]:
    """Each way's figures; the first way's small picture is what the others are held against. Raises `ValueError` for
    a picture too small for SSIM."""
    plain = next(iter(found.values())).small
    return {
        way: {
            "psnr_y": metrics.psnr(o.restored, hr, border),
            "ssim_y": metrics.ssim(o.restored, hr, border),
            "psnr_rgb": metrics.psnr(o.restored, hr, border, "rgb"),
            "lr_psnr": metrics.psnr(o.small, plain, channel="rgb"),
        }
        for way, o in found.items()
    }


def means(rows: Iterable[dict[str, Figures]]) -> dict[str, Figures]:
    """Of pictures, for each way."""
    rows = list(rows)
    return {
        way: {name: float(np.mean([row[way][name] for row in rows])) for name in first}
        for way, first in rows[0].items()
    }


def heading(some: Iterable[str]) -> str:
    """The line above `line`s."""
    return f"{'':24}" + "".join(f"{f'{way}: dB, SSIM':>26}" for way in some)


def line(name: str, row: dict[str, Figures]) -> str:
    return f"{name[-24:]:24}" + "".join(f"{f['psnr_y']:19.3f} {f['ssim_y']:.4f}" for f in row.values())
