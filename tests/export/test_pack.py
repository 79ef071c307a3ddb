"""Files with integers in them: what is written is read back bit by bit, and the runtime multiplies by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import quantize
from hypervl_jax.export import lower, pack
from hypervl_jax.export.lower import ExportError
from hypervl_jax.model import layers

pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")

KINDS = {name: kind for name, kind in quantize.KINDS.items() if kind}
rng = np.random.default_rng(0)
SHARED = rng.normal(size=(24, 128)).astype(np.float32)


def net(p, x):
    """One matrix of each kind after the other, the outputs side by side."""
    return jnp.concatenate([x @ p[name].T for name in sorted(KINDS)], -1)


@pytest.fixture(scope="module")
def params():
    matrices = {name: rng.normal(size=(40, 256)).astype(np.float32) for name in KINDS}
    return {"net": {name: quantize.quantize_matrix(w, KINDS[name]) for name, w in matrices.items()}}


@pytest.fixture(scope="module")
def written(params, tmp_path_factory):
    """With two signatures, since those of a decoder share their weights."""
    path = tmp_path_factory.mktemp("pack") / "net.tflite"
    signatures = [
        lower.Signature(f"rows_{n}", lambda p, x: net(p["net"], x), (jax.ShapeDtypeStruct((n, 256), jnp.float32),),
                        ("x",), ("y",))
        for n in (1, 8)
    ]  # fmt: skip
    lower.to_tflite(path, quantize.restored(params), signatures)
    return path


@pytest.fixture
def packed(written, params, tmp_path):
    path = tmp_path / "net.tflite"
    path.write_bytes(written.read_bytes())
    pack.pack(path, quantize.matrices(params))
    return path


def test_the_file_holds_the_integers_of_jax(packed, written, params):
    matrices = quantize.matrices(params)
    pack.compare(packed, matrices)
    found = pack.read(packed)
    assert found.keys() == {f"net.{name}" for name in KINDS}
    for name, w in found.items():
        np.testing.assert_array_equal(quantize.integers(w), quantize.integers(matrices[name]))
        np.testing.assert_array_equal(np.asarray(quantize.dequantize(w)), quantize.floats(matrices[name]))
    assert lower.ops(packed) == lower.ops(written)
    assert pack.read(written) == {}
    tables = 12_000
    assert packed.stat().st_size < sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + tables


@pytest.mark.parametrize("rows", [1, 8])
def test_the_runtime_multiplies_by_them(packed, written, params, rows):
    """Against float64 products of the integers with the rows as the runtime rounds them: to 8 bits, one scale a row and
    a zero point, by XNNPACK's own formula."""
    x = rng.normal(size=(rows, 256)).astype(np.float32) * 3 + 1
    got = lower.run(packed, f"rows_{rows}", {"x": x})["y"]
    plain = lower.run(written, f"rows_{rows}", {"x": x})["y"]
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = (high - low).astype(np.float64) / 255
    zero = np.clip(np.rint(-128 - low / scale), -128, 127)
    rounded = (np.clip(np.rint(x / scale) + zero, -128, 127) - zero) * scale
    weights = quantize.restored(params)["net"]
    want = np.concatenate([rounded @ weights[name].astype(np.float64).T for name in sorted(KINDS)], -1)
    exact = np.concatenate([x @ weights[name].astype(np.float64).T for name in sorted(KINDS)], -1)
    assert np.abs(plain - exact).max() < 1e-5 * np.abs(exact).max()
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()
    assert np.abs(got - exact).max() < 2e-2 * np.abs(exact).max()


@pytest.mark.parametrize("rows", [1, 8])
def test_jax_can_round_rows_as_the_runtime_does(packed, params, rows):
    """The same rounding, so what is left are sums in another order, and rows at the edge between two steps."""
    x = rng.normal(size=(rows, 256)).astype(np.float32) * 3 + 1
    got = lower.run(packed, f"rows_{rows}", {"x": x})["y"]
    steps = jnp.float32(255)
    matmul = jax.jit(lambda x, w: layers.matmul(x, quantize.Rounded(w, steps)))
    want = np.concatenate([np.asarray(matmul(x, params["net"][name])) for name in sorted(KINDS)], -1)
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()


