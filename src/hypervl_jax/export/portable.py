"""The same parts as portable StableHLO, for servers: what `jax.export` writes, weights beside it as safetensors.

A folder has PART.SIGNATURE.stablehlo for each entry point, which takes (weights, arrays by name) and gives arrays by
name, those of the phone's files, and PART.safetensors, the weights by path. XLA on CPU, CUDA and TPU runs them; the
layers are looped and the shapes fixed as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from hypervl_jax import quantize, tensors
from hypervl_jax.checkpoint import TOKENIZER, Model, replacing
from hypervl_jax.config import BRANCHES, Branch
from hypervl_jax.export import parts
from hypervl_jax.export.lower import ExportError, Signature

PLATFORMS = ("cpu", "cuda", "tpu")
KIND = ".stablehlo"
WEIGHTS = ".safetensors"


def write(
    model: Model,
    out: str | Path,
    *,
    prefill: Sequence[int] | None = None,
    cache: int | None = None,
    branches: Sequence[Branch] = BRANCHES,
) -> list[str]:
    """Write every part of `model` to the new or empty folder `out`, whole or not at all; returns the names written.

    Raises `ExportError` where something is at `out`, or the weights are in 8 or 4 bits.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out}: is there already; remove it, or name another folder")
    if quantize.is_quantized(model.params):
        raise ExportError("weights in 8 or 4 bits are not exported; load the model as it is")
    made = parts.make(model.config, model.params, branches, *parts.checked_lengths(model, prefill, cache, branches))
    made["embedder"] = parts.embedder(model.config, model.params, named=False)  # JAX names operators for one platform
    with replacing(out) as work:
        for name, part in made.items():
            spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), part.params)
            for s in part.signatures:
                inputs = dict(zip(s.inputs, jax.tree.leaves(s.args), strict=True))
                exported = jax_export.export(jax.jit(_named(s)), platforms=PLATFORMS)(spec, inputs)
                (work / f"{name}.{s.name}{KIND}").write_bytes(exported.serialize())
            flat = _paths(part.params)
            rows = tuple(tensors.Row(path, path) for path in flat)
            tensors.write(work, flat, tensors.Table(rows), shard=1 << 62)
            (work / tensors.FILE).rename(work / f"{name}{WEIGHTS}")
        model.tokenizer.save(work / TOKENIZER)
        return sorted(p.name for p in work.iterdir())


def _named(s: Signature) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
    """The function of a signature over arrays by name: trees of this library's types are nobody else's."""
    tree = jax.tree.structure(s.args)

    def fn(weights, inputs):
        out = s.fn(weights, *jax.tree.unflatten(tree, [inputs[name] for name in s.inputs]))
        return dict(zip(s.outputs, jax.tree.leaves(out), strict=True))

    return fn


def load(folder: str | Path, part: str, signature: str) -> tuple[Callable[..., Any], Any]:
    """One entry point: a function of (weights, inputs by name) to outputs by name, which may be jitted, and its weights
    as mapped arrays.

    Raises `ExportError` for a file that is not there, damaged, or of other weights."""
    path, beside = Path(folder) / f"{part}.{signature}{KIND}", Path(folder) / f"{part}{WEIGHTS}"
    try:
        exported = jax_export.deserialize(bytearray(path.read_bytes()))
        places, _ = jax.tree.unflatten(exported.in_tree, range(len(exported.in_avals)))
        named, held = _paths(places[0]), tensors.header(beside)
        if {k: exported.in_avals[int(i)].shape for k, i in named.items()} != {k: t.shape for k, t in held.items()}:
            raise ValueError(f"{beside.name} has other weights than it takes")
        weights = jax.tree.unflatten(jax.tree.structure(places[0]), [held[k].map() for k in named])
    except tensors.CheckpointError as e:
        raise ExportError(str(e)) from e
    except Exception as e:  # of flatbuffers, MLIR and the system, each of its own kind
        raise ExportError(f"{path}: cannot be used ({str(e).strip() or type(e).__name__:.100}); export again") from e
    return exported.call, weights


def _paths(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by path; places of a list are numbers."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): np.asarray(x) for path, x in flat}
