"""Training of both branches under one decoder: the step as a pure function of (state, batch), and its loop.

Stage 0 teaches the encoders with the image-name term alone; then next-token loss with Dual Consistency Learning: steps
alternate between the branches, the small one also follows the large one's answers (HyperVL 3.3).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from hypervl_jax import checkpoint, losses, mesh, optim, runs
from hypervl_jax.config import BRANCHES, Branch, Config, ConfigError
from hypervl_jax.data.feeds import Feed
from hypervl_jax.data.pipeline import Batch
from hypervl_jax.mesh import MeshConfig
from hypervl_jax.model import hypervl, llm
from hypervl_jax.runs import TrainError
from hypervl_jax.tensors import flatten
from hypervl_jax.watch import (
    PLAIN,
    WINDOW,
    Guard,
    Log,
    Meter,
    Samples,
    Stop,
    Stopped,
    Trace,
    Watch,
    note,
    save_batch,
    step_flops,
)


class State(NamedTuple):
    step: Array  # i32[]
    params: dict  # groups: base, large, llm, names_base, names_large
    opt: dict  # one optimiser state a group


class Totals(NamedTuple):
    """What the means of a loss are taken over, summed over a whole batch; None: over what the rows at hand have."""

    answers: Array | None = None
    names: Array | None = None
    words: Array | None = None
    cells: Array | None = None


ALONE = Totals()


class Job(NamedTuple):
    """What one step trains: the branches, and whether it is the image-name term alone. A value: static under jit."""

    branches: tuple[Branch, ...]
    stage0: bool = False


def init_state(cfg: Config, classes: int, start: dict | None = None) -> State:
    """Fresh weights, or those of `start` (groups base, large, llm), and fresh moments. VRC is not here: it is trained
    afterwards, on labels from this model. Raises `ConfigError` where `cfg.train.rules` do not fit."""
    key, names = jax.random.split(jax.random.key(cfg.train.seed))
    if start is None:
        fresh = jax.jit(lambda k: {g: p for g, p in hypervl.init(k, cfg.model).items() if g != "vrc"})
        params = fresh(key)
    else:
        params = {g: jax.tree.map(lambda a: jnp.array(a, jnp.float32), start[g]) for g in (*BRANCHES, "llm")}
    cells = cfg.model.policy.tokens_per_tile
    for branch in BRANCHES:
        shapes = {"names": (classes, cfg.model.vit(branch).width), "cells": (cells, cfg.model.llm.width)}
        params[f"names_{branch}"] = {k: 0.05 * jax.random.normal(names, shape) for k, shape in shapes.items()}
    return State(jnp.int32(0), params, optim.init(cfg.train, params))


def born(cfg: Config, classes: int, start: dict | None, grid: Mesh) -> State:
    """`init_state` on a mesh, of which no device ever holds the whole."""
    if start is None or grid.size == 1:
        return mesh.born(grid, lambda: init_state(cfg, classes, start))
    given = mesh.laid(grid, {g: start[g] for g in (*BRANCHES, "llm")})

    def rest() -> State:
        fresh = init_state(cfg, classes)
        return fresh._replace(params={g: p for g, p in fresh.params.items() if g not in given})

    state = mesh.born(grid, rest)
    return state._replace(params=state.params | given)


def job_at(cfg: Config, step: int) -> Job:
    """The DCL schedule as a value: stage 0 first, then even steps Large, odd steps Base (or both, or a coin)."""
    if step < cfg.train.stage0_steps:
        return Job(BRANCHES, stage0=True)
    if cfg.dcl.schedule == "joint":
        return Job(BRANCHES)
    if cfg.dcl.schedule == "random":
        return Job((BRANCHES[int(np.random.default_rng([cfg.train.seed, 2, step]).integers(2))],))
    return Job(("large" if (step - cfg.train.stage0_steps) % 2 == 0 else "base",))


def rate_at(cfg: Config, step: Array) -> Array:
    """Stage 0 holds its peak rate; the cosine spans the rest."""
    t = cfg.train
    early = t.stage0_lr * jnp.minimum(1.0, (step + 1) / max(t.warmup, 1))
    late = optim.rate(t, jnp.maximum(step - t.stage0_steps, 0), t.steps - t.stage0_steps)
    return jnp.where(step < t.stage0_steps, early, late)


def patches(params: dict, cfg: Config, branch: Branch, batch: Batch) -> Array:
    """f32[B N*P W]: what one branch makes of every patch of the batch."""
    b, n = batch.tiles.shape[:2]
    tiles, mask = batch.tiles.reshape(b * n, *batch.tiles.shape[2:]), batch.mask.reshape(b * n, -1)
    out = hypervl.look(params, cfg.model, branch, tiles, mask, *_driver(cfg))
    return out.reshape(b, -1, out.shape[-1])


def features(params: dict, cfg: Config, branch: Branch, seen: Array) -> Array:
    """f32[B F D]: patches as decoder embeddings."""
    b, per = seen.shape[0], cfg.model.vit(branch).patches
    out = hypervl.project(params, cfg.model, branch, seen.reshape(-1, per, seen.shape[-1]))
    return out.reshape(b, -1, out.shape[-1])


def row_hidden(params: dict, cfg: Config, feats: Array, batch: Batch) -> Array:
    """[B L D] what the decoder makes of whole rows."""
    row = batch.ids, batch.slots, batch.positions, batch.segments
    return hypervl.hidden(params, cfg.model, feats, *row, *_driver(cfg), cfg.train.attention_block)


def row_logits(params: dict, cfg: Config, feats: Array, batch: Batch) -> Array:
    """f32[B L V] next-token logits of whole rows."""
    return llm.logits(params["llm"], row_hidden(params, cfg, feats, batch))


def _driver(cfg: Config) -> tuple[bool, bool | str]:
    """How a stack of layers is run: whether scanned, and what of it is kept for the backward pass."""
    return cfg.train.scan, cfg.train.remat and cfg.train.remat_policy


def _narrow(params: dict, cfg: Config) -> dict:
    """The model in what it computes in. Tables of names stay f32, and so do rows of words until they are taken: in 16
    bits the gradients of a frequent word would soon stop adding up."""
    if cfg.train.compute_dtype == "float32":
        return params
    model = {g: params[g] for g in (*BRANCHES, "llm")}
    narrow = jax.tree.map(lambda a: a.astype(cfg.train.compute_dtype), model)
    words = {"head": llm.head(narrow["llm"]), "embed": params["llm"]["embed"]}
    return params | narrow | {"llm": narrow["llm"] | words}


def _supervised(batch: Batch) -> tuple[Array, Array]:
    """(what each position has to predict, how much that weighs), [B L]."""
    targets, mask = losses.shift(batch.ids, batch.loss)
    return targets, losses.answer_weights(mask, jnp.roll(batch.segments, -1, 1))


def _cells(cfg: Config, batch: Batch) -> Array:
    """bool[B F]: which tokens show something of the picture."""
    p, shown = cfg.model.policy, batch.mask.reshape(len(batch.mask), 1, -1).astype(jnp.float32)
    return losses.pool_cells(shown, p.patches_per_side, p.merge)[:, 0] > 0


def totals(cfg: Config, batch: Batch) -> Totals:
    """The weights of a batch, of which micro-batches have unequal shares."""
    names, words = ((x >= 0).sum() for x in (batch.names, batch.words))
    return Totals(_supervised(batch)[1].sum(), names, words, _cells(cfg, batch).sum())


def loss_fn(
    trained: dict, fixed: dict, cfg: Config, job: Job, batch: Batch, total: Totals = ALONE, grid: Mesh | None = None
) -> tuple[Array, dict[str, Array]]:
    """The objective of one job and its parts; with the `total` weights of a batch, the share these rows have in it.
    Gradients flow into `trained` only.

    The image-name term has three parts: patches through a table of its own, and the tokens that the decoder will see
    through the decoder's own head, where each thing should already say the first token of its name, both as it begins
    an answer and as it stands in a question, or the decoder would have to learn name by name that these are one. The
    second teaches projector and head, not the encoder: tokens are too coarse to teach it small things. And each token
    must say which cell of its tile it is, or encoders so trained forget it and the decoder cannot tell places. Tokens
    are taken at unit size, or they would grow until no layer of the decoder could change them.
    """
    wide, batch = optim.joined(fixed, trained), mesh.by_rows(batch, grid)
    params = _narrow(wide, cfg)
    seen = mesh.by_rows({b: patches(params, cfg, b, batch) for b in job.branches}, grid)
    feats = mesh.by_rows({b: features(params, cfg, b, seen[b]) for b in job.branches}, grid)
    whole, parts = jnp.float32(0), {}
    if cfg.train.name_weight:
        p = cfg.model.policy
        shares = losses.pool_cells(batch.weights, p.patches_per_side, p.merge)
        real = _cells(cfg, batch)
        for b in job.branches:
            tables = params[f"names_{b}"]
            alone = losses.unit(features(params, cfg, b, jax.lax.stop_gradient(seen[b])))
            found = {
                "name": losses.name_loss(seen[b], batch.weights, batch.names, tables["names"], total.names),
                "word": losses.name_loss(alone, shares, batch.words, cast(Array, llm.head(params["llm"])), total.words),
                "cell": losses.cell_loss(losses.unit(feats[b]), real, tables["cells"], total.cells),
            }
            whole += cfg.train.name_weight * sum(found.values())
            parts |= {f"{k}_{b}": v for k, v in found.items()}
    if job.stage0:
        return whole, parts
    targets, weights = _supervised(batch)
    chunk, head = cfg.train.loss_chunk, cast(Array, llm.head(wide["llm"]))
    read = row_hidden if chunk else row_logits
    said = mesh.by_rows({b: read(params, cfg, feats[b], batch) for b in job.branches}, grid)
    for b in job.branches:
        if chunk:
            each = cast(Array, losses.chunked_cross_entropy(said[b], head, targets, chunk))
        else:
            each = losses.cross_entropy(said[b], targets)
        term = losses.mean_where(each, weights, total.answers)
        whole, parts[f"loss_{b}"] = whole + term, term
    if "base" in job.branches and cfg.dcl.weight:
        if "large" not in said:
            teacher = features(params, cfg, "large", mesh.by_rows(patches(params, cfg, "large", batch), grid))
            said["large"] = mesh.by_rows(read(params, cfg, mesh.by_rows(teacher, grid), batch), grid)
        pair, how = (said["large"], said["base"]), (weights, cfg.dcl.temperature)
        if chunk:
            kl = losses.chunked_dcl_kl(*pair, head, *how, chunk, total.answers)
        else:
            kl = losses.dcl_kl(*pair, *how, total.answers)
        whole, parts["kl"] = whole + cfg.dcl.weight * kl, kl
    return whole, parts


def groups(cfg: Config, job: Job) -> tuple[str, ...]:
    """Which top-level parameter groups a job moves."""
    out: set[str] = set(job.branches)
    if cfg.train.name_weight:
        out |= {f"names_{b}" for b in job.branches}
    if not job.stage0 and not (cfg.dcl.llm_train == "teacher_only" and job.branches == ("base",)):
        out.add("llm")
    return tuple(sorted(out))


def moving(params: dict, cfg: Config, job: Job) -> dict:
    """The parameters a job moves. Raises `ConfigError` where `cfg.train.rules` leave it none."""
    learns = optim.learning(cfg.train, params)
    trained = {g: learns[g] for g in groups(cfg, job) if g in learns}
    if not trained:
        raise ConfigError(
            f"train.rules: a step of {' and '.join(job.branches)} moves nothing; give it something to learn"
        )
    return trained


def gradients(
    params: dict, cfg: Config, job: Job, batch: Batch, grid: Mesh | None = None
) -> tuple[dict, dict[str, Array]]:
    """(gradients of what moves, parts of the loss). Pure: runs plain, under jit, pmap or shard_map alike.

    With `cfg.train.accumulate` the rows come in so many micro-batches, one after another; every mean is still over the
    whole batch, however answers and things are spread over them. Raises `ConfigError` as `moving` does.
    """
    gradient = functools.partial(jax.grad(loss_fn, has_aux=True), moving(params, cfg, job), params, cfg, job, grid=grid)
    k = cfg.train.accumulate
    if k == 1:
        return gradient(batch)
    # Every k-th row: where rows are spread over devices, each device cuts its own.
    micro = jax.tree.map(lambda a: a.reshape(-1, k, *a.shape[1:]).swapaxes(0, 1), batch)
    share = functools.partial(gradient, total=totals(cfg, batch))
    shapes = jax.eval_shape(share, jax.tree.map(lambda a: a[0], micro))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(lambda sums, rows: (jax.tree.map(jnp.add, sums, share(rows)), None), zero, micro)[0]


def train_step(
    state: State, batch: Batch, cfg: Config, job: Job, grid: Mesh | None = None
) -> tuple[State, dict[str, Array]]:
    """One update of what the job moves; everything else comes back bit-equal, and all of it where it was on `grid`."""
    grads, parts = gradients(state.params, cfg, job, batch, grid)
    lr = rate_at(cfg, state.step)
    params, opt, norm = optim.update(cfg.train, lr, grads, state.opt, state.params)
    return mesh.stay(State(state.step + 1, params, opt), grid), {**parts, "grad_norm": norm, "lr": lr}


def guarded_step(
    state: State, batch: Batch, cfg: Config, job: Job, grid: Mesh | None = None
) -> tuple[State, dict[str, Array]]:
    """`train_step`, but where the loss or a gradient is not finite only the step counts and nothing moves. Where they
    are, the same but for rounding: the compiler fuses the choice with the update."""
    after, metrics = train_step(state, batch, cfg, job, grid)
    fine = jnp.isfinite(jnp.stack(list(metrics.values()))).all()

    def stays(new: Array, old: Array) -> Array:
        return old if new is old else jnp.where(fine, new, old)

    params, opt = (jax.tree.map(stays, getattr(after, part), getattr(state, part)) for part in ("params", "opt"))
    return State(after.step, params, opt), metrics


def step_of(cfg: Config) -> Callable[..., tuple[State, dict[str, Array]]]:
    """The step that a run of these settings takes."""
    return guarded_step if cfg.train.skips else train_step


@functools.lru_cache(maxsize=4)
def compiled(cfg: Config, grid: Mesh | None = None) -> Callable[[State, Batch, Job], tuple[State, dict[str, Array]]]:
    """The step jitted for one config and one mesh; the state is donated."""
    step = jax.jit(step_of(cfg), static_argnums=(2, 3, 4), donate_argnums=0)
    return lambda state, batch, job: step(state, batch, cfg, job, grid)


def run(
    cfg: Config, feed: Feed, out: Path | str, watch: Watch = PLAIN, start: dict | None = None, on: MeshConfig = mesh.ONE
) -> State:
    """Trains to `cfg.train.steps` on what `feed` gives, resuming from the newest checkpoint under `out` that is whole;
    where there is none, from the weights `start` (those of the stage before) or from nothing. Writes `out/log.jsonl`.
    On the mesh `on`, which need not be that of before; of several processes, which must all see `out`, each loads the
    rows of its own devices, and the first writes.

    Raises `TrainError` when `out` holds a run of other settings or data, and when too many steps are not finite (the
    batch of the last is then in `out`); `Stopped` on SIGTERM, on Ctrl-C and at `watch.stop_at`, of whichever process,
    with every step saved; `ConfigError` for rules that do not fit the parameters and for a mesh that does not fit
    devices or batch, `ValueError` for data that fits no bucket.
    """
    out, shows = Path(out), watch.progress and mesh.leads()
    feed.check(shows)  # now, not after stage 0
    mesh.check(cfg, on)
    grid, like = mesh.make(on), jax.eval_shape(lambda: init_state(cfg, feed.classes))
    early = cfg.train.stage0_steps
    for job in {job_at(cfg, step) for step in range(max(early - 1, 0), min(early + 64, cfg.train.steps))}:
        moving(like.params, cfg, job)  # found out before the first step of another job
    out.mkdir(parents=True, exist_ok=True)
    with mesh.first("settings"):
        runs.same_run(out / "train.json", cfg, feed.about)
    learns, steps = list(flatten(optim.learning(cfg.train, like.params))), cfg.train.steps
    smooth, shown, step_fn = {}, {}, compiled(cfg, grid)  # losses, smoothed and as they are
    rows = mesh.rows(grid, cfg.data.batch)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop(watch.stop_at))
        ckpts = stack.enter_context(contextlib.closing(checkpoint.Checkpoints(out / "checkpoints", cfg.train.keep)))
        if ckpts.latest() is None:
            state = born(cfg, feed.classes, start, grid)
        else:
            state = ckpts.restore(mesh.shapes(grid, like))
            saved = ckpts.about(int(state.step))
            smooth = dict(saved.get("smooth", {}))
            if other := runs.changed(saved, cfg):
                note(f"going on from step {int(state.step)}, saved with other settings: {runs.some(other)}")
        done = int(state.step)
        with mesh.first("log"):
            log = stack.enter_context(contextlib.closing(Log(out, done, mesh.leads())))
        guard, meter = Guard(cfg.train.skips, log.skipped), Meter(grid.devices.flat)
        samples = Samples(cfg, feed, out) if watch.sample_every else None
        traced = watch.profile if mesh.leads() else 0
        trace = stack.enter_context(contextlib.closing(Trace(out / "profile", traced, done, steps)))
        bar = tqdm(total=steps, initial=done, desc="train", disable=not shows, smoothing=0.05)
        stack.enter_context(bar)
        for step, mine in enumerate(feed.batches(done, rows), done):
            job, batch = job_at(cfg, step), mesh.put(grid, mine, rows, cfg.data.batch)
            trace.before(step)
            state, metrics = step_fn(state, batch, job)
            values = {k: float(v) for k, v in metrics.items()}
            trace.after(step)
            bad = sorted(k for k, v in values.items() if not np.isfinite(v))
            tokens = int((batch.segments >= 0).sum())
            told = {k: v for k, v in values.items() if k not in bad} | {"tokens": tokens}
            log.write(step, told | ({"skipped": True} if bad else {}))
            if bad:
                note(f"step {step}: {', '.join(bad)} not finite")
                if guard.too_many(step):
                    path = out / f"not-finite-{step}{mesh.apart()}.npz"
                    save_batch(path, step, mine, feed.shown(step, rows))
                    raise TrainError(
                        f"step {step}: loss or gradient is not finite, in {len(guard.steps)} of the last {WINDOW} "
                        f"steps; look at its batch, {path} (watch.load_batch), raise train.skips, or begin anew with "
                        "a lower train.lr"
                    )
            else:
                shown |= {k: v for k, v in values.items() if k not in ("lr", "grad_norm")}
                some = {k: v for k, v in values.items() if k.startswith("loss_")}
                smooth |= {k: smooth.get(k, v) + 0.02 * (v - smooth.get(k, v)) for k, v in some.items()}
            meter.add(tokens, step_flops(cfg, job.branches, job.stage0, batch, learns))
            bar.update()
            why = stop.asked()
            if (step + 1) % cfg.train.log_every == 0:
                log.flush()
                bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()} | meter.read())
            if (step + 1) % cfg.train.save_every == 0 or step + 1 == steps or why:
                log.flush(disk=True)
                ckpts.save(step + 1, state, runs.about(cfg, feed.about, step + 1, smooth))
            if samples is not None and (step + 1) % watch.sample_every == 0:
                samples(step + 1, mesh.whole({g: state.params[g] for g in ("base", "llm")}))
            if why:
                ckpts.close()  # said when it is true
                raise Stopped(f"{out}: {why} at step {step + 1} of {steps}; it is saved, the same command goes on")
    return state


def restore(cfg: Config, out: Path | str, classes: int, on: MeshConfig = mesh.ONE) -> State:
    """The newest state of a run that is whole, to read its weights."""
    like = mesh.shapes(mesh.make(on), jax.eval_shape(lambda: init_state(cfg, classes)))
    with contextlib.closing(checkpoint.Checkpoints(Path(out) / "checkpoints", cfg.train.keep)) as ckpts:
        return ckpts.restore(like)
