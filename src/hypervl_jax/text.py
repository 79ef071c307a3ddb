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
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsInt

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32
from tokenizers import models, pre_tokenizers, trainers

from hypervl_jax.config import TextConfig
from hypervl_jax.plan import MAX_GRID, VisionPlan

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
THINK, END_THINK = "<think>", "</think>"
GLOBAL = "<global-img>"
SPECIALS = (PAD, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, THINK, END_THINK)
MARKERS = (*(f"<row_{r}_col_{c}>" for r in range(1, MAX_GRID + 1) for c in range(1, MAX_GRID + 1)), GLOBAL)
ROLES = ("system", "user", "assistant")

# Qwen2's pre-tokenizer: words with the character before them, every digit alone, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROBE = "Where is the 12?  naïve 你好 🙂\r\n\n\t<|im_end|>"  # what a usable tokenizer gives back


class TextError(ValueError):
    """A conversation, prompt or tokenizer file that cannot be used; the message says what to change."""


# --- tokenizer -------------------------------------------------------------------------------------------------------


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2): itself if printable, else U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_letters()


class Tokenizer:
    """A byte-level BPE tokenizer in the Hugging Face `tokenizer.json` layout. Made by `load` or `train_tokenizer`."""

    def __init__(self, spec: Any, name: str = "tokenizer"):
        """`spec` is the parsed `tokenizer.json`. Raises `TextError`, naming `name`, if it is not a byte-level BPE."""
        self._spec, self._name = spec, name
        try:
            model = spec["model"]
            self._added: dict[str, int] = {token["content"]: token["id"] for token in spec["added_tokens"]}
            self._special = {token["id"] for token in spec["added_tokens"] if token["special"]}
            words = {word: i for word, i in model["vocab"].items() if word not in self._added}
            if model["type"] != "BPE" or not set(_BYTES) <= set(words) or not set("".join(words)) <= set(_BYTES):
                raise ValueError("no byte-level BPE, which those of Qwen2 and Qwen3 are")
            _check_lossless(spec)
            self._tokens = {i: bytes(map(_BYTES.__getitem__, word)) for word, i in words.items()}
            self._tokens |= {i: word.encode() for word, i in self._added.items()}
            if len(self._tokens) != len(words) + len(self._added) or {type(i) for i in self._tokens} != {int}:
                raise ValueError("ids must be integers, one a token")
            # The same tokenizer with every added token taken out: none can come out of a text, by construction.
            plain = {**spec, "model": {**model, "vocab": words}, "added_tokens": []}
            plain |= dict.fromkeys(("post_processor", "decoder", "truncation", "padding"))  # not used here
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(plain))
            if self.decode(self.encode(PROBE)) != PROBE:
                raise ValueError("a text does not come back from its ids")
        except BaseException as e:  # a damaged file can fail anywhere above: bare Exception, and panics, which are none
            if isinstance(e, KeyboardInterrupt | SystemExit):
                raise
            raise TextError(f"{name}: not a usable tokenizer.json ({type(e).__name__}: {e})") from e

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a `tokenizer.json`. Raises `TextError` naming the file if it is missing, damaged or of another kind."""
        try:
            spec = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise TextError(f"{path}: cannot read this tokenizer.json ({e})") from e
        return cls(spec, str(path))

    def save(self, path: str | Path) -> None:
        """Writes the `tokenizer.json` that `load` reads."""
        Path(path).write_text(json.dumps(self._spec, ensure_ascii=False, indent=1), "utf-8")

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs: the highest id plus one."""
        return max(self._tokens) + 1

    def special(self, name: str) -> int:
        """The id of a special token or marker. Raises `TextError` if the tokenizer has none of that name."""
        if name not in self._added:
            cure = "add the markers with with_markers" if name in MARKERS else "use a Qwen3 tokenizer.json"
            raise TextError(f"{self._name}: has no token {name}; {cure}")
        return self._added[name]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; what looks like a special token is spelt out in ordinary ones.

        `decode` gives the same text back (a Qwen tokenizer composes it first: NFC). Raises `TextError` for text that
        has no UTF-8 form, or on which a pattern of the tokenizer fails.
        """
        try:
            return self._encoder.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as e:
            raise TextError(f"cannot encode {text!r:.80}: text must be a str without lone surrogates") from e
        except BaseException as e:  # the library panics where a pattern of the file takes too long; no Exception
            if isinstance(e, KeyboardInterrupt | SystemExit):
                raise
            raise TextError(f"{self._name}: fails on {text!r:.80} ({e}); use Qwen3's tokenizer.json") from e

    def token(self, id: SupportsInt) -> bytes:
        """The bytes of one token, perhaps part of a character; U+FFFD for an id that is no token."""
        return self._tokens.get(int(id), b"\xef\xbf\xbd")

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of `ids`, special tokens by their names, U+FFFD for what is no UTF-8."""
        return b"".join(map(self.token, ids)).decode("utf-8", "replace")

    def forbidden(self, vocab: int) -> Bool[np.ndarray, " V"]:
        """Which rows of a model's vocabulary an answer may not use: rows without token, control tokens but <|im_end|>.

        That is the one end an answer can have, whichever loop decodes it.
        Raises `TextError` if the model has fewer than `vocab_size` rows.
        """
        if vocab < self.vocab_size:
            raise TextError(f"{self._name}: has {self.vocab_size} tokens, the model {vocab} rows: set LlmConfig.vocab")
        mask = np.array([i not in self._tokens or i in self._special for i in range(vocab)])
        mask[self.special(PAD)], mask[self.special(IM_END)] = True, False
        return mask


