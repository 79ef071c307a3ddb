"""Training of an IRN pair: what it loses as a pure function, one step, and the loop around it (Xiao et al., ECCV 2020,
sect. 3.4; sums over pixels, rates and schedule as in the official code).

Axes: B batch, H W picture, h w small picture.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from tqdm import tqdm

from hypervl_jax import checkpoint, runs
from hypervl_jax.config import ConfigError
from hypervl_jax.rescale import photographs, weights
from hypervl_jax.rescale.irn import Irn
from hypervl_jax.rescale.pairs import Pair, Params, quantise
from hypervl_jax.rescale.photographs import Source
from hypervl_jax.rescale.resample import bicubic_f32
from hypervl_jax.runs import TrainError
from hypervl_jax.watch import PLAIN, Log, Meter, Stop, Stopped, Trace, Watch, note

WEIGHTS = "pair.npz"  # what a run writes


@dataclass(frozen=True)
class PairTrain:
    """As it stands, the recipe of the published weights."""

    steps: int = 500_000
    batch: int = 16
    crop: int = 144  # pixels a side
    lr: float = 2e-4
    halve_at: tuple[int, ...] = (100_000, 200_000, 300_000, 400_000)  # steps
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 1e-5  # added to the gradient
    clip: float = 10.0  # of the norm of the gradient
    guide: float = 1.0  # how much it counts that the small picture is the bicubic one, times the scale squared
    latent: float = 1.0  # ... that no detail is left beside it
    restore: float = 1.0  # ... that the large picture comes back
    seed: int = 10
    log_every: int = 10
    save_every: int = 5_000
    keep: int = 2

    def __post_init__(self):
        least = ("steps", "batch", "crop", "log_every", "save_every", "keep")
        if small := [n for n in least if getattr(self, n) < 1]:
            raise ValueError(f"{', '.join(small)} must be at least 1")
        if not (self.lr > 0 and self.clip > 0 and min(self.guide, self.latent, self.restore, self.weight_decay) >= 0):
            raise ValueError("lr and clip must be above 0; guide, latent, restore and weight_decay at least 0")


@dataclass(frozen=True)
class PairConfig:
    """One run: the network and how it learns."""

    name: str
    net: Irn
    train: PairTrain = field(default_factory=PairTrain)

    def __post_init__(self):
        if not self.net.blocks or min(*self.net.blocks, self.net.growth) < 1:
            raise ValueError(f"net.blocks {self.net.blocks} and net.growth {self.net.growth} must be at least 1")
        if self.train.crop % self.net.scale:
            raise ValueError(f"train.crop {self.train.crop} must be a multiple of the scale {self.net.scale}")


# --- recipes ---------------------------------------------------------------------------------------------------------


def published(scale: int) -> PairConfig:
    """The official IRN's: 800 pictures of DIV2K, days on a GPU."""
    return PairConfig(f"hcd_x{scale}", Irn((8,) * int(math.log2(scale))))


def light(scale: int) -> PairConfig:
    """What ships: a few hundred kB.

    Nothing is drawn for the detail (`noise` 0; as Bai et al., AAAI 2025, train): a coupling divides noise by e at
    most, so few of them cannot get rid of it.
    """
    net = {2: Irn((4,), growth=8, noise=0.0), 4: Irn((2, 4), growth=8, noise=0.0)}[scale]
    halve = (5_000, 7_000, 8_000, 9_000)
    how = PairTrain(10_000, 8, 64, lr=1e-3, halve_at=halve, guide=0.5, save_every=500)
    return PairConfig(f"light_x{scale}", net, how)


def tiny() -> PairConfig:
    """Minutes on any machine, and better than bicubic."""
    how = PairTrain(600, 8, 48, lr=2e-3, halve_at=(300, 400, 500), guide=0.5, save_every=100)
    return PairConfig("tiny_x2", Irn((2,), growth=8, noise=0.0), how)


