"""A model exported in 8 and 4 bits: the files hold JAX's integers, and were proved before and after they got them."""

import shutil

import jax
import numpy as np
import pytest

from hypervl_jax import calibrate, cli, needs, quantize
from hypervl_jax.calibrate import CalibrationError
from hypervl_jax.export import lower, manifest, pack, parts, verify
from hypervl_jax.export.lower import ExportError
from hypervl_jax.export.runtime import Runtime
from hypervl_jax.quantize import RecipeError, Rule

CHOSEN = (Rule(r"llm\.blocks\.layers\.1\..*", "int4"), Rule(".*", "int8"))
SMALL = {"prefill": (96,), "cache": 128, "branches": ("base",), "progress": False}


@pytest.fixture(scope="module")
def narrow(tiny_model, tiny_screens, tmp_path_factory):
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    pytest.importorskip("ai_edge_litert", reason="the LiteRT runtime has no wheel here")
    out, pictures = tmp_path_factory.mktemp("narrow") / "tiny", [tiny_screens[0].image]
    parts.export(tiny_model, out, recipe=quantize.decoder4(), verify_images=pictures, source="some/model", **SMALL)
    return out


def test_the_proof_has_two_steps(narrow):
    m = manifest.check(narrow)
    seams = {"vrc", "encoder_base", "embedder", "prefill_96", "decode", "answers"}
    assert m.lowered.keys() == m.parity.keys() == seams
    assert max(m.lowered.values()) <= verify.LIMIT
    assert m.parity["vrc"] <= verify.LIMIT
    assert m.parity["embedder"] == 0  # a table has no activations
    assert all(verify.LIMIT < m.parity[seam] <= verify.DYNAMIC for seam in ("encoder_base", "decode"))
    assert m.recipe == (r"llm\.blocks\..*=int4/32", ".*=int8")
    assert m.source == "some/model"
    assert {k: round(v) for k, v in m.bits.items() if k in ("vrc", "embedder")} == {"vrc": 32, "embedder": 9}
    assert Runtime(narrow).answer(np.zeros((40, 40, 3), np.uint8), "what?", max_new=2).ids


def test_the_files_hold_what_jax_computes_with(narrow, tiny_model):
    """Leaf by leaf, not through the code that names the parts."""
    params = quantize.quantize(tiny_model.params, quantize.decoder4())
    found = pack.read(narrow / "decoder.tflite")
    layers = params["llm"]["blocks"]["layers"]
    for i in range(tiny_model.config.llm.depth):
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            want, got = layers[name]["weight"], found[f"blocks.layers.{i}.{name}.weight"]
            np.testing.assert_array_equal(got.q, want.q[i])
            np.testing.assert_array_equal(got.scale, want.scale[i])
    for table in (found["embed"], pack.read(narrow / "embedder.tflite")["embed"]):
        np.testing.assert_array_equal(table.q, params["llm"]["embed"].q)
    patch = pack.read(narrow / "encoder_base.tflite")["base.vit.patch.weight"]
    np.testing.assert_array_equal(patch.q, params["base"]["vit"]["patch"]["weight"].q)
    assert pack.read(narrow / "vrc.tflite") == {}


