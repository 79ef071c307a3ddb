"""A run as one page: `report.html`, self-contained, no script, no network, light and dark, readable on a phone.

Whatever a partial run has not measured yet is named as missing, never an error and never a blank.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hypervl_jax import charts, image
from hypervl_jax.config import BRANCHES
from hypervl_jax.plan import VisionPlan
from hypervl_jax.plan import make as make_plan

TASKS = {
    "name_known": "name, known artists",
    "name_unseen": "name, unseen artist",
    "find_known": "find, known artists",
    "find_unseen": "find, unseen artist",
    "read": "read a number",
    "count": "count",
    "yesno": "yes or no",
}
WAYS = {  # key of the summary -> what a column is called
    "accuracy": "JAX",
    "accuracy_vrc": "JAX + VRC",
    "accuracy_litert": "LiteRT",
    "accuracy_litert_vrc": "LiteRT + VRC",
}
CONTROLS = {"majority": "most common answer", "shuffled": "another screen's picture"}
MARGIN = 0.15  # a figure counts as learnt when it is this far above both controls
Summary = Mapping[str, Any]


class Answer(NamedTuple):
    """One question about a screen. `point` is the answer's (x, y), `box` the truth's, in pixels of the screen."""

    task: str
    question: str
    truth: str
    answer: str
    correct: bool
    point: tuple[float, float] | None = None
    box: tuple[float, float, float, float] | None = None


class Sample(NamedTuple):
    """A held-out screen u8[H W 3], its plan at the predicted area ratio, and what was asked."""

    image: np.ndarray
    plan: VisionPlan
    ratio: float
    questions: Sequence[Answer]


def write(path: Path, summary: Summary, curves: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> None:
    """Writes the page; `curves` are the rows of a run's log.jsonl. The old page stays until the new one is complete."""
    text = page(summary, curves, samples).encode("utf-8", "xmlcharrefreplace")
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text)
    os.replace(partial, path)


