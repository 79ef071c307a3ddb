"""The host loop over the files answers as JAX answers, without JAX."""

import json
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import compress, generate, image, plan, text, tokens
from hypervl_jax.export import manifest, verify
from hypervl_jax.export.manifest import ManifestError
from hypervl_jax.export.runtime import AnswerError, Runtime
from hypervl_jax.model import hypervl

NEW = 8


@pytest.fixture(scope="module")
def files(exported):
    return Runtime(exported)


def jax_answers(model, screens, ratios, branch):
    """Greedy ids up to the end of each screen's first question: one batch, padded on the left."""
    cfg, tok = model.config, model.tokenizer
    plans = [plan.make(s.image.shape[:2], r, cfg.policy) for s, r in zip(screens, ratios, strict=True)]
    rows = []
    features = np.zeros((len(screens), 10 * cfg.policy.tokens_per_tile, cfg.llm.width), np.float32)
    for b, (s, p) in enumerate(zip(screens, plans, strict=True)):
        content = [{"type": "image"}, {"type": "text", "text": s.questions[0].text}]
        row = text.render([{"role": "user", "content": content}], [p], tok, cfg.text)
        rows.append((row.ids, row.slots))
        tiles = np.zeros((10, cfg.policy.tile, cfg.policy.tile, 3), np.uint8)
        mask = np.zeros((10, cfg.policy.patches_per_side**2), bool)
        tiles[: p.n_tiles], mask[: p.n_tiles] = image.prepare(s.image, p), p.patch_mask()
        features[b] = np.asarray(encode(model.params, cfg, branch, tiles, mask)).reshape(features[b].shape)
    ids, slots, pads = generate.pad_left(rows, 192, tok.special(tokens.PAD))
    x = hypervl.embed(model.params, jnp.asarray(ids), jnp.asarray(slots), jnp.asarray(features))
    end, forbidden = tok.special(tokens.IM_END), tok.forbidden(cfg.llm.vocab)
    said = generate.generate(
        model.params, cfg, x, jnp.asarray(pads), jnp.asarray(forbidden), jax.random.key(0), generate.Sampler(), end, NEW
    )
    stops = {end, tok.special(tokens.PAD)}
    return [tuple(row[: next((i for i, t in enumerate(row) if t in stops), NEW)]) for row in np.asarray(said).tolist()]


encode = jax.jit(hypervl.encode_batch, static_argnums=(1, 2))


@pytest.mark.parametrize("branch", ["base", "large"])
def test_ten_screens_are_answered_as_by_jax(branch, files, tiny_model, tiny_screens):
    net, cfg = tiny_model.params["vrc"], tiny_model.config.vrc
    ratios = [compress.predict(net, cfg, s.image, tiny_model.info["vrc_scale"]) for s in tiny_screens]
    assert len({round(r, 3) for r in ratios}) > 3  # or VRC would be a constant
    for vrc, shares in ((True, ratios), (False, [1.0] * len(ratios))):
        found = [files.answer(s.image, s.questions[0].text, branch, vrc, NEW) for s in tiny_screens]
        assert [a.ratio for a in found] == pytest.approx(shares, rel=verify.LIMIT)
        want = jax_answers(tiny_model, tiny_screens, [a.ratio for a in found], branch)
        assert [a.ids for a in found] == want
        assert len(set(want)) > 3  # the answers depend on the screen
        for a in found:
            assert a.text == text.strip_answer(tiny_model.tokenizer, a.ids)
            assert a.plan.ratio == a.ratio


