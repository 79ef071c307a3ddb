"""Conversations as a tensorflow-datasets data set, stored as array_record and read without TensorFlow.

`build` writes one, a split an annotation; `source` gives random access to its records. Other data sets that TFDS
prepared as array_record are read too, where their features are named as one of the shapes of `conversations`.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import checkpoint
from . import readers
from .check import Examiner, Ledger
from .conversations import KEPT, Conversation, DataError, Fault, Picture, Refused, parse

try:
    import tensorflow_datasets as tfds

    from .tfds_builders import quiet
except ImportError as e:
    raise ImportError("prepared data sets need tensorflow-datasets: pip install 'hypervl_jax[train]'") from e

LEDGER = "ledger.jsonl"


class Conversations(tfds.core.GeneratorBasedBuilder):
    """A record: id; messages, JSON as `text.render` takes it; images, the bytes of its picture files as they were;
    sizes, JSON of their (height, width). Made by `build`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, parts: Sequence[readers.Part], ledger: Ledger, progress: bool, **kwargs: Any):
        self._parts, self._ledger, self._progress = parts, ledger, progress
        self.records = 0
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "messages": tfds.features.Text(),
            "images": tfds.features.Sequence(tfds.features.Image()),
            "sizes": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(repeat={}),
            disable_shuffling=True,  # in the order of the annotation
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        names = _split_names(self._parts)
        self.info.metadata["repeat"] = {s: p.repeat for s, p in names.items()}  # type: ignore
        return {split: self._generate_examples(part) for split, part in names.items()}

    def _generate_examples(self, part: readers.Part):
        examine, index = Examiner(), 0
        for item in tqdm(readers.read(part), part.name, disable=not self._progress, leave=False):
            if isinstance(item, Fault):
                self.records += item.kind != "wrong-length"
                self._ledger.faults.append(item)
                continue
            self.records += 1
            sizes, faults = examine(item)
            self._ledger.faults += faults
            if any(f.kind not in KEPT for f in faults):
                continue
            yield (
                index,
                {
                    "id": item.id,
                    "messages": json.dumps(item.messages),
                    "images": [io.BytesIO(p.bytes()) for p in item.pictures],
                    "sizes": json.dumps(sizes),
                },
            )
            index += 1


def _split_names(parts: Sequence[readers.Part]) -> dict[str, readers.Part]:
    """A name TFDS takes for each part, no two alike."""
    out: dict[str, readers.Part] = {}
    for part in parts:
        name = re.sub(r"\W+", "_", part.name, flags=re.ASCII).strip("_") or "part"
        name = name if name[0].isalpha() else f"part_{name}"
        n = next(i for i in range(1, len(parts) + 2) if (name if i == 1 else f"{name}_{i}") not in out)
        out[name if n == 1 else f"{name}_{n}"] = part
    return out


