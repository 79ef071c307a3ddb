"""`hypervl rescale` as a user meets it: what is written and printed, and that bad input writes nothing."""

import json
import re
import shlex
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypervl_jax import cli, rescaling
from hypervl_jax.rescale import metrics
from hypervl_jax.rescale.hcd import HcdConfig
from hypervl_jax.rescale.resample import bicubic
from hypervl_jax.rescaling import Hcd

ROOT = Path(__file__).parents[1]
BICUBIC = ["--pair", "bicubic-x2"]


def scene(height=40, width=36, seed=0):
    """Smooth, with edges: something to lose."""
    rng = np.random.default_rng(seed)
    x = np.kron(rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3)), np.ones((8, 8, 1)))
    return x[:height, :width].astype(np.uint8)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(scene(41, 37)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def run(capsys):
    def run(*argv):
        cli.main(["rescale", *map(str, argv)])
        return capsys.readouterr()

    return run


@pytest.fixture
def fails(capsys, tmp_path):
    """Runs a command that must fail and write nothing; returns its one line."""

    def files():
        return {p.relative_to(tmp_path): p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}

    def run(*argv):
        before = files()
        with pytest.raises(SystemExit) as stopped:
            cli.main(["rescale", *map(str, argv)])
        assert stopped.value.code == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("hypervl: ")
        assert said.err.count("\n") == 1
        assert files() == before
        return said.err

    return run


@pytest.fixture(scope="module")
def irn(tmp_path_factory, as_published):
    """Weights of a tiny IRN x2, and of a tiny IRN x4, that mean nothing."""
    import jax
    import jax.numpy as jnp

    from hypervl_jax.rescale.irn import Irn
    from hypervl_jax.rescale.pairs import Pair

    folder, rng = tmp_path_factory.mktemp("irn"), np.random.default_rng(0)
    for net in (Irn((1,), growth=2), Irn((1, 1), growth=2)):
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        params = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), shapes)
        as_published(Pair(net, params), folder / f"x{net.scale}.npz")
    return folder


# --- down and up -----------------------------------------------------------------------------------------------------


def test_there_and_back(photo, run):
    small, restored = photo.with_name("photo_lr.png"), photo.with_name("photo_sr.png")
    said = run("down", photo, *BICUBIC)
    assert said.out == f"{small}: 19 x 21 px of 37 x 41\n"
    assert said.err.startswith(f"{photo}: 37 x 41 px, 30 steps over 1 tile, about ")
    with Image.open(small) as picture:
        assert (picture.mode, picture.size) == ("RGB", (19, 21))
    assert run("up", small, *BICUBIC).out == f"{restored}: 37 x 41 px\n"
    with Image.open(restored) as picture:
        got = np.array(picture)
    plain = bicubic(bicubic(scene(42, 38), (21, 19)), (42, 38))[:41, :37]
    assert metrics.psnr(got, scene(41, 37)) > metrics.psnr(plain, scene(41, 37)) + 0.05


def test_without_hcd_it_is_the_pairs_own(photo, run, tmp_path):
    said = run("down", photo, *BICUBIC, "--no-hcd", "--out", tmp_path / "new" / "a.png")
    assert "steps" not in said.err
    with Image.open(tmp_path / "new" / "a.png") as picture:
        want = bicubic(np.pad(scene(41, 37), ((0, 1), (0, 1), (0, 0)), "symmetric"), (21, 19))
        assert np.abs(np.array(picture).astype(int) - want).max() <= 1


