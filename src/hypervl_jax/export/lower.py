"""A JAX function and its parameters -> a `.tflite` file, and back to numbers through the LiteRT runtime.

`jax.export` writes portable StableHLO and the stand-alone LiteRT converter lowers it; TensorFlow is not involved. This
is the only file that knows the converter's (young) Python interface. Both tools come with the `export` extra and are
imported when they are first needed, so everything else works where they have no wheels; JAX is imported by the writing
half alone, so a host that only runs files needs none.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

DENSE_LIMIT = 1 << 30  # bytes of parameters up to which constants are dense: folded and fused, but copied several times
FOLD_BELOW = 1 << 16  # bytes of a leaf that stays dense even above DENSE_LIMIT: biases and norm gains fuse
Arrays = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)
T = TypeVar("T")
_CHATTER = re.compile(r"(INFO|WARNING)\b|[IW]\d{4} |WARNING: All log messages before|\s*$")  # progress of native code
_WITHOUT = {  # an extra -> what there is without it
    "export": "the converter has wheels for Linux x86-64 and macOS arm64 only, the runtime for more. Everything but "
    "export works here",
    "litertlm": "it writes and asks .litertlm bundles. Everything but bundles works here",
}
_TO_STABLEHLO = "builtin.module(vhlo-legalize-stablehlo,reconcile-unrealized-casts,inline,strip-debuginfo)"


class ExportUnavailable(RuntimeError):
    """The converter or the runtime is not installed here; everything but export works."""


class ExportError(ValueError):
    """A function that cannot be lowered, or a `.tflite` file that cannot be trusted; the message says which and why."""


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """What native code tells of its progress does not reach stderr; lines of any other kind do, when the block ends.

    Should it end the process instead, stderr has where that was, and hypervl-*.log in the folder for temporary files
    what it said.
    """
    sys.stderr.flush()
    with tempfile.NamedTemporaryFile(prefix="hypervl-", suffix=".log") as said, contextlib.ExitStack() as after:
        kept = os.dup(2)
        after.callback(os.close, kept)
        if not faulthandler.is_enabled():
            faulthandler.enable(kept)
            after.callback(faulthandler.disable)
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            said.seek(0)
            for line in said.read().decode(errors="replace").splitlines():
                if not _CHATTER.match(line):
                    print(line, file=sys.stderr)


class Signature(NamedTuple):
    """One entry point of a file: `fn(params, *args)` with a name for every array in `args` and in the result.

    `args` are `jax.ShapeDtypeStruct`s, or trees of them; names follow the order of the leaves.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def extra(module: str, name: str = "export") -> Any:
    """A module of an extra. Raises `ExportUnavailable` where it is not installed."""
    try:
        with contextlib.nullcontext() if module in sys.modules else without_chatter():
            return importlib.import_module(module)
    except ImportError as e:
        absent = (e.name or module).partition(".")[0]
        raise ExportUnavailable(
            f"{absent} is not installed: pip install 'hypervl-jax[{name}]'; {_WITHOUT[name]}."
        ) from e


def require() -> None:
    """Raises `ExportUnavailable` where the converter or the runtime is missing: before work, not after it."""
    extra("litert_converter.mlir._mlir_libs.converter_api_ext")
    extra("ai_edge_litert.interpreter")


# --- writing ---------------------------------------------------------------------------------------------------------


