"""A conversation about pictures: what was said, the pictures' features and the decoder's cache in one object.

Everything it does is one of the functions of `ask.py`; it remembers what they returned. A picture is encoded once, and
of each turn only what is new is read.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from hypervl_jax import ask, image, lengths
from hypervl_jax.ask import Read, Seen, View
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import Branch
from hypervl_jax.generate import GREEDY, Sampler
from hypervl_jax.model.layers import unstack
from hypervl_jax.text import END_THINK, Fitted, fit

CONTEXT = 40_960  # tokens Qwen3 was trained to follow
Images = image.Source | Sequence[image.Source]


class ChatError(ValueError):
    """A conversation that cannot be had with this model; the message says what to change."""


class Program(NamedTuple):
    """A program that an answer needs, compiled when it is first run, and why it has the shape it has."""

    what: str
    why: str


class Chat:
    """A conversation with a model.

        chat = Chat(load_model("nano"))
        for piece in chat.ask("screen.png", "what is this?"):
            print(piece, end="", flush=True)

    `messages` is what the model is shown, as `text.render` takes it; `pictures` the pictures in it, in order. When a
    question no longer fits into `context` tokens beside `max_tokens` of an answer, the oldest turns are forgotten.
    `turns` counts questions, `encoded` pictures that went through an encoder, `fed` tokens the decoder had to read.
    """

    def __init__(
        self,
        model: Model,
        branch: Branch = "base",
        vrc: bool = True,
        *,
        system: str = "",
        sampler: Sampler = GREEDY,
        seed: int | None = None,
        max_tokens: int = 256,
        stops: Sequence[str] = (),
        thinking: bool = False,
        context: int = CONTEXT,
    ):
        """`branch` looks, `vrc` lets the Visual Resolution Compressor shrink pictures, `system` says what to be. What
        is sampled depends on `seed` (None: another one each time). An answer ends before any of `stops`. With
        `thinking` the model may think before it answers; thoughts are part of the text, not of what later turns see.

        Raises `ChatError` for a model that was not taught to think, `SamplerError` for a sampler that cannot be.
        """
        if thinking and not model.config.text.think:
            raise ChatError("this model was not taught to think before it answers; leave thinking off")
        # On the device, once (on a CPU these stay the very arrays), and layer by layer.
        params = model.params | {"llm": unstack(model.params["llm"])}
        self.model = model._replace(params=jax.device_put(params, may_alias=True))
        self.branch: Branch = branch
        self.vrc, self.thinking, self.context = vrc, thinking, context
        self.sampler, self.max_tokens, self.stops = sampler, max_tokens, tuple(stops)
        self.messages: list[Mapping[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.pictures: list[Seen] = []
        self.encoded = self.fed = 0
        self.ended = True  # the last answer, by the model itself or by a stop string
        self._key = jax.random.key(secrets.randbits(32) if seed is None else seed)
        self.turns = 0
        self._read: Read | None = None
        self._running: Iterator[str] | None = None

    def ask(self, images: Images, text: str) -> Iterator[str]:
        """The answer, piece by piece as it is known, to a question that shows one more image, several or none (`()`):
        files, their bytes, Pillow images or u8 arrays [H W 3].

        The turn begins with the first piece. An answer that is not read to its end, or is interrupted, stands in the
        conversation as far as it was said. Raises `ImageError` for a picture that cannot be used and `TextError` for a
        question that does not fit; the conversation is then as it was.
        """
        self.stop()
        self._running = self._turn(images, text)
        return self._running

    def stop(self) -> None:
        """Ends an answer that is still being said."""
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]
            self._running = None

    def programs(self, images: Images, text: str) -> list[Program]:
        """The programs that `ask` would run, in order. Looks at the pictures with VRC, and encodes nothing."""
        cfg, known = self.model.config, {picture.view for picture in self.pictures}
        views = [ask.view(self.model, p, self.branch, self.vrc) for p in _pixels(images)]
        found = []
        if views and self.vrc:
            side = cfg.vrc.side
            found.append(Program(f"vrc [1 {side} {side} 3]", "every picture is shrunk to this proxy"))
        if tiles := [view.plan.n_tiles for view in dict.fromkeys(views) if view not in known]:
            side, n = cfg.policy.tile, " + ".join(map(str, tiles))
            found.append(Program(f"encoder {self.branch} [1 {side} {side} 3]", f"one tile after another, of {n}"))
        fitted, seen = self._shown(views, text)
        layout = ask.lay_out(fitted.prompt, seen, self.max_tokens, self._read)
        n = len(layout.marks)
        why = f"{n} tokens, {layout.shared} of them read before, in runs of {lengths.PREFILL}"
        for length in dict.fromkeys(length for _, length in layout.runs):
            found.append(Program(f"prefill of {length} tokens, cache of {layout.room}", why))
        why = f"{n} tokens and an answer of up to {self.max_tokens}; {self.sampler}"
        return [*found, Program(f"decode step, cache of {layout.room}", why)]

    def _shown(self, views: Sequence[View], text: str) -> tuple[Fitted, list[View]]:
        """What the model is shown when a question is asked about new pictures, and all pictures in it."""
        parts = [*[{"type": "image"}] * len(views), {"type": "text", "text": text}]
        seen = [*(p.view for p in self.pictures), *views]
        fitted = fit(
            [*self.messages, {"role": "user", "content": parts}], [view.plan for view in seen], self.model.tokenizer,
            self.model.config.text, self.context - self.max_tokens, self.thinking,
        )  # fmt: skip
        return fitted, seen[len(seen) - fitted.pictures :]

    def _turn(self, images: Images, text: str) -> Iterator[str]:
        new = _pixels(images)
        views = [ask.view(self.model, p, self.branch, self.vrc) for p in new]
        fitted, shown = self._shown(views, text)
        known = {picture.view: picture for picture in self.pictures}
        for pixels, view in zip(new, views, strict=True):
            if view not in known:
                known[view] = ask.encode(self.model, pixels, view)
                self.encoded += 1
        seen = [known[view] for view in shown]
        read = self._read = ask.read(self.model, fitted.prompt, seen, self.max_tokens, self._read)
        self.messages, self.pictures, self.ended = fitted.messages, seen, False
        self.fed += read.fed
        self.turns += 1
        key, said = jax.random.fold_in(self._key, self.turns), ""
        try:
            for piece, read in ask.say(self.model, self._read, self.max_tokens, self.sampler, key, self.stops):
                self._read, said = read, said + piece
                if piece:
                    yield piece
            self.ended = read.ended
        finally:
            answer = said.rpartition(END_THINK)[2].lstrip("\n") if self.thinking else said
            self.messages.append({"role": "assistant", "content": answer})


def _pixels(images: Images) -> list[Any]:
    several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    return [image.load(i) for i in (images if several else [images])]  # type: ignore[union-attr]
