"""The decoder against float64 numpy; cache, scan and loop; who sees whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.config import LlmConfig
from hypervl_jax.model import llm

# Four query heads a key head, heads that do not make up the width, an untied head.
CFG = LlmConfig(vocab=37, width=20, depth=2, heads=8, kv_heads=2, head_dim=6, mlp=28, rope_theta=1e4, tied=False)
B, L = 2, 7


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    x, at, see = jnp.zeros((1, 1, CFG.width)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
    shapes = jax.eval_shape(llm.Llm(CFG).init, jax.random.key(0), x, at, see)["params"]
    return jax.tree.map(lambda s: jnp.asarray(0.4 * rng.normal(size=s.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def row():
    """(embeddings, positions, mask) of two rows, the second with positions of its own."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, L, CFG.width)), jnp.float32)
    positions = jnp.stack([jnp.arange(L), jnp.array([0, 1, 2, 3, 2, 3, 40])])
    return x, positions, llm.segment_mask(jnp.array([[0] * L, [0, 0, 1, 1, 2, 2, 2]]))


@pytest.fixture(scope="module")
def hidden(params, row):
    return np.asarray(jax.jit(llm.Llm(CFG).apply)({"params": params}, *row)[0])


def oracle(params, x, positions, mask):
    """One row, f64[L D] -> f64[L D]: token by token, head by head, each pair of channels turned by its own angle."""
    p = jax.tree.map(np.float64, params)
    d, group = CFG.head_dim, CFG.heads // CFG.kv_heads

    def norm(w, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CFG.eps) * w["weight"]

    def turn(vector, position):
        out = np.empty(d)
        for j in range(d // 2):
            angle = position / CFG.rope_theta ** (2 * j / d)
            turned = (vector[j] + 1j * vector[j + d // 2]) * np.exp(1j * angle)
            out[j], out[j + d // 2] = turned.real, turned.imag
        return out

    for i in range(CFG.depth):
        w = jax.tree.map(lambda a, i=i: a[i], p["blocks"]["layers"])
        y = norm(w["norm1"], x)
        q, k, v = ((y @ w[n]["weight"].T).reshape(L, -1, d) for n in "qkv")
        q, k = norm(w["q_norm"], q), norm(w["k_norm"], k)
        q, k = (np.array([[turn(h, at) for h in t] for t, at in zip(a, positions, strict=True)]) for a in (q, k))
        heads = []
        for h in range(CFG.heads):
            probs = np.where(mask, np.exp(q[:, h] @ k[:, h // group].T / np.sqrt(d)), 0)
            heads.append(probs / probs.sum(-1, keepdims=True) @ v[:, h // group])
        x = x + np.concatenate(heads, -1) @ w["o"]["weight"].T
        y = norm(w["norm2"], x)
        gate, up = y @ w["gate"]["weight"].T, y @ w["up"]["weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["down"]["weight"].T
    return norm(p["norm"], x)


def test_decoder_equals_the_oracle(hidden, params, row):
    want = np.stack([oracle(params, *(np.asarray(a[b]) for a in row)) for b in range(B)])
    np.testing.assert_allclose(hidden, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("drive", [{"scan": False}, {"remat": True}])
def test_scan_equals_loop_and_remat(drive, hidden, params, row):
    got = jax.jit(llm.Llm(CFG, **drive).apply)({"params": params}, *row)[0]
    np.testing.assert_allclose(got, hidden, rtol=1e-5, atol=1e-5)


def test_cached_decode_equals_the_full_forward(params, row, hidden):
    """Three positions at once into a cache longer than the row, then one by one; with the same positions and mask."""
    x, positions, mask = row
    room = jnp.pad(mask, ((0, 0), (0, 0), (0, 3)))
    step = jax.jit(llm.Llm(CFG, scan=False).apply)
    caches, out = llm.init_cache(CFG, B, L + 3), []
    assert [c.k.shape for c in caches] == [(B, CFG.kv_heads, L + 3, CFG.head_dim)] * CFG.depth
    for start, stop in [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)]:
        part = (a[:, start:stop] for a in (x, positions, room))
        y, caches = step({"params": params}, *part, caches, jnp.int32(start))
        out.append(np.asarray(y))
    np.testing.assert_allclose(np.concatenate(out, 1), hidden, atol=1e-4 * np.abs(hidden).max(), rtol=0)


def test_the_future_and_other_questions_have_no_effect(params, row, hidden):
    x, positions, mask = row
    changed = x.at[0, 5].add(1.0).at[1, 2].add(1.0)  # the row's second last token; a token of the first question
    got = np.asarray(jax.jit(llm.Llm(CFG).apply)({"params": params}, changed, positions, mask)[0])
    same = [got[0, :5] == hidden[0, :5], got[1, :2] == hidden[1, :2], got[1, 4:] == hidden[1, 4:]]
    assert all(s.all() for s in same)
    assert (got[0, 5:] != hidden[0, 5:]).any(-1).all()
    assert (got[1, 2:4] != hidden[1, 2:4]).any(-1).all()


def test_only_differences_of_positions_matter(params, row, hidden):
    x, positions, mask = row
    got = jax.jit(llm.Llm(CFG).apply)({"params": params}, x, positions + 11, mask)[0]
    np.testing.assert_allclose(got, hidden, atol=1e-4, rtol=0)


def test_segment_mask_is_what_its_docstring_draws():
    rows = llm.segment_mask(jnp.array([[0, 0, 1, 1, 2, -1]]))[0].astype(int).tolist()
    assert rows == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0],  # padding: it may look, nobody looks at it
    ]


def test_logits_use_the_head_if_there_is_one_and_the_table_if_not(params):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, CFG.width)), jnp.float32)
    np.testing.assert_allclose(llm.logits(params, x), np.float64(x) @ np.float64(params["head"]).T, atol=1e-5)
    tied = {k: v for k, v in params.items() if k != "head"}
    np.testing.assert_allclose(llm.logits(tied, x), np.float64(x) @ np.float64(params["embed"]).T, atol=1e-5)


def test_embed_reads_rows_of_the_table(params):
    ids = jnp.array([[3, 36, 0]])
    np.testing.assert_array_equal(llm.embed(params, ids)[0], params["embed"][ids[0]])
