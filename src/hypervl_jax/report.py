"""A run as one page: `report.html`, self-contained, no script, no network, light and dark, readable on a phone.

Whatever a partial run has not measured yet is named as missing, never an error and never a blank.
"""

from __future__ import annotations

import base64
import io
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
from hypervl_jax.summary import (
    CONTROLS,
    TASKS,
    WAYS,
    Summary,
    cell_of,
    columns_of,
    get,
    known,
    mean_accuracy,
    percent,
    points,
    tasks_of,
    terminal_table,
    verdict,
)

__all__ = ["Answer", "Sample", "page", "terminal_table", "write"]

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser holds the page to its promise


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
    put(path, page(summary, curves, samples))


def put(path: Path, text: str) -> None:
    """Writes a page; the old one stays until the new one is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text.encode("utf-8", "xmlcharrefreplace"))
    os.replace(partial, path)


def page(summary: Summary, curves: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> str:
    """The whole page as HTML."""
    name = str(summary.get("name") or "run")
    body = [
        f"<header><p class=kicker>HyperVL</p><h1>{escape(name)}</h1>",
        f"<p class=verdict>{escape(verdict(summary))}</p></header>",
        _headline(summary),
        section("Answers on held-out screens", _answers(summary)),
        section("Screens it had never seen", _screens(samples)),
        section("Learning", _learning(curves)),
        "<div class=pair>",
        section("Resolution it could do without", _vrc(summary)),
        section("Exported files", _export(summary)),
        "</div>",
        section("Time and memory", _cost(summary)),
        _footer(summary),
    ]
    return document(name, "".join(body))


def document(name: str, body: str) -> str:
    """A self-contained page around `body` (HTML), in the house's look."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(name)} · HyperVL</title><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


# --- sections --------------------------------------------------------------------------------------------------------


def _headline(summary: Summary) -> str:
    tiles = [
        *(
            (f"{b.capitalize()} accuracy", percent(m))
            for b in BRANCHES
            if (m := mean_accuracy(summary, "accuracy", b)) is not None
        ),
        ("visual tokens saved", percent(get(summary, "vrc", "tokens_saved"))),
        ("accuracy kept by VRC", percent(get(summary, "vrc", "retained"))),
        ("exported = JAX", percent(get(summary, "export", "same_answers"))),
        ("from nothing to here", _duration(get(summary, "seconds", "total"))),
    ]
    shown = [f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in tiles if v != "–"]
    return f"<div class=tiles>{''.join(shown)}</div>" if shown else ""


def _answers(summary: Summary) -> str:
    tasks, columns = tasks_of(summary), columns_of(summary)
    if not columns:
        return _missing("the accuracy table")
    groups = []
    for task in tasks:
        dots = [
            charts.Dot(c.mean, c.low, c.high, branch, way == "accuracy_vrc")
            for branch, way in columns
            if way in ("accuracy", "accuracy_vrc") and (c := cell_of(summary, way, branch, task))
        ]
        groups.append((TASKS.get(task, task), dots, [get(summary, "controls", k, task) for k in CONTROLS]))
    keys = {"base": "Base", "large": "Large", "hollow": "with VRC", "control0": "majority", "control1": "shuffled"}
    drawn = figure(charts.intervals(groups), "Accuracy with 95 % intervals", keys, "beside")

    branches = [b for b in BRANCHES if any(c[0] == b for c in columns)]
    head = "".join(
        f"<th colspan={sum(c[0] == b for c in columns)} class='first {b}'>{b.capitalize()}" for b in branches
    )
    first = {next(i for i, c in enumerate(columns) if c[0] == b) for b in branches}  # a rule to the left of each branch
    kind = ["first" if i in first else "" for i in range(len(columns))]
    sub = "".join(f"<th>{k}" for k in CONTROLS)
    sub += "".join(f"<th class='{k}'>{WAYS[w]}" for k, (_, w) in zip(kind, columns, strict=True))
    rows = []
    for task in tasks:
        cells = [cell_of(summary, w, b, task) for b, w in columns]
        n = max((c.n for c in cells if c), default=0)
        controls = "".join(f"<td class=muted>{points(get(summary, 'controls', k, task))}" for k in CONTROLS)
        figures = "".join(
            f"<td class='{k}'>{points(c.mean)}<small>{points(c.low)}–{points(c.high)}{_of(c.n, n)}</small>"
            if c
            else f"<td class='{k}'>-"
            for k, c in zip(kind, cells, strict=True)
        )
        rows.append(f"<tr><th>{escape(TASKS.get(task, task))}<small>{n:,} questions</small>{controls}{figures}")
    table = (
        f"<div class=scroll><table><thead><tr><th rowspan=2><th colspan=2>Controls{head}<tr>{sub}</thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><p class=note>Per cent correct, and its Wilson 95 % interval. "
        f"Controls: {escape('; '.join(f'{k}, {v}' for k, v in CONTROLS.items()))}.</p>"
    )
    return drawn + table


