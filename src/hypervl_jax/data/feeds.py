"""What training is fed with, as a value: composed screens, or prepared conversations. Which samples make up step s is a
pure function of the settings and s, so a run that goes on at s misses none and sees none twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from hypervl_jax.config import Config
from hypervl_jax.data import packing, pipeline, sheets
from hypervl_jax.data.conversations import Conversation, DataError
from hypervl_jax.data.pipeline import Batch
from hypervl_jax.tokens import Tokenizer


class Example(NamedTuple):
    """A question that a run is asked now and then."""

    images: list[UInt8[np.ndarray, "H W 3"]]
    messages: list[dict[str, Any]]  # up to the question, as `text.render` takes them
    truth: str

    @property
    def question(self) -> str:
        return " ".join(p["text"] for p in self.messages[-1]["content"] if p["type"] == "text").strip()


@runtime_checkable
class Feed(Protocol):
    """Batches of every step of a run."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def classes(self) -> int:
        """How many names the image-name term tells apart."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """What tells this feed from others, as JSON: a run goes on with the same."""
        ...

    def check(self, progress: bool) -> None:
        """Raises `ValueError` naming the setting where a step could not be fed: before the first one."""
        ...

    def batches(self, start: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        """Those of step `start` and on, to the last; some `rows` of each, or all."""
        ...

    def shown(self, step: int, rows: Sequence[int] | None = None) -> list[str]:
        """The samples of one step, in some `rows` or all."""
        ...

    def examples(self, n: int) -> list[Example]:
        """At most `n` questions."""
        ...


@dataclasses.dataclass(frozen=True)
class Screens:
    """Sheets in stage 0, then screens."""

    cfg: Config
    source: pipeline.Source
    sheets: pipeline.Source
    tokenizer: Tokenizer
    names: tuple[str, ...]

    @property
    def classes(self) -> int:
        return len(self.names)

    @property
    def about(self) -> dict[str, Any]:
        return {"classes": list(self.names)}

    def check(self, progress: bool) -> None:
        early, late = self._steps
        if early:
            self._specs(0, 1)
        words = self.cfg.data, self.cfg.model.policy, self.cfg.model.text, self.tokenizer, self.cfg.train.seed
        pipeline.check(self.source, *words, late, progress)

    def batches(self, start: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        cfg, (early, late) = self.cfg, self._steps
        rest = cfg.model.policy, cfg.model.text, self.tokenizer, self.names, cfg.train.seed
        if start < early:
            side = cfg.data.screens.sheet_side
            yield from pipeline.batches(self.sheets, _whole(cfg), *rest, early, start, sheets.most(side), rows)
        if late:
            yield from pipeline.batches(self.source, cfg.data, *rest, late, max(start - early, 0), rows=rows)

    def shown(self, step: int, rows: Sequence[int] | None = None) -> list[str]:
        early, _ = self._steps
        kind, at = ("sheet", step) if step < early else ("screen", step - early)
        spec = self._specs(step, at + 1)[at]
        mine = range(len(spec.indices)) if rows is None else rows
        return [f"{kind} {spec.indices[i]} at {spec.ratios[i]:g}" for i in mine]

    def examples(self, n: int) -> list[Example]:
        out = []
        for i in range(min(n, len(self.source))):
            screen = self.source[i]
            if screen.questions:
                asked = screen.questions[i % len(screen.questions)]
                content = [{"type": "image"}, {"type": "text", "text": asked.text}]
                out.append(Example([screen.image], [{"role": "user", "content": content}], asked.answer))
        return out

    @property
    def _steps(self) -> tuple[int, int]:
        """How many of stage 0, and after it."""
        return self.cfg.train.stage0_steps, self.cfg.train.steps - self.cfg.train.stage0_steps

    def _specs(self, step: int, steps: int) -> list[pipeline.BatchSpec]:
        cfg, early = self.cfg, step < self._steps[0]
        sizes, data = (self.sheets.sizes, _whole(cfg)) if early else (self.source.sizes, cfg.data)
        return pipeline.schedule(sizes, data, cfg.model.policy, cfg.train.seed, steps)


def _whole(cfg: Config) -> Any:
    """Settings of data that is never shrunk."""
    return dataclasses.replace(cfg.data, shrink_prob=0.0)


class Conversations:
    """Prepared conversations in packed rows, of one data set or several."""

    classes = 1  # a table of names that nothing asks for

    def __init__(self, cfg: Config, sources: Sequence[packing.Source], tokenizer: Tokenizer, progress: bool = True):
        """Reads every record once. Raises `DataError` where more than `cfg.data.max_rate` of them fit no bucket, and
        `ValueError` for a config that asks for the names of things, which conversations do not tell."""
        if cfg.train.stage0_steps or cfg.train.name_weight:
            raise DataError(
                "train.stage0_steps and train.name_weight must be 0: conversations do not name what is seen"
            )
        self.cfg, self.sources, self.tokenizer = cfg, sources, tokenizer
        self.measured, self.ledger = packing.measure(
            sources, cfg.model, cfg.data, tokenizer, cfg.data.max_rate, progress
        )
        newline = len(tokenizer.encode("\n"))
        self.specs = packing.schedule(self.measured, cfg.model, cfg.data, newline, cfg.train.seed, cfg.train.steps)

    @property
    def about(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        for m in self.measured:
            told = m.words.tolist(), m.sizes, m.usable.tolist(), m.repeat
            digest.update(json.dumps(told).encode())
        return {"data": {"records": [len(s) for s in self.sources], "digest": digest.hexdigest()}}

    def check(self, progress: bool) -> None:
        """It was checked as it was made."""

    def batches(self, start: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        return packing.batches(self.sources, self.specs, self.cfg.model, self.cfg.data, self.tokenizer, start, rows)

    def shown(self, step: int, rows: Sequence[int] | None = None) -> list[str]:
        every = self.specs[step].rows
        mine = every if rows is None else [every[i] for i in rows]
        return [f"{i.source}:{i.index} at {i.ratio:g}" for row in mine for i in row]

    def examples(self, n: int) -> list[Example]:
        """The first turns of the first records that fit."""
        some = [self.sources[s][int(i)] for s, m in enumerate(self.measured) for i in m.usable[:n]][:n]
        return [_first_turn(c) for c in some]


def records(folder: Path, splits: Sequence[str] = ()) -> list[Any]:
    """The splits of a prepared data set, or those that are named. Raises `DataError`."""
    from hypervl_jax.data import prepared

    return [prepared.Records(folder, s) for s in splits or prepared.splits(folder)]


def texts(sources: Sequence[packing.Source], most: int = 2_000) -> Iterator[str]:
    """What is said in the first conversations, to train a tokenizer on."""
    for source in sources:
        for i in range(min(most, len(source))):
            for message in source[i].messages:
                yield from (p["text"] for p in message["content"] if p["type"] == "text")


def _first_turn(c: Conversation) -> Example:
    at = next(i for i, m in enumerate(c.messages) if m["role"] == "assistant")
    before = c.messages[:at]
    shown = sum(p["type"] == "image" for m in before for p in m["content"])
    truth = " ".join(p["text"] for p in c.messages[at]["content"] if p["type"] == "text")
    return Example([p.load() for p in c.pictures[:shown]], before, truth)
