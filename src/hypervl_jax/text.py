"""Conversations -> token ids, image slots and loss masks.

User text can never become a special token: `Tokenizer.encode` runs a tokenizer that has none; only the template below
writes them, by id. Letters: L sequence, B batch.

Template (ChatML as in Qwen3, papers: HyperVL 1.6):

    <|im_start|>user\\n<|vision_start|>TILES<|vision_end|>\\n{question}<|im_end|>\\n
    <|im_start|>assistant\\n{<think>\\n\\n</think>\\n\\n}{answer}<|im_end|>\\n

TILES, layout "rowcol": for each tile row-major, its marker `<row_r_col_c>` and one `<|image_pad|>` a visual token, a
newline after each row of tiles, at last `<global-img>` and the thumbnail's tokens. Layout "plain": the tokens alone.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsInt

import numpy as np
from jaxtyping import Bool, Int32

from hypervl_jax.config import TextConfig
from hypervl_jax.plan import VisionPlan
from hypervl_jax.tokens import (
    END_THINK,
    GLOBAL,
    IM_END,
    IM_START,
    IMAGE_PAD,
    PAD,
    THINK,
    VISION_END,
    VISION_START,
    TextError,
    Tokenizer,
)

ROLES = ("system", "user", "assistant")
_PAIR = "[0-9]{1,9}[ ,]{1,3}[0-9]{1,9}"
_NUMBERS = f"{_PAIR}(?:[ ,]{{1,3}}{_PAIR})?"  # two or four whole numbers


# --- prompts ---------------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """One row of the decoder's input, or B rows after `stack`."""

    ids: Int32[np.ndarray, "*B L"]
    slots: Int32[np.ndarray, "*B L"]  # -1 for text, else tile * tokens_per_tile + cell: a row of the visual features
    loss: Bool[np.ndarray, "*B L"]  # this token is supervised: answers and the <|im_end|> that closes them
    positions: Int32[np.ndarray, "*B L"]  # rotary position
    segments: Int32[np.ndarray, "*B L"]  # 0 seen by all, k >= 1 the k-th question, -1 padding


class _Writer:
    """Collects (id, slot, loss) triples."""

    def __init__(self, tokenizer: Tokenizer, cfg: TextConfig):
        self.tokenizer, self.cfg = tokenizer, cfg
        self.ids: list[int] = []
        self.slots: list[int] = []
        self.loss: list[bool] = []

    def put(self, ids: Sequence[int], slots: Sequence[int] | None = None, loss: bool = False) -> None:
        self.ids += ids
        self.slots += [-1] * len(ids) if slots is None else slots
        self.loss += [loss] * len(ids)

    def text(self, text: str, loss: bool = False) -> None:
        self.put(self.tokenizer.encode(text), loss=loss)

    def special(self, name: str, loss: bool = False) -> None:
        self.put([self.tokenizer.special(name)], loss=loss)

    def image(self, plan: VisionPlan, first_tile: int) -> None:
        rowcol = self.cfg.layout == "rowcol"
        self.special(VISION_START)
        start = len(self.ids)
        pad = self.tokenizer.special(IMAGE_PAD)
        for i, tile in enumerate(plan.tiles):
            if rowcol:
                self.special(GLOBAL if tile.row < 0 else f"<row_{tile.row + 1}_col_{tile.col + 1}>")
            slots = (plan.cells(i) + (first_tile + i) * plan.policy.tokens_per_tile).tolist()
            self.put([pad] * len(slots), slots)
            if rowcol and tile.col == plan.grid[1] - 1:
                self.text("\n")
        found = sum(slot >= 0 for slot in self.slots[start:])
        if found != plan.tokens:
            raise TextError(f"the plan promises {plan.tokens} visual tokens, its tiles hold {found}: {plan}")
        self.special(VISION_END)
        self.text("\n")

    def open(self, role: str, text: str = "") -> None:
        self.special(IM_START)
        self.text(role + "\n" + text)

    def think(self) -> None:
        """Qwen3's empty thinking block, which says: answer at once."""
        if self.cfg.think:
            self.special(THINK)
            self.text("\n\n")
            self.special(END_THINK)
            self.text("\n\n")

    def close(self, loss: bool = False) -> None:
        self.special(IM_END, loss)
        self.text("\n")

    def qa(self, question: str, answer: str) -> None:
        """The rest of a user's turn after its picture, and the answer's turn."""
        self.text(question)
        self.close()
        self.open("assistant")
        self.think()
        self.text(answer, loss=True)
        self.close(loss=True)


def visual_tokens(plan: VisionPlan, cfg: TextConfig) -> int:
    """What one picture costs the decoder: the cells of its tiles and thumbnail, and a marker each."""
    return plan.tokens + (plan.n_tiles if cfg.layout == "rowcol" else 0)


