"""Weights in and out: a model of published parts, its parts back, and real trained weights that tell their story."""

import dataclasses
import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hypervl_jax import checkpoint, convert, generate, tensors, tokens
from hypervl_jax.checkpoint import CheckpointError, Model
from hypervl_jax.config import BRANCHES, ConfigError, LlmConfig
from hypervl_jax.model import llm
from hypervl_jax.tokens import MARKERS, TextError, Tokenizer

# --- trained weights -------------------------------------------------------------------------------------------------

STORY = (  # what these weights say, run in another implementation (research note on assets)
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball"
)
NAMES = {
    "input_layernorm": "n1", "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
    "self_attn.o_proj": "o", "post_attention_layernorm": "n2", "mlp.gate_proj": "w1", "mlp.down_proj": "w2",
    "mlp.up_proj": "w3",
}  # fmt: skip


@pytest.fixture(scope="module")
def tinystories(shared, tmp_path_factory):
    """The llama2.c file as a Llama directory: rotary pairs stand side by side there, half a head apart here."""
    data = (shared / "data" / "tinystories-260k" / "checkpoint_legacy.bin").read_bytes()
    d, mlp, n, heads, kv, vocab, _ = struct.unpack("<7i", data[:28])
    h, at, parts = d // heads, 28, {}
    for name, shape in {
        "embed": (vocab, d), "n1": (n, d), "q": (n, d, d), "k": (n, kv * h, d), "v": (n, kv * h, d), "o": (n, d, d),
        "n2": (n, d), "w1": (n, mlp, d), "w2": (n, d, mlp), "w3": (n, mlp, d), "norm": (d,),
    }.items():  # fmt: skip
        parts[name] = np.frombuffer(data, "<f4", np.prod(shape), at).reshape(shape)
        at += parts[name].nbytes
    for name in ("q", "k"):
        pairs = parts[name].reshape(n, -1, h // 2, 2, d)
        parts[name] = pairs.transpose(0, 1, 3, 2, 4).reshape(n, -1, d)
    flat = {"model.embed_tokens.weight": parts["embed"], "model.norm.weight": parts["norm"]}
    flat |= {f"model.layers.{i}.{k}.weight": np.ascontiguousarray(parts[v][i]) for k, v in NAMES.items()
             for i in range(n)}  # fmt: skip
    folder = tmp_path_factory.mktemp("tinystories")
    save_file(flat, folder / "model.safetensors")
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": d, "intermediate_size": mlp, "rms_norm_eps": 1e-5,
        "num_hidden_layers": n, "num_attention_heads": heads, "num_key_value_heads": kv, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def words(shared):
    """tokenizer.bin: the longest token, then a score, a length and the bytes of each."""
    data, at, out = (shared / "data" / "tinystories-260k" / "tokenizer.bin").read_bytes(), 4, []
    while at < len(data):
        size = struct.unpack_from("<i", data, at + 4)[0]
        out.append(data[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return out


def test_trained_weights_tell_their_story(tinystories, shared, tiny_config):
    cfg, params, unused = convert.load_llm(tinystories)
    assert cfg == LlmConfig(512, 64, 5, 8, 4, 8, 172, rope_theta=1e4, eps=1e-5, tied=True, qk_norm=False)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 260_032
    assert unused == []
    params, start, new = jax.tree.map(jnp.asarray, params), 1, 64
    x = llm.embed(params, jnp.array([[start]]))
    args = x, jnp.zeros(1, jnp.int32), jnp.zeros(cfg.vocab, bool), jax.random.key(0), generate.Sampler()
    said = generate.generate({"llm": params}, dataclasses.replace(tiny_config.model, llm=cfg), *args, cfg.vocab, new)
    vocab = words(shared)
    assert "".join(vocab[i] for i in said[0]).strip().startswith(STORY)


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tiny_model, tmp_path_factory):
    """The parts of a tiny model, each as it would be published."""
    root = tmp_path_factory.mktemp("published")
    convert.save_llm(root / "llm", tiny_model, jnp.bfloat16)
    for branch in BRANCHES:
        convert.save_vit(root / branch, tiny_model, branch)
    return root


@pytest.fixture(scope="module")
def assembled(published):
    return convert.assemble(published / "base", published / "large", published / "llm", seed=3)


def equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_part_comes_back_as_it_went(published, tiny_model):
    cfg, params, unused = convert.load_vit(published / "large")
    assert (cfg, unused) == (tiny_model.config.large, [])
    equal(params, tiny_model.params["large"]["vit"])
    cfg, params, unused = convert.load_llm(published / "llm")
    assert (cfg, unused) == (tiny_model.config.llm, [])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(jnp.bfloat16)}
    equal(params, jax.tree.map(lambda a: np.asarray(a).astype(jnp.bfloat16), tiny_model.params["llm"]))


def test_a_model_of_parts_has_their_weights_and_says_what_is_new(assembled, tiny_model):
    model, lines = assembled
    for branch in BRANCHES:
        equal(model.params[branch]["vit"], tiny_model.params[branch]["vit"])
    bf16 = jax.tree.map(lambda a: np.asarray(a).astype(jnp.bfloat16), tiny_model.params["llm"])
    equal(model.params["llm"], bf16)
    shapes = {k: v.shape for k, v in tensors.flatten(model.params).items()}
    assert shapes == checkpoint.expected(model.config)
    said = "\n".join(lines)
    assert "fresh: base.projector, large.projector, vrc, drawn from seed 3" in said
    assert "resized" not in said
    assert "grown" not in said
    assert model.info == {"fresh": ["base.projector", "large.projector", "vrc"], "seed": 3}


def test_a_model_of_parts_is_saved_with_each_part_as_it_was(assembled, tmp_path):
    model, _ = assembled
    checkpoint.save_model(tmp_path / "m", model.config, model.params, model.tokenizer, model.info, dtype=None)
    got = checkpoint.load_model(tmp_path / "m", dtype=None)
    assert got.config == model.config
    equal(got.params, model.params)
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json", "preprocessor_config.json",
    }  # fmt: skip


