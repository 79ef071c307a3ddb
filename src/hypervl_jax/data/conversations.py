"""One record of other people's data, whichever way it is written down: `parse` makes of it what `text.render` takes.

    LLaVA      {"id", "image": NAME or NAMES, "conversations": [{"from": "human" | "gpt", "value": TEXT}]}
    ShareGPT   {"images": NAMES, "system": TEXT, "messages": [{"role": "user" | "assistant", "content": TEXT}]}
    OpenAI     {"messages": [{"role", "content": [{"type": "text", "text"} | {"type": "image_url", "image_url"}]}]}
    pairs      {"images": NAMES, "texts": [{"user": TEXT, "assistant": TEXT}]}          the Cauldron, FineVision
    question   {"image": NAME, "question": TEXT, "answer": TEXT}
    caption    {"image": NAME, "caption" or "text": TEXT}

In the first two the words `<image>` in a user's TEXT say where the next picture stands; in the last three pictures
stand before the first question. A picture is a NAME (the reader looks it up), its bytes, {"bytes", "path"} or a data:
URL.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from hypervl_jax import image

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
UNSUPPORTED = ("video", "videos", "audio", "audios")
_BAD_TEXT = re.compile("[\ud800-\udfff\ufffd\x00-\x08\x0b\x0c\x0e-\x1f]")


class DataError(ValueError):
    """Data that cannot be used as a whole; the message names the file and the cure."""


class Refused(ValueError):
    """Why one record cannot be used: a kind of `KINDS`, and a reason that says what to change."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


KINDS = {  # kind of fault -> what it is
    "unreadable": "a file that is damaged or cut short: what follows there is not read",
    "not-utf8": "bytes that are no UTF-8",
    "bad-json": "no JSON",
    "duplicate-key": "an object with the same key twice",
    "bad-record": "not an object, or with parts of a wrong type",
    "no-messages": "no conversation, or an empty one",
    "not-supported": "video, audio, calls of tools, messages of another weight than 1",
    "bad-role": "a role that is none of " + ", ".join(ROLES),
    "role-order": "not system (or none), then user and assistant in turn",
    "no-answer": "the last message is not an answer",
    "empty-question": "a question without words or a picture",
    "empty-answer": "an answer without words",
    "bad-text": "characters that stand for lost ones, control characters, halves of characters",
    "image-count": "not one picture for each place of one",
    "image-place": "a picture in another message than a user's",
    "image-url": "a picture that would have to be fetched",
    "image-missing": "no such file",
    "path-escape": "a path that leads out of the root",
    "symlink-escape": "a link that leads out of the root",
    "image-damaged": "a file that cannot be decoded",
    "image-too-large": "more bytes or pixels than image.load takes",
    "image-too-small": "a side shorter than a patch",
    "too-many-tiles": "more tiles than the largest of data.tile_buckets",
    "too-long": "more tokens than data.lengths allow, or than pictures leave room for",
    "wrong-length": "a mixture that says another number of records than its annotation has",
    "special-token": "the name of a special token as text: a template that was applied before",
    "duplicate-id": "an id that was there before",
    "duplicate-record": "the very same messages and pictures as before",
}
KEPT = (
    "wrong-length",
    "image-too-small",
    "special-token",
    "duplicate-id",
    "duplicate-record",
)  # told of, and trained on all the same


class Fault(NamedTuple):
    """What is wrong with one record. `line` counts from 1: lines of JSON, rows of parquet, samples of a tar."""

    file: str
    line: int
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.reason}"


