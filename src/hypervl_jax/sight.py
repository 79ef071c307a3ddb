"""What VRC's trunk learns before it judges: to see what stands on a picture, and how large.

Published trunks come from a million photographs. Ours would start from nothing, and one number a picture teaches a
convolutional network next to nothing about where to look. Composed screens know what stands on them, so the trunk first
learns that: the features of a thing's cells, pooled, must tell its name and its size. The two tables that read them are
thrown away.

Axes: N pictures, B batch, S proxy side, K things a picture, C cells of the trunk, D its channels, W names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int32, UInt8
from tqdm import tqdm

from hypervl_jax import compress, image, losses
from hypervl_jax.config import VrcConfig, VrcTrainConfig
from hypervl_jax.data.screens import Screen
from hypervl_jax.model import vrc

Params = dict[str, Any]
SIZES = 2.0  # weight of the squared error of log2 of a size, beside the nats of a name


class Sights(NamedTuple):
    """What stands on proxies. `names` is -1 where there is no thing; the last name is that of all numbers."""

    proxies: UInt8[np.ndarray, "N S S 3"]
    boxes: Float32[np.ndarray, "N K 4"]  # x0 y0 x1 y1, proxy pixels
    names: Int32[np.ndarray, "N K"]
    sizes: Float32[np.ndarray, "N K"]  # log2 of its cells: a picture's longer side, a number's height


def of_screens(screens: Iterable[Screen], concepts: Sequence[str], side: int, things: int) -> Sights:
    """The first `things` of each screen as its proxy shows them."""
    index = {name: i for i, name in enumerate(concepts)}
    rows = []
    for screen in screens:
        h, w = screen.image.shape[:2]
        top, left, high, wide = image.proxy_place((h, w), side)
        boxes, names = np.zeros((things, 4), np.float32), np.full(things, -1, np.int32)
        sizes = np.zeros(things, np.float32)
        for k, thing in enumerate(screen.things[:things]):
            x0, y0, x1, y1 = np.array(thing.box) * ((wide / w, high / h) * 2) + (left, top) * 2
            number = thing.kind == "digit"
            boxes[k], names[k] = (x0, y0, x1, y1), len(index) if number else index[thing.concept]
            sizes[k] = np.log2((y1 - y0 if number else max(x1 - x0, y1 - y0)) / vrc.CELL)
        rows.append(((image.proxy(screen.image, side) * 255).round().astype(np.uint8), boxes, names, sizes))
    return Sights(*(np.stack(column) for column in zip(*rows, strict=True)))


def shares(boxes: Float[np.ndarray, "*B 4"], side: int) -> Float32[np.ndarray, "*B C"]:
    """How much of each box lies in each cell; they sum to 1."""
    edges = np.arange(-(-side // vrc.CELL) + 1) * vrc.CELL

    def along(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        return np.clip(np.minimum(stop[..., None], edges[1:]) - np.maximum(start[..., None], edges[:-1]), 0, None)

    x0, y0, x1, y1 = np.moveaxis(boxes, -1, 0)
    cells = along(y0, y1)[..., :, None] * along(x0, x1)[..., None, :]
    cells = cells.reshape(*boxes.shape[:-1], -1)
    return (cells / np.maximum(cells.sum(-1, keepdims=True), 1e-9)).astype(np.float32)


def train(
    key: Array, params: Params, sights: Sights, names: int, cfg: VrcConfig, how: VrcTrainConfig, progress: bool = True
) -> tuple[Params, Float[np.ndarray, "steps 2"]]:
    """VRC's parameters with a trunk that sees, and the loss of names (nats) and of sizes (squared octaves) at each of
    `how.sight_steps` steps. Pictures are varied as VRC's are. Raises `CompressError` where there is too little to learn
    from or a loss is not finite.
    """
    n, side = len(sights.proxies), cfg.side
    if n < how.batch or not (sights.names >= 0).any():
        raise compress.CompressError(f"{n} pictures with {(sights.names >= 0).sum()} things: too little to learn from")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    wide, trunk = params["pool"]["weight"].shape[-1], {k: v for k, v in params.items() if k.startswith("block_")}
    learnt = {"trunk": trunk, "names": jnp.zeros((names, wide)), "size": jnp.zeros(wide), "mean": jnp.zeros(())}
    opt, history, steps = _optimizer(how).init(learnt), [], how.sight_steps
    with tqdm(compress.draws(rng, n, how.batch, steps), "sight", steps, unit="step", disable=not progress) as bar:
        for step, pick in enumerate(bar):
            proxies, flipped = compress.varied(rng, sights.proxies[pick])
            boxes = np.stack([_flip(sights.boxes[i], side, f) for i, f in zip(pick, flipped, strict=True)])
            seen = proxies, shares(boxes, side), sights.names[pick], sights.sizes[pick]
            learnt, opt, parts = _step(learnt, opt, *seen, cfg, how)
            history.append(parts)
            if step % 20 == 0 or step + 1 == steps:
                name, size = np.asarray(parts)
                if not np.isfinite(name + size):
                    raise compress.CompressError(f"the loss is {name} by step {step}; lower sight_lr {how.sight_lr}")
                bar.set_postfix(name=f"{name:.3f}", size=f"{size:.3f}")
    return params | learnt["trunk"], np.asarray(history, np.float32).reshape(-1, 2)


def _flip(boxes: np.ndarray, side: int, mirrored: np.ndarray) -> np.ndarray:
    down, across = mirrored
    x0, y0, x1, y1 = boxes.T
    if across:
        x0, x1 = side - x1, side - x0
    if down:
        y0, y1 = side - y1, side - y0
    return np.stack([x0, y0, x1, y1], -1)


def _optimizer(how: VrcTrainConfig) -> optax.GradientTransformation:
    return compress.optimizer(how.sight_lr, how.sight_steps, how.weight_decay)


@functools.partial(jax.jit, static_argnames=("cfg", "how"))
def _step(
    learnt: Params, opt: Any, proxies: Array, weights: Array, names: Array, sizes: Array, cfg: VrcConfig,
    how: VrcTrainConfig,
):  # fmt: skip
    def error(learnt):
        net = vrc.Vrc(cfg, train=True, depthwise=compress.form(), cells=True)
        cells, stats = net.apply({"params": learnt["trunk"]}, compress.unit(proxies))
        named = losses.name_loss(cells, weights, names, learnt["names"])
        guess = jnp.einsum("bkc,bcd,d->bk", weights, cells, learnt["size"]) + learnt["mean"]
        sized = losses.mean_where((guess - sizes) ** 2, names >= 0)
        return named + SIZES * sized, (stats, jnp.stack([named, sized]))

    (_, (stats, parts)), grads = jax.value_and_grad(error, has_aux=True)(learnt)
    updates, opt = _optimizer(how).update(grads, opt, learnt)
    learnt = cast(Params, optax.apply_updates(learnt, updates))
    return learnt | {"trunk": vrc.update_stats(learnt["trunk"], stats)}, opt, parts
