"""Files to pixels, and pixels to what the model sees. Host side: Pillow and numpy, no device.

One decode policy for train, serve, evaluate and export (`load`), and for rescaling (`layers`, which keeps transparency
apart):

* Formats: PNG, JPEG (a phone's MPO too), GIF, WebP, AVIF, TIFF, BMP, PPM. Others are refused: some of Pillow's readers
  start programs (EPS), some are seldom tested.
* Orientation (EXIF, or XMP) is applied. Unreadable metadata counts as upright, as in every viewer.
* Transparency (alpha channel, palette entry, key colour) is composited on white.
* Animations and multi-page files give the first frame.
* 16 bit grey is scaled to 8 bit, round(v / 257), never clipped; 16 bit colour keeps its high bytes. Floating point,
  signed and 32 bit pixels are refused, whatever their values: nothing says what white is.
* Palette, grey, 1 bit, CMYK and YCbCr become RGB. ICC profiles are ignored, values count as sRGB: the same numbers on
  every machine, and no profile parser in reach of a stranger's file.
* Bytes and pixels are limited before anything is decoded; damaged or shortened files are errors.

Axis letters: H W picture, h w resized picture, N tiles (thumbnail included), T tile side, S proxy side.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageFile, UnidentifiedImageError

from hypervl_jax.plan import VisionPlan
from hypervl_jax.tiling import tile

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM")
MAX_BYTES = 64 << 20
MAX_PIXELS = 100_000_000

Source = str | os.PathLike | bytes | Image.Image | np.ndarray
T = TypeVar("T")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what brings it upright


class ImageError(ValueError):
    """A picture that can not be used; the message names it and says what to do."""


class Layers(NamedTuple):
    """A picture whose transparency is kept apart."""

    rgb: UInt8[np.ndarray, "H W 3"]  # as stored, under transparent pixels too
    alpha: UInt8[np.ndarray, "H W"] | None  # where the picture can be transparent: 0 is, 255 is not
    grey: bool  # whether it was grey before it became RGB
    profile: bytes | None  # ICC, of pictures that are stored as RGB: handed on, never read
    text: dict[str, str]  # what the file says in words, PNG text chunks among it


def load(
    source: Source, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a file (path or its bytes), a Pillow image or a u8 array (H x W, H x W x 3 or H x W x 4).

    The decode policy is at the top of this module. `name` is what errors call a picture that is not a file.
    Raises `ImageError` for a missing, empty, damaged, unknown or too large picture.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "array", max_pixels)
    if isinstance(source, Image.Image):
        return _decode(source, name or "image", max_pixels)
    if isinstance(source, bytes):
        name = name or "<bytes>"
    elif isinstance(source, str | os.PathLike):
        name = name or os.fspath(source)
    else:
        raise ImageError(
            f"{name or 'picture'}: a {type(source).__name__} is not a path, bytes, a Pillow image or a numpy array"
        )
    data = source if isinstance(source, bytes) else _read(Path(source), name, max_bytes)
    return _opened(data, name, max_bytes, lambda image: _decode(image, name, max_pixels))


def layers(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Layers:
    """A file under the same policy, its transparency kept apart instead of put on white.

    Raises `ImageError` as `load` does.
    """
    name = os.fspath(path)
    data = _read(Path(path), name, max_bytes)
    return _opened(data, name, max_bytes, lambda image: _decoded(image, name, max_pixels, _apart))


def _opened(data: bytes, name: str, max_bytes: int, decode: Callable[[Image.Image], T]) -> T:
    if not data:
        raise ImageError(f"{name}: the file is empty; download or save it again")
    if len(data) > max_bytes:
        raise ImageError(f"{name}: more than {max_bytes >> 20} MiB; shrink it or raise max_bytes")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(f"{name}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which hides damage; set it to False")
    try:
        with warnings.catch_warnings():  # the limit here is max_pixels; Pillow's own warning comes at another one
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return decode(image)
    except ImageError:
        raise
    except UnidentifiedImageError as e:
        raise ImageError(f"{name}: not a picture in a known format; convert it to PNG or JPEG ({_known()})") from e
    except Image.DecompressionBombError as e:  # Pillow's own limit, at 179 million unless the program changed it
        raise ImageError(f"{name}: more pixels than Pillow opens (Image.MAX_IMAGE_PIXELS); shrink it") from e
    except Exception as e:  # readers of damaged headers raise anything from OSError to IndexError; none may pass as is
        raise ImageError(f"{name}: the file is damaged ({e}); download or save it again") from e


def _read(path: Path, name: str, max_bytes: int) -> bytes:
    try:
        if not path.exists():
            raise ImageError(f"{name}: no such file; check the path (it is relative to {Path.cwd()})")
        if not path.is_file():
            raise ImageError(f"{name}: not a file but a {'folder' if path.is_dir() else 'device'}; name one picture")
        with path.open("rb") as f:
            return f.read(max_bytes + 1)  # one more than allowed tells too large, whatever the file grows to meanwhile
    except (OSError, ValueError) as e:
        if isinstance(e, ImageError):
            raise
        raise ImageError(f"{name!r}: can not be read ({getattr(e, 'strerror', None) or 'not a path'})") from e


def _decode(image: Image.Image, name: str, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    return _decoded(image, name, max_pixels, _on_white)


def _decoded(image: Image.Image, name: str, max_pixels: int, finish: Callable[[Image.Image], T]) -> T:
    _check_size(image.height, image.width, name, max_pixels)
    try:
        image.load()
        image = _upright(image)
        if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # a PGM of 16 bits is opened as "I"
            raise ImageError(
                f"{name}: floating point, signed and 32 bit pixels have no defined white; save it with 8 or 16 bits"
            )
        if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
            image = _eight_bit(image)
        return finish(image)
    except ImageError:
        raise
    except Exception as e:  # so do decoders of damaged data
        raise ImageError(f"{name}: can not be decoded, damaged or cut short ({e}); download or save it again") from e


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata around sound pixels, any error type: shown as it is stored
        turn = None
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    key = image.info.get("transparency")  # 16 bit PNG: one grey value that means transparent
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def _apart(image: Image.Image) -> Layers:
    info, grey = image.info, image.mode in ("1", "L", "LA", "La")
    rgba = np.array(image.convert("RGBA")) if image.has_transparency_data else None
    rgb = np.array(image.convert("RGB")) if rgba is None else rgba[..., :3].copy()
    profile = info.get("icc_profile")
    kept = isinstance(profile, bytes) and profile[16:20] == b"RGB " and not grey
    text = {k: str(v) for k, v in info.items() if isinstance(k, str) and isinstance(v, str)}
    return Layers(rgb, None if rgba is None else rgba[..., 3].copy(), grey, profile if kept else None, text)


def _from_array(array: np.ndarray, name: str, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"{name}: expected uint8 of shape H x W, H x W x 3 or H x W x 4, found {array.dtype} {array.shape}"
        )
    _check_size(array.shape[0], array.shape[1], name, max_pixels)
    return _on_white(Image.fromarray(np.ascontiguousarray(array)))


def _check_size(height: int, width: int, name: str, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{name}: {width} x {height} px, a picture without pixels")
    if height * width > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} px is over the limit of {max_pixels / 1e6:g} million pixels; "
            "shrink it or raise max_pixels"
        )


def _known() -> str:
    return ", ".join(FORMATS)


# --- what the model sees ----------------------------------------------------------------------------------------------


def resize(pixels: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Antialiased bicubic (Pillow) to (height, width); the very same array where the size is right already."""
    return _resize(pixels, size, Image.Resampling.BICUBIC)


