"""Screens: every answer follows from the things, boxes are right, and nothing held out is shown in training."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from hypervl_jax.config import ScreensConfig
from hypervl_jax.data import assets as archive
from hypervl_jax.data import screens as S
from hypervl_jax.data.assets import SPLITS, AssetError, Assets
from hypervl_jax.presets import nano, tiny

ASSETS = Assets.load()
NANO = nano().data.screens
SCREENS = {s: [S.record(ASSETS, NANO, s, i) for i in range(120)] for s in SPLITS}
ALL = [s for screens in SCREENS.values() for s in screens]


def overlap(a: S.Box, b: S.Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# --- the archive -----------------------------------------------------------------------------------------------------


def test_archive_is_small_and_complete():
    assert archive.PATH.stat().st_size < 1_000_000
    assert len(set(ASSETS.words)) == len(ASSETS.words) == 64
    assert all(w.isalpha() and w.islower() for w in ASSETS.words)
    for c in range(64):
        assert len(ASSETS.artists_of(c, "train")) >= 4
        assert ASSETS.artists_of(c, "test_unseen") == ("fluent-emoji-flat",)
    assert [sum(map(len, h)) for h in ASSETS.hand] == [1400, 397]
    assert all(min(map(len, h)) > 25 for h in ASSETS.hand)
    assert all(len(glyphs) == 10 for fonts in ASSETS.fonts for glyphs in fonts.values())


def test_held_out_families_share_nothing_with_training():
    train, held = ({n.split(":")[0] for n in fonts} for fonts in ASSETS.fonts)
    assert not train & held
    assert len(held) >= 4
    drawings = {a: {ASSETS.art[c, a].tobytes() for c in range(64) if (c, a) in ASSETS.art} for a in ASSETS.artists}
    seen = set().union(*(d for a, d in drawings.items() if a not in ASSETS.held_out))
    assert not seen & set().union(*(drawings[a] for a in ASSETS.held_out))


@pytest.mark.parametrize("content", [None, b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_damaged_archive_is_named(tmp_path, content):
    path = tmp_path / "broken.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AssetError, match=r"broken\.npz.*build_assets"):
        Assets.load(path)


# --- composition -----------------------------------------------------------------------------------------------------


def test_same_seed_same_screen_other_index_other_screen():
    again = S.record(ASSETS, NANO, "train", 7)
    np.testing.assert_array_equal(again.image, SCREENS["train"][7].image)
    assert again[1:] == SCREENS["train"][7][1:]
    assert len({s.image.tobytes() for s in ALL}) == len(ALL)
    other = S.record(ASSETS, dataclasses.replace(NANO, seed=1), "train", 7)
    assert other.image.tobytes() != again.image.tobytes()


def test_sizes_of_splits_do_not_matter_to_a_record():
    fewer = S.record(ASSETS, dataclasses.replace(NANO, train=10, label=1), "train", 3)
    np.testing.assert_array_equal(fewer.image, SCREENS["train"][3].image)


def test_sizes_shapes_and_questions_are_within_the_config():
    for s in ALL:
        h, w, channels = s.image.shape
        assert channels == 3
        assert s.image.dtype == np.uint8
        assert NANO.min_side <= min(h, w)
        assert max(h, w) <= NANO.max_side
        assert h * w <= NANO.max_area
        assert 1 <= len(s.questions) <= NANO.questions
        assert sum(t.kind == "picture" for t in s.things) <= NANO.max_things
    ratio = np.array([s.image.shape[0] / s.image.shape[1] for s in ALL])
    assert (ratio > 1.2).mean() > 0.4
    assert (ratio < 0.9).mean() > 0.05


def test_a_training_screen_is_asked_more():
    asked = {
        split: [len(S.record(ASSETS, NANO, split, i).questions) for i in range(40)] for split in ("train", "label")
    }
    assert max(asked["label"]) == NANO.held_out_questions < max(asked["train"]) <= NANO.questions


def test_the_place_asked_about_holds_one_thing_numbers_counted():
    for s in ALL:
        places = [S.place_of(t.box, s.image.shape[:2]) for t in s.things]
        for q in s.questions:
            if q.text == "what is this?":
                assert len(s.things) == 1
            elif q.task == "name":
                assert places.count(q.text.removeprefix("what is at the ").rstrip("?")) == 1


def test_things_lie_inside_and_apart():
    for s in ALL:
        h, w = s.image.shape[:2]
        for i, t in enumerate(s.things):
            x0, y0, x1, y1 = t.box
            assert 0 <= x0 < x1 <= w
            assert 0 <= y0 < y1 <= h
            assert not any(overlap(t.box, u.box) for u in s.things[:i])


def test_a_box_is_tight_around_what_was_drawn(monkeypatch):
    """On a white screen without a plate, the pixels that changed are those of the box."""
    monkeypatch.setattr(S.painting, "background", lambda rng, h, w: np.full((h, w, 3), 255, np.uint8))
    monkeypatch.setattr(S.painting, "plate", lambda *a, **k: None)
    cfg = dataclasses.replace(NANO, tasks=("name",), max_things=1)
    for i in range(20):
        s = S.record(ASSETS, cfg, "label", i)
        seen = np.abs(s.image.astype(int) - 255).max(-1) > 60
        x, y = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
        if len(x):  # white drawings leave less
            x0, y0, x1, y1 = s.things[0].box
            assert x0 <= x[0]
            assert x[-1] < x1
            assert y0 <= y[0]
            assert y[-1] < y1


def test_splits_show_only_their_artists_digits_and_fonts():
    for split, screens in SCREENS.items():
        artists = {t.artist for s in screens for t in s.things if t.kind == "picture"}
        fonts = {t.artist for s in screens for t in s.things if t.kind == "digit"} - {"hand"}
        if split == "test_unseen":
            assert artists == {"fluent-emoji-flat"}
        else:
            assert "fluent-emoji-flat" not in artists
            assert len(artists) >= 6
        assert fonts <= set(ASSETS.fonts[split.startswith("test")])
        assert len(fonts) >= 4


def test_handwriting_of_test_splits_is_held_out(monkeypatch):
    used = []
    monkeypatch.setattr(S.painting, "handwritten", lambda rng, hand, *a: used.append(hand) or np.ones((14, 14)))
    for split in SPLITS:
        used.clear()
        for i in range(30):
            S.record(ASSETS, NANO, split, i)
        assert used
        assert all(h is ASSETS.hand[split.startswith("test")] for h in used)


def test_small_print_alone_and_large_pictures_alone_both_exist():
    assert any(s.artist == "" and 0 < s.digit_height < 15 for s in ALL)
    large = [s for s in ALL if not s.digit_height and all(t.box[3] - t.box[1] >= 28 for t in s.things)]
    assert len(large) > 0.03 * len(ALL)
    heights = [s.digit_height for s in ALL if s.digit_height]
    assert 0.45 < len(heights) / len(ALL) < 0.75
    assert min(heights) < 10
    assert max(heights) > 30


def test_print_contrasts_with_its_plate():
    for s in ALL:
        for t in s.things:
            if t.kind == "digit":
                x0, y0, x1, y1 = map(int, t.box)
                grey = s.image[y0:y1, x0:x1].mean(-1)
                assert np.ptp(grey) > 70


# --- questions -------------------------------------------------------------------------------------------------------


def test_every_answer_follows_from_the_things():
    for s in ALL:
        size = s.image.shape[:2]
        pictures = [t for t in s.things if t.kind == "picture"]
        times = Counter(t.concept for t in pictures)
        assert len({q.text for q in s.questions}) == len(s.questions)
        for q in s.questions:
            if q.task == "read":
                (number,) = [t for t in s.things if t.kind == "digit"]
                assert (q.answer, q.box) == (number.concept, number.box)
                assert 1 <= len(q.answer) <= 4
            elif q.task == "name":
                place = q.text.removeprefix("what is at the ").removesuffix("?")
                there = [t for t in pictures if S.place_of(t.box, size) == place] if "at the" in q.text else pictures
                assert [(t.concept, t.box) for t in there] == [(q.answer, q.box)]
            elif q.task == "find":
                (t,) = [t for t in pictures if q.text == f"where is the {t.concept}?"]
                x, y = ((int(v) + 0.5) / 100 for v in q.answer.split())
                assert t.box[0] <= x * size[1] <= t.box[2]
                assert t.box[1] <= y * size[0] <= t.box[3]
                assert q.box == t.box
                assert len(q.answer) == 5
            elif q.task == "count":
                assert q.answer == str(times[q.text.split()[2].rstrip("?")])
                assert q.box is None
            else:
                assert (q.answer == "yes") == (q.text.split()[-1].rstrip("?") in times)


def test_answers_are_balanced():
    """So that always giving the most common answer is a weak control."""
    answers: dict[str, Counter] = {}
    for s in ALL:
        for q in s.questions:
            answers.setdefault(q.task, Counter())[q.answer] += 1
    assert set(answers) == set(NANO.tasks)
    assert 0.4 < answers["yesno"]["yes"] / answers["yesno"].total() < 0.62
    assert answers["count"].most_common(1)[0][1] / answers["count"].total() < 0.4
    assert sum(answers["count"][k] for k in "234") / answers["count"].total() > 0.35
    assert answers["name"].most_common(1)[0][1] / answers["name"].total() < 0.06
    assert len(answers["name"]) == 64
    counts = [c.total() for c in answers.values()]
    assert min(counts) > 0.5 * max(counts)


def test_only_the_first_concepts_and_the_wanted_tasks():
    cfg = dataclasses.replace(NANO, concepts=8, tasks=("find", "yesno"))
    for i in range(40):
        s = S.record(ASSETS, cfg, "train", i)
        assert {q.task for q in s.questions} <= {"find", "yesno"}
        assert {t.concept for t in s.things} <= set(ASSETS.words[:8])
    cfg = dataclasses.replace(NANO, tasks=("read",))
    assert all(S.record(ASSETS, cfg, "train", i).questions[0].task == "read" for i in range(10))


def test_smallest_screens_can_be_composed():
    for i in range(60):
        assert S.record(ASSETS, tiny().data.screens, "train", i).questions


def test_place_and_point():
    assert S.place_of((0.0, 0.0, 10.0, 10.0), (90, 90)) == "top left"
    assert S.place_of((40.0, 40.0, 50.0, 50.0), (90, 90)) == "center"
    assert S.place_of((80.0, 80.0, 90.0, 90.0), (90, 90)) == "bottom right"
    assert S.place_of((50.0, 80.0, 60.0, 90.0), (90, 300)) == "bottom left"
    assert S.point_of((0.0, 0.0, 2.0, 2.0), (100, 200)) == "00 01"
    assert S.point_of((198.0, 98.0, 202.0, 102.0), (100, 200)) == "99 99"  # an edge stays on the grid


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("sing",)}, "tasks"),
        ({"tasks": ()}, "tasks"),
        ({"concepts": 65}, "concepts 65"),
        ({"concepts": 1}, "concepts 1"),
        ({"min_side": 4}, "sides"),
        ({"max_side": 32}, "sides"),
        ({"max_area": 100}, "sides"),
        ({"questions": 0}, "questions"),
    ],
)
def test_settings_that_cannot_be_met_are_named(change, message):
    with pytest.raises(S.ScreenError, match=message):
        S.compose(np.random.default_rng(0), ASSETS, dataclasses.replace(ScreensConfig(), **change), "train")
