"""Weights in and out: a HyperVL from a published decoder and two published vision encoders, and its parts back.

What HyperVL adds (projectors, VRC, tile markers) is drawn anew and has to be trained before the whole answers anything.
Axes: P patches, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from hypervl_jax import checkpoint, layouts, tensors
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import BRANCHES, Branch, ConfigError, LlmConfig, ModelConfig, PlanPolicy, VitConfig, VrcConfig
from hypervl_jax.model import hypervl, llm
from hypervl_jax.model.vit import Vit
from hypervl_jax.tokens import SPECIALS, Tokenizer, with_markers

GROWN = ("embed", "head")  # tables with a row a token
FRESH = (*(f"{branch}.projector" for branch in BRANCHES), "vrc")  # what no published part has


class Loaded(NamedTuple):
    """A part as it was published: its sizes, its tree, and a line on everything its files hold beside that."""

    config: Any
    params: dict
    unused: list[str]


def load_llm(folder: Path | str, dtype: Any = None, shardings: dict | None = None) -> Loaded:
    """A Qwen3 or Llama directory -> `LlmConfig` and the tree of `model.llm.Llm`.

    `dtype` and `shardings` are those of `tensors.read`. Raises `ConfigError` or `CheckpointError` naming the file.
    """
    folder = Path(folder)
    cfg = layouts.llm_config(folder)
    return Loaded(cfg, *tensors.read(folder, layouts.llm(cfg), llm_shapes(cfg), dtype, shardings))


def load_vit(folder: Path | str, dtype: Any = None, shardings: dict | None = None) -> Loaded:
    """A SigLIP or SigLIP 2 directory, whole or its vision tower -> `VitConfig` and the tree of `model.vit.Vit`.

    `dtype` and `shardings` are those of `tensors.read`. Raises `ConfigError` or `CheckpointError` naming the file.
    """
    folder = Path(folder)
    cfg, naflex = layouts.vision_config(folder)
    table = layouts.vit_in(tensors.contents(folder), naflex)
    return Loaded(cfg, *tensors.read(folder, table, vit_shapes(cfg), dtype, shardings))


def llm_shapes(cfg: LlmConfig) -> dict[str, tuple[int, ...]]:
    """Path and shape of every weight of a decoder."""
    args = jnp.zeros((1, 1, cfg.width)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
    return _shapes(llm.Llm(cfg), *args)


def vit_shapes(cfg: VitConfig) -> dict[str, tuple[int, ...]]:
    """Path and shape of every weight of an encoder."""
    args = jax.ShapeDtypeStruct((1, cfg.tile, cfg.tile, 3), np.uint8), jax.ShapeDtypeStruct((1, cfg.patches), bool)
    return _shapes(Vit(cfg), *args)


def _shapes(module: Any, *args: Any) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return {path: tuple(leaf.shape) for path, leaf in tensors.flatten(tree).items()}


# --- in --------------------------------------------------------------------------------------------------------------


def resize_positions(table: Float[np.ndarray, "P D"], side: int) -> Float[np.ndarray, "_ D"]:
    """Position embeddings of a square of patches for one of `side` x `side`: bilinear, antialiased, in f32, as SigLIP 2
    does for NaFlex (2502.14786; transformers' Siglip2VisionEmbeddings)."""
    old = round(len(table) ** 0.5)
    square = rearrange(jnp.asarray(table, jnp.float32), "(r c) d -> r c d", r=old)
    new = jax.image.resize(square, (side, side, square.shape[-1]), "bilinear", antialias=True)
    return np.asarray(rearrange(new, "r c d -> (r c) d")).astype(table.dtype)


def grow(rows: Float[np.ndarray, "V D"], vocab: int, seed: int) -> Float[np.ndarray, "_ D"]:
    """The table with rows added up to `vocab`, drawn with the mean and spread of those that are there, by channel."""
    sample = np.asarray(rows, np.float32)
    rng, size = np.random.default_rng(seed), (vocab - len(rows), rows.shape[1])
    new = sample.mean(0) + sample.std(0) * rng.standard_normal(size, np.float32)
    return np.concatenate([rows, new.astype(rows.dtype)])


def assemble(
    base: Path | str, large: Path | str, decoder: Path | str, tile: int | None = None, seed: int = 0
) -> tuple[Model, list[str]]:
    """A HyperVL of published parts, each in the dtype of its files, and what there is to say about it, a line each.

    Tiles are of `tile` pixels: if not given, of the size that both encoders were made for. The decoder's tokenizer
    gets the tile markers it lacks, and its tables grow if they have no rows for them. Projectors and VRC are drawn from
    `seed`. Raises `ConfigError`, `CheckpointError` or `TextError` naming the file that does not fit.
    """
    folders = {"base": Path(base), "large": Path(large), "llm": Path(decoder)}
    cfg = _config(folders, tile)
    tokenizer = Tokenizer.load(folders["llm"] / layouts.TOKENIZER)
    for name in SPECIALS:
        tokenizer.special(name)
    parts = {branch: load_vit(folders[branch]) for branch in BRANCHES} | {"llm": load_llm(folders["llm"])}
    lines = []
    for name, part in parts.items():
        lines.append(f"{name}: {_summary(part.params)}, from {folders[name]}")
        lines += [f"  not used: {what}" for what in part.unused]
    for branch in BRANCHES:
        vit, side = parts[branch].params, cfg.policy.patches_per_side
        if (had := len(vit["pos"])) != side**2:
            vit["pos"] = resize_positions(vit["pos"], side)
            lines.append(f"{branch}: position table resized from {had} to {side**2} patches")
    known, tokenizer = tokenizer.vocab_size, with_markers(tokenizer)
    lines.append(f"tokenizer: {known} tokens, and {tokenizer.vocab_size - known} tile markers added")
    decoder_params = parts["llm"].params
    if (need := tokenizer.vocab_size) > cfg.llm.vocab:
        decoder_params |= {name: grow(decoder_params[name], need, seed) for name in GROWN if name in decoder_params}
        lines.append(f"llm: {cfg.llm.vocab} rows of tokens grown to {need}, new ones drawn from seed {seed}")
        cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, vocab=need))
    params = _fresh(jax.random.key(seed), cfg) | {"llm": decoder_params}
    for branch in BRANCHES:
        params[branch]["vit"] = parts[branch].params
    lines.append(f"fresh: {', '.join(FRESH)}, drawn from seed {seed}: to be trained before the model is asked")
    return Model(cfg, params, tokenizer, {"fresh": list(FRESH), "seed": seed}), lines


