"""Pictures to learn from: prepared once, cut by seed and step alone, small crops those of whole small pictures."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("grain", reason="needs the train extra")
pytest.importorskip("array_record", reason="needs the train extra")

from hypervl_jax.image import ImageError
from hypervl_jax.needs import UsageError
from hypervl_jax.rescale import photographs
from hypervl_jax.rescale.files import RescaleError
from hypervl_jax.rescale.resample import bicubic

SIZES = [(40, 37), (52, 61), (30, 30), (16, 90)]


def drawn(size, seed):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(SIZES):
        Image.fromarray(drawn(size, i)).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def source(folder, tmp_path_factory):
    return photographs.found(str(folder), tmp_path_factory.mktemp("data"), progress=False)


def test_a_folder_is_prepared_as_it_is(source):
    assert [tuple(s) for s in source.sizes] == SIZES
    for i, size in enumerate(SIZES):
        np.testing.assert_array_equal(source[i], drawn(size, i))


def test_pictures_stay_decoded_as_far_as_memory_is_given(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "KEPT_BYTES", 13_955)  # the second, of 9,516, does not fit after the first
    some, decoded = photographs.found(str(folder), tmp_path, progress=False), []
    load = photographs.image.load
    monkeypatch.setattr(photographs.image, "load", lambda *a, **k: decoded.append(k["name"]) or load(*a, **k))
    for _ in range(3):
        for i, size in enumerate(SIZES):
            np.testing.assert_array_equal(some[i], drawn(size, i))
    times = [sum(name.endswith(f":{i}") for name in decoded) for i in range(len(SIZES))]
    assert times == [1, 3, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        some[0][0, 0] = 0


def test_it_is_prepared_once_and_anew_when_a_picture_differs(folder, tmp_path):
    for f in folder.glob("*.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f.name).write_bytes(f.read_bytes())
    names = {photographs.found(str(tmp_path / "in"), tmp_path / "out", progress=False).name for _ in range(2)}
    assert len(names) == 1
    Image.fromarray(drawn((33, 33), 9)).save(tmp_path / "in" / "0.png")
    again = photographs.found(str(tmp_path / "in"), tmp_path / "out", progress=False)
    assert again.name not in names
    np.testing.assert_array_equal(again[0], drawn((33, 33), 9))


def test_what_is_no_picture_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(drawn((32, 32), 0)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"b\.png: the file is empty"):
        photographs.found(str(tmp_path / "in"), tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").rglob("*array_record*"))


def test_names_that_are_no_data(tmp_path):
    with pytest.raises(UsageError, match="neither a folder nor a data set"):
        photographs.found("no-such-thing", tmp_path, progress=False)


def test_div2k_by_name_where_it_is_not_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))
    with pytest.raises(UsageError, match="div2k/bicubic_x2 --file_format=array_record"):
        photographs.found("div2k", tmp_path, progress=False)


def test_a_data_set_by_name_where_it_is_prepared(tmp_path, monkeypatch):
    """DIV2K's own builder, its downloads replaced by two small pictures of the same names."""
    tfds = pytest.importorskip("tensorflow_datasets")
    for name, size in (("0001", (40, 52)), ("0002", (64, 48))):
        for kind, at in (("HR", "hr/DIV2K_train_HR"), ("x2", "lr")):
            path = tmp_path / at / f"{name}{'' if kind == 'HR' else 'x2'}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn(size if kind == "HR" else (size[0] // 2, size[1] // 2), int(name))).save(path)
    builder = tfds.builder("div2k/bicubic_x2", data_dir=tmp_path / "tfds", file_format="array_record")

    def examples(self, lr_path, hr_path):
        for path in sorted((tmp_path / "lr").glob("*.png")):  # as its own does, without TensorFlow's file system
            yield path.name, {"lr": str(path), "hr": str(tmp_path / "hr/DIV2K_train_HR" / f"{path.name[:4]}.png")}

    kind = type(builder)
    monkeypatch.setattr(kind, "_generate_examples", examples)
    splits = {"train": lambda self: self._generate_examples("", "")}
    monkeypatch.setattr(kind, "_split_generators", lambda self, _: {k: f(self) for k, f in splits.items()})
    builder.download_and_prepare()
    monkeypatch.setattr(tfds, "builder", lambda name, **how: builder)
    found = photographs.found("div2k", tmp_path, progress=False)
    assert sorted(map(tuple, found.sizes)) == [(40, 52), (64, 48)]
    which = next(i for i in range(2) if tuple(found.sizes[i]) == (40, 52))
    np.testing.assert_array_equal(found[which], drawn((40, 52), 1))


# --- crops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 4])
def test_the_small_crop_is_that_of_the_whole_pictures_small_one(scale):
    """Wherever it lies, at borders too, and however it is mirrored and turned."""
    picture = drawn((43, 50), 5)
    whole = picture[: 43 // scale * scale, : 50 // scale * scale]
    small = bicubic(whole, (whole.shape[0] // scale, whole.shape[1] // scale))
    side, n = 6 * scale, 6
    every = {}
    for top in range(small.shape[0] - n + 1):
        for left in range(small.shape[1] - n + 1):
            hr = whole[top * scale : top * scale + side, left * scale : left * scale + side]
            for flips in np.ndindex(2, 2, 2):
                x, y = hr, small[top : top + n, left : left + n]
                for on, turn in zip(flips, (np.fliplr, np.flipud, lambda a: a.swapaxes(0, 1)), strict=True):
                    x, y = (turn(x), turn(y)) if on else (x, y)
                every[x.tobytes()] = y
    seen = set()
    for seed in range(200):
        hr, low = photographs.crop(picture, scale, side, np.random.default_rng(seed))
        np.testing.assert_array_equal(low, every[hr.tobytes()])
        seen.add(hr.tobytes())
    assert len(seen) > 150


def test_an_epoch_shows_each_picture_once():
    steps = [photographs.shown(6, 4, seed=1, step=s) for s in range(3)]
    assert [len(s) for s in steps] == [4, 4, 4]
    flat = [n for step in steps for n in step]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list(range(6))
    assert flat[:6] != flat[6:]


def test_batches_are_of_seed_and_step(source):
    def some(start, seed=0):
        return list(photographs.batches(source, 2, 24, 3, seed, 5, start))

    whole, rest, other = some(0), some(3), some(0, seed=1)
    assert len(whole) == 5
    assert whole[0].hr.shape == (3, 24, 24, 3)
    assert whole[0].small.shape == (3, 12, 12, 3)
    for a, b in zip(whole[3:], rest, strict=True):
        np.testing.assert_array_equal(a.hr, b.hr)
        np.testing.assert_array_equal(a.small, b.small)
    assert (whole[0].hr != other[0].hr).any()


def test_pictures_smaller_than_a_crop_are_left_out(source):
    assert list(photographs.large(source, 2, 32)) == [0, 1]
    with pytest.raises(RescaleError, match="crops of 54 px fit in none of 4 pictures; choose at most 52"):
        photographs.large(source, 2, 54)
