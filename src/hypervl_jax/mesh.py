"""Devices and the processes that share them: a mesh, what of a tree each device holds, and which rows of a batch.

One rule says where a leaf is cut, from the end of its path and its shape. Moments are named as the parameters they are
of, so the rule has their places too. Rows of a batch are spread over the axes `data` and `fsdp`.

Axes of a leaf: layers (whole), O outputs, I inputs, V vocabulary, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hypervl_jax.config import Config, ConfigError

AXES = ("data", "fsdp", "tensor")
_ROWS = PartitionSpec(("data", "fsdp"))
_BY_OUTPUT = ("q", "k", "v", "gate", "up", "fc1")  # heads and hidden units, a part each ...
_BY_INPUT = ("o", "down", "fc2")  # ... and the products that add the parts up
_TABLES = ("embed", "head", "names", "cells", "pos")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis. It says how a step is computed, never what: a run may go on with another."""

    data: int = 1  # rows are spread, parameters repeated
    fsdp: int = 1  # rows are spread, and parameters with their moments (fully sharded data parallelism)
    tensor: int = 1  # heads and hidden units are spread, rows repeated

    def __post_init__(self):
        if small := [f"{axis} {size}" for axis, size in dataclasses.asdict(self).items() if size < 1]:
            raise ConfigError(f"mesh: {', '.join(small)} must be at least 1")

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def shards(self) -> int:
        """Into how many parts the rows of a batch are cut."""
        return self.data * self.fsdp


ONE = MeshConfig()


def parse(text: str) -> MeshConfig:
    """ "data=2,fsdp=4" -> MeshConfig(2, 4). Raises `ConfigError` saying how a mesh is written."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        sizes = {axis.strip(): int(size) for axis, size in pairs}
        if len(sizes) == len(pairs):
            return MeshConfig(**sizes)
    except (ValueError, TypeError) as e:
        if isinstance(e, ConfigError):
            raise
    raise ConfigError(f"mesh {text!r:.60}: write sizes of {', '.join(AXES)}, such as fsdp=8 or data=2,fsdp=4,tensor=2")


def make(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh, of the first of `devices`; of all processes' if not given, and then every process must have a part.

    Raises `ConfigError` where there are fewer devices, or several processes with others than the mesh has.
    """
    found = list(jax.devices() if devices is None else devices)
    short, idle = cfg.devices > len(found), devices is None and jax.process_count() > 1 and cfg.devices < len(found)
    if short or idle:
        sizes = ", ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(cfg).items())
        raise ConfigError(
            f"mesh ({sizes}): that is {cfg.devices} of devices, there are {len(found)}; choose sizes with that product"
        )
    shape = dataclasses.astuple(cfg)
    # Axes may be parts of those that the chips are wired along, such as 2 x 32 of 8 x 8; `jax.make_mesh` refuses that.
    grid = mesh_utils.create_device_mesh(shape, found[: cfg.devices], allow_split_physical_axes=True)
    # Auto axes: the compiler spreads what follows. Flax's norms do not trace under explicit ones.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check(cfg: Config, on: MeshConfig) -> None:
    """Raises `ConfigError` where a batch does not divide into equal micro-batches on all devices."""
    parts = on.shards * cfg.train.accumulate
    if cfg.data.batch % parts:
        raise ConfigError(
            f"data.batch {cfg.data.batch} must be a multiple of {parts}: data {on.data} x fsdp {on.fsdp} of the mesh x "
            f"train.accumulate {cfg.train.accumulate}"
        )


# --- what of a tree is where -----------------------------------------------------------------------------------------


def spec(path: Sequence[str], shape: Sequence[int], on: MeshConfig) -> PartitionSpec:
    """Where a leaf is cut. Matrices and tables are, by their last two axes; vectors and numbers are whole everywhere.

    `tensor` cuts outputs or inputs as the layer's name says. `fsdp` cuts the longest axis that is left and divides;
    of tables of the vocabulary the width, so that looking words up and reading a block of rows cut nothing.
    An axis that does not divide stays whole.
    """
    names = ["", *path]
    matrix = names[-1] == "weight" and "norm" not in names[-2]
    if len(shape) < 2 or not (matrix or names[-1] in _TABLES):
        return PartitionSpec()
    cuts: dict[int, tuple[str, ...]] = {}
    if names[-1] in ("embed", "head"):
        wide = ("fsdp", "tensor") if shape[-1] % (on.fsdp * on.tensor) == 0 else ("fsdp",)
        cuts = {-1: wide} if shape[-1] % on.fsdp == 0 else {}
    else:
        axis = -2 if names[-2] in _BY_OUTPUT else -1 if names[-2] in _BY_INPUT else None
        if axis is not None and shape[axis] % on.tensor == 0:
            cuts[axis] = ("tensor",)
        free = [a for a in (-2, -1) if a not in cuts and shape[a] % on.fsdp == 0]
        if free:
            cuts[max(free, key=lambda a: shape[a])] = ("fsdp",)
    return PartitionSpec(*([None] * (len(shape) - 2)), *(cuts.get(a) for a in (-2, -1)))


