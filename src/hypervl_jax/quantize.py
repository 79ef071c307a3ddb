"""Weights in 8 and 4 bits: which tensors, which integers, which scales.

A matrix [O I] becomes symmetric integers with a scale a group of inputs: w ~ q * scale, |w - q * scale| <= scale / 2.
The scales of a whole row are f32; those of smaller groups are f16 of 8 significant bits, since that is what the kernels
of phones (XNNPACK) make of them. In 4 bits two integers lie in a byte. Which matrix is kept how is a recipe, rules by
path; norms, biases, position tables and VRC stay as they are. `model.layers.matmul` multiplies by any of it without
making floats of all of it, and exported files hold the same integers (`export/pack.py`).
Axes: O outputs, I inputs, G groups of a row, i inputs of a group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from hypervl_jax.tensors import flatten

Bits = Literal[8, 4]


class RecipeError(ValueError):
    """A recipe that does not fit a model; the message names the rule and what there is."""


class Kind(NamedTuple):
    """How a matrix is kept."""

    bits: Bits
    group: int | None = None  # inputs that share a scale; None: a row


class Rule(NamedTuple):
    """What becomes of the matrices whose whole path a pattern matches: `llm.blocks.layers.q.weight` in every layer of a
    stack, or `llm.blocks.layers.3.q.weight` in one."""

    path: str
    kind: str  # one of KINDS; "f32": as it is

    def __str__(self) -> str:
        return f"{self.path}={self.kind}"


KINDS: dict[str, Kind | None] = {"f32": None, "int8": Kind(8), "int4": Kind(4)}
KINDS |= {f"int4/{group}": Kind(4, group) for group in (32, 64, 128)}
Recipe = tuple[Rule, ...]  # the first rule that matches a path holds; without one a matrix stays as it is


def decoder4(group: int | None = 32) -> Recipe:
    """The decoder's projections in 4 bits (their groups permitting), tables and encoders in 8."""
    return (Rule(r"llm\.blocks\..*", f"int4/{group}" if group else "int4"), Rule(".*", "int8"))


RECIPES: dict[str, Recipe] = {"int8": (Rule(".*", "int8"),), "int4": decoder4()}


