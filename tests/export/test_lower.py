"""Small functions of every kind the model is made of: lowered, run in the real runtime, equal to JAX."""

import itertools
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.export import lower
from hypervl_jax.export.lower import ExportError, ExportUnavailable, Signature

V, D, F, S = 32, 8, 16, 6  # vocabulary, width, hidden width, cache rows
f32, i32 = jnp.float32, jnp.int32
array = jax.ShapeDtypeStruct


@pytest.fixture(scope="module")
def converter():
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    pytest.importorskip("ai_edge_litert", reason="the LiteRT runtime has no wheel here")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    return {"embed": normal(V, D), "up": {"weight": normal(F, D), "bias": normal(F)}, "down": normal(D, F)}


def decoder(p, ids, position, cache):
    """Token ids after `cache`: embedding lookup, MLP, cache update, attention, tied head."""
    lookup = jax.lax.composite(lambda i, e: jnp.take(e, i, axis=0, mode="clip"), name="odml.embedding_lookup")
    x = lookup(ids, p["embed"])
    x = x + jax.nn.gelu(x @ p["up"]["weight"].T + p["up"]["bias"], approximate=True) @ p["down"].T
    cache = jax.lax.dynamic_update_slice(cache, x[None], (0, position, 0), allow_negative_indices=False)
    weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x[None], cache), axis=-1)
    return (weights @ cache) @ p["embed"].T, cache


def signature(name, tokens):
    args = (array((tokens,), i32), array((), i32), array((1, S, D), f32))
    return Signature(name, decoder, args, ("ids", "position", "cache"), ("logits", "cache_out"))


@pytest.fixture(scope="module")
def model(converter, params, tmp_path_factory):
    path = tmp_path_factory.mktemp("lower") / "decoder.tflite"
    lower.to_tflite(path, params, [signature("prefill", 4), signature("decode", 1)])
    return path


def inputs(tokens, position):
    rng = np.random.default_rng(tokens)
    ids = rng.integers(0, V, tokens).astype(np.int32)
    return {"ids": ids, "position": np.int32(position), "cache": rng.normal(size=(1, S, D)).astype(np.float32)}


def unary(fn, shape=(3,), dtype=f32):
    return [Signature("f", lambda p, x: fn(x), (array(shape, dtype),), ("x",), ("y",))]


def test_runtime_equals_jax(model, params):
    runner = lower.Runner(model)
    for name, tokens, position in (("prefill", 4, 1), ("decode", 1, 5), ("prefill", 4, 0)):
        given = inputs(tokens, position)
        with jax.default_matmul_precision("highest"):
            logits, cache = jax.jit(decoder)(params, *given.values())
        out = runner(name, given)
        np.testing.assert_allclose(out["logits"], logits, atol=1e-5)
        np.testing.assert_allclose(out["cache_out"], cache, atol=1e-5)


def test_operators_are_the_fused_builtins(model):
    found = set(lower.check_ops(model))
    assert found >= {"EMBEDDING_LOOKUP", "FULLY_CONNECTED", "GELU", "SOFTMAX", "DYNAMIC_UPDATE_SLICE"}
    assert not found & {"WHILE", "TRANSPOSE", "GATHER_ND", "STABLEHLO_COMPOSITE"}


def test_signatures_share_one_copy_of_the_parameters(converter, params, model, tmp_path):
    wide = {"w": np.random.default_rng(0).normal(size=(128, 128)).astype(np.float32)}
    one = unary(lambda x: x)[0]._replace(fn=lambda p, x: x @ p["w"].T, args=(array((1, 128), f32),))
    two = one._replace(name="g", args=(array((2, 128), f32),))
    lower.to_tflite(tmp_path / "both.tflite", wide, [one, two])
    assert wide["w"].nbytes < (tmp_path / "both.tflite").stat().st_size < 1.2 * wide["w"].nbytes


def test_large_constants_are_not_folded_and_equal(converter, params, tmp_path, monkeypatch):
    monkeypatch.setattr(lower, "DENSE_LIMIT", 0)
    monkeypatch.setattr(lower, "FOLD_BELOW", 0)
    lower.to_tflite(tmp_path / "d.tflite", params, [signature("prefill", 4)])
    given = inputs(4, 0)
    out = lower.run(tmp_path / "d.tflite", "prefill", given)
    np.testing.assert_allclose(out["logits"], decoder(params, *given.values())[0], atol=1e-5)


def test_inspect_reads_what_was_exported(model):
    contents = lower.inspect(model)
    assert list(contents.signatures) == ["prefill", "decode"]
    taken, given = contents.signatures["prefill"]
    assert taken == {"ids": ("int32", (4,)), "position": ("int32", ()), "cache": ("float32", (1, S, D))}
    assert given == {"logits": ("float32", (1, 4, V)), "cache_out": ("float32", (1, S, D))}
    assert contents.ops == lower.ops(model)
    assert [int(n) for n in contents.min_runtime.split(".")] >= [1, 0, 0]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3)[0], "while"),
        (jnp.sort, "sort"),
        (lambda x: x.at[0].add(1.0), "STABLEHLO_SCATTER"),
        (lambda x: jnp.linalg.cholesky(jnp.outer(x, x)), "refused"),
    ],
)
def test_what_phones_cannot_run_is_refused_and_leaves_nothing(converter, fn, message, tmp_path):
    with pytest.raises(ExportError, match=rf"f\.tflite.*{message}"):
        lower.to_tflite(tmp_path / "f.tflite", {}, unary(fn))
    assert not list(tmp_path.iterdir())


