"""Pictures of any size through a pair, tile by tile: memory of the networks does not grow with the picture.

Tiles are of one size, so each function compiles one program a shape, and lie inside the picture, so its border is what
the networks see at its border. They overlap, and each pixel is taken from the tile in which it lies deepest. HCD goes
the same way: what is put together of tiles is the gradient, so norms, budgets and results are those of the whole
picture. A picture of at most a tile is one tile. Host side: u8 in, u8 out.
Axes: H W picture, h w small picture.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from hypervl_jax.rescale import hcd
from hypervl_jax.rescale.hcd import HcdConfig, HCDResult, Scene
from hypervl_jax.rescale.pairs import Pair, keys, quantise, shrunk

TILE = 384  # pixels a side of the large picture
OVERLAP = 64  # of two tiles, likewise
LEAST = 2 * OVERLAP  # the smallest tile
Tick = Callable[[], Any]  # called after every tile


class Tile(NamedTuple):
    """Where a tile lies in the small picture, and the part of it that is kept: (first, after the last)."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    kept_rows: tuple[int, int]
    kept_columns: tuple[int, int]

    def read(self, scale: int) -> tuple[slice, slice]:
        """The tile in a picture of `scale` times the small one."""
        return _slice(self.rows, scale), _slice(self.columns, scale)

    def written(self, scale: int) -> tuple[slice, slice]:
        """The part that is kept, in that picture."""
        return _slice(self.kept_rows, scale), _slice(self.kept_columns, scale)

    def kept(self, scale: int) -> tuple[slice, slice]:
        """The part that is kept, in the tile."""
        return _slice(self.kept_rows, scale, self.rows[0]), _slice(self.kept_columns, scale, self.columns[0])


