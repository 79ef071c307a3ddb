"""VRC as a product: label pictures by how far a model's loss lets them shrink, learn that from the picture, apply it.

The model that is to be relieved appears only as a function from (pictures, ratio) to losses, so the same code serves
any (papers: HyperVL 3.2; TC, the follow-up by the same authors). A ratio is an area ratio: a side shrinks by its square
root.

Axes: N pictures, Q questions a picture, R ratios (ascending, the last one is 1), S proxy side, B batch.
"""

from __future__ import annotations

import functools
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from hypervl_jax import image
from hypervl_jax.config import VrcConfig, VrcTrainConfig
from hypervl_jax.model import vrc
from hypervl_jax.ratio import CompressError, unrescale
from hypervl_jax.ratio import rescale as rescale

Params = dict[str, Any]
Numbers = float | int | Sequence[Any] | np.ndarray | np.generic | Array


# --- labels ----------------------------------------------------------------------------------------------------------


def label(
    losses: Float[np.ndarray, "*N R"],
    ratios: Sequence[float] | np.ndarray,
    tolerance: float,
    floor: float,
    rule: Literal["first", "suffix"],
) -> Float[np.ndarray, "*N"]:
    """The smallest ratio whose loss is at most `tolerance` times the loss at full size (HyperVL 3.2).

    Both losses (nats a token) are raised by `floor`, so that a near-zero full-size loss does not forbid all shrinking.
    "first" takes the smallest ratio that passes, "suffix" the smallest from which all larger ones pass too. The paper's
    formula prints `max`, but full size always passes, so that would label every picture 1.
    """
    grid = _check_ratios(ratios)
    if tolerance < 1 or floor < 0:
        raise CompressError(f"tolerance {tolerance} must be at least 1 and floor {floor} not negative")
    if losses.shape[-1:] != grid.shape:
        raise CompressError(f"losses of shape {losses.shape} for {len(grid)} ratios; the last axis is the ratio")
    passes = losses + floor <= tolerance * (losses[..., -1:] + floor)
    if rule == "suffix":
        passes = np.flip(np.logical_and.accumulate(np.flip(passes, -1), axis=-1), -1)
    passes[..., -1] = True  # full size, whatever rounding says
    return np.asarray(grid[passes.argmax(-1)])


