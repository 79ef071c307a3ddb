"""Folders of safetensors, as Hugging Face lays them out: a table says what each tensor is called there, and one reader
and one writer walk any table, tensor by tensor.

A file is an eight-byte length, a JSON header and the bytes; several files have an index beside them. All that names and
headers can tell is checked before a byte of data is read. Letters: D width, K channels, p q a patch's rows and columns.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100 << 20  # bytes, the limit of the format
SHARD = 4 << 30  # bytes of one file
ROWS = 4096  # of a tensor, checked at once
ALIGNED = 64  # bytes
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")  # what weights may be


class CheckpointError(ValueError):
    """Weights, a model directory or a checkpoint that is missing, damaged or of another shape; the message names it."""


# --- trees -----------------------------------------------------------------------------------------------------------


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a.b": x}"""
    out = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def unflatten(flat: dict[str, Any]) -> dict:
    out: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = out
        for p in parents:
            node = node.setdefault(p, {})
        node[leaf] = value
    return out


# --- tables ----------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """How one tensor of a file becomes one of ours, and back. Both only move numbers, so both are exact."""

    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any]


AS_IS = Form(lambda x: x, lambda x: x)
PATCH = Form(  # the kernel of a convolution over patches <-> one linear layer over a patch's (row, column, channel)
    lambda x: rearrange(x, "D K p q -> D (p q K)"),
    lambda x: rearrange(x, "D (p q K) -> D K p q", K=3, p=math.isqrt(x.shape[1] // 3)),
)


class Row(NamedTuple):
    """One leaf of our tree and its tensor in a file. `{i}` in the name counts layers, the first axis of the leaf."""

    path: str
    name: str
    form: Form = AS_IS


class Table(NamedTuple):
    """A format: a row for every leaf, and what its files may hold beside that."""

    rows: tuple[Row, ...]
    unused: tuple[tuple[str, str], ...] = ()  # (pattern of names the model does not use, what they are)
    repeats: tuple[tuple[str, str], ...] = ()  # (name, the name whose numbers it must repeat)

    def within(self, path: str, name: str) -> Table:
        """The same format as a part of another: every path and name behind a prefix."""
        return Table(
            tuple(Row(path + row.path, name + row.name, row.form) for row in self.rows),
            tuple((re.escape(name) + pattern, what) for pattern, what in self.unused),
            tuple((name + a, name + b) for a, b in self.repeats),
        )


class Part(NamedTuple):
    """One tensor of a file: a leaf of ours or, where `layer` is a number, that layer of it."""

    path: str
    layer: int | None
    name: str
    shape: tuple[int, ...]  # in the file
    form: Form


def _parts(row: Row, shape: tuple[int, ...], at_most: int | None = None) -> list[Part]:
    stacked = "{i}" in row.name
    one = jax.eval_shape(row.form.theirs, jax.ShapeDtypeStruct(shape[stacked:], np.int8)).shape
    if not stacked:
        return [Part(row.path, None, row.name, one, row.form)]
    layers = shape[0] if at_most is None else min(shape[0], at_most)
    return [Part(row.path, i, row.name.format(i=i), one, row.form) for i in range(layers)]


# --- files -----------------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def map(self) -> np.ndarray:
        """Its numbers, read from the disk as they are looked at."""
        return np.memmap(self.file, np.dtype(DTYPES[self.dtype]), "r", self.offset, self.shape)


def _json(data: bytes, where: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"duplicate {Counter(k for k, _ in pairs).most_common(1)[0][0]}")
        return dict(pairs)

    try:
        values = json.loads(data, object_pairs_hook=once)
        if not isinstance(values, dict):
            raise ValueError("no table")
        return values
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{where}: damaged ({e}); copy or make it again") from e


def header(file: Path) -> dict[str, Tensor]:
    """What one safetensors file holds. Raises `CheckpointError` if it is missing, or cannot be what its header says."""
    try:
        with file.open("rb") as f:
            size, length = file.stat().st_size, int.from_bytes(f.read(8), "little")
            if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise CheckpointError(f"{file}: damaged (no safetensors header); copy or make it again")
            values = _json(f.read(length), file)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read ({e.strerror}); copy or make it again") from e
    values.pop("__metadata__", None)
    out, spans = {}, []
    for name, value in values.items():
        try:
            dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
            numbers = [begin, end, *shape]
            if dtype not in DTYPES or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError
            if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
                raise ValueError
        except (ValueError, KeyError, TypeError) as e:
            raise CheckpointError(
                f"{file}: damaged ({name} cannot be {str(value)[:100]}); copy or make it again"
            ) from e
        out[name] = Tensor(file, dtype, tuple(shape), 8 + length + begin)
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise CheckpointError(f"{file}: damaged (tensors overlap or leave holes); copy or make it again")
        at = end
    if 8 + length + at != size:
        raise CheckpointError(f"{file}: damaged ({size} bytes, not {8 + length + at}); copy or make it again")
    return out


def contents(folder: Path, file: str = FILE) -> dict[str, Tensor]:
    """What a folder holds, in one file or in those its index lists. Raises `CheckpointError` naming the file."""
    index = folder / INDEX
    if file != FILE or not index.is_file():
        if not (folder / file).is_file() and (other := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))):
            raise CheckpointError(
                f"{folder / file}: missing, and {other[0].name} may run code when it is read; save it as safetensors"
            )
        return header(folder / file)
    if (folder / FILE).is_file():
        raise CheckpointError(f"{folder}: has {FILE} and {INDEX}; delete the one that is not of this model")
    listed = _json(index.read_bytes(), index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index}: has no weight_map; copy or make it again")
    files = sorted({str(file) for file in listed.values()})
    if odd := [name for name in files if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name)]:
        raise CheckpointError(f"{index}: {odd[0]!r:.80} is no name of a file beside it; copy or make it again")
    out: dict[str, Tensor] = {}
    wrong = []
    for name in files:
        held = header(folder / name)
        wrong += [f"duplicate {k} in {out[k].file.name} and {name}" for k in held.keys() & out.keys()]
        wrong += [f"{name} holds {k}, which is not listed as its" for k in held if listed.get(k) != name]
        wrong += [f"missing {k} in {name}" for k, file in listed.items() if file == name and k not in held]
        out |= held
    if wrong:
        raise CheckpointError(_together(index, wrong))
    return out


