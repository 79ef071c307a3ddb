"""What every benchmark shares: its arguments, its bars, its results file, an interval.

args = arguments(__doc__)                        # --quick, --out FOLDER
...
bars = [Bar("serial_flat", 0.99, 0.95)]
sys.exit(finish("tiling_memory", metrics, bars, args, seeds=[0]))
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hypervl_jax.bench import told
from hypervl_jax.needs import DEFAULT

HERE = Path(__file__).parent
PACKAGES = ("hypervl-jax", "jax", "jaxlib", "flax", "optax", "numpy", "litert-converter", "ai-edge-litert", "libtpu")


def arguments(
    doc: str | None,
    argv: Sequence[str] | None = None,
    more: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> argparse.Namespace:
    """--quick (about a minute), --out, and what `more` adds; a quick run writes beside the full results, never over
    them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    more(parser)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, about a minute; no committed file changes")
    parser.add_argument("--out", type=Path, help="folder of the results file (default: benchmarks/results)")
    args = parser.parse_args(argv)
    args.out = args.out or (HERE.parent / ".cache" / "benchmarks" if args.quick else HERE / "results")
    return args


class Bar(NamedTuple):
    """One figure that must hold. `sense` is ">=" or "<="; a figure that is not a number falls short."""

    name: str
    figure: float
    target: float
    sense: str = ">="

    @property
    def ok(self) -> bool:
        return self.figure >= self.target if self.sense == ">=" else self.figure <= self.target

    def __str__(self) -> str:
        return f"bar {self.name}: {self.figure:.4g} {self.sense} {self.target:g} {'ok' if self.ok else 'falls short'}"


def finish(
    topic: str,
    metrics: dict[str, Any],
    bars: Sequence[Bar],
    args: argparse.Namespace,
    seeds: Sequence[int] = (),
) -> int:
    """Writes OUT/TOPIC-MACHINE.json, prints the bars last, returns the exit status: 1 if one falls short."""
    result = {
        "topic": topic,
        "metrics": _finite(metrics),
        "bars": [_finite({**bar._asdict(), "ok": bar.ok}) for bar in bars],
        "quick": args.quick,
        "seeds": list(seeds),
        "command": told(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": machine(),
        "commit": commit(),
        "versions": versions(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{topic}-{result['machine']['kind']}.json"
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"\nwrote {os.path.relpath(path)}")
    for bar in bars:
        print(bar)
    return int(not all(bar.ok for bar in bars))


def once(path: Path, make: Callable[[], Any]) -> Any:
    """JSON that is kept at `path`, made where it is not there: long benchmarks go on where they were interrupted."""
    if not path.exists():
        made = json.dumps(make(), indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(made)
        part.replace(path)
    return json.loads(path.read_text())


def _finite(value: Any) -> Any:
    """`value` with None for every float that JSON cannot hold."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def paired(a: np.ndarray, b: np.ndarray) -> Interval:
    """Mean of a - b over screens both were asked about; the screens are the sample."""
    d = np.asarray(a, float) - np.asarray(b, float)
    half = 1.959964 * d.std(ddof=1) / len(d) ** 0.5 if len(d) > 1 else math.inf
    return Interval(float(d.mean()), float(d.mean() - half), float(d.mean() + half))


def bootstrap(figure: Callable[[np.ndarray], float], n: int, draws: int = 1000, seed: int = 0) -> Interval:
    """`figure(indices)` of n screens, and the middle 95 % of it over `draws` samples of n with replacement."""
    rng = np.random.default_rng(seed)
    found = [figure(rng.integers(0, n, n)) for _ in range(draws)]
    return Interval(float(figure(np.arange(n))), *(float(x) for x in np.nanpercentile(found, (2.5, 97.5))))


def compile_cache() -> None:
    """Keeps compiled programs between runs, where the tests and a fresh clone look too."""
    import jax

    where = os.environ.get("JAX_COMPILATION_CACHE_DIR") or HERE.parent / ".cache" / "jax" / jax.__version__
    jax.config.update("jax_compilation_cache_dir", str(where))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def model_options(parser: argparse.ArgumentParser) -> None:
    """--model and --data."""
    parser.add_argument("--model", help=f"a model folder, or the name of weights that ship (default: {DEFAULT})")
    parser.add_argument("--data", type=Path, default=HERE.parent / "runs" / "data", help="where screens are prepared")


def load_model(name: str | None) -> tuple[Any, str]:
    """(the model, where it was found)."""
    from hypervl_jax import checkpoint

    path = checkpoint.find_model(name or DEFAULT)
    return checkpoint.load_model(path), os.path.relpath(path, HERE.parent)


def machine() -> dict[str, Any]:
    """What kind of machine this is; no names, no addresses. `kind` is "cpu" or the accelerator, fit for a file name."""
    import jax  # here: a benchmark may set JAX's environment after it imports this file

    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else device.device_kind.lower().replace(" ", "-").replace("/", "-")
    out = {"kind": kind, "devices": jax.device_count(), "system": f"{platform.system()} {platform.machine()}"}
    out["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if name := cpu():
        out["cpu"] = name
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        out["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return out


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model and the widest vectors it has, which speeds hang on; "" where Linux does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ""
    said = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = said.get("flags", said.get("Features", "")).split()
    widest = next((f for f in ("amx_int8", "avx512_vnni", "avx512f", "avx_vnni", "avx2", "asimddp") if f in flags), "")
    return ", ".join(filter(None, (said.get("model name", ""), widest)))


def commit() -> str:
    """The commit of the code that ran, "+changes" where the source differs from it."""
    try:
        git = ["git", "-C", str(HERE)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../src", "."]).returncode
        return head + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Python and the packages whose release can move a number; only those installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
