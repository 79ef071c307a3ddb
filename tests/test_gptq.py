"""GPTQ against its definition in float64: every input rounded in turn, the inverse taken anew of what is left."""

import numpy as np
import pytest

from hypervl_jax import gptq, quantize
from hypervl_jax.gptq import CalibrationError
from hypervl_jax.quantize import KINDS, Kind

O, I = 12, 64
narrow = pytest.mark.parametrize("kind", [Kind(4, 32), Kind(4, 64), Kind(4), Kind(8)])


def matrix(seed=0, shape=(O, I)):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1)))).astype(np.float32)


def gram(rows=400, seed=1, width=I):
    """Inputs that depend on one another, of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 8)) @ rng.normal(size=(8, width)) + 0.3 * rng.normal(size=(rows, width))
    x *= np.exp(rng.normal(size=width))
    return x.T @ x / rows


def oracle(w, scale, kind, h):
    """Frantar et al., algorithm of section 3 without its shortcuts: after input j is fixed, the others move to the
    least squares solution, d = -(e_j / [F^-1]_jj) [F^-1]_j of the inputs F that are left."""
    most, w = 2 ** (kind.bits - 1) - 1, np.array(w, np.float64)
    h = h + gptq.DAMPING * np.mean(np.diag(h)) * np.eye(len(h))
    step = np.repeat(scale.astype(np.float64), w.shape[1] // scale.shape[1], 1)
    left, q = list(np.argsort(-np.diag(h), kind="stable")), np.zeros(w.shape, int)
    while left:
        j, inverse = left[0], np.linalg.inv(h[np.ix_(left, left)])
        q[:, j] = np.clip(np.rint(w[:, j] / step[:, j]), -most, most)
        e = w[:, j] - q[:, j] * step[:, j]
        w[:, left] -= np.outer(e / inverse[0, 0], inverse[0])
        left = left[1:]
    return q


def lost(w, kept, h):
    e = np.asarray(w, np.float64) - quantize.floats(kept)
    return np.einsum("oi,ij,oj->o", e, h, e)


@narrow
@pytest.mark.parametrize("block", [7, 128])
def test_integers_are_those_of_the_definition(kind, block, monkeypatch):
    monkeypatch.setattr(gptq, "BLOCK", block)
    w, h = matrix(), gram()
    scale = quantize.quantize_matrix(w, kind).scale
    order = np.argsort(-h.diagonal(), kind="stable")
    got = gptq._compensated(w.astype(np.float64), scale, kind, gptq._factor(h[np.ix_(order, order)]), order)
    np.testing.assert_array_equal(got, oracle(w, scale, kind, h))


@narrow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [5, 400])
def test_no_output_loses_more_than_by_rounding_to_the_nearest(kind, seed, rows):
    w, h = matrix(seed), gram(rows, seed + 10)
    nearest, kept = quantize.quantize_matrix(w, kind), gptq.round_matrix(w, kind, h)
    before, after = lost(w, nearest, h), lost(w, kept, h)
    assert (after <= before * (1 + 1e-5)).all()
    if kind.bits == 4:
        assert after.sum() < 0.6 * before.sum()


@narrow
def test_the_grid_is_that_of_rounding(kind):
    w = matrix()
    nearest, kept = quantize.quantize_matrix(w, kind), gptq.round_matrix(w, kind, gram())
    assert (kept.q.shape, kept.q.dtype, kept.scale.shape, kept.scale.dtype, kept.kind) == (
        nearest.q.shape, nearest.q.dtype, nearest.scale.shape, nearest.scale.dtype, kind,
    )  # fmt: skip
    assert np.abs(quantize.integers(kept)).max() <= 2 ** (kind.bits - 1) - 1
    assert (kept.scale <= nearest.scale).all()
    if kind.group:  # what kernels of phones keep of a scale
        np.testing.assert_array_equal(quantize.round_scale(kept.scale.astype(np.float32), grouped=True), kept.scale)


def test_inputs_by_themselves_are_rounded_by_themselves():
    """A diagonal H: nothing makes up for anything, and scales alone may do better than the nearest."""
    w, h = matrix(), np.diag(np.arange(1.0, I + 1))
    kind = Kind(4, 32)
    scale = gptq.clipped(w, kind, h)
    order = np.argsort(-h.diagonal())
    q = gptq._compensated(w.astype(np.float64), scale, kind, gptq._factor(h[np.ix_(order, order)]), order)
    step = np.repeat(scale.astype(np.float64), 32, 1)
    np.testing.assert_array_equal(q, np.clip(np.rint(w / np.where(step > 0, step, 1)), -7, 7))
    assert lost(w, quantize.quantized(q, scale, 4), h).sum() < lost(w, quantize.quantize_matrix(w, kind), h).sum()


def test_the_smaller_scale_is_the_best_of_those_tried():
    """Group by group against a search that is written out."""
    w, h, kind = matrix(3, (4, 64)), gram(seed=5), Kind(4)
    found = gptq.clipped(w, kind, h)
    for row, plain, got in zip(
        w.astype(np.float64), quantize.quantize_matrix(w, kind).scale[:, 0], found[:, 0], strict=True
    ):
        tried = [np.float32(plain * np.float32(share)) for share in gptq.SHARES]
        losses = [(np.diag(h) * (row - np.clip(np.rint(row / s), -7, 7) * np.float64(s)) ** 2).sum() for s in tried]
        assert got == tried[int(np.argmin(losses))]


@pytest.mark.parametrize("dead", [[0, 5], list(range(1, I))])
def test_a_singular_gram_matrix_is_no_obstacle(dead):
    """Inputs that were never other than zero, and more inputs than rows."""
    h = gram(rows=3)
    h[dead], h[:, dead] = 0, 0
    w = matrix()
    kept = gptq.round_matrix(w, KINDS["int4/32"], h)
    assert (lost(w, kept, h) <= lost(w, quantize.quantize_matrix(w, Kind(4, 32)), h) * (1 + 1e-5)).all()


@pytest.mark.parametrize(("bad", "says"), [(np.nan, "not finite"), (np.inf, "not finite"), (0, "all zero")])
def test_what_says_nothing_is_refused(bad, says):
    h = gram() if bad else np.zeros((I, I))
    h[3, 3] = bad
    with pytest.raises(CalibrationError, match=says):
        gptq.round_matrix(matrix(), Kind(4, 32), h)


def test_nothing_but_zeros_stays_so():
    assert not quantize.integers(gptq.round_matrix(np.zeros((3, I)), Kind(4, 32), gram())).any()
