"""AWQ: the same function, and less lost of it by 4 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import awq, calibrate, gptq, quantize
from hypervl_jax.model import llm
from hypervl_jax.quantize import Kind, Rule

RECIPE = (Rule(r"llm\.blocks\..*", "int4"), Rule(".*", "int8"))  # the tiny model's rows are no groups of 32


@pytest.fixture(scope="module")
def found(tiny_model):
    return list(calibrate.grams(tiny_model, calibrate.from_screens(tiny_model, 3), ("base",), progress=False))


@pytest.fixture(scope="module")
def scaled(tiny_model, found):
    return awq.scaled(tiny_model.params, RECIPE, found)


def inputs(seed=0, rows=400, width=64, loud=6):
    """Rows of which a few inputs are much larger."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width))
    x[:, :loud] *= 20
    return x.T @ x / rows


def matrix(seed=1, shape=(12, 64)):
    return np.random.default_rng(seed).normal(size=shape)


def lost(w, s, kind, h):
    return gptq.error(w, quantize.floats(quantize.quantize_matrix(w * s, kind)) / s, h).sum()


@pytest.mark.parametrize("kind", [Kind(4, 32), Kind(4, 64), Kind(4)])
def test_loud_inputs_are_rounded_finer(kind):
    w, h = matrix(), inputs()
    s = awq.scales([(w, kind)], h)
    assert s[:6].min() > 2 * s[6:].max()
    assert s.max() * s.min() == pytest.approx(1)
    assert lost(w, s, kind, h) < 0.5 * lost(w, 1, kind, h)


def test_scales_are_the_best_of_all_tried():
    w, kind, h = matrix(), Kind(4, 32), inputs(loud=3)
    size = np.sqrt(h.diagonal())
    tried = [lost(w, size**a / np.sqrt((size**a).max() * (size**a).min()), kind, h) for a in np.arange(20) / 20]
    assert lost(w, awq.scales([(w, kind)], h), kind, h) == pytest.approx(min(tried), rel=1e-9)


def test_one_scale_serves_all_matrices_of_an_input():
    a, b, h, kind = matrix(1), matrix(2), inputs(), Kind(4, 32)
    s = awq.scales([(a, kind), (b, kind)], h)
    assert lost(a, s, kind, h) + lost(b, s, kind, h) <= lost(a, 1, kind, h) + lost(b, 1, kind, h)


def test_inputs_that_are_always_zero_do_no_harm():
    h = inputs()
    h[9], h[:, 9] = 0, 0
    s = awq.scales([(matrix(), Kind(4))], h)
    assert np.isfinite(s).all()
    assert s.min() > 0


def test_what_is_not_in_four_bits_stays(tiny_model, found):
    same, grams = awq.scaled(tiny_model.params, (Rule(".*", "int8"),), found)
    jax.tree.map(np.testing.assert_array_equal, same, tiny_model.params)
    for a, b in zip(grams, found, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_function_is_the_same(tiny_model, scaled):
    cfg = tiny_model.config.llm
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, cfg.width)), jnp.float32)

    def hidden(params):
        positions, mask = jnp.tile(jnp.arange(9), (2, 1)), jnp.tile(jnp.tri(9, dtype=bool), (2, 1, 1))
        return llm.Llm(cfg).apply({"params": params["llm"]}, x, positions, mask)[0]

    want, got = hidden(tiny_model.params), hidden(scaled[0])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    down = "blocks", "layers", "down", "weight"
    assert not np.allclose(_at(scaled[0]["llm"], down), _at(tiny_model.params["llm"], down), rtol=1e-3)


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def test_gram_matrices_are_those_of_the_other_model(tiny_model, scaled):
    params, grams = scaled
    model = tiny_model._replace(params=params)
    again = calibrate.grams(model, calibrate.from_screens(model, 3), ("base",), progress=False)
    for got, want in zip(grams, again, strict=True):
        for name in want:
            np.testing.assert_allclose(got[name], want[name], atol=1e-5 * np.abs(want[name]).max(), rtol=0)


def test_four_bits_lose_less(tiny_model, found, scaled):
    """Of every layer, over its matrices whose inputs are scaled; and GPTQ may follow."""
    params, grams = scaled
    followed = calibrate.calibrated(params, RECIPE, grams)
    for i in range(tiny_model.config.llm.depth):
        plain = _lost(tiny_model.params, quantize.quantize(tiny_model.params, RECIPE), found[i], i)
        less = _lost(params, quantize.quantize(params, RECIPE), grams[i], i)
        assert less < plain
        assert _lost(params, followed, grams[i], i) < less


def _lost(params, kept, found, i):
    layer, plain = calibrate.layers_of(kept)[i], calibrate.at(params, i)
    names = [n for _, some in awq.SETS for n in some]
    return sum(
        gptq.error(plain[n]["weight"], quantize.floats(layer[n]["weight"]), found[calibrate.INPUT[n]]).sum()
        for n in names
    )
