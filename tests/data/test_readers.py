"""The same conversations come out of every format; paths stay inside the root; mixtures are read strictly."""

import base64
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from hypervl_jax import text
from hypervl_jax.data import readers
from hypervl_jax.data.conversations import Conversation, DataError, Fault


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


PICTURE = {"type": "image"}


def says(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


WANT = [says("user", PICTURE, "what is this?"), says("assistant", "a thing")]
URL = "data:image/png;base64," + base64.b64encode(png(0)).decode()
ASKED, ANSWERED = {"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": "a thing"}
SHAPES = {
    "llava": {"image": "0.png", "conversations": [ASKED, ANSWERED]},
    "llava, a list": {"image": ["0.png"], "conversations": [ASKED, ANSWERED]},
    "sharegpt": {
        "images": ["0.png"],
        "messages": [{"role": "user", "content": ASKED["value"]}, {"role": "assistant", "content": "a thing"}],
    },
    "openai": {
        "messages": [
            says("user", {"type": "image_url", "image_url": {"url": URL}}, "what is this?"),
            {"role": "assistant", "content": "a thing"},
        ]
    },
    "parts that name a picture": {
        "messages": [says("user", {"type": "image", "image": "0.png"}, "what is this?"), says("assistant", "a thing")]
    },
    "parts and a list": {"images": ["0.png"], "messages": WANT},
    "messages as JSON": {"images": ["0.png"], "messages": json.dumps(WANT)},
    "pairs": {"images": ["0.png"], "texts": [{"user": "what is this?", "assistant": "a thing"}]},
    "question": {"image": "0.png", "question": "what is this?", "answer": "a thing"},
}


@pytest.fixture
def root(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


def records(path, root=None):
    return [r for part in readers.parts([path], root) for r in readers.read(part)]


def one(path, root=None):
    (found,) = records(path, root)
    assert isinstance(found, Conversation), found
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_conversation(shape, root):
    file = root / "one.jsonl"
    file.write_text(json.dumps({"id": "x", **SHAPES[shape]}))
    found = one(file)
    assert (found.id, found.messages, found.file, found.line) == ("x", WANT, str(file), 1)
    (picture,) = found.pictures
    assert picture.bytes() == png(0)
    np.testing.assert_array_equal(picture.load(), np.array(Image.open(root / "0.png")))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson"])
def test_lines_and_lists(suffix, root):
    rows = [{"id": i, **SHAPES["llava"], "image": f"{i}.png"} for i in range(3)]
    file = root / f"all{suffix}"
    file.write_text(json.dumps(rows, indent=2) if suffix == ".json" else "\n\n".join(map(json.dumps, rows)))
    found = records(file)
    assert [r.id for r in found] == ["0", "1", "2"]
    whole = json.dumps(rows, indent=2)
    begins = [whole[: whole.index(f'"id": {i}')].count("\n") for i in range(3)]  # the line before its first key
    assert [r.line for r in found] == (begins if suffix == ".json" else [1, 3, 5])
    assert [r.pictures[0].bytes() for r in found] == [png(i) for i in range(3)]


def test_lines_of_json_under_another_name_and_a_byte_order_mark(root):
    file = root / "lines.json"
    file.write_text("\n".join(json.dumps({"id": i, **SHAPES["llava"]}) for i in range(2)), encoding="utf-8-sig")
    assert [r.id for r in records(file)] == ["0", "1"]


@pytest.mark.parametrize("long", [101, 350, 1000])
def test_a_line_that_is_too_long_is_told_of_and_the_next_is_read(long, root, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 100)
    file = root / "a.jsonl"
    short = json.dumps({"id": "s", "caption": "c"})
    file.write_text("\n".join([short, "x" * long, short, json.dumps({"id": "y" * long})]))
    first, fault, second, last = records(file)
    assert (first.line, second.line) == (1, 3)
    assert [(f.line, f.kind) for f in (fault, last)] == [(2, "bad-json"), (4, "bad-json")]


def test_a_record_without_an_id_is_called_by_its_place(root):
    file = root / "a.jsonl"
    file.write_text(json.dumps(SHAPES["llava"]))
    assert one(file).id == f"{file}:1"


def test_several_pictures_stand_where_they_are_written(root, tiny_tokenizer, tiny_config):
    said = "<image>\nbefore<image><image>\n\nafter"
    turns = [{"from": "system", "value": "be brief"}, {"from": "human", "value": said}, ANSWERED]
    again = [{"from": "human", "value": "and now?"}, {"from": "gpt", "value": "as before"}]
    file = root / "a.jsonl"
    file.write_text(json.dumps({"image": ["0.png", "1.png", "0.png"], "conversations": turns + again}))
    found = one(file)
    assert found.messages == [
        says("system", "be brief"),
        says("user", PICTURE, "before", PICTURE, PICTURE, "\nafter"),
        says("assistant", "a thing"),
        says("user", "and now?"),
        says("assistant", "as before"),
    ]
    assert [p.name for p in found.pictures] == ["0.png", "1.png", "0.png"]
    from hypervl_jax.data import check

    sizes = [p.load().shape[:2] for p in found.pictures]
    seen = check.shown(found, sizes, 1.0, tiny_config.model.policy, tiny_config.model.text, tiny_tokenizer)
    assert int((seen.prompt.slots >= 0).sum()) == sum(p.tokens for p in seen.plans)
    learnt = tiny_tokenizer.decode(seen.prompt.ids[seen.prompt.loss])
    assert learnt == "a thing<|im_end|>as before<|im_end|>"
    assert isinstance(seen.prompt, text.Prompt)


def test_names_count_from_the_annotation_unless_a_root_is_given(root):
    (root / "notes").mkdir()
    file = root / "notes" / "a.jsonl"
    file.write_text(json.dumps({"image": "0.png", "conversations": [ASKED, ANSWERED]}))
    (fault,) = records(file)
    assert fault.kind == "image-missing"
    assert f"names count from {root / 'notes'} (--root)" in fault.reason
    assert one(file, root).pictures[0].source == root / "0.png"
    file.write_text(json.dumps({"image": "../0.png", "conversations": [ASKED, ANSWERED]}))
    assert [f.kind for f in records(file)] == ["path-escape"]
    file.write_text(json.dumps({"image": str(root / "0.png"), "conversations": [ASKED, ANSWERED]}))
    assert one(file, root).pictures[0].bytes() == png(0)  # a whole path that stays inside


def test_a_root_may_itself_be_a_link(root, tmp_path_factory):
    link = tmp_path_factory.mktemp("other") / "link"
    link.symlink_to(root)
    file = root / "a.jsonl"
    file.write_text(json.dumps(SHAPES["llava"]))
    assert one(link / "a.jsonl").pictures[0].bytes() == png(0)


# --- parquet ---------------------------------------------------------------------------------------------------------


def test_rows_of_parquet(root):
    pa = pytest.importorskip("pyarrow", reason="needs the train extra")
    import pyarrow.parquet as pq

    pair = [{"user": "what is this?", "assistant": "a thing"}]
    rows = [
        {"id": "bytes", "images": [{"bytes": png(1), "path": "gone.png"}], "texts": pair},
        {"id": "path", "images": [{"bytes": None, "path": "2.png"}], "texts": pair},
        {"id": "lost", "images": [{"bytes": None, "path": "gone.png"}], "texts": pair},
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "a.parquet")
    first, second, fault = records(root / "a.parquet")
    assert first.messages == second.messages == WANT
    assert [first.pictures[0].bytes(), second.pictures[0].bytes()] == [png(1), png(2)]
    assert (fault.line, fault.kind) == (3, "image-missing")


def test_without_pyarrow_the_extra_is_named(root, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (root / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.parquet: .*pip install 'hypervl-jax\[train\]'"):
        records(root / "a.parquet")


# --- tar -------------------------------------------------------------------------------------------------------------


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_samples_of_a_webdataset(suffix, mode, root):
    chat = json.dumps({"conversations": [ASKED, ANSWERED]}).encode()
    both = json.dumps({"id": "named", "images": ["1.b.png", "1.a.png"], "texts": [{"user": "u", "assistant": "a"}]})
    files = [
        ("shard/0.png", png(0)),
        ("shard/0.json", chat),
        ("1.a.png", png(1)),
        ("1.b.png", png(2)),
        ("1.json", both.encode()),
        ("2.jpg", png(0)),
        ("2.txt", b"a caption"),
        ("2.cls", b"7"),
        ("3.png", png(0)),
        ("4.txt", b"\xff"),
        ("5.png", None),
        ("6.json", b'{"image": "../0.png", "caption": "c"}'),
    ]
    write_tar(root / f"a{suffix}", files, mode)
    first, second, third, *faults = records(root / f"a{suffix}")
    assert (first.id, first.messages, first.pictures[0].bytes()) == ("shard/0", WANT, png(0))
    assert (second.id, [p.bytes() for p in second.pictures]) == ("named", [png(2), png(1)])
    assert third.messages == [says("user", PICTURE), says("assistant", "a caption")]
    kinds = [(4, "no-messages"), (5, "not-utf8"), (6, "symlink-escape"), (7, "image-missing")]
    assert [(f.line, f.kind) for f in faults] == kinds


def test_an_archive_that_is_cut_short_says_so(root):
    write_tar(
        root / "a.tar", [(f"{i}.{end}", data) for i in range(3) for end, data in (("png", png(i)), ("txt", b"c"))]
    )
    (root / "b.tar").write_bytes((root / "a.tar").read_bytes()[:5000])
    *whole, fault = records(root / "b.tar")
    assert len(whole) == 1
    assert (fault.line, fault.kind) == (3, "unreadable")


# --- mixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(root):
    (root / "pictures").mkdir()
    (root / "pictures" / "p.png").write_bytes(png(1))
    (root / "a.jsonl").write_text(json.dumps({"image": "p.png", "conversations": [ASKED, ANSWERED]}))
    (root / "b.json").write_text(json.dumps([{"id": 1, **SHAPES["llava"]}, {"id": 2, **SHAPES["llava"]}]))

    def write(**changes):
        parts = {
            "first": {"root": "pictures/", "annotation": "a.jsonl", "repeat_time": 0.5, "length": 1} | changes,
            "second": {"annotation": "b.json", "max_dynamic_patch": 6, "data_augment": False, "length": 3},
        }
        (root / "meta.json").write_text(json.dumps(parts))
        return root / "meta.json"

    return write


def test_a_mixture_names_its_annotations(mixture, root):
    first, second = readers.parts([mixture()])
    assert first == readers.Part("first", root / "a.jsonl", root / "pictures", 0.5, 1)
    assert second == readers.Part("second", root / "b.json", root, 1.0, 3)
    assert [r.pictures[0].bytes() for r in readers.read(first)] == [png(1)]
    *whole, fault = readers.read(second)
    assert len(whole) == 2
    assert isinstance(fault, Fault)
    assert (fault.line, fault.kind) == (2, "wrong-length")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotation": "gone.jsonl"}, "no such file"),
        ({"annotation": 3}, "must be paths"),
        ({"root": "gone"}, "no such folder"),
        ({"repeat_time": 0}, "above 0"),
        ({"repeat_time": "2"}, "above 0"),
        ({"length": 1.5}, "whole number"),
        ({"data_augment": True}, "data_augment"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused_by_its_part(mixture, changes, said):
    with pytest.raises(DataError, match=rf"meta\.json: 'first'.*{said}"):
        readers.parts([mixture(**changes)])


def test_two_parts_of_one_name_are_refused(root):
    (root / "meta.json").write_text('{"a": {"annotation": "x.jsonl"}, "a": {"annotation": "y.jsonl"}}')
    with pytest.raises(DataError, match=r"meta\.json: 'a' is there twice"):
        readers.parts([root / "meta.json"])


@pytest.mark.parametrize(("name", "said"), [("gone.jsonl", "no such file"), ("0.png", "no known kind")])
def test_what_is_no_annotation_is_refused(name, said, root):
    with pytest.raises(DataError, match=rf"{name}: .*{said}"):
        readers.parts([root / name])
    with pytest.raises(DataError, match="no such folder; --root"):
        readers.parts([root / "0.png"], root / "nowhere")
