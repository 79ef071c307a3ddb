"""HCD with real weights on real pictures: plain, small picture moved, both moved; dB and SSIM an image and on average.

FIRN x4 and IMDN x2, x4 at the official setting, each restored with `--draws` draws of noise. Set5 carries the bars,
Set14 is printed beside it. `--quick` takes one batch of 96 x 96 crops of Set5 with FIRN and the budget of a 256 x 256
picture. Pictures and weights: `--data`, laid out as its SOURCES.md says.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import HERE, Bar, arguments, compile_cache, finish
from tqdm import tqdm

from hypervl_jax import image
from hypervl_jax.rescale import hcd, metrics, weights
from hypervl_jax.rescale.hcd import HcdConfig
from hypervl_jax.rescale.imdn import Imdn
from hypervl_jax.rescale.irn import firn
from hypervl_jax.rescale.pairs import Pair

CROP = 96
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


def over(name: str, run: Callable[[np.ndarray], dict], some: dict[str, np.ndarray]) -> dict:
    """{way: {picture: figures}} of a set, and its table; pictures of a set differ in size, so one at a time."""
    found: dict = {}
    for stem, hr in tqdm(some.items(), desc=name):
        for way, (row,) in run(hr[None]).items():
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
    bars = [
        Bar(f"hcd.crops_{way}_off", abs(float(np.mean(gains(found, way))) - CROPS[way]), 0.05, "<=") for way in CROPS
    ]
    return {"crops": found}, bars


def full(data: Path, draws: int) -> tuple[dict, list[Bar]]:
    out, bars = {}, []
    pair = weights.load(firn(), data / "weights" / "firn_x4.npz")
    for name in ("Set5", "Set14"):
        out[f"firn_x4_{name}"] = over(
            f"FIRN x4, {name}", lambda hr: measure(pair, 4, hr, WAYS, draws), pictures(data / name, 4)
        )
    found = out["firn_x4_Set5"]
    for way, (db, structure, off) in SET5.items():
        bars.append(Bar(f"hcd.firn_{way}_psnr_off", abs(mean(found[way], "psnr_y") - db), off, "<="))
        bars.append(Bar(f"hcd.firn_{way}_ssim_off", abs(mean(found[way], "ssim_y") - structure), 0.002, "<="))
    bars += [Bar(f"hcd.firn_{way}_least_gain", min(gains(found, way)), 0.0) for way in ("LR15", "HR15+LR15")]
    for scale in (4, 2):
        pair = weights.load(Imdn(scale), data / "weights" / f"imdn_x{scale}.npz")
        ways = {way: WAYS[way] for way in ("plain", "LR15")}
        some = {stem: hr for stem, hr in pictures(data / "Set5", scale).items() if stem != "baby"}
        found = out[f"imdn_x{scale}_Set5"] = over(
            f"IMDN x{scale}, Set5 without baby",
            lambda hr, pair=pair, scale=scale, ways=ways: measure(pair, scale, hr, ways, 1),
            some,
        )
        for way in ways:
            off = abs(mean(found[way], "psnr_y") - IMDN[scale, way])
            bars.append(Bar(f"hcd.imdn_x{scale}_{way}_psnr_off", off, 0.05, "<="))
    return out, bars


def options(parser: ArgumentParser) -> None:
    shared = Path(os.environ.get("HYPERVL_SHARED", HERE.parents[1] / "shared"))
    parser.add_argument("--data", type=Path, default=shared / "data" / "rescaling", help="pictures and weights")
    parser.add_argument("--draws", type=int, default=3, help="of noise, a restored picture (default: 3)")


def main() -> int:
    args = arguments(__doc__, more=options)
    if not (args.data / "Set5").is_dir():
        sys.exit(f"{args.data}: no pictures and weights there; name their folder with --data")
    compile_cache()
    found, bars = (quick if args.quick else full)(args.data, args.draws)
    return finish("hcd", found, bars, args, seeds=[0])


if __name__ == "__main__":
    sys.exit(main())