def page(summary: Summary, curves: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> str:
    """The whole page as HTML."""
    name = str(summary.get("name") or "run")
    body = [
        f"<header><p class=kicker>HyperVL</p><h1>{escape(name)}</h1><p class=verdict>{escape(verdict(summary))}</p></header>",
        _headline(summary),
        _section("Answers on held-out screens", _answers(summary)),
        _section("Screens it had never seen", _screens(samples)),
        _section("Learning", _learning(curves)),
        _section("Resolution it could do without", _vrc(summary)),
        _section("Exported files", _export(summary)),
        _section("Time and memory", _cost(summary)),
        _footer(summary),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(name)} · HyperVL</title><style>{_STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


# --- the accuracy table ----------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    mean: float
    n: int
    low: float
    high: float


def _cell(summary: Summary, way: str, branch: str, task: str) -> Cell | None:
    found = _get(summary, way, branch, task)
    if not isinstance(found, Mapping) or not _known(found.get("mean")):
        return None
    mean = float(found["mean"])
    low, high = (float(v) if _known(v := found.get(k)) else mean for k in ("low", "high"))
    return Cell(mean, int(found.get("n") or 0), low, high)


def _tasks(summary: Summary) -> list[str]:
    """Every task any part of the table knows, in the order of TASKS."""
    seen = {t for way in WAYS for b in BRANCHES for t in _get(summary, way, b) or {}}
    seen |= {t for control in CONTROLS for t in _get(summary, "controls", control) or {}}
    return [t for t in TASKS if t in seen] + sorted(str(t) for t in seen - set(TASKS))


def _columns(summary: Summary) -> list[tuple[str, str]]:
    """(branch, way) pairs with at least one figure."""
    tasks = _tasks(summary)
    return [(b, w) for b in BRANCHES for w in WAYS if any(_cell(summary, w, b, t) for t in tasks)]


def _short(summary: Summary) -> tuple[list[tuple[str, str]], int]:
    """The (branch, task) pairs less than MARGIN above a control, and how many pairs could be judged."""
    short, judged = [], 0
    for branch in BRANCHES:
        for task in _tasks(summary):
            cell = _cell(summary, "accuracy", branch, task)
            controls = [c for k in CONTROLS if _known(c := _get(summary, "controls", k, task))]
            if cell and controls:
                judged += 1
                if cell.mean - max(controls) < MARGIN:
                    short.append((branch, task))
    return short, judged


def _mean(summary: Summary, way: str, branch: str) -> float | None:
    cells = [c for t in _tasks(summary) if (c := _cell(summary, way, branch, t))]
    return sum(c.mean for c in cells) / len(cells) if cells else None


def verdict(summary: Summary) -> str:
    """The run in one sentence, from its own numbers."""
    means = {b: m for b in BRANCHES if (m := _mean(summary, "accuracy", b)) is not None}
    if not means:
        return "This run has not been evaluated yet."
    said = " and ".join(f"{b.capitalize()} answers {_percent(m)}" for b, m in means.items())
    parts = [f"{said} of held-out questions rightly"]
    short, judged = _short(summary)
    if short:
        parts[0] += f", but {len(short)} of {judged} figures are less than {MARGIN * 100:.0f} points above a control"
    elif judged:
        parts[0] += f", every figure at least {MARGIN * 100:.0f} points above both controls"
    saved, kept = _get(summary, "vrc", "tokens_saved"), _get(summary, "vrc", "retained")
    if _known(saved) and _known(kept):
        parts.append(f"VRC spares {_percent(saved)} of the visual tokens and keeps {_percent(kept)} of the accuracy")
    if _known(same := _get(summary, "export", "same_answers")):
        parts.append(f"the exported files give the same answer to {_percent(same)}")
    return "; ".join(parts) + "."


def terminal_table(summary: Summary) -> str:
    """The accuracy table in plain text, one block a branch: per cent with the 95 % interval, both controls beside."""
    blocks = []
    for branch in BRANCHES:
        ways = [w for b, w in _columns(summary) if b == branch]
        if not ways:
            continue
        head = [branch.capitalize(), "n", *CONTROLS, *(WAYS[w] for w in ways)]
        rows = [head]
        for task in _tasks(summary):
            cells = [_cell(summary, w, branch, task) for w in ways]
            n = max((c.n for c in cells if c), default=0)
            controls = [_percent(_get(summary, "controls", k, task)) for k in CONTROLS]
            figures = [f"{c.mean * 100:.1f} [{c.low * 100:.0f}, {c.high * 100:.0f}]" if c else "-" for c in cells]
            rows.append([_plain(task), str(n or "-"), *controls, *figures])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        blocks.append("\n".join(_aligned(row, widths) for row in rows))
    return "\n\n".join(blocks) or "no accuracy measured yet"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (v.rjust(w) if i else v.ljust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True)))
    return "  ".join([first, *rest])


