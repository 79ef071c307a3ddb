"""Answers to many questions at once and what they are worth: exact match, or a point inside the box asked for; and the
losses of true answers, which VRC's labels are made of.

Axes: B screens, N tiles, T tile side, P patches, F features a screen, R questions, L prompt, D width.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from hypervl_jax import compress, generate, image, losses, plan, ratio, text, tokens
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import Branch, ModelConfig
from hypervl_jax.data.screens import Question, Screen
from hypervl_jax.model import hypervl, llm
from hypervl_jax.plan import VisionPlan
from hypervl_jax.text import Prompt

NEW = 8  # tokens an answer may have
BATCH = 32  # screens encoded together


class Answer(NamedTuple):
    """One question, what the model said, and whether that is right."""

    screen: int
    task: str
    truth: str
    answer: str
    correct: bool


class Accuracy(NamedTuple):
    """A mean with its Wilson 95 % interval."""

    mean: float
    n: int
    low: float
    high: float


def wilson(correct: int, n: int, effective: float | None = None, z: float = 1.96) -> Accuracy:
    """Wilson score interval of a proportion; (0, 0, 0, 1) of nothing. `effective` stands in for n where trials are not
    independent."""
    if n == 0:
        return Accuracy(0.0, 0, 0.0, 1.0)
    p, m = correct / n, effective or n
    d = 1 + z * z / m
    middle, half = (p + z * z / (2 * m)) / d, z * (p * (1 - p) / m + z * z / (4 * m * m)) ** 0.5 / d
    return Accuracy(p, n, max(0.0, middle - half), min(1.0, middle + half))


def point(answer: str, size: tuple[int, int], coords: int) -> tuple[float, float] | None:
    """The point in original pixels that an answer such as "37 52" names, or None if it does not name just one."""
    named = text.coordinates(answer, coords)
    if len(named) != 1 or len(named[0]) != 2:
        return None
    (x, y), (h, w) = named[0], size
    return (x + 0.5) * w / coords, (y + 0.5) * h / coords


def right(question: Question, answer: str, size: tuple[int, int], coords: int) -> bool:
    """Exact match; for `find`, a point inside the box."""
    if question.task != "find":
        return answer == question.answer
    at = point(answer, size, coords)
    if at is None or question.box is None:
        return False
    x0, y0, x1, y1 = question.box
    return x0 <= at[0] < x1 and y0 <= at[1] < y1


def tile_buckets(cfg: ModelConfig) -> tuple[int, ...]:
    """Numbers of tiles a batch is padded to: one, and then by twos and by doubling up to the most a plan can have."""
    most = cfg.policy.max_tiles + cfg.policy.thumbnail
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(most, max(3, 2 * sizes[-1] - 1)))
    return tuple(sizes)


@functools.partial(jax.jit, static_argnames=("cfg", "branch"))
def _features(params: dict, cfg: ModelConfig, branch: Branch, tiles: Array, mask: Array) -> Array:
    b, n = tiles.shape[:2]
    out = hypervl.encode_batch(params, cfg, branch, tiles.reshape(-1, *tiles.shape[2:]), mask.reshape(b * n, -1))
    return out.reshape(b, -1, out.shape[-1])


@jax.jit
def _embed(params: dict, ids: Array, slots: Array, features: Array, screens: Array) -> Array:
    return hypervl.embed(params, ids, slots, features[screens])


class Job(NamedTuple):
    """A picture at a ratio, and what is asked about it."""

    image: np.ndarray
    ratio: float
    questions: tuple[str, ...]


def answer(
    model: Model, branch: Branch, jobs: Sequence[Job], progress: str = "", batch: int = BATCH
) -> list[tuple[str, ...]]:
    """Greedy answers to every question of every job, batched by tile count. `progress` names the bar; empty: none."""
    cfg = model.config
    plans = [plan.make(j.image.shape[:2], j.ratio, cfg.policy) for j in jobs]
    sizes = tile_buckets(cfg)
    groups: dict[int, list[int]] = defaultdict(list)
    for i, p in enumerate(plans):
        groups[next(s for s in sizes if p.n_tiles <= s)].append(i)
    out: list[tuple[str, ...]] = [()] * len(jobs)
    most = max(len(j.questions) for j in jobs)
    with tqdm(total=len(jobs), desc=progress, disable=not progress) as bar:
        for n, members in sorted(groups.items()):
            for start in range(0, len(members), batch):
                now = members[start : start + batch]
                said = _answer_batch(model, branch, [jobs[i] for i in now], [plans[i] for i in now], n, batch, most)
                for i, answers in zip(now, said, strict=True):
                    out[i] = answers
                bar.update(len(now))
    return out


def _answer_batch(
    model: Model, branch: Branch, jobs: list[Job], plans: list[VisionPlan], n: int, batch: int, most: int
) -> Iterator[tuple[str, ...]]:
    cfg, tok = model.config, model.tokenizer
    tiles, mask = _tiles([j.image for j in jobs], plans, n, batch)
    rows = [prompt(model, p, q) for job, p in zip(jobs, plans, strict=True) for q in job.questions]
    screens = [b for b, job in enumerate(jobs) for _ in job.questions]
    fill = batch * most - len(rows)
    length = -(-max(len(ids) for ids, _ in rows) // 32) * 32
    ids, slots, pads = generate.pad_left(rows + rows[:1] * fill, length, tok.special(tokens.PAD))
    features = _features(model.params, cfg, branch, tiles, mask)
    x = _embed(model.params, ids, slots, features, np.array(screens + [0] * fill))
    end, forbidden = tok.special(tokens.IM_END), tok.forbidden(cfg.llm.vocab)
    said = generate.generate(model.params, cfg, x, pads, forbidden, jax.random.key(0), generate.Sampler(), end, NEW)
    answers = iter([text.strip_answer(tok, row) for row in np.asarray(said)])
    for job in jobs:
        yield tuple(next(answers) for _ in job.questions)


def prompt(model: Model, p: VisionPlan, question: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, slots) of one question about one picture, up to where the answer starts."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    row = text.render([{"role": "user", "content": content}], [p], model.tokenizer, model.config.text)
    return row.ids, row.slots


def ratios(model: Model, screens: Iterable[Screen], batch: int = 64) -> np.ndarray:
    """f64[n]: what VRC predicts for each picture."""
    cfg, images = model.config.vrc, [s.image for s in screens]
    scale, out = model.info.get("vrc_scale", 1.0), []
    for start in range(0, len(images), batch):
        now = images[start : start + batch]
        proxies = np.zeros((batch, cfg.side, cfg.side, 3), np.float32)
        proxies[: len(now)] = [image.proxy(i, cfg.side) for i in now]
        alpha = np.asarray(compress.predict_proxies(model.params["vrc"], cfg, jnp.asarray(proxies)))[: len(now)]
        out.append(ratio.unrescale(alpha, [i.shape[:2] for i in now], cfg, scale))
    return np.concatenate(out)


def run(
    model: Model,
    branch: Branch,
    screens: Sequence[Screen],
    shrink: Sequence[float] | np.ndarray | None = None,
    shuffled: bool = False,
    progress: str = "",
) -> list[Answer]:
    """Every question of every screen, at area ratios `shrink` (1 if None). `shuffled` shows each question the next
    screen's picture instead, of two screens or more: what the model knows without looking."""
    shrink = np.ones(len(screens)) if shrink is None else shrink
    jobs = []
    for i, screen in enumerate(screens):
        shown = (i + 1) % len(screens) if shuffled else i
        asked = tuple(q.text for q in screen.questions)
        jobs.append(Job(screens[shown].image, float(shrink[shown]), asked))
    said, coords = answer(model, branch, jobs, progress), model.config.text.coords
    return [
        Answer(i, q.task, q.answer, a, right(q, a, screen.image.shape[:2], coords))
        for i, (screen, answers) in enumerate(zip(screens, said, strict=True))
        for q, a in zip(screen.questions, answers, strict=True)
    ]


