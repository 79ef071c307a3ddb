"""Writes figures of README.md and docs/ from `benchmarks/results/`, between the markers that frame them, and the plots.

    python scripts/figures.py            rewrite the pages and the plots docs/*.svg
    python scripts/figures.py --check    only say whether they are up to date (exit status 1 if not)

Figures are never typed by hand: a test runs the check.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hypervl_jax import charts

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT, CURVES = Path("docs") / "tiling.svg", Path("docs") / "picture_size.svg"
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
    return f"`{result['command']}`, {machine['cores']} {kind.upper()} core{'s' * (machine['cores'] > 1)}"


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
    narrow = [f"{k} {over(decode, f'jax {k}', f'jax {kind}'):.2f}" for k in ("bfloat16", "int8", "int4")]
    return prose(
        "**Speed**, in time of transformers' on the same weights and threads, the same run:",
        f"encoding a tile {', '.join(times)}; prefill {reads(d, f'jax {kind}', f'torch {kind}')};",
        f"decode {over(decode, f'jax {kind}', f'torch {kind}'):.2f}.",
        *([f"In time of llama.cpp's: {native(d, kind)}."] if m.get("llama.cpp") else []),
        f"A token in narrow weights, in time of {kind}: {', '.join(narrow)} ({where(r)}).",
    )


def training(r: Result) -> list[str]:
    m = r["metrics"]
    if not m.get("torch"):
        return []
    ratios = "; ".join(
        f"{name} " + ", ".join(f"{b} {found[b]['jax']['over_first']:.2f}" for b in ("base", "large"))
        for name, found in m["steps"].items()
    )
    back = "; ".join(
        f"{name} "
        + ", ".join(f"{b} {found[b]['jax']['seconds'] / m['steps'][name][b]['jax']['seconds']:.2f}" for b in found)
        for name, found in m["as_is"].items()
    )
    return prose(
        "**A training step**, in time of the same step in torch: forward, backward, clipping, AdamW, equal losses:",
        f"{ratios}. Where a process does not keep its memory as the commands do it takes, times: {back} ({where(r)}).",
    )


def native(d: dict[str, Any], kind: str) -> str:
    """The decoder beside llama.cpp's, in the dtype of the run and in the 8 and 4 bits that either has."""
    pairs = {kind: kind, "int8": "q8_0", "int4": "q4_0"}
    tokens = [f"{ours} {over(d['decode'], f'jax {ours}', f'llama.cpp {q}'):.2f}" for ours, q in pairs.items()]
    return f"prefill {reads(d, f'jax {kind}', f'llama.cpp {kind}')}; decode {', '.join(tokens)}"


def reads(d: dict[str, Any], a: str, b: str) -> str:
    """Every length of a prompt, time of a over time of b."""
    return ", ".join(f"{n.split('_')[1]} tokens {over(d[n], a, b):.2f}" for n in d if is_prefill(n))


TILING = {
    "serial": "serial tiles",
    "batched": "all tiles at once",
    "flash": "whole, blocks of scores",
    "chunked": "whole, query chunks",
    "whole": "whole",
}


def tiling(r: Result) -> list[str]:
    """Rows of a table: a way a line; the smallest and the largest picture of the analysis, the largest that ran."""
    m = r["metrics"]
    sides = [m["base"]["analysis"][i]["side"] for i in (0, -1)]
    ran = [m[b]["measured"][-1] for b in ("base", "large") if "measured" in m[b]]
    run = f" Seconds and peak memory of a run at {ran[0]['side']:,} px." if ran else ""
    said = prose(
        "**Serial tiles** at the paper's sizes: MB of working memory of the encoder on a square picture, by compiler",
        f"analysis, and how many times what serial tiles take.{run} A tile is {sides[0]} px wide.",
    )
    heads = [f"{b}, {side:,} px" for b in ("Base", "Large") for side in sides]
    heads += [f"{b}, run at {row['side']:,} px" for b, row in zip(("Base", "Large"), ran, strict=False)]
    rows = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for way, name in TILING.items():
        cells = [memory(m[b]["analysis"][i], way) for b in ("base", "large") for i in (0, -1)]
        cells += [f"{row['seconds'][way]:.0f} s, {memory(row, way)}" if row["bytes"][way] else "-" for row in ran]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    plotted = f"![memory and time of the encoders over the side of the picture]({PLOT.as_posix()})"
    below = f"Solid: by compiler analysis{'; dashed: runs' if ran else ''} ({where(r)})."
    return [*said, "", *rows, "", plotted, "", below]


