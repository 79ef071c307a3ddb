"""LoRA: what adapters add, that merging says the same and is undone bit for bit, PEFT's files, learning."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import lora
from hypervl_jax.config import ConfigError, LoraConfig
from hypervl_jax.model import hypervl, llm
from hypervl_jax.tensors import CheckpointError, flatten

HOW = LoraConfig(r"llm\.blocks\.layers\.(q|v|down)\.weight", rank=3, alpha=12.0)
PATHS = [f"llm.blocks.layers.{n}.weight" for n in ("down", "q", "v")]


@pytest.fixture(scope="module")
def adapters(tiny_params):
    """With B drawn too: fresh ones change nothing."""
    fresh = lora.init(jax.random.key(3), HOW, tiny_params)
    rng = np.random.default_rng(4)
    return {k: x._replace(b=jnp.asarray(0.1 * rng.normal(size=x.b.shape), jnp.float32)) for k, x in fresh.items()}


@pytest.fixture(scope="module")
def row(tiny_config):
    """(features, ids, slots, positions, segments) of two rows without pictures."""
    rng = np.random.default_rng(5)
    ids = jnp.asarray(rng.integers(0, 512, (2, 6)), jnp.int32)
    features = jnp.zeros((2, 4, tiny_config.model.llm.width))
    same = jnp.broadcast_to(jnp.arange(6), (2, 6))
    return features, ids, jnp.full_like(ids, -1), same, jnp.zeros_like(ids)


@pytest.fixture(scope="module")
def logits(tiny_config, row):
    def logits(params, scan=True):
        return llm.logits(params["llm"], hypervl.hidden(params, tiny_config.model, *row, scan))

    return jax.jit(logits, static_argnums=1)


def close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max()))


# --- what they say ---------------------------------------------------------------------------------------------------


def test_fresh_adapters_have_their_shapes_and_change_nothing(tiny_config, tiny_params, logits):
    fresh, c = lora.init(jax.random.key(0), HOW, tiny_params), tiny_config.model.llm
    assert sorted(fresh) == PATHS
    down = fresh[PATHS[0]]
    assert (down.a.shape, down.b.shape) == ((c.depth, 3, c.mlp), (c.depth, c.width, 3))
    assert 0 < float(jnp.abs(down.a).max()) <= c.mlp**-0.5
    assert not np.array_equal(down.a[0], down.a[1])
    close(logits(lora.apply(tiny_params, fresh, HOW)), logits(tiny_params), 1e-6)


def test_applied_is_merged_is_the_sum(tiny_params, adapters, logits):
    applied, merged = lora.apply(tiny_params, adapters, HOW), lora.merge(tiny_params, adapters, HOW).params
    for path, (a, b) in adapters.items():
        want = np.float64(flatten(tiny_params)[path]) + 12 / 3 * np.float64(b) @ np.float64(a)
        np.testing.assert_allclose(flatten(merged)[path], want, rtol=0, atol=1e-6 * np.abs(want).max())
    want = logits(merged)
    assert float(jnp.abs(want - logits(tiny_params)).max()) > 0.1
    close(logits(applied), want)
    close(logits(applied, False), want)


def test_gradients_are_those_of_the_sum(tiny_params, adapters, logits):
    def pulled(how):
        return jax.jit(jax.grad(lambda x: (logits(how(tiny_params, x, HOW)) ** 2).mean()))(adapters)

    close(pulled(lora.apply), pulled(lambda *args: lora.merge(*args).params))


def test_merging_is_undone_bit_for_bit(tiny_params, adapters):
    merged = lora.merge(tiny_params, adapters, HOW)
    changed = {k for k, v in flatten(merged.params).items() if (v != flatten(tiny_params)[k]).any()}
    assert changed == set(PATHS)
    back, base = flatten(lora.unmerge(merged)), flatten(tiny_params)
    assert back.keys() == base.keys()
    for path, leaf in back.items():
        assert np.asarray(leaf).tobytes() == np.asarray(base[path]).tobytes()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (r"vision\..*", "matches no path"),
        (r"llm\..*", r"llm\.blocks\.layers\.k_norm\.weight is no matrix|llm\.\S+ is no matrix"),
        (r"llm\.embed", r"llm\.embed is no matrix of a linear layer"),
    ],
)
def test_paths_that_are_no_matrices_are_refused(tiny_params, path, message):
    with pytest.raises(ConfigError, match=message):
        lora.init(jax.random.key(0), replace(HOW, path=path), tiny_params)


def test_adapters_of_another_model_are_refused(tiny_params, adapters):
    one = adapters[PATHS[1]]
    with pytest.raises(ConfigError, match=r"llm\.blocks\.layers\.up\.weight of shape"):
        lora.apply(tiny_params, {"llm.blocks.layers.up.weight": one}, HOW)
    with pytest.raises(ConfigError, match=r"llm\.other, which these parameters do not have"):
        lora.merge(tiny_params, {"llm.other": one}, HOW)
    with pytest.raises(ConfigError, match="no plain matrix"):
        lora.apply(lora.apply(tiny_params, adapters, HOW), adapters, HOW)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(adapters, tiny_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("peft") / "adapter"
    return lora.save(out, adapters, HOW, tiny_config.model.llm, "some/decoder")


def test_files_have_the_names_and_shapes_of_peft(folder, tiny_config):
    """As its documents have them (developer guides, PEFT checkpoint format)."""
    numpy = pytest.importorskip("safetensors.numpy")
    c = tiny_config.model.llm
    sizes = {
        "self_attn.q_proj": (c.heads * c.head_dim, c.width),
        "self_attn.v_proj": (c.kv_heads * c.head_dim, c.width),
    }
    sizes["mlp.down_proj"] = (c.width, c.mlp)
    want = {}
    for i in range(c.depth):
        for name, (outputs, inputs) in sizes.items():
            want[f"base_model.model.model.layers.{i}.{name}.lora_A.weight"] = (3, inputs)
            want[f"base_model.model.model.layers.{i}.{name}.lora_B.weight"] = (outputs, 3)
    found = numpy.load_file(folder / "adapter_model.safetensors")
    assert {k: v.shape for k, v in found.items()} == want
    values = json.loads((folder / "adapter_config.json").read_text())
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 12.0, "bias": "none"}
    said |= {"base_model_name_or_path": "some/decoder", "target_modules": ["down_proj", "q_proj", "v_proj"]}
    assert said.items() <= values.items()
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_what_was_saved_is_loaded(folder, adapters, tiny_config, tiny_params):
    how, back = lora.load(folder, tiny_config.model.llm)
    assert (how.rank, how.alpha, how.scale) == (3, 12.0, HOW.scale)
    assert sorted(lora.init(jax.random.key(0), how, tiny_params)) == sorted(back) == PATHS
    for path, adapter in back.items():
        for ours, saved in zip(adapters[path], adapter, strict=True):
            np.testing.assert_array_equal(ours, saved)


def test_the_decoder_of_transformers_says_the_same_with_these_files(
    folder, adapters, tiny_model, row, logits, tmp_path
):
    """W + alpha / r B A at the module that each name points to: what PEFT computes."""
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    transformers = pytest.importorskip("transformers", reason="needs the parity extra")
    from safetensors.torch import load_file

    from hypervl_jax import convert

    convert.save_llm(tmp_path / "decoder", tiny_model, "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", dtype=torch.float32)
    values = json.loads((folder / "adapter_config.json").read_text())
    found = load_file(folder / "adapter_model.safetensors")
    for name in [k for k in found if ".lora_A." in k]:
        module = theirs.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        change = found[name.replace("lora_A", "lora_B")] @ found[name]
        module.weight.data += values["lora_alpha"] / values["r"] * change
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(np.asarray(row[1]), dtype=torch.long)).logits.numpy()
    close(logits(lora.apply(tiny_model.params, adapters, HOW)), want)


def test_adapters_of_other_parts_are_not_saved(tiny_params, tiny_config, tmp_path):
    how = LoraConfig(r"base\.projector\.fc1\.weight")
    with pytest.raises(ConfigError, match=r"base\.projector\.fc1\.weight: PEFT files are of the decoder"):
        lora.save(tmp_path / "x", lora.init(jax.random.key(0), how, tiny_params), how, tiny_config.model.llm)
    bad = {PATHS[1]: lora.init(jax.random.key(0), HOW, tiny_params)[PATHS[1]]}
    bad[PATHS[1]] = bad[PATHS[1]]._replace(b=bad[PATHS[1]].b * jnp.nan)
    with pytest.raises(CheckpointError, match=r"not finite: base_model\.model\.model\.layers\.0\.self_attn\.q_proj"):
        lora.save(tmp_path / "x", bad, HOW, tiny_config.model.llm)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True; only False"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens is \[1, 2\]; only None"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16', which changes the matrices"),
        ({"init_lora_weights": {}}, "init_lora_weights is {}"),
        ({"r": None}, r"adapter_config\.json"),
        ({"lora_alpha": "much"}, "cannot be read"),
        ({"target_modules": ["q_proj"]}, "target_modules is .* beside it are weights of down_proj, q_proj, v_proj"),
        ({"target_modules": "all-linear"}, "target_modules is 'all-linear'"),
    ],
)
def test_adapters_of_another_kind_are_refused_by_name(folder, tiny_config, tmp_path, changes, message):
    values = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | changes))
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=message) as e:
        lora.load(tmp_path, tiny_config.model.llm)
    assert "adapter_config.json" in str(e.value)


def test_files_that_do_not_fit_are_named(folder, tiny_config, tmp_path):
    with pytest.raises(ConfigError, match=r"adapter_config\.json: cannot be read"):
        lora.load(tmp_path, tiny_config.model.llm)
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        lora.load(tmp_path, tiny_config.model.llm)
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    deeper = replace(tiny_config.model.llm, depth=3)
    with pytest.raises(CheckpointError, match=r"missing base_model\.model\.model\.layers\.2\."):
        lora.load(tmp_path, deeper)


# --- learning --------------------------------------------------------------------------------------------------------


def test_adapters_learn_and_everything_else_stays(tiny_model, tiny_source):
    """A few pictures by heart; the decoder's own weights are random and stay."""
    samples = [lora.Sample(s.image, s.questions[0].text, s.questions[0].answer) for s in tiny_source.records[:4]]
    before = {k: np.asarray(v).tobytes() for k, v in flatten(tiny_model.params).items()}
    how = LoraConfig(rank=4)
    fitted = lora.fit(tiny_model, samples, how, steps=40, batch=4, lr=1e-2)
    assert len(fitted.losses) == 40
    assert fitted.losses[-1] < 0.3 * fitted.losses[0]
    assert {k: np.asarray(v).tobytes() for k, v in flatten(tiny_model.params).items()} == before
    with pytest.raises(ConfigError, match=r"base\.\S+ is not the decoder's"):
        lora.fit(tiny_model, samples, LoraConfig(r"base\.projector\.fc1\.weight"))
    with pytest.raises(ConfigError, match=r"lr 1e\+30: the loss is not finite from step \d on; choose a lower one"):
        lora.fit(tiny_model, samples, how, steps=3, batch=4, lr=1e30)
    with pytest.raises(ConfigError, match="no samples"):
        lora.fit(tiny_model, [], how)
