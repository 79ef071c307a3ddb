"""Cost of rescaling over picture size: time and memory of the plain path and of HCD's steps, tile by tile.

Square pictures through the network of light_x2, which the commands take (--quick: a smaller one), with weights drawn
at random: what a step costs does not depend on them. Each size runs in a process of its own, compiles first, then
measures the median of `--repeats` runs:

  plain   down and up
  hcd     one step of the large and one of the small picture, the shrinking between them

and the peak resident memory above what was resident before (Linux; not a number elsewhere, which no bar takes). Beside
it stands what the same program would need for the whole picture at once, by the compiler's account; nothing of that
runs. The last row, of as many pixels as 7680 x 4320 have, is of the plain path alone, once. Writes a plot beside its
results file.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import statistics
import sys
import time
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import Bar, arguments, compile_cache, finish

from hypervl_jax import bench, charts
from hypervl_jax.rescale import hcd, tiles
from hypervl_jax.rescale.hcd import HcdConfig, Scene
from hypervl_jax.rescale.irn import Irn
from hypervl_jax.rescale.pairs import Pair, keys

STEP = HcdConfig(1, 1, eps_mode="rms")
BYTES = 200  # of the whole picture's arrays a pixel, at most: what HCD moves, its gradient, copies of them


class Plan(NamedTuple):
    """What is measured."""

    net: Irn
    sides: tuple[int, ...]  # of pictures, multiples of the scale; the first two are compiled whole too
    tile: int
    plain: int  # side of a picture that takes the plain path alone


FULL = Plan(Irn((4,), growth=8, noise=0.0), (320, 640, 1280, 2560), tiles.TILE, 5760)
QUICK = Plan(Irn((1,), growth=4), (256, 512), tiles.LEAST, 768)


def measure(net: Irn, side: int, tile: int, repeats: int, some: tuple[str, ...] = ("plain", "hcd")) -> dict:
    """Seconds of some paths, and bytes by which the peak of resident memory exceeds what was resident before."""
    compile_cache()
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))  # numpy draws: compiling JAX's takes longer than all else
    pair = Pair(net, jax.tree.map(lambda x: jnp.asarray(0.01 * rng.normal(size=x.shape), jnp.float32), shapes))
    hr = rng.integers(0, 256, (side, side, 3), np.uint8)
    ways = {
        "plain": lambda hr: tiles.up(pair, tiles.down(pair, hr, tile), tile=tile),
        "hcd": lambda hr: tiles.descend(pair, hr, STEP, tile=tile),
    }
    row: dict = {"side": side, "tiles": len(tiles.grid((side // net.scale, side // net.scale), net.scale, tile))}
    for way in some:
        run = ways[way]
        run(hr if "hcd" in some else hr[: 2 * tile, : 2 * tile])  # compiles; on the plain path pictures share programs
        before = _peak_from_here()
        took = []
        for _ in range(repeats):
            begun = time.perf_counter()
            run(hr)
            took.append(time.perf_counter() - begun)
        row |= {f"{way}_s": statistics.median(took), f"{way}_bytes": _resident("VmHWM") - before}
    return row


def whole_bytes(net: Irn, side: int) -> int:
    """What one step of the large picture allocates for a whole picture, by the compiler's account."""
    params = jax.eval_shape(net.init, jax.random.key(0))
    shape = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)

    def step(params: dict, hr: jax.Array, delta: jax.Array) -> tuple:
        scene = Scene(Pair(net, params), hr, hr, jnp.float32(1), keys(jax.random.key(0), 1))
        return hcd.look(scene, hcd.step_of(STEP, "hr"), "hr", delta, 0)

    return bench.temporary_bytes(step, params, shape, shape)


def _resident(field: str) -> float:
    """Bytes, of a line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(field)), math.nan)


def _peak_from_here() -> float:
    """Bytes resident now, from where the peak is counted; not a number where the peak cannot be set back."""
    with contextlib.suppress(OSError, AttributeError):  # what was freed goes back first, or it would hide what is taken
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    return _resident("VmRSS")


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="runs whose median is taken (default: 5)")


def main() -> int:
    args = arguments(__doc__, more=options)
    plan = QUICK if args.quick else FULL
    rows = []
    print(f"{'side':>6}{'tiles':>7}{'plain s':>10}{'HCD step s':>12}{'plain MB':>10}{'HCD MB':>9}{'whole MB':>10}")
    for side in plan.sides:
        row = fresh(plan.net, side, plan.tile, args.repeats)
        # Of larger ones compiling takes too long.
        row["whole_bytes"] = whole_bytes(plan.net, side) if side <= plan.sides[1] else None
        rows.append(row)
        whole = f"{row['whole_bytes'] / 1e6:10.0f}" if row["whole_bytes"] else f"{'':10}"
        print(
            f"{side:>6}{row['tiles']:>7}{row['plain_s']:>10.2f}{row['hcd_s']:>12.2f}{row['plain_bytes'] / 1e6:>10.0f}"
            f"{row['hcd_bytes'] / 1e6:>9.0f}{whole}",
            flush=True,
        )
    large = fresh(plan.net, plan.plain, plan.tile, 1, ("plain",))
    print(f"{plan.plain:>6}{large['tiles']:>7}{large['plain_s']:>10.2f}{'':12}{large['plain_bytes'] / 1e6:>10.0f}")
    found = {"net": repr(plan.net), "tile": plan.tile, "sizes": rows, "plain": large}
    status = finish("rescale_cost", found, bars(rows[-2], rows[-1], large), args, seeds=[0])
    (args.out / "rescale_cost.svg").write_text(plot(rows))
    return status


def bars(first: dict, last: dict, large: dict) -> list[Bar]:
    """Time a tile stays as it is, and memory grows by a few arrays of the picture, from one size to the next."""
    out = []
    for name, way, a, b in (
        ("plain", "plain", first, last), ("hcd", "hcd", first, last), ("large_plain", "plain", last, large)
    ):  # fmt: skip
        slower = b[f"{way}_s"] / a[f"{way}_s"] * a["tiles"] / b["tiles"]
        more = (b[f"{way}_bytes"] - a[f"{way}_bytes"]) / (b["side"] ** 2 - a["side"] ** 2)
        out.append(Bar(f"rescale.{name}_time_a_tile", slower, 1.2, "<="))
        out.append(Bar(f"rescale.{name}_bytes_a_pixel", more, BYTES, "<="))
    return out


def fresh(*of: Any) -> dict:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *of).result()


def plot(rows: list[dict]) -> str:
    """Seconds over pixels, as an SVG that stands alone."""
    said = {"hcd": ("HCD, one step of each", "large"), "plain": ("plain, down and up", "base")}
    series = [
        charts.Series(text, [(r["side"] ** 2 / 1e6, r[f"{way}_s"]) for r in rows], colour)
        for way, (text, colour) in said.items()
    ]
    drawn = charts.lines(series, "million pixels", "seconds", dots=True)
    return charts.page([("seconds", drawn)], {colour: text for text, colour in said.values()}, across=1)


if __name__ == "__main__":
    sys.exit(main())
