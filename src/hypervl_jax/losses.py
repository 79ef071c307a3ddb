"""Next token, DCL divergence and the image-name term. Axes: B batch, L sequence, V vocabulary, K things, F features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Bool, Float, Int


def mean_where(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Mean of `values` where `mask`; 0 where it is empty."""
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)


def shift(ids: Int[Array, "B L"], loss: Bool[Array, "B L"]) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """What each position has to predict, and whether that counts. An answer is always continued by its own next token,
    so the next index is the next token also where several questions share a row."""
    return jnp.roll(ids, -1, 1), jnp.roll(loss, -1, 1).at[:, -1].set(False)


def cross_entropy(logits: Float[Array, "B L V"], targets: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """-log softmax(logits)[target], nats, f32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - picked


def dcl_kl(
    teacher: Float[Array, "B L V"], student: Float[Array, "B L V"], mask: Bool[Array, "B L"], temperature: float
) -> Float[Array, ""]:
    """tau^2 mean over answer positions of KL(softmax(teacher / tau) || softmax(student / tau)), no gradient into the
    teacher (HyperVL 3.3; Hinton et al. for tau^2)."""
    t = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature)
    s = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return temperature**2 * mean_where((jnp.exp(t) * (t - s)).sum(-1), mask)


def pool_cells(weights: Float[Array, "B K N*P"], side: int, merge: int) -> Float[Array, "B K N*M"]:
    """Shares of patches, `side` x `side` a tile, as shares of the tokens they are folded into."""
    return reduce(weights, "b k (n r p c q) -> b k (n r c)", "sum", r=side // merge, p=merge, c=side // merge, q=merge)


def name_loss(
    features: Float[Array, "B F D"],
    weights: Float[Array, "B K F"],
    names: Int[Array, "B K"],
    table: Float[Array, "C D"],
) -> Float[Array, ""]:
    """Image-name term: the features of each thing's patches (or tokens), pooled with `weights`, must pick its name out
    of a table of one vector a name. `names` is -1 where there is none. Keeps a small model off the language prior."""
    pooled = jnp.einsum("bkf,bfd->bkd", weights, features)
    return mean_where(cross_entropy(jnp.einsum("bkd,cd->bkc", pooled, table), jnp.maximum(names, 0)), names >= 0)
