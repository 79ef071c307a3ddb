"""The paper's geometry, exported on this machine: what the files weigh, what making them takes, what they answer.

HyperVL of 1.7B with random weights (what is measured here does not depend on them) goes through `hypervl export
--recipe w4a16 --group 128 --bundle base`, a part at a time; the resident memory of all its processes is added up ten
times a second. Every seam of the files, integers and all, is compared with JAX on the way. Then a picture of four tiles
and a thumbnail is asked about, each branch with and without VRC, from the files alone.

Two models in f32 have their seams compared at 1e-4: a decoder of 0.6B, and the 1.7B's with four layers.

Models take 7 GB of disk under .cache/paper_size while they are exported. What was measured is kept there and an
interrupted run goes on; the files in 4 and 8 bits, 3 GB, stay for `picture_size.py`. `--quick` takes two layers and a
short vocabulary.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import HERE, Bar, arguments, commit, finish, once
from PIL import Image

from hypervl_jax import checkpoint, presets, tensors
from hypervl_jax.config import ModelConfig
from hypervl_jax.export import bench, doctor, manifest, parts
from hypervl_jax.export.runtime import ENCODER

CACHE, LAYERS = 1536, 4
QWEN3_0P6B = {"width": 1024, "heads": 16, "kv_heads": 8, "head_dim": 128, "mlp": 3072}


def make(folder: Path, cfg: ModelConfig) -> None:
    """A model folder in bf16 with the tokenizer that ships. No layer has the numbers of another: equal constants would
    lie in a file once."""
    rng, flat = np.random.default_rng(0), {}
    for path, shape in checkpoint.expected(cfg).items():
        stacked = ".layers." in path
        one = shape[stacked:]
        values = rng.standard_normal(one, np.float32) * np.float32(one[-1] ** -0.5 if len(one) > 1 else 0.02)
        if path.endswith(("norm.weight", "norm1.weight", "norm2.weight", "scale", "var")):
            values = 1 + values
        values = (np.abs(values) if path.endswith("var") else values).astype(jnp.bfloat16)
        flat[path] = np.stack([np.roll(values, i, 0) for i in range(shape[0])]) if stacked else values
    tokenizer = checkpoint.load_model("nano", only=("vrc.",)).tokenizer
    checkpoint.save_model(folder, cfg, tensors.unflatten(flat), tokenizer, dtype=None)


def watched(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and the most bytes that it and its children had resident together. Linux only."""
    start, most = time.time(), 0
    with subprocess.Popen(command) as run:
        while run.poll() is None:
            most = max(most, resident(run.pid))
            time.sleep(0.1)
    if run.returncode:
        sys.exit(f"{' '.join(command)}: {run.returncode}")
    return time.time() - start, most


def resident(pid: int) -> int:
    """Bytes of a process and of its descendants."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        children = [c for f in Path(f"/proc/{pid}/task").glob("*/children") for c in f.read_text().split()]
    except OSError:  # it has just ended
        return 0
    own = next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS")), 0)
    return own + sum(resident(int(c)) for c in children)


def exported(files: Path, cfg: ModelConfig, *options: str) -> tuple[manifest.Manifest, dict]:
    """A model made and exported; its manifest, and what the export took."""
    model = files.with_name("model")
    for old in (model, files):
        shutil.rmtree(old, ignore_errors=True)
    make(model, cfg)
    start = time.time()
    hypervl = [sys.executable, "-m", "hypervl_jax.cli"]
    seconds, peak = watched([*hypervl, "export", str(model), "--out", str(files), *options])
    shutil.rmtree(model)
    done, took = manifest.check(files), {}
    for p in done.parts:  # made one after another
        end = (files / p.file.file).stat().st_mtime
        took[p.name], start = end - start, end
    how = {"seconds": seconds, "seconds_by_part": took, "peak_bytes": peak, "parity": done.parity}
    return done, how | {"bytes": {f.file: f.bytes for f in done.files}, "bits": done.bits}


def full(files: Path, cfg: ModelConfig) -> dict:
    """The whole model in 4 and 8 bits."""
    stock = ("--bundle", "base") if doctor.opens() else ()
    options = ("--recipe", "w4a16", "--group", "128", "--cache", str(CACHE), *stock)
    done, found = exported(files, cfg, *options)
    shapes = checkpoint.expected(cfg)
    projector = sum(np.prod(s) for p, s in shapes.items() if p.startswith("base.projector.") and p.endswith("weight"))
    found |= {"base_projector_bytes": int(projector)}
    return found | {"stock_runtime": bool(stock), "recipe": list(done.recipe)}


def asked(files: Path, cfg: ModelConfig) -> dict:
    """What a picture of several tiles costs by the files."""
    picture = files.with_name("picture.png")
    Image.fromarray(parts.default_pictures(cfg, cache=CACHE)[-1]).save(picture)
    found = bench.run(files, picture, repeats=1)
    return {k: found[k] for k in ("ways", "entries", "host")}


def kept(quick: bool) -> Path:
    """Where what this commit made lies; `files` in it are those of `full`."""
    return HERE.parent / ".cache" / "paper_size" / (commit()[:12] + "-quick" * quick)


def sizes(quick: bool) -> ModelConfig:
    """The paper's model."""
    cfg = presets.hypervl_1p7b().model
    return shallow(cfg, 2, vocab=4096) if quick else cfg


