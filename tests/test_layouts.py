"""config.json of published models, in both directions, and the names of their tensors at the real sizes."""

import json

import pytest

from hypervl_jax import convert, layouts, presets
from hypervl_jax.config import ConfigError, LlmConfig, VitConfig

VIT = VitConfig(width=64, depth=2, heads=4, mlp=100, tile=32, patch=8, eps=1e-5)
LLM = LlmConfig(101, 40, 3, heads=8, kv_heads=2, head_dim=14, mlp=72, rope_theta=1e4, eps=1e-5, tied=False)


@pytest.fixture
def said(tmp_path):
    """Writes a config.json; returns its folder."""

    def said(values):
        (tmp_path / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
        return tmp_path

    return said


def refuses(read, folder, message):
    with pytest.raises(ConfigError) as e:
        read(folder)
    assert str(folder / "config.json") in str(e.value)
    assert message in str(e.value)


def test_sizes_come_back_as_they_were_written(said):
    assert layouts.vision_config(said(layouts.vit_values(VIT, "float32"))) == (VIT, False)
    for cfg in (LLM, LlmConfig(101, 40, 3, heads=8, kv_heads=2, head_dim=14, mlp=72, qk_norm=False)):
        assert layouts.llm_config(said(layouts.llm_values(cfg, "bfloat16"))) == cfg


def test_what_a_siglip_leaves_out_is_as_in_base(said):
    """google/siglip-base-patch16-224 says no more than this of its vision tower."""
    folder = said({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}})
    assert layouts.vision_config(folder) == (VitConfig(768, 12, 12, 3072, tile=224), False)
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    folder = said({"model_type": "siglip", "vision_config": large | {"image_size": 512}})
    assert layouts.vision_config(folder) == (presets.hypervl_1p7b().model.large, False)
    assert layouts.vision_config(said({"model_type": "siglip2", "vision_config": {}})) == (
        VitConfig(768, 12, 12, 3072, tile=256), True
    )  # fmt: skip


# As Qwen/Qwen3-1.7B has it, and as transformers 5 writes the base of the rotary embedding.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def test_a_qwen3_is_read_in_both_ways_its_rotary_embedding_is_written(said):
    want = presets.hypervl_1p7b().model.llm
    assert layouts.llm_config(said(QWEN3)) == want
    new = {k: v for k, v in QWEN3.items() if k not in ("rope_theta", "rope_scaling")}
    assert layouts.llm_config(said(new | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})) == want


def test_a_llama_that_leaves_out_its_heads(said):
    values = {k: v for k, v in QWEN3.items() if k not in ("head_dim", "num_key_value_heads", "rope_theta")}
    cfg = layouts.llm_config(said(values | {"model_type": "llama"}))
    assert (cfg.head_dim, cfg.kv_heads, cfg.rope_theta, cfg.qk_norm) == (128, 16, 1e4, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (QWEN3 | {"model_type": "qwen2"}, "model_type is 'qwen2', not qwen3 or llama"),
        (QWEN3 | {"model_type": ["x"]}, "not qwen3 or llama"),
        (QWEN3 | {"attention_bias": True}, "attention_bias is True; only False"),
        (QWEN3 | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        (QWEN3 | {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN3 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'; only 'default'"),
        (QWEN3 | {"rope_parameters": 3}, "rope_parameters: expected a table"),
        (QWEN3 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (QWEN3 | {"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        (QWEN3 | {"hidden_size": "2048"}, "hidden_size: expected int"),
        (QWEN3 | {"hidden_size": 10**30}, "hidden_size: 10000000000000000000 is more than any model has"),
        (QWEN3 | {"tie_word_embeddings": None}, "tie_word_embeddings: expected bool"),
        ({k: v for k, v in QWEN3.items() if k != "intermediate_size"}, "intermediate_size: missing"),
        (QWEN3 | {"num_key_value_heads": 3}, "heads 16 must be a multiple of kv_heads 3"),
        (QWEN3 | {"rms_norm_eps": float("nan")}, "eps"),
        ("{", "cannot be read"), ("3", "expected a table"), ("[" * 10**5, "cannot be read"),
    ],
)  # fmt: skip
def test_a_decoder_that_is_not_ours_is_refused_with_file_and_key(values, message, said):
    refuses(layouts.llm_config, said(values), message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "clip"}, "model_type is 'clip', not siglip or siglip2"),
        ({"model_type": "siglip", "vision_config": 3}, "vision_config: expected a table"),
        ({"model_type": "siglip_vision_model", "hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "siglip_vision_model", "num_channels": 1}, "num_channels is 1; only 3"),
        ({"model_type": "siglip_vision_model", "patch_size": [16, 16]}, "patch_size: expected int"),
        ({"model_type": "siglip2_vision_model", "num_patches": 255}, "num_patches 255 of 16 px make no square"),
        ({"model_type": "siglip_vision_model", "image_size": 220}, "tile 220 must be a multiple of patch 16"),
    ],
)
def test_an_encoder_that_is_not_ours_is_refused_with_file_and_key(values, message, said):
    refuses(layouts.vision_config, said(values), message)


def count(shapes):
    total = 0
    for shape in shapes.values():
        n = 1
        for side in shape:
            n *= side
        total += n
    return total


def test_weights_at_the_papers_sizes():
    """papers: HyperVL 1.2. Base is counted with its pooling head and 16 x 16 positions, Large with 32 x 32 and without.

    The pooling head of width D: a probe, attention with biases, a norm, an MLP of four widths.
    """
    model = presets.hypervl_1p7b().model
    assert count(convert.llm_shapes(model.llm)) == 1_720_574_976
    assert count(convert.vit_shapes(model.large)) == 304_147_456
    assert count(convert.vit_shapes(model.base)) == 86_433_024
    d = 768
    head = d + 4 * (d * d + d) + 2 * d + 2 * 4 * d * d + 5 * d
    assert count(convert.vit_shapes(VitConfig(d, 12, 12, 4 * d, tile=256))) + head == 92_930_304