def test_weights_of_a_file(photo, run, irn, tmp_path):
    how = ["--pair", irn / "x2.npz", "--hr-steps", "1", "--lr-steps", "1", "--seed", "3"]
    run("down", photo, *how, "--out", tmp_path / "a.png")
    run("down", photo, *how, "--out", tmp_path / "b.png")
    run("down", photo, *how[:-1], "4", "--out", tmp_path / "c.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    assert run("up", tmp_path / "a.png", *how[:2], "--out", tmp_path / "d.png").out.endswith("d.png: 37 x 41 px\n")


def test_up_of_any_small_picture(photo, run):
    said = run("up", photo, *BICUBIC)
    assert said.out == f"{photo.with_name('photo_sr.png')}: 74 x 82 px, 2 times 37 x 41: it notes no original\n"


def test_a_folder_goes_on_where_it_was_interrupted(tmp_path, run):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("a.png", "b.jpg", "c.webp")):
        Image.fromarray(scene(seed=i)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("not a picture, and not named as one")
    argv = ["down", tmp_path / "in", *BICUBIC, "--no-hcd", "--out", tmp_path / "small"]
    assert run(*argv).out.count(" px of ") == 3
    (tmp_path / "small" / "b_lr.png").unlink()
    stamp = (tmp_path / "small" / "a_lr.png").stat().st_mtime_ns
    said = run(*argv)
    assert said.out.count(" px of ") == 1
    assert "2 are there already and stay; --overwrite makes them anew" in said.err
    assert (tmp_path / "small" / "a_lr.png").stat().st_mtime_ns == stamp
    assert run(*argv, "--overwrite").out.count(" px of ") == 3
    assert run("up", tmp_path / "small", *BICUBIC, "--out", tmp_path / "large").out.count(": 36 x 40 px\n") == 3
    assert sorted(p.name for p in (tmp_path / "large").iterdir()) == ["a_sr.png", "b_sr.png", "c_sr.png"]


def test_a_bad_picture_does_not_stop_the_others(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("a.png", "b.png", "c.png")):
        Image.fromarray(scene(seed=i)).save(tmp_path / "in" / name)
    broken = tmp_path / "in" / "b.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["rescale", "down", str(tmp_path / "in"), *BICUBIC, "--no-hcd", "--out", str(tmp_path / "small")])
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert said.out.count(" px of ") == 2
    first, last = said.err.splitlines()
    assert first.startswith(f"hypervl: {broken}: ")
    assert last == f"hypervl: 1 of 3 pictures failed, 2 are done: {broken}"
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == ["a_lr.png", "c_lr.png"]


def test_tiles_of_a_large_picture(tmp_path, run):
    Image.fromarray(scene(200, 150)).save(tmp_path / "a.png")
    argv = [tmp_path / "a.png", *BICUBIC, "--no-hcd", "--overwrite", "--out", tmp_path / "b.png"]
    run("down", *argv, "--tile", "128")
    tiled = np.array(Image.open(tmp_path / "b.png"))
    run("down", *argv)
    assert np.abs(np.array(Image.open(tmp_path / "b.png")).astype(int) - tiled).max() <= 1


# --- eval and compare ------------------------------------------------------------------------------------------------


def test_eval_prints_a_row_a_picture_and_writes_json(tmp_path, run):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("a.png", "b.png")):
        Image.fromarray(scene(41, 37, seed=i)).save(tmp_path / "in" / name)
    out = tmp_path / "found.json"
    said = run("eval", tmp_path / "in", *BICUBIC, "--hr-steps", "2", "--lr-steps", "3", "--out", out).out.splitlines()
    assert said[0].split() == ["plain:", "dB,", "SSIM", "LR3:", "dB,", "SSIM", "HR2+LR3:", "dB,", "SSIM"]
    assert [line.split()[0] for line in said[1:4]] == ["a.png", "b.png", "mean"]
    assert said[-1] == f"wrote {out}"
    found = json.loads(out.read_text())
    rows = list(found["pictures"].values())
    for i, row in enumerate(rows):
        hr = scene(41, 37, seed=i)[:40, :36]
        want = bicubic(bicubic(hr, (20, 18)), (40, 36))
        assert row["plain"]["psnr_y"] == pytest.approx(metrics.psnr(want, hr, 2), abs=0.05)
        assert row["plain"]["psnr_y"] < row["LR3"]["psnr_y"]
        assert row["plain"]["lr_psnr"] is None
        assert f"{row['LR3']['psnr_y']:.3f} {row['LR3']['ssim_y']:.4f}" in said[1 + i]
    assert found["mean"]["LR3"]["psnr_y"] == pytest.approx(np.mean([r["LR3"]["psnr_y"] for r in rows]))
    assert found["pair"]["scale"] == 2
    assert found["how"]["eps_mode"] == "rms"