class LabelSet(NamedTuple):
    """What labelling found. A question that was not asked or was dropped is NaN throughout; a picture left without
    questions has label NaN and is not to be trained on (`kept`)."""

    ratios: Float[np.ndarray, " R"]
    losses: Float[np.ndarray, "N Q R"]
    labels: Float[np.ndarray, " N"]

    @property
    def kept(self) -> np.ndarray:
        """bool[N]: pictures with a label."""
        return np.isfinite(self.labels)

    def first(self, n: int) -> LabelSet:
        """Those of the first n pictures."""
        return LabelSet(self.ratios, self.losses[:n], self.labels[:n])

    def again(self, cfg: VrcTrainConfig) -> LabelSet:
        """The labels that the same losses give under the tolerance, floor and rules of `cfg`."""
        asked = ~np.isnan(self.losses[..., -1])
        passed = label(np.nan_to_num(self.losses), self.ratios, cfg.tolerance, cfg.floor, cfg.rule)
        each = np.where(asked, passed, np.nan)
        some, labels = asked.any(-1), np.full(len(asked), np.nan)
        labels[some] = (np.nanmax if cfg.reduce == "max" else np.nanmean)(each[some], axis=-1)
        return self._replace(labels=labels)

    def save(self, path: str | Path) -> None:
        """Write an .npz of plain arrays."""
        with open(path, "wb") as file:  # by handle: numpy would append its own suffix to a path
            np.savez_compressed(file, **self._asdict())

    @classmethod
    def load(cls, path: str | Path) -> LabelSet:
        """Raises `CompressError` where the file is not one that `save` wrote."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
                out = cls(**{name: found[name] for name in cls._fields})
            if out.losses.shape != (*out.labels.shape, out.losses.shape[1], *_check_ratios(out.ratios).shape):
                raise CompressError(f"losses {out.losses.shape}, labels {out.labels.shape}")
        except (ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise CompressError(f"{path}: not a set of VRC labels ({e}); write it again with LabelSet.save") from e
        return out


def label_images(
    n: int,
    loss_at: Callable[[np.ndarray, float], Numbers],
    cfg: VrcTrainConfig,
    progress: bool = True,
    *,
    batch: int | None = None,
    blind: Numbers | None = None,
) -> LabelSet:
    """Labels of pictures 0 .. n-1 from the frozen model's own losses.

    `loss_at(indices, ratio)` gives the mean answer loss (nats a token) of those pictures shrunk to `ratio`: [n], or
    [n Q] for several questions each, NaN where a picture has fewer. Every question gets its label; `cfg.reduce` makes
    one of them ("max" is the safe choice, since VRC never sees the question). `batch` pictures are asked at a time,
    `cfg.batch` unless told.

    `blind`, losses with no picture shown (same shape), drops questions that need none: theirs within a tenth of the
    loss at full size. Such a question would teach that anything may shrink.
    """
    grid, step = _check_ratios(cfg.ratios), batch or cfg.batch
    rows = []
    for start in tqdm(range(0, n, step), desc="label", unit="batch", disable=not progress):
        indices = np.arange(start, min(start + step, n))
        rows.append(np.stack([_table(loss_at(indices, float(r)), len(indices)) for r in grid], axis=-1))
    if not rows:
        raise CompressError("no pictures to label")
    losses = np.concatenate(rows)
    asked = ~np.isnan(losses[..., -1])
    bad = ~(np.isnan(losses) == ~asked[..., None]).all((1, 2)) | np.isinf(losses).any((1, 2))
    if bad.any():
        raise CompressError(
            f"{bad.sum()} pictures have losses that are not finite, the first is number {bad.argmax()}; "
            "only a question that a picture does not have may be NaN, and then at every ratio"
        )
    if blind is not None:
        unseen = _table(blind, n)
        if unseen.shape != asked.shape or not np.isfinite(unseen[asked]).all():
            raise CompressError(f"blind losses {unseen.shape} must be finite for every question asked, {asked.shape}")
        with np.errstate(invalid="ignore"):
            needless = unseen + cfg.floor <= 1.1 * (losses[..., -1] + cfg.floor)
        losses[needless] = np.nan
    return LabelSet(grid, losses, np.full(n, np.nan)).again(cfg)


def _check_ratios(ratios: Sequence[float] | np.ndarray) -> np.ndarray:
    grid = np.asarray(ratios, np.float64)
    if grid.ndim != 1 or not len(grid) or grid[0] <= 0 or grid[-1] != 1 or (np.diff(grid) <= 0).any():
        raise CompressError(f"ratios must rise from above 0 to exactly 1, found {ratios}")
    return grid


def _table(losses: Numbers, n: int) -> np.ndarray:
    table = np.array(losses, np.float64)
    if table.ndim not in (1, 2) or len(table) != n:
        raise CompressError(f"expected losses of shape [{n}] or [{n} questions], found {list(table.shape)}")
    return table.reshape(n, -1)


# --- ratio -----------------------------------------------------------------------------------------------------------


def predict(params: Params, cfg: VrcConfig, pixels: UInt8[np.ndarray, "H W 3"], scale: float = 1.0) -> float:
    """The area ratio in [min_ratio, 1] to which this picture may shrink. `scale` is what `calibrate` found."""
    alpha = predict_proxies(params, cfg, jnp.asarray(image.proxy(pixels, cfg.side))[None])[0]
    return float(unrescale(alpha, pixels.shape[:2], cfg, scale))


@functools.partial(jax.jit, static_argnames="cfg")
def predict_proxies(params: Params, cfg: VrcConfig, proxies: Array) -> Array:
    """alpha' f32[B] of proxies [B S S 3], u8 or float in 0..1."""
    return cast(Array, vrc.Vrc(cfg, depthwise=form()).apply({"params": params}, unit(proxies)))