def render(
    messages: Sequence[Mapping[str, Any]],
    plans: Sequence[VisionPlan],
    tokenizer: Tokenizer,
    cfg: TextConfig,
    add_generation_prompt: bool = True,
    thinking: bool = False,
) -> Prompt:
    """A conversation as one causal row: all in segment 0, positions 0 .. L-1.

    A message is `{"role": "system" | "user" | "assistant", "content": text or parts}`, a part `{"type": "image"}` (user
    only) or `{"type": "text", "text": ...}`. `plans` has one plan for each image, in order; the slots of an image start
    after the tiles of those before it. As in Qwen3's template, the thinking block is written for the answer that ends
    the row, not for answers before the last question. The generation prompt is added unless an answer ends the row;
    `thinking` leaves the block out of it, so that the model may think first. Raises `TextError` for what does not fit
    this description.
    """
    w = _Writer(tokenizer, cfg)
    if len({plan.policy.tokens_per_tile for plan in plans}) > 1:
        raise TextError("the pictures of one conversation must share one PlanPolicy")
    if not messages:
        raise TextError("a conversation needs at least one message")
    used = tiles = 0
    role = ""
    for n, message in enumerate(messages):
        role, parts = _parts(message, n)
        answer = role == "assistant"
        if not answer and parts and parts[0] is not None:
            w.open(role, parts.pop(0) or "")  # in one piece, as Qwen's tokenizer meets it: it may begin with a newline
        else:
            w.open(role)
        if answer and n == len(messages) - 1:
            w.think()
        for part in parts:
            if part is not None:
                w.text(part, loss=answer)
                continue
            if role != "user":
                raise TextError(f"message {n}: a picture belongs in a user message, not in {role}'s")
            if used < len(plans):
                w.image(plans[used], tiles)
                tiles += plans[used].n_tiles
            used += 1
        w.close(loss=answer)
    if used != len(plans):
        raise TextError(f"the messages show {used} pictures, {len(plans)} were given")
    if add_generation_prompt and role != "assistant":
        w.open("assistant")
        if not thinking:
            w.think()
    return _prompt(w, np.arange(len(w.ids)), np.zeros(len(w.ids)))


class Fitted(NamedTuple):
    """What a model is shown of a conversation."""

    messages: list[Mapping[str, Any]]
    pictures: int  # how many pictures these messages show: the last of the conversation's
    prompt: Prompt


def fit(
    messages: Sequence[Mapping[str, Any]],
    plans: Sequence[VisionPlan],
    tokenizer: Tokenizer,
    cfg: TextConfig,
    length: int,
    thinking: bool = False,
) -> Fitted:
    """The latest turns of a conversation whose row (`render`) has at most `length` tokens, after its system message.

    A turn, which begins with a user message, goes or stays whole and its pictures with it: nothing is ever cut inside a
    message or an image. Raises `TextError` with the length that the last turn needs if it is longer alone.
    """
    prompt = render(messages, plans, tokenizer, cfg, thinking=thinking)
    turns = [n for n, message in enumerate(messages) if message["role"] == "user"]
    kept, pictures = list(messages), len(plans)
    for start in turns[1:]:
        if len(prompt.ids) <= length:
            break
        kept = [*messages[: turns[0]], *messages[start:]]
        pictures = sum(part is None for n, message in enumerate(kept) for part in _parts(message, n)[1])
        prompt = render(kept, plans[len(plans) - pictures :], tokenizer, cfg, thinking=thinking)
    if len(prompt.ids) > length:
        visual = int((prompt.slots >= 0).sum())
        raise TextError(
            f"the prompt needs {len(prompt.ids)} tokens, {visual} of them visual; there is room for {length}: ask a "
            "shorter question, show fewer or smaller pictures, or allow a longer context"
        )
    return Fitted(kept, pictures, prompt)


