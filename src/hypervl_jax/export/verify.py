"""Exported files against JAX, seam by seam, on real pictures: a wrong part is named by its own number.

A seam's error is max |file - JAX| / max |JAX|, the worst over pictures, tiles and steps. Each seam is fed with JAX's
own values, so that errors do not add up from seam to seam; `answers` then goes the whole way. Its error is the regret:
by how much JAX would have preferred its own token to the one the files chose, over the largest logit; 0 if all agree.

JAX computes with the weights that the files hold. What is left where those are integers is the runtime's own rounding
of activations, and a seam behind them is allowed more.

Axes: N tiles, M tokens a tile, L prompt, S cache length, D decoder width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypervl_jax import compress, generate, image, plan, tokens
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import Branch
from hypervl_jax.export.lower import ExportError
from hypervl_jax.export.runtime import ENCODER, PREFILL, Runtime
from hypervl_jax.generate import DecodeState
from hypervl_jax.model import hypervl, llm

LIMIT = 1e-4
DYNAMIC = 0.1  # where the runtime rounds activations to 8 bits: each product then has an error of about 1 %
QUESTION = "what is this?"
STEPS = 6  # tokens an answer may have here

_encode = jax.jit(hypervl.encode_batch, static_argnums=(1, 2))
_embed = jax.jit(hypervl.embed)
_prefill = jax.jit(generate.prefill, static_argnums=(1, 5))
_step = jax.jit(generate.sample_step, static_argnums=(1, 3, 5))


class Seam(NamedTuple):
    """Where files and JAX meet, and how far apart they were."""

    name: str
    error: float
    limit: float = LIMIT

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # not of NaN

    def __str__(self) -> str:
        return f"{self.name} is {self.error:.2g} of the largest value away from JAX, {self.limit:g} is allowed"


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| / max |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / (np.abs(b).max() or 1.0))


def _worst(*errors: float) -> float:
    """The largest; NaN where one is NaN, which `max` would pass over."""
    return float(np.max(errors))


def seams(
    model: Model, runtime: Runtime, pictures: Sequence[np.ndarray], say: Callable[[str], object] = lambda seam: None
) -> list[Seam]:
    """Every seam of every branch on all pictures (u8[H W 3]). `say` is told what is compared next."""
    if not pictures:
        raise ExportError("an export is verified on at least one picture; none was given")
    model = model._replace(params=jax.device_put(model.params))  # once
    with jax.default_matmul_precision("highest"):
        worst: dict[str, float] = {}

        def note(name: str, error: float) -> None:
            worst[name] = _worst(worst.get(name, 0.0), error)

        say("vrc")
        for pixels in pictures:
            note("vrc", _vrc(model, runtime, pixels))
        x: dict[tuple[Branch, int], np.ndarray] = {}
        for branch in runtime.branches:
            for i, pixels in enumerate(pictures):
                say(f"{ENCODER}{branch} {i + 1}/{len(pictures)}")
                error, features, p = _encoder(model, runtime, pixels, branch)
                note(ENCODER + branch, error)
                x[branch, i] = _prompt(model, runtime, p, features)
        say("embedder")
        note("embedder", _embedder(model, runtime))
        everything = np.concatenate(list(x.values()), axis=1)
        length = max(*runtime.buckets, *(row.shape[1] for row in x.values()))  # one for all: JAX compiles it once
        say(PREFILL.rstrip("_"))
        for name, error in _prefills(model, runtime, everything, length).items():
            note(name, error)
        for (branch, i), row in x.items():
            say(f"answers {branch} {i + 1}/{len(pictures)}")
            decode, answers = _answers(model, runtime, pictures[i], branch, row, length)
            note("decode", decode)
            note("answers", answers)
    return [Seam(name, error, _limit(name, runtime)) for name, error in worst.items()]


def _limit(seam: str, runtime: Runtime) -> float:
    bits = {name: b for name, b in runtime.manifest.bits.items() if name not in ("vrc", "embedder")}  # no activations
    part = "decoder" if seam == "decode" or seam.startswith(PREFILL) else seam
    narrow = min(bits.values(), default=32) < 32 if seam == "answers" else bits.get(part, 32) < 32
    return DYNAMIC if narrow else LIMIT


def _vrc(model: Model, runtime: Runtime, pixels: np.ndarray) -> float:
    proxy = jnp.asarray(image.proxy(pixels, model.config.vrc.side))[None]
    want = compress.predict_proxies(model.params["vrc"], model.config.vrc, proxy)
    return relative(np.array([runtime.alpha(pixels)]), np.asarray(want))


def _encoder(
    model: Model, runtime: Runtime, pixels: np.ndarray, branch: Branch
) -> tuple[float, np.ndarray, plan.VisionPlan]:
    """Worst tile, JAX's features and the plan (full size)."""
    p = plan.make(pixels.shape[:2], 1.0, model.config.policy)
    found = runtime.encode(pixels, p, branch)
    tiles = zip(image.prepare(pixels, p), p.patch_mask(), strict=True)
    want = [np.asarray(_encode(model.params, model.config, branch, t[None], m[None])) for t, m in tiles]
    return _worst(*(relative(f, w[0]) for f, w in zip(found, want, strict=True))), np.concatenate(want), p


