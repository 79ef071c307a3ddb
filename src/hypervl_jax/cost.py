"""What a picture costs before any of it is encoded: arithmetic on its plan and on the shapes of a model.

FLOPs are two a multiply-add; bytes are those of float32. Axes: N tiles, M tokens a tile, L tokens.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hypervl_jax import bench
from hypervl_jax.config import Branch, LlmConfig, ModelConfig
from hypervl_jax.model import hypervl
from hypervl_jax.plan import VisionPlan, make
from hypervl_jax.text import visual_tokens


class Encoding(NamedTuple):
    """One branch with its projector, tile by tile."""

    weights: int  # bytes
    working: int  # bytes beside them, the same for every picture


class Cost(NamedTuple):
    """One picture through one branch and the decoder."""

    tokens: int  # in the prompt, markers counted
    encode: int  # FLOPs
    prefill: int  # FLOPs to read these tokens
    cache: int  # bytes of keys and values


def of(plan: VisionPlan, cfg: ModelConfig, branch: Branch) -> Cost:
    """What a picture with this plan costs."""
    n = visual_tokens(plan, cfg.text)
    return Cost(n, plan.vit_flops(cfg.vit(branch)) + projector_flops(plan, cfg, branch), llm_flops(cfg.llm, n),
                2 * cfg.llm.depth * cfg.llm.kv_heads * cfg.llm.head_dim * n * 4)  # fmt: skip


def projector_flops(plan: VisionPlan, cfg: ModelConfig, branch: Branch) -> int:
    """Both layers over all M tokens of N tiles."""
    wide, d = cfg.vit(branch).width * cfg.policy.merge**2, cfg.llm.width
    return plan.n_tiles * cfg.policy.tokens_per_tile * 2 * (wide * d + d * d)


@functools.lru_cache(maxsize=8)
def tile_flops(cfg: ModelConfig, branch: Branch) -> tuple[int, int]:
    """FLOPs of one tile: (encoder, projector)."""
    one = make((cfg.policy.tile, cfg.policy.tile), 1.0, cfg.policy)
    return one.vit_flops(cfg.vit(branch)) // one.n_tiles, projector_flops(one, cfg, branch) // one.n_tiles


def llm_flops(cfg: LlmConfig, n: int) -> int:
    """Reading n tokens at once, attention over all of them, no output layer."""
    heads = cfg.heads * cfg.head_dim
    layer = 2 * cfg.width * (2 * heads + 2 * cfg.kv_heads * cfg.head_dim + 3 * cfg.mlp)
    return n * cfg.depth * (layer + 4 * n * heads)


def encoding(cfg: ModelConfig, branch: Branch) -> Encoding:
    """Bytes that encoding takes, by the compiler's own account; compiles one tile's program and runs nothing."""
    shapes = bench.encoder_shapes(cfg, branch, 1)
    weights = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(shapes[0]))
    working = bench.temporary_bytes(lambda p, t, m: hypervl.encode_tile(p, cfg, branch, t[0], m[0]), *shapes)
    return Encoding(weights, working)


def decoder_bytes(cfg: ModelConfig) -> int:
    """Bytes of the decoder's weights."""
    from hypervl_jax.model import llm

    one = jnp.zeros((1, 1), jnp.int32)
    net, x, see = llm.Llm(cfg.llm), jnp.zeros((1, 1, cfg.llm.width)), jnp.ones((1, 1, 1), bool)
    shapes = jax.eval_shape(lambda key: net.init(key, x, one, see), jax.random.key(0))
    return sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(shapes))


def table(plan: VisionPlan, cfg: ModelConfig, encodings: dict[Branch, Encoding], decoder: int) -> list[str]:
    """Lines for people: one a part of the model."""
    costs = {branch: of(plan, cfg, branch) for branch in encodings}
    rows = [("", "FLOPs", "weights", "working memory")]
    rows += [(b, _flops(costs[b].encode), _bytes(e.weights), _bytes(e.working)) for b, e in encodings.items()]
    one = next(iter(costs.values()))
    rows.append(("decoder", _flops(one.prefill), _bytes(decoder), f"{_bytes(one.cache)} of cache"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  " + "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in
            enumerate(zip(row, widths, strict=True))) for row in rows]  # fmt: skip


def _flops(n: int) -> str:
    return f"{n / 1e12:.2f} T" if n >= 1e11 else f"{n / 1e9:.2f} G" if n >= 1e8 else f"{n / 1e6:.2f} M"


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB" if n >= 1e4 else f"{n / 1e3:.2f} kB"
