"""A part at a time, in processes of their own: the same files as with all of the model in memory, or nothing at all."""

import json
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from hypervl_jax import checkpoint, cli, config, quantize
from hypervl_jax.calibrate import Sample
from hypervl_jax.checkpoint import CheckpointError
from hypervl_jax.export import apart, doctor, lower, manifest, parts, verify
from hypervl_jax.export.lower import ExportError
from hypervl_jax.export.runtime import Runtime
from hypervl_jax.quantize import RecipeError, Rule

SMALL: dict[str, Any] = {"prefill": (96,), "cache": 128, "branches": ("base",), "progress": False}
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


ROWS: dict[str, Any] = {
    "recipe": (Rule(r"llm\.blocks\..*", "int4"), Rule(".*", "int8"))
}  # no group divides the tiny model's rows


def test_samples_choose_the_same_4_bits(folder, samples, tiny_screens, tmp_path, monkeypatch):
    monkeypatch.setattr(apart, "in_a_process", lambda job: apart.do(json.loads(json.dumps(job))))
    model, how = checkpoint.load_model(folder), ROWS | SMALL | {"verify_images": [tiny_screens[0].image]}
    got = apart.export(folder, tmp_path / "a", samples=samples, **how)
    want = parts.export(model, tmp_path / "b", samples=samples, **how)
    assert got.calibrated == want.calibrated == 2
    for part in want.parts:
        assert (tmp_path / "a" / part.file.file).read_bytes() == (tmp_path / "b" / part.file.file).read_bytes()
    parts.export(model, tmp_path / "c", **how)
    decoder = parts.file_of("decoder")
    assert (tmp_path / "a" / decoder).read_bytes() != (tmp_path / "c" / decoder).read_bytes()
    assert all(seam.ok for seam in parts.prove(model, tmp_path / "a", [tiny_screens[0].image]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_samples_without_4_bits_are_refused_before_any_work(folder, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ExportError, match="none of its matrices is in 4 bits"):
        apart.export(folder, tmp_path / "out", recipe=(Rule(".*", "int8"),), samples=samples, **SMALL)


def test_samples_survive_being_handed_on(samples, tmp_path):
    more = [Sample([], [{"role": "user", "content": "no picture"}]), Sample(samples[0].pictures * 2, [])]
    told = json.loads(json.dumps(apart.keep(tmp_path / "pictures.npz", [*samples, *more])))
    for got, want in zip(apart.shown(**told), [*samples, *more], strict=True):
        assert got.messages == want.messages
        assert len(got.pictures) == len(want.pictures)
        for a, b in zip(got.pictures, want.pictures, strict=True):
            np.testing.assert_array_equal(a, b)


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


def test_a_process_that_fails_is_said_and_nothing_is_left(folder, samples, tmp_path, monkeypatch):
    bad = shutil.copytree(folder, tmp_path / "bad")
    weights = safetensors.numpy.load_file(bad / "model.safetensors")
    name = next(k for k in weights if "vrc" not in k and "lm" in k)
    weights[name] = np.full_like(weights[name], np.nan)
    safetensors.numpy.save_file(weights, bad / "model.safetensors")
    with pytest.raises(ExportError, match="not finite"):
        apart.export(bad, tmp_path / "out", **SMALL)
    with pytest.raises(ExportError, match="not finite"):
        apart.export(bad, tmp_path / "out", **ROWS, samples=samples, **SMALL)
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: killed)
    with pytest.raises(ExportError, match=r"vrc: the process that lowers it was killed.*memory"):
        apart.export(folder, tmp_path / "out", **SMALL)
    with pytest.raises(ExportError, match=r"calibrate: the process that calibrates was killed"):
        apart.export(folder, tmp_path / "out", **ROWS, samples=samples, **SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


def test_the_command_goes_this_way_with_large_models(folder, tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parts, "default_pictures", lambda *_, **__: [np.zeros((30, 30, 3), np.uint8)])
    monkeypatch.setattr(apart, "in_a_process", apart.do)
    assert not apart.is_large(folder)
    monkeypatch.setattr(apart, "LARGE", 1000)
    assert apart.is_large(folder)
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
    assert f"an answer by base: {got.peak_bytes['base'] / 1e6:,.0f} MB" in out
    assert 20e6 < got.peak_bytes["base"] < 2e9
    rules = ["--rules", r"llm\.blocks\..*=int4", "--calibrate", "2"]
    m = checkpoint.load_model(folder)
    told = checkpoint.save_model(tmp_path / "m", *m[:3], m.info | {"config": config.to_dict(tiny_config)})
    cli.main(["export", str(told), "--out", str(tmp_path / "y"), "--branch", "base", "--cache", "128", *rules])
    assert manifest.check(tmp_path / "y").calibrated == 2