def test_the_setting_of_our_own_can_be_asked_for(load):
    """What hcd_setting.py chose is what --help says is best."""
    config = load("hcd").chosen(ROOT / "benchmarks" / "results")
    assert config == rescaling._config(Hcd(hr_steps=10, lr_steps=25, lr_eps=0.9))
    assert HcdConfig(eps_mode="rms") == rescaling._config(Hcd())


def test_eval_without_hcd_is_one_column(photo, run):
    assert run("eval", photo, *BICUBIC, "--no-hcd").out.splitlines()[0].split() == ["plain:", "dB,", "SSIM"]


def test_eval_of_a_bad_picture_counts_the_others(photo, tmp_path, capsys):
    (tmp_path / "empty.png").write_bytes(b"")
    out = tmp_path / "found.json"
    argv = ["eval", str(tmp_path / "empty.png"), str(photo), *BICUBIC, "--no-hcd", "--out", str(out)]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["rescale", *argv])
    assert stopped.value.code == 1
    assert "1 of 2 pictures failed" in capsys.readouterr().err.splitlines()[-1]
    assert list(json.loads(out.read_text())["pictures"]) == [str(photo)]


def test_compare_draws_what_was_asked_for(tmp_path, run):
    Image.fromarray(scene(96, 120)).save(tmp_path / "a.png")
    out = tmp_path / "compared.png"
    how = ["--hr-steps", "1", "--lr-steps", "1", "--out", out]
    said = run("compare", tmp_path / "a.png", *BICUBIC, *how).out
    assert [line.split(":")[0] for line in said.splitlines()] == ["plain", "LR1", "HR1+LR1", "bicubic", f"wrote {out}"]
    with Image.open(out) as picture:
        assert picture.mode == "RGB"
        first, size = picture.tobytes(), picture.size
    assert size[0] > 5 * 300  # original, bicubic, three ways
    run("compare", tmp_path / "a.png", *BICUBIC, *how, "--overwrite", "--at", 10, 90)
    with Image.open(out) as picture:
        assert picture.tobytes() != first


# --- what cannot be --------------------------------------------------------------------------------------------------