def test_verify_proves_again_and_finds_another_model(narrow, tiny_model, tiny_screens, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(needs, "load", lambda name: asked.append(name) or tiny_model)
    monkeypatch.setattr(parts, "default_pictures", lambda *_, **__: [tiny_screens[0].image])
    cli.main(["verify", str(narrow)])
    said = capsys.readouterr().out
    assert asked == ["some/model"]
    assert "proved, the integers bit by bit" in said
    assert "embedder: 0.0e+00 from JAX, 0.0001 is allowed" in said
    other = tiny_model._replace(params=tiny_model.params | {"base": tiny_model.params["large"]})
    with pytest.raises(ExportError, match=r"encoder_base\.tflite: base\..* other|is in 8 or 4 bits only"):
        parts.prove(other, narrow)


@pytest.fixture(scope="module")
def chosen(tiny_model, tiny_screens, samples, tmp_path_factory):
    """By calibration, in one layer alone: its stack comes apart."""
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    pytest.importorskip("ai_edge_litert", reason="the LiteRT runtime has no wheel here")
    out, pictures = tmp_path_factory.mktemp("chosen") / "tiny", [tiny_screens[0].image]
    parts.export(tiny_model, out, recipe=CHOSEN, samples=samples, verify_images=pictures, **SMALL)
    return out


def test_files_hold_the_integers_that_calibration_chose(chosen, tiny_model, samples):
    grams = calibrate.grams(tiny_model, samples, ("base",), progress=False)
    first, second = calibrate.layers_of(calibrate.calibrated(tiny_model.params, CHOSEN, grams))
    assert manifest.check(chosen).calibrated == 2
    found = pack.read(chosen / "decoder.tflite")
    for i, layer in enumerate((first, second)):
        for name in calibrate.INPUT:
            got = found[f"blocks.layers.{i}.{name}.weight"]
            assert got.bits == (4 if i else 8)
            np.testing.assert_array_equal(got.q, layer[name]["weight"].q)
            np.testing.assert_array_equal(got.scale, layer[name]["weight"].scale)


def test_what_calibration_chose_is_proved_again(chosen, tiny_model, tiny_screens, tmp_path):
    assert all(seam.ok for seam in parts.prove(tiny_model, chosen, [tiny_screens[0].image]))
    other = jax.tree.map(lambda a: np.flip(np.asarray(a), -1), tiny_model.params["llm"]["blocks"])
    llm = tiny_model.params["llm"] | {"blocks": other}
    with pytest.raises(
        ExportError, match=r"decoder\.tflite: blocks\.layers\.1\.q\.weight: other integers than of this"
    ):
        parts.prove(tiny_model._replace(params=tiny_model.params | {"llm": llm}), chosen)
    folder = shutil.copytree(chosen, tmp_path / "other")
    m = manifest.read(folder)
    files = {p.name: p.file.file for p in m.parts}
    more = {"recipe": (r"llm\.blocks\..*=int4", ".*=int8"), "bits": m.bits, "calibrated": 2}
    manifest.write(folder, manifest.describe(folder, m.model, files, "tokenizer.json", {}, m.vrc_scale, **more))
    with pytest.raises(ExportError, match=r"blocks\.layers\.0\.q\.weight: not kept as the manifest's recipe says"):
        parts.prove(tiny_model, folder)


def test_samples_that_do_not_serve_leave_nothing(tiny_model, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(lower, "require", lambda: None)
    with pytest.raises(ExportError, match="none of its matrices is in 4 bits"):
        parts.export(tiny_model, tmp_path / "out", recipe=quantize.RECIPES["int8"], samples=samples, **SMALL)
    blocks = jax.tree.map(np.array, tiny_model.params["llm"]["blocks"])
    blocks["layers"]["norm2"]["weight"][0] *= np.nan
    damaged = tiny_model._replace(params=tiny_model.params | {"llm": tiny_model.params["llm"] | {"blocks": blocks}})
    with pytest.raises(CalibrationError, match=r"layers\.0\.gate\.weight: what it is multiplied by is not finite"):
        parts.export(damaged, tmp_path / "out", recipe=CHOSEN, samples=samples, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rounding_leaves_nothing(tiny_model, tiny_screens, tmp_path, monkeypatch):
    """One integer of one file is not JAX's."""
    put = pack.pack

    def wrong(path, matrices):
        if path.name == "embedder.tflite":
            table = matrices["embed"]
            q = np.array(table.q)
            q[0, 0] -= np.sign(q[0, 0])
            shifted = quantize.floats(table._replace(q=q))
            lower.to_tflite(path, {"embed": shifted}, parts.embedder(tiny_model.config, tiny_model.params).signatures)
            matrices = {"embed": table._replace(q=q)}
        put(path, matrices)

    monkeypatch.setattr(verify, "seams", lambda *args: [verify.Seam("vrc", 0.0)])
    monkeypatch.setattr(pack, "pack", wrong)
    pictures = [tiny_screens[0].image]
    with pytest.raises(ExportError, match=r"embedder\.tflite: embed: other integers than JAX computes with"):
        parts.export(tiny_model, tmp_path / "out", recipe=quantize.RECIPES["int8"], verify_images=pictures, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_does_not_fit_is_refused_before_any_work(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(lower, "require", lambda: None)
    with pytest.raises(RecipeError, match=r"llm\.block=int8: the pattern matches the whole path of no matrix"):
        parts.export(tiny_model, tmp_path / "out", recipe=(Rule("llm.block", "int8"),), verify_images=[], **SMALL)
    rounded = tiny_model._replace(params=quantize.quantize(tiny_model.params, quantize.RECIPES["int8"]))
    with pytest.raises(ExportError, match="load the model as it is, and give a recipe"):
        parts.export(rounded, tmp_path / "out", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_what_changed_since_is_found(narrow, tiny_model, tmp_path):
    """Integers of another group size in a folder whose manifest agrees with its files."""
    folder = shutil.copytree(narrow, tmp_path / "other")
    m = manifest.read(folder)
    files = {p.name: p.file.file for p in m.parts}
    more = {"recipe": (".*=int8",), "bits": m.bits}
    manifest.write(folder, manifest.describe(folder, m.model, files, "tokenizer.json", {}, m.vrc_scale, **more))
    with pytest.raises(ExportError, match=r"decoder\.tflite: blocks\.layers\.0\.\w+\.weight: other integers"):
        parts.prove(tiny_model, folder)
