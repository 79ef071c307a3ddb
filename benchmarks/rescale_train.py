"""A small pair trained from nothing on BSDS500-train, what it and HCD give on Set5, and the memory of the paper's.

`tiny_x2` (IRN of two blocks, growth 8: 100 kB) for its 600 steps, some minutes on two cores. Set5 is looked at once, at
the end: plain against bicubic both ways, and HCD at the official setting. Training and figures are kept under .cache,
so that the same command goes on where it was interrupted. `--memory` compiles a training step of hcd_x2 and hcd_x4 as
well, batch 16 and crops of 144, and tells what it allocates by the compiler's account (minutes). `--quick`: 40 steps on
crops of the shipped screens, and only that the loss falls.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from argparse import ArgumentParser
from pathlib import Path

import hcd as tables
import jax
import numpy as np
from common import HERE, Bar, arguments, compile_cache, finish
from PIL import Image

from hypervl_jax import bench, needs
from hypervl_jax.rescale import evaluate, metrics, photographs, train, weights
from hypervl_jax.watch import PLAIN

OUT = HERE.parent / ".cache" / "benchmarks" / "rescale_train"


def step_bytes(scale: int) -> dict[str, int]:
    """A training step of the paper's pair: what is held between steps, and what one allocates beside it."""
    cfg = train.published(scale)
    state = jax.eval_shape(lambda: train.init_state(cfg))
    t = cfg.train
    hr, small = (jax.ShapeDtypeStruct((t.batch, s, s, 3), np.uint8) for s in (t.crop, t.crop // scale))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    used = bench.temporary_bytes(lambda *x: train.train_step(x[0], x[1], x[2], cfg), state, hr, small)
    return {"state": held, "step": used}


def learning(rows: list[dict], n: int) -> tuple[float, float]:
    """The mean gain over bicubic of the first and of the last `n` steps."""
    gains = [row["gain"] for row in rows]
    return float(np.mean(gains[:n])), float(np.mean(gains[-n:]))


def quick() -> tuple[dict, list[Bar]]:
    from hypervl_jax.export.upscaler import screens

    cfg = train.tiny()
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=40, batch=4, halve_at=(30,)))
    folder = OUT / "screens"
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(screens(192, 4)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    shutil.rmtree(OUT / "quick", ignore_errors=True)
    source = photographs.found(str(folder), OUT / "quick" / "data")
    train.run(cfg, source, OUT / "quick", PLAIN, source.name)
    rows = [json.loads(line) for line in (OUT / "quick" / "log.jsonl").read_text().splitlines()]
    first, last = learning(rows, 8)
    return {"gain_first": first, "gain_last": last}, [Bar("rescale_train.gain_rises", last - first, 0.0)]


def full(data: Path, memory: bool) -> tuple[dict, list[Bar]]:
    source = photographs.found(str(data / "BSDS500-train"), OUT / "data")
    run = OUT / f"tiny_x2-{tables.code('train', 'photographs')[:12]}"
    pair = train.run(cfg := train.tiny(), source, run, PLAIN, source.name)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    some = tables.pictures(data / "Set5", 2)
    bicubic = {s: metrics.psnr(evaluate.both_ways(x, 2).restored, x, 2) for s, x in some.items()}
    task = tables.Task("tiny_x2_Set5", pair, data / "Set5", tables.WAYS, 1)
    found = tables.over(
        "tiny x2 Set5", lambda hr: tables.measure(pair, 2, hr, tables.WAYS, 1), some, task.kept(OUT / "tables")
    )
    plain = tables.mean(found["plain"], "psnr_y") - float(np.mean(list(bicubic.values())))
    moved = tables.gains(found, "HR15+LR15")
    print(f"bicubic both ways {np.mean(list(bicubic.values())):.3f} dB: {plain:+.3f} dB above it")
    told = {
        "config": repr(cfg), "steps": len(rows), "gain": learning(rows, 50), "bicubic": bicubic, "Set5": found,
        "bytes": (run / train.WEIGHTS).stat().st_size, "weights": weights.fingerprint(pair),
    }  # fmt: skip
    bars = [
        Bar("rescale_train.above_bicubic_db", plain, 2.0),
        Bar("rescale_train.hcd_least_gain", min(moved), 0.0),
        Bar("rescale_train.hcd_mean_gain", float(np.mean(moved)), 0.2),
    ]
    if memory:
        told["memory"] = {f"hcd_x{scale}": step_bytes(scale) for scale in (2, 4)}
        for name, m in told["memory"].items():
            print(f"{name}: {m['state'] / 1e6:.0f} MB of state, a step allocates {m['step'] / 1e9:.2f} GB beside it")
    return told, bars


def options(parser: ArgumentParser) -> None:
    tables.options(parser)
    parser.add_argument("--memory", action="store_true", help="compile a training step of the paper's pairs as well")


def main() -> int:
    args = arguments(__doc__, more=options)
    if not args.quick and not (args.data / "BSDS500-train").is_dir():
        sys.exit(f"{args.data}: no BSDS500-train there; name its folder with --data")
    needs.keep_memory()
    compile_cache()
    found, bars = quick() if args.quick else full(args.data, args.memory)
    return finish("rescale_train", found, bars, args, seeds=[train.tiny().train.seed])


if __name__ == "__main__":
    sys.exit(main())