def shallow(cfg: ModelConfig, depth: int, **more: int) -> ModelConfig:
    """With fewer layers in the decoder."""
    return dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, depth=depth, **more))


def main() -> int:
    args = arguments(__doc__)
    cfg, folder = sizes(args.quick), kept(args.quick)
    small = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, **QWEN3_0P6B))
    floats = {"0.6B": small, f"1.7B, {LAYERS} layers": shallow(cfg, min(LAYERS, cfg.llm.depth))}
    f32 = ("--branch", "base", "--cache", "704")
    metrics: dict = {"f32": {}}
    for name, c in floats.items():
        path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        metrics["f32"][name] = once(path, lambda c=c: exported(folder / "f32", c, *f32)[1])
        shutil.rmtree(folder / "f32", ignore_errors=True)
    files = folder / "files"
    found = once(folder / "w4a16.json", lambda: full(files, cfg))
    metrics["w4a16"] = found = found | once(folder / "asked.json", lambda: asked(files, cfg))

    for name, f in metrics["f32"].items():
        print(f"{name} in f32: {f['seconds']:.0f} s, {f['peak_bytes'] / 2**30:.1f} GiB, largest seam error "
              f"{max(f['parity'].values()):.1e}")  # fmt: skip
    print(f"1.7B in 4 and 8 bits: {found['seconds']:.0f} s, {found['peak_bytes'] / 2**30:.1f} GiB")
    for file, n in found["bytes"].items():
        print(f"  {file}: {n / 1e6:,.1f} MB")
    for way in found["ways"]:
        said = ", ".join(f"{k} {v:.2f}" for k, v in way["seconds"].items())
        name = way["branch"] + (" + VRC" if way["vrc"] else "")
        print(f"  {name}: {way['tiles']} tiles, {way['prompt']} tokens; seconds: {said}; peak "
              f"{way['peak_bytes'] / 2**30:.2f} GiB")  # fmt: skip
    size = found["bytes"]
    needs = ("decoder.tflite", "embedder.tflite", "encoder_base.tflite")
    whole = size.get("base.litertlm", sum(size[k] for k in needs))
    bars = [
        Bar("paper_size.peak_gib", found["peak_bytes"] / 2**30, 20, "<="),
        Bar("paper_size.decoder_gb", size["decoder.tflite"] / 1e9, 1.1, "<="),
        Bar("paper_size.base_mb", (size[f"{ENCODER}base.tflite"] - found["base_projector_bytes"]) / 1e6, 95, "<="),
        Bar("paper_size.bundle_gb", whole / 1e9, 1.6, "<="),
        *(Bar(f"paper_size.seam {name}", max(f["parity"].values()), 1e-4, "<=") for name, f in metrics["f32"].items()),
    ]
    return finish("paper_size", metrics, bars[-len(floats) :] if args.quick else bars, args, seeds=[0])


if __name__ == "__main__":
    assert jax.default_backend() == "cpu", "these files are made for the CPU's runtime: JAX_PLATFORMS=cpu"
    sys.exit(main())