def to_tflite(path: str | Path, params: Any, signatures: Sequence[Signature]) -> list[str]:
    """Write one file with all `signatures` over one copy of `params` and return its operators.

    The functions must have static shapes, no loops (`scan`, `while_loop`: unroll them) and float32 or int32 parameters.
    The file appears whole and checked (`check_ops`) or not at all. Raises `ExportError` naming what cannot be lowered,
    `ExportUnavailable` without the converter.
    """
    import jax

    path = Path(path)
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    leaves = [np.asarray(leaf, order="C") for _, leaf in paths]  # kept alive until written: large ones are not copied
    for (key, _), leaf in zip(paths, leaves, strict=True):
        if leaf.dtype not in (np.float32, np.int32):
            raise ExportError(f"{path.name}: parameter {jax.tree_util.keystr(key)} is {leaf.dtype}; cast it to float32")
    if len({s.name for s in signatures}) != len(signatures) or not signatures:
        raise ExportError(f"{path.name}: needs signatures of distinct names, got {[s.name for s in signatures]}")

    exported = [_trace(path.name, s, tree, leaves) for s in signatures]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with without_chatter():
            _convert(path.name, part, leaves, signatures, exported)
        found = check_ops(part, path.name)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return found


def _trace(file: str, s: Signature, tree: Any, leaves: list[np.ndarray]) -> Any:
    import jax

    spec = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])
    exported = jax.export.export(jax.jit(s.fn, keep_unused=True), platforms=["cpu"])(spec, *s.args)
    for kind, names, avals in (
        ("inputs", s.inputs, jax.tree.leaves(s.args)),
        ("outputs", s.outputs, exported.out_avals),
    ):
        if len(set(names)) != len(names) or len(names) != len(avals):
            raise ExportError(f"{file}: {s.name} has {len(avals)} {kind}, named {list(names)}")
    return exported


def _convert(file: str, part: Path, leaves: list[np.ndarray], signatures: Sequence[Signature], exported: list[Any]):
    converter = extra("litert_converter.mlir._mlir_libs.converter_api_ext")
    ir, passes = extra("litert_converter.mlir.ir"), extra("litert_converter.mlir.passmanager")
    context = ir.Context()
    converter.prepare_mlir_context(context)
    try:
        with context, ir.Location.unknown():
            constants = _constants(ir, leaves)
            modules = [_module(file, ir, passes, s, e, constants) for s, e in zip(signatures, exported, strict=True)]
            for s, module in zip(signatures, modules, strict=True):
                converter.set_signature(
                    module.operation,
                    signature_name=s.name,
                    input_names=list(s.inputs),
                    output_names=list(s.outputs),
                )
            settings = converter.ConvertToTFLConfig()
            settings.enable_x64 = False
            settings.canonicalizing_inf_as_min_max_float = False
            merged = converter.merge_modules(modules)
            converter.run_convert_to_tfl_passes(merged, passes.PassManager(), settings)
            converter.export_flatbuffer_to_file(merged.operation, str(part))
    except ExportError:
        raise
    except Exception as e:  # the converter raises several kinds, some without a word
        raise ExportError(f"{file}: the converter refused it: {str(e).strip() or 'no reason given'}") from e


def _module(file: str, ir: Any, passes: Any, s: Signature, exported: Any, constants: list[tuple[Any, Any]]) -> Any:
    module = ir.Module.parse(exported.mlir_module_serialized)
    passes.PassManager.parse(_TO_STABLEHLO).run(module.operation)
    if never := sorted({"stablehlo.while", "stablehlo.sort"} & _operations(ir, module)):
        raise ExportError(f"{file}: {s.name} contains {', '.join(never)}, which the runtime cannot run; unroll it")
    _bind(ir, module, constants)
    return module


def _constants(ir: Any, leaves: list[np.ndarray]) -> list[tuple[Any, Any]]:
    """(type, attribute) of each parameter, made once: signatures that share an attribute share bytes in the file."""
    dense = sum(x.nbytes for x in leaves) <= DENSE_LIMIT
    kinds = {"float32": ir.F32Type.get(), "int32": ir.IntegerType.get_signless(32)}
    out = []
    for i, leaf in enumerate(leaves):
        kind = ir.RankedTensorType.get(leaf.shape, kinds[str(leaf.dtype)])
        if dense or leaf.nbytes < FOLD_BELOW:
            out.append((kind, ir.DenseElementsAttr.get(leaf, type=kind)))
        else:  # no copies, but nothing folds through: weights must already be [out, in]
            out.append((kind, ir.DenseResourceElementsAttr.get_from_buffer(leaf.data, f"w{i}", kind)))
    return out