def unit(proxies: Array) -> Array:
    """Proxies as the network takes them: u8 or any float -> f32 in 0..1."""
    return proxies.astype(jnp.float32) / (255 if proxies.dtype == jnp.uint8 else 1)


def form() -> vrc.Depthwise:
    """How depthwise convolutions are fastest here."""
    return "shift" if jax.default_backend() == "cpu" else "conv"


# --- training --------------------------------------------------------------------------------------------------------


def train(
    key: Array,
    params: Params,
    proxies: np.ndarray,
    targets: np.ndarray,
    cfg: VrcConfig,
    how: VrcTrainConfig,
    progress: bool = True,
) -> tuple[Params, Float[np.ndarray, " steps"]]:
    """Regress `targets` (alpha', see `rescale`) from `proxies` (u8, or float in 0..1; [N S S 3]) by squared error.

    AdamW, 5 % warm-up, cosine to zero; epochs are permutations drawn from `key`. Every time a proxy is shown, it is
    mirrored, its colours swapped and its contrast changed at random: what is legible stays so. Returns the parameters,
    statistics included, and the loss of every step. Raises `CompressError` on unusable input and when the loss is not
    finite.
    """
    n = len(proxies)
    targets = np.asarray(targets, np.float32)
    if n < how.batch or proxies.shape[1:] != (cfg.side, cfg.side, 3) or targets.shape != (n,):
        raise CompressError(
            f"proxies {proxies.shape} and targets {targets.shape}: expected [N {cfg.side} {cfg.side} 3] and [N], "
            f"N at least one batch ({how.batch})"
        )
    if not np.isfinite(targets).all():
        raise CompressError("targets are not finite: train on the labelled pictures only, LabelSet.kept")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    opt, losses = _optimizer(how).init(params), []
    with tqdm(draws(rng, n, how.batch, how.steps), "vrc", how.steps, unit="step", disable=not progress) as bar:
        for step, pick in enumerate(bar):
            params, opt, loss = _step(params, opt, varied(rng, proxies[pick])[0], targets[pick], cfg, how)
            losses.append(loss)
            if step % 20 == 0 or step + 1 == how.steps:  # reading the loss waits for the device
                if not np.isfinite(loss):
                    raise CompressError(f"the loss is {float(loss)} by step {step}; lower the rate {how.lr}")
                bar.set_postfix(mse=f"{float(loss):.4f}")
    return params, np.asarray(losses, np.float32)


def draws(rng: np.random.Generator, n: int, batch: int, steps: int) -> Iterator[np.ndarray]:
    """Which of n samples each step takes, i64[batch]: permutations, one after another."""
    order = np.zeros(0, int)
    for _ in range(steps):
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(n)])
        yield order[:batch]
        order = order[batch:]


