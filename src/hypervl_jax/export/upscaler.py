"""The upscaler of a rescaling pair as a `.tflite` file, proved before it exists: what a phone restores with.

    up    small f32[1 S S 3] in 0..1, of 8 bits  ->  large f32[1 L L 3], neither clipped nor rounded; L = S x scale

Detail that the weights do not know is 0, its likeliest value, so nothing is drawn. Pictures of any size are restored
tile by tile, as `restore` does.
Axes: S L sides of a tile in the small and in the large picture, H W large picture, h w small picture.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from hypervl_jax.checkpoint import replacing
from hypervl_jax.config import ConfigError, ScreensConfig, from_dict
from hypervl_jax.export import lower, manifest, verify
from hypervl_jax.export.lower import ExportError, Signature
from hypervl_jax.export.manifest import ManifestError
from hypervl_jax.rescale import metrics, tiles, weights
from hypervl_jax.rescale.irn import Irn
from hypervl_jax.rescale.pairs import Pair, quantise

FILE, UP = "upscaler.tflite", "up"
KIND = "upscaler"
FORMAT = 1


@dataclass(frozen=True)
class Upscaler:
    """What lies in the folder, as its `manifest.json` says."""

    part: manifest.Part
    scale: int
    side: int  # of the small tile
    net: str
    weights: str  # their fingerprint, which small pictures note
    min_runtime: str
    parity: dict[str, float] = field(default_factory=dict)  # largest relative error against JAX
    versions: dict[str, str] = field(default_factory=dict)
    kind: str = KIND
    format: int = FORMAT


def export(pair: Pair, out: Path | str, side: int = 96, pictures: list[np.ndarray] | None = None) -> Upscaler:
    """Writes `pair`'s upscaler of tiles of `side` small pixels with a manifest, compared with JAX on `pictures`
    (composed screens if None), and names the folder `out`. An earlier one there is replaced, anything else is left
    alone.

    Raises `ExportUnavailable` without the converter, `ExportError` for a network that cannot be lowered, for one that
    is too far from JAX and for an `out` that is taken. Whatever is raised, nothing of a failed export remains.
    """
    lower.require()
    out, scale = Path(out).absolute(), tiles.whole_scale(pair)
    if side * scale < tiles.LEAST:
        raise ExportError(f"tiles of {side} px: at least {-(-tiles.LEAST // scale)} at scale {scale}, for they overlap")
    _check_free(out)
    shown = screens(side * scale) if pictures is None else pictures
    # Channels of zeros help XLA's CPU backend alone.
    net = dataclasses.replace(pair.net, form="plain") if isinstance(pair.net, Irn) else pair.net

    def up(params: Any, small: jax.Array) -> jax.Array:
        return net.up(params, small, None)

    spec = (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)
    with replacing(out) as work:
        params = jax.tree.map(np.asarray, pair.params)
        lower.to_tflite(work / FILE, params, [Signature(UP, up, spec, ("small",), ("large",))])
        seam = verify.Seam(UP, proved(pair, work / FILE, side, shown))
        if not seam.ok:
            raise ExportError(f"{out}: not exported: {seam}")
        contents = lower.inspect(work / FILE)
        made = Upscaler(
            manifest.part_of(KIND, work / FILE, contents),
            scale,
            side,
            repr(pair.net),
            weights.fingerprint(pair),
            contents.min_runtime,
            {UP: seam.error},
            manifest.tool_versions(),
        )
        manifest.write(work, made)
    return made


def proved(pair: Pair, file: Path, side: int, pictures: list[np.ndarray]) -> float:
    """The largest relative error of the file against JAX over the small pictures' first tiles, u8[H W 3] of at least
    `side` times the scale. Raises `ExportError` where there is none to compare on."""
    if not pictures:
        raise ExportError("an export is verified on at least one picture; none was given")
    runner, large, errors = lower.Runner(file), side * tiles.whole_scale(pair), []
    with jax.default_matmul_precision("highest"):
        for pixels in pictures:
            hr = jnp.asarray(pixels[None, :large, :large], jnp.float32) / 255
            small = quantise(_down(pair, hr))
            found = runner(UP, {"small": np.asarray(small)})["large"]
            errors.append(verify.relative(found, np.asarray(_up(pair, small))))
    return float(np.max(errors))  # NaN where one is


@jax.jit
def _down(pair: Pair, hr: jax.Array) -> jax.Array:
    return pair.down(hr)


@jax.jit
def _up(pair: Pair, lr: jax.Array) -> jax.Array:
    return pair.up(lr, None)


def screens(side: int, n: int = 2) -> list[np.ndarray]:
    """Composed screens of `side` x `side` pixels, or more where that is too few for one."""
    from hypervl_jax.data import screens
    from hypervl_jax.data.assets import Assets

    side = max(side, 48)
    shape = ScreensConfig(min_side=side, max_side=side, max_area=side * side)
    return [screens.record(Assets.load(), shape, "test_known", i).image for i in range(n)]


# --- the folder ------------------------------------------------------------------------------------------------------


def read(folder: Path | str) -> Upscaler:
    """What an exported folder says, where its file is whole and the one that was exported. Raises `ManifestError`."""
    path = Path(folder) / manifest.NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["kind"] != KIND or values["format"] != FORMAT:
            raise ValueError("of another kind or format")
        tables = {k: dict(values.pop(k)) for k in ("parity", "versions")}
        made: Upscaler = from_dict(Upscaler, values, "manifest")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError) as e:
        raise ManifestError(f"{folder}: no exported upscaler ({e}); write one: hypervl rescale export PAIR") from e
    for fault in manifest.file_faults(Path(folder), [made.part.file]):
        raise ManifestError(fault)
    return dataclasses.replace(made, **tables)


def restore(folder: Path | str, small: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """The restored picture, by the file alone: tiles overlap, and each pixel is of the tile in which it lies deepest.
    A side shorter than a tile is mirrored up to it. Raises `ManifestError` and `ExportError`."""
    made = read(folder)
    runner, s, side = lower.Runner(Path(folder) / made.part.file.file), made.scale, made.side
    h, w = small.shape[:2]
    wide = np.pad(small, ((0, max(side - h, 0)), (0, max(side - w, 0)), (0, 0)), "symmetric")
    out = np.empty((wide.shape[0] * s, wide.shape[1] * s, 3), np.uint8)
    for t in tiles.grid(wide.shape[:2], s, side * s):  # type: ignore
        part = runner(UP, {"small": wide[t.read(1)][None].astype(np.float32) / 255})["large"]
        out[t.written(s)] = metrics.to_u8(part)[0][t.kept(s)]
    return out[: h * s, : w * s]


def _check_free(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        read(out)
        if {p.name for p in out.iterdir()} != {FILE, manifest.NAME}:
            raise ManifestError("other files lie there")
    except (ManifestError, OSError) as e:
        raise ExportError(f"{out}: exists and is not an exported upscaler; remove it or name another folder") from e
    if out.samefile(Path.cwd()):
        raise ExportError(f"{out}: an export is replaced by a new folder, and you are in this one; go to another first")
