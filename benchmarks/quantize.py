"""What 8 and 4 bits cost on held-out screens: points lost a task, paired with the same model in f32.

Three parts, all on the very integers that a file holds:

    methods      group size x method x task, activations in f32, on `--table` screens of each split; and the drift, the
                 nats a token of the true answers by which the model diverges from itself in f32
    activations  the headline's recipe in JAX with activations in f32, bf16 and int16, on `--screens` of each split
    files        the headline's files in their runtime, which rounds rows to 8 bits as it goes, on the same screens

`--quick` takes 6 screens of each split, which say nothing about points, and leaves the files out. Times are not
measured, so it may share a machine. What is done is kept under .cache/quantize, and an interrupted run goes on.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from common import HERE, Bar, arguments, commit, compile_cache, finish, load_model, model_options, once, paired
from tqdm import tqdm

from hypervl_jax import awq, calibrate, evaluate, judge, quantize
from hypervl_jax.calibrate import Grams, Sample
from hypervl_jax.checkpoint import Model
from hypervl_jax.data.screens import Screen
from hypervl_jax.evaluate import Answer
from hypervl_jax.export import parts
from hypervl_jax.export.runtime import Runtime

POINTS = 0.5  # that a task may lose (the paper: DocVQA 91.3 -> 91.2)
BITS = 4.6  # a weight of the decoder's layers
SAMPLES = 128  # that 4 bits are calibrated on
GROUP = 32  # of the headline
KINDS = ("f32", "bf16", "int16")


METHODS = ("nearest", "awq", "gptq", "awq+gptq")


class Way(NamedTuple):
    """How matrices are kept."""

    recipe: quantize.Recipe
    method: str = "nearest"

    def params(self, model: Model, grams: Sequence[Grams]) -> dict:
        params = model.params
        if "awq" in self.method:
            params, grams = awq.scaled(params, self.recipe, grams)
        if "gptq" in self.method:
            return calibrate.calibrated(params, self.recipe, grams)
        return quantize.quantize(params, self.recipe)


def ways(groups: Sequence[int | None]) -> dict[str, Way]:
    """8 bits, and 4 for each size of groups (None: a row) by each of METHODS."""
    out = {"int8": Way(quantize.RECIPES["int8"])}
    for group in groups:
        out |= {f"{group or 'row'} {method}": Way(quantize.decoder4(group), method) for method in METHODS}
    return out


HEADLINE = f"{GROUP} gptq"


def lost(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Points (of 100) that each task loses, with the paired 95 % interval over its questions."""
    out = {}
    for task in sorted({a.task for a in before}):
        pairs = [(a.correct, b.correct) for a, b in zip(before, after, strict=True) if a.task == task]
        a, b = np.array(pairs, float).T
        difference = paired(a, b)
        out[task] = {k: 100 * v for k, v in difference._asdict().items()} | {"n": len(pairs), "before": 100 * a.mean()}
    return out


def same(a: Sequence[Answer], b: Sequence[Answer]) -> float:
    """Share of questions that are answered alike."""
    return float(np.mean([x.answer == y.answer for x, y in zip(a, b, strict=True)]))


def methods(
    model: Model, branch: Any, screens: Sequence[Screen], some: dict[str, Way], grams: Sequence[Grams], kept: Path
) -> dict[str, dict]:
    """For each way: bits, points lost, drift. Weights are the floats that integers stand for: one program for all."""

    def of(name: str) -> dict:
        params = some[name].params(model, grams)
        floats = jax.device_put(quantize.restored(params))
        after = evaluate.run(model._replace(params=floats), branch, screens, progress=name)
        kl, _, tokens = evaluate.drift(model, floats, branch, screens).sum(0)
        return {
            "bits": quantize.bits_per_weight(params["llm"]["blocks"]), "bytes": quantize.nbytes(params),
            "lost": lost(before, after), "same_as_f32": same(before, after), "drift": float(kl / tokens),
        }  # fmt: skip

    before = answers(kept / "f32.json", lambda: evaluate.run(model, branch, screens, progress="f32"))
    return {name: once(kept / f"{name.replace(' ', '-')}.json", partial(of, name)) for name in some}


def answers(path: Path, make: Callable[[], Sequence[Answer]]) -> list[Answer]:
    """`once` of answers."""
    return [Answer(*a) for a in once(path, make)]


def activations(
    model: Model, branch: Any, screens: Sequence[Screen], params: dict, kinds: Sequence[str], kept: Path
) -> tuple[list[Answer], dict[str, list[Answer]]]:
    """(answers of the model in f32, {kind: answers}). In bf16 the weights are the integers themselves: what they stand
    for is no number of bf16."""

    def of(kind: str) -> list[Answer]:
        stored = params if kind == "bf16" else quantize.restored(params)
        narrow = jax.device_put(quantize.with_activations(stored, kind))
        return evaluate.run(model._replace(params=narrow), branch, screens, progress=f"activations {kind}")

    before = answers(kept / "all-f32.json", lambda: evaluate.run(model, branch, screens, progress="f32"))
    return before, {kind: answers(kept / f"all-activations-{kind}.json", partial(of, kind)) for kind in kinds}