def _bind(ir: Any, module: Any, constants: list[tuple[Any, Any]]) -> None:
    """Replace the first arguments of `main`, the parameters, by constants."""
    arith, func = extra("litert_converter.mlir.dialects.arith"), extra("litert_converter.mlir.dialects.func")
    main = next(
        o
        for o in module.body.operations
        if isinstance(o, func.FuncOp) and ir.StringAttr(o.attributes["sym_name"]).value == "main"
    )
    block, n = main.entry_block, len(constants)
    with ir.InsertionPoint.at_block_begin(block):
        for argument, constant in zip(list(block.arguments)[:n], constants, strict=True):
            argument.replace_all_uses_with(arith.ConstantOp(*constant).results[0])
    for i in reversed(range(n)):
        block.erase_argument(i)
    kind = ir.FunctionType.get(list(main.type.inputs)[n:], list(main.type.results))
    main.attributes["function_type"] = ir.TypeAttr.get(kind)
    for name in ("arg_attrs", "res_attrs"):  # they still count the parameters
        if name in main.attributes:
            del main.attributes[name]


def _operations(ir: Any, module: Any) -> set[str]:
    names: set[str] = set()

    def visit(op: Any):
        names.add(op.operation.name)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return names


# --- reading ---------------------------------------------------------------------------------------------------------


class Contents(NamedTuple):
    """What a file says of itself: operators, and dtype and shape of each signature's inputs and outputs by name."""

    ops: list[str]
    signatures: dict[str, tuple[Arrays, Arrays]]
    min_runtime: str


def inspect(path: str | Path, name: str | None = None) -> Contents:
    """Read a file without running it. Raises `ExportError` for one that is not whole (called `name`, if given)."""
    return parsed(path, contents, name)


def parsed(path: str | Path, read: Callable[[Any, np.ndarray], T], name: str | None = None) -> T:
    """What `read` makes of a file, given its unpacked model and its bytes. Raises `ExportError` where that fails.

    The whole model is unpacked, every offset checked, before anything native maps the file.
    """
    path, name = Path(path), name or str(path)
    if not path.is_file():
        raise ExportError(f"{name}: no such file")
    size = path.stat().st_size
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    if data[4:8].tobytes() != b"TFL3":
        raise ExportError(f"{name}: not a .tflite file; export again")
    schema = extra("ai_edge_litert.schema_py_generated")
    try:
        model = schema.ModelT.InitFromPackedBuf(data)
        if max(b.offset + b.size for b in model.buffers) > size:  # large buffers lie behind the tables
            raise ValueError("buffers outside the file")
        return read(model, data)
    except ExportError:
        raise
    except Exception as e:  # whatever reading nonsense raises: struct.error, ValueError, IndexError, TypeError ...
        raise ExportError(f"{name}: truncated or damaged .tflite file of {size} bytes; export again") from e


def contents(model: Any, data: np.ndarray) -> Contents:
    """What an unpacked model says of itself, for `parsed`."""
    signatures = {}
    for s in model.signatureDefs or ():
        tensors = model.subgraphs[s.subgraphIndex].tensors
        signatures[s.signatureKey.decode()] = (_arrays(s.inputs, tensors), _arrays(s.outputs, tensors))
    versions = [model.buffers[m.buffer] for m in model.metadata or () if m.name == b"min_runtime_version"]
    version = versions[0].data.tobytes().rstrip(b"\0").decode() if versions else ""
    return Contents(_op_names(model), signatures, version)


def _arrays(maps: Any, tensors: Any) -> Arrays:
    types = {v: k.lower() for k, v in vars(extra("ai_edge_litert.schema_py_generated").TensorType).items()}
    found = ((m.name.decode(), tensors[m.tensorIndex]) for m in maps or ())
    return {name: (types[t.type], tuple(int(n) for n in (() if t.shape is None else t.shape))) for name, t in found}


