"""Exported files against JAX on held-out screens: the same greedy answers, and the largest error at any seam.

The model is exported (to a temporary folder unless `--folder` has an export of it) and every question about every
screen is answered twice, by JAX in batches and by the files one at a time: Base at VRC's ratios, so that every file has
a part in the answer, and Large at full size. `--quick` takes 20 screens of each split.
"""

from __future__ import annotations

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
from hypervl_jax.data.screens import Screen
from hypervl_jax.export import manifest, parts
from hypervl_jax.export.runtime import Runtime

WAYS = (("base", True), ("large", False))  # branch, whether VRC shrinks


def compare(model: Model, files: Runtime, screens: list[Screen], branch: str, shrink: bool) -> dict:
    """How many questions there are and how many are answered alike, what was not, and answers a second."""
    ratios = evaluate.ratios(model, screens) if shrink else None
    said = iter(evaluate.run(model, branch, screens, ratios, progress=f"JAX {branch}"))  # type: ignore
    other, n, start = [], 0, time.perf_counter()
    for screen in tqdm(screens, desc=f"files {branch}"):
        for q in screen.questions:
            got, want = files.answer(screen.image, q.text, branch, shrink, evaluate.NEW).text, next(said).answer
            n += 1
            if got != want:
                other.append({"question": q.text, "truth": q.answer, "jax": want, "files": got})
    return {"n": n, "same": n - len(other), "other": other, "answers_per_second": n / (time.perf_counter() - start)}


def options(parser: ArgumentParser) -> None:
    model_options(parser)
    parser.add_argument(
        "--folder", type=Path, help="an export of this model; made anew in a temporary one if not given"
    )
    parser.add_argument("--screens", type=int, help="of each split (default: all)")


def main() -> int:
    args = arguments(__doc__, more=options)
    compile_cache()
    model, where = load_model(args.model)
    tests = judge.held_out(judge.trained_on(model), args.data, 20 if args.quick else args.screens)
    screens = [s for some in tests.values() for s in some]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "export"
        if not args.folder:
            parts.export(model, folder, verify_images=[s.image for some in tests.values() for s in some[:2]])
        made, files = manifest.read(folder), Runtime(folder)
        found = {branch: compare(model, files, screens, branch, shrink) for branch, shrink in WAYS}
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
    return finish("export", metrics, bars, args)


if __name__ == "__main__":
    sys.exit(main())
