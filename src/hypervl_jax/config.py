"""Every setting of the library: nested frozen dataclasses and named presets.

A config is a value: hashable, printable, serialisable (`to_dict`, `from_dict`). Presets are functions of no arguments;
a file under `configs/` is one runnable experiment, `get_config() -> Config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import re
import reprlib
import sys
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

Branch = Literal["base", "large"]
BRANCHES: tuple[Branch, ...] = ("base", "large")
GRID = 100  # points of composed screens are on a grid of GRID x GRID cells
SIDE, MANY, SEEDS = 8192, 10_000_000, 2**32 - 1  # pixels, records of a split, seeds: more is a slip or a trap


def _positive(settings: Any, *names: str) -> None:
    if small := [n for n in names if getattr(settings, n) < 1]:
        raise ValueError(f"{', '.join(small)} must be at least 1")


def _above_zero(settings: Any, *names: str) -> None:
    if wrong := [f"{n} {v}" for n in names if not 0 < (v := getattr(settings, n)) <= sys.float_info.max]:
        raise ValueError(f"{', '.join(wrong)} must be above 0 and finite")


def _within(settings: Any, low: int, high: int | float, *names: str) -> None:
    if wrong := [f"{n} {v}" for n in names if not low <= (v := getattr(settings, n)) <= high]:
        raise ValueError(f"{', '.join(wrong)} must lie in {low} .. {high}")


def _multiple(settings: Any, name: str, of: str) -> None:
    a, b = getattr(settings, name), getattr(settings, of)
    if a % b:
        raise ValueError(f"{name} {a} must be a multiple of {of} {b}")


def _pattern(path: str) -> None:
    try:
        re.compile(path)
    except re.error as e:
        raise ValueError(f"path {path!r:.80} is no regular expression: {e}") from e


@dataclass(frozen=True)
class PlanPolicy:
    """How a picture becomes tiles (papers: HyperVL 3.1, AnyRes; InternVL; LLaVA-NeXT).

    `tile` pixels a side, `patch` pixels a ViT patch, `merge` patches a side folded into one token by the pixel shuffle.
    """

    tile: int = 512
    patch: int = 16
    merge: int = 2
    mode: Literal["native_pad", "grid_match", "grid_pad"] = "native_pad"
    max_tiles: int = 36  # thumbnail not counted
    thumbnail: bool = True  # one padded copy of the whole image when there is more than one tile
    drop_pad: bool = True  # only cells that touch real pixels become tokens
    min_side: int = 32  # pixels; the ratio never shrinks a side below this

    def __post_init__(self):
        _positive(self, "tile", "patch", "merge", "max_tiles", "min_side")
        if self.tile % (self.patch * self.merge):
            raise ValueError(f"tile {self.tile} must be a multiple of patch x merge = {self.patch * self.merge}")

    @property
    def cell(self) -> int:
        """Pixels a side of what becomes one visual token."""
        return self.patch * self.merge

    @property
    def patches_per_side(self) -> int:
        return self.tile // self.patch

    @property
    def cells_per_side(self) -> int:
        return self.tile // self.cell

    @property
    def tokens_per_tile(self) -> int:
        return self.cells_per_side**2


@dataclass(frozen=True)
class VitConfig:
    """SigLIP2 encoder geometry. `tile` and `patch` fix the position table to (tile / patch)^2 rows."""

    width: int
    depth: int
    heads: int
    mlp: int
    tile: int = 512
    patch: int = 16
    eps: float = 1e-6

    def __post_init__(self):
        _positive(self, "width", "depth", "heads", "mlp", "tile", "patch")
        _above_zero(self, "eps")
        _multiple(self, "width", "heads")
        _multiple(self, "tile", "patch")

    @property
    def patches(self) -> int:
        return (self.tile // self.patch) ** 2


@dataclass(frozen=True)
class LlmConfig:
    """Geometry of a Qwen3 decoder, or without `qk_norm` of a Llama."""

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 1e6
    eps: float = 1e-6
    tied: bool = True
    qk_norm: bool = True  # RMS norm on queries and keys; Llama has none

    def __post_init__(self):
        _positive(self, "vocab", "width", "depth", "heads", "kv_heads", "head_dim", "mlp")
        _above_zero(self, "rope_theta", "eps")
        _multiple(self, "heads", "kv_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: the rotary embedding turns pairs")


@dataclass(frozen=True)
class VrcConfig:
    """Visual Resolution Compressor: MobileNetV4-conv-small trunk, weighted pooling, MLP (HyperVL 3.2; TC sect. 4.1)."""

    multiplier: float = 1.0  # width multiplier of the trunk
    side: int = 384  # pixels a side of the proxy image
    hidden: int = 512
    rescale: Literal["R1", "R2", "none"] = "R2"
    min_ratio: float = 0.1

    def __post_init__(self):
        _above_zero(self, "multiplier", "min_ratio")
        _within(self, 1, SIDE, "side")
        _positive(self, "hidden")
        _within(self, 0, 1, "min_ratio")


@dataclass(frozen=True)
class TextConfig:
    """Chat template. `think` adds Qwen3's empty thinking block; `coords` is the grid of points and boxes in text."""

    think: bool = True
    layout: Literal["rowcol", "plain"] = "rowcol"
    coords: int = 1000

    def __post_init__(self):
        _positive(self, "coords")