def _screens(samples: Sequence[Sample]) -> str:
    if not samples:
        return _missing("sample screens")
    note = (
        "First the screen, then what the model sees of it: shrunk to the ratio that VRC predicts, cut into tiles "
        "(thick lines), one token a cell (thin lines). An outline is where the thing is, a dot where the model points."
    )
    return f"<p class=note>{note}</p><div class=cards>{''.join(map(_card, samples))}</div>"


def _card(sample: Sample) -> str:
    """The screen as it is, beside it as the model sees it: shrunk, cut into tiles, one token a cell."""
    plan, (h, w), (rh, rw) = sample.plan, sample.plan.size, sample.plan.resized
    answers = [Answer(*q) for q in sample.questions]
    top, left = plan.offset
    tile, cell = plan.policy.tile, plan.policy.cell
    seen = image.resize(sample.image, (rh, rw))

    def grid(step: int, kind: str) -> str:
        across = "".join(f"M{x} 0V{rh}" for x in range(step - left % step, rw, step))
        path = across + "".join(f"M0 {y}H{rw}" for y in range(step - top % step, rh, step))
        return f'<path d="{path}" class="{kind} under"/><path d="{path}" class="{kind}"/>' if path else ""

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
        f"<span class=a>{f'<i class=hue{i % 4}></i>' if a.point or a.box else ''}{escape(a.answer) or '(nothing)'}"
        f"{'' if a.correct else f'<s>{escape(a.truth)}</s>'}</span>"
        for i, a in enumerate(answers)
    )
    return (
        f'<article><div class="views{" tall" if h > 0.8 * w else ""}">{views}</div>'
        f"<p class=size>{w} × {h} → {rw} × {rh} px <span>ratio {sample.ratio:.2f}</span></p>"
        f"<div class=meter><i style=width:{share * 100:.1f}%></i></div>"
        f"<p class=size>{plan.tokens} of {full} tokens <span>{_tiles(plan)}</span></p><ul>{asked}</ul></article>"
    )


def _of(n: int, of: int) -> str:
    """How many questions, where that is not what the row says."""
    return "" if n == of else f" of {n:,}"


def _tiles(plan: VisionPlan) -> str:
    rows, cols = plan.grid
    return "1 tile" if plan.n_tiles == 1 else f"{rows} × {cols} tiles" + (" + thumbnail" if plan.thumb else "")


def _learning(curves: Sequence[Mapping[str, Any]]) -> str:
    rows = [row for _, row in sorted({r["step"]: r for r in curves if known(r.get("step"))}.items())]  # resumed: last

    def chart(keys: Mapping[str, tuple[str, str]], caption: str) -> str:
        series = [
            charts.Series(label, [(r["step"], r[k]) for r in rows if known(r.get(k))], colour)
            for k, (label, colour) in keys.items()
        ]
        drawn = charts.lines(series, "step", caption, smooth=True, width=340)
        return figure(drawn, caption, {c: l for s, (l, c) in zip(series, keys.values(), strict=True) if s.points})

    two = {b: (b.capitalize(), b) for b in BRANCHES}
    drawn = [
        chart({f"loss_{b}": v for b, v in two.items()}, "Next-token loss, nats"),
        chart({f"name_{b}": v for b, v in two.items()}, "Naming the picture, nats"),
        chart({"kl": ("KL", "grey")}, "KL(Large ‖ Base) on answer tokens, nats"),
    ]
    return f"<div class=three>{''.join(drawn)}</div>" if any(drawn) else _missing("the log of training")


