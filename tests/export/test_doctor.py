"""Every fault of an exported folder is named by its file, and none brings the process down."""

import dataclasses
import hashlib
import json
import shutil

import pytest

from hypervl_jax import cli, quantize, tokens
from hypervl_jax.export import doctor, lower, manifest, pack, parts

FILES = ("vrc.tflite", "encoder_base.tflite", "embedder.tflite", "decoder.tflite", "tokenizer.json")


@pytest.fixture(scope="module")
def template(tiny_model, tmp_path_factory):
    """Parts of the tiny model in 8 and 4 bits, as `export` writes them, without its proof."""
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    pytest.importorskip("ai_edge_litert", reason="the LiteRT runtime has no wheel here")
    folder, recipe = tmp_path_factory.mktemp("doctor"), quantize.decoder4()
    made = parts.make(tiny_model.config, quantize.quantize(tiny_model.params, recipe), ("base",), (64,), 96)
    for name, part in made.items():
        lower.to_tflite(folder / f"{name}.tflite", quantize.restored(part.params), part.signatures)
        pack.pack(folder / f"{name}.tflite", quantize.matrices(part.params))
    tiny_model.tokenizer.save(folder / "tokenizer.json")
    files = {name: f"{name}.tflite" for name in made}
    more = {"recipe": tuple(map(str, recipe)), "bits": parts.bits(made)}
    manifest.write(folder, manifest.describe(folder, tiny_model.config, files, "tokenizer.json", {}, **more))
    return folder


@pytest.fixture
def folder(template, tmp_path):
    return shutil.copytree(template, tmp_path / "phone")


def rehash(folder, name):
    """Make the manifest agree with a file, as one who wants to deceive would."""
    path, data = folder / manifest.NAME, (folder / name).read_bytes()
    values = json.loads(path.read_text())
    listed = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    if name == values["tokenizer"]["file"]:
        values["tokenizer"] = listed
    for part in values["parts"]:
        if part["file"]["file"] == name:
            part["file"] = listed
    path.write_text(json.dumps(values))


def test_a_whole_folder_has_no_faults_and_loads(folder, capsys):
    assert doctor.examine(folder) == []
    cli.main(["doctor", str(folder), "--no-load"])
    assert capsys.readouterr().out == f"{folder}: whole\n"


def test_truncation_at_fifty_offsets(folder):
    """Ten of each file; of some also with a manifest that says that this is how it must be."""
    for name in FILES:
        whole = (folder / name).read_bytes()
        said = (folder / manifest.NAME).read_text()
        for i in range(10):
            cut = len(whole) * i // 10
            (folder / name).write_bytes(whole[:cut])
            assert doctor.examine(folder, load=False) == [
                f"{folder / name}: {cut} bytes instead of {len(whole)}: truncated or replaced; export again"
            ]
            if i % 5 == 4:
                rehash(folder, name)
                (fault,) = doctor.examine(folder, load=False)
                assert str(folder / name) in fault or "is not in an embedder of this size" in fault
                (folder / manifest.NAME).write_text(said)
        (folder / name).write_bytes(whole)


