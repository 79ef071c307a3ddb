"""From pictures and a question to an answer, as functions: view, encode, read, say.

    view     pixels -> View        which picture, and how it is cut: VRC and the plan
    encode   pixels, View -> Seen  its tiles through one branch, one after another
    read     a prompt -> Read      the decoder's cache; what a prompt has in common with the last one is not read again
    say      Read -> text          the answer, piece by piece

`see` is the first two, `answer` all of it for one question; `chat.Chat` holds a conversation. `export.runtime` is the
same walk over exported files.
Axes: H W picture, F features of a picture's tiles, L tokens, D decoder width.
"""

from __future__ import annotations

import functools
import hashlib
import secrets
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from hypervl_jax import compress, generate, image, lengths, plan, text, tokens
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import Branch, ModelConfig
from hypervl_jax.generate import GREEDY, DecodeState, Sampler
from hypervl_jax.model import hypervl, llm
from hypervl_jax.plan import VisionPlan
from hypervl_jax.text import Prompt
from hypervl_jax.tokens import Tokenizer

# --- pictures --------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """Which picture, how it is cut, and who looks: what its features depend on."""

    digest: str  # SHA-256 of its pixels
    plan: VisionPlan
    branch: Branch


class Seen(NamedTuple):
    """A picture as the model sees it."""

    view: View
    features: Float[np.ndarray, "F D"]

    @property
    def plan(self) -> VisionPlan:
        return self.view.plan


def ratio_of(model: Model, pixels: UInt8[np.ndarray, "H W 3"]) -> float:
    """The area ratio in [min_ratio, 1] that VRC allows this picture."""
    scale = model.info.get("vrc_scale", 1.0)
    return compress.predict(model.params["vrc"], model.config.vrc, pixels, scale)


def view(model: Model, pixels: UInt8[np.ndarray, "H W 3"], branch: Branch = "base", vrc: bool = True) -> View:
    """How a picture will be seen; nothing is encoded yet."""
    p = plan.make(pixels.shape[:2], ratio_of(model, pixels) if vrc else 1.0, model.config.policy)
    digest = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    return View(digest, p, branch)


def encode(model: Model, pixels: UInt8[np.ndarray, "H W 3"], view: View) -> Seen:
    """Encodes the tiles of a picture one after another, through one compiled program."""
    tiles, masks = image.prepare(pixels, view.plan), view.plan.patch_mask()
    run = functools.partial(_encode, model.params, model.config, view.branch)
    features = [np.asarray(run(t, m)) for t, m in zip(tiles, masks, strict=True)]
    return Seen(view, np.concatenate(features))


def see(model: Model, pixels: UInt8[np.ndarray, "H W 3"], branch: Branch = "base", vrc: bool = True) -> Seen:
    """Plans and encodes a picture."""
    return encode(model, pixels, view(model, pixels, branch, vrc))


@functools.partial(jax.jit, static_argnames=("cfg", "branch"))
def _encode(params: dict, cfg: ModelConfig, branch: Branch, tile: Array, mask: Array) -> Array:
    return hypervl.encode_tile(params, cfg, branch, tile, mask)


# --- reading ---------------------------------------------------------------------------------------------------------

Mark = int | tuple[View, int]  # a token: its id, or a picture and one of its slots


class Read(NamedTuple):
    """What the decoder has read. Reading or saying more gives the state's buffers away: it is good for one use."""

    state: DecodeState
    marks: tuple[Mark, ...]  # token by token, what stands in the cache
    fed: int  # how many of them had to be read; the cache held those before
    ended: bool = False  # the last one was the end of an answer

    @property
    def room(self) -> int:
        """Positions of the cache."""
        return self.state.caches[0].k.shape[2]

    @property
    def whole(self) -> bool:
        """Whether its buffers are still its own."""
        return not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))


class Layout(NamedTuple):
    """How a prompt will be read."""

    marks: tuple[Mark, ...]
    shared: int  # how many of them the cache holds already
    runs: tuple[tuple[int, int], ...]  # (start, length) of each run of the prefill program; the last may be padded
    room: int  # positions of the cache


def lay_out(prompt: Prompt, views: Sequence[View], new: int, before: Read | None = None) -> Layout:
    """How `read` will read this prompt, where `before` is what was read last."""
    owner = [(view, slot) for view in views for slot in range(view.plan.n_tiles * view.plan.policy.tokens_per_tile)]
    marks = tuple(i if s < 0 else owner[s] for i, s in zip(prompt.ids.tolist(), prompt.slots.tolist(), strict=True))
    old = before.marks if before is not None and before.whole else ()
    same = next((n for n, (a, b) in enumerate(zip(old, marks, strict=False)) if a != b), min(len(old), len(marks)))
    shared = min(same, len(marks) - 1)  # the last one is read again if need be: its logits say what comes next
    room = lengths.room(len(marks) + max(new, lengths.PREFILL[0]))
    if before is not None and shared:
        room = max(room, before.room)
    runs = [(shared + at, n) for at, n in lengths.chunks(len(marks) - shared, lengths.PREFILL, room - shared)]
    return Layout(marks, shared, tuple(runs), room)


