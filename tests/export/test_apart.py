"""A part at a time, in processes of their own: the same files as with all of the model in memory, or nothing at all."""

import shutil
import subprocess

import numpy as np
import pytest
import safetensors.numpy

from hypervl_jax import checkpoint, cli, needs, quantize
from hypervl_jax.checkpoint import CheckpointError
from hypervl_jax.export import apart, doctor, lower, manifest, parts, verify
from hypervl_jax.export.lower import ExportError
from hypervl_jax.export.runtime import Runtime
from hypervl_jax.quantize import RecipeError, Rule

SMALL = {"prefill": (96,), "cache": 128, "branches": ("base",), "progress": False}
MIXED = (Rule(r"llm\.blocks\.layers\.1\..*", "int4"), *quantize.decoder4())  # layers that are not kept alike


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    pytest.importorskip("ai_edge_litert", reason="the LiteRT runtime has no wheel here")
    m = tiny_model
    return checkpoint.save_model(tmp_path_factory.mktemp("apart") / "m", m.config, m.params, m.tokenizer, m.info)


@pytest.fixture(scope="module")
def made(folder, tiny_screens):
    pictures = [tiny_screens[0].image]
    apart.export(folder, folder.parent / "made", recipe=MIXED, verify_images=pictures, source="it", **SMALL)
    return folder.parent / "made"


def test_the_files_are_those_of_an_export_in_one_piece(made, folder, tiny_screens):
    whole = folder.parent / "whole"
    model, pictures = checkpoint.load_model(folder), [tiny_screens[0].image]
    want = parts.export(model, whole, recipe=MIXED, verify_images=pictures, source="it", **SMALL)
    for file in (*(f"{name}.tflite" for name in parts.names(["base"])), "tokenizer.json"):
        assert (made / file).read_bytes() == (whole / file).read_bytes(), file
    got = manifest.check(made)
    assert (got.bits, got.recipe, got.source, got.vrc_scale) == (want.bits, want.recipe, "it", want.vrc_scale)
    assert got.parts == want.parts
    assert got.parity.keys() == want.parity.keys()
    assert got.lowered == {}
    for seam, error in want.parity.items():  # JAX with the integers, here; there, too
        assert got.parity[seam] == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_it_answers_is_whole_and_is_proved_again(made, folder, tiny_screens):
    assert Runtime(made).answer(tiny_screens[1].image, "what is this?", max_new=2).ids
    assert not list(doctor.examine(made))
    seams = parts.prove(checkpoint.load_model(folder), made, [tiny_screens[0].image])
    assert all(seam.ok for seam in seams)


def test_only_what_is_asked_for_is_read(folder, tiny_model):
    got = checkpoint.load_model(folder, only=("llm.embed", "vrc."))
    assert got.params.keys() == {"llm", "vrc"}
    assert got.params["llm"].keys() == {"embed"}
    np.testing.assert_array_equal(got.params["llm"]["embed"], tiny_model.params["llm"]["embed"])


def test_rules_that_fit_nothing_are_named_before_any_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(RecipeError, match="nothing"):
        apart.export(folder, tmp_path / "out", recipe=(Rule("nothing", "int8"),), **SMALL)
    with pytest.raises(ExportError, match="prefill lengths"):
        apart.export(folder, tmp_path / "out", **SMALL | {"prefill": (256,)})
    assert not (tmp_path / "out").exists()


def test_a_process_that_fails_is_said_and_nothing_is_left(folder, tmp_path, monkeypatch):
    bad = shutil.copytree(folder, tmp_path / "bad")
    weights = safetensors.numpy.load_file(bad / "model.safetensors")
    name = next(k for k in weights if "vrc" not in k and "lm" in k)
    weights[name] = np.full_like(weights[name], np.nan)
    safetensors.numpy.save_file(weights, bad / "model.safetensors")
    with pytest.raises(ExportError, match="not finite"):
        apart.export(bad, tmp_path / "out", **SMALL)
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: killed)
    with pytest.raises(ExportError, match=r"vrc: the process that lowers it was killed.*memory"):
        apart.export(folder, tmp_path / "out", **SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


def test_the_command_goes_this_way_with_large_models(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parts, "default_pictures", lambda *_, **__: [np.zeros((30, 30, 3), np.uint8)])
    here = lambda path, out, part, rules, *lengths: apart.lower_part(path, out, part, quantize.parse(rules), *lengths)  # noqa: E731
    monkeypatch.setattr(apart, "_in_a_process", here)
    assert not apart.is_large(folder)
    monkeypatch.setattr(apart, "LARGE", 1000)
    assert apart.is_large(folder)
    with pytest.raises(needs.UsageError, match="too large for --calibrate"):
        cli.main(
            ["--debug", "export", str(folder), "--out", str(tmp_path / "x"), "--recipe", "w4a16", "--calibrate", "2"]
        )
    with pytest.raises(CheckpointError, match="does not exist"):
        cli.main(["--debug", "export", str(tmp_path / "none"), "--out", str(tmp_path / "x")])
    cli.main(["export", str(folder), "--out", str(tmp_path / "x"), "--branch", "base", "--cache", "128"])
    out = capsys.readouterr().out
    assert "decode: " in out
    got = manifest.check(tmp_path / "x")
    assert max(got.parity.values()) <= verify.LIMIT
    assert (got.recipe, got.lowered) == ((), {})
    assert Runtime(tmp_path / "x").cache_length == 128
    assert lower.check_ops(tmp_path / "x" / "decoder.tflite")
