"""Next token, DCL divergence and the image-name term; the first two also without ever holding the logits.

Axes: B batch, L sequence, V vocabulary, C rows of it at a time, D decoder width, K things, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Bool, Float, Int

Weights = Bool[Array, "..."] | Float[Array, "..."]


def unit(features: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Features of root mean square 1, as a decoder's layers and its head see them."""
    return features * jax.lax.rsqrt((features * features).mean(-1, keepdims=True) + 1e-6)


def mean_where(values: Float[Array, "..."], weights: Weights, total: Array | None = None) -> Float[Array, ""]:
    """Mean of `values` by `weights` (a mask weighs alike what it shows); 0 where nothing weighs. With the `total`
    weight of a larger batch, what these values add to its mean."""
    w = weights.astype(jnp.float32)
    return jnp.where(w > 0, values * w, 0).sum() / jnp.maximum(w.sum() if total is None else total, 1e-9)


def shift(ids: Int[Array, "B L"], loss: Bool[Array, "B L"]) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """What each position has to predict, and whether that counts. An answer is always continued by its own next token,
    so the next index is the next token also where several questions share a row."""
    return jnp.roll(ids, -1, 1), jnp.roll(loss, -1, 1).at[:, -1].set(False)


def answer_weights(mask: Bool[Array, "B L"], segments: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """1 / length of its answer at each supervised position, so that every answer weighs alike: a point is six tokens of
    which most are noise, a name two."""
    same = mask[:, None] & (segments[:, None] == segments[:, :, None])
    return jnp.where(mask, 1 / jnp.maximum(same.sum(-1), 1), 0.0)


def cross_entropy(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """-log softmax(logits)[target], nats, f32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - picked


def dcl_kl(
    teacher: Float[Array, "B L V"], student: Float[Array, "B L V"], weights: Weights, temperature: float,
    total: Array | None = None,
) -> Float[Array, ""]:  # fmt: skip
    """tau^2 mean by `weights` over answer positions of KL(softmax(teacher / tau) || softmax(student / tau)), without
    gradient into the teacher (HyperVL 3.3; Hinton et al. for tau^2)."""
    t = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature)
    s = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return temperature**2 * mean_where((jnp.exp(t) * (t - s)).sum(-1), weights, total)


def pool_cells(weights: Float[Array, "B K F"], side: int, merge: int) -> Float[Array, "B K G"]:
    """Shares of patches, `side` x `side` a tile, as shares of the tokens they are folded into."""
    return reduce(weights, "b k (n r p c q) -> b k (n r c)", "sum", r=side // merge, p=merge, c=side // merge, q=merge)


def name_loss(
    features: Float[Array, "B F D"],
    weights: Float[Array, "B K F"],
    names: Int[Array, "B K *S"],
    table: Float[Array, "N D"],
    total: Array | None = None,
) -> Float[Array, ""]:
    """Image-name term: the features of each thing's patches (or tokens), pooled with `weights`, must pick its name out
    of a table of one vector a name; of S synonyms each, alike. `names` is -1 where there is none. Keeps a small model
    off the language prior."""
    pooled = jnp.einsum("bkf,bfd->bkd", weights, features)
    logits = jnp.einsum("bkd,cd->bkc", pooled, table)
    if names.ndim == 3:
        logits = jnp.broadcast_to(logits[:, :, None], (*names.shape, len(table)))
    return mean_where(cross_entropy(logits, jnp.maximum(names, 0)), names >= 0, total)


def cell_loss(
    features: Float[Array, "B F D"], real: Bool[Array, "B F"], table: Float[Array, "T D"], total: Array | None = None
) -> Float[Array, ""]:
    """Every real token must say which of the T cells of its tile it is: what a decoder has to know to tell places. A
    tile's tokens follow one another, so the cell of token f is f modulo T."""
    cells = jnp.arange(features.shape[1]) % len(table)
    logits = jnp.einsum("bfd,td->bft", features, table)
    return mean_where(cross_entropy(logits, jnp.broadcast_to(cells, real.shape)), real, total)


# --- without the logits ----------------------------------------------------------------------------------------------
#
# Of D numbers a position the head makes V, some 150,000: of all tensors of a step the largest, several times over. Here
# a block of rows of the head at a time: what a softmax needs of the others is two numbers a position (Milakov and
# Gimelshein 2018). The gradient makes each block anew, and writes its rows of the head's own gradient once.


class _Block(NamedTuple):
    at: Array  # i32[], its first row
    rows: Array  # [C D]
    fresh: Array  # bool[C]: the last block begins early, so that all are of one size


def _block(head: Float[Array, "V D"], size: int, i: Array) -> _Block:
    at = jnp.minimum(i * size, len(head) - size)
    return _Block(at, jax.lax.dynamic_slice_in_dim(head, at, size), at + jnp.arange(size) >= i * size)


def _over(head: Float[Array, "V D"], chunk: int, step: Callable[[_Block, Any], Any], start: Any) -> Any:
    """`step` over all blocks of at most `chunk` rows."""
    size = min(chunk, len(head))
    blocks = -(-len(head) // size)
    return jax.lax.fori_loop(0, blocks, lambda i, carry: step(_block(head, size, i), carry), start)


def _scores(hidden: Float[Array, "B L D"], rows: Float[Array, "C D"]) -> Float[Array, "B L C"]:
    return jnp.einsum("bld,cd->blc", hidden, rows.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _pull(
    gap: Float[Array, "B L C"], hidden: Float[Array, "B L D"], block: _Block, grads: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Gradients of hidden states (f32) and head, with those of one block's logits."""
    to_hidden, to_head = grads
    gap = gap.astype(hidden.dtype)
    rows = block.rows.astype(hidden.dtype)
    to_hidden += jnp.einsum("blc,cd->bld", gap, rows, preferred_element_type=jnp.float32)
    rows = jnp.einsum("blc,bld->cd", gap, hidden, preferred_element_type=jnp.float32)
    rows += jax.lax.dynamic_slice_in_dim(to_head, block.at, len(rows))  # 0 but where the block before has been
    return to_hidden, jax.lax.dynamic_update_slice_in_dim(to_head, rows.astype(to_head.dtype), block.at, 0)


def _grow(x: Float[Array, "B L C"], top: Array, total: Array) -> tuple[Array, Array, Array]:
    """Running maximum and sum of exponentials below it, and by how much what was summed before shrinks."""
    new = jnp.maximum(top, x.max(-1))
    shrink = jnp.exp(top - new)
    return new, total * shrink + jnp.exp(x - new[..., None]).sum(-1), shrink


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def chunked_cross_entropy(
    hidden: Float[Array, "B L D"], head: Float[Array, "V D"], targets: Int[Array, "B L"], chunk: int
) -> Float[Array, "B L"]:
    """`cross_entropy` of `hidden` through `head`, `chunk` rows of the vocabulary at a time. Products are in the dtype
    of `hidden`, sums in f32, the gradient of the head in its own dtype. NaN for a target that is no row of the head."""
    return _cross_entropy(hidden, head, targets, chunk)[0]


def _cross_entropy(hidden, head, targets, chunk):
    def step(block: _Block, carry):
        top, total, picked = carry
        x = jnp.where(block.fresh, _scores(hidden, block.rows), -jnp.inf)
        top, total, _ = _grow(x, top, total)
        inside = targets - block.at
        mine = jnp.take_along_axis(x, jnp.clip(inside, 0, x.shape[-1] - 1)[..., None], -1)[..., 0]
        return top, total, jnp.where((inside >= 0) & (inside < x.shape[-1]) & (mine > -jnp.inf), mine, picked)

    zero = jnp.zeros(targets.shape, jnp.float32)
    top, total, picked = _over(head, chunk, step, (zero - jnp.inf, zero, zero + jnp.nan))
    normaliser = top + jnp.log(total)
    return normaliser - picked, (hidden, head, targets, normaliser)


def _cross_entropy_back(chunk, kept, pull):
    hidden, head, targets, normaliser = kept

    def step(block: _Block, grads):
        p = jnp.exp(_scores(hidden, block.rows) - normaliser[..., None])
        hit = targets[..., None] == block.at + jnp.arange(p.shape[-1])
        return _pull(jnp.where(block.fresh, (p - hit) * pull[..., None], 0), hidden, block, grads)

    to_hidden, to_head = _over(head, chunk, step, (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(head)))
    return to_hidden.astype(hidden.dtype), to_head, None


chunked_cross_entropy.defvjp(_cross_entropy, _cross_entropy_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _divergence(teacher, student, head, temperature, chunk):
    return _divergence_kept(teacher, student, head, temperature, chunk)[0]


def _divergence_kept(teacher, student, head, temperature, chunk):
    def step(block: _Block, carry):
        top_t, total_t, mean, top_s, total_s = carry
        t, s = (
            jnp.where(block.fresh, _scores(hidden, block.rows) / temperature, -jnp.inf) for hidden in (teacher, student)
        )
        top_t, total_t, shrink = _grow(t, top_t, total_t)
        top_s, total_s, _ = _grow(s, top_s, total_s)
        gap = jnp.where(block.fresh, t - s, 0)
        return top_t, total_t, mean * shrink + (jnp.exp(t - top_t[..., None]) * gap).sum(-1), top_s, total_s

    zero = jnp.zeros(student.shape[:-1], jnp.float32)
    top_t, total_t, mean, top_s, total_s = _over(head, chunk, step, (zero - jnp.inf, zero, zero, zero - jnp.inf, zero))
    # Differences of what is alike before sums of it: that is where the digits of a small divergence are.
    kl = mean / total_t - (top_t - top_s) - jnp.log(total_t / total_s)
    return kl, (teacher, student, head, top_t + jnp.log(total_t), top_s + jnp.log(total_s))


def _divergence_back(temperature, chunk, kept, pull):
    teacher, student, head, norm_t, norm_s = kept

    def step(block: _Block, grads):
        p, q = (
            jnp.exp(_scores(hidden, block.rows) / temperature - norm[..., None])
            for hidden, norm in ((teacher, norm_t), (student, norm_s))
        )
        gap = jnp.where(block.fresh, (q - p) * (pull / temperature)[..., None], 0)
        return _pull(gap, student, block, grads)

    to_student, to_head = _over(head, chunk, step, (jnp.zeros(student.shape, jnp.float32), jnp.zeros_like(head)))
    return jnp.zeros_like(teacher), to_student.astype(student.dtype), to_head


_divergence.defvjp(_divergence_kept, _divergence_back)


def chunked_dcl_kl(
    teacher: Float[Array, "B L D"], student: Float[Array, "B L D"], head: Float[Array, "V D"], weights: Weights,
    temperature: float, chunk: int, total: Array | None = None,
) -> Float[Array, ""]:  # fmt: skip
    """`dcl_kl` of hidden states through the head they share, `chunk` rows of the vocabulary at a time."""
    kl = cast(Array, _divergence(jax.lax.stop_gradient(teacher), student, head, temperature, chunk))
    return temperature**2 * mean_where(kl, weights, total)
