"""AdamW, or Muon for the matrices of hidden layers, by group. Every top-level key of the parameter tree is a group with
its own optimiser state, so a step that trains one branch leaves the other's weights, moments and counts untouched, bit
for bit. Rules by path say what of a group learns, and how fast."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array

from hypervl_jax.config import ConfigError, TrainConfig
from hypervl_jax.tensors import flatten, unflatten

Tree = Any


# --- which parameters learn ------------------------------------------------------------------------------------------


def rates(cfg: TrainConfig, params: dict[str, Tree]) -> dict[str, Tree]:
    """How fast each leaf learns, as a multiple of the learning rate: what the first of `cfg.rules` says that matches
    its whole path.

    Raises `ConfigError` naming the paths that no rule matches, and the rules that no path is left for.
    """
    paths = list(flatten(params))
    if not cfg.rules:
        return unflatten(dict.fromkeys(paths, 1.0))
    first = {p: next((i for i, rule in enumerate(cfg.rules) if re.fullmatch(rule.path, p)), None) for p in paths}
    bare = sorted(p for p, i in first.items() if i is None)
    idle = [repr(rule.path) for i, rule in enumerate(cfg.rules) if i not in first.values()]
    if bare or idle:
        more = f" and {len(bare) - 4} more" if len(bare) > 4 else ""
        wrong = [f"no rule for {', '.join(bare[:4])}{more}"] if bare else []
        wrong += [f"nothing is left for {', '.join(idle)}"] if idle else []
        raise ConfigError(f"train.rules: {'; '.join(wrong)}; the first rule that matches a whole path counts")
    return unflatten({p: cfg.rules[i].rate for p, i in first.items() if i is not None})


def learning(cfg: TrainConfig, params: dict[str, Tree]) -> dict[str, Tree]:
    """What of the parameters learns at all; a group of which nothing does is not in it. Raises as `rates` does."""
    speed = flatten(rates(cfg, params))
    return unflatten({path: leaf for path, leaf in flatten(params).items() if speed[path]})


def joined(params: dict[str, Tree], some: dict[str, Tree]) -> dict[str, Tree]:
    """`params` with the leaves of `some` in their places."""
    return unflatten({**flatten(params), **flatten(some)})


def _like(tree: dict, some: dict) -> dict:
    """The leaves of `tree` that `some` has as well."""
    return {k: _like(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in some.items()}


# --- how they learn --------------------------------------------------------------------------------------------------


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
    """One optimiser state a group, of what learns in it."""
    return {name: transform(cfg).init(group) for name, group in learning(cfg, params).items()}


def rate(cfg: TrainConfig, step: Array | int, steps: int) -> Array:
    """Linear warm-up, then a cosine down to `final_lr` of the peak at `steps`."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, cfg.lr, min(cfg.warmup, max(steps - 1, 1)), max(steps, 2), cfg.lr * cfg.final_lr
    )
    return jnp.asarray(schedule(jnp.asarray(step) + 1))


def update(
    cfg: TrainConfig, lr: Array, grads: dict[str, Tree], opt: dict[str, Tree], params: dict[str, Tree]
) -> tuple[dict[str, Tree], dict[str, Tree], Array]:
    """One step of the leaves present in `grads`: those of `learning`, of the groups whose turn it is. They are clipped
    by their joint norm; all others pass through as they are. Returns (params, opt, gradient norm before clipping)."""
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, cfg.clip / (norm + 1e-6))
    speed, params, opt = rates(cfg, params), dict(params), dict(opt)
    for name in _known(grads, params):
        clipped = jax.tree.map(lambda g: g * scale, grads[name])
        mine, at = _like(params[name], grads[name]), _like(speed[name], grads[name])
        step, opt[name] = transform(cfg).update(clipped, opt[name], mine)
        moved = jax.tree.map(lambda p, s, r: p - ((lr if r == 1 else lr * r) * s).astype(p.dtype), mine, step, at)
        params[name] = joined(params[name], moved)
    return params, opt, norm


def _known(grads: Iterable[str], params: dict) -> list[str]:
    unknown = set(grads) - set(params)
    if unknown:
        raise KeyError(f"gradients of groups that do not exist: {', '.join(sorted(unknown))}")
    return sorted(grads)
