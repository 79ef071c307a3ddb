"""IMDN with its real weights against the official code's output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.rescale import weights
from hypervl_jax.rescale.imdn import Distill, Imdn


@pytest.mark.parametrize(("scale", "number"), [(2, 694_404), (4, 715_176)])
def test_published_parameter_counts(scale, number):
    shapes = jax.eval_shape(Imdn(scale).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == number


@pytest.mark.parametrize("scale", [2, 4])
def test_upscaling_is_the_official_one(rescaling, golden, close, scale):
    g = golden(f"imdn_x{scale}_butterfly24")
    pair = weights.load(Imdn(scale), rescaling / "weights" / f"imdn_x{scale}.npz")
    close(jax.jit(pair.up)(jnp.asarray(g["lr_u8"][None], jnp.float32) / 255), g["out"])


def test_a_flat_picture_has_a_gradient():
    """Channels without contrast: the square root of 0 must not poison the gradient."""
    block, x = Distill(16), jnp.zeros((1, 4, 4, 16))
    grad = jax.jit(jax.grad(lambda x: (block.init_with_output(jax.random.key(0), x)[0] ** 2).sum()))(x)
    assert np.isfinite(np.asarray(grad)).all()
