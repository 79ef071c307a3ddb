"""Matrices of a written `.tflite` file as integers: the very ones that JAX computes with, put in and read back.

A file is lowered with the floats that the integers stand for, proved, and then packed: each constant that has the bytes
of such a matrix becomes its integers and scales, and nothing else of the graph changes. The runtime rounds the rows
that it multiplies such a matrix by to 8 bits as it goes (dynamic activations). How integers are written down is the
runtime's: a scale a row lies beside the tensor in f32, scales of groups in a tensor of f16 (`BlockwiseQuantization`).

Axes: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hypervl_jax import quantize
from hypervl_jax.export import lower
from hypervl_jax.export.lower import ExportError
from hypervl_jax.quantize import Bits, Quantized

TAKES = ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")  # operators whose second input may be integers
INLINE = 1024  # bytes up to which a buffer stays inside the tables
ALIGN = 16
_SCHEMA = "ai_edge_litert.schema_py_generated"
_NONE = -1


def pack(path: str | Path, matrices: Mapping[str, Quantized]) -> None:
    """Put `matrices` into a file that has their floats (`quantize.floats`) as constants; each is named by its key.

    The file is replaced whole or stays as it is. Raises `ExportError` for a matrix that is not there, or that an
    operator reads which takes no integers.
    """
    path = Path(path)
    model, data = lower.parsed(path, lambda model, data: (model, data))
    buffers = [_bytes(buffer, data) for buffer in model.buffers]
    names = _found(path.name, buffers, matrices)
    places = _places(path.name, model, names)
    scales: dict[int, int] = {}
    for i, name in names.items():
        w = matrices[name.split()[0]]
        buffers[i] = _packed(quantize.integers(w), w.bits)
        if _grouped(w):
            scales[i] = len(buffers)
            buffers.append(np.ascontiguousarray(w.scale).reshape(-1).view(np.uint8))
    for graph, tensor in places:
        name = names[tensor.buffer]
        w = matrices[name.split()[0]]
        if (shape := (w.scale.shape[0], w.group * w.scale.shape[1])) != tuple(tensor.shape):
            raise ExportError(f"{path.name}: {name} is {list(tensor.shape)} there, not {list(shape)}")
        _describe(graph, tensor, name, w, scales.get(tensor.buffer))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _write(part, model, buffers)
        del data
        lower.check_ops(part, path.name)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: str | Path, name: str | None = None) -> dict[str, Quantized]:
    """The matrices that a file holds as integers, by name. Raises `ExportError` for a file that is not whole."""
    return lower.parsed(path, held, name)


def compare(path: str | Path, matrices: Mapping[str, Quantized]) -> None:
    """Raises `ExportError` unless a file holds exactly `matrices`, bit by bit."""
    path, found = Path(path), read(path)
    if missing := sorted(matrices.keys() ^ found.keys()):
        raise ExportError(f"{path.name}: {missing[0]} is in 8 or 4 bits only in {_where(missing[0], found)}")
    for key, w in matrices.items():
        for what, got, want in zip(("integers", "scales"), found[key], w, strict=True):
            if got.dtype != want.dtype or not np.array_equal(got, want):
                raise ExportError(f"{path.name}: {key}: other {what} than JAX computes with")


def _where(name: str, found: Mapping[str, Quantized]) -> str:
    return "the file" if name in found else "JAX"


# --- writing ---------------------------------------------------------------------------------------------------------


def _bytes(buffer: Any, data: np.ndarray) -> np.ndarray | None:
    if buffer.offset > 1:
        return data[buffer.offset : buffer.offset + buffer.size]
    return None if buffer.data is None else np.asarray(buffer.data, np.uint8)


def _found(file: str, buffers: list[np.ndarray | None], matrices: Mapping[str, Quantized]) -> dict[int, str]:
    """Buffer -> name, or names of matrices of the same numbers."""
    of: dict[bytes, list[str]] = {}
    sizes = set()
    for name, w in matrices.items():
        floats = quantize.floats(w)
        sizes.add(floats.nbytes)
        of.setdefault(_digest(floats), []).append(name)
    out = {}
    for i, buffer in enumerate(buffers):
        if buffer is not None and buffer.nbytes in sizes and (names := of.get(_digest(buffer))):
            out[i] = " ".join(names)
    if lost := sorted(matrices.keys() - {name for names in out.values() for name in names.split()}):
        raise ExportError(f"{file}: {lost[0]} is not a constant there: the converter changed it; keep it in f32")
    return out


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).data).digest()


def _places(file: str, model: Any, names: Mapping[int, str]) -> list[tuple[Any, Any]]:
    """(graph, tensor) of every constant that becomes integers, after a look at who reads it."""
    out = []
    for graph in model.subgraphs:
        ours = {i: t for i, t in enumerate(graph.tensors) if t.buffer in names}
        for op in graph.operators or ():
            for place, i in enumerate(op.inputs):
                kind = lower.op_name(model, op.opcodeIndex) if i in ours else ""
                if i in ours and not (kind in TAKES and place == 1):
                    raise ExportError(f"{file}: {names[ours[i].buffer]} is read by {kind}, which takes no integers")
        out += [(graph, tensor) for tensor in ours.values()]
    return out


def _packed(q: np.ndarray, bits: Bits) -> np.ndarray:
    """i8[O I] -> bytes; of 4 bits the first of two integers in the low half, in two's complement."""
    flat = q.reshape(-1).view(np.uint8)
    return flat if bits == 8 else (flat[::2] & 15) | flat[1::2] << 4


