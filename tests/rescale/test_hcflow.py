"""HCFlow: numbers of the official code with weights drawn from their names, its published size, the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.rescale import hcd
from hypervl_jax.rescale.hcd import HcdConfig
from hypervl_jax.rescale.hcflow import HcFlow
from hypervl_jax.rescale.pairs import Pair
from hypervl_jax.tensors import flatten


@pytest.fixture(scope="module")
def golden(local_golden):
    return local_golden("hcflow_tiny")


@pytest.fixture(scope="module")
def tiny(drawn):
    net = HcFlow(steps=2, conditional=2)
    return net, drawn(net)


def test_published_size_and_names(golden):
    shapes = jax.eval_shape(HcFlow().init, jax.random.key(0))
    haar = 4 * 12 + 4 * 24  # kernels, constants that its file holds too
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) + haar == 4_396_350
    assert sorted(flatten(shapes)) == list(golden["names"])


def test_both_directions_are_the_official_ones(tiny, golden, close):
    net, params = tiny
    small, outer, inner = jax.jit(net.forward)(params, jnp.asarray(golden["hr"]))
    close(small, golden["lr"])
    close(outer, golden["z_outer"])
    close(inner, golden["z_inner"])
    inverse = jax.jit(net.inverse)
    close(inverse(params, golden["lr"], golden["noise_outer"], golden["noise_inner"]), golden["up"])
    close(inverse(params, small, outer, inner), golden["hr"])
    close(net.down(params, jnp.asarray(golden["hr"])), golden["lr"])


def test_hcd_lowers_its_loss(tiny, golden):
    net, params = tiny
    config = HcdConfig(hr_steps=0, lr_steps=4, z="fixed")
    trace = hcd.descend(Pair(net, params), jnp.asarray(golden["hr"]), config).lr_trace.loss
    assert (np.asarray(trace[-1]) < np.asarray(trace[0])).all()
