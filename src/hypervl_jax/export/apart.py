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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hypervl_jax import checkpoint, quantize
from hypervl_jax.checkpoint import TOKENIZER, Model, replacing
from hypervl_jax.config import BRANCHES, Branch
from hypervl_jax.export import lower, manifest, pack, parts, verify
from hypervl_jax.export.lower import ExportError
from hypervl_jax.export.manifest import Manifest
from hypervl_jax.export.runtime import Runtime
from hypervl_jax.quantize import Recipe

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
    quantize.quantize({}, recipe, checkpoint.expected(head.config))  # whether the rules fit
    prefill, cache = parts.checked_lengths(head, prefill, cache, branches)
    pictures = parts.default_pictures(head.config, cache=cache) if verify_images is None else verify_images
    names, rules = parts.names(branches), tuple(map(str, recipe))
    total = len(names) + 1 + (bundle is not None)
    with replacing(out) as work, tqdm(total=total, desc="export", unit="part", disable=not progress) as bar:
        for part in names:
            bar.set_postfix_str(part)
            _in_a_process(path, work / parts.file_of(part), part, rules, prefill, cache)
            bar.update()
        bar.set_postfix_str("verify integers")
        head.tokenizer.save(work / TOKENIZER)
        model = narrow(head, path, recipe, branches)
        made = parts.make(model.config, model.params, branches, prefill, cache)
        for part, of in made.items():
            pack.compare(work / parts.file_of(part), quantize.matrices(of.params))
        more = {"model": model, "branches": branches, "source": source, "recipe": rules, "bits": parts.bits(made)}
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


def narrow(head: Model, path: Path, recipe: Recipe, branches: Sequence[Branch]) -> Model:
    """A model with the weights of some branches as the files have them; beside them one group at a time is in f32."""
    params, shapes = {}, checkpoint.expected(head.config)
    for group in ("vrc", *branches, "llm"):
        params |= quantize.quantize(checkpoint.load_model(path, only=(f"{group}.",)).params, recipe, shapes)
    return head._replace(params=params)


# --- one part --------------------------------------------------------------------------------------------------------


def _in_a_process(path: Path, out: Path, part: str, rules: Sequence[str], prefill: Sequence[int], cache: int) -> None:
    job = {"path": str(path), "out": str(out), "part": part, "rules": rules, "prefill": prefill, "cache": cache}
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(job), text=True, capture_output=True, env=env
    )
    if run.returncode == 0:
        return
    said = run.stderr.strip().splitlines()
    if run.returncode > 0 and said:
        raise ExportError(said[-1])
    why = "was killed, as happens where memory runs out" if run.returncode == -9 else f"ended with {run.returncode}"
    raise ExportError(f"{part}: the process that lowers it {why}{': ' + said[-1] if said else ''}")


def lower_part(path: Path, out: Path, part: str, recipe: Recipe, prefill: Sequence[int], cache: int) -> None:
    """Write one part of a model folder, its matrices as the recipe says."""
    model = checkpoint.load_model(path, only=(parts.WEIGHTS[part],))
    params = quantize.quantize(model.params, recipe, checkpoint.expected(model.config))
    config = model.config
    del model  # its floats
    made = parts.one(part, config, params, prefill, cache)
    lower.to_tflite(out, quantize.restored(made.params), made.signatures)
    if recipe:
        pack.pack(out, quantize.matrices(made.params))


def main() -> None:
    """One job from stdin, as JSON."""
    job = json.load(sys.stdin)
    path, out = Path(job["path"]), Path(job["out"])
    try:
        lower_part(path, out, job["part"], quantize.parse(job["rules"]), job["prefill"], job["cache"])
    except (ExportError, lower.ExportUnavailable, quantize.RecipeError, checkpoint.CheckpointError, OSError) as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