def test_what_is_new_depends_on_the_seed_alone(assembled, published):
    other, _ = convert.assemble(published / "base", published / "large", published / "llm", seed=4)
    first = tensors.flatten(assembled[0].params)
    changed = {k for k, v in tensors.flatten(other.params).items() if (first[k] != v).any()}
    assert {"base.projector.fc1.weight", "large.projector.fc2.weight", "vrc.out.weight"} <= changed
    assert all(k.startswith(("base.projector.", "large.projector.", "vrc.")) for k in changed)


def test_larger_tiles_get_larger_position_tables(published):
    model, lines = convert.assemble(published / "base", published / "large", published / "llm", tile=64)
    assert model.config.policy.tile == model.config.base.tile == 64
    assert model.params["large"]["vit"]["pos"].shape == (64, 48)
    assert "base: position table resized from 16 to 64 patches" in lines


@pytest.fixture
def few_rows(tiny_model, tmp_path):
    """A decoder whose tokenizer has no tile markers, with a row for each token and none to spare; head of its own."""
    spec = tiny_model.tokenizer._spec
    kept = [token for token in spec["added_tokens"] if token["content"] not in MARKERS]
    tokenizer = Tokenizer({**spec, "added_tokens": kept})
    n = tokenizer.vocab_size
    cfg = dataclasses.replace(tiny_model.config.llm, vocab=n, tied=False)
    embed = np.asarray(tiny_model.params["llm"]["embed"])[:n]
    params = {"llm": tiny_model.params["llm"] | {"embed": embed, "head": embed * 2}}
    model = Model(dataclasses.replace(tiny_model.config, llm=cfg), params, tokenizer, {})
    convert.save_llm(tmp_path / "few", model)
    return tmp_path / "few", embed