def _vrc(summary: Summary) -> str:
    v = get(summary, "vrc") or {}
    kept = [
        ("visual tokens", 1 - x if known(x := v.get("tokens_saved")) else None),
        ("encoder FLOPs", 1 - x if known(x := v.get("flops_saved")) else None),
        ("accuracy", v.get("retained")),
        ("worst task", v.get("retained_worst_task")),
    ]
    drawn = charts.bars([(label, x, percent(x)) for label, x in kept if known(x)], top=1.0)
    caption = "What is left, of 100 % without VRC."
    if known(x := v.get("mean_ratio")):
        caption += f" Mean area ratio {x:.2f}."
    if known(x := v.get("rank_correlation")):
        caption += f" Rank correlation with the legible scale {x:.2f}."
    return figure(drawn, caption) or _missing("the figures of VRC")


def _export(summary: Summary) -> str:
    e = get(summary, "export") or {}
    if not e:
        return _missing("the exported files")
    said = ""
    if known(same := e.get("same_answers")):
        of = f" of {n:,} questions" if known(n := e.get("n")) else ""
        said += f"The files alone, in LiteRT, answer {percent(same)}{of} as JAX does. "
    if known(error := e.get("max_relative_error")):
        said += f"Largest relative error at any seam {error:.1e}. "
    rows = [(str(k), float(v), f"{v / 1e6:.2f} MB") for k, v in (e.get("bytes") or {}).items() if known(v)]
    if rows:
        said += f"Size of each file, together {sum(size for _, size, _ in rows) / 1e6:.1f} MB."
    ops = e.get("ops") or []
    names = [f"{k} × {v}" for k, v in ops.items()] if isinstance(ops, Mapping) else [str(op) for op in ops]
    listed = f"<details><summary>{len(names)} kinds of operation</summary><p>{escape(', '.join(names))}</p></details>"
    chart = charts.bars(rows, colour="large")
    return (figure(chart, said) or f"<p>{escape(said)}</p>") + (listed if names else "")


def _cost(summary: Summary) -> str:
    seconds = get(summary, "seconds") or {}
    rows = [(str(k), float(v), _duration(v)) for k, v in seconds.items() if k != "total" and known(v)]
    caption = "Where the time went."
    if known(total := seconds.get("total")):
        caption += f" Together {_duration(total)}."
    if known(peak := summary.get("peak_rss_gb")):
        caption += f" Peak resident memory {peak:.1f} GB."
    time = figure(charts.bars(rows), caption) or _missing("the time of each part")

    sizes = [r for r in get(summary, "memory") or [] if isinstance(r, Mapping) and known(r.get("side"))]
    series = [
        charts.Series(label, [(r["side"], r[k]) for r in sizes if known(r.get(k))], colour)
        for k, label, colour in (("whole_mb", "whole image", "large"), ("serial_mb", "serial tiles", "base"))
    ]
    drawn = charts.lines(series, "side of a square picture, pixels", "working memory, MB", log=True, dots=True)
    caption = "Working memory of the encoder, MB: by compiler analysis, weights apart"
    memory = figure(drawn, caption, {s.colour: s.label for s in series}) or _missing("memory over image size")
    return f"<div class=pair>{time}{memory}</div>"


def _footer(summary: Summary) -> str:
    facts = {
        k: summary[k] for k in ("machine", "versions", "commit", "config_hash", "seeds", "command") if k in summary
    }
    rows = "".join(f"<dt>{escape(k)}<dd>{escape(v)}" for k, v in _flat(facts))
    return f"<footer>{f'<dl>{rows}</dl>' if rows else _missing('machine and versions')}</footer>"


# --- small parts -----------------------------------------------------------------------------------------------------


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def figure(chart: str, caption: str, keys: Mapping[str, str] | None = None, kind: str = "") -> str:
    """A chart under its caption and its key (class -> label); nothing for an empty chart."""
    if not chart:
        return ""
    shown = "".join(f"<span><i class={k}></i>{escape(label)}</span>" for k, label in (keys or {}).items())
    key = f"<div class=key>{shown}</div>" if shown else ""
    return f'<figure class="{kind}"><figcaption>{escape(caption)}{key}</figcaption>{chart}</figure>'


def _missing(what: str) -> str:
    return f"<p class=missing>Not in this run: {escape(what)}.</p>"


def _duration(seconds: Any) -> str:
    if not known(seconds):
        return "–"
    return f"{seconds:.1f}\N{NO-BREAK SPACE}s" if seconds < 100 else f"{seconds / 60:.1f}\N{NO-BREAK SPACE}min"


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
