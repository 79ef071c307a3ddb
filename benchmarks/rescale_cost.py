"""Cost of rescaling over picture size: time and memory of the plain path and of HCD's steps, tile by tile.

Square pictures through FIRN x4 with weights drawn at random: what a step costs does not depend on them. Each size runs
in a process of its own, compiles first, and then measures the median of `--repeats` runs:

  plain   down and up
  hcd     one step of the large and one of the small picture, the shrinking between them

and the peak resident memory above what was resident before (Linux). Beside it stands what the same program would need
for the whole picture at once, by the compiler's account; nothing of that runs. Writes a plot beside its results file.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import Bar, arguments, compile_cache, finish

from hypervl_jax import bench, charts
from hypervl_jax.rescale import hcd, tiles
from hypervl_jax.rescale.hcd import HcdConfig, Scene
from hypervl_jax.rescale.irn import firn
from hypervl_jax.rescale.pairs import Pair, keys

SIDES, QUICK = (320, 640, 1280, 2560), (160, 320)  # multiples of 4
TILES = {False: tiles.TILE, True: tiles.LEAST}
STEP = HcdConfig(1, 1, eps_mode="rms")
BYTES = 200  # of the whole picture's arrays a pixel, at most: what HCD moves, its gradient, copies of them
STYLE = """<style>.line{fill:none;stroke-width:2}.base{stroke:#2a78b8}.large{stroke:#c2571a}.dot{stroke:none}
.dot.base{fill:#2a78b8}.dot.large{fill:#c2571a}.rule{stroke:#ddd}text{font:12px sans-serif;fill:#444}</style>"""


def measure(side: int, tile: int, repeats: int) -> dict:
    """Seconds of both paths, and bytes by which the peak of resident memory exceeds what was resident before."""
    compile_cache()
    pair = Pair(firn(), firn().init(jax.random.key(0)))
    hr = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    ways = {
        "plain": lambda: tiles.up(pair, tiles.down(pair, hr, tile), tile=tile),
        "hcd": lambda: tiles.descend(pair, hr, STEP, tile=tile),
    }
    row: dict = {"side": side, "tiles": len(tiles.grid((side // 4, side // 4), 4, tile))}
    for way, run in ways.items():
        run()  # compiles
        before = _peak_from_here()
        took = []
        for _ in range(repeats):
            begun = time.perf_counter()
            run()
            took.append(time.perf_counter() - begun)
        row |= {f"{way}_s": statistics.median(took), f"{way}_bytes": _resident("VmHWM") - before}
    return row


def whole_bytes(side: int) -> int:
    """What one step of the large picture allocates for a whole picture, by the compiler's account."""
    net = firn()
    params = jax.eval_shape(net.init, jax.random.key(0))
    shape = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)

    def step(params: dict, hr: jax.Array, delta: jax.Array) -> tuple:
        scene = Scene(Pair(net, params), hr, hr, jnp.float32(1), keys(jax.random.key(0), 1))
        return hcd.look(scene, hcd.step_of(STEP, "hr"), "hr", delta, 0)

    return bench.temporary_bytes(step, params, shape, shape)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def _peak_from_here() -> int:
    """Bytes resident now, from where the peak is counted."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="runs whose median is taken (default: 5)")


def main() -> int:
    args = arguments(__doc__, more=options)
    sides, tile = QUICK if args.quick else SIDES, TILES[args.quick]
    rows = []
    print(f"{'side':>6}{'tiles':>7}{'plain s':>10}{'HCD step s':>12}{'plain MB':>10}{'HCD MB':>9}{'whole MB':>10}")
    for side in sides:
        fresh = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with fresh as pool:
            row = pool.submit(measure, side, tile, args.repeats).result()
        row["whole_bytes"] = whole_bytes(side) if side <= sides[1] else None  # beyond that compiling takes too long
        rows.append(row)
        whole = f"{row['whole_bytes'] / 1e6:10.0f}" if row["whole_bytes"] else f"{'':10}"
        print(
            f"{side:>6}{row['tiles']:>7}{row['plain_s']:>10.2f}{row['hcd_s']:>12.2f}{row['plain_bytes'] / 1e6:>10.0f}"
            f"{row['hcd_bytes'] / 1e6:>9.0f}{whole}",
            flush=True,
        )
    first, last = rows[-2], rows[-1]
    tiled = last["tiles"] / first["tiles"]
    bars = [
        Bar(f"rescale.{w}_time_a_tile", last[f"{w}_s"] / first[f"{w}_s"] / tiled, 1.2, "<=") for w in ("plain", "hcd")
    ]
    more = last["side"] ** 2 - first["side"] ** 2
    bars += [
        Bar(f"rescale.{w}_bytes_a_pixel", (last[f"{w}_bytes"] - first[f"{w}_bytes"]) / more, BYTES, "<=")
        for w in ("plain", "hcd")
    ]
    points = {w: [(r["side"] ** 2 / 1e6, r[f"{w}_s"]) for r in rows] for w in ("plain", "hcd")}
    drawn = charts.lines(
        [
            charts.Series("HCD, one step of each", points["hcd"], "large"),
            charts.Series("plain, down and up", points["plain"]),
        ],
        "million pixels", "seconds", dots=True,
    )  # fmt: skip
    status = finish("rescale_cost", {"tile": tile, "sizes": rows}, bars, args, seeds=[0])
    head, body = drawn.split(">", 1)
    alone = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"')
    (args.out / "rescale_cost.svg").write_text(f"{alone}>{STYLE}{body}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