def build(parts: Sequence[readers.Part], out: Path, max_rate: float = 0.01, progress: bool = True) -> Ledger:
    """Writes every record that can be used to `out`, which must be new or empty, with the ledger of those that cannot.

    Raises `DataError` where more than `max_rate` of them cannot; then nothing is written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out}: is there already; remove it, or choose another --out")
    ledger = Ledger()
    with checkpoint.replacing(out) as new:
        with quiet():
            builder = Conversations(parts, ledger, progress, data_dir=str(new), file_format="array_record")
            try:
                builder.download_and_prepare()
            except Exception:
                if builder.records:  # TFDS refuses an empty split; what emptied it says more
                    ledger.settle(builder.records, max_rate)
                raise
        ledger.settle(builder.records, max_rate)
        shutil.rmtree(new / "downloads", ignore_errors=True)  # TFDS makes it for what there is not
        ledger.write(new / LEDGER)
    return ledger


# --- reading ---------------------------------------------------------------------------------------------------------


def _open(folder: Path) -> Any:
    """The read-only builder of the one data set at or below `folder`."""
    found = sorted(p.parent for depth in range(4) for p in folder.glob("*/" * depth + "dataset_info.json"))
    if len(found) != 1:
        what = ", ".join(str(p.relative_to(folder)) for p in found[:5]) if found else "none here"
        raise DataError(f"{folder}: give the folder of one prepared data set (with dataset_info.json; {what})")
    try:
        with quiet():
            builder = tfds.builder_from_directory(found[0])
    except Exception as e:  # whatever a damaged or foreign folder makes TFDS raise
        raise DataError(f"{found[0]}: TFDS cannot open this data set ({type(e).__name__}: {str(e)[:120]})") from e
    kept = builder.info.file_format
    if kept is None or kept.value != "array_record":
        raise DataError(
            f"{found[0]}: prepared as {kept and kept.value}, which takes TensorFlow to read; prepare it again with "
            'file_format="array_record"'
        )
    return builder


def splits(folder: Path) -> dict[str, float]:
    """The splits of a prepared data set and how often an epoch shows each. Raises `DataError`."""
    builder = _open(folder)
    repeat = (builder.info.metadata or {}).get("repeat", {})
    return {s: float(repeat.get(s, 1.0)) for s in builder.info.splits}


class Records:
    """Random access to one split: `records[i]` is a `Conversation` whose pictures are bytes, with their sizes."""

    def __init__(self, folder: Path | str, split: str):
        self.folder, self.split = Path(folder), split
        builder = _open(self.folder)
        if split not in builder.info.splits:
            raise DataError(f"{folder}: no split {split!r}; there are {', '.join(builder.info.splits)}")
        self._pictures = {k for k, f in builder.info.features.items() if _is_picture(f)}
        try:
            self._records = builder.as_data_source(split, decoders={k: _Bytes() for k in self._pictures})
        except Exception as e:  # so do shards that are missing
            raise DataError(f"{folder}: split {split} cannot be opened ({type(e).__name__}: {str(e)[:120]})") from e
        self.repeat = float((builder.info.metadata or {}).get("repeat", {}).get(split, 1.0))

    def __len__(self) -> int:
        return len(self._records)

    def raw(self, index: int) -> Any:
        """Its features in Python's own types, or why it cannot be read."""
        try:
            return {k: _plain(v, k in self._pictures) for k, v in self._records[int(index)].items()}
        except UnicodeDecodeError as e:
            return Refused("not-utf8", f"a text of this record: {e}")
        except Exception as e:  # damaged shards raise whatever the library's reader does
            return Refused("unreadable", f"{type(e).__name__}: {str(e)[:120]}")

    def __getitem__(self, index: int) -> Conversation:
        """Raises `DataError` for a record that is no conversation."""
        raw = self.raw(index)
        try:
            if isinstance(raw, Refused):
                raise raw
            c = parse(raw, named, f"{self.folder}/{self.split}", int(index) + 1)
        except Refused as e:
            raise DataError(f"{self.folder}/{self.split}:{index + 1}: {e.kind}: {e.reason}") from e
        sizes = json.loads(raw["sizes"]) if "sizes" in raw else [None] * len(c.pictures)
        pictures = [Picture(p.name, p.source, s and tuple(s)) for p, s in zip(c.pictures, sizes, strict=True)]
        return c._replace(pictures=pictures)


class _Bytes(tfds.decode.SkipDecoding):
    """Pictures as they are stored, one or a list."""

    def decode_batch_example_np(self, example: Any) -> Any:
        return example


def _is_picture(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", feature), tfds.features.Image)


def _plain(value: Any, picture: bool) -> Any:
    """A feature in Python's own types: text is str, the bytes of pictures stay bytes. Raises `UnicodeDecodeError`."""
    if isinstance(value, dict):
        return {k: _plain(v, False) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(v, picture) for v in value]
    return value.decode("utf-8") if isinstance(value, bytes) and not picture else value


def named(name: str) -> Picture:
    """Refuses: a record here may not name a file."""
    raise Refused("image-missing", f"{name:.200}: a prepared data set holds its pictures; this record names a file")