def _logits(params: dict, cfg: ModelConfig, branch: Branch, tiles: Array, mask: Array, row: Any) -> Array:
    feats = _features(params, cfg, branch, tiles, mask)
    return llm.logits(
        params["llm"], hypervl.hidden(params, cfg, feats, row.ids, row.slots, row.positions, row.segments)
    )


@functools.partial(jax.jit, static_argnames=("cfg", "branch", "questions"))
def _losses(params: dict, cfg: ModelConfig, branch: Branch, questions: int, tiles: Array, mask: Array, row: Any):
    targets, answers = losses.shift(row.ids, row.loss)
    nats = losses.cross_entropy(_logits(params, cfg, branch, tiles, mask, row), targets)
    own = answers[:, None] & (jnp.roll(row.segments, -1, 1)[:, None] == 1 + jnp.arange(questions)[:, None])
    return jnp.where(own.any(-1), jnp.where(own, nats[:, None], 0).sum(-1) / own.sum(-1), jnp.nan)


def answer_losses(
    model: Model, branch: Branch, screens: Sequence[Screen], shrink: Sequence[float] | np.ndarray, questions: int
) -> np.ndarray:
    """f64[n questions]: mean nats a token of each true answer, teacher-forced; NaN where a screen has fewer."""
    out = np.full((len(screens), questions), np.nan)
    for now, seen in _rows(model, screens, shrink, questions):
        got = _losses(model.params, model.config, branch, questions, *seen)
        out[now] = np.asarray(got)[: len(now)]
    return out


