"""What a pair learns from: a folder of pictures as a tensorflow-datasets data set, or one that TFDS knows by name, and
the crops of each step.

Pictures are stored as array_record, their files as they were, and read without TensorFlow. Which crops make up a step
is a pure function of the seed and the step, so a run that goes on misses none and sees none twice.
Axes: N pictures, B batch, S side of a crop, s of its small picture, H W picture.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from hypervl_jax import image
from hypervl_jax.needs import UsageError
from hypervl_jax.rescale import files
from hypervl_jax.rescale.resample import bicubic

try:
    import tensorflow_datasets as tfds

    from hypervl_jax.data.tfds_builders import quiet
except ImportError as e:
    raise ImportError("pictures to learn from need tensorflow-datasets: pip install 'hypervl_jax[train]'") from e

MAX_BYTES = 512 << 20  # of a picture file
KEPT_BYTES = 1 << 30  # of decoded pictures, so that a small set is decoded once and not at every crop


@runtime_checkable
class Source(Protocol):
    """Pictures by number; `sizes` are int[N 2], (height, width)."""

    @property
    def sizes(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W 3"]: ...


class Crops(NamedTuple):
    """One step's pictures, and what bicubic makes of the whole ones there."""

    hr: UInt8[np.ndarray, "B S S 3"]
    small: UInt8[np.ndarray, "B s s 3"]


# --- crops -----------------------------------------------------------------------------------------------------------


def shown(pictures: int, batch: int, seed: int, step: int) -> list[int]:
    """The numbers of the pictures of one step: each once an epoch, in an order of the epoch's own."""
    out = []
    for at in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(at, pictures)
        out.append(int(np.random.default_rng([seed, 0, epoch]).permutation(pictures)[place]))
    return out


def crop(
    picture: UInt8[np.ndarray, "H W 3"], scale: int, side: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "S S 3"], UInt8[np.ndarray, "s s 3"]]:
    """A random part, and that part of the whole picture's small one: mirrored and turned alike, as the paper does."""
    h, w = (n // scale for n in picture.shape[:2])  # of the small picture
    n = side // scale
    top, left = int(rng.integers(h - n + 1)), int(rng.integers(w - n + 1))
    y0, x0 = max(top - 2, 0), max(left - 2, 0)  # so far the kernel reaches
    y1, x1 = min(top + n + 2, h), min(left + n + 2, w)
    around = bicubic(picture[y0 * scale : y1 * scale, x0 * scale : x1 * scale], (y1 - y0, x1 - x0))
    hr = picture[top * scale : top * scale + side, left * scale : left * scale + side]
    small = around[top - y0 : top - y0 + n, left - x0 : left - x0 + n]
    across, down, turned = rng.random(3) < 0.5

    def varied(x: np.ndarray) -> np.ndarray:
        x = x[:, ::-1] if across else x
        x = x[::-1] if down else x
        return x.swapaxes(0, 1) if turned else x

    return varied(hr), varied(small)


def batches(
    source: Source, scale: int, side: int, batch: int, seed: int, steps: int, start: int = 0
) -> Iterator[Crops]:
    """Those of steps `start` .. `steps` - 1, cut ahead in threads by Grain. Raises `RescaleError` where no picture is
    as large as a crop; smaller ones are left out."""
    import grain.python as grain

    fits = large(source, scale, side)

    def load(step: int) -> Crops:
        numbers = shown(len(fits), batch, seed, step)
        rngs = (np.random.default_rng([seed, 1, step, i]) for i in range(batch))
        parts = [crop(source[int(fits[n])], scale, side, rng) for n, rng in zip(numbers, rngs, strict=True)]
        return Crops(*(np.ascontiguousarray(np.stack(column)) for column in zip(*parts, strict=True)))

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(range(start, steps)).map(load).to_iter_dataset(options))


