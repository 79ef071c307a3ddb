"""The upscaler of a pair in the real runtime: equal to JAX, tile by tile too, or not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("litert_converter", reason="needs the export extra")

from hypervl_jax.export import lower, upscaler
from hypervl_jax.export.lower import ExportError
from hypervl_jax.export.manifest import ManifestError
from hypervl_jax.rescale import tiles, weights
from hypervl_jax.rescale.imdn import Imdn
from hypervl_jax.rescale.irn import Irn
from hypervl_jax.rescale.pairs import Bicubic, Pair

SIDE = 64


def shaken(net, scale=0.1):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return Pair(net, jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), shapes))


@pytest.fixture(scope="module")
def pair():
    return shaken(Irn((1,), growth=2, noise=0.0))


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("up") / "phone"
    return upscaler.export(pair, out, SIDE), out


def test_it_says_what_it_is_and_was_proved(exported, pair):
    made, out = exported
    assert made == upscaler.read(out)
    assert (made.scale, made.side, made.weights) == (2, SIDE, weights.fingerprint(pair))
    assert 0 <= made.parity["up"] <= 1e-4
    (entry,) = made.part.signatures
    assert [(t.name, t.dtype, t.shape) for t in entry.inputs] == [("small", "float32", (1, SIDE, SIDE, 3))]
    assert [(t.name, t.dtype, t.shape) for t in entry.outputs] == [("large", "float32", (1, 2 * SIDE, 2 * SIDE, 3))]
    assert not lower.without_kernel(made.part.ops)
    assert "PAD" not in made.part.ops  # the network's plain form: channels of zeros are for XLA alone


@pytest.mark.parametrize("size", [(100, 131), (20, 90), (5, 7)])
def test_a_whole_picture_is_jaxs_own(size, exported, pair):
    """Larger than a tile, narrower than one, and smaller both ways."""
    small = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    got = upscaler.restore(exported[1], small)
    wide = np.pad(small, [(0, max(SIDE - n, 0)) for n in size] + [(0, 0)], "symmetric")
    want = tiles.up(pair, wide, tile=2 * SIDE)[: 2 * size[0], : 2 * size[1]]
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want).max() <= 1
    assert (got != want).mean() < 0.001


def test_noise_is_left_out(tmp_path):
    """What a pair draws is 0 in the file."""
    noisy = shaken(Irn((1,), growth=2))
    upscaler.export(noisy, tmp_path / "up", SIDE)
    small = np.random.default_rng(1).random((1, SIDE, SIDE, 3)).astype(np.float32)
    got = lower.run(tmp_path / "up" / upscaler.FILE, "up", {"small": small})["large"]
    np.testing.assert_allclose(got, noisy.up(jnp.asarray(small), None), atol=1e-4)
    assert np.abs(got - noisy.up(jnp.asarray(small), jax.random.key(0))).max() > 0.01


@pytest.mark.parametrize(
    "make", [lambda: shaken(Imdn(2, 16, 1)), lambda: Pair(Bicubic(2), {})], ids=["imdn", "bicubic"]
)
def test_other_pairs(make, tmp_path):
    assert upscaler.export(make(), tmp_path / "up", SIDE).parity["up"] <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["firn_x4", "imdn_x4"])
def test_real_weights(name, shared, tmp_path):
    pair = weights.recognise(shared / "data" / "rescaling" / "weights" / f"{name}.npz")
    assert upscaler.export(pair, tmp_path / "up", 32).parity["up"] <= 1e-4


def test_what_differs_from_jax_is_not_exported(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(upscaler, "proved", lambda *_: 2e-4)
    with pytest.raises(ExportError, match=r"not exported: up is 0\.0002 of the largest value away"):
        upscaler.export(pair, tmp_path / "up", SIDE)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_keeps_the_one_before(exported, pair, monkeypatch):
    before = {p.name: p.read_bytes() for p in exported[1].iterdir()}
    monkeypatch.setattr(upscaler, "proved", lambda *_: float("nan"))
    with pytest.raises(ExportError, match="not exported"):
        upscaler.export(pair, exported[1], SIDE)
    assert {p.name: p.read_bytes() for p in exported[1].iterdir()} == before


def test_what_lies_elsewhere_is_left_alone(pair, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ExportError, match="exists and is not an exported upscaler"):
        upscaler.export(pair, tmp_path, SIDE)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_tiles_that_are_all_overlap(pair, tmp_path):
    with pytest.raises(ExportError, match="tiles of 63 px: at least 64 at scale 2"):
        upscaler.export(pair, tmp_path / "up", 63)


def test_damage_is_named(exported, tmp_path):
    out = exported[1]
    for name, change, message in (
        (upscaler.FILE, lambda b: b[:-100], "truncated or replaced"),
        (upscaler.FILE, lambda b: b[:-1] + bytes([b[-1] ^ 1]), "its hash differs"),
        ("manifest.json", lambda b: b[:40], "no exported upscaler"),
        ("manifest.json", lambda b: b.replace(b'"upscaler"', b'"other"'), "no exported upscaler"),
    ):
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in out.iterdir():
            (folder / file.name).write_bytes(change(file.read_bytes()) if file.name == name else file.read_bytes())
        with pytest.raises(ManifestError, match=message):
            upscaler.restore(folder, np.zeros((4, 4, 3), np.uint8))
