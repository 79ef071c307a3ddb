"""What the encoder and the decoder share: a linear layer, two norms, and one block under two drivers.

Axes: B batch, L sequence, S keys, H heads, K kv heads, D width, O outputs, I inputs, M rows,
r the rank of a change.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hypervl_jax.quantize import Quantized, Rounded, dequantize, halves, round_rows


class Adapted(NamedTuple):
    """A matrix, or a stack of them, and a change of low rank beside it: W + B A (`lora.py`)."""

    weight: Any  # [... O I]
    a: Any  # [... r I]
    b: Any  # [... O r]


Matrix = Array | np.ndarray | Quantized
Weight = Matrix | Adapted | Rounded
_NT = (((1,), (1,)), ((), ()))  # [M I] x [O I] -> [M O]
_BLOCK = 2 << 20  # bytes of f32 weights that are made at a time: they stay in the cache
_BLOCK_4 = 512 << 10  # the same of 4 bits for a single row
_SCORES = 4 << 20  # bytes of attention scores that are made at once
_ROWS, _KEYS = 512, 256  # of one head, where they are more


class Linear(nn.Module):
    """y = x W^T + b with W stored [out, in], the layout of published checkpoints and of one TFLite FULLY_CONNECTED."""

    features: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2)
        if self.has_variable("params", "weight"):
            weight = self.get_variable("params", "weight")
        else:
            weight = self.param("weight", init, (self.features, x.shape[-1]))
        y = matmul(x, weight)
        return y + self.param("bias", nn.initializers.zeros, (self.features,)) if self.bias else y


class LayerNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)).astype(x.dtype)
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        return y * weight + self.param("bias", nn.initializers.zeros, (x.shape[-1],))


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)).astype(x.dtype)
        return y * self.param("weight", nn.initializers.ones, (x.shape[-1],))


# --- matrix products -------------------------------------------------------------------------------------------------


def matmul(x: Float[Array, "... I"], weight: Weight) -> Float[Array, "... O"]:
    """x W^T in the dtype of x, of f32 or narrower weights, summed in f32 where they are narrower.

    XLA's CPU backend makes floats of a whole narrow matrix before it multiplies a row by it. So it is given, for a
    single row, products in the weights' own kind (`_int8_row`, `_bf16_row`), and otherwise one block of the matrix at a
    time; other backends fuse the conversion.
    """
    if isinstance(weight, Adapted):
        return matmul(x, weight.weight) + matmul(matmul(x, weight.a), weight.b)
    if isinstance(weight, Rounded):
        return matmul(round_rows(x, weight.steps), weight.weight)
    # Rows flattened: XLA's CPU backend runs the plain matrix product, and above all its gradient, twice as fast.
    rows = x.reshape(-1, x.shape[-1])
    quantized = isinstance(weight, Quantized)
    if not quantized and weight.dtype.itemsize >= 4:
        y = jax.lax.dot_general(rows, weight, _NT)
    else:
        y = jax.lax.platform_dependent(rows, weight, cpu=_narrow, default=_plain)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def take(weight: Weight, ids: Int[Array, "..."]) -> Float[Array, "... I"]:
    """Rows of a table; ids outside it clip."""
    table = weight.weight if isinstance(weight, Rounded) else weight
    rows = jax.tree.map(lambda a: jnp.take(a, ids, axis=0, mode="clip"), table)
    return dequantize(rows) if isinstance(rows, Quantized) else rows


def _plain(x: Float[Array, "M I"], weight: Matrix) -> Float[Array, "M O"]:
    w = dequantize(weight, x.dtype) if isinstance(weight, Quantized) else weight.astype(x.dtype)
    return jax.lax.dot_general(x, w, _NT).astype(x.dtype)


def _narrow(x: Float[Array, "M I"], weight: Matrix) -> Float[Array, "M O"]:
    one_row = x.shape[0] == 1
    if not isinstance(weight, Quantized):  # may be trained
        y = _bf16_row(x, weight) if one_row and weight.dtype == jnp.bfloat16 else _plain(x, weight)
    else:
        y = _int8_row(x, weight) if one_row and weight.bits == 8 else _blocks(x, weight)
    return y.astype(x.dtype)


def _int8_row(x: Float[Array, "1 I"], weight: Quantized) -> Float[Array, "1 O"]:
    """One row times 8 bit weights in integer products, which read the weights as they lie. The row is the sum of three
    rows of 8 bits, each what the one before left over: as exact as f32. One row alone would take the way that makes
    floats of everything."""
    rest, unit = x.astype(jnp.float32), jnp.maximum(jnp.abs(x).max().astype(jnp.float32), 1e-30) / 127
    parts, units = [], []
    for _ in range(3):
        part = jnp.round(rest / unit)
        parts.append(part.astype(jnp.int8))
        units.append(unit)
        rest, unit = rest - part * unit, unit / 254
    rows = jnp.concatenate(parts)
    sums = jax.lax.dot_general(rows, weight.q, _NT, preferred_element_type=jnp.int32)  # exact to 133,000 inputs
    return jnp.einsum("mo,m->o", sums.astype(jnp.float32), jnp.stack(units))[None] * weight.scale[:, 0]


def _bf16_row(x: Float[Array, "1 I"], weight: Array | np.ndarray) -> Float[Array, "1 O"]:
    """The same for weights in bf16: an f32 row is the sum of three rows of bf16."""
    rest, parts = x.astype(jnp.float32), []
    for _ in range(1 if x.dtype == jnp.bfloat16 else 3):
        # A plain round trip through bf16 would be taken out as needless, and with it all but the first part.
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    rows = jnp.concatenate([*parts, jnp.zeros_like(parts[0])])
    sums = jax.lax.dot_general(rows, weight, _NT, preferred_element_type=jnp.float32)
    return sums[: len(parts)].sum(0, keepdims=True)


def _blocks(x: Float[Array, "M I"], weight: Quantized) -> Float[Array, "M O"]:
    """One block of outputs at a time, whose weights become floats that stay in the cache."""
    x, inputs, outputs = x.astype(jnp.float32), x.shape[1], weight.q.shape[0]
    size = _BLOCK_4 if weight.bits == 4 and x.shape[0] == 1 else _BLOCK
    rows = max(1, size // (4 * inputs))

    def product(w: Quantized) -> Array:
        if w.bits == 8:
            return jax.lax.dot_general(x, w.q.astype(jnp.float32), _NT) * w.scale[:, 0]
        sides, scale = x.reshape(-1, inputs // w.group, 2, w.group // 2), w.scale[..., None].astype(jnp.float32)
        low, high = (
            jax.lax.dot_general(sides[:, :, n].reshape(len(x), -1), (half * scale).reshape(len(half), -1), _NT)
            for n, half in enumerate(halves(w))
        )
        return low + high

    if rows >= outputs:
        return product(weight)

    def block(i: Int[Array, ""], y: Array) -> Array:
        at = jnp.minimum(i * rows, outputs - rows)  # the last block may say again what the one before has said
        w = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, rows), weight)
        return jax.lax.dynamic_update_slice_in_dim(y, product(w), at, 1)

    return jax.lax.fori_loop(0, -(-outputs // rows), block, jnp.zeros((len(x), outputs), jnp.float32))


# --- attention -------------------------------------------------------------------------------------------------------


def attention(
    q: Float[Array, "B H L d"], k: Float[Array, "B K S d"], v: Float[Array, "B K S d"], mask: Bool[Array, "B #L S"]
) -> Float[Array, "B H L d"]:
    """Softmax attention, scores in f32. Query heads H are K groups that share a key head; the group is folded into the
    rows, so that no key is repeated and each product is one batched matmul. True in `mask` means visible."""
    b, h, l, d = q.shape
    groups = h // k.shape[1]
    scores = jnp.einsum("bkqd,bksd->bkqs", q.reshape(b, -1, groups * l, d), k).astype(jnp.float32) * d**-0.5
    bias = jnp.where(mask, 0.0, -1e30)[:, None]  # finite: a row that sees nothing gives a mean, not NaN
    if groups > 1:
        scores = scores.reshape(b, h, l, -1) + bias
        probs = jax.nn.softmax(scores, axis=-1).reshape(b, -1, groups * l, k.shape[2])
    else:
        probs = jax.nn.softmax(scores + bias, axis=-1)
    return jnp.einsum("bkqs,bksd->bkqd", probs.astype(v.dtype), v).reshape(b, h, l, d)


def cpu_attention(
    q: Float[Array, "B H L d"], k: Float[Array, "B K S d"], v: Float[Array, "B K S d"], mask: Bool[Array, "B #L S"]
) -> Float[Array, "B H L d"]:
    """`attention` to answer with on a CPU. XLA's CPU backend makes four copies of a cache that a single row was written
    to and is then multiplied by; sums of products it computes where the cache lies. Of many rows about one picture it
    writes out all scores, of keys that nobody sees too; see `_running`."""
    b, h, l, d = q.shape
    if l == 1:
        rows = q.astype(jnp.float32).reshape(b, k.shape[1], -1, 1, d)
        scores = (rows * k[:, :, None]).sum(-1) * d**-0.5
        probs = jax.nn.softmax(scores + jnp.where(mask, 0.0, -1e30)[:, None], axis=-1)
        return (probs[..., None] * v[:, :, None]).sum(-2).reshape(b, h, 1, d).astype(v.dtype)
    if b > 1 or 4 * h * l * k.shape[2] <= _SCORES:  # several at once keep the cores busy as they are
        return attention(q, k, v, mask)
    return _running(q[0], k[0], v[0], mask[0])[None]


def _running(
    q: Float[Array, "H L d"], k: Float[Array, "K S d"], v: Float[Array, "K S d"], mask: Bool[Array, "#L S"]
) -> Float[Array, "H L d"]:
    """`_ROWS` rows of one head and `_KEYS` keys at a time, whose scores stay in the cache, under a softmax whose sums
    run along (FlashAttention, 2205.14135, algorithm 1). It ends with the last key that one of the rows sees: a causal
    mask costs half, and room that a cache keeps for later nothing."""
    (h, l, d), (heads, keys) = q.shape, k.shape[:2]
    size, width = min(_ROWS, l), min(_KEYS, keys)
    blocks = -(-l // size)
    rows = jnp.pad(q, ((0, 0), (0, blocks * size - l), (0, 0))).reshape(h * blocks, size, d)
    seen = jnp.pad(jnp.broadcast_to(mask, (l, keys)), ((0, blocks * size - l), (0, 0))).reshape(blocks, size, keys)
    ends = jnp.where(seen.any(1), jnp.arange(keys) + 1, 1).max(-1)

    def block(i: Int[Array, ""]) -> Array:
        head, n = i // blocks // (h // heads), i % blocks

        def more(t: Int[Array, ""], found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = found
            at = jnp.minimum(t * width, keys - width)  # the last step may pass keys again: `fresh` are those it has not
            near_k, near_v = (jax.lax.dynamic_slice(a, (head, at, 0), (1, width, d))[0] for a in (k, v))
            fresh = at + jnp.arange(width) >= t * width
            visible = jax.lax.dynamic_slice(seen, (n, 0, at), (1, size, width))[0] & fresh
            scores = jax.lax.dot_general(rows[i], near_k, _NT).astype(jnp.float32) * d**-0.5
            scores = jnp.where(visible, scores, -1e30)
            high = jnp.maximum(top, scores.max(-1))
            probs, fade = jnp.exp(scores - high[:, None]), jnp.exp(top - high)
            new = (probs.astype(v.dtype) @ near_v).astype(jnp.float32)
            return high, total * fade + probs.sum(-1), out * fade[:, None] + new

        start = jnp.full(size, -1e30), jnp.zeros(size), jnp.zeros((size, d))
        _, total, out = jax.lax.fori_loop(0, -(-ends[n] // width), more, start)
        return (out / total[:, None]).astype(v.dtype)

    return jax.lax.map(block, jnp.arange(h * blocks)).reshape(h, blocks * size, d)[:, :l]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise(
    q: Float[Array, "B H L d"], k: Float[Array, "B K L d"], v: Float[Array, "B K L d"], segments: Int[Array, "B L"],
    size: int,
) -> Float[Array, "B H L d"]:  # fmt: skip
    """`attention` of a row to itself, under the mask that `llm.segment_mask` has for its segments: `size` queries and
    `size` keys at a time under a softmax whose sums run along, and the scores made anew in the backward pass
    (FlashAttention, 2205.14135, algorithms 1 and 4). Neither scores nor mask ever exist whole, and blocks above the
    diagonal are not computed. A row of -1 attends to what it likes: nobody attends to it."""
    return _forth(q, k, v, segments, size)[0]


class _Cut(NamedTuple):
    """A row in blocks: [n, B, ...] for n blocks of its L positions, filled up with segment -1."""

    size: int
    length: int
    pairs: tuple[Array, Array]  # (queries, keys), blocks on and below the diagonal

    @classmethod
    def of(cls, length: int, size: int) -> _Cut:
        size = min(size, length)
        i, j = np.tril_indices(-(-length // size))
        return cls(size, length, (jnp.asarray(i, jnp.int32), jnp.asarray(j, jnp.int32)))

    def blocks(self, x: Array, axis: int, fill: int = 0) -> Array:
        axis %= x.ndim
        short = -self.length % self.size
        x = jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)], constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, self.size, *x.shape[axis + 1 :]), axis, 0)

    def whole(self, x: Array, axis: int) -> Array:
        """The row again, its positions at `axis`."""
        x = jnp.moveaxis(x, 0, axis)
        return jax.lax.slice_in_dim(x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]), 0, self.length, axis=axis)


def _scores(q: Array, k: Array, segments: tuple[Array, Array], i: Array, j: Array) -> Float[Array, "B K G q s"]:
    """Of query block i and key block j."""
    size, (mine, theirs) = q.shape[-2], (s[:, None, None] for s in segments)
    here = jnp.arange(size)
    seen = (i * size + here[:, None] >= j * size + here) & (theirs[..., None, :] >= 0)
    seen &= (theirs[..., None, :] == 0) | (theirs[..., None, :] == mine[..., None])
    scores = jnp.einsum("bkgqd,bksd->bkgqs", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    return jnp.where(seen, scores, -1e30)


def _in_blocks(cut: _Cut, q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, Array, Array, Array]:
    """Queries [n B K G q d], keys and values [n B K s d], segments [n B q]. Behind a barrier: who sees whom is the same
    in all layers, and JAX would make the mask of every pair of blocks before the first, and keep it."""
    q, segments = jax.lax.optimization_barrier((q, segments))
    grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    return cut.blocks(grouped, -2), cut.blocks(k, -2), cut.blocks(v, -2), cut.blocks(segments, -1, -1)


def _forth(q: Array, k: Array, v: Array, segments: Array, size: int) -> tuple[Array, tuple]:
    cut = _Cut.of(q.shape[2], size)
    qs, ks, vs, seg = _in_blocks(cut, q, k, v, segments)

    def one(found: tuple, pair: tuple) -> tuple[tuple, None]:
        i, j = pair
        top, total, out = (a[i] for a in found)
        scores = _scores(qs[i], ks[j], (seg[i], seg[j]), i, j)
        high = jnp.maximum(top, scores.max(-1))
        probs, fade = jnp.exp(scores - high[..., None]), jnp.exp(top - high)
        new = jnp.einsum("bkgqs,bksd->bkgqd", probs.astype(v.dtype), vs[j]).astype(jnp.float32)
        made = high, total * fade + probs.sum(-1), out * fade[..., None] + new
        return tuple(a.at[i].set(b) for a, b in zip(found, made, strict=True)), None

    none = jnp.zeros(qs.shape[:-1], jnp.float32)
    (top, total, out), _ = jax.lax.scan(one, (none - 1e30, none, jnp.zeros(qs.shape, jnp.float32)), cut.pairs)
    out = cut.whole((out / total[..., None]).astype(v.dtype), 3).reshape(q.shape)
    return out, (q, k, v, segments, out, top + jnp.log(total))


def _back(size: int, kept: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out, lse = kept
    cut = _Cut.of(q.shape[2], size)
    qs, ks, vs, seg = _in_blocks(cut, q, k, v, segments)
    ds, outs = (_in_blocks(cut, a, k, v, segments)[0] for a in (d_out, out))
    slope = (ds.astype(jnp.float32) * outs.astype(jnp.float32)).sum(-1)

    def one(found: tuple, pair: tuple) -> tuple[tuple, None]:
        i, j = pair
        probs = jnp.exp(_scores(qs[i], ks[j], (seg[i], seg[j]), i, j) - lse[i][..., None])
        d_probs = jnp.einsum("bkgqd,bksd->bkgqs", ds[i], vs[j]).astype(jnp.float32)
        d_scores = (probs * (d_probs - slope[i][..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
        more = (
            (i, jnp.einsum("bkgqs,bksd->bkgqd", d_scores, ks[j])),
            (j, jnp.einsum("bkgqs,bkgqd->bksd", d_scores, qs[i])),
            (j, jnp.einsum("bkgqs,bkgqd->bksd", probs.astype(v.dtype), ds[i])),
        )
        return tuple(a.at[n].add(b.astype(jnp.float32)) for a, (n, b) in zip(found, more, strict=True)), None

    start = tuple(jnp.zeros(a.shape, jnp.float32) for a in (qs, ks, vs))
    (dq, dk, dv), _ = jax.lax.scan(one, start, cut.pairs)
    dq = cut.whole(dq, 3).reshape(q.shape).astype(q.dtype)
    return dq, cut.whole(dk, 2).astype(k.dtype), cut.whole(dv, 2).astype(v.dtype), None


blockwise.defvjp(_forth, _back)


class Stack(nn.Module):
    """`depth` blocks over one stacked parameter tree: `nn.scan` to train, a loop to export and decode, remat in both.

    A block maps (x, cache, *shared) -> (x, cache). The loop takes and returns a tuple of one cache a layer; the scan
    has none. Layers may also come apart (`unstack`); those are looped. `remat` may name the policy of
    `jax.checkpoint_policies` that says what the backward pass finds kept; True keeps nothing.
    """

    block: type[nn.Module]
    cfg: Any
    depth: int
    scan: bool = True
    remat: bool | str = False

    @nn.compact
    def __call__(self, x: Array, caches: tuple | None, *shared: Any) -> tuple[Array, tuple | None]:
        policy = getattr(jax.checkpoint_policies, self.remat) if isinstance(self.remat, str) else None
        apart = isinstance(self.variables.get("params", {}).get("layers"), list | tuple)
        if self.scan and not apart:
            if caches is not None:
                raise ValueError("a KV cache needs the loop: build the stack with scan=False")
            block = nn.remat(self.block, prevent_cse=False, policy=policy) if self.remat else self.block
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # type: ignore  # its stub knows integers only
                length=self.depth,
            )(self.cfg, name="layers")
            return layers(x, None, *shared)
        block = nn.remat(self.block, policy=policy) if self.remat else self.block
        params, out = self.variables["params"]["layers"], []
        for i in range(self.depth):
            layer = params[i] if apart else jax.tree.map(lambda a: a[i], params)  # noqa: B023 - used at once
            x, cache = block(self.cfg).apply({"params": layer}, x, caches[i] if caches is not None else None, *shared)
            out.append(cache)
        return x, tuple(out) if caches is not None else None


def unstack(params: dict) -> dict:
    """The same parameters with every stack of layers as a list of layers. A loop over a stack copies each layer out of
    it, at every call: several times the time of a decoding step."""
    out = {}
    for key, value in params.items():
        if key == "layers" and isinstance(value, dict):
            depth = len(jax.tree.leaves(value)[0])
            out[key] = [jax.tree.map(lambda a: a[i], value) for i in range(depth)]  # noqa: B023 - used at once
        else:
            out[key] = unstack(value) if isinstance(value, dict) else value
    return out
