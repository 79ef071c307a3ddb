"""What tiles, the small branch, 8 bits and VRC save on large pictures: time and memory over the side of the picture.

The paper reports 12.9 times the speed and 6.8 times less memory than a baseline that it does not describe (HyperVL
5.4). Four ratios at its geometry, random weights, in the CPU's runtime of exported files, say what such figures can be
made of:

  a  the picture whole over in tiles, the same ViT in f32, Base and Large
  b  whole through Large in f32 over in tiles through Base, in f32 and in 8 bits
  c  the same over VRC and tiles of Base in 8 bits, at the ratio that saves the paper's 20.2 % of the tokens
  d  to the first token, with the same decoder in 4 bits: whole through Large over VRC and tiles of Base in 8 bits

Memory is what a process has resident above what it had before it loaded the files, at most. Up to 1,024 px everything
runs, each way in a process of its own. Above that it is computed, and labelled so: the whole picture by what fits its
time (patches, and patches squared) and its memory (those and a constant) at the sizes that ran; tiles by their number,
their memory as it was; the decoder by tokens, and by what its cache grows with them.

The files in 8 and 4 bits are those that `paper_size.py` left, or are made as there (about an hour). An interrupted run
goes on at the size where it was. `--quick` takes a decoder of two layers and pictures of one tile and less.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import paper_size
from common import Bar, arguments, finish, once
from runtimes import lowered
from tiling_memory import kilobytes
from tqdm import tqdm

from hypervl_jax import bench, checkpoint, plan, tensors
from hypervl_jax.config import BRANCHES, Branch, ModelConfig
from hypervl_jax.export import lower, manifest, parts
from hypervl_jax.export.bench import QUESTION
from hypervl_jax.export.runtime import ENCODER, Runtime

SIDES, RUN = (256, 512, 768, 1024, 1536, 2048), 1024  # of the picture; the largest that runs
SHARE = 1 - 0.202  # of the tokens that VRC keeps, by the paper
FLAT = 1.15  # memory of the most tiles over that of one
LONG, ROUNDS = 20, 3  # seconds from which on one run is enough; runs else, the median counts
RATIOS = {  # over under
    "a base": ("whole base f32", "tiles base f32"),
    "a large": ("whole large f32", "tiles large f32"),
    "b f32": ("whole large f32", "tiles base f32"),
    "b int8": ("whole large f32", "tiles base int8"),
    "c": ("whole large f32", "VRC, tiles base int8"),
    "d": ("first token, whole large f32", "first token, VRC, tiles base int8"),
}
Found = dict[str, dict[str, float]]  # by way: seconds and bytes


# --- run: in a process of its own ------------------------------------------------------------------------------------


def measured(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of `run`, and how far the peak of resident memory rose from what it was. Linux only."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, times = kilobytes("/proc/self/status", "VmRSS"), []
    run()  # loads, packs weights
    while len(times) < ROUNDS and (not times or times[0] < LONG):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {"seconds": float(np.median(times)), "bytes": kilobytes("/proc/self/status", "VmHWM") - before}


def encode(path: Path, signature: str, shapes: dict[str, tuple[int, ...]], tiles: int) -> dict[str, float]:
    """So many tiles, one after another."""
    rng = np.random.default_rng(0)
    inputs = {k: np.ones(s, np.float32) if k == "mask" else rng.random(s, np.float32) for k, s in shapes.items()}
    load = functools.cache(lower.Runner)

    def run() -> None:
        for _ in range(tiles):
            load(path)(signature, inputs)

    return measured(run)


class Told(Runtime):
    """Computes VRC and is told its ratio: random weights choose none that means something."""

    def ratio(self, pixels: np.ndarray) -> float:
        super().ratio(pixels)
        return SHARE


def first_token(files: Path, side: int, whole: tuple[Path, str] | None) -> dict[str, float]:
    """From pixels to a token: VRC and tiles of Base, or an encoder (file, signature) of the whole picture.
    `decoder` is the part of the seconds that is the decoder's."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    load, open_, decoder = functools.cache(lower.Runner), functools.cache(Told), []

    def tiled() -> None:
        took = open_(files).answer(pixels, QUESTION, "base", vrc=True, max_new=1).seconds
        decoder.append(took["prefill"] + took["decode"])

    def at_once(path: Path, signature: str) -> None:
        seen = load(path)(signature, {"images": pixels[None] / np.float32(255)})["features"]
        start = time.perf_counter()
        opened = open_(files)
        row = np.resize(seen, (1, prompt(opened, side)[0], seen.shape[-1]))  # what the rows hold costs nothing
        opened.step(row[:, -1:], row.shape[1] - 1, opened.prefill(row[:, :-1]))
        decoder.append(time.perf_counter() - start)

    return measured(tiled if whole is None else lambda: at_once(*whole)) | {"decoder": decoder[-1]}


