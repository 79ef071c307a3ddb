"""Exported files against JAX on held-out screens: the same greedy answers, and the largest error at any seam.

The model is exported (to a temporary folder unless `--folder` has an export of it) and every question about every
screen is answered twice, by JAX in batches and by the files one at a time: Base at VRC's ratios, so that every file has
a part in the answer, and Large at full size. `--quick` takes 20 screens of each split.

With `--bundle` one file is also made for the stock LiteRT-LM runtime, which is asked about held-out screens of tile
size: its host loop knows no others.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
from common import Bar, arguments, compile_cache, finish, load_model, model_options
from tqdm import tqdm

from hypervl_jax import evaluate, judge
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import Branch
from hypervl_jax.data.assets import Assets
from hypervl_jax.data.screens import Screen, record
from hypervl_jax.export import bundle, manifest, parts
from hypervl_jax.export.runtime import Runtime

WAYS: tuple[tuple[Branch, bool], ...] = (("base", True), ("large", False))  # branch, whether VRC shrinks
PICTURES = 50  # that the stock runtime is asked about


def compare(model: Model, files: Runtime, screens: list[Screen], branch: Branch, shrink: bool) -> dict:
    """How many questions there are and how many are answered alike, what was not, and answers a second."""
    ratios = evaluate.ratios(model, screens) if shrink else None
    said = iter(evaluate.run(model, branch, screens, ratios, progress=f"JAX {branch}"))
    other, n, start = [], 0, time.perf_counter()
    for screen in tqdm(screens, desc=f"files {branch}"):
        for q in screen.questions:
            got, want = files.answer(screen.image, q.text, branch, shrink, evaluate.NEW).text, next(said).answer
            n += 1
            if got != want:
                other.append({"question": q.text, "truth": q.answer, "jax": want, "files": got})
    return {"n": n, "same": n - len(other), "other": other, "answers_per_second": n / (time.perf_counter() - start)}


def jobs(model: Model, n: int) -> list[evaluate.Job]:
    """Held-out screens of tile size with their questions."""
    side, assets = model.config.policy.tile, Assets.load()
    shape = dataclasses.replace(
        judge.trained_on(model).data.screens, min_side=side, max_side=side, max_area=side * side
    )
    some = [record(assets, shape, "test_known", i) for i in range(n)]
    return [evaluate.Job(s.image, 1.0, tuple(q.text for q in s.questions)) for s in some]


def options(parser: ArgumentParser) -> None:
    model_options(parser)
    parser.add_argument(
        "--folder", type=Path, help="an export of this model; made anew in a temporary one if not given"
    )
    parser.add_argument("--screens", type=int, help="of each split (default: all)")
    parser.add_argument("--bundle", action="store_true", help="ask the stock runtime too (needs the litertlm extra)")


def main() -> int:
    args = arguments(__doc__, more=options)
    compile_cache()
    if args.bundle:
        bundle.require()
    model, where = load_model(args.model)
    tests = judge.held_out(judge.trained_on(model), args.data, 20 if args.quick else args.screens)
    screens = [s for some in tests.values() for s in some]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "export"
        if not args.folder:
            parts.export(model, folder, verify_images=[s.image for some in tests.values() for s in some[:2]])
        made, files = manifest.read(folder), Runtime(folder)
        found = {branch: compare(model, files, screens, branch, shrink) for branch, shrink in WAYS}
        stock = []
        if args.bundle:
            file = bundle.write(model, folder, Path(temporary) / f"base{bundle.SUFFIX}")
            stock = bundle.beside_jax(file, model, "base", jobs(model, 5 if args.quick else PICTURES))
    n, same = (sum(f[k] for f in found.values()) for k in ("n", "same"))
    error = float(np.max(list(made.parity.values())))
    for branch, f in found.items():
        print(f"{branch}: {f['same']} of {f['n']} answers the same, {f['answers_per_second']:.0f} answers a second")
        for o in f["other"][:5]:
            print(f"  {o['question']} {o['truth']}: JAX {o['jax']!r}, files {o['files']!r}")
    ops = sorted({op for p in made.parts for op in p.ops})
    print(f"largest error at any seam {error:.1e}; operators: {', '.join(ops)}")
    metrics = {
        "model": where, "screens": len(screens), "questions": n, "same_answers": same / n, "ways": found, "ops": ops,
        "max_relative_error": error, "bytes": {p.name: p.file.bytes for p in made.parts},
    }  # fmt: skip
    bars = [Bar("export.same_answers", same / n, 0.99), Bar("export.max_relative_error", error, 1e-4, "<=")]
    if stock:
        share = sum(got == want for got, want in stock) / len(stock)
        print(f"stock runtime: {share:.1%} of {len(stock)} answers those of JAX")
        metrics["bundle"] = {"n": len(stock), "same": share, "other": [s for s in stock if s[0] != s[1]]}
        bars.append(Bar("export.bundle_same_answers", share, 1.0))
    return finish("export", metrics, bars, args)


if __name__ == "__main__":
    sys.exit(main())
