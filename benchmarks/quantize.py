"""What 8 and 4 bits cost on held-out screens: points lost a task, paired with the same model in f32.

Every recipe is measured in JAX with activations in bf16, on the very integers that a file would hold. Those of RECIPES
that say so are exported too and answer from their files, whose activations the runtime rounds to 8 bits as it goes.
`--screens N` takes N of each split, `--quick` 8 of them and two recipes. Times are not measured, so it may share a
machine.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import Bar, arguments, compile_cache, finish, load_model, model_options, paired
from tqdm import tqdm

from hypervl_jax import evaluate, judge, quantize
from hypervl_jax.checkpoint import Model
from hypervl_jax.data.screens import Screen
from hypervl_jax.evaluate import Answer
from hypervl_jax.export import parts
from hypervl_jax.export.runtime import Runtime
from hypervl_jax.quantize import Quantized, Recipe

POINTS = 0.5  # that a task may lose (the paper: DocVQA 91.3 -> 91.2)
BITS = 4.6  # a weight of the decoder's layers


class Way(NamedTuple):
    """A recipe, and whether its files are measured."""

    recipe: Recipe
    files: bool = False


WAYS = {
    "int8": Way(quantize.RECIPES["int8"], files=True),
    "w4a16 group 32": Way(quantize.decoder4(32), files=True),
    "w4a16 group 64": Way(quantize.decoder4(64)),
    "w4a16 group 128": Way(quantize.decoder4(128)),
    "w4a16 a scale a row": Way(quantize.decoder4(None)),
}
HEADLINE = "w4a16 group 32"


def in_bf16(params: dict) -> dict:
    """Parameters with which activations are bf16: all but the matrices in 8 and 4 bits, and VRC."""

    def cast(leaf: Any) -> Any:
        return leaf if isinstance(leaf, Quantized) else jnp.asarray(leaf, jnp.bfloat16)

    narrow = jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return narrow | {"vrc": params["vrc"]}


def from_files(files: Runtime, screens: Sequence[Screen], branch: str) -> list[Answer]:
    """What `evaluate.run` gives, from exported files."""
    coords, said = files.config.text.coords, []
    for i, s in enumerate(tqdm(screens, desc=f"files {branch}")):
        for q in s.questions:
            got = files.answer(s.image, q.text, branch, False, evaluate.NEW).text  # type: ignore  # one of two names
            said.append(Answer(i, q.task, q.answer, got, evaluate.right(q, got, s.image.shape[:2], coords)))
    return said


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


def measure(model: Model, screens: Sequence[Screen], branch: str, ways: dict[str, Way]) -> dict[str, dict]:
    """For each way: bits, points lost in JAX and, where its files are measured, from them."""
    plain = evaluate.run(model, branch, screens, progress="f32")  # type: ignore  # one of two names
    out = {}
    for name, way in ways.items():
        params = quantize.quantize(model.params, way.recipe)
        said = evaluate.run(model._replace(params=in_bf16(params)), branch, screens, progress=name)  # type: ignore
        out[name] = {
            "bits": quantize.bits_per_weight(params["llm"]["blocks"]),
            "bytes": quantize.nbytes(params),
            "jax": lost(plain, said),
            "same_as_f32": same(plain, said),
        }
        if way.files:
            with tempfile.TemporaryDirectory() as folder:
                made = parts.export(model, Path(folder) / "files", recipe=way.recipe, branches=(branch,))  # type: ignore
                files = from_files(Runtime(Path(folder) / "files"), screens, branch)
            out[name] |= {
                "files": lost(plain, files), "parity": made.parity, "lowered": made.lowered,
                "file_bytes": {p.name: p.file.bytes for p in made.parts},
                "same_as_jax": same(said, files),
            }  # fmt: skip
    return out


def options(parser: ArgumentParser) -> None:
    model_options(parser)
    parser.add_argument("--branch", choices=("base", "large"), default="base")
    parser.add_argument("--screens", type=int, help="of each split (default: all)")


def main() -> int:
    args = arguments(__doc__, more=options)
    compile_cache()
    model, where = load_model(args.model)
    tests = judge.held_out(judge.trained_on(model), args.data, 8 if args.quick else args.screens)
    screens = [s for some in tests.values() for s in some]
    ways = {k: w for k, w in WAYS.items() if w.files} if args.quick else WAYS
    found = measure(model, screens, args.branch, ways)
    print(f"{args.branch}, {len(screens)} screens; points lost to f32, with the worst end of the 95 % interval")
    for name, f in found.items():
        for how in ("jax", "files"):
            tasks = ", ".join(f"{t} {x['mean']:+.2f} ({x['high']:+.2f})" for t, x in f.get(how, {}).items())
            if tasks:
                print(f"{name:20} {f['bits']:5.2f} bits  {how:5}  {tasks}")
    bars = [
        Bar(f"quantize.points_lost_{how}", max(x["mean"] for x in found[HEADLINE][how].values()), POINTS, "<=")
        for how in ("jax", "files")
    ]
    bars.append(Bar("quantize.bits_per_weight", found[HEADLINE]["bits"], BITS, "<="))
    metrics = {"model": where, "branch": args.branch, "screens": len(screens), "ways": found}
    return finish("quantize", metrics, bars, args)


if __name__ == "__main__":
    sys.exit(main())