def test_rows_are_grown_only_for_tokens_that_have_none(published, few_rows):
    folder, embed = few_rows
    model, lines = convert.assemble(published / "base", published / "large", folder)
    n = model.tokenizer.vocab_size
    assert n == len(embed) + len(MARKERS) == model.config.llm.vocab
    assert f"llm: {len(embed)} rows of tokens grown to {n}, new ones drawn from seed 0" in lines
    for name, factor in (("embed", 1), ("head", 2)):
        table = model.params["llm"][name]
        assert table.shape == (n, embed.shape[1])
        np.testing.assert_array_equal(table[: len(embed)], factor * embed)
        spread = table[len(embed) :].std() / table[: len(embed)].std()
        assert 0.8 < spread < 1.2
    assert model.tokenizer.special("<global-img>") == n - 1


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(published, tmp_path):
    """The three folders, to be damaged."""
    return shutil.copytree(published, tmp_path / "parts")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_encoders_for_pictures_of_two_sizes_need_a_tile(copied):
    change(copied / "large", image_size=48)
    with pytest.raises(ConfigError, match=r"base and .*large: made for 32 and 48 px; say with --tile"):
        convert.assemble(copied / "base", copied / "large", copied / "llm")


def test_encoders_of_two_patches_do_not_go_together(copied):
    change(copied / "large", patch_size=16)
    with pytest.raises(ConfigError, match="patches of 8 and 16 px"):
        convert.assemble(copied / "base", copied / "large", copied / "llm")


def test_a_tile_that_cannot_be_is_an_error(published):
    with pytest.raises(ConfigError, match=r"tile 40 must be a multiple of patch x merge = 16; choose one with --tile"):
        convert.assemble(published / "base", published / "large", published / "llm", tile=40)


def test_folders_in_the_wrong_order_are_named(published):
    with pytest.raises(ConfigError, match=r"llm/config\.json: model_type is 'qwen3', not siglip"):
        convert.assemble(published / "llm", published / "large", published / "base")


def test_a_tokenizer_without_a_chat_is_named(copied):
    spec = json.loads((copied / "llm" / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != tokens.VISION_START]
    (copied / "llm" / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TextError, match=r"tokenizer\.json: has no token <\|vision_start\|>"):
        convert.assemble(copied / "base", copied / "large", copied / "llm")


def test_sizes_that_are_not_those_of_the_weights_are_named(copied):
    change(copied / "large", num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"large/model\.safetensors: 16 weights.*missing vision_model\.encoder\."):
        convert.load_vit(copied / "large")


def test_a_part_that_cannot_be_written_leaves_what_was_there(published, tiny_model, tmp_path):
    convert.save_vit(tmp_path / "v", tiny_model, "base")
    before = {p.name: p.read_bytes() for p in (tmp_path / "v").iterdir()}
    bad = jax.tree.map(lambda a: a * np.nan, tiny_model.params["base"])
    with pytest.raises(CheckpointError, match="not finite"):
        convert.save_vit(tmp_path / "v", tiny_model._replace(params={"base": bad}), "base")
    assert {p.name: p.read_bytes() for p in (tmp_path / "v").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["v"]


def test_every_published_tensor_is_used_or_explained(copied):
    """A pooling head and a text tower are; one more layer is not."""
    file = copied / "base" / "model.safetensors"
    more = {"vision_model.head.probe": np.zeros(3, np.float32), "logit_scale": np.zeros(1, np.float32)}
    more |= {"text_model.final_layer_norm.bias": np.zeros(3, np.float32)}
    flat = load_file(file)
    save_file(flat | more, file)
    _, _, unused = convert.load_vit(copied / "base")
    assert [line.split(" (")[0] for line in unused] == ["pooling head", "scales", "text tower"]
    save_file(flat | {"vision_model.encoder.layers.2.layer_norm1.bias": np.zeros(32, np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"unknown vision_model\.encoder\.layers\.2\.layer_norm1\.bias"):
        convert.load_vit(copied / "base")
