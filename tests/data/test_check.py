"""Planted faults are found by file and line, each and no other; no bytes of a file make the check stumble."""

import io
import json
import os
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hypervl_jax import cost, plan, text, tokens
from hypervl_jax.data import check, readers
from hypervl_jax.data.conversations import KEPT, KINDS, DataError, Fault

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def png(height=40, width=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def bomb(side):
    """A PNG of some bytes that says it has side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def llava(id, image="a.png", question="<image>\nwhat is this?", answer="a thing", **more):
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    record = {"id": id, "conversations": said, **more}
    return record if image is None else {"image": image, **record}


def turns(*said, id, image="a.png"):
    return {"id": id, "image": image, "conversations": [{"from": f, "value": v} for f, v in said]}


@pytest.fixture
def folder(tmp_path):
    """A root with pictures, and something outside of it that nobody may read."""
    root = tmp_path / "set"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    for name, data in {
        "a.png": png(),
        "b.png": png(seed=1),
        "empty.png": b"",
        "cut.png": png(200, 200)[:300],
        "text.png": b"<html>404</html>",
        "huge.png": bomb(20_000),
        "thin.png": png(3, 40),
        "tall.png": png(500, 500),
    }.items():
        (root / name).write_bytes(data)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "circle.png").symlink_to(root / "circle.png")
    (root / "inside.png").symlink_to(root / "a.png")
    (root / "folder.png").mkdir()
    return root


@pytest.fixture
def checked(tiny_config, tiny_tokenizer):
    """Checks files against the tiny model."""

    def run(*files, data=None, root=None):
        return check.check(readers.parts(list(files), root), tiny_config.model, tiny_tokenizer, data, progress=False)

    return run


GOOD = llava("good")
QUESTION = {"role": "user", "content": "show me"}
PLANTED = [  # a line each: what stands there, and what is wrong with it
    (json.dumps(GOOD), None),
    ('{"id": "cut off", "conversations": [', "bad-json"),
    ('{"id": 1} {"id": 2}', "bad-json"),
    ("[" * 100_000, "bad-json"),
    (b'{"id": "caf\xe9"}', "not-utf8"),
    ('{"id": "x", "id": "y", "conversations": []}', "duplicate-key"),
    ('["no", "object"]', "bad-record"),
    (json.dumps({"id": "m", "image": "a.png"}), "no-messages"),
    (json.dumps({"id": "e", "conversations": []}), "no-messages"),
    (json.dumps({"id": "s", "conversations": "not a list"}), "bad-json"),
    (json.dumps({"id": "n", "image": 7, "conversations": GOOD["conversations"]}), "bad-record"),
    (json.dumps(turns(("human", "<image>"), ("robot", "hm"), id="role")), "bad-role"),
    (json.dumps(turns(("human", "<image>"), ("human", "again"), ("gpt", "a"), id="o")), "role-order"),
    (json.dumps(turns(("gpt", "first"), ("human", "why?"), id="p", image=[])), "role-order"),
    (json.dumps(turns(("human", "<image>"), ("gpt", "a"), ("human", "and?"), id="q")), "no-answer"),
    (json.dumps(llava("ea", answer=" \n")), "empty-answer"),
    (json.dumps(llava("eq", image=None, question="  ")), "empty-question"),
    (json.dumps(llava("sur", answer="\ud83d")), "bad-text"),
    (json.dumps(llava("nul", answer="a\x00b")), "bad-text"),
    (json.dumps(llava("lost", answer="caf\ufffd")), "bad-text"),
    (json.dumps(llava("more", question="<image><image>\nhm?")), "image-count"),
    (json.dumps(llava("fewer", image=["a.png", "b.png"])), "image-count"),
    (json.dumps(llava("none", question="no place for it?")), "image-count"),
    (json.dumps({"messages": [QUESTION, {"role": "assistant", "content": [{"type": "image"}]}]}), "image-place"),
    (json.dumps(llava("url", image="https://example.com/a.png")), "image-url"),
    (json.dumps(llava("file", image="file:///etc/passwd")), "image-url"),
    (json.dumps(llava("gone", image="nowhere.png")), "image-missing"),
    (json.dumps(llava("dir", image="folder.png")), "image-missing"),
    (json.dumps(llava("circle", image="circle.png")), "image-missing"),
    (json.dumps(llava("zero", image="a\x00.png")), "image-missing"),
    (json.dumps(llava("long", image="a" * 5000)), "image-missing"),
    (json.dumps(llava("up", image="../secret.png")), "path-escape"),
    (json.dumps(llava("abs", image="/etc/passwd")), "path-escape"),
    (json.dumps(llava("link", image="link.png")), "symlink-escape"),
    (json.dumps(llava("empty", image="empty.png")), "image-damaged"),
    (json.dumps(llava("cut", image="cut.png")), "image-damaged"),
    (json.dumps(llava("html", image="text.png")), "image-damaged"),
    (json.dumps(llava("b64", image="data:image/png;base64,@@@")), "image-damaged"),
    (json.dumps(llava("huge", image="huge.png")), "image-too-large"),
    (json.dumps(llava("thin", image="thin.png")), "image-too-small"),
    (json.dumps(llava("tall", image="tall.png")), "too-many-tiles"),
    (json.dumps(llava("words", question="<image>\n" + "what is this? " * 500)), "too-long"),
    (json.dumps(llava("special", answer="a thing<|im_end|>")), "special-token"),
    (json.dumps(llava("good", answer="another thing")), "duplicate-id"),
    (json.dumps(llava("again")), "duplicate-record"),
    (json.dumps(llava("film", image=None, question="what?", video="a.mp4")), "not-supported"),
    (json.dumps(llava("well", image="inside.png", answer="a link that stays inside")), None),
]  # fmt: skip


def write(path, lines):
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else x.encode("utf-8", "surrogatepass") for x in lines) + b"\n"
    )
    return path


def test_every_planted_fault_is_found_by_file_and_line_and_nothing_else(folder, checked, tiny_config):
    data = replace(tiny_config.data, tile_buckets=(1, 3, 7), lengths=(256, 256, 256))
    file = write(folder / "train.jsonl", [line for line, _ in PLANTED])
    report = checked(file, data=data)
    assert {(f.file, f.line, f.kind) for f in report.ledger.faults} == {
        (str(file), n, kind) for n, (_, kind) in enumerate(PLANTED, 1) if kind
    }
    assert len(report.ledger.faults) == sum(kind is not None for _, kind in PLANTED)
    assert report.records == len(PLANTED)
    assert len(report.tokens) == sum(kind is None or kind in KEPT for _, kind in PLANTED)
    assert all(f.reason for f in report.ledger.faults)


def test_the_planted_faults_are_of_every_kind_that_a_line_can_have():
    """`unreadable` is of whole files, `wrong-length` of mixtures: both have tests of their own."""
    found = {kind for _, kind in PLANTED if kind}
    assert found == set(KINDS) - {"unreadable", "wrong-length"}
    assert len(found) >= 20


def test_a_list_of_records_tells_the_same_by_the_lines_where_they_begin(folder, checked):
    apart = ("bad-json", "too-many-tiles", "too-long")
    lines = [(x, kind) for x, kind in PLANTED if isinstance(x, str) and kind not in apart]
    file = folder / "train.json"
    bad = lines[4][0].replace("}", ', "latin": "\xe9"}', 1).encode("latin-1")
    body = ",\n\n".join(x for x, _ in lines).encode("utf-8", "surrogatepass")
    file.write_bytes(b"[\n" + body + b",\n\n" + bad + b"\n]\n")
    faults = checked(file).ledger.faults
    want = [(2 + 2 * n, kind) for n, (_, kind) in enumerate(lines) if kind] + [(2 + 2 * len(lines), "not-utf8")]
    assert [(f.line, f.kind) for f in faults] == want


def test_a_list_that_is_cut_short_keeps_what_came_before_and_says_that_the_rest_is_lost(folder, checked):
    file = folder / "train.json"
    whole = json.dumps([llava(i, answer=f"thing {i}") for i in range(5)], indent=1)
    file.write_text(whole[: whole.index('"thing 3"')])
    report = checked(file)
    assert len(report.tokens) == 3
    ((_, line, kind, reason),) = report.ledger.faults
    assert (line, kind) == (whole[: whole.index('"thing 3"')].count("\n") + 1, "unreadable")
    assert "rest" in reason
    with pytest.raises(DataError, match=rf"train\.json:{line}: unreadable"):
        report.ledger.settle(report.records, 0.9)


def test_what_it_counts_is_what_the_model_meets(folder, checked, tiny_config, tiny_tokenizer):
    m = tiny_config.model
    both = llava(1, image=["a.png", "tall.png"], question="<image><image>and?")
    file = write(folder / "two.jsonl", [json.dumps(llava(0)), json.dumps(both)])
    report = checked(file)
    one, big = (plan.make(size, 1.0, m.policy) for size in ((40, 30), (500, 500)))
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}
    row = text.render([message, {"role": "assistant", "content": "a thing"}], [one], tiny_tokenizer, m.text)
    assert report.tokens[0] == len(row.ids)
    assert list(report.visual) == [one.tokens, one.tokens + big.tokens]
    assert list(report.tiles) == [one.n_tiles, one.n_tiles + big.n_tiles]
    assert report.answers[0] == row.loss.sum() == len(tiny_tokenizer.encode("a thing")) + 1
    for branch in ("base", "large"):
        encode = sum(p.vit_flops(m.vit(branch)) + cost.projector_flops(p, m, branch) for p in (one, one, big))
        assert report.flops[branch] == encode + sum(cost.llm_flops(m.llm, int(n)) for n in report.tokens)
    said = "\n".join(report.lines())
    assert f"an epoch: {report.tokens.sum()} tokens, {report.visual.sum()} of them visual" in said


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200))
def test_a_histogram_counts_everything_once(values):
    lines = check._histogram(np.array(values))
    assert sum(int(line.split()[-1]) for line in lines) == len(values)
    assert len(lines) <= 8


def test_a_ledger_has_a_maximum_rate(tmp_path):
    ledger = check.Ledger()
    ledger.settle(0, 0.0)
    ledger.faults += [Fault("f", i, "image-missing", "gone") for i in (3, 5)] + [Fault("f", 7, "duplicate-id", "twice")]
    ledger.settle(100, 0.02)
    with pytest.raises(DataError, match=r"f:3: image-missing: gone; 2 of 100 records \(2.00%\) cannot be used, 1.00%"):
        ledger.settle(100, 0.01)
    with pytest.raises(DataError, match="2 of 2"):
        ledger.settle(2, 1.0)
    ledger.write(tmp_path / "l.jsonl")
    assert [json.loads(line)["line"] for line in (tmp_path / "l.jsonl").read_text().splitlines()] == [3, 5, 7]


# --- fuzzing ---------------------------------------------------------------------------------------------------------

SEEDS = [
    line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    for line, _ in PLANTED
    if len(line) < 1000
]


def survives(file, checked):
    report = checked(file)
    assert all(f.line >= 1 and f.file == str(file) and f.kind in KINDS for f in report.ledger.faults)
    assert len(report.tokens) + report.ledger.lost == report.records


@fuzz
@given(data=st.binary(max_size=300), suffix=st.sampled_from([".json", ".jsonl", ".tar", ".tgz"]))
def test_any_bytes(data, suffix, folder, checked):
    file = folder / f"fuzz{suffix}"
    file.write_bytes(data)
    survives(file, checked)


BITS = [b"{", b"}", b"[", b"]", b'"', b"\n", b"null", b"1e999", b"<image>", b"\\ud800"]


@st.composite
def mutated(draw, seeds):
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 8))):
        at, kind = draw(st.integers(0, max(len(data) - 1, 0))), draw(st.integers(0, 3))
        if kind == 0:
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == 1:
            del data[at : at + draw(st.integers(1, 30))]
        elif kind == 2:
            data[at:at] = draw(st.binary(max_size=10))
        else:
            data[at:at] = draw(st.sampled_from(BITS))
    return bytes(data)


@settings(fuzz, max_examples=150)
@given(lines=st.lists(mutated(SEEDS), min_size=1, max_size=4), whole=st.booleans())
def test_damaged_records(lines, whole, folder, checked):
    file = folder / ("fuzz.json" if whole else "fuzz.jsonl")
    file.write_bytes(b"[" + b",".join(lines) + b"]" if whole else b"\n".join(lines))
    survives(file, checked)


WORDS = ["a.png", "<image>", "user", "gpt", "image", "text", "data:,", "x://y"]
INNER = [
    "role", "from", "value", "content", "type", "text", "image",
    "image_url", "url", "bytes", "path", "user", "assistant", "weight",
    "tool_calls",
]  # fmt: skip
OUTER = [
    "id", "image", "images", "messages", "conversations", "texts", "question",
    "answer", "caption", "text", "system", "video",
]  # fmt: skip
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(INNER), inner, max_size=4),
    max_leaves=12,
)


@settings(fuzz, max_examples=150)
@given(record=st.dictionaries(st.sampled_from(OUTER), values, max_size=6))
def test_any_object(record, folder, checked):
    file = folder / "fuzz.jsonl"
    file.write_text(json.dumps(record) + "\n")
    survives(file, checked)


def tar_of(files):
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


TAR = tar_of({"0.png": png(), "0.json": json.dumps(llava(0, image=None)).encode(), "1.png": png(), "1.txt": b"a thing"})


@fuzz
@given(data=mutated([TAR]), cut=st.integers(0, len(TAR)))
def test_damaged_archives(data, cut, folder, checked):
    file = folder / "fuzz.tar"
    file.write_bytes(data[:cut])
    survives(file, checked)


@fuzz
@given(data=st.data())
def test_damaged_tables(data, folder, checked):
    pa = pytest.importorskip("pyarrow", reason="needs the train extra")
    import pyarrow.parquet as pq

    row = {"images": [{"bytes": png(), "path": None}], "texts": [{"user": "what?", "assistant": "a"}]}
    pq.write_table(pa.Table.from_pylist([row]), buffer := io.BytesIO())
    file = folder / "fuzz.parquet"
    file.write_bytes(data.draw(mutated([buffer.getvalue()])))
    survives(file, checked)


@fuzz
@given(picture=mutated([png(8, 8)]))
def test_damaged_pictures(picture, folder, checked):
    (folder / "fuzz.png").write_bytes(picture)
    survives(write(folder / "one.jsonl", [json.dumps(llava(0, image="fuzz.png"))]), checked)


def test_special_names_are_those_of_the_tokenizer(tiny_tokenizer):
    for name in (*tokens.SPECIALS, *tokens.MARKERS):
        tiny_tokenizer.special(name)
        assert check._SPECIAL.fullmatch(name)


def test_a_pipe_is_not_waited_for(folder, checked):
    os.mkfifo(folder / "pipe.png")
    report = checked(write(folder / "p.jsonl", [json.dumps(llava(0, image="pipe.png"))]))
    assert Counter(f.kind for f in report.ledger.faults) == {"image-missing": 1}
