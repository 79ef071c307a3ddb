"""What is wrong with an exported folder: every fault by the name of its file, before anything native reads it.

The last look is the runtime's own, in a process beside this one: a file that brings the runtime down is a fault too.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hypervl_jax import quantize, tokens
from hypervl_jax.export import lower, manifest, pack, runtime
from hypervl_jax.export.lower import ExportError
from hypervl_jax.export.manifest import Manifest, ManifestError, Part
from hypervl_jax.quantize import RecipeError

SECONDS = 300  # that loading a part may take
SECTION = 1 << 14  # sections of a bundle begin at multiples of it
_LOAD = "import sys; from hypervl_jax.export import lower; lower.Runner(sys.argv[1])"
_OPEN = """import sys, tempfile, litert_lm as lm
with tempfile.TemporaryDirectory() as work:
    lm.Engine(sys.argv[1], backend=lm.Backend.CPU(), vision_backend=lm.Backend.CPU(), cache_dir=work)"""


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
    if not found:
        found += [fault for b in m.bundles for fault in _bundle(directory, directory / b.file.file, m)]
    if load and not found:
        found = [fault for part in m.parts for fault in _loaded(directory / part.file.file, _LOAD)]
        if opens():
            found += [fault for b in m.bundles for fault in _loaded(directory / b.file.file, _OPEN)]
    return found


def opens() -> bool:
    """Whether the stock runtime for bundles is installed here."""
    return importlib.util.find_spec("litert_lm") is not None


def _bundle(directory: Path, path: Path, m: Manifest) -> Iterator[str]:
    """A bundle must hold the folder's own parts."""
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    if data[:8].tobytes() != b"LITERTLM":
        yield f"{path}: not a .litertlm file; export again"
        return
    for name in ("embedder", "decoder"):
        file = directory / m.part(name).file.file
        part = np.memmap(file, np.uint8, "r")
        if not any(_same(data[at : at + part.size], part) for at in range(0, data.size - part.size + 1, SECTION)):
            yield f"{path}: its {name} is not {file.name}; export again"


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a[:64], b[:64]) and np.array_equal(a, b)


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


def _loaded(path: Path, how: str) -> Iterator[str]:
    try:
        done = subprocess.run([sys.executable, "-c", how, str(path)], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        yield f"{path}: not loaded within {SECONDS} seconds"
        return
    if done.returncode < 0:
        yield f"{path}: the runtime crashed on it (signal {-done.returncode}); export again"
    elif done.returncode:
        said = (done.stderr.strip().splitlines() or [""])[-1].removeprefix("hypervl_jax.export.lower.ExportError: ")
        yield said if said.startswith(str(path)) else f"{path}: the runtime cannot load it: {said}"
