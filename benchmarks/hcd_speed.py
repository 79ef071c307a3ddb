"""HCD here and by the same loop in PyTorch (parity extra): one picture, same cores, same process, same weights.

15 + 15 steps on Set5's butterfly, 256 x 256 pixels: FIRN x4 with its trained weights, and IRN x4 as published with
weights drawn at random, which takes 18 times the arithmetic; from a zero start and with the same noise in every step,
so that both must find the same. Each round runs one after the other; a figure is the median over rounds of ratios as of
times. The plain form of the network, as the paper writes it, runs once. Weights are frozen on both sides, so a gradient
costs as much as the pass it is of: 4 passes a step of the large picture, 2 of the small one. The share of the
arithmetic limit is of what a large product of matrices reaches in the same run. Compiling is timed apart. The process
keeps its memory, as the commands do (`needs.keep_memory`), whoever takes it. What a step of the large picture
allocates, with and without remat, is the compiler's account. `--quick`: an IRN x2 of one block on a composed screen of
64 x 64 pixels, 3 + 3 steps. Picture and weights: `--data`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import hcd as tables
import jax
import jax.numpy as jnp
import numpy as np
from common import Bar, arguments, finish

from hypervl_jax import bench, image, needs
from hypervl_jax.config import ScreensConfig
from hypervl_jax.data import assets, screens
from hypervl_jax.rescale import hcd, irn, weights
from hypervl_jax.rescale.hcd import Descent, HcdConfig
from hypervl_jax.rescale.pairs import Pair, noise
from hypervl_jax.tensors import flatten

FASTER, APART = 1.3, 1e-3  # bars: times faster, and the relative difference of losses
PRODUCT = 1536  # side of the matrices whose product stands for the limit


class Torch:
    """IRN and FIRN in PyTorch, and HCD's loop as the official code has it; NCHW."""

    def __init__(self, pair: Pair, side: int):
        """`side` of the picture, which has the noise that `z` "fixed" has by the default key."""
        import torch  # type: ignore

        self.torch, self.f, self.net = torch, torch.nn.functional, pair.net
        named = {k: np.asarray(v) for k, v in flatten(pair.params).items()}
        named = {k: np.ascontiguousarray(v.transpose(3, 2, 0, 1)) if v.ndim == 4 else v for k, v in named.items()}
        self.w = {k: torch.tensor(v) for k, v in named.items()}
        small, detail = side // pair.net.scale, 3 * (pair.net.scale**2 - 1)  # type: ignore
        z = pair.net.noise * noise(jax.random.key(0), (1, small, small, detail))  # type: ignore
        self.z = torch.tensor(np.asarray(z).transpose(0, 3, 1, 2).copy())

    def conv(self, x: Any, name: str) -> Any:
        weight = self.w[f"{name}.weight"]
        return self.f.conv2d(x, weight, self.w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def subnet(self, x: Any, name: str) -> Any:
        act = lambda y: self.f.leaky_relu(y, 0.2)  # noqa: E731
        if f"{name}.conv1.weight" in self.w:
            for i in range(1, 5):
                x = self.torch.cat([x, act(self.conv(x, f"{name}.conv{i}"))], 1)
            return self.conv(x, f"{name}.conv5")
        if f"{name}.expandconv.weight" in self.w:
            x = act(self.conv(x, f"{name}.expandconv"))
        parts = []
        for i in (1, 2, 3):
            parts.append(act(self.conv(x, f"{name}.c{i}_d")))
            x = act(self.conv(x, f"{name}.c{i}_r") + x)
        y = self.conv(self.torch.cat([*parts, act(self.conv(x, f"{name}.c4"))], 1), f"{name}.c5")
        return y * self.torch.sigmoid(self.conv(y, f"{name}.PA.conv"))

    def couple(self, x: Any, name: str, back: bool) -> Any:
        low, detail = x[:, :3], x[:, 3:]

        def shift(d: Any) -> Any:
            thin = f"{name}.reduce_conv.0"
            d = self.f.leaky_relu(self.conv(d, thin), 0.2) if f"{thin}.weight" in self.w else d
            return self.subnet(d, f"{name}.F")

        low = low if back else low + shift(detail)
        s = self.torch.tanh(self.subnet(low, f"{name}.H") / 2)
        g = self.subnet(low, f"{name}.G")
        detail = (detail - g) / self.torch.exp(s) if back else detail * self.torch.exp(s) + g
        return self.torch.cat([low - shift(detail) if back else low, detail], 1)

    def flow(self, x: Any, back: bool = False) -> Any:
        at, steps = 0, []
        for n in self.net.blocks:  # type: ignore
            steps += [None, *(f"operations.{at + 1 + i}" for i in range(n))]
            at += 1 + n
        for step in reversed(steps) if back else steps:
            x = (self.unhaar(x) if back else self.haar(x)) if step is None else self.couple(x, step, back)
        return x

    def haar(self, x: Any) -> Any:
        a, b, c, d = (x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        return self.torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 4

    def unhaar(self, x: Any) -> Any:
        a, b, c, d = x.chunk(4, 1)
        cells = self.torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 2)
        return self.f.pixel_shuffle(cells.flatten(1, 2), 2)

    def down(self, hr: Any) -> Any:
        x = self.flow(hr)[:, :3]
        return x + (self.torch.round(255 * x.detach().clamp(0, 1)) / 255 - x.detach())

    def up(self, lr: Any) -> Any:
        return self.flow(self.torch.cat([lr, self.z], 1), back=True)

    def descend(self, hr: np.ndarray, config: HcdConfig) -> list[float]:
        """The losses before each step, of both loops."""
        torch, seen = self.torch, []
        y = torch.tensor(hr.transpose(0, 3, 1, 2).copy())

        def loop(base: Any, restored: Callable[[Any], Any], how: Descent, steps: int) -> Any:
            delta = torch.zeros_like(base)
            for _ in range(steps):
                delta.requires_grad_(True)
                loss = ((restored(base + delta) - y) ** 2).mean()
                (grad,) = torch.autograd.grad(loss, delta)
                seen.append(float(loss.detach()))
                with torch.no_grad():
                    delta = delta - how.alpha * grad / (grad.norm() + 1e-10)
                    delta = delta * min(1.0, how.eps / max(float(delta.norm()), 1e-12))
                    delta = torch.maximum(torch.minimum(delta, 1 - base), -base)
            return base + delta

        moved = loop(y, lambda x: self.up(self.down(x)), config.hr, config.hr_steps)
        with torch.no_grad():
            small = self.down(moved)
        loop(small, self.up, config.lr, config.lr_steps)
        return seen


def matrix_flops() -> float:
    """FLOP/s of a large product, the fastest of five."""
    a = jnp.ones((PRODUCT, PRODUCT))
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    took = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(product(a))
        took.append(time.perf_counter() - began)
    return 2 * PRODUCT**3 / min(took)


def picture(side: int) -> np.ndarray:
    """f32[1 S S 3]: a composed screen."""
    cfg = ScreensConfig(min_side=side, max_side=side, max_area=side * side)
    return screens.record(assets.Assets.load(), cfg, "test_known", 0).image[None].astype(np.float32) / 255


def ours(pair: Pair, hr: jax.Array, config: HcdConfig) -> list[float]:
    found = hcd.descend(pair, hr, config)
    losses = [float(x) for trace in (found.hr_trace, found.lr_trace) for x in np.asarray(trace.loss)[:, 0]]
    jax.block_until_ready(found.lr)
    return losses


def timed(run: Callable[[], list[float]]) -> tuple[list[float], float]:
    began = time.perf_counter()
    return run(), time.perf_counter() - began


def step_bytes(pair: Pair, hr: jax.Array, config: HcdConfig) -> int:
    """What one step of the large picture allocates, by the compiler's account."""

    def step(hr: jax.Array, delta: jax.Array) -> tuple:
        scene = hcd.Scene(pair, hr, hr, jnp.float32(1), jax.random.split(jax.random.key(0), 1))
        return hcd.look(scene, hcd.step_of(config, "hr"), "hr", delta, 0)

    return bench.temporary_bytes(step, hr, hr)


def step_bytes_anew(pair: Pair, hr: jax.Array, config: HcdConfig) -> int:
    """The same where every coupling is computed anew on the way back (`flax.linen.remat`)."""
    kept = irn.Coupling
    irn.Coupling = nn.remat(kept, static_argnums=(2,))  # type: ignore
    try:
        return step_bytes(pair, hr, config)
    finally:
        irn.Coupling = kept


def drawn(net: irn.Irn) -> Pair:
    """A pair of random weights, small enough that the way back is bounded."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return Pair(net, jax.tree.map(lambda x: jnp.asarray(0.02 * rng.normal(size=x.shape), jnp.float32), shapes))


def beside_torch(pair: Pair, hr: np.ndarray, steps: int, rounds: int, limit: float) -> dict[str, Any]:
    """Every figure of one pair; `limit` in FLOP/s."""
    how: dict[str, Any] = {"hr": Descent(start="zero", quantise=True), "lr": Descent(start="zero")}
    config, theirs, x = HcdConfig(steps, steps, **how, z="fixed"), Torch(pair, hr.shape[1]), jnp.asarray(hr)
    _, first = timed(lambda: ours(pair, x, config))  # compiles; no cache between runs here
    theirs.descend(hr, HcdConfig(1, 1, **how, z="fixed"))
    rows, found = [], {}
    for n in range(rounds):
        order = (("jax", lambda: ours(pair, x, config)), ("torch", lambda: theirs.descend(hr, config)))
        found = {name: timed(run) for name, run in (order if n % 2 else order[::-1])}
        rows.append({name: seconds for name, (_, seconds) in found.items()})
        print(f"round {n}: " + ", ".join(f"{name} {s:.2f} s" for name, s in sorted(rows[-1].items())), flush=True)
    a, b = (np.array(found[name][0]) for name in ("jax", "torch"))
    apart = float(np.abs(a - b).max() / np.abs(b).max())
    took = {name: float(np.median([row[name] for row in rows])) for name in ("jax", "torch")}
    ratio = float(np.median([row["torch"] / row["jax"] for row in rows]))
    plain = Pair(dataclasses.replace(pair.net, form="plain"), pair.params)  # type: ignore
    ours(plain, x, dataclasses.replace(config, hr_steps=1, lr_steps=1))  # compiles
    _, plain_s = timed(lambda: ours(plain, x, config))
    flops = (4 * steps + 2 * steps + 1) * pair.net.flops(hr.shape[1])  # type: ignore
    share = flops / took["jax"] / limit
    memory = step_bytes(pair, x, config), step_bytes_anew(pair, x, config)
    print(f"JAX {took['jax']:.2f} s, torch {took['torch']:.2f} s: {ratio:.2f} times as fast; losses {apart:.1e} apart")
    print(f"{flops / 1e9:.0f} GFLOP, {share:.1%} of the {limit / 1e9:.0f} GFLOP/s of a product of matrices")
    print(f"the plain form of the network takes {plain_s:.2f} s")
    print(f"first run {first:.1f} s, so compiling takes {first - took['jax']:.1f} s")
    print(f"a step of the large picture allocates {memory[0] / 1e6:.0f} MB, with remat {memory[1] / 1e6:.0f} MB")
    return {
        "net": repr(pair.net), "rounds": rows, "seconds": took, "ratio": ratio, "apart": apart, "plain_s": plain_s,
        "flops": flops, "share": share, "compile_s": first - took["jax"],
        "step_bytes": memory[0], "step_bytes_remat": memory[1],
    }  # fmt: skip


def options(parser: ArgumentParser) -> None:
    tables.options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="whose median is taken; of IRN two fewer (default: 5)")


def main() -> int:
    args = arguments(__doc__, more=options)
    if importlib.util.find_spec("torch") is None:
        sys.exit("torch is not installed: pip install 'hypervl-jax[parity]', or `make parity` in a clone")
    if not args.quick and not (args.data / "Set5").is_dir():
        sys.exit(f"{args.data}: no pictures and weights there; name their folder with --data")
    import torch  # type: ignore

    needs.keep_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    if args.quick:
        side, steps, pairs = 64, 3, {"irn_x2": drawn(irn.Irn((1,), growth=8))}
        hr = picture(side)
    else:
        side, steps = 256, 15
        firn = weights.load(irn.firn(), Path(args.data) / "weights" / "firn_x4.npz")
        hr = image.load(Path(args.data) / "Set5" / "butterfly.png")[None].astype(np.float32) / 255
        pairs = {"firn_x4": firn, "irn_x4": drawn(irn.Irn((8, 8)))}
    limit, nets, bars = matrix_flops(), {}, []
    for name, pair in pairs.items():
        print(f"\n{name}")
        rounds = args.rounds if name != "irn_x4" else max(1, args.rounds - 2)
        nets[name] = beside_torch(pair, hr, steps, rounds, limit)
        bars.append(Bar(f"hcd_speed.{name}_losses_apart", nets[name]["apart"], APART, "<="))
        if not args.quick:
            bars.append(Bar(f"hcd_speed.{name}_times_torch", nets[name]["ratio"], FASTER))
    told = {"side": side, "steps": steps, "cores": cores, "limit_flops": limit, "torch": torch.__version__}
    return finish("hcd_speed", told | {"nets": nets}, bars, args, seeds=[0, 1])


if __name__ == "__main__":
    sys.exit(main())
