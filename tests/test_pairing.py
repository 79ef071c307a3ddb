"""`hypervl rescale train` and `export` as a user meets them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypervl_jax import cli, needs

ROOT = Path(__file__).parents[1]
CONFIG = """
from hypervl_jax.rescale.irn import Irn
from hypervl_jax.rescale.train import PairConfig, PairTrain


def get_config():
    return PairConfig("mine", Irn((1,), growth=2, noise=0.0), PairTrain(3, 2, 16, lr=1e-3, save_every=2))
"""


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        x = np.random.default_rng(i).integers(0, 256, (5, 6, 3), np.uint8)
        Image.fromarray(np.kron(x, np.ones((8, 8, 1), np.uint8))).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return path


def fails(capsys, *argv, code=1):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["rescale", *map(str, argv)])
    assert stopped.value.code == code
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [s for s in said.err.splitlines() if s.startswith("hypervl: ")]
    return line


def test_trained_from_a_folder_it_rescales(photos, mine, tmp_path, capsys):
    pytest.importorskip("array_record", reason="needs the train extra")
    out = tmp_path / "run"
    line = fails(capsys, "train", mine, "--data", photos, "--out", out, "--max-hours", 1e-9, code=75)
    assert "--max-hours at step 1 of 3; it is saved, the same command goes on" in line
    cli.main(["rescale", "train", str(mine), "--data", str(photos), "--out", str(out)])
    said = capsys.readouterr().out
    made = out / "pair.npz"
    assert re.search(rf"wrote {made}: \d+ kB\n", said)
    assert f"use it:     hypervl rescale down PICTURE --pair {made}\n" in said
    assert [json.loads(s)["step"] for s in (out / "log.jsonl").read_text().splitlines()] == [0, 1, 2]
    cli.main(
        ["rescale", "down", str(photos / "0.png"), "--pair", str(made), "--no-hcd", "--out", str(tmp_path / "s.png")]
    )
    cli.main(["rescale", "up", str(tmp_path / "s.png"), "--pair", str(made), "--out", str(tmp_path / "l.png")])
    with Image.open(tmp_path / "l.png") as restored:
        assert restored.size == (48, 40)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["light_x3", "--data", "."], "no preset 'light_x3'; choose hcd_x2"),
        (["gone.py", "--data", "."], "gone.py: no such file; give a preset (hcd_x2"),
        ([ROOT / "configs/nano.py", "--data", "."], "must return a PairConfig, not Config"),
        (["tiny_x2", "--data", "gone"], "--data gone: neither a folder nor a data set"),
        (["tiny_x2", "--data", ".", "--steps", 0], "--steps 0: at least 1"),
        (["tiny_x2", "--data", ".", "--max-hours", 0], "--max-hours 0: above 0"),
        (["tiny_x2", "--data", ".", "--profile", -1], "--profile -1: at least 0"),
    ],
)
def test_what_cannot_be_trained_is_one_line(argv, message, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorflow_datasets", reason="needs the train extra")
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "train", *argv, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pictures_that_are_too_small_are_one_line(tmp_path, mine, capsys):
    pytest.importorskip("array_record", reason="needs the train extra")
    (tmp_path / "small").mkdir()
    Image.new("RGB", (12, 40)).save(tmp_path / "small" / "a.png")
    line = fails(capsys, "train", mine, "--data", tmp_path / "small", "--out", tmp_path / "run")
    assert "crops of 16 px fit in none of 1 pictures; choose at most 12" in line


def test_without_the_train_extra(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(needs, "need", lambda *names: (_ for _ in ()).throw(needs.UsageError(needs.missing(names[0]))))
    line = fails(capsys, "train", "tiny_x2", "--data", photos, "--out", tmp_path / "run")
    assert "pip install 'hypervl-jax[train]'" in line


def test_exported_with_its_error(tmp_path, as_published, capsys):
    pytest.importorskip("litert_converter", reason="needs the export extra")
    import jax

    from hypervl_jax.rescale.irn import Irn
    from hypervl_jax.rescale.pairs import Pair

    net = Irn((1,), growth=2)
    as_published(Pair(net, net.init(jax.random.key(0))), tmp_path / "x2.npz")
    cli.main(["rescale", "export", str(tmp_path / "x2.npz"), "--out", str(tmp_path / "phone"), "--side", "64"])
    said = capsys.readouterr().out
    assert float(re.search(r"up: (\S+) from JAX", said)[1]) <= 1e-4
    assert "64 x 64 px to 2 times that" in said
    assert sorted(p.name for p in (tmp_path / "phone").iterdir()) == ["manifest.json", "upscaler.tflite"]


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    pytest.importorskip("litert_converter", reason="needs the export extra")
    out = tmp_path / "phone"
    assert "--side 0" in fails(capsys, "export", "bicubic-x2", "--out", out, "--side", 0)
    assert "at least 64 at scale 2" in fails(capsys, "export", "bicubic-x2", "--out", out, "--side", 16)
    assert "gone.npz: cannot be read" in fails(capsys, "export", tmp_path / "gone.npz", "--out", out)
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert "is not an exported upscaler" in fails(capsys, "export", "bicubic-x2", "--out", out, "--side", 64)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_without_the_export_extra(tmp_path, capsys, monkeypatch):
    from hypervl_jax.export import lower

    def absent():
        raise lower.ExportUnavailable("litert_converter is not installed: pip install 'hypervl-jax[export]'")

    monkeypatch.setattr(lower, "require", absent)
    assert "hypervl-jax[export]" in fails(capsys, "export", "bicubic-x2", "--out", tmp_path / "phone")
    assert not (tmp_path / "phone").exists()
