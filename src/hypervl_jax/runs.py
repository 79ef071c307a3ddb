"""What a run says of itself, beside it and in each checkpoint, so that it is gone on with as it began. What differs is
named, each setting with both values."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hypervl_jax import __version__, checkpoint, config
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import Config, ConfigError

# What may change on the way: it changes nothing that is computed, `skips` and `form` but for rounding.
FREE = ("train.log_every", "train.save_every", "train.keep", "train.skips", "net.form")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class TrainError(RuntimeError):
    """Training had to stop; what was saved before stays."""


@runtime_checkable
class Settings(Protocol):
    """A config of a model or of a pair, as far as a run speaks of it: `train` has a seed."""

    @property
    def train(self) -> Any: ...


# --- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, values: Any) -> None:
    """JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1))
    os.replace(part, path)


def read(path: Path, cure: str = "delete it and run again, it will be computed anew") -> Any:
    """What `write` wrote. Raises `ConfigError` with the cure where it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise ConfigError(f"{path}: damaged ({e}); {cure}") from e


def some(differences: Sequence[str], most: int = 6) -> str:
    more = f" and {len(differences) - most} more" if len(differences) > most else ""
    return "; ".join(differences[:most]) + more


# --- beside a run ----------------------------------------------------------------------------------------------------


def same_config(path: Path, cfg: Config) -> None:
    """Writes the settings of a run, or raises `ConfigError` where it has others. What changes nothing that is computed
    may change, and VRC's until what they decide is there."""
    if not path.exists():
        write(path, config.to_dict(cfg))
        return
    free = (*FREE, *_undecided(cfg, path.parent / "stages"))
    found, told = _known(read(path)), config.to_dict(cfg)
    was, now = (_without(values, free) for values in (found, told))
    if other := config.differences(was, now):
        raise ConfigError(
            f"{path.parent} holds a run with other settings ({some(other)}): choose another --out or delete it"
        )
    if found != told:
        write(path, told)


def _undecided(cfg: Config, stages: Path) -> list[str]:
    """VRC's settings that no finished stage has read."""
    every = [f.name for f in dataclasses.fields(cfg.vrc)]
    reads = {
        "sight": ("sight_steps", "sight_lr", "batch", "weight_decay", "seed"),
        "labels": ("branch", "ratios"),
        "vrc": every,
    }
    decided = {name for stage, names in reads.items() if (stages / f"{stage}.json").exists() for name in names}
    return [f"vrc.{name}" for name in every if name not in decided]


def same_start(out: Path, start: Path | str | None) -> None:
    """Raises `ConfigError` where a run began otherwise: gone on with so, it would silently be another run."""
    path, name = out / "start.json", None if start is None else str(Path(start).absolute())
    if not path.exists() and not (out / "stages").exists():
        write(path, name)
    began = read(path) if path.exists() else None  # a run older than this file began from nothing
    if began != name:
        how = "from nothing: leave out --start" if began is None else f"from {began}: give that as --start"
        raise ConfigError(f"{out} holds a run that began {how}, or choose another --out")


def begun(start: Path | str, cfg: Config) -> Model:
    """The model to begin with. How a picture is cut (`policy`) may be another in every stage."""
    model = checkpoint.load_model(start)
    sizes = [f.name for f in dataclasses.fields(model.config) if f.name != "policy"]
    if other := [name for name in sizes if getattr(model.config, name) != getattr(cfg.model, name)]:
        raise ConfigError(f"{start}: its {', '.join(other)} differ from those of config {cfg.name}")
    return model


def same_run(path: Path, cfg: Settings, about: dict[str, Any]) -> None:
    """Writes the settings of training and what its data are, or raises `TrainError` where they are others. The number
    of steps may change, and what only VRC reads."""
    now = {"config": config.to_dict(cfg), **about}
    if not path.exists():
        write(path, now)
        return
    try:
        found = read(path, "delete it if the settings are those of this run")
    except ConfigError as e:
        raise TrainError(str(e)) from e
    was = dict(found) if isinstance(found, dict) else {}
    was["config"] = _known(was.get("config"), type(cfg))
    for values in (was, now):
        values["config"] = _without(values["config"], (*FREE, "train.steps", "vrc"))
    if other := config.differences(was, now):
        raise TrainError(
            f"{path} is of a run with other settings ({some(other)}): continue it with those, or choose another --out"
        )


def _without(values: Any, paths: Sequence[str]) -> Any:
    """A config as `to_dict` gives it, less some tables or settings of tables."""
    if not isinstance(values, dict):
        return values
    out = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for path in paths:
        table, _, name = path.rpartition(".")
        if isinstance(at := out.get(table) if table else out, dict):
            at.pop(name, None)
    return out


def _known(values: Any, kind: type = Config) -> Any:
    """Settings that were written down, and defaults of those that were not known then."""
    with contextlib.suppress(ConfigError):
        return config.to_dict(config.from_dict(kind, values))
    return values


# --- in a checkpoint -------------------------------------------------------------------------------------------------


def about(cfg: Settings, data: dict[str, Any], step: int, smooth: dict[str, float]) -> dict[str, Any]:
    """What a checkpoint says beside its weights and moments. Which samples come next, and every draw, are functions of
    seed and step; `smooth` are smoothed losses, their mean says which checkpoint is best."""
    loss = {"loss": sum(smooth.values()) / len(smooth)} if smooth else {}
    at = {"step": step, "seed": cfg.train.seed, "data": data, "smooth": dict(smooth), **loss}
    return at | {"config": config.to_dict(cfg), "config_hash": config.config_hash(cfg), "versions": versions()}


def versions() -> dict[str, str]:
    return {"hypervl_jax": __version__, **{name: metadata.version(name) for name in PACKAGES}}


def changed(saved: dict[str, Any], cfg: Settings) -> list[str]:
    """How what goes on differs from what `about` told; nothing is known of checkpoints of older versions."""
    now = {"config": config.to_dict(cfg), "versions": versions()}
    was = {"config": _known(saved.get("config"), type(cfg)), "versions": saved.get("versions")}
    return config.differences(was, now) if saved else []
