"""The verbs of `hypervl data`: other people's conversations checked, looked at, and prepared to be trained on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from hypervl_jax import needs
from hypervl_jax.config import Config, ModelConfig

Files = Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE...")]


def check(
    files: Files,
    /,
    root: Path | None = None,
    model: Annotated[str, arg(metavar="MODEL")] = needs.DEFAULT,
    config: Annotated[str | None, arg(metavar="CONFIG")] = None,
    limit: int = 20,
    ledger: Path | None = None,
) -> None:
    """Read all of it, decode every picture, say what is wrong by file and line, how long it is and what it costs.

    Exits with 1 if anything is wrong. For example:

    hypervl data check train.jsonl

    hypervl data check llava.json --root images --config configs/nano.py --ledger faults.jsonl

    Args:
        files: JSON, JSON lines, parquet, webdataset tars, mixtures, or the folder of a prepared data set.
        root: names of pictures count from here and may not leave it; if not given, the folder of each annotation.
        model: a model folder, or the name of weights that ship: its tokenizer counts, its tiles are cut.
        config: a preset or a file with `get_config()` whose tiles and lengths rows must fit; if not given, none.
        limit: how many faults are printed.
        ledger: file to write them all to, a line of JSON each.
    """
    if limit < 0:
        raise needs.UsageError(f"--limit {limit}: at least 0")
    if ledger is not None and ledger.exists():
        raise needs.UsageError(f"{ledger}: is there already; remove it, or choose another --ledger")
    cfg, whole, tokenizer = _model(model, config)
    from hypervl_jax.data import check as checks
    from hypervl_jax.data import readers

    report = checks.check(readers.parts(list(files), root), cfg, tokenizer, whole and whole.data)
    print("\n".join(report.lines(limit)))
    print(
        f"counted with the tokenizer of {model} and tiles of {cfg.policy.tile} px, {config or model}", file=sys.stderr
    )
    if ledger is not None:
        report.ledger.write(ledger)
    if report.ledger.faults:
        sys.exit(1)


def show(
    file: Annotated[Positional[Path], arg(metavar="FILE")],
    /,
    out: Path,
    line: int = 1,
    root: Path | None = None,
    model: Annotated[str, arg(metavar="MODEL")] = needs.DEFAULT,
    config: Annotated[str | None, arg(metavar="CONFIG")] = None,
    ratio: float = 1.0,
) -> None:
    """Draw one record: its tiles, the tokens they become, and which tokens are learnt.

    For example:

    hypervl data show train.jsonl --line 12 --out sample.png

    Args:
        file: an annotation, or the folder of a prepared data set.
        out: PNG file to write.
        line: which record, counted as `data check` does: the line it begins at, row, or sample.
        root: names of pictures count from here; if not given, the annotation's folder.
        model: a model folder, or the name of weights that ship: its tokenizer is used, its tiles are cut.
        config: a preset or a file with `get_config()` whose tiles are cut instead.
        ratio: area ratio the pictures are shrunk to, as VRC would.
    """
    if out.suffix.lower() != ".png":
        raise needs.UsageError(f"--out {out}: name a .png file")
    if not 0 < ratio <= 1:
        raise needs.UsageError(f"--ratio {ratio:g}: above 0, at most 1")
    cfg, _, tokenizer = _model(model, config)
    from PIL import Image

    from hypervl_jax.data import check as checks
    from hypervl_jax.data import readers, show
    from hypervl_jax.data.conversations import DataError, Fault

    parts = readers.parts([file], root)
    if len(parts) > 1:
        raise needs.UsageError(f"{file}: holds {', '.join(p.name for p in parts)}; name the file of one of them")
    for item in readers.read(parts[0]):
        if item.line == line and (not isinstance(item, Fault) or item.kind != "wrong-length"):
            break
    else:
        raise needs.UsageError(f"--line {line}: no record of {file} begins there")
    if isinstance(item, Fault):
        raise DataError(str(item))
    sizes = [p.load().shape[:2] for p in item.pictures]
    seen = checks.shown(item, [(h, w) for h, w in sizes], ratio, cfg.policy, cfg.text, tokenizer)
    Image.fromarray(show.draw(item, seen, tokenizer)).save(out)
    print(
        f"wrote {out}: {len(seen.prompt.ids)} tokens, {int(seen.prompt.loss.sum())} of them learnt, {seen.tiles} tiles"
    )


def build(files: Files, /, out: Path, root: Path | None = None, max_rate: float = 0.01) -> None:
    """Write what can be used as a tensorflow-datasets data set of array_record shards, a split an annotation.

    Picture files go in as they are. What cannot be used is in OUT/ledger.jsonl; above --max-rate nothing is written.
    For example:

    hypervl data build train.jsonl --out data/train

    hypervl data build mixture.json --out data/mixture --max-rate 0.05

    Args:
        files: JSON, JSON lines, parquet, webdataset tars or mixtures.
        out: folder to write; it must be new or empty.
        root: names of pictures count from here and may not leave it; if not given, the folder of each annotation.
        max_rate: the share of records that may be left out.
    """
    if not 0 <= max_rate < 1:
        raise needs.UsageError(f"--max-rate {max_rate:g}: at least 0, below 1")
    needs.need("tensorflow_datasets", "array_record")
    from hypervl_jax.data import prepared, readers

    ledger = prepared.build(readers.parts(list(files), root), out, max_rate)
    for split, repeat in prepared.splits(out).items():
        print(f"{split}: {len(prepared.Records(out, split))} records, {repeat:g} times an epoch")
    told = len(ledger.faults) - ledger.lost
    print(f"wrote {out}; {ledger.lost} records left out, {told} told of and kept: {out / prepared.LEDGER}")


VERBS = {"check": check, "show": show, "build": build}


def data() -> None:
    """Bring your own data: check it, look at what the model would see of it, write shards to train on.

    For example:

    hypervl data check train.jsonl

    hypervl data show train.jsonl --line 12 --out sample.png

    hypervl data build train.jsonl --out data/train
    """  # what `hypervl --help` lists; `cli.main` goes to VERBS


def _model(model: str, config: str | None) -> tuple[ModelConfig, Config | None, Any]:
    """Model settings and tokenizer without any weights; the whole config where one is given."""
    from hypervl_jax import checkpoint
    from hypervl_jax.layouts import TOKENIZER
    from hypervl_jax.tokens import Tokenizer

    whole = needs.load_config(config) if config is not None else None
    cfg = whole.model if whole is not None else checkpoint.load_config(model)
    return cfg, whole, Tokenizer.load(checkpoint.find_model(model) / TOKENIZER)
