"""What exported files cost: time stage by stage, peak memory, operations and bytes. Imports no JAX.

Operations are two a multiply-add of matrix products and convolutions; bytes are those that every operator reads and
writes, weights as wide as they are stored, as if nothing stayed in a cache. Both are counted in the file itself, and
are the proxy for power where a host has no energy counters. Each way of answering runs in a process of its own, whose
peak memory is then its alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hypervl_jax import image, plan
from hypervl_jax.config import Branch, ModelConfig, PlanPolicy
from hypervl_jax.export import lower, manifest
from hypervl_jax.export.runtime import ENCODER, Runtime

STAGES = ("load", "preprocess", "vrc", "encode", "project", "prefill", "decode")
QUESTION = "what is this?"
SIDES = (256, 512, 1024, 2048)  # pixels of square pictures, for what is computed
_MEASURE = """import json, sys
from hypervl_jax.export import bench
print(json.dumps(bench.measure(json.loads(sys.argv[1]))))"""
POWERCAP = Path("/sys/class/powercap")
_BITS = {"FLOAT32": 32, "FLOAT16": 16, "INT32": 32, "INT64": 64, "INT8": 8, "UINT8": 8, "INT4": 4, "BOOL": 8}


class BenchError(ValueError):
    """A bench that cannot be run or read; the message says what to change."""


class Work(NamedTuple):
    """What one run of an entry point takes."""

    flops: int
    bytes: int
    weights: int  # bytes of constants it reads, in that number


# --- counted -----------------------------------------------------------------------------------------------------


def work(path: str | Path) -> dict[str, Work]:
    """Operations and bytes of each signature of a `.tflite` file. Raises `ExportError` for one that is not whole."""

    def read(model: Any, data: np.ndarray) -> dict[str, Work]:
        return {s.signatureKey.decode(): _graph(model, model.subgraphs[s.subgraphIndex]) for s in model.signatureDefs}

    return lower.parsed(path, read)


def _graph(model: Any, graph: Any) -> Work:
    codes = {v: k for k, v in vars(lower.extra("ai_edge_litert.schema_py_generated").TensorType).items()}
    flops = moved = weights = 0

    def size(i: int) -> int:
        t = graph.tensors[i]
        return _count(t.shape) * _BITS.get(codes[t.type], 32) // 8

    def constant(i: int) -> bool:
        buffer = model.buffers[graph.tensors[i].buffer]
        return buffer.offset > 1 or buffer.data is not None

    for op in graph.operators or ():
        name, ins, outs = lower.op_name(model, op.opcodeIndex), _ints(op.inputs), _ints(op.outputs)
        shapes = [graph.tensors[i].shape for i in ins]
        flops += 2 * sum(_count(graph.tensors[i].shape) for i in outs) * _depth(name, shapes, op)
        if name == "EMBEDDING_LOOKUP" or name.startswith("GATHER"):  # rows, not tables
            table = 1 if name == "EMBEDDING_LOOKUP" else 0
            rows = sum(_count(graph.tensors[i].shape) for i in outs)
            width = size(ins[table]) / max(1, _count(graph.tensors[ins[table]].shape))
            moved += round(rows * width) + sum(map(size, outs))
            weights += round(rows * width)
        elif name == "DYNAMIC_UPDATE_SLICE":  # in place
            moved += 2 * size(ins[1])
        elif name != "RESHAPE":  # no work at all
            moved += sum(map(size, (*ins, *outs)))
            weights += sum(size(i) for i in ins if constant(i))
    return Work(flops, moved, weights)


def _depth(name: str, shapes: Sequence[Any], op: Any) -> int:
    """Multiply-adds an element of the result takes; 0 of operators that are not products."""
    if name == "FULLY_CONNECTED":
        return int(shapes[1][-1])
    if name == "BATCH_MATMUL":
        return int(shapes[0][-2 if op.builtinOptions.adjX else -1])
    if name == "CONV_2D":
        return _count(shapes[1][1:])
    if name == "DEPTHWISE_CONV_2D":
        return _count(shapes[1][1:3])
    return 0


def _ints(indices: Any) -> list[int]:
    return [int(i) for i in indices if i >= 0]  # -1: an input that is not given


def _count(shape: Any) -> int:
    return math.prod(int(n) for n in (() if shape is None else shape))


def projector_share(cfg: ModelConfig, branch: Branch) -> float:
    """The projector's share of an encoder's operations: it is fused into the encoder's file."""
    wide, d = cfg.vit(branch).width * cfg.policy.merge**2, cfg.llm.width
    projector = cfg.policy.tokens_per_tile * 2 * (wide * d + d * d)
    one = plan.make((cfg.policy.tile, cfg.policy.tile), 1.0, cfg.policy)
    return projector / (projector + one.vit_flops(cfg.vit(branch)) // one.n_tiles)


def whole(cfg: ModelConfig, branch: Branch, sides: Iterable[int] = SIDES) -> list[dict[str, int]]:
    """Computed, not measured: FLOPs and bytes of one layer's attention scores of a square picture in tiles and whole.

    Tiles are those that cover it, without a thumbnail and without a limit to their number."""
    vit, policy, rows = cfg.vit(branch), cfg.policy, []
    for side in sides:
        across = -(-side // policy.tile)
        one = plan.make((policy.tile, policy.tile), 1.0, replace(policy, max_tiles=1))
        tile = one.vit_flops(vit) // one.n_tiles
        big = replace(vit, tile=across * policy.tile)
        rows.append({
            "side": across * policy.tile,
            "tiles": across**2,
            "tiled_flops": across**2 * tile,
            "whole_flops": _vit_flops(big.patches, vit, policy),
            "tiled_scores": 4 * vit.heads * vit.patches**2,
            "whole_scores": 4 * vit.heads * big.patches**2,
        })  # fmt: skip
    return rows


def _vit_flops(patches: int, vit: Any, policy: PlanPolicy) -> int:
    block = 2 * (4 * vit.width**2 + 2 * vit.width * vit.mlp) + 4 * patches * vit.width
    return patches * (block * vit.depth + 2 * 3 * policy.patch**2 * vit.width)


# --- measured ----------------------------------------------------------------------------------------------------


def run(folder: str | Path, pixels: Path | None = None, repeats: int = 5, threads: int | None = None) -> dict[str, Any]:
    """Everything about one exported folder: counted work, each entry point timed, every way of answering timed.

    `pixels` is a picture's file (noise of the largest plan if None). Raises `ManifestError` for a folder that is not
    whole, `BenchError` where a process fails.
    """
    folder, m = Path(folder), manifest.check(folder)
    branches = [p.name.removeprefix(ENCODER) for p in m.parts if p.name.startswith(ENCODER)]
    common = {"folder": str(folder), "picture": str(pixels) if pixels else None, "repeats": repeats, "threads": threads}
    ways = [
        {"branch": b, "vrc": vrc, **_child({"branch": b, "vrc": vrc, **common})}
        for b in branches
        for vrc in (False, True)
    ]
    entries = {f"{p.name} {s.name}": None for p in m.parts for s in p.signatures}
    timed = _child({"entries": list(entries), **common})
    counted = {f"{p.name} {k}": w for p in m.parts for k, w in work(folder / p.file.file).items()}
    return {
        "folder": folder.name,
        "recipe": list(m.recipe) or ["f32"],
        "bytes": {f.file: f.bytes for f in m.files},
        "ops": {p.name: list(p.ops) for p in m.parts},
        "entries": {k: counted[k]._asdict() | timed["entries"][k] for k in entries},
        "ways": ways,
        "computed": {b: whole(m.model, b) for b in branches},  # type: ignore[arg-type]  # names of branches
        "host": host(threads),
    }


def peaks(folder: str | Path) -> manifest.Manifest:
    """Measure what memory answering takes, each branch in a process of its own, and note it in the folder's manifest.
    What is kept of tokens is of one size, and tiles come one after another: it is as much for any picture."""
    m = manifest.check(folder)
    jobs = {b: {"peak": b, "folder": str(folder), "threads": None} for b in Runtime(folder).branches}
    found = {b: n for b, job in jobs.items() if (n := _child(job)["peak_bytes"])}
    manifest.write(folder, done := dataclasses.replace(m, peak_bytes=found))
    return done


def _child(job: Mapping[str, Any]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", _MEASURE, json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise BenchError(f"{job['folder']}: cannot be measured: {said.rpartition('Error: ')[2]:.300}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """One process's measurement: an answer's stages for a branch, its memory alone, or every entry point by itself."""
    files = Runtime(job["folder"], job["threads"])
    if "peak" in job:
        blank = np.zeros((files.config.policy.tile,) * 2 + (3,), np.uint8)
        files.answer(blank, QUESTION, job["peak"], vrc=True, max_new=2)
        return {"peak_bytes": peak()}
    if "entries" in job:
        return {"entries": {name: _entry(files, name, job["repeats"]) for name in job["entries"]}}
    pixels = image.load(job["picture"]) if job["picture"] else _noise(files.config)
    first = files.answer(pixels, QUESTION, job["branch"], job["vrc"])  # loads the files
    before, began, runs = energy(), time.perf_counter(), []
    for _ in range(job["repeats"]):
        runs.append(files.answer(pixels, QUESTION, job["branch"], job["vrc"]))
    after, seconds = energy(), time.perf_counter() - began
    stages = {s: statistics.median(a.seconds.get(s, 0.0) for a in runs) for s in STAGES if s != "project"}
    share = projector_share(files.config, job["branch"])
    stages["load"] = first.seconds["load"]
    stages["project"], stages["encode"] = stages["encode"] * share, stages["encode"] * (1 - share)
    return {
        "seconds": {s: stages[s] for s in STAGES},
        "tiles": first.plan.n_tiles,
        "prompt": len(files.prompt(first.plan, QUESTION).ids),
        "answer": len(first.ids),
        "ratio": first.ratio,
        "peak_bytes": peak(),
        "joules": joules(before, after, job["repeats"]),
        "answer_seconds": seconds / job["repeats"],
    }


def _entry(files: Runtime, name: str, repeats: int) -> dict[str, float]:
    """Seconds to load the file of "PART SIGNATURE" and of a run on zeros, the median."""
    part, signature = name.split(" ", 1)
    start = time.perf_counter()
    runner = lower.Runner(files.directory / files.manifest.part(part).file.file, files._threads)
    init = time.perf_counter() - start
    [entry] = [s for s in files.manifest.part(part).signatures if s.name == signature]
    inputs = {t.name: np.zeros(t.shape, t.dtype) for t in entry.inputs}
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        runner(signature, inputs)
        times.append(time.perf_counter() - start)
    return {"init_seconds": init, "seconds": statistics.median(times[1:])}


def _noise(cfg: ModelConfig) -> np.ndarray:
    """A picture of as many tiles as a plan may have."""
    side = round(cfg.policy.tile * cfg.policy.max_tiles**0.5)
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def peak() -> int:
    """The most memory this program has held, bytes; 0 where the system does not tell. Not `getrusage`, which after a
    fork still has the parent's peak."""
    try:
        said = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(said[1]) * 1024 if said else 0
    except OSError:
        return 0


def energy(root: Path = POWERCAP) -> dict[str, tuple[int, int]]:
    """Energy counters of the host's packages: name -> (microjoules so far, where the counter begins anew)."""
    out = {}
    for zone in sorted(root.glob("intel-rapl:*")) if root.is_dir() else ():
        try:
            if zone.name.count(":") == 1:  # a package; its parts are in it
                out[zone.name] = int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):  # root alone may read it
            continue
    return out


def joules(before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]], runs: int) -> float | None:
    """Joules of one of `runs`, of everything the host did meanwhile; None without counters."""
    both = [(before[k], after[k]) for k in before if k in after]
    total = sum((b[0] - a[0]) % (a[1] + 1) for a, b in both)
    return total / 1e6 / runs if both else None


