"""Saving and loading: a model directory in the layout of Hugging Face (safetensors + JSON + tokenizer, what `ask`,
`eval` and `export` read) and training checkpoints (Orbax, what `train` resumes from)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import reprlib
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypervl_jax import __version__, config, layouts, mesh, quantize, tensors
from hypervl_jax.config import ModelConfig
from hypervl_jax.layouts import CONFIG, TOKENIZER
from hypervl_jax.tensors import CheckpointError, flatten
from hypervl_jax.tokens import Tokenizer

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart
    fcntl = None

FORMAT = 2
MENDED = (MemoryError, RuntimeError, PermissionError)  # errors of reading that are not damage
SHIPPED = Path(__file__).parent / "weights"


class Model(NamedTuple):
    """A model directory in memory. `info` is what training wrote beside it."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer
    info: dict[str, Any]


def expected(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a model."""
    from hypervl_jax.model import hypervl

    shapes = jax.eval_shape(lambda k: hypervl.init(k, cfg), jax.random.key(0))
    return {name: tuple(leaf.shape) for name, leaf in flatten(shapes).items()}


@contextlib.contextmanager
def replacing(out: Path | str) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `out` if the block ends without an error. Otherwise `out`
    stays as it was. An empty `out` is filled where it is: it may be the folder someone works in."""
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    box = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))  # of a name that is nobody else's
    new, old = box / "new", box / "old"
    try:
        new.mkdir()
        yield new
        if out.is_dir() and not any(out.iterdir()):
            for file in sorted(new.iterdir()):
                os.replace(file, out / file.name)
        else:
            if out.exists():
                os.replace(out, old)
            os.replace(new, out)
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        shutil.rmtree(box, ignore_errors=True)


def save_model(
    path: Path | str,
    cfg: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    info: dict | None = None,
    dtype: Any = np.float32,
) -> Path:
    """Writes a model directory, whole or not at all, with weights in `dtype` (f32, f16, bf16; None: each as it is).

    Raises `CheckpointError` naming weights that are not finite, or not in `dtype`, or of 8 or 4 bits.
    """
    if quantize.is_quantized(params):
        raise CheckpointError(f"{path}: weights in 8 or 4 bits are not saved; load the model as it is and save that")
    path, paths = Path(path), flatten(params)
    values = {"format": FORMAT, "version": __version__, "model": config.to_dict(cfg), "info": info or {}}
    with replacing(path) as new:
        tensors.write(new, params, layouts.hypervl(cfg, paths), dtype)
        layouts.write_json(new / CONFIG, {"model_type": "hypervl"} | values)
        layouts.write_text_files(new, tokenizer, cfg.text)
        layouts.write_image_files(new, cfg.policy.tile)
    return path


def find_model(name: Path | str) -> Path:
    """A model directory, by path or by the name of weights that ship. Raises `CheckpointError` with what there is."""
    path = Path(name)
    for p in (path / "model", path, SHIPPED / str(name)):
        if (p / CONFIG).is_file() and not _is_run(p):
            return p
    if (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path}: a run that has not made its model yet; give the command that began it once more"
        )
    shipped = ", ".join(sorted(p.name for p in SHIPPED.glob("*") if (p / CONFIG).is_file())) or "none"
    what = "has no config.json" if path.exists() else "does not exist"
    raise CheckpointError(f"{path}: {what}; give a model directory or the name of shipped weights ({shipped})")