class Picture(NamedTuple):
    """A picture that is not decoded yet. `size` is (height, width) where that is known already."""

    name: str
    source: Path | bytes
    size: tuple[int, int] | None = None

    def load(self) -> UInt8[np.ndarray, "H W 3"]:
        """Its pixels. Raises `ImageError`."""
        return image.load(self.source, name=self.name)

    def bytes(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


class Conversation(NamedTuple):
    """One record: `messages` as `text.render` takes them, their content a list of parts, and as many pictures as they
    show, in order."""

    id: str
    messages: list[dict[str, Any]]
    pictures: list[Picture]
    file: str
    line: int


Find = Callable[[str], Picture]  # a name -> the picture, or `Refused`


def parse(raw: Any, find: Find, file: str, line: int) -> Conversation:
    """The conversation of one record. Raises `Refused` with the first thing that is wrong with it."""
    if not isinstance(raw, Mapping):
        raise Refused("bad-record", f"expected an object, found {_short(raw)}")
    if found := [k for k in UNSUPPORTED if raw.get(k)]:
        raise Refused("not-supported", f"{found[0]!r}: only pictures and text are read; leave the record out")
    listed = [_picture(value, find) for value in _listed(raw)]
    turns, placed = _turns(raw)
    messages, pictures, waiting = [], [], list(listed)
    for n, (role, content) in enumerate(turns, 1):
        parts: list[dict[str, str]] = []
        front: list[tuple[str, Any]] = [] if placed or n > 1 else [("image", None)] * len(listed)
        for kind, part in (*front, *_parts(content, n, placed and role == "user")):
            if kind == "text":
                if bad := _BAD_TEXT.search(part):
                    raise Refused(
                        "bad-text", f"message {n}: U+{ord(bad[0]):04X} at {part[: bad.start()][-20:]!r}; mend it"
                    )
                parts += [{"type": "text", "text": part}] if part else []
                continue
            if role != "user":
                raise Refused("image-place", f"message {n}: a picture in {role}'s message; move it to a user's")
            parts.append({"type": "image"})
            if part is not None:
                pictures.append(_picture(part, find))
            elif waiting:
                pictures.append(waiting.pop(0))
            else:
                raise Refused("image-count", f"{len(listed)} pictures, but message {n} has a place for one more")
        _check_turn(role, parts, n)
        if all(p["type"] == "text" for p in parts):  # one text is tokenised in one piece
            parts = [{"type": "text", "text": "".join(p["text"] for p in parts)}]
        messages.append({"role": role, "content": parts})
    if waiting:
        raise Refused(
            "image-count",
            f"{len(listed)} pictures, {len(listed) - len(waiting)} places: write {IMAGE} where each is to be seen",
        )
    _check_order([m["role"] for m in messages])
    name = raw.get("id")
    named = isinstance(name, str | int) and not isinstance(name, bool) and name != ""
    return Conversation(str(name) if named else f"{file}:{line}", messages, pictures, file, line)


def _listed(raw: Mapping[str, Any]) -> list[Any]:
    """What a record names as its pictures, beside its messages."""
    out = []
    for key in ("image", "images"):
        value = raw.get(key)
        if value is not None:
            out += value if isinstance(value, list | tuple) else [value]
    return [value for value in out if value is not None]


def _turns(raw: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], bool]:
    """(role, content) of every message, and whether these say where pictures stand."""
    said = _first(raw, "messages", "conversations", "conversation")
    if isinstance(said, str):  # a column of JSON
        try:
            said = json.loads(said)
        except (ValueError, RecursionError) as e:
            raise Refused("bad-json", f"messages: {e}") from e
    turns: list[tuple[str, Any]] = []
    if said is not None:
        if not isinstance(said, Sequence):
            raise Refused("bad-record", f"messages: expected a list, found {_short(said)}")
        turns = [_turn(message, n) for n, message in enumerate(said, 1)]
        if not turns:
            raise Refused("no-messages", "the conversation is empty")
        if isinstance(raw.get("system"), str) and raw["system"] and turns[0][0] != "system":
            turns.insert(0, ("system", raw["system"]))
        return turns, True
    if isinstance(pairs := raw.get("texts"), Sequence) and not isinstance(pairs, str):
        for n, pair in enumerate(pairs, 1):
            if not isinstance(pair, Mapping) or not {"user", "assistant"} <= pair.keys():
                raise Refused("bad-record", f'texts {n}: expected {{"user", "assistant"}}, found {_short(pair)}')
            turns += [("user", pair["user"]), ("assistant", pair["assistant"])]
    elif raw.get("question") is not None:
        turns = [("user", raw["question"]), ("assistant", raw.get("answer"))]
    elif (caption := _first(raw, "caption", "text")) is not None:
        turns = [("user", ""), ("assistant", caption)]
    if not turns:
        raise Refused("no-messages", "no messages, conversations, texts, question or caption in this record")
    return turns, False


