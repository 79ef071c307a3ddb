"""Published weights of the pairs: .npz, .safetensors and PyTorch's .pth, read without running anything in them.

Our parameters have the names of the official repositories, so a file needs no table: kernels turn from PyTorch's order
to ours, and what is left over, missing, misshapen or not finite is an error. A .pth is a pickle; the reader here knows
tensors and plain containers and refuses every other name, so it can build nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypervl_jax.rescale.files import save as save_bytes
from hypervl_jax.rescale.hcflow import HcFlow
from hypervl_jax.rescale.imdn import Imdn
from hypervl_jax.rescale.irn import Irn
from hypervl_jax.rescale.pairs import Network, Pair, Params
from hypervl_jax.tensors import CheckpointError, flatten, header

UNUSED = re.compile(r".*\.haar_weights|.*\.num_batches_tracked|.*(sub|add)_mean\.(weight|bias)")  # constants, counters
NOISE = "noise"  # beside the tensors of IRN: what was drawn as detail when they learnt, where it was not N(0, 1)
WRAPPERS = ("state_dict", "params_ema", "params", "model", "netG")  # keys that training scripts put around weights
LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # magic number and version of files written before PyTorch 1.6
STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
SHIPPED = Path(__file__).parents[1] / "weights" / "rescale"
LIGHT = ("light_x2", "light_x4")  # whose weights are there; scripts/light_pairs.py trains them
LARGEST = 1 << 30  # bytes of a file; the largest pair has 45 million


def load(net: Network, file: Path | str) -> Pair:
    """`net` with the weights of a file, in f32. Raises `CheckpointError` as `read` does, and naming all that does not
    fit the network."""
    return Pair(net, fit(net, read(file), str(file)))


def recognise(file: Path | str) -> Pair:
    """The pair whose weights a file holds, which their names and shapes tell: IRN, FIRN, HCFlow or IMDN of any size.
    Raises `CheckpointError` as `load` does, and for weights of anything else."""
    found = read(file)
    net = _network({k.removeprefix("module."): v.shape for k, v in found.items()}, str(file))
    if isinstance(net, Irn) and NOISE in found:
        net = dataclasses.replace(net, noise=_number(found[NOISE]))
    return Pair(net, fit(net, found, str(file)))


def shipped(name: str = "light_x2") -> Pair:
    """One of the pairs that ship, `LIGHT`. Raises `CheckpointError` for another name."""
    if name not in LIGHT:
        raise CheckpointError(f"{name}: no pair of that name ships; choose {', '.join(LIGHT)}")
    return recognise(SHIPPED / f"{name}.npz")


def save(pair: Pair, file: Path | str, dtype: Any = np.float32) -> None:
    """Writes an .npz that `recognise` reads, whole or not at all: published names, PyTorch's order of axes, and for
    IRN the noise it was taught to bear where that is not the published 1."""
    theirs = {name: _theirs(np.asarray(leaf, dtype)) for name, leaf in flatten(pair.params).items()}
    if isinstance(pair.net, Irn) and pair.net.noise != 1:
        theirs[NOISE] = np.array(pair.net.noise, np.float32)
    data = io.BytesIO()
    np.savez(data, **theirs)  # type: ignore  # no name of a tensor is one of its own
    save_bytes(Path(file), data.getvalue())


def _network(shapes: dict[str, tuple[int, ...]], where: str) -> Network:
    """What there is most to tell by, and no more: `fit` compares the rest."""

    def counted(pattern: str) -> list[int]:
        return sorted({int(m[1]) for name in shapes if (m := re.match(pattern, name))})

    def first(name: str) -> int:
        return next(iter(shapes.get(name, ())), 1)

    if couplings := counted(r"operations\.(\d{1,4})\.F\."):
        blocks = [1]
        for before, at in itertools.pairwise(couplings):  # Haar has a number too: a gap begins a stage
            blocks = [*blocks[:-1], blocks[-1] + 1] if at == before + 1 else [*blocks, 1]
        f = f"operations.{couplings[0]}.F"
        light = f"{f}.c1_d.weight" in shapes
        return Irn(tuple(blocks), "light") if light else Irn(tuple(blocks), growth=first(f"{f}.conv1.weight"))
    if blocks := counted(r"IMDB(\d{1,4})\."):
        return Imdn(math.isqrt(first("upsampler.0.weight") // 3), first("fea_conv.weight"), len(blocks))
    if layers := counted(r"flow\.layers\.(\d{1,4})\.affine\."):
        return HcFlow(len(layers) // 2, len(counted(r"flow\.level0_condFlow\.additional_flow_steps\.(\d{1,4})\.")))
    raise CheckpointError(f"{where}: weights of no pair known by its names (IRN, FIRN, HCFlow, IMDN); check the file")


def fingerprint(pair: Pair) -> str:
    """16 hex digits that tell weights apart: of the network and its numbers in f32, whatever file they came from."""
    digest = hashlib.sha256(repr(pair.net).encode())
    for name, leaf in sorted(flatten(pair.params).items()):
        digest.update(f"{name}{leaf.shape}".encode() + np.asarray(leaf, "<f4").tobytes())
    return digest.hexdigest()[:16]


def fit(net: Network, found: dict[str, np.ndarray], where: str) -> Params:
    """Arrays in PyTorch's layout, by name, as the parameters of `net`."""
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    found = {k.removeprefix("module."): v for k, v in found.items()}
    found = {k: v for k, v in found.items() if not UNUSED.fullmatch(k)}
    wanted = {name: leaf.shape for name, leaf in flatten(shapes).items()}
    wrong = []
    if isinstance(net, Irn) and NOISE in found and (told := _number(found.pop(NOISE))) != np.float32(net.noise):
        wrong.append(f"{NOISE} is {told:g}, not {net.noise:g}")
    wrong += [f"unknown {k}" for k in found.keys() - wanted.keys()]
    wrong += [f"missing {k}" for k in wanted.keys() - found.keys()]
    both = {k: _ours(np.asarray(found[k]), len(wanted[k])) for k in wanted.keys() & found.keys()}
    for k, x in both.items():
        if x.shape != wanted[k]:
            wrong.append(f"{k} is {found[k].shape}, which does not become {wanted[k]}")
        elif not np.isfinite(x).all():
            wrong.append(f"{k} is not finite")
    if wrong:
        more = "; ..." if len(wrong) > 8 else ""
        raise CheckpointError(
            f"{where}: no weights of {net}: {len(wrong)} do not fit: {'; '.join(sorted(wrong)[:8])}{more}"
        )

    def leaf(path: tuple, _: Any) -> jax.Array:
        return jnp.asarray(both[".".join(p.key for p in path)], jnp.float32)

    return jax.tree.map_with_path(leaf, shapes)


