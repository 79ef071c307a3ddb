"""How public models are written down: tensor names, config.json and the small files beside the weights.

SigLIP and SigLIP 2 of fixed resolution (model type `siglip`), NaFlex SigLIP 2 (`siglip2`), Qwen3, Llama, and HyperVL,
whose parts keep the names they have alone. A table or a dictionary a format, read in both directions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hypervl_jax import config
from hypervl_jax.config import BRANCHES, ConfigError, LlmConfig, TextConfig, VitConfig
from hypervl_jax.tensors import AS_IS, PATCH, Row, Table
from hypervl_jax.tokens import (
    END_THINK,
    IM_END,
    IM_START,
    IMAGE_PAD,
    PAD,
    THINK,
    VISION_END,
    VISION_START,
    Tokenizer,
)

CONFIG, TOKENIZER = "config.json", "tokenizer.json"

# --- tensors ---------------------------------------------------------------------------------------------------------

VIT_BLOCK = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
    "v": "self_attn.v_proj", "o": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
}  # fmt: skip
LLM_BLOCK = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
    "v": "self_attn.v_proj", "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def vit(naflex: bool = False) -> Table:
    """A SigLIP vision tower. NaFlex has a linear layer over patches, in our order; the others a convolution."""
    rows = [
        Row("patch.weight", "embeddings.patch_embedding.weight", AS_IS if naflex else PATCH),
        Row("patch.bias", "embeddings.patch_embedding.bias"),
        Row("pos", "embeddings.position_embedding.weight"),
    ]
    for leaf in ("weight", "bias"):
        rows += [Row(f"blocks.layers.{a}.{leaf}", f"encoder.layers.{{i}}.{b}.{leaf}") for a, b in VIT_BLOCK.items()]
        rows.append(Row(f"norm.{leaf}", f"post_layernorm.{leaf}"))
    return Table(tuple(rows), ((r"head\..*", "pooling head"), (r"embeddings\.position_ids", "position numbers")))


def vit_in(names: Iterable[str], naflex: bool) -> Table:
    """The same in the files of a whole SigLIP, or alone; transformers has written towers with and without a prefix."""
    whole = any(name.startswith("vision_model.") for name in names)
    table = vit(naflex).within("", "vision_model." if whole else "")
    return table._replace(unused=(*table.unused, (r"text_model\..*", "text tower"), (r"logit_(scale|bias)", "scales")))


def llm(cfg: LlmConfig) -> Table:
    """A Qwen3 or Llama decoder with its head."""
    block = {a: b for a, b in LLM_BLOCK.items() if cfg.qk_norm or a not in ("q_norm", "k_norm")}
    rows = [
        Row("embed", "model.embed_tokens.weight"),
        *(Row(f"blocks.layers.{a}.weight", f"model.layers.{{i}}.{b}.weight") for a, b in block.items()),
        Row("norm.weight", "model.norm.weight"),
    ]
    unused = [(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "rotary frequencies")]
    if not cfg.tied:
        return Table((*rows, Row("head", "lm_head.weight")), tuple(unused))
    repeats = (("lm_head.weight", "model.embed_tokens.weight"),)
    return Table(tuple(rows), (*unused, (r"lm_head\.weight", "head, which repeats the embedding")), repeats)


def hypervl(cfg: config.ModelConfig, paths: Iterable[str]) -> Table:
    """Our own format: the parts as they are alone, each behind its name; projectors and VRC (`paths` names them all)
    as in our tree."""
    rows = [*llm(cfg.llm).within("llm.", "llm.").rows]
    for branch in BRANCHES:
        rows += vit().within(f"{branch}.vit.", f"{branch}.vision_model.").rows
    public = {row.path for row in rows}
    return Table((*rows, *(Row(path, path) for path in paths if path not in public)))


# --- sizes -----------------------------------------------------------------------------------------------------------

VIT_SIZES = {
    "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads", "mlp": "intermediate_size",
    "tile": "image_size", "patch": "patch_size", "eps": "layer_norm_eps",
}  # fmt: skip
LLM_SIZES = {
    "vocab": "vocab_size", "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "mlp": "intermediate_size", "rope_theta": "rope_theta",
    "eps": "rms_norm_eps", "tied": "tie_word_embeddings",
}  # fmt: skip
# What transformers assumes where a file is silent: those of SigLIP leave out what is as in Base/16 at 224.
VIT_DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "image_size": 224, "num_patches": 256, "patch_size": 16, "layer_norm_eps": 1e-6,
}  # fmt: skip
LLM_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False}
VIT_FIXED = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
LLM_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}


class Vision(NamedTuple):
    """What a config.json says of a SigLIP."""

    config: VitConfig
    naflex: bool


def vision_config(folder: Path) -> Vision:
    """Of a whole SigLIP or of its vision tower. NaFlex counts patches: its tile is the square of them.

    Raises `ConfigError` naming file and key for another kind of model, or one that the encoder is not.
    """
    values, where = _load(folder), folder / CONFIG
    kind = values.get("model_type")
    if kind in ("siglip", "siglip2"):
        values = values.get("vision_config") or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: vision_config: expected a table")
    elif kind not in ("siglip_vision_model", "siglip2_vision_model"):
        raise ConfigError(f"{where}: model_type is {kind!r:.80}, not siglip or siglip2; give a SigLIP 2")
    naflex = kind.startswith("siglip2")
    values = VIT_DEFAULTS | values
    _refuse(values, VIT_FIXED, where)
    if naflex:
        n, patch = values["num_patches"], values["patch_size"]
        if type(n) is not int or type(patch) is not int or n < 1 or math.isqrt(n) ** 2 != n:
            raise ConfigError(f"{where}: num_patches {n!r:.80} of {patch!r:.80} px make no square")
        values["image_size"] = math.isqrt(n) * patch
    return Vision(_sizes(VitConfig, VIT_SIZES, values, where), naflex)


def llm_config(folder: Path) -> LlmConfig:
    """Of a Qwen3 or Llama. Raises `ConfigError` naming file and key for another kind of model, or one that the decoder
    is not: biases, sliding windows, stretched rotary embeddings, quantised weights."""
    values, where = _load(folder), folder / CONFIG
    kind = values.get("model_type")
    if kind not in ("qwen3", "llama"):
        raise ConfigError(f"{where}: model_type is {kind!r:.80}, not qwen3 or llama; give one of these")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: rope_parameters: expected a table")
    values = LLM_DEFAULTS | values | {k: v for k, v in rope.items() if k == "rope_theta"}
    kinds = {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
    kinds["partial_rotary_factor"] = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1))
    _refuse(values, LLM_FIXED, where)
    _refuse(kinds, {"rope_type": "default", "partial_rotary_factor": 1}, where)
    if kind == "llama":
        heads, width = values.get("num_attention_heads"), values.get("hidden_size")
        values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
        if not values.get("head_dim") and type(heads) is int and type(width) is int and heads > 0:
            values["head_dim"] = width // heads
    cfg = _sizes(LlmConfig, LLM_SIZES, values, where)
    return dataclasses.replace(cfg, qk_norm=kind == "qwen3")


def _load(folder: Path) -> dict[str, Any]:
    where = folder / CONFIG
    try:
        values = json.loads(where.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{where}: cannot be read ({e}); give the folder of a model as transformers saves it") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a table, found {values!r:.80}")
    if values.get("quantization_config"):
        raise ConfigError(f"{where}: quantization_config: quantised weights are not read; give the original model")
    return values


def _refuse(values: dict, only: dict[str, Any], where: Path) -> None:
    for key, value in only.items():
        if values.get(key, value) != value:
            raise ConfigError(f"{where}: {key} is {values[key]!r:.80}; only {value!r} is supported")


def _sizes(cls: type, names: dict[str, str], values: dict[str, Any], where: Path) -> Any:
    kinds = typing.get_type_hints(cls)
    for ours, theirs in names.items():
        if theirs not in values:
            raise ConfigError(f"{where}: {theirs}: missing")
        allowed = (int, float) if kinds[ours] is float else (kinds[ours],)
        if type(values[theirs]) not in allowed:
            raise ConfigError(f"{where}: {theirs}: expected {kinds[ours].__name__}, found {values[theirs]!r:.80}")
        if kinds[ours] is int and values[theirs] > config.MANY:
            raise ConfigError(f"{where}: {theirs}: {values[theirs]!r:.20} is more than any model has")
    return config.from_dict(cls, {ours: values[theirs] for ours, theirs in names.items()}, str(where))


def vit_values(cfg: VitConfig, dtype: str) -> dict[str, Any]:
    """config.json of a vision tower without its pooling head."""
    sizes = {theirs: getattr(cfg, ours) for ours, theirs in VIT_SIZES.items()}
    kind = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model"}
    return kind | VIT_FIXED | sizes | {"vision_use_head": False, "dtype": dtype}


def llm_values(cfg: LlmConfig, dtype: str) -> dict[str, Any]:
    """config.json of a decoder."""
    sizes = {theirs: getattr(cfg, ours) for ours, theirs in LLM_SIZES.items()}
    name = "Qwen3" if cfg.qk_norm else "Llama"
    kind = {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower()}
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}  # as transformers 5 has it; before, it stood alone
    return kind | LLM_FIXED | sizes | {"rope_parameters": rope, "dtype": dtype}


# --- beside the weights ----------------------------------------------------------------------------------------------


def chat_template(cfg: TextConfig) -> str:
    """`text.render` in Jinja, as far as it is text: a picture is one <|image_pad|>, which the plan turns into many."""
    image = VISION_START + IMAGE_PAD + VISION_END + r"\n"
    think = rf"{THINK}\n\n{END_THINK}\n\n" if cfg.think else ""
    return (
        "{%- for message in messages %}"
        f"{{{{- '{IM_START}' + message.role + '\\n' }}}}"
        "{%- if message.role == 'assistant' and loop.last %}"
        f"{{{{- '{think}' }}}}"
        "{%- endif %}"
        "{%- if message.content is string %}{{- message.content }}{%- else %}"
        "{%- for part in message.content %}"
        f"{{%- if part.type == 'image' %}}{{{{- '{image}' }}}}{{%- else %}}{{{{- part.text }}}}{{%- endif %}}"
        "{%- endfor %}{%- endif %}"
        f"{{{{- '{IM_END}\\n' }}}}"
        "{%- endfor %}"
        "{%- if add_generation_prompt and messages[-1].role != 'assistant' %}"
        f"{{{{- '{IM_START}assistant\\n{think}' }}}}"
        "{%- endif %}"
    )


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), "utf-8")


def write_text_files(folder: Path, tokenizer: Tokenizer, cfg: TextConfig) -> None:
    """Tokenizer, chat template and how an answer is generated and ends."""
    tokenizer.save(folder / TOKENIZER)
    tokens = {"eos_token": IM_END, "pad_token": PAD, "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | tokens)
    (folder / "chat_template.jinja").write_text(chat_template(cfg), "utf-8")
    end, pad = tokenizer.special(IM_END), tokenizer.special(PAD)
    write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad})


def write_image_files(folder: Path, tile: int) -> None:
    """What makes one tile of a picture: resized as `image.resize` does, u8 to -1 .. 1 as the encoder does itself."""
    half = [0.5, 0.5, 0.5]
    values = {
        "image_processor_type": "SiglipImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"height": tile, "width": tile}, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": half, "image_std": half,
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", values)
