"""HCD: a small picture from which a frozen upscaler restores more, found by descending the gradient on pictures (Xu et
al., "Downscaled Representation Matters", ICCV 2023).

Two loops of the same step. The first moves the large picture before it is shrunk, through downscaler and upscaler; the
second moves the small picture, through the upscaler alone. Nothing else is stored, and whoever restores the picture
does what they always did. The defaults are the settings of the official code.
Axes: B batch, H W picture, h w small picture, S steps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from hypervl_jax.rescale import metrics
from hypervl_jax.rescale.pairs import Pair, keys, quantise

Pictures = Float[Array, "B H W 3"]
Loss = Callable[[Array, Array], Float[Array, " B"]]  # (restored, original) -> one number an image
PAPER_SIDE = 256  # of the picture that budgets in "rms" mode are given for


def mse(restored: Pictures, original: Pictures) -> Float[Array, " B"]:
    """The official loss."""
    return ((restored - original) ** 2).mean((1, 2, 3))


def mae(restored: Pictures, original: Pictures) -> Float[Array, " B"]:
    return jnp.abs(restored - original).mean((1, 2, 3))


def mse_y(restored: Pictures, original: Pictures) -> Float[Array, " B"]:
    """On luma alone: what PSNR-Y rewards, at the cost of colour."""
    return (((restored - original) @ (jnp.array(metrics.LUMA) / 255)) ** 2).mean((1, 2))


@dataclass(frozen=True)
class Descent:
    """One step of a loop, as a value. `eps` bounds how far the picture moves, `alpha` is the length of a step (Adam's
    rate): L2 norms of a whole image in 0..1, or the largest change of a number ("linf")."""

    norm: Literal["l2", "linf"] = "l2"
    eps: float = 0.3  # math.inf: no bound
    alpha: float = 20 / 255
    optimiser: Literal["step", "adam"] = "step"  # "step": along the gradient (its sign for "linf"), by alpha
    start: Literal["random", "zero"] = "random"
    keep: Literal["last", "best"] = "last"  # "best": of the losses seen, each of its own noise; costs one step more
    quantise: bool = False  # whether the small picture is rounded before it goes up

    def __post_init__(self):
        if not (self.eps > 0 and self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"eps {self.eps}, alpha {self.alpha}: must be above 0, alpha finite")
        if self.start == "random" and math.isinf(self.eps):
            raise ValueError('eps inf: a random start has no length without a bound; choose start "zero"')


@dataclass(frozen=True)
class HcdConfig:
    """How a picture is optimised; as it stands, as in the official code. A loop of 0 steps leaves its picture alone."""

    hr_steps: int = 15
    lr_steps: int = 15
    hr: Descent = field(default_factory=lambda: Descent(quantise=True))
    lr: Descent = field(default_factory=Descent)
    eps_mode: Literal["absolute", "rms"] = "absolute"  # "rms": eps and alpha are for 256 x 256 and grow with the side
    target: Literal["original", "collaborative"] = "original"  # what the second loop restores
    z: Literal["fresh", "fixed", "zero"] = "fresh"  # a draw a call; one, that `pair.up(lr, key)` draws too; none
    loss: Loss = mse
    patience: int = 0  # an image rests after so many steps in a row without a smaller loss; 0: never

    def __post_init__(self):
        if min(self.hr_steps, self.lr_steps, self.patience) < 0:
            raise ValueError("hr_steps, lr_steps and patience must be at least 0")


class Trace(NamedTuple):
    """What one loop saw before each of its steps; NaN once an image rests."""

    loss: Float[Array, "S B"]
    grad_norm: Float[Array, "S B"]  # L2


class HCDResult(NamedTuple):
    lr: Float[Array, "B h w 3"]  # of 8 bits, as 0..1: what is stored
    hr: Float[Array, "B H W 3"]  # the collaborative large picture, which is thrown away
    hr_trace: Trace
    lr_trace: Trace


class State(NamedTuple):
    """A loop between two steps. `best` and `waited` are of what was seen so far."""

    delta: Pictures
    opt: Any  # Adam's moments; nothing for plain steps
    best_delta: Pictures | None  # where the best is kept
    best: Float[Array, " B"]
    waited: Float[Array, " B"]


class Scene(NamedTuple):
    """What a loop does not change."""

    pair: Pair
    base: Pictures  # what is moved: the large or the small picture
    target: Pictures
    size: Float[Array, ""]  # by which eps and alpha are multiplied
    key: Array  # one an image


class Passes(NamedTuple):
    """How the networks run over pictures: at once (`WHOLE`), or tile by tile (`tiles.py`)."""

    look: Callable[[Scene, HcdConfig, str, Array, Array | int], tuple[Array, Array]]  # see `look`
    shrink: Callable[[Pair, Array], Array]  # the small pictures, of 8 bits


def descend(
    pair: Pair,
    hr: Pictures,
    config: HcdConfig = HcdConfig(),
    key: Array | None = None,
    driver: Literal["auto", "host", "scan"] = "auto",
    passes: Passes | None = None,
) -> HCDResult:
    """The small pictures of `hr` (0..1, sides multiples of the pair's scale) that restore best.

    `key` is one key (default: seed 0), or one an image; every image has draws, norms and budgets of its own, so a batch
    equals its images one by one. "host" runs compiled programs from Python, "scan" is one program; "auto" takes the
    first on CPUs, where XLA runs convolutions inside a loop far slower, except where this function is itself being
    transformed. Other `passes` than `WHOLE` are always run from Python.
    """
    key = keys(jax.random.key(0) if key is None else key, len(hr))
    if passes is not None:
        driver = "host"
    if driver == "auto":
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((pair, hr, key)))
        driver = "host" if jax.default_backend() == "cpu" and not traced else "scan"
    size = jnp.float32(1.0 if config.eps_mode == "absolute" else (hr.shape[1] * hr.shape[2]) ** 0.5 / PAPER_SIDE)
    passes = passes or WHOLE
    delta, hr_trace = _loop(Scene(pair, hr, hr, size, key), config, "hr", driver, passes.look)
    moved = hr + delta
    small = passes.shrink(pair, moved)
    target = hr if config.target == "original" else moved
    delta, lr_trace = _loop(Scene(pair, small, target, size, key), config, "lr", driver, passes.look)
    return HCDResult(quantise(small + delta), moved, hr_trace, lr_trace)


@jax.jit
def _shrink(pair: Pair, hr: Pictures) -> Float[Array, "B h w 3"]:
    return quantise(pair.down(hr))


# --- one loop --------------------------------------------------------------------------------------------------------


def _loop(
    scene: Scene, config: HcdConfig, which: Literal["hr", "lr"], driver: str, looking: Callable
) -> tuple[Pictures, Trace]:
    """The perturbation after the loop, and what it saw."""
    how, steps = getattr(config, which), getattr(config, f"{which}_steps")
    nothing = jnp.zeros((0, len(scene.base)))
    if not steps:
        return jnp.zeros_like(scene.base), Trace(nothing, nothing)
    one = step_of(config, which)
    state = _begin(scene, one, which)
    number = steps + (how.keep == "best")  # the last look is for the loss alone
    if driver == "scan":
        state, trace = lax.scan(functools.partial(_step, scene, one, which), state, jnp.arange(number))
    else:
        seen = []
        for i in range(number):
            state, saw = _jit_move(scene, one, which, state, *looking(scene, one, which, state.delta, i))
            seen.append(saw)
            if config.patience and bool((state.waited >= config.patience).all()):
                break
        trace = jax.tree.map(lambda *x: jnp.stack(x), *seen)
    return state.delta if state.best_delta is None else state.best_delta, trace


def step_of(config: HcdConfig, which: str) -> HcdConfig:
    """What a step of one loop depends on: its program serves any number of steps, and whatever the other loop does."""
    how = getattr(config, which)
    return dataclasses.replace(config, hr_steps=0, lr_steps=0, hr=how, lr=how, eps_mode="absolute", target="original")


@functools.partial(jax.jit, static_argnums=(1, 2))
def _begin(scene: Scene, config: HcdConfig, which: Literal["hr", "lr"]) -> State:
    how, (b, *_) = getattr(config, which), scene.base.shape
    delta = jnp.zeros_like(scene.base)
    if how.start == "random":
        delta = jax.vmap(lambda k, x: _somewhere(k, x, how, scene.size))(_fold(scene.key, which == "lr"), scene.base)
    opt = _adam().init(delta) if how.optimiser == "adam" else ()
    return State(delta, opt, delta if how.keep == "best" else None, jnp.full(b, jnp.inf), jnp.zeros(b))


def _somewhere(key: Array, base: Array, how: Descent, size: Array) -> Array:
    """A Gaussian direction of a length drawn from 0..eps, for one image; uniform in the cube for "linf"."""
    direction, length = jax.random.split(key)
    if how.norm == "linf":
        delta = jax.random.uniform(direction, base.shape, minval=-how.eps, maxval=how.eps)
    else:
        delta = jax.random.normal(direction, base.shape)
        delta *= jax.random.uniform(length) * how.eps * size / jnp.linalg.norm(delta)
    return jnp.clip(delta, -base, 1 - base)


def _step(scene: Scene, config: HcdConfig, which: str, state: State, i: Array | int) -> tuple[State, Trace]:
    return _move(scene, config, which, state, *look(scene, config, which, state.delta, i))


def look(scene: Scene, config: HcdConfig, which: str, delta: Pictures, i: Array | int) -> tuple[Array, Pictures]:
    """What restoring loses of each image at step `i`, and the gradient on what is moved."""
    how = getattr(config, which)
    draws = {"fresh": lambda: _fold(scene.key, 2 + 2 * i + (which == "lr")), "fixed": lambda: scene.key}
    z = draws.get(config.z, lambda: None)()

    def looked(delta: Pictures) -> tuple[Array, Array]:
        x = scene.base + delta
        x = scene.pair.down(x) if which == "hr" else x
        restored = scene.pair.up(quantise(x) if how.quantise else x, z)
        losses = config.loss(restored, scene.target)
        return losses.sum(), losses  # images do not meet, so the gradient of the sum is each one's own

    (_, losses), grad = jax.value_and_grad(looked, has_aux=True)(delta)
    return losses, grad


def _move(
    scene: Scene, config: HcdConfig, which: str, state: State, losses: Array, grad: Pictures
) -> tuple[State, Trace]:
    """Moves every image that does not rest."""
    how = getattr(config, which)
    norms = _norm(grad)
    opt = state.opt
    if how.optimiser == "adam":
        move, opt = _adam().update(grad, opt)
    else:
        move = jnp.sign(grad) if how.norm == "linf" else grad / (_wide(norms) + 1e-10)
    length = how.alpha if how.norm == "linf" or how.optimiser == "adam" else how.alpha * scene.size
    delta = _bound(state.delta - length * move, scene, how)
    resting = (state.waited >= config.patience) if config.patience else jnp.zeros(len(losses), bool)
    better = (losses < state.best) & ~resting
    best_delta = state.best_delta
    after = State(
        jnp.where(_wide(resting), state.delta, delta),
        opt,
        None if best_delta is None else jnp.where(_wide(better), state.delta, best_delta),
        jnp.where(better, losses, state.best),
        jnp.where(better, 0, state.waited + 1),
    )
    return after, Trace(jnp.where(resting, jnp.nan, losses), jnp.where(resting, jnp.nan, norms))


_jit_move = jax.jit(_move, static_argnums=(1, 2))
WHOLE = Passes(jax.jit(look, static_argnums=(1, 2)), _shrink)


def _bound(delta: Pictures, scene: Scene, how: Descent) -> Pictures:
    """Back into the budget, then into the range of pictures."""
    if how.norm == "linf":
        delta = jnp.clip(delta, -how.eps, how.eps)
    elif math.isfinite(how.eps):
        norm = _wide(_norm(delta))
        delta = delta * jnp.minimum(1.0, how.eps * scene.size / jnp.maximum(norm, 1e-12))
    return jnp.clip(delta, -scene.base, 1 - scene.base)


def _adam() -> optax.GradientTransformation:
    return optax.scale_by_adam()


def _norm(x: Pictures) -> Float[Array, " B"]:
    return jnp.sqrt((x * x).sum((1, 2, 3)))


def _wide(x: Array) -> Array:
    return x[:, None, None, None]


def _fold(key: Array, n: Array | int) -> Array:
    return jax.vmap(lambda k: jax.random.fold_in(k, n))(key)
