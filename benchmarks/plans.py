"""The paper's stages on machines that are not here: what a step of each takes on TPU slices and on one GPU host, as
`hypervl plan` says. Compiled for them and run nowhere: memory and collectives by the compiler's account, times by
published rates. A stage that does not fit stands in the table with what it would take.

Needs the extra `plan` for TPU slices. Each case is a process of its own, takes minutes, and is written down when it is
done. Rows of the results file stand where they are of the same code and settings; with `--only`, those of other
machines stand whatever they are of: each says its commit.

    python benchmarks/plans.py                      every case
    python benchmarks/plans.py --only v5e:16x16     those of one machine
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from typing import Any, NamedTuple

from common import HERE, Bar, arguments, commit, finish, versions

from hypervl_jax.chips import CHIPS

ROOT = HERE.parent
READ = ("account", "chips", "config", "forecast", "losses", "mesh", "optim", "presets", "train", "model/*")


class Stage(NamedTuple):
    """A config, and by machine its mesh and micro-batches; its batch, where that is not the config's."""

    config: str
    on: dict[str, tuple[str, int, int | None]]


# Rows of 2,048 tokens: some to a device. Of 8,192 and 16,384: one, or one over several. The batch is the paper-size
# config's.
STAGES = (
    Stage("stage1_align", {
        "v5e:4x4": ("fsdp=16", 8, None), "v5e:8x8": ("fsdp=64", 2, None), "v5e:16x16": ("fsdp=256", 1, None),
        "v6e:8x8": ("fsdp=64", 1, None), "v5p:4x4x4": ("fsdp=64", 1, None),
        "v5p:16x16x24": ("data=24,fsdp=256", 1, 12_288), "h100:8": ("fsdp=8", 16, None), "h200:8": ("fsdp=8", 16, None),
    }),
    Stage("stage2_pretrain", {
        "v5e:4x4": ("fsdp=8,tensor=2", 64, None), "v5e:8x8": ("fsdp=32,tensor=2", 16, None),
        "v5e:16x16": ("fsdp=256", 2, None), "v6e:8x8": ("fsdp=64", 8, None),
        "v5p:4x4x4": ("fsdp=64", 4, None), "v5p:16x16x24": ("data=24,fsdp=256", 1, 6_144),
        "h100:8": ("fsdp=8", 64, None), "h200:8": ("fsdp=8", 64, None),
    }),
    Stage("stage3_dcl", {
        "v5e:4x4": ("fsdp=2,tensor=8", 128, None), "v5e:8x8": ("fsdp=8,tensor=8", 32, None),
        "v5e:16x16": ("fsdp=64,tensor=4", 4, None), "v6e:8x8": ("fsdp=64", 4, None),
        "v5p:4x4x4": ("fsdp=64", 4, None), "v5p:16x16x24": ("data=24,fsdp=64,tensor=4", 1, 1_536),
        "h100:8": ("fsdp=2,tensor=4", 128, None), "h200:8": ("fsdp=2,tensor=4", 128, None),
    }),
)  # fmt: skip
MACHINES = tuple(STAGES[0].on)


def command(stage: Stage, machine: str) -> list[str]:
    mesh, accumulate, batch = stage.on[machine]
    config = os.path.relpath(ROOT / "configs" / f"{stage.config}.py")
    argv = ["plan", "--topology", machine, "--config", config, "--mesh", mesh, "--accumulate", str(accumulate)]
    return [*argv, *(["--batch", str(batch)] if batch else [])]


def digest(stage: Stage, machine: str) -> str:
    """Of the code and the settings that a step is made of, of its mesh, and of what compiles it."""
    files = [p for name in READ for p in (ROOT / "src" / "hypervl_jax").glob(f"{name}.py")]
    whole = b"".join(p.read_bytes() for p in (*sorted(files), ROOT / "configs" / f"{stage.config}.py"))
    compilers = {k: v for k, v in versions().items() if k in ("jaxlib", "libtpu")}
    return hashlib.sha256(whole + json.dumps([machine, stage.on[machine], compilers]).encode()).hexdigest()[:16]