@dataclass(frozen=True)
class ModelConfig:
    base: VitConfig
    large: VitConfig
    llm: LlmConfig
    vrc: VrcConfig
    policy: PlanPolicy
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self):
        for name in BRANCHES:
            vit = self.vit(name)
            if (vit.tile, vit.patch) != (self.policy.tile, self.policy.patch):
                raise ValueError(
                    f"branch {name} sees tiles of {vit.tile} px in patches of {vit.patch} px, "
                    f"the plan cuts tiles of {self.policy.tile} in patches of {self.policy.patch}"
                )

    def vit(self, branch: Branch) -> VitConfig:
        if branch not in BRANCHES:
            raise ValueError(f"no branch {branch!r}; choose one of {', '.join(BRANCHES)}")
        return getattr(self, branch)


@dataclass(frozen=True)
class ScreensConfig:
    """A set of composed screens (`data/screens.py`): pictures of things and numbers, with questions."""

    name: str = "nano"
    concepts: int = 64
    tasks: tuple[str, ...] = ("name", "find", "read", "count", "yesno")
    min_side: int = 64  # pixels
    max_side: int = 192
    max_area: int = 192 * 144
    max_things: int = 6
    picture: tuple[int, ...] = (18, 56)  # pixels, longer side, from .. to
    print_height: tuple[int, ...] = (7, 40)  # pixels, height of a printed digit, log-uniform: small print is common
    hand_height: tuple[int, ...] = (14, 44)  # pixels, height of a handwritten digit
    digits: int = 4  # at most, of a number
    questions: int = 8  # questions a training screen
    held_out_questions: int = 4  # of any other: fewer, on more screens
    sheets: int = 8_000  # tiles full of named things, what stage 0 learns from (`data/sheets.py`)
    sheet_side: int = 96  # pixels: that of a tile
    train: int = 24_000  # screens a split; `label` is what VRC learns from, both test splits are held out
    label: int = 3_000
    test_known: int = 2_000  # known artists, new compositions; other digits, other fonts
    test_unseen: int = 2_000  # an artist never seen; other digits, other fonts
    seed: int = 0

    def __post_init__(self):
        # What no honest set has, for these also come with other people's models; `screens.check` has the rest.
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):  # it names a folder
            raise ValueError(f"name {self.name!r:.40} must be of letters, digits, _ and -")
        _within(self, 0, MANY, "sheets", "train", "label", "test_known", "test_unseen")
        _within(self, 0, SIDE, "min_side", "max_side")
        _within(self, 0, SIDE**2, "max_area")
        _within(self, 1, SIDE, "sheet_side")
        _within(self, 0, 64, "max_things", "questions", "held_out_questions", "digits")
        _within(self, 0, SEEDS, "seed")
        if max((0, *self.picture, *self.print_height, *self.hand_height)) > SIDE:
            raise ValueError(f"picture, print_height and hand_height must end at {SIDE} or before")


