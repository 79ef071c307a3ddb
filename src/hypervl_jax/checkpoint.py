"""Saving and loading: a model directory (safetensors + JSON + tokenizer, what `ask`, `eval` and `export` read) and
training checkpoints (Orbax, what `train` resumes from)."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hypervl_jax import __version__, config
from hypervl_jax.config import ModelConfig
from hypervl_jax.text import Tokenizer

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
SHIPPED = Path(__file__).parent / "weights"


class CheckpointError(ValueError):
    """A model directory or checkpoint that is missing, damaged or of another shape; the message names the file."""


class Model(NamedTuple):
    """A model directory in memory. `info` is what training wrote beside it."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer
    info: dict[str, Any]


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a.b": x}"""
    out = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def unflatten(flat: dict[str, Any]) -> dict:
    out: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = out
        for p in parents:
            node = node.setdefault(p, {})
        node[leaf] = value
    return out


def expected(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a model."""
    from hypervl_jax.model import hypervl

    shapes = jax.eval_shape(lambda k: hypervl.init(k, cfg), jax.random.key(0))
    return {name: tuple(leaf.shape) for name, leaf in flatten(shapes).items()}


def save_model(
    path: Path | str, cfg: ModelConfig, params: dict, tokenizer: Tokenizer, info: dict | None = None, half: bool = False
) -> Path:
    """Writes a model directory, whole or not at all. `half` stores f16 (half the bytes; loaded back as f32)."""
    path = Path(path)
    with np.errstate(over="ignore"):  # what f16 cannot hold is found below
        flat = {k: np.asarray(v).astype(np.float16 if half else np.float32) for k, v in flatten(params).items()}
    bad = sorted(k for k, v in flat.items() if not np.isfinite(v).all())
    if bad:
        raise CheckpointError(f"{path}: not saved, weights are not finite: {', '.join(bad[:5])}")
    tmp = path.with_name(path.name + ".part")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    save_file(flat, tmp / WEIGHTS)
    values = {"format": 1, "version": __version__, "model": config.to_dict(cfg), "info": info or {}}
    (tmp / CONFIG).write_text(json.dumps(values, indent=1))
    tokenizer.save(tmp / TOKENIZER)
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(tmp, path)
    shutil.rmtree(old, ignore_errors=True)
    return path


def find_model(name: Path | str) -> Path:
    """A model directory, by path or by the name of weights that ship. Raises `CheckpointError` with what there is."""
    path = Path(name)
    for p in (path / "model", path, SHIPPED / str(name)):  # a run has a config.json of its own
        if (p / CONFIG).is_file():
            return p
    shipped = ", ".join(sorted(p.name for p in SHIPPED.glob("*") if (p / CONFIG).is_file())) or "none"
    what = "has no config.json" if path.exists() else "does not exist"
    raise CheckpointError(f"{path}: {what}; give a model directory or the name of shipped weights ({shipped})")


def load_model(name: Path | str) -> Model:
    """Reads a model directory, strict: unknown, missing, misshapen and non-finite weights are reported together."""
    path = find_model(name)
    try:
        values = json.loads((path / CONFIG).read_text())
        cfg = config.from_dict(ModelConfig, values["model"], f"{path / CONFIG}: model")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{path / CONFIG}: not a model config ({type(e).__name__}: {e})") from e
    try:
        flat = load_file(path / WEIGHTS)
    except (OSError, SafetensorError, struct.error) as e:
        raise CheckpointError(f"{path / WEIGHTS}: missing or damaged ({e}); copy or train it again") from e
    want = expected(cfg)
    wrong = [f"missing {k}" for k in want.keys() - flat.keys()] + [f"unknown {k}" for k in flat.keys() - want.keys()]
    wrong += [f"{k} is {flat[k].shape}, not {want[k]}" for k in want.keys() & flat.keys() if flat[k].shape != want[k]]
    wrong += [f"{k} is {v.dtype}, not a float" for k, v in flat.items() if not jnp.issubdtype(v.dtype, jnp.floating)]
    wrong += [f"{k} is not finite" for k, v in flat.items() if not np.isfinite(v).all()]
    if wrong:
        raise CheckpointError(f"{path / WEIGHTS}: {len(wrong)} weights do not fit: {'; '.join(sorted(wrong)[:8])}")
    params = unflatten({k: v.astype(np.float32) for k, v in flat.items()})
    return Model(cfg, params, Tokenizer.load(path / TOKENIZER), values.get("info", {}))


class Checkpoints:
    """Training state on disk, a step a directory, written atomically, the last `keep` kept."""

    def __init__(self, path: Path | str, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.path = Path(path).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Returns when the state is on disk: the next step donates its buffers."""
        self._manager.save(step, args=self._ocp.args.StandardSave(state))
        self._manager.wait_until_finished()

    def restore(self, like: Any) -> Any:
        """The latest state, in the shapes and dtypes of `like`. Raises `CheckpointError` if it does not fit."""
        step = self.latest()
        if step is None:
            raise CheckpointError(f"{self.path}: no checkpoint to resume from")
        try:
            return self._manager.restore(step, args=self._ocp.args.StandardRestore(like))
        except Exception as e:  # Orbax raises many kinds; all mean that this directory cannot be resumed
            raise CheckpointError(
                f"{self.path / str(step)}: cannot be resumed ({type(e).__name__}: {str(e).splitlines()[0]}); "
                "delete that folder to fall back to the step before, or start anew with another --out"
            ) from e

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
