"""Configs with names: tiny (tests), quickstart (minutes), nano (hours), hypervl_1p7b (the paper's sizes)."""

from __future__ import annotations

import difflib
from typing import Any

from hypervl_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    DclConfig,
    LlmConfig,
    ModelConfig,
    PlanPolicy,
    ScreensConfig,
    TextConfig,
    TrainConfig,
    VitConfig,
    VrcConfig,
    VrcTrainConfig,
)


def _model(tile: int, patch: int, base: tuple[int, int, int], large: tuple[int, int, int], **rest: Any) -> ModelConfig:
    """(width, depth, heads) a branch; the MLP is four widths, as in SigLIP2."""
    b, l = (VitConfig(w, d, h, 4 * w, tile, patch) for w, d, h in (base, large))
    return ModelConfig(base=b, large=l, **rest)


_MUON: dict[str, Any] = {"optimizer": "muon", "lr": 2e-3, "stage0_lr": 4e-3, "final_lr": 0.02}  # small, from nothing


def tiny() -> Config:
    """Everything at the size of a unit test."""
    model = _model(
        32, 8, (32, 2, 2), (48, 3, 3),
        llm=LlmConfig(vocab=512, width=48, depth=2, heads=4, kv_heads=2, head_dim=16, mlp=96),
        vrc=VrcConfig(multiplier=0.25, side=64, hidden=32),
        policy=PlanPolicy(tile=32, patch=8, max_tiles=9, min_side=16),
        text=TextConfig(think=False, coords=100),
    )  # fmt: skip
    screens = ScreensConfig(
        name="tiny", concepts=4, min_side=24, max_side=64, max_area=64 * 64, max_things=2, questions=3,
        held_out_questions=2, sheets=16, sheet_side=32, train=64, label=32, test_known=16, test_unseen=16,
    )  # fmt: skip
    return Config(
        "tiny",
        model,
        DataConfig(screens, batch=4, tile_buckets=(1, 3, 5), lengths=(96, 96, 128)),
        TrainConfig(steps=4, stage0_steps=2, warmup=2, save_every=2, optimizer="muon"),
        DclConfig(),
        VrcTrainConfig(steps=4, batch=4),
    )


def nano() -> Config:
    """Made to be shipped: about 3 M parameters, 64 things, five tasks, screens of up to seven tiles."""
    model = _model(
        64, 8, (96, 4, 3), (128, 6, 4),
        llm=LlmConfig(vocab=512, width=128, depth=4, heads=4, kv_heads=2, head_dim=32, mlp=384),
        vrc=VrcConfig(multiplier=0.35, side=128, hidden=128, rescale="R1"),
        policy=PlanPolicy(tile=64, patch=8, max_tiles=6, min_side=16),
        text=TextConfig(think=False, coords=100),
    )  # fmt: skip
    screens = ScreensConfig(
        min_side=48, max_side=176, max_area=96 * 120, max_things=5, picture=(24, 64), print_height=(9, 40),
        hand_height=(16, 44), digits=3, sheets=12_000, sheet_side=64, label=9_000,
    )  # fmt: skip
    return Config(
        "nano",
        model,
        DataConfig(screens, batch=16, tile_buckets=(1, 3, 5, 7), lengths=(160, 208, 224, 232)),
        TrainConfig(steps=8_000, stage0_steps=2_500, scan=False, **_MUON),
        DclConfig(),
        VrcTrainConfig(tolerance=2.0, floor=0.6, steps=2_000, lr=2e-3, sight_steps=12_000),
    )


def quickstart() -> Config:
    """A smaller nano that trains from nothing in minutes on two cores: 12 things, small screens, two tasks."""
    model = _model(
        64, 8, (64, 3, 2), (96, 4, 3),
        llm=LlmConfig(vocab=512, width=96, depth=3, heads=3, kv_heads=1, head_dim=32, mlp=288),
        vrc=VrcConfig(multiplier=0.25, side=96, hidden=64),
        policy=PlanPolicy(tile=64, patch=8, max_tiles=4, min_side=16),
        text=TextConfig(think=False, coords=100),
    )  # fmt: skip
    screens = ScreensConfig(
        name="quickstart", concepts=12, tasks=("name", "read"), min_side=36, max_side=112, max_area=64 * 64,
        max_things=3, picture=(24, 56), print_height=(9, 40), hand_height=(16, 44), digits=1, questions=2,
        held_out_questions=2, sheets=6_000, sheet_side=64, train=6_000, label=800, test_known=400, test_unseen=400,
    )  # fmt: skip
    return Config(
        "quickstart",
        model,
        DataConfig(screens, batch=16, tile_buckets=(1, 3), lengths=(96, 120)),
        TrainConfig(steps=2_600, stage0_steps=1_100, warmup=50, scan=False, save_every=400, **_MUON),
        DclConfig(),
        VrcTrainConfig(steps=200),
    )


def hypervl_1p7b() -> Config:
    """The paper's sizes: SigLIP2 Base/16 and Large/16 at 512 px, Qwen3-1.7B (papers: HyperVL table 1)."""
    model = _model(
        512, 16, (768, 12, 12), (1024, 24, 16),
        llm=LlmConfig(vocab=151_936, width=2048, depth=28, heads=16, kv_heads=8, head_dim=128, mlp=6144),
        vrc=VrcConfig(),
        policy=PlanPolicy(),
    )  # fmt: skip
    screens = ScreensConfig(tasks=("name", "read", "count", "yesno"))  # `find` has a coarser grid than this text
    how = TrainConfig(compute_dtype="bfloat16", attention_block=512, loss_chunk=2048, remat=True, skips=5)
    return Config("hypervl_1p7b", model, DataConfig(screens), how)


PRESETS = {"tiny": tiny, "quickstart": quickstart, "nano": nano, "hypervl_1p7b": hypervl_1p7b}


def preset(name: str) -> Config:
    """The preset called `name`. Raises `ConfigError` with the nearest names for one that does not exist."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(PRESETS)}"
        raise ConfigError(f"no preset {name!r}: {hint}")
    return PRESETS[name]()
