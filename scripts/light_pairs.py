"""Train the light pairs that ship, x2 and x4, and put them where the library finds them.

    python scripts/light_pairs.py --out runs/light [--photos FOLDER] [--scales 2 4] [--max-hours H] [--steps N]

Given again, the same command goes on where it stopped; stopped by --max-hours it exits with 75. They learn from
pictures whose licence allows it and from no other: composed screens (the drawings of NOTICE), the photographs of
`PHOTOGRAPHS`, fetched with pip, and those of `OPEN_IMAGES` as far as --photos has them. There are about as many screens
as photographs. Set5, Set14, Kodak and BSDS are for tests alone.

Writes src/hypervl_jax/weights/rescale/light_xS.npz (f16), and benchmarks/results/light_xS-training.json: the recipe,
the pictures with their hashes and licences, every hundredth line of the log.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from hypervl_jax import config, needs, watch
from hypervl_jax.config import ScreensConfig
from hypervl_jax.data import screens
from hypervl_jax.data.assets import Assets
from hypervl_jax.rescale import photographs, train, weights

ROOT = Path(__file__).parents[1]
SCREENS, SIDES = 24, (256, 384)  # how many, and pixels a side
PACKAGE = "scikit-image==0.25.2"
PHOTOGRAPHS = {  # in that package, skimage/data -> licence and origin, as its documentation says
    "astronaut.png": "public domain, NASA",
    "brick.png": "CC0, cc0textures.com",
    "camera.png": "CC0, Lav Varshney",
    "chelsea.png": "CC0, Stefan van der Walt",
    "coffee.png": "CC0, Rachel Michetti",
    "grass.png": "CC0, linolafett",
    "gravel.png": "CC0, cc0textures.com",
    "hubble_deep_field.jpg": "public domain, NASA",
    "retina.jpg": "CC0, Mikael Haggstrom",
    "rocket.jpg": "public domain, SpaceX",
}
OPEN_IMAGES = {  # google-coral/test_data, its COPYRIGHT; Open Images V5
    **dict.fromkeys(
        (f"{n}.jpg" for n in ("bird", "cat_720p", "dragonfly", "hot_dog", "owl", "parrot", "pets", "sunflower")),
        "CC BY 2.0, Open Images V5",
    ),
    "grace_hopper.jpg": "public domain, US Navy",
}


def gather(folder: Path, photos: Path | None) -> dict[str, str]:
    """Fills `folder` where it is empty; {file: licence}."""
    told = {f"screen-{i:02}.png": "composed, NOTICE" for i in range(SCREENS)} | PHOTOGRAPHS
    if photos is not None:
        told |= {name: licence for name, licence in OPEN_IMAGES.items() if (photos / name).is_file()}
    if folder.exists():
        if other := {p.name for p in folder.iterdir()} ^ set(told):
            raise SystemExit(f"{folder}: holds other pictures ({', '.join(sorted(other)[:4])}); give the same --photos")
        return told
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(SCREENS):
        side = int(rng.integers(*SIDES))
        shape = ScreensConfig(min_side=side, max_side=side, max_area=side * side)
        Image.fromarray(screens.record(Assets.load(), shape, "train", i).image).save(part / f"screen-{i:02}.png")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(part / "pip"), PACKAGE]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next((part / "pip").glob("*.whl"))) as wheel:
        for name in PHOTOGRAPHS:
            (part / name).write_bytes(wheel.read(f"skimage/data/{name}"))
    shutil.rmtree(part / "pip")
    for name in set(told) & set(OPEN_IMAGES):
        shutil.copyfile(photos / name, part / name)  # type: ignore
    part.rename(folder)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "light", help="where runs are kept")
    parser.add_argument("--photos", type=Path, help="a folder with pictures of OPEN_IMAGES")
    parser.add_argument("--scales", type=int, nargs="+", choices=(2, 4), default=[2, 4])
    parser.add_argument(
        "--steps", type=int, help="instead of the recipe's; a trial, whose weights are not put anywhere"
    )
    parser.add_argument("--max-hours", type=float, help="stop in time before so many hours are over")
    args = parser.parse_args()
    began = time.monotonic()
    needs.keep_compiled()
    told = gather(args.out / "pictures", args.photos)
    source = photographs.found(str(args.out / "pictures"), args.out / "data")
    how = watch.Watch(stop_at=None if args.max_hours is None else began + 3600 * args.max_hours)
    for scale in args.scales:
        cfg = train.light(scale)
        if args.steps is not None:
            cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=args.steps))
        run = args.out / cfg.name
        try:
            pair = train.run(cfg, source, run, how, source.name)
        except watch.Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(stopped.exit_code)
        if args.steps is None:
            ship(cfg, run, pair, told, args.out / "pictures")


def ship(cfg: train.PairConfig, run: Path, pair: weights.Pair, told: dict[str, str], pictures: Path) -> None:
    """The weights and how they came about, where they belong."""
    weights.SHIPPED.mkdir(parents=True, exist_ok=True)
    made = weights.SHIPPED / f"{cfg.name}.npz"
    shutil.copyfile(run / train.WEIGHTS, made)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    recipe = {
        "config": config.to_dict(cfg),
        "weights": weights.fingerprint(pair),
        "bytes": made.stat().st_size,
        "gain_db": float(np.mean([row["gain"] for row in rows[-500:]])),
        "pictures": {
            name: {"licence": licence, "sha256": hashlib.sha256((pictures / name).read_bytes()).hexdigest()}
            for name, licence in sorted(told.items())
        },
        "log": rows[::100],  # each with the time of day, in seconds
    }
    (ROOT / "benchmarks" / "results" / f"{cfg.name}-training.json").write_text(json.dumps(recipe, indent=1) + "\n")
    print(
        f"wrote {made}: {recipe['bytes'] / 1e3:.0f} kB, {recipe['gain_db']:+.2f} dB above bicubic on its own pictures"
    )


if __name__ == "__main__":
    main()
