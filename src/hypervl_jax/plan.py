"""The vision plan: what becomes of a picture, decided from its size alone.

Train, generate, serve, evaluate, export and the phone all read the same `VisionPlan`, so the grid, the padding, the
number of visual tokens and the map back to original pixels can never disagree (papers: HyperVL 3.1, AnyRes; InternVL
`dynamic_preprocess`; LLaVA-NeXT `anyres`).

Axis letters: N tiles (thumbnail included), P patches a tile. Sizes are (height, width) in pixels; points are (x, y).
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32

from hypervl_jax.config import ConfigError, PlanPolicy, VitConfig, from_dict, to_dict

JSON_VERSION = 1
_MAX_SIDE = 1 << 20  # pixels; far beyond any picture, small enough that products stay exact in a float64
_MAX_TILES = 4096  # far beyond any grid: a typing slip in a settings file
MAX_GRID = 8  # rows and columns a grid may have: those that have markers in the text


class PlanError(ValueError):
    """A size, ratio, point or JSON text no plan can be made of; the message says what is accepted."""


class Tile(NamedTuple):
    """One T x T tile: (row, col) in the grid, (-1, -1) for the thumbnail; the rectangle of real pixels inside it."""

    row: int
    col: int
    top: int
    left: int
    height: int
    width: int

    @property
    def is_thumbnail(self) -> bool:
        return self.row < 0


@dataclass(frozen=True)
class VisionPlan:
    """How one picture is seen. A value: hashable, comparable, JSON; made by `make`, never by hand.

    The picture of `size` is resized to `resized` (area `ratio`, tile cap and grid applied) and laid at `offset`
    (top, left) on a black canvas of `grid` (rows, cols) tiles, cut row-major into `tiles`. `thumb` is the size of the
    whole picture inside the last tile, the thumbnail, or None where one tile shows everything.
    """

    size: tuple[int, int]
    ratio: float
    resized: tuple[int, int]
    grid: tuple[int, int]
    offset: tuple[int, int]
    tiles: tuple[Tile, ...]
    policy: PlanPolicy
    thumb: tuple[int, int] | None

    # --- tokens ------------------------------------------------------------------------------------------------------

    @property
    def n_tiles(self) -> int:
        """N: tiles the ViT encodes, thumbnail included."""
        return len(self.tiles)

    @property
    def tokens(self) -> int:
        """Visual tokens the decoder sees: the sum of `tokens_of` (text markers are not counted here)."""
        return sum(map(self.tokens_of, range(self.n_tiles)))

    def tokens_of(self, i: int) -> int:
        """Visual tokens of tile i."""
        rows, cols = self._kept(i)
        return len(rows) * len(cols)

    def cells(self, i: int) -> Int32[np.ndarray, " m"]:
        """Indices of the cells of tile i that become tokens, row-major in its cells_per_side x cells_per_side grid.

        With `drop_pad` these are the cells that touch real pixels. The thumbnail keeps all of its cells: its cost is a
        constant, one tile, whatever the picture (papers: HyperVL notes, table of sequence lengths).
        """
        rows, cols = (np.asarray(axis, np.int32) for axis in self._kept(i))
        return (rows[:, None] * np.int32(self.policy.cells_per_side) + cols).reshape(-1)

    def patch_mask(self) -> Bool[np.ndarray, "N P"]:
        """True where a ViT patch touches real pixels: the keys that may be attended to."""
        side = self.policy.patches_per_side
        mask = np.zeros((self.n_tiles, side, side), np.bool_)
        for m, tile in zip(mask, self.tiles, strict=True):
            rows, cols = _touched(tile, self.policy.patch)
            m[rows.start : rows.stop, cols.start : cols.stop] = True
        return mask.reshape(self.n_tiles, -1)

    def _kept(self, i: int) -> tuple[range, range]:
        """Rows and columns of cells of tile i that become tokens."""
        if self.policy.drop_pad and not self.tiles[i].is_thumbnail:
            return _touched(self.tiles[i], self.policy.cell)
        every = range(self.policy.cells_per_side)
        return every, every

    def summary(self) -> str:
        """How the picture is seen, for people."""
        tiles, (h, w) = "1 tile" if self.n_tiles == 1 else f"{self.n_tiles} tiles", self.size
        return f"{w} x {h} px at ratio {self.ratio:.2f}, {tiles}, {self.tokens} visual tokens"

    def vit_flops(self, vit: VitConfig) -> int:
        """FLOPs (two a multiply-add) to encode N tiles: whole tiles, padding and thumbnail included, no projector."""
        p, d = vit.patches, vit.width
        block = 2 * (4 * d * d + 2 * d * vit.mlp) + 4 * p * d
        return self.n_tiles * p * (block * vit.depth + 2 * 3 * vit.patch**2 * d)

    # --- coordinates -------------------------------------------------------------------------------------------------

    def to_text(self, points: Sequence[SupportsFloat], coords: int = 1000) -> tuple[int, ...]:
        """Pixels of the original picture (x, y) or a box (x0, y0, x1, y1) -> integers 0 .. coords - 1.

        Text coordinates are relative to the whole original picture, so they do not change with the ratio or the grid.
        Raises `PlanError` for a point outside the picture.
        """
        out = []
        for p, side in self._each(points):
            if not 0 <= p <= side:
                raise PlanError(f"{p:g} lies outside the picture, 0 to {side} px; clip points and boxes to it first")
            out.append(min(math.floor(p * coords / side), coords - 1))
        return tuple(out)

    def to_pixels(self, points: Sequence[SupportsFloat], coords: int = 1000) -> tuple[float, ...]:
        """Integers 0 .. coords - 1 as written in the text -> pixels of the original picture (centres of grid cells).

        Raises `PlanError` for a number off the grid.
        """
        out = []
        for p, side in self._each(points):
            if not 0 <= p < coords:
                raise PlanError(f"{p:g} is not a coordinate of this text: they run from 0 to {coords - 1}")
            out.append((p + 0.5) * side / coords)
        return tuple(out)

    def pixels_to_canvas(self, points: Sequence[SupportsFloat]) -> tuple[float, ...]:
        """Pixels of the original picture -> pixels of the model's canvas (pixel edges map to pixel edges)."""
        (h, w), (rh, rw), (top, left) = self.size, self.resized, self.offset
        scale, shift = (rw / w, rh / h), (left, top)
        return tuple(p * scale[i % 2] + shift[i % 2] for i, (p, _) in enumerate(self._each(points)))

    def canvas_to_pixels(self, points: Sequence[SupportsFloat]) -> tuple[float, ...]:
        """The inverse of `pixels_to_canvas`."""
        (h, w), (rh, rw), (top, left) = self.size, self.resized, self.offset
        scale, shift = (w / rw, h / rh), (left, top)
        return tuple((p - shift[i % 2]) * scale[i % 2] for i, (p, _) in enumerate(self._each(points)))

    def _each(self, points: Sequence[SupportsFloat]) -> Iterator[tuple[float, int]]:
        """Every number of x, y, x, y ... with the side of the picture it runs along."""
        if len(points) % 2 or not points:
            raise PlanError(f"expected (x, y) or (x0, y0, x1, y1), found {len(points)} numbers")
        height, width = self.size
        for i, p in enumerate(points):
            try:
                value = float(p)
            except OverflowError:  # an integer of hundreds of digits, as a model may write one
                value = math.inf
            if not math.isfinite(value):
                raise PlanError("a coordinate must be a finite number")
            yield value, height if i % 2 else width

    # --- JSON --------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """One line of JSON: every field, and the tokens of every tile for readers in other languages."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tokens = [self.tokens_of(i) for i in range(self.n_tiles)]
        fields |= {"version": JSON_VERSION, "policy": to_dict(self.policy), "tokens": tokens}
        return json.dumps(fields, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> VisionPlan:
        """The inverse of `to_json`, strict: the plan is made again and must equal the text in every field.

        Raises `PlanError` for anything else, so an edited plan can not smuggle in a grid its own policy would not make.
        """
        try:
            found = json.loads(text, object_pairs_hook=_no_duplicates)
            if type(found["ratio"]) not in (int, float) or any(type(side) is not int for side in found["size"]):
                raise TypeError
            plan = make(found["size"], found["ratio"], from_dict(PlanPolicy, found["policy"], "policy"))
        except (ConfigError, PlanError) as e:
            raise PlanError(f"not a vision plan: {e}") from e
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as e:
            raise PlanError("not a vision plan: expected the JSON text that VisionPlan.to_json writes") from e
        found["ratio"] = plan.ratio  # 1 and 1.0 are the same number to other languages' writers
        wanted = json.loads(plan.to_json())
        if wrong := [k for k in sorted(found | wanted) if _canonical(found.get(k)) != _canonical(wanted.get(k))]:
            raise PlanError(f"not the plan of its size, ratio and policy: {', '.join(wrong)} differ; make it again")
        return plan


def make(size: Sequence[SupportsIndex], ratio: SupportsFloat = 1.0, policy: PlanPolicy | None = None) -> VisionPlan:
    """The plan of a picture of `size` (height, width) shrunk to the area ratio `ratio`; the default policy if None.

    `native_pad` keeps the picture's own size (never larger, smaller only by the ratio and the tile cap) and pads at the
    right and bottom; `grid_match` stretches it to the grid of nearest aspect (InternVL); `grid_pad` fits it, centred,
    into the grid that keeps most of its pixels and wastes least (LLaVA-NeXT). No grid has more than `max_tiles` tiles,
    or more than `MAX_GRID` rows or columns: a long scrolled screenshot is shrunk.
    Raises `PlanError` for a size that is not two positive integers or a ratio outside (0, 1].
    """
    policy = policy or PlanPolicy()
    h, w = _checked_size(size)
    ratio = _checked_ratio(ratio)
    if min(policy.tile, policy.patch, policy.merge) < 1 or policy.max_tiles > _MAX_TILES:
        raise PlanError(f"tile, patch and merge must be at least 1 and max_tiles at most {_MAX_TILES}; found {policy}")
    choose = {"native_pad": _native_pad, "grid_match": _grid_match, "grid_pad": _grid_pad}[policy.mode]
    resized, grid = choose((h, w), math.sqrt(ratio), policy)
    t, (rows, cols) = policy.tile, grid
    centred = policy.mode == "grid_pad"
    top, left = ((rows * t - resized[0]) // 2, (cols * t - resized[1]) // 2) if centred else (0, 0)

    tiles = []
    for row in range(rows):
        for col in range(cols):
            y, y1 = _overlap(top, resized[0], row * t, t)
            x, x1 = _overlap(left, resized[1], col * t, t)
            tiles.append(Tile(row, col, y, x, y1 - y, x1 - x))
    thumb = None
    if policy.thumbnail and rows * cols > 1:
        stretched = policy.mode == "grid_match"  # as its tiles are
        th, tw = thumb = (t, t) if stretched else _shrunk(resized, t / max(resized))
        tiles.append(Tile(-1, -1, (t - th) // 2 if centred else 0, (t - tw) // 2 if centred else 0, th, tw))
    return VisionPlan((h, w), ratio, resized, grid, (top, left), tuple(tiles), policy, thumb)


# --- the three ways to choose a grid: (height, width), side ratio -> (resized, (rows, cols)) --------------------------

_Pair = tuple[int, int]


def _native_pad(size: _Pair, scale: float, policy: PlanPolicy) -> tuple[_Pair, _Pair]:
    """Its own size; over the cap, shrunk to the cap's area and on in 2 % steps until the grid fits."""
    resized = _shrunk(size, scale, policy.min_side)
    scale *= min(1.0, policy.tile * math.sqrt(policy.max_tiles / math.prod(resized)))
    while math.prod(_covered(resized, policy)) > policy.max_tiles or max(_covered(resized, policy)) > MAX_GRID:
        resized = _shrunk(size, scale, min(policy.min_side, policy.tile))  # so that one tile can always be reached
        scale *= 0.98
    return resized, _covered(resized, policy)


def _covered(size: _Pair, policy: PlanPolicy) -> _Pair:
    """The grid of tiles that a size takes."""
    return -(-size[0] // policy.tile), -(-size[1] // policy.tile)


def _grid_match(size: _Pair, scale: float, policy: PlanPolicy) -> tuple[_Pair, _Pair]:
    """The grid whose cols / rows is nearest to width / height; of equal ones the largest the picture can half fill."""
    (h, w), t = _shrunk(size, scale, policy.min_side), policy.tile
    best, best_error = (1, 1), (math.inf, 1)
    for r, c in _grids(policy.max_tiles):
        error = abs(w * r - h * c), r  # |w/h - c/r| * h as a fraction: exact, so ties are ties everywhere
        left, right = error[0] * best_error[1], best_error[0] * error[1]
        if left < right or (left == right and 2 * w * h > t * t * r * c):
            best, best_error = (r, c), error
    return (best[0] * t, best[1] * t), best


def _grid_pad(size: _Pair, scale: float, policy: PlanPolicy) -> tuple[_Pair, _Pair]:
    """The grid in which the fitted picture keeps most of its pixels; of equal ones the one with the least padding."""
    (h, w), t = _shrunk(size, scale, policy.min_side), policy.tile

    def score(grid: _Pair) -> tuple[int, int]:
        height, width = grid[0] * t, grid[1] * t
        fitted = width * (h * width // w) if width * h <= height * w else height * (w * height // h)
        return min(fitted, h * w), -height * width

    best = max(_grids(policy.max_tiles), key=score)
    height, width = best[0] * t, best[1] * t
    if width * h <= height * w:
        return (min(-(-h * width // w), height), width), best
    return (height, min(-(-w * height // h), width)), best


def _grids(max_tiles: int) -> list[_Pair]:
    """Every (rows, cols) of at most max_tiles tiles and MAX_GRID a side, smallest first."""
    side = range(1, MAX_GRID + 1)
    grids = [(r, c) for r in side for c in side if r * c <= max_tiles]
    return sorted(grids, key=lambda g: (g[0] * g[1], g[1]))


# --- small parts ------------------------------------------------------------------------------------------------------


def _shrunk(size: _Pair, scale: float, floor: int = 1) -> _Pair:
    """size * scale to the nearest pixel, half up as on the phone; no side grows, or shrinks below `floor`."""
    h, w = (min(side, max(floor, math.floor(side * scale + 0.5))) for side in size)
    return h, w


def _overlap(start: int, length: int, tile_start: int, t: int) -> tuple[int, int]:
    """The part of [start, start + length) inside a tile, in the tile's own coordinates; (0, 0) if empty."""
    a, b = max(start - tile_start, 0), min(start + length - tile_start, t)
    return (a, b) if a < b else (0, 0)


def _touched(tile: Tile, unit: int) -> tuple[range, range]:
    """Rows and columns of `unit`-sized squares that touch the tile's real pixels."""
    if not (tile.height and tile.width):
        return range(0), range(0)
    bottom, right = tile.top + tile.height, tile.left + tile.width
    return range(tile.top // unit, -(-bottom // unit)), range(tile.left // unit, -(-right // unit))


def _checked_size(size: Sequence[SupportsIndex]) -> _Pair:
    try:
        h, w = (operator.index(s) for s in size)
    except (TypeError, ValueError):
        raise PlanError(f"a size is two whole numbers of pixels, (height, width); found {size!r}") from None
    if not (1 <= h <= _MAX_SIDE and 1 <= w <= _MAX_SIDE):
        raise PlanError(f"a picture of {h} x {w} pixels can not be planned; sides run from 1 to {_MAX_SIDE}")
    return h, w


def _checked_ratio(ratio: SupportsFloat) -> float:
    try:
        value = float(ratio)
    except (TypeError, ValueError, OverflowError):
        raise PlanError(f"a ratio is a number in (0, 1], found {ratio!r}") from None
    if not 0 < value <= 1:
        raise PlanError(f"a ratio is an area ratio in (0, 1], found {value}; pictures are never enlarged by it")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) != len(pairs):
        raise PlanError("a key appears twice")
    return dict(pairs)


def _canonical(value: Any) -> str:
    """JSON text as the yardstick of equality: Python's own == takes True for 1."""
    return json.dumps(value, sort_keys=True)
