"""What transformers writes is read, what we write transformers opens: bytes, names, tokens and answers are the same."""

import copy
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hypervl_jax import convert, layouts, presets, tensors, text
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import BRANCHES, LlmConfig, TextConfig, VitConfig
from hypervl_jax.model import llm
from hypervl_jax.model.vit import Vit

torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")


def data(folder):
    """Name -> (dtype, shape, bytes) of every tensor of a folder."""
    flat = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    return {k: (v.dtype, v.shape, v.tobytes()) for k, v in flat.items()}


def opened(cls, folder):
    """A model that transformers makes of our folder; nothing may be missing, too much or of another shape."""
    model, said = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(said[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    return model.eval()


# --- what transformers writes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_goes_in_and_out_byte_for_byte(tied, dtype, shaken, tiny_tokenizer, tmp_path):
    sizes = transformers.Qwen3Config(
        vocab_size=512, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, tie_word_embeddings=tied,
    )  # fmt: skip
    theirs = shaken(transformers.Qwen3ForCausalLM(sizes)).to(dtype)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    cfg, params, unused = convert.load_llm(tmp_path / "in")
    assert unused == []
    whole = dataclasses.replace(presets.tiny().model, llm=cfg)
    convert.save_llm(tmp_path / "out", Model(whole, {"llm": params}, tiny_tokenizer, {}))
    assert data(tmp_path / "out") == data(tmp_path / "in")
    again = opened(transformers.AutoModelForCausalLM, tmp_path / "out")
    assert again.dtype == dtype
    assert all((a == b).all() for a, b in zip(again.parameters(), theirs.parameters(), strict=True))


def test_a_whole_siglip_gives_its_vision_tower_byte_for_byte(shaken, tmp_path):
    """Its text tower, pooling head and scales are named and left."""
    small = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = transformers.SiglipConfig(
        vision_config=small | {"image_size": 32, "patch_size": 8}, text_config=small | {"vocab_size": 20}
    )
    shaken(transformers.SiglipModel(sizes)).save_pretrained(tmp_path / "in")
    cfg, params, unused = convert.load_vit(tmp_path / "in")
    assert [line.split(" (")[0] for line in unused] == ["pooling head", "scales", "text tower"]
    whole = dataclasses.replace(presets.tiny().model, base=cfg)
    convert.save_vit(tmp_path / "out", Model(whole, {"base": {"vit": params}}, None, {}), "base")
    tower = {k: v for k, v in data(tmp_path / "in").items() if k.startswith("vision_model.") and ".head." not in k}
    assert data(tmp_path / "out") == tower


def test_a_naflex_tower_goes_in_and_out_byte_for_byte(shaken, tmp_path):
    sizes = transformers.Siglip2VisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, num_patches=9, patch_size=8
    )
    shaken(transformers.Siglip2VisionModel(sizes)).save_pretrained(tmp_path)
    _, params, unused = convert.load_vit(tmp_path)
    assert [line.split(" (")[0] for line in unused] == ["pooling head"]
    (tmp_path / "out").mkdir()
    tensors.write(tmp_path / "out", params, layouts.vit(naflex=True))
    assert data(tmp_path / "out") == {k: v for k, v in data(tmp_path).items() if not k.startswith("head.")}


# --- what we write ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    convert.save_llm(root / "llm", tiny_model)
    for branch in BRANCHES:
        convert.save_vit(root / branch, tiny_model, branch)
    return root


@pytest.mark.parametrize("branch", BRANCHES)
def test_transformers_opens_an_encoder_with_its_preprocessor(branch, written, tiny_model, close):
    cfg = tiny_model.config.vit(branch)
    theirs = opened(transformers.SiglipVisionModel, written / branch)
    processor = transformers.AutoImageProcessor.from_pretrained(written / branch, use_fast=False)
    tiles = np.random.default_rng(0).integers(0, 256, (2, cfg.tile, cfg.tile, 3), np.uint8)
    with torch.no_grad():
        want = theirs(**processor(list(tiles), return_tensors="pt")).last_hidden_state
    vit = Vit(cfg, scan=False)
    got = jax.jit(vit.apply)({"params": tiny_model.params[branch]["vit"]}, tiles, np.ones((2, cfg.patches), bool))
    close(got, want)


def test_transformers_opens_the_decoder_and_knows_how_an_answer_ends(written, tiny_model, tiny_tokenizer, close):
    theirs = opened(transformers.AutoModelForCausalLM, written / "llm")
    assert type(theirs) is transformers.Qwen3ForCausalLM
    assert theirs.generation_config.eos_token_id[0] == tiny_tokenizer.special("<|im_end|>")
    ids = np.random.default_rng(0).integers(0, 400, (2, 9))
    params = tiny_model.params["llm"]
    hidden = llm.Llm(tiny_model.config.llm, scan=False).apply(
        {"params": params}, llm.embed(params, jnp.asarray(ids)), jnp.broadcast_to(jnp.arange(9), (2, 9)),
        llm.segment_mask(jnp.zeros((2, 9), jnp.int32)),
    )[0]  # fmt: skip
    with torch.no_grad():
        close(llm.logits(params, hidden), theirs(torch.tensor(ids)).logits)


TALKS = [
    [{"role": "user", "content": "what is this?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}],
    [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c?"}],
    [{"role": "user", "content": [{"type": "text", "text": "a?"}]}, {"role": "assistant", "content": "b"}],
]


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("talk", TALKS, ids=["one", "system", "three", "answered"])
def test_their_tokenizer_and_chat_template_give_our_ids(talk, think, tiny_tokenizer, tmp_path):
    cfg = TextConfig(think=think)
    layouts.write_text_files(tmp_path, tiny_tokenizer, cfg)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    want = text.render(talk, (), tiny_tokenizer, cfg).ids.tolist()
    got = theirs.apply_chat_template(talk, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert got == want


# --- names and counts at the real sizes ------------------------------------------------------------------------------


def covered(theirs, table, shapes):
    """Fails unless every tensor of a model of theirs is one of the table, in its shape, or one it explains.
    Returns the weights that are used."""
    parts = {p.name: p.shape for row in table.rows for p in tensors._parts(row, shapes[row.path])}
    named = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    explained = {k for k in named if any(re.fullmatch(pattern, k) for pattern, _ in table.unused)}
    assert {k: v for k, v in named.items() if k not in explained} == parts
    return sum(int(np.prod(s)) for s in parts.values())


QWEN3 = {  # (width, depth, heads, mlp) and weights, as published
    "0.6B": (1024, 28, 16, 3072, True, 596_049_920),
    "1.7B": (2048, 28, 16, 6144, True, 1_720_574_976),
    "4B": (2560, 36, 32, 9728, True, 4_022_468_096),
    "4B untied": (2560, 36, 32, 9728, False, 4_022_468_096 + 151_936 * 2560),
}


@pytest.mark.parametrize("name", QWEN3)
def test_every_tensor_of_a_real_qwen3_has_its_place(name):
    width, depth, heads, mlp, tied, count = QWEN3[name]
    cfg = LlmConfig(151_936, width, depth, heads, 8, 128, mlp, tied=tied)
    values = layouts.llm_values(cfg, "bfloat16")
    with torch.device("meta"):
        theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**values))
    assert covered(theirs, layouts.llm(cfg), convert.llm_shapes(cfg)) == count


SIGLIP = {"base": (768, 12, 12), "large": (1024, 24, 16)}


@pytest.mark.parametrize("branch", SIGLIP)
@pytest.mark.parametrize("tile", [224, 256, 384, 512])
def test_every_tensor_of_a_real_siglip_has_its_place(branch, tile):
    width, depth, heads = SIGLIP[branch]
    cfg = VitConfig(width, depth, heads, 4 * width, tile)
    values = layouts.vit_values(cfg, "float32") | {"vision_use_head": True}
    with torch.device("meta"):
        theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**values))
    used = covered(theirs, layouts.vit(), convert.vit_shapes(cfg))
    if (branch, tile) == ("base", 256):
        assert sum(p.numel() for p in theirs.parameters()) == 92_930_304  # with the pooling head
    if (branch, tile) == ("large", 512):
        assert used == 304_147_456


def test_every_tensor_of_the_real_naflex_has_its_place():
    with torch.device("meta"):
        theirs = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig())
    cfg = VitConfig(768, 12, 12, 3072, tile=256)
    covered(theirs, layouts.vit(naflex=True), convert.vit_shapes(cfg))
    assert sum(p.numel() for p in theirs.parameters()) == 92_930_304


