"""How fast a picture is encoded and an answer made: this library, transformers in torch and llama.cpp, in one run.

  encode    one tile through either branch, to patch features
  prefill   512 and 2,048 tokens in one program
  decode    tokens one after another behind 512; weights in f32 and bf16, here and in llama.cpp also in 8 and 4 bits
  picture   time to the first token about a square picture of 256 to 2,048 pixels: tiles through Base, then the prompt

All run on the same cores, from the same weights and in the same dtype, one call of each after the other in every round;
a figure is the median over the rounds, of ratios as of times. The process keeps its memory, as the commands do
(`needs.keep_memory`), whoever takes it. That they compute the same is checked first. What is not installed is left out,
and it is said; llama.cpp is there for the decoder on a CPU.

On a CPU models keep a sixth of their layers (SigLIP Base and Large at 512 px) or a seventh of them and of the
vocabulary (Qwen3-0.6B). `--gpu` takes the whole of `configs/hypervl_1p7b.py` in bf16, and compares
with what a plain copy and a plain product reach on the same device. `--quick` takes tiny models. Accuracy: how many
answers of nano stay the same in narrow weights.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

from common import Bar, arguments, compile_cache, finish

KINDS = ("float32", "bfloat16", "int8", "int4")
ENCODE, READ, DECODE, EIGHT_BITS, MEMORY = 1.1, 1.1, 0.55, 1.0, 0.27  # bars, of time and of bytes
ALIKE = {"float32": 1e-4, "bfloat16": 0.1}  # how far both sides may differ, of the largest value
PAUSE = 0.02  # seconds before a call: threads of OpenMP, torch's and llama.cpp's, spin for milliseconds after theirs


class Sizes(NamedTuple):
    """What is measured."""

    model: Any  # ModelConfig
    dtype: str  # of both sides
    prompts: tuple[int, ...]
    tokens: int  # said a round
    sides: tuple[int, ...]  # pixels of the pictures
    rounds: int


def sizes(args: Namespace) -> Sizes:
    from hypervl_jax import presets

    if args.quick:
        return Sizes(presets.tiny().model, "float32", (16, 64), 4, (32, 96), 3)
    paper = presets.hypervl_1p7b().model
    if args.gpu:
        return Sizes(paper, "bfloat16", (512, 2048), 32, (256, 512, 1024, 2048), 7)
    part, llm = dataclasses.replace, paper.llm
    llm = part(llm, width=1024, mlp=3072, vocab=llm.vocab // 7, depth=4)
    encoders = {b: part(paper.vit(b), depth=paper.vit(b).depth // 6) for b in ("base", "large")}
    return Sizes(part(paper, **encoders, llm=llm), "float32", (512, 2048), 8, (256, 512, 1024, 2048), args.rounds)


# --- time ------------------------------------------------------------------------------------------------------------


def rounds(calls: dict[str, Callable[[], object]], n: int) -> dict[str, dict[str, float]]:
    """Each call once a round, one after the other: {name: {"seconds", "cpu_seconds", and "over_first",
    "cpu_over_first", its ratio to the first call of the same round}}, medians. One round before is not counted, and no
    call begins before the threads of the last one sleep."""
    import numpy as np

    wall, cpu = np.zeros((n + 1, len(calls))), np.zeros((n + 1, len(calls)))
    for r in range(n + 1):
        for i, call in enumerate(calls.values()):
            time.sleep(PAUSE)
            w, c = time.perf_counter(), time.process_time()
            call()
            wall[r, i], cpu[r, i] = time.perf_counter() - w, time.process_time() - c
    wall, cpu = wall[1:], cpu[1:]
    return {
        name: {
            "seconds": float(np.median(wall[:, i])),
            "cpu_seconds": float(np.median(cpu[:, i])),
            "over_first": float(np.median(wall[:, i] / wall[:, 0])),
            "cpu_over_first": float(np.median(cpu[:, i] / cpu[:, 0])),
        }
        for i, name in enumerate(calls)
    }


def table(what: str, found: dict[str, dict[str, float]], per: int = 1) -> None:
    for name, row in found.items():
        wall, cpu = (1e3 * row[key] / per for key in ("seconds", "cpu_seconds"))
        print(f"{what:16s} {name:18s} {wall:10.2f} ms x {row['over_first']:5.2f}   "
              f"CPU time {cpu:10.2f} ms x {row['cpu_over_first']:5.2f}", flush=True)  # fmt: skip


def close(what: str, ours: Any, theirs: Any, tolerance: float, whose: str = "torch") -> float:
    """The largest difference over the largest value. Ends the run where both do not compute the same."""
    import numpy as np

    theirs = np.asarray(theirs.float().cpu() if hasattr(theirs, "cpu") else theirs)
    error = float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())
    if not error <= tolerance:
        sys.exit(f"{what}: {error:.1e} from {whose}, more than {tolerance:g}: nothing to compare")
    return error


def beside(script: str, *needs: str) -> Any:
    """The other side of that name, or None, said, where something it needs is not installed."""
    if missing := [name for name in needs if not importlib.util.find_spec(name)]:
        print(f"not installed, so left out: {' and '.join(missing)} (benchmarks/{script}.py says how to have it)")
        return None
    return importlib.import_module(script)


# --- what is measured ------------------------------------------------------------------------------------------------


def weights(size: Sizes) -> dict:
    """Random parameters in numpy, f32; without VRC, which is not measured."""
    import jax
    import numpy as np

    from hypervl_jax.model import hypervl

    draw = jax.jit(lambda key: {k: v for k, v in hypervl.init(key, size.model).items() if k != "vrc"})
    return jax.tree.map(np.asarray, draw(jax.random.key(0)))


def keep(params: dict, kind: str) -> dict:
    """On the device in one kind of weights, layer by layer as a conversation has them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from hypervl_jax import quantize
    from hypervl_jax.model.layers import unstack

    recipe = quantize.RECIPES.get(kind)
    kept = quantize.quantize(params, recipe) if recipe else params
    kept = kept if recipe else jax.tree.map(lambda a: np.asarray(a).astype(jnp.dtype(kind)), kept)
    llm = {"llm": unstack(kept["llm"])} if "llm" in kept else {}
    return jax.device_put(kept | llm, may_alias=True)


