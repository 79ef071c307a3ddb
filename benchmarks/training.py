"""How fast a training step is, beside the same step in torch on the same cores; and on a GPU what share of it is used.

  nano      the model that ships, 16 rows of 3 tiles and 208 tokens
  wide      a larger one, so that arithmetic decides: 62 million parameters, 4 rows of 2 tiles (256 px) and 512 tokens

Each in both turns of DCL's alternating schedule: Large by the next token; Base by the next token and the divergence
from Large. Forward, backward, clipping, AdamW, f32. Torch runs transformers' SigLIP and Qwen3 from the same weights, on
the same rows. That both do the same is checked first, over three steps of each turn: losses, divergence and gradient
norms. Then they take turns; a figure is the median over the rounds, of ratios as of times. Without torch only this
library's times are there. The process keeps its memory, as the commands do (`needs.keep_memory`), whoever takes it;
what that is worth is measured by the same in a process that does not (`--as-is`).

On a GPU (`--gpu`): a step of `configs/hypervl_1p7b.py` in bf16, both branches at once, and its share of the device's
published rate (model FLOPs utilisation). `--quick` takes a tiny model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Bar, arguments, compile_cache, finish
from inference import beside, rounds, table

RATIO = 1.1  # bar: our time over torch's
FIRST, LATER = 1e-5, 1e-3  # relative differences: losses of the first step; all after it, since Adam's steps are signs
STEPS = 3  # of each turn, compared


def wide() -> Any:
    """A config whose step is arithmetic."""
    from hypervl_jax import presets
    from hypervl_jax.config import LlmConfig, PlanPolicy, VitConfig

    nano = presets.nano()
    model = dataclasses.replace(
        nano.model,
        policy=PlanPolicy(tile=256, patch=16, max_tiles=2),
        base=VitConfig(width=384, depth=6, heads=6, mlp=1536, tile=256, patch=16),
        large=VitConfig(width=512, depth=8, heads=8, mlp=2048, tile=256, patch=16),
        llm=LlmConfig(vocab=8192, width=512, depth=6, heads=8, kv_heads=4, head_dim=64, mlp=1536),
    )
    data = dataclasses.replace(nano.data, batch=4, tile_buckets=(2,), lengths=(512,))
    return dataclasses.replace(nano, name="wide", model=model, data=data)


def settings(quick: bool) -> list[Any]:
    """What is measured, with the parts that both sides have."""
    from hypervl_jax import presets

    found = [presets.tiny()] if quick else [presets.nano(), wide()]
    plain = {"stage0_steps": 0, "name_weight": 0.0, "optimizer": "adamw", "warmup": 2, "steps": 1000}
    return [dataclasses.replace(c, train=dataclasses.replace(c.train, **plain)) for c in found]


def batch_of(cfg: Any, bucket: int = -1, rows: int = 0) -> Any:
    """Whole rows of random pictures and words: tiles first, then text, whose last quarter is the answer."""
    import numpy as np

    from hypervl_jax.data.pipeline import Batch

    m, rng, b = cfg.model, np.random.default_rng(0), rows or cfg.data.batch
    n, length = cfg.data.tile_buckets[bucket], cfg.data.lengths[bucket]
    patches, shown = m.policy.patches_per_side**2, n * m.policy.tokens_per_tile
    at = np.broadcast_to(np.arange(length, dtype=np.int32), (b, length))
    return Batch(
        rng.integers(0, 256, (b, n, m.policy.tile, m.policy.tile, 3), np.uint8), np.ones((b, n, patches), bool),
        rng.integers(0, m.llm.vocab, (b, length), np.int32), np.where(at < shown, at, -1), at >= length - length // 4,
        at, np.zeros_like(at), np.zeros((b, 2), np.int32), np.zeros((b, 2, 2), np.int32),
        np.full((b, 2, n * patches), 1 / patches, np.float32),
    )  # fmt: skip


def bucket(cfg: Any) -> int:
    """The longest whose pictures leave room for text."""
    room = [
        s - t * cfg.model.policy.tokens_per_tile for t, s in zip(cfg.data.tile_buckets, cfg.data.lengths, strict=True)
    ]
    return max(i for i, left in enumerate(room) if 2 * left >= cfg.data.lengths[i])


def beside_torch(cfg: Any, peers: Any, n: int) -> dict[str, Any]:
    """Both turns of one config: seconds here and, where it is installed, in torch."""
    import jax
    import numpy as np

    from hypervl_jax import train
    from hypervl_jax.config import BRANCHES, Branch
    from hypervl_jax.tensors import flatten
    from hypervl_jax.watch import step_flops

    batch, state, step = batch_of(cfg, bucket(cfg)), train.init_state(cfg, 2), train.compiled(cfg)
    learns, rates = list(flatten(state.params)), np.asarray(train.rate_at(cfg, jax.numpy.arange(cfg.train.steps)))
    theirs: Any = None
    given: dict[str, Any] = {}
    if peers:
        import torch  # type: ignore

        theirs = peers.Trainer(cfg, jax.tree.map(np.asarray, state.params))
        targets, weights = train._supervised(jax.tree.map(jax.numpy.asarray, batch))
        given = {
            "tiles": batch.tiles, "ids": batch.ids.astype(np.int64), "slots": batch.slots.astype(np.int64),
            "targets": np.array(targets, np.int64), "weights": np.array(weights),
        }  # fmt: skip
        given = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in given.items()}

    def mine(branch: Branch) -> dict[str, float]:
        nonlocal state
        state, found = step(state, batch, train.Job((branch,)))
        return {k: float(v) for k, v in found.items() if k != "lr"}

    done = 0

    def torchs(branch: Branch) -> dict[str, float]:
        nonlocal done
        done += 1
        return theirs.step(given, branch, float(rates[done - 1]))

    out: dict[str, Any] = {"parameters": sum(a.size for a in jax.tree.leaves(state.params)), "rows": len(batch.ids),
                           "tokens": batch.ids.shape[1], "tiles": batch.tiles.shape[1], "error": {}}  # fmt: skip
    for i in range(STEPS):
        for branch in reversed(BRANCHES):
            ours = mine(branch)
            for name, value in (torchs(branch) if theirs else {}).items():
                error = abs(ours[name] / value - 1)
                out["error"][f"{name} of {branch}, step {i + 1}"] = error
                if not error <= (FIRST if i == 0 and name.startswith("loss") else LATER):
                    sys.exit(f"{cfg.name}: {name} of {branch}'s step {i + 1} is {ours[name]:.8g}, torch's {value:.8g}: "
                             "nothing to compare")  # fmt: skip
    for branch in BRANCHES:
        calls: dict[str, Callable[[], object]] = {"jax": functools.partial(mine, branch)}
        calls = {"torch": functools.partial(torchs, branch), **calls} if theirs else calls
        found: dict[str, Any] = dict(rounds(calls, n))
        table(f"{cfg.name} {branch}", found)
        flops = step_flops(cfg, (branch,), False, batch, learns)
        out[branch] = {**found, "flops": flops, "flops_per_second": flops / found["jax"]["seconds"]}
        out[branch]["tokens_per_second"] = batch.ids.size / found["jax"]["seconds"]
    return out


def paper(quick: bool, n: int) -> dict[str, Any]:
    """Seconds of a step of the paper's sizes, both branches, on one row; its share of what the device is said to do."""
    import jax

    from hypervl_jax import chips, presets, train
    from hypervl_jax.config import BRANCHES
    from hypervl_jax.tensors import flatten
    from hypervl_jax.watch import step_flops

    cfg = presets.preset("tiny" if quick else "hypervl_1p7b")
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, remat=True, compute_dtype="bfloat16"))
    batch, state = batch_of(cfg, 0, 1), train.init_state(cfg, 2)
    learns, step, job = list(flatten(state.params)), train.compiled(cfg), train.Job(BRANCHES)

    def run() -> None:
        nonlocal state
        state, found = step(state, batch, job)
        jax.block_until_ready(found["loss_base"])

    found = rounds({"step": run}, n)["step"]
    device, flops = jax.devices()[0], step_flops(cfg, BRANCHES, False, batch, learns)
    top = chips.peak(device.device_kind)
    mfu = flops / found["seconds"] / top if top else None
    said = (
        f"MFU {mfu:.1%}" if mfu else f"{flops / found['seconds'] / 1e9:.3g} GFLOP/s, no published rate of this device"
    )
    print(f"{cfg.name}: {found['seconds']:.3f} s a step, {batch.ids.size} tokens, {said}", flush=True)
    memory = device.memory_stats() or {}
    return {**found, "tokens": batch.ids.size, "tiles": batch.tiles.shape[1], "flops": flops, "mfu": mfu,
            "peak_bytes": memory.get("peak_bytes_in_use")}  # fmt: skip


