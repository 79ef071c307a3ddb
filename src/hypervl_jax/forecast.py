"""What a training step would take on machines one does not have: compiled ahead of time, run nowhere.

A TPU slice is compiled for by its own compiler (libtpu, on any Linux machine); GPUs and CPUs are stood in for by
devices of this machine's CPU. Memory and collectives are what the compiler says, products what the trace says, times
what both take at the chip's published rates: a roofline, no measurement.

Axes: B rows, N tiles, T tile side, P patches a tile, L sequence, K things.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hypervl_jax import account, mesh, needs, train
from hypervl_jax.account import Collective
from hypervl_jax.chips import CHIPS, TPUS, Chip
from hypervl_jax.config import BRANCHES, Config, ConfigError
from hypervl_jax.data import pipeline
from hypervl_jax.data.pipeline import Batch
from hypervl_jax.mesh import MeshConfig
from hypervl_jax.train import Job

_DAY = 86_400


class Unfit(ValueError):
    """A step that does not fit; the message says by how much, and what to change."""


class Topology(NamedTuple):
    name: str
    chip: Chip | None  # None: devices without figures
    devices: Sequence[Any]


class Forecast(NamedTuple):
    """A step of `cfg`. Bytes and seconds are those of one device."""

    config: str
    topology: str
    mesh: MeshConfig
    job: tuple[str, ...]
    rows: int
    accumulate: int
    length: int
    tiles: int
    state: int  # bytes of parameters and moments
    memory: int  # bytes, all together
    flops: int  # of the whole step, products computed twice counted twice
    useful: int  # of the whole step, each product once
    traffic: int  # bytes to and from memory
    collectives: tuple[Collective, ...]
    chip: Chip | None

    @property
    def tokens(self) -> int:
        """Positions a step reads."""
        return self.rows * self.length

    @property
    def crossing(self) -> float:
        """Bytes received from other devices."""
        return math.fsum(c.received for c in self.collectives)

    @property
    def seconds(self) -> dict[str, float]:
        """How long each takes alone: products, memory traffic, what crosses between devices."""
        if self.chip is None:
            return {}
        return {
            "products": self.flops / self.mesh.devices / self.chip.flops,
            "memory": self.traffic / self.chip.bandwidth,
            "links": self.crossing / self.chip.link,
        }

    @property
    def step(self) -> tuple[float, float]:
        """(seconds if all that goes on at once, seconds if one waits for the other)."""
        return max(self.seconds.values()), sum(self.seconds.values())


def topology(name: str) -> Topology:
    """A TPU slice (v5e:4x4, v5p:4x4x4), or as many simulated devices of a kind (h100:8, cpu:8).

    Raises `UsageError` where JAX's libtpu is not installed, `ConfigError` for what there is no such topology of.
    """
    kind, _, shape = name.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", shape) or kind not in (*CHIPS, "cpu"):
        raise ConfigError(
            f"topology {name!r:.40}: a slice such as v5e:16x16, v6e:8x8 or v5p:4x4x4, or simulated devices such as "
            f"{', '.join(f'{k}:8' for k in CHIPS if k not in TPUS)} or cpu:8"
        )
    if kind in TPUS:
        return Topology(name, CHIPS[kind], _slice(name))
    count, chip = int(np.prod([int(n) for n in shape.split("x")])), CHIPS.get(kind)
    if chip is not None and count > chip.node:
        raise ConfigError(f"topology {name}: figures are those of one node, {kind}:{chip.node} at most")
    with contextlib.suppress(RuntimeError):  # devices are there already, as many as there are
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise ConfigError(f"topology {name}: this process has {len(found)} devices; ask in a new one")
    return Topology(name, chip, found[:count])


def _slice(name: str) -> Sequence[Any]:
    needs.compiler()
    from jax.experimental import topologies

    for variable, value in {  # libtpu would ask a TPU's host for these
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        return topologies.get_topology_desc(name, "tpu").devices
    except Exception as e:  # of many kinds
        raise ConfigError(f"topology {name}: {(str(e).splitlines() or [type(e).__name__])[0]:.200}") from e


def dearest(cfg: Config) -> Job:
    """The step of a schedule that takes most: both branches at once, or Base's, which also reads Large's answers."""
    if cfg.dcl.schedule == "joint":
        return Job(BRANCHES)
    return Job(("base",) if cfg.dcl.weight else ("large",))


def resized(cfg: Config, batch: int | None = None, accumulate: int | None = None) -> Config:
    """The same settings with another batch. Raises `ConfigError` where it cannot be cut into its micro-batches."""
    data, how = cfg.data, cfg.train
    try:
        data = data if batch is None else dataclasses.replace(data, batch=batch)
        how = how if accumulate is None else dataclasses.replace(how, accumulate=accumulate)
        return dataclasses.replace(cfg, data=data, train=how)
    except ValueError as e:
        raise ConfigError(str(e)) from e


def batch_shapes(cfg: Config, bucket: int) -> Batch:
    """A batch of one bucket, as shapes."""
    b, n, l, p = cfg.data.batch, cfg.data.tile_buckets[bucket], cfg.data.lengths[bucket], cfg.model.policy
    things = 2 * (cfg.data.screens.max_things + cfg.data.screens.digits)
    patches = n * p.patches_per_side**2
    kinds = {
        "tiles": ((b, n, p.tile, p.tile, 3), np.uint8), "mask": ((b, n, p.patches_per_side**2), bool),
        "ids": ((b, l), np.int32), "slots": ((b, l), np.int32), "loss": ((b, l), bool),
        "positions": ((b, l), np.int32), "segments": ((b, l), np.int32), "names": ((b, things), np.int32),
        "words": ((b, things, 2), np.int32), "weights": ((b, things, patches), np.float32),
    }  # fmt: skip
    return Batch(**{name: jax.ShapeDtypeStruct(*kind) for name, kind in kinds.items()})


def products(cfg: Config, job: Job, bucket: int) -> tuple[int, int]:
    """FLOPs of a whole step (as it is computed, each product once). Traced, on no device."""
    plain = dataclasses.replace(cfg.train, remat=False, loss_chunk=0, accumulate=1)
    state, batch = jax.eval_shape(lambda: train.init_state(cfg, _classes(cfg))), batch_shapes(cfg, bucket)

    def of(cfg: Config) -> int:
        return account.flops(lambda s, b: train.step_of(cfg)(s, b, cfg, job), state, batch)

    return of(cfg), of(dataclasses.replace(cfg, train=plain))


def forecast(cfg: Config, where: Topology, on: MeshConfig | None = None, bucket: int = -1) -> Forecast:
    """Compiles the dearest step of `cfg` for rows of one bucket (the longest if not said) on the mesh `on` (all devices
    along `fsdp` if not given).

    Raises `Unfit` where it does not fit into memory, `ConfigError` where mesh, devices and batch do not go together.
    """
    on = on or MeshConfig(fsdp=len(where.devices))
    if on.devices != len(where.devices):
        raise ConfigError(f"mesh: {on.devices} devices, {where.name} has {len(where.devices)}")
    mesh.check(cfg, on)
    grid, job = mesh.make(on, where.devices), dearest(cfg)
    state = mesh.shapes(grid, jax.eval_shape(lambda: train.init_state(cfg, _classes(cfg))))
    mine = sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in jax.tree.leaves(state))
    limit = where.chip.memory if where.chip else None
    if limit is not None and mine > limit:
        raise Unfit(f"parameters and moments are {_gb(mine)} of {_gb(limit)} a device: {_cure(cfg, on, mine, limit)}")
    step = jax.jit(train.step_of(cfg), static_argnums=(2, 3, 4), donate_argnums=0)
    lowered = step.lower(state, mesh.row_shapes(grid, batch_shapes(cfg, bucket)), cfg, job, grid)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        said = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", str(e))
        much = f"the step takes {said[1]} of {said[2]} a device" if said else "the step does not fit into a device"
        raise Unfit(f"{much}, {_gb(mine)} of it parameters and moments: {_cure(cfg, on, mine, limit)}") from e
    sizes, program = compiled.memory_analysis(), compiled.as_text()
    if sizes is None or program is None:
        raise RuntimeError(f"{where.name}: the compiler gives no account of what it has made")
    memory = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    memory += sizes.temp_size_in_bytes
    if limit is not None and memory > limit:
        raise Unfit(
            f"the step takes {_gb(memory)} of {_gb(limit)} a device, {_gb(mine)} of it parameters and moments: "
            f"{_cure(cfg, on, mine, limit)}"
        )
    did = account.read(program, on.devices)
    d = cfg.data
    return Forecast(
        cfg.name, where.name, on, job.branches, d.batch, cfg.train.accumulate, d.lengths[bucket],
        d.tile_buckets[bucket], mine, memory, *products(cfg, job, bucket), did.traffic, did.collectives, where.chip,
    )  # fmt: skip


def _classes(cfg: Config) -> int:
    return cfg.data.screens.concepts + len(pipeline.DIGITS)


def _cure(cfg: Config, on: MeshConfig, state: int, limit: float | None) -> str:
    """What to change first."""
    k, rows = cfg.train.accumulate, cfg.data.batch // (on.shards * cfg.train.accumulate)
    if limit is not None and 2 * state > limit:
        return f"spread them over more devices: a mesh with a larger fsdp than {on.fsdp}"
    if rows > 1:
        return f"fewer rows at a time: --accumulate {2 * k} halves the {rows} that a device computes at once"
    if on.fsdp % 2 == 0:
        half = dataclasses.replace(on, fsdp=on.fsdp // 2, tensor=2 * on.tensor)
        return f"a row over more devices: --mesh data={half.data},fsdp={half.fsdp},tensor={half.tensor}"
    return "shorter rows (--bucket), or chips with more memory"


def _gb(size: int | float) -> str:
    return f"{size / 1e9:.2f} GB"


# --- for people ------------------------------------------------------------------------------------------------------


def lines(f: Forecast) -> list[str]:
    """A forecast as lines of text."""
    axes = ", ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(f.mesh).items())
    of = f" of {_gb(f.chip.memory)}" if f.chip else ""
    counts: dict[str, tuple[int, float]] = {}
    for c in f.collectives:
        times, size = counts.get(c.kind, (0, 0.0))
        counts[c.kind] = times + c.times, size + c.received
    crossing = ", ".join(f"{kind} {times} x {_gb(size)}" for kind, (times, size) in sorted(counts.items()))
    intensity = f.flops / f.mesh.devices / max(f.traffic, 1)
    balance = f", the chip's own balance is {f.chip.flops / f.chip.bandwidth:.0f}" if f.chip else ""
    out = [
        f"{f.config} on {f.topology}: {f.mesh.devices} devices, mesh {axes}",
        f"step        {' and '.join(f.job)}: {f.rows} rows of {f.length:,} tokens and {f.tiles} tiles, "
        f"{f.accumulate} micro-batches",
        f"memory      {_gb(f.memory)}{of} a device; parameters and moments {_gb(f.state)}",
        f"products    {f.flops:.3g} FLOPs, {f.useful:.3g} if nothing is computed twice",
        f"traffic     {_gb(f.traffic)} a device; {intensity:.0f} FLOPs a byte{balance}",
        f"received    {_gb(f.crossing)} a device" + (f": {crossing}" if crossing else ""),
    ]
    if f.chip is None:
        return [*out, "            no figures of such devices: no times"]
    low, high = f.step
    each = ", ".join(f"{name} {s:.3g} s" for name, s in f.seconds.items())
    best = f.useful / f.mesh.devices / f.chip.flops
    return [
        *out,
        f"step time   {low:.3g} s if all goes on at once, {high:.3g} s one after another ({each})",
        f"tokens      {f.tokens * _DAY / high / 1e9:.3g} to {f.tokens * _DAY / low / 1e9:.3g} billion a day; "
        f"MFU {best / high:.0%} to {best / low:.0%}",
        f"figures     {f.chip.source}",
    ]


def to_json(f: Forecast) -> str:
    """A forecast as one line of JSON, times with it."""
    values = {k: v for k, v in f._asdict().items() if k not in ("collectives", "chip", "mesh")}
    values |= {"mesh": dataclasses.asdict(f.mesh), "collectives": [c._asdict() for c in f.collectives]}
    values |= {"tokens": f.tokens, "received": f.crossing, "seconds": f.seconds}
    return json.dumps(values | ({"step_seconds": f.step} if f.chip else {}))
