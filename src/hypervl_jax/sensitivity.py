"""Which matrices of a decoder bear 4 bits: what each alone costs on held-out screens, and the recipe of fewest bytes
that keeps a stated accuracy.

    costs   every matrix of every layer alone in 4 bits, the model otherwise in f32: nats and points lost a task
    pick    the matrices in the order of what a byte costs, as many as hold together: each number of them is measured

The gate is reading and grounding (GATE), not a mean over everything. What is measured is written down at once, so that
the same call goes on where it was interrupted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from hypervl_jax import calibrate, evaluate, gptq, judge, quantize
from hypervl_jax.calibrate import Grams
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import Branch
from hypervl_jax.data.screens import Screen
from hypervl_jax.quantize import KINDS, Kind, Recipe, Rule

GATE = ("read", "find")  # reading and grounding


class SensitivityError(ValueError):
    """A model, screens or a file of measurements that no recipe can be picked by; the message says what to change."""


class Lost(NamedTuple):
    """What a task loses, against the same model in f32 on the same questions."""

    nats: float  # a token of the true answer, mean
    points: float  # right answers of 100
    low: float  # of the points, the paired 95 % interval
    high: float
    n: int  # questions

    def __str__(self) -> str:
        return f"{self.nats:+.4f} nats, {self.points:+.2f} points ({self.low:+.2f} to {self.high:+.2f} of {self.n})"


class Cost(NamedTuple):
    """One matrix alone in 4 bits."""

    path: str  # llm.blocks.layers.3.q.weight
    saved: int  # bytes, against 8 bits
    lost: dict[str, Lost]

    @property
    def price(self) -> float:
        """Nats a saved byte, of the task that loses most; chance may make a task gain, which is no merit."""
        return max(0.0, *(task.nats for task in self.lost.values())) / self.saved


class Picked(NamedTuple):
    """A recipe and what it was measured to lose."""

    recipe: Recipe
    narrow: int  # matrices in 4 bits
    bits: float  # a weight of the decoder's layers
    lost: dict[str, Lost]


class Exam:
    """Held-out screens, and what a model in f32 says about them."""

    branch: Branch

    def __init__(self, model: Model, branch: Branch, screens: Sequence[Screen]):
        """Asks only what GATE names. Raises `SensitivityError` where nothing is asked of it."""
        own = [tuple(q for q in s.questions if q.task in GATE) for s in screens]
        self.screens = [s._replace(questions=q) for s, q in zip(screens, own, strict=True) if q]
        if not self.screens:
            raise SensitivityError(f"{len(screens)} screens ask nothing of {' or '.join(GATE)}; take more screens")
        self.model, self.branch = model, branch
        self.plain = self._sit(model.params)

    def _sit(self, params: dict) -> dict[str, np.ndarray]:
        """f64[n 2] a task: whether each answer is right, and the nats of the true one."""
        model, ones = self.model._replace(params=params), [1.0] * len(self.screens)
        asked = [len(s.questions) for s in self.screens]
        said = evaluate.run(model, self.branch, self.screens)
        table = evaluate.answer_losses(model, self.branch, self.screens, ones, max(asked))
        nats = np.concatenate([row[:n] for row, n in zip(table, asked, strict=True)])
        if not np.isfinite(nats).all():
            raise SensitivityError("the model gives no numbers for some of the screens; it is damaged")
        tasks, both = np.array([a.task for a in said]), np.stack([[a.correct for a in said], nats], -1)
        return {task: both[tasks == task] for task in GATE if (tasks == task).any()}

    def lost(self, params: dict) -> dict[str, Lost]:
        """What each task loses with other weights. Raises `SensitivityError` where these give no numbers."""
        out = {}
        for task, after in self._sit(params).items():
            right, nats = (after - self.plain[task]).T
            points, n = 0.0 - 100 * float(right.mean()), len(right)
            half = 196 * float(right.std(ddof=1)) / n**0.5 if n > 1 else 100.0
            out[task] = Lost(float(nats.mean()), points, points - half, points + half, n)
        return out


def held_out(model: Model, n: int) -> list[Screen]:
    """The first `n` screens of the split that neither the decoder was trained on nor figures are taken from.

    Raises `ConfigError` for a model that does not say what it was trained on.
    """
    from hypervl_jax.data import screens
    from hypervl_jax.data.assets import Assets

    cfg, assets = judge.trained_on(model).data.screens, Assets.load()
    return [screens.record(assets, cfg, "label", i) for i in range(min(n, cfg.label))]


class Record:
    """Measurements in a file, kept as they are made."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        """Raises `SensitivityError` for a file of other settings, or that is none."""
        self.path, self.values = path, {"settings": settings}
        if not path.exists():
            return
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = values["settings"]
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise SensitivityError(f"{path}: not a file of measurements; remove it, or choose another --out") from e
        if other := sorted(k for k in {*settings, *found} if settings.get(k) != found.get(k)):
            raise SensitivityError(
                f"{path}: measured with other {', '.join(other)}; remove it, or choose another --out"
            )
        self.values = values

    def __call__(self, key: str, measure: Callable[[], dict[str, Lost]]) -> dict[str, Lost]:
        """What is written down under a key, or else measured and written down."""
        if key not in self.values:
            self.values[key] = {task: list(map(float, lost)) for task, lost in measure().items()}
            part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
            try:
                part.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
                os.replace(part, self.path)
            finally:
                part.unlink(missing_ok=True)
        return {task: Lost(x[0], x[1], x[2], x[3], int(x[4])) for task, x in self.values[key].items()}


def digest(params: dict) -> str:
    """What tells weights from others."""
    out = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        out.update(jax.tree_util.keystr(path).encode())
        out.update(np.ascontiguousarray(leaf).data)
    return out.hexdigest()


def costs(
    exam: Exam, kind: str, grams: Sequence[Grams], record: Record | None = None, progress: bool = True
) -> list[Cost]:
    """What every matrix of the decoder's layers costs alone in 4 bits, those that a `kind` (`int4/32`) fits. With
    `grams` its integers are those of GPTQ, else the nearest. Raises `SensitivityError` where it fits none."""
    params, out = exam.model.params, []
    stack = params["llm"]["blocks"]["layers"]
    depth = len(stack["q"]["weight"])
    units = [(i, name) for i in range(depth) for name in calibrate.INPUT if _fits(i, name, stack, kind)]
    if not units:
        raise SensitivityError(
            f"no matrix of the decoder has inputs in groups as {kind} has them; choose another --group"
        )
    for i, name in tqdm(units, "each alone in 4 bits", unit="matrix", disable=not progress):
        w, path = np.asarray(stack[name]["weight"][i], np.float32), f"llm.blocks.layers.{i}.{name}.weight"
        wide, narrow = (quantize.nbytes(quantize.quantize_matrix(w, how)) for how in (Kind(8), KINDS[kind] or Kind(4)))
        measure = functools.partial(_alone, exam, i, name, KINDS[kind] or Kind(4), grams[i] if grams else None)
        out.append(Cost(path, wide - narrow, record(path, measure) if record else measure()))
    return out


def _alone(exam: Exam, i: int, name: str, kind: Kind, found: Grams | None) -> dict[str, Lost]:
    blocks = exam.model.params["llm"]["blocks"]
    w = np.array(blocks["layers"][name]["weight"], np.float32)
    one = gptq.round_matrix(w[i], kind, found[calibrate.INPUT[name]]) if found else quantize.quantize_matrix(w[i], kind)
    w[i] = quantize.floats(one)
    llm = exam.model.params["llm"] | {"blocks": blocks | {"layers": blocks["layers"] | {name: {"weight": w}}}}
    return exam.lost(exam.model.params | {"llm": llm})


def _fits(i: int, name: str, stack: dict, kind: str) -> bool:
    found = quantize.kind_of(
        f"llm.blocks.layers.{i}.{name}.weight", stack[name]["weight"].shape[-1], (Rule(".*", kind),)
    )
    return found is not None and found.bits == 4


def pick(
    exam: Exam, table: Sequence[Cost], kind: str, grams: Sequence[Grams], keep: float, record: Record | None = None,
    progress: bool = True,
) -> Picked:  # fmt: skip
    """The recipe of fewest bytes that loses at most `keep` points of each task: the matrices of `table` in 4 bits from
    the cheapest byte on, as many as hold together, all others in 8. How many is found by halving.

    Raises `SensitivityError` where 8 bits alone lose more.
    """
    order = [cost.path for cost in sorted(table, key=lambda cost: cost.price)]
    model = exam.model

    def recipe(n: int) -> Recipe:
        wide = (Rule(re.escape(path), "int8") for path in sorted(order[n:]))
        return (*wide, *((Rule(r"llm\.blocks\..*", kind),) if n else ()), Rule(".*", "int8"))

    def kept(n: int) -> dict:
        if grams and n:
            return calibrate.calibrated(model.params, recipe(n), grams)
        return quantize.quantize(model.params, recipe(n))

    def lost(n: int) -> dict[str, Lost]:
        bar.set_postfix_str(f"{n} in 4 bits")
        measure = lambda: exam.lost(quantize.restored(kept(n)))  # noqa: E731
        found = record(f"{n} together", measure) if record else measure()
        bar.update()
        return found

    def holds(n: int) -> bool:
        return all(task.points <= keep for task in lost(n).values())

    with tqdm(desc="together", disable=not progress) as bar:
        most, over = 0, len(order)
        if holds(over):
            most = over
        elif not holds(0):
            worst = ", ".join(f"{task} {x}" for task, x in lost(0).items())
            raise SensitivityError(f"in 8 bits it already loses more than {keep:g} points: {worst}; take more screens")
        while over - most > 1:
            half = (most + over) // 2
            most, over = (half, over) if holds(half) else (most, half)
        return Picked(recipe(most), most, quantize.bits_per_weight(kept(most)["llm"]["blocks"]), lost(most))


def written(picked: Picked, table: Sequence[Cost], about: str) -> str:
    """A file of rules, as `quantize.read` reads it: what was measured as comments, then the recipe."""
    lines = [about, f"{picked.narrow} of {len(table)} matrices in 4 bits, {picked.bits:.2f} bits a weight; together:"]
    lines += [f"  {task}: {lost}" for task, lost in picked.lost.items()]
    lines.append("each alone in 4 bits, the cheapest byte first:")
    for cost in sorted(table, key=lambda cost: cost.price):
        lines.append(f"  {cost.path}, {cost.saved} bytes: " + "; ".join(f"{t} {x}" for t, x in cost.lost.items()))
    return "".join(f"# {line}\n" for line in lines) + "".join(f"{rule}\n" for rule in picked.recipe)