def grid(size: tuple[int, int], scale: int, tile: int = TILE) -> list[Tile]:
    """The tiles over a small picture of (height, width); `tile` is of the large one, and rounded down to whole pixels
    of the small one. Raises `ValueError` for a tile that is mostly overlap."""
    if tile < LEAST:
        raise ValueError(f"tiles of {tile} px: at least {LEAST}, for {OVERLAP} of them overlap")
    rows, columns = (_along(n, tile // scale, -(-OVERLAP // scale)) for n in size)
    return [Tile(r, c, keep_r, keep_c) for (r, keep_r), (c, keep_c) in itertools.product(rows, columns)]


def _along(size: int, tile: int, overlap: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """[(tile, what is kept of it)] along one side: evenly placed, cut in the middle of what two share."""
    if size <= tile:
        return [((0, size), (0, size))]
    n = -(-(size - overlap) // (tile - overlap))
    starts = [(size - tile) * i // (n - 1) for i in range(n)]
    cuts = [0, *((a + tile + b) // 2 for a, b in itertools.pairwise(starts)), size]
    return [((s, s + tile), cut) for s, cut in zip(starts, itertools.pairwise(cuts), strict=True)]


def _slice(ends: tuple[int, int], scale: int, origin: int = 0) -> slice:
    return slice((ends[0] - origin) * scale, (ends[1] - origin) * scale)


def down(
    pair: Pair, hr: UInt8[np.ndarray, "H W 3"], tile: int = TILE, tick: Tick = lambda: None
) -> UInt8[np.ndarray, "h w 3"]:
    """The plain small picture. Raises `ValueError` where sides are no multiples of the pair's scale."""
    s = whole_scale(pair)
    size = shrunk(hr[None], s)
    out = np.empty((*size, 3), np.uint8)
    for t in grid(size, s, tile):
        out[t.written(1)] = np.asarray(_down(pair, hr[t.read(s)][None]))[0][t.kept(1)]
        tick()
    return out


def up(
    pair: Pair, lr: UInt8[np.ndarray, "h w 3"], key: Array | None = None, tile: int = TILE, tick: Tick = lambda: None
) -> UInt8[np.ndarray, "H W 3"]:
    """The restored picture. What the weights do not know is drawn from `key` (default: seed 0), for each tile anew."""
    s, key = whole_scale(pair), jax.random.key(0) if key is None else key
    out = np.empty((lr.shape[0] * s, lr.shape[1] * s, 3), np.uint8)
    for n, t in enumerate(grid(lr.shape[:2], s, tile)):  # type: ignore
        part = _up(pair, lr[t.read(1)][None], _of_tile(keys(key, 1), n))
        out[t.written(s)] = np.asarray(part)[0][t.kept(s)]
        tick()
    return out


def descend(
    pair: Pair,
    hr: UInt8[np.ndarray, "H W 3"],
    config: HcdConfig,
    key: Array | None = None,
    tile: int = TILE,
    tick: Tick = lambda: None,
) -> UInt8[np.ndarray, "h w 3"]:
    """The small picture by HCD. A step is a walk over the tiles, so losses are means over tiles, each pixel as often
    as tiles hold it; everything else is `hcd.descend`. Raises `ValueError` as `down` does."""
    s = whole_scale(pair)
    tiles = grid(shrunk(hr[None], s), s, tile)
    x = jnp.asarray(hr[None], jnp.float32) / 255
    found: HCDResult = hcd.descend(pair, x, config, key, passes=_passes(tiles, s, tick))
    return _bytes_of(np.asarray(found.lr)[0])


def steps(config: HcdConfig) -> int:
    """How often `descend` walks over all tiles, the one in which the picture is shrunk among them."""
    loops = ((config.hr_steps, config.hr), (config.lr_steps, config.lr))
    return 1 + sum(n + (how.keep == "best") for n, how in loops if n)


def seconds(pair: Pair, size: tuple[int, int], config: HcdConfig, tile: int = TILE) -> float:
    """What `descend` of a small picture of (height, width) will take, from one look of each loop at one tile. Compiles
    what `descend` needs."""
    s = whole_scale(pair)
    tiles = grid(size, s, tile)
    h, w = (b - a for a, b in (tiles[0].rows, tiles[0].columns))
    rng, key = np.random.default_rng(0), keys(jax.random.key(0), 1)
    lr, hr = (jnp.asarray(rng.random((1, n * h, n * w, 3)), jnp.float32) for n in (1, s))
    total = 0.0
    for which, n, base in (("hr", config.hr_steps, hr), ("lr", config.lr_steps, lr)):
        if n:
            scene, one = Scene(pair, base, hr, jnp.float32(1), key), hcd.step_of(config, which)
            for _ in range(2):  # the first compiles
                begun = time.perf_counter()
                jax.block_until_ready(hcd.WHOLE.look(scene, one, which, jnp.zeros_like(base), 0))
                took = time.perf_counter() - begun
            total += n * len(tiles) * took
    return total


def whole_scale(pair: Pair) -> int:
    """The pair's scale, by which sides can be counted. Raises `ValueError` where it is not whole."""
    if int(pair.scale) != pair.scale:
        raise ValueError(f"{pair.net} rescales by {pair.scale:g}: tiles need a whole number")
    return int(pair.scale)


# --- the networks over one tile, and HCD over all --------------------------------------------------------------------


@jax.jit
def _down(pair: Pair, hr: Array) -> Array:
    return _bits(pair.down(hr.astype(jnp.float32) / 255))


@jax.jit
def _up(pair: Pair, lr: Array, key: Array) -> Array:
    return _bits(pair.up(lr.astype(jnp.float32) / 255, key))


@jax.jit
def _shrink(pair: Pair, hr: Array) -> Array:
    return quantise(pair.down(hr))


def _bits(x: Array) -> Array:
    return jnp.round(255 * jnp.clip(x, 0, 1)).astype(jnp.uint8)


def _bytes_of(x: np.ndarray) -> np.ndarray:
    return np.rint(255 * x).astype(np.uint8)


@jax.jit
def _of_tile(key: Array, n: Array | int) -> Array:
    """The keys of tile `n`."""
    return jax.vmap(lambda k: jax.random.fold_in(k, n))(key)


def _passes(tiles: list[Tile], scale: int, tick: Tick) -> hcd.Passes:
    """How HCD looks at one picture [1 H W 3] tile by tile. Arrays of the whole picture stay on the host."""

    def look(scene: Scene, config: HcdConfig, which: str, delta: Array, i: Array | int) -> tuple[Array, Array]:
        s = scale if which == "hr" else 1
        base, moved, target = (np.asarray(x)[0] for x in (scene.base, delta, scene.target))
        grad, losses = np.empty_like(base), []
        for n, t in enumerate(tiles):
            at = t.read(s)
            part = Scene(scene.pair, base[at][None], target[t.read(scale)][None], scene.size, _of_tile(scene.key, n))
            loss, slope = hcd.WHOLE.look(part, config, which, moved[at][None], i)
            grad[t.written(s)] = np.asarray(slope)[0][t.kept(s)] / len(tiles)
            losses.append(loss)
            tick()
        return jnp.mean(jnp.stack(losses), 0), jnp.asarray(grad[None])

    def shrink(pair: Pair, hr: Array) -> Array:
        whole = np.asarray(hr)[0]
        out = np.empty((whole.shape[0] // scale, whole.shape[1] // scale, 3), np.float32)
        for t in tiles:
            out[t.written(1)] = np.asarray(_shrink(pair, whole[t.read(scale)][None]))[0][t.kept(1)]
            tick()
        return jnp.asarray(out[None])

    return hcd.Passes(look, shrink)