def encode(size: Sizes, params: dict, peers: Any, device: str) -> dict[str, Any]:
    """One tile through either branch; both sides end at the patch features."""
    import jax
    import numpy as np

    from hypervl_jax.model import hypervl, vit

    cfg, p = size.model, size.model.policy
    tile = np.random.default_rng(0).random((1, p.tile, p.tile, 3), np.float32)
    mask, out = np.ones((1, p.patches_per_side**2), bool), {}
    for branch in ("base", "large"):
        mine = keep({branch: params[branch]}, size.dtype)
        look = functools.partial(hypervl.look, cfg=cfg, branch=branch, block=vit.one_tile())
        run = jax.jit(lambda q, t, m, look=look: look(q, tiles=t, mask=m)).lower(mine, tile, mask).compile()
        calls: dict[str, Callable] = {"jax": lambda run=run, mine=mine: jax.block_until_ready(run(mine, tile, mask))}
        if peers:
            theirs = peers.Encoder(cfg.vit(branch), params[branch]["vit"], device, size.dtype)
            error = close(f"encode {branch}", calls["jax"](), theirs(tile), ALIKE[size.dtype])
            calls = {"torch": lambda theirs=theirs: theirs(tile), **calls}
        out[branch] = {**rounds(calls, size.rounds), "temporary_bytes": temporary(run)}
        out[branch] |= {"relative_error": error} if peers else {}
        table(f"encode {branch}", {k: v for k, v in out[branch].items() if isinstance(v, dict)})
    return out


