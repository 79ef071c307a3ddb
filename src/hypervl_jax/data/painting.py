"""Painting: backgrounds, free places, drawings and digits, as arrays. What `screens.py` and `sheets.py` compose with.

H, W image; boxes (x0, y0, x1, y1) in pixels, the end outside; colours 0..255.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

Box = tuple[float, float, float, float]
Rect = tuple[int, int, int, int]
Generator = np.random.Generator


# --- background ------------------------------------------------------------------------------------------------------


def colour(rng: Generator, dark: bool) -> np.ndarray:
    """f64[3], a muted or a lively colour of the wanted lightness."""
    grey = rng.uniform(10, 75) if dark else rng.uniform(175, 250)
    return np.clip(grey + rng.normal(0, rng.choice([4, 22]), 3), 0, 255)


def background(rng: Generator, height: int, width: int) -> np.ndarray:
    """u8[H W 3]: flat, gradient or blobs, light or dark, with bars, cards and lines as interfaces have them."""
    dark = rng.random() < 0.4
    kind = rng.choice(["flat", "gradient", "blobs"], p=[0.35, 0.3, 0.35])
    a, b = colour(rng, dark), colour(rng, dark if rng.random() < 0.8 else not dark)
    if kind == "flat":
        grid = np.broadcast_to(a, (1, 1, 3))
    elif kind == "gradient":
        ramp = (np.cos(t := rng.uniform(0, 2 * np.pi)) * np.arange(2)[:, None] + np.sin(t) * np.arange(2)) / 2
        grid = a + (ramp[..., None] - ramp.min()) * (b - a)
    else:
        rows, columns = rng.integers(2, 7, 2)
        grid = a + rng.random((rows, columns, 1)) * (b - a) + rng.normal(0, 8, (rows, columns, 3))
    image = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        _clutter(rng, ImageDraw.Draw(image), height, width, dark)
    pixels = np.array(image)
    if rng.random() < 0.3:  # grain, as in a photographed wallpaper
        grain = rng.normal(0, rng.uniform(2, 8), (height, width, 1))
        pixels = np.clip(pixels + grain, 0, 255).astype(np.uint8)
    return pixels


def _clutter(rng: Generator, draw: ImageDraw.ImageDraw, height: int, width: int, dark: bool) -> None:
    def paint() -> tuple[int, ...]:
        return tuple(int(v) for v in colour(rng, dark if rng.random() < 0.7 else not dark))

    for _ in range(rng.integers(0, 3)):  # cards
        x, y = rng.uniform(-0.1, 0.6) * width, rng.uniform(-0.1, 0.7) * height
        box = (x, y, x + rng.uniform(0.3, 0.9) * width, y + rng.uniform(0.2, 0.6) * height)
        draw.rounded_rectangle(box, radius=rng.uniform(2, 10), fill=paint())
    if rng.random() < 0.5:  # status bar
        bar = rng.uniform(5, 10)
        draw.rectangle((0, 0, width, bar), fill=paint())
        for x in rng.uniform(2, width - 6, rng.integers(1, 5)):
            draw.rectangle((x, 0.3 * bar, x + rng.uniform(2, 6), 0.7 * bar), fill=paint())
    if rng.random() < 0.4:  # lines that look like text from afar
        x, y, fill = rng.uniform(0, 0.5) * width, rng.uniform(0.1, 0.8) * height, paint()
        for k in range(rng.integers(2, 5)):
            draw.rectangle((x, y + 5 * k, x + rng.uniform(0.2, 0.5) * width, y + 5 * k + 1), fill=fill)


# --- placing and pasting ---------------------------------------------------------------------------------------------


def place(rng: Generator, canvas: np.ndarray, size: tuple[int, int], taken: list[Rect], gap: int = 2) -> Rect | None:
    """A free rectangle of `size` (h, w), noted in `taken`; None when 30 tries find none."""
    height, width = canvas.shape[0] - size[0], canvas.shape[1] - size[1]
    if height < 0 or width < 0:
        return None
    for x, y in zip(rng.integers(0, width + 1, 30).tolist(), rng.integers(0, height + 1, 30).tolist(), strict=True):
        box = (x, y, x + size[1], y + size[0])
        if all(
            box[0] >= t[2] + gap or t[0] >= box[2] + gap or box[1] >= t[3] + gap or t[1] >= box[3] + gap for t in taken
        ):
            taken.append(box)
            return box
    return None


def visible(alpha: np.ndarray, origin: tuple[int, int]) -> Box:
    """The tight box of what a person sees, moved to `origin` (x, y)."""
    seen = alpha > 0.15
    x, y = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
    ends = (origin[0] + x[0], origin[1] + y[0], origin[0] + x[-1] + 1, origin[1] + y[-1] + 1)
    return tuple(float(v) for v in ends)  # type: ignore


def plate(canvas: np.ndarray, box: Rect, colour: np.ndarray, radius: float) -> None:
    """A rounded rectangle, in place."""
    x0, y0, x1, y1 = box
    mask = Image.new("L", (x1 - x0, y1 - y0))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, x1 - x0 - 1, y1 - y0 - 1), radius, fill=255)
    canvas[y0:y1, x0:x1][np.asarray(mask) > 0] = colour.astype(np.uint8)


# --- pictures and digits ----------------------------------------------------------------------------------------------


def drawing(rng: Generator, art: Image.Image, size: float, vary: bool) -> np.ndarray:
    """f32[h w 4], colour times alpha (0..255) and alpha (0..1): resized, turned, perhaps mirrored, recoloured."""
    stretch = rng.uniform(-0.15, 0.15) if vary else 0.0
    box = art.getbbox() or (0, 0, *art.size)
    scale = size / max(box[2] - box[0], box[3] - box[1])
    w, h = (max(4, round((box[2 + i] - box[i]) * scale * (1 + s))) for i, s in enumerate((stretch, -stretch)))
    image = art.resize((w, h), Image.Resampling.BICUBIC, box=box, reducing_gap=None)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    image = image.crop(image.getbbox())
    rgba = np.asarray(image).astype(np.float32)
    rgba[..., 3] /= 255
    mix = np.diag(rng.uniform(0.92, 1.08, 3) * rng.uniform(0.88, 1.1))
    if vary and rng.random() < 0.6:
        mix = mix @ _recolour(rng)
    rgba[..., :3] = np.clip(rgba[..., :3] @ mix.T.astype(np.float32), 0, 255 * rgba[..., 3:])
    return rgba


def _recolour(rng: Generator) -> np.ndarray:
    """f64[3 3]: turn the hue by up to 30 degrees about the grey axis and scale the saturation by 0.5 to 1.4."""
    turn, grey = np.radians(rng.uniform(-30, 30)), np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    rotate = np.cos(turn) * (np.eye(3) - grey) + np.sin(turn) * cross
    return grey + rng.uniform(0.5, 1.4) * rotate


def resize(alpha: np.ndarray, width: int, height: int) -> np.ndarray:
    """f64[height width] in 0..1, antialiased."""
    return np.asarray(Image.fromarray(alpha).resize((width, height), Image.Resampling.BICUBIC)) / 255.0


def printed(glyphs: tuple[np.ndarray, ...], digits: list[int], height: int) -> np.ndarray:
    line = np.concatenate([glyphs[d] for d in digits], 1)
    return resize(line, max(3, round(line.shape[1] * height / line.shape[0])), height)


def handwritten(rng: Generator, hand: tuple[np.ndarray, ...], digits: list[int], height: int) -> np.ndarray:
    """Strokes of 8 x 8 grey levels, enlarged and sharpened back to strokes; cells hop a little, as in writing."""
    hop = max(1, height // 8)
    width = round(height * rng.uniform(0.75, 0.95))
    out = np.zeros((height + hop, width * len(digits)))
    for i, d in enumerate(digits):
        cell = resize(hand[d][rng.integers(len(hand[d]))], width, height)
        y = rng.integers(0, hop + 1)
        out[y : y + height, i * width : (i + 1) * width] = np.clip((cell - 0.25) * 1.6, 0, 1)
    return out
