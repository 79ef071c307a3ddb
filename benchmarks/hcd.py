"""HCD with real weights on real pictures: plain, small picture moved, both moved; dB and SSIM a picture and on average.

    python benchmarks/hcd.py --sets Set5              # what carries the bars; the other sets are printed beside it
    python benchmarks/hcd.py --sets Set5 Set14 kodak  # all tables

FIRN x4 and IMDN x4, x2 at the official setting, the light pairs that ship, and in a column of its own the setting
that `hcd_setting.py` chose, where it has been run. Restored with `--draws` draws of noise. Every picture's figures are
kept under .cache/benchmarks/hcd, so that the same command goes on where it was interrupted; the results file holds
every set that is complete. `--quick` takes one batch of 96 x 96 crops of Set5 with FIRN and the budget of a 256 x 256
picture. Pictures and weights: `--data`, laid out as its SOURCES.md says, Kodak's in the folder beside it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import HERE, Bar, arguments, compile_cache, finish, once
from tqdm import tqdm

from hypervl_jax import image, needs
from hypervl_jax.rescale import hcd, metrics, weights
from hypervl_jax.rescale.hcd import Descent, HcdConfig
from hypervl_jax.rescale.imdn import Imdn
from hypervl_jax.rescale.irn import firn
from hypervl_jax.rescale.pairs import Pair

CROP = 96
SETS = ("Set5", "Set14", "kodak")
WAYS = {"plain": HcdConfig(hr_steps=0, lr_steps=0), "LR15": HcdConfig(hr_steps=0), "HR15+LR15": HcdConfig()}
FIGURES = ("psnr_y", "ssim_y", "psnr_rgb", "lr_psnr")
# What the official networks gave, with HCD written anew from its code: PSNR-Y, SSIM, +- dB; of crops, the gain
SET5 = {"plain": (33.573, 0.9186, 0.02), "LR15": (34.067, 0.9231, 0.04), "HR15+LR15": (34.230, 0.9254, 0.05)}
IMDN = {(4, "plain"): 31.811, (4, "LR15"): 33.396, (2, "plain"): 37.778, (2, "LR15"): 38.803}  # without baby
CROPS = {"LR15": 0.603, "HR15+LR15": 0.783}


def pictures(folder: Path, scale: int) -> dict[str, np.ndarray]:
    return {f.stem: metrics.modcrop(image.load(f), scale) for f in sorted(folder.glob("*.png"))}


def measure(pair: Pair, scale: int, hr: np.ndarray, ways: dict[str, HcdConfig], draws: int, seed: int = 0) -> dict:
    """{way: FIGURES of every picture of a batch u8[B H W 3]}; the PSNR of small pictures is against the plain ones."""
    x, up, found, plain = jnp.asarray(hr, jnp.float32) / 255, jax.jit(pair.net.up), {}, None
    for way, config in ways.items():
        small = hcd.descend(pair, x, config, jax.random.key(seed)).lr
        lr = metrics.to_u8(np.asarray(small))
        plain = lr if plain is None else plain
        rows = []
        for draw in range(draws):
            restored = metrics.to_u8(np.asarray(up(pair.params, small, jax.random.key(1000 + draw))))
            rows.append([
                (metrics.psnr(b, a, scale), metrics.ssim(b, a, scale), metrics.psnr(b, a, scale, "rgb"))
                for a, b in zip(hr, restored, strict=True)
            ])  # fmt: skip
        near = [metrics.psnr(a, b, channel="rgb") for a, b in zip(lr, plain, strict=True)]
        means = np.mean(rows, 0).tolist()
        found[way] = [dict(zip(FIGURES, (*row, n), strict=True)) for row, n in zip(means, near, strict=True)]
    return found


def over(name: str, run: Callable[[np.ndarray], dict], some: dict[str, np.ndarray], kept: Path) -> dict:
    """{way: {picture: figures}} of a set, and its table; pictures of a set differ in size, so one at a time. What is
    kept of a picture is not measured again."""
    found: dict = {}
    for stem, hr in tqdm(some.items(), desc=name):
        for way, row in once(kept / f"{stem}.json", lambda hr=hr: {w: r for w, (r,) in run(hr[None]).items()}).items():
            found.setdefault(way, {})[stem] = row
    table(name, found)
    return found


def mean(rows: dict[str, dict], figure: str) -> float:
    return float(np.mean([row[figure] for row in rows.values()]))


def table(name: str, found: dict) -> None:
    print(f"\n{name}\n{'':12}" + "".join(f"{f'{way}: dB, SSIM':>26}" for way in found))
    stems = list(next(iter(found.values())))
    for stem in stems:
        print(
            f"{stem:12}"
            + "".join(f"{rows[stem]['psnr_y']:19.3f} {rows[stem]['ssim_y']:.4f}" for rows in found.values())
        )
    print(f"{'mean':12}" + "".join(f"{mean(r, 'psnr_y'):19.3f} {mean(r, 'ssim_y'):.4f}" for r in found.values()))
    print(f"{'RGB':12}" + "".join(f"{mean(r, 'psnr_rgb'):19.3f}       " for r in found.values()))
    print(f"{'small':12}" + "".join(f"{mean(r, 'lr_psnr'):19.2f}       " for r in found.values()))


def gains(found: dict, way: str) -> list[float]:
    return [row["psnr_y"] - found["plain"][stem]["psnr_y"] for stem, row in found[way].items()]


def quick(data: Path, draws: int) -> tuple[dict, list[Bar]]:
    pair = weights.load(firn(), data / "weights" / "firn_x4.npz")
    ways = {way: HcdConfig(c.hr_steps, c.lr_steps, eps_mode="rms") for way, c in WAYS.items()}
    middle = {}
    for stem, hr in pictures(data / "Set5", 4).items():
        top, left = ((n - CROP) // 2 for n in hr.shape[:2])
        middle[stem] = hr[top : top + CROP, left : left + CROP]
    rows = measure(pair, 4, np.stack(list(middle.values())), ways, draws)
    found = {way: dict(zip(middle, r, strict=True)) for way, r in rows.items()}
    table("FIRN x4, crops of Set5", found)
    held = [
        Bar(f"hcd.crops_{way}_off", abs(float(np.mean(gains(found, way))) - CROPS[way]), 0.05, "<=") for way in CROPS
    ]
    return {"crops": found}, held


class Task(NamedTuple):
    """One table: a pair on a set."""

    label: str  # firn_x4_Set5
    pair: Pair
    folder: Path
    ways: dict[str, HcdConfig]
    draws: int

    def kept(self, root: Path) -> Path:
        """Where its figures are: a folder that says what made them."""
        ways = [(way, digest(config)) for way, config in self.ways.items()]
        told = weights.fingerprint(self.pair), ways, self.draws, code()
        return root / self.label / hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def digest(config: HcdConfig) -> str:
    """Twelve digits that name a setting."""
    told = asdict(config) | {"loss": config.loss.__name__}
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


@functools.cache
def code(*more: str) -> str:
    """A digest of what figures depend on, and of other modules."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name in ("hcd", "imdn", "irn", "layers", "metrics", "pairs", "resample", *more):
        digest.update((HERE.parent / "src/hypervl_jax/rescale" / f"{name}.py").read_bytes())
    return digest.hexdigest()