def _plain(text: str) -> str:
    """One line, nothing a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


# --- sections --------------------------------------------------------------------------------------------------------


def _headline(summary: Summary) -> str:
    get = lambda *path: _get(summary, *path)  # noqa: E731
    tiles = [
        *((f"{b.capitalize()} accuracy", _percent(m)) for b in BRANCHES if (m := _mean(summary, "accuracy", b))),
        ("visual tokens saved", _percent(get("vrc", "tokens_saved"))),
        ("accuracy kept by VRC", _percent(get("vrc", "retained"))),
        ("exported = JAX", _percent(get("export", "same_answers"))),
        ("from nothing to here", _duration(get("seconds", "total"))),
        ("peak memory", f"{v:.1f} GB" if _known(v := get("peak_rss_gb")) else "–"),
    ]
    shown = [f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in tiles if v != "–"]
    return f"<div class=tiles>{''.join(shown)}</div>" if shown else ""


def _answers(summary: Summary) -> str:
    tasks, columns = _tasks(summary), _columns(summary)
    if not columns:
        return _missing("the accuracy table")
    groups = []
    for task in tasks:
        dots = [
            charts.Dot(c.mean, c.low, c.high, branch, way == "accuracy_vrc")
            for branch, way in columns
            if way in ("accuracy", "accuracy_vrc") and (c := _cell(summary, way, branch, task))
        ]
        groups.append((TASKS.get(task, task), dots, [_get(summary, "controls", k, task) for k in CONTROLS]))
    key = _key("base", "Base") + _key("large", "Large") + _key("hollow", "with VRC")
    key += _key("control0", CONTROLS["majority"]) + _key("control1", CONTROLS["shuffled"])
    figure = _figure(charts.intervals(groups), f"Accuracy with 95 % intervals. {key}")

    branches = [b for b in BRANCHES if any(c[0] == b for c in columns)]
    head = "".join(f"<th colspan={sum(c[0] == b for c in columns)} class={b}>{b.capitalize()}" for b in branches)
    sub = "".join(f"<th>{escape(t)}" for t in CONTROLS.values()) + "".join(f"<th>{WAYS[w]}" for _, w in columns)
    rows = []
    for task in tasks:
        cells = [_cell(summary, w, b, task) for b, w in columns]
        controls = "".join(f"<td class=muted>{_percent(_get(summary, 'controls', k, task))}" for k in CONTROLS)
        figures = "".join(
            f"<td>{c.mean * 100:.1f}<small>{c.low * 100:.1f}–{c.high * 100:.1f}</small>" if c else "<td class=muted>–"
            for c in cells
        )
        n = max((c.n for c in cells if c), default=0)
        rows.append(f"<tr><th>{escape(TASKS.get(task, task))}<small>{n:,} questions</small>{controls}{figures}")
    table = (
        f"<div class=scroll><table><thead><tr><th rowspan=2><th colspan=2>Controls{head}<tr>{sub}</thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><p class=note>Per cent right; small: Wilson 95 % interval.</p>"
    )
    return figure + table


def _screens(samples: Sequence[Sample]) -> str:
    if not samples:
        return _missing("sample screens")
    return f"<div class=cards>{''.join(map(_card, samples))}</div>"


def _card(sample: Sample) -> str:
    """The screen as it is, beside it as the model sees it: shrunk, cut into tiles, one token a cell."""
    plan, (h, w), (rh, rw) = sample.plan, sample.plan.size, sample.plan.resized
    answers = [Answer(*q) for q in sample.questions]
    top, left = plan.offset
    tile, cell = plan.policy.tile, plan.policy.cell
    seen = image.resize(sample.image, (rh, rw))

    def grid(step: int, kind: str) -> str:
        across = "".join(f"M{x} 0V{rh}" for x in range(step - left % step, rw, step))
        return f'<path d="{across}{"".join(f"M0 {y}H{rw}" for y in range(step - top % step, rh, step))}" class="{kind}"/>'

    marks = []
    for i, a in enumerate(answers):
        if a.box:
            x0, y0, x1, y1 = plan.pixels_to_canvas(a.box)
            box = f'x="{x0 - left:.2f}" y="{y0 - top:.2f}" width="{x1 - x0:.2f}" height="{y1 - y0:.2f}"'
            marks.append(f'<rect {box} class="halo"/><rect {box} class="box hue{i % 4}"/>')
        if a.point:
            x, y = plan.pixels_to_canvas(a.point)
            at = f'd="M{x - left:.2f} {y - top:.2f}h0"'
            marks.append(f'<path {at} class="point halo"/><path {at} class="point hue{i % 4}"/>')
    views = (
        f'<svg viewBox="0 0 {w} {h}" role="img" aria-label="the screen"><image href="{_data_uri(sample.image)}" '
        f'width="{w}" height="{h}"/></svg>'
        f'<svg viewBox="0 0 {rw} {rh}" role="img" aria-label="what the model sees" style="aspect-ratio:{w}/{h}" '
        f'preserveAspectRatio="none"><image href="{_data_uri(seen)}" width="{rw}" height="{rh}" '
        f'preserveAspectRatio="none"/>{grid(cell, "cells")}{grid(tile, "cuts")}{"".join(marks)}</svg>'
    )
    full = make_plan(plan.size, 1.0, plan.policy).tokens
    share = min(plan.tokens / max(full, 1), 1)
    asked = "".join(
        f'<li class="{"right" if a.correct else "wrong"}"><span class=q>{escape(a.question)}</span> '
        f'<span class=a>{f"<i class=hue{i % 4}></i>" if a.point or a.box else ""}{escape(a.answer) or "(nothing)"}'
        f"{'' if a.correct else f'<s> {escape(a.truth)}</s>'}</span>"
        for i, a in enumerate(answers)
    )
    return (
        f'<article><div class="views{" tall" if h > w else ""}">{views}</div><p class=size>{w} × {h} → {rw} × {rh} px '
        f"<span>ratio {sample.ratio:.2f}</span></p><div class=meter><i style=width:{share * 100:.1f}%></i></div>"
        f"<p class=size>{plan.tokens} of {full} visual tokens <span>{_tiles(plan)}</span></p><ul>{asked}</ul></article>"
    )


def _tiles(plan: VisionPlan) -> str:
    rows, cols = plan.grid
    return "1 tile" if plan.n_tiles == 1 else f"{rows} × {cols} tiles" + (" + thumbnail" if plan.thumb else "")


def _learning(curves: Sequence[Mapping[str, Any]]) -> str:
    rows = [row for _, row in sorted({r["step"]: r for r in curves if _known(r.get("step"))}.items())]  # resumed: last

    def chart(keys: Mapping[str, tuple[str, str]], caption: str) -> str:
        series = [
            charts.Series(label, [(r["step"], r[k]) for r in rows if k in r], colour)
            for k, (label, colour) in keys.items()
        ]
        drawn = charts.lines(series, "step", caption, smooth=True)
        present = [(c, l) for s, (l, c) in zip(series, keys.values(), strict=True) if s.points]
        return _figure(drawn, f"{escape(caption)} {''.join(_key(c, l) for c, l in present)}") if drawn else ""

    two = {b: (b.capitalize(), b) for b in BRANCHES}
    drawn = [
        chart({f"loss_{b}": v for b, v in two.items()}, "Next-token loss, nats."),
        chart({f"name_{b}": v for b, v in two.items()}, "Naming the picture, nats."),
        chart({"kl": ("KL", "grey")}, "KL(Large ‖ Base) on answer tokens."),
    ]
    return f"<div class=pair>{''.join(drawn)}</div>" if any(drawn) else _missing("the log of training")


def _vrc(summary: Summary) -> str:
    v = _get(summary, "vrc") or {}
    rows = [
        ("visual tokens", v.get("tokens_saved"), True),
        ("encoder FLOPs", v.get("flops_saved"), True),
        ("accuracy", v.get("retained"), False),
        ("worst task", v.get("retained_worst_task"), False),
    ]
    kept = [(k, 1 - x if saved else x, _percent(1 - x if saved else x)) for k, x, saved in rows if _known(x)]
    if not kept:
        return _missing("the figures of VRC")
    notes = [
        f"mean area ratio {v['mean_ratio']:.2f}" if _known(v.get("mean_ratio")) else "",
        f"rank correlation with the legible scale {v['rank_correlation']:.2f}" if _known(v.get("rank_correlation")) else "",
    ]
    text = "What is left, of 100 % without VRC. " + "; ".join(n for n in notes if n)
    return _figure(charts.bars(kept, top=1.0), escape(text.strip()))


def _export(summary: Summary) -> str:
    e = _get(summary, "export") or {}
    if not e:
        return _missing("the exported files")
    said = []
    if _known(e.get("same_answers")):
        of = f" of {e['n']:,} questions" if _known(e.get("n")) else ""
        said.append(f"The files alone, in LiteRT, give the same greedy answer as JAX to {_percent(e['same_answers'])}{of}.")
    if _known(e.get("max_relative_error")):
        said.append(f"Largest relative error at any seam: {e['max_relative_error']:.1e}.")
    sizes = e.get("bytes") or {}
    rows = [(str(k), float(v), f"{v / 1e6:.2f} MB") for k, v in sizes.items() if _known(v)]
    total = f" Together {sum(r[1] for r in rows) / 1e6:.1f} MB." if rows else ""
    ops = e.get("ops")
    if isinstance(ops, Mapping):
        ops = [f"{k} × {v}" for k, v in ops.items()]
    shown = f"<details><summary>{len(ops)} kinds of operation</summary><p class=ops>{escape(', '.join(map(str, ops)))}</p></details>" if isinstance(ops, list | tuple | set) and ops else ""  # fmt: skip
    figure = _figure(charts.bars(rows, colour="large"), f"Size of each file.{total}") if rows else ""
    return f"<p>{escape(' '.join(said))}</p>{figure}{shown}"


def _cost(summary: Summary) -> str:
    seconds = _get(summary, "seconds") or {}
    rows = [(str(k), float(v), _duration(v)) for k, v in seconds.items() if k != "total" and _known(v)]
    total = f" Together {_duration(seconds['total'])}." if _known(seconds.get("total")) else ""
    time = _figure(charts.bars(rows), f"Where the time went.{escape(total)}") if rows else _missing("the time of each part")

    points = [r for r in _get(summary, "memory") or [] if isinstance(r, Mapping) and _known(r.get("side"))]
    series = [
        charts.Series(label, [(r["side"], r[k]) for r in points if k in r], colour)
        for k, label, colour in (("whole_mb", "whole image", "large"), ("serial_mb", "serial tiles", "base"))
    ]
    drawn = charts.lines(series, "side of a square picture, pixels", "working memory, MB", log=True, dots=True)
    key = _key("large", "whole image") + _key("base", "serial tiles")
    caption = f"Working memory of the encoder, MB, log scale; by compiler analysis, weights apart. {key}"
    return f"<div class=pair>{time}{_figure(drawn, caption) if drawn else _missing('memory over image size')}</div>"


def _footer(summary: Summary) -> str:
    facts = {k: summary[k] for k in ("machine", "versions", "commit", "config_hash", "seeds", "command") if k in summary}
    rows = "".join(f"<dt>{escape(k)}<dd>{escape(v)}" for k, v in _flat(facts))
    return f"<footer>{f'<dl>{rows}</dl>' if rows else _missing('machine and versions')}</footer>"


# --- small parts -----------------------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _figure(chart: str, caption: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"


def _key(kind: str, label: str) -> str:
    return f"<span class=key><i class={kind}></i>{escape(label)}</span>"


def _missing(what: str) -> str:
    return f"<p class=missing>Not in this run: {escape(what)}.</p>"


def _get(values: Any, *path: str) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _percent(value: Any) -> str:
    return f"{value * 100:.1f} %" if _known(value) else "–"


def _duration(seconds: Any) -> str:
    if not _known(seconds):
        return "–"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (name, text); the innermost name says enough."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, str(key))
    elif isinstance(values, list | tuple):
        yield name, ", ".join(map(str, values))
    elif values is not None:
        yield name, str(values)


def _data_uri(pixels: np.ndarray) -> str:
    """u8[H W 3] as a data URI: small screens exactly, photographs as a JPEG of at most 800 pixels a side."""
    picture, out = Image.fromarray(pixels), io.BytesIO()
    kind = "png" if max(picture.size) <= 400 else "jpeg"
    picture.thumbnail((800, 800))
    picture.save(out, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


_STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#1c1e21;--muted:#6b7078;--rule:#e6e3dc;--track:#efece5;
--base:#2b6cb0;--large:#c8581e;--grey:#6b7078;--good:#23803f;--bad:#b4322e}
@media(prefers-color-scheme:dark){:root{--paper:#131519;--card:#1b1e24;--ink:#e9e7e2;--muted:#979ca6;--rule:#2b2f37;
--track:#262a32;--base:#6db0f5;--large:#f2935c;--grey:#979ca6;--good:#6cc788;--bad:#f0817b}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1060px;margin:0 auto;padding:48px 20px 40px}
h1{font-size:clamp(2rem,6vw,3rem);line-height:1.1;margin:.1em 0 .35em;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 16px;letter-spacing:-.01em}
.kicker{margin:0;color:var(--muted);font-size:.8rem;letter-spacing:.14em;text-transform:uppercase}
.verdict{font-size:clamp(1.05rem,2.4vw,1.25rem);line-height:1.5;max-width:46em;margin:0;color:var(--muted);text-wrap:pretty}
section{margin-top:52px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:12px;margin-top:32px}
.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 16px}
.tiles b{display:block;font-size:1.4rem;font-weight:620;letter-spacing:-.02em;white-space:nowrap}
.tiles span,.note,figcaption,.size,small{color:var(--muted);font-size:.82rem}
figure,.scroll,article{background:var(--card);border:1px solid var(--rule);border-radius:12px}
figure{margin:0 0 16px;padding:16px}
figcaption{margin-bottom:12px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:16px;align-items:start}
.pair figure{margin:0}
.chart{display:block;width:100%;max-width:640px;margin:0 auto;height:auto}
.chart text{font-size:12px;fill:var(--muted)}.chart .figure{fill:var(--ink);font-weight:600}
.base{--hue:var(--base)}.large{--hue:var(--large)}.grey{--hue:var(--grey)}
.rule{stroke:var(--rule)}.track{fill:var(--track)}.bar{fill:var(--hue)}
.line{fill:none;stroke:var(--hue);stroke-width:2;stroke-linejoin:round}.raw{stroke-width:1;opacity:.25}
.dot{fill:var(--hue)}.ring{fill:var(--card);stroke:var(--hue);stroke-width:2}.whisker{stroke:var(--hue);stroke-width:2;opacity:.55}
.control{stroke:var(--muted);stroke-width:2}.control1{stroke-dasharray:2 2}
.key{display:inline-block;margin-left:12px;white-space:nowrap;color:var(--ink)}
.key i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px;background:var(--hue)}
.key .hollow{background:none;border:2px solid var(--muted)}
.key .control0,.key .control1{background:none;width:0;height:12px;border-radius:0;border-left:2px solid var(--muted);
vertical-align:-2px}.key .control1{border-left-style:dotted}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem;white-space:nowrap}
th,td{padding:9px 12px;text-align:right;font-weight:400}
td{border-top:1px solid var(--rule)}
td small,tbody th small{display:block;font-size:.72rem;line-height:1.3}
tbody th{text-align:left;border-top:1px solid var(--rule);position:sticky;left:0;background:var(--card)}
thead th{color:var(--muted);font-size:.8rem;vertical-align:bottom;white-space:normal}
thead tr:first-child th{text-align:right;font-weight:620;color:var(--hue,var(--muted))}
.muted{color:var(--muted)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr));gap:16px}
article{padding:14px;overflow:hidden}
.views{display:grid;gap:8px}.views.tall{grid-template-columns:1fr 1fr}
.views svg{display:block;width:100%;max-height:280px;border-radius:6px;background:var(--track)}
.views image{image-rendering:pixelated}
.cells,.cuts,.box,.halo,.point{fill:none;vector-effect:non-scaling-stroke}
.cells{stroke:#fff;stroke-opacity:.28}.cuts{stroke:#fff;stroke-width:2.5}
.box{stroke:var(--mark);stroke-width:2}.halo{stroke:#000;stroke-width:4;stroke-opacity:.45}
.point{stroke:var(--mark);stroke-width:10;stroke-linecap:round}.point.halo{stroke-width:14;stroke:#000}
.hue0{--mark:#ffd166}.hue1{--mark:#7ae0ff}.hue2{--mark:#ff8fd0}.hue3{--mark:#9bf28f}
.size{display:flex;justify-content:space-between;gap:8px;margin:8px 0 0}
.meter{height:6px;border-radius:3px;background:var(--track);margin-top:8px;overflow:hidden}
.meter i{display:block;height:100%;background:var(--base);border-radius:3px}
ul{list-style:none;margin:12px 0 0;padding:0}
li{padding:7px 0;border-top:1px solid var(--rule);font-size:.88rem;line-height:1.4;overflow-wrap:anywhere}
.q{display:block;color:var(--muted)}.a{font-weight:600}
.a::before{content:"✓ ";color:var(--good)}.wrong .a::before{content:"✗ ";color:var(--bad)}
.a i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px;background:var(--mark);border:1px solid #0006}
.a s{text-decoration:none;font-weight:400;color:var(--muted)}.a s::before{content:"truth: "}
.missing{color:var(--muted);font-style:italic;margin:0}
details{font-size:.88rem}.ops{color:var(--muted);overflow-wrap:anywhere}
footer{margin-top:56px;padding-top:20px;border-top:1px solid var(--rule);font-size:.8rem;color:var(--muted)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 16px;margin:0}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:480px){main{padding:28px 14px}section{margin-top:40px}.tiles{grid-template-columns:1fr 1fr}figure{padding:12px}
.key{margin:0 12px 0 0}th,td{padding:8px 9px}}
@media print{body{background:#fff}figure,article{break-inside:avoid}}
"""
