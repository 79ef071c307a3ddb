"""Any picture down to one small PNG, and back to a picture of its size and kind.

The networks take RGB in 8 bits whose sides are multiples of their scale; pictures do not. So:

* The size may be any: the right and the bottom are mirrored up to the next multiple, and cut off again.
* Grey pictures become a small picture in colour (its three channels are what restores them) and are grey again.
* Transparency is no business of the networks: it is resampled (bicubic) both ways. Colours under it are kept.
* 16 bits become 8, as everywhere in this library: the small picture has no more to restore them from.
* EXIF and XMP turn the picture upright and are then dropped; an ICC profile of RGB is handed on; animations give their
  first frame (`image.layers`).

What `up` has to know of the original (size, scale, weights, grey or not) travels in one text chunk of the small PNG. A
small picture without it is restored to its own size times the scale.
Axes: H W picture, h w small picture.
"""

from __future__ import annotations

import io
import json
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, UInt8
from PIL import Image, PngImagePlugin

from hypervl_jax import image
from hypervl_jax.image import Layers
from hypervl_jax.rescale import tiles, weights
from hypervl_jax.rescale.files import RescaleError
from hypervl_jax.rescale.hcd import HcdConfig
from hypervl_jax.rescale.pairs import Pair
from hypervl_jax.rescale.resample import bicubic
from hypervl_jax.rescale.tiles import TILE, Tick

CHUNK = "hypervl-rescale"  # keyword of the PNG text chunk
MAX_BYTES = 512 << 20  # of a picture file: large restored pictures are large files


class Notes(NamedTuple):
    """What a small picture knows of its original."""

    size: tuple[int, int]  # (height, width)
    scale: int
    weights: str  # their fingerprint
    grey: bool

    def text(self) -> str:
        return json.dumps(self._asdict())


def notes(small: Layers) -> Notes | None:
    """None where there are none, where they cannot be read, or where the picture was cut or resized since."""
    try:
        found = json.loads(small.text[CHUNK])
        (height, width), scale = found["size"], found["scale"]
        if any(type(n) is not int or n < 1 for n in (height, width, scale)):
            return None
        if (-(-height // scale), -(-width // scale)) != small.rgb.shape[:2]:
            return None
        return Notes((height, width), scale, str(found["weights"]), found["grey"] is True)
    except (KeyError, TypeError, ValueError, RecursionError):  # anyone may have written them
        return None


def down(
    pair: Pair,
    picture: Layers,
    config: HcdConfig | None = None,
    key: Array | None = None,
    tile: int = TILE,
    tick: Tick = lambda: None,
) -> Layers:
    """The small picture with its notes: by HCD if there is a config, else as the pair makes it."""
    s, (h, w) = tiles.whole_scale(pair), picture.rgb.shape[:2]
    hr = filled(picture.rgb, s)
    small = tiles.down(pair, hr, tile, tick) if config is None else tiles.descend(pair, hr, config, key, tile, tick)
    alpha = picture.alpha
    if alpha is not None:
        alpha = bicubic(filled(alpha[..., None], s), (small.shape[0], small.shape[1]))[..., 0]
    said = Notes((h, w), s, weights.fingerprint(pair), picture.grey).text()
    return Layers(small, alpha, False, picture.profile, {CHUNK: said})


def up(
    pair: Pair,
    small: Layers,
    key: Array | None = None,
    tile: int = TILE,
    tick: Tick = lambda: None,
    noted: bool = True,
) -> Layers:
    """The restored picture: of the original's size and kind where notes say it and are to be heeded (`noted`), else
    `scale` times as large. Raises `RescaleError` for a small picture of another pair, and one that would be too large.
    """
    check(pair, small, noted)
    known = notes(small) if noted else None
    s, (h, w) = tiles.whole_scale(pair), small.rgb.shape[:2]
    rgb, alpha = tiles.up(pair, small.rgb, key, tile, tick), small.alpha
    if alpha is not None:
        alpha = bicubic(alpha[..., None], (h * s, w * s))[..., 0]
    height, width = known.size if known is not None else (h * s, w * s)
    return Layers(
        rgb[:height, :width],
        None if alpha is None else alpha[:height, :width],
        small.grey or (known is not None and known.grey),
        small.profile,
        {},
    )


def check(pair: Pair, small: Layers, noted: bool = True) -> None:
    """Raises `RescaleError` for a small picture that notes another pair, and one that would be too large."""
    s, (h, w) = tiles.whole_scale(pair), small.rgb.shape[:2]
    known = notes(small) if noted else None
    height, width = known.size if known is not None and known.scale == s else (h * s, w * s)
    if height * width > image.MAX_PIXELS:
        most = image.MAX_PIXELS / 1e6
        raise RescaleError(f"{w} x {h} px times {s} is over the limit of {most:g} million pixels; cut it into parts")
    if known is None:
        return
    if known.weights == (ours := weights.fingerprint(pair)):
        return
    shipped = {weights.fingerprint(weights.shipped(name)): f"--pair {name}" for name in weights.LIGHT}
    theirs = shipped.get(known.weights)
    if known.scale != s:
        cure = theirs or "the pair it was made by"
        raise RescaleError(f"made small by {known.scale}, this pair restores by {s}: give {cure}")
    cure = f"{theirs or 'those'}, or --no-notes to restore it anyway"
    raise RescaleError(f"made small by weights {known.weights}, these are {ours}: give {cure}")


def filled(x: UInt8[np.ndarray, "H W C"], scale: int) -> UInt8[np.ndarray, "_ _ C"]:
    """The picture mirrored at the right and the bottom up to multiples of `scale`."""
    h, w = x.shape[:2]
    return np.pad(x, ((0, -h % scale), (0, -w % scale), (0, 0)), "symmetric")


def png(picture: Layers) -> bytes:
    """A PNG of its kind: RGB or grey, with or without alpha, with its profile and its text."""
    drawn = Image.fromarray(np.ascontiguousarray(picture.rgb))
    drawn = drawn.convert("L") if picture.grey else drawn
    if picture.alpha is not None:
        drawn.putalpha(Image.fromarray(np.ascontiguousarray(picture.alpha)))
    said = PngImagePlugin.PngInfo()
    for name, text in picture.text.items():
        said.add_text(name, text)
    out = io.BytesIO()
    drawn.save(out, "PNG", pnginfo=said, icc_profile=picture.profile)
    return out.getvalue()
