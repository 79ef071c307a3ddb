"""Any picture down and up again, to the size and kind it had; and notes that cannot be trusted."""

import io
import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from hypervl_jax import image
from hypervl_jax.rescale import pictures, tiles, weights
from hypervl_jax.rescale.files import RescaleError
from hypervl_jax.rescale.hcd import HcdConfig
from hypervl_jax.rescale.pairs import Bicubic, Pair
from hypervl_jax.rescale.resample import bicubic

BICUBIC = Pair(Bicubic(2), {})
RNG = np.random.default_rng(0)


def noise(height, width, channels=3):
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


@pytest.fixture
def stored(tmp_path):
    """A Pillow picture as a file, read as `layers` reads it."""

    def stored(picture, name="x.png", **options):
        picture.save(tmp_path / name, **options)
        return image.layers(tmp_path / name)

    return stored


def opened(layers):
    return Image.open(io.BytesIO(pictures.png(layers)))


def through(pair, picture, tmp_path, config=None):
    """(small, restored) as Pillow opens them, by way of the file."""
    data = pictures.png(pictures.down(pair, picture, config))
    (tmp_path / "small.png").write_bytes(data)
    small = image.layers(tmp_path / "small.png")
    return Image.open(io.BytesIO(data)), opened(pictures.up(pair, small))


# --- kinds -----------------------------------------------------------------------------------------------------------


def palette():
    picture = Image.fromarray(noise(13, 21)).quantize(16)
    picture.info["transparency"] = 3
    return picture