def proxy(pixels: UInt8[np.ndarray, "H W 3"], side: int) -> Float32[np.ndarray, "S S 3"]:
    """VRC's small square view, values 0 .. 1 on black (HyperVL 3.2; TC app. C, "pad keep aspect").

    A picture smaller than `side` both ways lies unscaled at the top left; any other is shrunk (bilinear) until its
    longer side is `side`, and centred.
    """
    top, left, h, w = proxy_place(pixels.shape[:2], side)
    out = np.zeros((side, side, 3), np.float32)
    out[top : top + h, left : left + w] = _resize(pixels, (h, w), Image.Resampling.BILINEAR)
    return out / np.float32(255)


def proxy_place(size: tuple[int, ...], side: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a picture of `size` (height, width) on its `proxy`."""
    h, w = size
    if max(h, w) < side:
        return 0, 0, h, w
    h, w = (max(1, min(side, round(s * side / max(size)))) for s in size)
    return (side - h) // 2, (side - w) // 2, h, w


def prepare(pixels: UInt8[np.ndarray, "H W 3"], plan: VisionPlan) -> UInt8[np.ndarray, "N T T 3"]:
    """Resize as planned, cut into tiles, append the thumbnail: the one preprocessing of train, ask, serve and export.

    Raises `ImageError` where the picture is not of the size the plan was made for.
    """
    if pixels.shape[:2] != plan.size:
        raise ImageError(
            f"a picture of {pixels.shape[:2]} (height, width) with a plan for {plan.size}; make the plan from its size"
        )
    tiles = np.asarray(tile(resize(pixels, plan.resized), plan))
    if plan.thumb is None:
        return tiles
    place, side = plan.tiles[-1], plan.policy.tile
    thumb = np.zeros((1, side, side, 3), np.uint8)
    thumb[0, place.top : place.top + place.height, place.left : place.left + place.width] = resize(pixels, plan.thumb)
    return np.concatenate([tiles, thumb])


def _resize(pixels: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    if pixels.shape[:2] == tuple(size):
        return pixels
    return np.array(Image.fromarray(np.ascontiguousarray(pixels)).resize((size[1], size[0]), how))
