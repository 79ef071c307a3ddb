"""Files of conversations, record by record: JSON, JSON lines, parquet, webdataset tar, prepared data sets, mixtures.

A reader never raises for what is inside a file: each record comes out as a `Conversation` or as the `Fault` that says
why not. Names of pictures count from the root (the annotation's own folder, unless one is given) and may not leave it,
by `..`, by an absolute path or through a link.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from hypervl_jax import image
from hypervl_jax.data.conversations import Conversation, DataError, Fault, Picture, Refused, parse

LONGEST = 64 << 20  # bytes of one line of JSON
JSON, LINES, PARQUET, TAR = (".json",), (".jsonl", ".ndjson"), (".parquet",), (".tar", ".tgz", ".gz")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")  # in a tar

_ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that was no UTF-8
_SPACE = re.compile(r"[ \t\r\n]*")


class Part(NamedTuple):
    """One annotation: where names of pictures count from, how often an epoch shows it, how many records it says it has.
    `split` is that of a prepared data set."""

    name: str
    path: Path
    root: Path
    repeat: float = 1.0
    says: int | None = None
    split: str | None = None

    @property
    def file(self) -> str:
        """What its records and faults say they are of."""
        return str(self.path if self.split is None else self.path / self.split)


def parts(paths: list[Path], root: Path | None = None) -> list[Part]:
    """The annotations behind `paths`: each itself, those a mixture names, the splits of a prepared data set.

    A mixture is InternVL's {NAME: {"annotation": PATH, "root": FOLDER, "repeat_time": NUMBER, "length": COUNT}}; its
    paths count from its own folder. Raises `DataError` for what is not there or of no known kind.
    """
    out: list[Part] = []
    for path in paths:
        if root is not None and not root.is_dir():
            raise DataError(f"{root}: no such folder; --root is where the names of pictures count from")
        if path.is_dir():
            from hypervl_jax.data import prepared

            out += [Part(s, path, path, n, split=s) for s, n in prepared.splits(path).items()]
            continue
        if not path.is_file():
            raise DataError(f"{path}: no such file; give annotations ({_known()}) or the folder of a prepared data set")
        if path.suffix.lower() in JSON and (mixture := _mixture(path)) is not None:
            out += mixture
        elif path.suffix.lower() in (*JSON, *LINES, *PARQUET, *TAR):
            out.append(Part(path.stem.split(".")[0], path, root or path.parent))
        else:
            raise DataError(f"{path}: of no known kind; give {_known()} or the folder of a prepared data set")
    if not out:
        raise DataError("no data; give one or more annotations")
    return out


def read(part: Part) -> Iterator[Conversation | Fault]:
    """Every record of one annotation in order. Raises `DataError` where an extra is not installed."""
    if part.split is not None:
        from hypervl_jax.data import prepared

        records = prepared.Records(part.path, part.split)
        yield from _parsed(part, (Row(i + 1, records.raw(i)) for i in range(len(records))), prepared.named)
        return
    kind = part.path.suffix.lower()
    rows: Callable[[Path], Iterator[Row]] = _array if kind in JSON else _lines if kind in LINES else _parquet
    if kind in TAR:
        yield from _tar(part)
    else:
        yield from _parsed(part, rows(part.path), _Inside(part.root))


class Row(NamedTuple):
    line: int
    value: Any  # what `parse` takes, or why there is nothing to parse


def _parsed(part: Part, rows: Iterator[Row], find: Callable[[str], Picture]) -> Iterator[Conversation | Fault]:
    count = 0
    for line, value in rows:
        count += 1
        yield _one(part.file, line, value, find)
    if part.says is not None and count != part.says:
        reason = f"the mixture says {part.says} records, there are {count}: correct its length, or look for the rest"
        yield Fault(part.file, max(count, 1), "wrong-length", reason)


def _one(file: str, line: int, value: Any, find: Callable[[str], Picture]) -> Conversation | Fault:
    try:
        if isinstance(value, Refused):
            raise value
        return parse(value, find, file, line)
    except Refused as e:
        return Fault(file, line, e.kind, e.reason)


class _Inside:
    """Names -> pictures below `root`, and nowhere else."""

    def __init__(self, root: Path):
        self.root = root.resolve()

    def __call__(self, name: str) -> Picture:
        try:
            path = self.root / name
            if not Path(os.path.normpath(path)).is_relative_to(self.root):
                raise Refused(
                    "path-escape", f"{name:.200}: leads out of {self.root}; name a file below it, or move --root"
                )
            real = path.resolve()
            if not real.is_relative_to(self.root):
                raise Refused(
                    "symlink-escape", f"{name:.200}: a link to {real}, out of {self.root}; copy the picture there"
                )
            if not real.is_file():
                what = "not a file" if real.exists() else "no such file"
                raise Refused("image-missing", f"{name:.200}: {what}; names count from {self.root} (--root)")
        except Refused:
            raise
        except (OSError, ValueError, RuntimeError) as e:  # zero bytes, links in a circle, names too long
            raise Refused("image-missing", f"{name!r:.200}: no path ({getattr(e, 'strerror', None) or e})") from e
        return Picture(name, real)


# --- JSON ------------------------------------------------------------------------------------------------------------


class _Decoder(json.JSONDecoder):
    """Remembers a key that an object has twice: one of the two values would be lost without a word."""

    def __init__(self):
        super().__init__(object_pairs_hook=self._object)
        self._twice: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            keys = [k for k, _ in pairs]
            self._twice = next(k for k in keys if keys.count(k) > 1)
        return out

    def at(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, or why it is none, and where it ends."""
        self._twice = None
        value, end = self.raw_decode(text, start)
        if self._twice is not None:
            return Refused("duplicate-key", f"{self._twice!r:.60} is there twice; keep one"), end
        return value, end


