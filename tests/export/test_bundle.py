"""One file for the stock runtime: it answers as the exported folder does, or it is not there."""

import dataclasses
import re
import shutil

import numpy as np
import pytest

from hypervl_jax import cli, needs, plan, text
from hypervl_jax.export import bundle, doctor, lower, manifest, parts, verify
from hypervl_jax.export.lower import ExportError, ExportUnavailable
from hypervl_jax.export.runtime import Runtime

SMALL = {"prefill": (64,), "cache": 96, "branches": ("base",), "progress": False}


@pytest.fixture(scope="module")
def stock():
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    pytest.importorskip("litert_lm", reason="needs the litertlm extra")
    pytest.importorskip("litert_lm_builder", reason="needs the litertlm extra")


@pytest.fixture(scope="module", params=["f32", "w4a16"])
def folder(request, stock, tiny_model, tiny_screens, tmp_path_factory):
    from hypervl_jax import quantize

    recipe = quantize.decoder4() if request.param == "w4a16" else ()
    out, pictures = tmp_path_factory.mktemp("bundle") / request.param, [tiny_screens[0].image]
    parts.export(tiny_model, out, recipe=recipe, verify_images=pictures, **SMALL)
    return out


def test_the_stock_runtime_answers_as_the_files_do(folder, tiny_model, tmp_path, monkeypatch):
    out = bundle.write(tiny_model, folder, tmp_path / "phone.litertlm")
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes()[:8] == b"LITERTLM"
    answer, tok = Runtime.answer, tiny_model.tokenizer
    monkeypatch.setattr(Runtime, "answer", lambda *a, **k: answer(*a, **k)._replace(ids=tuple(tok.encode("else"))))
    with pytest.raises(ExportError, match=r"more\.litertlm: picture 0: says .*, the files say 'else'"):
        bundle.write(tiny_model, folder, tmp_path / "more.litertlm")
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(ExportError, match="has no large encoder"):
        bundle.write(tiny_model, folder, tmp_path / "large.litertlm", "large")


def test_a_bundle_that_may_say_control_tokens_is_found(folder, tiny_model, tmp_path, monkeypatch):
    """Random weights would say some; `Runtime` never does, and a bundle tells the stock runtime which they are."""
    made = bundle._metadata

    def without(files):
        said = made(files)
        assert list(said.suppress_tokens.ids) == np.flatnonzero(tiny_model.tokenizer.forbidden(512)).tolist()
        said.ClearField("suppress_tokens")
        return said

    monkeypatch.setattr(bundle, "_metadata", without)
    with pytest.raises(ExportError, match=r"free\.litertlm: picture \d: says .*, the files say"):
        bundle.write(tiny_model, folder, tmp_path / "free.litertlm")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def whole(stock, tiny_model, tiny_screens, tmp_path_factory):
    """An export with a bundle in it, in f32."""
    out = tmp_path_factory.mktemp("whole") / "phone"
    parts.export(tiny_model, out, verify_images=[tiny_screens[0].image], bundle="base", source="some/model", **SMALL)
    return out


def test_an_export_with_a_bundle_is_listed_proved_and_examined(whole, tiny_model, capsys, monkeypatch):
    m = manifest.check(whole)
    assert [(b.branch, b.file.file) for b in m.bundles] == [("base", "base.litertlm")]
    monkeypatch.setattr(needs, "load", lambda name: tiny_model)
    cli.main(["verify", str(whole)])
    told = "base.litertlm: the stock runtime says what the files say; 3 of 3 answers are those of JAX"
    assert told in capsys.readouterr().out
    cli.main(["doctor", str(whole)])
    assert "base.litertlm: opens in the stock runtime" in capsys.readouterr().out


def test_a_bundle_that_was_cut_flipped_or_is_of_other_parts_is_named(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "phone")
    path = folder / "base.litertlm"
    data = path.read_bytes()
    for i in range(10):
        path.write_bytes(data[: len(data) * i // 10])
        (fault,) = doctor.examine(folder)
        assert f"{path}: {len(data) * i // 10} bytes instead of {len(data)}" in fault
    decoder = data.index((folder / "decoder.tflite").read_bytes())
    for at, says in ((0, "not a .litertlm file"), (decoder + 9999, "its decoder is not decoder.tflite")):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert "its hash differs" in doctor.examine(folder)[0]
        m = manifest.read(folder)  # and by one who changes the list too
        manifest.write(folder, dataclasses.replace(m, bundles=(manifest.bundle_of(path, "base"),)))
        assert [says in f for f in doctor.examine(folder)] == [True]
        manifest.write(folder, m)
    path.write_bytes(data[:32] + b"\xff" * 64 + data[96:])  # tables of sections
    manifest.write(folder, dataclasses.replace(m, bundles=(manifest.bundle_of(path, "base"),)))
    (fault,) = doctor.examine(folder)
    assert fault.startswith(f"{path}: the runtime ")
    (folder / "stray.litertlm").write_bytes(b"")
    assert "stray.litertlm not in manifest.json" in doctor.examine(folder)[0]


def test_a_bundle_that_does_not_answer_alike_is_no_export(tiny_model, tiny_screens, tmp_path, monkeypatch):
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    monkeypatch.setattr(bundle, "require", lambda: None)

    def refuse(*args):
        raise ExportError("base.litertlm: picture 0: says 'x'")

    monkeypatch.setattr(bundle, "write", refuse)
    monkeypatch.setattr(verify, "seams", lambda *args: [verify.Seam("vrc", 0.0)])
    some = [tiny_screens[0].image]
    with pytest.raises(ExportError, match="picture 0"):
        parts.export(tiny_model, tmp_path / "phone", verify_images=some, bundle="base", **SMALL)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ExportError, match="a bundle of large needs that branch; it is not among base"):
        parts.export(tiny_model, tmp_path / "phone", verify_images=some, bundle="large", **SMALL)


def test_template_and_pictures_give_the_prompt_of_render(exported, tiny_model):
    """The Jinja template by the real Jinja, the placeholder replaced as the runtime replaces it."""
    jinja2 = pytest.importorskip("jinja2", reason="comes with the parity extra")
    files, policy = Runtime(exported), tiny_model.config.policy
    content = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    said = jinja2.Template(bundle.template(tiny_model.config.text), keep_trailing_newline=True).render(
        messages=[{"role": "user", "content": content}], add_generation_prompt=True
    )
    before, after = bundle.around(files)
    said = said.replace("<|image_pad|>", before + "<|image_pad|>" * policy.tokens_per_tile + after)
    p = plan.make((policy.tile, policy.tile), 1.0, policy)
    row = text.render([{"role": "user", "content": content}], [p], files.tokenizer, tiny_model.config.text)
    assert said == files.tokenizer.decode(row.ids)
    assert re.findall(r"<row_1_col_1>", said) == ["<row_1_col_1>"]


def test_without_the_extra_it_says_so(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(lower.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    cure = r"litert_lm is not installed: pip install 'hypervl-jax\[litertlm\]'; .*Everything but bundles works here"
    with pytest.raises(ExportUnavailable, match=cure) as told:
        bundle.write(tiny_model, tmp_path, tmp_path / "x.litertlm")
    assert "converter" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_what_an_extra_itself_lacks_is_named(monkeypatch):
    monkeypatch.setattr(lower.importlib, "import_module", lambda n: (_ for _ in ()).throw(ImportError(name="google.x")))
    with pytest.raises(ExportUnavailable, match=r"^google is not installed: pip install 'hypervl-jax\[litertlm\]'"):
        bundle.require()
