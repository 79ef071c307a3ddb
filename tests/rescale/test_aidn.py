"""AIDN: numbers of the official code with weights drawn from their names, its published size, any scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.rescale import hcd, weights
from hypervl_jax.rescale.aidn import Aidn, bilinear
from hypervl_jax.rescale.hcd import HcdConfig
from hypervl_jax.rescale.pairs import Pair
from hypervl_jax.tensors import flatten


@pytest.fixture(scope="module")
def golden(local_golden):
    return local_golden("aidn_tiny")


@pytest.fixture(scope="module")
def params(drawn):
    return drawn(Aidn(2.0, width=16, blocks=4))


def test_published_size_and_names(golden):
    shapes = jax.eval_shape(Aidn(2.0).init, jax.random.key(0))
    sizes = {name: leaf.size for name, leaf in flatten(shapes).items()}
    constants = 4 * 12  # shifts of the mean, which its file holds too
    assert sum(n for k, n in sizes.items() if "running" not in k) + constants == 3_775_362
    assert sorted(sizes) == [k for k in golden["names"] if not weights.UNUSED.fullmatch(k)]


@pytest.mark.parametrize("scale", [2.0, 2.5])
def test_both_directions_are_the_official_ones(params, golden, close, scale):
    hr, lr, up = (jnp.asarray(golden[f"{name}_{scale:g}"]) for name in ("hr", "lr", "up"))
    net = Aidn(scale, hr.shape[1:3], width=16, blocks=4)
    close(jax.jit(net.down)(params, hr), lr)
    close(jax.jit(net.up)(params, lr), up)


def test_without_a_size_the_scale_decides(params):
    net = Aidn(1.5, width=16, blocks=4)
    assert jax.eval_shape(net.up, params, jnp.zeros((1, 5, 7, 3))).shape == (1, 8, 10, 3)


def test_bilinear_at_pixels_between_them_and_outside():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    at = jnp.array([[1, 0], [0.5, 0.5], [-0.5, 0], [2.5, 1], [5, 5]]).reshape(1, 1, 5, 2)
    np.testing.assert_allclose(bilinear(x, at)[0, 0, :, 0], [1, 2, 0, 2.5, 0])


def test_hcd_lowers_its_loss_at_a_scale_that_is_not_whole(params, golden):
    hr = jnp.asarray(golden["hr_2.5"])
    pair = Pair(Aidn(2.5, hr.shape[1:3], width=16, blocks=4), params)
    trace = hcd.descend(pair, hr, HcdConfig(hr_steps=0, lr_steps=4)).lr_trace.loss
    assert (np.asarray(trace[-1]) < np.asarray(trace[0])).all()
