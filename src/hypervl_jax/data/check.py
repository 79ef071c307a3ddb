"""What there is to say of data before it is trained on: every record read, every picture decoded, every fault named.

`Examiner` looks at one record, `check` at all of them; `Ledger` holds what cannot be used, up to a rate.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from hypervl_jax import cost, plan, text, tokens
from hypervl_jax.config import BRANCHES, Branch, DataConfig, ModelConfig, PlanPolicy, TextConfig
from hypervl_jax.data import readers
from hypervl_jax.data.conversations import IMAGE, KEPT, KINDS, Conversation, DataError, Fault
from hypervl_jax.image import ImageError
from hypervl_jax.plan import VisionPlan
from hypervl_jax.tokens import TextError, Tokenizer

_SPECIAL = re.compile("|".join(map(re.escape, (*tokens.SPECIALS, *tokens.MARKERS, IMAGE))))
Sizes = list[tuple[int, int]]


class Ledger:
    """Faults as they are found. Those of a kind in `KEPT` do not count: their records are used all the same."""

    def __init__(self):
        self.faults: list[Fault] = []

    @property
    def lost(self) -> int:
        """How many records cannot be used."""
        return sum(f.kind not in KEPT for f in self.faults)

    def settle(self, records: int, max_rate: float) -> None:
        """Raises `DataError` where more than `max_rate` of `records`, or all of them, cannot be used, and where a file
        could not be read to its end: nobody knows how many those are."""
        if cut := next((f for f in self.faults if f.kind == "unreadable"), None):
            raise DataError(f"{cut}; mend the file, or leave it out")
        lost = self.lost
        if lost > max_rate * records or (records and lost >= records):
            first = next(f for f in self.faults if f.kind not in KEPT)
            raise DataError(
                f"{first}; {lost} of {records} records ({lost / records:.2%}) cannot be used, {max_rate:.2%} are "
                "allowed: mend what `hypervl data check` lists, or raise --max-rate"
            )

    def write(self, path: Path) -> None:
        """A line of JSON a fault."""
        path.write_text("".join(json.dumps(f._asdict()) + "\n" for f in self.faults), "utf-8")


class Examiner:
    """Decodes the pictures of one record after another and knows again what was there before."""

    def __init__(self):
        self._ids: dict[tuple[str, str], int] = {}
        self._records: dict[bytes, str] = {}

    def __call__(self, c: Conversation) -> tuple[Sizes, list[Fault]]:
        """(height, width) of each picture, and the faults. Where one is not of `KEPT`, sizes are not complete."""
        sizes, faults = [], []

        def found(kind: str, reason: str) -> None:
            faults.append(Fault(c.file, c.line, kind, reason))

        for picture in c.pictures:
            try:
                h, w = picture.load().shape[:2]
                sizes.append((h, w))
            except ImageError as e:
                large = re.search(r"raise max_|more pixels than", str(e))
                found("image-too-large" if large else "image-damaged", str(e))
                return sizes, faults
        for n, message in enumerate(c.messages, 1):
            words = "\n".join(p["text"] for p in message["content"] if p["type"] == "text")
            if special := _SPECIAL.search(words):
                found("special-token", f"message {n}: {special[0]} is read as plain text; take it out of the data")
        if (before := self._ids.setdefault((c.file, c.id), c.line)) != c.line:
            found("duplicate-id", f"{c.id!r:.80} is the id of {c.file}:{before} too")
        where = f"{c.file}:{c.line}"
        if (same := self._records.setdefault(_digest(c), where)) != where:
            found("duplicate-record", f"messages and pictures are those of {same}")
        return sizes, faults


def _digest(c: Conversation) -> bytes:
    digest = hashlib.blake2b(json.dumps(c.messages, sort_keys=True).encode(), digest_size=16)
    for picture in c.pictures:
        digest.update(picture.source if isinstance(picture.source, bytes) else str(picture.source).encode() + b"\0")
    return digest.digest()


class Shown(NamedTuple):
    """A record as the model meets it."""

    plans: list[VisionPlan]
    prompt: text.Prompt

    @property
    def tiles(self) -> int:
        return sum(p.n_tiles for p in self.plans)


def shown(
    c: Conversation, sizes: Sizes, ratio: float, policy: PlanPolicy, cfg: TextConfig, tokenizer: Tokenizer
) -> Shown:
    """The plans of its pictures, each at the area ratio `ratio`, and its row. Raises `TextError`."""
    plans = [plan.make(size, ratio, policy) for size in sizes]
    return Shown(plans, text.render(c.messages, plans, tokenizer, cfg, add_generation_prompt=False))


def too_much(tokens: int, tiles: int, cfg: DataConfig) -> tuple[str, str] | None:
    """Kind and reason of a row that fits no bucket: nothing is ever cut."""
    if tiles > cfg.tile_buckets[-1]:
        return (
            "too-many-tiles",
            f"{tiles} tiles, data.tile_buckets end at {cfg.tile_buckets[-1]}: raise them, or lower max_tiles",
        )
    if not any(tiles <= n and tokens <= length for n, length in zip(cfg.tile_buckets, cfg.lengths, strict=True)):
        return "too-long", f"{tokens} tokens with {tiles} tiles; data.lengths are {list(cfg.lengths)}: raise them"
    return None


class Report(NamedTuple):
    """What `check` found. One entry of the arrays a record that can be used."""

    records: int
    ledger: Ledger
    tokens: np.ndarray  # i64[n]
    visual: np.ndarray  # i64[n], those of them that stand for pictures
    answers: np.ndarray  # i64[n], those of them that are learnt
    tiles: np.ndarray  # i64[n]
    flops: dict[Branch, int]  # of reading all of it once

    def lines(self, limit: int = 20) -> list[str]:
        """For people: the first faults, counts, histograms, cost."""
        faults = self.ledger.faults
        out = [str(f) for f in faults[:limit]]
        if len(faults) > limit:
            out.append(f"... and {len(faults) - limit} more (--limit, --ledger)")
        kinds = Counter(f.kind for f in faults)
        out += [f"  {n} {kind}: {KINDS[kind]}" for kind, n in kinds.most_common()]
        out.append(f"{self.records} records, {self.ledger.lost} of them cannot be used, {len(faults)} faults")
        if not len(self.tokens):
            return out
        out += ["", "tokens a record", *_histogram(self.tokens), "tiles a record", *_histogram(self.tiles)]
        out.append(
            f"an epoch: {self.tokens.sum()} tokens, {self.visual.sum()} of them visual, {self.answers.sum()} learnt; "
            f"{self.tiles.sum()} tiles"
        )
        out += [
            f"  {b}: {3 * n / 1e12:.4g} TFLOP to train on once, {n / 1e12:.4g} to read" for b, n in self.flops.items()
        ]
        return out


def _histogram(values: np.ndarray, bins: int = 8) -> list[str]:
    low, high = int(values.min()), int(values.max())
    step = max(1, -(-(high - low + 1) // bins))
    counts = np.bincount((values - low) // step)
    ends = [f"{low + i * step}" + (f" .. {low + i * step + step - 1}" if step > 1 else "") for i in range(len(counts))]
    wide = max(map(len, ends))
    return [f"  {e:>{wide}}  {'#' * round(40 * n / counts.max()):<40}  {n}" for e, n in zip(ends, counts, strict=True)]


def check(
    parts: Sequence[readers.Part],
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    data: DataConfig | None = None,
    progress: bool = True,
) -> Report:
    """Reads everything once, as `cfg` would see it, at ratio 1; `data` says what rows may hold.

    A record is told of with the first thing that keeps it from being used. Raises `DataError` for an extra that is
    missing, and nothing for what is in the files.
    """
    ledger, examine, records = Ledger(), Examiner(), 0
    rows: list[tuple[int, int, int, int]] = []
    flops: dict[Branch, int] = dict.fromkeys(BRANCHES, 0)
    bar = tqdm(disable=not progress, desc="check", leave=False)
    for part in parts:
        for item in readers.read(part):
            bar.update()
            if isinstance(item, Fault):
                records += item.kind != "wrong-length"
                ledger.faults.append(item)
                continue
            records += 1
            sizes, faults = examine(item)
            ledger.faults += faults
            if any(f.kind not in KEPT for f in faults):
                continue
            try:
                seen = shown(item, sizes, 1.0, cfg.policy, cfg.text, tokenizer)
            except TextError as e:
                ledger.faults.append(Fault(item.file, item.line, "bad-text", str(e)))
                continue
            n = len(seen.prompt.ids)
            ledger.faults += [
                Fault(
                    item.file,
                    item.line,
                    "image-too-small",
                    f"{p.name:.80}: {w} x {h} px, a patch has {cfg.policy.patch}",
                )
                for p, (h, w) in zip(item.pictures, sizes, strict=True)
                if min(h, w) < cfg.policy.patch
            ]
            if data is not None and (much := too_much(n, seen.tiles, data)):
                ledger.faults.append(Fault(item.file, item.line, *much))
                continue
            rows.append((n, int((seen.prompt.slots >= 0).sum()), int(seen.prompt.loss.sum()), seen.tiles))
            for branch in BRANCHES:
                looked = sum(p.vit_flops(cfg.vit(branch)) + cost.projector_flops(p, cfg, branch) for p in seen.plans)
                flops[branch] += looked + cost.llm_flops(cfg.llm, n)
    bar.close()
    tokens, visual, answers, tiles = np.array(rows, np.int64).reshape(-1, 4).T
    return Report(records, ledger, tokens, visual, answers, tiles, flops)
