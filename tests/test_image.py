"""One decode policy over every kind of file, made on the fly; damage and bombs are errors; and what the model sees."""

import io
import os
import struct
import time
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from hypervl_jax import image as images
from hypervl_jax.config import PlanPolicy
from hypervl_jax.image import ImageError, layers, load, prepare, proxy, resize
from hypervl_jax.plan import make
from hypervl_jax.tiling import untile

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def scene() -> np.ndarray:
    """u8[24 40 3], different in every corner: whatever is turned or mirrored shows."""
    x = np.zeros((24, 40, 3), np.uint8)
    x[:8, :16], x[:8, 16:], x[8:, :16], x[8:, 16:] = RED, GREEN, BLUE, (200, 200, 40)
    return x


def encode(picture, kind: str, **options) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes = b"", **chunks: bytes) -> bytes:
    """A PNG by hand: what Pillow reads but does not write, and headers that lie."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- formats and modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("PPM", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("GIF", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 8),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 8),
        ("AVIF", {"quality": 95, "subsampling": "4:4:4"}, 24),
    ],
)
def test_formats(kind, options, tolerance, tmp_path):
    data = encode(scene(), kind, **options)
    pixels = load(data)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.astype(int), scene().astype(int), atol=tolerance)
    path = tmp_path / f"picture.{kind.lower()}"
    path.write_bytes(data)
    with Image.open(path) as opened:
        for same in (path, str(path), opened):
            np.testing.assert_array_equal(load(same), pixels)


def test_layers_are_what_load_puts_on_white(tmp_path):
    alpha = np.linspace(0, 255, 24 * 40).astype(np.uint8).reshape(24, 40)
    (tmp_path / "x.png").write_bytes(encode(np.dstack([scene(), alpha]), "PNG"))
    apart = layers(tmp_path / "x.png")
    np.testing.assert_array_equal(apart.rgb, scene())
    np.testing.assert_array_equal(apart.alpha, alpha)
    share = alpha[..., None] / 255
    np.testing.assert_allclose(load(tmp_path / "x.png"), scene() * share + 255 * (1 - share), atol=1)
    (tmp_path / "y.png").write_bytes(encode(scene(), "PNG"))
    np.testing.assert_array_equal(layers(tmp_path / "y.png").rgb, load(tmp_path / "y.png"))
    assert layers(tmp_path / "y.png")[1:] == (None, False, None, {})
    with pytest.raises(ImageError, match="no such file"):
        layers(tmp_path / "z.png")


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """How a camera stores the scene under an EXIF orientation: where its first row and column lie in the scene."""
    quarter = np.rot90(upright)  # first row = right edge, from the top
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),  # row 0 left, column 0 top
        6: quarter,  # row 0 right, column 0 top
        7: quarter[:, ::-1],  # row 0 right, column 0 bottom
        8: np.rot90(upright, -1),  # row 0 left, column 0 bottom
    }[orientation]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encode(np.ascontiguousarray(stored(scene(), orientation)), kind, exif=exif, **options)
    np.testing.assert_allclose(load(data).astype(int), scene().astype(int), atol=8 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b""]
)
@pytest.mark.filterwarnings("ignore")
def test_broken_exif_counts_as_upright(exif):
    np.testing.assert_allclose(load(encode(scene(), "JPEG", quality=95, subsampling=0, exif=exif)), scene(), atol=8)


def test_unknown_orientation_counts_as_upright():
    for value in (0, 9, 700):
        exif = Image.Exif()
        exif[0x0112] = value
        np.testing.assert_array_equal(load(encode(scene(), "PNG", exif=exif)), scene())


def rgba(colour, alpha) -> Image.Image:
    return Image.new("RGBA", (4, 3), (*colour, alpha))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("alpha", "expected"), [(0, WHITE), (255, RED), (128, (255, 127, 127))])
def test_alpha_lies_on_white(kind, alpha, expected):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = load(encode(rgba(RED, alpha), kind, **options))
    assert tuple(pixels[1, 2]) == expected


def palette(transparency=None) -> bytes:
    x = Image.new("P", (2, 1))
    x.putpalette([*RED, *BLUE])
    x.putpixel((1, 0), 1)
    return encode(x, "PNG", **({} if transparency is None else {"transparency": transparency}))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (palette(), [RED, BLUE]),
        (palette(transparency=0), [WHITE, BLUE]),
        (palette(transparency=bytes([128, 0])), [(255, 127, 127), WHITE]),
        (encode(np.array([[0, 200]], np.uint8), "PNG"), [(0, 0, 0), (200, 200, 200)]),
        (encode(np.array([[0, 200]], np.uint8), "PNG", transparency=0), [WHITE, (200, 200, 200)]),
        (encode(np.array([[RED, BLUE]], np.uint8), "PNG", transparency=RED), [WHITE, BLUE]),
        (encode(np.array([[0, 255]], np.uint8) > 0, "PNG"), [(0, 0, 0), WHITE]),
        (encode(Image.new("LA", (2, 1), (100, 0)), "PNG"), [WHITE, WHITE]),
        (encode(Image.new("LA", (2, 1), (100, 255)), "PNG"), [(100,) * 3] * 2),
        (encode(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF"), [RED, RED]),
        (encode(Image.new("YCbCr", (2, 1), (255, 128, 128)), "TIFF"), [WHITE, WHITE]),
    ],
)
def test_modes(data, expected):
    assert [tuple(p) for p in load(data)[0].tolist()] == expected


def test_cmyk_jpeg_is_not_inverted():
    cyan = load(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95))
    np.testing.assert_allclose(cyan[4, 4].astype(int), (0, 255, 255), atol=4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 1, 128, 129, 255, 256, 257, 20_000, 40_000, 65_407, 65_535]], np.uint16)
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(load(encode(values, kind)), np.stack([expected] * 3, -1))


def test_16_bit_by_hand():
    rgb = struct.pack(">B6H", 0, 0x1234, 0x8000, 0xFFFF, 0, 0xFFFF, 0x00FF)
    assert load(png(2, 1, 16, 2, rgb)).tolist() == [[[0x12, 0x80, 0xFF], [0, 0xFF, 0]]]
    with_alpha = struct.pack(">B4H", 0, 0x8000, 0xFFFF, 0x8000, 0)
    assert load(png(2, 1, 16, 4, with_alpha))[0, :, 0].tolist() == [0x80, 0xFF]
    keyed = struct.pack(">B2H", 0, 0x1234, 0x1235)  # the key is exact: its neighbour of the same high byte stays
    assert load(png(2, 1, 16, 0, keyed, tRNS=struct.pack(">H", 0x1234)))[0, :, 0].tolist() == [0xFF, 0x12]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("value", [200, 1e6])
def test_pixels_without_a_white_are_refused(dtype, value):
    picture = Image.fromarray(np.full((3, 3), value, dtype))
    for source in (encode(picture, "TIFF"), picture):
        with pytest.raises(ImageError, match="white"):
            load(source)


def test_signed_16_bit_has_no_white_either():
    signed = encode(np.full((3, 3), 200, np.uint16), "TIFF", tiffinfo={339: 2})
    assert Image.open(io.BytesIO(signed)).mode == "I"
    with pytest.raises(ImageError, match="signed"):
        load(signed)


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("MPO", {})]
)
def test_animations_give_their_first_frame(kind, options):
    frames = [Image.new("RGB", (6, 5), c) for c in (RED, GREEN, BLUE)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_allclose(load(data).astype(int), np.full((5, 6, 3), RED), atol=2 if kind == "MPO" else 0)


def test_profiles_are_ignored():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for icc in (profile, b"not a profile"):
        np.testing.assert_array_equal(load(encode(scene(), "PNG", icc_profile=icc)), scene())


def test_arrays_and_images():
    np.testing.assert_array_equal(load(scene()), scene())
    np.testing.assert_array_equal(load(scene()[:, ::-2]), scene()[:, ::-2])
    np.testing.assert_array_equal(load(scene()[..., 0]), np.stack([scene()[..., 0]] * 3, -1))
    transparent = np.concatenate([scene(), np.zeros((24, 40, 1), np.uint8)], -1)
    assert (load(transparent) == 255).all()
    given_image = Image.fromarray(scene())
    load(given_image)[:] = 0  # the caller's own picture is left alone
    np.testing.assert_array_equal(np.asarray(given_image), scene())
    for bad in (
        scene().astype(np.float32),
        scene()[None],
        np.zeros((3, 3, 2), np.uint8),
        np.zeros((0, 3, 3), np.uint8),
    ):
        with pytest.raises(ImageError):
            load(bad, name="frame 7")


# --- damage, limits, and names ----------------------------------------------------------------------------------------


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore")
def test_shortened_files_are_errors(kind, kept):
    data = encode(noise(), kind)
    with pytest.raises(ImageError, match=r"damaged|known format"):
        load(data[: int(len(data) * kept)])


def test_hidden_damage_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES"):
        load(encode(scene(), "PNG"))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_corrupt_bytes_give_pixels_or_an_image_error(kind, changes):
    data = bytearray(encode(scene(), kind))
    for where, value in changes:
        data[min(int(where * len(data)), len(data) - 1)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = load(bytes(data))
        except ImageError:
            return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


@pytest.mark.parametrize("side", [10_001, 13_000, 60_000])  # over our limit; over Pillow's warning; over Pillow's error
def test_bombs_are_refused_by_their_header(side):
    bomb = png(side, side, 8, 2, bytes(1000))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match="pixels"):
            load(bomb)
    assert time.perf_counter() - start < 1


def test_limits_are_settings():
    data = encode(noise(), "PNG")
    with pytest.raises(ImageError, match="max_pixels"):
        load(data, max_pixels=40 * 50 - 1)
    with pytest.raises(ImageError, match="max_pixels"):
        load(noise(), max_pixels=40 * 50 - 1)
    assert load(data, max_pixels=40 * 50, max_bytes=len(data)).shape == (40, 50, 3)
    with pytest.raises(ImageError, match="max_bytes"):
        load(data, max_bytes=len(data) - 1)


@pytest.mark.parametrize(
    "data", [b"plain text, not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"\x89PNG\r\n\x1a\n"]
)
@pytest.mark.filterwarnings("ignore")
def test_other_files_are_refused(data):
    with pytest.raises(ImageError, match=r"damaged|known format") as error:
        load(data, name="upload 3")
    assert str(error.value).startswith("upload 3: ")
    assert "plain text" not in str(error.value)  # never the file's own bytes


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ImageError, match=r"absent\.png.*no such file"):
        load(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="folder"):
        load(tmp_path)
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(ImageError, match=r"empty\.png.*empty"):
        load(empty)
    with pytest.raises(ImageError, match="empty"):
        load(b"")
    os.mkfifo(tmp_path / "pipe.png")  # would wait for ever
    with pytest.raises(ImageError, match="not a file"):
        load(tmp_path / "pipe.png")
    with pytest.raises(ImageError):
        load("bad\0name.png")
    big = tmp_path / "big.png"
    big.write_bytes(encode(noise(), "PNG"))
    with pytest.raises(ImageError, match=r"big\.png.*max_bytes"):
        load(big, max_bytes=100)


# --- what the model sees ----------------------------------------------------------------------------------------------


def test_resize_is_antialiased_and_exact_where_nothing_changes():
    x = noise()
    assert resize(x, (40, 50)) is x
    checker = np.indices((64, 64)).sum(0) % 2 * 255
    small = resize(np.stack([checker] * 3, -1).astype(np.uint8), (8, 8))
    assert np.abs(small[1:-1, 1:-1].astype(int) - 127).max() <= 2  # aliasing would give 0 or 255
    assert resize(x, (7, 120)).shape == (7, 120, 3)
    assert resize(x[:, ::-1], (20, 25)).shape == (20, 25, 3)


def test_proxy_geometry():
    small = proxy(scene(), 64)
    assert small.dtype == np.float32
    np.testing.assert_array_equal(small[:24, :40], scene().astype(np.float32) / 255)  # unscaled, top left
    assert small[24:].max() == small[:, 40:].max() == 0

    white = np.full((100, 200, 3), 255, np.uint8)
    wide = proxy(white, 64)
    assert (wide[16:48] == 1).all()  # 32 x 64, centred
    assert wide[:16].max() == wide[48:].max() == 0
    tall = proxy(white.swapaxes(0, 1), 64)
    np.testing.assert_array_equal(tall, wide.swapaxes(0, 1))
    assert proxy(np.full((1, 4000, 3), 255, np.uint8), 64)[31].min() == 1  # a line stays visible
    np.testing.assert_array_equal(proxy(white[:64, :64], 64), np.ones((64, 64, 3)))


@pytest.mark.parametrize("mode", ["native_pad", "grid_match", "grid_pad"])
@pytest.mark.parametrize("size", [(1, 1), (40, 50), (1, 500), (200, 130)])
def test_prepare(mode, size):
    policy = PlanPolicy(tile=32, patch=8, max_tiles=9, min_side=4, mode=mode)
    x = np.random.default_rng(1).integers(1, 256, (*size, 3), np.uint8)
    plan = make(size, 0.7, policy)
    tiles = prepare(x, plan)
    assert tiles.dtype == np.uint8
    assert tiles.shape == (plan.n_tiles, 32, 32, 3)
    np.testing.assert_array_equal(untile(tiles, plan), resize(x, plan.resized))
    mask = plan.patch_mask().reshape(plan.n_tiles, 4, 4)
    assert (tiles[~mask.repeat(8, 1).repeat(8, 2)] == 0).all()  # nothing but black where no key may be attended to
    if plan.thumb:
        place = plan.tiles[-1]
        inside = tiles[-1, place.top : place.top + place.height, place.left : place.left + place.width]
        np.testing.assert_array_equal(inside, resize(x, plan.thumb))
        assert inside.sum(dtype=np.int64) == tiles[-1].sum(dtype=np.int64)
    with pytest.raises(ImageError, match="plan"):
        prepare(np.concatenate([x, x]), plan)


@pytest.mark.parametrize("mode", ["native_pad", "grid_match", "grid_pad"])
@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_the_plan_knows_where_things_are(mode, ratio):
    """A white square is found on the canvas where the affine map says, to half a pixel, and back from the text."""
    size, box = (330, 510), (301.0, 120.0, 361.0, 180.0)
    x = np.zeros((*size, 3), np.uint8)
    x[120:180, 301:361] = 255
    plan = make(size, ratio, replace(PlanPolicy(tile=96, patch=8, max_tiles=12), mode=mode))
    tiles = prepare(x, plan)[: plan.grid[0] * plan.grid[1], ..., 0].astype(float)
    canvas = tiles.reshape(*plan.grid, 96, 96).swapaxes(1, 2).reshape(plan.grid[0] * 96, plan.grid[1] * 96)
    ys, xs = np.indices(canvas.shape) + 0.5
    found = (canvas * xs).sum() / canvas.sum(), (canvas * ys).sum() / canvas.sum()
    assert found == pytest.approx(plan.pixels_to_canvas((331.0, 150.0)), abs=0.5)
    back = plan.to_pixels(plan.to_text(box, 1000), 1000)
    assert back == pytest.approx(box, abs=0.3)


def test_real_photographs(shared):
    """Camera, scanner and bilevel files agree with Pillow's plain reading, and every plan of theirs rebuilds them."""
    paths = [
        *sorted((shared / "data" / "kodak").glob("*.png"))[:2],
        *sorted((shared / "data" / "mobilenet-v2-imagenet" / "photos").glob("*.jpg"))[:3],
        *sorted((shared / "data" / "ocr-pages").glob("*.tif")),
    ]
    if not paths:
        pytest.skip("no photographs in the shared data")
    for path in paths:
        pixels = load(path)
        with Image.open(path) as plain:
            np.testing.assert_array_equal(pixels, np.asarray(plain.convert("RGB")))
        plan = make(pixels.shape[:2], 0.5, PlanPolicy(tile=256))
        np.testing.assert_array_equal(untile(prepare(pixels, plan), plan), resize(pixels, plan.resized))


def test_errors_are_value_errors():
    assert issubclass(images.ImageError, ValueError)
