"""A prepared data set holds what could be used, in order, byte for byte; nothing is left of one that failed."""

import io
import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tensorflow_datasets", reason="prepared data sets need the train extra")
from hypervl_jax.data import prepared, readers
from hypervl_jax.data.conversations import DataError


def picture(seed, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def llava(i, image):
    said = [{"from": "human", "value": "<image>" * len(image) + "what, Zoë?"}, {"from": "gpt", "value": f"thing {i}"}]
    return {"id": i, "image": image, "conversations": said}


@pytest.fixture
def annotated(tmp_path):
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "1.jpg").write_bytes(picture(1, "JPEG"))
    images = [["0.png"], ["1.jpg", "0.png"], ["gone.png"], []]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(llava(i, x)) for i, x in enumerate(images)))
    return file


def test_records_come_back_as_they_were_read(annotated, tmp_path):
    ledger = prepared.build(readers.parts([annotated]), tmp_path / "out", 0.25, progress=False)
    (fault,) = ledger.faults
    assert (fault.line, fault.kind) == (3, "image-missing")
    assert json.loads((tmp_path / "out" / prepared.LEDGER).read_text()) == fault._asdict()
    records = prepared.Records(tmp_path / "out", "train")
    want = [r for part in readers.parts([annotated]) for r in readers.read(part) if r != fault]
    assert len(records) == 3
    for i, c in enumerate(want):
        found = records[i]
        assert (found.id, found.messages) == (c.id, c.messages)
        assert [p.bytes() for p in found.pictures] == [p.bytes() for p in c.pictures]
        assert [p.size for p in found.pictures] == [p.load().shape[:2] for p in c.pictures]
    assert "tensorflow" not in sys.modules
    copy = pickle.loads(pickle.dumps(records))  # to worker processes
    assert copy[1].id == "1"


def test_it_is_read_like_any_other_annotation(annotated, tmp_path):
    prepared.build(readers.parts([annotated]), tmp_path / "out", 0.25, progress=False)
    (part,) = readers.parts([tmp_path / "out"])
    found = list(readers.read(part))
    assert [r.id for r in found] == ["0", "1", "3"]
    assert found[1].pictures[1].bytes() == picture(0)


def test_too_many_faults_leave_nothing_behind(annotated, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"train\.jsonl:3: image-missing: .*1 of 4 records \(25.00%\)"):
        prepared.build(readers.parts([annotated]), tmp_path / "out", 0.1, progress=False)
    annotated.write_text("{bad\n")
    with pytest.raises(DataError, match="1 of 1 records"):
        prepared.build(readers.parts([annotated]), tmp_path / "out", 0.99, progress=False)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_there_is_not_written_over(annotated, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(DataError, match="is there already"):
        prepared.build(readers.parts([annotated]), tmp_path / "out", progress=False)


def test_a_mixture_becomes_a_split_a_part_with_its_weight(annotated, tmp_path):
    part = {"annotation": "train.jsonl", "repeat_time": 2}
    (tmp_path / "mix.json").write_text(json.dumps({"ocr/v1": part, "ocr v1": part | {"repeat_time": 0.5}, "9": part}))
    prepared.build(readers.parts([tmp_path / "mix.json"]), tmp_path / "out", 0.3, progress=False)
    assert prepared.splits(tmp_path / "out") == {"ocr_v1": 2.0, "ocr_v1_2": 0.5, "part_9": 2.0}
    assert prepared.Records(tmp_path / "out", "ocr_v1_2").repeat == 0.5
    with pytest.raises(DataError, match="no split 'train'; there are"):
        prepared.Records(tmp_path / "out", "train")


def test_another_data_set_of_the_format_is_read_by_its_features(tmp_path):
    """One of a builder that knows nothing of us; and one whose features say nothing."""
    import tensorflow_datasets as tfds

    from hypervl_jax.data.prepared import quiet

    def made(name, features, row):
        class Other(prepared.Conversations, skip_registration=True):
            def __init__(self, **kwargs):
                tfds.core.GeneratorBasedBuilder.__init__(self, **kwargs)

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"validation": self._generate_examples()}

            def _generate_examples(self):
                yield 0, row

        Other.name = name
        with quiet():
            Other(data_dir=str(tmp_path / name), file_format="array_record").download_and_prepare()
        return readers.parts([tmp_path / name])

    text = tfds.features.Text()
    image = tfds.features.Image()
    (part,) = made("vqa", {"image": image, "question": text, "answer": text},
                   {"image": io.BytesIO(picture(2)), "question": "what?", "answer": "Zoë"})  # fmt: skip
    (found,) = readers.read(part)
    assert [m["content"][-1]["text"] for m in found.messages] == ["what?", "Zoë"]
    np.testing.assert_array_equal(found.pictures[0].load(), np.array(Image.open(io.BytesIO(picture(2)))))
    (part,) = made("digits", {"image": image, "label": text}, {"image": io.BytesIO(picture(0)), "label": "7"})
    (fault,) = readers.read(part)
    assert (fault.line, fault.kind) == (1, "no-messages")


def test_a_damaged_shard_is_told_of(annotated, tmp_path):
    prepared.build(readers.parts([annotated]), tmp_path / "out", 0.3, progress=False)
    shard = next((tmp_path / "out").glob("**/*.array_record*"))
    data = bytearray(shard.read_bytes())
    data[100:400] = bytes(300)
    shard.write_bytes(data)
    (part,) = readers.parts([tmp_path / "out"])
    found = list(readers.read(part))
    assert len(found) == 3
    assert any(getattr(f, "kind", "") == "unreadable" for f in found)


def test_what_is_no_prepared_set_is_refused(tmp_path, annotated):
    with pytest.raises(DataError, match=r"dataset_info\.json; none here"):
        readers.parts([tmp_path])
    prepared.build(readers.parts([annotated]), tmp_path / "out", 0.3, progress=False)
    info = next((tmp_path / "out").glob("**/dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r'as tfrecord, which takes TensorFlow .* file_format="array_record"'):
        readers.parts([tmp_path / "out"])