def test_failure_keeps_the_previous_file(model, params):
    before = model.read_bytes()
    with pytest.raises(ExportError):
        lower.to_tflite(model, params, unary(jnp.sort))
    assert model.read_bytes() == before
    assert list(model.parent.iterdir()) == [model]


def test_bad_parameters_and_names_are_named(tmp_path):
    path = tmp_path / "f.tflite"
    with pytest.raises(ExportError, match=r"\['w'\] is bfloat16; cast it to float32"):
        lower.to_tflite(path, {"w": jnp.ones(3, jnp.bfloat16)}, unary(jnp.sin))
    with pytest.raises(ExportError, match=r"f has 1 outputs, named \['y', 'z'\]"):
        lower.to_tflite(path, {}, [unary(jnp.sin)[0]._replace(outputs=("y", "z"))])
    with pytest.raises(ExportError, match="distinct names"):
        lower.to_tflite(path, {}, unary(jnp.sin) * 2)
    assert not path.exists()


def test_truncated_and_foreign_files_are_refused(model, tmp_path):
    data, path = model.read_bytes(), tmp_path / "cut.tflite"
    for n in itertools.chain(range(0, 64, 4), np.linspace(64, len(data) - 64, 12).astype(int)):
        path.write_bytes(data[:n])
        for read in (lower.ops, lower.Runner):
            with pytest.raises(ExportError, match=r"cut\.tflite: (truncated|not a)"):
                read(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" * 100)
    with pytest.raises(ExportError, match=r"not a \.tflite file"):
        lower.Runner(path)
    with pytest.raises(ExportError, match="no such file"):
        lower.Runner(tmp_path / "absent.tflite")


def test_damaged_files_never_crash(model, tmp_path):
    """One byte overwritten: refused with a clear error, or run; the process lives either way."""
    data, path = model.read_bytes(), tmp_path / "damaged.tflite"
    refused = 0
    for n in np.random.default_rng(0).integers(8, len(data), 60):
        path.write_bytes(data[:n] + b"\xff" + data[n + 1 :])
        try:
            lower.run(path, "prefill", inputs(4, 0))
        except ExportError:
            refused += 1
    assert 0 < refused < 60  # some bytes are tables, some are weights


def test_runner_refuses_what_does_not_fit(model):
    runner, given = lower.Runner(model), inputs(4, 0)
    with pytest.raises(ExportError, match="no signature 'encode'; it has prefill, decode"):
        runner("encode", given)
    with pytest.raises(ExportError, match=r"ids int32\[4\].*was given.*ids int32\[5\]"):
        runner("prefill", given | {"ids": np.zeros(5, np.int32)})
    with pytest.raises(ExportError, match="int64"):
        runner("prefill", given | {"ids": np.zeros(4, np.int64)})
    with pytest.raises(ExportError, match="takes cache"):
        runner("prefill", {"ids": given["ids"]})


@pytest.mark.parametrize("absent", ["litert_converter", "ai_edge_litert"])
def test_without_the_extra_export_says_so(absent, monkeypatch, tmp_path):
    importlib_import = lower.importlib.import_module

    def import_module(name):
        if name.partition(".")[0] == absent:
            raise ModuleNotFoundError(name)
        return importlib_import(name)

    monkeypatch.setattr(lower.importlib, "import_module", import_module)
    if absent == "ai_edge_litert":
        pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    with pytest.raises(ExportUnavailable, match=rf"{absent} is not installed.*\[export\].*Everything but export works"):
        lower.to_tflite(tmp_path / "f.tflite", {}, unary(jnp.sin))
    assert not list(tmp_path.iterdir())


def test_progress_of_native_code_is_not_told_and_errors_are(capfd):
    def told(e=None):
        with lower.without_chatter():
            os.write(2, lines)
            if e:
                raise e

    lines = b"INFO: Created TensorFlow Lite XNNPACK delegate\nW0000 00:00:1 flatbuffer_export.cc:1] module\nerror: no\n"
    told()
    assert capfd.readouterr().err == "error: no\n"
    with pytest.raises(ExportError):
        told(ExportError("x"))
    assert capfd.readouterr().err == "error: no\n"
    os.write(2, b"again")
    assert capfd.readouterr().err == "again"


def test_writing_and_loading_a_file_print_nothing(tmp_path, capfd):
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    args = (jax.ShapeDtypeStruct((1, 4), np.float32),)
    path = tmp_path / "x.tflite"
    lower.to_tflite(
        path, {"w": np.ones((3, 4), np.float32)}, [Signature("f", lambda p, x: x @ p["w"].T, args, ("x",), ("y",))]
    )
    lower.run(path, "f", {"x": np.ones((1, 4), np.float32)})
    assert capfd.readouterr() == ("", "")


def test_loading_the_converter_and_the_runtime_prints_nothing():
    """In a process of its own: native libraries tell of themselves once."""
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    code = "from hypervl_jax.export import lower; lower.require()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_where_native_code_ends_the_process_what_it_said_is_kept(tmp_path):
    code = """import os
from hypervl_jax.export import lower
with lower.without_chatter():
    os.write(2, b'why')
    os.abort()"""
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr
    [log] = tmp_path.glob("hypervl-*.log")
    assert log.read_text() == "why"