def tasks(data: Path, draws: int) -> list[Task]:
    """Every table there are weights and pictures for."""
    own = {} if (config := chosen(HERE / "results")) is None else {"own": config}
    alone = {way: WAYS[way] for way in ("plain", "LR15")}  # of bicubic, whose large picture nothing is gained by moving
    pairs = [("firn_x4", weights.load(firn(), data / "weights" / "firn_x4.npz"), WAYS | own, draws)]
    for scale in (4, 2):
        pairs.append((f"imdn_x{scale}", weights.load(Imdn(scale), data / "weights" / f"imdn_x{scale}.npz"), alone, 1))
        pairs.append((f"light_x{scale}", weights.shipped(f"light_x{scale}"), WAYS | own, 1))  # it draws nothing
    folders = {"Set5": data / "Set5", "Set14": data / "Set14", "kodak": data.parent / "kodak"}
    return [
        Task(f"{label}_{name}", pair, folder, ways, n)
        for label, pair, ways, n in pairs
        for name, folder in folders.items()
        if folder.is_dir()
    ]


def full(data: Path, draws: int, sets: Sequence[str], kept: Path) -> tuple[dict, list[Bar]]:
    out = {}
    for task in tasks(data, draws):
        scale, some = int(task.pair.scale), pictures(task.folder, int(task.pair.scale))
        where = task.kept(kept)
        if task.folder.name in sets or all((where / f"{stem}.json").exists() for stem in some):
            out[task.label] = over(
                task.label.replace("_", " "),
                lambda hr, t=task, s=scale: measure(t.pair, s, hr, t.ways, t.draws),
                some,
                where,
            )
    return out, bars(out)


