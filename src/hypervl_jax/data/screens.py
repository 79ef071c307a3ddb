"""Phone-like screens composed of drawings and numbers, with questions whose answers are known exactly.

One screen is a function of (generator, assets, config, split). Every split is composed alike; what differs is whose
art, whose handwriting and which fonts it shows (`Assets`), and that training drawings are also varied in hue and shape,
as an unseen artist's are.

H, W image; boxes (x0, y0, x1, y1) in pixels, the end outside; colours 0..255.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ..config import ScreensConfig
from .assets import SPLITS, Assets, Split

Box = tuple[float, float, float, float]
Rect = tuple[int, int, int, int]
Generator = np.random.Generator

TASKS = ("name", "find", "read", "count", "yesno")
ROWS = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
GRID = 100  # `find` answers on a grid of GRID x GRID cells over the image
NUMBERS = 0.6  # of the screens show a number ...
ALONE = 0.15  # ... of those, show nothing else
REPEATS = 0.5  # of the screens show one thing several times, so that counts of 2 to 4 are not rare


class ScreenError(ValueError):
    """A `ScreensConfig` that no screen can satisfy."""


class Thing(NamedTuple):
    concept: str  # the word, or the digits of a number
    kind: str  # "picture" | "digit"
    box: Box  # tight around what is visible
    artist: str  # who drew it; the font, or "hand"


class Question(NamedTuple):
    task: str
    text: str
    answer: str
    box: Box | None  # the target, where there is one


class Screen(NamedTuple):
    image: np.ndarray  # u8[H W 3]
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]
    artist: str  # whose pictures: a name, "mixed", or "" without pictures
    digit_height: float  # pixels, how small one must read; 0 without a number


def record(assets: Assets, cfg: ScreensConfig, split: Split, index: int) -> Screen:
    """Screen `index` of a split: depends on (seed, split, index) and the settings of composition only."""
    return compose(np.random.default_rng([cfg.seed, SPLITS.index(split), index]), assets, cfg, split)


def compose(rng: Generator, assets: Assets, cfg: ScreensConfig, split: Split) -> Screen:
    """One screen with at least one question. Raises `ScreenError` for settings that cannot be met."""
    check(assets, cfg)
    for _ in range(100):
        screen = _compose(rng, assets, cfg, split)
        if screen.questions:
            return screen
    raise ScreenError(f"no question can be asked: tasks {cfg.tasks}, sides {cfg.min_side}..{cfg.max_side} px")


def check(assets: Assets, cfg: ScreensConfig) -> None:
    """Raises `ScreenError` naming the setting that does not fit."""
    unknown = set(cfg.tasks) - set(TASKS)
    if unknown or not cfg.tasks:
        raise ScreenError(f"tasks {cfg.tasks}: choose one or more of {', '.join(TASKS)}")
    if not 2 <= cfg.concepts <= len(assets.words):
        raise ScreenError(f"concepts {cfg.concepts}: the archive has {len(assets.words)}, and two are the least")
    if not 16 <= cfg.min_side <= cfg.max_side or cfg.max_area < cfg.min_side**2:
        raise ScreenError("sides: need 16 <= min_side <= max_side and max_area >= min_side^2")
    if cfg.max_things < 1 or cfg.questions < 1 or cfg.digits < 1:
        raise ScreenError("max_things, questions and digits must be at least 1")
    for name in ("picture", "print_height", "hand_height"):
        span = getattr(cfg, name)
        if len(span) != 2 or not 7 <= span[0] <= span[1]:
            raise ScreenError(f"{name} {span}: from .. to, in pixels, and 7 is the least that can be seen")


def _compose(rng: Generator, assets: Assets, cfg: ScreensConfig, split: Split) -> Screen:
    height, width = _size(rng, cfg)
    canvas = _background(rng, height, width)
    taken: list[Rect] = []
    things: list[Thing] = []
    digit_height = 0.0
    pictures_wanted = cfg.tasks != ("read",)
    number = "read" in cfg.tasks and (rng.random() < NUMBERS or not pictures_wanted)
    if number:
        thing, digit_height = _number(rng, assets, cfg, split, canvas, taken)
        things.append(thing)
    if pictures_wanted and not (number and rng.random() < ALONE):
        things += _pictures(rng, assets, cfg, split, canvas, taken)
    artists = {t.artist for t in things if t.kind == "picture"}
    questions = _questions(rng, assets, cfg, things, (height, width))
    artist = artists.pop() if len(artists) == 1 else "mixed" if artists else ""
    return Screen(canvas, tuple(things), questions, artist, digit_height)


def _size(rng: Generator, cfg: ScreensConfig) -> tuple[int, int]:
    """(height, width): area uniform by side, portrait more often than not."""
    side = rng.uniform(cfg.min_side, cfg.max_area**0.5)
    tall = rng.choice([rng.uniform(1.2, 2.2), rng.uniform(0.85, 1.18), 1 / rng.uniform(1.2, 2.2)], p=[0.6, 0.2, 0.2])
    height = float(np.clip(side * tall**0.5, cfg.min_side, cfg.max_side))
    width = float(np.clip(side**2 / height, cfg.min_side, min(cfg.max_side, cfg.max_area / height)))
    return int(height), int(width)


# --- background ------------------------------------------------------------------------------------------------------


def _colour(rng: Generator, dark: bool) -> np.ndarray:
    """f64[3], a muted or a lively colour of the wanted lightness."""
    grey = rng.uniform(10, 75) if dark else rng.uniform(175, 250)
    return np.clip(grey + rng.normal(0, rng.choice([4, 22]), 3), 0, 255)


def _background(rng: Generator, height: int, width: int) -> np.ndarray:
    """u8[H W 3]: flat, gradient or blobs, light or dark, with bars, cards and lines as interfaces have them."""
    dark = rng.random() < 0.4
    kind = rng.choice(["flat", "gradient", "blobs"], p=[0.35, 0.3, 0.35])
    a, b = _colour(rng, dark), _colour(rng, dark if rng.random() < 0.8 else not dark)
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
        return tuple(int(v) for v in _colour(rng, dark if rng.random() < 0.7 else not dark))

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


def _place(rng: Generator, canvas: np.ndarray, size: tuple[int, int], taken: list[Rect], gap: int = 2) -> Rect | None:
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


def _visible(alpha: np.ndarray, origin: tuple[int, int]) -> Box:
    """The tight box of what a person sees, moved to `origin` (x, y)."""
    seen = alpha > 0.15
    x, y = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
    ends = (origin[0] + x[0], origin[1] + y[0], origin[0] + x[-1] + 1, origin[1] + y[-1] + 1)
    return tuple(float(v) for v in ends)  # type: ignore


def _plate(canvas: np.ndarray, box: Rect, colour: np.ndarray, radius: float) -> None:
    """A rounded rectangle, in place."""
    x0, y0, x1, y1 = box
    mask = Image.new("L", (x1 - x0, y1 - y0))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, x1 - x0 - 1, y1 - y0 - 1), radius, fill=255)
    canvas[y0:y1, x0:x1][np.asarray(mask) > 0] = colour.astype(np.uint8)


# --- pictures --------------------------------------------------------------------------------------------------------


def _concepts(rng: Generator, cfg: ScreensConfig) -> list[int]:
    """What to show: different things, or one of them two to four times."""
    count = 1 + int(cfg.max_things * rng.random() ** 1.4)  # few, large things as often as many small ones
    chosen = rng.permutation(cfg.concepts)[:count].tolist()
    if "count" in cfg.tasks and cfg.max_things >= 2 and rng.random() < REPEATS:
        times = int(rng.integers(2, min(4, cfg.max_things) + 1))
        others = chosen[1 : cfg.max_things - times + 1]
        return chosen[:1] * times + others
    return chosen


def _pictures(
    rng: Generator, assets: Assets, cfg: ScreensConfig, split: Split, canvas: np.ndarray, taken: list[Rect]
) -> list[Thing]:
    concepts = _concepts(rng, cfg)
    side = min(canvas.shape[:2])
    room = (0.45 * canvas.shape[0] * canvas.shape[1] / len(concepts)) ** 0.5
    low = min(cfg.picture[0], 0.7 * side)
    high = max(low, min(cfg.picture[1], 0.7 * side, room))
    typical = np.exp(rng.uniform(np.log(low), np.log(high)))  # of this screen, so that some have only large pictures
    things = []
    for concept in concepts:
        artists = assets.artists_of(concept, split)
        artist = artists[rng.integers(len(artists))]
        for shrink in (1.0, 0.6):
            size = float(np.clip(typical * rng.uniform(0.8, 1.25) * shrink, low, high))
            rgba = _drawing(rng, assets.art[concept, artist], size, vary=split == "train")
            spot = _place(rng, canvas, rgba.shape[:2], taken)
            if spot is not None:
                break
        else:
            continue
        x, y = spot[:2]
        under = canvas[y : y + rgba.shape[0], x : x + rgba.shape[1]]
        colour, alpha = rgba[..., :3], rgba[..., 3:]
        blend = colour + (1 - alpha) * under
        if np.abs(blend - under).sum() < 40 * 3 * alpha.sum():  # would hardly be seen: put a plate under it
            lightness = colour.sum() / max(3 * alpha.sum(), 1)
            _plate(canvas, spot, _colour(rng, dark=bool(lightness > 127)), radius=3.0)
            blend = colour + (1 - alpha) * under
        under[:] = np.rint(np.clip(blend, 0, 255))
        things.append(Thing(assets.words[concept], "picture", _visible(alpha[..., 0], (x, y)), artist))
    return things


def _drawing(rng: Generator, art: Image.Image, size: float, vary: bool) -> np.ndarray:
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


# --- numbers ---------------------------------------------------------------------------------------------------------


def _number(
    rng: Generator, assets: Assets, cfg: ScreensConfig, split: Split, canvas: np.ndarray, taken: list[Rect]
) -> tuple[Thing, float]:
    """Write one number, handwritten or printed, on a plate that keeps it legible. Returns it and its digit height."""
    held = int(split.startswith("test"))
    hand = rng.random() < 0.35
    low, high = cfg.hand_height if hand else cfg.print_height
    fonts = assets.fonts[held]
    font = "hand" if hand else list(fonts)[rng.integers(len(fonts))]
    digits = rng.integers(0, 10, rng.integers(1, cfg.digits + 1)).tolist()
    while True:  # shorter and smaller until it fits: on the smallest screen one digit of 7 px does
        height = round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))
        alpha = _handwritten(rng, assets.hand[held], digits, height) if hand else _printed(fonts[font], digits, height)
        pad = max(1, round(height * rng.uniform(0.1, 0.3)))
        size = (alpha.shape[0] + 2 * pad, alpha.shape[1] + 2 * pad)
        spot = _place(rng, canvas, size, taken) if size[0] <= 0.7 * canvas.shape[0] else None
        if spot is not None:
            break
        if high <= low:
            digits, low = digits[: max(1, len(digits) - 1)], max(7, low - 1)
        high = max(low, 0.8 * high)
    dark = rng.random() < 0.5
    plate, ink = _colour(rng, dark), _colour(rng, not dark)
    ink = np.clip(ink + (40 if dark else -40), 0, 255)
    _plate(canvas, spot, plate, radius=float(rng.choice([0, pad])))
    x, y = spot[0] + pad, spot[1] + pad
    under = canvas[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    under[:] = np.rint(under + alpha[..., None] * (ink - under))
    box = _visible(alpha, (x, y))
    return Thing("".join(map(str, digits)), "digit", box, font), box[3] - box[1]


def _resize(alpha: np.ndarray, width: int, height: int) -> np.ndarray:
    """f64[height width] in 0..1, antialiased."""
    return np.asarray(Image.fromarray(alpha).resize((width, height), Image.Resampling.BICUBIC)) / 255.0


def _printed(glyphs: tuple[np.ndarray, ...], digits: list[int], height: int) -> np.ndarray:
    line = np.concatenate([glyphs[d] for d in digits], 1)
    return _resize(line, max(3, round(line.shape[1] * height / line.shape[0])), height)


def _handwritten(rng: Generator, hand: tuple[np.ndarray, ...], digits: list[int], height: int) -> np.ndarray:
    """Strokes of 8 x 8 grey levels, enlarged and sharpened back to strokes; cells hop a little, as in writing."""
    hop = max(1, height // 8)
    width = round(height * rng.uniform(0.75, 0.95))
    out = np.zeros((height + hop, width * len(digits)))
    for i, d in enumerate(digits):
        cell = _resize(hand[d][rng.integers(len(hand[d]))], width, height)
        y = rng.integers(0, hop + 1)
        out[y : y + height, i * width : (i + 1) * width] = np.clip((cell - 0.25) * 1.6, 0, 1)
    return out


# --- questions -------------------------------------------------------------------------------------------------------


def place_of(box: Box, size: tuple[int, int]) -> str:
    """Which of nine places a box's centre is in; size is (height, width)."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return ROWS[min(2, int(3 * y / size[0]))][min(2, int(3 * x / size[1]))]


