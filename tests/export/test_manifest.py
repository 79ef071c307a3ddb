"""A manifest is what the files say; a folder that differs from it is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.export import lower, manifest
from hypervl_jax.export.manifest import ManifestError


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder of two parts and a tokenizer, without a manifest."""
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    folder = tmp_path_factory.mktemp("template")
    args = (jax.ShapeDtypeStruct((1, 4), jnp.float32),)
    signature = lower.Signature("project", lambda p, x: x @ p["w"].T, args, ("x",), ("y",))
    for name in ("vrc", "projector"):
        lower.to_tflite(folder / f"{name}.tflite", {"w": np.ones((2, 4), np.float32)}, [signature])
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def folder(template, tiny_config, tmp_path):
    for file in template.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    parts = {name: f"{name}.tflite" for name in ("vrc", "projector")}
    parity = {"vrc": 1e-6, "answers": 1}
    manifest.write(tmp_path, manifest.describe(tmp_path, tiny_config.model, parts, "tokenizer.json", parity))
    return tmp_path


def edit(folder, change):
    path = folder / manifest.NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_what_older_manifests_do_not_know_is_empty(folder):
    edit(folder, lambda values: [values.pop(k) for k in ("lowered", "bits", "peak_bytes")])
    assert manifest.read(folder).peak_bytes == {}


def test_round_trip_says_everything(folder, tiny_config):
    m = manifest.check(folder)
    assert m == manifest.read(folder)
    assert m.model == tiny_config.model
    assert m.tokens_per_tile == tiny_config.model.policy.tokens_per_tile == 4
    assert m.parity == {"vrc": 1e-6, "answers": 1.0}
    assert m.versions["jax"] == jax.__version__
    assert m.min_runtime == lower.inspect(folder / "vrc.tflite").min_runtime
    part = m.part("projector")
    assert part.ops == ("FULLY_CONNECTED",)
    assert part.signatures[0].inputs == (manifest.Tensor("x", "float32", (1, 4)),)
    assert part.signatures[0].outputs == (manifest.Tensor("y", "float32", (1, 2)),)
    assert part.file.bytes == (folder / "projector.tflite").stat().st_size
    assert {p.name for p in folder.iterdir()} == {"manifest.json", "tokenizer.json", "vrc.tflite", "projector.tflite"}
    with pytest.raises(ManifestError, match="no part 'decoder' was exported; there are vrc, projector"):
        m.part("decoder")


def test_missing_truncated_tampered_and_unknown_files_are_refused(folder):
    vrc, whole = folder / "vrc.tflite", (folder / "vrc.tflite").read_bytes()
    vrc.unlink()
    with pytest.raises(ManifestError, match=r"vrc\.tflite: missing"):
        manifest.check(folder)
    vrc.write_bytes(whole[:-1])
    with pytest.raises(ManifestError, match=r"vrc\.tflite: \d+ bytes instead of \d+: truncated"):
        manifest.check(folder)
    vrc.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ManifestError, match=r"vrc\.tflite: not the file that was exported"):
        manifest.check(folder)
    vrc.write_bytes(whole)
    manifest.check(folder)
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(ManifestError, match=r"tokenizer\.json: not the file"):
        manifest.check(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra.tflite").write_bytes(whole)
    with pytest.raises(ManifestError, match=r"extra\.tflite not in manifest\.json"):
        manifest.check(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(note=1), "manifest.note: no such setting"),
        (lambda v: v.pop("parts"), "manifest.parts: missing"),
        (lambda v: v.pop("parity"), "manifest.parity: expected names with a float"),
        (lambda v: v["versions"].update(jax=1), "manifest.versions: expected names with a str"),
        (lambda v: v["parts"][0].update(kind="x"), r"manifest.parts\[0\].kind: no such setting"),
        (lambda v: v["parts"][0]["file"].update(bytes="many"), r"parts\[0\].file.bytes: expected int"),
        (lambda v: v["parts"][0]["file"].update(file="../vrc.tflite"), "not the bare name of a file"),
        (lambda v: v["parts"].append(v["parts"][0]), "part vrc is listed twice"),
        (lambda v: v.update(tokens_per_tile=5), "tokens_per_tile 5"),
        (lambda v: v["model"]["policy"].update(tile=40), "manifest.model"),
        (lambda v: v.update(format=2), "not a manifest of format 1"),
        (lambda v: v.update(vrc_scale=-1), "vrc_scale -1.0 must be above 0"),
        (lambda v: v.update(vrc_scale=float("nan")), "manifest.vrc_scale: expected a finite number"),
        (lambda v: v["parity"].update(vrc=float("nan")), "manifest.parity: expected names with a float"),
    ],
)
def test_a_manifest_is_read_strictly(folder, change, message):
    edit(folder, change)
    with pytest.raises(ManifestError, match=message) as e:
        manifest.read(folder)
    assert "manifest.json" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_folder_without_or_with_half_a_manifest_is_refused(folder):
    path = folder / manifest.NAME
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ManifestError, match="damaged: not JSON"):
        manifest.read(folder)
    path.write_text("[" * 10**5)
    with pytest.raises(ManifestError, match="damaged: not JSON"):
        manifest.read(folder)
    path.write_text("[]")
    with pytest.raises(ManifestError, match="not a manifest"):
        manifest.read(folder)
    path.unlink()
    with pytest.raises(ManifestError, match="not an exported model"):
        manifest.check(folder)
    path.mkdir()
    with pytest.raises(ManifestError, match="cannot be read"):
        manifest.read(folder)


def test_describe_refuses_a_damaged_part(folder, tiny_config):
    (folder / "vrc.tflite").write_bytes(b"nothing")
    with pytest.raises(lower.ExportError, match=r"vrc\.tflite: not a \.tflite file"):
        manifest.describe(folder, tiny_config.model, {"vrc": "vrc.tflite"}, "tokenizer.json", {})


def test_newest_runtime_wins():
    assert manifest._version("2.10.0") > manifest._version("2.9.0")
