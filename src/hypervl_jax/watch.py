"""What a run is watched by: when it must stop, what of it is not finite, how fast it is, what it says, where its time
goes. None of this changes what a step computes.

Axes: B rows, N tiles, L sequence.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from hypervl_jax import ask, chips, cost, mesh, text
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import BRANCHES, Branch, Config
from hypervl_jax.data.feeds import Example, Feed
from hypervl_jax.data.pipeline import Batch

RESUME = 75  # exit code of a run that stopped as it was told to and can be gone on with: EX_TEMPFAIL of sysexits.h
WINDOW = 100  # steps over which those passed over are counted
WARM = 5  # steps before a trace begins: those in which programs are compiled
_LATE = 1_000  # no signal
NEW = 32  # tokens an answer during training may have


class Watch(NamedTuple):
    """How a run is watched."""

    progress: bool = True
    stop_at: float | None = None  # `time.monotonic()` after which no step may end
    sample_every: int = 0  # steps between answers; 0: none
    profile: int = 0  # steps traced with jax.profiler; 0: none


PLAIN, QUIET = Watch(), Watch(progress=False)


def note(line: str) -> None:
    """A line that does not tear the bar; of several processes the first says it."""
    if mesh.leads():
        tqdm.write(line, file=sys.stderr)


# --- stopping --------------------------------------------------------------------------------------------------------


class Stopped(RuntimeError):
    """A run stopped as it was told to, and saved before it did: the same command goes on."""

    exit_code = RESUME


class Stop:
    """Whether a run must stop: SIGTERM, Ctrl-C (a second one ends it at once), or no time left for a step. What one of
    several processes is told all of them do, after the same step. In a thread that is not the main one signals are not
    heard. A signal that nobody asked about in time has its effect at the end.
    """

    def __init__(self, at: float | None = None):
        self._at, self._since = at, time.monotonic()
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._told) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _told(self, number: int, _: Any) -> None:
        if self._number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number
        note(f"{signal.Signals(number).name}: this step is finished and saved; Ctrl-C once more stops at once")

    def asked(self) -> str:
        """Why, asked after each step, by all processes; empty: go on."""
        now = time.monotonic()
        last, self._since = now - self._since, now
        late = self._at is not None and now + last > self._at
        why = mesh.agree(self._number if self._number is not None else _LATE if late else 0)
        return "" if not why else "--max-hours" if why == _LATE else signal.Signals(why).name

    def __exit__(self, kind: Any, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._number is not None and kind is None:
            signal.raise_signal(self._number)


# --- what is not finite ----------------------------------------------------------------------------------------------


class Guard:
    """Counts the steps that were passed over."""

    def __init__(self, limit: int, before: Iterable[int] = ()):
        self.limit, self.steps = limit, deque(before)

    def too_many(self, step: int) -> bool:
        """Whether passing over this step as well is more than `limit` of the last `WINDOW`."""
        self.steps.append(step)
        while self.steps[0] <= step - WINDOW:
            self.steps.popleft()
        return len(self.steps) > self.limit


def save_batch(path: Path, step: int, batch: Batch, shown: list[str]) -> Path:
    """The batch of a step and what it shows, to be looked at with `load_batch`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        arrays = {k: np.asarray(v) for k, v in batch._asdict().items()}
        np.savez(file, step=step, shown=np.array(shown), **arrays)  # type: ignore  # its own names are none of these
    os.replace(part, path)
    return path


def load_batch(path: Path | str) -> tuple[int, Batch, list[str]]:
    """(step, batch, what it shows) that `save_batch` wrote."""
    with np.load(path, allow_pickle=False) as found:
        batch = Batch(**{k: found[k] for k in Batch._fields})
        return int(found["step"]), batch, [str(s) for s in found["shown"]]


# --- metrics ---------------------------------------------------------------------------------------------------------


class Log:
    """A line of JSON a step, and the same for TensorBoard where tensorboardX is installed."""

    def __init__(self, folder: Path, start: int, writes: bool = True):
        """Takes out what came after the checkpoint that a run goes on from, and a line that was cut short; or, unless
        it `writes`, only reads what was skipped."""
        self.path, self._board = folder / "log.jsonl", None
        kept = [row for row in _rows(self.path) if row["step"] < start]
        self.skipped = [row["step"] for row in kept if row.get("skipped")]
        if writes and self.path.exists():
            part = self.path.with_suffix(".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in kept))
            part.replace(self.path)
        self._writes, self._file = writes, (self.path if writes else Path(os.devnull)).open("a")
        if writes and importlib.util.find_spec("tensorboardX") is not None:
            from tensorboardX import SummaryWriter  # type: ignore  # optional

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 2), **values}) + "\n")
        for name, value in values.items() if self._board is not None else ():
            self._board.add_scalar(name, float(value), step)  # type: ignore

    def flush(self, disk: bool = False) -> None:
        self._file.flush()
        if disk and self._writes:  # a checkpoint is to follow
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _rows(path: Path) -> list[dict[str, Any]]:
    out = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            out += [row] if row["step"] >= 0 else []
    return out


# --- speed -----------------------------------------------------------------------------------------------------------


