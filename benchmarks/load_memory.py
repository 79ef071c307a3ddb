"""Peak memory of reading a decoder of the paper's size: its own bytes and one tensor, no more.

A directory of Qwen3-1.7B's shape is written in bf16, in files of 1 GB, and read in a process of its own, once in bf16
and once in f32. What counts is the peak of resident memory above what was resident before, over the bytes of the
weights that were read. The file's pages that are mapped count too: they are resident while a tensor is copied.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from common import Bar, arguments, finish

from hypervl_jax import convert, layouts, presets, tensors


def make(folder: Path, cfg) -> int:
    """Writes the directory, every layer the same random numbers; returns the bytes of its largest tensor."""
    import jax.numpy as jnp

    rng, flat, largest = np.random.default_rng(0), {}, 0
    for path, shape in convert.llm_shapes(cfg).items():
        one = shape[1:] if path.startswith("blocks.") else shape
        values = rng.standard_normal(one, np.float32).astype(jnp.bfloat16)
        flat[path] = np.broadcast_to(values, shape)
        largest = max(largest, values.nbytes)
    tensors.write(folder, tensors.unflatten(flat), layouts.llm(cfg), shard=1 << 30)
    layouts.write_json(folder / layouts.CONFIG, layouts.llm_values(cfg, "bfloat16"))
    return largest


def measure(folder: Path, dtype: str) -> dict:
    """Peak of resident memory above what was resident before, bytes of the weights, seconds. Linux only."""
    import jax

    convert.llm_shapes(layouts.llm_config(folder))  # JAX has started
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = resident("VmRSS"), time.perf_counter()
    params = convert.load_llm(folder, dtype).params
    seconds = time.perf_counter() - start
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"weights": weights, "peak": resident("VmHWM") - before, "seconds": seconds}


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> int:
    args = arguments(__doc__)
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("this measurement asks Linux")
    cfg = presets.preset("hypervl_1p7b").model.llm
    if args.quick:
        cfg = dataclasses.replace(cfg, depth=2)
    metrics, bars = {}, []
    with tempfile.TemporaryDirectory() as folder:
        largest = make(Path(folder), cfg)
        for dtype in ("bfloat16", "float32"):
            fresh = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            with fresh as pool:
                found = metrics[dtype] = pool.submit(measure, Path(folder), dtype).result()
            found["largest_tensor_in_file"] = largest
            print(f"{dtype}: {found['weights'] / 1e6:,.1f} MB of weights, peak {found['peak'] / 1e6:,.1f} MB, "
                  f"largest tensor {largest / 1e6:,.1f} MB, {found['seconds']:.1f} s", flush=True)  # fmt: skip
            allowed = found["weights"] + largest
            bars.append(Bar(f"{dtype}.peak_over_allowed", found["peak"] / allowed, 1, "<="))
    return finish("load_memory", metrics, bars, args, seeds=[0])


if __name__ == "__main__":
    sys.exit(main())
