"""The Visual Resolution Compressor on held-out screens: what it saves, what it keeps, what it follows (HyperVL 3.2).

  saved, retained   tokens the decoder does not see and accuracy kept (mean over tasks), at the scale the model carries,
                    with a 95 % interval over screens (the same screens answered with VRC and without)
  over the scale    the same for predicted ratios times a factor, from answers at every ratio of the grid; beside it the
                    best picture-blind policy of equal cost, any mixture of constant ratios
  over the tolerance  labels of the held-out screens themselves, from the model's own losses on their true answers: what
                    a perfect VRC would do (an oracle); with --retrain also a VRC trained anew on the stored labels read
                    under that tolerance, at its raw predictions
  rank correlation  of the predicted ratio with the legible scale: the largest (pixels needed / pixels there)^2 over the
                    things of a screen, where a digit's height and a picture's longer side need what the model itself
                    was found to need (median over the oracle's labels)
  overhead          multiply-adds of VRC over those of the encoder it relieves

Tokens are all that the decoder sees of a picture: tiles, thumbnail, markers. Answers come from the branch that made the
labels. `--quick` takes 60 screens of each split and fewer ratios.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from common import Bar, Interval, arguments, bootstrap, compile_cache, finish, load_model, model_options

from hypervl_jax import compress, evaluate, judge, plan, presets, quickstart
from hypervl_jax.checkpoint import Model
from hypervl_jax.compress import LabelSet, Saving
from hypervl_jax.config import BRANCHES, Config, VrcTrainConfig
from hypervl_jax.data.screens import Screen
from hypervl_jax.evaluate import Answer
from hypervl_jax.model import vrc

SURE = 0.1  # nats a token: below it the model knows the answer
TOLERANCES = (1.1, 1.2, 1.5, 2.0)
FACTORS = tuple(float(f) for f in np.geomspace(0.25, 4, 9))
PHONE = (2400, 1080)  # pixels, (height, width)


def hits(answers: Sequence[Answer], n: int, known: int) -> tuple[np.ndarray, np.ndarray]:
    """(right, asked) f64[n groups]: counts of each screen; a group is a task on known or on unseen art."""
    tasks = sorted({a.task for a in answers})
    right, asked = np.zeros((2, n, 2 * len(tasks)))
    for a in answers:
        group = 2 * tasks.index(a.task) + (a.screen >= known)
        right[a.screen, group] += a.correct
        asked[a.screen, group] += 1
    return right, asked


def retained(with_vrc: np.ndarray, without: np.ndarray, asked: np.ndarray) -> float:
    """Mean accuracy over groups with VRC, over that without; from counts [n groups]."""
    total = np.maximum(asked.sum(0), 1)
    return float((with_vrc.sum(0) / total).sum() / (without.sum(0) / total).sum())


def size_of(kind: str, box: Sequence[float]) -> float:
    """Pixels: the height of a number's digits, the longer side of a picture."""
    return box[3] - box[1] if kind == "digit" else max(box[2] - box[0], box[3] - box[1])


def legible_sizes(screens: Sequence[Screen], found: LabelSet, how: VrcTrainConfig) -> dict[str, float]:
    """Pixels that a thing of each kind needs, by the model's own losses: the median of size times root of label over
    the questions about one thing that the model answers at full size (loss under `SURE`)."""
    asked = np.nan_to_num(found.losses, nan=np.inf)
    labels = compress.label(np.where(np.isfinite(asked), asked, 1e9), found.ratios, how.tolerance, how.floor, how.rule)
    sizes: dict[str, list[float]] = {"digit": [], "picture": []}
    for screen, loss, each in zip(screens, asked[..., -1], labels, strict=True):
        for q, full, label in zip(screen.questions, loss, each, strict=False):
            if q.box is not None and full < SURE:
                kind = "digit" if q.task == "read" else "picture"
                sizes[kind].append(size_of(kind, q.box) * label**0.5)
    return {kind: float(np.median(px)) if px else float("nan") for kind, px in sizes.items()}


def legible(screens: Sequence[Screen], least: dict[str, float]) -> dict[str, np.ndarray]:
    """How much of its area a screen must keep, f64[n]: the largest (`least` / size)^2 over the things it shows, kinds
    of unknown need left out. "all", and NaN but for screens that need most for a "number" or for a "picture"."""
    need, kind = np.full(len(screens), np.nan), np.full(len(screens), "       ")
    for i, s in enumerate(screens):
        some = [t for t in s.things if np.isfinite(least[t.kind])]
        if some:
            need[i], kind[i] = max(((least[t.kind] / size_of(t.kind, t.box)) ** 2, t.kind) for t in some)
    only = {name: np.where(kind == k, need, np.nan) for name, k in (("number", "digit"), ("picture", "picture"))}
    return {"all": need, **only}


