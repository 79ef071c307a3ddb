"""PSNR and SSIM against values worked out by hand or by slow loops, and bicubic against what MATLAB wrote."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hypervl_jax.rescale import metrics
from hypervl_jax.rescale.metrics import psnr, ssim
from hypervl_jax.rescale.pairs import Bicubic
from hypervl_jax.rescale.resample import bicubic, bicubic_8bit, bicubic_f32

SET5 = ("baby", "bird", "butterfly", "head", "woman")


def pixels(path):
    return np.array(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def noisy():
    """A picture and the same with noise."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (20, 18, 3), np.uint8)
    return a, np.clip(a + rng.integers(-20, 20, a.shape), 0, 255).astype(np.uint8)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_luma_is_studio_range_and_not_rounded():
    rgb = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]], np.uint8)
    np.testing.assert_allclose(metrics.luma(rgb), [[16, 235, 81.481]], atol=1e-9)


def test_psnr_by_hand(noisy):
    a, b = noisy
    want = 20 * math.log10(255 / np.sqrt(np.mean((a.astype(float) - b.astype(float)) ** 2)))
    assert psnr(a, b, channel="rgb") == pytest.approx(want, abs=1e-9)
    shifted = (a // 2 + 10).astype(np.uint8)
    grey = 219 / 255 * 10  # ten levels of every colour, on luma
    assert psnr(shifted, (a // 2).astype(np.uint8)) == pytest.approx(20 * math.log10(255 / grey), abs=1e-9)
    assert psnr(a, a) == math.inf


def test_the_border_is_left_out(noisy):
    a, _ = noisy
    b = a.copy()
    b[:2], b[-2:], b[:, :2], b[:, -2:] = 0, 0, 0, 0
    assert psnr(a, b, 2) == math.inf
    assert psnr(a, b, 1) < 40
    assert ssim(a, b, 2) == pytest.approx(1, abs=1e-12)


def test_ssim_window_by_window(noisy):
    a, b = noisy
    x, y = metrics.luma(a), metrics.luma(b)
    at = np.arange(11) - 5
    g = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    g /= g.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mp, mq = (g * p).sum(), (g * q).sum()
            vp, vq = (g * (p - mp) ** 2).sum(), (g * (q - mq) ** 2).sum()
            cov = (g * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-9)


def test_what_cannot_be_compared_is_said(noisy):
    a, b = noisy
    with pytest.raises(ValueError, match="crop them alike"):
        psnr(a, b[:-1])
    with pytest.raises(ValueError, match="border of 9 pixels leaves nothing"):
        psnr(a, b, 9)
    with pytest.raises(ValueError, match="needs 11 pixels each way"):
        ssim(a, b, 4)


def test_modcrop_keeps_the_top_left():
    a = np.arange(7 * 9 * 3, dtype=np.uint8).reshape(7, 9, 3)
    np.testing.assert_array_equal(metrics.modcrop(a, 4), a[:4, :8])


# --- bicubic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("name", SET5)
def test_bicubic_equals_matlab_to_the_bit(rescaling, name, scale):
    hr = metrics.modcrop(pixels(rescaling / "Set5" / f"{name}.png"), scale)
    (file,) = (rescaling / "Set5" / f"LR_bicubic_x{scale}").glob(f"{name}*.png")
    want = pixels(file)
    np.testing.assert_array_equal(bicubic(hr, want.shape[:2]), want)


@pytest.mark.parametrize(
    ("name", "scale", "db", "structure"),
    [("Set5", 2, 33.68, 0.9305), ("Set5", 4, 28.43, 0.8113), ("Set14", 2, 30.33, 0.8700), ("Set14", 4, 26.09, 0.7050)],
)
def test_bicubic_baselines(rescaling, name, scale, db, structure):
    found = []
    for file in sorted((rescaling / name).glob("*.png")):
        hr = metrics.modcrop(pixels(file), scale)
        lr = bicubic(hr, (hr.shape[0] // scale, hr.shape[1] // scale))
        back = bicubic(lr, hr.shape[:2])
        found.append((psnr(back, hr, scale), ssim(back, hr, scale)))
    assert np.mean(found, 0)[0] == pytest.approx(db, abs=0.01)
    assert np.mean(found, 0)[1] == pytest.approx(structure, abs=1e-3)


def test_the_differentiable_pair_gives_the_same_small_picture(rescaling):
    hr = pixels(rescaling / "Set5" / "butterfly.png")[:96, :64]
    got = Bicubic(4).down({}, jnp.asarray(hr[None], jnp.float32) / 255)
    np.testing.assert_array_equal(metrics.to_u8(np.asarray(got[0])), bicubic(hr, (24, 16)))


def test_resampling_keeps_what_a_line_is():
    """Weights sum to 1 and the kernel is exact on straight lines, away from the border."""
    x = jnp.broadcast_to(jnp.arange(40.0), (1, 3, 40))[..., None]
    got = np.asarray(bicubic_f32(x, (3, 20)))[0, 1, 4:-4, 0]
    np.testing.assert_allclose(got, np.arange(4, 16) * 2 + 0.5, atol=1e-4)
    np.testing.assert_allclose(bicubic_f32(jnp.ones((1, 5, 7, 3)), (13, 2)), 1, atol=1e-6)


def test_rounding_passes_the_gradient_through():
    x = jnp.asarray(np.random.default_rng(0).random((1, 8, 8, 3)), jnp.float32)
    rounded, smooth = (jax.grad(lambda x, f=f: (f(x, (4, 4)) ** 2).sum()) for f in (bicubic_8bit, bicubic_f32))
    np.testing.assert_allclose(rounded(x), smooth(x), atol=0.02)
    assert np.abs(np.asarray(smooth(x))).max() > 0.1
