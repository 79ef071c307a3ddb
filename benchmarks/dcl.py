"""Dual Consistency Learning: what the KL term does, everything else equal (HyperVL 3.3, 4.4).

Two arms a seed, with the KL term and without, on the same batches for the same number of steps, and at the end on the
same held-out screens. Stage 0 has no decoder and so no KL term: it is the same program for both arms, bit for bit, and
is trained once a seed; both arms start from its checkpoint.

  divergence   mean KL(Large || Base) at temperature 1 over the tokens of true answers, teacher-forced
  agreement    share of questions to which both branches give the same answer, greedy
  switch cost  accuracy of Large less that of Base under the one decoder: what swapping the branch at run time costs

Differences are paired by screen and averaged over the seeds; their 95 % interval is over screens. How much the seeds
differ stands beside it in the rows. `--ablate-names` adds one run of the first seed that never sees the image-name term
(no stage 0, weight 0, as many steps in all).

Runs stay under `runs/dcl`, an interrupted one goes on where it stopped, a finished one is only judged again. `--quick`
judges what is finished on fewer screens; where nothing is, it walks the whole path with the tiny preset, which learns
nothing and so is held to no bar.
"""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import HERE, Bar, arguments, compile_cache, finish, paired

from hypervl_jax import checkpoint, evaluate, presets, quickstart, train
from hypervl_jax import judge as judging
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import BRANCHES, Config
from hypervl_jax.data import feeds, pipeline, tfds_builders
from hypervl_jax.data.screens import Screen

ON, OFF, NAMELESS = "kl", "plain", "nameless"


STEPS = 1_600  # enough to look, few enough for three seeds in half an hour on two cores


def settings(steps: int = STEPS, screens: int = 2_000) -> Config:
    """The quickstart preset with more held-out screens; `steps` scales stage 0 with the rest."""
    cfg = presets.quickstart()
    early = cfg.train.stage0_steps * steps // cfg.train.steps
    return replace(
        cfg,
        name="dcl",
        data=replace(cfg.data, screens=replace(cfg.data.screens, label=0, test_known=screens, test_unseen=screens)),
        train=replace(cfg.train, steps=steps, stage0_steps=early),
    )


def arm(cfg: Config, name: str, seed: int) -> Config:
    """One run's settings: they differ from the other arm's in one value."""
    cfg = replace(cfg, train=replace(cfg.train, seed=seed))
    if name == OFF:
        return replace(cfg, dcl=replace(cfg.dcl, weight=0.0))
    if name == NAMELESS:
        return replace(cfg, train=replace(cfg.train, stage0_steps=0, name_weight=0.0))
    return cfg


class Lab(NamedTuple):
    """Data and words that all runs share, prepared once under `path`."""

    path: Path
    cfg: Config
    train: pipeline.Source
    sheets: pipeline.Source
    tokenizer: evaluate.tokens.Tokenizer
    classes: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, cfg: Config) -> Lab:
        path.mkdir(parents=True, exist_ok=True)
        built = tfds_builders.build(cfg.data.screens, path / "data")
        words = quickstart.words(cfg, built["train"], path / checkpoint.TOKENIZER)
        return cls(path, cfg, built["train"], built["sheets"], words, quickstart.classes(cfg))

    def run(self, cfg: Config, name: str) -> dict:
        """Trains to the end under the name; returns the weights."""
        feed = feeds.Screens(cfg, self.train, self.sheets, self.tokenizer, self.classes)
        return train.run(cfg, feed, self.path / name).params

    def trained(self, name: str, seed: int) -> Model:
        """The model of one arm and seed. Resumes, and shares stage 0."""
        cfg, out = arm(self.cfg, name, seed), f"{name}-{seed}"
        early, target = cfg.train.stage0_steps, self.path / out / "checkpoints"
        print(f"{out}: {cfg.train.steps} steps, {early} of them stage 0", flush=True)
        if early and not target.exists():
            first = arm(self.cfg, ON, seed)
            self.run(replace(first, train=replace(first.train, steps=early)), f"stage0-{seed}")
            part = target.with_name("checkpoints.part")  # copied whole or not at all
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(self.path / f"stage0-{seed}" / "checkpoints" / str(early), part / str(early))
            part.rename(target)
        params = self.run(cfg, out)
        return Model(cfg.model, {k: params[k] for k in (*BRANCHES, "llm")}, self.tokenizer, {})


def finished(path: Path, cfg: Config, name: str, seed: int) -> bool:
    return (path / f"{name}-{seed}" / "checkpoints" / str(cfg.train.steps)).is_dir()


class Judged(NamedTuple):
    """One run on n held-out screens, known artists first."""

    correct: dict[str, np.ndarray]  # f64[n] a branch: share of its questions answered right
    tasks: dict[str, dict[str, float]]  # accuracy by branch and task
    same: np.ndarray  # f64[n], share of questions to which both branches give the same answer
    teacher: np.ndarray  # f64[n 3], see `evaluate.divergence`

    def row(self) -> dict[str, float]:
        kl, tokens_same, tokens = self.teacher.sum(0)
        base, large = (float(self.correct[b].mean()) for b in ("base", "large"))
        return {
            "divergence": float(kl / tokens), "token_agreement": float(tokens_same / tokens),
            "agreement": float(self.same.mean()), "base": base, "large": large, "switch_cost": large - base,
        }  # fmt: skip


