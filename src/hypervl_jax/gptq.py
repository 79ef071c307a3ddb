"""Integers of a matrix chosen together: what rounding one input leaves over is made up for by those that follow (GPTQ,
Frantar et al. 2210.17323, with the order of its `act_order`).

Rounding to the nearest minimises |W - Q|; what a layer's outputs lose is |(W - Q) x| for the x that it multiplies.
With their Gram matrix H = mean of x x^T, row by row of W, that is e H e^T (`error`), e = w - q. The grid is that of
`quantize.quantize_matrix`, so that files hold the result as they hold any other; only the scales of a group may be
smaller (`clipped`). A row that comes out no better than by rounding to the nearest is rounded to the nearest.
Axes: O outputs, I inputs, G groups of a row, i inputs of a group.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int8

from hypervl_jax import quantize
from hypervl_jax.quantize import Kind, Quantized

DAMPING = 0.01  # of the mean of H's diagonal, added to it: GPTQ's own
SHARES = np.arange(1.0, 0.5, -0.05)  # of the largest weight of a group, that may be the end of its range
BLOCK = 128  # inputs after which the rest of a matrix learns of them


class CalibrationError(ValueError):
    """Samples that a model cannot be calibrated on; the message says which and why."""


def round_matrix(w: Float[np.ndarray, "O I"], kind: Kind, gram: Float[np.ndarray, "I I"]) -> Quantized:
    """The integers that lose least of a layer's outputs, of those tried. `gram` is H, up to a factor.

    Raises `CalibrationError` for an H that is not finite or nothing but zeros.
    """
    w, h = np.asarray(w, np.float64), np.asarray(gram, np.float64)
    if not np.isfinite(h).all():
        raise CalibrationError("inputs that are not finite")
    if not h.any():
        raise CalibrationError("inputs that are all zero")
    order = np.argsort(-h.diagonal(), kind="stable")  # the largest first: they have the most others to lean on
    factor = _factor(h[np.ix_(order, order)])
    best = quantize.quantize_matrix(w, kind)
    q, scale = quantize.integers(best).copy(), best.scale.copy()
    least = error(w, _product(q, scale), h)
    for other in (scale.copy(), clipped(w, kind, h)):
        found = _compensated(w, other, kind, factor, order)
        lost = error(w, _product(found, other), h)
        better = lost < least
        q[better], scale[better], least[better] = found[better], other[better], lost[better]
    return quantize.quantized(q, scale, kind.bits)


def error(
    w: Float[np.ndarray, "O I"], q: Float[np.ndarray, "O I"], gram: Float[np.ndarray, "I I"]
) -> Float[np.ndarray, " O"]:
    """What each output loses: the mean of ((w - q) x)^2 over the rows x of the Gram matrix."""
    e = np.asarray(w, np.float64) - q
    return np.maximum(((e @ gram) * e).sum(-1), 0)


def clipped(w: Float[np.ndarray, "O I"], kind: Kind, gram: Float[np.ndarray, "I I"]) -> Float[np.ndarray, "O G"]:
    """Scales of each group with which rounding to the nearest loses least, inputs taken by themselves: the largest
    weights may lie beyond the range."""
    plain = quantize.quantize_matrix(w, kind).scale
    groups = np.asarray(w, np.float64).reshape(*plain.shape, -1)
    weights = gram.diagonal().reshape(plain.shape[-1], -1)
    best, least = plain.copy(), np.full(plain.shape, np.inf)
    for scale in _smaller(plain):
        lost = (np.square(groups - _nearest(groups, scale[..., None], kind) * _step(scale)[..., None]) * weights).sum(
            -1
        )
        best, least = np.where(lost < least, scale, best), np.minimum(lost, least)
    return best


def _smaller(scale: np.ndarray) -> Iterator[np.ndarray]:
    for share in SHARES:
        yield quantize.round_scale((scale.astype(np.float32) * np.float32(share)), grouped=scale.dtype == np.float16)


def _step(scale: np.ndarray) -> np.ndarray:
    return np.where(scale > 0, scale, 1).astype(np.float64)


def _nearest(w: np.ndarray, scale: np.ndarray, kind: Kind) -> np.ndarray:
    most = 2 ** (kind.bits - 1) - 1
    return np.clip(np.rint(w / _step(scale)), -most, most)


def _product(q: Int8[np.ndarray, "O I"], scale: Float[np.ndarray, "O G"]) -> np.ndarray:
    return (q.reshape(*scale.shape, -1) * scale[..., None].astype(np.float64)).reshape(q.shape)


def _factor(h: np.ndarray) -> np.ndarray:
    """The upper triangle U with H^-1 = U^T U. Damped, since H is singular where rows leave out a direction, or there
    are fewer of them than inputs."""
    inverse = np.linalg.inv(h + DAMPING * h.diagonal().mean() * np.eye(len(h)))
    return np.linalg.cholesky((inverse + inverse.T) / 2).T


def _compensated(
    w: np.ndarray, scale: np.ndarray, kind: Kind, factor: np.ndarray, order: np.ndarray
) -> Int8[np.ndarray, "O I"]:
    """Input after input, in `order`: rounded, and what is left over taken out of those that follow."""
    rest, group = w[:, order], w.shape[1] // scale.shape[1]
    steps = scale[:, order // group]
    q = np.empty_like(rest)
    for start in range(0, rest.shape[1], BLOCK):
        end = min(start + BLOCK, rest.shape[1])
        left = np.empty((len(w), end - start))
        for j in range(start, end):
            q[:, j] = _nearest(rest[:, j], steps[:, j], kind)
            left[:, j - start] = (rest[:, j] - q[:, j] * _step(steps[:, j])) / factor[j, j]
            rest[:, j + 1 : end] -= left[:, j - start, None] * factor[j, j + 1 : end]
        rest[:, end:] -= left @ factor[start:end, end:]
    out = np.empty(w.shape, np.int8)
    out[:, order] = q
    return out
