"""What the encoder and the decoder share: a linear layer, two norms, and one block under two drivers.

Axes: B batch, L sequence, S keys, H heads, K kv heads, D width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Linear(nn.Module):
    """y = x W^T + b with W stored [out, in], the layout of published checkpoints and of one TFLite FULLY_CONNECTED."""

    features: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2)
        weight = self.param("weight", init, (self.features, x.shape[-1]))
        # Rows flattened: XLA's CPU backend runs the plain matrix product, and above all its gradient, twice as fast.
        y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), weight, (((1,), (1,)), ((), ())))
        y = y.reshape(*x.shape[:-1], self.features)
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


class Stack(nn.Module):
    """`depth` blocks over one stacked parameter tree: `nn.scan` to train, a loop to export and decode, remat in both.

    A block maps (x, cache, *shared) -> (x, cache). The loop takes and returns a tuple of one cache a layer; the scan
    has none.
    """

    block: type[nn.Module]
    cfg: Any
    depth: int
    scan: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, caches: tuple | None, *shared: Any) -> tuple[Array, tuple | None]:
        if self.scan:
            if caches is not None:
                raise ValueError("a KV cache needs the loop: build the stack with scan=False")
            block = nn.remat(self.block, prevent_cse=False) if self.remat else self.block
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # type: ignore  # its stub knows integers only
                length=self.depth,
            )(self.cfg, name="layers")
            return layers(x, None, *shared)
        block = nn.remat(self.block) if self.remat else self.block
        params, out = self.variables["params"]["layers"], []
        for i in range(self.depth):
            layer = {"params": jax.tree.map(lambda a: a[i], params)}  # noqa: B023 - used at once
            x, cache = block(self.cfg).apply(layer, x, caches[i] if caches is not None else None, *shared)
            out.append(cache)
        return x, tuple(out) if caches is not None else None
