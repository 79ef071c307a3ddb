"""One picture, one question, the whole path in JAX: load, shrink (VRC), plan, encode tile by tile, decode as a stream.

`export.runtime` is the same walk over exported files.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Generator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hypervl_jax import compress, evaluate, generate, image, plan, text, tokens
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import Branch, ModelConfig
from hypervl_jax.model import hypervl
from hypervl_jax.plan import VisionPlan


class Seen(NamedTuple):
    """A picture as the model sees it."""

    plan: VisionPlan
    features: Float[Array, "1 F D"]


def ratio_of(model: Model, pixels: np.ndarray) -> float:
    """The area ratio in [min_ratio, 1] that VRC allows this picture."""
    scale = model.info.get("vrc_scale", 1.0)
    return compress.predict(model.params["vrc"], model.config.vrc, pixels, scale)


def see(model: Model, pixels: np.ndarray, branch: Branch, vrc: bool = True) -> Seen:
    """Plans a picture u8[H W 3] and encodes its tiles one after another, through one compiled program."""
    cfg = model.config
    p = plan.make(pixels.shape[:2], ratio_of(model, pixels) if vrc else 1.0, cfg.policy)
    tiles, masks = image.prepare(pixels, p), p.patch_mask()
    features = [_encode(model.params, cfg, branch, t[None], m[None]) for t, m in zip(tiles, masks, strict=True)]
    return Seen(p, jnp.concatenate(features, axis=1))


@functools.partial(jax.jit, static_argnames=("cfg", "branch"))
def _encode(params: dict, cfg: ModelConfig, branch: Branch, tile: Array, mask: Array) -> Array:
    return hypervl.encode_batch(params, cfg, branch, tile, mask)


def answer(
    model: Model, seen: Seen, question: str, new: int = 32, temperature: float = 0.0, seed: int | None = None
) -> Generator[str, None, bool]:
    """The answer, piece by piece as it is known; the generator returns whether the model ended it, False if it was cut
    at `new` tokens. Above temperature 0 it is sampled, by `seed` (None: another one each time)."""
    tok, cfg = model.tokenizer, model.config
    row = evaluate.prompt(model, seen.plan, question)
    length = -(-len(row[0]) // 32) * 32  # few programs: lengths by 32
    ids, slots, pads = generate.pad_left([row], length, tok.special(tokens.PAD))
    x = hypervl.embed(model.params, jnp.asarray(ids), jnp.asarray(slots), seen.features)
    end, forbidden = tok.special(tokens.IM_END), jnp.asarray(tok.forbidden(cfg.llm.vocab))
    sampler, key = generate.Sampler(temperature), jax.random.key(secrets.randbits(32) if seed is None else seed)
    out, said = text.Stream(tok), 0
    for token in generate.stream(model.params, cfg, x, jnp.asarray(pads), forbidden, key, sampler, end, new):
        piece, said = out.push(token), said + 1
        if piece:
            yield piece
    rest = out.finish()
    if rest:
        yield rest
    return said < new