def _lines(path: Path) -> Iterator[Row]:
    """JSON lines. Blank ones are none."""
    decoder = _Decoder()
    with path.open("rb") as f:
        for line, raw in enumerate(_bytes(f), 1):
            if len(raw) > LONGEST:
                yield Row(line, Refused("bad-json", f"longer than {LONGEST >> 20} MiB; keep pictures in files"))
                continue
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                if not text.strip():
                    continue
                value, end = decoder.at(text, _SPACE.match(text).end())  # type: ignore[union-attr]
                if text[end:].strip():
                    value = Refused(
                        "bad-json", f"more after the record: {text[end:].strip()[:40]!r}; one record a line"
                    )
            except UnicodeDecodeError as e:
                value = Refused("not-utf8", f"byte {e.start + 1} of the line is 0x{raw[e.start]:02x}; save it as UTF-8")
            except (ValueError, RecursionError) as e:
                cut = "" if raw.endswith(b"\n") else "; the line has no end: the file may be cut short"
                value = Refused("bad-json", f"{str(e)[:120]}{cut}")
            yield Row(line, value)


def _bytes(f: Any) -> Iterator[bytes]:
    """Lines, of one that is too long only the beginning."""
    while line := f.readline(LONGEST + 1):
        rest = line
        while len(rest) > LONGEST and not rest.endswith(b"\n"):
            rest = f.readline(LONGEST + 1)
        yield line


def _array(path: Path) -> Iterator[Row]:
    """A list of records in one JSON text, which is read whole. Its lines are where the records begin."""
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    decoder, at, line, counted = _Decoder(), 0, 1, 0
    at = _SPACE.match(text).end()  # type: ignore[union-attr]
    if text[at : at + 1] != "[":
        if text[at : at + 1] == "{":  # lines of JSON under another name
            yield from _lines(path)
        else:
            yield Row(1, Refused("bad-json", "expected a list of records: [{...}, ...]"))
        return
    at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.at(text, at)
        except (ValueError, RecursionError) as e:
            where = getattr(e, "pos", at)
            said = f"{getattr(e, 'msg', str(e))[:120]}; the rest of the file cannot be read"
            yield Row(line + text.count("\n", at, where), Refused("unreadable", said))
            return
        if bad := _ESCAPED.search(text, at, end):
            byte = ord(bad[0]) - 0xDC00
            value = Refused("not-utf8", f"byte 0x{byte:02x} after {text[at : bad.start()][-20:]!r}; save it as UTF-8")
        yield Row(line, value)
        at = _SPACE.match(text, end).end()  # type: ignore[union-attr]
        if text[at : at + 1] == ",":
            at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            said = "expected , or ] after a record; the file may be cut short, the rest of it cannot be read"
            yield Row(line, Refused("unreadable", said))
            return
    if text[at + 1 :].strip():
        line += text.count("\n", counted, at + 1)
        yield Row(line, Refused("unreadable", f"more after the list: {text[at + 1 :].strip()[:40]!r}"))


def _mixture(path: Path) -> list[Part] | None:
    """The parts of a mixture, None for another JSON file."""
    with path.open("rb") as f:
        if not f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            return None
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape").strip()
    try:
        found, end = _Decoder().at(text, 0)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, Refused) and '"annotation"' in text:  # of two parts of one name, one would be lost
        raise DataError(f"{path}: {found.reason}")
    if (
        text[end:]
        or not isinstance(found, dict)
        or not found
        or not all(isinstance(v, dict) and "annotation" in v for v in found.values())
    ):
        return None
    out = []
    for name, v in found.items():
        where, repeat, says = f"{path}: {name!r:.60}", v.get("repeat_time", 1), v.get("length")
        if not all(isinstance(v.get(k, ""), str) for k in ("annotation", "root")):
            raise DataError(f"{where}: annotation and root must be paths")
        if type(repeat) not in (int, float) or not 0 < repeat <= 1000:
            raise DataError(f"{where}: repeat_time {repeat!r:.40} must be above 0 and at most 1000")
        if says is not None and type(says) is not int:
            raise DataError(f"{where}: length {says!r:.40} must be a whole number")
        if v.get("data_augment"):
            raise DataError(f"{where}: data_augment is not supported; make it false")
        file, root = path.parent / v["annotation"], path.parent / v.get("root", "")
        if file.suffix.lower() not in (*JSON, *LINES, *PARQUET, *TAR) or not file.is_file():
            raise DataError(f"{where}: annotation {file}: no such file ({_known()})")
        if not root.is_dir():
            raise DataError(f"{where}: root {root}: no such folder; it counts from {path.parent}")
        out.append(Part(name, file, root, float(repeat), says))
    return out


