"""Runs that are killed (SIGKILL) at random moments and gone on with, beside one that nobody touched: whether a
checkpoint was ever unreadable, a sample lost or shown twice, a step lost that was saved, a bit different in the end.

Packed conversations, two micro-batches a step, epochs of a few steps; every third kill waits until a checkpoint is
being written. Another run saves every step and is killed at each: it goes on from every one, whether an epoch ends
there or not. All processes are real, and so is their death.

    python benchmarks/resume.py             50 kills
    python benchmarks/resume.py --kills 10 --seed 3
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import Bar, arguments, finish
from PIL import Image

from hypervl_jax import presets
from hypervl_jax.config import Config, Rule
from hypervl_jax.data.conversations import Conversation, Picture

STEPS, SAVE = 48, 4
PRELOAD = ["jax", "optax", "orbax.checkpoint", "grain.python", "hypervl_jax.train", "hypervl_jax.checkpoint"]


# --- what is trained -------------------------------------------------------------------------------------------------


def settings(steps: int = STEPS, save: int = SAVE) -> Config:
    """One program, and a small one: both branches every step, next token alone, one layer of everything, encoders and
    layers of the decoder stand still."""
    cfg = presets.tiny()
    m = cfg.model
    parts = {part: replace(getattr(m, part), depth=1) for part in ("base", "large", "llm")}
    rules = (Rule(r".*\.vit\..*|llm\.blocks\..*|names_.*", 0.0), Rule(r".*"))
    how = replace(
        cfg.train, steps=steps, stage0_steps=0, name_weight=0.0, save_every=save, accumulate=2, optimizer="adamw",
        rules=rules, scan=False,
    )  # fmt: skip
    data = replace(cfg.data, batch=2, tile_buckets=(4,), lengths=(64,))
    dcl = replace(cfg.dcl, weight=0.0, schedule="joint")
    return replace(cfg, name="resume", model=replace(m, **parts), data=data, train=how, dcl=dcl)


class Records(NamedTuple):
    """Conversations in memory."""

    held: list[Conversation]
    repeat: float = 1.0

    def __getitem__(self, index: int) -> Conversation:
        return self.held[index]

    def __len__(self) -> int:
        return len(self.held)


def records(n: int = 13) -> Records:
    def one(i: int) -> Conversation:
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(buffer := io.BytesIO(), "PNG")
        asked = [{"type": "image"}, {"type": "text", "text": f"what is {i}?"}]
        said = [{"type": "text", "text": "a thing" if i % 2 else "nothing"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        return Conversation(str(i), messages, [Picture(f"{i}.png", buffer.getvalue(), (20 + i, 30))], "set", i + 1)

    return Records([one(i) for i in range(n)])


class Audited:
    """A feed that writes down which samples it gives to which step, and a digest of the batch itself, before it does;
    and lets every step take its time, so that there is something to interrupt."""

    def __init__(self, feed: Any, path: Path, pace: float):
        self.feed, self.path, self.pace = feed, path, pace

    def __getattr__(self, name: str) -> Any:
        return getattr(self.feed, name)

    def batches(self, start: int, rows: Any = None) -> Iterator[Any]:
        for step, batch in enumerate(self.feed.batches(start, rows), start):
            digest = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in batch)).hexdigest()[:16]
            with self.path.open("a") as file:
                row = {"process": os.getpid(), "step": step, "shown": self.feed.shown(step), "digest": digest}
                file.write(json.dumps(row) + "\n")
            time.sleep(self.pace)
            yield batch


def worker(out: str, steps: int, save: int, pace: float, cache: str) -> None:
    """A run to its end, or to that of this process; the bits of the last state are then in OUT/done."""
    os.dup2(os.open(Path(out) / "said.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from hypervl_jax import tokens, train
    from hypervl_jax.data import feeds
    from hypervl_jax.watch import QUIET, Stopped

    source, cfg = records(), settings(steps, save)
    tokenizer = tokens.train_tokenizer(list(feeds.texts([source])) * 2)
    feed: Any = Audited(feeds.Conversations(cfg, [source], tokenizer, progress=False), Path(out) / "seen.jsonl", pace)
    try:
        state = train.run(cfg, feed, Path(out) / "run", QUIET)
    except Stopped as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)))
    part = Path(out) / "done.part"
    part.write_text(digest.hexdigest())
    part.rename(Path(out) / "done")


# --- killing ---------------------------------------------------------------------------------------------------------


class Lab:
    """Runs under one folder."""

    def __init__(
        self, folder: Path, steps: int = STEPS, pace: float = 0.05, cache: Path | None = None, save: int = SAVE
    ):
        self.folder, self.steps, self.pace, self.save = folder, steps, pace, save
        self.cache = cache or folder / "compiled"
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(PRELOAD)

    def begin(self, name: str) -> Any:
        (self.folder / name).mkdir(exist_ok=True)
        how = (str(self.folder / name), self.steps, self.save, self.pace, str(self.cache))
        process = self._processes.Process(target=worker, args=how, daemon=True)
        process.start()
        return process

    def whole(self, name: str) -> Path:
        """A run that nobody touches."""
        process = self.begin(name)
        process.join()
        if not (self.folder / name / "done").exists():
            raise RuntimeError(
                f"{self.folder / name}: the run failed ({(self.folder / name / 'said.txt').read_text()})"
            )
        return self.folder / name

    def kill_at(self, name: str, step: int) -> bool:
        """Begins or goes on with a run, and kills it once the checkpoint of `step` is there; whether it was alive."""
        process = self.begin(name)
        while process.is_alive() and step not in finished(self.folder / name):
            time.sleep(0.002)
        process.kill()
        process.join()
        return not (self.folder / name / "done").exists()

    def kill(self, name: str, rng: np.random.Generator, saving: bool) -> bool:
        """Begins or goes on with a run, and kills it; whether it was still alive then. Half of the other kills come at
        any moment from the very start, half while steps are taken."""
        out = self.folder / name
        before = len(rows(out / "seen.jsonl"))
        process = self.begin(name)
        if saving or rng.random() < 0.5:
            target = before + int(rng.integers(1, 3 * SAVE))
            while process.is_alive() and len(rows(out / "seen.jsonl")) < target:
                time.sleep(0.005)
            while saving and process.is_alive() and not list((out / "run" / "checkpoints").glob("*tmp*")):
                time.sleep(0.0005)
            time.sleep(float(rng.uniform(0, self.pace)) * (not saving or rng.random() < 0.5))
        else:
            time.sleep(float(rng.uniform(0, 6)))
        process.kill()
        process.join()
        return not (out / "done").exists()


def rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a log."""
    return [json.loads(s) for s in path.read_text().splitlines(True) if s.endswith("\n")] if path.exists() else []