def memory(row: Result, way: str) -> str:
    """MB of one way, and how many times what serial tiles take."""
    times = f" ({x:,.{int(x < 10)}f} x)" if (x := row["over_serial"].get(way)) else ""
    return f"{row['bytes'][way] / 1e6:,.0f}{times}"


def plot(r: Result) -> str:
    """Memory and time over the side, a row a branch: lines of the analysis, dashed lines of runs."""
    m, panels = r["metrics"], []
    for branch in ("base", "large"):
        rows, runs = m[branch]["analysis"], m[branch].get("measured", ())
        memory = [lines_of(rows, "bytes", way, way, 1e9) for way in TILING]
        memory += [lines_of(runs, "bytes", way, f"{way} run", 1e9) for way in TILING]
        time = [lines_of(runs, "seconds", way, f"{way} run") for way in TILING]
        name, side = branch.capitalize(), "side of a square picture, pixels"
        for title, series in (("memory, GB", memory), ("time of a run, s", time)):
            if drawn := charts.lines(series, side, title, log=True, dots=True):
                panels.append((f"{name}: {title}", drawn))
    return charts.page(panels, TILING)


def lines_of(rows: Sequence[Result], key: str, way: str, colour: str, unit: float = 1.0) -> charts.Series:
    return charts.Series(colour, [(row["side"], row[key][way] / unit) for row in rows if row[key][way]], colour)


def is_prefill(name: str) -> bool:
    return name.startswith("prefill_") and name.count("_") == 1


def over(rows: dict[str, dict[str, float]], a: str, b: str) -> float:
    return rows[a]["over_first"] / rows[b]["over_first"]