def _grouped(w: Quantized) -> bool:
    return w.scale.dtype == np.float16


def _describe(graph: Any, tensor: Any, name: str, w: Quantized, scales: int | None) -> None:
    schema = lower.extra(_SCHEMA)
    tensor.name, tensor.type = name.encode(), schema.TensorType.INT8 if w.bits == 8 else schema.TensorType.INT4
    q = tensor.quantization = schema.QuantizationParametersT()
    if scales is None:
        q.scale = np.asarray(w.scale, np.float32).reshape(-1)
        q.zeroPoint = np.zeros(q.scale.size, np.int64)
        return
    beside = schema.TensorT()
    beside.name, beside.type = f"{name}.scale".encode(), schema.TensorType.FLOAT16
    beside.shape, beside.buffer = np.asarray(w.scale.shape, np.int32), scales
    graph.tensors.append(beside)
    q.detailsType, q.details = schema.QuantizationDetails.BlockwiseQuantization, schema.BlockwiseQuantizationT()
    q.details.scales, q.details.zeroPoints, q.details.blockSize = len(graph.tensors) - 1, _NONE, w.group


def _write(path: Path, model: Any, buffers: list[np.ndarray | None]) -> None:
    """Tables first, large buffers behind them: the tables are packed twice, since their length says where that is."""
    flatbuffers, schema = lower.extra("flatbuffers"), lower.extra(_SCHEMA)
    model.buffers = [schema.BufferT() for _ in buffers]
    outside = [i for i, b in enumerate(buffers) if b is not None and b.nbytes > INLINE]
    for i, data in enumerate(buffers):
        model.buffers[i].data = data
    for i in outside:
        model.buffers[i].data, model.buffers[i].offset, model.buffers[i].size = None, 1, 1  # takes its room

    def tables() -> bytes:
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    at = length = len(tables())
    for i in outside:
        at = -(-at // ALIGN) * ALIGN
        model.buffers[i].offset, model.buffers[i].size = at, buffers[i].nbytes  # type: ignore  # not None
        at += model.buffers[i].size
    head = tables()
    if len(head) != length:
        raise ExportError(f"{path.name}: tables of {len(head)} bytes, {length} without offsets")
    with path.open("wb") as f:
        f.write(head)
        for i in outside:
            f.write(b"\0" * (model.buffers[i].offset - f.tell()))
            f.write(np.ascontiguousarray(buffers[i]).data)


# --- reading ---------------------------------------------------------------------------------------------------------


def held(model: Any, data: np.ndarray) -> dict[str, Quantized]:
    """What `read` gives, of an unpacked model, for `lower.parsed`."""
    schema = lower.extra(_SCHEMA)
    bits: dict[int, Bits] = {schema.TensorType.INT8: 8, schema.TensorType.INT4: 4}
    out: dict[str, Quantized] = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.type not in bits or tensor.quantization is None:
                continue
            stored = _bytes(model.buffers[tensor.buffer], data)
            if stored is None:  # not a constant
                continue
            q = _unpacked(stored, bits[tensor.type]).reshape(tuple(tensor.shape))
            w = quantize.quantized(q, _scale(graph, tensor, model, data), bits[tensor.type])
            for name in tensor.name.decode().split():
                if name in out and not all(map(np.array_equal, out[name], w)):
                    raise ValueError(f"two matrices called {name}")
                out[name] = w
    return out


def _unpacked(data: np.ndarray, bits: Bits) -> np.ndarray:
    if bits == 8:
        return data.view(np.int8)
    both = np.stack([data & 15, data >> 4], -1).reshape(-1).astype(np.int8)
    return np.where(both > 7, both - 16, both).astype(np.int8)


def _scale(graph: Any, tensor: Any, model: Any, data: np.ndarray) -> np.ndarray:
    q = tensor.quantization
    if q.details is None:
        return np.asarray(q.scale, np.float32)[:, None]
    beside = graph.tensors[q.details.scales]
    stored = _bytes(model.buffers[beside.buffer], data)
    if stored is None:
        raise ValueError("scales without numbers")
    return np.frombuffer(stored.tobytes(), np.float16).reshape(tuple(beside.shape))
