"""Restored pictures side by side with the original, as one picture: whole, a part of it enlarged, and what is wrong.

Axes: H W picture, S side of the part.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from hypervl_jax.rescale.evaluate import Figures, Outcome

WIDTH, MARGIN, GAP, LINE = 300, 16, 8, 20  # pixels: of a column, around, between, a line of text
PART = 64  # side of the part that is enlarged, in pixels of the picture
FAINT = 4  # grey levels: what is white in a map of errors is at least that
INK, FRAME = (20, 20, 20), (230, 40, 40)

Picture = UInt8[np.ndarray, "H W 3"]


def draw(
    hr: Picture, found: dict[str, Outcome], rows: dict[str, Figures], at: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "_ _ 3"]:
    """A column for the original and one a way, with its figures; four pictures in each.

    `at` is the (x, y) the enlarged part is around; if not given, it is where the first way is most wrong.
    """
    first, (h, w) = next(iter(found)), hr.shape[:2]
    errors = {way: np.abs(o.restored.astype(np.float32) - hr).mean(-1) for way, o in found.items()}
    white = max(FAINT, round(float(np.percentile(errors[first], 99.5))))
    down, across = part(errors[first], at)
    frame = across.start / w, down.start / h, across.stop / w, down.stop / h
    small = found[first].small
    columns = [[
        _text("original", f"{w} x {h} px"),
        _shown(hr, frame),
        _shown(hr[down, across]),
        _shown(small),
        _text(f"above: small, {small.shape[1]} x {small.shape[0]} px", f"beside: errors, white is {white} or more"),
    ]]  # fmt: skip
    for way, outcome in found.items():
        wrong = (errors[way] * (255 / white)).clip(0, 255).astype(np.uint8)[..., None].repeat(3, -1)
        columns.append([
            _text(way, f"{rows[way]['psnr_y']:.2f} dB, SSIM {rows[way]['ssim_y']:.4f}"),
            _shown(outcome.restored, frame),
            _shown(outcome.restored[down, across]),
            _shown(wrong),
            _shown(wrong[down, across]),
        ])  # fmt: skip
    return np.asarray(_table(columns))


def part(error: Float[np.ndarray, "H W"], at: tuple[int, int] | None) -> tuple[slice, slice]:
    """Rows and columns of a square of `PART`, or all there is: around (x, y), or where its error is largest."""
    h, w = (min(PART, n) for n in error.shape)
    if at is None:
        sums = np.pad((error.astype(np.float64) ** 2).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        squares = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
        top, left = np.unravel_index(squares.argmax(), squares.shape)
    else:
        top, left = at[1] - h // 2, at[0] - w // 2
    top, left = (int(min(max(0, a), n - m)) for a, n, m in ((top, error.shape[0], h), (left, error.shape[1], w)))
    return slice(top, top + h), slice(left, left + w)


def _shown(x: Picture, frame: tuple[float, ...] | None = None) -> Image.Image:
    """The picture as wide as a column: whole pixels where it is enlarged, averages where it is shrunk. `frame` marks
    (left, top, right, bottom), shares of its sides."""
    h, w = x.shape[:2]
    scale = WIDTH / max(h, w)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    out = Image.fromarray(np.ascontiguousarray(x))
    out = out.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
    if frame is not None:
        left, top = (math.floor(share * n) for share, n in zip(frame[:2], size, strict=True))
        right, bottom = (math.ceil(share * n) - 1 for share, n in zip(frame[2:], size, strict=True))
        ImageDraw.Draw(out).rectangle((left, top, right, bottom), outline=FRAME)
    return out


def _text(*lines: str) -> Image.Image:
    out = Image.new("RGB", (WIDTH, LINE * len(lines)), "white")
    for i, said in enumerate(lines):
        ImageDraw.Draw(out).text((0, i * LINE), said, INK, ImageFont.load_default(14))
    return out


def _table(columns: list[list[Image.Image]]) -> Image.Image:
    """Cells of a row as high as the highest of them."""
    high = [max(c[i].height for c in columns if i < len(c)) for i in range(max(map(len, columns)))]
    size = len(columns) * (WIDTH + GAP) - GAP + 2 * MARGIN, sum(high) + GAP * (len(high) - 1) + 2 * MARGIN
    out = Image.new("RGB", size, "white")
    for n, column in enumerate(columns):
        y = MARGIN
        for cell, height in zip(column, high, strict=False):
            out.paste(cell, (MARGIN + n * (WIDTH + GAP), y))
            y += height + GAP
    return out