# --- the real sizes, random weights ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_qwen3_of_the_real_size_in_bf16(tmp_path, bf16_is_as_good_as_torchs):
    cfg = presets.hypervl_1p7b().model.llm
    torch.manual_seed(0)
    sizes = transformers.Qwen3Config(**layouts.llm_values(cfg, "bfloat16"))
    theirs = transformers.AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="1GB")
    ids = np.random.default_rng(0).integers(0, cfg.vocab, (1, 16))
    with torch.no_grad():
        half = theirs(torch.tensor(ids)).logits
        reference = theirs.float()(torch.tensor(ids)).logits
    del theirs
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    read, params, _ = convert.load_llm(tmp_path)
    assert read == cfg
    params = jax.tree.map(jnp.asarray, params)
    x, positions = llm.embed(params, jnp.asarray(ids)), jnp.arange(16)[None]
    mask = llm.segment_mask(jnp.zeros((1, 16), jnp.int32))
    hidden = jax.jit(llm.Llm(cfg).apply)({"params": params}, x, positions, mask)[0]
    bf16_is_as_good_as_torchs(llm.logits(params, hidden), half, reference)


@pytest.mark.slow
@pytest.mark.parametrize("branch", BRANCHES)
def test_siglip_of_the_real_size_in_bf16(branch, tmp_path, bf16_is_as_good_as_torchs):
    cfg = presets.hypervl_1p7b().model.vit(branch)
    torch.manual_seed(0)
    sizes = transformers.SiglipVisionConfig(**layouts.vit_values(cfg, "bfloat16"))
    theirs = transformers.SiglipVisionModel(sizes).bfloat16().eval()
    theirs.save_pretrained(tmp_path, max_shard_size="100MB")
    tile = np.random.default_rng(0).integers(0, 256, (1, cfg.tile, cfg.tile, 3), np.uint8)
    pixels = torch.tensor(tile.transpose(0, 3, 1, 2) / 127.5 - 1)
    with torch.no_grad():
        half = theirs(pixel_values=pixels.bfloat16()).last_hidden_state
        reference = copy.deepcopy(theirs).float()(pixel_values=pixels.float()).last_hidden_state
    read, params, _ = convert.load_vit(tmp_path)
    assert read == cfg
    got = jax.jit(Vit(cfg).apply)({"params": jax.tree.map(jnp.asarray, params)}, tile, np.ones((1, cfg.patches), bool))
    bf16_is_as_good_as_torchs(got, half, reference)
