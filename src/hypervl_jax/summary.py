"""What a `summary.json` says: the accuracy table with its controls, one sentence, and the table for a terminal.

A partial run lacks keys; every function takes what is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from hypervl_jax.config import BRANCHES

LABELS = {"name": "name", "find": "find", "read": "read a number", "count": "count", "yesno": "yes or no"}
ART = {"known": "known artists", "unseen": "unseen artist"}
TASKS = {f"{t}_{a}": f"{label}, {art}" for t, label in LABELS.items() for a, art in ART.items()} | LABELS
WAYS = {  # key of the summary -> what a column is called
    "accuracy": "JAX",
    "accuracy_vrc": "JAX +\N{NO-BREAK SPACE}VRC",
    "accuracy_litert": "LiteRT",
    "accuracy_litert_vrc": "LiteRT +\N{NO-BREAK SPACE}VRC",
}
CONTROLS = {"majority": "always the most common answer", "shuffled": "the same model shown another screen's picture"}
MARGIN = 0.15  # a figure counts as learnt when it is this far above both controls
Summary = Mapping[str, Any]


class Cell(NamedTuple):
    """One figure: share of n questions answered correctly, with its 95 % interval."""

    mean: float
    n: int
    low: float
    high: float


def cell_of(summary: Summary, way: str, branch: str, task: str) -> Cell | None:
    """The figure of one way, branch and task, None where it was not measured."""
    found = get(summary, way, branch, task)
    if not isinstance(found, Mapping) or not known(found.get("mean")):
        return None
    mean = float(found["mean"])
    low, high = (float(v) if known(v := found.get(k)) else mean for k in ("low", "high"))
    return Cell(mean, int(n) if known(n := found.get("n")) else 0, low, high)


def tasks_of(summary: Summary) -> list[str]:
    """Every task any part of the table knows, in the order of TASKS."""
    seen = {t for way in WAYS for b in BRANCHES for t in get(summary, way, b) or {}}
    seen |= {t for control in CONTROLS for t in get(summary, "controls", control) or {}}
    return [t for t in TASKS if t in seen] + sorted(str(t) for t in seen - set(TASKS))


def columns_of(summary: Summary) -> list[tuple[str, str]]:
    """(branch, way) pairs with at least one figure."""
    tasks = tasks_of(summary)
    return [(b, w) for b in BRANCHES for w in WAYS if any(cell_of(summary, w, b, t) for t in tasks)]


def short_of_controls(summary: Summary) -> tuple[list[tuple[str, str]], int]:
    """The (branch, task) pairs less than MARGIN above a control, and how many pairs could be judged."""
    short, judged = [], 0
    for branch in BRANCHES:
        for task in tasks_of(summary):
            cell = cell_of(summary, "accuracy", branch, task)
            controls = [c for k in CONTROLS if known(c := get(summary, "controls", k, task))]
            if cell and len(controls) == len(CONTROLS):
                judged += 1
                if cell.mean - max(controls) < MARGIN:
                    short.append((branch, task))
    return short, judged


def mean_accuracy(summary: Summary, way: str, branch: str) -> float | None:
    """Over tasks, each counting alike; None where nothing was measured."""
    cells = [c for t in tasks_of(summary) if (c := cell_of(summary, way, branch, t))]
    return sum(c.mean for c in cells) / len(cells) if cells else None


def verdict(summary: Summary) -> str:
    """The run in one sentence, from its own numbers."""
    means = {b: m for b in BRANCHES if (m := mean_accuracy(summary, "accuracy", b)) is not None}
    if not means:
        return "This run has not been evaluated yet."
    said = " and ".join(f"{b.capitalize()} answers {percent(m)}" for b, m in means.items())
    parts = [f"{said} of held-out questions correctly"]
    short, judged = short_of_controls(summary)
    if short:
        parts[0] += f", but {len(short)} of {judged} figures are less than {MARGIN * 100:.0f} points above a control"
    elif judged:
        parts[0] += f", every figure at least {MARGIN * 100:.0f} points above both controls"
    saved, kept = get(summary, "vrc", "tokens_saved"), get(summary, "vrc", "retained")
    if known(saved) and known(kept):
        parts.append(f"VRC spares {percent(saved)} of the visual tokens and keeps {percent(kept)} of the accuracy")
    if known(same := get(summary, "export", "same_answers")):
        parts.append(f"the exported files give the same answer to {percent(same)}")
    return "; ".join(parts) + "."


def terminal_table(summary: Summary) -> str:
    """The accuracy table in plain text, one block a branch: per cent with the 95 % interval, both controls beside."""
    blocks = []
    for branch in BRANCHES:
        ways = [w for b, w in columns_of(summary) if b == branch]
        if not ways:
            continue
        head = [branch.capitalize(), "n", *CONTROLS, *(WAYS[w] for w in ways)]
        rows = [head]
        for task in tasks_of(summary):
            cells = [cell_of(summary, w, branch, task) for w in ways]
            n = max((c.n for c in cells if c), default=0)
            controls = [points(get(summary, "controls", k, task)) for k in CONTROLS]
            figures = [figure(c, n) if c else "-" for c in cells]
            rows.append([_plain(TASKS.get(task, task)), str(n or "-"), *controls, *figures])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        blocks.append("\n".join(_aligned(row, widths) for row in rows))
    return "\n\n".join(blocks) or "no accuracy measured yet"


def figure(cell: Cell, n: int) -> str:
    """Per cent with the interval; with the number of questions where it is not the `n` of the row."""
    said = f"{cell.mean * 100:.1f} [{cell.low * 100:.0f}, {cell.high * 100:.0f}]"
    return said if cell.n == n else f"{said} of {cell.n:,}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (v.rjust(w) if i else v.ljust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True)))
    return "  ".join([first, *rest])


def _plain(text: str) -> str:
    """One line, nothing a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


# --- small parts -----------------------------------------------------------------------------------------------------


def get(values: Any, *path: str) -> Any:
    """values[path[0]][path[1]]..., None where a key is missing."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def known(value: Any) -> TypeGuard[float]:
    """A finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def percent(value: Any) -> str:
    """A share as text; a dash for what is not known."""
    return f"{value * 100:.1f}\N{NO-BREAK SPACE}%" if known(value) else "–"


def points(value: Any) -> str:
    """Per cent without the sign, for columns."""
    return f"{value * 100:.1f}" if known(value) else "-"