def read(model: Model, prompt: Prompt, pictures: Sequence[Seen], new: int, before: Read | None = None) -> Read:
    """Reads a prompt that shows `pictures`, with room for `new` more tokens. Where it begins like `before` (same text,
    same pictures seen the same way) only what follows is read, and `before` is used up."""
    cfg = model.config
    marks, shared, runs, room = lay_out(prompt, [p.view for p in pictures], new, before)
    if before is not None and shared:
        state = before.state if before.room == room else generate.grow(before.state, room)
    else:
        state = generate.start(cfg, 1, room, llm.dtype(model.params["llm"]))
    seen = generate.tokens_in([prompt.ids], cfg.llm.vocab)
    state = state._replace(at=jnp.int32(shared), done=jnp.zeros(1, bool), seen=jnp.asarray(seen))
    features = np.concatenate([np.zeros((0, cfg.llm.width), np.float32), *(p.features for p in pictures)])
    for start, length in runs:
        row = slice(start, start + length)
        count = len(prompt.ids[row])
        ids, slots = np.zeros((1, length), np.int32), np.full((1, length), -1, np.int32)
        ids[0, :count] = prompt.ids[row]
        visual = np.flatnonzero(prompt.slots[row] >= 0)
        slots[0, visual] = visual  # the run carries its own features, one row a token: one shape, whatever the pictures
        x = np.zeros((1, length, cfg.llm.width), features.dtype)
        x[0, visual] = features[prompt.slots[row][visual]]
        state = _feed(model.params, cfg, state, ids, slots, x, jnp.int32(count))
    return Read(state, marks, len(marks) - shared)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def _feed(
    params: dict, cfg: ModelConfig, state: DecodeState, ids: Array, slots: Array, features: Array, count: Array
) -> DecodeState:
    return generate.extend(params, cfg, state, hypervl.embed(params, ids, slots, features), count)


# --- saying ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _forbidden(tokenizer: Tokenizer, vocab: int) -> Array:
    return jnp.asarray(tokenizer.forbidden(vocab))


def say(
    model: Model,
    read: Read,
    new: int,
    sampler: Sampler = GREEDY,
    key: Any = None,
    stops: Sequence[str] = (),
) -> Iterator[tuple[str, Read]]:
    """The answer to what was read: for every token the text that it completes, perhaps none, and what the decoder has
    read by then. Only the latest `Read` may be used for anything else; its `ended` says whether the model ended the
    answer (or a stop string did), or `new` tokens were not enough.

    Raises `ValueError` where the cache has no room for `new` tokens.
    """
    if len(read.marks) + new > read.room:
        raise ValueError(f"{len(read.marks)} tokens are read and the cache holds {read.room}: no room for {new} more")
    tok, cfg = model.tokenizer, model.config
    end, forbidden = tok.special(tokens.IM_END), _forbidden(tok, cfg.llm.vocab)
    out, marks = text.Stream(tok, stops), read.marks
    begun = read.state._replace(key=jax.random.key(0) if key is None else key)
    for token, state in generate.stream(model.params, cfg, begun, forbidden, sampler, end, new):
        piece, marks = out.push(token), (*marks, token)
        read = Read(state, marks, read.fed, out.done)
        yield piece, read
        if out.done:
            break
    if rest := out.finish():
        yield rest, read


def answer(
    model: Model,
    pictures: Sequence[Seen],
    question: str,
    new: int = 32,
    sampler: Sampler = GREEDY,
    seed: int | None = None,
    stops: Sequence[str] = (),
) -> Generator[str, None, bool]:
    """The answer to one question about some pictures, piece by piece as it is known, of at most `new` tokens; the
    generator returns whether the model ended it. What is sampled depends on `seed` (None: another one each time)."""
    content = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": question}]
    cfg, tok = model.config, model.tokenizer
    prompt = text.render([{"role": "user", "content": content}], [p.plan for p in pictures], tok, cfg.text)
    key = jax.random.key(secrets.randbits(32) if seed is None else seed)
    ended = False
    for piece, now in say(model, read(model, prompt, pictures, new), new, sampler, key, stops):
        ended = now.ended
        if piece:
            yield piece
    return ended
