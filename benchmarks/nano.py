"""A model (the weights that ship, unless told) on all its held-out screens: known artists and one never seen; other
digits, other fonts.

Accuracy per task with Wilson 95 % intervals: both branches, full size and at VRC's ratios, beside two controls that do
not look (always the most common answer; the same model shown another screen's picture). Answers a second are medians of
five interleaved repeats over the same screens, all programs compiled. `--quick` takes 100 screens of each split.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np
from common import Bar, arguments, compile_cache, finish, load_model, model_options

from hypervl_jax import evaluate, judge
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import BRANCHES, Branch
from hypervl_jax.data.screens import Screen
from hypervl_jax.evaluate import Accuracy, Answer

WAYS: list[tuple[Branch, bool]] = [(branch, shrink) for branch in BRANCHES for shrink in (False, True)]
Table = dict[str, dict[str, float]]  # "task_known" or "task_unseen" -> mean, n, low, high


def name_of(branch: str, shrink: bool) -> str:
    return branch + ("_vrc" if shrink else "")


def together(said: dict[str, list[Answer]]) -> dict[str, Accuracy]:
    """Accuracy per task on all splits as one."""
    start, answers = 0, []
    for some in said.values():
        answers += [a._replace(screen=start + a.screen) for a in some]
        start += 1 + max((a.screen for a in some), default=0)
    return evaluate.accuracy(answers)


def margin(table: Table, controls: dict[str, dict[str, float]]) -> tuple[float, str]:
    """How far the worst task is above the better of its controls, and which task that is."""
    return min((row["mean"] - max(c.get(task, 0.0) for c in controls.values()), task) for task, row in table.items())


def bars_of(branch: str, table: Table, tasks: dict[str, Accuracy], controls: dict[str, dict[str, float]]) -> list[Bar]:
    """What the shipped weights must reach, for one branch at full size; tasks that were not asked fall short."""

    def mean(task: str) -> float:
        return table[task]["mean"] if task in table else float("nan")

    return [
        *(
            Bar(f"nano.{branch}.{task}", tasks[task].mean if task in tasks else float("nan"), 0.8)
            for task in ("read", "find")
        ),
        Bar(f"nano.{branch}.name_known", mean("name_known"), 0.9),
        Bar(f"nano.{branch}.name_unseen", mean("name_unseen"), 0.5),
        Bar(f"nano.{branch}.above_controls", margin(table, controls)[0], 0.15),
    ]  # fmt: skip


def speeds(model: Model, screens: Sequence[Screen], ratios: np.ndarray, repeats: int = 5) -> dict[str, float]:
    """Answers a second of each way, batches of `evaluate.BATCH` screens, preparation of the pictures included."""
    asked, took = sum(len(s.questions) for s in screens), {name_of(*way): [] for way in WAYS}
    for repeat in range(repeats + 1):  # the first one compiles
        for branch, shrink in WAYS:
            start = time.perf_counter()
            evaluate.run(model, branch, screens, ratios if shrink else None)
            if repeat:
                took[name_of(branch, shrink)].append(time.perf_counter() - start)
    return {name: asked / statistics.median(t) for name, t in took.items()}


def show(tables: dict[str, Table], controls: dict[str, dict[str, float]]) -> None:
    print(f"\n{'':16}" + "".join(f"{name:>22}" for name in tables) + "".join(f"{c:>10}" for c in controls))
    for task in next(iter(tables.values())):
        rows = [t[task] for t in tables.values()]
        cells = "".join(f"{r['mean']:>9.3f} ({r['low']:.3f}-{r['high']:.3f})" for r in rows)
        print(f"{task:16}{cells}" + "".join(f"{c.get(task, 0.0):>10.3f}" for c in controls.values()), flush=True)


def main() -> int:
    args = arguments(__doc__, more=model_options)
    compile_cache()
    model, where = load_model(args.model)
    cfg = judge.trained_on(model)
    tests = judge.held_out(cfg, args.data, 100 if args.quick else None)
    count = sum(len(s) for s in tests.values())
    print(f"{where}: {count} held-out screens", flush=True)
    ratios = {s: evaluate.ratios(model, some) for s, some in tests.items()}
    said, start = {}, time.perf_counter()
    for branch, shrink in WAYS:
        said[f"eval_{name_of(branch, shrink)}"] = {
            s: evaluate.run(
                model, branch, some, ratios[s] if shrink else None, progress=f"{name_of(branch, shrink)} {s}"
            )
            for s, some in tests.items()
        }
    seconds = time.perf_counter() - start
    tables = {name_of(*way): judge.per_task(said[f"eval_{name_of(*way)}"]) for way in WAYS}
    tasks = {branch: together(said[f"eval_{branch}"]) for branch in BRANCHES}
    controls = judge.without_looking(model, tests)
    show(tables, controls)
    saved = judge.savings(cfg, model, tests, ratios, said)
    print(f"\nVRC: {saved['tokens_saved']:.1%} of tokens saved, {saved['retained']:.1%} of accuracy retained")
    first = [s for some in tests.values() for s in some[:48]]
    speed = speeds(model, first, np.concatenate([r[:48] for r in ratios.values()]), 1 if args.quick else 5)
    print("answers a second: " + ", ".join(f"{name} {x:.1f}" for name, x in speed.items()))
    for branch in BRANCHES:
        gap, task = margin(tables[branch], controls)
        print(f"{branch}: the task least above its controls is {task}, by {gap:.3f}")
    metrics = {
        "model": where, "screens": count, "accuracy": tables, "controls": controls, "vrc": saved, "seconds": seconds,
        "tasks": {b: {t: a._asdict() for t, a in tasks[b].items()} for b in BRANCHES},
        "answers_per_second": speed, "speed_base_over_large": speed["base"] / speed["large"],
    }  # fmt: skip
    return finish("nano", metrics, [bar for b in BRANCHES for bar in bars_of(b, tables[b], tasks[b], controls)], args)


if __name__ == "__main__":
    sys.exit(main())