def _ours(x: np.ndarray, axes: int) -> np.ndarray:
    """A kernel [... O I K K] as [... K K I O]; a vector [1 C 1 1] as [C]; all else as it is."""
    if axes >= 4 and x.ndim == axes:
        return np.moveaxis(x, (-1, -2, -3, -4), (-3, -4, -2, -1))
    return x.reshape(-1) if axes == 1 and x.size == max(x.shape, default=1) else x


def _theirs(x: np.ndarray) -> np.ndarray:
    """The inverse of `_ours` for kernels."""
    return np.moveaxis(x, (-3, -4, -2, -1), (-1, -2, -3, -4)) if x.ndim >= 4 else x


def _number(x: np.ndarray) -> float:
    """Of an array of one; NaN of any other."""
    return float(x) if x.shape == () and x.dtype.kind == "f" else math.nan


# --- files -----------------------------------------------------------------------------------------------------------


def read(file: Path | str) -> dict[str, np.ndarray]:
    """The arrays of a file by name. Raises `CheckpointError` for one that is missing, empty, damaged, of another kind,
    or that would need more than tensors to be built."""
    file = Path(file)
    readers: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
        ".npz": _npz, ".safetensors": _safetensors, ".pth": _pth, ".pt": _pth
    }  # fmt: skip
    if file.suffix not in readers:
        raise CheckpointError(f"{file}: weights are .npz, .safetensors or .pth")
    try:
        size = file.stat().st_size
        if not 0 < size <= LARGEST:
            raise CheckpointError(f"{file}: {size} bytes are no weights of a pair; download it again")
        return readers[file.suffix](file)
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read ({e.strerror or e}); check the path") from e
    except Exception as e:  # damaged archives and pickles raise anything
        raise CheckpointError(f"{file}: damaged ({e}); download it again") from e