def _is_run(path: Path) -> bool:
    """Whether the config.json of a folder is that of a training run, whose model comes last and in a folder below."""
    try:
        return "train" in json.loads((path / CONFIG).read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def load_model(
    name: Path | str, dtype: Any = np.float32, shardings: dict | None = None, only: Sequence[str] = ()
) -> Model:
    """Reads a model directory, strict: unknown, missing, misshapen and non-finite weights are reported together.

    `dtype` and `shardings` are those of `tensors.read`; "int8" and "int4" are those of `quantize.py`, tensor by tensor
    as they are read, everything that is no matrix in f32. With `only` no more is read than the weights whose paths
    begin so, such as "llm.", and nothing is said of the others.
    Raises `CheckpointError`, `ConfigError` or `TextError` naming the file that does not fit.
    """
    path = find_model(name)
    cfg, info = _described(path)
    want = expected(cfg)
    recipe = quantize.RECIPES.get(dtype) if isinstance(dtype, str) else None
    if recipe is not None and shardings is not None:
        raise ValueError(f"{dtype} weights are read onto one device: leave out shardings")
    pack, dtype = (quantize.packer(recipe), np.float32) if recipe is not None else (None, dtype)
    table = layouts.hypervl(cfg, want)
    if only:
        want = {k: shape for k, shape in want.items() if k.startswith(tuple(only))}
        table = tensors.Table(tuple(row for row in table.rows if row.path in want), ((".*", "not asked for"),))
    params, _ = tensors.read(path, table, want, dtype, shardings, pack)
    return Model(cfg, params, Tokenizer.load(path / TOKENIZER), info)


def load_config(name: Path | str) -> ModelConfig:
    """The settings of a model directory without its weights. Raises as `load_model` does."""
    return _described(find_model(name))[0]


def _described(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """What the config.json of a model says."""
    where = path / CONFIG
    try:
        values = json.loads(where.read_text())
        kind = values.get("model_type", "hypervl")
        if kind != "hypervl":
            raise CheckpointError(f"{where}: {kind!r:.40} is a part of a model; put one together with hypervl convert")
        written, model, info = values["format"], values["model"], values.get("info", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{where}: not a model config ({type(e).__name__}: {e})") from e
    if written != FORMAT:
        raise CheckpointError(f"{where}: not a model of format {FORMAT}; take the version of hypervl-jax that wrote it")
    cfg = config.from_dict(ModelConfig, model, f"{where}: model")
    scale = info.get("vrc_scale", 1.0) if isinstance(info, dict) else 0
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise CheckpointError(f"{where}: info: expected a table, its vrc_scale above 0, found {reprlib.repr(info)}")
    return cfg, info


class Checkpoints:
    """Training state on disk, a step a directory, written in the background and atomically, with sums of every leaf
    that tell damage. The last `keep` stay, and the one of least loss. The folder is this object's alone until `close`:
    raises `CheckpointError` where another one, of whatever process, has it open.

    The processes of one run call every method together. Each writes and reads the parts that its devices hold; the
    first one has the folder for all of them, names what is finished and removes what is old.
    """

    def __init__(self, path: Path | str, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.path = Path(path).absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        self._unlock = _lock(self, self.path) if mesh.leads() else lambda: None
        self._loss: dict[int, float] = {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Keep(keep, self._loss), cleanup_tmp_directories=True, lightweight_initialize=True
        )
        self._handler = ocp.StandardCheckpointHandler()
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=self._handler)
        for step in self._manager.all_steps():
            with contextlib.suppress(CheckpointError):
                self._note(step, self.about(step))

    def _note(self, step: int, about: dict) -> None:
        if (loss := about.get("loss")) is not None:
            self._loss[step] = loss

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step of least loss of those that are here."""
        return min((s for s in self._manager.all_steps() if s in self._loss), key=self._loss.__getitem__, default=None)

    def save(self, step: int, state: Any, about: dict[str, Any] | None = None) -> None:
        """Begins to write a state; returns when its buffers may be given away. `about` is told of it, as JSON; its
        `loss`, if it has one, says which checkpoint is best.

        Raises `CheckpointError` naming leaves that are not finite, in which case nothing is written, and where this
        or the checkpoint before could not be written.
        """
        seen = jax.device_get(_survey(flatten_paths(state)))
        if bad := sorted(name for name, (_, finite) in seen.items() if not finite):
            more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
            raise CheckpointError(
                f"{self.path / str(step)}: not finite: {', '.join(bad[:4])}{more}; it is not written, what was saved "
                "before stays"
            )
        sums = {name: [int(x) for x in both] for name, (both, _) in seen.items()}
        sealed = _sealed({**(about or {}), "sums": sums})
        self._note(step, sealed)
        if jax.default_backend() == "cpu":  # where what is written would be the buffers that the next step is given
            state = jax.tree.map(jnp.copy, state)
        try:
            self._manager.save(step, args=self._ocp.args.StandardSave(state), custom_metadata=sealed)
        except Exception as e:  # also of the one before, which was written meanwhile
            raise _unwritten(self.path, e) from e

    def about(self, step: int) -> dict[str, Any]:
        """What was told of a checkpoint; empty of one that an older version has written. Raises `CheckpointError` where
        that is damaged."""
        path = self.path / str(step) / "_CHECKPOINT_METADATA"
        try:
            found = json.loads(path.read_text())["custom_metadata"] or {}
            if found and found != _sealed({k: v for k, v in found.items() if k != "seal"}):
                raise ValueError("does not match its seal")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise CheckpointError(f"{path.name}: {e}") from e
        return found

    def restore(self, like: Any) -> Any:
        """The latest state that is whole, in the shapes, dtypes and places of `like`; where it says no place, on the
        first device, wherever the state was written. Damaged ones that are younger are told of on stderr and set aside.
        Raises `CheckpointError` if it does not fit or if none is whole."""
        self._manager.wait_until_finished()
        if self.latest() is None:
            raise CheckpointError(f"{self.path}: no checkpoint to resume from")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def placed(x: Any) -> Any:
            bare = isinstance(x, jax.ShapeDtypeStruct) and x.sharding is None
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) if bare else x

        damaged: list[tuple[int, Exception]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._read(step, jax.tree.map(placed, like))
            except Exception as e:  # Orbax raises many kinds
                said = f"{self.path / str(step)}: cannot be resumed ({_first_line(e)})"
                if self._other(step, like):
                    cure = "it is of other settings or another version: resume with those, or choose another --out"
                    raise CheckpointError(f"{said}; {cure}") from e
                if isinstance(e, MENDED):
                    cure = "mend that and resume again: the checkpoint itself may be whole"
                    raise CheckpointError(f"{said}; {cure}") from e
                damaged.append((step, e))
                continue
            for late, e in reversed(damaged):
                self._set_aside(late, f"damaged ({_first_line(e)})", step)
            return state
        step, e = damaged[0]
        cure = "delete that folder to fall back to the step before, or start anew with another --out"
        if len(damaged) > 1:
            cure = f"so are {len(damaged) - 1} more, and none is whole: start anew with another --out"
        raise CheckpointError(f"{self.path / str(step)}: cannot be resumed ({_first_line(e)}); {cure}") from e

    def _read(self, step: int, like: Any) -> Any:
        """One state. Raises `CheckpointError` for one that is not as it was, and whatever Orbax raises; in all
        processes, where it is so in one."""
        sums, state, failed = None, None, None
        try:
            sums = self.about(step).get("sums")
            # Not by the manager: it would wait for a process that could not read its part.
            folder: Any = self.path / str(step) / "default"
            state = self._handler.restore(folder, args=self._ocp.args.StandardRestore(like))
        except Exception as e:  # of many kinds
            failed = e
        worst = mesh.agree(0 if failed is None else 2 if isinstance(failed, MENDED) else 1)
        if worst == 2 and not isinstance(failed, MENDED):
            failed = RuntimeError("another process could not read its part")
        elif worst and failed is None:
            failed = CheckpointError("the part of another process is damaged")
        if failed is not None:
            raise failed
        if sums is not None:  # otherwise of an older version
            seen = jax.device_get(_survey(flatten_paths(state)))
            wrong = sorted(name for name, (both, _) in seen.items() if sums.get(name) != [int(x) for x in both])
            if wrong:
                raise CheckpointError(f"{len(wrong)} of {len(seen)} leaves are not as they were written: {wrong[0]}")
        return state

    def _set_aside(self, step: int, why: str, instead: int) -> None:
        """Gives a damaged checkpoint another name, so that its step can be written anew, and says so."""
        with mesh.first("damaged"):
            if mesh.leads():
                names = (self.path / f"damaged-{step}{'-' * bool(n)}{n or ''}" for n in range(1000))
                aside = next(name for name in names if not name.exists())
                os.replace(self.path / str(step), aside)
                told = f"{self.path / str(step)}: {why}, now {aside.name}; going on from step {instead}"
                print(told, file=sys.stderr)
        self._loss.pop(step, None)
        self._manager.reload()

    def _other(self, step: int, like: Any) -> bool:
        """Whether what a checkpoint says of itself can be read, and is not `like`."""
        try:
            return _shapes(self._manager.item_metadata(step).tree) != _shapes(like)
        except Exception:  # of many kinds, all of which say damaged; the caller has the first error and tells it
            return False

    def close(self) -> None:
        """Waits until everything is on disk. Raises `CheckpointError` where that fails."""
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except Exception as e:
            raise _unwritten(self.path, e) from e
        finally:
            self._unlock()


class _Keep:
    """Which checkpoints stay: the last `last`, and the best."""

    def __init__(self, last: int, loss: dict[int, float]):
        self.last, self.loss = last, loss

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [c.step for c in checkpoints]
        best = min((s for s in steps if s in self.loss), key=self.loss.__getitem__, default=None)
        return [i >= len(steps) - self.last or s == best for i, s in enumerate(steps)]


@jax.jit
def _survey(leaves: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Two sums of each leaf that tell it from one with any other bits, u32[2], and whether it is finite. The same on
    whatever devices a leaf lies and in however many pieces: integers wrap around, so their order does not matter."""

    def one(a: Any) -> tuple[Any, Any]:
        floats = jnp.issubdtype(a.dtype, jnp.floating)
        finite = jnp.isfinite(a).all() if floats else jnp.bool_(True)
        bits = jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}") if floats else a
        x, at, stride = bits.astype(jnp.uint32), jnp.zeros(a.shape, jnp.uint32), 1
        for axis in reversed(range(a.ndim)):
            at += jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis) * np.uint32(stride % 2**32)
            stride *= a.shape[axis]
        odd = (2 * at + 1, at * np.uint32(2654435761) | 1)  # one word that changes changes both sums
        return jnp.stack([(x * w).sum(dtype=jnp.uint32) for w in odd]), finite

    return {name: one(a) for name, a in leaves.items()}


def flatten_paths(tree: Any) -> dict[str, Any]:
    """Every leaf under its dotted path, `params.llm.embed`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _sealed(values: dict[str, Any]) -> dict[str, Any]:
    values = json.loads(json.dumps(values))
    return {**values, "seal": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}


def _first_line(e: Exception) -> str:
    line = (str(e).splitlines() or [""])[0]
    return line if isinstance(e, CheckpointError) else f"{type(e).__name__}: {line}"


def _unwritten(path: Path, e: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: a checkpoint could not be written ({_first_line(e)}); those before it stay")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in flatten_paths(tree).items()}


def _lock(owner: Any, path: Path) -> Callable[[], Any]:
    """Keeps others out of a folder until what it returns is called, or `owner` or the process is gone."""
    if fcntl is None:
        return lambda: None
    handle = os.open(path, os.O_RDONLY)
    unlock = weakref.finalize(owner, os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        unlock()
        raise CheckpointError(
            f"{path}: another run is writing there; wait until it ends, or choose another --out"
        ) from e
    except OSError:  # a file system without locks
        pass
    return unlock