class Decoder:
    """This library's decoder with one kind of weights: compiled once, then timed."""

    def __init__(self, size: Sizes, params: dict, kind: str):
        import jax
        import jax.numpy as jnp

        from hypervl_jax import generate, lengths
        from hypervl_jax.model import llm

        self.cfg, self.params = size.model, keep({"llm": params["llm"]}, kind)
        cfg, none = self.cfg, jnp.zeros(self.cfg.llm.vocab, bool)
        dtype = llm.dtype(self.params["llm"])
        self.rooms = {n: lengths.room(n + (size.rounds + 2) * size.tokens) for n in size.prompts}

        def fill(p, state, ids):
            return generate.extend(p, cfg, state, llm.embed(p["llm"], ids), ids.shape[1])

        def step(p, state):
            return generate.sample_step(p, cfg, state, generate.GREEDY, none, -1)

        self.empty = lambda n: generate.start(cfg, 1, self.rooms[n], dtype)
        self.fills, first = {}, size.prompts[0]
        for n in size.prompts:
            shapes = self.params, jax.eval_shape(lambda n=n: self.empty(n)), jax.ShapeDtypeStruct((1, n), jnp.int32)
            self.fills[n] = jax.jit(fill, donate_argnums=1).lower(*shapes).compile()
        state = jax.eval_shape(lambda: self.empty(first))
        self.step = jax.jit(step, donate_argnums=1).lower(self.params, state).compile()
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        self.temporary = {"decode": temporary(self.step)} | {
            f"prefill_{n}": temporary(f) for n, f in self.fills.items()
        }

    def prefill(self, ids: Any) -> Any:
        import jax

        self.state = self.fills[ids.shape[1]](self.params, self.empty(ids.shape[1]), ids)
        return jax.block_until_ready(self.state.logits)

    def decode(self, tokens: int) -> list[int]:
        said = []
        for _ in range(tokens):
            self.state, token = self.step(self.params, self.state)
            said.append(token.item())
        return said


def decoder(size: Sizes, params: dict, peers: Any, llamacpp: Any, device: str, threads: int) -> dict[str, Any]:
    """Prefill and decode of every kind of weights, beside torch in those kinds that it has and llama.cpp in all."""
    import numpy as np

    cfg, rng = size.model, np.random.default_rng(1)
    kinds = [size.dtype, *(k for k in KINDS if k != size.dtype and not (device == "cuda" and k == "float32"))]
    mine = {k: Decoder(size, params, k) for k in kinds}
    theirs, native = {}, {}
    if peers:
        theirs = {f"torch {k}": peers.Decoder(cfg.llm, params["llm"], device, k) for k in kinds if "int" not in k}
    if llamacpp:
        room = max(size.prompts) + (size.rounds + 2) * size.tokens
        native = {f"llama.cpp {k}": llamacpp.Decoder(cfg.llm, params["llm"], k, room, threads) for k in llamacpp.TYPES}
    out: dict[str, Any] = {"kinds": {k: {"bytes": d.bytes, "temporary": d.temporary} for k, d in mine.items()}}
    out["llama.cpp_bytes"] = {k: d.bytes for k, d in native.items()}
    order = {**theirs, **{f"jax {k}": d for k, d in mine.items()}, **native}
    others = [name for name, there in (("torch", theirs), ("llama.cpp", native)) if there]
    for n in size.prompts:
        ids, tolerance = rng.integers(0, cfg.llm.vocab, (1, n)).astype(np.int32), ALIKE[size.dtype]
        got = mine[size.dtype].prefill(ids)
        out[f"prefill_{n}_relative_error"] = {
            name: close(f"prefill {n}", got, order[f"{name} {size.dtype}"].prefill(ids), tolerance, name)
            for name in others
        }
        out[f"prefill_{n}"] = rounds({k: lambda d=d, ids=ids: d.prefill(ids) for k, d in order.items()}, size.rounds)
        table(f"prefill {n}", out[f"prefill_{n}"])
        if n == size.prompts[0]:
            calls = {k: lambda d=d: d.decode(size.tokens) for k, d in order.items()}
            said = calls[f"jax {size.dtype}"]()
            for name in others:
                if said != (other := calls[f"{name} {size.dtype}"]()):
                    same = next(i for i, (a, b) in enumerate(zip(said, other, strict=True)) if a != b)
                    print(f"decode: the first {same} of {len(said)} greedy tokens are those of {name}")
            out["decode"] = rounds(calls, size.rounds)
            for row in out["decode"].values():
                row["tokens_per_second"] = size.tokens / row["seconds"]
            table("decode, a token", out["decode"], per=size.tokens)
    return out


