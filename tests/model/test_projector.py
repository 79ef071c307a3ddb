"""Pixel shuffle and projector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.model.projector import Projector, pixel_shuffle


@pytest.mark.parametrize(("side", "merge"), [(4, 2), (6, 3), (4, 1)])
def test_each_token_is_its_square_of_patches_row_by_row(side, merge):
    x = np.random.default_rng(0).normal(size=(2, side * side, 5)).astype(np.float32)
    grid, cells = x.reshape(2, side, side, 5), side // merge
    got = pixel_shuffle(jnp.asarray(x), merge)
    assert got.shape == (2, cells * cells, merge * merge * 5)
    for i in range(cells):
        for j in range(cells):
            square = [grid[:, merge * i + a, merge * j + b] for a in range(merge) for b in range(merge)]
            np.testing.assert_array_equal(got[:, i * cells + j], np.concatenate(square, -1))


def test_the_order_is_that_of_internvl():
    """InternVL's `pixel_shuffle` in its corrected version, `ps_version v2`, ends in this order of axes."""
    x = np.arange(2 * 16 * 3, dtype=np.float32).reshape(2, 16, 3)
    want = x.reshape(2, 2, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 12)
    np.testing.assert_array_equal(pixel_shuffle(jnp.asarray(x), 2), want)


def test_projector_equals_the_oracle():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 16, 6)).astype(np.float32)
    shapes = jax.eval_shape(Projector(10).init, jax.random.key(0), jnp.asarray(x))
    params = jax.tree.map(lambda s: (0.5 * rng.normal(size=s.shape)).astype(np.float32), shapes["params"])
    p = jax.tree.map(np.float64, params)
    y = x.astype(np.float64).reshape(2, 2, 2, 2, 2, 6).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 24)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    y = (y * p["norm"]["weight"] + p["norm"]["bias"]) @ p["fc1"]["weight"].T + p["fc1"]["bias"]
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    want = y @ p["fc2"]["weight"].T + p["fc2"]["bias"]
    np.testing.assert_allclose(Projector(10).apply({"params": params}, jnp.asarray(x)), want, rtol=1e-4, atol=1e-5)
