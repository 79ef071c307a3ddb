"""One file for the stock runtime: it answers as the exported folder does, or it is not there."""

import re

import numpy as np
import pytest

from hypervl_jax import plan, text
from hypervl_jax.export import bundle, lower, parts
from hypervl_jax.export.lower import ExportError, ExportUnavailable
from hypervl_jax.export.runtime import Runtime

SMALL = {"prefill": (64,), "cache": 96, "branches": ("base",), "progress": False}


@pytest.fixture(scope="module", params=["f32", "w4a16"])
def folder(request, tiny_model, tiny_screens, tmp_path_factory):
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    from hypervl_jax import quantize

    recipe = quantize.decoder4() if request.param == "w4a16" else ()
    out, pictures = tmp_path_factory.mktemp("bundle") / request.param, [tiny_screens[0].image]
    parts.export(tiny_model, out, recipe=recipe, verify_images=pictures, **SMALL)
    return out


def test_the_stock_runtime_answers_as_the_files_do(folder, tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("litert_lm", reason="needs the litertlm extra")
    pytest.importorskip("litert_lm_builder", reason="needs the litertlm extra")
    out = bundle.write(tiny_model, folder, tmp_path / "phone.litertlm")
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes()[:8] == b"LITERTLM"
    answer, forbidden = Runtime.answer, tiny_model.tokenizer.forbidden(512)
    rare = next(i for i in range(511, 0, -1) if not forbidden[i])

    def other(self, *args, **kwargs):
        return answer(self, *args, **kwargs)._replace(text="something else", ids=(rare,))

    monkeypatch.setattr(Runtime, "answer", other)
    with pytest.raises(ExportError, match=r"more\.litertlm: picture 0: says .*, the files say 'something else'"):
        bundle.write(tiny_model, folder, tmp_path / "more.litertlm")
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(ExportError, match="has no large encoder"):
        bundle.write(tiny_model, folder, tmp_path / "large.litertlm", "large")


def test_template_and_pictures_give_the_prompt_of_render(folder, tiny_model):
    """The Jinja template by the real Jinja, the placeholder replaced as the runtime replaces it."""
    jinja2 = pytest.importorskip("jinja2", reason="comes with the parity extra")
    files, policy = Runtime(folder), tiny_model.config.policy
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
    with pytest.raises(ExportUnavailable, match=r"hypervl-jax\[litertlm\]"):
        bundle.write(tiny_model, tmp_path, tmp_path / "x.litertlm")
    assert np.size(list(tmp_path.iterdir())) == 0
