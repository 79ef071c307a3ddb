"""Weights in 8 and 4 bits: which tensors, which integers, which scales.

A matrix [O I] becomes symmetric integers with a scale a group of inputs: w ~ q * scale, |w - q * scale| <= scale / 2.
In 8 bits a row is one group; in 4 bits, two to a byte, 32 inputs are one and scales are f16. The decoder's projections
are in 4 bits where that is asked for, all other matrices (tables and encoders) then in 8; norms, biases, position
tables and VRC stay as they are. `model.layers.matmul` multiplies by either without making floats of all of it.
Axes: O outputs, I inputs, G groups of a row, i inputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hypervl_jax.tensors import flatten, unflatten

Bits = Literal[8, 4]
BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
GROUP = 32  # inputs that share a scale in 4 bits


class Quantized(NamedTuple):
    """A matrix of a model, or a stack of them, in place of its array."""

    q: Any  # 8 bits: i8[... O I]; 4 bits: u8[... O I/2], of each group its first half in the low bits, plus 8
    scale: Any  # f32[... O 1], or f16[... O I/32]

    @property
    def bits(self) -> Bits:
        return 8 if self.q.dtype == jnp.int8 else 4


def quantize_matrix(w: Float[np.ndarray, "*S O I"], bits: Bits) -> Quantized:
    """The nearest integers, symmetric about 0, the largest of a group at the end of the range. For 4 bits I is a
    multiple of 32."""
    most = 2 ** (bits - 1) - 1
    w = np.asarray(w, np.float32)
    groups = w.reshape(*w.shape[:-1], -1, GROUP if bits == 4 else w.shape[-1])
    scale = (np.abs(groups).max(-1) / most).astype(np.float16 if bits == 4 else np.float32)
    whole = np.where(scale > 0, scale, 1)[..., None].astype(np.float32)
    q = np.clip(np.rint(groups / whole), -most, most).astype(np.int8)
    if bits == 8:
        return Quantized(q.reshape(w.shape), scale)
    low, high = np.split((q + 8).astype(np.uint8), 2, -1)
    return Quantized((low | high << 4).reshape(*w.shape[:-1], -1), scale)


def halves(q: Array) -> tuple[Array, Array]:
    """u8[... I/2] of 4 bits -> the first and the second half of each group, f32[... G i/2] each."""
    q = q.reshape(*q.shape[:-1], -1, GROUP // 2)
    return (q & 15).astype(jnp.float32) - 8, (q >> 4).astype(jnp.float32) - 8


def dequantize(w: Quantized, dtype: Any = jnp.float32) -> Float[Array, "*S O I"]:
    """The matrix that a `Quantized` stands for."""
    q, scale = jnp.asarray(w.q), jnp.asarray(w.scale, jnp.float32)
    if w.bits == 8:
        return (q.astype(jnp.float32) * scale).astype(dtype)
    groups = jnp.concatenate(halves(q), -1) * scale[..., None]
    return groups.reshape(*q.shape[:-1], -1).astype(dtype)


def bits_of(path: str, inputs: int, bits: Bits) -> Bits | None:
    """How a leaf (`llm.blocks.layers.q.weight`) is kept in a model of so many bits; None: as it is."""
    *parents, leaf = path.split(".")
    if leaf not in ("weight", "embed", "head") or parents[0] == "vrc" or any("norm" in name for name in parents):
        return None
    return 4 if bits == 4 and parents[0] == "llm" and leaf == "weight" and inputs % GROUP == 0 else 8


def packer(bits: Bits) -> Callable[[str, np.ndarray], Any]:
    """What `tensors.read` does with each tensor of a model as it comes: (path, numbers) -> leaf."""

    def pack(path: str, numbers: np.ndarray) -> Any:
        kept = bits_of(path, numbers.shape[-1] if numbers.ndim else 0, bits)
        return numbers if kept is None else quantize_matrix(numbers, kept)

    return pack


def quantize(params: dict, bits: Bits) -> dict:
    """A model's tree with its matrices in `bits`; every function of the library takes it in place of the other. Not to
    be trained, saved or exported."""
    pack = packer(bits)
    return unflatten({path: pack(path, np.asarray(leaf)) for path, leaf in flatten(params).items()})


def is_quantized(params: dict) -> bool:
    return any(isinstance(leaf, Quantized) for leaf in flatten(params).values())


def nbytes(params: dict) -> int:
    """Bytes of all weights as they are kept."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
