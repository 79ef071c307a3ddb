"""What VRC's number means: its prediction alpha' <-> the area ratio a picture is shrunk to. Plain numpy.

Shared by training, evaluation and a host that runs exported files, which has no JAX (papers: HyperVL 3.2; TC).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hypervl_jax.config import VrcConfig

Numbers = Any  # one, a nested sequence of them, or an array of numpy or JAX


class CompressError(ValueError):
    """Losses, labels or sizes that VRC cannot learn from or be applied to; the message says what to change."""


def rescale(alpha: Numbers, size: Numbers, cfg: VrcConfig) -> np.ndarray:
    """The regression target alpha' = alpha x g of pictures of `size` (height, width; or [N 2]).

    The network sees a proxy of fixed size, so what it can see is how large the *result* must be in proxies: g is the
    picture's area (R1) or longer side, if above 1 (R2), measured in proxies (TC 4.1; TC app. C, eq. 20).
    """
    return np.asarray(np.asarray(alpha, np.float64) * _gain(size, cfg))


def unrescale(alpha: Numbers, size: Numbers, cfg: VrcConfig, scale: float = 1.0) -> np.ndarray:
    """The area ratio in [min_ratio, 1] that a prediction alpha' stands for; the inverse of `rescale` in there.

    `scale` is the dial between cost and quality that `compress.calibrate` finds: a factor on the ratio.
    """
    ratio = np.clip(np.asarray(alpha, np.float64) / _gain(size, cfg), cfg.min_ratio, 1.0)
    return np.asarray(np.clip(scale * ratio, cfg.min_ratio, 1.0))


def _gain(size: Numbers, cfg: VrcConfig) -> np.ndarray:
    hw = np.asarray(size, np.float64)
    if hw.shape[-1:] != (2,) or (hw <= 0).any():
        raise CompressError(f"expected sizes (height, width) in pixels, found {size}")
    if cfg.rescale == "R1":
        return np.asarray(hw.prod(-1) / cfg.side**2)
    if cfg.rescale == "R2":
        return np.asarray(np.maximum(1.0, hw.max(-1) / cfg.side))
    return np.ones(hw.shape[:-1])