@dataclass(frozen=True)
class DataConfig:
    screens: ScreensConfig = field(default_factory=ScreensConfig)
    batch: int = 32  # screens a step
    shrink_prob: float = 0.3  # training screens shown at a random area ratio ...
    shrink_min: float = 0.1  # ... uniform in [shrink_min, 1]
    tile_buckets: tuple[int, ...] = (1, 3, 5)  # a batch holds screens of one bucket; thumbnail counted
    lengths: tuple[int, ...] = (112, 208, 272)  # sequence length of each bucket
    max_rate: float = 0.01  # share of conversations that may fit no bucket

    def __post_init__(self):
        _positive(self, "batch")
        _above_zero(self, "shrink_min")
        _within(self, 0, 1, "shrink_prob", "shrink_min", "max_rate")
        rises = all(a < b for a, b in itertools.pairwise((0, *self.tile_buckets)))
        if not self.tile_buckets or not rises or len(self.lengths) != len(self.tile_buckets) or min(self.lengths) < 1:
            raise ValueError(
                f"tile_buckets {self.tile_buckets} must rise from 1, with one of lengths {self.lengths} each"
            )


@dataclass(frozen=True)
class DclConfig:
    """Dual Consistency Learning: KL(teacher Large || student Base) on answer tokens (HyperVL 3.3)."""

    weight: float = 1.0  # lambda; 0 switches the KL term off
    temperature: float = 2.0  # tau
    schedule: Literal["alternate", "joint", "random"] = "alternate"
    llm_train: Literal["both", "teacher_only"] = "both"

    def __post_init__(self):
        _within(self, 0, MANY, "weight")
        _above_zero(self, "temperature")


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole path (`llm.blocks.layers.q.weight`) matches `path` learn at `rate` times the rate."""

    path: str  # a regular expression
    rate: float = 1.0  # 0 freezes: no gradient, no optimiser state, the same bits after any step

    def __post_init__(self):
        _within(self, 0, MANY, "rate")
        _pattern(self.path)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 4_000  # 0: the model that was begun with stands still, and VRC alone is trained
    stage0_steps: int = 400  # image-name term alone, on sheets: encoders and projectors
    name_weight: float = 0.5  # image-name term beside the next-token loss; 0 switches it off
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: matrices of hidden layers by Muon, the rest by AdamW
    lr: float = 1e-3
    stage0_lr: float = 2e-3
    warmup: int = 100
    final_lr: float = 0.1  # of lr, at the end of the cosine
    weight_decay: float = 0.01
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    rules: tuple[Rule, ...] = ()  # the first that matches counts, and every parameter has one; (): all learn alike
    accumulate: int = 1  # micro-batches a step, one after another: the same sums, less memory
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of both encoders and the decoder; weights stay f32
    attention_block: int = 0  # the decoder's queries and keys at a time: scores never exist whole; 0: they do
    loss_chunk: int = 0  # rows of the vocabulary at a time, so that logits never exist whole; 0: they do
    seed: int = 0
    scan: bool = True  # one compiled layer body; False unrolls it, which small models on a CPU run faster
    remat: bool = False  # compute activations anew in the backward pass ...
    remat_policy: Literal["nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"] = "nothing_saveable"
    log_every: int = 10
    save_every: int = 500
    keep: int = 2  # checkpoints, the last ones; the one of least loss stays as well
    skips: int = 0  # of any 100 steps, how many may be passed over for a loss or a gradient that is not finite

    def __post_init__(self):
        _positive(self, "accumulate", "log_every", "save_every", "keep")
        _within(self, 0, sys.maxsize, "steps")
        _within(self, 0, 100, "skips")
        _within(self, 0, self.steps, "stage0_steps")
        _within(self, 0, MANY, "loss_chunk", "attention_block")
        _above_zero(self, "lr", "stage0_lr", "clip")
        _within(self, 0, MANY, "name_weight", "warmup", "weight_decay")
        _within(self, 0, 1, "final_lr")
        _within(self, 0, 0.999999, "b1", "b2")
        _within(self, 0, SEEDS, "seed")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of the matrices whose whole path matches `path`; what they add is scaled by alpha / rank (`lora.py`)."""

    path: str = r"llm\.blocks\.layers\.(q|k|v|o|gate|up|down)\.weight"  # a regular expression
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self):
        _pattern(self.path)
        _positive(self, "rank")
        _above_zero(self, "alpha")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class VrcTrainConfig:
    """Labels from the model's own loss ratio, then regression (HyperVL 3.2)."""

    branch: Branch = "base"
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    tolerance: float = 1.5  # epsilon
    floor: float = 0.3  # eta, nats
    rule: Literal["first", "suffix"] = "first"
    reduce: Literal["max", "mean"] = "max"  # several questions about one picture
    steps: int = 6_000
    batch: int = 32
    lr: float = 6e-3
    weight_decay: float = 1e-5
    sight_steps: int = 0  # before that: the trunk learns to see what stands on a screen (`sight.py`); needs its boxes
    sight_lr: float = 6e-3
    seed: int = 0

    def __post_init__(self):
        _positive(self, "steps", "batch")
        _above_zero(self, "tolerance", "lr", "sight_lr")
        _within(self, 0, MANY, "sight_steps")
        _within(self, 0, MANY, "floor", "weight_decay")
        _within(self, 0, SEEDS, "seed")
        if self.ratios[-1:] != (1.0,) or not all(a < b for a, b in itertools.pairwise((0, *self.ratios))):
            raise ValueError(f"ratios {self.ratios} must rise from above 0 to exactly 1")


