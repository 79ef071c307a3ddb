"""How fast exported files run on this CPU: LiteRT beside JAX, llama.cpp and ONNX Runtime, in one run on the same cores.

  decode    tokens one after another behind 512: JAX and LiteRT in f32, 8 and 4 bits, llama.cpp in f32, Q8_0 and Q4_0
  prefill   512 tokens
  encode    one tile through Base to patch features: JAX and LiteRT in f32 and 8 bits, ONNX Runtime in f32

Sizes, weights and rounds are those of `inference.py`: Qwen3-0.6B with a seventh of its layers and words, SigLIP Base at
512 px with a sixth of its layers. Of LiteRT the file is `export`'s own, and its caches are bound to the same memory on
both sides, as LiteRT-LM binds them; a row of f32 embeddings is looked up by the caller. In 8 and 4 bits LiteRT and
llama.cpp round activations to 8 bits, JAX does not. What is not installed is left out, and it is said: ONNX Runtime
comes with `pip install onnx onnxruntime`, llama.cpp as `llamacpp.py` says. `--quick` takes tiny models.
"""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import Bar, arguments, compile_cache, finish
from inference import KINDS, Decoder, Sizes, beside, close, keep, ratio, rounds, sizes, table, weights

FASTER, NATIVE = 1 / 3, 1.0  # bars: 4 bits over f32 in LiteRT, and over llama.cpp's Q4_0
LITE = ("float32", "int8", "int4", "int4/128", "int4/row")  # of 4 bits: inputs that share a scale, 32 if not said


class Lite:
    """A `.tflite` file in LiteRT, inputs and outputs in memory that stays."""

    def __init__(self, path: Path, threads: int):
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.options import CpuOptions, HardwareAccelerator, Options

        from hypervl_jax.export import lower

        how = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=CpuOptions(num_threads=threads))
        self.bytes = path.stat().st_size
        with lower.without_chatter():
            self.model = CompiledModel.from_file(str(path), options=how)
        self.shapes = lower.inspect(path).signatures
        self.buffers: dict[tuple[str, str, str], Any] = {}

    def __call__(self, signature: str, inputs: dict[str, np.ndarray], shared: dict[str, Any]) -> dict[str, np.ndarray]:
        """Outputs by name, but those that are `shared`: tensors that are read and written where they lie."""
        takes, gives = self.shapes[signature]
        into = {name: shared.get(name) or self.buffer(signature, "in", name) for name in takes}
        out = {name: shared.get(name) or self.buffer(signature, "out", name) for name in gives}
        for name, value in inputs.items():
            into[name].write(value)
        self.model.run_by_name(signature, into, out)
        read = {name: gives[name] for name in gives if name not in shared}
        return {name: out[name].read(int(np.prod(s)), np.dtype(t)).reshape(s) for name, (t, s) in read.items()}

    def buffer(self, signature: str, side: str, name: str) -> Any:
        """The memory of one input ("in") or output ("out")."""
        if (key := (signature, side, name)) not in self.buffers:
            make = self.model.create_input_buffer_by_name if side == "in" else self.model.create_output_buffer_by_name
            self.buffers[key] = make(signature, name)
        return self.buffers[key]


