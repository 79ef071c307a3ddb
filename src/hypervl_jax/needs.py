"""What a command needs before it starts: its config, its extras, a model. Found out first, said in one line."""

from __future__ import annotations

import ctypes
import dataclasses
import fnmatch
import importlib.util
import itertools
import os
import sys
from collections.abc import Container, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from hypervl_jax.config import Config, ConfigError
from hypervl_jax.presets import PRESETS, preset

T = TypeVar("T")
DEFAULT = "nano"  # weights that ship
EXTRAS = {  # what an extra brings -> the extra
    "tensorflow_datasets": "train",
    "grain": "train",
    "array_record": "train",
    "ai_edge_litert": "export",
    "libtpu": "plan",
}


class UsageError(ValueError):
    """An argument that cannot be; the message says what can."""


def load_config(name: str, steps: int | None = None) -> Config:
    """A preset by name, or `get_config()` of a Python file. Raises `ConfigError` saying what there is."""
    cfg = _config_of(Path(name), Config, PRESETS) if _is_file(name, PRESETS) else preset(name)
    if steps is None:
        return cfg
    if steps < 1:
        raise UsageError(f"--steps {steps}: at least 1")
    early = cfg.train.stage0_steps
    if steps <= early:
        early = steps * early // cfg.train.steps
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=steps, stage0_steps=early))


def pair_config(name: str, steps: int | None = None) -> Any:
    """The same of a pair for image rescaling, a `PairConfig`."""
    from hypervl_jax.rescale import train

    cfg = (
        _config_of(Path(name), train.PairConfig, train.PRESETS) if _is_file(name, train.PRESETS) else train.preset(name)
    )
    if steps is None:
        return cfg
    if steps < 1:
        raise UsageError(f"--steps {steps}: at least 1")
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=steps))


def _is_file(name: str, presets: Container[str]) -> bool:
    return name not in presets and (Path(name).suffix == ".py" or Path(name).exists())


def _config_of(path: Path, kind: type[T], presets: Iterable[str]) -> T:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise ConfigError(f"{path}: {what}; give a preset ({', '.join(presets)}) or a file such as those of configs/")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: a config is a Python file (.py) with `def get_config() -> {kind.__name__}`")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        cfg = module.get_config()
    except Exception as e:  # it is the user's program: anything may come out of it
        raise ConfigError(f"{path}: get_config() could not be had from this file ({type(e).__name__}: {e})") from e
    if not isinstance(cfg, kind):
        raise ConfigError(f"{path}: get_config() must return a {kind.__name__}, not {type(cfg).__name__}")
    return cfg


def prepared(config: str, steps: int | None, out: Path, accumulate: int | None = None) -> Config:
    """The config of a run, when what the run needs is there: found out now, not after an hour."""
    cfg = load_config(config, steps)
    if accumulate is not None:
        from hypervl_jax import forecast

        cfg = forecast.resized(cfg, accumulate=accumulate)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file is there; choose another --out")
    need("tensorflow_datasets", "grain")
    keep_compiled()
    return cfg


def need(*modules: str) -> None:
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise UsageError(missing(name))


def missing(module: str) -> str:
    return f"{module} is not installed: pip install 'hypervl-jax[{EXTRAS[module]}]', or `make setup` in a clone"


def compiler() -> None:
    """The TPU's compiler, and the one that goes with this JAX: what another compiles it may not be able to read."""
    need("libtpu")
    found, about = metadata.version("libtpu"), metadata.requires("jax") or ()
    wanted = [r.split(";")[0].removeprefix("libtpu==").strip() for r in about if r.startswith("libtpu==")]
    if wanted and not fnmatch.fnmatch(found, wanted[0]):
        jax = metadata.version("jax")
        raise UsageError(f"libtpu {found}: JAX {jax} goes with {wanted[0]}, and with no other: pip install 'jax[tpu]'")


def load(name: str, dtype: Any = "float32") -> Any:
    """A model, or the one line that says how to come by one."""
    from hypervl_jax import checkpoint

    check_model(name)
    keep_compiled()
    return checkpoint.load_model(name, dtype)


def check_model(name: str) -> None:
    """Raises the one line that says how to come by a model where a name can be none."""
    from hypervl_jax import checkpoint

    if not name.strip():
        raise UsageError("--model is empty; give a model folder, or leave it out")
    if name == DEFAULT and not Path(name).exists() and not (checkpoint.SHIPPED / name).exists():
        raise UsageError(
            f"no {DEFAULT} weights ship with this version; make a model with `make quickstart` (or `hypervl "
            "quickstart`), then give --model quickstart/model"
        )
    if (Path(name) / "manifest.json").is_file():
        raise UsageError(f"{name}: these are exported files; ask them with --runtime litert, or give the model folder")


def samples(model: Any, n: int, data: Path | None) -> list[Any]:
    """Samples to calibrate `model` on, of a prepared data set or composed."""
    from hypervl_jax import calibrate

    if data is None:
        if "config" not in model.info:
            raise UsageError("this model does not say what it was trained on: give samples as --data FOLDER")
        return calibrate.from_screens(model, n)
    need("tensorflow_datasets", "array_record")
    from hypervl_jax.data import feeds

    splits = feeds.records(data)
    turns = ((i, split) for i in range(n) for split in splits if i < len(split))
    return calibrate.from_conversations(split[i] for i, split in itertools.islice(turns, n))


def exported(name: str) -> Path:
    """A folder of exported files; the folder of a whole run will do."""
    for path in (Path(name), Path(name) / "export"):
        if (path / "manifest.json").is_file():
            return path
    if name != DEFAULT and not Path(name).exists():
        raise UsageError(f"{name}: does not exist; give a folder that hypervl export MODEL --out FOLDER wrote")
    raise UsageError(
        f"{name}: no exported files; write them: hypervl export {name} --out phone, then ask with --model phone"
    )


def keep_memory() -> None:
    """Memory that this process has had stays with it, unless the environment says how (`MALLOC_...`). XLA takes the
    working memory of a program anew at each call, and glibc gives large pieces back at once: a training step on a CPU
    spends a third of its time on pages that the kernel clears. Where there is no glibc, nothing happens.

    For who composes functions: call it before the first array is made; the commands do.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    for what, value in ((-8, 1), (-4, 0), (-1, -1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD: never
        mallopt(what, value)


def keep_compiled() -> None:
    """Compiled programs are kept between calls, unless the environment says where and which."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "hypervl_jax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