def as_is(args: Namespace) -> dict[str, Any]:
    """Seconds and ratios of every turn in a process whose memory goes back at once."""
    with tempfile.TemporaryDirectory() as out:
        given = ["--as-is", "--out", out, "--rounds", str(args.rounds), *(["--quick"] if args.quick else [])]
        given += ["--threads", str(args.threads)] if args.threads else []
        subprocess.run(
            [sys.executable, __file__, *given], stdout=subprocess.DEVNULL
        )  # 1: a bar that is not asked about
        steps = json.loads((Path(out) / "training-cpu.json").read_text())["metrics"]["steps"]
    return {name: {b: found[b] for b in ("base", "large")} for name, found in steps.items()}


def bars(metrics: dict[str, Any]) -> list[Bar]:
    """Our time over torch's in every turn."""
    return [
        Bar(f"{name}.{branch}", metrics["steps"][name][branch]["jax"]["over_first"], RATIO, "<=")
        for name in metrics["steps"]
        for branch in ("base", "large")
        if "torch" in metrics["steps"][name][branch]
    ]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--gpu", action="store_true", help="a step of the paper's sizes in bf16, and its MFU")
    parser.add_argument("--as-is", action="store_true", help="memory goes back to the kernel as the C library has it")
    parser.add_argument("--threads", type=int, help="cores that both sides run on (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 for a figure that counts")


