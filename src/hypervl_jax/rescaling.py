"""The verbs of `hypervl rescale`: pictures down to small ones and back, measured, and shown side by side."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tqdm import tqdm
from tyro.conf import Positional, arg

from hypervl_jax import image, needs, pairing
from hypervl_jax.config import SEEDS
from hypervl_jax.rescale import files

DEFAULT = "light_x2"  # of the pairs that ship
STEPS = 10_000  # the most a loop may have

Files = Annotated[Positional[tuple[Path, ...]], arg(metavar="PICTURE...")]


@dataclass(frozen=True)
class Hcd:
    """How small pictures are made."""

    hcd: bool = True
    """move pictures so that they restore better; --no-hcd: as the pair makes them, in a fraction of the time."""
    hr_steps: int = 15
    """steps of the large picture."""
    lr_steps: int = 15
    """steps of the small picture, after those; each costs half."""
    eps_mode: Literal["rms", "absolute"] = "rms"
    """how far a picture may move: by as much a pixel as the paper's moves at 256 x 256; absolute: the paper's code,
    whose budget of a whole picture fades as pictures grow."""
    lr_eps: float = 0.3
    """how far the small picture may move: the L2 norm of all it moves by, of numbers in 0..1. More mostly gives more,
    and a small picture further from the plain one: docs/rescaling.md has --hr-steps 10 --lr-steps 25 --lr-eps 0.9."""


@dataclass(frozen=True)
class Run:
    """How pictures are gone through."""

    seed: int = 0
    """starts and noise depend on it."""
    tile: int = 384
    """pixels a side of what is held in memory at once, at least 128; pictures of at most that are one tile."""
    overwrite: bool = False
    """replace files that are there."""


How = Annotated[Hcd, arg(name="")]
Running = Annotated[Run, arg(name="")]
Weights = Annotated[str, arg(metavar="FILE")]


def down(
    pictures: Files, /, pair: Weights = DEFAULT, out: Path | None = None, how: How = Hcd(), run: Running = Run()
) -> None:
    """Make pictures small, in 8 bits, such that the same pair restores more of them than of those it makes by itself.

    The small PNG notes the original's size and the pair. Transparency and grey are kept; 16 bits become 8. For example:

    hypervl rescale down photo.jpg

    hypervl rescale down photos --pair irn_x2.pth --out small --hr-steps 5 --lr-steps 5

    hypervl rescale down photo.jpg --no-hcd --out photo_plain.png

    Args:
        pictures: picture files, or folders of them.
        pair: light_x2 or light_x4, which ship, weights of IRN, FIRN, HCFlow or IMDN (.npz, .safetensors, .pth), or
            bicubic-x2, -x3, -x4.
        out: a .png for one picture, else a folder; if not given, beside the one picture, as NAME_lr.png.
    """
    _check(run)
    config = _config(how)
    jobs = files.jobs(pictures, out, files.SMALL, run.overwrite)
    net = pair_of(pair)
    from hypervl_jax.rescale import pictures as any_picture

    def one(job: files.Job) -> None:
        picture = image.layers(job.source, max_bytes=any_picture.MAX_BYTES)
        h, w = picture.rgb.shape[:2]
        with _bar(job.source, net, (h, w), [config], run.tile) as bar:
            small = any_picture.down(net, picture, config, _key(run), run.tile, bar.update)
        files.save(job.out, any_picture.png(small))
        print(f"{job.out}: {small.rgb.shape[1]} x {small.rgb.shape[0]} px of {w} x {h}", flush=True)

    files.ended(jobs, files.each(jobs, one))


def up(
    pictures: Files,
    /,
    pair: Weights = DEFAULT,
    out: Path | None = None,
    notes: bool = True,
    run: Running = Run(),
) -> None:
    """Restore small pictures: to their original's size where they note it, else times the scale of the pair.

    Any picture will do; the original is not needed. For example:

    hypervl rescale up photo_lr.png

    hypervl rescale up small --pair irn_x2.pth --out restored

    Args:
        pictures: picture files, or folders of them.
        pair: the pair they were made by: light_x2 or light_x4, weights (.npz, .safetensors, .pth), or
            bicubic-x2, -x3, -x4.
        out: a .png for one picture, else a folder; if not given, beside the one picture, as NAME_sr.png.
        notes: heed what `down` noted, and refuse another pair; --no-notes: take it for any small picture.
    """
    _check(run)
    jobs = files.jobs(pictures, out, files.LARGE, run.overwrite)
    net = pair_of(pair)
    from hypervl_jax.rescale import pictures as any_picture

    def one(job: files.Job) -> None:
        small = image.layers(job.source, max_bytes=any_picture.MAX_BYTES)
        any_picture.check(net, small, notes)
        h, w = small.rgb.shape[:2]
        with _bar(job.source, net, (h * net.scale, w * net.scale), [None], run.tile) as bar:
            restored = any_picture.up(net, small, _key(run), run.tile, bar.update, notes)
        files.save(job.out, any_picture.png(restored))
        said = f"{job.out}: {restored.rgb.shape[1]} x {restored.rgb.shape[0]} px"
        if any_picture.notes(small) is None:
            said += f", {net.scale} times {w} x {h}: it notes no original"
        print(said, flush=True)

    files.ended(jobs, files.each(jobs, one))


def evaluate(
    pictures: Files, /, pair: Weights = DEFAULT, out: Path | None = None, how: How = Hcd(), run: Running = Run()
) -> None:
    """PSNR and SSIM (luma) of restored pictures: plain, the small picture moved, both moved; a row a picture.

    Measured as papers do: cut to a multiple of the scale, which is also the border that is left out. For example:

    hypervl rescale eval Set5 --eps-mode absolute --out set5.json

    hypervl rescale eval photo.jpg --pair imdn_x2.npz --hr-steps 0

    Args:
        pictures: picture files, or folders of them.
        pair: light_x2 or light_x4, which ship, weights of IRN, FIRN, HCFlow or IMDN (.npz, .safetensors, .pth), or
            bicubic-x2, -x3, -x4.
        out: JSON file to write: every figure of every picture, and how they were made.
    """
    _check(run)
    config = _config(how)
    jobs = [files.Job(source) for source in files.found(pictures)]
    if out is not None:
        files.checked(jobs[0].source, out, run.overwrite, ".json")
    net = pair_of(pair)
    from hypervl_jax.rescale import evaluate as measure

    some = measure.ways(config)
    rows: dict[str, dict] = {}

    def one(job: files.Job) -> None:
        hr = _cut(job.source, net)
        found = _outcomes(job.source, hr, net, some, run)
        if not rows:
            print(measure.heading(some), flush=True)
        rows[str(job.source)] = measure.figures(hr, found, net.scale)
        print(measure.line(job.source.name, rows[str(job.source)]), flush=True)

    failed = files.each(jobs, one)
    if rows:
        mean = measure.means(rows.values())
        print(measure.line("mean", mean))
        print(f"{'mean PSNR of RGB':24}" + "       ".join(f"{f['psnr_rgb']:19.3f}" for f in mean.values()))
        if out is not None:
            files.save(out, _told(net, how, run, rows, mean).encode())
            print(f"wrote {out}")
    files.ended(jobs, failed)


def compare(
    picture: Annotated[Positional[Path], arg(metavar="PICTURE")],
    /,
    out: Path,
    pair: Weights = DEFAULT,
    at: Annotated[tuple[int, int] | None, arg(metavar="X Y")] = None,
    how: How = Hcd(),
    run: Running = Run(),
) -> None:
    """Draw a picture beside what is restored of it: whole, a part enlarged, and maps of what is wrong.

    For example:

    hypervl rescale compare photo.jpg --out compared.png

    hypervl rescale compare photo.jpg --pair firn_x4.npz --out eye.png --at 120 80

    Args:
        picture: a picture file.
        out: PNG file to write.
        pair: light_x2 or light_x4, which ship, weights of IRN, FIRN, HCFlow or IMDN (.npz, .safetensors, .pth), or
            bicubic-x2, -x3, -x4.
        at: the pixel around which a part is enlarged; if not given, where the plain way is most wrong.
    """
    _check(run)
    config = _config(how)
    files.checked(picture, out, run.overwrite, ".png")
    net = pair_of(pair)
    from hypervl_jax.rescale import compare as drawing
    from hypervl_jax.rescale import evaluate as measure
    from hypervl_jax.rescale import pictures as any_picture

    def one(job: files.Job) -> None:
        hr = _cut(job.source, net)
        h, w = hr.shape[:2]
        if at is not None and not (0 <= at[0] < w and 0 <= at[1] < h):
            raise files.RescaleError(f"--at {at[0]} {at[1]}: choose 0 to {w - 1} and 0 to {h - 1}")
        found = _outcomes(job.source, hr, net, measure.ways(config), run)
        found["bicubic"] = measure.both_ways(hr, net.scale)
        rows = measure.figures(hr, found, net.scale)
        drawn = drawing.draw(hr, found, rows, at)
        files.save(out, any_picture.png(image.Layers(drawn, None, False, None, {})))
        for way, figures in rows.items():
            print(f"{way}: {figures['psnr_y']:.3f} dB, SSIM {figures['ssim_y']:.4f}")
        print(f"wrote {out}")

    files.each([files.Job(picture, out)], one)


VERBS = {
    "down": down,
    "up": up,
    "eval": evaluate,
    "compare": compare,
    "train": pairing.train,
    "export": pairing.export,
}


def rescale() -> None:
    """Pictures down to small ones that restore well, and back: HCD with a pair of networks.

    For example:

    hypervl rescale down photo.jpg

    hypervl rescale up photo_lr.png

    hypervl rescale eval Set5 --pair firn_x4.npz

    hypervl rescale compare photo.jpg --out compared.png

    hypervl rescale train tiny_x2 --data photos --out runs/tiny_x2

    hypervl rescale export runs/tiny_x2/pair.npz --out phone
    """  # what `hypervl --help` lists; `cli.main` goes to VERBS


# --- settings --------------------------------------------------------------------------------------------------------


def _check(run: Run) -> None:
    """Raises `UsageError` for settings that cannot be."""
    if not 0 <= run.seed <= SEEDS:
        raise needs.UsageError(f"--seed {run.seed}: choose 0 to {SEEDS}")
    if not 128 <= run.tile <= image.MAX_PIXELS:
        raise needs.UsageError(f"--tile {run.tile}: at least 128")


def _key(run: Run) -> Any:
    import jax

    return jax.random.key(run.seed)


def _config(how: Hcd) -> Any:
    """The `HcdConfig`, or None where there is nothing to descend."""
    for name, n in (("hr", how.hr_steps), ("lr", how.lr_steps)):
        if not 0 <= n <= STEPS:
            raise needs.UsageError(f"--{name}-steps {n}: choose 0 to {STEPS}")
    if not how.hcd or how.hr_steps + how.lr_steps == 0:
        return None
    if not 0 < how.lr_eps < math.inf:
        raise needs.UsageError(f"--lr-eps {how.lr_eps:g}: choose a number above 0")
    from hypervl_jax.rescale.hcd import Descent, HcdConfig

    return HcdConfig(how.hr_steps, how.lr_steps, lr=Descent(eps=how.lr_eps), eps_mode=how.eps_mode)


def pair_of(name: str) -> Any:
    """A pair by the name of one that ships, or by its file of weights.

    Raises `UsageError` for what is neither, `CheckpointError` for a file that is none.
    """
    from hypervl_jax.rescale import pairs, weights

    needs.keep_compiled()
    if scale := re.fullmatch(r"bicubic-x([234])", name):
        return pairs.Pair(pairs.Bicubic(int(scale[1])), {})
    if name in weights.LIGHT:
        return weights.shipped(name)
    if not Path(name).suffix:
        some = ", ".join([*weights.LIGHT, "bicubic-x2", "-x3", "-x4"])
        raise needs.UsageError(f"--pair {name}: choose {some}, or a file of weights (.npz, .safetensors, .pth)")
    return weights.recognise(name)


# --- work, and how far it is -----------------------------------------------------------------------------------------


def _cut(source: Path, pair: Any) -> Any:
    """A picture cut to a multiple of the scale. Raises `RescaleError` where too little is left to compare."""
    from hypervl_jax.rescale import metrics
    from hypervl_jax.rescale.pictures import MAX_BYTES

    hr = metrics.modcrop(image.load(source, max_bytes=MAX_BYTES), pair.scale)
    h, w = hr.shape[:2]
    least = metrics.WINDOW + 2 * pair.scale
    if min(h, w) < least:
        raise files.RescaleError(f"{w} x {h} px once cut to a multiple of {pair.scale}; at least {least} are compared")
    return hr


def _outcomes(source: Path, hr: Any, pair: Any, some: dict, run: Run) -> dict:
    """What becomes of a picture each way."""
    from hypervl_jax.rescale import evaluate as measure

    with _bar(source, pair, hr.shape[:2], [c for config in some.values() for c in (config, None)], run.tile) as bar:
        return measure.outcomes(pair, hr, some, _key(run), run.tile, bar.update)


def _bar(source: Path, pair: Any, size: tuple[int, int], walks: list, tile: int) -> tqdm:
    """A progress bar over all tiles of `walks` over a picture of (height, width): HCD's by a config, others None.
    Says first how long HCD will take."""
    from hypervl_jax.rescale import tiles

    small = -(-size[0] // pair.scale), -(-size[1] // pair.scale)
    n, configs = len(tiles.grid(small, pair.scale, tile)), [c for c in walks if c is not None]
    if configs:
        steps = sum(c.hr_steps + c.lr_steps for c in configs)
        took = _time(sum(tiles.seconds(pair, small, c, tile) for c in configs))
        said = f"{source}: {size[1]} x {size[0]} px, {steps} steps over {n} tile{'s' * (n > 1)}, about {took}"
        print(said + "; --no-hcd needs none of them", file=sys.stderr, flush=True)
    total = n * sum(1 if c is None else tiles.steps(c) for c in walks)
    return tqdm(total=total, desc=source.name, unit="tile", leave=False, disable=None)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _told(pair: Any, how: Hcd, run: Run, rows: dict, mean: dict) -> str:
    """JSON of figures, and of how they were made; None for the PSNR of equal pictures."""
    from hypervl_jax import bench
    from hypervl_jax.rescale import weights

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: finite(v) for k, v in value.items()}
        return None if value == math.inf else value

    made = {"net": repr(pair.net), "scale": pair.scale, "weights": weights.fingerprint(pair)}
    told = {"pair": made, "how": asdict(how), "seed": run.seed, "machine": bench.machine(), "pictures": rows}
    return json.dumps(finite(told | {"mean": mean}), indent=1, allow_nan=False) + "\n"