def _parts(message: Any, n: int) -> tuple[str, list[str | None]]:
    """(role, parts) of message n: a text each, None for a picture."""
    if not isinstance(message, Mapping):
        raise TextError(f'message {n}: expected {{"role": ..., "content": ...}}, found {message!r:.80}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise TextError(f"message {n}: role {role!r} is not one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return role, [content]
    if not isinstance(content, Sequence):
        raise TextError(f"message {n}: content must be text or a list of parts, found {content!r:.80}")
    parts: list[str | None] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if kind == "text" else None
        if kind != "image" and not isinstance(text, str):
            raise TextError(
                f'message {n}: a part is {{"type": "image"}} or {{"type": "text", "text": ...}}, found {part!r:.80}'
            )
        parts.append(text)
    return role, parts


def render_questions(
    plan: VisionPlan, questions: Sequence[tuple[str, str]], tokenizer: Tokenizer, cfg: TextConfig
) -> Prompt:
    """One picture and several independent (question, answer) pairs in one row: the picture is encoded and read once.

    The user's turn up to the picture is segment 0; the k-th pair (from 1) goes on from there as segment k, positions
    restarting after the picture, so that segment 0 with segment k is exactly `render` of that pair.
    """
    w = _Writer(tokenizer, cfg)
    w.open("user")
    w.image(plan, 0)
    ends = [len(w.ids)]
    for question, answer in questions:
        w.qa(question, answer)
        ends.append(len(w.ids))
    lengths = np.diff(ends, prepend=0)
    starts = np.repeat([0, *ends[:-1]], lengths)
    segments = np.repeat(np.arange(len(ends)), lengths)
    return _prompt(w, np.arange(len(w.ids)) - starts + np.where(segments > 0, ends[0], 0), segments)


def _prompt(w: _Writer, positions: np.ndarray, segments: np.ndarray) -> Prompt:
    ids, slots, positions, segments = (np.asarray(x, np.int32) for x in (w.ids, w.slots, positions, segments))
    return Prompt(ids, slots, np.array(w.loss, bool), positions, segments)


def pad(prompt: Prompt, length: int, pad_id: int) -> Prompt:
    """The prompt filled up to `length`; never cut: raises `TextError` with the length it needs."""
    more = length - len(prompt.ids)
    if more < 0:
        visual = int((prompt.slots >= 0).sum())
        raise TextError(
            f"the prompt needs {len(prompt.ids)} tokens, {visual} of them visual; the row holds {length}: raise "
            "DataConfig.lengths, or lower the ratio or PlanPolicy.max_tiles"
        )
    fill = (pad_id, -1, False, 0, -1)
    return Prompt(*(np.pad(array, (0, more), constant_values=value) for array, value in zip(prompt, fill, strict=True)))


def stack(prompts: Sequence[Prompt], length: int, pad_id: int) -> Prompt:
    """Prompts as the rows of one [B L] batch, each padded to `length`."""
    rows = [pad(prompt, length, pad_id) for prompt in prompts]
    return Prompt(*(np.stack(column) for column in zip(*rows, strict=True)))


# --- answers ---------------------------------------------------------------------------------------------------------


def strip_answer(tokenizer: Tokenizer, ids: Iterable[SupportsInt]) -> str:
    """The text of generated ids up to the first <|im_end|> or <|endoftext|>, without white space around it."""
    stream = Stream(tokenizer)
    return ("".join(map(stream.push, ids)) + stream.finish()).strip()


class Stream:
    """Text as it is generated: `push` ids one by one, get only whole characters; `done` after the answer's end.

    The answer also ends where one of `stops` is complete, which is left out of it; what may become one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        if not all(stops):
            raise TextError("a stop string is empty; leave it out, the answer then ends where the model ends it")
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ends = {tokenizer.special(IM_END), tokenizer.special(PAD)}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._stopped = False
        self.done = False

    def push(self, id: SupportsInt) -> str:
        """The characters that `id` completes, often none; nothing once the answer has ended."""
        self.done = self.done or int(id) in self._ends
        return "" if self.done else self._release(self._decoder.decode(self._tokenizer.token(id)))

    def finish(self) -> str:
        """What was held back, and what is left of an unfinished character, as U+FFFD; usually nothing."""
        if self._stopped:
            return ""
        rest = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return rest

    def _release(self, more: str) -> str:
        """What can no longer be the beginning of a stop string, up to the first one that is complete."""
        text = self._held + more
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.done = self._stopped = True
            self._held = ""
            return text[: min(found)[1]]
        starts = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        kept = len(text) - max(starts, default=0)
        self._held = text[kept:]
        return text[:kept]


def coordinates(answer: str, coords: int) -> list[tuple[int, ...]]:
    """Points (x, y) and boxes (x0, y0, x1, y1) that an answer names, 0 .. coords - 1 as in `VisionPlan.to_pixels`: the
    whole of it ("37 52"), or in brackets anywhere ("the anchor is at (37, 52)")."""
    whole = re.fullmatch(_NUMBERS, answer.strip())
    groups = [whole[0]] if whole else re.findall(rf"[(\[]\s*({_NUMBERS})\s*[)\]]", answer)
    found = [tuple(int(n) for n in re.findall("[0-9]+", group)) for group in groups]
    return [numbers for numbers in found if max(numbers) < coords]


def places(answer: str, plan: VisionPlan, coords: int) -> list[str]:
    """The same in pixels of the original picture, a line each."""
    h, w = plan.size
    out = []
    for numbers in coordinates(answer, coords):
        x, y, *end = plan.to_pixels(numbers, coords)
        named = f"box x {x:.0f} to {end[0]:.0f}, y {y:.0f} to {end[1]:.0f}" if end else f"point x {x:.0f}, y {y:.0f}"
        out.append(f"{named} of {w} x {h} pixels")
    return out
