"""What the decoder multiplies by its matrices, against a decoder in float64; and the 4 bits chosen by it."""

import jax
import numpy as np
import pytest

from hypervl_jax import ask, calibrate, gptq, quantize, text
from hypervl_jax.calibrate import CalibrationError, Sample
from hypervl_jax.config import ConfigError
from hypervl_jax.quantize import Rule

RECIPE = (Rule(r"llm\.blocks\..*", "int4"), Rule(".*", "int8"))  # the tiny model's rows are no groups of 32


@pytest.fixture(scope="module")
def samples(tiny_model):
    return calibrate.from_screens(tiny_model, 3)


@pytest.fixture(scope="module")
def found(tiny_model, samples):
    return list(calibrate.grams(tiny_model, samples, ("base", "large"), progress=False))


def norm(x, g, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * g


def rotated(x, theta):
    """[H L d], by the definition of the half-split rotation."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def layer(p, c, x):
    """(output, what the matrices are multiplied by) of one sample f64[L D]."""

    def linear(name, x):
        return x @ p[name]["weight"].T

    def heads(name, n):
        return linear(name, y).reshape(len(x), n, c.head_dim).swapaxes(0, 1)

    y = norm(x, p["norm1"]["weight"], c.eps)
    q, k, v = heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
    q, k = norm(q, p["q_norm"]["weight"], c.eps), norm(k, p["k_norm"]["weight"], c.eps)
    q, k = rotated(q, c.rope_theta), rotated(k, c.rope_theta)
    k, v = (np.repeat(a, c.heads // c.kv_heads, 0) for a in (k, v))
    scores = np.where(np.tri(len(x), dtype=bool), q @ k.swapaxes(1, 2) / c.head_dim**0.5, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    o = (probs / probs.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(x), -1)
    x = x + linear("o", o)
    z = norm(x, p["norm2"]["weight"], c.eps)
    gate = linear("gate", z)
    down = gate / (1 + np.exp(-gate)) * linear("up", z)
    return x + linear("down", down), {"q": y, "o": o, "gate": z, "down": down}


def test_gram_matrices_are_those_of_a_decoder_in_float64(tiny_model, samples, found):
    cfg, params = tiny_model.config, jax.tree.map(lambda a: np.asarray(a, np.float64), tiny_model.params)
    rows = []
    for i, s in enumerate(samples):
        seen = ask.see(tiny_model, s.pictures[0], ("base", "large")[i % 2], vrc=False)
        prompt = text.render(s.messages, [seen.plan], tiny_model.tokenizer, cfg.text)
        visual = prompt.slots[:, None] >= 0
        rows.append(np.where(visual, seen.features[np.maximum(prompt.slots, 0)], params["llm"]["embed"][prompt.ids]))
    assert len(found) == cfg.llm.depth == 2
    assert len({len(x) for x in rows}) > 1  # so that some of them are padded
    for i, grams in enumerate(found):
        both = [layer(jax.tree.map(lambda a: a[i], params["llm"]["blocks"]["layers"]), cfg.llm, x) for x in rows]  # noqa: B023
        for name, got in grams.items():
            x = np.concatenate([met[name] for _, met in both])
            want = x.T @ x / len(x)
            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), (i, name)
        rows = [x for x, _ in both]


def test_only_the_decoders_four_bits_are_chosen_anew(tiny_model, found):
    nearest = quantize.quantize(tiny_model.params, RECIPE)
    chosen = calibrate.calibrated(tiny_model.params, RECIPE, found)
    assert jax.tree.structure(chosen) == jax.tree.structure(nearest)
    layers = chosen["llm"]["blocks"]["layers"]
    for i, grams in enumerate(found):
        for name, source in calibrate.INPUT.items():
            w = np.asarray(tiny_model.params["llm"]["blocks"]["layers"][name]["weight"])[i]
            want = gptq.round_matrix(w, quantize.Kind(4), grams[source])
            np.testing.assert_array_equal(layers[name]["weight"].q[i], want.q)
            np.testing.assert_array_equal(layers[name]["weight"].scale[i], want.scale)
    before, after = quantize.matrices(nearest), quantize.matrices(chosen)
    other = {path for path in before if not all(map(np.array_equal, before[path], after[path]))}
    assert other == {f"llm.blocks.layers.{name}.weight" for name in calibrate.INPUT}


def test_single_layers_may_be_in_four_bits(tiny_model, found):
    recipe = (Rule(r"llm\.blocks\.layers\.1\.down\.weight", "int4"), Rule(".*", "int8"))
    chosen = calibrate.calibrated(tiny_model.params, recipe, found)
    assert [sorted(calibrate.narrow(layer)) for layer in calibrate.layers_of(chosen)] == [[], ["down"]]


def test_a_models_own_screens_and_conversations_are_samples(tiny_model, samples):
    again = calibrate.from_screens(tiny_model, 2)
    assert len(samples) == 3
    for a, b in zip(again, samples, strict=False):
        np.testing.assert_array_equal(a.pictures[0], b.pictures[0])
        assert a.messages == b.messages
        assert [m["role"] for m in a.messages] == ["user", "assistant"]
    with pytest.raises(ConfigError, match="does not say what it was trained on"):
        calibrate.from_screens(tiny_model._replace(info={}), 2)


def test_text_alone_is_a_sample_too(tiny_model):
    talk = Sample([], [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "this"}])
    assert len(list(calibrate.grams(tiny_model, [talk], ("base",), progress=False))) == 2


def test_no_samples_and_damaged_models_are_named(tiny_model, samples):
    def spoilt(path):
        params = jax.tree_util.tree_map_with_path(
            lambda p, a: a * np.nan if jax.tree_util.keystr(p, simple=True, separator=".") == path else a,
            tiny_model.params,
        )
        return list(calibrate.grams(tiny_model._replace(params=params), samples, ("base",), progress=False))

    with pytest.raises(CalibrationError, match="no samples to calibrate on"):
        list(calibrate.grams(tiny_model, [], ("base",)))
    with pytest.raises(CalibrationError, match=r"sample 1: the features of its pictures \(base\) are not finite"):
        spoilt("base.projector.fc1.bias")
    with pytest.raises(CalibrationError, match=r"llm\.blocks\.layers\.0\.q\.weight: what it is multiplied by is not"):
        spoilt("llm.blocks.layers.norm1.weight")


def test_a_layer_that_multiplies_nothing_is_named(tiny_model, found):
    silent = [{name: 0 * g for name, g in grams.items()} for grams in found]
    with pytest.raises(CalibrationError, match=r"llm\.blocks\.layers\.0\.q\.weight: inputs that are all zero"):
        calibrate.calibrated(tiny_model.params, RECIPE, silent)


def test_there_are_no_more_samples_than_screens(tiny_model):
    screens = tiny_model.info["config"]["data"]["screens"]
    assert len(calibrate.from_screens(tiny_model, 1_000)) == screens["train"]
