"""Losses against float64 numpy; what has gradient and what has none; which positions count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import bench, losses

B, L, V = 2, 6, 11
RNG = np.random.default_rng(0)
TEACHER, STUDENT = (jnp.asarray(3 * RNG.normal(size=(B, L, V)), jnp.float32) for _ in range(2))
TARGETS = jnp.asarray(RNG.integers(0, V, (B, L)))
MASK = jnp.asarray(RNG.random((B, L)) < 0.5).at[0, 0].set(False).at[1, 3].set(True)


def log_softmax(x):
    x = np.float64(x)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def kl(teacher, student, weights, tau):
    t, s = log_softmax(teacher / tau), log_softmax(student / tau)
    return tau**2 * np.average((np.exp(t) * (t - s)).sum(-1), weights=np.float64(weights))


# --- next token ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_cross_entropy_is_the_oracles(scale):
    want = -np.take_along_axis(log_softmax(np.float64(STUDENT) * scale), np.asarray(TARGETS)[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.cross_entropy(STUDENT * scale, TARGETS), want, rtol=1e-5, atol=1e-5)


def test_half_precision_logits_are_summed_in_full():
    half = STUDENT.astype(jnp.bfloat16)
    got = losses.cross_entropy(half, TARGETS)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, losses.cross_entropy(half.astype(jnp.float32), TARGETS), rtol=1e-6)


def test_means_count_only_what_the_mask_shows():
    values = jnp.arange(6.0).reshape(2, 3)
    mask = jnp.array([[True, False, True], [False, False, True]])
    assert losses.mean_where(values, mask) == pytest.approx((0 + 2 + 5) / 3)
    poisoned = jnp.where(mask, values, jnp.nan)
    assert losses.mean_where(poisoned, mask) == pytest.approx(7 / 3)
    assert losses.mean_where(values, jnp.zeros_like(mask)) == 0
    assert not jax.grad(lambda v: losses.mean_where(v, jnp.zeros_like(mask)))(values).any()


def test_means_are_weighted_as_asked():
    values, weights = jnp.array([1.0, 2.0, jnp.nan]), jnp.array([0.5, 1.5, 0.0])
    assert losses.mean_where(values, weights) == pytest.approx((0.5 + 3.0) / 2)
    np.testing.assert_allclose(jax.grad(losses.mean_where)(values, weights), [0.25, 0.75, 0])


def test_every_answer_of_a_row_weighs_alike():
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, -1, -1, -1]])
    mask = jnp.array([[0, 0, 0, 1, 1, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1, 0, 0, 0]], bool)
    want = [[0, 0, 0, 1 / 2, 1 / 2, 0, 0, 0, 1], [0, 0, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 0, 0, 0]]
    np.testing.assert_allclose(losses.answer_weights(mask, segments), want)


def test_each_position_predicts_the_next_token_of_its_answer():
    ids = jnp.array([[4, 5, 6, 7, 8]])
    targets, counts = losses.shift(ids, jnp.array([[True, False, True, True, False]]))
    assert targets[0, :-1].tolist() == [5, 6, 7, 8]
    assert counts[0].tolist() == [False, True, True, False, False]  # the first token is predicted by nobody


def test_supervised_positions_of_a_real_batch_spell_the_answers(tiny_batches, tiny_tokenizer, tiny_source):
    answers = {q.answer for s in tiny_source.records for q in s.questions}
    for batch in tiny_batches:
        targets, counts = losses.shift(jnp.asarray(batch.ids), jnp.asarray(batch.loss))
        assert int(counts.sum()) == batch.loss.sum() > 0
        for row, counted in zip(np.asarray(targets), np.asarray(counts), strict=True):
            said = tiny_tokenizer.decode(row[counted]).split("<|im_end|>")
            assert said.pop() == ""
            assert set(said) <= answers


# --- consistency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 8.0])
def test_divergence_is_the_oracles(tau):
    got = losses.dcl_kl(TEACHER, STUDENT, MASK, tau)
    assert got == pytest.approx(kl(np.float64(TEACHER), np.float64(STUDENT), MASK, tau), rel=1e-5)
    weights = jnp.where(MASK, 1 + jnp.arange(L) / L, 0)
    got = losses.dcl_kl(TEACHER, STUDENT, weights, tau)
    assert got == pytest.approx(kl(np.float64(TEACHER), np.float64(STUDENT), weights, tau), rel=1e-5)
    assert losses.dcl_kl(TEACHER, TEACHER, MASK, tau) == pytest.approx(0, abs=1e-6)


def test_the_teacher_gets_no_gradient_and_the_student_the_oracles():
    tau = 2.0
    teacher, student = jax.grad(losses.dcl_kl, argnums=(0, 1))(TEACHER, STUDENT, MASK, tau)
    assert not np.asarray(teacher).any()
    gap = np.exp(log_softmax(np.float64(STUDENT) / tau)) - np.exp(log_softmax(np.float64(TEACHER) / tau))
    want = tau * np.where(MASK[..., None], gap, 0) / MASK.sum()
    np.testing.assert_allclose(student, want, rtol=1e-5, atol=1e-6)


def test_only_answer_positions_count_in_the_divergence():
    other = jnp.where(MASK[..., None], STUDENT, -5 * STUDENT + 1)
    assert losses.dcl_kl(TEACHER, other, MASK, 2.0) == losses.dcl_kl(TEACHER, STUDENT, MASK, 2.0)
    assert losses.dcl_kl(other, STUDENT, ~MASK, 2.0) != losses.dcl_kl(STUDENT, STUDENT, ~MASK, 2.0)


# --- image-name term -------------------------------------------------------------------------------------------------


def test_name_term_is_the_oracles_and_skips_what_is_not_there():
    features, weights, table = (
        jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in [(B, 5, 7), (B, 3, 5), (4, 7)]
    )
    names = jnp.array([[2, -1, 0], [-1, 3, -1]])
    logits = np.float64(weights) @ np.float64(features) @ np.float64(table).T
    picked = [-log_softmax(logits)[b, k, names[b, k]] for b in range(B) for k in range(3) if names[b, k] >= 0]
    got = losses.name_loss(features, weights, names, table)
    assert got == pytest.approx(np.mean(picked), rel=1e-5)
    assert losses.name_loss(features, weights.at[0, 1].add(9.0), names, table) == got
    assert losses.name_loss(features, weights, jnp.full_like(names, -1), table) == 0
    other = jnp.where(names >= 0, (names + 1) % len(table), -1)
    both = losses.name_loss(features, weights, jnp.stack([names, other], -1), table)
    apart = [losses.name_loss(features, weights, n, table) for n in (names, other)]
    assert both == pytest.approx(float(sum(apart)) / 2, rel=1e-6)  # synonyms weigh alike


def test_shares_of_patches_become_shares_of_their_tokens():
    """Two tiles of 4 x 4 patches, folded 2 x 2 as the pixel shuffle folds them."""
    weights = RNG.random((1, 2, 32))
    grid = weights.reshape(1, 2, 2, 2, 2, 2, 2)  # ..., tile, row of tokens, row inside, column, column inside
    want = grid.sum((-1, -3)).reshape(1, 2, 8)
    np.testing.assert_allclose(losses.pool_cells(jnp.asarray(weights, jnp.float32), 4, 2), want, rtol=1e-5)


def test_cells_are_told_apart_by_their_place_in_the_tile():
    """Two tiles of four cells; the last token of the second is padding and may say anything."""
    table = 10 * jnp.eye(4)
    tokens = jnp.tile(jnp.eye(4), (1, 2, 1)).at[0, 7].set(jnp.array([9.0, 0, 0, 0]))
    real = jnp.arange(8)[None] < 7
    assert losses.cell_loss(tokens, real, table) < 1e-3
    assert losses.cell_loss(tokens, jnp.ones_like(real), table) > 1
    assert losses.cell_loss(tokens[:, ::-1], real, table) > 1


# --- without the logits ----------------------------------------------------------------------------------------------

D = 7
HEAD = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
SEEN, OTHER = (jnp.asarray(RNG.normal(size=(B, L, D)) / 2, jnp.float32) for _ in range(2))  # logits of about one
PULL = jnp.asarray(RNG.normal(size=(B, L)), jnp.float32)


def logits(hidden, head):
    return jnp.einsum("bld,vd->blv", hidden, head)


def agree(got, want, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max()))


@pytest.mark.parametrize("chunk", [1, 4, 100])  # of 11: alone, with an overlap, more than there are
def test_chunked_cross_entropy_and_its_gradients_are_the_plain_ones(chunk):
    def plain(hidden, head):
        return losses.cross_entropy(logits(hidden, head), TARGETS)

    def chunked(hidden, head):
        return losses.chunked_cross_entropy(hidden, head, TARGETS, chunk)

    agree(jax.jit(chunked)(SEEN, HEAD), plain(SEEN, HEAD))
    agree(jax.vjp(chunked, SEEN, HEAD)[1](PULL), jax.vjp(plain, SEEN, HEAD)[1](PULL))


@pytest.mark.parametrize("chunk", [4, 11])
@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_chunked_divergence_and_its_gradients_are_the_plain_ones(chunk, tau):
    weights = jnp.where(MASK, 1 + jnp.arange(L) / L, 0)

    def plain(teacher, student, head):
        return losses.dcl_kl(logits(teacher, head), logits(student, head), weights, tau)

    def chunked(teacher, student, head):
        return losses.chunked_dcl_kl(teacher, student, head, weights, tau, chunk)

    got = jax.value_and_grad(chunked, argnums=(0, 1, 2))(SEEN, OTHER, HEAD)
    agree(got, jax.value_and_grad(plain, argnums=(0, 1, 2))(SEEN, OTHER, HEAD))
    assert not np.asarray(got[1][0]).any()  # the teacher's
    assert abs(float(chunked(SEEN, SEEN, HEAD))) < 1e-6


@pytest.mark.parametrize("far", [-300.0, 300.0])
def test_logits_far_from_zero_neither_overflow_nor_vanish(far):
    """The oracle is in float64: so far out f32 logits are themselves rounded to 1e-5 or so."""
    head = jnp.concatenate([HEAD, jnp.full((V, 1), far)], 1)
    seen, other = (jnp.concatenate([h, jnp.ones((B, L, 1))], -1) for h in (SEEN, OTHER))
    t, s = (np.einsum("bld,vd->blv", np.float64(h), np.float64(head)) for h in (seen, other))
    want = -np.take_along_axis(log_softmax(s), np.asarray(TARGETS)[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.chunked_cross_entropy(other, head, TARGETS, 4), want, atol=2e-4)
    got = losses.chunked_dcl_kl(seen, other, head, MASK, 2.0, 4)
    assert float(got) == pytest.approx(kl(t, s, MASK, 2.0), abs=2e-4)


def test_narrow_hidden_states_are_summed_in_full():
    seen, head = SEEN.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16).astype(jnp.float32)
    want = losses.cross_entropy(logits(seen.astype(jnp.float32), head), TARGETS)
    got, back = jax.vjp(lambda h, w: losses.chunked_cross_entropy(h, w, TARGETS, 4), seen, head)
    assert got.dtype == jnp.float32
    agree(got, want, 1e-5)
    assert [g.dtype for g in back(PULL)] == [jnp.bfloat16, jnp.float32]


def test_a_target_beyond_the_vocabulary_is_no_loss_at_all():
    """Silently taking it for any other would train on."""
    beyond = TARGETS.at[0, 2].set(V).at[1, 0].set(V + 100)
    plain = losses.cross_entropy(logits(SEEN, HEAD), beyond)
    chunked = losses.chunked_cross_entropy(SEEN, HEAD, beyond, 4)
    np.testing.assert_array_equal(np.isnan(chunked), beyond >= V)
    np.testing.assert_array_equal(np.isnan(plain), beyond >= V)


def test_rows_without_a_weight_have_no_loss_and_no_gradient():
    """All of them, and some: what stands there may not even be a number."""
    weights = jnp.ones((B, L)).at[0].set(0)
    odd = SEEN.at[0].set(jnp.inf)

    def loss(hidden, head, weights):
        nats = losses.chunked_cross_entropy(hidden, head, TARGETS, 4)
        return losses.mean_where(nats, weights) + losses.chunked_dcl_kl(OTHER, hidden, head, weights, 2.0, 4)

    assert loss(SEEN, HEAD, 0 * weights) == 0
    for grad in jax.grad(loss, argnums=(0, 1))(SEEN, HEAD, 0 * weights):
        assert not np.asarray(grad).any()
    assert loss(SEEN, HEAD, weights) == loss(SEEN.at[0].multiply(3), HEAD, weights)
    assert float(loss(odd, HEAD, weights)) == pytest.approx(float(loss(SEEN, HEAD, weights)))


def test_the_logits_never_exist_whole():
    """Nor anything else of their size: the largest tensor of value and gradients is the head."""

    def everything(hidden, other, head, targets):
        ce = losses.chunked_cross_entropy(hidden, head, targets, 16).sum()
        return ce + losses.chunked_dcl_kl(other, hidden, head, jnp.ones(targets.shape), 2.0, 16)

    def plain(hidden, other, head, targets):
        said = logits(hidden, head)
        return losses.cross_entropy(said, targets).sum() + losses.dcl_kl(logits(other, head), said, targets >= 0, 2.0)

    whole, shapes = 64 * 512 * 4, [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 64, 8), (1, 64, 8), (512, 8))]
    shapes.append(jax.ShapeDtypeStruct((1, 64), jnp.int32))
    chunked, all_at_once = (bench.temporary_bytes(jax.grad(f, argnums=(0, 2)), *shapes) for f in (everything, plain))
    assert chunked < whole // 2
    assert all_at_once > whole