def step_flops(cfg: Config, branches: tuple[Branch, ...], stage0: bool, batch: Batch, learns: Iterable[str]) -> int:
    """FLOPs of one step by formula, two a multiply-add, padding counted, recomputation not: what a model FLOPs
    utilisation is taken of (PaLM, appendix B). `learns` are paths of parameters that do: behind the first of them a
    gradient costs as much as the forward pass, and its own gradient once more."""
    groups = {".".join(path.split(".")[: 2 if path.split(".")[0] in BRANCHES else 1]) for path in learns}
    (b, n), l, llm = np.shape(batch.tiles)[:2], np.shape(batch.ids)[1], cfg.model.llm
    decoder = b * (cost.llm_flops(llm, l) + 2 * l * llm.width * llm.vocab)

    def encoder(branch: Branch, teaches: bool = False) -> int:
        vit, projector = cost.tile_flops(cfg.model, branch)
        if teaches:
            return b * n * (vit + projector)
        return b * n * (vit * (3 if f"{branch}.vit" in groups else 1) + 3 * projector)

    whole = sum(encoder(branch) for branch in branches)
    if stage0:
        return whole
    whole += len(branches) * decoder * (3 if "llm" in groups else 2)
    if branches == ("base",) and cfg.dcl.weight:
        whole += encoder("large", teaches=True) + decoder
    return whole


class Meter:
    """Tokens, or pixels, and FLOPs a second of some devices since it was last asked."""

    def __init__(self, devices: Iterable[Any], unit: str = "tok/s"):
        self._unit, self._tokens, self._flops = unit, 0, 0
        self._since = time.monotonic()
        self._peak = sum(chips.peak(d.device_kind) for d in devices)

    def add(self, tokens: int, flops: int) -> None:
        self._tokens, self._flops = self._tokens + tokens, self._flops + flops

    def read(self) -> dict[str, str]:
        now = time.monotonic()
        spent = max(now - self._since, 1e-9)
        tokens, flops = self._tokens / spent, self._flops / spent
        self._tokens, self._flops, self._since = 0, 0, now
        share = {"MFU": f"{flops / self._peak:.1%}"} if self._peak else {"GFLOP/s": f"{flops / 1e9:.3g}"}
        return {self._unit: f"{tokens:,.0f}", **share}


# --- answers and traces ----------------------------------------------------------------------------------------------


class Samples:
    """The same few questions, answered by Base now and then, greedily: to OUT/samples.jsonl, and told of. Weights that
    were spread over devices come as numpy arrays, and are computed with on the CPU: no device may have room for them.
    """

    def __init__(self, cfg: Config, feed: Feed, folder: Path, n: int = 3):
        self.cfg, self.tokenizer, self.path = cfg, feed.tokenizer, folder / "samples.jsonl"
        self.examples = feed.examples(n)

    def __call__(self, step: int, params: dict) -> None:
        if not mesh.leads():
            return
        model = Model(self.cfg.model, params, self.tokenizer, {})
        with self.path.open("a") as file, _on_host(params):
            for example in self.examples:
                said = answer(model, example)
                row = {"step": step, "question": example.question, "truth": example.truth, "answer": said}
                file.write(json.dumps(row) + "\n")
                note(f"step {step}: {_short(example.question)} -> {_short(said)} (true: {_short(example.truth)})")


@contextlib.contextmanager
def _on_host(params: dict) -> Iterator[None]:
    spread = isinstance(jax.tree.leaves(params)[0], np.ndarray)
    with jax.default_device(jax.local_devices(backend="cpu")[0]) if spread else contextlib.nullcontext():
        yield


def answer(model: Model, example: Example, new: int = NEW) -> str:
    """The greedy answer to one question by Base, pictures at full size."""
    pictures = [ask.see(model, pixels, "base", vrc=False) for pixels in example.images]
    plans, cfg = [p.plan for p in pictures], model.config.text
    prompt = text.render(example.messages, plans, model.tokenizer, cfg)
    return "".join(piece for piece, _ in ask.say(model, ask.read(model, prompt, pictures, new), new))


def _short(words: str) -> str:
    line = " ".join(words.split())
    return json.dumps(line if len(line) < 60 else line[:57] + "...", ensure_ascii=False)


class Trace:
    """jax.profiler over some steps of a run that begins at `start` and ends before `end`, to `folder`."""

    def __init__(self, folder: Path, steps: int, start: int, end: int):
        self.folder, self._on = folder, False
        self.first = min(start + WARM, max(end - steps, start))
        self.last = min(self.first + steps, end) if steps else -1

    def before(self, step: int) -> None:
        if self.last > step == self.first:
            jax.profiler.start_trace(str(self.folder))
            self._on = True

    def after(self, step: int) -> None:
        if self._on and step + 1 >= self.last:
            self.close()
            note(f"traced steps {self.first} to {step}: tensorboard --logdir {self.folder}, or ui.perfetto.dev")

    def close(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


# --- what next -------------------------------------------------------------------------------------------------------


def keep_example(out: Path, example: Example | None) -> None:
    """A picture and a question to ask the model of `out`, where there is none yet."""
    path = out / "example.png"
    if example is not None and example.images and not path.exists():
        from PIL import Image

        (out / "example.txt").write_text(example.question, "utf-8")
        Image.fromarray(example.images[0]).save(part := out / "example.part.png")
        os.replace(part, path)


def commands(out: Path, vrc: bool = True) -> list[str]:
    """The commands that ask, judge and export the model under `out`; `vrc` says whether it has learnt how far pictures
    may shrink."""
    picture, asked, model = "PICTURE", "what is this?", out / "model"
    if (out / "example.png").is_file():
        picture, asked = str(out / "example.png"), (out / "example.txt").read_text("utf-8")
    said = {
        "ask it:    ": ["ask", picture, asked, "--model", model, *([] if vrc else ["--no-vrc"])],
        "judge it:  ": ["eval", "--model", model],
        "export it: ": ["export", model, "--out", out / "export"],
    }
    return [what + shlex.join(["hypervl", *map(str, argv)]) for what, argv in said.items()]
