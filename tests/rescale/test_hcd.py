"""HCD: the official algorithm's numbers, and what its options promise."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypervl_jax.rescale import hcd, metrics, weights
from hypervl_jax.rescale.hcd import Descent, HcdConfig
from hypervl_jax.rescale.irn import firn
from hypervl_jax.rescale.pairs import Pair, quantise

ZERO = HcdConfig(hr=Descent(start="zero", quantise=True), lr=Descent(start="zero"), z="fixed")


# --- the golden trace: FIRN x4 with its real weights, start 0, one given z --------------------------------------------


@pytest.fixture(scope="module")
def trace(golden):
    return golden("firn_x4_butterfly64")


@pytest.fixture(scope="module")
def firn_given(rescaling, trace, given):
    """(pair, picture) of the trace."""
    params = weights.load(firn(), rescaling / "weights" / "firn_x4.npz").params
    pair = Pair(given((8, 8), "light"), {"net": params, "z": jnp.asarray(trace["z"])})
    return pair, jnp.asarray(trace["hr_u8"][None], jnp.float32) / 255


@pytest.fixture(scope="module")
def whole(firn_given):
    return hcd.descend(*firn_given, ZERO)


def test_the_losses_are_those_of_the_official_loop(whole, trace):
    np.testing.assert_allclose(whole.hr_trace.loss[:, 0], trace["hcd_hr_loss"][:15], rtol=1e-4)
    np.testing.assert_allclose(whole.lr_trace.loss[:, 0], trace["hcd_lr_loss"][:15], rtol=1e-4)


def test_the_gradient_norms_are_those_of_the_official_loop(whole, trace):
    np.testing.assert_allclose(whole.hr_trace.grad_norm[:, 0], trace["hcd_hr_gradnorm"], rtol=5e-3)
    np.testing.assert_allclose(whole.lr_trace.grad_norm[:, 0], trace["hcd_lr_gradnorm"], rtol=5e-3)


@pytest.mark.parametrize(("steps", "tolerance"), [(1, 1e-4), (5, 1e-2), (15, 5e-2)])
def test_the_large_picture_moves_as_in_the_official_loop(firn_given, trace, close, steps, tolerance):
    pair, hr = firn_given
    moved = hcd.descend(pair, hr, dataclasses.replace(ZERO, hr_steps=steps, lr_steps=0)).hr - hr
    close(moved, trace[f"hcd_hr_delta{steps}"], tolerance)


@pytest.mark.parametrize("steps", [1, 5, 15])
def test_the_small_picture_moves_as_in_the_official_loop(firn_given, trace, steps):
    """In 8 bits: at most one sample in a hundred may have been rounded the other way."""
    got = hcd.descend(*firn_given, dataclasses.replace(ZERO, lr_steps=steps)).lr
    want = np.asarray(quantise(jnp.asarray(trace["hcd_lr_start"] + trace[f"hcd_lr_delta{steps}"])))
    assert np.abs(np.asarray(got) - want).max() < 1.01 / 255
    assert (np.abs(np.asarray(got) - want) > 1e-6).mean() <= 0.01


def test_the_restored_picture_is_better_by_as_much_as_the_official_one(firn_given, whole, trace):
    pair, hr = firn_given
    up = jax.jit(pair.net.up)
    original = metrics.to_u8(np.asarray(hr[0]))
    before = metrics.to_u8(np.asarray(up(pair.params, hcd._shrink(pair, hr))[0]))
    after = metrics.to_u8(np.asarray(up(pair.params, whole.lr)[0]))
    for measure, name, tolerance in ((metrics.psnr, "psnr", 0.01), (metrics.ssim, "ssim", 1e-3)):
        assert measure(before, original, 4) == pytest.approx(trace[f"{name}_y_before"], abs=tolerance)
        assert measure(after, original, 4) == pytest.approx(trace[f"{name}_y_after"], abs=tolerance)