def finished(out: Path) -> list[int]:
    """Steps of the checkpoints that are there by name."""
    folder = out / "run" / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def unreadable(out: Path) -> int:
    """How many of them cannot be read, or are not as they were written. Looks at a copy."""
    import jax

    from hypervl_jax import checkpoint, train

    bad, cfg = 0, settings()
    with tempfile.TemporaryDirectory() as box:
        shutil.copytree(out / "run" / "checkpoints", Path(box) / "c")
        ckpts = checkpoint.Checkpoints(Path(box) / "c")
        like = jax.eval_shape(lambda: train.init_state(cfg, 1))
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
        for step in finished(out):
            try:
                ckpts._read(step, like)
            except Exception as e:
                print(f"{out} {step}: {e}", flush=True)
                bad += 1
        ckpts.close()
    return bad


class Trial(NamedTuple):
    """What so many kills did."""

    kills: int
    while_saving: int  # of them, how many left a checkpoint half written
    runs: int  # that came to their end
    unreadable: int
    lost: int  # times a run did not go on from its newest checkpoint
    samples: int  # steps whose samples or batches were not those of the run that nobody touched
    uneven: int  # steps that the log of a finished run has not exactly once, or with other numbers
    different: int  # finished runs with another state


def trial(lab: Lab, kills: int, seed: int) -> Trial:
    reference, rng = lab.whole("whole"), np.random.default_rng(seed)
    want = {r["step"]: (r["shown"], r["digest"]) for r in rows(reference / "seen.jsonl")}
    losses = [{k: v for k, v in r.items() if k != "time"} for r in rows(reference / "run" / "log.jsonl")]
    found, name = Counter(), "run-0"
    for n in range(kills):
        out = lab.folder / name
        newest, at = max(finished(out), default=0), len(rows(out / "seen.jsonl"))
        alive = lab.kill(name, rng, saving=n % 3 == 0)
        began = rows(out / "seen.jsonl")[at:]
        found["lost"] += bool(began) and began[0]["step"] < newest
        found["while_saving"] += bool(list((out / "run" / "checkpoints").glob("*tmp*")))
        found["unreadable"] += unreadable(out) if finished(out) else 0
        print(f"kill {n + 1} of {kills}: {name}, {len(began)} steps taken, saved {finished(out)}", flush=True)
        if not alive or n + 1 == kills:
            if alive:
                lab.whole(name)
            found["runs"] += 1
            _settle(found, out, want, losses, (reference / "done").read_text())
            name = f"run-{n + 1}"
    return Trial(kills, *(int(found[k]) for k in Trial._fields[1:]))


