"""Screens -> batches. Which screens make up step s, and how far each is shrunk, is a pure function of the seed, so to
resume is to start at s. Grain runs the loading in threads.

Axes: B screens, N tiles, T tile side, P patches a tile, L sequence, K things.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from hypervl_jax import image, plan, text, tokens
from hypervl_jax.config import DataConfig, PlanPolicy, TextConfig
from hypervl_jax.data.screens import Screen, Thing
from hypervl_jax.plan import VisionPlan
from hypervl_jax.tokens import Tokenizer

DIGITS = tuple("0123456789")
Rows = Any  # numpy as it is loaded, traced in a step
LEGIBLE = 7  # pixels a side, as shown: smaller things are not asked for by the image-name term


@runtime_checkable
class Source(Protocol):
    """Random access to screens, and their (height, width) without decoding."""

    @property
    def sizes(self) -> np.ndarray: ...

    def __getitem__(self, index: int) -> Screen: ...
    def __len__(self) -> int: ...


class Batch(NamedTuple):
    """One step's worth. `names`, `words` and `weights` are the image-name term's: the class of each thing (-1: none),
    how its name begins, and the share of its box in each patch."""

    tiles: Rows  # u8[B N T T 3]
    mask: Rows  # bool[B N P], patches that touch real pixels
    ids: Rows  # i32[B L]
    slots: Rows  # i32[B L]
    loss: Rows  # bool[B L]
    positions: Rows  # i32[B L]
    segments: Rows  # i32[B L]
    names: Rows  # i32[B K]
    words: Rows  # i32[B K 2], the first token of the name, as an answer begins with it and inside a sentence
    weights: Rows  # f32[B K N*P]


class BatchSpec(NamedTuple):
    """Screens of one bucket, so that shapes come from a short list."""

    bucket: int
    indices: tuple[int, ...]
    ratios: tuple[float, ...]


@functools.lru_cache(maxsize=65_536)
def _plan(size: tuple[int, int], ratio: float, policy: PlanPolicy) -> VisionPlan:
    return plan.make(size, ratio, policy)


def bucket_of(tiles: int, cfg: DataConfig) -> int:
    """The first bucket that holds `tiles`. Raises `ValueError` naming the setting if none does."""
    for i, size in enumerate(cfg.tile_buckets):
        if tiles <= size:
            return i
    raise ValueError(f"a screen needs {tiles} tiles, data.tile_buckets end at {cfg.tile_buckets[-1]}")


def schedule(sizes: np.ndarray, cfg: DataConfig, policy: PlanPolicy, seed: int, steps: int) -> list[BatchSpec]:
    """The first `steps` batches. Each epoch is a new permutation with new random ratios, cut into batches within
    buckets; a bucket's remainder opens the next epoch."""
    if len(sizes) == 0:
        raise ValueError("the data set is empty")
    rng, out = np.random.default_rng([seed, 1]), []
    waiting: list[list[tuple[int, float]]] = [[] for _ in cfg.tile_buckets]
    while len(out) < steps:
        epoch = []
        shrink = rng.random(len(sizes)) < cfg.shrink_prob
        ratios = np.where(shrink, rng.uniform(cfg.shrink_min, 1, len(sizes)), 1.0)
        for i in rng.permutation(len(sizes)):
            ratio = round(float(ratios[i]), 3)
            b = bucket_of(_plan(tuple(map(int, sizes[i])), ratio, policy).n_tiles, cfg)
            waiting[b].append((int(i), ratio))
            if len(waiting[b]) == cfg.batch:
                indices, kept = zip(*waiting[b], strict=True)
                epoch.append(BatchSpec(b, indices, kept))
                waiting[b] = []
        out += [epoch[j] for j in rng.permutation(len(epoch))]
    return out[:steps]


def check(
    source: Source, cfg: DataConfig, policy: PlanPolicy, text_cfg: TextConfig, tokenizer: Tokenizer, seed: int,
    steps: int, progress: bool = True,
) -> None:  # fmt: skip
    """Raises `ValueError` where a picture or a row of the first `steps` batches fits no bucket: before training, not
    in it. Reads every record once."""
    specs = schedule(source.sizes, cfg, policy, seed, steps)
    used = sorted({i for spec in specs for i in spec.indices})
    words = {}  # tokens of a row besides its picture's
    for i in tqdm(used, "check rows", disable=not progress, leave=False):
        whole, asked = _plan(tuple(map(int, source.sizes[i])), 1.0, policy), source[i].questions
        row = text.render_questions(whole, [(q.text, q.answer) for q in asked], tokenizer, text_cfg)
        words[i] = len(row.ids) - text.visual_tokens(whole, text_cfg)
    most = [0] * len(cfg.lengths)
    for spec in specs:
        for i, ratio in zip(spec.indices, spec.ratios, strict=True):
            shown = text.visual_tokens(_plan(tuple(map(int, source.sizes[i])), ratio, policy), text_cfg)
            most[spec.bucket] = max(most[spec.bucket], words[i] + shown)
    if any(need > has for need, has in zip(most, cfg.lengths, strict=True)):
        raise ValueError(f"rows of up to {most} tokens do not fit data.lengths {list(cfg.lengths)}: raise them")