def ask(argv: list[str], limit: float) -> dict[str, Any]:
    """What `hypervl plan` says: its JSON, or under "refused" why there is none."""
    try:
        whole = [sys.executable, "-m", "hypervl_jax.cli", *argv, "--json"]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"refused": f"not compiled in {limit:g} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [s.removeprefix("hypervl: ") for s in done.stderr.splitlines() if s.startswith("hypervl: ")]
    return {"refused": lines[-1] if lines else f"exit code {done.returncode}"}


def row(stage: Stage, machine: str, found: dict[str, Any]) -> dict[str, Any]:
    """What stands in the table of one step."""
    mesh, accumulate, _ = stage.on[machine]
    told = {"stage": stage.config, "machine": machine, "mesh": mesh, "accumulate": accumulate}
    told |= {"digest": digest(stage, machine), "commit": commit()}
    told["command"] = "hypervl " + " ".join(command(stage, machine))
    if "refused" in found:
        return told | {"refused": found["refused"]}
    chip, devices = CHIPS[machine.split(":")[0]], math.prod(found["mesh"].values())
    best = found["useful"] / devices / chip.flops
    low, high = found["step_seconds"]
    return told | {
        "rows": found["rows"], "tokens": found["length"], "tiles": found["tiles"],
        "memory_gb": found["memory"] / 1e9, "of_gb": chip.memory / 1e9, "state_gb": found["state"] / 1e9,
        "flops": found["flops"], "useful_flops": found["useful"], "received_gb": found["received"] / 1e9,
        "traffic_gb": found["traffic"] / 1e9, "flops_a_byte": found["flops"] / devices / found["traffic"],
        "seconds": found["seconds"], "step_seconds": [low, high], "mfu": [best / high, best / low],
        "tokens_a_day": [found["tokens"] * 86_400 / high, found["tokens"] * 86_400 / low],
        "collectives": found["collectives"],
    }  # fmt: skip


def stands(r: dict[str, Any], digest: str) -> bool:
    """Whether a row is of this code, and what it says is the compiler's answer."""
    return r.get("digest") == digest and ("refused" not in r or "GB" in r["refused"])


def line(r: dict[str, Any]) -> str:
    """A row, as it is printed."""
    head = f"| {r['machine']} | {r['stage']} | {r['mesh']}, {r['accumulate']} |"
    if "refused" in r:
        return f"{head} {r['refused']} | | | |"
    low, high = r["step_seconds"]
    few, many = (t / 1e9 for t in r["tokens_a_day"])
    return (
        f"{head} {r['rows']} x {r['tokens']:,} | {r['memory_gb']:.1f} of {r['of_gb']:.0f} GB | "
        f"{low:.3g} to {high:.3g} s | {few:.3g} to {many:.3g} billion | {r['mfu'][0]:.0%} to {r['mfu'][1]:.0%} |"
    )


def main() -> int:
    def more(parser: Any) -> None:
        parser.add_argument("--only", choices=MACHINES, help="compile for one machine")
        parser.add_argument("--limit", type=float, default=590, help="seconds that one case may take")

    args = arguments(__doc__, more=more)
    path = args.out / "plans-cpu.json"
    known = json.loads(path.read_text())["metrics"]["rows"] if path.exists() else []
    stood = {(r["machine"], r["stage"]): r for r in known}
    for machine in MACHINES[2:3] if args.quick else MACHINES:
        for stage in STAGES[:1] if args.quick else STAGES:
            case = (machine, stage.config)
            if args.only in (None, machine) and not stands(stood.get(case, {}), digest(stage, machine)):
                stood[case] = row(stage, machine, ask(command(stage, machine), args.limit))
                write(stood, args)
            if case in stood:
                print(line(stood[case]), flush=True)
    return write(stood, args)


def write(stood: dict[tuple[str, str], dict[str, Any]], args: Any) -> int:
    """The results file of the rows there are, in the order of the table."""
    rows = [stood[m, s.config] for m in MACHINES for s in STAGES if (m, s.config) in stood]
    fits = [r for r in rows if "refused" not in r]
    bars = [
        Bar(f"{s.config}_machines", len({r["machine"] for r in fits if r["stage"] == s.config}), 3)
        for s in ([] if args.quick else STAGES)
    ]
    return finish("plans", {"rows": rows}, bars, args)


if __name__ == "__main__":
    sys.exit(main())