def plans(r: Result) -> list[str]:
    """A row a stage and machine, smallest slice first as they were compiled; what does not fit says why."""
    rows = [
        "| machine | stage | mesh, micro-batches | rows x tokens | memory of a device | step | tokens a day | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for m in r["metrics"]["rows"]:
        head = f"| {m['machine']} | {m['stage']} | {m['mesh']}, {m['accumulate']} |"
        if "refused" in m:
            rows.append(f"{head} {m['refused']} | | | | |")
            continue
        (low, high), (few, many) = m["step_seconds"], (t / 1e9 for t in m["tokens_a_day"])
        least, most = (100 * share for share in m["mfu"])
        rows.append(
            f"{head} {m['rows']:,} x {m['tokens']:,} | {m['memory_gb']:.1f} of {m['of_gb']:.0f} GB | "
            f"{low:.3g}-{high:.3g} s | {few:.3g}-{many:.3g} billion | {least:.0f}-{most:.0f} % |"
        )
    said = "The time of a step is that of all at once and of one after another, and what follows from it;"
    return [*rows, "", *prose(said, f"`python benchmarks/plans.py`, libtpu {r['versions'].get('libtpu', 'unknown')}.")]


def runtimes(r: Result) -> list[str]:
    """A row a runtime, in time of LiteRT's f32: a token, a prompt, a tile."""
    m = r["metrics"]
    columns = [m["decode"], m["prefill"], m["encoder"]["encode"]]
    names = [n for n in LITE if any(n in c for c in columns)]
    said = prose(
        "**Runtimes** on the same weights, in time of LiteRT's f32 in the same run: a token behind 512,",
        f"a prompt of 512, a tile of Base ({where(r)}). MB are those of the decoder's weights.",
    )
    rows = ["| | MB | token | prompt | tile |", "|---|---|---|---|---|"]
    for name in names:
        size = f"{m['bytes'][name] / 1e6:,.0f}" if name in m["bytes"] else "-"
        times = (f"{c[name]['over_first']:.2f}" if name in c else "-" for c in columns)
        rows.append(cells((LITE[name], size, *times)))
    return [*said, "", *rows]


LITE = {
    "litert float32": "LiteRT, f32",
    "litert int8": "LiteRT, 8 bits",
    "litert int4": "LiteRT, 4 bits, groups of 32",
    "litert int4/128": "LiteRT, 4 bits, groups of 128",
    "litert int4/row": "LiteRT, 4 bits, a scale a row",
    "jax float32": "JAX, f32",
    "jax int8": "JAX, 8 bits",
    "jax int4": "JAX, 4 bits, groups of 32",
    "onnxruntime float32": "ONNX Runtime, f32",
    "llama.cpp float32": "llama.cpp, f32",
    "llama.cpp q8_0": "llama.cpp, Q8_0",
    "llama.cpp q4_0": "llama.cpp, Q4_0",
}


def paper_size(r: Result) -> list[str]:
    """What the paper's geometry weighs, what its export takes, and what one picture costs."""
    m = r["metrics"]
    whole = m["w4a16"]
    layers = f"{whole['bits']['layers']:.2f} bits a weight"
    seams = "; ".join(f"{name} {max(f['parity'].values()):.0e}" for name, f in m["f32"].items())
    said = prose(
        f"**The paper's size**, random weights: 1.7B exported in {whole['seconds'] / 60:.0f} minutes within",
        f"{whole['peak_bytes'] / 2**30:.1f} GiB of memory; {layers} of the decoder's layers.",
        f"Largest relative error at any seam in f32: {seams} ({where(r)}). VRC's ratio is chance where weights are.",
    )
    files = ["| file | MB |", "|---|---|"]
    files += [f"| `{f}` | {n / 1e6:,.1f} |" for f, n in whole["bytes"].items() if n > 1e6]
    heads = ("one picture", "tiles", "prompt", "VRC", "encode", "prefill", "a token", "peak memory")
    ways = [cells(heads), "|---" * len(heads) + "|"]
    for w in whole["ways"]:
        s, name = w["seconds"], w["branch"] + (" + VRC" if w["vrc"] else "")
        each = (s["vrc"], s["encode"] + s["project"], s["prefill"], s["decode"] / max(w["answer"], 1))
        row = (name, w["tiles"], w["prompt"], *(f"{t:.2f} s" for t in each), f"{w['peak_bytes'] / 2**30:.2f} GiB")
        ways.append(cells(row))
    return [*said, "", *files, "", *ways]


TASKS = ("read", "find", "name", "count", "yesno")


def quantized(r: Result) -> list[str]:
    """A row a way to keep the decoder's layers, then a row a kind of activations of the headline: points lost."""
    m = r["metrics"]
    rows = [cells(("the decoder's layers", "bits", "drift", "same answers", *TASKS)), "|---" * 9 + "|"]
    for name, f in m["methods"].items():
        group, _, method = name.partition(" ")
        said = (
            f"4 bits, {'a scale a row' if group == 'row' else f'groups of {group}'}, {method}" if method else "8 bits"
        )
        drift, same = f"{1e3 * f['drift']:.2f}", f"{percent(f['same_as_f32'])} %"
        rows.append(cells((said, f"{f['bits']:.2f}", drift, same, *points(f["lost"]))))
    screens, of = m["screens"], m["activations"]
    acts = [cells(("activations", "same answers", *TASKS)), "|---" * 7 + "|"]
    for kind, f in of.items():
        name = {"files": "8 bits, the files in their runtime"}.get(kind, f"{kind}, JAX")
        acts.append(cells((name, f"{percent(f['same_as_f32'])} %", *points(f["lost"], 2))))
    said = prose(
        f"**Narrow weights**, the shipped model, {m['branch'].capitalize()}: points of 100 that each task loses to the",
        f"same model in f32 on {screens['methods']:,} held-out screens ({where(r)}). The paired 95 % interval is",
        f"at most {widest(m['methods']):.1f} points to either side. Drift: thousandths of a nat a token of the true",
        "answers by which it diverges from f32.",
    )
    group, _, method = m["headline"].partition(" ")
    below = prose(
        f"Groups of {group}, {capital(method)}, on {screens['activations']:,} screens, with an interval of at most",
        f"{widest(of):.1f} to either side:",
    )
    return [*said, "", *rows, "", *below, "", *acts]


def capital(method: str) -> str:
    return method if method == "nearest" else method.upper().replace("+", " + ")


def narrow(r: Result) -> list[str]:
    """The headline of `quantized`."""
    m, acts = r["metrics"], r["metrics"]["activations"]
    group, _, method = m["headline"].partition(" ")
    worst = {k: max((x["mean"], task) for task, x in f["lost"].items()) for k, f in acts.items()}
    names = {"files": "8 bits, as the files have them,"}
    said = "; ".join(f"{names.get(k, k)} {lost:.2f} points ({task})" for k, (lost, task) in worst.items())
    return prose(
        f"**In 4 bits**, groups of {group}, {capital(method)}, {m['methods'][m['headline']]['bits']:.2f} bits a weight",
        "of the decoder's layers, tables and encoders in 8: what the worst task loses to f32, by activations:",
        f"{said}; on {m['screens']['activations']:,} held-out screens ({where(r)}).",
    )


def points(lost: Result, digits: int = 1) -> list[str]:
    return [f"{round(lost[task]['mean'], digits) + 0:.{digits}f}" if task in lost else "-" for task in TASKS]


def widest(found: Result) -> float:
    """Half the widest interval."""
    return max(x["high"] - x["mean"] for f in found.values() for x in f["lost"].values())


SAVED = {
    "a base": "(a) whole / tiles, Base, f32",
    "a large": "(a) whole / tiles, Large, f32",
    "b f32": "(b) whole Large / tiles of Base, f32",
    "b int8": "(b) the same, tiles of Base in 8 bits",
    "c": "(c) the same behind VRC",
    "d": "(d) to the first token, as (c)",
}


def picture_size(r: Result) -> list[str]:
    """A row a ratio, a column a side: times as fast, and times less memory."""
    rows = r["metrics"]["rows"]
    said = prose(
        "**Large pictures** at the paper's geometry: how many times the time and the peak memory of a whole picture",
        f"are those of what this library does with it, over its side in pixels ({where(r)}). A tile is",
        f"{r['metrics']['tile']} px wide. In italics: computed, not run. The paper reports 12.9 times the speed and",
        "6.8 times less memory than a baseline that it does not describe. Pictures that fill their tiles badly",
        "take longer in tiles than whole.",
    )
    heads = [f"{row['side']:,}" if row["ran"] else f"*{row['side']:,}*" for row in rows]
    out = [cells(("time; memory", *heads)), "|---" * (len(heads) + 1) + "|"]
    for key, name in SAVED.items():
        pairs = ((row["ran"], row["ratios"][key]) for row in rows)
        figures = ((ran, f"{x['seconds']:.1f}; {x['bytes']:.1f}") for ran, x in pairs)
        out.append(cells((name, *(f if ran else f"*{f}*" for ran, f in figures))))
    plotted = f"![how many times the time and the memory a whole picture takes, over its side]({CURVES.name})"
    return [*said, "", *out, "", plotted, "", "Solid: run; dashed: computed."]


def curves(r: Result) -> str:
    """The ratios of `picture_size` over the side: lines of what ran, dashed from there on."""
    rows, panels = r["metrics"]["rows"], []
    ran = [row for row in rows if row["ran"]]
    shown = {k: v for k, v in SAVED.items() if k != "b f32"}
    for key, title in (("seconds", "times the time"), ("bytes", "times the memory")):
        series = [
            charts.Series(k, [(row["side"], row["ratios"][k][key]) for row in part], f"{k.replace(' ', '-')}{dashed}")
            for k in shown
            for part, dashed in ((ran, ""), (rows[len(ran) - 1 :], " run"))
        ]
        panels.append((title, charts.lines(series, "side of a square picture, pixels", title, dots=True)))
    return charts.page(panels, {k.replace(" ", "-"): k for k in shown})


# --- rescaling -------------------------------------------------------------------------------------------------------

SETS = ("Set5", "Set14", "kodak")
PAIRS = {
    "firn_x4": "FIRN x4",
    "imdn_x4": "IMDN x4",
    "imdn_x2": "IMDN x2",
    "light_x4": "light x4",
    "light_x2": "light x2",
}
WAYS = ("plain", "LR15", "HR15+LR15", "own")
SPEED = {"firn_x4": "FIRN x4, trained weights", "irn_x4": "IRN x4 as published, random weights"}


def rescaled(r: Result) -> list[str]:
    """A row a pair and set, a column a way: PSNR and SSIM, and how far the small picture is from the plain one."""
    found = r["metrics"]
    said = prose(
        "**HCD** with frozen networks: PSNR-Y in dB and SSIM, on average; in brackets the PSNR of the small picture to",
        f"the plain one ({where(r)}). `own` is the setting that `hcd_setting.py` chose; it lets the small picture move",
        "further, and its budget grows with the picture where the official one does not.",
    )
    rows = [cells(("pair", "set", *WAYS)), "|---" * (len(WAYS) + 2) + "|"]
    for pair, name in PAIRS.items():
        for folder in SETS:
            if (ways := found.get(f"{pair}_{folder}")) is not None:
                each = (restored(ways[way].values()) if way in ways else "-" for way in WAYS)
                rows.append(cells((name, f"{folder.capitalize()}, {len(ways['plain'])}", *each)))
    both = [
        (ways["own"][stem]["psnr_y"] - row["psnr_y"], stem)
        for label, ways in found.items()
        if "own" in ways
        for stem, row in ways["HR15+LR15"].items()
    ]
    less = ", ".join(f"{stem} by {-gain:.2f} dB" for gain, stem in sorted(both) if gain < 0)
    return [
        *said,
        "",
        *rows,
        "",
        *prose(f"Of {len(both)} restored pictures `own` gives less than HR15+LR15 for: {less or 'none'}."),
    ]


def restored(rows: Iterable[Result]) -> str:
    rows = list(rows)
    db, ssim = (sum(row[k] for row in rows) / len(rows) for k in ("psnr_y", "ssim_y"))
    near = [row["lr_psnr"] for row in rows if row["lr_psnr"] is not None]  # None: the same picture
    return f"{db:.2f}, {ssim:.4f}" + (f" ({sum(near) / len(near):.1f})" if near else "")


def setting(r: Result) -> list[str]:
    m = r["metrics"]
    chosen, gain, proof = m["chosen"], m["gain"], m["proof"]
    official = m["settings"]["official"]["passes"]
    moved = proof[chosen["name"]]["lr_psnr"], proof["official"]["lr_psnr"]
    return prose(
        f"**A setting of our own**, {chosen['name']}, chosen among {len(m['settings'])} on crops of BSDS500's training",
        f"part: {chosen['passes']} passes of a network where the official setting has {official}; on crops of other",
        f"pictures {gain['mean']:+.2f} dB ({gain['low']:+.2f} to {gain['high']:+.2f}) above it, its small picture",
        f"{moved[0]:.1f} dB from the plain one where the official one's is {moved[1]:.1f} ({where(r)}).",
    )


def speed(r: Result) -> list[str]:
    m = r["metrics"]
    steps, side = m["steps"], m["side"]
    said = prose(
        f"**Time.** HCD with {steps} + {steps} steps on {side} x {side} pixels beside the same loop in PyTorch, same",
        "cores and process, and beside the plain form of the network, as the paper writes it. The share is of the",
        "arithmetic that a product of matrices reaches, memory what one step of the large picture allocates, and what",
        f"it would with couplings computed anew, remat ({where(r)}).",
    )
    head = ("pair", "seconds", "of PyTorch's time", "of the plain form's", "share", "compiling, s", "MB", "MB, remat")
    rows = [cells(head), "|---" * len(head) + "|"]
    for name, n in m["nets"].items():
        times = (f"{n['seconds']['jax']:.1f}", f"{1 / n['ratio']:.2f}", f"{n['seconds']['jax'] / n['plain_s']:.2f}")
        memory = (f"{n[k] / 1e6:.0f}" for k in ("step_bytes", "step_bytes_remat"))
        rows.append(cells((SPEED[name], *times, f"{100 * n['share']:.0f} %", f"{n['compile_s']:.0f}", *memory)))
    return [*said, "", *rows]


def growth(r: Result) -> list[str]:
    """A row a size: seconds and memory."""
    m = r["metrics"]
    said = prose(
        f"**Cost over the size of the picture** with the network of `light_x2`, tiles of {m['tile']} pixels: seconds a",
        "megapixel, the plain path and a step of the large and of the small picture by HCD, and the memory of both",
        f"({where(r)}).",
    )
    rows = [cells(("side", "plain, s/MP", "HCD, s/MP a step", "plain, MB", "HCD, MB")), "|---" * 5 + "|"]
    for row in m["sizes"]:
        area = row["side"] ** 2 / 1e6
        times = (f"{row[k] / area:.2f}" for k in ("plain_s", "hcd_s"))
        rows.append(cells((f"{row['side']:,}", *times, *(megabytes(row[k]) for k in ("plain_bytes", "hcd_bytes")))))
    large = m["plain"]
    per = large["plain_s"] / large["side"] ** 2 * 1e6
    rows.append(cells((f"{large['side']:,}", f"{per:.2f}", "-", megabytes(large["plain_bytes"]), "-")))
    return [*said, "", *rows]


def megabytes(n: float | None) -> str:
    """A dash where nothing was measured, as off Linux."""
    return "-" if n is None else f"{n / 1e6:,.0f}"


def trained(r: Result) -> list[str]:
    m = r["metrics"]
    plain, moved = ([row["psnr_y"] for row in m["Set5"][way].values()] for way in ("plain", "HR15+LR15"))
    above = sum(plain) / len(plain) - sum(m["bicubic"].values()) / len(plain)
    gains = [b - a for a, b in zip(plain, moved, strict=True)]
    needed = (f"{name} {n['step'] / 1e9:.1f} GB" for name, n in m.get("memory", {}).items())
    return prose(
        f"**`tiny_x2`** after its {m['steps']} steps on BSDS500's training part, {m['bytes'] / 1e3:.0f} kB: Set5 comes",
        f"back at {sum(plain) / len(plain):.2f} dB plain, {above:+.2f} dB against bicubic both ways, and HCD at the",
        f"official setting adds {sum(gains) / len(gains):.2f} dB on average, {min(gains):.2f} at least ({where(r)}).",
        f"A training step of the paper's pairs, batch 16, crops of 144, compiles and allocates: {', '.join(needed)}.",
    )


def cells(row: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, row)) + " |"