def host(threads: int | None) -> dict[str, Any]:
    """What kind of machine and which versions a figure comes from; no names, no addresses."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {p: metadata.version(p) for p in ("ai-edge-litert", "numpy")}
    machine = {"system": f"{platform.system()} {platform.machine()}", "cores": cores}
    return machine | {"threads": threads or lower.cores()} | versions


# --- a phone -----------------------------------------------------------------------------------------------------


def phone(log: str | Path) -> dict[str, dict[str, float]]:
    """What `launch/android_bench.sh` recorded: entry -> init_seconds, seconds, peak_bytes (0 where not told).

    The log has a line `== PART SIGNATURE` before what LiteRT's benchmark_model printed of each. Raises `BenchError`
    for a log without entries, and naming an entry that was not measured.
    """
    log = Path(log)
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise BenchError(f"{log}: cannot be read: {e.strerror}") from e
    number, out = r"([0-9.]+(?:e[+-]?[0-9]+)?)", {}
    for block in re.split(r"^== ", text, flags=re.M)[1:]:
        name, _, said = block.partition("\n")
        times = re.search(rf"Inference timings in us: Init: {number}, .*Inference \(avg\): {number}", said)
        if not times:
            last = (said.strip().splitlines() or ["nothing"])[-1]
            raise BenchError(f"{log}: {name.strip()} was not measured: benchmark_model said {last!r:.200}")
        peak = re.search(rf"peak memory footprint \(MB\) via periodic monitoring: {number}", said)
        held = peak or re.search(rf"Memory footprint delta .*overall={number}", said)  # older tools: what was added
        held_bytes = float(held[1]) * 2**20 if held else 0.0
        out[name.strip()] = {
            "init_seconds": float(times[1]) / 1e6,
            "seconds": float(times[2]) / 1e6,
            "peak_bytes": held_bytes,
        }
    if not out:
        raise BenchError(f"{log}: not a log of launch/android_bench.sh: no line '== PART SIGNATURE' in it")
    return out


class Device(NamedTuple):
    """What a device can hold, and which operators its accelerator has (empty: not known)."""

    name: str
    ram_gb: float
    ops: tuple[str, ...] = ()


def device(path: str | Path) -> Device:
    """A device profile: JSON {"name", "ram_gb", "ops"}. Raises `BenchError` for anything else."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        name, ram, ops = values["name"], values["ram_gb"], values.get("ops", [])
        known = isinstance(name, str) and type(ram) in (int, float) and 0 < ram < math.inf and isinstance(ops, list)
        if not known or values.keys() - {"name", "ram_gb", "ops"} or not all(isinstance(op, str) for op in ops):
            raise ValueError
    except OSError as e:
        raise BenchError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BenchError(f'{path}: a device is {{"name": text, "ram_gb": number, "ops": [operators, if known]}}') from e
    return Device(name, float(ram), tuple(ops))


def warnings(found: Mapping[str, Any], on: Device) -> list[str]:
    """What may go wrong on a device: memory beyond half of its own, operators that leave its accelerator."""
    held = max((w["peak_bytes"] for w in found["ways"]), default=0)
    out = []
    if held > on.ram_gb * 1e9 / 2:
        out.append(f"{found['folder']}: needs {held / 1e9:.2f} GB here, more than half of {on.name}'s {on.ram_gb:g} GB")
    for part, ops in found["ops"].items() if on.ops else ():
        if missing := [op for op in ops if op not in on.ops]:
            out.append(f"{found['folder']}: {part} leaves {on.name}'s accelerator for {', '.join(missing)}")
    return out


def entries(folder: str | Path) -> list[str]:
    """FILE PART SIGNATURE of every entry point, a line each: what `launch/android_bench.sh` runs."""
    return [f"{p.file.file} {p.name} {s.name}" for p in manifest.check(folder).parts for s in p.signatures]


def check_folders(folders: Sequence[Path]) -> None:
    """Raises `BenchError` for folders that would have one name in a table."""
    names = [f.name for f in folders]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise BenchError(f"{twice[0]}: two folders of that name; rename one, tables are by name")
