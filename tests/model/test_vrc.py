"""The VRC network: published counts, two depthwise forms, batch norm as plain parameters, folding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.config import VrcConfig
from hypervl_jax.model import vrc
from hypervl_jax.presets import tiny

CFG = tiny().model.vrc


def leaves(tree):
    return [("/".join(p.key for p in path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


@pytest.fixture(scope="module")
def params():
    """Untrained weights, and statistics, scales and biases that are not the identity."""
    rng = np.random.default_rng(0)
    ranges = {"mean": (-0.3, 0.3), "var": (0.5, 2), "scale": (0.5, 1.5), "bias": (-0.2, 0.2)}

    def shake(path, leaf):
        low_high = ranges.get(path[-1].key)
        return jnp.asarray(rng.uniform(*low_high, leaf.shape), jnp.float32) if low_high else leaf

    return jax.tree.map_with_path(shake, vrc.init(jax.random.key(0), CFG))


@pytest.fixture(scope="module")
def proxies():
    return jax.random.uniform(jax.random.key(1), (3, CFG.side, CFG.side, 3))


@pytest.fixture(scope="module")
def expected(params, proxies):
    """The prediction with stored statistics and the library's convolution."""
    return jax.jit(vrc.Vrc(CFG, depthwise="conv").apply)({"params": params}, proxies)


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("multiplier", "count", "macs"), [(1.0, 1.262e6, 0.539e9), (0.35, 0.189e6, 0.098e9)])
def test_the_trunk_has_the_published_size(multiplier, count, macs):
    cfg = VrcConfig(multiplier=multiplier)
    shapes = jax.eval_shape(lambda k: vrc.init(k, cfg), jax.random.key(0))
    trunk = {name: leaf.size for name, leaf in leaves(shapes) if name.startswith("block")}
    learned = sum(size for name, size in trunk.items() if name.split("/")[-1] not in ("mean", "var"))
    assert round(learned, -3) == count
    assert round(vrc.macs(cfg), -6) == macs


@pytest.mark.parametrize(("channels", "expected"), [(32, 32), (11.2, 16), (33.6, 32), (22.4, 24), (44.8, 48), (1, 8)])
def test_channels_are_multiples_of_eight_and_lose_at_most_a_tenth(channels, expected):
    assert vrc.make_divisible(channels) == expected


def test_init_makes_the_tree_of_the_module_in_a_sane_range():
    cfg = VrcConfig(multiplier=0.1, side=32, hidden=16)
    mine = jax.jit(lambda k: vrc.init(k, cfg))(jax.random.key(0))
    theirs = jax.eval_shape(vrc.Vrc(cfg).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, theirs)
    weight = mine["block_17"]["weight"]  # the last and widest convolution
    assert weight.std() == pytest.approx((vrc.GAIN / weight.shape[2]) ** 0.5, rel=0.1)
    assert mine["block_5"]["mid"]["var"].min() == 1
    assert mine["block_5"]["mid"]["mean"].max() == 0


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_shifted_multiplies_are_the_depthwise_convolution_and_its_gradients(kernel, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 7, 8)), jnp.float32)  # an even and an odd side
    w = jnp.asarray(rng.normal(size=(kernel, kernel, 1, 8)), jnp.float32)
    pull = jnp.asarray(rng.normal(size=(2, -(-6 // stride), -(-7 // stride), 8)), jnp.float32)

    def value_and_grads(form):
        y, back = jax.vjp(lambda x, w: form(x, w, stride), x, w)
        return y, back(pull)

    got, want = jax.jit(lambda: tuple(map(value_and_grads, (vrc.shift_multiply, vrc.convolve))))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, want)


def test_both_depthwise_forms_agree(params, proxies, expected):
    got = jax.jit(vrc.Vrc(CFG, depthwise="shift").apply)({"params": params}, proxies)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_folded_equals_stored_statistics(params, proxies, expected):
    folded = vrc.fold(params)
    assert {name.split("/")[-1] for name, _ in leaves(folded)} == {"weight", "bias"}
    got = jax.jit(vrc.Vrc(CFG, folded=True).apply)({"params": folded}, proxies)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_predictions_are_positive_and_depend_on_the_picture(expected):
    assert expected.shape == (3,)
    assert (expected > 0).all()
    assert np.ptp(expected) > 1e-4


def test_folded_and_train_exclude_each_other(params, proxies):
    with pytest.raises(ValueError, match="fold after training"):
        vrc.Vrc(CFG, train=True, folded=True).apply({"params": params}, proxies)


# --- batch statistics ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(params, proxies):
    """(prediction, statistics), gradients: one training forward and backward."""

    def run(params):
        prediction, stats = vrc.Vrc(CFG, train=True).apply({"params": params}, proxies)
        return prediction.sum(), (prediction, stats)

    (_, out), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    return out, grads


def test_statistics_mirror_the_parameters(params, trained):
    (_, stats), _ = trained
    stored = {name: leaf.shape for name, leaf in leaves(params) if name.split("/")[-1] in ("mean", "var")}
    assert {name: leaf.shape for name, leaf in leaves(stats)} == stored


def test_the_first_statistics_are_those_of_the_first_convolution(params, proxies, trained):
    (_, stats), _ = trained
    y = vrc.convolve((proxies - jnp.array(vrc.MEAN)) / jnp.array(vrc.STD), params["block_0"]["weight"], 2)
    np.testing.assert_allclose(stats["block_0"]["mean"], y.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["block_0"]["var"], y.var((0, 1, 2)), rtol=1e-4)


def test_stored_statistics_of_the_batch_reproduce_training(params, proxies, trained):
    """What training normalised by, stored, gives the training prediction at inference; so does folding it."""
    (prediction, stats), _ = trained
    stored = vrc.update_stats(params, stats, momentum=0.0)
    got = jax.jit(vrc.Vrc(CFG, folded=True).apply)({"params": vrc.fold(stored)}, proxies)
    np.testing.assert_allclose(got, prediction, rtol=1e-4)


def test_update_stats_moves_statistics_only(params, trained):
    (_, stats), _ = trained
    after = dict(leaves(vrc.update_stats(params, stats, momentum=0.75)))
    batch = dict(leaves(stats))
    for name, before in leaves(params):
        want = 0.75 * before + 0.25 * batch[name] if name in batch else before
        np.testing.assert_array_equal(after[name], want)


def test_training_reaches_every_weight_and_no_statistic(trained):
    _, grads = trained
    for name, grad in leaves(grads):
        reached = bool(np.abs(grad).max() > 0)
        assert reached == (name.split("/")[-1] not in ("mean", "var")), name