PAGES: dict[str, dict[str, Callable[[Result], list[str]]]] = {
    "README.md": {
        "nano": nano,
        "export": export,
        "quantize": narrow,
        "inference": inference,
        "training": training,
        "tiling_memory": tiling,
        "vrc": vrc,
        "dcl": dcl,
        "quickstart": quickstart,
    },
    "docs/training.md": {"plans": plans},
    "docs/export.md": {
        "paper_size": paper_size,
        "picture_size": picture_size,
        "quantize": quantized,
        "runtimes": runtimes,
    },
    "docs/rescaling.md": {
        "hcd": rescaled,
        "hcd_setting": setting,
        "hcd_speed": speed,
        "rescale_cost": growth,
        "rescale_train": trained,
    },
}


def figures(page: str = "README.md", results: Path = RESULTS) -> str:
    """The framed part of a page: what there are results of, in the order of `PAGES`."""
    lines = [START]
    for name, section in PAGES[page].items():
        path = results / f"{name}-cpu.json"
        if path.exists():
            lines += ["", *section(json.loads(path.read_text()))]
    return "\n".join([*lines, "", END])


def files() -> dict[Path, str]:
    """What this writes, by path."""
    out = {}
    for page in PAGES:
        head, rest = (ROOT / page).read_text().split(START)
        out[ROOT / page] = head + figures(page) + rest.split(END)[1]
    for path, name, draw in ((PLOT, "tiling_memory", plot), (CURVES, "picture_size", curves)):
        if (found := RESULTS / f"{name}-cpu.json").exists():
            out[ROOT / path] = draw(json.loads(found.read_text()))
    return out


def main(argv: list[str]) -> int:
    stale = {path: text for path, text in files().items() if not path.exists() or path.read_text() != text}
    if "--check" in argv:
        names = " and ".join(path.relative_to(ROOT).as_posix() for path in stale)
        print(f"{names}: stale, run python scripts/figures.py" if stale else "the pages and the plot are up to date")
        return int(bool(stale))
    for path, text in stale.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