def judge(model: Model, screens: Sequence[Screen]) -> Judged:
    """Both branches on the same screens."""
    said = {b: evaluate.run(model, b, screens, progress=b) for b in BRANCHES}
    alike = [a._replace(correct=a.answer == b.answer) for a, b in zip(said["base"], said["large"], strict=True)]
    return Judged(
        {b: evaluate.per_screen(said[b], len(screens)) for b in BRANCHES},
        {b: {task: a.mean for task, a in evaluate.accuracy(said[b]).items()} for b in BRANCHES},
        evaluate.per_screen(alike, len(screens)),
        evaluate.divergence(model, screens),
    )


def pooled(runs: Sequence[Judged], branch: str) -> np.ndarray:
    """f64[n]: accuracy on each screen, averaged over seeds."""
    return np.mean([r.correct[branch] for r in runs], 0)


def compare(on: Sequence[Judged], off: Sequence[Judged]) -> tuple[dict, list[Bar]]:
    """Runs of the same seeds with and without the KL term -> (figures, bars)."""
    kl, plain = (np.mean([r.row()["divergence"] for r in runs]) for runs in (on, off))
    gains = {b: paired(pooled(on, b), pooled(off, b)) for b in BRANCHES}
    agree = paired(np.mean([r.same for r in on], 0), np.mean([r.same for r in off], 0))
    switch = {name: paired(pooled(r, "large"), pooled(r, "base")) for name, r in ((ON, on), (OFF, off))}
    print(f"\ndivergence {plain:.4f} without, {kl:.4f} with the KL term: {kl / plain:.3f} of it")
    print(f"answer agreement, with less without:  {agree}")
    for b in BRANCHES:
        print(f"accuracy of {b}, with less without:  {gains[b]}")
    for name, x in switch.items():
        print(f"switch cost (Large less Base), {name}:  {x}")
    bars = [
        Bar("dcl.divergence_ratio", float(kl / plain), 0.5, "<="),
        Bar("dcl.agreement_gain", agree.mean, 0.0),
        Bar("dcl.base_gain", gains["base"].mean, 0.0),
        Bar("dcl.large_gain_bound", gains["large"].low, -0.01),
    ]
    figures = {
        "divergence_ratio": float(kl / plain),
        "agreement_gain": agree._asdict(),
        **{f"{b}_gain": gains[b]._asdict() for b in BRANCHES},
        "switch_cost": {name: x._asdict() for name, x in switch.items()},
    }
    return figures, bars


def looks(runs: Sequence[Judged], screens: Sequence[Screen], coords: int) -> float:
    """How far the worst branch of the worst run is above the most common answer, mean over tasks: two branches that
    guess alike would agree perfectly."""
    blind = np.mean(list(evaluate.majority(screens, coords).values()))
    return float(min(np.mean(list(r.tasks[b].values())) for r in runs for b in BRANCHES) - blind)


def table(rows: dict[str, dict[str, float]]) -> None:
    names = next(iter(rows.values()))
    print(f"\n{'run':12}" + "".join(f"{name:>17}" for name in names))
    for run, row in rows.items():
        print(f"{run:12}" + "".join(f"{x:>17.4f}" for x in row.values()), flush=True)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of a run, stage 0 included")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "dcl", help="folder of the runs")
    parser.add_argument("--ablate-names", action="store_true", help="one more run, without the image-name term")


def main() -> int:
    args = arguments(__doc__, more=options)
    compile_cache()
    cfg, seeds, nameless, tiny = settings(args.steps), args.seeds, args.ablate_names, False
    if args.quick:
        seeds = [s for s in seeds if all(finished(args.runs, cfg, name, s) for name in (ON, OFF))]
        nameless = nameless and bool(seeds) and finished(args.runs, cfg, NAMELESS, seeds[0])
        if tiny := not seeds:
            print(f"no finished runs under {args.runs}: the tiny preset shows that the path is whole")
            cfg, seeds, args.runs = replace(presets.tiny(), name="dcl"), [0], HERE.parent / ".cache" / "dcl-tiny"
    lab = Lab.open(args.runs, cfg)
    tests = judging.held_out(cfg, args.runs / "data", 200 if args.quick else None)
    screens = [s for split in judging.SPLITS for s in tests[split]]
    wanted = [(name, s) for s in seeds for name in (ON, OFF)] + [(NAMELESS, seeds[0])] * nameless
    judged = {(n, s): judge(lab.trained(n, s), screens) for n, s in wanted}
    rows = {f"{n}-{s}": r.row() for (n, s), r in judged.items()}
    table(rows)
    figures, bars = compare(*([judged[n, s] for s in seeds] for n in (ON, OFF)))
    arms = [r for (n, _), r in judged.items() if n != NAMELESS]
    bars.append(Bar("dcl.looks", looks(arms, screens, cfg.model.text.coords), 0.15))
    if (NAMELESS, seeds[0]) in judged:
        with_term, without = judged[ON, seeds[0]], judged[NAMELESS, seeds[0]]
        gains = {b: paired(with_term.correct[b], without.correct[b]) for b in BRANCHES}
        figures["names_gain"] = {b: x._asdict() for b, x in gains.items()}
        for b, x in gains.items():
            print(f"accuracy of {b}, with the image-name term less without:  {x}")
    tasks = {f"{n}-{s}": r.tasks for (n, s), r in judged.items()}
    metrics = {"runs": rows, "tasks": tasks, **figures, "screens": len(screens), "steps": cfg.train.steps}
    return finish("dcl", metrics, [] if tiny else bars, args, seeds)


if __name__ == "__main__":
    sys.exit(main())
