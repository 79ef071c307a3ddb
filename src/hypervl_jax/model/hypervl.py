"""HyperVL as a sentence: encode the tiles with one of two branches, place them in the text, run the decoder.

Parameters are one plain tree, {"base": {vit, projector}, "large": {vit, projector}, "llm", "vrc"}.
Axes: B batch, N tiles, T tile side, P patches, W encoder width, M tokens a tile, F = N M,
L sequence, D decoder width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from hypervl_jax.config import BRANCHES, Branch, ModelConfig
from hypervl_jax.model import llm, vrc
from hypervl_jax.model.projector import Projector
from hypervl_jax.model.vit import Block, Vit, one_tile

Params = dict


@functools.partial(jax.jit, static_argnames="cfg")  # one program: run op by op, the draws take minutes to compile
def init(key: Array, cfg: ModelConfig) -> Params:
    """Random weights of both branches, decoder and VRC."""
    keys = dict(zip((*BRANCHES, "llm", "vrc"), jax.random.split(key, 4), strict=True))
    p = cfg.policy
    tiles, mask = jnp.zeros((1, p.tile, p.tile, 3)), jnp.ones((1, p.patches_per_side**2), bool)
    params = {}
    for branch in BRANCHES:
        k1, k2 = jax.random.split(keys[branch])
        vit = cfg.vit(branch)
        params[branch] = {
            "vit": Vit(vit).init(k1, tiles, mask)["params"],
            "projector": Projector(cfg.llm.width, p.merge).init(k2, jnp.zeros((1, vit.patches, vit.width)))["params"],
        }
    one = jnp.zeros((1, 1), jnp.int32)
    x, see = jnp.zeros((1, 1, cfg.llm.width)), jnp.ones((1, 1, 1), bool)
    params["llm"] = llm.Llm(cfg.llm).init(keys["llm"], x, one, see)["params"]
    params["vrc"] = vrc.init(keys["vrc"], cfg.vrc)
    return params


def look(
    params: Params,
    cfg: ModelConfig,
    branch: Branch,
    tiles: Num[Array, "N T T 3"],
    mask: Bool[Array, "N P"],
    scan: bool = True,
    remat: bool | str = False,
    block: type[Block] = Block,
) -> Float[Array, "N P W"]:
    """Patch features of all tiles at once, W wide: one branch without its projector."""
    return cast(Array, Vit(cfg.vit(branch), scan, remat, block).apply({"params": params[branch]["vit"]}, tiles, mask))


def project(params: Params, cfg: ModelConfig, branch: Branch, patches: Float[Array, "N P W"]) -> Float[Array, "N M D"]:
    """Patch features -> decoder embeddings."""
    projector = Projector(cfg.llm.width, cfg.policy.merge)
    return cast(Array, projector.apply({"params": params[branch]["projector"]}, patches))


def encode_batch(
    params: Params, cfg: ModelConfig, branch: Branch, tiles: Num[Array, "N T T 3"], mask: Bool[Array, "N P"],
    scan: bool = True, remat: bool | str = False,
) -> Float[Array, "N M D"]:  # fmt: skip
    """All tiles at once through one branch and its projector."""
    return project(params, cfg, branch, look(params, cfg, branch, tiles, mask, scan, remat))


def encode_tile(
    params: Params, cfg: ModelConfig, branch: Branch, tile: Num[Array, "T T 3"], mask: Bool[Array, " P"],
    scan: bool = True,
) -> Float[Array, "M D"]:  # fmt: skip
    """One tile alone: the same numbers as in a batch, in less time and memory."""
    patches = look(params, cfg, branch, tile[None], mask[None], scan, block=one_tile())
    return project(params, cfg, branch, patches)[0]


def encode_tiles(
    params: Params,
    cfg: ModelConfig,
    branch: Branch,
    tiles: Num[Array, "N T T 3"],
    mask: Bool[Array, "N P"],
    batch_size: int = 1,
    scan: bool = True,
) -> Float[Array, "N M D"]:
    """The same features, `batch_size` tiles at a time: 1 is the paper's serial tiling (3.1), whose peak memory does not
    grow with the picture; N is one batch."""

    def one(seen):
        return encode_tile(params, cfg, branch, seen[0], seen[1], scan)

    return jax.lax.map(one, (tiles, mask), batch_size=batch_size if batch_size > 1 else None)


def embed(
    params: Params, ids: Int[Array, "B L"], slots: Int[Array, "B L"], features: Float[Array, "B F D"]
) -> Float[Array, "B L D"]:
    """Token embeddings in the decoder's dtype, with feature `slots` of the same row written wherever a slot is not
    negative."""
    text = llm.embed(params["llm"], ids).astype(llm.dtype(params["llm"]))
    seen = jnp.take_along_axis(features, jnp.maximum(slots, 0)[..., None], axis=1)
    return jnp.where(slots[..., None] >= 0, seen.astype(text.dtype), text)


def hidden(
    params: Params,
    cfg: ModelConfig,
    features: Float[Array, "B F D"],
    ids: Int[Array, "B L"],
    slots: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    segments: Int[Array, "B L"],
    scan: bool = True,
    remat: bool | str = False,
    attention_block: int = 0,
) -> Float[Array, "B L D"]:
    """The decoder over a whole row, without a cache: what training and scoring read. `llm.logits` makes it logits.
    With `attention_block` it attends so many queries and keys at a time, and scores never exist whole."""
    x = embed(params, ids, slots, features)
    block = llm.in_blocks(attention_block) if attention_block else llm.Block
    mask = segments if attention_block else llm.segment_mask(segments)
    return llm.Llm(cfg.llm, scan, remat, block).apply({"params": params["llm"]}, x, positions, mask)[0]
