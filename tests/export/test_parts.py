"""Every part equals the model, a part that does not is found, and a failed export leaves nothing."""

import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from hypervl_jax import plan, presets, text
from hypervl_jax.export import lower, manifest, parts, verify
from hypervl_jax.export.lower import ExportError, ExportUnavailable
from hypervl_jax.export.runtime import Runtime

PARTS = ("vrc", "encoder_base", "encoder_large", "embedder", "decoder")


def test_the_manifest_says_what_the_parts_are(exported, tiny_config):
    m, c = manifest.check(exported), tiny_config.model
    assert [p.name for p in m.parts] == list(PARTS)
    assert sorted(p.name for p in exported.iterdir()) == sorted(
        ["manifest.json", "tokenizer.json", *(f"{name}.tflite" for name in PARTS)]
    )
    assert m.model == c
    assert m.vrc_scale == 0.9
    entries = {s.name: s for s in m.part("decoder").signatures}
    assert set(entries) == {"decode", "prefill_160", "prefill_96"}
    caches = {f"kv_cache_{side}_{i}": (1, 2, 192, 16) for i in range(c.llm.depth) for side in "kv"}
    decode, fill = entries["decode"], entries["prefill_96"]
    common = {"embeddings": (1, 96, 48), "input_pos": (96,), "mask": (1, 1, 96, 192)}
    assert {t.name: t.shape for t in fill.inputs} == common | caches
    assert {t.name: t.shape for t in fill.outputs} == caches
    assert {t.name: t.shape for t in decode.outputs} == {"logits": (1, 1, 512)} | caches
    (vision,) = m.part("encoder_large").signatures
    assert {t.name: (t.dtype, t.shape) for t in vision.inputs} == {
        "images": ("float32", (1, 32, 32, 3)),
        "mask": ("float32", (1, 16)),
    }


def test_only_builtin_operators(exported):
    for part in manifest.read(exported).parts:
        assert lower.check_ops(exported / part.file.file) == list(part.ops)
        assert not any(op.startswith(("CUSTOM", "FLEX", "STABLEHLO")) for op in part.ops)
    assert "SLICE" not in manifest.read(exported).part("encoder_base").ops  # of stacked weights, at every call
    assert "DEPTHWISE_CONV_2D" in manifest.read(exported).part("vrc").ops
    assert "EMBEDDING_LOOKUP" in manifest.read(exported).part("embedder").ops


def test_every_seam_was_measured(exported):
    parity = manifest.read(exported).parity
    seams = {"vrc", "encoder_base", "encoder_large", "embedder", "prefill_96", "prefill_160", "decode", "answers"}
    assert set(parity) == seams
    assert max(parity.values()) <= verify.LIMIT
    assert parity["decode"] > 0  # the runtime rounds otherwise than XLA: equal to the bit means not compared


def test_decoder_holds_its_weights_once(exported, tiny_model):
    weights = sum(x.nbytes for x in jax.tree.leaves(tiny_model.params["llm"]))
    graphs = 3 * 12_000  # what three signatures of two layers take without weights
    assert weights < (exported / "decoder.tflite").stat().st_size < weights + 3 * graphs


@pytest.mark.parametrize(
    ("part", "seam"),
    [("vrc", "vrc"), ("encoder_base", "encoder_base"), ("embedder", "embedder"), ("decoder", "decode")],
)
def test_a_wrong_part_is_named(part, seam, exported, tiny_model, tiny_screens, tmp_path):
    """One weight of one file is changed by 2 %; JAX keeps the right one."""
    m, folder = manifest.read(exported), tmp_path / "changed"
    shutil.copytree(exported, folder)
    made = parts.make(tiny_model.config, tiny_model.params, ["base"], [96, 160], 192)[part]
    leaves, tree = jax.tree.flatten(made.params)
    largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[largest] = np.array(leaves[largest]) * np.float32(1.02)
    lower.to_tflite(folder / f"{part}.tflite", jax.tree.unflatten(tree, leaves), made.signatures)
    files = {p.name: p.file.file for p in m.parts}
    manifest.write(folder, manifest.describe(folder, m.model, files, "tokenizer.json", {}, m.vrc_scale))
    found = {s.name: s for s in verify.seams(tiny_model, Runtime(folder), [tiny_screens[0].image])}
    assert not found[seam].ok
    assert found[seam].error > 1e-3
    wrong = {s for s in found if not found[s].ok} - {"answers"}
    assert wrong <= ({seam} if part != "decoder" else {"decode", "prefill_96", "prefill_160"})