def step_by_step(lab: Lab) -> Trial:
    """A run that saves every step, killed at each."""
    folder = lab.folder / "each"
    folder.mkdir()
    each, found, out = Lab(folder, lab.steps, lab.pace, lab.cache, save=1), Counter(runs=1), folder / "killed"
    reference = each.whole("whole")
    for step in range(1, each.steps):
        at = len(rows(out / "seen.jsonl"))
        found["kills"] += each.kill_at("killed", step)
        began = rows(out / "seen.jsonl")[at:]
        found["lost"] += bool(began) and began[0]["step"] < step - 1
        found["unreadable"] += unreadable(out)
    each.whole("killed")
    want = {r["step"]: (r["shown"], r["digest"]) for r in rows(reference / "seen.jsonl")}
    losses = [{k: v for k, v in r.items() if k != "time"} for r in rows(reference / "run" / "log.jsonl")]
    _settle(found, out, want, losses, (reference / "done").read_text())
    return Trial(*(int(found[k]) for k in Trial._fields))


def _settle(found: Counter, out: Path, want: dict, losses: list, state: str) -> None:
    """Compares a finished run with the one that nobody touched."""
    found["unreadable"] += len(list((out / "run" / "checkpoints").glob("damaged-*")))
    seen = rows(out / "seen.jsonl")
    found["samples"] += sum((r["shown"], r["digest"]) != want[r["step"]] for r in seen)
    found["samples"] += len(set(want) - {r["step"] for r in seen})
    got = [{k: v for k, v in r.items() if k != "time"} for r in rows(out / "run" / "log.jsonl")]
    found["uneven"] += abs(len(got) - len(losses)) + sum(a != b for a, b in zip(got, losses, strict=False))
    found["different"] += (out / "done").read_text() != state


def main() -> int:
    args = arguments(__doc__, more=lambda p: (p.add_argument("--kills", type=int), p.add_argument("--seed", type=int)))
    kills, seed = args.kills or (6 if args.quick else 50), args.seed or 0
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        t = trial(lab, kills, seed)
        each = step_by_step(Lab(Path(folder), 3 if args.quick else 16, lab.pace, lab.cache))
    for name in Trial._fields:
        print(f"{name:>14} {getattr(t, name):3} {getattr(each, name):3}")
    faults = ("unreadable", "lost", "samples", "uneven", "different")
    bars = [Bar(name, getattr(t, name), 0, "<=") for name in faults]
    bars += [Bar(f"each_step_{name}", getattr(each, name), 0, "<=") for name in faults]
    bars.append(Bar("while_saving", t.while_saving, 1))
    return finish("resume", {"random": t._asdict(), "each_step": each._asdict()}, bars, args, seeds=[seed])


if __name__ == "__main__":
    sys.exit(main())