def _turn(message: Any, n: int) -> tuple[str, Any]:
    if not isinstance(message, Mapping):
        raise Refused("bad-record", f"message {n}: expected an object, found {_short(message)}")
    if message.get("tool_calls") or message.get("weight", 1) not in (1, None):
        raise Refused("not-supported", f"message {n}: calls of tools and weights are not read; leave the record out")
    role = _first(message, "role", "from")
    if not isinstance(role, str) or role not in ROLES:
        raise Refused("bad-role", f"message {n}: role {_short(role)} is none of {', '.join(ROLES)}")
    return ROLES[role], _first(message, "content", "value")


def _parts(content: Any, n: int, places: bool) -> Iterator[tuple[str, Any]]:
    """("text", the words) and ("image", the value of a picture, or None for the next of the listed ones)."""
    if isinstance(content, str):
        before, *after = content.split(IMAGE) if places else [content]
        yield "text", before
        for words in after:
            yield "image", None
            yield "text", words.removeprefix("\n")  # the template writes it
        return
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise Refused("bad-record", f"message {n}: expected text or a list of parts, found {_short(content)}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield "text", part["text"]
        elif kind == "image":
            yield "image", _first(part, "image", "path", "url")
        elif kind == "image_url":
            value = part.get("image_url")
            value = value.get("url") if isinstance(value, Mapping) else value
            yield "image", 0 if value is None else value  # no picture at all, which `_picture` refuses
        else:
            raise Refused("bad-record", f"message {n}: neither text nor a picture: {_short(part)}")


def _picture(value: Any, find: Find) -> Picture:
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        value, name = (path, None) if data is None else (data, path)
    else:
        name = None
    if isinstance(value, bytes):
        return Picture(name if isinstance(name, str) and name else "<bytes>", value)
    if not isinstance(value, str):
        raise Refused("bad-record", f"expected the name of a picture, found {_short(value)}")
    if value[:5].lower() == "data:":
        head, _, data = value.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("not base64")
            return Picture("<data: URL>", base64.b64decode(data, validate=True))
        except (ValueError, binascii.Error) as e:
            raise Refused("image-damaged", f"a data: URL that cannot be decoded ({e})") from e
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise Refused("image-url", f"{value:.80}: nothing is fetched; save the picture and name the file")
    return find(value)


def _check_turn(role: str, parts: list[dict[str, str]], n: int) -> None:
    words = any(p["type"] == "text" and p["text"].strip() for p in parts)
    if role == "assistant" and not words:
        raise Refused("empty-answer", f"message {n}: the answer is empty; write one, or leave the record out")
    if role == "user" and not words and not any(p["type"] == "image" for p in parts):
        raise Refused("empty-question", f"message {n}: neither words nor a picture; write one, or leave the record out")


def _check_order(roles: list[str]) -> None:
    first = 1 if roles[0] == "system" else 0
    for n, role in enumerate(roles[first:]):
        if role != ("user", "assistant")[n % 2]:
            want = ("a question", "an answer")[n % 2]
            raise Refused("role-order", f"message {n + first + 1}: {role}, where {want} is due")
    if roles[-1] != "assistant":
        raise Refused("no-answer", f"the last message is {roles[-1]}'s; add the answer, or leave the record out")


def _first(values: Mapping[str, Any], *keys: str) -> Any:
    """The first of these that is there; columns of a table are there and None."""
    return next((values[k] for k in keys if values.get(k) is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
