"""Three charts as SVG text: lines, bars, dots with intervals. Pure functions of numbers; every label is escaped.

Colours and fonts are classes that the page's style sheet defines, so that one chart serves light and dark: `base`,
`large`, `grey`. A chart WIDTH units wide, text of 12, suits half a desktop page and a whole phone. `page` makes lines a
file that needs no style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple, TypeGuard

Number = int | float
WIDTH, HEIGHT = 440, 250
_HUES = ("#2a78b8", "#c2571a", "#23803f", "#8a5bb5", "#b4322e")
_STYLE = """text{font:12px sans-serif;fill:#444}.title{font-weight:bold}.rule{stroke:#ddd}
.line{fill:none;stroke-width:2}.run.line{stroke-dasharray:5 4}"""
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 36


class Series(NamedTuple):
    """One line. `colour` is a class of the style sheet; points that are not finite are left out."""

    label: str
    points: Sequence[tuple[Number, Number]]
    colour: str = "base"


class Dot(NamedTuple):
    """A figure with its interval; hollow ones are drawn as rings."""

    value: Number
    low: Number
    high: Number
    colour: str = "base"
    hollow: bool = False


def lines(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    dots: bool = False,
    smooth: bool = False,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """Lines over a shared x. `log`: y logarithmic; `smooth`: a moving average, the raw line faint behind it."""
    drawn = [s._replace(points=_finite(s.points, log)) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    xs, ys = zip(*(p for s in drawn for p in s.points), strict=True)
    x_ticks = _ticks(min(xs), max(xs))
    y_ticks = _powers(min(ys), max(ys)) if log else _ticks(min(0.0, *ys), max(ys))
    x = _scale(min(xs), max(xs), _LEFT, width - _RIGHT)
    low, high = min(*ys, y_ticks[0]) if log else min(0.0, *ys), max(*ys, y_ticks[-1])
    y = _scale(low, high, height - _BOTTOM, _TOP, math.log10 if log else float)
    parts = []
    for tick in y_ticks:
        parts.append(_line(_LEFT, y(tick), width - _RIGHT, y(tick), "rule"))
        parts.append(_text(_LEFT - 6, y(tick) + 4, _number(tick), "end"))
    for tick in x_ticks:
        parts.append(_text(x(tick), height - _BOTTOM + 16, _number(tick), "middle"))
    parts.append(_text((width + _LEFT - _RIGHT) / 2, height - 4, x_label, "middle", "label"))
    for s in drawn:
        points = _average(s.points) if smooth else s.points
        if smooth and len(s.points) > 8:
            parts.append(_path(s.points, x, y, f"line raw {s.colour}"))
        parts.append(_path(points, x, y, f"line {s.colour}"))
        if dots or len(points) == 1:
            parts += [_circle(x(a), y(b), 3.5, f"dot {s.colour}") for a, b in points]
    return _svg(width, height, parts, f"{y_label} over {x_label}: {', '.join(s.label for s in drawn)}")


def bars(rows: Sequence[tuple[str, Number, str]], top: Number | None = None, colour: str = "base") -> str:
    """Horizontal bars of (label, value, text at the right); `top` is the value of a full track."""
    rows = [r for r in rows if _is_number(r[1])]
    if not rows:
        return ""
    top = top or max(value for _, value, _ in rows) or 1.0
    left, right, step = 140, WIDTH - 72, 28
    parts = []
    for i, (label, value, text) in enumerate(rows):
        y = i * step + 6
        length = (right - left) * min(max(value / top, 0.0), 1.0)
        parts.append(_text(left - 10, y + 13, label if len(label) <= 20 else label[:19] + "…", "end"))
        parts.append(f'<rect x="{left}" y="{y + 2}" width="{right - left}" height="14" rx="3" class="track"/>')
        parts.append(f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="14" rx="3" class="bar {colour}"/>')
        parts.append(_text(WIDTH, y + 13, text, "end", "figure"))
    return _svg(WIDTH, len(rows) * step + 6, parts, "; ".join(f"{label}: {text}" for label, _, text in rows))


def intervals(groups: Sequence[tuple[str, Sequence[Dot], Sequence[Number | None]]]) -> str:
    """A block of rows a group (label, dots, controls) over 0 to 100 %: dots with whiskers, controls upright ticks."""
    left, right, row, gap = 140, WIDTH - 4, 10, 8
    x = _scale(0.0, 1.0, left, right)
    parts, y = [], 2.0
    for label, dots, controls in groups:
        block = max(len(dots), 1) * row
        parts.append(f'<rect x="{left}" y="{y}" width="{right - left}" height="{block}" rx="3" class="track"/>')
        parts.append(_text(left - 10, y + block / 2 + 4, label, "end"))
        for i, control in enumerate(controls):
            if _is_number(control):
                parts.append(_line(x(control), y, x(control), y + block, f"control control{i}"))
        for i, dot in enumerate(dots):
            middle = y + (i + 0.5) * row
            parts.append(_line(x(dot.low), middle, x(dot.high), middle, f"whisker {dot.colour}"))
            parts.append(_circle(x(dot.value), middle, 3.2, f"{'ring' if dot.hollow else 'dot'} {dot.colour}"))
        y += block + gap
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_text(x(tick), y + 8, f"{tick:.0%}", "middle" if 0 < tick < 1 else "end" if tick else "start"))
    return _svg(WIDTH, round(y) + 14, parts, f"accuracy with 95 % intervals: {', '.join(g[0] for g in groups)}")


def page(panels: Sequence[tuple[str, str]], key: Mapping[str, str], across: int = 2) -> str:
    """(title, chart of lines) in rows of `across` under one key, colour -> label, as an SVG file that stands alone, on
    white. A series may be "COLOUR run": dashed."""
    if len(key) > len(_HUES):
        raise ValueError(f"{len(key)} colours are asked for; there are {len(_HUES)}")
    step, top = HEIGHT + 30, 30
    colours = "".join(
        f".{name}.line{{stroke:{hue}}}.{name}.dot,text.{name}{{fill:{hue}}}"
        for name, hue in zip(key, _HUES, strict=False)
    )
    width, height = across * WIDTH, top + -(-len(panels) // across) * step
    parts = [f"<style>{_STYLE}{colours}</style>", f'<rect width="{width}" height="{height}" fill="#fff"/>']
    x = float(_LEFT)
    for name, label in key.items():
        parts.append(_text(x, 18, label, "start", name))
        x += 6.5 * len(label) + 20
    for i, (title, chart) in enumerate(panels):
        x, y = i % across * WIDTH, top + i // across * step
        parts.append(_text(x + _LEFT, y + 16, title, "start", "title"))
        parts.append(chart.replace("<svg", f'<svg x="{x}" y="{y + 24}" width="{WIDTH}" height="{HEIGHT}"', 1))
    svg = _svg(width, height, parts, "; ".join(title for title, _ in panels))
    return svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1) + "\n"


# --- numbers ---------------------------------------------------------------------------------------------------------


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _finite(points: Sequence[tuple[Number, Number]], positive: bool) -> list[tuple[Number, Number]]:
    return [(x, y) for x, y in points if _is_number(x) and _is_number(y) and (y > 0 or not positive)]


def _average(points: Sequence[tuple[Number, Number]]) -> list[tuple[Number, Number]]:
    """Moving average over a twentieth of the line: centred, narrow at the steep start, one-sided at the flat end."""
    half, out = len(points) // 40, []
    for i, (x, _) in enumerate(points):
        window = points[max(i - half, 0) : i + min(half, i) + 1]
        out.append((x, sum(y for _, y in window) / len(window)))
    return out


def _ticks(low: Number, high: Number, wanted: int = 5) -> list[Number]:
    """Round numbers from low to high, about `wanted` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _powers(low: Number, high: Number) -> list[Number]:
    """Powers of ten from the one at or below low to the one at or above high, thinned to at most six."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    return [10.0**i for i in range(first, last + 1, -(-(last - first) // 5))]


def _scale(
    low: Number, high: Number, start: Number, stop: Number, f: Callable[[Number], float] = float
) -> Callable[[Number], float]:
    span = f(high) - f(low) or 1.0
    return lambda v: start + (stop - start) * (f(v) - f(low)) / span


def _number(value: Number) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


# --- SVG -------------------------------------------------------------------------------------------------------------


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    label = escape(title)
    return f'<svg viewBox="0 0 {width} {height}" class="chart" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _text(x: Number, y: Number, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _line(x0: Number, y0: Number, x1: Number, y1: Number, kind: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>'


def _circle(x: Number, y: Number, radius: Number, kind: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}"/>'


def _path(points: Sequence[tuple[Number, Number]], x: Callable, y: Callable, kind: str) -> str:
    return f'<path d="M{" L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)}" class="{kind}"/>'