def _together(where: Path, wrong: list[str]) -> str:
    more = "; ..." if len(wrong) > 8 else ""
    return f"{where}: {len(wrong)} weights do not fit: {'; '.join(sorted(wrong)[:8])}{more}"


# --- reading and writing ---------------------------------------------------------------------------------------------


def read(
    folder: Path,
    table: Table,
    shapes: dict[str, tuple[int, ...]],
    dtype: Any = None,
    shardings: dict | None = None,
    pack: Callable[[str, np.ndarray], Any] | None = None,
    file: str = FILE,
) -> tuple[dict, list[str]]:
    """The tree whose leaves have `shapes` (by path), and a line on everything there that the model does not use.

    In `dtype`, or each leaf as the files have it (f32 where its layers differ); as numpy arrays, or by `shardings` (a
    tree like the result) on their devices. Numbers go straight into their place: beside the result, no more than one
    tensor is held, with shardings one leaf. Without shardings `pack` may make something smaller of every tensor as it
    comes (path, numbers): arrays or a tree of them, stacked over the layers of a leaf.
    Raises `CheckpointError`: first with all that is unknown, missing, duplicate, misshapen or no float, then with all
    that is not finite (in `dtype`).
    """
    found = contents(folder, file)
    where = folder / (file if (folder / file).is_file() else INDEX)
    rows = {row.path: row for row in table.rows}
    if rows.keys() != shapes.keys():
        raise ValueError(f"no table for this model: {sorted(rows.keys() ^ shapes.keys())}")
    parts = {path: _parts(rows[path], shape, len(found) + 1) for path, shape in shapes.items()}
    wanted = {part.name: part for ps in parts.values() for part in ps}
    unused: dict[str, list[str]] = {}
    wrong = []
    for name in found.keys() - wanted.keys():
        what = next((what for pattern, what in table.unused if re.fullmatch(pattern, name)), None)
        if what:
            unused.setdefault(what, []).append(name)
        else:
            wrong.append(f"unknown {name}")
    for name, part in wanted.items():
        if name not in found:
            wrong.append(f"missing {name}")
            continue
        if found[name].shape != part.shape:
            wrong.append(f"{name} is {found[name].shape}, not {part.shape}")
        if found[name].dtype not in FLOATS:
            wrong.append(f"{name} is {np.dtype(DTYPES[found[name].dtype]).name}, not a float of 16 bits or more")
    for name, same in table.repeats:
        if name in found and same in found and not wrong and not _equal(found[name], found[same]):
            wrong.append(f"{name} differs from {same}, which the config says it repeats")
    if wrong:
        raise CheckpointError(_together(where, wrong))
    places, flat, bad = flatten(shardings or {}), {}, set()
    for path in sorted(shapes, key=lambda p: -math.prod(shapes[p])):  # the largest while little else is held
        kinds = {DTYPES[found[part.name].dtype] for part in parts[path]}
        kind = np.dtype(dtype or (kinds.pop() if len(kinds) == 1 else np.float32))
        cut = functools.partial(_cut, found, parts[path], shapes[path], kind, bad)
        if pack is not None:
            flat[path] = _packed(found, parts[path], shapes[path], kind, bad, functools.partial(pack, path))
        elif shardings is None:
            flat[path] = cut((slice(None),) * len(shapes[path]))
        else:
            flat[path] = jax.make_array_from_callback(shapes[path], places[path], cut)
    if bad:
        raise CheckpointError(_together(where, [f"{name} is not finite" for name in bad]))
    lines = [f"{what} ({len(names)} tensors, such as {min(names)})" for what, names in sorted(unused.items())]
    return unflatten({path: flat[path] for path in shapes}), lines