def test_one_other_integer_is_found(packed, params):
    matrices = quantize.matrices(params)
    for name, w in matrices.items():
        q = np.array(w.q)
        q.reshape(-1)[-1] ^= 1
        with pytest.raises(ExportError, match=rf"net\.tflite: {name}: other integers than JAX"):
            pack.compare(packed, matrices | {name: w._replace(q=q)})
        with pytest.raises(ExportError, match=rf"net\.tflite: {name}: other scales than JAX"):
            pack.compare(packed, matrices | {name: w._replace(scale=w.scale * w.scale.dtype.type(2))})
    with pytest.raises(ExportError, match=r"net\.int8 is in 8 or 4 bits only in the file"):
        pack.compare(packed, {k: v for k, v in matrices.items() if k != "net.int8"})


def test_what_cannot_be_packed_is_named_and_the_file_stays(written, params, tmp_path):
    path = tmp_path / "net.tflite"
    path.write_bytes(written.read_bytes())
    other = quantize.quantize_matrix(rng.normal(size=(40, 256)), quantize.Kind(8))
    with pytest.raises(ExportError, match="other is not a constant there"):
        pack.pack(path, quantize.matrices(params) | {"other": other})
    added = tmp_path / "added.tflite"
    args = (jax.ShapeDtypeStruct((40, 256), jnp.float32),)
    lower.to_tflite(
        added, {"w": quantize.floats(other)}, [lower.Signature("add", lambda p, x: x + p["w"], args, ("x",), ("y",))]
    )
    before = added.read_bytes()
    with pytest.raises(ExportError, match=r"added\.tflite: w is read by ADD, which takes no integers"):
        pack.pack(added, {"w": other})
    assert path.read_bytes() == written.read_bytes()
    assert added.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["added.tflite", "net.tflite"]


def test_a_table_is_looked_up_exactly_and_shared_with_the_head(tmp_path):
    """Tied embedding: one buffer, two operators."""
    table = quantize.quantize_matrix(SHARED, quantize.Kind(8))

    def rows(ids, table):
        return jnp.take(table, ids, axis=0, mode="clip")

    def tied(p, ids, x):
        return jax.lax.composite(rows, name="odml.embedding_lookup")(ids, p["embed"]), x @ p["embed"].T

    path, args = (
        tmp_path / "tied.tflite",
        (jax.ShapeDtypeStruct((3,), jnp.int32), jax.ShapeDtypeStruct((2, 128), jnp.float32)),
    )
    lower.to_tflite(
        path, {"embed": quantize.floats(table)}, [lower.Signature("tied", tied, args, ("ids", "x"), ("e", "y"))]
    )
    pack.pack(path, {"embed": table})
    pack.compare(path, {"embed": table})
    assert path.stat().st_size < SHARED.size * 2
    found = lower.run(path, "tied", {"ids": np.array([3, 0, 23], np.int32), "x": SHARED[:2]})
    np.testing.assert_array_equal(found["e"], quantize.floats(table)[[3, 0, 23]])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_damaged_file_is_refused(packed, share):
    whole = packed.read_bytes()
    packed.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ExportError, match="damaged"):
        pack.read(packed)


@pytest.mark.parametrize(("scale", "kept"), [(1 + 2**-7, 1 + 2**-7), (1 + 2**-10, 1.0), (1 + 3 * 2**-9, 1 + 2**-7)])
def test_a_kernel_keeps_eight_bits_of_a_groups_scale(scale, kept, tmp_path):
    """Why `quantize_matrix` rounds them so."""
    path, q = tmp_path / "net.tflite", rng.integers(1, 8, (16, 64)).astype(np.int8)
    w = quantize.quantized(q, np.full((16, 2), scale, np.float16), 4)
    args = (jax.ShapeDtypeStruct((1, 64), jnp.float32),)
    lower.to_tflite(
        path, {"w": quantize.floats(w)}, [lower.Signature("f", lambda p, x: x @ p["w"].T, args, ("x",), ("y",))]
    )
    pack.pack(path, {"w": w})
    x = np.zeros((1, 64), np.float32)
    x[0, 3] = 255
    np.testing.assert_allclose(lower.run(path, "f", {"x": x})["y"][0], 255 * kept * q[:, 3], rtol=1e-6)