def bars(out: dict) -> list[Bar]:
    """What must hold of the tables that are there."""
    made = []
    if (found := out.get("firn_x4_Set5")) is not None:
        for way, (db, structure, off) in SET5.items():
            made.append(Bar(f"hcd.firn_{way}_psnr_off", abs(mean(found[way], "psnr_y") - db), off, "<="))
            made.append(Bar(f"hcd.firn_{way}_ssim_off", abs(mean(found[way], "ssim_y") - structure), 0.002, "<="))
        made += [Bar(f"hcd.firn_{way}_least_gain", min(gains(found, way)), 0.0) for way in ("LR15", "HR15+LR15")]
    for scale in (4, 2):
        if (found := out.get(f"imdn_x{scale}_Set5")) is not None:
            for way, rows in found.items():
                some = {stem: row for stem, row in rows.items() if stem != "baby"}
                off = abs(mean(some, "psnr_y") - IMDN[scale, way])
                made.append(Bar(f"hcd.imdn_x{scale}_{way}_psnr_off", off, 0.05, "<="))
        if (found := out.get(f"light_x{scale}_Set5")) is not None:
            made.append(Bar(f"hcd.light_x{scale}_least_gain", min(gains(found, "HR15+LR15")), 0.0))
            made.append(Bar(f"hcd.light_x{scale}_mean_gain", float(np.mean(gains(found, "HR15+LR15"))), 0.2))
    for label, found in out.items():
        if "own" in found:
            more = mean(found["own"], "psnr_y") - mean(found["HR15+LR15"], "psnr_y")
            made.append(Bar(f"hcd.own_above_official_{label}", more, 0.0))
    return made


def chosen(results: Path) -> HcdConfig | None:
    """What `hcd_setting.py` wrote last; None where there is nothing."""
    for path in sorted(results.glob("hcd_setting-*.json")):
        told = json.loads(path.read_text())["metrics"]["chosen"]["config"]
        told |= {k: {n: math.inf if v is None else v for n, v in told[k].items()} for k in ("hr", "lr")}
        how: dict[str, Any] = {k: Descent(**told[k]) for k in ("hr", "lr")}
        return HcdConfig(told["hr_steps"], told["lr_steps"], **how, eps_mode=told["eps_mode"])
    return None


def options(parser: ArgumentParser) -> None:
    shared = Path(os.environ.get("HYPERVL_SHARED", HERE.parents[1] / "shared"))
    parser.add_argument("--data", type=Path, default=shared / "data" / "rescaling", help="pictures and weights")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="of pictures (default: all)")
    parser.add_argument("--draws", type=int, default=3, help="of noise, a restored picture (default: 3)")


def main() -> int:
    args = arguments(__doc__, more=options)
    if not (args.data / "Set5").is_dir():
        sys.exit(f"{args.data}: no pictures and weights there; name their folder with --data")
    needs.keep_memory()
    compile_cache()
    kept = HERE.parent / ".cache" / "benchmarks" / "hcd"
    found, held = quick(args.data, args.draws) if args.quick else full(args.data, args.draws, args.sets, kept)
    return finish("hcd", found, held, args, seeds=[0])


if __name__ == "__main__":
    sys.exit(main())