def _prompt(model: Model, runtime: Runtime, p: plan.VisionPlan, features: np.ndarray) -> np.ndarray:
    """f32[1 L D]: JAX's embeddings of a question about a picture."""
    row = runtime.prompt(p, QUESTION)
    x = _embed(model.params, row.ids[None], row.slots[None], features.reshape(1, -1, features.shape[-1]))
    return np.asarray(x)


def _embedder(model: Model, runtime: Runtime) -> float:
    """Every row of a small table, a sample of a large one."""
    vocab = model.config.llm.vocab
    ids = np.arange(vocab, dtype=np.int32)[:: max(1, vocab // 2048)]
    return relative(runtime.embed(ids)[0], _rows(model, ids))


def _rows(model: Model, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """f32[n D]: rows of JAX's token table."""
    return np.asarray(llm.embed(model.params["llm"], jnp.asarray(ids, jnp.int32)[None]))[0]


def _prefills(model: Model, runtime: Runtime, x: np.ndarray, length: int) -> dict[str, float]:
    """Caches of each prefill length. A key depends on no later position, so the longest run is the reference of all."""
    x = np.tile(x, (1, -(-length // x.shape[1]), 1))[:, :length]
    state, out = _prefilled(model, x, length), {}
    for n in runtime.buckets:
        found = runtime.prefill(x[:, :n])
        pairs = ((found[f"kv_cache_{s}_{i}"], getattr(c, s)) for i, c in enumerate(state.caches) for s in "kv")
        out[f"{PREFILL}{n}"] = _worst(*(relative(f[:, :, :n], np.asarray(w)[:, :, :n]) for f, w in pairs))
    return out


def _answers(
    model: Model, runtime: Runtime, pixels: np.ndarray, branch: Branch, x: np.ndarray, length: int
) -> tuple[float, float]:
    """(decode, answers): logits step by step, and the regret of the answer that the files give from the pixels on.

    JAX is led along the files' tokens, padded on the left as it pads batches; the files are not padded.
    """
    answer = runtime.answer(pixels, QUESTION, branch, vrc=False, max_new=STEPS)
    tok, n = model.tokenizer, x.shape[1]
    forbidden, end = tok.forbidden(model.config.llm.vocab), tok.special(tokens.IM_END)
    state, caches, decode, regret = _prefilled(model, x, length), runtime.prefill(x[:, :-1]), 0.0, 0.0
    for i in range(len(answer.ids) + answer.ended):
        want = np.asarray(state.logits[0])
        found, caches = runtime.step(x[:, -1:], n - 1 + i, caches)
        decode = _worst(decode, relative(found, want))
        chosen = answer.ids[i] if i < len(answer.ids) else end
        regret = _worst(regret, float((want[~forbidden].max() - want[chosen]) / np.abs(want).max()))
        if i < len(answer.ids):
            state = _led(model, state, answer.ids[i], forbidden, end)
            x = _rows(model, [answer.ids[i]])[None]
    return decode, regret


def _prefilled(model: Model, x: np.ndarray, length: int) -> DecodeState:
    """JAX's state after x, padded on the left to `length`, with room for an answer."""
    pads = length - x.shape[1]
    x, key = np.pad(x, ((0, 0), (pads, 0), (0, 0))), jax.random.key(0)
    return _prefill(model.params, model.config, x, np.array([pads], np.int32), key, length + STEPS)


def _led(model: Model, state: DecodeState, token: int, forbidden: np.ndarray, end: int) -> DecodeState:
    """JAX's state after `token`, whatever its own choice was."""
    state = state._replace(logits=jnp.zeros_like(state.logits).at[0, token].set(1))
    return _step(model.params, model.config, state, generate.Sampler(), forbidden, end)[0]
