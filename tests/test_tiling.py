"""Tiles hold the picture, the whole picture and nothing but the picture; numpy and jax agree to the bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervl_jax.config import PlanPolicy
from hypervl_jax.plan import PlanError, make
from hypervl_jax.tiling import tile, untile

MODES = ("native_pad", "grid_match", "grid_pad")
SMALL = PlanPolicy(tile=16, patch=4, max_tiles=9, min_side=4)


def picture(plan, dtype=np.uint8):
    rng = np.random.default_rng(sum(plan.resized))
    return rng.integers(1, 256, (*plan.resized, 3)).astype(dtype)  # never 0, so padding shows


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.floats(0.1, 1),
    st.sampled_from(MODES),
    st.sampled_from([np.uint8, np.float32]),
)
def test_untile_is_the_exact_inverse(size, ratio, mode, dtype):
    plan = make(size, ratio, replace(SMALL, mode=mode))
    x = picture(plan, dtype)
    tiles = tile(x, plan)
    assert tiles.dtype == dtype
    assert tiles.shape == (plan.grid[0] * plan.grid[1], 16, 16, 3)
    np.testing.assert_array_equal(untile(tiles, plan), x)
    for got, place in zip(tiles, plan.tiles, strict=False):  # the rectangle of the plan, and zeros around it
        real = np.zeros((16, 16), bool)
        real[place.top : place.top + place.height, place.left : place.left + place.width] = True
        assert (got[real] != 0).all()
        assert (got[~real] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_numpy_and_jax_are_equal_and_jit_able(mode):
    plan = make((37, 61), 0.9, replace(SMALL, mode=mode))
    x = picture(plan)
    by_jax = jax.jit(tile, static_argnums=1)(jnp.asarray(x), plan)
    assert isinstance(by_jax, jax.Array)
    assert isinstance(tile(x, plan), np.ndarray)
    np.testing.assert_array_equal(by_jax, tile(x, plan))
    back = jax.jit(untile, static_argnums=1)(by_jax, plan)
    assert isinstance(back, jax.Array)
    np.testing.assert_array_equal(back, x)


def test_order_is_row_major():
    plan = make((32, 48), policy=replace(SMALL, thumbnail=False))
    x = np.zeros((32, 48, 3), np.uint8)
    x[16:, 16:32] = 7  # second row, second column
    assert [int(t.max()) for t in tile(x, plan)] == [0, 0, 0, 0, 7, 0]


def test_a_thumbnail_is_ignored_and_wrong_shapes_are_refused():
    plan = make((30, 50), policy=SMALL)
    x = picture(plan)
    tiles = tile(x, plan)
    with_thumbnail = np.concatenate([tiles, np.full((1, 16, 16, 3), 9, np.uint8)])
    np.testing.assert_array_equal(untile(with_thumbnail, plan), x)
    with pytest.raises(PlanError, match="resize"):
        tile(x[:-1], plan)
    with pytest.raises(PlanError, match="tiles"):
        untile(tiles[:-1], plan)
    with pytest.raises(PlanError, match="tiles"):
        untile(tiles[:, :8, :8], plan)


def test_differentiable():
    """Pixels are what rescaling descends on: the gradient comes back through the tiles unchanged."""
    plan = make((20, 20), policy=SMALL)
    x = jnp.asarray(picture(plan, np.float32))
    np.testing.assert_allclose(jax.grad(lambda v: (tile(v, plan) ** 2).sum() / 2)(x), x)