def _npz(file: Path) -> dict[str, np.ndarray]:
    with file.open("rb") as f, np.load(f, allow_pickle=False) as arrays:
        return dict(arrays)


def _safetensors(file: Path) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.map()) for name, tensor in header(file).items()}


class _Storage(NamedTuple):
    dtype: Any
    key: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Knows ordered dictionaries, storages and the two functions that PyTorch rebuilds tensors with."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, stride, *_: _Tensor(
                storage, offset, shape, stride
            ),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights do not need")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, *_ = pid
        if kind != "storage" or dtype not in STORAGES.values() or type(size) is not int or size < 0:
            raise pickle.UnpicklingError("a storage that is none")
        return _Storage(dtype, str(key), size)


def _pth(file: Path) -> dict[str, np.ndarray]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            (root,) = {name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")}
            big = sum(entry.file_size for entry in archive.infolist())
            if big > LARGEST:
                raise ValueError(f"it unpacks to {big} bytes")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise ValueError("numbers in big-endian order")
            tree = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl"))).load()
            return _arrays(tree, lambda storage: archive.read(f"{root}data/{storage.key}"))
    with file.open("rb") as f:
        if tuple(_Unpickler(f).load() for _ in range(2)) != LEGACY:
            raise ValueError("not written by PyTorch")
        if _Unpickler(f).load().get("little_endian") is not True:
            raise ValueError("numbers in big-endian order")
        tree = _Unpickler(f).load()
        held = _storages(f, tree, _Unpickler(f).load())
    return _arrays(tree, lambda storage: held[storage.key])


def _storages(f: BinaryIO, tree: Any, order: list[str]) -> dict[str, bytes]:
    """The storages of an old file, one after another: a count of eight bytes and the numbers."""
    sizes = {t.storage.key: np.dtype(t.storage.dtype).itemsize for t in _weights(tree).values()}
    out = {}
    for key in order:
        n = int.from_bytes(f.read(8), "little")
        out[str(key)] = f.read(n * sizes[str(key)])
    return out


def _weights(tree: Any) -> dict[str, _Tensor]:
    """The dictionary of tensors in what a training script saved."""
    for key in WRAPPERS:
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    if not isinstance(tree, dict) or not tree or not all(isinstance(v, _Tensor) for v in tree.values()):
        raise ValueError("it holds no dictionary of tensors")
    return {str(k): v for k, v in tree.items()}


def _arrays(tree: Any, data: Callable[[_Storage], bytes]) -> dict[str, np.ndarray]:
    out = {}
    for name, t in _weights(tree).items():
        numbers = [t.offset, *t.shape, *t.stride]
        if len(t.shape) != len(t.stride) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{name} cannot have shape {t.shape}")
        flat = np.frombuffer(data(t.storage), t.storage.dtype)
        last = t.offset + sum((n - 1) * s for n, s in zip(t.shape, t.stride, strict=True))
        if math.prod(t.shape) > len(flat) or (math.prod(t.shape) and last >= len(flat)):
            raise ValueError(f"{name} reaches past its numbers")
        strides = [s * flat.itemsize for s in t.stride]
        out[name] = np.lib.stride_tricks.as_strided(flat[t.offset :], t.shape, strides).copy()
    return out