@functools.partial(jax.jit, static_argnames=("cfg", "branches"))
def _divergence(
    params: tuple[dict, dict], cfg: ModelConfig, branches: tuple[Branch, Branch], tiles: Array, mask: Array, row: Any
):
    _, answers = losses.shift(row.ids, row.loss)
    t, s = (jax.nn.log_softmax(_logits(p, cfg, b, tiles, mask, row)) for p, b in zip(params, branches, strict=True))
    kl, same = (jnp.exp(t) * (t - s)).sum(-1), t.argmax(-1) == s.argmax(-1)
    return jnp.stack([jnp.where(answers, x, 0).sum(-1) for x in (kl, same, jnp.ones_like(kl))], -1)


def divergence(model: Model, screens: Sequence[Screen]) -> np.ndarray:
    """f64[n 3]: over the tokens of the true answers about each screen, teacher-forced: the sum of KL(Large || Base) at
    temperature 1 (nats), how many the branches agree on (most likely token), and how many there are."""
    return _diverged((model.params, model.params), model, ("large", "base"), screens)


def drift(model: Model, params: dict, branch: Branch, screens: Sequence[Screen]) -> np.ndarray:
    """f64[n 3]: the same of a model and itself with other weights, KL(model || other)."""
    return _diverged((model.params, params), model, (branch, branch), screens)


def _diverged(
    params: tuple[dict, dict], model: Model, branches: tuple[Branch, Branch], screens: Sequence[Screen]
) -> np.ndarray:
    out = np.zeros((len(screens), 3))
    for now, seen in _rows(model, screens, [1.0] * len(screens), max(len(s.questions) for s in screens)):
        out[now] = np.asarray(_divergence(params, model.config, branches, *seen))[: len(now)]
    return out


