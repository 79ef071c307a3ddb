"""Memory of the vision encoder over picture size: serial tiles (HyperVL 3.1) against the whole picture at once.

Four ways to encode a square picture of 4 to 36 tiles with the same Base encoder:

  serial   `hypervl.encode_tiles`: one program, a loop over the tiles
  host     a loop in Python over one compiled program of one tile
  whole    one tile as large as the picture, global attention
  chunked  the same, its attention one tile's worth of queries at a time

Working memory is what the compiler reserves beside arguments and result (weights, picture and features apart), with
every intermediate array a buffer (`hypervl_jax.bench`); nothing runs, so the paper's sizes need no memory. For nano the
peak resident memory of a real run is measured too, each in a process of its own: there XLA's CPU backend fuses the
attention of some sizes, so `whole` may grow less than the analysis says.

A loop in a program may hold one copy of the array it loops over. XLA makes none here: it slices the u8 tiles where they
lie and turns one at a time into floats. Should a release make one, it is subtracted from `serial`, and the column
`copies` says so.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from common import Bar, arguments, finish
from einops import rearrange

from hypervl_jax import bench, config, presets
from hypervl_jax.model import hypervl, layers, vit

ACROSS = (2, 3, 4, 5, 6)  # tiles a side of the picture
FLAT = 0.95  # smallest over largest: flat within 5 %


def in_query_chunks(size: int):
    """`layers.attention` over `size` queries at a time: the same numbers, no square matrix."""

    def attention(q, k, v, mask):
        parts = rearrange(q, "b h (n c) d -> n b h c d", c=size)
        parts = jax.lax.map(lambda part: layers.attention(part, k, v, mask), parts)
        return rearrange(parts, "n b h c d -> b h (n c) d")

    return attention


def chunked(cfg: config.ModelConfig, size: int):
    """The whole-picture encoder with its attention in chunks of `size` queries."""

    def encode(*args):
        with mock.patch.object(vit, "attention", in_query_chunks(size)):
            return hypervl.encode_batch(args[0], cfg, "base", *args[1:])

    return encode


def analyse(cfg: config.ModelConfig, across: tuple[int, ...]) -> list[dict]:
    """Temporary bytes of the four ways, by the compiler's account; u8 tiles as `image.prepare` cuts them."""
    one = bench.serial_bytes(cfg, 1)
    rows = []
    for n in across:
        whole = bench.as_one_tile(cfg, side := n * cfg.policy.tile)
        rows.append({
            "side": side,
            "tiles": n * n,
            "tile_bytes": n * n * cfg.policy.tile**2 * 3,
            "serial": bench.serial_bytes(cfg, n * n),
            "host": one,
            "whole": bench.whole_bytes(cfg, side),
            "chunked": bench.temporary_bytes(chunked(whole, cfg.base.patches), *bench.encoder_shapes(whole, "base", 1)),
        })  # fmt: skip
    first, last = rows[0], rows[-1]
    growth = (last["serial"] - first["serial"]) / (last["tile_bytes"] - first["tile_bytes"])
    for row in rows:
        row["copies"] = int(growth > 0.5)
        row["serial"] -= row["copies"] * row["tile_bytes"]
    return rows


def measure(way: str, across: int) -> float:
    """Bytes by which the peak resident memory of one run of nano exceeds what was resident before. Linux only."""
    cfg = presets.preset("nano").model
    tile, n = cfg.policy.tile, across * across
    if way in ("whole", "chunked"):
        cfg, n = bench.as_one_tile(cfg, across * tile), 1
    per_call = 1 if way == "host" else n
    encode = {
        "serial": lambda *a: hypervl.encode_tiles(a[0], cfg, "base", *a[1:]),
        "host": lambda *a: hypervl.encode_batch(a[0], cfg, "base", *a[1:]),
        "whole": lambda *a: hypervl.encode_batch(a[0], cfg, "base", *a[1:]),
        "chunked": chunked(cfg, tile**2 // cfg.policy.patch**2),
    }[way]
    shapes = bench.encoder_shapes(cfg, "base", per_call)
    program = jax.jit(encode).lower(*shapes).compile()
    weights, tiles, mask = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
    jax.block_until_ready((weights, tiles, mask))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    for _ in range(n // per_call):
        jax.block_until_ready(program(weights, tiles, mask))
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(across: tuple[int, ...]) -> list[dict]:
    """`measure` of the four ways, each in a fresh process."""
    fresh = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with fresh as pool:
        return [
            {"tiles": n * n} | {way: pool.submit(measure, way, n).result() for way in WAYS}
            for n in across
        ]  # fmt: skip


WAYS = ("serial", "host", "whole", "chunked")


def table(title: str, rows: list[dict]) -> None:
    """MB of 10^6 bytes."""
    print(
        f"\n{title}\n{'tiles':>6}" + "".join(f"{way:>12}" for way in WAYS) + ("  copies" if "copies" in rows[0] else "")
    )
    for row in rows:
        copies = f"{row['copies']:>8}" if "copies" in row else ""
        print(f"{row['tiles']:>6}" + "".join(f"{row[way] / 1e6:>12,.2f}" for way in WAYS) + copies, flush=True)


def bars(name: str, rows: list[dict]) -> list[Bar]:
    """Flat: smallest over largest of all sizes. Grows: last over first, at least half as fast as the tiles."""
    more = rows[-1]["tiles"] / rows[0]["tiles"]

    def flat(way):
        values = [row[way] for row in rows]
        return min(values) / max(values)

    return [
        Bar(f"{name}.serial_flat", flat("serial"), FLAT),
        *(Bar(f"{name}.{way}_grows", rows[-1][way] / rows[0][way], more / 2) for way in ("whole", "chunked")),
        Bar(f"{name}.whole_over_serial", rows[-1]["whole"] / rows[-1]["serial"], more),
    ]


def main() -> int:
    args = arguments(__doc__)
    across = (ACROSS[0], ACROSS[-1]) if args.quick else ACROSS
    metrics, checked = {}, []
    for name in ("hypervl_1p7b", "nano"):
        rows = metrics[name] = analyse(presets.preset(name).model, across)
        table(f"{name}, Base: working memory by compiler analysis, MB", rows)
        checked += bars(name, rows)
    if Path("/proc/self/clear_refs").exists():
        rows = metrics["nano_measured"] = measured(across)
        table("nano, Base: peak resident memory of a run above what was resident before, MB", rows)
    return finish("tiling_memory", metrics, checked, args)


if __name__ == "__main__":
    sys.exit(main())