def _op_names(model: Any) -> list[str]:
    used = {op.opcodeIndex for graph in model.subgraphs for op in graph.operators or ()}
    return sorted({op_name(model, index) for index in used})


def op_name(model: Any, index: int) -> str:
    """The name of an operator code of an unpacked model."""
    operators = vars(extra("ai_edge_litert.schema_py_generated").BuiltinOperator)
    names = {code: name for name, code in operators.items() if isinstance(code, int)}
    kind = model.operatorCodes[index]
    code = max(kind.builtinCode, kind.deprecatedBuiltinCode)  # small codes are written in the old field
    return f"CUSTOM {kind.customCode!r}" if kind.customCode else names.get(code, f"UNKNOWN {code}")


def ops(path: str | Path) -> list[str]:
    """The operators a file uses, sorted, each once. Raises `ExportError` for a file that is not whole."""
    return inspect(path).ops


def check_ops(path: str | Path, name: str | None = None) -> list[str]:
    """`ops(path)`, all of them with a kernel in the plain runtime; raises `ExportError` naming those that have none."""
    found = inspect(path, name).ops
    if bad := without_kernel(found):
        raise ExportError(f"{name or path}: operators without a kernel on phones: {', '.join(bad)}")
    return found


def without_kernel(ops: Sequence[str]) -> list[str]:
    """Those of the operators that the plain runtime does not have."""
    return [op for op in ops if _needs_more(op)]


def _needs_more(op: str) -> bool:
    return op.startswith(("CUSTOM", "FLEX", "UNKNOWN", "DELEGATE")) or (
        op.startswith("STABLEHLO_") and op != "STABLEHLO_COMPOSITE"
    )


# --- running ---------------------------------------------------------------------------------------------------------


def cores() -> int:
    """Cores that this process may use, 8 at most: a token has not work for more."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class Runner:
    """A loaded file. `runner(signature, inputs)` runs one entry point; loading happens once. `threads` are `cores()` if
    None: the runtime's own choice is one.

    Raises `ExportError` for a file that is not whole, a signature it lacks, and inputs that do not fit it.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        self.path = Path(path)
        self._expected = {k: inputs for k, (inputs, _) in inspect(self.path).signatures.items()}
        interpreter = extra("ai_edge_litert.interpreter").Interpreter
        try:
            with without_chatter():
                self._interpreter = interpreter(model_path=str(self.path), num_threads=threads or cores())
                self._runners = {name: self._interpreter.get_signature_runner(name) for name in self._expected}
            self._fresh = True  # weights are packed when it first runs
        except (RuntimeError, ValueError) as e:
            raise ExportError(f"{self.path}: the runtime cannot load it: {e}") from e

    def __call__(self, signature: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs by name; `inputs` by name, of exactly the exported shapes and dtypes."""
        if signature not in self._runners:
            raise ExportError(f"{self.path}: no signature {signature!r}; it has {', '.join(self._runners)}")
        arrays = {k: np.asarray(v, order="C") for k, v in inputs.items()}
        given = {k: (str(v.dtype), v.shape) for k, v in arrays.items()}
        expected = self._expected[signature]
        if given != expected:
            raise ExportError(f"{self.path}: {signature} takes {_show(expected)}; it was given {_show(given)}")
        try:
            with without_chatter() if self._fresh else contextlib.nullcontext():
                out = self._runners[signature](**arrays)
            self._fresh = False
            return out
        except (RuntimeError, ValueError) as e:
            raise ExportError(f"{self.path}: {signature} cannot run: {e}") from e


def _show(arrays: Arrays) -> str:
    return ", ".join(f"{k} {dtype}[{' '.join(map(str, shape))}]" for k, (dtype, shape) in sorted(arrays.items()))


def run(path: str | Path, signature: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Load `path`, run one signature once; keep a `Runner` to run it again."""
    return Runner(path)(signature, inputs)