# --- parquet and tar -------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Row]:
    """Rows of a table, a column a key. Needs pyarrow."""
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install 'hypervl-jax[train]'") from e
    row = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=16):
                for i in range(len(batch)):
                    row += 1
                    try:
                        (value,) = batch.slice(i, 1).to_pylist()
                    except UnicodeDecodeError as e:
                        value = Refused("not-utf8", f"a text of this row: {e}")
                    yield Row(row, value)
    except Exception as e:  # damaged tables raise whatever the library's readers do
        yield Row(row + 1, Refused("unreadable", f"{type(e).__name__}: {str(e)[:120]}; the rest is not read"))


def _tar(part: Part) -> Iterator[Conversation | Fault]:
    """Samples of a webdataset: files that follow one another under one name. NAME.json is the record, or NAME.txt a
    caption; the pictures beside it are its own unless it names some of them."""
    sample: dict[str, bytes] = {}
    count, key = 0, None
    try:
        with contextlib.closing(tarfile.open(part.path, "r|*")) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isdir():
                    continue
                if (stem := str(name.parent / name.name.split(".")[0])) != key:
                    if sample:
                        yield _sample(part, count, key or "", sample)
                    sample, key, count = {}, stem, count + 1
                if not member.isfile() or (file := tar.extractfile(member)) is None:
                    yield Fault(part.file, count, "symlink-escape", f"{name}: a link; a tar must hold files")
                    continue
                sample[member.name] = file.read(image.MAX_BYTES + 1)
        if sample:
            yield _sample(part, count, key or "", sample)
    except Exception as e:  # damaged archives raise anything from ReadError to zlib's own
        reason = f"{type(e).__name__}: {str(e)[:120]}; the rest is not read"
        yield Fault(part.file, count + 1, "unreadable", reason)


def _sample(part: Part, count: int, key: str, files: dict[str, bytes]) -> Conversation | Fault:
    pictures = [name for name in files if name.lower().endswith(PICTURES)]

    def find(name: str) -> Picture:
        for held in pictures:
            if name in (held, PurePosixPath(held).name, PurePosixPath(held).suffix[1:]):
                return Picture(held, files[held])
        raise Refused(
            "image-missing", f"{name:.200}: not beside it in the tar, where {', '.join(pictures) or 'none'} is"
        )

    def value() -> Any:
        text = next((files[n] for end in (".json", ".txt") for n in files if n.lower().endswith(end)), None)
        if text is None:
            return Refused("no-messages", f"{key}: neither {key}.json nor {key}.txt beside {', '.join(files)}")
        try:
            if not any(n.lower().endswith(".json") for n in files):
                return {"caption": text.decode("utf-8"), "images": pictures, "id": key}
            said = text.decode("utf-8-sig").strip()
            raw, end = _Decoder().at(said, 0)
        except UnicodeDecodeError as e:
            return Refused("not-utf8", f"{key}: byte {e.start + 1} is 0x{text[e.start]:02x}; save it as UTF-8")
        except (ValueError, RecursionError) as e:
            return Refused("bad-json", f"{key}: {str(e)[:120]}")
        if said[end:].strip():
            return Refused("bad-json", f"{key}: more after the record")
        if isinstance(raw, dict) and not _names_pictures(raw):
            raw = {**raw, "images": pictures}
        return {"id": key, **raw} if isinstance(raw, dict) else raw

    return _one(part.file, count, value(), find)


def _names_pictures(raw: dict[str, Any]) -> bool:
    said = raw.get("messages")
    parts = (
        [p for m in said if isinstance(m, dict) and isinstance(m.get("content"), list) for p in m["content"]]
        if (isinstance(said, list))
        else []
    )
    inside = any(isinstance(p, dict) and p.get("type") in ("image_url", "image") and len(p) > 1 for p in parts)
    return inside or raw.get("image") is not None or raw.get("images") is not None


def _known() -> str:
    return ", ".join((*JSON, *LINES, *PARQUET, ".tar, .tar.gz"))
