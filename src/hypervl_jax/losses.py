"""Next token, DCL divergence and the image-name term. Axes: B batch, L sequence, V vocabulary, K things, F features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Bool, Float, Int

Weights = Bool[Array, "..."] | Float[Array, "..."]


def mean_where(values: Float[Array, "..."], weights: Weights) -> Float[Array, ""]:
    """Mean of `values` by `weights` (a mask weighs alike what it shows); 0 where nothing weighs."""
    w = weights.astype(jnp.float32)
    return jnp.where(w > 0, values * w, 0).sum() / jnp.maximum(w.sum(), 1e-9)


def shift(ids: Int[Array, "B L"], loss: Bool[Array, "B L"]) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """What each position has to predict, and whether that counts. An answer is always continued by its own next token,
    so the next index is the next token also where several questions share a row."""
    return jnp.roll(ids, -1, 1), jnp.roll(loss, -1, 1).at[:, -1].set(False)


def answer_weights(mask: Bool[Array, "B L"], segments: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """1 / length of its answer at each supervised position, so that every answer weighs alike: a point is six tokens of
    which most are noise, a name two."""
    same = mask[:, None] & (segments[:, None] == segments[:, :, None])
    return jnp.where(mask, 1 / jnp.maximum(same.sum(-1), 1), 0.0)


def cross_entropy(logits: Float[Array, "B L V"], targets: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """-log softmax(logits)[target], nats, f32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - picked


def dcl_kl(
    teacher: Float[Array, "B L V"], student: Float[Array, "B L V"], weights: Weights, temperature: float
) -> Float[Array, ""]:
    """tau^2 mean by `weights` over answer positions of KL(softmax(teacher / tau) || softmax(student / tau)), without
    gradient into the teacher (HyperVL 3.3; Hinton et al. for tau^2)."""
    t = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature)
    s = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return temperature**2 * mean_where((jnp.exp(t) * (t - s)).sum(-1), weights)


def pool_cells(weights: Float[Array, "B K F"], side: int, merge: int) -> Float[Array, "B K G"]:
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


def cell_loss(
    features: Float[Array, "B F D"], real: Bool[Array, "B F"], table: Float[Array, "T D"]
) -> Float[Array, ""]:
    """Every real token must say which of the T cells of its tile it is: what a decoder has to know to tell places. A
    tile's tokens follow one another, so the cell of token f is f modulo T."""
    cells = jnp.arange(features.shape[1]) % len(table)
    logits = jnp.einsum("bfd,td->bft", features, table)
    return mean_where(cross_entropy(logits, jnp.broadcast_to(cells, real.shape)), real)