def prompt(files: Runtime, side: int) -> tuple[int, int]:
    """Tokens of a question about a square picture: whole, and in tiles behind VRC."""
    policy = files.config.policy
    p = plan.make((side, side), SHARE, policy)
    tiled = len(files.prompt(p, QUESTION).ids)
    return (side // policy.patch // policy.merge) ** 2 + tiled - p.tokens, tiled


def alone(function: Callable, *args: Any) -> Any:
    """In a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# --- what runs -------------------------------------------------------------------------------------------------------


def encoder(cfg: ModelConfig, branch: Branch, path: Path) -> tuple[Path, str]:
    """A file in f32 for pictures of tile size, with random weights; and its signature."""
    rng = np.random.default_rng(0)
    shapes = {k: s for k, s in checkpoint.expected(cfg).items() if k.startswith(f"{branch}.")}
    flat = {k: 0.02 * rng.standard_normal(s, np.float32) for k, s in shapes.items()}
    part = parts.encoder(cfg, tensors.unflatten(flat), branch, masked=False)
    lowered(part, path)
    return path, part.signatures[0].name


def run(cfg: ModelConfig, files: Path, sides: Sequence[int], work: Path) -> dict[int, Found]:
    """Every way at every size; those of which `files` has a figure beside it are not run again."""
    m, tile = manifest.check(files), cfg.policy.tile
    images = {"images": (1, tile, tile, 3)}
    mask = {"mask": (1, cfg.policy.patches_per_side**2)}
    narrow = {b: (files / m.part(ENCODER + b).file.file, "vision", images | mask) for b in BRANCHES}
    tiled = functools.cache(lambda b: (*alone(encoder, cfg, b, work / f"tile-{b}.tflite"), images))
    proxy = {"proxy": (1, cfg.vrc.side, cfg.vrc.side, 3)}

    def of(side: int) -> Found:
        n, shrunk = (plan.make((side, side), share, cfg.policy).n_tiles for share in (1.0, SHARE))
        found: Found = {}
        for b in BRANCHES:
            found[f"tiles {b} f32"] = alone(encode, *tiled(b), n)
            found[f"tiles {b} int8"] = alone(encode, *narrow[b], n)
            whole = alone(encoder, bench.as_one_tile(cfg, side), b, work / "whole.tflite")
            found[f"whole {b} f32"] = alone(encode, *whole, {"images": (1, side, side, 3)}, 1)
            if b == "large":
                found["first token, whole large f32"] = alone(first_token, files, side, whole)
        fewer = alone(encode, *narrow["base"], shrunk)
        vrc = alone(encode, files / m.part("vrc").file.file, "vrc", proxy, 1)
        found["VRC, tiles base int8"] = {k: fewer[k] + vrc[k] for k in fewer}
        found["first token, VRC, tiles base int8"] = alone(first_token, files, side, None)
        return found

    return {side: once(files.with_name(f"side-{side}.json"), lambda: of(side)) for side in tqdm(sides, "sides")}  # noqa: B023


# --- computed --------------------------------------------------------------------------------------------------------


def fitted(x: Sequence[float], y: Sequence[float], powers: Sequence[int]) -> Callable[[float], float]:
    """The sum of powers of x that is relatively nearest to y, no term negative."""
    powers = list(powers)
    while True:
        terms = np.array([[a**p for p in powers] for a in x], float)
        weights, *_ = np.linalg.lstsq(terms / np.array(y)[:, None], np.ones(len(y)), rcond=None)
        if (weights >= 0).all():
            return lambda at: float(sum(w * at**p for w, p in zip(weights, powers, strict=True)))
        powers.pop(int(np.argmin(weights * terms[-1])))


def computed(cfg: ModelConfig, ran: dict[int, Found], prompts: dict[int, tuple[int, int]], side: int) -> Found:
    """A size that did not run."""
    last = max(ran)
    policy, most, out = cfg.policy, ran[last], {}

    def grown(way: str, key: str, powers: Sequence[int]) -> float:
        return fitted([s * s for s in ran], [f[way][key] for f in ran.values()], powers)(side * side)

    for b in BRANCHES:
        whole = f"whole {b} f32"
        out[whole] = {"seconds": grown(whole, "seconds", (1, 2)), "bytes": grown(whole, "bytes", (0, 1, 2))}
        for kind in ("f32", "int8"):
            out[f"tiles {b} {kind}"] = _more(most[f"tiles {b} {kind}"], _tiles(policy, side) / _tiles(policy, last))
    fewer = _tiles(policy, side, SHARE) / _tiles(policy, last, SHARE)
    out["VRC, tiles base int8"] = _more(most["VRC, tiles base int8"], fewer)
    cache = 2 * 4 * cfg.llm.depth * cfg.llm.kv_heads * cfg.llm.head_dim  # bytes a token
    for i, (way, seen) in enumerate((("whole large f32", "whole large f32"), ("VRC, tiles base int8",) * 2)):
        first, n = most[f"first token, {way}"], [prompts[s][i] for s in (last, side)]
        decoder = first["decoder"] * n[1] / n[0]
        rest = (first["seconds"] - first["decoder"]) * out[seen]["seconds"] / most[seen]["seconds"]
        more = out[seen]["bytes"] - most[seen]["bytes"] + cache * (n[1] - n[0])
        out[f"first token, {way}"] = {"seconds": rest + decoder, "bytes": first["bytes"] + more, "decoder": decoder}
    return out


def _tiles(policy: Any, side: int, share: float = 1.0) -> int:
    return plan.make((side, side), share, policy).n_tiles


def _more(found: dict[str, float], times: float) -> dict[str, float]:
    return found | {"seconds": found["seconds"] * times}


# --- said ------------------------------------------------------------------------------------------------------------


def ratios(found: Found) -> Found:
    return {k: {m: found[a][m] / found[b][m] for m in ("seconds", "bytes")} for k, (a, b) in RATIOS.items()}


def table(rows: Sequence[dict[str, Any]], key: str, title: str) -> None:
    print(f"\n{title}\n{'side':>6}" + "".join(f"{k:>10}" for k in RATIOS))
    for row in rows:
        said = "".join(f"{row['ratios'][k][key]:>10.2f}" for k in RATIOS)
        print(f"{row['side']:>6}{said}" + ("" if row["ran"] else "   computed"), flush=True)


def main() -> int:
    args = arguments(__doc__)
    cfg, folder = paper_size.sizes(args.quick), paper_size.kept(args.quick)
    files = folder / "files"
    once(folder / "w4a16.json", lambda: paper_size.full(files, cfg))
    sides = [s for s in SIDES if s <= (512 if args.quick else RUN)]
    with tempfile.TemporaryDirectory(dir=folder) as work:
        ran = run(cfg, files, sides, Path(work))
    prompts = alone(_prompts, files, SIDES)
    rows = []
    for side in sides if args.quick else SIDES:
        found = ran.get(side) or computed(cfg, ran, prompts, side)
        rows.append({"side": side, "ran": side in ran, "found": found, "ratios": ratios(found)})
    table(rows, "seconds", "times as fast")
    table(rows, "bytes", "times less memory")
    flat = ran[sides[-1]]["tiles base f32"]["bytes"] / ran[512]["tiles base f32"]["bytes"]
    bars = [Bar("picture_size.tiles_flat", flat, FLAT, "<=")]
    return finish("picture_size", {"tile": cfg.policy.tile, "rows": rows}, bars, args, seeds=[0])


def _prompts(files: Path, sides: Sequence[int]) -> dict[int, tuple[int, int]]:
    runtime = Runtime(files)
    runtime.cache_length = sys.maxsize  # tokens are counted, not read
    return {side: prompt(runtime, side) for side in sides}


if __name__ == "__main__":
    sys.exit(main())
