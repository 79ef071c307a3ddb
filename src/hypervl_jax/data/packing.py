"""Conversations -> batches. Several stand in one row, each a segment of its own, so that little of a row is padding;
none is ever cut, and no picture of one. What makes up step s is a pure function of the seed, so to resume is to start
at s, on any number of hosts. Grain runs the loading in threads.

Axes: B rows, N tiles, T tile side, P patches a tile, L sequence, n records.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32
from tqdm import tqdm

from hypervl_jax import image, plan, text, tokens
from hypervl_jax.config import DataConfig, ModelConfig, PlanPolicy, TextConfig
from hypervl_jax.data.check import Ledger, Sizes, shown, too_much
from hypervl_jax.data.conversations import Conversation, DataError, Fault
from hypervl_jax.data.pipeline import Batch
from hypervl_jax.plan import VisionPlan
from hypervl_jax.tokens import Tokenizer

OPEN = 16  # rows of a bucket that may still grow; when there are more, the fullest is done


@runtime_checkable
class Source(Protocol):
    """Random access to conversations (`prepared.Records`), and how often an epoch shows each."""

    @property
    def repeat(self) -> float: ...
    def __getitem__(self, index: int) -> Conversation: ...
    def __len__(self) -> int: ...


class Measured(NamedTuple):
    """What packing has to know of a source."""

    words: Int32[np.ndarray, " n"]  # tokens besides those of pictures
    sizes: list[Sizes]
    usable: Int32[np.ndarray, " m"]  # records that fit a bucket at ratio 1
    repeat: float


class Item(NamedTuple):
    """One conversation in a row, its pictures at the area ratio `ratio`."""

    source: int
    index: int
    ratio: float


class Packed(NamedTuple):
    """One step: B rows of one bucket."""

    bucket: int
    rows: tuple[tuple[Item, ...], ...]


@functools.lru_cache(maxsize=65_536)
def _plan(size: tuple[int, int], ratio: float, policy: PlanPolicy) -> VisionPlan:
    return plan.make(size, ratio, policy)


def picture_tokens(p: VisionPlan, cfg: TextConfig, newline: int) -> int:
    """What one picture adds to a row: `text.visual_tokens` and what stands between and around them; a newline is
    `newline` tokens."""
    between = p.grid[0] * newline if cfg.layout == "rowcol" else 0
    return text.visual_tokens(p, cfg) + between + 2 + newline


def measure(
    sources: Sequence[Source],
    cfg: ModelConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    max_rate: float = 0.01,
    progress: bool = True,
) -> tuple[list[Measured], Ledger]:
    """Reads every record once. Those that fit no bucket of `data` go to the ledger, and are not trained on.

    Raises `DataError` where that is more than `max_rate` of them.
    """
    ledger, out, newline = Ledger(), [], len(tokenizer.encode("\n"))
    bar = tqdm(total=sum(map(len, sources)), desc="measure", disable=not progress, leave=False)
    for source in sources:
        words, sizes, usable = np.zeros(len(source), np.int32), [], []
        for i in range(len(source)):
            bar.update()
            c = source[i]
            sizes.append([p.size or _size(p.load()) for p in c.pictures])
            seen = shown(c, sizes[i], 1.0, cfg.policy, cfg.text, tokenizer)
            words[i] = len(seen.prompt.ids) - sum(picture_tokens(p, cfg.text, newline) for p in seen.plans)
            if much := too_much(len(seen.prompt.ids), seen.tiles, data):
                ledger.faults.append(Fault(c.file, c.line, *much))
            else:
                usable.append(i)
        out.append(Measured(words, sizes, np.array(usable, np.int32), source.repeat))
    bar.close()
    ledger.settle(sum(map(len, sources)), max_rate)
    return out, ledger


def _size(pixels: np.ndarray) -> tuple[int, int]:
    return pixels.shape[0], pixels.shape[1]


class _Row:
    """A row that is being filled."""

    def __init__(self):
        self.items: list[Item] = []
        self.tokens = self.tiles = 0

    def add(self, item: Item, tokens: int, tiles: int) -> None:
        self.items.append(item)
        self.tokens, self.tiles = self.tokens + tokens, self.tiles + tiles


def schedule(
    measured: Sequence[Measured], cfg: ModelConfig, data: DataConfig, newline: int, seed: int, steps: int
) -> list[Packed]:
    """The first `steps` batches. An epoch shows each source `repeat` times (its fraction by a draw), in a new order and
    at new random ratios. A conversation stands in the first row of its bucket, the smallest it fits, that has room for
    it whole; rows and batches that are not full at the end of an epoch are filled in the next.

    Raises `DataError` if there is nothing to show.
    """
    if not any(len(m.usable) for m in measured):
        raise DataError("there is no conversation to train on")
    rng, out = np.random.default_rng([seed, 3]), []
    growing: list[list[_Row]] = [[] for _ in data.lengths]
    done: list[list[tuple[Item, ...]]] = [[] for _ in data.lengths]

    def cost(item: Item) -> tuple[int, int]:
        m = measured[item.source]
        plans = [_plan(size, item.ratio, cfg.policy) for size in m.sizes[item.index]]
        seen = sum(picture_tokens(p, cfg.text, newline) for p in plans)
        return int(m.words[item.index]) + seen, sum(p.n_tiles for p in plans)

    while len(out) < steps:
        epoch = []
        for item in _epoch(measured, data, rng):
            tokens, tiles = cost(item)
            if too_much(tokens, tiles, data):  # a grid may grow as a picture shrinks; whole it fits
                item = item._replace(ratio=1.0)
                tokens, tiles = cost(item)
            shapes = list(zip(data.tile_buckets, data.lengths, strict=True))
            b = next(i for i, (n, length) in enumerate(shapes) if tiles <= n and tokens <= length)
            n, length = shapes[b]
            fits = (r for r in growing[b] if r.tokens + tokens <= length and r.tiles + tiles <= n)
            if (row := next(fits, None)) is None:
                growing[b].append(row := _Row())
            row.add(item, tokens, tiles)
            if row.tokens == length or len(growing[b]) > OPEN:
                full = row if row.tokens == length else max(growing[b], key=lambda r: r.tokens)
                growing[b].remove(full)
                done[b].append(tuple(full.items))
            if len(done[b]) == data.batch:
                epoch.append(Packed(b, tuple(done[b])))
                done[b] = []
        out += [epoch[j] for j in rng.permutation(len(epoch))]
    return out[:steps]


def _epoch(measured: Sequence[Measured], data: DataConfig, rng: np.random.Generator) -> Iterator[Item]:
    picked = []
    for s, m in enumerate(measured):
        whole, rest = int(m.repeat), int((m.repeat % 1) * len(m.usable) + rng.random())  # right on average
        indices = np.concatenate([np.tile(m.usable, whole), rng.permutation(m.usable)[:rest]])
        picked.append(np.stack([np.full(len(indices), s), indices], 1))
    items = np.concatenate(picked)
    shrink = rng.random(len(items)) < data.shrink_prob
    ratios = np.where(shrink, rng.uniform(data.shrink_min, 1, len(items)), 1.0)
    for i in rng.permutation(len(items)):
        yield Item(int(items[i, 0]), int(items[i, 1]), round(float(ratios[i]), 3))


def collate(
    rows: Sequence[Sequence[tuple[Conversation, float]]],
    cfg: ModelConfig,
    data: DataConfig,
    bucket: int,
    tokenizer: Tokenizer,
) -> Batch:
    """Rows of (conversation, ratio) in the shapes of `bucket`: the k-th conversation of a row, from 1, is segment k
    with positions from 0, so that it sees itself alone. No thing is named.

    Raises `TextError` or `DataError` for a row that does not fit, `ImageError` for a picture that cannot be decoded.
    """
    n, policy = data.tile_buckets[bucket], cfg.policy
    tiles = np.zeros((len(rows), n, policy.tile, policy.tile, 3), np.uint8)
    mask = np.zeros((len(rows), n, policy.patches_per_side**2), bool)
    prompts = []
    for b, row in enumerate(rows):
        used, written = 0, []
        for k, (c, ratio) in enumerate(row, 1):
            pixels = [p.load() for p in c.pictures]
            seen = shown(c, [_size(p) for p in pixels], ratio, policy, cfg.text, tokenizer)
            if used + seen.tiles > n:
                raise DataError(f"{c.file}:{c.line}: tile {used + seen.tiles} of a row that holds {n}")
            slots = np.where(seen.prompt.slots >= 0, seen.prompt.slots + used * policy.tokens_per_tile, -1)
            segments = np.full_like(seen.prompt.segments, k)
            written.append(seen.prompt._replace(slots=slots.astype(np.int32), segments=segments))
            for picture, p in zip(pixels, seen.plans, strict=True):
                tiles[b, used : used + p.n_tiles] = image.prepare(picture, p)
                mask[b, used : used + p.n_tiles] = p.patch_mask()
                used += p.n_tiles
        prompts.append(text.Prompt(*(np.concatenate(column) for column in zip(*written, strict=True))))
    names, words = (np.full((len(rows), 1, *more), -1, np.int32) for more in ((), (2,)))
    weights = np.zeros((len(rows), 1, n * policy.patches_per_side**2), np.float32)
    stacked = text.stack(prompts, data.lengths[bucket], tokenizer.special(tokens.PAD))
    return Batch(tiles, mask, *stacked, names, words, weights)


def batches(
    sources: Sequence[Source],
    specs: Sequence[Packed],
    cfg: ModelConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    start: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """The batches of `specs` from step `start`, loaded ahead in threads by Grain. Of each only `rows` are loaded; all
    if not given."""
    import grain.python as grain

    def load(spec: Packed) -> Batch:
        mine = spec.rows if rows is None else [spec.rows[i] for i in rows]
        some = [[(sources[i.source][i.index], i.ratio) for i in row] for row in mine]
        return collate(some, cfg, data, spec.bucket, tokenizer)

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=6)
    return iter(grain.MapDataset.source(specs[start:]).map(load).to_iter_dataset(options))