def places(mesh: Mesh, tree: Any) -> Any:
    """The same tree of shardings: `spec` of every leaf. Arrays or shapes, of parameters, moments or a whole state."""
    on = MeshConfig(**mesh.shape)

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        return NamedSharding(mesh, spec(names, leaf.shape, on))

    return jax.tree_util.tree_map_with_path(place, tree)


def shapes(mesh: Mesh, tree: Any) -> Any:
    """The same tree as shapes that know their places: what to restore or to compile for."""
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree, places(mesh, tree)
    )


def stay(tree: Any, mesh: Mesh | None) -> Any:
    """In a traced function: the tree where `places` has it, and not where the compiler would rather leave it."""
    return tree if mesh is None or mesh.size == 1 else jax.lax.with_sharding_constraint(tree, places(mesh, tree))


def by_rows(tree: Any, mesh: Mesh | None) -> Any:
    """In a traced function: rows of every array, its first axis, spread as those of a batch. Left to itself the
    compiler may cut activations as it finds tables cut, by their width, and then adds up parts of every product."""
    if mesh is None or mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, _ROWS))


def born(mesh: Mesh, make: Any) -> Any:
    """What `make()` returns, each device making its own part of it: none ever holds the whole."""
    where = places(mesh, jax.eval_shape(make))
    if mesh.size == 1:  # as it is, and not as one program: fusing changes the last bit of a draw
        return jax.device_put(make(), where)
    return jax.jit(make, out_shardings=where)()


def laid(mesh: Mesh, tree: Any, dtype: Any = np.float32) -> Any:
    """Copies of arrays that every process has, each device given its own part."""

    def put(a: Any, place: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(a.shape, place, lambda index: np.array(a[index], dtype))

    return jax.tree.map(put, tree, places(mesh, tree))


def whole(tree: Any) -> Any:
    """Arrays that are spread over devices as numpy arrays, the whole of each in every process; others as they are. All
    processes must ask."""

    def gather(a: Any) -> Any:
        if not isinstance(a, jax.Array) or len(a.devices()) == 1:
            return a
        return np.asarray(a) if a.is_fully_addressable else multihost_utils.process_allgather(a, tiled=True)

    return jax.tree.map(gather, tree)


# --- rows of a batch -------------------------------------------------------------------------------------------------


def rows(mesh: Mesh, batch: int) -> tuple[int, ...]:
    """Which rows of a batch the devices of this process compute: what it has to load, and no more."""
    held = NamedSharding(mesh, _ROWS).addressable_devices_indices_map((batch,)).values()
    return tuple(sorted({i for index in held for i in range(batch)[cast(tuple, index)[0]]}))


def put(mesh: Mesh, some: Any, held: Sequence[int], batch: int) -> Any:
    """The batch of `batch` rows on the mesh, of which this process has those that `rows` told it to have."""
    place, at = NamedSharding(mesh, _ROWS), {row: i for i, row in enumerate(held)}

    def one(a: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            mine = range(batch)[index[0]]
            return a[at[mine[0]] : at[mine[-1]] + 1]

        return jax.make_array_from_callback((batch, *a.shape[1:]), place, part)

    return jax.tree.map(one, some)


def row_shapes(mesh: Mesh, tree: Any) -> Any:
    """Shapes of a batch that know their places."""
    place = NamedSharding(mesh, _ROWS)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)


# --- processes -------------------------------------------------------------------------------------------------------


def start() -> None:
    """Joins the processes of a run; before anything asks for a device. Where JAX_COORDINATOR_ADDRESS (host:port) is
    set, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who this is; Slurm, MPI, Kubernetes and TPU pods are found by JAX
    itself. On a machine alone nothing happens.

    Raises `ConfigError` where the address stands without the two numbers.
    """
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would hear SIGTERM, and nothing would come of it
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        try:
            jax.distributed.initialize()
        except ValueError as e:  # no cluster that JAX knows
            if "coordinator_address" not in str(e):
                raise
        return
    try:
        count, index = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    except (KeyError, ValueError) as e:
        raise ConfigError(
            f"JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers ({e})"
        ) from e
    jax.distributed.initialize(num_processes=count, process_id=index)


def leads() -> bool:
    """Whether this process writes what all of them have found."""
    return jax.process_index() == 0


def leave(code: int, alone: bool) -> None:
    """Ends a process that failed `alone` at once: by default it would wait for the others, who may be waiting for it.
    Where there are no others nothing happens."""
    if alone and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def apart() -> str:
    """What tells names of files from those of the other processes; nothing where there are none."""
    return f"-{jax.process_index()}" if jax.process_count() > 1 else ""


def agree(number: int) -> int:
    """The largest number that any process has. All of them must ask."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


@contextlib.contextmanager
def first(what: str) -> Iterator[None]:
    """One process goes through the block before all others do: they find there what it has written. However long that
    takes: they wait for each other through the coordinator, whose patience is ours, and not on devices."""
    if not leads():
        _meet(what)
    try:
        yield
    finally:
        if leads():
            _meet(what)


def _meet(what: str) -> None:
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost  # JAX has this barrier, but not in public

        multihost.get_barrier_sync_fn()(key=f"hypervl {what} {next(_MEETINGS)}", timeout_ms=30 * 86_400_000)


_MEETINGS = itertools.count()  # a barrier serves once; all processes count alike