def test_a_seam_that_is_not_a_number_fails():
    assert not verify.Seam("vrc", float("nan")).ok
    assert np.isnan(verify.relative(np.array([1.0, np.nan]), np.ones(2)))
    assert verify.relative(np.zeros(2), np.zeros(2)) == 0
    assert verify.relative(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5


class Broken(Runtime):
    """Files that give what JAX gives here, zeros, but for NaN in the last tile, cache and step."""

    cache_length, buckets = 8, [4]

    def __init__(self, folder):
        self.manifest = manifest.read(folder)

    def encode(self, pixels, p, branch):
        return np.stack([np.full((4, 48), x, np.float32) for x in (0, 0, np.nan)])

    def prefill(self, x):
        names = [f"kv_cache_{side}_{i}" for i in range(2) for side in "kv"]
        return {n: np.full((1, 2, 8, 16), np.nan if n == names[-1] else 0, np.float32) for n in names}

    def answer(self, *args, **kwargs):
        return SimpleNamespace(ids=(1, 2), ended=False)

    def step(self, x, at, caches):
        return np.full(512, np.nan if at == 3 else 0, np.float32), caches


def test_what_is_not_a_number_in_one_tile_or_cache_or_step_reaches_its_seam(exported, tiny_model, monkeypatch):
    cache = SimpleNamespace(k=np.zeros((1, 2, 8, 16)), v=np.zeros((1, 2, 8, 16)))
    state = SimpleNamespace(caches=(cache, cache), logits=np.ones((1, 512)))
    monkeypatch.setattr(verify, "_encode", lambda *args: np.zeros((1, 4, 48), np.float32))
    monkeypatch.setattr(verify, "_prefilled", lambda *args: state)
    monkeypatch.setattr(verify, "_led", lambda model, state, *rest: state)
    files, pixels, x = Broken(exported), np.zeros((32, 64, 3), np.uint8), np.zeros((1, 3, 48), np.float32)
    assert np.isnan(verify._encoder(tiny_model, files, pixels, "base")[0])
    assert np.isnan(verify._prefills(tiny_model, files, x, 4)["prefill_4"])
    assert np.isnan(verify._answers(tiny_model, files, pixels, "base", x, 4)[0])


def test_a_failed_export_leaves_nothing(tiny_model, tiny_screens, exported, tmp_path, monkeypatch):
    """Wrong weights in one part; an earlier export at the same place stays as it was."""
    embedder = parts.embedder

    def wrong(cfg, params):
        return embedder(cfg, {"llm": {"embed": params["llm"]["embed"] * np.float32(1.01)}})

    monkeypatch.setattr(parts, "embedder", wrong)
    out, pictures = tmp_path / "out", [tiny_screens[0].image]
    out.mkdir()
    with monkeypatch.context() as inside:
        inside.chdir(out)
        with pytest.raises(ExportError, match=r"out: not exported: embedder is 0\.01 of the largest value away from"):
            parts.export(tiny_model, ".", prefill=(128,), branches=("base",), verify_images=pictures, progress=False)
    assert list(tmp_path.rglob("*")) == [out]
    out.rmdir()
    shutil.copytree(exported, out)
    with pytest.raises(ExportError, match="embedder"):
        parts.export(tiny_model, out, prefill=(128,), branches=("base",), verify_images=pictures, progress=False)
    assert manifest.check(out) == manifest.check(exported)
    monkeypatch.undo()
    m = parts.export(tiny_model, out, prefill=(128,), branches=("base",), verify_images=pictures, progress=False)
    assert manifest.check(out) == m
    assert [p.name for p in m.parts] == ["vrc", "encoder_base", "embedder", "decoder"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_no_export_is_left_alone(tiny_model, exported, tmp_path, monkeypatch):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("words")
    mixed = tmp_path / "mixed"
    shutil.copytree(exported, mixed)
    (mixed / "notes.txt").write_text("words")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "net.tflite").write_bytes(b"")
    for path in (thesis, mixed, foreign, thesis / "chapter.txt"):
        with pytest.raises(ExportError, match=rf"{path.name}: .*remove it or name another folder"):
            parts.export(tiny_model, path, progress=False)
    assert (thesis / "chapter.txt").read_text() == "words"
    assert (mixed / "notes.txt").is_file()
    (mixed / "notes.txt").unlink()
    monkeypatch.chdir(mixed)
    with pytest.raises(ExportError, match=r"mixed: .*you are in this one"):
        parts.export(tiny_model, ".", progress=False)
    with pytest.raises(ExportError, match=r"prefill lengths \[512\] must lie in 2 .. cache = 256"):
        parts.export(tiny_model, tmp_path / "new", prefill=(512,), cache=256, progress=False)
    with pytest.raises(ExportError, match="at least one picture"):
        parts.export(tiny_model, tmp_path / "new", prefill=(8,), cache=16, verify_images=[], progress=False)
    assert not (tmp_path / "new").exists()


def test_without_the_converter_export_says_so(tiny_model, tmp_path, monkeypatch):
    importlib_import = lower.importlib.import_module

    def import_module(name):
        if name.startswith("litert_converter"):
            raise ModuleNotFoundError(name)
        return importlib_import(name)

    monkeypatch.setattr(lower.importlib, "import_module", import_module)
    with pytest.raises(ExportUnavailable, match=r"\[export\].*Everything but export works"):
        parts.export(tiny_model, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tiny", "quickstart", "nano"])
def test_default_lengths_hold_the_largest_prompt(name, tiny_tokenizer):
    cfg = presets.preset(name).model
    lengths, cache = parts.lengths(cfg, tiny_tokenizer)
    t, most = cfg.policy.tile, cfg.policy.max_tiles
    rows = max(r for r in range(1, plan.MAX_GRID + 1) if most % r == 0)
    p = plan.make((rows * t, most // rows * t), 1.0, cfg.policy)
    assert p.n_tiles == most + 1
    content = [{"type": "image"}, {"type": "text", "text": "~" * 64}]
    assert len(tiny_tokenizer.encode("~" * 64)) == 64
    row = text.render([{"role": "user", "content": content}], [p], tiny_tokenizer, cfg.text)
    assert len(row.ids) <= lengths[-1] <= cache - 32
    assert list(lengths) == sorted(set(lengths))


@pytest.mark.parametrize("cache", [400, 1536, 9728])
def test_at_paper_size_lengths_are_cut_and_pictures_fit_the_cache(cache, tiny_tokenizer):
    cfg = presets.hypervl_1p7b().model
    lengths, room = parts.lengths(cfg, tiny_tokenizer)
    assert (lengths, room) == ((352, 704, 1024), 9664)
    plans = [plan.make(p.shape[:2], 1.0, cfg.policy) for p in parts.default_pictures(cfg, cache=cache)]
    assert plans[0].n_tiles == 1
    assert [p.n_tiles for p in plans][-1] == {400: 1, 1536: 5, 9728: 10}[cache]
    assert max(p.tokens for p in plans) <= cache - 100


def test_default_pictures_run_from_one_tile_to_many(tiny_config):
    counts = [
        plan.make(p.shape[:2], 1.0, tiny_config.model.policy).n_tiles for p in parts.default_pictures(tiny_config.model)
    ]
    assert counts[0] == 1
    assert counts[-1] > 4
