"""LoRA (Hu et al. 2021): a matrix W [O I] learns as W + (alpha / rank) B A, where A and B are small and W stands still.

Adapters are a flat dictionary by path, and which matrices have one is a pattern of paths, as everywhere. `apply` puts
them into a tree of parameters, which every function of the library then takes; `merge` makes plain matrices of them.
Files are those of PEFT, for the decoder as `hypervl convert --part llm` writes it.
Axes: O outputs, I inputs, r rank, S layers of a stack, n samples, F features a picture, L sequence, D decoder width.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from hypervl_jax import image, layouts, losses, plan, tensors, text, tokens
from hypervl_jax.checkpoint import Model, replacing
from hypervl_jax.config import Branch, ConfigError, LlmConfig, LoraConfig
from hypervl_jax.model import hypervl, llm
from hypervl_jax.model.layers import Adapted
from hypervl_jax.tensors import Row, Table, flatten, unflatten

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
PREFIX = "base_model.model."


class Adapter(NamedTuple):
    """What one matrix, or one stack of them, learns."""

    a: Float[Array, "*S r I"]
    b: Float[Array, "*S O r"]


Adapters = dict[str, Adapter]  # by the path of the matrix


class Merged(NamedTuple):
    """Parameters with their adapters in them, and the matrices that were there before."""

    params: dict
    replaced: dict[str, Any]


def init(key: Array, cfg: LoraConfig, params: dict) -> Adapters:
    """Adapters of every matrix whose whole path matches `cfg.path`: A drawn as PEFT draws it, B zero, so that at first
    nothing changes.

    Raises `ConfigError` where no path matches, or one that is no weight matrix of a linear layer.
    """
    leaves = flatten(params)
    paths = sorted(path for path in leaves if re.fullmatch(cfg.path, path))
    if not paths:
        raise ConfigError(f"lora.path: {cfg.path!r} matches no path; they are as {', '.join(sorted(leaves)[:3])}, ...")
    odd = [p for p in paths if not p.endswith(".weight") or "norm" in p or getattr(leaves[p], "ndim", 0) < 2]
    if odd:
        raise ConfigError(f"lora.path: {odd[0]} is no matrix of a linear layer, in an array; match those alone")

    def one(key: Array, weight: Any) -> Adapter:
        *stack, o, i = weight.shape
        a = jax.random.uniform(key, (*stack, cfg.rank, i), jnp.float32, -(i**-0.5), i**-0.5)
        return Adapter(a, jnp.zeros((*stack, o, cfg.rank)))

    keys = jax.random.split(key, len(paths))
    return {path: one(k, leaves[path]) for path, k in zip(paths, keys, strict=True)}


def apply(params: dict, adapters: Adapters, cfg: LoraConfig) -> dict:
    """`params` with adapters beside their matrices: forward and backward without a matrix of the size of W."""
    leaves = _meant(params, adapters)
    beside = {
        path: Adapted(leaves[path], a.astype(leaves[path].dtype), (cfg.scale * b).astype(leaves[path].dtype))
        for path, (a, b) in adapters.items()
    }
    return unflatten({**leaves, **beside})


def merge(params: dict, adapters: Adapters, cfg: LoraConfig) -> Merged:
    """Plain parameters that say the same. A sum of floats cannot be undone by subtracting, so what was there is kept
    (not copied) and `unmerge` puts it back."""
    leaves = _meant(params, adapters)
    new = {path: _sum(leaves[path], adapter, cfg.scale) for path, adapter in adapters.items()}
    return Merged(unflatten({**leaves, **new}), {path: leaves[path] for path in adapters})


def unmerge(merged: Merged) -> dict:
    """The parameters before `merge`, bit for bit."""
    return unflatten({**flatten(merged.params), **merged.replaced})


@functools.partial(jax.jit, static_argnames="scale")
def _sum(weight: Any, adapter: Adapter, scale: float) -> Array:
    change = jnp.einsum("...or,...ri->...oi", scale * adapter.b, adapter.a, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + change).astype(weight.dtype)


def _meant(params: dict, adapters: Adapters) -> dict[str, Any]:
    """All leaves by path. Raises `ConfigError` for adapters of matrices that are not there, or of another shape."""
    leaves = flatten(params)
    for path, (a, b) in adapters.items():
        want = (*b.shape[:-1], a.shape[-1])
        if path not in leaves:
            raise ConfigError(f"an adapter is for {path}, which these parameters do not have: they are another model's")
        if getattr(leaves[path], "shape", ()) != want:
            raise ConfigError(f"an adapter is for {path} of shape {want}, which is no plain matrix of that shape here")
    return leaves


# --- learning --------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """What a model is to answer."""

    image: np.ndarray  # u8[H W 3]
    question: str
    answer: str


class Fitted(NamedTuple):
    adapters: Adapters
    losses: np.ndarray  # f64[steps], nats a token of the answers, before each step


def fit(
    model: Model, samples: Sequence[Sample], cfg: LoraConfig, steps: int = 100, batch: int = 16, lr: float = 2e-3,
    branch: Branch = "base", seed: int = 0,
) -> Fitted:  # fmt: skip
    """Adapters of the decoder that answer as `samples` do, by Adam. Encoder and projector stand still, so that every
    picture is encoded once, and features of all of them are held.

    Raises `ConfigError` where `cfg.path` means more than the decoder, where there is no sample, or where the loss is
    not finite.
    """
    adapters = init(jax.random.key(seed), cfg, model.params)
    if beyond := [path for path in adapters if not path.startswith("llm.")]:
        raise ConfigError(
            f"lora.path: {beyond[0]} is not the decoder's, which alone learns from samples; match llm alone"
        )
    if not samples:
        raise ConfigError("no samples: adapters learn from one at least")
    features, rows = _seen(model, samples, branch)
    rule, decoder = optax.adam(lr), {"llm": jax.tree.map(jnp.asarray, model.params["llm"])}

    def loss(adapters: Adapters, decoder: dict, seen: Array, row: Any) -> Array:
        params = apply(decoder, adapters, cfg)
        out = hypervl.hidden(params, model.config, seen, row.ids, row.slots, row.positions, row.segments)
        targets, mask = losses.shift(row.ids, row.loss)
        nats = losses.cross_entropy(llm.logits(params["llm"], out), targets)
        return losses.mean_where(nats, losses.answer_weights(mask, jnp.roll(row.segments, -1, 1)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: Adapters, state: Any, *seen: Any) -> tuple[Any, Any, Array]:
        value, grads = jax.value_and_grad(loss)(adapters, *seen)
        change, state = rule.update(grads, state)
        return optax.apply_updates(adapters, change), state, value  # type: ignore  # of the same tree

    rng, state, found = np.random.default_rng(seed), rule.init(adapters), []  # type: ignore
    for _ in range(steps):
        some = rng.choice(len(samples), batch, replace=len(samples) < batch)
        row = jax.tree.map(lambda a: a[some], rows)  # noqa: B023 - used at once
        adapters, state, value = step(adapters, state, decoder, features[some], row)
        found.append(value)
    said = np.array([float(x) for x in found])
    if not np.isfinite(said).all():
        raise ConfigError(
            f"lr {lr:g}: the loss is not finite from step {np.isfinite(said).argmin()} on; choose a lower one"
        )
    return Fitted(adapters, said)


def _seen(model: Model, samples: Sequence[Sample], branch: Branch) -> tuple[np.ndarray, text.Prompt]:
    """(features f32[n F D], rows [n L]) of samples."""
    cfg, tok = model.config, model.tokenizer
    plans = [plan.make(s.image.shape[:2], 1.0, cfg.policy) for s in samples]
    most = max(p.n_tiles for p in plans)
    encode = jax.jit(lambda params, tiles, mask: hypervl.encode_tiles(params, cfg, branch, tiles, mask))
    features = []
    for sample, p in zip(samples, plans, strict=True):
        blank = [(0, most - p.n_tiles)]
        tiles = np.pad(image.prepare(sample.image, p), blank + [(0, 0)] * 3)
        out = encode(model.params, tiles, np.pad(p.patch_mask(), [*blank, (0, 0)]))
        features.append(np.asarray(out).reshape(-1, out.shape[-1]))
    prompts = [
        text.render_questions(p, [(s.question, s.answer)], tok, cfg.text) for s, p in zip(samples, plans, strict=True)
    ]
    length = -(-max(len(row.ids) for row in prompts) // 32) * 32
    return np.stack(features), text.stack(prompts, length, tok.special(tokens.PAD))


# --- files -----------------------------------------------------------------------------------------------------------

# What a PEFT file may ask for that is no plain LoRA, and the only value of it that is read.
_PLAIN = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
    "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None,
    "layer_replication": None, "lora_bias": False, "target_parameters": None,
}  # fmt: skip
_READ = _PLAIN | {"alora_invocation_tokens": None, "use_qalora": False}
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # that leave W as it was; others take a part out of it


def _modules(cfg: LlmConfig) -> dict[str, str]:
    """Path of every projection of the decoder -> the name of its module, `{i}` for the layer."""
    rows = layouts.llm(cfg).within("llm.", "").rows
    return {row.path: row.name.removesuffix(".weight") for row in rows if row.name.endswith("_proj.weight")}


def _table(cfg: LlmConfig, paths: Iterable[str]) -> Table:
    names, rows = _modules(cfg), []
    for path in paths:
        if path not in names:
            raise ConfigError(f"{path}: PEFT files are of the decoder's projections; save others merged into the model")
        for part in ("a", "b"):
            rows.append(Row(f"{path}.{part}", f"{PREFIX}{names[path]}.lora_{part.upper()}.weight"))
    return Table(tuple(rows))


def save(folder: Path | str, adapters: Adapters, cfg: LoraConfig, decoder: LlmConfig, base: str = "") -> Path:
    """Writes adapters of the decoder as PEFT does, whole or not at all. `base` names the model they are for.

    Raises `ConfigError` for adapters of anything else, `CheckpointError` naming what is not finite.
    """
    folder, table = Path(folder), _table(decoder, sorted(adapters))
    modules = sorted({_modules(decoder)[path].rsplit(".", 1)[-1] for path in adapters})
    values = _PLAIN | {
        "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "r": cfg.rank,
        "lora_alpha": cfg.alpha, "lora_dropout": 0.0, "target_modules": modules, "init_lora_weights": True,
    }  # fmt: skip
    tree = unflatten({f"{path}.{part}": getattr(x, part) for path, x in adapters.items() for part in ("a", "b")})
    with replacing(folder) as new:
        tensors.write(new, tree, table, np.float32)
        os.replace(new / tensors.FILE, new / WEIGHTS)
        layouts.write_json(new / CONFIG, values)
    return folder


def load(folder: Path | str, decoder: LlmConfig) -> tuple[LoraConfig, Adapters]:
    """Adapters of the decoder from a folder that PEFT or `save` has written, f32.

    Raises `ConfigError` for another kind of adapter, `CheckpointError` for tensors that do not fit it or the decoder.
    """
    where = Path(folder) / CONFIG
    try:
        values = json.loads(where.read_text("utf-8"))
        rank, alpha, modules = values["r"], float(values["lora_alpha"]), values["target_modules"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise ConfigError(
            f"{where}: cannot be read ({type(e).__name__}: {e}); give a folder that PEFT has saved"
        ) from e
    for key, only in _READ.items():
        if key in values and (values[key] or None) != (only or None):
            raise ConfigError(
                f"{where}: {key} is {values[key]!r:.80}; only {only!r} is read: merge it with PEFT instead"
            )
    if (begun := values.get("init_lora_weights")) not in _STARTS:
        raise ConfigError(
            f"{where}: init_lora_weights is {begun!r:.80}, which changes the matrices beside the adapter; save it "
            "again with path_initial_model_for_weight_conversion, or merge it with PEFT"
        )
    found = tensors.contents(Path(folder), WEIGHTS)
    names = {f"{PREFIX}{name}.lora_A.weight": path for path, name in _modules(decoder).items()}
    paths = sorted(path for name, path in names.items() if name.replace("{i}", "0") in found)
    said = {_modules(decoder)[path].rsplit(".", 1)[-1] for path in paths}
    if not paths or not isinstance(modules, list) or said != {str(m).rsplit(".", 1)[-1] for m in modules}:
        have = f"{', '.join(sorted(said)) or 'none of the projections'} of layer 0"
        raise ConfigError(f"{where}: target_modules is {modules!r:.200}, beside it are weights of {have}")
    kinds = "|".join(sorted(re.escape(path) for path in paths))
    try:
        cfg = LoraConfig(kinds, rank, alpha)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{where}: {e}") from e
    shapes = {}
    for path, (o, i) in _sizes(decoder, paths).items():
        shapes |= {f"{path}.a": (decoder.depth, rank, i), f"{path}.b": (decoder.depth, o, rank)}
    tree, _ = tensors.read(Path(folder), _table(decoder, paths), shapes, np.float32, file=WEIGHTS)
    flat = flatten(tree)
    return cfg, {path: Adapter(*(jnp.asarray(flat[f"{path}.{part}"]) for part in ("a", "b"))) for path in paths}


def _sizes(cfg: LlmConfig, paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of projections."""
    q, kv, d, m = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim, cfg.width, cfg.mlp
    of = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q), "gate": (m, d), "up": (m, d), "down": (d, m)}
    return {path: of[path.split(".")[-2]] for path in paths}
