"""`hypervl data` as a user meets it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from hypervl_jax import cli


@pytest.fixture
def toy(tmp_path, tiny_picture):
    shutil.copy(tiny_picture, tmp_path / "screen.png")
    said = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": "a thing"}]
    rows = [
        {"id": i, "image": "screen.png", "conversations": [said[0], {"from": "gpt", "value": f"{i}"}]} for i in range(4)
    ]
    (tmp_path / "good.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "id": 9, "image": "../x.png"}])))
    return tmp_path


def test_check_says_where_and_why_and_ends_with_one(toy, tiny_folder, capsys):
    cli.main(["data", "check", str(toy / "good.jsonl"), "--model", str(tiny_folder)])
    said = capsys.readouterr().out
    assert "4 records, 0 of them cannot be used, 0 faults" in said
    assert "tokens a record" in said
    with pytest.raises(SystemExit) as stopped:
        cli.main(
            [
                "data",
                "check",
                str(toy / "bad.jsonl"),
                "--model",
                str(tiny_folder),
                "--ledger",
                str(toy / "faults.jsonl"),
            ]
        )
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert said.startswith(f"{toy / 'bad.jsonl'}:5: path-escape: ../x.png: leads out of {toy.resolve()}")
    assert json.loads((toy / "faults.jsonl").read_text())["line"] == 5


def test_check_against_the_shapes_of_a_config(toy, tiny_folder, tmp_path, capsys):
    config = tmp_path / "short.py"
    config.write_text(
        "import dataclasses\nfrom hypervl_jax import presets\n\n\ndef get_config():\n    c = presets.tiny()\n"
        "    return dataclasses.replace(c, data=dataclasses.replace(c.data, lengths=(8, 8, 8)))\n"
    )
    with pytest.raises(SystemExit):
        cli.main(["data", "check", str(toy / "good.jsonl"), "--model", str(tiny_folder), "--config", str(config)])
    assert "too-long" in capsys.readouterr().out


def test_show_draws_the_record_that_is_asked_for(toy, tiny_folder, capsys):
    out = toy / "sample.png"
    cli.main(["data", "show", str(toy / "good.jsonl"), "--line", "3", "--out", str(out), "--model", str(tiny_folder)])
    assert f"wrote {out}: " in capsys.readouterr().out
    assert np.asarray(Image.open(out)).shape[2] == 3


def test_build_writes_shards_that_check_and_show_read(toy, tiny_folder, capsys):
    pytest.importorskip("tensorflow_datasets", reason="needs the train extra")
    out = toy / "out"
    cli.main(["data", "build", str(toy / "bad.jsonl"), "--out", str(out), "--max-rate", "0.2"])
    said = capsys.readouterr().out
    assert "bad: 4 records, 1 times an epoch" in said
    assert "1 records left out" in said
    cli.main(["data", "check", str(out), "--model", str(tiny_folder)])
    assert "4 records, 0 of them cannot be used" in capsys.readouterr().out
    cli.main(["data", "show", str(out), "--line", "4", "--out", str(toy / "s.png"), "--model", str(tiny_folder)])


def test_data_alone_lists_its_verbs(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "hypervl data check train.jsonl" in said
    assert all(verb in said for verb in ("check", "show", "build"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["check", "gone.jsonl"], "gone.jsonl: no such file"),
        (["check", "good.jsonl", "--limit", "-1"], "--limit -1"),
        (["check", "good.jsonl", "--root", "nowhere"], "nowhere: no such folder"),
        (["check", "good.jsonl", "--ledger", "good.jsonl"], "is there already"),
        (["show", "good.jsonl", "--out", "a.jpg"], "name a .png"),
        (["show", "good.jsonl", "--out", "a.png", "--line", "77"], "--line 77: no record"),
        (["show", "good.jsonl", "--out", "a.png", "--ratio", "0"], "--ratio 0"),
        (["show", "bad.jsonl", "--out", "a.png", "--line", "5"], "bad.jsonl:5: path-escape"),
        (["build", "good.jsonl", "--out", "good.jsonl"], "is there already"),
        (["build", "good.jsonl", "--out", "o", "--max-rate", "1.5"], "--max-rate 1.5"),
        (["build", "bad.jsonl", "--out", "o"], "1 of 5 records"),
    ],
)
def test_what_cannot_be_is_one_line(argv, said, toy, tiny_folder, monkeypatch, capsys):
    if argv[0] == "build":
        pytest.importorskip("tensorflow_datasets", reason="needs the train extra")
    monkeypatch.chdir(toy)
    before = {p: p.read_bytes() for p in toy.rglob("*") if p.is_file()}
    model = ["--model", str(tiny_folder)] if argv[0] != "build" else []
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", *argv, *model])
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert said in " ".join(err.split())
    assert err.splitlines()[-1].startswith("hypervl: ")
    assert {p: p.read_bytes() for p in toy.rglob("*") if p.is_file()} == before