def bomb(path):
    """A PNG that says it is 60,000 pixels square."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


BAD = {
    "missing": (lambda path: None, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text": (lambda path: path.write_text("not a picture"), "not a picture in a known format"),
    "cut": (lambda path: (Image.fromarray(scene()).save(path), path.write_bytes(path.read_bytes()[:80])), "damaged"),
    "bomb": (bomb, "more pixels than Pillow opens"),
    "float": (lambda path: Image.fromarray(np.zeros((20, 20), np.float32)).save(path, "TIFF"), "no defined white"),
}


@pytest.mark.parametrize("verb", ["down", "up", "eval", "compare"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_one_line(kind, verb, tmp_path, fails):
    make, message = BAD[kind]
    make(tmp_path / "bad.png")
    kept = tmp_path / ("out.json" if verb == "eval" else "out.png")
    kept.write_text("what was there")
    said = fails(verb, tmp_path / "bad.png", *BICUBIC, "--out", kept, "--overwrite")
    assert f"{tmp_path / 'bad.png'}: " in said
    assert message in said


def test_another_pair_than_it_was_made_by(photo, irn, run, fails, tmp_path):
    small = tmp_path / "s.png"
    run("down", photo, "--pair", irn / "x2.npz", "--no-hcd", "--out", small)
    assert f"{small}: made small by 2, this pair restores by 4" in fails("up", small, "--pair", irn / "x4.npz")
    said = fails("up", small, *BICUBIC)
    assert "made small by weights" in said
    assert "--no-notes to restore it anyway" in said
    assert run("up", small, *BICUBIC, "--no-notes").out.endswith(": 38 x 42 px\n")


def test_pairs_that_ship_have_names(photo, run, fails, tmp_path):
    """Without --pair it is the light one by 2."""
    h, w = np.asarray(Image.open(photo)).shape[:2]
    run("down", photo, "--no-hcd", "--out", tmp_path / "2.png")
    run("down", photo, "--no-hcd", "--pair", "light_x2", "--out", tmp_path / "named.png")
    run("down", photo, "--no-hcd", "--pair", "light_x4", "--out", tmp_path / "4.png")
    for scale in (2, 4):
        with Image.open(tmp_path / f"{scale}.png") as small:
            assert small.size == (-(-w // scale), -(-h // scale))
    assert (tmp_path / "2.png").read_bytes() == (tmp_path / "named.png").read_bytes()
    assert "restores by 2: give --pair light_x4" in fails("up", tmp_path / "4.png", "--out", tmp_path / "no.png")


def test_pairs_that_are_none(photo, tmp_path, fails):
    for name in ("light_x3", "bicubic-x9", ""):
        said = fails("up", photo, "--pair", name)
        assert f"--pair {name}: choose light_x2, light_x4, bicubic-x2, -x3, -x4, or a file of weights" in said
    assert "nowhere.npz: cannot be read" in fails("up", photo, "--pair", "nowhere.npz")
    assert "weights are .npz, .safetensors or .pth" in fails("up", photo, "--pair", "weights.bin")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and no more")
    assert "bad.npz: damaged" in fails("down", photo, "--pair", tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    assert "weights of no pair known by its names" in fails("down", photo, "--pair", tmp_path / "other.npz")


def test_nothing_is_overwritten(photo, tmp_path, fails, run):
    small = photo.with_name("photo_lr.png")
    small.write_text("mine")
    assert f"{small}: is there already" in fails("down", photo, *BICUBIC)
    assert "is the picture that is read" in fails("down", photo, *BICUBIC, "--out", photo, "--overwrite")
    (tmp_path / "found.json").write_text("mine")
    assert "is there already" in fails("eval", photo, *BICUBIC, "--out", tmp_path / "found.json")
    assert "is there already" in fails("compare", photo, *BICUBIC, "--out", small)
    run("down", photo, *BICUBIC, "--no-hcd", "--overwrite")
    assert small.read_bytes()[:4] == b"\x89PNG"


def test_a_picture_that_is_read_is_not_overwritten_under_another_name(tmp_path, fails):
    """small/../in, a link and the whole path are the folder that is read."""
    (tmp_path / "in").mkdir()
    (tmp_path / "small").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for name in ("a.png", "a_lr.png"):
        Image.fromarray(scene()).save(tmp_path / "in" / name)
    for out in (tmp_path / "in", tmp_path / "link", tmp_path / "small" / ".." / "in"):
        said = fails("down", tmp_path / "in", *BICUBIC, "--no-hcd", "--overwrite", "--out", out)
        assert f"{out / 'a_lr.png'}: is a picture that is read" in said


def test_a_picture_named_twice_is_done_once(tmp_path):
    from hypervl_jax.rescale import files

    for name in ("b.PNG", "a.jfif", "c.pnm", "d.txt", ".e.png"):
        (tmp_path / name).touch()
    want = [tmp_path / name for name in ("a.jfif", "b.PNG", "c.pnm")]
    assert files.found((tmp_path, tmp_path / "a.jfif", tmp_path / "." / "c.pnm")) == want


def test_the_longest_name_is_saved(tmp_path):
    from hypervl_jax.rescale import files

    path = tmp_path / ("n" * 251 + ".png")
    files.save(path, b"whole")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"whole"


def test_settings_that_cannot_be(photo, tmp_path, fails):
    Image.fromarray(scene()).save(tmp_path / "photo.webp")
    (tmp_path / "empty").mkdir()
    both = [photo, tmp_path / "photo.webp"]
    assert "name a folder for them with --out" in fails("down", *both, *BICUBIC)
    assert "would both become" in fails("down", *both, *BICUBIC, "--out", tmp_path / "new")
    assert "no pictures in this folder" in fails("down", tmp_path / "empty", *BICUBIC, "--out", tmp_path / "new")
    assert "name a .png file" in fails("down", photo, *BICUBIC, "--out", tmp_path / "new.jpg")
    assert "name a .json file" in fails("eval", photo, *BICUBIC, "--out", tmp_path / "new.txt")
    assert "name a .png file" in fails("compare", photo, *BICUBIC, "--out", tmp_path / "new.jpg")
    assert "names a picture, but a folder" in fails("down", *both, *BICUBIC, "--out", tmp_path / "new.png")
    assert "cannot be written" in fails("down", photo, *BICUBIC, "--out", photo / "new.png")
    assert "no picture; give one or more" in fails("down", *BICUBIC)
    assert "--seed -1" in fails("up", photo, *BICUBIC, "--seed", "-1")
    assert "--tile 100: at least 128" in fails("up", photo, *BICUBIC, "--tile", "100")
    assert "--lr-eps 0: choose a number above 0" in fails("down", photo, *BICUBIC, "--lr-eps", "0")
    assert "--lr-steps -2" in fails("down", photo, *BICUBIC, "--lr-steps", "-2")
    assert "--at 99 1: choose 0 to 35" in fails(
        "compare", photo, *BICUBIC, "--out", tmp_path / "c.png", "--at", "99", "1"
    )  # the one line: how long HCD would take is not said, for it is not begun


def test_a_picture_too_small_to_compare(tmp_path, fails):
    Image.fromarray(scene(14, 30)).save(tmp_path / "a.png")
    assert "30 x 14 px once cut to a multiple of 2; at least 15" in fails("eval", tmp_path / "a.png", *BICUBIC)


def test_the_tile_told_is_the_tile_taken():
    from hypervl_jax import rescaling
    from hypervl_jax.rescale import tiles

    assert rescaling.Run().tile == tiles.TILE
    assert tiles.LEAST == 128


def test_what_fails_halfway_leaves_nothing(photo, fails, monkeypatch):
    """A disk that is full."""
    import os

    def full(*_):
        raise OSError(28, "No space left on device", "photo_lr.png")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left on device" in fails("down", photo, *BICUBIC, "--no-hcd")


def test_the_code_of_the_page_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    [code] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "rescaling.md").read_text(), re.M | re.S)
    names: dict = {}
    exec(compile(code, "rescaling.md", "exec"), names)
    assert names["restored"].shape == (1, *names["pixels"].shape)
    assert metrics.psnr(names["restored"][0], names["pixels"], 2) > 35


def test_the_page_says_what_is_printed(tmp_path, monkeypatch, capsys):
    """docs/rescaling.md: the commands run, and print what stands below them; figures to 0.05 dB."""
    page = (ROOT / "docs" / "rescaling.md").read_text()
    commands, printed = re.search(r"^```sh\n(.*?)^```$.*?^```\n(.*?)^```$", page, re.M | re.S).groups()
    monkeypatch.chdir(tmp_path)
    for line in commands.splitlines():
        program, *argv = shlex.split(line)
        assert program == "hypervl"
        cli.main([str(ROOT / a) if a.startswith("examples/") else a for a in argv])
    got, numbers = capsys.readouterr().out, re.compile(r"\d+(?:\.\d+)?")
    assert numbers.sub("#", got).split() == numbers.sub("#", printed).split()
    found, said = ([float(n) for n in numbers.findall(text)] for text in (got, printed))
    assert found == pytest.approx(said, abs=0.05)
