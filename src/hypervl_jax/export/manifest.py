"""What an exported folder holds, as `manifest.json`: written from the files themselves, read strictly, checked by hash.

A folder whose files differ from its manifest is refused with one line; nothing in it is run before that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hypervl_jax import __version__
from hypervl_jax.config import Branch, ConfigError, ModelConfig, from_dict, to_dict
from hypervl_jax.export import lower

NAME = "manifest.json"
OURS = (".tflite", ".litertlm")  # kinds of files that must be listed
FORMAT = 1


class ManifestError(ValueError):
    """An exported folder that is incomplete, damaged or of another version; the message names the file and the cure."""


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str  # as numpy spells it
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One signature of a part."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class File:
    """A file of the folder by its bare name."""

    file: str
    sha256: str
    bytes: int

    def __post_init__(self):
        if self.file in ("", ".", "..") or "/" in self.file or "\\" in self.file:
            raise ValueError(f"{self.file!r} is not the bare name of a file")


@dataclass(frozen=True)
class Part:
    """One `.tflite` file: what it is for, what it takes and gives, and the operators a runtime must have."""

    name: str
    file: File
    signatures: tuple[Entry, ...]
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Bundle:
    """One `.litertlm` file of the parts with one encoder, for the stock runtime."""

    branch: Branch
    file: File


@dataclass(frozen=True)
class Manifest:
    """Everything a host program needs to answer from the folder: `model` holds the plan policy and the text config."""

    model: ModelConfig
    tokens_per_tile: int
    tokenizer: File
    parts: tuple[Part, ...]
    min_runtime: str  # of LiteRT, the newest that a part asks for
    vrc_scale: float = 1.0  # factor on predicted ratios, found by calibration
    parity: dict[str, float] = field(default_factory=dict)  # seam -> largest relative error against JAX
    lowered: dict[str, float] = field(default_factory=dict)  # the same of the files before they got their integers
    recipe: tuple[str, ...] = ()  # rules by which matrices are in 8 or 4 bits, as `quantize.parse` reads them
    calibrated: int = 0  # samples that the decoder's 4 bits were chosen by; 0: they are the nearest
    bits: dict[str, float] = field(default_factory=dict)  # part, and "layers" of the decoder -> bits a weight takes
    peak_bytes: dict[str, int] = field(default_factory=dict)  # branch -> resident memory that an answer took at most
    bundles: tuple[Bundle, ...] = ()  # one file for the stock runtime, of one branch each
    source: str = ""  # the model it was made from, as it was called
    versions: dict[str, str] = field(default_factory=dict)  # tool -> version that wrote the folder
    format: int = FORMAT

    def __post_init__(self):
        if not 0 < self.vrc_scale < math.inf:
            raise ValueError(f"vrc_scale {self.vrc_scale} must be above 0")
        if self.tokens_per_tile != self.model.policy.tokens_per_tile:
            raise ValueError(f"tokens_per_tile {self.tokens_per_tile} is not the policy's")
        for what, names in (("part", [p.name for p in self.parts]), ("file", [f.file for f in self.files])):
            if twice := sorted({n for n in names if names.count(n) > 1}):
                raise ValueError(f"{what} {', '.join(twice)} is listed twice")

    @property
    def files(self) -> list[File]:
        return [self.tokenizer, *(p.file for p in self.parts), *(b.file for b in self.bundles)]

    def part(self, name: str) -> Part:
        """The part called `name`. Raises `ManifestError` naming those there are."""
        for p in self.parts:
            if p.name == name:
                return p
        raise ManifestError(f"no part {name!r} was exported; there are {', '.join(p.name for p in self.parts)}")


# --- writing ---------------------------------------------------------------------------------------------------------


def describe(
    directory: str | Path,
    model: ModelConfig,
    parts: Mapping[str, str],
    tokenizer: str,
    parity: Mapping[str, float],
    vrc_scale: float = 1.0,
    **more: Any,
) -> Manifest:
    """The manifest of `directory` from its files: `parts` is part name -> file name, `tokenizer` a file name, `more`
    what else is known.

    Raises `lower.ExportError` for a part that is not a whole `.tflite` file.
    """
    directory = Path(directory)
    contents = {name: lower.inspect(directory / file) for name, file in parts.items()}
    return Manifest(
        model=model,
        tokens_per_tile=model.policy.tokens_per_tile,
        tokenizer=_file(directory / tokenizer),
        parts=tuple(part_of(name, directory / parts[name], c) for name, c in contents.items()),
        min_runtime=max((c.min_runtime for c in contents.values()), key=_version, default=""),
        vrc_scale=vrc_scale,
        parity={k: float(v) for k, v in parity.items()},
        versions=tool_versions(),
        **more,
    )


def write(directory: str | Path, manifest: Any) -> Path:
    """Write `manifest.json` of any such dataclass, whole or not at all."""
    path = Path(directory) / NAME
    part = path.with_name(f".{NAME}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(to_dict(manifest), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def bundle_of(path: Path, branch: Branch) -> Bundle:
    """What a manifest says of a bundle."""
    return Bundle(branch, _file(path))


def part_of(name: str, path: Path, contents: lower.Contents) -> Part:
    """What a file is, as the manifest says it."""
    entries = tuple(
        Entry(key, *(tuple(Tensor(n, *spec) for n, spec in arrays.items()) for arrays in sides))
        for key, sides in contents.signatures.items()
    )
    return Part(name, _file(path), entries, tuple(contents.ops))


def _file(path: Path) -> File:
    return File(path.name, _sha256(path), path.stat().st_size)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(".") if n.isdigit())


def tool_versions() -> dict[str, str]:
    tools = ("jax", "jaxlib", "flax", "litert-converter", "ai-edge-litert")
    return {"hypervl-jax": __version__} | {tool: metadata.version(tool) for tool in tools}


# --- reading ---------------------------------------------------------------------------------------------------------


def read(directory: str | Path) -> Manifest:
    """The manifest of `directory`, whose files are not looked at. Raises `ManifestError` for anything unexpected."""
    path = Path(directory) / NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ManifestError(f"{directory}: not an exported model: no {NAME}") from e
    except OSError as e:
        raise ManifestError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise ManifestError(f"{path}: damaged: not JSON; export again") from e
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ManifestError(f"{path}: not a manifest of format {FORMAT}; export again with this version")
    try:
        values = {"lowered": {}, "bits": {}, "peak_bytes": {}} | values  # older ones have none
        kinds = {"parity": float, "lowered": float, "bits": float, "peak_bytes": int, "versions": str}
        tables = {k: _table(k, values.pop(k, None), kind) for k, kind in kinds.items()}
        return dataclasses.replace(from_dict(Manifest, values, "manifest"), **tables)
    except ConfigError as e:
        raise ManifestError(f"{path}: {e}; export again") from e


def check(directory: str | Path) -> Manifest:
    """`read`, and every file is there, whole and the one that was exported, and no other part or bundle beside them.

    Raises `ManifestError` with one line about the first thing that is wrong.
    """
    manifest = read(directory)
    for fault in faults(directory, manifest):
        raise ManifestError(fault)
    return manifest


def faults(directory: str | Path, manifest: Manifest) -> Iterator[str]:
    """How the files of a folder differ from its manifest, a line for each."""
    directory = Path(directory)
    yield from file_faults(directory, manifest.files)
    unknown = {p.name for p in directory.iterdir() if p.suffix in OURS} - {f.file for f in manifest.files}
    if unknown:
        yield f"{directory}: {', '.join(sorted(unknown))} not in {NAME}; remove it or export again"


def file_faults(directory: Path, files: Sequence[File]) -> Iterator[str]:
    """How files differ from what was listed of them."""
    of = {f.sha256: f.file for f in files}
    for f in files:
        path = directory / f.file
        if not path.is_file():
            yield f"{path}: missing; export again"
            continue
        size, found = path.stat().st_size, _sha256(path)
        if found != f.sha256 and found in of:
            yield f"{path}: this is {of[found]} under another name; put the files back or export again"
        elif size != f.bytes:
            yield f"{path}: {size} bytes instead of {f.bytes}: truncated or replaced; export again"
        elif found != f.sha256:
            yield f"{path}: not the file that was exported (its hash differs); export again"


def _table(name: str, values: Any, kind: type) -> dict[str, Any]:
    if not isinstance(values, dict) or not all(type(v) is kind and v == v for v in values.values()):
        raise ConfigError(f"manifest.{name}: expected names with a {kind.__name__} each, found {reprlib.repr(values)}")
    return values
