"""The data that ships: drawings of things by several artists, handwritten digits, printed digits (see `NOTICE`).

Rebuilt by `scripts/build_assets.py`. Held out from every training split: one whole artist, the digits of other writers,
whole font families.
"""

from __future__ import annotations

import functools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "label", "test_known", "test_unseen"]
SPLITS: tuple[Split, ...] = ("train", "label", "test_known", "test_unseen")
PATH = Path(__file__).with_name("assets.npz")


class AssetError(ValueError):
    """The archive is missing or is not one; the message names the file and the command that rebuilds it."""


@dataclass(frozen=True, eq=False)
class Assets:
    """Everything a screen is composed of.

    words: the concepts, those that artists agree on most first.
    artists: names; `held_out` those that only `test_unseen` shows.
    art: (concept, artist) -> drawing, premultiplied RGBa, 48 x 48.
    hand: per digit the handwritten images, alpha u8[8 8], (train, held out).
    fonts: name -> ten glyphs, alpha u8[40 w]; the width is the advance. (train, held out).
    """

    words: tuple[str, ...]
    artists: tuple[str, ...]
    held_out: tuple[str, ...]
    art: dict[tuple[int, str], Image.Image]
    hand: tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]
    fonts: tuple[dict[str, tuple[np.ndarray, ...]], dict[str, tuple[np.ndarray, ...]]]

    @staticmethod
    def load(path: Path | str = PATH) -> Assets:
        """The shipped archive. Raises `AssetError` if the file is missing or damaged."""
        return _load(Path(path))

    def artists_of(self, concept: int, split: Split) -> tuple[str, ...]:
        """Who drew this concept and may be shown in this split."""
        return self._artists_of[concept, split == "test_unseen"]

    @functools.cached_property
    def _artists_of(self) -> dict[tuple[int, bool], tuple[str, ...]]:
        return {
            (c, unseen): tuple(a for a in self.artists if (a in self.held_out) == unseen and (c, a) in self.art)
            for c in range(len(self.words))
            for unseen in (False, True)
        }


@functools.lru_cache(maxsize=2)
def _load(path: Path) -> Assets:
    try:
        with path.open("rb") as f, np.load(f, allow_pickle=False) as z:
            a = {k: z[k] for k in z.files}
        artists = tuple(a["artists"].tolist())
        images = (Image.fromarray(p, "RGBA").convert("RGBa") for p in a["art"])
        where = zip(a["art_concept"].tolist(), a["art_artist"].tolist(), images, strict=True)
        ink = np.rint(a["hand"] * (255 / 16)).astype(np.uint8)
        edges = np.concatenate([[0], np.cumsum(a["glyph_width"].ravel(), dtype=np.int64)])
        cells = [a["glyphs"][:, edges[i] : edges[i + 1]] for i in range(len(edges) - 1)]
        fonts = {n: tuple(cells[10 * i : 10 * i + 10]) for i, n in enumerate(a["fonts"].tolist())}
        return Assets(
            words=tuple(a["words"].tolist()),
            artists=artists,
            held_out=tuple(np.array(artists)[a["artist_held_out"]].tolist()),
            art={(c, artists[i]): image for c, i, image in where},
            hand=(
                tuple(ink[(a["hand_digit"] == d) & ~a["hand_held_out"]] for d in range(10)),
                tuple(ink[(a["hand_digit"] == d) & a["hand_held_out"]] for d in range(10)),
            ),
            fonts=(
                {n: g for (n, g), held in zip(fonts.items(), a["font_held_out"], strict=True) if not held},
                {n: g for (n, g), held in zip(fonts.items(), a["font_held_out"], strict=True) if held},
            ),
        )
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise AssetError(
            f"{path}: not the archive of drawings and digits ({e}); reinstall, or run scripts/build_assets.py"
        ) from e
