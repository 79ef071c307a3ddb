"""What a model is worth on held-out screens: accuracy beside controls that do not look, what VRC saves and keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hypervl_jax import compress, config, evaluate, plan, text
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import BRANCHES, Config
from hypervl_jax.data.screens import Screen
from hypervl_jax.plan import VisionPlan

SPLITS = ("test_known", "test_unseen")


def held_out(cfg: Config, data: Path, n: int | None = None) -> dict[str, list[Screen]]:
    """The screens of both test splits (the first `n` of each), built where they are not."""
    return {s: split(cfg, data, s, n) for s in SPLITS}


def split(cfg: Config, data: Path, name: str, n: int | None = None) -> list[Screen]:
    """The first `n` screens of one split. Where the whole set is not prepared under `data`, only this split is."""
    from hypervl_jax.data import tfds_builders

    try:
        source = tfds_builders.source(cfg.data.screens, data, name)
    except FileNotFoundError:
        sizes = dict.fromkeys(tfds_builders.SETS, 0) | {name: getattr(cfg.data.screens, name)}
        source = tfds_builders.build(replace(cfg.data.screens, **sizes), data)[name]
    return [source[i] for i in range(min(n or len(source), len(source)))]


def trained_on(model: Model) -> Config:
    """The config that made a model. Raises `ConfigError` for a model that carries none."""
    if "config" not in model.info:
        raise config.ConfigError("this model does not say what it was trained on; take one made by `train`")
    return config.from_dict(Config, model.info["config"], "info.config")


def verdict(model: Model, branch: config.Branch, shrink: bool, n: int | None, data: Path) -> dict[str, Any]:
    """Accuracy per task on the held-out screens of the config that the model was trained with, and the controls.

    Raises `ConfigError` for a model that carries no such config.
    """
    tests = held_out(trained_on(model), data, n)
    said = {
        s: evaluate.run(model, branch, some, evaluate.ratios(model, some) if shrink else None, progress=s)
        for s, some in tests.items()
    }
    return {"branch": branch, "vrc": shrink, "accuracy": per_task(said), "controls": without_looking(model, tests)}


def tables(
    model: Model, branch: config.Branch, screens: Sequence[Screen], ratios: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, correct) f64[n ratios]: what each picture costs and is worth at each ratio (`evaluate.worth`)."""
    tokens = np.array([[cost(s, r, model) for r in ratios] for s in screens], float)
    correct = np.zeros_like(tokens)
    for j, r in enumerate(ratios):
        said = evaluate.run(model, branch, screens, [r] * len(screens), progress=f"at {r:.1f}")
        correct[:, j] = evaluate.worth(said, len(screens))
    return tokens, correct


def cost(screen: Screen, ratio: float, model: Model) -> int:
    """Tokens that the decoder sees of one picture at this ratio, the markers of its tiles among them."""
    return text.visual_tokens(plan_at(screen, ratio, model), model.config.text)


def plan_at(screen: Screen, ratio: float, model: Model) -> VisionPlan:
    return plan.make(screen.image.shape[:2], float(ratio), model.config.policy)


def without_looking(model: Model, tests: dict[str, list[Screen]], n: int = 400) -> dict[str, dict[str, float]]:
    """What needs no looking: the most common answer, and the better branch shown another screen's picture (the first
    `n` of each split; nothing where there is no other screen)."""
    coords = model.config.text.coords
    most = {s: evaluate.majority(tests[s], coords) for s in SPLITS}
    shown = {s: some[:n] for s, some in tests.items() if len(some) > 1}
    blind = [
        per_task({
            s: evaluate.run(model, b, some, shuffled=True, progress=f"shuffled {b} {s}") for s, some in shown.items()
        })
        for b in BRANCHES
    ]  # fmt: skip
    return {
        "majority": {f"{t}_{s.removeprefix('test_')}": x for s in SPLITS for t, x in most[s].items()},
        "shuffled": {t: max(found[t]["mean"] for found in blind) for t in blind[0]},
    }


def per_task(said: dict[str, list]) -> dict[str, dict[str, float]]:
    """{split: answers} -> {"task_known" or "task_unseen": accuracy with its interval}."""
    out = {}
    for split, answers in said.items():
        for task, a in evaluate.accuracy(evaluate.Answer(*x) for x in answers).items():
            out[f"{task}_{split.removeprefix('test_')}"] = a._asdict()
    return out


def savings(cfg: Config, model: Model, tests: dict, ratios: dict, said: dict) -> dict[str, Any]:
    """What VRC saves and keeps on the held-out screens, by the labelling branch; and whether it follows small print."""
    branch = cfg.vrc.branch
    vit, tokens, flops, legible = model.config.vit(branch), [], [], []
    for split in SPLITS:
        for s, r in zip(tests[split], ratios[split], strict=True):
            now, full = plan_at(s, r, model), plan_at(s, 1.0, model)
            tokens.append((cost(s, r, model), cost(s, 1.0, model)))
            flops.append((now.vit_flops(vit), full.vit_flops(vit)))
            if s.digit_height:
                legible.append((r, 1 / s.digit_height**2))
    with_vrc, without = (per_task(said[f"eval_{branch}{v}"]) for v in ("_vrc", ""))
    kept = {t: with_vrc[t]["mean"] / a["mean"] for t, a in without.items() if a["mean"]}
    tokens, flops = np.array(tokens).sum(0), np.array(flops, float).sum(0)
    worst = min(kept, key=lambda t: kept[t]) if kept else ""
    mean = {v: np.mean([a["mean"] for a in t.values()]) for v, t in (("with", with_vrc), ("without", without))}
    return {
        "tokens_saved": float(1 - tokens[0] / tokens[1]),
        "flops_saved": float(1 - flops[0] / flops[1]),
        "retained": float(mean["with"] / mean["without"]) if mean["without"] else float("nan"),
        "retained_worst_task": kept.get(worst, float("nan")),
        "worst_task": worst,
        "rank_correlation": compress.spearman(*np.array(legible).T) if legible else float("nan"),
        "mean_ratio": float(np.mean(np.concatenate([ratios[s] for s in SPLITS]))),
    }  # fmt: skip