def _rows(
    model: Model, screens: Sequence[Screen], shrink: Sequence[float] | np.ndarray, questions: int
) -> Iterator[tuple[list[int], tuple[np.ndarray, np.ndarray, Prompt]]]:
    """(which screens, (tiles, mask, row)): batches of screens with their first `questions` questions and answers, each
    filled up with its first screen."""
    cfg, tok = model.config, model.tokenizer
    plans = [plan.make(s.image.shape[:2], r, cfg.policy) for s, r in zip(screens, shrink, strict=True)]
    sizes, groups = tile_buckets(cfg), defaultdict(list)
    for i, p in enumerate(plans):
        groups[next(s for s in sizes if p.n_tiles <= s)].append(i)
    for n, members in sorted(groups.items()):
        for start in range(0, len(members), BATCH):
            now = members[start : start + BATCH]
            fill = now + now[:1] * (BATCH - len(now))
            rows = [
                text.render_questions(
                    plans[i], [(q.text, q.answer) for q in screens[i].questions[:questions]], tok, cfg.text
                )
                for i in fill
            ]
            length = -(-max(len(r.ids) for r in rows) // 32) * 32
            tiles, mask = _tiles([screens[i].image for i in fill], [plans[i] for i in fill], n, BATCH)
            yield now, (tiles, mask, text.stack(rows, length, tok.special(tokens.PAD)))


def _tiles(images: Sequence[np.ndarray], plans: Sequence[VisionPlan], n: int, batch: int):
    """Pictures as tiles u8[batch n T T 3] and patch masks bool[batch n P], zero beyond what there is."""
    policy = plans[0].policy
    tiles = np.zeros((batch, n, policy.tile, policy.tile, 3), np.uint8)
    mask = np.zeros((batch, n, policy.patches_per_side**2), bool)
    for b, (pixels, p) in enumerate(zip(images, plans, strict=True)):
        tiles[b, : p.n_tiles], mask[b, : p.n_tiles] = image.prepare(pixels, p), p.patch_mask()
    return tiles, mask


def accuracy(answers: Iterable[Answer]) -> dict[str, Accuracy]:
    """Per task. Questions about one screen are not independent: the interval is that of the number of independent
    questions whose mean would vary as much as this one does from screen to screen, never more than were asked."""
    hits: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for a in answers:
        hits[a.task][a.screen].append(a.correct)
    out = {}
    for task, screens in sorted(hits.items()):
        right, asked = np.array([(sum(h), len(h)) for h in screens.values()]).T
        n, p = int(asked.sum()), right.sum() / asked.sum()
        spread = float(np.square(right - p * asked).sum())  # n^2 times the variance of the ratio right / asked
        worth = n * n * p * (1 - p) / spread if spread else n if 0 < p < 1 else len(screens)
        out[task] = wilson(int(right.sum()), n, min(float(worth), n))
    return out


def per_screen(answers: Sequence[Answer], n: int) -> np.ndarray:
    """f64[n]: the share of right answers about each of n screens; NaN where nothing was asked."""
    where = np.array([a.screen for a in answers], int)
    asked = np.bincount(where, minlength=n).astype(float)
    right = np.bincount(where, weights=[a.correct for a in answers], minlength=n)
    return np.divide(right, asked, out=np.full(n, np.nan), where=asked > 0)


def worth(answers: Sequence[Answer], n: int) -> np.ndarray:
    """f64[n]: right answers about each of n screens, so weighed that their mean over screens is the mean accuracy over
    tasks; 0 where nothing was asked."""
    asked = Counter(a.task for a in answers)
    out = np.zeros(n)
    for a in answers:
        out[a.screen] += a.correct * n / (len(asked) * asked[a.task])
    return out


def majority(screens: Iterable[Screen], coords: int) -> dict[str, float]:
    """The accuracy of always giving the one answer that is right most often (for `find`: the best fixed point)."""
    truths: dict[str, list[str]] = defaultdict(list)
    boxes = []
    for s in screens:
        h, w = s.image.shape[:2]
        for q in s.questions:
            truths[q.task].append(q.answer)
            if q.task == "find" and q.box is not None:
                boxes.append((q.box[0] / w, q.box[1] / h, q.box[2] / w, q.box[3] / h))
    out = {task: Counter(t).most_common(1)[0][1] / len(t) for task, t in truths.items()}
    if boxes:
        at = (np.arange(coords) + 0.5) / coords
        x0, y0, x1, y1 = np.array(boxes).T[..., None]
        inside = ((x0 <= at) & (at < x1)).T.astype(np.float32) @ ((y0 <= at) & (at < y1)).astype(np.float32)
        out["find"] = float(inside.max() / len(boxes))
    return out
