"""AdamW, or Muon for the matrices of hidden layers, by group. Every top-level key of the parameter tree is a group with
its own optimiser state, so a step that trains one branch leaves the other's weights, moments and counts untouched, bit
for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array

from hypervl_jax.config import TrainConfig

Tree = Any


def decays(params: Tree) -> Tree:
    """Which leaves weight decay pulls on: matrices and tables by name, not norms, biases or positions."""

    def rule(path, _):
        names = [p.key for p in path]
        return names[-1] in ("weight", "embed", "head", "names", "cells") and not any("norm" in n for n in names)

    return jax.tree_util.tree_map_with_path(rule, params)


def hidden(params: Tree) -> Tree:
    """ "muon" for the matrices between hidden layers, stacked or alone, "adam" for everything else: tables, the patch
    layer, norms and biases, whose rows have a meaning each."""

    def rule(path, leaf):
        names = [p.key for p in path]
        return "muon" if names[-1] == "weight" and names[-2] != "patch" and "norm" not in names[-2] else "adam"

    return jax.tree_util.tree_map_with_path(rule, params)


def transform(cfg: TrainConfig) -> optax.GradientTransformation:
    """Moments of one group and decoupled decay; the learning rate is applied in `update`, from the global step.

    Muon (Jordan et al. 2024) makes the singular values of an update equal. It is scaled to the size of an Adam update,
    0.2 by root mean square (Liu et al. 2025, eq. 4), so one rate serves both kinds of leaves.
    """
    rule = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=1e-8)
    if cfg.optimizer == "muon":
        muon = optax.contrib.scale_by_muon(weight_dimension_numbers=_out_in)
        sized = optax.stateless(lambda step, _: jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, step))
        rule = optax.partition({"muon": optax.chain(muon, sized), "adam": rule}, hidden)
    return optax.chain(rule, optax.add_decayed_weights(cfg.weight_decay, decays))


def _out_in(params: Tree) -> Tree:
    """Our matrices are [out, in]; an axis before these numbers layers."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-1, -2), params)


def init(cfg: TrainConfig, params: dict[str, Tree]) -> dict[str, Tree]:
    """One optimiser state a group."""
    return {name: transform(cfg).init(group) for name, group in params.items()}


def rate(cfg: TrainConfig, step: Array | int, steps: int) -> Array:
    """Linear warm-up, then a cosine down to `final_lr` of the peak at `steps`."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, cfg.lr, min(cfg.warmup, max(steps - 1, 1)), max(steps, 2), cfg.lr * cfg.final_lr
    )
    return jnp.asarray(schedule(jnp.asarray(step) + 1))


def update(
    cfg: TrainConfig, lr: Array, grads: dict[str, Tree], opt: dict[str, Tree], params: dict[str, Tree]
) -> tuple[dict[str, Tree], dict[str, Tree], Array]:
    """One step of the groups present in `grads`, clipped by their joint norm. Other groups pass through as they
    are. Returns (params, opt, gradient norm before clipping)."""
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, cfg.clip / (norm + 1e-6))
    params, opt = dict(params), dict(opt)
    for name in _known(grads, params):
        clipped = jax.tree.map(lambda g: g * scale, grads[name])
        step, opt[name] = transform(cfg).update(clipped, opt[name], params[name])
        params[name] = jax.tree.map(lambda p, s: p - (lr * s).astype(p.dtype), params[name], step)
    return params, opt, norm


def _known(grads: Iterable[str], params: dict) -> list[str]:
    unknown = set(grads) - set(params)
    if unknown:
        raise KeyError(f"gradients of groups that do not exist: {', '.join(sorted(unknown))}")
    return sorted(grads)
