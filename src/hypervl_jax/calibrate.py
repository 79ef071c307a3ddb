"""What a decoder multiplies by its matrices, from pictures and text, and the 4 bits that are chosen by it (`gptq.py`).

Pictures go through the model's own vision part, and their features with the text through the decoder, layer by layer:
one program of one layer, whose memory does not grow with the depth.
Axes: H W picture, L tokens, D decoder width, I inputs of a matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from tqdm import tqdm

from hypervl_jax import ask, gptq, judge, quantize, text
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import Branch, LlmConfig
from hypervl_jax.data.conversations import Conversation
from hypervl_jax.gptq import CalibrationError
from hypervl_jax.model import hypervl, llm
from hypervl_jax.model.layers import Linear
from hypervl_jax.quantize import Quantized, Recipe

INPUT = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}  # which share theirs
Grams = dict[str, Any]  # f32[I I] each, by the first matrix of INPUT that takes them


class Sample(NamedTuple):
    """Pictures and what is said about them."""

    pictures: list[UInt8[np.ndarray, "H W 3"]]
    messages: list[dict[str, Any]]  # as `text.render` takes them


class Row(NamedTuple):
    """What a layer reads of a sample."""

    x: Float[Array, "1 L D"]
    seen: Bool[Array, "1 L"]  # not padding


def from_screens(model: Model, n: int) -> list[Sample]:
    """A question and its answer about each of the first `n` composed screens that the model was trained on.

    Raises `ConfigError` for a model that does not say what that was.
    """
    from hypervl_jax.data import screens
    from hypervl_jax.data.assets import Assets

    cfg, assets, out = judge.trained_on(model).data.screens, Assets.load(), []
    for i in range(cfg.train):
        screen = screens.record(assets, cfg, "train", i)
        if screen.questions and len(out) < n:
            asked = screen.questions[i % len(screen.questions)]
            content = [{"type": "image"}, {"type": "text", "text": asked.text}]
            said = [{"role": "user", "content": content}, {"role": "assistant", "content": asked.answer}]
            out.append(Sample([screen.image], said))
        if len(out) == n:
            break
    return out


def from_conversations(some: Iterable[Conversation]) -> list[Sample]:
    """The same of other people's data."""
    return [Sample([p.load() for p in c.pictures], c.messages) for c in some]


def grams(
    model: Model, samples: Sequence[Sample], branches: Sequence[Branch], progress: bool = True
) -> Iterator[Grams]:
    """Layer by layer of the decoder: H = mean of x x^T over all tokens x that it multiplies by its matrices.

    The samples take turns with the `branches`. Raises `CalibrationError` for samples that are none, or where what is
    multiplied is not finite.
    """
    if not samples:
        raise CalibrationError("no samples to calibrate on; give one at least")
    cfg, depth = model.config.llm, model.config.llm.depth
    with tqdm(total=len(samples) + depth, desc="calibrate", disable=not progress, leave=False) as bar:
        rows = []
        for i, sample in enumerate(samples):
            rows.append(_row(model, sample, branches[i % len(branches)], f"sample {i + 1}"))
            bar.update()
        tokens = sum(int(row.seen.sum()) for row in rows)
        for i in range(depth):
            layer, total = at(model.params, i), None
            for n, row in enumerate(rows):
                x, total = _layer(layer, cfg, row, total)
                rows[n] = row._replace(x=x)
            found = {name: np.asarray(g) / tokens for name, g in (total or {}).items()}
            for name in INPUT:
                if not np.isfinite(found[INPUT[name]]).all():
                    raise CalibrationError(
                        f"llm.blocks.layers.{i}.{name}.weight: what it is multiplied by is not finite; the model is "
                        "damaged, or not made for such samples"
                    )
            bar.update()
            yield found


def calibrated(params: dict, recipe: Recipe, found: Iterable[Grams]) -> dict:
    """`quantize.quantize(params, recipe)`, the 4 bits of the decoder's layers chosen by what was `found` (`grams`).

    Raises `RecipeError`, and `CalibrationError` where nothing can be learnt of what was found.
    """
    kept = quantize.quantize(params, recipe)
    each = [rounded(params, layer, i, g) for i, (layer, g) in enumerate(zip(layers_of(kept), found, strict=True))]
    return with_layers(kept, each)