def large(source: Source, scale: int, side: int) -> np.ndarray:
    """The numbers of the pictures that a crop fits in. Raises `RescaleError` where there is none."""
    fits = np.flatnonzero((source.sizes // scale * scale).min(1) >= side)
    if not len(fits):
        most = int(source.sizes.min(1).max())
        raise files.RescaleError(f"crops of {side} px fit in none of {len(source)} pictures; choose at most {most}")
    return fits


# --- pictures --------------------------------------------------------------------------------------------------------


class Photographs(tfds.core.GeneratorBasedBuilder):
    """A record: name; image, the bytes of its file as they were. The (height, width) of all are in
    `info.metadata["sizes"]`. Made by `prepared`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, paths: list[Path], name: str, progress: bool = True, **kwargs: Any):
        self._paths, self._progress = paths, progress
        config = tfds.core.BuilderConfig(name=name, version="1.0.0", description="pictures of a folder")
        super().__init__(config=config, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "image": tfds.features.Image()}),
            metadata=tfds.core.MetadataDict(sizes=[]),
            disable_shuffling=True,  # record i is picture i
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        sizes: list[list[int]] = []
        for i, path in enumerate(tqdm(self._paths, "pictures", disable=not self._progress, leave=False)):
            sizes.append(list(image.load(path, max_bytes=MAX_BYTES).shape[:2]))
            yield i, {"name": path.name, "image": io.BytesIO(path.read_bytes())}
        self.info.metadata["sizes"] = sizes  # type: ignore


class Pictures:
    """A split of a prepared data set: `source[i]` is picture i, decoded, read-only. The first ones asked for stay in
    memory, up to `KEPT_BYTES`: epochs ask for all alike."""

    def __init__(self, builder: Any, split: str = "train"):
        pictures = [k for k in ("hr", "image") if k in builder.info.features]
        if not pictures or split not in builder.info.splits:
            raise files.RescaleError(
                f"{builder.info.full_name}: has no pictures to learn from (hr, image) in {split!r}"
            )
        self._key, self.name = pictures[0], f"{builder.info.full_name}/{split}"
        self._kept: dict[int, np.ndarray] = {}
        self._left, self._lock = KEPT_BYTES, threading.Lock()
        every = {k: tfds.decode.SkipDecoding() for k, f in builder.info.features.items() if _is_picture(f)}
        self._records = builder.as_data_source(split, decoders=every)
        told = (builder.info.metadata or {}).get("sizes")
        self.sizes = np.array(told or [self._size(i) for i in range(len(self))], np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        index = int(index)
        if (kept := self._kept.get(index)) is not None:
            return kept
        data, name = self._records[index][self._key], f"{self.name}:{index}"
        pixels = image.load(bytes(data), max_bytes=MAX_BYTES, name=name)
        pixels.flags.writeable = False
        with self._lock:
            if pixels.nbytes <= self._left and self._kept.setdefault(index, pixels) is pixels:
                self._left -= pixels.nbytes
        return pixels

    def _size(self, index: int) -> tuple[int, int]:
        with Image.open(io.BytesIO(self._records[int(index)][self._key])) as opened:
            return opened.height, opened.width


def _is_picture(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Image)


def found(data: str, folder: Path, progress: bool = True) -> Pictures:
    """The pictures `data` names: a folder, which is prepared under `folder` unless it is there already, or a data set
    that TFDS has prepared as array_record, such as div2k/bicubic_x2.

    Raises `UsageError` for a name that is neither, `ImageError` for a file that is no picture; then nothing is kept.
    """
    if Path(data).is_dir():
        return prepared(files.found((Path(data),)), folder, progress)
    name = {"div2k": "div2k/bicubic_x2"}.get(data, data)
    cure = f"python -m tensorflow_datasets.scripts.cli.main build {name} --file_format=array_record"
    try:
        with quiet():
            builder = tfds.builder(name, file_format="array_record")
    except Exception as e:  # of many kinds, for names, configs and versions
        raise UsageError(f"--data {data}: neither a folder nor a data set of tensorflow-datasets (div2k)") from e
    if not builder.is_prepared():
        raise UsageError(f"--data {data}: not prepared under {builder.data_dir}; prepare it: {cure}")
    return Pictures(builder)


def prepared(paths: list[Path], folder: Path, progress: bool = True) -> Pictures:
    """These files as a data set under `folder`, named by what is in them."""
    digest = hashlib.blake2b(digest_size=6)
    for path in paths:
        digest.update(f"{path.name}\0".encode() + hashlib.blake2b(path.read_bytes()).digest())
    with quiet():
        builder = Photographs(paths, digest.hexdigest(), progress, data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare()
    return Pictures(builder)
