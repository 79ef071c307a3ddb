"""Linear, norms and attention against float64 numpy; one stack under two drivers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import account
from hypervl_jax.config import VitConfig
from hypervl_jax.model import layers, llm, vit

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_linear_stores_out_in_as_published_checkpoints_do():
    x, w, b = normal(2, 3, 5), normal(4, 5), normal(4)
    got = layers.Linear(4).apply({"params": {"weight": w, "bias": b}}, x)
    np.testing.assert_allclose(got, np.float64(x) @ np.float64(w).T + b, rtol=1e-5, atol=1e-5)
    bare = layers.Linear(4, bias=False)
    assert set(bare.init(jax.random.key(0), x)["params"]) == {"weight"}
    np.testing.assert_allclose(bare.apply({"params": {"weight": w}}, x), got - b, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_norms_are_those_of_the_textbook(offset):
    x, w, b = normal(3, 16) + offset, normal(16), normal(16)
    x64 = np.float64(x)
    centred = x64 - x64.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w + b
    got = layers.LayerNorm(1e-6).apply({"params": {"weight": w, "bias": b}}, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    want = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * w
    np.testing.assert_allclose(layers.RMSNorm(1e-6).apply({"params": {"weight": w}}, x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", [layers.attention, layers.cpu_attention])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_shares_key_heads_among_neighbouring_queries(kv_heads, rows, attention):
    """The oracle repeats every key head for its group, query by query; a row may see any subset."""
    q, k, v = normal(2, 4, rows, 8), normal(2, kv_heads, 7, 8), normal(2, kv_heads, 7, 8)
    mask = (RNG.random((2, rows, 7)) < 0.6) | (np.arange(7) == 0)
    scores = np.float64(q) @ np.repeat(k, 4 // kv_heads, 1).swapaxes(2, 3) / np.sqrt(8)
    probs = np.where(mask[:, None], np.exp(scores), 0)
    want = probs / probs.sum(-1, keepdims=True) @ np.repeat(v, 4 // kv_heads, 1)
    np.testing.assert_allclose(attention(q, k, v, jnp.asarray(mask)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("block", [(512, 256), (4, 5), (1, 1)])  # rows, keys: all at once, a few, one by one
def test_attention_a_block_at_a_time_is_attention(kv_heads, block, monkeypatch):
    for name, value in zip(("_SCORES", "_ROWS", "_KEYS"), (0, *block), strict=True):
        monkeypatch.setattr(layers, name, value)
    q, k, v = normal(1, 4, 11, 8), normal(1, kv_heads, 13, 8), normal(1, kv_heads, 13, 8)
    causal = (np.arange(13) <= np.arange(11)[:, None])[None]
    for mask in ((RNG.random((1, 11, 13)) < 0.6) | (np.arange(13) == 0), np.arange(13)[None, None] < 9, causal):
        args = q, k, v, jnp.asarray(mask)
        np.testing.assert_allclose(layers.cpu_attention(*args), layers.attention(*args), rtol=1e-5, atol=1e-6)


def test_attention_a_block_at_a_time_does_not_touch_room_kept_for_later(monkeypatch):
    """A cache is longer than what was read so far. What lies there is not even multiplied by zero."""
    for name, value in {"_SCORES": 0, "_ROWS": 4, "_KEYS": 2}.items():
        monkeypatch.setattr(layers, name, value)
    q, k, v = normal(1, 4, 11, 8), normal(1, 2, 32, 8), normal(1, 2, 32, 8)
    mask = jnp.asarray(np.arange(32) <= np.arange(11)[:, None])[None]
    want = layers.attention(q, k, v, mask)
    k, v = (a.at[:, :, 12:].set(jnp.nan) for a in map(jnp.asarray, (k, v)))
    np.testing.assert_allclose(layers.cpu_attention(q, k, v, mask), want, rtol=1e-5, atol=1e-6)


def test_hidden_keys_have_no_effect_and_a_row_that_sees_nothing_stays_finite():
    q, k, v = normal(1, 4, 3, 8), normal(1, 2, 6, 8), normal(1, 2, 6, 8)
    mask = jnp.broadcast_to(jnp.arange(6) < 4, (1, 3, 6)).at[:, 2].set(False)
    other_k, other_v = (x.at[:, :, 4:].multiply(-1e3) for x in (k, v))
    a, b = layers.attention(q, k, v, mask), layers.attention(q, other_k, other_v, mask)
    np.testing.assert_array_equal(a[:, :, :2], b[:, :, :2])
    assert np.isfinite(b).all()


@pytest.fixture(scope="module")
def stack():
    """(module maker, parameters, input) of two small blocks."""
    cfg = VitConfig(width=8, depth=2, heads=2, mlp=16)

    def make(**drive):
        return layers.Stack(vit.Block, cfg, cfg.depth, **drive)

    x, mask = normal(2, 4, 8), jnp.ones((2, 1, 4), bool)
    params = jax.jit(make().init)(jax.random.key(0), x, None, mask)
    return make, params, (x, None, mask)


def test_scan_equals_loop_and_remat_forward_and_backward(stack):
    make, params, args = stack

    def value_and_grad(**drive):
        return jax.jit(jax.value_and_grad(lambda p: (make(**drive).apply(p, *args)[0] ** 2).sum()))(params)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))

    want = value_and_grad(scan=True)
    kept = {"remat": "dots_saveable"}
    for drive in ({"scan": False}, {"remat": True}, {"scan": False, "remat": True}, kept):
        jax.tree.map(close, value_and_grad(**drive), want)


@pytest.mark.parametrize("scan", [True, False])
def test_remat_is_in_the_gradient_of_both_drivers(stack, scan):
    make, params, args = stack
    for remat in (True, False):
        value = make(scan=scan, remat=remat).apply
        program = jax.make_jaxpr(jax.grad(lambda p, f=value: f(p, *args)[0].sum()))(params)
        assert ("remat" in str(program)) == remat


@pytest.mark.parametrize("scan", [True, False])
def test_a_policy_says_which_products_are_computed_anew(stack, scan):
    make, params, args = stack

    def products(**drive):
        value = make(scan=scan, **drive).apply
        return str(jax.make_jaxpr(jax.grad(lambda p: value(p, *args)[0].sum()))(params)).count("dot_general")

    nothing, dots, plain = products(remat="nothing_saveable"), products(remat="dots_saveable"), products()
    assert nothing == products(remat=True)
    assert plain == dots < nothing


def test_the_loop_leaves_no_while_in_the_program(stack):
    make, params, args = stack
    programs = [jax.jit(make(scan=s).apply).lower(params, *args).as_text() for s in (True, False)]
    assert ["while" in p for p in programs] == [True, False]


def test_layers_of_a_stack_start_different(stack):
    _, params, _ = stack
    weight = params["params"]["layers"]["q"]["weight"]
    assert weight.shape == (2, 8, 8)
    assert np.abs(weight[0] - weight[1]).max() > 0.01


def test_a_cache_needs_the_loop(stack):
    make, params, (x, _, mask) = stack
    with pytest.raises(ValueError, match="scan=False"):
        make().apply(params, x, (None,) * 2, mask)


# --- attention of a row in blocks ------------------------------------------------------------------------------------


def row(length, heads=(4, 2), d=8, rows=2, seed=0):
    """Queries, keys, values, and segments: a shared prefix, two that follow, padding."""
    shapes = ((rows, heads[0], length, d), *[(rows, heads[1], length, d)] * 2)
    q, k, v = (
        jax.random.normal(key, s) for key, s in zip(jax.random.split(jax.random.key(seed), 3), shapes, strict=True)
    )
    cuts = np.sort(np.random.default_rng(seed).integers(0, length + 1, (rows, 3)), 1)
    segments = (np.arange(length) >= cuts[:, :2, None]).sum(1)
    return q, k, v, jnp.asarray(np.where(np.arange(length) >= np.maximum(cuts[:, 2:], 1), -1, segments), jnp.int32)


@pytest.mark.parametrize(
    ("length", "size", "heads"), [(24, 8, (4, 2)), (21, 8, (3, 3)), (7, 16, (4, 1)), (5, 1, (4, 2)), (1, 4, (2, 1))]
)
def test_attention_in_blocks_is_attention(length, size, heads):
    """Values and gradients of rows that are not padding."""
    q, k, v, segments = row(length, heads)
    real = (segments >= 0)[:, None, :, None]
    weights = jnp.where(real, jax.random.normal(jax.random.key(9), q.shape), 0)

    def plain(*a):
        return jnp.where(real, layers.attention(*a, llm.segment_mask(segments)), 0)

    def blocks(*a):
        return jnp.where(real, layers.blockwise(*a, segments, size), 0)

    np.testing.assert_allclose(blocks(q, k, v), plain(q, k, v), rtol=1e-5, atol=1e-6)
    want, got = (jax.grad(lambda *a, f=f: (f(*a) * weights).sum(), (0, 1, 2))(q, k, v) for f in (plain, blocks))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_attention_in_blocks_computes_no_whole_scores_and_half_of_them():
    q, k, v, segments = row(64, rows=1)
    one = jax.make_jaxpr(lambda *a: jax.grad(lambda q, *b: layers.blockwise(q, *b, segments, 8).sum())(*a))(q, k, v)
    assert "64,64" not in str(one)
    whole = account.flops(lambda *a: layers.attention(*a, llm.segment_mask(segments)), q, k, v)
    assert account.flops(lambda *a: layers.blockwise(*a, segments, 8), q, k, v) == whole * 9 // 16


def test_half_precision_in_blocks_is_as_near_as_whole():
    q, k, v, segments = row(48)
    want = layers.attention(q, k, v, llm.segment_mask(segments))
    real = np.asarray(segments >= 0)[:, None, :, None]
    narrow = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    off = [
        np.abs(np.where(real, np.asarray(f.astype(jnp.float32) - want), 0)).max()
        for f in (layers.attention(*narrow, llm.segment_mask(segments)), layers.blockwise(*narrow, segments, 16))
    ]
    assert off[1] <= 1.5 * off[0]