def point_of(box: Box, size: tuple[int, int]) -> str:
    """The centre of a box on the GRID: `"07 52"`, x before y."""
    x, y = GRID * (box[0] + box[2]) / 2 / size[1], GRID * (box[1] + box[3]) / 2 / size[0]
    return f"{min(GRID - 1, int(x)):02d} {min(GRID - 1, int(y)):02d}"


def _questions(
    rng: Generator, assets: Assets, cfg: ScreensConfig, things: list[Thing], size: tuple[int, int]
) -> tuple[Question, ...]:
    """The number, if any; then one task after the other in random order until there are `cfg.questions`."""
    asked = [
        Question("read", "what is the number?", t.concept, t.box)
        for t in things
        if t.kind == "digit" and "read" in cfg.tasks
    ]
    pictures = [t for t in things if t.kind == "picture"]
    if not pictures:
        return tuple(asked[: cfg.questions])
    ask = {"name": _name, "find": _find, "count": _count, "yesno": _yesno}
    pools = [ask[t](rng, assets, cfg, pictures, size) for t in rng.permutation([t for t in cfg.tasks if t in ask])]
    while len(asked) < cfg.questions and any(pools):
        asked += [p.pop() for p in pools if p]
    return tuple(asked[: cfg.questions])


def _name(rng: Generator, assets: Assets, cfg: ScreensConfig, pictures: list[Thing], size: tuple[int, int]):
    places = Counter(place_of(t.box, size) for t in pictures)
    pool = [
        Question("name", f"what is at the {place_of(t.box, size)}?", t.concept, t.box)
        for t in pictures
        if places[place_of(t.box, size)] == 1
    ]
    if len(pictures) == 1:
        pool.append(Question("name", "what is this?", pictures[0].concept, pictures[0].box))
    rng.shuffle(pool)  # type: ignore
    return pool