def _check_lossless(spec: Any) -> None:
    """Raises `ValueError` for settings with which a text would not come back from its ids, or not always."""
    model, pre = spec["model"], spec.get("pre_tokenizer") or {}
    if found := [k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]:
        raise ValueError(f"model.{found[0]} must be empty")
    if spec.get("normalizer") not in (None, {"type": "NFC"}):
        raise ValueError("the normalizer must be NFC or null")
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds = {step.get("type") for step in steps}
    if not {"ByteLevel"} <= kinds <= {"ByteLevel", "Split"} or any(s.get("behavior") == "Removed" for s in steps):
        raise ValueError("the pre_tokenizer must be ByteLevel, after Splits that remove nothing")


def _added(names: Iterable[str], start: int) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": name, **flags, "special": name not in (THINK, END_THINK)}  # as in Qwen3: thoughts are text
        for i, name in enumerate(names, start)
    ]


def with_markers(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the tile markers it lacks, in order, at its first free ids (Qwen3: 151669 and on)."""
    spec = tokenizer._spec
    missing = [name for name in MARKERS if name not in tokenizer._added]
    added = [*spec["added_tokens"], *_added(missing, tokenizer.vocab_size)]
    return Tokenizer({**spec, "added_tokens": added}, tokenizer._name)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> Tokenizer:
    """A byte-level BPE for a small model: 256 bytes, whole words, merges, then `SPECIALS` and `MARKERS`.

    Plain BPE spends rows on the fragments that lead up to a word; here the words that save most tokens get one row
    each (`ignore_merges` lets a word that is a token be taken whole), and merges have the rows that are left. Fewer
    rows than `vocab_size` are used when the texts do not need them. Raises `TextError` if `vocab_size` has no room.
    """
    room = vocab_size - 256 - len(SPECIALS) - len(MARKERS)
    if room < 0:
        raise TextError(
            f"vocab_size {vocab_size} is too small: bytes, special tokens and markers need {vocab_size - room}"
        )
    texts = list(texts)
    bpe = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = splitter = pre_tokenizers.Sequence([split, letters])  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + room, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    spec = json.loads(bpe.to_str())

    count = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    saved = sorted(((n * (len(word) - 1), word) for word, n in count.items() if n > 1), key=lambda s: (-s[0], s[1]))
    template = [word for word, _ in splitter.pre_tokenize_str("system\n\nuser\n\nassistant")]
    words = dict.fromkeys([*template, *(word for gain, word in saved if gain)])
    vocab = {word: i for i, word in enumerate([*sorted(_BYTES, key=_BYTES.__getitem__), *words][: 256 + room])}
    merges = []
    for a, b in spec["model"]["merges"]:
        if a + b not in vocab and len(vocab) == 256 + room:
            break
        vocab.setdefault(a + b, len(vocab))
        merges.append([a, b])
    spec["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": True}
    spec["added_tokens"] = _added((*SPECIALS, *MARKERS), len(vocab))
    spec["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return Tokenizer(spec)


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

    def open(self, role: str) -> None:
        self.special(IM_START)
        self.text(role + "\n")

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
) -> Prompt:
    """A conversation as one causal row: all in segment 0, positions 0 .. L-1.

    A message is `{"role": "system" | "user" | "assistant", "content": text or parts}`, a part `{"type": "image"}` (user
    only) or `{"type": "text", "text": ...}`. `plans` has one plan for each image, in order; the slots of an image start
    after the tiles of those before it. As in Qwen3's template, the thinking block is written for the answer that ends
    the row, not for answers before the last question. The generation prompt is added unless an answer ends the row.
    Raises `TextError` for what does not fit this description.
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
        w.open(role)
        answer = role == "assistant"
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
        w.think()
    return _prompt(w, np.arange(len(w.ids)), np.zeros(len(w.ids)))


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
    """Text as it is generated: `push` ids one by one, get only whole characters; `done` after the answer's end."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stops = {tokenizer.special(IM_END), tokenizer.special(PAD)}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.done = False

    def push(self, id: SupportsInt) -> str:
        """The characters that `id` completes, often none; nothing once the answer has ended."""
        self.done = self.done or int(id) in self._stops
        return "" if self.done else self._decoder.decode(self._tokenizer.token(id))

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD; usually nothing."""
        return self._decoder.decode(b"", final=True)
