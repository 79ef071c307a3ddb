"""What VRC's number means: predicted alpha' <-> the area ratio a picture is shrunk to. Plain numpy.

Training, evaluation and a host that runs exported files share this arithmetic; the last has no JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hypervl_jax.config import VrcConfig

Numbers = Any  # a number, a (nested) sequence of numbers or an array of numpy or JAX


class RatioError(ValueError):
    """A picture size that no ratio can be computed for."""


def rescale(alpha: Numbers, size: Sequence[Any] | np.ndarray, cfg: VrcConfig) -> np.ndarray:
    """The regression target alpha' = alpha x g of pictures of `size` (height, width; or [N 2]).

    The network sees a proxy of fixed size, so what it can see is how large the *result* must be in proxies: g is the
    picture's area (R1) or longer side, if above 1 (R2), measured in proxies (TC 4.1; TC app. C, eq. 20).
    """
    return np.asarray(alpha, np.float64) * _gain(size, cfg)


def unrescale(alpha: Numbers, size: Sequence[Any] | np.ndarray, cfg: VrcConfig, scale: float = 1.0) -> np.ndarray:
    """The area ratio in [min_ratio, 1] that predictions alpha' stand for; the inverse of `rescale` in there.

    `scale`, the dial between cost and quality that `compress.calibrate` finds, acts on the clipped ratio.
    """
    ratio = np.clip(np.asarray(alpha, np.float64) / _gain(size, cfg), cfg.min_ratio, 1.0)
    return np.clip(scale * ratio, cfg.min_ratio, 1.0)


def _gain(size: Sequence[Any] | np.ndarray, cfg: VrcConfig) -> np.ndarray:
    hw = np.asarray(size, np.float64)
    if hw.shape[-1:] != (2,) or (hw <= 0).any():
        raise RatioError(f"expected sizes (height, width) in pixels, found {size}")
    if cfg.rescale == "R1":
        return hw.prod(-1) / cfg.side**2
    if cfg.rescale == "R2":
        return np.maximum(1.0, hw.max(-1) / cfg.side)
    return np.ones(hw.shape[:-1])
