"""The vision encoder against float64 numpy; independence of tiles; what lies outside the picture."""

import jax
import numpy as np
import pytest

from hypervl_jax.config import VitConfig
from hypervl_jax.model.vit import Vit

CFG = VitConfig(width=24, depth=2, heads=3, mlp=40, tile=24, patch=8)  # heads of 8, an MLP that is not four widths


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(Vit(CFG).init, jax.random.key(0), np.zeros((1, 24, 24, 3)), np.ones((1, 9), bool))
    return jax.tree.map(lambda s: (0.4 * rng.normal(size=s.shape)).astype(np.float32), shapes["params"])


@pytest.fixture(scope="module")
def tiles():
    return np.random.default_rng(2).integers(0, 256, (3, 24, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def mask():
    """All of the first tile is picture, the left column of the second is padding, half of the third."""
    mask = np.ones((3, 3, 3), bool)
    mask[1, :, 0] = False
    mask[2, 1:] = False
    return mask.reshape(3, 9)


@pytest.fixture(scope="module")
def encode():
    return jax.jit(Vit(CFG).apply)


@pytest.fixture(scope="module")
def features(encode, params, tiles, mask):
    return np.asarray(encode({"params": params}, tiles, mask))


def oracle(params, tile, mask):
    """One tile, u8[T T 3] -> f64[P D], patch by patch and head by head."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def linear(w, x):
        return x @ w["weight"].T + w["bias"]

    def norm(w, x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + CFG.eps) * w["weight"] + w["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    corners = [(8 * r, 8 * c) for r in range(3) for c in range(3)]
    patches = np.stack([tile[y : y + 8, x : x + 8].reshape(-1) for y, x in corners])
    patches = np.where(mask[:, None], patches, 0)
    x = linear(p["patch"], patches / 127.5 - 1) + p["pos"]
    for i in range(CFG.depth):
        w = jax.tree.map(lambda a, i=i: a[i], p["blocks"]["layers"])
        y = norm(w["norm1"], x)
        q, k, v = (linear(w[n], y) for n in "qkv")
        heads = []
        for h in range(CFG.heads):
            at = slice(8 * h, 8 * h + 8)
            probs = np.where(mask, np.exp(q[:, at] @ k[:, at].T / np.sqrt(8)), 0)
            heads.append(probs / probs.sum(-1, keepdims=True) @ v[:, at])
        x = x + linear(w["o"], np.concatenate(heads, -1))
        x = x + linear(w["fc2"], gelu(linear(w["fc1"], norm(w["norm2"], x))))
    return norm(p["norm"], x)


def test_encoder_equals_the_oracle(features, params, tiles, mask):
    want = np.stack([oracle(params, t, m) for t, m in zip(tiles, mask, strict=True)])
    np.testing.assert_allclose(features, want, rtol=1e-4, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("drive", [{"scan": False}, {"remat": True}])
def test_scan_equals_loop_and_remat(drive, features, params, tiles, mask):
    got = jax.jit(Vit(CFG, **drive).apply)({"params": params}, tiles, mask)
    np.testing.assert_allclose(got, features, rtol=1e-5, atol=1e-5)


def test_bytes_equal_floats(features, params, tiles, mask):
    got = jax.jit(Vit(CFG).apply)({"params": params}, tiles.astype(np.float32) / 255, mask)
    np.testing.assert_allclose(got, features, rtol=1e-5, atol=1e-5)


def test_one_tile_changed_leaves_the_others_bit_equal(encode, features, params, tiles, mask):
    changed = tiles.copy()
    changed[1] = 255 - changed[1]
    got = np.asarray(encode({"params": params}, changed, mask))
    np.testing.assert_array_equal(got[[0, 2]], features[[0, 2]])
    assert np.abs(got[1] - features[1]).max() > 0.1


def test_pixels_outside_the_picture_have_no_effect(encode, features, params, tiles, mask):
    noise = np.random.default_rng(3).integers(0, 256, tiles.shape, np.uint8)
    outside = ~np.repeat(np.repeat(mask.reshape(3, 3, 3), 8, 1), 8, 2)[..., None]
    got = np.asarray(encode({"params": params}, np.where(outside, noise, tiles), mask))
    np.testing.assert_array_equal(got, features)
    real = np.asarray(encode({"params": params}, np.where(outside, tiles, noise), mask))
    assert np.abs(real - features).max() > 0.1


def test_an_empty_tile_is_finite(encode, params, tiles):
    assert np.isfinite(encode({"params": params}, tiles, np.zeros((3, 9), bool))).all()