def _find(rng: Generator, assets: Assets, cfg: ScreensConfig, pictures: list[Thing], size: tuple[int, int]):
    times = Counter(t.concept for t in pictures)
    pool = [
        Question("find", f"where is the {t.concept}?", point_of(t.box, size), t.box)
        for t in pictures
        if times[t.concept] == 1
    ]
    rng.shuffle(pool)  # type: ignore
    return pool


def _absent(rng: Generator, assets: Assets, cfg: ScreensConfig, pictures: list[Thing]) -> str | None:
    shown = {t.concept for t in pictures}
    rest = [w for w in assets.words[: cfg.concepts] if w not in shown]
    return rest[rng.integers(len(rest))] if rest else None


def _count(rng: Generator, assets: Assets, cfg: ScreensConfig, pictures: list[Thing], size: tuple[int, int]):
    times = Counter(t.concept for t in pictures)
    word, most = times.most_common(1)[0]
    if most == 1:
        single = pictures[rng.integers(len(pictures))].concept
        word = (_absent(rng, assets, cfg, pictures) if rng.random() < 0.5 else None) or single
    return [Question("count", f"how many {word}?", str(times[word]), None)]


def _yesno(rng: Generator, assets: Assets, cfg: ScreensConfig, pictures: list[Thing], size: tuple[int, int]):
    other = _absent(rng, assets, cfg, pictures) if rng.random() < 0.5 else None
    target = pictures[rng.integers(len(pictures))]
    box = None if other else target.box
    word = other or target.concept
    article = "an" if word[0] in "aeiou" else "a"
    return [Question("yesno", f"is there {article} {word}?", "no" if other else "yes", box)]