KINDS = {
    "rgb": (lambda: Image.fromarray(noise(13, 21)), "RGB", "RGB"),
    "grey": (lambda: Image.fromarray(noise(13, 21)[..., 0]), "RGB", "L"),
    "black and white": (lambda: Image.fromarray(noise(13, 21)[..., 0]).convert("1"), "RGB", "L"),
    "rgba": (lambda: Image.fromarray(noise(13, 21, 4)), "RGBA", "RGBA"),
    "grey with alpha": (lambda: Image.fromarray(noise(13, 21, 4)).convert("LA"), "RGBA", "LA"),
    "palette": (lambda: Image.fromarray(noise(13, 21)).quantize(16), "RGB", "RGB"),
    "palette with a transparent colour": (palette, "RGBA", "RGBA"),
    "16 bit grey": (lambda: Image.fromarray(257 * noise(13, 21)[..., 0].astype(np.uint16)), "RGB", "L"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_comes_back(kind, stored, tmp_path):
    make, small_mode, mode = KINDS[kind]
    small, restored = through(BICUBIC, stored(make()), tmp_path)
    assert (small.size, small.mode) == ((11, 7), small_mode)
    assert (restored.size, restored.mode) == ((21, 13), mode)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_formats(kind, stored, tmp_path):
    _, restored = through(BICUBIC, stored(Image.fromarray(noise(9, 10)), f"x.{kind}"), tmp_path)
    assert (restored.size, restored.mode) == ((10, 9), "RGB")


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 1), (1, 7), (5, 5), (64, 3)])
def test_every_size_comes_back(size, tiny_pair, stored, tmp_path):
    for pair in (BICUBIC, tiny_pair, Pair(Bicubic(4), {})):
        small, restored = through(pair, stored(Image.fromarray(noise(*size))), tmp_path)
        assert small.size == (-(-size[1] // pair.scale), -(-size[0] // pair.scale))
        assert restored.size == size[::-1]


def test_what_is_added_at_the_border_is_a_mirror():
    x = noise(3, 5)
    got = pictures.filled(x, 4)
    assert got.shape == (4, 8, 3)
    np.testing.assert_array_equal(got[3, :5], x[2])
    np.testing.assert_array_equal(got[:3, 5:], x[:, 4:1:-1])
    np.testing.assert_array_equal(pictures.filled(x[:1, :1], 4), np.broadcast_to(x[0, 0], (4, 4, 3)))


def test_a_turned_picture_is_upright_in_both(stored, tmp_path):
    picture = Image.fromarray(np.zeros((8, 20, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6
    small, restored = through(BICUBIC, stored(picture, exif=exif), tmp_path)
    assert (small.size, restored.size) == ((4, 10), (8, 20))
    assert not small.getexif()


def test_alpha_is_resampled_and_colours_under_it_are_kept(stored, tmp_path):
    """Fully transparent: what is restored is what would have been without the transparency."""
    x = noise(12, 16)
    clear = np.dstack([x, np.zeros((12, 16), np.uint8)])
    clear[:, 8:, 3] = 255
    _, with_alpha = through(BICUBIC, stored(Image.fromarray(clear)), tmp_path)
    _, without = through(BICUBIC, stored(Image.fromarray(x)), tmp_path)
    np.testing.assert_array_equal(np.array(with_alpha)[..., :3], np.array(without))
    got = np.array(with_alpha)[..., 3]
    np.testing.assert_array_equal(got, bicubic(bicubic(clear[..., 3:], (6, 8)), (12, 16))[..., 0])
    assert (got[:, :5] == 0).all()
    assert (got[:, -5:] == 255).all()


def test_an_rgb_profile_is_handed_on_and_no_other(stored, tmp_path):
    profile = bytes(16) + b"RGB " + bytes(200)
    small, restored = through(BICUBIC, stored(Image.fromarray(noise(8, 8)), icc_profile=profile), tmp_path)
    assert small.info["icc_profile"] == restored.info["icc_profile"] == profile
    for other, picture in ((b"GRAY", noise(8, 8)[..., 0]), (b"CMYK", noise(8, 8))):
        profile = bytes(16) + other + bytes(200)
        small, _ = through(BICUBIC, stored(Image.fromarray(picture), icc_profile=profile), tmp_path)
        assert "icc_profile" not in small.info


def test_down_is_the_pairs_and_hcds_own(tiny_pair, stored):
    picture = stored(Image.fromarray(noise(10, 12)))
    np.testing.assert_array_equal(pictures.down(tiny_pair, picture).rgb, tiles.down(tiny_pair, picture.rgb))
    config = HcdConfig(0, 2)
    moved = pictures.down(BICUBIC, picture, config).rgb
    np.testing.assert_array_equal(moved, tiles.descend(BICUBIC, picture.rgb, config))
    assert (moved != pictures.down(BICUBIC, picture).rgb).any()


# --- notes -----------------------------------------------------------------------------------------------------------


def test_a_small_picture_needs_no_notes(stored, tmp_path):
    small = pictures.down(BICUBIC, stored(Image.fromarray(noise(13, 21))))
    bare = stored(opened(small).convert("RGB"), "bare.png", pnginfo=PngImagePlugin.PngInfo())
    assert pictures.notes(bare._replace(text={})) is None
    restored = pictures.up(BICUBIC, bare._replace(text={})).rgb
    assert restored.shape == (14, 22, 3)
    np.testing.assert_array_equal(restored[:13, :21], pictures.up(BICUBIC, small).rgb)


def test_a_grey_picture_without_notes_stays_grey(stored):
    assert opened(pictures.up(BICUBIC, stored(Image.fromarray(noise(5, 4)[..., 0])))).mode == "L"


GOOD = {"size": [13, 21], "scale": 2, "weights": "0" * 16, "grey": False}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({k: v for k, v in GOOD.items() if k != "weights"}),
        *(
            json.dumps(GOOD | {"size": size})
            for size in ([13, 21, 1], [15, 21], [10**30, 21], ["13", 21], 13, [13.0, 21], [-13, 21], [True, 21])
        ),
        *(json.dumps(GOOD | {"scale": scale}) for scale in (0, None, 3, 2.0)),
    ],
)
def test_notes_that_make_no_sense_are_no_notes(text):
    small = image.Layers(noise(7, 11), None, False, None, {pictures.CHUNK: text})
    assert pictures.notes(small) is None
    assert pictures.up(BICUBIC, small).rgb.shape == (14, 22, 3)


def test_a_small_picture_that_was_cut_is_no_longer_the_originals(stored):
    small = pictures.down(BICUBIC, stored(Image.fromarray(noise(13, 21))))
    cut = small._replace(rgb=small.rgb[:5])
    assert pictures.notes(small) is not None
    assert pictures.notes(cut) is None


def test_another_pair_is_refused(tiny_pair, stored):
    small = pictures.down(tiny_pair, stored(Image.fromarray(noise(13, 21))))
    assert pictures.notes(small) == ((13, 21), 2, weights.fingerprint(tiny_pair), False)
    with pytest.raises(RescaleError, match="made small by 2, this pair restores by 4"):
        pictures.up(Pair(Bicubic(4), {}), small)
    with pytest.raises(RescaleError, match=r"made small by weights [0-9a-f]{16}, these are [0-9a-f]{16}: give"):
        pictures.up(BICUBIC, small)
    assert pictures.up(BICUBIC, small, noted=False).rgb.shape == (14, 22, 3)


def test_what_would_be_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(image, "MAX_PIXELS", 1000)
    small = image.Layers(np.zeros((16, 16, 3), np.uint8), None, False, None, {})
    with pytest.raises(RescaleError, match="16 x 16 px times 2 is over the limit"):
        pictures.up(BICUBIC, small)


def test_what_was_small_enough_to_go_down_goes_up_again(monkeypatch):
    """Also where only what was added at its border would be too much."""
    monkeypatch.setattr(image, "MAX_PIXELS", 1000)
    small = pictures.down(BICUBIC, image.Layers(noise(31, 31), None, False, None, {}))
    assert pictures.up(BICUBIC, small).rgb.shape == (31, 31, 3)