def follows(ratios: np.ndarray, need: np.ndarray) -> float:
    """Rank correlation over the screens that have a need."""
    some = np.isfinite(need)
    return compress.spearman(ratios[some], need[some]) if some.sum() > 1 else float("nan")


def quarters(ratios: np.ndarray, need: np.ndarray) -> list[dict[str, float]]:
    """Mean ratio of the quarter of screens that needs least resolution, and so on."""
    some = np.flatnonzero(np.isfinite(need))
    parts = np.array_split(some[np.argsort(need[some], kind="stable")], 4)
    return [
        {"from": float(need[p].min()), "to": float(need[p].max()), "mean_ratio": float(ratios[p].mean())}
        for p in parts
        if len(p)
    ]


class Tables(NamedTuple):
    """Screens at every ratio of a grid: cost and worth of each f64[n R], and what VRC predicted f64[n]."""

    predicted: np.ndarray
    ratios: tuple[float, ...]
    tokens: np.ndarray
    correct: np.ndarray

    def at(self, ratios: np.ndarray, some: np.ndarray | slice = slice(None)) -> Saving:
        return compress.saving_retention(ratios[some], self.ratios, self.tokens[some], self.correct[some])

    def edge(self) -> Interval:
        """Accuracy retained above what the best constant policy of equal cost retains."""

        def figure(some: np.ndarray) -> float:
            found = self.at(self.predicted, some)
            return found.retained - found.constant

        return bootstrap(figure, len(self.predicted), 400)


def overhead(model: Model, screens: Sequence[Screen]) -> dict[str, float]:
    """Multiply-adds of VRC over those of each encoder, on these screens and, by arithmetic, at the paper's sizes."""
    cfg, big = model.config, presets.preset("hypervl_1p7b").model
    plans = [plan.make(s.image.shape[:2], 1.0, cfg.policy) for s in screens]
    flops = {b: np.mean([p.vit_flops(cfg.vit(b)) for p in plans]) for b in BRANCHES}
    phone = plan.make(PHONE, 1.0, big.policy).vit_flops(big.base)
    return {b: float(2 * vrc.macs(cfg.vrc) / flops[b]) for b in BRANCHES} | {"paper": 2 * vrc.macs(big.vrc) / phone}


def retrain(model: Model, cfg: Config, labels: Path, data: Path, held: Sequence[Screen]) -> dict[float, np.ndarray]:
    """What a VRC trained on the stored labels under each tolerance predicts for held-out screens, unscaled."""
    found, out = compress.LabelSet.load(labels), {}
    screens = judge.split(cfg, data, "label", len(found.labels))
    fresh = vrc.init(jax.random.key(cfg.vrc.seed), cfg.model.vrc)
    for tolerance in TOLERANCES:
        how = replace(cfg, vrc=replace(cfg.vrc, tolerance=tolerance))
        start = model._replace(params={**model.params, "vrc": fresh}, info={})
        out[tolerance] = evaluate.ratios(quickstart.fit_vrc(start, how, screens, found.again(how.vrc))[0], held)
    return out


def show(title: str, rows: dict[str, Saving]) -> dict[str, dict[str, float]]:
    print(f"\n{title:28}{'saved':>10}{'retained':>10}{'constant':>10}")
    for name, s in rows.items():
        print(f"{name:28}{s.saved:>10.3f}{s.retained:>10.3f}{s.constant:>10.3f}", flush=True)
    return {name: s._asdict() for name, s in rows.items()}


def bought(model: Model, screens: list[Screen], known: int, predicted: np.ndarray) -> tuple[Interval, Interval, dict]:
    """(tokens saved, accuracy retained, retained of each task on known and on unseen art) at the predicted ratios."""
    branch = judge.trained_on(model).vrc.branch
    ways = {"full size": None, "VRC": predicted}
    said = [evaluate.run(model, branch, screens, ratios, progress=way) for way, ratios in ways.items()]
    (right, asked), (kept, _) = (hits(answers, len(screens), known) for answers in said)
    held = bootstrap(lambda i: retained(kept[i], right[i], asked[i]), len(screens))
    pairs = zip(screens, predicted, strict=True)
    cost = np.array([[judge.cost(s, ratio, model) for ratio in (r, 1.0)] for s, r in pairs])
    saved = bootstrap(lambda i: 1 - cost[i, 0].sum() / cost[i, 1].sum(), len(screens))
    with np.errstate(invalid="ignore", divide="ignore"):
        each = (kept.sum(0) / right.sum(0)).reshape(-1, 2).tolist()
    tasks = dict(zip(sorted({a.task for a in said[0]}), each, strict=True))
    print(f"tokens saved {saved}, accuracy retained {held}; of each task on known, unseen art:")
    print("  ".join(f"{task} {a:.3f}, {b:.3f}" for task, (a, b) in tasks.items()))
    return saved, held, tasks


