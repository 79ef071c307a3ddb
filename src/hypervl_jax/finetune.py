"""A model from other people's conversations: what `data build` has prepared, packed in rows, trained on in one stage.

Resumable as the recipe of screens is: given again, the same call goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from hypervl_jax import checkpoint, config, mesh, runs, tokens, train, watch
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import BRANCHES, Config
from hypervl_jax.data import feeds
from hypervl_jax.mesh import MeshConfig
from hypervl_jax.model import vrc


def adapted(cfg: Config) -> Config:
    """The config without what only composed screens can teach: conversations do not name the things that are seen."""
    return replace(cfg, train=replace(cfg.train, stage0_steps=0, name_weight=0.0))


def make_model(
    cfg: Config,
    data: Path,
    out: Path | str,
    start: Path | str | None = None,
    splits: Sequence[str] = (),
    how: watch.Watch = watch.PLAIN,
    on: MeshConfig = mesh.ONE,
) -> Model:
    """Trains on the conversations under `data`, or some `splits` of them, and writes and returns the model `out/model`.
    `start` is a model to begin with: its weights, its VRC and its tokenizer; without it they are made anew, and VRC is
    as it was drawn. It trains on the mesh `on`; of several processes the first writes.

    Raises `ConfigError` if `out` holds a run with other settings or another `start`, `DataError` for data that cannot
    be used, and what `train.run` raises.
    """
    out, first = Path(out), None if start is None else runs.begun(start, cfg)
    sources = feeds.records(data, splits)
    for source in sources:
        watch.note(f"{source.split}: {len(source)} records, {source.repeat:g} times an epoch")
    if (bare := adapted(cfg)) != cfg:
        watch.note("conversations name nothing that is seen: train.stage0_steps and train.name_weight are 0")
    cfg = bare
    out.mkdir(parents=True, exist_ok=True)
    with mesh.first("settings"):
        runs.same_config(out / "config.json", cfg)
        runs.same_start(out, start)
        tokenizer = _words(cfg, sources, out / checkpoint.TOKENIZER) if first is None else first.tokenizer
    feed = feeds.Conversations(cfg, sources, tokenizer, how.progress and mesh.leads())
    if feed.ledger.faults and mesh.leads():
        feed.ledger.write(out / "ledger.jsonl")
        watch.note(f"{feed.ledger.lost} records fit no bucket and are left out: {out / 'ledger.jsonl'}")
    if mesh.leads():
        watch.keep_example(out, next((e for e in feed.examples(20) if e.images), None))
    params = mesh.whole(train.run(cfg, feed, out / "train", how, first and first.params, on).params)
    net = vrc.init(jax.random.key(cfg.vrc.seed), cfg.model.vrc) if first is None else first.params["vrc"]
    info = {**(first.info if first is not None else {}), "config": config.to_dict(cfg)}
    whole = {**{k: params[k] for k in (*BRANCHES, "llm")}, "vrc": net}
    with mesh.first("model"):
        if mesh.leads():
            checkpoint.save_model(out / "model", cfg.model, whole, tokenizer, info, np.float16)
        return checkpoint.load_model(out / "model")


def _words(cfg: Config, sources: Sequence[feeds.packing.Source], path: Path) -> tokens.Tokenizer:
    """The tokenizer at `path`, trained on the first conversations where there is none."""
    if not path.exists():
        part = path.with_suffix(".part")
        tokens.train_tokenizer(feeds.texts(sources), cfg.model.llm.vocab).save(part)
        os.replace(part, path)
    return tokens.Tokenizer.load(path)