def rounded(params: dict, kept: dict, i: int, found: Grams) -> dict:
    """Layer `i` as it is `kept`, its matrices in 4 bits by GPTQ."""
    out, plain = dict(kept), at(params, i)
    for name, leaf in narrow(kept).items():
        try:
            out[name] = {"weight": gptq.round_matrix(plain[name]["weight"], leaf.kind, found[INPUT[name]])}
        except CalibrationError as e:
            raise CalibrationError(f"llm.blocks.layers.{i}.{name}.weight: {e}") from e
    return out


def narrow(layer: dict) -> dict[str, Quantized]:
    """The matrices of a decoder's layer that are in 4 bits."""
    leaves = {name: layer[name]["weight"] for name in INPUT}
    return {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Quantized) and leaf.bits == 4}


def chooses(recipe: Recipe, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a recipe has a matrix of the decoder's layers in 4 bits; `shapes` are those of the model, by path."""
    stacks = {name: shapes[f"llm.blocks.layers.{name}.weight"] for name in INPUT}
    kinds = (
        quantize.kind_of(f"llm.blocks.layers.{i}.{name}.weight", inputs, recipe)
        for name, (depth, _, inputs) in stacks.items()
        for i in range(depth)
    )
    return any(kind is not None and kind.bits == 4 for kind in kinds)


def _row(model: Model, sample: Sample, branch: Branch, what: str) -> Row:
    """Of one of few lengths."""
    seen = [ask.see(model, pixels, branch, vrc=False) for pixels in sample.pictures]
    prompt = text.render(sample.messages, [s.plan for s in seen], model.tokenizer, model.config.text, False)
    length = 64
    while length < len(prompt.ids):
        length *= 2
    prompt = text.pad(prompt, length, 0)
    blank = np.zeros((1, model.config.llm.width), np.float32)
    features = np.concatenate([s.features for s in seen]) if seen else blank
    if not np.isfinite(features).all():
        raise CalibrationError(f"{what}: the features of its pictures ({branch}) are not finite; the model is damaged")
    x = _embed(model.params, prompt.ids[None], prompt.slots[None], features[None])
    return Row(x, jnp.asarray(prompt.segments[None] >= 0))


_embed = jax.jit(hypervl.embed)


@functools.partial(jax.jit, static_argnames="cfg")
def _layer(params: dict, cfg: LlmConfig, row: Row, total: Grams | None) -> tuple[Array, Grams]:
    """What a layer gives, and the sums of x x^T over its tokens, added to those so far."""
    met = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Linear) and context.module.name in INPUT.values():
            met[context.module.name] = jnp.where(row.seen[..., None], args[0], 0)[0]
        return call(*args, **kwargs)

    length = row.x.shape[1]
    cos, sin = llm.rotary(jnp.arange(length)[None], cfg.head_dim, cfg.rope_theta)
    mask = jnp.tril(jnp.ones((length, length), bool)) & row.seen[:, None]
    with nn.intercept_methods(note):
        y, _ = llm.Block(cfg).apply({"params": params}, row.x, None, cos, sin, mask, 0)  # type: ignore  # not mutable
    sums = {name: jnp.einsum("li,lj->ij", x, x, precision="highest") for name, x in met.items()}
    return y, sums if total is None else jax.tree.map(jnp.add, sums, total)


# --- layers of a tree ------------------------------------------------------------------------------------------------


def layers_of(params: dict) -> list[dict]:
    """The decoder's layers one by one, stacked or not."""
    stack = params["llm"]["blocks"]["layers"]
    return stack if isinstance(stack, list) else [at(params, i) for i in range(len(jax.tree.leaves(stack)[0]))]


def at(params: dict, i: int) -> dict:
    """Layer `i` of the decoder's stack."""
    return jax.tree.map(lambda a: np.asarray(a)[i], params["llm"]["blocks"]["layers"])


def with_layers(params: dict, each: list[dict]) -> dict:
    """The same model with other layers in the decoder."""
    blocks = params["llm"]["blocks"] | {"layers": quantize.joined(each)}
    return params | {"llm": params["llm"] | {"blocks": blocks}}
