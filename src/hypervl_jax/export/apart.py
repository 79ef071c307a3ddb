"""Large models: each part is read, lowered and given its integers in a process of its own, which then ends.

`parts.export` holds a model in f32, its integers and the floats that they stand for. Here no more is in memory than one
part of that at a time, and the proof has JAX compute with the integers themselves: of the paper's 2.1 billion weights,
in 4 and 8 bits, 1.6 GB.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hypervl_jax import calibrate, checkpoint, quantize
from hypervl_jax.calibrate import CalibrationError, Sample
from hypervl_jax.checkpoint import TOKENIZER, Model, replacing
from hypervl_jax.config import BRANCHES, Branch
from hypervl_jax.export import lower, manifest, pack, parts, verify
from hypervl_jax.export.lower import ExportError
from hypervl_jax.export.manifest import Manifest
from hypervl_jax.export.runtime import Runtime
from hypervl_jax.quantize import Quantized, Recipe, RecipeError

LARGE = 2 << 30  # bytes of weights in f32 above which `hypervl export` goes this way


def is_large(name: str | Path) -> bool:
    """Whether a model folder, or weights that ship, are better exported here than by `parts.export`."""
    shapes = checkpoint.expected(checkpoint.load_config(name))
    return 4 * sum(map(math.prod, shapes.values())) > LARGE


def export(
    name: str | Path,
    out_dir: str | Path,
    *,
    recipe: Recipe = (),
    samples: Sequence[Sample] = (),
    prefill: Sequence[int] | None = None,
    cache: int | None = None,
    branches: Sequence[Branch] = BRANCHES,
    verify_images: Sequence[np.ndarray] | None = None,
    source: str = "",
    bundle: Branch | None = None,
    progress: bool = True,
) -> Manifest:
    """`parts.export` of a model folder, or weights that ship, a process a part.

    There is one proof and not two: the files with their integers, bit by bit and each seam. Options and errors are
    those of `parts.export`, and `ExportError` for a process that ends otherwise than it should.
    """
    from hypervl_jax.export import bundle as bundles

    lower.require()
    if bundle is not None:
        bundles.require()
        if bundle not in branches:
            raise ExportError(f"a bundle of {bundle} needs that branch; it is not among {', '.join(branches)}")
    out, path = Path(out_dir).absolute(), checkpoint.find_model(name).absolute()
    parts.check_free(out)
    head = checkpoint.load_model(path, only=(parts.WEIGHTS["vrc"],))
    quantize.quantize({}, recipe, shapes := checkpoint.expected(head.config))  # whether the rules fit
    if samples:
        parts.check_narrow(recipe, shapes)
    prefill, cache = parts.checked_lengths(head, prefill, cache, branches)
    pictures = parts.default_pictures(head.config, cache=cache) if verify_images is None else verify_images
    names, rules = parts.names(branches), tuple(map(str, recipe))
    total = bool(samples) + len(names) + 1 + (bundle is not None)
    with (
        replacing(out) as work,
        tempfile.TemporaryDirectory(dir=out.parent) as kept,
        tqdm(total=total, desc="export", unit="part", disable=not progress) as bar,
    ):
        job: dict[str, Any] = {"path": str(path), "rules": rules, "prefill": prefill, "cache": cache, "chosen": None}
        if samples:
            bar.set_postfix_str("calibrate")
            job["chosen"] = str(Path(kept) / "chosen.npz")
            shown = keep(Path(kept) / "pictures.npz", samples)
            in_a_process(job | {"part": CALIBRATE, "out": job["chosen"], "samples": shown, "branches": branches})
            bar.update()
        for part in names:
            bar.set_postfix_str(part)
            in_a_process(job | {"part": part, "out": str(work / parts.file_of(part))})
            bar.update()
        bar.set_postfix_str("verify integers")
        head.tokenizer.save(work / TOKENIZER)
        model = narrow(head, path, recipe, branches, job["chosen"])
        made = parts.make(model.config, model.params, branches, prefill, cache)
        for part, of in made.items():
            pack.compare(work / parts.file_of(part), quantize.matrices(of.params))
        more = {"model": model, "branches": branches, "source": source, "recipe": rules, "bits": parts.bits(made)}
        more["calibrated"] = len(samples)
        del made
        manifest.write(work, parts.described(work, **more))
        seams = verify.seams(model, Runtime(work), pictures, lambda seam: bar.set_postfix_str(f"verify {seam}"))
        parts.refuse(out, seams)
        done = parts.described(work, seams, **more)
        manifest.write(work, done)
        bar.update()
        if bundle is not None:
            bar.set_postfix_str(f"{bundle} bundle")
            done = bundles.add(model, work, done, bundle)
            bar.update()
    return done


def narrow(head: Model, path: Path, recipe: Recipe, branches: Sequence[Branch], chosen: str | None) -> Model:
    """A model with the weights of some branches as the files have them; beside them one group at a time is in f32."""
    params, shapes = {}, checkpoint.expected(head.config)
    for group in ("vrc", *branches, "llm"):
        params |= quantize.quantize(checkpoint.load_model(path, only=(f"{group}.",)).params, recipe, shapes)
    return head._replace(params=as_chosen(params, chosen))


# --- in a process of its own -----------------------------------------------------------------------------------------

CALIBRATE = "calibrate"  # a job beside those of the parts


def in_a_process(job: dict[str, Any]) -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", __name__]
    run = subprocess.run(command, input=json.dumps(job), text=True, capture_output=True, env=env)
    if run.returncode == 0:
        return
    said = run.stderr.strip().splitlines()
    if run.returncode > 0 and said:
        raise ExportError(said[-1])
    why = "was killed, as happens where memory runs out" if run.returncode == -9 else f"ended with {run.returncode}"
    doing = "calibrates" if job["part"] == CALIBRATE else "lowers it"
    raise ExportError(f"{job['part']}: the process that {doing} {why}{': ' + said[-1] if said else ''}")


def do(job: dict[str, Any]) -> None:
    """Choose the decoder's 4 bits by samples, or write one part, its matrices as the recipe says."""
    path, out, recipe = Path(job["path"]), Path(job["out"]), quantize.parse(job["rules"])
    if job["part"] == CALIBRATE:
        model = checkpoint.load_model(path)
        found = calibrate.grams(model, shown(**job["samples"]), job["branches"], progress=False)
        write(out, calibrate.calibrated(model.params, recipe, found))
        return
    model = checkpoint.load_model(path, only=(parts.WEIGHTS[job["part"]],))
    params = quantize.quantize(model.params, recipe, checkpoint.expected(model.config))
    config = model.config
    del model  # its floats
    made = parts.one(job["part"], config, as_chosen(params, job["chosen"]), job["prefill"], job["cache"])
    lower.to_tflite(out, quantize.restored(made.params), made.signatures)
    if recipe:
        pack.pack(out, quantize.matrices(made.params))