class LiteDecoder:
    """The exported decoder, with a cache of `room` positions."""

    def __init__(self, size: Sizes, params: dict, kind: str, room: int, threads: int, work: Path):
        from hypervl_jax import quantize
        from hypervl_jax.export import parts

        cfg, self.room = size.model, room
        self.table = params["llm"]["embed"]
        name, _, group = kind.partition("/")
        recipe = quantize.decoder4(int(group) if group.isdigit() else None) if group else quantize.RECIPES.get(name, ())
        packed = quantize.quantize({"llm": params["llm"]}, recipe)
        part = parts.decoder(cfg, packed, size.prompts[:1], room)
        self.file = Lite(lowered(part, work / f"decoder-{kind.replace('/', '-')}.tflite"), threads)
        caches = {k: shape for k, (_, shape) in self.file.shapes["decode"][0].items() if k.startswith("kv_cache")}
        self.caches = {k: self.file.buffer("decode", "in", k) for k in caches}
        for name, shape in caches.items():
            self.caches[name].write(np.zeros(shape, np.float32))
        self.at, self.bytes = 0, self.file.bytes

    def _run(self, signature: str, ids: np.ndarray) -> dict[str, np.ndarray]:
        from hypervl_jax.export.runtime import HIDDEN

        positions = np.arange(self.at, self.at + len(ids), dtype=np.int32)
        mask = np.where(np.arange(self.room) <= positions[:, None], np.float32(0), HIDDEN)[None, None]
        self.at += len(ids)
        inputs = {"embeddings": self.table[None, ids], "input_pos": positions, "mask": mask}
        return self.file(signature, inputs, self.caches)

    def prefill(self, ids: np.ndarray) -> None:
        self.at = 0
        self._run(f"prefill_{ids.shape[1]}", ids[0])

    def first(self, ids: np.ndarray) -> np.ndarray:
        """Logits [1 V] of what comes after the ids: the last of them goes through `decode`, which has logits."""
        self.prefill(ids)
        self.at -= 1
        self.logits = self._run("decode", ids[0, -1:])["logits"][0]
        return self.logits

    def decode(self, tokens: int) -> list[int]:
        said = []
        for _ in range(tokens):
            said.append(int(self.logits.argmax()))
            self.logits = self._run("decode", np.array(said[-1:]))["logits"][0]
        return said


def lowered(part: Any, path: Path) -> Path:
    """The file of a part, integers where it has them."""
    from hypervl_jax import quantize
    from hypervl_jax.export import lower, pack

    lower.to_tflite(path, quantize.restored(part.params), part.signatures)
    if matrices := quantize.matrices(part.params):
        pack.pack(path, matrices)
    return path


def decoders(size: Sizes, params: dict, llamacpp: Any, threads: int, work: Path) -> dict[str, Any]:
    """Prefill and decode, every kind of weights in every runtime."""
    n = size.prompts[0]
    room = n + (size.rounds + 2) * size.tokens
    mine = {f"jax {k}": Decoder(size._replace(prompts=(n,)), params, k) for k in KINDS if k != "bfloat16"}
    lite = {f"litert {k}": LiteDecoder(size, params, k, room, threads, work) for k in LITE}
    native = {}
    if llamacpp:
        kinds = ("float32", "q8_0", "q4_0")
        native = {f"llama.cpp {k}": llamacpp.Decoder(size.model.llm, params["llm"], k, room, threads) for k in kinds}
    ids = np.random.default_rng(1).integers(0, size.model.llm.vocab, (1, n)).astype(np.int32)
    want = mine["jax float32"].prefill(ids)
    out: dict[str, Any] = {"bytes": {k: d.bytes for k, d in (mine | lite | native).items()}}
    out["relative_error"] = {"litert float32": close("prefill", lite["litert float32"].first(ids), want, 1e-4, "JAX")}
    order = {"litert float32": lite.pop("litert float32"), **lite, **mine, **native}
    out["prefill"] = rounds({k: lambda d=d: d.prefill(ids) for k, d in order.items()}, size.rounds)
    table(f"prefill {n}", out["prefill"])
    for d in order.values():
        d.first(ids) if isinstance(d, LiteDecoder) else d.prefill(ids)
    said = {k: d.decode(size.tokens) for k, d in order.items()}
    out["same_tokens"] = {k: s == said["jax float32"] for k, s in said.items()}
    out["decode"] = rounds({k: lambda d=d: d.decode(size.tokens) for k, d in order.items()}, size.rounds)
    table("decode, a token", out["decode"], per=size.tokens)
    return out