def _cut(
    found: dict[str, Tensor], parts: list[Part], shape: tuple[int, ...], kind: np.dtype, bad: set[str], index: Any
) -> np.ndarray:
    """The piece of a leaf that `index`, a slice an axis, says; names of what is not finite are added to `bad`."""
    out = _empty([len(range(n)[s]) for n, s in zip(shape, index, strict=True)], kind)
    stacked = parts[0].layer is not None
    for part, to in zip(parts[index[0]], out, strict=True) if stacked else [(parts[0], out)]:
        with np.errstate(over="ignore", invalid="ignore"):  # what cannot be held is found below
            to[...] = part.form.ours(found[part.name].map())[index[stacked:]]
        if not _finite(to):
            bad.add(part.name)
    return out


def _packed(
    found: dict[str, Tensor], parts: list[Part], shape: tuple[int, ...], kind: np.dtype, bad: set[str], pack: Callable
) -> Any:
    """A leaf out of what `pack` makes of its tensors, one after another."""
    if parts[0].layer is None:
        return pack(_cut(found, parts, shape, kind, bad, (slice(None),) * len(shape)))
    out: Any = None
    for i, part in enumerate(parts):
        one = pack(_cut(found, [part], (1, *shape[1:]), kind, bad, (slice(None),) * len(shape))[0])
        if out is None:
            out = jax.tree.map(lambda a: _empty([len(parts), *a.shape], a.dtype), one)
        jax.tree.map(lambda all_layers, a: all_layers.__setitem__(i, a), out, one)  # noqa: B023 - used at once
    return out


def _empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array that begins where JAX wants its own to begin, so that on a CPU it can be one without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNED, np.uint8)
    at = -room.ctypes.data % ALIGNED
    return room[at : at + size].view(dtype).reshape(shape)


def _finite(x: np.ndarray) -> bool:
    return all(np.isfinite(x[i : i + ROWS]).all() for i in range(0, len(x), ROWS))


def _equal(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype) or not a.shape:
        return False
    x, y = a.map(), b.map()
    return all((x[i : i + ROWS] == y[i : i + ROWS]).all() for i in range(0, len(x), ROWS))


def write(folder: Path, params: dict, table: Table, dtype: Any = None, shard: int = SHARD) -> None:
    """Writes a tree as safetensors in `dtype`, or each leaf in its own: one file, or several of at most `shard` bytes
    (or one tensor) and their index. Leaves may lie anywhere. Raises `CheckpointError` naming all that is not finite."""
    flat = flatten(params)
    if flat.keys() != {row.path for row in table.rows}:
        raise ValueError(f"no table for this model: {sorted(flat.keys() ^ {row.path for row in table.rows})}")
    codes = {np.dtype(v): k for k, v in DTYPES.items()}
    shards: list[list[tuple[Part, np.dtype]]] = [[]]
    total = held = 0
    for row in table.rows:
        kind = np.dtype(dtype or flat[row.path].dtype)
        for part in _parts(row, flat[row.path].shape):
            size = math.prod(part.shape) * kind.itemsize
            if shards[-1] and held + size > shard:
                shards.append([])
                held = 0
            shards[-1].append((part, kind))
            held, total = held + size, total + size
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [FILE]
    bad: list[str] = []
    for name, content in zip(names, shards, strict=True):
        content.sort(key=lambda entry: -entry[1].itemsize)  # every tensor then starts at a multiple of its item
        fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for part, kind in content:
            end = at + math.prod(part.shape) * kind.itemsize
            fields[part.name] = {"dtype": codes[kind], "shape": part.shape, "data_offsets": [at, end]}
            at = end
        head = json.dumps(fields, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        with (folder / name).open("wb") as f:
            f.write(len(head).to_bytes(8, "little") + head)
            for part, values in _tensors(content, flat):
                if not _finite(values):
                    bad.append(part.name)
                f.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    if bad:
        raise CheckpointError(f"not saved, weights are not finite: {', '.join(bad[:5])}")
    if len(shards) > 1:
        listed = {part.name: name for name, content in zip(names, shards, strict=True) for part, _ in content}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": listed}, indent=1))


def _tensors(content: list[tuple[Part, np.dtype]], flat: dict[str, Any]) -> Iterator[tuple[Part, np.ndarray]]:
    """The tensors of one file, one at a time; a leaf comes to the host once, and goes before the next."""
    path, leaf = "", np.empty(0)
    for part, kind in content:
        if part.path != path:
            path, leaf = part.path, np.asarray(flat[part.path])
        with np.errstate(over="ignore"):  # what f16 cannot hold is found by the writer
            yield part, part.form.theirs(leaf if part.layer is None else leaf[part.layer]).astype(kind, copy=False)