def from_files(files: Runtime, screens: Sequence[Screen], branch: Any) -> list[Answer]:
    """What `evaluate.run` gives, from exported files."""
    coords, said = files.config.text.coords, []
    for i, s in enumerate(tqdm(screens, desc=f"files {branch}")):
        for q in s.questions:
            got = files.answer(s.image, q.text, branch, False, evaluate.NEW).text
            said.append(Answer(i, q.task, q.answer, got, evaluate.right(q, got, s.image.shape[:2], coords)))
    return said


def exported(
    model: Model, branch: Any, screens: Sequence[Screen], way: Way, samples: Sequence[Sample]
) -> tuple[dict, list[Answer]]:
    """About the files of a way, and what they answer."""
    with tempfile.TemporaryDirectory() as folder:
        where, chosen = Path(folder) / "files", samples if way.method == "gptq" else ()
        made = parts.export(model, where, recipe=way.recipe, samples=chosen, branches=(branch,))
        about = {"parity": made.parity, "lowered": made.lowered, "bytes": {p.name: p.file.bytes for p in made.parts}}
        return about, from_files(Runtime(where), screens, branch)


def options(parser: ArgumentParser) -> None:
    model_options(parser)
    parser.add_argument("--branch", choices=("base", "large"), default="base")
    parser.add_argument("--screens", type=int, help="of each split, for activations and files (default: all)")
    parser.add_argument("--table", type=int, default=250, help="of each split, for methods (default: 250)")


def told(name: str, losses: dict[str, dict], more: str = "") -> None:
    tasks = ", ".join(f"{t} {x['mean']:+.2f} ({x['low']:+.2f} to {x['high']:+.2f})" for t, x in losses.items())
    print(f"{name:18}{more:24}{tasks}")


def main() -> int:
    args = arguments(__doc__, more=options)
    compile_cache()
    model, where = load_model(args.model)
    cfg = judge.trained_on(model)
    few, table = (6, 6) if args.quick else (args.screens, args.table)
    tests = judge.held_out(cfg, args.data, None if few is None else max(few, table))

    def of_each(n: int | None) -> list[Screen]:
        return [s for some in tests.values() for s in some[:n]]

    some = ways((GROUP,) if args.quick else (32, 64, 128, None))
    samples = calibrate.from_screens(model, 16 if args.quick else SAMPLES)
    grams = list(calibrate.grams(model, samples, (args.branch,)))
    kept = HERE.parent / ".cache" / "quantize" / f"{commit()[:12]}-{Path(where).name}-{args.branch}-{few}-{table}"
    found = methods(model, args.branch, of_each(table), some, grams, kept)
    print(f"points lost to f32 with the paired 95 % interval; {args.branch}, {len(of_each(table))} screens")
    for name, f in found.items():
        told(name, f["lost"], f"{f['bits']:.2f} bits, drift {f['drift']:.4f}")
    before, said = activations(model, args.branch, of_each(few), some[HEADLINE].params(model, grams), KINDS, kept)
    metrics: dict[str, Any] = {
        "model": where, "branch": args.branch, "headline": HEADLINE, "samples": len(samples),
        "screens": {"methods": len(of_each(table)), "activations": len(of_each(few))}, "methods": found,
    }  # fmt: skip
    if not args.quick:
        about, of_files = once(
            kept / "files.json", lambda: exported(model, args.branch, of_each(few), some[HEADLINE], samples)
        )
        said["files"], metrics = [Answer(*a) for a in of_files], metrics | about
    acts = {k: {"lost": lost(before, after), "same_as_f32": same(before, after)} for k, after in said.items()}
    print(f"{HEADLINE} with activations in f32 and 16 bits, and its files; {len(of_each(few))} screens")
    for kind, f in acts.items():
        told(kind, f["lost"], f"as f32 {100 * f['same_as_f32']:.2f} %")
    bars = [Bar("quantize.bits_per_weight", found[HEADLINE]["bits"], BITS, "<=")]
    bars.append(Bar("quantize.drift_of_nearest", found[f"{GROUP} nearest"]["drift"] / found[HEADLINE]["drift"], 1))
    if not args.quick:  # a dozen screens cannot tell half a point
        worst = {kind: max(x["mean"] for x in f["lost"].values()) for kind, f in acts.items()}
        bars += [Bar(f"quantize.points_lost_{kind}", points, POINTS, "<=") for kind, points in worst.items()]
    return finish("quantize", metrics | {"activations": acts}, bars, args)


if __name__ == "__main__":
    sys.exit(main())