def collate(
    screens: Sequence[Screen],
    plans: Sequence[VisionPlan],
    prompts: Sequence[text.Prompt],
    cfg: DataConfig,
    bucket: int,
    tokenizer: Tokenizer,
    classes: Sequence[str] = (),
    things: int = 1,
) -> Batch:
    """Screens with their plans and prompts, padded to the shapes of `bucket`; at most `things` of them named."""
    n, policy = cfg.tile_buckets[bucket], plans[0].policy
    tiles = np.zeros((len(screens), n, policy.tile, policy.tile, 3), np.uint8)
    mask = np.zeros((len(screens), n, policy.patches_per_side**2), bool)
    index = {c: i for i, c in enumerate(classes)}
    first = [_begins(tokenizer, c) for c in classes]
    names = np.full((len(screens), things), -1, np.int32)
    words = np.full((len(screens), things, 2), -1, np.int32)
    weights = np.zeros((len(screens), things, n * policy.patches_per_side**2), np.float32)
    for b, (screen, p) in enumerate(zip(screens, plans, strict=True)):
        tiles[b, : p.n_tiles] = image.prepare(screen.image, p)
        mask[b, : p.n_tiles] = p.patch_mask()
        if classes:
            shown = [s for t in screen.things for s in _shares(t, p, index)][:things]
            for k, (name, share) in enumerate(shown):
                names[b, k], words[b, k] = name, first[name]
                weights[b, k, : share.size] = share
    return Batch(
        tiles, mask, *text.stack(prompts, cfg.lengths[bucket], tokenizer.special(tokens.PAD)), names, words, weights
    )


def _begins(tokenizer: Tokenizer, name: str) -> tuple[int, int]:
    """The first token of a name that is an answer, and of one that follows a space: to the tokenizer, two words."""
    spaced = tokenizer.encode(" " + name)
    return tokenizer.encode(name)[0], next(t for t in spaced if tokenizer.token(t).strip())


def batches(
    source: Source,
    cfg: DataConfig,
    policy: PlanPolicy,
    text_cfg: TextConfig,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    seed: int,
    steps: int,
    start: int = 0,
    things: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Training batches of steps `start` .. `steps` - 1, loaded ahead in threads by Grain. `things` are named on each
    screen at most; by default each picture and digit, also as the thumbnail shows it. Of each batch only `rows` are
    loaded; all if not given."""
    import grain.python as grain

    most = 2 * (cfg.screens.max_things + cfg.screens.digits) if things is None else things

    def load(spec: BatchSpec) -> Batch:
        mine = range(len(spec.indices)) if rows is None else rows
        screens = [source[spec.indices[i]] for i in mine]
        plans = [_plan(s.image.shape[:2], spec.ratios[i], policy) for s, i in zip(screens, mine, strict=True)]
        prompts = [
            text.render_questions(p, [(q.text, q.answer) for q in s.questions], tokenizer, text_cfg)
            for s, p in zip(screens, plans, strict=True)
        ]
        return collate(screens, plans, prompts, cfg, spec.bucket, tokenizer, classes, most)

    specs = schedule(source.sizes, cfg, policy, seed, steps)[start:]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=6)
    return iter(grain.MapDataset.source(specs).map(load).to_iter_dataset(options))


def _shares(thing: Thing, p: VisionPlan, index: dict[str, int]) -> Iterator[tuple[int, np.ndarray]]:
    """(class, f32[N*P]) of what is legible of a thing: in the tiles together, and again in the thumbnail. A number
    counts as its digits, side by side."""
    parts = [(thing.concept, thing.box)]
    if thing.kind == "digit":
        x0, y0, x1, y1 = thing.box
        edges = np.linspace(x0, x1, len(thing.concept) + 1)
        parts = [(d, (l, y0, r, y1)) for d, l, r in zip(thing.concept, edges, edges[1:], strict=False)]
    side, patch = p.policy.patches_per_side, p.policy.patch
    for name, box in parts:
        if name not in index:
            continue
        x0, y0, x1, y1 = p.pixels_to_canvas(box)
        if max(x1 - x0, y1 - y0) >= LEGIBLE:
            rows, cols = _overlap(y0, y1, p.grid[0] * side, patch), _overlap(x0, x1, p.grid[1] * side, patch)
            grid = np.outer(rows, cols).reshape(p.grid[0], side, p.grid[1], side).transpose(0, 2, 1, 3).reshape(-1)
            yield index[name], (grid / grid.sum()).astype(np.float32)
        if p.thumb is not None:
            last, (h, w) = p.tiles[-1], p.size
            x0, x1 = (x * last.width / w + last.left for x in (box[0], box[2]))
            y0, y1 = (y * last.height / h + last.top for y in (box[1], box[3]))
            if max(x1 - x0, y1 - y0) >= LEGIBLE:
                grid = np.outer(_overlap(y0, y1, side, patch), _overlap(x0, x1, side, patch)).reshape(-1)
                share = np.zeros(p.n_tiles * side**2, np.float32)
                share[-(side**2) :] = grid / grid.sum()
                yield index[name], share


def _overlap(start: float, stop: float, patches: int, patch: int) -> np.ndarray:
    """f32[patches]: pixels of [start, stop) in each patch of an axis."""
    edges = np.arange(patches + 1) * patch
    return np.clip(np.minimum(stop, edges[1:]) - np.maximum(start, edges[:-1]), 0, None) + 1e-9
