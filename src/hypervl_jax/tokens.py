"""The byte-level BPE tokenizer: text -> ids and back. No text can become a control token.

A `tokenizer.json` of the `tokenizers` library, as Qwen2 and Qwen3 ship it or `train_tokenizer` makes it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import tokenizers
from jaxtyping import Bool
from tokenizers import models, pre_tokenizers, trainers

from hypervl_jax.plan import MAX_GRID

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
THINK, END_THINK = "<think>", "</think>"
GLOBAL = "<global-img>"
SPECIALS = (PAD, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, THINK, END_THINK)
MARKERS = (*(f"<row_{r}_col_{c}>" for r in range(1, MAX_GRID + 1) for c in range(1, MAX_GRID + 1)), GLOBAL)

# Qwen2's pre-tokenizer: words with the character before them, every digit alone, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROBE = "Where is the 12?  naïve 你好 🙂\r\n\n\t<|im_end|>"  # what a usable tokenizer gives back


class TextError(ValueError):
    """A conversation, prompt or tokenizer file that cannot be used; the message says what to change."""


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
