"""The whole path as one resumable recipe: data, training, VRC, evaluation, export, answers from the exported files,
report. `hypervl quickstart` runs it small, `--config nano` makes the weights that ship.

Each stage leaves its result in `OUT/stages/NAME.json`; a stage that is there is not run again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from hypervl_jax import bench, checkpoint, compress, config, evaluate, image, judge, mesh, report, sight, tokens, train
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import BRANCHES, Config
from hypervl_jax.data import feeds, pipeline
from hypervl_jax.data.assets import Assets
from hypervl_jax.data.screens import Screen, check
from hypervl_jax.export.lower import ExportUnavailable
from hypervl_jax.mesh import MeshConfig
from hypervl_jax.model import vrc
from hypervl_jax.runs import begun, read, same_config, same_start, write
from hypervl_jax.tensors import flatten, unflatten
from hypervl_jax.watch import PLAIN, Watch, keep_example

SIGHTS = 16_000  # screens that VRC's trunk learns to see on; their proxies are in memory at once
RETAIN = 0.99  # what VRC is calibrated to keep: above the paper's 98.7 %, since held-out pictures land on either side


class Stages:
    """Results by name, on disk: what was computed once is read back, with the seconds of all attempts at it and the
    peak memory of the process that ended it."""

    def __init__(self, out: Path):
        self.path = out / "stages"
        self.seconds: dict[str, float] = {}
        self.peak_rss_gb = 0.0

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        path, spent = self.path / f"{name}.json", self.path / f"{name}.spent"
        if path.exists():
            stored = read(path)
            print(f"{name}: done before, in {stored['seconds']:.0f} s")
        else:
            print(f"{name} ...")
            self.path.mkdir(parents=True, exist_ok=True)
            before, start = read(spent) if spent.exists() else 0.0, time.monotonic()
            try:
                result = compute()
            finally:
                seconds = before + time.monotonic() - start
                if mesh.leads():
                    write(spent, seconds)
            stored = {"seconds": seconds, "peak_rss_gb": bench.peak_rss_gb(), "result": result}
            if mesh.leads():
                write(path, stored)
                spent.unlink()
        self.seconds[name] = stored["seconds"]
        self.peak_rss_gb = max(self.peak_rss_gb, stored.get("peak_rss_gb", 0.0))
        return stored["result"]


def classes(cfg: Config) -> tuple[str, ...]:
    """Names of the image-name term: the concepts, then the digits."""
    return (*Assets.load().words[: cfg.data.screens.concepts], *pipeline.DIGITS)


def corpus(screens: Iterable[Screen]) -> Iterable[str]:
    for screen in screens:
        for q in screen.questions:
            yield from (q.text, q.answer)


def words(cfg: Config, source: pipeline.Source, path: Path) -> tokens.Tokenizer:
    """The tokenizer at `path`, trained on the first screens of `source` where there is none."""
    if not path.exists():
        some = (source[i] for i in range(min(2_000, len(source))))
        part = path.with_suffix(".part")
        tokens.train_tokenizer(corpus(some), cfg.model.llm.vocab).save(part)
        os.replace(part, path)
    try:
        return tokens.Tokenizer.load(path)
    except tokens.TextError as e:
        raise config.ConfigError(f"{e}; delete it and run again, the same one is made anew") from e


def make_model(
    cfg: Config, out: Path | str, start: Path | str | None = None, stage: Stages | None = None, watch: Watch = PLAIN,
    on: MeshConfig = mesh.ONE,
) -> Model:  # fmt: skip
    """Data, training, labels and VRC under `out`; returns the model in `out/model`. Resumes what was interrupted.
    `start` is a model to begin with, of the stage before: its weights and its tokenizer; without it they are made anew.
    With `train.steps` 0 it stands still, and what is trained is VRC. On the mesh `on` it trains; whatever else there is
    to do, the first of several processes does for all.

    Raises `ConfigError` if `out` holds a run with other settings or another `start`, if a set it needs is to be empty,
    or if `start` is a model of other sizes, or missing where it stands still.
    """
    from hypervl_jax.data import tfds_builders

    out = Path(out)
    first = None if start is None else begun(start, cfg)
    if first is None and not cfg.train.steps:
        raise config.ConfigError("train.steps 0: the model stands still; give it as --start MODEL, or train it")
    for name in ("train", "sheets", "label"):
        if not getattr(cfg.data.screens, name):
            raise config.ConfigError(f"data.screens.{name}: at least 1, a model is made from them")
    check(Assets.load(), cfg.data.screens)
    out.mkdir(parents=True, exist_ok=True)
    stage, screens, names, model_dir = stage or Stages(out), cfg.data.screens, classes(cfg), out / "model"
    with mesh.first("data"):
        same_config(out / "config.json", cfg)
        same_start(out, start)
        stage("data", lambda: {k: len(v) for k, v in tfds_builders.build(screens, out / "data").items()})
        source = tfds_builders.build(screens, out / "data")  # anew where it is gone, or of an older version of the code
        tokenizer = words(cfg, source["train"], out / checkpoint.TOKENIZER) if first is None else first.tokenizer
        feed = feeds.Screens(cfg, source["train"], source["sheets"], tokenizer, names)
        keep_example(out, next(iter(feed.examples(1)), None))
    if first is None or cfg.train.steps:
        stage("train", lambda: _train(cfg, feed, out, first, watch, on))
        params = mesh.whole(train.restore(cfg, out / "train", len(names), on).params)
    else:
        params = first.params
    net = vrc.init(jax.random.key(cfg.vrc.seed), cfg.model.vrc) if first is None else first.params["vrc"]
    with mesh.first("vrc"):
        if first is None and cfg.vrc.sight_steps:
            stage("sight", lambda: _sight(cfg, source["train"], net, out / "trunk.npz"))
            net = _load_tree(out / "trunk.npz", net, "sight")
        model = Model(cfg.model, {**{k: params[k] for k in (*BRANCHES, "llm")}, "vrc": net}, tokenizer, {})
        stage("labels", lambda: _labels(model, cfg, source["label"], out / "labels.npz"))
        stage("vrc", lambda: _vrc(model, cfg, source["label"], out / "labels.npz", model_dir))
        return checkpoint.load_model(model_dir)


def run(cfg: Config, out: Path | str) -> dict[str, Any]:
    """`make_model`, then evaluates, exports and reports under `out`; returns what `out/summary.json` holds."""
    out, stage = Path(out), Stages(Path(out))
    model = make_model(cfg, out, stage=stage)
    origin = stage("origin", _origin)  # of the process that came here first
    del stage.seconds["origin"]
    tests = judge.held_out(cfg, out / "data")
    ratios = {
        s: np.asarray(stage(f"ratios_{s}", lambda s=s: evaluate.ratios(model, tests[s]).tolist())) for s in judge.SPLITS
    }
    said: dict[str, Any] = {}
    for branch in BRANCHES:
        for shrunk in (False, True):
            name = f"eval_{branch}" + ("_vrc" if shrunk else "")
            said[name] = stage(
                name,
                lambda b=branch, v=shrunk: {
                    s: evaluate.run(model, b, some, ratios[s] if v else None, progress=f"{b} {s}")
                    for s, some in tests.items()
                },
            )
    controls = stage("controls", lambda: judge.without_looking(model, tests))
    summary: dict[str, Any] = {"name": cfg.name, "config_hash": config.config_hash(cfg), "controls": controls}
    for v in ("", "_vrc"):
        summary["accuracy" + v] = {b: judge.per_task(said[f"eval_{b}{v}"]) for b in BRANCHES}
    summary["vrc"] = judge.savings(cfg, model, tests, ratios, said)
    try:
        exported = stage("export", lambda: _export(model, tests, out / "export"))
        litert = stage("litert", lambda: _litert(model, tests, ratios, out / "export"))
    except ExportUnavailable as e:  # the rest of the run is worth its report
        print(f"not exported: {e}")
    else:
        summary |= {k: litert[k] for k in ("accuracy_litert", "accuracy_litert_vrc")}
        summary["export"] = {**litert["export"], **exported}
    summary["memory"] = stage(
        "memory", lambda: bench.memory_curve(cfg.model, [n * cfg.model.policy.tile for n in (1, 2, 3, 4, 6)])
    )
    summary["seconds"] = {**stage.seconds, "total": sum(stage.seconds.values())}
    summary = finite(summary | {"peak_rss_gb": stage.peak_rss_gb, "machine": bench.machine(), **origin})
    write(out / "summary.json", summary)
    report.write(out / "report.html", summary, curves(out / "train" / "log.jsonl"), _samples(model, tests, ratios))
    print(report.terminal_table(summary))
    return summary


def curves(path: Path) -> list[dict[str, Any]]:
    """Rows of a training log; a line that an interruption cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def finite(values: Any) -> Any:
    """The same tree with None for numbers that are not finite, which JSON has no word for."""
    if isinstance(values, dict):
        return {k: finite(v) for k, v in values.items()}
    if isinstance(values, list | tuple):
        return [finite(v) for v in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _origin() -> dict[str, Any]:
    """What made a summary: versions, the commit where this is a checkout, the command."""
    found = {"versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}}
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
            found |= {"commit": git.stdout.strip()} if git.returncode == 0 else {}
    return {**found, "command": bench.told(["hypervl", *sys.argv[1:]])}


def _train(cfg: Config, feed: feeds.Feed, out: Path, first: Model | None, watch: Watch, on: MeshConfig) -> dict:
    state = train.run(cfg, feed, out / "train", watch, first and first.params, on)
    return {"steps": int(state.step), "parameters": sum(x.size for x in jax.tree.leaves(state.params))}


def _sight(cfg: Config, source: pipeline.Source, net: dict, path: Path) -> dict:
    """Teaches VRC's trunk to see, on the screens that the model learns from."""
    names, most = classes(cfg)[: cfg.data.screens.concepts], cfg.data.screens.max_things + 1
    screens = (source[i] for i in tqdm(range(min(SIGHTS, len(source))), "proxies", leave=False))
    seen = sight.of_screens(screens, names, cfg.model.vrc.side, most)
    found, history = sight.train(jax.random.key(cfg.vrc.seed), net, seen, len(names) + 1, cfg.model.vrc, cfg.vrc)
    part = path.with_name(f".{path.name}")
    with part.open("wb") as file:
        np.savez(file, **flatten(found))
    os.replace(part, path)
    name, size = history[-50:].mean(0)
    return {"name_loss": float(name), "size_error": float(size), "things": int((seen.names >= 0).sum())}


def _load_tree(path: Path, like: dict, stage: str) -> dict:
    """Arrays that `stage` left, with the names and shapes of `like`."""
    try:
        with path.open("rb") as f, np.load(f, allow_pickle=False) as file:
            found, want = {k: file[k] for k in file.files}, flatten(like)
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in want.items()}:
            raise ValueError("other arrays than this model has")
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        cure = f"delete it and {path.parent / 'stages' / f'{stage}.json'}, and run again"
        raise config.ConfigError(f"{path}: missing or damaged ({e}); {cure}") from e
    return unflatten(found)


def label(model: Model, cfg: Config, screens: Sequence[Screen]) -> compress.LabelSet:
    """How far each picture may shrink before the true answers surprise the model."""

    def loss_at(indices: np.ndarray, ratio: float) -> np.ndarray:
        some = [screens[i] for i in indices]
        return evaluate.answer_losses(
            model, cfg.vrc.branch, some, [ratio] * len(some), cfg.data.screens.held_out_questions
        )

    return compress.label_images(len(screens), loss_at, cfg.vrc, batch=256)


def _labels(model: Model, cfg: Config, source: pipeline.Source, path: Path) -> dict:
    found = label(model, cfg, [source[i] for i in range(len(source))])
    found.save(path)
    kept = found.labels[found.kept]
    return {"labelled": len(kept), "mean": float(kept.mean()), "full_size": float((kept == 1).mean())}


def fit_vrc(model: Model, cfg: Config, screens: Sequence[Screen], found: compress.LabelSet) -> tuple[Model, np.ndarray]:
    """(the model with its VRC trained on these labels of these pictures, the loss of every step)."""
    how = cfg.model.vrc
    some = [s for s, kept in zip(screens, found.kept, strict=True) if kept]
    proxies = np.stack([(image.proxy(s.image, how.side) * 255).round().astype(np.uint8) for s in some])
    targets = compress.rescale(found.labels[found.kept], [s.image.shape[:2] for s in some], how)
    key = jax.random.key(cfg.vrc.seed)
    params, history = compress.train(key, model.params["vrc"], proxies, targets, how, cfg.vrc)
    return model._replace(params={**model.params, "vrc": params}), history


def _vrc(model: Model, cfg: Config, source: pipeline.Source, path: Path, model_dir: Path) -> dict:
    """Trains VRC on three quarters of the labels, finds its scale on the rest, and writes the model directory."""
    try:
        found = compress.LabelSet.load(path).again(cfg.vrc)  # the losses are what cost; how they are read may change
    except (OSError, compress.CompressError) as e:
        cure = f"delete it and {path.parent / 'stages' / 'labels.json'}, and run again"
        raise config.ConfigError(f"{path}: missing or damaged; {cure}") from e
    screens = [source[i] for i in range(len(source))]
    cut = len(screens) * 3 // 4
    model, history = fit_vrc(model, cfg, screens[:cut], found.first(cut))
    scale = _calibrate(model, cfg, screens[cut:])
    info = {"config": config.to_dict(cfg), "vrc_scale": scale or 1.0}
    checkpoint.save_model(model_dir, cfg.model, model.params, model.tokenizer, info, np.float16)
    return {"mse": float(history[-20:].mean()), "scale": scale or 1.0, "calibrated": scale is not None}


def _calibrate(model: Model, cfg: Config, screens: Sequence[Screen]) -> float | None:
    """The factor on predictions that keeps `RETAIN` of the accuracy on pictures VRC has not seen; None if none does."""
    tokens, correct = judge.tables(model, cfg.vrc.branch, screens, cfg.vrc.ratios)
    try:
        return compress.calibrate(evaluate.ratios(model, screens), cfg.vrc.ratios, tokens, correct, RETAIN)
    except compress.CompressError as e:
        print(f"VRC is not calibrated, its predictions are taken as they are: {e}")
        return None


def _export(model: Model, tests: dict[str, list[Screen]], out: Path) -> dict:
    from hypervl_jax.export import parts

    made = parts.export(model, out, verify_images=[s.image for split in judge.SPLITS for s in tests[split][:2]])
    return {
        "bytes": {p.name: p.file.bytes for p in made.parts},
        "ops": sorted({op for p in made.parts for op in p.ops}),
        "max_relative_error": max(made.parity.values()),
    }


def _litert(model: Model, tests: dict, ratios: dict, out: Path, n: int = 100) -> dict[str, Any]:
    """`n` screens of each test split answered from the exported files alone, beside JAX on the same screens."""
    from hypervl_jax.export.runtime import Runtime

    runtime, same, coords = Runtime(out), [], model.config.text.coords
    said: dict[str, dict] = {"": {}, "_vrc": {}}
    for branch in BRANCHES:
        for name, shrunk in (("", False), ("_vrc", True)):
            answers = {}
            for split in judge.SPLITS:
                some = tests[split][:n]
                jax_said = evaluate.run(model, branch, some, ratios[split][:n] if shrunk else None)
                answers[split], it = [], iter(jax_said)
                for i, s in enumerate(tqdm(some, desc=f"litert {branch}{name} {split}")):
                    for q in s.questions:
                        got = runtime.answer(s.image, q.text, branch, shrunk, evaluate.NEW).text
                        ok = evaluate.right(q, got, s.image.shape[:2], coords)
                        answers[split].append(evaluate.Answer(i, q.task, q.answer, got, ok))
                        same.append(next(it).answer == got)
            said[name][branch] = judge.per_task(answers)
    return {
        "accuracy_litert": said[""],
        "accuracy_litert_vrc": said["_vrc"],
        "export": {"same_answers": float(np.mean(same)), "n": len(same)},
    }


def _samples(model: Model, tests: dict[str, list[Screen]], ratios: dict, n: int = 6) -> list[report.Sample]:
    """A few held-out screens with the plan at the predicted ratio, the questions, and what was answered."""
    out, coords = [], model.config.text.coords
    for split in judge.SPLITS:
        some, at = tests[split][:n], ratios[split][:n]
        said = iter(evaluate.run(model, "base", some, at))
        for s, r in zip(some, at, strict=True):
            questions = []
            for q in s.questions:
                a = next(said)
                where = evaluate.point(a.answer, s.image.shape[:2], coords) if q.task == "find" else None
                questions.append((q.task, q.text, q.answer, a.answer, a.correct, where, q.box))
            out.append(report.Sample(s.image, judge.plan_at(s, r, model), float(r), questions))
    return out