def test_without_jax(exported, files, tiny_screens, tmp_path):
    """A Python in which JAX and everything built on it cannot be imported gives the same answer."""
    screen, path = tiny_screens[0], tmp_path / "screen.npy"
    np.save(path, screen.image)
    code = f"""
import sys
from importlib.machinery import PathFinder
absent = ("jax", "jaxlib", "flax", "optax", "orbax", "litert_converter", "tensorflow", "torch")
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
try:
    import jax
except ModuleNotFoundError:
    import numpy as np
from hypervl_jax.export.runtime import Runtime
a = Runtime({str(exported)!r}).answer(np.load({str(path)!r}), {screen.questions[0].text!r}, max_new={NEW})
print(*a.ids, a.ratio)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    want = files.answer(screen.image, screen.questions[0].text, max_new=NEW)
    assert out.stdout.split() == [*map(str, want.ids), str(want.ratio)]


def test_pieces_come_one_by_one_and_make_the_text(files, tiny_screens):
    start = time.perf_counter()
    stream, pieces = files.stream(tiny_screens[1].image, "what is this?", max_new=NEW), []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            answer = end.value
            break
    assert "".join(pieces).strip() == answer.text
    assert len(pieces) > 1
    assert len(answer.ids) == NEW or answer.ended
    assert set(answer.seconds) == {"load", "preprocess", "vrc", "encode", "prefill", "decode"}
    assert 0 < sum(answer.seconds.values()) < time.perf_counter() - start
    assert answer.seconds["vrc"] > 0
    assert files.answer(tiny_screens[1].image, "what is this?", vrc=False).seconds["vrc"] == 0


def test_an_answer_ends_where_the_model_ends_it(files, tiny_screens, monkeypatch):
    tok = files.tokenizer
    script, step = iter([*tok.encode("ab"), tok.special(tokens.IM_END)]), files.step

    def led(x, at, caches):
        logits, caches = step(x, at, caches)
        logits[[tok.special(tokens.IM_START), tok.special(tokens.PAD)]] = 1e4  # forbidden
        logits[next(script)] = 1e3
        return logits, caches

    monkeypatch.setattr(files, "step", led)
    answer = files.answer(tiny_screens[0].image, "what is this?", max_new=NEW)
    assert answer.ended
    assert answer.text == "ab"


def test_an_answer_is_cut_by_the_cache(exported, tiny_screens, monkeypatch):
    files = Runtime(exported)
    n = len(files.prompt(plan.make(tiny_screens[0].image.shape[:2], 1.0, files.config.policy), "what?").ids)
    step = files.step

    def endless(x, at, caches):
        logits, caches = step(x, at, caches)
        logits[[files.tokenizer.special(tokens.IM_END), files.tokenizer.special(tokens.PAD)]] = -1e9
        return logits, caches

    monkeypatch.setattr(files, "step", endless)
    answer = files.answer(tiny_screens[0].image, "what?", vrc=False, max_new=10_000)
    assert not answer.ended
    assert len(answer.ids) == files.cache_length - n + 1  # the last token is never read back


def test_prefill_in_any_chunks_is_the_same(exported):
    """180 positions: one run of 160 and single steps, or two of 96; then fewer."""
    files = Runtime(exported)
    x = np.random.default_rng(0).normal(size=(1, 180, files.config.llm.width)).astype(np.float32)
    want = files.prefill(x)
    files.buckets = [96]
    for n in (180, 97, 96):
        found = files.prefill(x[:, :n])
        assert found.keys() == want.keys()
        for name, cache in found.items():
            np.testing.assert_allclose(cache[:, :, :n], want[name][:, :, :n], atol=2e-5)


def test_what_does_not_fit_is_refused(exported, files, tiny_screens):
    pixels = tiny_screens[0].image
    with pytest.raises(AnswerError, match=r"the prompt needs \d+ tokens.*exported for 192: ask a shorter question"):
        files.answer(pixels, "word " * 200)
    assert files.branches == ["base", "large"]


def test_a_folder_with_one_branch_says_so(exported, tiny_screens, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(exported, folder)
    (folder / "encoder_large.tflite").unlink()
    m = manifest.read(folder)
    names = {p.name: p.file.file for p in m.parts if p.name != "encoder_large"}
    manifest.write(folder, manifest.describe(folder, m.model, names, "tokenizer.json", m.parity))
    files = Runtime(folder)
    assert files.branches == ["base"]
    with pytest.raises(ManifestError, match="no part 'encoder_large' was exported; there are vrc, encoder_base"):
        files.answer(tiny_screens[0].image, "what is this?", "large")


def _entry(values, part, name):
    found = next(p for p in values["parts"] if p["name"] == part)["signatures"]
    return next(s for s in found if s["name"] == name)


def _shape(values, part, entry, tensor, shape):
    e = _entry(values, part, entry)
    next(t for t in (*e["outputs"], *e["inputs"]) if t["name"] == tensor)["shape"] = shape


def _vocab(values, rows):
    values["model"]["llm"]["vocab"] = rows
    _shape(values, "decoder", "decode", "logits", [1, 1, rows])


def _cache(values, length):
    for e in next(p for p in values["parts"] if p["name"] == "decoder")["signatures"]:
        for t in (*e["inputs"], *e["outputs"]):
            if t["name"].startswith("kv_cache_"):
                t["shape"][2] = length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["parts"].pop(), "decode needs two caches a layer"),
        (lambda v: _entry(v, "decoder", "decode").update(name="step"), "decode needs two caches a layer"),
        (lambda v: v["parts"].pop(0), "vrc vrc: proxy is None"),
        (lambda v: _entry(v, "decoder", "prefill_96").update(name="prefill_0"), "prefill_0: lengths lie in 2 .. 192"),
        (lambda v: _entry(v, "decoder", "prefill_96").update(name="prefill_x"), "prefill_x: lengths lie in"),
        (lambda v: _entry(v, "decoder", "prefill_96").update(name="prefill_97"), "decoder prefill_97: embeddings is"),
        (lambda v: _shape(v, "decoder", "decode", "logits", [1, 1, 511]), r"logits is \(1, 1, 511\), its model needs"),
        (lambda v: _shape(v, "encoder_base", "vision", "images", [1, 64, 64, 3]), "encoder_base vision: images is"),
        (lambda v: _shape(v, "decoder", "decode", "kv_cache_v_1", [1, 2, 64, 16]), "decode needs two caches a layer"),
        (lambda v: v["model"]["llm"].update(depth=10**12), "decode needs two caches a layer"),
        (lambda v: _vocab(v, 10**12), "a vocabulary of 1000000000000 rows is not in an embedder of this size"),
        (lambda v: _cache(v, 10**12), "C up to 1048576"),
    ],
)
def test_a_manifest_that_does_not_make_sense_is_refused(exported, tmp_path, change, message):
    """Its hashes are right: the files are those that were exported."""
    for file in exported.iterdir():
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / manifest.NAME
    values = json.loads(path.read_text())
    change(values)
    if len(values["parts"]) < 5:
        (tmp_path / ({"vrc", "decoder"} - {p["name"] for p in values["parts"]}).pop()).with_suffix(".tflite").unlink()
    path.unlink()
    path.write_text(json.dumps(values))
    with pytest.raises(ManifestError, match=message) as e:
        Runtime(tmp_path)
    assert str(path) in str(e.value)


def test_damaged_folders_are_refused(exported, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(exported, folder)
    part = folder / "decoder.tflite"
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(ManifestError, match=r"decoder\.tflite: 1000 bytes instead of \d+: truncated"):
        Runtime(folder)
    with pytest.raises(ManifestError, match="not an exported model"):
        Runtime(tmp_path)
