"""The verb that finds a recipe for exported files: `hypervl recipe`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from hypervl_jax import needs
from hypervl_jax.config import Branch


def recipe(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    /,
    out: Path,
    keep: float = 0.5,
    group: Literal["32", "64", "128", "row"] = "32",
    calibrate: int = 0,
    data: Path | None = None,
    screens: int = 512,
    branch: Branch = "base",
) -> None:
    """Find the rules of fewest bytes with which a model still reads and points, for hypervl export --rules.

    Every matrix of the decoder's layers is tried alone in 4 bits; then as many of them together as keep the accuracy on
    held-out screens. Interrupted, the same command goes on where it stopped: what is measured is in OUT.json. For
    example:

    hypervl recipe nano --out rules.txt

    hypervl recipe nano --out rules.txt --keep 0.2 --group 64 --calibrate 128

    Args:
        model: a model folder, or the name of weights that ship.
        out: file to write, rules with what they were measured to lose.
        keep: points of 100 that reading and grounding may lose each, against the model in f32.
        group: inputs that share a scale in 4 bits.
        calibrate: choose 4 bits by what the decoder multiplies in so many samples (GPTQ); 0: the nearest.
        data: a folder that `hypervl data build` wrote, to take them from; if not given, screens are composed.
        screens: how many held-out screens are asked about.
        branch: which vision encoder looks.
    """
    if not keep >= 0:
        raise needs.UsageError(f"--keep {keep:g}: at least 0 points")
    if screens < 1:
        raise needs.UsageError(f"--screens {screens}: at least 1")
    if calibrate < 0 or (data is not None and not calibrate):
        raise needs.UsageError("--calibrate: so many samples, at least 1; --data: where they come from")
    if out.exists():
        raise needs.UsageError(f"{out}: is there already; remove it, or choose another --out")
    if not out.absolute().parent.is_dir():
        raise needs.UsageError(f"{out}: no such folder; make it, or choose another --out")
    loaded = needs.load(model)
    from hypervl_jax import calibrate as of
    from hypervl_jax import sensitivity

    kind = "int4" if group == "row" else f"int4/{group}"
    settings = {"weights": sensitivity.digest(loaded.params), "group": group, "calibrate": calibrate,
                "data": str(data or ""), "screens": screens, "branch": branch}  # fmt: skip
    record = sensitivity.Record(out.with_name(f"{out.name}.json"), settings)
    exam = sensitivity.Exam(loaded, branch, sensitivity.held_out(loaded, screens))
    samples = needs.samples(loaded, calibrate, data) if calibrate else []
    grams = list(of.grams(loaded, samples, (branch,))) if calibrate else []
    table = sensitivity.costs(exam, kind, grams, record)
    picked = sensitivity.pick(exam, table, kind, grams, keep, record)
    about = f"{model}, {branch}, {len(exam.screens)} screens, keep {keep:g} points, {kind}, calibrate {calibrate}"
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.write_text(sensitivity.written(picked, table, about), encoding="utf-8")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    for task, lost in picked.lost.items():
        print(f"{task}: {lost}")
    print(
        f"{picked.narrow} of {len(table)} matrices in 4 bits: {picked.bits:.2f} bits a weight of the decoder's layers"
    )
    more = (f" --calibrate {calibrate}" if calibrate else "") + (f" --data {data}" if data else "")
    print(f"export it: hypervl export {model} --out phone --rules {out}{more}")