def _config(folders: dict[str, Path], tile: int | None) -> ModelConfig:
    seen = {branch: layouts.vision_config(folders[branch]) for branch in BRANCHES}
    both = f"{folders['base']} and {folders['large']}"
    patches = sorted({v.config.patch for v in seen.values()})
    if len(patches) > 1:
        raise ConfigError(f"{both}: patches of {patches[0]} and {patches[1]} px; choose encoders with the same")
    sizes = sorted({v.config.tile for v in seen.values() if not v.naflex} or {v.config.tile for v in seen.values()})
    if tile is None and len(sizes) > 1:
        raise ConfigError(f"{both}: made for {sizes[0]} and {sizes[1]} px; say with --tile how large tiles shall be")
    try:
        policy = PlanPolicy(tile=tile or sizes[0], patch=patches[0])
    except ValueError as e:
        raise ConfigError(f"{both}: {e}; choose one with --tile") from e
    base, large = (dataclasses.replace(seen[branch].config, tile=policy.tile) for branch in BRANCHES)
    return ModelConfig(base, large, layouts.llm_config(folders["llm"]), VrcConfig(), policy)


@functools.partial(jax.jit, static_argnames="cfg")  # what is drawn but not returned is not computed
def _fresh(key: Array, cfg: ModelConfig) -> dict:
    params = hypervl.init(key, cfg)
    return {branch: {"projector": params[branch]["projector"]} for branch in BRANCHES} | {"vrc": params["vrc"]}


def _summary(params: dict) -> str:
    leaves = jax.tree.leaves(params)
    return f"{sum(leaf.size for leaf in leaves):,} weights, {'/'.join(sorted({leaf.dtype.name for leaf in leaves}))}"


# --- out -------------------------------------------------------------------------------------------------------------


def save_llm(out: Path | str, model: Model, dtype: Any = None) -> None:
    """Writes the decoder as a directory that transformers opens: weights in `dtype` or as they are, tokenizer, chat
    template. Whole or not at all."""
    cfg, params = model.config.llm, model.params["llm"]
    with checkpoint.replacing(out) as new:
        tensors.write(new, params, layouts.llm(cfg), dtype)
        layouts.write_json(new / layouts.CONFIG, layouts.llm_values(cfg, np.dtype(dtype or params["embed"].dtype).name))
        layouts.write_text_files(new, model.tokenizer, model.config.text)


def save_vit(out: Path | str, model: Model, branch: Branch, dtype: Any = None) -> None:
    """The same for one encoder, as a SigLIP vision tower of fixed resolution; its projector has no place there."""
    cfg, params = model.config.vit(branch), model.params[branch]["vit"]
    with checkpoint.replacing(out) as new:
        tensors.write(new, params, layouts.vit().within("", "vision_model."), dtype)
        layouts.write_json(new / layouts.CONFIG, layouts.vit_values(cfg, np.dtype(dtype or params["pos"].dtype).name))
        layouts.write_image_files(new, cfg.tile)
