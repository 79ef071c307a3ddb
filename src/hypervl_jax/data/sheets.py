"""Sheets: one tile full of drawings and numbers, each with its name and box. What stage 0 learns to see from, since a
sheet names several times as many things as a screen of the same cost.

H, W image; boxes (x0, y0, x1, y1) in pixels, the end outside.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from hypervl_jax.config import ScreensConfig
from hypervl_jax.data import painting
from hypervl_jax.data.assets import SPLITS, Assets, Split
from hypervl_jax.data.screens import Screen, Thing

SLOT = (12, 48)  # pixels a side of what is shown, log-uniform
NUMBER = 0.5  # of the slots show a number
SALT = 7  # sheets and screens of one index differ


def most(side: int) -> int:
    """Names on a sheet of `side` pixels, at most: a number counts as its digits."""
    return 2 * max(1, round(side / SLOT[0])) ** 2


def record(assets: Assets, cfg: ScreensConfig, split: Split, index: int) -> Screen:
    """Sheet `index` of a split: depends on (seed, split, index) and the settings of composition only."""
    return compose(np.random.default_rng([cfg.seed, SALT, SPLITS.index(split), index]), assets, cfg, split)


def compose(rng: np.random.Generator, assets: Assets, cfg: ScreensConfig, split: Split) -> Screen:
    """A square of `sheet_side` pixels cut into equal slots with a thing in each, and no questions."""
    side = cfg.sheet_side
    canvas = painting.background(rng, side, side)
    across = max(1, round(side / float(np.exp(rng.uniform(*np.log(SLOT))))))
    edges = np.linspace(0, side, across + 1).round().astype(int).tolist()
    things = []
    for top, bottom in pairwise(edges):
        for left, right in pairwise(edges):
            paint = _number if "read" in cfg.tasks and rng.random() < NUMBER else _picture
            things.append(paint(rng, assets, cfg, split, canvas, (left, top, right, bottom)))
    return Screen(canvas, tuple(things), (), "mixed", 0.0)


def _spot(rng: np.random.Generator, slot: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, int]:
    """(x, y) of something of `size` (h, w) at a random place in the slot."""
    x0, y0, x1, y1 = slot
    return int(rng.integers(x0, max(x1 - size[1], x0) + 1)), int(rng.integers(y0, max(y1 - size[0], y0) + 1))


def _picture(rng, assets: Assets, cfg: ScreensConfig, split: Split, canvas: np.ndarray, slot) -> Thing:
    concept = int(rng.integers(cfg.concepts))
    artists = assets.artists_of(concept, split)
    artist = artists[rng.integers(len(artists))]
    room = slot[2] - slot[0]
    rgba = painting.drawing(rng, assets.art[concept, artist], room * rng.uniform(0.7, 1.0), vary=split == "train")
    rgba = rgba[:room, :room]
    x, y = _spot(rng, slot, rgba.shape)
    under = canvas[y : y + rgba.shape[0], x : x + rgba.shape[1]]
    rgba = rgba[: under.shape[0], : under.shape[1]]
    under[:] = np.rint(np.clip(rgba[..., :3] + (1 - rgba[..., 3:]) * under, 0, 255))
    return Thing(assets.words[concept], "picture", painting.visible(rgba[..., 3], (x, y)), artist)


def _number(rng, assets: Assets, cfg: ScreensConfig, split: Split, canvas: np.ndarray, slot) -> Thing:
    held, room = int(split.startswith("test")), min(slot[2] - slot[0], slot[3] - slot[1])
    digits = rng.integers(0, 10, rng.integers(1, min(3, cfg.digits) + 1)).tolist()
    while True:  # fewer until they fit at a height that can be read
        height = round(min(room, 1.5 * room / len(digits)) * rng.uniform(0.6, 0.95))
        if height >= 7 or len(digits) == 1:
            break
        digits.pop()
    fonts = assets.fonts[held]
    font = "hand" if height >= cfg.hand_height[0] and rng.random() < 0.35 else list(fonts)[rng.integers(len(fonts))]
    if font == "hand":
        alpha = painting.handwritten(rng, assets.hand[held], digits, height)
    else:
        alpha = painting.printed(fonts[font], digits, max(6, height))
    if alpha.shape[1] > room or alpha.shape[0] > room:
        scale = room / max(alpha.shape)
        alpha = painting.resize(
            (255 * alpha).astype(np.uint8), max(3, int(scale * alpha.shape[1])), int(scale * alpha.shape[0])
        )
    x, y = _spot(rng, slot, alpha.shape)
    under = canvas[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    dark = bool(under.mean() > 127) if rng.random() < 0.7 else rng.random() < 0.5
    if dark != (under.mean() > 127) or rng.random() < 0.5:
        painting.plate(canvas, slot, painting.colour(rng, not dark), radius=0.0)
    ink = np.clip(painting.colour(rng, dark) + (-40 if dark else 40), 0, 255)
    under[:] = np.rint(under + alpha[..., None] * (ink - under))
    return Thing("".join(map(str, digits)), "digit", painting.visible(alpha, (x, y)), font)