PRESETS: dict[str, Callable[[], PairConfig]] = {
    "hcd_x2": functools.partial(published, 2),
    "hcd_x4": functools.partial(published, 4),
    "light_x2": functools.partial(light, 2),
    "light_x4": functools.partial(light, 4),
    "tiny_x2": tiny,
}


# --- one step --------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    step: Array  # i32[]
    params: Params
    opt: Any


def init_state(cfg: PairConfig) -> State:
    """Fresh weights, with which the small picture is the mean of its pixels, and fresh moments."""
    params = jax.jit(cfg.net.init)(jax.random.fold_in(jax.random.key(cfg.train.seed), 0))
    return State(jnp.int32(0), params, transform(cfg.train).init(params))


def transform(cfg: PairTrain) -> optax.GradientTransformation:
    """PyTorch's Adam on clipped gradients, with L2 decay added to them; the rate is applied in `train_step`."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.add_decayed_weights(cfg.weight_decay),
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=1e-8),
    )


def rate(cfg: PairTrain, step: Array | int) -> Array:
    """Halved at each of `halve_at`."""
    return cfg.lr * 0.5 ** (jnp.asarray(step) >= jnp.array(cfg.halve_at or (cfg.steps,))).sum()


def losses(
    params: Params,
    net: Irn,
    cfg: PairTrain,
    hr: Float[Array, "B H W 3"],
    guide: Float[Array, "B h w 3"],
    key: Array | None = None,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The objective and its terms, sums over pixels and means over the batch; `restored` is what came back.

    `guide` is what the small picture should look like. Gradients pass through its rounding unchanged.
    """
    out, b = net.forward(params, hr), len(hr)
    small, detail = out[..., :3], out[..., 3:]
    restored = net.up(params, quantise(small), key)
    terms = {
        "loss_guide": cfg.guide * net.scale**2 * ((small - guide) ** 2).sum() / b,
        "loss_latent": cfg.latent * (detail**2).sum() / b,
        "loss_restore": cfg.restore * jnp.sqrt((hr - restored) ** 2 + 1e-6).sum() / b,
    }
    return sum(terms.values(), jnp.float32(0)), terms | {"restored": restored}


def train_step(state: State, hr: Array, small: Array, cfg: PairConfig) -> tuple[State, dict[str, Array]]:
    """One update on crops of 8 bits. Of the metrics `psnr` is that of the restored crops, `gain` what it is above
    bicubic both ways, in dB of RGB."""
    hr, guide = (x.astype(jnp.float32) / 255 for x in (hr, small))
    key = jax.random.fold_in(jax.random.key(cfg.train.seed), state.step + 1)
    gradient = jax.grad(losses, has_aux=True)
    grads, told = gradient(state.params, cfg.net, cfg.train, hr, guide, key)
    step, opt = transform(cfg.train).update(grads, state.opt, state.params)
    lr = rate(cfg.train, state.step)
    params = jax.tree.map(lambda p, s: p - lr * s, state.params, step)
    psnr, plain = (_psnr(x, hr) for x in (told.pop("restored"), bicubic_f32(guide, (hr.shape[1], hr.shape[2]))))
    told |= {"psnr": psnr, "gain": psnr - plain, "grad_norm": optax.tree.norm(grads), "lr": lr}
    return State(state.step + 1, params, opt), told


def _psnr(x: Array, y: Array) -> Array:
    """Of a batch as one picture, in dB."""
    return -10 * jnp.log10(((jnp.clip(x, 0, 1) - y) ** 2).mean() + 1e-10)


@functools.lru_cache(maxsize=4)
def compiled(cfg: PairConfig) -> Callable[[State, Any, Any], tuple[State, dict[str, Array]]]:
    """`train_step`, jitted for one config; the state is donated."""
    step = jax.jit(train_step, static_argnums=3, donate_argnums=0)
    return lambda state, hr, small: step(state, hr, small, cfg)


# --- the loop --------------------------------------------------------------------------------------------------------


