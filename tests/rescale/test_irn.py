"""The flows against the official code's numbers: channel order, couplings, counts, the way back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.rescale import weights
from hypervl_jax.rescale.irn import Coupling, Irn, firn
from hypervl_jax.rescale.layers import haar, leaky, pixel_shuffle, unhaar
from hypervl_jax.rescale.pairs import quantise


def count(net):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0))))


@pytest.fixture(scope="module")
def tiny(golden):
    """(net, params, golden numbers): the official IRN x4 with blocks [2, 2] and growth 8."""
    g, net = golden("irn_tiny_x4_blocks22_gc8"), Irn((2, 2), growth=8)
    return net, weights.fit(net, {k[2:]: v for k, v in g.items() if k.startswith("w/")}, "golden"), g


@pytest.mark.parametrize(
    ("net", "number"),
    [
        (Irn((8,)), 1_667_952),
        (Irn((8, 8)), 4_355_136),
        (Irn((8, 8, 8)), 11_119_248),
        (firn(), 320_880 - 240),  # less the Haar kernels, which its file holds too
    ],
)
def test_published_parameter_counts(net, number):
    assert count(net) == number


def test_haar_is_the_official_one_and_goes_back(tiny, close):
    _, _, g = tiny
    close(haar(jnp.asarray(g["hr"])), g["haar1"], 1e-6)
    close(unhaar(haar(jnp.asarray(g["hr"]))), g["hr"], 1e-6)


def test_pixel_shuffle_counts_channels_as_pytorch():
    x = jnp.arange(8.0).reshape(1, 1, 1, 8)
    np.testing.assert_array_equal(pixel_shuffle(x, 2)[0, :, :, 0], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(pixel_shuffle(x, 2)[0, :, :, 1], [[4, 5], [6, 7]])


def test_one_coupling_is_the_official_one(tiny, close):
    _, params, g = tiny
    got = Coupling(growth=8).apply({"params": params["operations.1"]}, jnp.asarray(g["haar1"]))
    close(got, g["block1"])


def test_forward_small_picture_and_inverse_are_the_official_ones(tiny, close):
    net, params, g = tiny
    forward = jax.jit(net.forward)(params, jnp.asarray(g["hr"]))
    close(forward, g["fwd48"])
    close(quantise(forward[..., :3]), g["lr"])
    latent = jnp.concatenate([jnp.asarray(g["lr"]), jnp.asarray(g["z"])], -1)
    close(jax.jit(net.inverse)(params, latent), g["up"])
    close(jax.jit(net.inverse)(params, forward), g["hr"])


def test_up_draws_the_detail(tiny, close):
    net, params, g = tiny
    lr, up = jnp.asarray(g["lr"]), jax.jit(net.up)
    nothing = jnp.concatenate([lr, jnp.zeros((*lr.shape[:3], 45))], -1)
    close(up(params, lr, None), jax.jit(net.inverse)(params, nothing))
    one, other = (up(params, lr, jax.random.key(i)) for i in (0, 1))
    assert np.abs(np.asarray(one) - np.asarray(other)).max() > 0.01


@pytest.mark.parametrize("net", [Irn((1, 1), growth=8), Irn((1,), growth=3), Irn((1, 1), "light")])
def test_the_forms_compute_the_same(net, close):
    """As CPUs like it, and as the papers write it: there, back, and the gradients of both."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), shapes)
    hr = jnp.asarray(rng.random((2, 12, 20, 3)), jnp.float32)

    def lost(net, params, hr):
        forward = net.forward(params, hr)
        back = net.inverse(params, forward.at[..., 3:].multiply(0.5))
        return ((back - hr) ** 2).sum(), (forward, back)

    lost = jax.jit(jax.value_and_grad(lost, (1, 2), has_aux=True), static_argnums=0)
    got, want = (lost(dataclasses.replace(net, form=form), params, hr) for form in ("wide", "plain"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(a, b, 2e-5)


def test_a_leaky_relu_has_the_slope_of_pytorch():
    x = jnp.array([-2.0, -0.0, 0.0, 3.0])
    slope = jax.vmap(jax.grad(leaky))
    np.testing.assert_allclose(slope(x), [0.2, 0.2, 0.2, 1.0])
    np.testing.assert_allclose(jax.jvp(leaky, (x,), (2 * x,))[1], [-0.8, 0, 0, 6], rtol=1e-6)
    twice = jax.vmap(jax.grad(jax.grad(lambda x: leaky(x) ** 2)))
    np.testing.assert_allclose(twice(x), [0.08, 0.08, 0.08, 2.0], rtol=1e-6)


def test_flops_are_those_of_the_convolutions():
    """Of both stages by hand, and by the compiler's count of the whole, which has a little more to it."""
    net = Irn((1, 2), growth=3, form="plain")
    f, g = ((3 * (n + n + 3 + n + 6 + n + 9) + m * (n + 12)) * 9 for n, m in ((9, 3), (3, 9)))
    wide_f, wide_g = ((3 * (n + n + 3 + n + 6 + n + 9) + m * (n + 12)) * 9 for n, m in ((45, 3), (3, 45)))
    assert net.flops(32) == 2 * ((f + 2 * g) * 16**2 + 2 * (wide_f + 2 * wide_g) * 8**2)
    one = jax.jit(net.forward).lower(net.init(jax.random.key(0)), jnp.zeros((1, 32, 32, 3))).compile()
    assert 0.7 * net.flops(32) < one.cost_analysis()["flops"] < 1.2 * net.flops(32)  # borders multiply nothing


def test_a_fresh_network_shrinks_by_the_mean():
    net = Irn((1,), growth=2)
    hr = jax.random.uniform(jax.random.key(0), (2, 4, 6, 3))
    small = net.down(net.init(jax.random.key(1)), hr)
    np.testing.assert_allclose(small, hr.reshape(2, 2, 2, 3, 2, 3).mean((2, 4)), atol=1e-6)


def test_sides_that_do_not_divide_are_refused(tiny_pair):
    with pytest.raises(ValueError, match="5 x 4 px is no multiple of 2"):
        tiny_pair.down(jnp.zeros((1, 4, 5, 3)))


# --- FIRN, with its real weights -------------------------------------------------------------------------------------


def test_firn_is_the_official_one(rescaling, golden, close):
    g = golden("firn_x4_butterfly64")
    pair = weights.load(firn(), rescaling / "weights" / "firn_x4.npz")
    forward = jax.jit(pair.net.forward)(pair.params, jnp.asarray(g["hr_u8"][None], jnp.float32) / 255)
    close(forward, g["fwd48"])
    close(quantise(forward[..., :3]), g["lr"])
    inverse = jax.jit(pair.net.inverse)
    close(inverse(pair.params, jnp.concatenate([jnp.asarray(g["lr"]), jnp.asarray(g["z"])], -1)), g["up"])
    close(inverse(pair.params, forward), g["hr_u8"][None] / 255)
