"""What the encoder needs to run: working memory by the compiler's own account, without weights and without running.

Axes: N tiles, T tile side, P patches a tile, M tokens a tile, D decoder width.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from hypervl_jax import __version__
from hypervl_jax.config import Branch, ModelConfig
from hypervl_jax.model import hypervl
from hypervl_jax.model.projector import Projector
from hypervl_jax.model.vit import Vit

# XLA's CPU backend hands whole chains of operations, attention among them, to a library that allocates while it runs:
# such memory is in no buffer and so in no analysis. Without these fusions every intermediate array is a buffer.
_EVERY_BUFFER: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}


def temporary_bytes(f: Callable, *shapes: object) -> int:
    """Bytes the compiled `f` allocates beside its arguments and its result, every intermediate array counted.

    Compiles for the default device and runs nothing, so a program may be asked about that no memory here could hold.
    """
    try:
        compiled = jax.jit(f).lower(*shapes).compile(compiler_options=_EVERY_BUFFER)
    except jax.errors.JaxRuntimeError as e:
        if "No such compile option" not in str(e):
            raise
        compiled = jax.jit(f).lower(*shapes).compile()  # a release that has no such fusions, or another name for them
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError(f"{jax.default_backend()} gives no memory analysis; run this on CPU or GPU")
    return memory.temp_size_in_bytes


def encoder_shapes(cfg: ModelConfig, branch: Branch, n: int, dtype: DTypeLike = np.uint8) -> tuple:
    """(params, tiles [N T T 3], patch mask [N P]) of one branch as shapes: what `hypervl.encode_tiles` takes."""
    p, vit = cfg.policy, cfg.vit(branch)

    def init(key):
        tile, mask = jnp.zeros((1, p.tile, p.tile, 3)), jnp.ones((1, vit.patches), bool)
        parts = {
            "vit": Vit(vit).init(key, tile, mask),
            "projector": Projector(cfg.llm.width, p.merge).init(key, jnp.zeros((1, vit.patches, vit.width))),
        }
        return {branch: {name: part["params"] for name, part in parts.items()}}

    tiles = jax.ShapeDtypeStruct((n, p.tile, p.tile, 3), dtype)
    return jax.eval_shape(init, jax.random.key(0)), tiles, jax.ShapeDtypeStruct((n, vit.patches), bool)


def as_one_tile(cfg: ModelConfig, side: int) -> ModelConfig:
    """The same encoders for a whole picture of `side` pixels: one tile as large as it, no tiling."""
    replace = dataclasses.replace
    return replace(
        cfg,
        base=replace(cfg.base, tile=side),
        large=replace(cfg.large, tile=side),
        policy=replace(cfg.policy, tile=side, max_tiles=1),
    )


def serial_bytes(cfg: ModelConfig, n: int, branch: Branch = "base", dtype: DTypeLike = np.uint8) -> int:
    """Temporary bytes of the serial encoder over n tiles, one at a time in one program."""
    return temporary_bytes(
        lambda *a: hypervl.encode_tiles(a[0], cfg, branch, *a[1:]), *encoder_shapes(cfg, branch, n, dtype)
    )


def whole_bytes(cfg: ModelConfig, side: int, branch: Branch = "base") -> int:
    """Temporary bytes of the same encoder over the whole picture of `side` pixels at once, its attention global."""
    cfg = as_one_tile(cfg, side)
    return temporary_bytes(lambda *a: hypervl.encode_batch(a[0], cfg, branch, *a[1:]), *encoder_shapes(cfg, branch, 1))


def memory_curve(cfg: ModelConfig, sides: Iterable[int], branch: Branch = "base") -> list[dict[str, int | float]]:
    """Working memory over image size: rows {"side", "tiles", "whole_mb", "serial_mb"}, MB of 10^6 temporary bytes.

    `side` is that of a square picture in pixels, rounded up to whole tiles. Two compilations a row, a few seconds.
    """
    rows = []
    for side in sides:
        across = -(-side // cfg.policy.tile)
        rows.append({
            "side": across * cfg.policy.tile,
            "tiles": across**2,
            "whole_mb": whole_bytes(cfg, across * cfg.policy.tile, branch) / 1e6,
            "serial_mb": serial_bytes(cfg, across**2, branch) / 1e6,
        })  # fmt: skip
    return rows


def machine() -> dict[str, Any]:
    """What kind of machine and which versions a figure comes from; no names, no addresses."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"hypervl_jax": __version__, "jax": jax.__version__, "python": platform.python_version()}
    system = f"{platform.system()} {platform.machine()}"
    return {"device": device.device_kind, "cores": cores, "system": system, **versions}


def told(argv: Sequence[str]) -> str:
    """A command line without --out, --data and the places they name: results are shown to others."""
    places = ("--out", "--data")
    behind = [False, *(a in places for a in argv)]
    return shlex.join(
        a for a, place in zip(argv, behind, strict=False) if not place and a.split("=", 1)[0] not in places
    )


def peak_rss_gb() -> float:
    """The most memory this process has held, GB of 10^9 bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