def main() -> int:
    args = arguments(__doc__, more=options)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = cores[: args.threads or len(cores)]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before JAX starts its threads
    from hypervl_jax import needs

    if not args.as_is:
        needs.keep_memory()
    import jax

    gpu = jax.default_backend() == "gpu"
    if args.gpu and not gpu and not args.quick:
        sys.exit(f"--gpu: no GPU here, JAX sees {jax.devices()[0].device_kind} alone; install jax[cuda12] on a machine "
                 "with one (--quick --gpu walks through it on a CPU)")  # fmt: skip
    compile_cache()
    metrics: dict[str, Any] = {"threads": len(cores), "rounds": args.rounds}
    if args.gpu:
        metrics["paper"] = paper(args.quick, args.rounds)
        return finish("training", metrics, [], args, seeds=[0])
    peers = None if gpu else beside("peers", "torch", "transformers")
    if peers:
        import torch  # type: ignore

        torch.set_num_threads(len(cores))
        metrics["torch"] = torch.__version__
    metrics["steps"] = {cfg.name: beside_torch(cfg, peers, args.rounds) for cfg in settings(args.quick)}
    if not args.as_is and not gpu:
        metrics["as_is"] = as_is(args)
        for name, found in metrics["as_is"].items():
            for b, row in found.items():
                gain = row["jax"]["seconds"] / metrics["steps"][name][b]["jax"]["seconds"]
                print(f"{name} {b:6s} where memory goes back: x {gain:.2f} of the time here", flush=True)
    return finish("training", metrics, [] if args.quick else bars(metrics), args, seeds=[0])


if __name__ == "__main__":
    sys.exit(main())
