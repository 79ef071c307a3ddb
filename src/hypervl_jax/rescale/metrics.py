"""PSNR and SSIM as papers on image rescaling report them: 8-bit pictures, luma not rounded, float64. Host side.

The procedure is that of IRN (hence of HCD): cut to a multiple of the scale before shrinking (`modcrop`), crop `border`
pixels (the scale) off each side of the result, compare.
Axes: N pictures, H W picture, C channels.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, UInt8

LUMA = (65.481, 128.553, 24.966)  # ITU-R BT.601, of R, G, B in 0..1; beside an offset of 16
WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian
Channel = Literal["y", "rgb"]
Picture = UInt8[np.ndarray, "_ _ 3"]


def modcrop(pixels: UInt8[np.ndarray, "H W *C"], scale: int) -> UInt8[np.ndarray, "_ _ *C"]:
    """The picture cut at the right and the bottom to multiples of `scale`."""
    h, w = pixels.shape[:2]
    return pixels[: h - h % scale, : w - w % scale]


def to_u8(x: Float[np.ndarray, "*N H W 3"]) -> UInt8[np.ndarray, "*N H W 3"]:
    """0..1, clipped and rounded to 8 bits."""
    return np.rint(255 * np.clip(np.asarray(x), 0, 1)).astype(np.uint8)


def luma(rgb: Picture) -> Float64[np.ndarray, "_ _"]:
    """Y in 16..235, not rounded (MATLAB's rgb2ycbcr rounds; half of the field does, and reports up to 0.02 dB more)."""
    return 16 + rgb.astype(np.float64) @ (np.array(LUMA) / 255)


def psnr(a: Picture, b: Picture, border: int = 0, channel: Channel = "y") -> float:
    """20 log10(255 / RMSE) in dB; infinite where the pictures are equal. Raises `ValueError` as `planes` does."""
    x, y = (planes(p, border, channel) for p in _same(a, b))
    mse = float(np.mean((x - y) ** 2))
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def ssim(a: Picture, b: Picture, border: int = 0, channel: Channel = "y") -> float:
    """Structural similarity (Wang et al. 2004) over windows that lie in the picture; on RGB the channels' mean.

    Raises `ValueError` as `planes` does, and where what the border leaves is smaller than a window.
    """
    x, y = (planes(p, border, channel) for p in _same(a, b))
    if min(x.shape[:2]) < WINDOW:
        raise ValueError(f"SSIM needs {WINDOW} pixels each way; {x.shape[:2]} are left of {a.shape[:2]}")
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _blur(x), _blur(y)
    vx, vy, cov = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    out = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(out.mean())


def planes(rgb: Picture, border: int, channel: Channel) -> Float64[np.ndarray, "_ _ _"]:
    """What is compared: Y or RGB without its border, in float64. Raises `ValueError` if the border leaves nothing."""
    x = luma(rgb)[..., None] if channel == "y" else rgb.astype(np.float64)
    x = x[border : x.shape[0] - border, border : x.shape[1] - border]
    if not x.size:
        raise ValueError(f"a border of {border} pixels leaves nothing of {rgb.shape[1]} x {rgb.shape[0]} px")
    return x


def _same(a: Picture, b: Picture) -> tuple[Picture, Picture]:
    if a.shape != b.shape:
        raise ValueError(f"pictures of {a.shape} and {b.shape} cannot be compared; crop them alike")
    return a, b


def _blur(x: np.ndarray) -> np.ndarray:
    """Gaussian window, along the rows and then the columns, where all of it lies in the picture."""
    g = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    g /= g.sum()
    for axis in (0, 1):
        n = x.shape[axis] - WINDOW + 1
        x = sum(w * np.take(x, range(i, i + n), axis) for i, w in enumerate(g))  # type: ignore
    return x