def options(parser: ArgumentParser) -> None:
    model_options(parser)
    parser.add_argument("--table", type=int, default=500, help="screens of each split answered at every ratio")
    parser.add_argument("--retrain", type=Path, metavar="LABELS", help="labels.npz of the run: train VRC per tolerance")


def main() -> int:
    args = arguments(__doc__, more=options)
    compile_cache()
    model, where = load_model(args.model)
    cfg = judge.trained_on(model)
    grid = (0.1, 0.4, 0.7, 1.0) if args.quick else cfg.vrc.ratios
    tests = judge.held_out(cfg, args.data, 60 if args.quick else None)
    known, screens = len(tests[judge.SPLITS[0]]), [s for split in judge.SPLITS for s in tests[split]]
    print(f"{where}: {len(screens)} held-out screens, branch {cfg.vrc.branch}", flush=True)
    predicted = evaluate.ratios(model, screens)
    saved, held, tasks = bought(model, screens, known, predicted)

    n = min(args.table, known, len(screens) - known)
    some = np.r_[:n, known : known + n]
    subset = [screens[i] for i in some]
    tables = Tables(predicted[some], grid, *judge.tables(model, cfg.vrc.branch, subset, grid))
    losses = quickstart.label(model, replace(cfg, vrc=replace(cfg.vrc, ratios=grid)), subset)
    oracle = {t: losses.again(replace(cfg.vrc, tolerance=t)).labels for t in TOLERANCES}
    factors = {f"{f:.2f}": np.minimum(f * tables.predicted, 1.0) for f in FACTORS}
    curves = {
        "scale": show(f"scale, {len(some)} screens", {f: tables.at(r) for f, r in factors.items()}),
        "tolerance_oracle": show("tolerance, oracle", {str(t): tables.at(r) for t, r in oracle.items()}),
        "constant": show("ratio, the same for all", {str(r): tables.at(np.full(len(some), r)) for r in grid}),
    }
    if args.retrain:
        again = retrain(model, cfg, args.retrain, args.data, subset)
        curves["tolerance"] = show("tolerance, retrained", {str(t): tables.at(r) for t, r in again.items()})
    edge = tables.edge()
    print(f"\nretained above the best constant policy of equal cost: {edge}")

    least = legible_sizes(subset, losses, cfg.vrc)
    print("pixels needed: " + ", ".join(f"{kind} {px:.1f}" for kind, px in least.items()))
    need = legible(screens, least)
    ranks = {name: follows(predicted, n) for name, n in need.items()}
    ranks |= {f"oracle_{t}": follows(r, need["all"][some]) for t, r in oracle.items()}
    print("rank correlation with the legible scale: " + ", ".join(f"{k} {v:.3f}" for k, v in ranks.items()))
    by_need = {kind: quarters(predicted, n) for kind, n in need.items()}
    for kind, rows in by_need.items():
        line = ", ".join(f"{r['from']:.2f}-{r['to']:.2f} {r['mean_ratio']:.2f}" for r in rows)
        print(f"mean ratio by need, {kind}: {line}")
    share = overhead(model, screens)
    print("VRC over encoder, multiply-adds: " + ", ".join(f"{k} {v:.2%}" for k, v in share.items()))

    bars = [
        Bar("vrc.tokens_saved", saved.mean, 0.2),
        Bar("vrc.retained", held.mean, 0.987),
        Bar("vrc.beats_constant_bound", edge.low, 0.0),
        Bar("vrc.rank_correlation", ranks["all"], 0.7),
    ]
    metrics = {
        "model": where, "screens": len(screens), "table_screens": len(some), "scale": model.info.get("vrc_scale", 1.0),
        "tokens_saved": saved._asdict(), "retained": held._asdict(), "retained_tasks": tasks, "curves": curves,
        "above_constant": edge._asdict(), "rank_correlation": ranks,
        "pixels_needed": least, "ratio_by_need": by_need, "overhead": share,
    }  # fmt: skip
    return finish("vrc", metrics, bars, args)


if __name__ == "__main__":
    sys.exit(main())
