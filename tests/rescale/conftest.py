"""Golden numbers of the official PyTorch code, real weights, and a light network that costs little to compile."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def rescaling(shared):
    """The folder of pictures, weights and golden files."""
    path = shared / "data" / "rescaling"
    if not path.is_dir():
        pytest.skip(f"no rescaling data at {path}; set HYPERVL_SHARED")
    return path


@pytest.fixture(scope="session")
def golden(rescaling):
    """A golden file by name: its arrays, those called `..._nchw` turned to NHWC and called without it."""

    def golden(name):
        with np.load(rescaling / "golden" / f"{name}.npz") as arrays:
            turned = {k: np.moveaxis(v, 1, -1) if k.endswith("_nchw") else v for k, v in arrays.items()}
        return {k.removesuffix("_nchw"): v for k, v in turned.items()}

    return golden


@pytest.fixture(scope="session")
def close():
    """Fails unless max |a - b| <= tolerance x max |b|."""

    def close(got, want, tolerance=1e-5):
        got, want = np.asarray(got), np.asarray(want)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())

    return close


@pytest.fixture(scope="session")
def shaken():
    """Random weights of `net` that let every one of them be seen: none is 0, as many are at the start."""

    def shaken(net, scale=0.1, seed=0):
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), shapes)

    return shaken


@pytest.fixture(scope="session")
def tiny_pair(shaken):
    """IRN x2 of one block with random weights."""
    from hypervl_jax.rescale.irn import Irn
    from hypervl_jax.rescale.pairs import Pair

    return Pair(net := Irn((1,), growth=2), shaken(net))


@pytest.fixture(scope="session")
def given():
    """An IRN whose noise is given, in `params["z"]`, as golden traces need it."""
    from hypervl_jax.rescale.irn import Irn

    @dataclass(frozen=True)
    class Given(Irn):
        def down(self, params, hr):
            return super().down(params["net"], hr)

        def up(self, params, lr, key=None):
            return self.inverse(params["net"], jnp.concatenate([lr, params["z"]], -1))

    return Given
