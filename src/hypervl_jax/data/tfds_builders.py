"""The composed screens as a tensorflow-datasets builder, stored as array_record and read without TensorFlow.

`build` prepares every split once; `source` gives random access to one. A prepared set is named by its settings, by the
archive of drawings and by the code that composes, so that a stale one is never read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image
from tqdm import tqdm

from ..config import ScreensConfig, config_hash
from . import assets as archive
from . import painting, screens, sheets
from .assets import SPLITS, Assets
from .screens import Question, Screen, Thing

try:
    import tensorflow_datasets as tfds
except ImportError as e:
    raise ImportError("preparing screens needs tensorflow-datasets: pip install 'hypervl_jax[train]'") from e


SETS = (*SPLITS, "sheets")  # sheets show what `train` shows


def record(assets: Assets, cfg: ScreensConfig, name: str, index: int) -> Screen:
    """Record `index` of one of `SETS`."""
    if name == "sheets":
        return sheets.record(assets, cfg, "train", index)
    return screens.record(assets, cfg, name, index)  # type: ignore


@functools.cache
def _origin() -> str:
    """What a screen depends on besides its settings: the archive and the composing code."""
    digest = hashlib.sha256(archive.PATH.read_bytes())
    for module in (painting, screens, sheets):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def name_of(cfg: ScreensConfig) -> str:
    """The prepared set's name: the config's own and a hash of all it was made from."""
    return f"{cfg.name}-{hashlib.sha256((config_hash(cfg) + _origin()).encode()).hexdigest()[:12]}"


class ScreensBuilderConfig(tfds.core.BuilderConfig):
    """A `ScreensConfig` under the name TFDS stores it by."""

    def __init__(self, screens_config: ScreensConfig, progress: bool = True):
        super().__init__(name=name_of(screens_config), version="1.0.0", description=str(screens_config))
        self.screens, self.progress = screens_config, progress


class Screens(tfds.core.GeneratorBasedBuilder):
    """`Screens(config=ScreensBuilderConfig(cfg), data_dir=..., file_format="array_record")`; or use `build`.

    A record: image (PNG, u8[H W 3]); meta, JSON of things, questions, artist and digit height. The (height, width) of
    all records of a split are in `info.metadata["sizes"][split]`.
    """

    VERSION = tfds.core.Version("1.0.0")

    @property
    def _screens(self) -> ScreensBuilderConfig:
        assert isinstance(self.builder_config, ScreensBuilderConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "meta": tfds.features.Text()}
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(sizes={}),
            disable_shuffling=True,  # record i is screen i
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {s: self._generate_examples(s) for s in SETS if getattr(self._screens.screens, s)}

    def _generate_examples(self, split: str):
        cfg, assets = self._screens.screens, Assets.load()
        sizes: list[list[int]] = []
        bar = tqdm(range(getattr(cfg, split)), f"screens {split}", disable=not self._screens.progress, leave=False)
        for i in bar:
            screen = record(assets, cfg, split, i)
            sizes.append(list(screen.image.shape[:2]))
            yield i, {"image": io.BytesIO(_png(screen.image)), "meta": json.dumps(_meta(screen))}
        self.info.metadata["sizes"][split] = sizes  # type: ignore


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _meta(screen: Screen) -> dict[str, Any]:
    return {
        "things": [t._asdict() for t in screen.things],
        "questions": [q._asdict() for q in screen.questions],
        "artist": screen.artist,
        "digit_height": screen.digit_height,
    }


def _box(value: list[float] | None) -> Any:
    return None if value is None else tuple(value)


class ScreenSource:
    """Random access to one prepared split: `source[i]` is a `Screen`; `sizes` i32[n 2] are (height, width)."""

    def __init__(self, builder: Screens, split: str):
        self._records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})  # type: ignore
        self.sizes = np.array(builder.info.metadata["sizes"][split], np.int32).reshape(-1, 2)  # type: ignore
        self.name = f"{builder.builder_config.name}/{split}"  # type: ignore

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Screen:
        record: Any = self._records[int(index)]
        meta = json.loads(record["meta"])
        return Screen(
            np.asarray(Image.open(io.BytesIO(record["image"]))),
            tuple(Thing(**{**t, "box": _box(t["box"])}) for t in meta["things"]),
            tuple(Question(**{**q, "box": _box(q["box"])}) for q in meta["questions"]),
            meta["artist"],
            meta["digit_height"],
        )

    def __repr__(self) -> str:
        return f"ScreenSource({self.name}, {len(self)} screens)"


class Composed:
    """The same records, composed when they are asked for: what `build` gives where array_record has no wheel (Windows).
    Sizes are found once, by composing everything, and kept."""

    def __init__(self, cfg: ScreensConfig, data_dir: Path | str, split: str):
        self._cfg, self._split = cfg, split
        self._path = Path(data_dir) / "composed" / f"{name_of(cfg)}-{split}.npy"

    @property
    def prepared(self) -> bool:
        return self._path.exists()

    def prepare(self, progress: bool) -> None:
        if not self.prepared:
            bar = tqdm(range(len(self)), f"screens {self._split}", disable=not progress, leave=False)
            sizes = np.array([self[i].image.shape[:2] for i in bar], np.int32)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            np.save(part := self._path.with_suffix(".part.npy"), sizes)
            part.replace(self._path)

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        return np.load(self._path)

    @property
    def sizes(self) -> np.ndarray:
        return self._sizes

    def __len__(self) -> int:
        return getattr(self._cfg, self._split)

    def __getitem__(self, index: int) -> Screen:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return record(Assets.load(), self._cfg, self._split, int(index))


Source = ScreenSource | Composed


def _stored() -> bool:
    return importlib.util.find_spec("array_record") is not None


def _builder(cfg: ScreensConfig, data_dir: Path | str, progress: bool) -> Screens:
    screens.check(Assets.load(), cfg)
    config = ScreensBuilderConfig(cfg, progress)
    with quiet():  # TFDS warns of every config that it does not list
        return Screens(config=config, data_dir=str(Path(data_dir).expanduser()), file_format="array_record")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What TFDS says is nobody's result, and its bars are not ours."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.set_verbosity(level)


def build(cfg: ScreensConfig, data_dir: Path | str, progress: bool = True) -> Mapping[str, Source]:
    """Every set of `cfg` with at least one record, prepared under `data_dir` unless it is there already.

    An interrupted preparation leaves nothing that would be taken for a prepared set. Raises `ScreenError` for settings
    that no screen can satisfy.
    """
    if not _stored():
        screens.check(Assets.load(), cfg)
        found = {s: Composed(cfg, data_dir, s) for s in SETS if getattr(cfg, s)}
        for source in found.values():
            source.prepare(progress)
        return found
    builder = _builder(cfg, data_dir, progress)
    with quiet():
        builder.download_and_prepare()
    return {s: ScreenSource(builder, s) for s in SETS if getattr(cfg, s)}


def source(cfg: ScreensConfig, data_dir: Path | str, split: str) -> Source:
    """One prepared set. Raises `FileNotFoundError` if `build` has not been run for these settings."""
    if not _stored():
        if not (found := Composed(cfg, data_dir, split)).prepared:
            raise FileNotFoundError(f"{data_dir}: not prepared; run build(cfg, {str(data_dir)!r}) first")
        return found
    builder = _builder(cfg, data_dir, progress=False)
    if not builder.is_prepared():
        raise FileNotFoundError(f"{builder.data_path}: not prepared; run build(cfg, {str(data_dir)!r}) first")
    return ScreenSource(builder, split)