def run(cfg: PairConfig, source: Source, out: Path | str, watch: Watch = PLAIN, about: Any = None) -> Pair:
    """Trains to `cfg.train.steps` on crops of `source`, resuming from the newest checkpoint under `out` that is whole,
    and writes `out/log.jsonl` and the weights, `out/pair.npz` in f16, which are what is returned. `about` tells these
    pictures from others.

    Raises `TrainError` when `out` holds a run of other settings or pictures, and where a loss or a gradient is not
    finite; `Stopped` on SIGTERM, on Ctrl-C and at `watch.stop_at`, with every step saved; `RescaleError` for pictures
    that are all smaller than a crop.
    """
    out, t = Path(out), cfg.train
    scale, side, data = cfg.net.scale, t.crop, {"pictures": len(source), "about": about}
    left = len(source) - len(photographs.large(source, scale, side))
    state = jax.device_put(init_state(cfg), jax.local_devices()[0])  # as a restored one is: no step compiles anew
    out.mkdir(parents=True, exist_ok=True)
    runs.same_run(out / "train.json", cfg, data)
    # A step goes both ways, and its gradient costs twice that.
    smooth, flops = {}, 6 * t.batch * cfg.net.flops(side)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop(watch.stop_at))
        ckpts = stack.enter_context(contextlib.closing(checkpoint.Checkpoints(out / "checkpoints", t.keep)))
        if ckpts.latest() is not None:
            state = ckpts.restore(state)
            saved = ckpts.about(int(state.step))
            smooth = dict(saved.get("smooth", {}))
            if other := runs.changed(saved, cfg):
                note(f"going on from step {int(state.step)}, saved with other settings: {runs.some(other)}")
        elif left:
            note(f"{left} of {len(source)} pictures are smaller than a crop of {side} px and left out")
        done, step_fn = int(state.step), compiled(cfg)
        log = stack.enter_context(contextlib.closing(Log(out, done)))
        meter = Meter(jax.local_devices()[:1], "px/s")
        trace = stack.enter_context(contextlib.closing(Trace(out / "profile", watch.profile, done, t.steps)))
        bar = tqdm(total=t.steps, initial=done, desc=cfg.name, disable=not watch.progress, smoothing=0.05)
        stack.enter_context(bar)
        feed = photographs.batches(source, scale, side, t.batch, t.seed, t.steps, done)
        for step, crops in enumerate(feed, done):
            trace.before(step)
            state, metrics = step_fn(state, *crops)
            values = {k: float(v) for k, v in metrics.items()}
            trace.after(step)
            if bad := sorted(k for k, v in values.items() if not np.isfinite(v)):
                raise TrainError(
                    f"step {step}: {', '.join(bad)} not finite; begin anew with a lower train.lr than {t.lr:g}, what "
                    f"was saved before stays in {out}"
                )
            log.write(step, values)
            some = {k: v for k, v in values.items() if k.startswith("loss_") or k == "gain"}
            smooth |= {k: smooth.get(k, v) + 0.02 * (v - smooth.get(k, v)) for k, v in some.items()}
            meter.add(t.batch * side * side, flops)
            bar.update()
            why = stop.asked()
            if (step + 1) % t.log_every == 0:
                log.flush()
                bar.set_postfix({"dB": f"{values['psnr']:.1f}", "gain": f"{smooth['gain']:+.2f}"} | meter.read())
            if (step + 1) % t.save_every == 0 or step + 1 == t.steps or why:
                log.flush(disk=True)
                told = runs.about(cfg, data, step + 1, {k: v for k, v in smooth.items() if k != "gain"})
                ckpts.save(step + 1, state, told | {"smooth": dict(smooth)})
            if why:
                ckpts.close()  # said when it is true
                raise Stopped(f"{out}: {why} at step {step + 1} of {t.steps}; it is saved, the same command goes on")
    weights.save(Pair(cfg.net, state.params), out / WEIGHTS, np.float16)
    return weights.recognise(out / WEIGHTS)


def preset(name: str) -> PairConfig:
    """Raises `ConfigError` saying what there is."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; choose {', '.join(PRESETS)}, or a file such as configs/hcd_x2.py")
    return PRESETS[name]()