def first_token(size: Sizes, params: dict, peers: Any, device: str) -> list[dict[str, Any]]:
    """Seconds from a picture in memory to the first token about it, both sides on the same plan: tiles one after
    another through Base, then a prompt of as many tokens and 32 of text. A third as many rounds."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from hypervl_jax import generate, image, lengths, plan, text
    from hypervl_jax.model import hypervl, llm

    cfg, rng = size.model, np.random.default_rng(2)
    mine = keep({k: params[k] for k in ("base", "llm")}, size.dtype)
    look = jax.jit(lambda p, t, m: hypervl.encode_tile(p, cfg, "base", t, m))

    def feed(p, state, features, count):
        return generate.extend(p, cfg, state, features, count)

    fill = jax.jit(feed, donate_argnums=1)
    table_ = np.asarray(params["llm"]["embed"])
    dtype = llm.dtype(mine["llm"])
    if peers:
        encoder = peers.Encoder(cfg.base, params["base"]["vit"], device, size.dtype)
        other = peers.Decoder(cfg.llm, params["llm"], device, size.dtype)
    rows = []
    for side in size.sides:
        pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
        p = plan.make((side, side), 1.0, cfg.policy)
        n = text.visual_tokens(p, cfg.text) + 32
        runs = list(lengths.chunks(n, lengths.PREFILL, lengths.room(n)))

        def ours(pixels=pixels, p=p, n=n, runs=runs):
            tiles, masks = image.prepare(pixels, p), p.patch_mask()
            seen = [np.asarray(look(mine, t, m)) for t, m in zip(tiles, masks, strict=True)]
            x = np.zeros((1, runs[-1][0] + runs[-1][1], cfg.llm.width), np.float32)
            x[0, :n] = table_[np.arange(n) % len(table_)]
            features = np.concatenate(seen)[:n]
            x[0, : len(features)] = features
            state = generate.start(cfg, 1, lengths.room(n), dtype)
            for start, length in runs:
                part = jnp.asarray(x[:, start : start + length], dtype)
                state = fill(mine, state, part, jnp.int32(min(length, n - start)))
            return int(state.logits.argmax())

        def theirs(pixels=pixels, p=p, n=n):
            tiles = image.prepare(pixels, p)
            for t in tiles:
                encoder(t[None].astype(np.float32) / 255)  # features only: the projector is ours alone, and small
            return other.prefill(np.arange(n)[None] % cfg.llm.vocab)

        found = rounds({**({"torch": theirs} if peers else {}), "jax": ours}, max(1, size.rounds // 3))
        rows.append({"side": side, "tiles": p.n_tiles, "tokens": n, **found})
        table(f"picture {side}", found)
    return rows


def temporary(program: Any) -> int:
    """Bytes beside arguments and result, by the compiler's account of the program that runs."""
    return program.memory_analysis().temp_size_in_bytes


def agreement(screens: int) -> dict[str, dict[str, int]]:
    """Of the questions about held-out screens, how many nano answers the same with narrow weights as with f32."""
    from hypervl_jax import checkpoint, evaluate, judge
    from hypervl_jax.data import screens as compose
    from hypervl_jax.data.assets import Assets

    cfg, art = judge.trained_on(checkpoint.load_model("nano")), Assets.load()
    some = [compose.record(art, cfg.data.screens, "test_known", i) for i in range(screens)]
    kinds = ("float32", "int8", "int4")
    said = {k: [a.answer for a in evaluate.run(checkpoint.load_model("nano", k), "base", some)] for k in kinds}
    out = {}
    for kind in kinds[1:]:
        same = sum(a == b for a, b in zip(said[kind], said["float32"], strict=True))
        out[kind] = {"same": same, "questions": len(said["float32"])}
        print(
            f"nano, {screens} screens: {same} of {out[kind]['questions']} answers of {kind} are those of f32",
            flush=True,
        )
    return out


# --- limits, of an accelerator ---------------------------------------------------------------------------------------


def limits(small: bool) -> dict[str, float]:
    """What this device reaches: bytes a second of a plain copy (read and written), FLOPs a second of a bf16 product."""
    import jax
    import jax.numpy as jnp

    side, n = (256, 1 << 20) if small else (8192, 1 << 30)
    a, big = jnp.ones((side, side), jnp.bfloat16), jnp.ones(n, jnp.uint8)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda b: b + jnp.uint8(1))
    found = rounds(
        {"product": lambda: product(a).block_until_ready(), "copy": lambda: copy(big).block_until_ready()}, 5
    )
    return {"flops": 2 * side**3 / found["product"]["seconds"], "bytes": 2 * n / found["copy"]["seconds"]}