class Quantized(NamedTuple):
    """A matrix of a model, or a stack of them, in place of its array."""

    q: Any  # 8 bits: i8[... O I]; 4 bits: u8[... O I/2], of each group its first half in the low bits, plus 8
    scale: Any  # f32[... O 1], or f16[... O G]

    @property
    def bits(self) -> Bits:
        return 8 if self.q.dtype == jnp.int8 else 4

    @property
    def group(self) -> int:
        return self.q.shape[-1] * (8 // self.bits) // self.scale.shape[-1]

    @property
    def kind(self) -> Kind:
        return Kind(self.bits, self.group if self.scale.dtype == jnp.float16 else None)


class Rounded(NamedTuple):
    """A matrix, or a stack of them, and to how many steps the rows are rounded that it multiplies."""

    weight: Any  # an array or `Quantized`
    steps: Any  # f32[...]: 2^bits - 1


def quantize_matrix(w: Float[np.ndarray, "*S O I"], kind: Kind) -> Quantized:
    """The nearest integers, symmetric about 0, the largest of a group at the end of the range. I is a multiple of the
    group, and even in 4 bits. Raises `RecipeError` for weights that are not finite, or too large for their scales."""
    most = 2 ** (kind.bits - 1) - 1
    w = np.asarray(w, np.float32)
    groups = w.reshape(*w.shape[:-1], -1, kind.group or w.shape[-1])
    scale = round_scale(np.abs(groups).max(-1) / np.float32(most), grouped=kind.group is not None)
    if not np.isfinite(scale).all():
        raise RecipeError("weights that are not finite, or too large for their scales; the model is damaged")
    whole = np.where(scale > 0, scale, 1)[..., None].astype(np.float32)
    q = np.clip(np.rint(groups / whole), -most, most).astype(np.int8)
    return quantized(q.reshape(w.shape), scale, kind.bits)


def round_scale(scale: Float[np.ndarray, "*S"], grouped: bool) -> Float[np.ndarray, "*S"]:
    """A scale as it is kept: f32 of a row, f16 of 8 significant bits of a group."""
    return scale.astype(jnp.bfloat16).astype(np.float16) if grouped else scale.astype(np.float32)


def quantized(q: Int8[np.ndarray, "*S O I"], scale: Float[np.ndarray, "*S O G"], bits: Bits) -> Quantized:
    """Integers and scales as a leaf; the inverse of `integers`."""
    if bits == 8:
        return Quantized(q, scale)
    low, high = np.split((q.reshape(*scale.shape, -1) + 8).astype(np.uint8), 2, -1)
    return Quantized((low | high << 4).reshape(*q.shape[:-1], -1), scale)


def halves(w: Quantized) -> tuple[Array, Array]:
    """4 bits -> the first and the second half of each group, f32[... G i/2] each."""
    q = w.q.reshape(*w.q.shape[:-1], -1, w.group // 2)
    return (q & 15).astype(jnp.float32) - 8, (q >> 4).astype(jnp.float32) - 8


def dequantize(w: Quantized, dtype: Any = jnp.float32) -> Float[Array, "*S O I"]:
    """The matrix that a `Quantized` stands for."""
    w = Quantized(jnp.asarray(w.q), jnp.asarray(w.scale))
    scale = w.scale.astype(jnp.float32)
    if w.bits == 8:
        return (w.q.astype(jnp.float32) * scale).astype(dtype)
    groups = jnp.concatenate(halves(w), -1) * scale[..., None]
    return groups.reshape(*w.q.shape[:-1], -1).astype(dtype)


def integers(w: Quantized) -> Int8[np.ndarray, "*S O I"]:
    """The integers in the order of the matrix, on the host."""
    q = np.asarray(w.q)
    if w.bits == 8:
        return q
    q = q.reshape(*q.shape[:-1], -1, w.group // 2)
    return (np.concatenate([q & 15, q >> 4], -1).astype(np.int8) - 8).reshape(*q.shape[:-2], -1)


def floats(w: Quantized) -> Float[np.ndarray, "*S O I"]:
    """`dequantize` on the host: the same numbers, bit by bit."""
    q, scale = integers(w), np.asarray(w.scale, np.float32)
    groups = q.reshape(*scale.shape, -1).astype(np.float32) * scale[..., None]
    return groups.reshape(q.shape)


def round_rows(x: Float[Array, "*M I"], steps: Array) -> Float[Array, "*M I"]:
    """Rows as integers of so many steps with a scale and a zero point each, and back: 255 steps are what XNNPACK makes
    of the rows that it multiplies integers by, in its own arithmetic."""
    low, high = jnp.minimum(x.min(-1, keepdims=True), 0), jnp.maximum(x.max(-1, keepdims=True), 0)
    least = -(steps + 1) / 2
    scale = jnp.maximum((high - low) / steps, 1e-30)
    zero = jnp.clip(jnp.round(least - low / scale), least, least + steps)
    return (jnp.clip(jnp.round(x / scale) + zero, least, least + steps) - zero) * scale


ACTIVATIONS = ("f32", "bf16", "f16", "int16", "int8")


def with_activations(params: dict, kind: str) -> dict:
    """A model, its matrices in integers or not, that computes in activations of a `kind` of ACTIVATIONS: in floats of
    16 bits everywhere, or in f32 with the rows that its matrices multiply rounded to integers (`round_rows`). VRC stays
    in f32."""
    if kind == "f32":
        return params
    narrow = {"bf16": jnp.bfloat16, "f16": jnp.float16}.get(kind)

    def of(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.startswith("vrc."):
            return leaf
        if narrow is not None:
            return leaf if isinstance(leaf, Quantized) else jnp.asarray(leaf, narrow)
        if not is_matrix(name):
            return leaf
        numbers = leaf.q if isinstance(leaf, Quantized) else leaf
        return Rounded(leaf, np.full(numbers.shape[:-2], 2 ** int(kind.removeprefix("int")) - 1, np.float32))

    return jax.tree_util.tree_map_with_path(of, params, is_leaf=_is_quantized)


def parse(texts: Iterable[str]) -> Recipe:
    """Rules as they are written, `PATTERN=KIND`. Raises `RecipeError` for what is none."""
    return tuple(map(_rule, texts))


def _rule(text: str) -> Rule:
    path, equals, kind = text.rpartition("=")
    if not equals or kind not in KINDS:
        raise RecipeError(f"{text[:200]!r}: a rule is PATTERN=KIND, its kind one of {', '.join(KINDS)}")
    return Rule(path, kind)


def read(given: Iterable[str]) -> Recipe:
    """Rules, and the rules of files: a line each, without empty lines and what follows a `#`. Raises `RecipeError`
    naming the file and the line."""
    rules: list[Rule] = []
    for text in given:
        if "=" in text and (text.rpartition("=")[2] in KINDS or not Path(text).is_file()):
            rules.append(_rule(text))
            continue
        try:
            lines = Path(text).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as e:
            raise RecipeError(f"{text}: not a file of rules: not text; its lines are PATTERN=KIND") from e
        except OSError as e:
            raise RecipeError(f"{text}: neither a rule, PATTERN=KIND, nor a file of them ({e.strerror})") from e
        for n, line in enumerate(lines, 1):
            if line := line.partition("#")[0].strip():
                try:
                    rules.append(_rule(line))
                except RecipeError as e:
                    raise RecipeError(f"{text}:{n}: {e}") from e
    return tuple(rules)


def kind_of(path: str, inputs: int, recipe: Recipe) -> Kind | None:
    """How a recipe keeps a leaf (`llm.blocks.layers.q.weight`, or of one layer `llm.blocks.layers.3.q.weight`) of so
    many inputs; None: as it is. Where its group does not divide the inputs a matrix is kept in 8 bits."""
    if not is_matrix(path):
        return None
    names = {path, _in_every_layer(path)}
    found = (KINDS[rule.kind] for rule in recipe if any(re.fullmatch(rule.path, name) for name in names))
    kind = next(found, None)
    if kind is None or kind.bits == 8:
        return kind
    return kind if inputs % (kind.group or 2) == 0 else Kind(8)


def _in_every_layer(path: str) -> str:
    return re.sub(r"\.layers\.\d+\.", ".layers.", path)


def is_matrix(path: str) -> bool:
    """Whether recipes speak of a leaf: matrices and tables, but not VRC's."""
    *parents, leaf = path.split(".")
    return leaf in ("weight", "embed", "head") and parents[0] != "vrc" and not any("norm" in name for name in parents)


def packer(recipe: Recipe) -> Callable[[str, np.ndarray], Any]:
    """What `tensors.read` does with each tensor of a model as it comes: (path, numbers) -> leaf."""

    def pack(path: str, numbers: np.ndarray) -> Any:
        kind = kind_of(path, numbers.shape[-1] if numbers.ndim else 0, recipe)
        try:
            return numbers if kind is None else quantize_matrix(numbers, kind)
        except RecipeError as e:
            raise RecipeError(f"{path}: {e}") from e

    return pack


def quantize(params: dict, recipe: Recipe, shapes: Mapping[str, Sequence[int]] | None = None) -> dict:
    """A model's tree with its matrices as the recipe says; every function of the library takes it in place of the
    other. A stack whose layers are kept alike stays one, another becomes a list of layers. Not to be trained or saved.
    Of a part of a tree `shapes` are those of the whole one, by path.
    Raises `RecipeError` for a rule that speaks of no matrix, or of an unknown kind.
    """
    shapes = {path: np.shape(leaf) for path, leaf in flatten(params).items()} if shapes is None else shapes
    paths = [path for path in shapes if is_matrix(path)]
    check(recipe, paths, [_layer(p, i) for p in paths if ".layers." in p for i in range(shapes[p][0])])
    return _quantize(params, packer(recipe), "")


def _quantize(tree: dict, pack: Callable[[str, np.ndarray], Any], path: str) -> dict:
    out = {}
    for key, value in tree.items():
        name = path + key
        if key == "layers" and isinstance(value, dict):
            depth = len(jax.tree.leaves(value)[0])
            each = [jax.tree.map(lambda a: np.asarray(a)[i], value) for i in range(depth)]  # noqa: B023 - used at once
            out[key] = joined([_quantize(layer, pack, f"{name}.{i}.") for i, layer in enumerate(each)])
        else:
            out[key] = _quantize(value, pack, f"{name}.") if isinstance(value, dict) else pack(name, np.asarray(value))
    return out


def joined(layers: list[dict]) -> dict | list[dict]:
    """Layers as a stack, one array a leaf; as they came where their matrices are not kept alike."""
    first, *others = ([(a.shape, a.dtype) for a in jax.tree.leaves(layer)] for layer in layers)
    alike = all(jax.tree.structure(layer) == jax.tree.structure(layers[0]) for layer in layers)
    return jax.tree.map(lambda *a: np.stack(a), *layers) if alike and all(o == first for o in others) else layers


def _layer(path: str, i: int) -> str:
    return path.replace(".layers.", f".layers.{i}.")


def check(recipe: Recipe, paths: list[str], layers: Iterable[str] = ()) -> None:
    """Raises `RecipeError` for a rule of which none of the matrices at `paths`, or of single `layers`, would know."""
    names = (*paths, *layers)
    for rule in recipe:
        if rule.kind not in KINDS:
            raise RecipeError(f"{rule}: no such kind; choose one of {', '.join(KINDS)}")
        try:
            known = any(re.fullmatch(rule.path, name) for name in names)
        except re.error as e:
            raise RecipeError(f"{rule}: not a pattern: {e}") from e
        if not known:
            raise RecipeError(
                f"{rule}: the pattern matches the whole path of no matrix; there are {paths[0]} "
                f"and {len(paths) - 1} more"
            )


def restored(tree: Any) -> Any:
    """A tree whose matrices are the floats that they stand for."""
    return jax.tree.map(lambda w: floats(w) if isinstance(w, Quantized) else w, tree, is_leaf=_is_quantized)


def matrices(tree: Any) -> dict[str, Quantized]:
    """The matrices of a tree that are in 8 or 4 bits, by path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_quantized)[0]
    named = ((jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves)
    return {path: leaf for path, leaf in named if isinstance(leaf, Quantized)}


def replaced(tree: Any, found: Mapping[str, Quantized]) -> Any:
    """The inverse of `matrices`: a tree with those of `found` in their places."""

    def of(path: Any, leaf: Any) -> Any:
        return found.get(jax.tree_util.keystr(path, simple=True, separator="."), leaf)

    return jax.tree_util.tree_map_with_path(of, tree, is_leaf=_is_quantized)


def is_quantized(params: dict) -> bool:
    return bool(matrices(params))


def nbytes(tree: Any) -> int:
    """Bytes of all weights as they are kept."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def bits_per_weight(tree: Any) -> float:
    """Bits a weight takes, its share of the scales included, over everything in a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_quantized)
    return 8 * nbytes(tree) / sum(integers(w).size if isinstance(w, Quantized) else w.size for w in leaves)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)