def test_flipped_bytes(folder):
    for name in FILES:
        whole = (folder / name).read_bytes()
        for i in range(5):
            changed = bytearray(whole)
            changed[(len(whole) - 1) * i // 4] ^= 0x5A
            (folder / name).write_bytes(changed)
            assert doctor.examine(folder, load=False) == [
                f"{folder / name}: not the file that was exported (its hash differs); export again"
            ]
        (folder / name).write_bytes(whole)


def test_flipped_tables_of_a_file_whose_hash_was_made_to_fit_bring_nothing_down(folder):
    """Where the tables of a part are; the loader is in another process."""
    path, name = folder / "embedder.tflite", "embedder.tflite"
    whole, said = path.read_bytes(), (folder / manifest.NAME).read_text()
    for at in (0, 4, 9, 24, 40):
        changed = bytearray(whole)
        changed[at] ^= 0xFF
        path.write_bytes(changed)
        rehash(folder, name)
        assert all(name in fault for fault in doctor.examine(folder, load=False))
        (folder / manifest.NAME).write_text(said)


@pytest.mark.parametrize(
    ("code", "says"), [("import os; os.abort()", "crashed on it (signal 6)"), ("1 / 0", "division")]
)
def test_a_file_that_brings_the_runtime_down_is_a_fault(code, says, folder):
    (fault,) = doctor._loaded(folder / "vrc.tflite", code)
    assert fault.startswith(f"{folder / 'vrc.tflite'}: ")
    assert says in fault


def test_swapped_parts_are_told_from_damaged_ones(folder):
    a, b = folder / "vrc.tflite", folder / "encoder_base.tflite"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    assert doctor.examine(folder) == [
        f"{a}: this is encoder_base.tflite under another name; put the files back or export again",
        f"{b}: this is vrc.tflite under another name; put the files back or export again",
    ]
    rehash(folder, a.name)
    rehash(folder, b.name)
    faults = doctor.examine(folder)
    assert len(faults) == 2
    assert f"{a}: not the vrc of manifest.json: it takes and gives other arrays" in faults[0]
    assert f"{b}: not the encoder_base of manifest.json" in faults[1]


def test_missing_and_unknown_files_are_all_named(folder):
    (folder / "vrc.tflite").unlink()
    (folder / "tokenizer.json").unlink()
    (folder / "stray.tflite").write_bytes(b"")
    faults = doctor.examine(folder)
    assert [fault.rpartition("/")[2].partition(":")[0] for fault in faults] == ["tokenizer.json", "vrc.tflite", "phone"]
    assert "stray.tflite not in manifest.json" in faults[2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(format=0), "not a manifest of format 1; export again with this version"),
        (lambda v: v.pop("parts"), "parts"),
        (lambda v: v["model"]["llm"].update(depth=3), "decode needs two caches a layer"),
        (lambda v: v["model"]["policy"].update(tile=64), "manifest.model"),
        (lambda v: v.update(recipe=[".*=int3"]), "a rule is PATTERN=KIND"),
    ],
)
def test_an_older_or_another_models_manifest(change, says, folder):
    path = folder / manifest.NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    (fault,) = doctor.examine(folder)
    assert str(path) in fault
    assert says in fault


def test_a_manifest_from_before_recipes_is_read(folder):
    path = folder / manifest.NAME
    values = json.loads(path.read_text())
    for key in ("lowered", "bits", "recipe", "source"):
        del values[key]
    path.write_text(json.dumps(values))
    assert doctor.examine(folder, load=False) == []
    m = manifest.read(folder)
    assert (m.recipe, m.bits, m.lowered, m.source) == ((), {}, {}, "")


def test_the_tokenizer_of_another_model(folder):
    other = tokens.train_tokenizer(["a text of some words", "and another one"] * 2, vocab_size=1024)
    path = folder / "tokenizer.json"
    other.save(path)
    assert "tokenizer.json" in doctor.examine(folder)[0]
    m = manifest.read(folder)
    rehash(folder, path.name)
    values = json.loads((folder / manifest.NAME).read_text())
    assert values["tokenizer"]["sha256"] != m.tokenizer.sha256
    path.write_text(json.dumps({"model": {}}))
    rehash(folder, path.name)
    (fault,) = doctor.examine(folder)
    assert f"{path}: not the tokenizer of this model" in fault


def test_the_verb_names_each_and_fails(folder, capsys):
    for name in ("vrc.tflite", "decoder.tflite"):
        (folder / name).write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", str(folder)])
    out, err = capsys.readouterr()
    assert stopped.value.code == 1
    assert "vrc.tflite: 0 bytes" in out
    assert "decoder.tflite: 0 bytes" in out
    assert err == f"hypervl: {folder}: 2 faults, named above\n"


def test_a_recipe_says_what_the_file_is_in(folder):
    m = manifest.read(folder)
    assert quantize.parse(m.recipe) == quantize.decoder4()
    assert dataclasses.asdict(m)["bits"]["vrc"] == 32
    assert 8 < m.bits["embedder"] < 9
    assert 4.5 < m.bits["layers"] < 8  # 48 inputs of most matrices have no groups of 32
    found = pack.read(folder / "decoder.tflite")
    assert found["blocks.layers.0.down.weight"].bits == 4
    assert found["blocks.layers.0.q.weight"].bits == found["embed"].bits == 8
