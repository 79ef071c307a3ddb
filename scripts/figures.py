"""Writes the figures of README.md from `benchmarks/results/`, between the markers that frame them.

    python scripts/figures.py            rewrite the README
    python scripts/figures.py --check    only say whether it is up to date (exit status 1 if not)

Figures are never typed by hand: a test runs the check.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- figures: scripts/figures.py -->", "<!-- end of figures -->"
Result = dict[str, Any]


def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def spread(row: dict[str, float]) -> str:
    """A share with its 95 % interval, in per cent."""
    return f"{percent(row['mean'])} ({100 * row['low']:.0f}-{100 * row['high']:.0f})"


def where(result: Result) -> str:
    """The command, and the machine it ran on."""
    machine = result["machine"]
    kind = machine.get("kind") or machine["device"]
    return f"`{result['command']}`, {machine['cores']} {kind.upper()} cores"


def accuracy(tables: dict[str, Any], controls: dict[str, dict[str, float]]) -> list[str]:
    """Rows of a table: a task a line, Base and Large, and the better of the controls."""
    rows = ["| | Base | Large | not looking |", "|---|---|---|---|"]
    for task in tables["base"]:
        name, art = task.rsplit("_", 1)
        blind = max(c.get(task, 0.0) for c in controls.values())
        both = " | ".join(spread(tables[b][task]) for b in ("base", "large"))
        rows.append(
            f"| {name}, {'artist never seen' if art == 'unseen' else 'known artists'} | {both} | {percent(blind)} |"
        )
    return rows


def prose(*parts: str) -> list[str]:
    return textwrap.wrap(" ".join(parts), 120, break_on_hyphens=False)


def nano(r: Result) -> list[str]:
    m = r["metrics"]
    said = prose(
        f"**The weights that ship**, {m['screens']:,} held-out screens: per cent right with 95 % intervals;",
        "the last column is the better of two controls, the most common answer and the same model",
        f"shown another picture ({where(r)}):",
    )
    return [*said, "", *accuracy(m["accuracy"], m["controls"])]


def quickstart(r: Result) -> list[str]:
    total, memory = f"{r['seconds']['total']:.0f} s in all", f"{r['peak_rss_gb']:.1f} GB"
    said = prose(
        f"**One quickstart run**, {total} and {memory} ({where(r)}): per cent right on held-out screens with 95 %",
        "intervals; the last column is the better of two controls, the most common answer and the same model",
        "shown another picture.",
    )
    return [*said, "", *accuracy(r["accuracy"], r["controls"])]


def vrc(r: Result) -> list[str]:
    m = r["metrics"]
    saved, held, edge = m["tokens_saved"], m["retained"], m["above_constant"]
    gap, low, high = (f"{100 * edge[k]:+.1f}" for k in ("mean", "low", "high"))
    return prose(
        f"**VRC** saves {percent(saved['mean'])} % of the visual tokens and keeps {percent(held['mean'])} %",
        f"({percent(held['low'])}-{percent(held['high'])}) of the accuracy;",
        f"against the best constant ratio of equal cost that is {gap} points ({low} to {high}).",
        "Its ratio follows what must stay legible with rank correlation",
        f"{m['rank_correlation']['all']:.2f} ({where(r)}).",
    )


def dcl(r: Result) -> list[str]:
    m = r["metrics"]
    agree, base, large = (f"{100 * m[f'{k}_gain']['mean']:+.1f}" for k in ("agreement", "base", "large"))
    on, off = (f"{100 * cost['mean']:.1f}" for cost in m["switch_cost"].values())
    return prose(
        f"**DCL**, {len(r['seeds'])} seeds with and without the KL term on the same data:",
        f"the divergence of Base from Large falls to {percent(m['divergence_ratio'])} % of what it is without;",
        f"the branches give the same answer {agree} points more often,",
        f"the accuracy of Base changes by {base} points, that of Large by {large}.",
        f"Switching from Large to Base costs {on} points with the term, {off} without ({where(r)}).",
        *ablation(m),
    )


def ablation(m: dict[str, Any]) -> list[str]:
    """What the image-name term is worth, where the run without it was made."""
    if "names_gain" not in m:
        return []
    base, large = (f"{100 * m['names_gain'][b]['mean']:+.1f}" for b in ("base", "large"))
    text = f"with it the accuracy of Base differs by {base} points, that of Large by {large}."
    return [f"One more run without the image-name term: {text}"]


def export(r: Result) -> list[str]:
    m = r["metrics"]
    return prose(
        f"**Exported files** give the same greedy answer as JAX to {percent(m['same_answers'])} % of",
        f"{m['questions']:,}",
        f"questions about {m['screens']:,} held-out screens; the largest relative error at any seam is",
        f"{m['max_relative_error']:.0e} ({where(r)}).",
    )


def inference(r: Result) -> list[str]:
    m, d = r["metrics"], r["metrics"]["decoder"]
    if not m["torch"]:
        return []
    kind, decode = m["dtype"], d["decode"]
    times = [f"{b} {m['encode'][b]['jax']['over_first']:.2f}" for b in ("base", "large")]
    reads = [f"{n.split('_')[1]} tokens {over(d[n], f'jax {kind}', f'torch {kind}'):.2f}" for n in d if is_prefill(n)]
    narrow = [f"{k} {over(decode, f'jax {k}', f'jax {kind}'):.2f}" for k in ("bfloat16", "int8", "int4")]
    return prose(
        "**Speed**, in time of transformers' on the same weights and threads, the same run:",
        f"encoding a tile {', '.join(times)}; prefill {', '.join(reads)};",
        f"decode {over(decode, f'jax {kind}', f'torch {kind}'):.2f}.",
        f"A token in narrow weights, in time of {kind}: {', '.join(narrow)} ({where(r)}).",
    )


def is_prefill(name: str) -> bool:
    return name.startswith("prefill_") and name.count("_") == 1


def over(rows: dict[str, dict[str, float]], a: str, b: str) -> float:
    return rows[a]["over_first"] / rows[b]["over_first"]


SECTIONS: dict[str, Callable[[Result], list[str]]] = {
    "nano": nano,
    "export": export,
    "inference": inference,
    "vrc": vrc,
    "dcl": dcl,
    "quickstart": quickstart,
}


def figures(results: Path = RESULTS) -> str:
    """The framed part: what has been measured, in the order of `SECTIONS`."""
    lines = [START]
    for name, section in SECTIONS.items():
        path = results / f"{name}-cpu.json"
        if path.exists():
            lines += ["", *section(json.loads(path.read_text()))]
    return "\n".join([*lines, "", END])


def main(argv: list[str]) -> int:
    path = ROOT / "README.md"
    text = path.read_text()
    head, rest = text.split(START)
    new = head + figures() + rest.split(END)[1]
    if "--check" in argv:
        print("README.md is up to date" if new == text else "README.md is stale: run python scripts/figures.py")
        return int(new != text)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
