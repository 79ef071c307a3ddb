"""What is wrong with an exported folder: every fault by the name of its file, before anything native reads it.

The last look is the runtime's own, in a process beside this one: a file that brings the runtime down is a fault too.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hypervl_jax import quantize, tokens
from hypervl_jax.export import lower, manifest, pack, runtime
from hypervl_jax.export.lower import ExportError
from hypervl_jax.export.manifest import Manifest, ManifestError, Part
from hypervl_jax.quantize import RecipeError

SECONDS = 300  # that loading a part may take
_LOAD = "import sys; from hypervl_jax.export import lower; lower.Runner(sys.argv[1])"


def examine(directory: str | Path, load: bool = True) -> list[str]:
    """A line for each fault; none for a whole folder. With `load` a folder without faults is also loaded."""
    directory = Path(directory)
    try:
        m = manifest.read(directory)
    except ManifestError as e:
        return [str(e)]
    found = [*manifest.faults(directory, m), *_model(directory, m)]
    known = "\n".join(found)
    if str(directory / m.tokenizer.file) not in known:
        found += _tokenizer(directory / m.tokenizer.file, m)
    for part in m.parts:
        if str(directory / part.file.file) not in known:
            found += _part(directory / part.file.file, part)
    if load and not found:
        found = [fault for part in m.parts for fault in _loaded(directory / part.file.file)]
    return found


def _model(directory: Path, m: Manifest) -> Iterator[str]:
    try:
        runtime.fit(m)
        quantize.parse(m.recipe)
    except (ManifestError, RecipeError) as e:
        yield f"{directory / manifest.NAME}: {e}; export again"


def _tokenizer(path: Path, m: Manifest) -> Iterator[str]:
    try:
        tokens.Tokenizer.load(path).forbidden(m.model.llm.vocab)
    except Exception as e:  # of `tokenizers` too, which has kinds of its own
        yield f"{path}: not the tokenizer of this model: {(str(e).splitlines() or [''])[0]:.200}; export again"


def _part(path: Path, part: Part) -> Iterator[str]:
    """A file against what the manifest says of it."""
    try:
        contents, _ = lower.parsed(path, lambda *of: (lower.contents(*of), pack.held(*of)))
    except ExportError as e:
        yield str(e)
        return
    listed = {
        e.name: tuple({t.name: (t.dtype, t.shape) for t in side} for side in (e.inputs, e.outputs))
        for e in part.signatures
    }
    if bad := lower.without_kernel(contents.ops):
        yield f"{path}: operators without a kernel on phones: {', '.join(bad)}; export again"
    if listed != contents.signatures:
        yield f"{path}: not the {part.name} of {manifest.NAME}: it takes and gives other arrays; export again"


def _loaded(path: Path) -> Iterator[str]:
    try:
        done = subprocess.run([sys.executable, "-c", _LOAD, str(path)], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        yield f"{path}: not loaded within {SECONDS} seconds"
        return
    if done.returncode < 0:
        yield f"{path}: the runtime crashed on it (signal {-done.returncode}); export again"
    elif done.returncode:
        said = (done.stderr.strip().splitlines() or [""])[-1].removeprefix("hypervl_jax.export.lower.ExportError: ")
        yield said if said.startswith(str(path)) else f"{path}: the runtime cannot load it: {said}"
