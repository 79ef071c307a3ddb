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

from ..config import GRID, ScreensConfig
from . import painting
from .assets import SPLITS, Assets, Split
from .painting import Box, Generator, Rect

TASKS = ("name", "find", "read", "count", "yesno")
ROWS = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
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
    if min(cfg.max_things, cfg.questions, cfg.held_out_questions, cfg.digits) < 1:
        raise ScreenError("max_things, questions, held_out_questions and digits must be at least 1")
    for name in ("picture", "print_height", "hand_height"):
        span = getattr(cfg, name)
        if len(span) != 2 or not 7 <= span[0] <= span[1]:
            raise ScreenError(f"{name} {span}: from .. to, in pixels, and 7 is the least that can be seen")


def _compose(rng: Generator, assets: Assets, cfg: ScreensConfig, split: Split) -> Screen:
    height, width = _size(rng, cfg)
    canvas = painting.background(rng, height, width)
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
    most = cfg.questions if split == "train" else cfg.held_out_questions
    questions = _questions(rng, assets, cfg, things, (height, width), most)
    artist = artists.pop() if len(artists) == 1 else "mixed" if artists else ""
    return Screen(canvas, tuple(things), questions, artist, digit_height)


def _size(rng: Generator, cfg: ScreensConfig) -> tuple[int, int]:
    """(height, width): area uniform by side, portrait more often than not."""
    side = rng.uniform(cfg.min_side, cfg.max_area**0.5)
    tall = rng.choice([rng.uniform(1.2, 2.2), rng.uniform(0.85, 1.18), 1 / rng.uniform(1.2, 2.2)], p=[0.6, 0.2, 0.2])
    height = float(np.clip(side * tall**0.5, cfg.min_side, cfg.max_side))
    width = float(np.clip(side**2 / height, cfg.min_side, min(cfg.max_side, cfg.max_area / height)))
    return int(height), int(width)


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
            rgba = painting.drawing(rng, assets.art[concept, artist], size, vary=split == "train")
            spot = painting.place(rng, canvas, rgba.shape[:2], taken)
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
            painting.plate(canvas, spot, painting.colour(rng, dark=bool(lightness > 127)), radius=3.0)
            blend = colour + (1 - alpha) * under
        under[:] = np.rint(np.clip(blend, 0, 255))
        things.append(Thing(assets.words[concept], "picture", painting.visible(alpha[..., 0], (x, y)), artist))
    return things


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
        alpha = (
            painting.handwritten(rng, assets.hand[held], digits, height)
            if hand
            else painting.printed(fonts[font], digits, height)
        )
        pad = max(1, round(height * rng.uniform(0.1, 0.3)))
        size = (alpha.shape[0] + 2 * pad, alpha.shape[1] + 2 * pad)
        spot = painting.place(rng, canvas, size, taken) if size[0] <= 0.7 * canvas.shape[0] else None
        if spot is not None:
            break
        if high <= low:
            digits, low = digits[: max(1, len(digits) - 1)], max(7, low - 1)
        high = max(low, 0.8 * high)
    dark = rng.random() < 0.5
    plate, ink = painting.colour(rng, dark), painting.colour(rng, not dark)
    ink = np.clip(ink + (40 if dark else -40), 0, 255)
    painting.plate(canvas, spot, plate, radius=float(rng.choice([0, pad])))
    x, y = spot[0] + pad, spot[1] + pad
    under = canvas[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    under[:] = np.rint(under + alpha[..., None] * (ink - under))
    box = painting.visible(alpha, (x, y))
    return Thing("".join(map(str, digits)), "digit", box, font), box[3] - box[1]


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
    rng: Generator, assets: Assets, cfg: ScreensConfig, things: list[Thing], size: tuple[int, int], most: int
) -> tuple[Question, ...]:
    """The number, if any; then one task after the other in random order until there are `most`."""
    asked = [
        Question("read", "what is the number?", t.concept, t.box)
        for t in things
        if t.kind == "digit" and "read" in cfg.tasks
    ]
    pictures = [t for t in things if t.kind == "picture"]
    if not pictures:
        return tuple(asked[:most])
    ask = {
        "name": lambda: _name(rng, things, size),
        "find": lambda: _find(rng, pictures, size),
        "count": lambda: _count(rng, assets, cfg, pictures),
        "yesno": lambda: _yesno(rng, assets, cfg, pictures),
    }
    pools = [ask[t]() for t in rng.permutation([t for t in cfg.tasks if t in ask])]
    while len(asked) < most and any(pools):
        asked += [p.pop() for p in pools if p]
    return tuple(asked[:most])


def _name(rng: Generator, things: list[Thing], size: tuple[int, int]) -> list[Question]:
    """What is at a place where nothing else is, a number neither."""
    places = Counter(place_of(t.box, size) for t in things)
    pictures = [t for t in things if t.kind == "picture"]
    pool = [
        Question("name", f"what is at the {place_of(t.box, size)}?", t.concept, t.box)
        for t in pictures
        if places[place_of(t.box, size)] == 1
    ]
    if len(things) == 1:
        pool += [Question("name", "what is this?", t.concept, t.box) for t in pictures]
    rng.shuffle(pool)  # type: ignore
    return pool


def _find(rng: Generator, pictures: list[Thing], size: tuple[int, int]) -> list[Question]:
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


def _count(rng: Generator, assets: Assets, cfg: ScreensConfig, pictures: list[Thing]) -> list[Question]:
    times = Counter(t.concept for t in pictures)
    word, most = times.most_common(1)[0]
    if most == 1:
        single = pictures[rng.integers(len(pictures))].concept
        word = (_absent(rng, assets, cfg, pictures) if rng.random() < 0.5 else None) or single
    return [Question("count", f"how many {word}?", str(times[word]), None)]


def _yesno(rng: Generator, assets: Assets, cfg: ScreensConfig, pictures: list[Thing]) -> list[Question]:
    other = _absent(rng, assets, cfg, pictures) if rng.random() < 0.5 else None
    target = pictures[rng.integers(len(pictures))]
    box = None if other else target.box
    word = other or target.concept
    article = "an" if word[0] in "aeiou" else "a"
    return [Question("yesno", f"is there {article} {word}?", "no" if other else "yes", box)]
