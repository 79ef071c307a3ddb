"""Which files a verb of rescaling reads and writes: found out before the work, and written whole or not at all."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hypervl_jax.image import ImageError
from hypervl_jax.needs import UsageError

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".mpo", ".gif", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pbm",
    ".pnm",
)  # fmt: skip
SMALL, LARGE = "_lr", "_sr"  # what names of small and restored pictures end with


class RescaleError(ValueError):
    """What cannot be rescaled, and what to do."""


class Job(NamedTuple):
    """A picture, and the file that is written of it, where one is."""

    source: Path
    out: Path = Path()


def found(paths: tuple[Path, ...]) -> list[Path]:
    """The picture files themselves, and those in folders, each once. Raises `UsageError` where there is none."""
    if not paths:
        raise UsageError("no picture; give one or more files or folders: hypervl rescale VERB PICTURE...")
    out = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        inside = [f for f in inside if f.is_file() and f.suffix.lower() in SUFFIXES and f.name[0] != "."]
        if path.is_dir() and not inside:
            raise UsageError(f"{path}: no pictures in this folder ({', '.join(SUFFIXES)})")
        out += inside or [path]
    return list(dict.fromkeys(out))


def jobs(paths: tuple[Path, ...], out: Path | None, ending: str, overwrite: bool) -> list[Job]:
    """Which picture becomes which PNG: `out` if it names a file and there is one picture, else a file in that folder.

    Of several pictures, those whose PNG is there are left out, and it is said: the same command goes on where it was
    interrupted. Raises `UsageError` where one cannot be written, before anything is read.
    """
    sources = found(paths)
    alone = len(paths) == 1 and not paths[0].is_dir()
    if out is None and not alone:
        raise UsageError("several pictures: name a folder for them with --out")
    if alone and out is not None and out.suffix and not out.is_dir():
        checked(sources[0], out, overwrite, ".png")
        return [Job(sources[0], out)]
    if out is not None and not alone and out.suffix.lower() in SUFFIXES and not out.is_dir():
        raise UsageError(f"--out {out}: names a picture, but a folder or several pictures are read; name a folder")
    targets: dict[Path, Path] = {}
    for source in sources:
        stem = source.stem.removesuffix(SMALL) if ending == LARGE else source.stem
        target = (out or source.parent) / f"{stem}{ending}.png"
        if targets.setdefault(target, source) != source:
            raise UsageError(f"{targets[target]} and {source} would both become {target}; rename one")
        checked(source, target, overwrite or not alone, ".png")
    read = {source.resolve() for source in sources}
    for target in targets:
        if target.resolve() in read:
            raise UsageError(f"{target}: is a picture that is read; choose another --out")
    there = 0 if overwrite else sum(target.exists() for target in targets)
    if there:
        print(f"{there} are there already and stay; --overwrite makes them anew", file=sys.stderr, flush=True)
    return [Job(source, target) for target, source in targets.items() if overwrite or not target.exists()]


def checked(source: Path, out: Path, overwrite: bool, kind: str) -> None:
    """Raises `UsageError` where `out` is no file of this kind that may be written."""
    if out.suffix.lower() != kind:
        raise UsageError(f"--out {out}: name a {kind} file")
    if out.exists() and out.resolve() == source.resolve():
        raise UsageError(f"{out}: is the picture that is read; choose another --out")
    if out.is_dir() or (out.exists() and not overwrite):
        raise UsageError(f"{out}: is there already; choose another --out, or give --overwrite")
    above = next(p for p in out.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{out}: cannot be written, for {above} is no folder that may be; choose another --out")


def each(jobs: list[Job], one: Callable[[Job], None]) -> list[str]:
    """All jobs. One that cannot be done does not stop the others: it is said, and named in what is returned. One that
    is alone raises."""
    failed = []
    for job in jobs:
        try:
            try:
                one(job)
            except RescaleError as e:
                raise RescaleError(f"{job.source}: {e}") from e
        except (ImageError, RescaleError, OSError) as e:
            if len(jobs) == 1:
                raise
            failed.append(str(job.source))
            print(f"hypervl: {e}", file=sys.stderr, flush=True)
    return failed


def ended(jobs: list[Job], failed: list[str]) -> None:
    """Raises `RescaleError` naming those that failed."""
    if failed:
        done = len(jobs) - len(failed)
        raise RescaleError(f"{len(failed)} of {len(jobs)} pictures failed, {done} are done: {', '.join(failed)}")


def save(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{secrets.token_hex(8)}.part")  # a name that fits wherever that of `path` does
    try:
        with new.open("xb") as f:
            f.write(data)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