def encoders(size: Sizes, params: dict, peers: Any, threads: int, work: Path) -> dict[str, Any]:
    """One tile through Base, to patch features."""
    import jax
    import jax.numpy as jnp

    from hypervl_jax import quantize
    from hypervl_jax.export import parts
    from hypervl_jax.export.lower import Signature
    from hypervl_jax.model import hypervl, vit

    cfg, policy = size.model, size.model.policy
    tile = np.random.default_rng(0).random((1, policy.tile, policy.tile, 3), np.float32)
    mask = jnp.ones((1, policy.patches_per_side**2), bool)
    here = keep({"base": params["base"]}, "float32")
    run = jax.jit(lambda p, t, m: hypervl.look(p, cfg, "base", t, m, block=vit.one_tile()))
    calls: dict[str, Callable[[], Any]] = {}
    for kind in ("float32", "int8"):
        packed = quantize.quantize({"base": params["base"]}, quantize.RECIPES.get(kind, ()))
        part = parts.encoder(cfg, packed, "base", masked=False)
        see = lambda p, t: hypervl.look(parts.stacked(p), cfg, "base", t, mask, scan=False)  # noqa: E731
        seen = Signature("look", see, part.signatures[0].args, ("images",), ("features",))
        tree = {"base": {"vit": part.params["base"]["vit"]}}
        file = Lite(lowered(parts.Part(tree, (seen,)), work / f"encoder-{kind}.tflite"), threads)
        calls[f"litert {kind}"] = lambda file=file: file("look", {"images": tile}, {})["features"]
    calls["jax float32"] = lambda: np.asarray(run(here, tile, mask))
    if peers and (other := onnx(peers.Encoder(cfg.base, params["base"]["vit"]), tile, threads, work / "encoder.onnx")):
        calls["onnxruntime float32"] = other
    want = calls["jax float32"]()
    error = {k: close(k, calls[k](), want, 1e-4, "JAX") for k in calls if k.endswith("float32")}
    found = rounds(calls, size.rounds)
    table("encode base", found)
    return {"encode": found, "relative_error": error}


def onnx(encoder: Any, tile: np.ndarray, threads: int, path: Path) -> Callable[[], np.ndarray] | None:
    """transformers' encoder in ONNX Runtime."""
    runtime = beside("onnxruntime", "onnx", "onnxruntime")
    if not runtime:
        return None
    import torch  # type: ignore

    class Features(torch.nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, pixels: Any) -> Any:
            return self.model(pixel_values=pixels * 2 - 1).last_hidden_state

    pixels = tile.transpose(0, 3, 1, 2).copy()
    torch.onnx.export(Features(encoder.model), (torch.from_numpy(pixels),), str(path), dynamo=False, opset_version=17)
    how = runtime.SessionOptions()
    how.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), how, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: pixels})[0]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="cores that all run on (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 for a figure that counts")
    parser.set_defaults(gpu=False)


def main() -> int:
    args = arguments(__doc__, more=options)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = cores[: args.threads or len(cores)]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before JAX starts its threads
    from hypervl_jax import needs
    from hypervl_jax.export import lower

    needs.keep_memory()
    lower.require()
    compile_cache()
    peers, llamacpp = beside("peers", "torch", "transformers"), beside("llamacpp", "llama_cpp", "gguf")
    size = sizes(args)
    params = weights(size)
    metrics: dict[str, Any] = {"threads": len(cores), "rounds": size.rounds}
    with tempfile.TemporaryDirectory() as work:
        metrics |= decoders(size, params, llamacpp, len(cores), Path(work))
        metrics["encoder"] = encoders(size, params, peers, len(cores), Path(work))
    found, seen = metrics["decode"], metrics["encoder"]["encode"]
    bars = [
        Bar("runtimes.int4_decode_over_f32", ratio(found, "litert int4", "litert float32"), FASTER, "<="),
        Bar("runtimes.int8_encode_over_f32", ratio(seen, "litert int8", "litert float32"), 1.0, "<="),
    ]
    if "llama.cpp q4_0" in found:
        q4 = ratio(found, "litert int4", "llama.cpp q4_0")
        bars.append(Bar("runtimes.int4_decode_over_llamacpp", q4, NATIVE, "<="))
    return finish("runtimes", metrics, [] if args.quick else bars, args, seeds=[0, 1])


if __name__ == "__main__":
    sys.exit(main())
