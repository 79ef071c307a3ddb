"""AdamW and Muon by group: equal to their oracles, idle groups untouched, which weights decay, the rate over time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypervl_jax import checkpoint, optim, tensors
from hypervl_jax.config import ConfigError, Rule, TrainConfig

CFG = TrainConfig(lr=0.05, weight_decay=0.1, clip=0.7)
MUON = replace(CFG, optimizer="muon")


def tree(seed):
    rng = np.random.default_rng(seed)
    layer = {"weight": rng.normal(size=(3, 4)), "bias": rng.normal(size=3)}
    norm = {"weight": rng.normal(size=3), "bias": rng.normal(size=3)}
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), {"fc": layer, "norm1": norm})


def test_a_group_alone_is_optax_adamw_after_clipping():
    params = {"a": tree(0)}
    ours, opt = params, optim.init(CFG, params)
    rule = optax.chain(
        optax.clip_by_global_norm(CFG.clip),
        optax.adamw(0.05, b1=CFG.b1, b2=CFG.b2, weight_decay=0.1, mask={"a": optim.decays(params["a"])}),
    )
    theirs, state = params, rule.init(params)
    for seed in (1, 2, 3):
        grads = {"a": tree(seed)}
        ours, opt, norm = optim.update(CFG, jnp.float32(0.05), grads, opt, ours)
        assert norm == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)
        assert norm > CFG.clip
        step, state = rule.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, step)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_muon_steps_matrices_with_equal_singular_values_and_the_rest_with_adam():
    params, grads = {"a": tree(0)}, [{"a": tree(seed)} for seed in (1, 2, 3)]
    ours, opt, by_adam, adam = params, optim.init(MUON, params), params, optim.init(CFG, params)
    momentum = np.zeros((3, 4))
    for n, g in enumerate(grads, 1):
        before = ours["a"]["fc"]["weight"]
        ours, opt, norm = optim.update(MUON, jnp.float32(0.05), g, opt, ours)
        by_adam, adam, _ = optim.update(CFG, jnp.float32(0.05), g, adam, by_adam)
        clipped = np.asarray(g["a"]["fc"]["weight"], np.float64) * 0.7 / float(norm)
        momentum = 0.95 * momentum + 0.05 * clipped
        ahead = 0.95 * momentum / (1 - 0.95 ** (n + 1)) + 0.05 * clipped / (1 - 0.95**n)  # Nesterov, bias corrected
        x = ahead / np.linalg.norm(ahead)
        for _ in range(5):  # Newton-Schulz, with the published coefficients
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        want = np.asarray(before, np.float64) * (1 - 0.05 * 0.1) - 0.05 * 0.2 * 2 * x  # 2: the root of the longer side
        np.testing.assert_allclose(ours["a"]["fc"]["weight"], want, rtol=2e-5, atol=2e-6)
        values = np.linalg.svd(x, compute_uv=False)
        assert 0.6 < values.min() <= values.max() < 1.3
    for leaf in (("fc", "bias"), ("norm1", "weight"), ("norm1", "bias")):
        np.testing.assert_array_equal(ours["a"][leaf[0]][leaf[1]], by_adam["a"][leaf[0]][leaf[1]])


def test_muon_steps_a_stack_layer_by_layer():
    rng = np.random.default_rng(0)
    params, grads = (jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32) for _ in range(2))
    rule = optim.transform(MUON)

    def stepped(p, g):
        p, g = ({"fc": {"weight": a}} for a in (p, g))
        return rule.update(g, rule.init(p), p)[0]["fc"]["weight"]

    alone = [stepped(p, g) for p, g in zip(params, grads, strict=True)]
    np.testing.assert_allclose(stepped(params, grads), jnp.stack(alone), rtol=1e-5, atol=1e-6)


def test_muon_has_matrices_between_hidden_layers_only(tiny_config):
    shapes = tensors.unflatten({k: np.zeros(s) for k, s in checkpoint.expected(tiny_config.model).items()})
    found = tensors.flatten(optim.hidden(shapes["base"] | {"llm": shapes["llm"], "names": np.zeros((3, 4))}))
    assert {k for k, rule in found.items() if rule == "muon"} == {
        "projector.fc1.weight", "projector.fc2.weight",
        *(f"vit.blocks.layers.{n}.weight" for n in ("q", "k", "v", "o", "fc1", "fc2")),
        *(f"llm.blocks.layers.{n}.weight" for n in ("q", "k", "v", "o", "gate", "up", "down")),
    }  # fmt: skip


@pytest.mark.parametrize("cfg", [CFG, MUON], ids=["adamw", "muon"])
def test_idle_groups_and_their_moments_come_back_as_they_are(cfg):
    params = {"a": tree(0), "b": tree(1), "c": tree(2)}
    opt = optim.init(cfg, params)
    after, opt2, _ = optim.update(cfg, jnp.float32(0.05), {"a": tree(3), "c": tree(4)}, opt, params)
    assert after["b"] is params["b"]
    assert opt2["b"] is opt["b"]
    assert (after["a"]["fc"]["weight"] != params["a"]["fc"]["weight"]).all()
    counts = {g: {int(n) for _, n in optax.tree.get_all_with_path(opt2[g], "count")} for g in params}
    assert counts == {"a": {1}, "b": {0}, "c": {1}}


def test_groups_are_clipped_by_their_joint_norm():
    params = {"a": tree(0), "b": tree(1)}
    grads = {"a": tree(2), "b": jax.tree.map(lambda g: 100 * g, tree(3))}
    _, opt, norm = optim.update(CFG, jnp.float32(0.05), grads, optim.init(CFG, params), params)
    moment = optax.tree.get(opt["a"], "mu")["fc"]["weight"]
    np.testing.assert_allclose(moment, (1 - CFG.b1) * grads["a"]["fc"]["weight"] * CFG.clip / norm, rtol=1e-4)


def test_gradients_of_no_group_are_an_error():
    params = {"a": tree(0)}
    with pytest.raises(KeyError, match="b, d"):
        optim.update(CFG, jnp.float32(1), {"d": tree(0), "b": tree(0)}, optim.init(CFG, params), params)


def test_decay_pulls_on_matrices_and_tables_only(tiny_config):
    shapes = tensors.unflatten({k: np.zeros(s) for k, s in checkpoint.expected(tiny_config.model).items()})
    pulled = {k for k, yes in tensors.flatten(optim.decays(shapes["base"] | {"llm": shapes["llm"]})).items() if yes}
    assert pulled == {
        "vit.patch.weight", "projector.fc1.weight", "projector.fc2.weight", "llm.embed",
        *(f"vit.blocks.layers.{n}.weight" for n in ("q", "k", "v", "o", "fc1", "fc2")),
        *(f"llm.blocks.layers.{n}.weight" for n in ("q", "k", "v", "o", "gate", "up", "down")),
    }  # fmt: skip
    assert optim.decays({"names": shapes["llm"]["embed"]})["names"]


def test_the_rate_warms_up_peaks_and_ends_at_its_share():
    cfg = TrainConfig(lr=1.0, warmup=10, final_lr=0.1)
    rates = np.array([float(optim.rate(cfg, s, 100)) for s in range(100)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert rates.argmax() == 9
    assert (np.diff(rates[9:]) < 0).all()
    assert rates[-1] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 45 / 90))
    assert rates[54] == pytest.approx(middle, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_shorter_than_their_warm_up_have_a_rate(steps):
    rates = [float(optim.rate(TrainConfig(lr=1.0, warmup=100), s, steps)) for s in range(steps)]
    assert all(0 < r <= 1 for r in rates)


# --- rules -----------------------------------------------------------------------------------------------------------

RULES = (Rule(r"a\.fc\.weight", 0.5), Rule(r"a\.fc\..*"), Rule(r"(a|b)\.norm1\..*", 0.0), Rule(r"b\.fc\..*", 0.0))


@pytest.mark.parametrize("cfg", [CFG, MUON], ids=["adamw", "muon"])
def test_rules_freeze_and_slow_down_by_path(cfg):
    params, ruled = {"a": tree(0), "b": tree(1)}, replace(cfg, rules=RULES)
    learns, opt = optim.learning(ruled, params), optim.init(ruled, params)
    assert {*tensors.flatten(learns)} == {"a.fc.weight", "a.fc.bias"}
    alone = {"a": {"fc": params["a"]["fc"]}}
    assert jax.tree.structure(opt) == jax.tree.structure(optim.init(cfg, alone))  # nothing is kept of what is frozen
    grads = {"a": {"fc": tree(2)["fc"]}}
    after, opt, norm = optim.update(ruled, jnp.float32(0.05), grads, opt, params)
    want, _, same = optim.update(cfg, jnp.float32(0.05), grads, optim.init(cfg, alone), alone)
    half, _, _ = optim.update(cfg, jnp.float32(0.025), grads, optim.init(cfg, alone), alone)
    assert norm == same
    np.testing.assert_array_equal(after["a"]["fc"]["weight"], half["a"]["fc"]["weight"])
    np.testing.assert_array_equal(after["a"]["fc"]["bias"], want["a"]["fc"]["bias"])
    assert after["b"] is params["b"]
    for leaf in ("weight", "bias"):
        assert after["a"]["norm1"][leaf] is params["a"]["norm1"][leaf]


def test_parameters_without_a_rule_and_rules_without_parameters_are_one_error():
    params = {"a": tree(0), "b": tree(1)}
    some = replace(CFG, rules=(Rule(r"a\..*"), Rule(r"a\.fc\.bias", 0.0), Rule(r"b\.fc\.weight"), Rule("b", 0.0)))
    with pytest.raises(ConfigError) as e:
        optim.init(some, params)
    said = str(e.value)
    assert "no rule for b.fc.bias, b.norm1.bias, b.norm1.weight;" in said  # a pattern is of whole paths: "b" is none
    assert f"nothing is left for {RULES[0].path.replace('weight', 'bias')!r}, 'b'" in said
    many = replace(CFG, rules=(Rule(r"a\.fc\.bias"),))
    with pytest.raises(ConfigError, match=r"no rule for a\.fc\.weight, .* and 3 more;"):
        optim.init(many, params)
