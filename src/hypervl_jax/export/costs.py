"""What `bench.run` found, as a table for a terminal and as one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hypervl_jax import charts, report
from hypervl_jax.export.bench import STAGES

Found = Sequence[Mapping[str, Any]]
PROXY = "proxy for power: operations and bytes moved"
NO_COUNTER = "no energy counter on this host"


def table(found: Found) -> list[str]:
    """Lines: every way of answering with its stages in ms, then every entry point with its work."""
    counts = ("tiles", "prompt", "answer")  # answers of another length are decoded in another time
    head = ("folder", "way", *counts, *(f"{s} ms" for s in STAGES), "all ms", "peak MB", "joules")
    rows = [head] + [
        (
            f["folder"],
            _way(w),
            *(str(w[c]) for c in counts),
            *(f"{1e3 * w['seconds'][s]:.1f}" for s in STAGES),
            f"{1e3 * _answer(w):.1f}",
            f"{w['peak_bytes'] / 1e6:.0f}",
            "-" if w["joules"] is None else f"{w['joules']:.2f}",
        )
        for f in found
        for w in f["ways"]
    ]
    second = [("folder", "part and signature", "load ms", "run ms", "MFLOP", "MB moved", "MB of weights")]
    for f in found:
        for name, e in f["entries"].items():
            work = (f"{e['flops'] / 1e6:.2f}", f"{e['bytes'] / 1e6:.2f}", f"{e['weights'] / 1e6:.2f}")
            times = (f"{1e3 * e['init_seconds']:.1f}", f"{1e3 * e['seconds']:.2f}")
            second.append((f["folder"], name, *times, *work))
    told = any(w["joules"] is not None for f in found for w in f["ways"])
    notes = [
        "prompt and answer in tokens; project is part of encode's file: its share of operations",
        PROXY + ("" if told else f"; {NO_COUNTER}"),
    ]
    return [*_aligned(rows), "", *_aligned(second), "", *notes]


def write(out: Path, found: Found, warnings: Sequence[str], phone: Mapping[str, Any]) -> list[Path]:
    """Write OUT/bench.json, all of it, and OUT/bench.html, the page; returns both names."""
    out.mkdir(parents=True, exist_ok=True)
    result = {"folders": found, "warnings": warnings, "phone": phone}
    texts = {"bench.json": json.dumps(result, indent=1, allow_nan=False) + "\n", "bench.html": page(found)}
    for name, text in texts.items():
        report.put(out / name, text)
    return [out / name for name in texts]


def page(found: Found) -> str:
    """The same as HTML: ways beside each other, recipes beside each other, tiles beside the whole picture."""
    several = len(found) > 1

    def label(f: Mapping[str, Any], w: Mapping[str, Any]) -> str:
        return f"{f['folder']} {_way(w)}" if several else _way(w)

    ways = [(f, w) for f in found for w in f["ways"]]
    answers = [(label(f, w), _answer(w), f"{1e3 * _answer(w):.1f} ms") for f, w in ways]
    memory = [(label(f, w), w["peak_bytes"], f"{w['peak_bytes'] / 1e6:.0f} MB") for f, w in ways]
    sizes = [(f["folder"], sum(f["bytes"].values()), f"{sum(f['bytes'].values()) / 1e6:.1f} MB") for f in found]
    shown = [
        report.figure(charts.bars(answers), "One answer without loading, by way; median"),
        report.figure(charts.bars(memory), "Peak memory of a process that answers"),
        report.figure(charts.bars(sizes), "All files of a folder, by recipe"),
    ]
    stages = [
        report.figure(
            charts.bars([(s, w["seconds"][s], f"{1e3 * w['seconds'][s]:.1f} ms") for s in STAGES]), label(f, w)
        )
        for f, w in ways
    ]
    works = []
    for f in found:
        for key, unit in (("flops", "MFLOP"), ("bytes", "MB moved")):
            rows = [(name, e[key], f"{e[key] / 1e6:.1f}") for name, e in f["entries"].items()]
            works.append(report.figure(charts.bars(rows, colour="large"), f"{f['folder']}: {unit} a run, {PROXY}"))
    curves = []
    for branch, rows in found[0]["computed"].items():
        for key, what in (("flops", "FLOPs"), ("scores", "bytes of one layer's attention scores")):
            series = [
                charts.Series(kind, [(r["side"], r[f"{kind}_{key}"]) for r in rows], colour)
                for kind, colour in (("tiled", "base"), ("whole", "large"))
            ]
            drawn = charts.lines(series, "side of a square picture, pixels", what, log=True, dots=True)
            keys = {"base": "in tiles", "large": "whole"}
            curves.append(report.figure(drawn, f"{branch}: {what}; computed, not measured", keys))
    facts = "".join(f"<dt>{escape(str(k))}<dd>{escape(str(v))}" for k, v in found[0]["host"].items())
    rules = "".join(f"<dt>{escape(f['folder'])}<dd>{escape(', '.join(f['recipe']))}" for f in found)
    lines = escape(chr(10).join(table(found)))
    sections = [
        "<header><p class=kicker>HyperVL</p><h1>What the exported files cost</h1></header>",
        report.section("Branches, VRC and recipes", f"<div class=pair>{''.join(shown)}</div>"),
        report.section("Stage by stage", f"<div class=pair>{''.join(stages)}</div>"),
        report.section("Operations and bytes", f"<div class=pair>{''.join(works)}</div>"),
        report.section("In tiles and whole", f"<div class=pair>{''.join(curves)}</div>"),
        report.section("In figures", f"<div class=scroll><pre>{lines}</pre></div>"),
        f"<footer><dl>{facts}{rules}</dl></footer>",
    ]
    return report.document("bench", "".join(sections))


def _way(w: Mapping[str, Any]) -> str:
    return f"{w['branch']}{' + VRC' if w['vrc'] else ''}"


def _answer(w: Mapping[str, Any]) -> float:
    return sum(w["seconds"][s] for s in STAGES if s != "load")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = (
        [c.rjust(n) if i > 1 else c.ljust(n) for i, (c, n) in enumerate(zip(row, widths, strict=True))] for row in rows
    )
    return ["  ".join(row).rstrip() for row in cells]
