"""The report: complete, partial and hostile input; what it says is what the summary says."""

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervl_jax import charts, plan, report
from hypervl_jax.config import PlanPolicy
from hypervl_jax.data import screens
from hypervl_jax.data.assets import Assets
from hypervl_jax.presets import preset

FIGURE = {"mean": 0.875, "n": 400, "low": 0.839, "high": 0.904}
POLICY = PlanPolicy(tile=32, patch=8, max_tiles=9, min_side=16)


def full_summary() -> dict:
    accuracy = {b: {"name_known": FIGURE, "read": FIGURE | {"mean": 0.5}} for b in ("base", "large")}
    return {
        "name": "quickstart",
        "accuracy": accuracy,
        "accuracy_vrc": accuracy,
        "accuracy_litert": accuracy,
        "accuracy_litert_vrc": accuracy,
        "controls": {"majority": {"name_known": 0.07, "read": 0.04}, "shuffled": {"name_known": 0.081, "read": 0.05}},
        "vrc": {
            "tokens_saved": 0.25, "flops_saved": 0.31, "retained": 0.989, "retained_worst_task": 0.97,
            "rank_correlation": 0.75, "mean_ratio": 0.6,
        },
        "export": {
            "same_answers": 0.9951, "n": 800, "ops": ["ADD", "MUL"], "bytes": {"vrc": 1e6}, "max_relative_error": 3e-6
        },
        "seconds": {"train": 300.0, "export": 31.5, "total": 331.5},
        "peak_rss_gb": 2.75,
        "memory": [{"side": s, "tiles": s * s // 1024, "whole_mb": s**3 / 1e4, "serial_mb": 0.5} for s in (64, 192)],
        "machine": {"kind": "cpu", "cores": 2},
        "versions": {"jax": "0.10.2"},
        "commit": "0123456789ab",
        "config_hash": "feedbeef0123",
    }  # fmt: skip


def curves() -> list[dict]:
    rows = [
        {"step": i, "time": i / 10, f"loss_{'base' if i % 20 else 'large'}": 2 / (1 + i)} for i in range(0, 400, 10)
    ]
    return [*rows, {"step": 390, "time": 40.0, "loss_base": 0.2, "kl": 0.1, "name_base": 1.5}]


def sample(text: str = "banana", ratio: float = 0.5) -> report.Sample:
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    asked = [
        report.Answer("find", f"where is the {text}?", text, text, True, (45.0, 30.0), (40.0, 20.0, 60.0, 40.0)),
        report.Answer("name", text, text, "apple", False),
    ]
    return report.Sample(image, plan.make((60, 90), ratio, POLICY), ratio, asked)


class Page(HTMLParser):
    """What a browser would see: tags with attribute names, and the text outside of style."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.open = tag

    def handle_endtag(self, tag):
        self.open = ""

    def handle_data(self, data):
        self.text += "" if self.open == "style" else " " + data


def words(html: str) -> str:
    return " ".join(Page(html).text.split())


# --- the page --------------------------------------------------------------------------------------------------------


def test_a_full_run_is_complete_and_self_contained(tmp_path):
    path = tmp_path / "report.html"
    report.write(path, full_summary(), curves(), [sample()])
    html = path.read_text(encoding="utf-8")
    assert "Not in this run" not in html
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert "://" not in html
    assert "<script" not in html
    assert all(uri.startswith("data:image/") for uri in re.findall(r'(?:href|src)="([^"]*)', html))
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    said = words(html)
    for figure in ("87.5", "83.9–90.4", "7.0", "8.1", "75.0 %", "69.0 %", "98.9 %", "5.0 min", "31.5 s", "2.8 GB"):
        assert figure in said, figure
    for fact in ("0123456789ab", "feedbeef0123", "0.10.2", "3.0e-06", "400 questions", "ADD, MUL"):
        assert fact in said, fact


@pytest.mark.parametrize("missing", [*full_summary(), None])
def test_a_partial_run_says_what_is_missing(missing):
    summary = {k: v for k, v in full_summary().items() if k != missing} if missing else {}
    html = report.page(summary, curves() if missing else [], [sample()] if missing else [])
    assert html.count("Not in this run") == {
        "accuracy": 0, "vrc": 1, "export": 1, "seconds": 1, "memory": 1, None: 8
    }.get(missing, 0)  # fmt: skip
    assert report.terminal_table(summary)
    if missing in ("accuracy", None):
        assert "has not been evaluated yet" in words(html)


def test_numbers_that_are_not_numbers_are_left_out():
    summary = full_summary() | {"peak_rss_gb": math.nan, "seconds": {"train": None, "total": math.inf}}
    summary["accuracy"] = {"base": {"read": {"mean": math.nan, "n": 0, "low": None, "high": None}}, "large": None}
    rows = [{"step": 1, "loss_base": math.nan}, {"step": 2, "loss_base": None}, {"step": 3, "loss_base": 1.0}]
    html = report.page(summary, rows, [])
    assert not re.search(r"\b(nan|inf|None)\b", words(html) + "".join(re.findall(r'(?:d|[xyr]|c[xy])="[^"]*"', html)))


def test_a_resumed_log_is_drawn_once_with_its_later_rows():
    rows = [{"step": 10, "loss_base": 9.0}, {"step": 20, "loss_base": 9.0}, {"step": 10, "loss_base": 1.0}]
    assert report.page({}, rows, []) == report.page({}, [rows[2], rows[1]], [])


def test_a_failed_write_keeps_the_old_page(tmp_path):
    path = tmp_path / "report.html"
    report.write(path, full_summary(), [], [])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        report.write(path, full_summary() | {"export": {"ops": 3}}, [], [])
    assert path.read_bytes() == before


# --- the sentence and the table --------------------------------------------------------------------------------------


def test_the_verdict_admits_what_falls_short():
    summary = full_summary()
    assert "every figure at least 15 points above both controls" in report.verdict(summary)
    summary["controls"]["shuffled"]["read"] = 0.36
    assert "but 2 of 4 figures are less than 15 points above a control" in report.verdict(summary)
    del summary["controls"]["majority"]  # one control alone proves nothing
    assert "control" not in report.verdict(summary)


def test_the_terminal_table_is_aligned_and_holds_every_figure():
    blocks = report.terminal_table(full_summary()).split("\n\n")
    assert [b.split()[0] for b in blocks] == ["Base", "Large"]
    for block in blocks:
        head, *rows = block.splitlines()
        assert len({len(line) for line in (head, *rows)}) == 1
        assert [r[:19].strip() for r in rows] == ["name, known artists", "read a number"]
        assert rows[0].split()[3:9] == ["400", "7.0", "8.1", "87.5", "[84,", "90]"]
        assert rows[0].count("87.5") == 4


def test_the_terminal_table_shows_only_what_was_measured():
    table = report.terminal_table({"accuracy": {"large": {"read": {"mean": 0.25}, "new_task": FIGURE}}})
    assert "Base" not in table
    assert "LiteRT" not in table
    assert table.splitlines()[1].split() == ["read", "a", "number", "-", "-", "-", "25.0", "[25,", "25]"]
    assert table.splitlines()[2].split()[0] == "new_task"


# --- screens ---------------------------------------------------------------------------------------------------------


def test_marks_and_cuts_lie_where_the_plan_puts_them():
    """90 x 60 at ratio 1 in tiles of 32: cuts at 32 and 64 across, 32 down; at ratio 1 marks keep their pixels."""
    html = report.page({}, [], [sample(ratio=1.0)])
    assert 'd="M32 0V60M64 0V60M0 32H90" class="cuts"' in html
    assert '<rect x="40.00" y="20.00" width="20.00" height="20.00" class="box hue0"/>' in html
    assert 'd="M45.00 30.00h0" class="point hue0"' in html


def test_a_shrunk_screen_shows_both_sizes_and_the_tokens_saved():
    shown = sample(ratio=0.25)
    html = report.page({}, [], [shown])
    assert "90 × 60 → 45 × 30 px" in words(html)
    full = plan.make((60, 90), 1.0, POLICY).tokens
    assert f"{shown.plan.tokens} of {full} tokens" in words(html)
    assert 'd="M22.50 15.00h0" class="point hue0"' in html


@pytest.mark.parametrize("mode", ["native_pad", "grid_match", "grid_pad"])
def test_real_screens_in_every_tiling_mode(mode):
    config = preset("nano")
    policy = PlanPolicy(tile=64, patch=8, max_tiles=6, min_side=16, mode=mode)
    screen = screens.record(Assets.load(), config.data.screens, "test_unseen", 3)
    p = plan.make(screen.image.shape[:2], 0.7, policy)
    asked = [(q.task, q.text, q.answer, q.answer, True, None, q.box) for q in screen.questions]  # plain tuples do too
    html = report.page({}, [], [report.Sample(screen.image, p, 0.7, asked)])
    assert html.count("<image ") == 2
    for x, w in re.findall(r'<rect x="([-\d.]+)" y="[-\d.]+" width="([-\d.]+)"[^>]*class="box', html):
        assert float(x) >= -0.01
        assert float(x) + float(w) <= p.resized[1] + 0.01


def test_a_photograph_is_made_small():
    image = np.zeros((1200, 2400, 3), np.uint8)
    html = report.page({}, [], [report.Sample(image, plan.make((1200, 2400), 1.0), 1.0, [])])
    assert "data:image/jpeg" in html
    assert len(html) < 100_000


# --- hostile text ----------------------------------------------------------------------------------------------------

TEXT = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["<script>x</script>", '"><img src=x onerror=y>', "</style><b>", "' onload='x", "&lt;", "\ud800"]),
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXT)
def test_no_text_can_become_markup(text):
    def hostile(t: str) -> str:
        s = full_summary()
        s |= {"name": t, "machine": {t: t}, "commit": t, "versions": {"a": [t]}}
        s["accuracy"]["base"]["z" + t] = FIGURE
        s["seconds"]["s" + t] = 1.0
        s["export"] |= {"bytes": {"b" + t: 1}, "ops": [t, "ADD"]}
        return report.page(s, curves(), [sample(t)])

    html = hostile(text).encode("utf-8", "xmlcharrefreplace").decode()
    assert Page(html).tags == Page(hostile("harmless")).tags
    if text.isalnum() and text.isascii():
        assert f"where is the {text}?" in words(html)


@settings(max_examples=20, deadline=None)
@given(TEXT)
def test_the_terminal_table_keeps_control_characters_out(text):
    table = report.terminal_table({"accuracy": {"base": {"t" + text: FIGURE}}})
    assert len(table.split("\n")) == 2
    assert all(c.isprintable() or c in "\n\u00a0" for c in table)


# --- charts ----------------------------------------------------------------------------------------------------------

NUMBER = st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NUMBER, NUMBER), max_size=12), st.booleans(), st.booleans())
def test_lines_of_any_numbers_stay_inside_the_picture(points, log, smooth):
    svg = charts.lines([charts.Series("a", points)], "x", "y", log=log, smooth=smooth, dots=True)
    places = re.findall(r'cx="([^"]+)" cy="([^"]+)"', svg)
    usable = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]
    assert len(places) == len(usable)
    for x, y in places:
        assert 0 <= float(x) <= charts.WIDTH
        assert 0 <= float(y) <= 250


def test_higher_is_higher_and_equal_steps_of_ten_are_equal_on_a_log_chart():
    svg = charts.lines([charts.Series("a", [(0, 1), (1, 10), (2, 100)])], "x", "y", log=True, dots=True)
    a, b, c = (float(y) for y in re.findall(r'cy="([^"]+)"', svg))
    assert a > b > c
    assert a - b == pytest.approx(b - c, abs=0.11)


def test_bars_are_in_proportion_and_never_leave_their_track():
    svg = charts.bars([("a", 1.0, "1"), ("b", 2.0, "2"), ("c", 9.0, "9"), ("d", math.nan, "?")], top=4.0)
    a, b, c = (float(w) for w in re.findall(r'width="([\d.]+)"[^>]*class="bar', svg))
    assert b == pytest.approx(2 * a, abs=0.1)
    assert c == pytest.approx(4 * a, abs=0.2)


def test_each_control_keeps_its_stroke_when_the_other_is_missing():
    svg = charts.intervals([("read", [charts.Dot(0.5, 0.4, 0.6)], [None, 0.25])])
    assert "control1" in svg
    assert "control0" not in svg


def test_empty_charts_are_nothing():
    assert charts.lines([charts.Series("a", [])], "x", "y") == ""
    assert charts.bars([]) == ""


def test_a_page_of_charts_stands_alone():
    """Well-formed, every panel inside the picture, every colour of the key defined."""
    drawn = charts.lines(
        [charts.Series("a", [(0, 1), (1, 3)], "one"), charts.Series("b", [(0, 2)], "two run")], "x", "y"
    )
    page = charts.page([("first & last", drawn)] * 3, {"one": "a < b", "two": "b"})
    root = ElementTree.fromstring(page)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    panels = root.findall("{*}svg")
    assert len(panels) == 3
    for p in panels:
        x, y, w, h = (float(p.attrib[k]) for k in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    assert all(f".{name}.line{{stroke:#" in page for name in ("one", "two"))
    with pytest.raises(ValueError, match="6 colours"):
        charts.page([("x", drawn)], {str(i): "" for i in range(6)})
