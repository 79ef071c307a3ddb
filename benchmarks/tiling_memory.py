"""Memory and time of the vision encoder over picture size: serial tiles (HyperVL 3.1) against other ways.

Five ways to encode a square picture of 1 to 36 tiles with the same encoder, Base and Large, at the paper's sizes
(tiles of 512 px, f32), and with --quick at those of nano:

  serial   `hypervl.encode_tiles`: one program, a loop over the tiles
  batched  `hypervl.encode_batch`: the same features, all tiles at once
  flash    one tile as large as the picture, global attention in blocks of scores (`layers.cpu_attention`, what `serial`
           has on a CPU): of what grows with the square of the picture, a byte of mask a pair of patches is left
  chunked  the same picture, its attention one tile's worth of queries at a time
  whole    the same, all scores at once

Working memory is what the compiler reserves beside arguments and result (weights, picture and features apart), with
every intermediate array a buffer (`hypervl_jax.bench`); nothing runs, so no size is too large to be asked about.

To 1,536 px every way also runs, in a process of its own with random weights: the peak of its resident memory above what
was resident before, features apart, and its seconds. Runs are compiled as users have them: XLA's CPU backend then fuses
the attention of some sizes, so `whole` may take less than the analysis says. Beside working memory the peak holds what
the libraries below XLA and the allocator keep for themselves, 3 to 13 MB from one run to the next, so the bar of serial
tiles is wider there: flat within a quarter, while the tiles become nine times as many. A way that by analysis does not
fit into the memory that is free is left out. `--analysis` runs nothing: minutes, on any machine.

A loop in a program may hold one copy of the array it loops over. XLA makes none here: it slices the u8 tiles where they
lie and turns one at a time into floats. Should a release make one, it is subtracted from `serial`, and the column
`copies` says so.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from common import Bar, arguments, finish
from einops import rearrange

from hypervl_jax import bench, presets
from hypervl_jax.config import BRANCHES, Branch, ModelConfig
from hypervl_jax.model import hypervl, layers, vit

WAYS = ("serial", "batched", "flash", "chunked", "whole")
ACROSS, RUN = (1, 2, 3, 4, 5, 6), (1, 2, 3)  # tiles a side of the picture: analysed, and run
FLAT, RUN_FLAT = 0.95, 0.85  # smallest over largest, of the analysis and of runs
LONG = 20  # seconds from which on one run is enough: what only the first one does is a small part of it
SPARE = 2e9  # bytes of a process beside weights and working memory

Row = dict[str, Any]


def in_query_chunks(size: int) -> Callable:
    """`layers.attention` over `size` queries at a time: the same numbers, no square matrix."""

    def attention(q, k, v, mask):
        parts = rearrange(q, "b h (n c) d -> n b h c d", c=size)
        parts = jax.lax.map(lambda part: layers.attention(part, k, v, mask), parts)
        return rearrange(parts, "n b h c d -> b h (n c) d")

    return attention


def encoder(cfg: ModelConfig, branch: Branch, way: str, across: int) -> tuple[Callable, tuple]:
    """One way to encode a picture `across` tiles wide, and what it takes as shapes: weights, u8 tiles, patch mask."""
    n, queries = across * across, cfg.vit(branch).patches
    if way in ("flash", "chunked", "whole"):
        cfg, n = bench.as_one_tile(cfg, across * cfg.policy.tile), 1
    encode = hypervl.encode_tiles if way in ("serial", "flash") else hypervl.encode_batch
    attend = in_query_chunks(queries) if way == "chunked" else layers.attention

    def run(params, tiles, mask):
        with mock.patch.object(vit.Block, "attend", staticmethod(attend)):
            return encode(params, cfg, branch, tiles, mask)

    return run, bench.encoder_shapes(cfg, branch, n)


def over_serial(found: dict[str, int | None]) -> dict[str, float | None]:
    return {way: n and found["serial"] and n / found["serial"] for way, n in found.items() if way != "serial"}


# --- by the compiler's account ---------------------------------------------------------------------------------------


def analyse(cfg: ModelConfig, branch: Branch, across: Sequence[int]) -> list[Row]:
    """Temporary bytes of every way, a row a size."""
    rows = []
    for n in across:
        found = {}
        for way in WAYS:
            run, shapes = encoder(cfg, branch, way, n)
            found[way] = bench.temporary_bytes(run, *shapes)
        rows.append({"side": n * cfg.policy.tile, "tiles": n * n, "bytes": found})
    first, last = rows[0], rows[-1]
    a_tile = cfg.policy.tile**2 * 3
    growth = (last["bytes"]["serial"] - first["bytes"]["serial"]) / (last["tiles"] - first["tiles"]) / a_tile
    for row in rows:
        row["copies"] = int(growth > 0.5)
        row["bytes"]["serial"] -= row["copies"] * row["tiles"] * a_tile
        row["over_serial"] = over_serial(row["bytes"])
    return rows


# --- run -------------------------------------------------------------------------------------------------------------


def measure(cfg: ModelConfig, branch: Branch, way: str, across: int) -> tuple[int, float]:
    """(bytes by which the peak resident memory exceeds what was resident before, features apart; seconds). Linux only.

    Memory is that of the first run; timed is the second, and the first where that took `LONG`.
    """
    run, shapes = encoder(cfg, branch, way, across)
    program = jax.jit(run).lower(*shapes).compile()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape, np.float32)), shapes[0])
    tiles = jnp.asarray(rng.integers(0, 256, shapes[1].shape, np.uint8))
    given = jax.block_until_ready((params, tiles, jnp.ones(shapes[2].shape, bool)))

    def timed() -> tuple[float, int]:
        start = time.perf_counter()
        features = jax.block_until_ready(program(*given))
        return time.perf_counter() - start, features.nbytes

    ctypes.CDLL(None).malloc_trim(0)  # what compiling left free would hide as much of the run
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = kilobytes("/proc/self/status", "VmRSS")
    seconds, features = timed()
    peak = kilobytes("/proc/self/status", "VmHWM")  # of one run: the allocator keeps the features of the last one
    if seconds < LONG:
        seconds, _ = timed()
    return peak - before - features, seconds


def kilobytes(path: str, field: str) -> int:
    """Bytes that Linux tells in kB: VmRSS, VmHWM of a process, MemAvailable of the machine."""
    return next(int(line.split()[1]) * 1024 for line in Path(path).read_text().splitlines() if line.startswith(field))


def measured(cfg: ModelConfig, branch: Branch, analysed: Sequence[Row]) -> list[Row]:
    """`measure` of every way, each in a fresh process; None where it does not fit."""
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(bench.encoder_shapes(cfg, branch, 1)[0]))
    fresh = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    rows = []
    with fresh as pool:
        for row in analysed:
            n, found = row["side"] // cfg.policy.tile, {}
            for way in WAYS:
                fits = row["bytes"][way] + weights + SPARE < kilobytes("/proc/meminfo", "MemAvailable")
                found[way] = pool.submit(measure, cfg, branch, way, n).result() if fits else (None, None)
            peaks, seconds = ({way: pair[i] for way, pair in found.items()} for i in (0, 1))
            size = {"side": row["side"], "tiles": row["tiles"]}
            rows.append(size | {"bytes": peaks, "seconds": seconds, "over_serial": over_serial(peaks)})
    return rows


# --- said ------------------------------------------------------------------------------------------------------------


def table(title: str, rows: Sequence[Row], key: str, unit: float, ratios: bool = True) -> None:
    """`key` of every way in `unit`s, a line a size, then the others over serial tiles; `-` for what was left out."""
    others = WAYS[1:] if ratios else ()
    copies = "copies" in rows[0]
    heads = [f"{way:>12}" for way in WAYS] + [f"{way + '/s.':>12}" for way in others] + ["  copies"] * copies
    print(f"\n{title}\n{'side':>6}{'tiles':>6}" + "".join(heads))
    for row in rows:
        cells = [row[key][way] and row[key][way] / unit for way in WAYS] + [row["over_serial"][way] for way in others]
        said = "".join(f"{'-':>12}" if x is None else f"{x:>12,.2f}" for x in cells)
        print(f"{row['side']:>6}{row['tiles']:>6}{said}" + (f"{row['copies']:>8}" if copies else ""), flush=True)


def flat(rows: Sequence[Row]) -> float:
    """Smallest over largest of serial tiles over all sizes."""
    values = [row["bytes"]["serial"] for row in rows]
    return min(values) / max(values)


def bars(name: str, rows: Sequence[Row]) -> list[Bar]:
    """By analysis. Serial tiles are flat; the others grow, last over first, at least half as fast as the tiles, and the
    whole picture takes more than as many times the memory as it has tiles."""
    first, last = rows[0], rows[-1]
    more = last["tiles"] / first["tiles"]
    return [
        Bar(f"{name}.serial_flat", flat(rows), FLAT),
        *(Bar(f"{name}.{way}_grows", last["bytes"][way] / first["bytes"][way], more / 2) for way in WAYS[1:]),
        Bar(f"{name}.whole_over_serial", last["over_serial"]["whole"], more),
    ]


def run_bars(name: str, rows: Sequence[Row]) -> list[Bar]:
    """By runs: the same of the largest picture that fitted in memory as a whole."""
    last = [row for row in rows if row["over_serial"]["whole"]][-1]
    return [
        Bar(f"{name}.run_serial_flat", flat(rows), RUN_FLAT),
        Bar(f"{name}.run_whole_over_serial", last["over_serial"]["whole"], last["tiles"]),
    ]


def main() -> int:
    analysis = "by the compiler's account alone: nothing runs"
    args = arguments(__doc__, more=lambda parser: parser.add_argument("--analysis", action="store_true", help=analysis))
    name = "nano" if args.quick else "hypervl_1p7b"
    cfg, across = presets.preset(name).model, (2, 6) if args.quick else ACROSS
    runs = Path("/proc/self/clear_refs").exists() and not args.analysis
    metrics: dict[str, Any] = {"preset": name}
    checked = []
    for branch in BRANCHES:
        rows = analyse(cfg, branch, across)
        found = metrics[branch] = {"analysis": rows}
        table(f"{name}, {branch}: working memory by compiler analysis, MB", rows, "bytes", 1e6)
        checked += bars(branch, rows)
        if runs:
            rows = found["measured"] = measured(cfg, branch, rows[: 1 if args.quick else len(RUN)])
            table(f"{name}, {branch}: peak memory of a run above what was resident before, MB", rows, "bytes", 1e6)
            table(f"{name}, {branch}: time of a run, s", rows, "seconds", 1, ratios=False)
            checked += [] if args.quick else run_bars(branch, rows)  # nano's working memory is less than what varies
    return finish("tiling_memory", metrics, checked, args)


if __name__ == "__main__":
    sys.exit(main())