@dataclass(frozen=True)
class Config:
    name: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    dcl: DclConfig = field(default_factory=DclConfig)
    vrc: VrcTrainConfig = field(default_factory=VrcTrainConfig)

    def __post_init__(self):
        screens, tile, coords = self.data.screens, self.model.policy.tile, self.model.text.coords
        if "find" in screens.tasks and coords != GRID:
            raise ValueError(
                f"data.screens.tasks: 'find' is answered on a grid of {GRID}, model.text.coords is {coords}: make that "
                f"{GRID} or leave 'find' out"
            )
        if self.data.batch % self.train.accumulate:
            raise ValueError(
                f"data.batch {self.data.batch} must be a multiple of train.accumulate {self.train.accumulate}"
            )
        if screens.sheet_side > tile:
            raise ValueError(f"data.screens.sheet_side {screens.sheet_side} must be at most model.policy.tile {tile}")


class ConfigError(ValueError):
    """A setting, preset or config file that does not exist or does not fit; the message says what to write instead."""


# --- JSON ------------------------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """Any config of this file as JSON-ready values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: Any, where: str = "config") -> Any:
    """The inverse of `to_dict`, strict: unknown, missing and mistyped settings raise `ConfigError` with their path."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected settings of {cls.__name__}, found {reprlib.repr(values)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            raise ConfigError(f"{where}.{key}: no such setting" + (f"; did you mean {near[0]!r}?" if near else ""))
    out = {}
    for name, f in fields.items():
        if name not in values:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{where}.{name}: missing")
            continue
        out[name] = _coerce(hints[name], values[name], f"{where}.{name}")
    try:
        return cls(**out)
    except ValueError as e:
        raise ConfigError(f"{where}: {e}") from e


def _coerce(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {reprlib.repr(value)} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, found {reprlib.repr(value)}")
        return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if kind is float and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{where}: expected a finite number, found {reprlib.repr(value)}")
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: expected {kind.__name__}, found {reprlib.repr(value)}")
    return value


def differences(was: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two configs as `to_dict` gives them, each setting with both values."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        return [] if was == now else [f"{where} was {reprlib.repr(was)}, is {reprlib.repr(now)}"]
    out = []
    for key in {**was, **now}:
        path = f"{where}.{key}" if where else str(key)
        if key in was and key in now:
            out += differences(was[key], now[key], path)
        else:
            out.append(f"{path} is not in {'this one' if key in was else 'that one'}")
    return out


def config_hash(config: Any) -> str:
    """Twelve hexadecimal digits that name these settings."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]