def varied(rng: np.random.Generator, proxies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Other pictures that bear as much shrinking, and which are mirrored, bool[B 2] (top to bottom, left to right).
    Black stays black: it is padding."""
    out, mirrored = np.empty_like(proxies), np.empty((len(proxies), 2), bool)
    for i, proxy in enumerate(proxies):
        mirrored[i] = flips = rng.choice([-1, 1], 2) < 0
        rows, columns = (slice(None, None, -1 if f else 1) for f in flips)
        out[i] = proxy[rows, columns][..., rng.permutation(3)] * rng.uniform(0.6, 1.0)
    return out, mirrored


def _optimizer(how: VrcTrainConfig) -> optax.GradientTransformation:
    return optimizer(how.lr, how.steps, how.weight_decay)


def optimizer(lr: float, steps: int, weight_decay: float) -> optax.GradientTransformation:
    """AdamW, 5 % warm-up, cosine to zero; only matrices and kernels decay."""
    warm = max(1, steps // 20)
    rate = optax.warmup_cosine_decay_schedule(lr / warm, lr, warm, max(steps, warm + 1))
    return optax.adamw(rate, weight_decay=weight_decay, mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p))


@functools.partial(jax.jit, static_argnames=("cfg", "how"))
def _step(params: Params, opt: Any, proxies: Array, targets: Array, cfg: VrcConfig, how: VrcTrainConfig):
    def error(params):
        alpha, stats = vrc.Vrc(cfg, train=True, depthwise=form()).apply({"params": params}, unit(proxies))
        return jnp.mean((alpha - targets) ** 2), stats

    (loss, stats), grads = jax.value_and_grad(error, has_aux=True)(params)
    updates, opt = _optimizer(how).update(grads, opt, params)  # stored statistics have no gradient and stay
    return vrc.update_stats(cast(Params, optax.apply_updates(params, updates)), stats), opt, loss


# --- what it bought --------------------------------------------------------------------------------------------------


class Saving(NamedTuple):
    """Shares of the same policy without VRC: `saved` tokens, `retained` accuracy; and the accuracy that the best
    picture-blind policy (any mixture of constant ratios) would have retained with as many tokens."""

    saved: float
    retained: float
    constant: float


def saving_retention(
    predicted: Float[np.ndarray, " N"],
    ratios: Sequence[float] | np.ndarray,
    tokens: Float[np.ndarray, "N R"],
    correct: Float[np.ndarray, "N R"],
) -> Saving:
    """Cost and quality of predicted ratios, from tables measured on the grid of ratios.

    `tokens` the decoder sees and `correct` (0..1, or a mean over questions) of each picture at each ratio. A prediction
    counts as the next ratio of the grid above it, so quality is never claimed at more pixels than were asked for and
    cost never at fewer.
    """
    grid, tokens, correct = _check_tables(ratios, tokens, correct)
    at = np.arange(len(tokens)), _snap(predicted, grid)
    cost, right = tokens[at].mean(), correct[at].mean()
    costs, rights = tokens.mean(0), correct.mean(0)
    best = max(  # the upper hull of the constants: mix any one at most as dear with any one at least as dear
        a if ca == cb else a + (b - a) * (cost - ca) / (cb - ca)
        for ca, a in zip(costs, rights, strict=True)
        for cb, b in zip(costs, rights, strict=True)
        if ca <= cost <= cb
    )
    return Saving(*(float(x) for x in (1 - cost / costs[-1], right / rights[-1], best / rights[-1])))


def calibrate(
    predicted: Float[np.ndarray, " N"],
    ratios: Sequence[float] | np.ndarray,
    tokens: Float[np.ndarray, "N R"],
    correct: Float[np.ndarray, "N R"],
    retain: float = 0.987,
) -> float:
    """The smallest factor on predicted ratios from which it and every larger one retain at least `retain` of the
    accuracy at full size; one that passes between others that do not passes by luck.

    Found on held-out pictures, handed to `predict(..., scale=)`: the dial between cost and quality.
    """
    grid, tokens, correct = _check_tables(ratios, tokens, correct)
    scales = np.geomspace(1 / grid[0], 0.25, 97)  # from what leaves no picture smaller
    found = (saving_retention(np.minimum(f * predicted, 1.0), grid, tokens, correct).retained for f in scales)
    good = [float(f) for f, _ in itertools.takewhile(lambda x: x[1] >= retain, zip(scales, found, strict=True))]
    if good:
        return good[-1]
    raise CompressError(f"no factor up to {scales[0]:.0f} retains {retain:.1%}: predictions are below {grid[0]}")


def spearman(a: Numbers, b: Numbers) -> float:
    """Rank correlation, ties by mean rank; NaN where either side is constant."""
    x, y = (_ranks(np.asarray(v)) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _snap(predicted: np.ndarray, grid: np.ndarray) -> np.ndarray:
    if not ((predicted > 0) & (predicted <= 1)).all():
        raise CompressError("predicted ratios must lie in (0, 1]")
    return np.searchsorted(grid, predicted - 1e-6)


def _check_tables(
    ratios: Sequence[float] | np.ndarray, tokens: np.ndarray, correct: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    grid = _check_ratios(ratios)
    if tokens.shape != correct.shape or tokens.ndim != 2 or tokens.shape[1:] != grid.shape or not correct[:, -1].any():
        raise CompressError(
            f"tokens {tokens.shape} and correct {correct.shape}: expected both [N {len(grid)}], and some answer right "
            "at full size"
        )
    return grid, tokens, correct