def shares(size: Sizes, metrics: dict[str, Any]) -> dict[str, float]:
    """Of the limits: bytes of all weights a token in decode; FLOPs of encoders and prefill."""
    from hypervl_jax import cost, plan

    cfg, top = size.model, metrics["limits"]
    one = plan.make((cfg.policy.tile, cfg.policy.tile), 1.0, cfg.policy)
    out = {}
    for kind, about in metrics["decoder"]["kinds"].items():
        speed = metrics["decoder"]["decode"][f"jax {kind}"]["tokens_per_second"]
        out[f"decode {kind}"] = about["bytes"] * speed / top["bytes"]
    for branch, found in metrics["encode"].items():
        out[f"encode {branch}"] = one.vit_flops(cfg.vit(branch)) / one.n_tiles / found["jax"]["seconds"] / top["flops"]
    for n in size.prompts:
        seconds = metrics["decoder"][f"prefill_{n}"][f"jax {size.dtype}"]["seconds"]
        out[f"prefill {n}"] = cost.llm_flops(cfg.llm, n) / seconds / top["flops"]
    for name, share in out.items():
        print(
            f"{name:24s} {share:6.1%} of what a plain {'copy' if 'decode' in name else 'product'} reaches", flush=True
        )
    return out


# --- the run ---------------------------------------------------------------------------------------------------------


def bars(size: Sizes, metrics: dict[str, Any]) -> list[Bar]:
    """Ratios of time against torch, and of narrow weights against f32."""
    out, d, kind = [], metrics["decoder"], size.dtype
    if metrics["torch"]:
        out += [Bar(f"encode.{b}", found["jax"]["over_first"], ENCODE, "<=") for b, found in metrics["encode"].items()]
        out += [Bar(f"prefill_{n}", ratio(d[f"prefill_{n}"], f"jax {kind}", f"torch {kind}"), READ, "<=")
                for n in size.prompts]  # fmt: skip
        out.append(Bar("decode", ratio(d["decode"], f"jax {kind}", f"torch {kind}"), DECODE, "<="))
    out.append(Bar("int8_decode_over_full", ratio(d["decode"], "jax int8", f"jax {kind}"), EIGHT_BITS, "<="))
    if kind == "float32":
        out.append(Bar("int8_bytes", d["kinds"]["int8"]["bytes"] / d["kinds"][kind]["bytes"], MEMORY, "<="))
    return out


def ratio(found: dict[str, dict[str, float]], a: str, b: str) -> float:
    """Time of a over time of b; every row is relative to the first of the same rounds."""
    return found[a]["over_first"] / found[b]["over_first"]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--gpu", action="store_true", help="the paper's sizes in bf16, and the limits")
    parser.add_argument("--threads", type=int, help="cores that both sides run on (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="on a CPU; at least 5 for a figure that counts")


def main() -> int:
    args = arguments(__doc__, more=options)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of it
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = cores[: args.threads or len(cores)]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before JAX starts its threads
    from hypervl_jax import bench, needs

    needs.keep_memory()
    import jax

    gpu = jax.default_backend() == "gpu"
    if args.gpu and not gpu and not args.quick:
        sys.exit(f"--gpu: no GPU here, JAX sees {jax.devices()[0].device_kind} alone; install jax[cuda12] on a machine "
                 "with one (--quick --gpu walks through it on a CPU)")  # fmt: skip
    compile_cache()
    peers, llamacpp = beside("peers", "torch", "transformers"), None
    if peers:
        import torch  # type: ignore

        torch.set_num_threads(len(cores))
        if gpu and not torch.cuda.is_available():
            sys.exit("JAX sees a GPU and torch does not: install a torch of the same CUDA, or leave torch out")
    if not gpu:
        llamacpp = beside("llamacpp", "llama_cpp", "gguf")
    size = sizes(args)
    device = "cuda" if gpu else "cpu"
    params = weights(size)
    metrics: dict[str, Any] = {
        "threads": len(cores), "dtype": size.dtype, "rounds": size.rounds,
        "torch": peers and torch.__version__, "llama.cpp": llamacpp and llamacpp.VERSION,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }  # fmt: skip
    metrics["encode"] = encode(size, params, peers, device)
    metrics["decoder"] = decoder(size, params, peers, llamacpp, device, len(cores))
    metrics["first_token"] = first_token(size, params, peers, device)
    metrics["agreement"] = agreement(5 if args.quick else 100)
    if args.gpu:
        metrics["limits"] = limits(not gpu)
        metrics["shares"] = shares(size, metrics)
    metrics["rss_gb"] = bench.peak_rss_gb()
    found = [] if args.quick else bars(size, metrics)
    return finish("inference", metrics, found, args, seeds=[0, 1, 2])


if __name__ == "__main__":
    sys.exit(main())