def main() -> None:
    """One job from stdin, as JSON."""
    try:
        do(json.load(sys.stdin))
    except (
        ExportError,
        lower.ExportUnavailable,
        RecipeError,
        CalibrationError,
        checkpoint.CheckpointError,
        OSError,
    ) as e:
        sys.exit(str(e))


# --- what processes hand on ------------------------------------------------------------------------------------------


def keep(path: Path, samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples as `shown` takes them, their pictures in a file."""
    arrays: dict[str, Any] = {f"{i}.{j}": p for i, s in enumerate(samples) for j, p in enumerate(s.pictures)}
    np.savez(path, **arrays)
    return {"path": str(path), "counts": [len(s.pictures) for s in samples], "messages": [s.messages for s in samples]}


def shown(path: str, counts: Sequence[int], messages: Sequence[list]) -> list[Sample]:
    with np.load(path) as pictures:
        return [
            Sample([pictures[f"{i}.{j}"] for j in range(n)], said)
            for i, (n, said) in enumerate(zip(counts, messages, strict=True))
        ]


def write(path: Path, params: dict) -> None:
    """The decoder's 4 bits."""
    found = {k: m for k, m in quantize.matrices(params["llm"]["blocks"]).items() if m.bits == 4}
    arrays: dict[str, Any] = {f"{name}.{k}": a for name, m in found.items() for k, a in m._asdict().items()}
    np.savez(path, **arrays)


def as_chosen(params: dict, path: str | None) -> dict:
    """`params` with the 4 bits that `write` wrote, where they have a decoder."""
    if path is None or "blocks" not in params.get("llm", {}):
        return params
    with np.load(path) as chosen:
        names = [name.removesuffix(".q") for name in chosen.files if name.endswith(".q")]
        found = {name: Quantized(chosen[f"{name}.q"], chosen[f"{name}.scale"]) for name in names}
    blocks = quantize.replaced(params["llm"]["blocks"], found)
    return params | {"llm": params["llm"] | {"blocks": blocks}}


if __name__ == "__main__":
    main()
