"""Golden numbers of the official PyTorch code, real weights, and a light network that costs little to compile."""

import zlib
from dataclasses import dataclass
from pathlib import Path

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


def turned(file):
    """The arrays of a golden file: pictures in NHWC, without the `_nchw` of their names; weights ("w/") as they are."""
    with np.load(file) as arrays:
        nhwc = {k: np.moveaxis(v, 1, -1) if v.ndim == 4 and k[:2] != "w/" else v for k, v in arrays.items()}
    return {k.removesuffix("_nchw"): v for k, v in nhwc.items()}


@pytest.fixture(scope="session")
def golden(rescaling):
    """A golden file of the shared data by name."""
    return lambda name: turned(rescaling / "golden" / f"{name}.npz")


@pytest.fixture(scope="session")
def local_golden():
    """A golden file of this repository by name: what the official code made of weights that `drawn` draws."""
    return lambda name: turned(Path(__file__).parents[1] / "golden" / f"{name}.npz")


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
def drawn():
    """Weights that anyone can draw again: each tensor, in PyTorch's layout, from the checksum of its name."""
    from hypervl_jax.rescale import weights

    def one(name, shape):
        n = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if name.endswith("permute.weight"):
            return np.eye(shape[0]) + 0.05 * n
        if name.endswith("running_var"):
            return 1 + 0.5 * np.tanh(n)
        return n / np.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.1 * n

    def drawn(net):
        tensors = {}
        for path, leaf in jax.tree.leaves_with_path(jax.eval_shape(net.init, jax.random.key(0))):
            name, shape = ".".join(p.key for p in path), leaf.shape
            if len(shape) >= 4:
                shape = (*shape[:-4], shape[-1], shape[-2], shape[-4], shape[-3])
            tensors[name] = one(name, shape).astype(np.float32)
        return weights.fit(net, tensors, "drawn")

    return drawn


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
