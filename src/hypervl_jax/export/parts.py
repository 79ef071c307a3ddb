"""A trained model -> a folder of `.tflite` files that answers without JAX, proved before it exists.

The parts are the model's own functions with fixed shapes and the layers looped:

    vrc       vrc          proxy f32[1 S S 3]                        -> alpha f32[1]
    encoder_B vision       images f32[1 T T 3], mask f32[1 P]        -> features f32[1 M D]       B: base, large
    embedder  embed        token_ids i32[1 1]                        -> embeddings f32[1 1 D]
    decoder   prefill_L    embeddings f32[1 L D], input_pos i32[L], mask f32[1 1 L C], caches -> caches
              decode       the same with L = 1                       -> logits f32[1 1 V], caches

Pictures are in 0..1; the patch mask is 1 on real pixels; the attention mask is 0 where visible, negative where hidden.
Caches are kv_cache_k_<layer> and kv_cache_v_<layer>, f32[1 K C h] each, written from input_pos[0] on. Names and shapes
of embedder and decoder are those that LiteRT-LM loads. A prompt's last token goes through `decode`, which has logits.

Axes: S proxy side, T tile side, P patches, M tokens a tile, D decoder width, L tokens, C cache length, K kv heads,
h head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hypervl_jax import calibrate, checkpoint, plan, quantize, text
from hypervl_jax.calibrate import Sample
from hypervl_jax.checkpoint import TOKENIZER, Model, replacing
from hypervl_jax.config import BRANCHES, Branch, ModelConfig, ScreensConfig
from hypervl_jax.export import lower, manifest, pack, verify
from hypervl_jax.export.lower import ExportError, Signature
from hypervl_jax.export.manifest import Manifest
from hypervl_jax.export.runtime import ENCODER, PREFILL, Runtime
from hypervl_jax.export.verify import Seam
from hypervl_jax.model import hypervl, llm, vrc
from hypervl_jax.quantize import Recipe
from hypervl_jax.tokens import Tokenizer

_f32, _i32 = jnp.float32, jnp.int32
_array = jax.ShapeDtypeStruct
_NEAR = 0.5  # of a matrix, that 4 bits may be away from it: the nearest are at 0.1 to 0.2, those of another model at 1


WEIGHTS = {"vrc": "vrc.", **{ENCODER + b: f"{b}." for b in BRANCHES}, "embedder": "llm.embed", "decoder": "llm."}
SHOWN = 9  # tiles of the largest picture that an export is proved on where none are given
TEXT = 160  # tokens of a question and an answer, where it is asked how many tiles a cache holds
LONGEST = 1024  # tokens of the longest prefill: what it multiplies a prompt's scores in grows with it


class Part(NamedTuple):
    """One file: a tree of weights and the entry points that share it."""

    params: Any
    signatures: tuple[Signature, ...]


def names(branches: Sequence[Branch]) -> tuple[str, ...]:
    """What every part is called, in the order in which they are made."""
    return ("vrc", *(ENCODER + b for b in branches), "embedder", "decoder")


def make(
    cfg: ModelConfig, params: dict, branches: Sequence[Branch], prefill: Sequence[int], cache: int
) -> dict[str, Part]:
    """Every part by name, nothing lowered yet."""
    return {name: one(name, cfg, params, prefill, cache) for name in names(branches)}


def one(name: str, cfg: ModelConfig, params: dict, prefill: Sequence[int], cache: int) -> Part:
    """The part of that name. `params` may lack what the part has not got: `WEIGHTS`."""
    made: dict[str, Callable[[], Part]] = {
        "vrc": lambda: compressor(cfg, params),
        "embedder": lambda: embedder(cfg, params),
        "decoder": lambda: decoder(cfg, params, prefill, cache),
    }
    return (made | {ENCODER + b: partial(encoder, cfg, params, b) for b in BRANCHES})[name]()


def compressor(cfg: ModelConfig, params: dict) -> Part:
    """VRC with its batch norms multiplied into the convolutions."""
    net = vrc.Vrc(cfg.vrc, folded=True, depthwise="conv")
    s = cfg.vrc.side
    args = (_array((1, s, s, 3), _f32),)
    return Part(
        jax.jit(vrc.fold)(params["vrc"]),
        (Signature("vrc", lambda p, proxy: net.apply({"params": p}, proxy), args, ("proxy",), ("alpha",)),),
    )


def encoder(cfg: ModelConfig, params: dict, branch: Branch, masked: bool = True) -> Part:
    """One tile through a branch and its projector. Not `masked` there is no padding and no mask, and the signature is
    called as LiteRT-LM wants it."""
    t, patches = cfg.policy.tile, cfg.policy.patches_per_side**2

    def vision(p, images, mask=None):
        seen = jnp.ones((1, patches), bool) if mask is None else mask > 0.5
        return hypervl.encode_batch(stacked(p), cfg, branch, images, seen, scan=False)

    tree, args = _unstacked({branch: params[branch]}), (_array((1, t, t, 3), _f32), _array((1, patches), _f32))
    if masked:
        return Part(tree, (Signature("vision", vision, args, ("images", "mask"), ("features",)),))
    name = f"vision_{cfg.policy.tokens_per_tile}"
    return Part(tree, (Signature(name, vision, args[:1], ("images",), ("features",)),))


def embedder(cfg: ModelConfig, params: dict, named: bool = True) -> Part:
    """One row of the token table, `named` as the operator that quantises."""

    def rows(ids, table):  # the operator takes flat ids
        return llm.embed({"embed": table}, ids[None])[0]

    look_up = jax.lax.composite(rows, name="odml.embedding_lookup") if named else rows

    def embed(p, ids):
        return look_up(ids.reshape(-1), p["embed"])[None]

    args = (_array((1, 1), _i32),)
    return Part({"embed": params["llm"]["embed"]}, (Signature("embed", embed, args, ("token_ids",), ("embeddings",)),))


def decoder(cfg: ModelConfig, params: dict, prefill: Sequence[int], cache: int) -> Part:
    """Prefill of each length and decode over one copy of the weights."""
    c = cfg.llm
    net, caches = llm.Llm(c, scan=False), jax.eval_shape(lambda: llm.init_cache(c, 1, cache))
    names = tuple(f"kv_cache_{side}_{i}" for i in range(c.depth) for side in "kv")

    def run(p, x, input_pos, mask, caches):
        return net.apply({"params": stacked(p)}, x, input_pos[None], mask[:, 0] >= 0, caches, input_pos[0])

    def fill(*args):
        return run(*args)[1]  # the last layer's attention and the head fall away

    def decode(p, *args):
        hidden, caches = run(p, *args)
        return llm.logits(p, hidden), caches

    def signature(name, fn, n, *outputs):
        args = (_array((1, n, c.width), _f32), _array((n,), _i32), _array((1, 1, n, cache), _f32), caches)
        return Signature(name, fn, args, ("embeddings", "input_pos", "mask", *names), (*outputs, *names))

    fills = (signature(f"{PREFILL}{n}", fill, n) for n in sorted(set(prefill)))
    return Part(_unstacked(params["llm"]), (*fills, signature("decode", decode, 1, "logits")))


class _Layers:
    """One leaf of a stack, layer by layer: the layer loop only indexes its leaves, so this stands in for an array."""

    def __init__(self, *leaves: Any):
        self.leaves = leaves

    def __getitem__(self, i: int) -> Any:
        return self.leaves[i]


def _unstacked(tree: dict) -> dict:
    """Every stack of layers cut into layers on the host. Cut in the graph, a stack would be folded slowly and once a
    signature, each with weights of its own, or not at all and be cut again at every call."""
    out = {}
    for key, value in tree.items():
        if key == "layers" and isinstance(value, dict):
            depth = len(jax.tree.leaves(value)[0])
            out[key] = [jax.tree.map(lambda a: np.asarray(a[i]), value) for i in range(depth)]  # noqa: B023 - used now
        else:
            out[key] = _unstacked(value) if isinstance(value, dict) else value
    return out


def stacked(tree: dict) -> dict:
    """The tree that the model expects, out of what `_unstacked` made of it."""
    return {
        key: jax.tree.map(_Layers, *value)
        if isinstance(value, list)
        else stacked(value)
        if isinstance(value, dict)
        else value
        for key, value in tree.items()
    }


# --- the folder ------------------------------------------------------------------------------------------------------


def lengths(
    cfg: ModelConfig, tokenizer: Tokenizer, question: int = 64, answer: int = 32
) -> tuple[tuple[int, ...], int]:
    """(prefill lengths, cache length) with room for the largest plan, a question and an answer of so many tokens.

    Lengths double from one tile and a question up to the largest prompt, or `LONGEST`: longer ones are read in pieces.
    """
    policy = cfg.policy
    tile = policy.tokens_per_tile + 1  # with its marker
    small = plan.make((policy.tile, policy.tile), 1.0, policy)
    empty = [{"role": "user", "content": [{"type": "image"}]}]  # what every prompt has besides picture and question
    question += len(text.render(empty, [small], tokenizer, cfg.text).ids) - text.visual_tokens(small, cfg.text)
    most = (policy.max_tiles + policy.thumbnail) * tile + policy.max_tiles + question  # a line end after each row

    def up(n: int) -> int:
        return -(-n // 32) * 32

    out, n = [], up(tile + question)
    last = max(n, min(up(most), LONGEST))
    while n < last:
        out.append(n)
        n = up(2 * n)
    return (*out, last), up(most + answer)


def checked_lengths(
    model: Model, prefill: Sequence[int] | None, cache: int | None, branches: Sequence[Branch]
) -> tuple[tuple[int, ...], int]:
    """(prefill lengths, cache length), `lengths` where None. Raises `ExportError` for those that cannot be."""
    defaults = lengths(model.config, model.tokenizer)
    cache = cache or defaults[1]
    prefill = tuple(prefill or sorted({min(n, cache) for n in defaults[0]}))
    if min(prefill) < 2 or max(prefill) > cache or not branches:
        raise ExportError(f"prefill lengths {list(prefill)} must lie in 2 .. cache = {cache}, and one branch be given")
    return prefill, cache


def export(
    model: Model,
    out_dir: str | Path,
    *,
    recipe: Recipe = (),
    samples: Sequence[Sample] = (),
    prefill: Sequence[int] | None = None,
    cache: int | None = None,
    branches: Sequence[Branch] = BRANCHES,
    verify_images: Sequence[np.ndarray] | None = None,
    source: str = "",
    bundle: Branch | None = None,
    progress: bool = True,
) -> Manifest:
    """Write `model` as `.tflite` files with tokenizer and manifest, compare each seam with JAX, then name it `out_dir`.

    With a `recipe` matrices are in 8 and 4 bits, and the proof has two steps: the files with the floats that the
    integers stand for, each seam within `verify.LIMIT`, and the files with the integers, which are JAX's bit by bit.
    With `samples` the 4 bits of the decoder are chosen by what it multiplies there (`calibrate`), else the nearest.
    `prefill` and `cache` are token counts (`lengths` if None). `verify_images` are pictures u8[H W 3] to compare on
    (composed screens if None). `source` is what the model is called. With `bundle` the folder also has one file for
    the stock LiteRT-LM runtime with that branch, proved in it. An earlier export at `out_dir` is replaced, anything
    else there is left alone. Raises `ExportError` for a seam that is too far from JAX, with the number,
    `ExportUnavailable` without the converter, `RecipeError` for a recipe that does not fit, `CalibrationError` for
    samples that do not serve, `ExportError` for weights that are in 8 or 4 bits already. Whatever is raised, nothing of
    a failed export remains.
    """
    from hypervl_jax.export import bundle as bundles  # it is made of parts

    lower.require()
    if bundle is not None:
        bundles.require()
        if bundle not in branches:
            raise ExportError(f"a bundle of {bundle} needs that branch; it is not among {', '.join(branches)}")
    if quantize.is_quantized(model.params):
        raise ExportError("weights in 8 or 4 bits are not exported; load the model as it is, and give a recipe")
    out = Path(out_dir).absolute()
    check_free(out)
    prefill, cache = checked_lengths(model, prefill, cache, branches)
    pictures = default_pictures(model.config, cache=cache) if verify_images is None else verify_images
    params = quantize.quantize(model.params, recipe)
    if samples:
        check_narrow(recipe, checkpoint.expected(model.config))
        found = calibrate.grams(model, samples, branches, progress)
        params = calibrate.calibrated(model.params, recipe, found)
    parts = make(model.config, params, branches, prefill, cache)
    about = partial(described, model=model, branches=branches, source=source)

    def proved(work: Path, params: dict) -> list[Seam]:
        seams = prove(model, work, pictures, params, lambda seam: bar.set_postfix_str(f"verify {seam}"))
        refuse(out, seams)
        bar.update()
        return seams

    total = (len(parts) + 1) * (2 if recipe else 1) + (bundle is not None)
    with replacing(out) as work, tqdm(total=total, desc="export", unit="part", disable=not progress) as bar:
        for name, part in parts.items():
            bar.set_postfix_str(name)
            lower.to_tflite(work / file_of(name), quantize.restored(part.params), part.signatures)
            bar.update()
        model.tokenizer.save(work / TOKENIZER)
        manifest.write(work, about(work))
        seams = proved(work, quantize.restored(params))
        more: dict[str, Any] = {"bits": bits(parts), "recipe": tuple(map(str, recipe)), "calibrated": len(samples)}
        if recipe:
            for name, part in parts.items():
                bar.set_postfix_str(f"{name} integers")
                pack.pack(work / file_of(name), quantize.matrices(part.params))
                bar.update()
            more["lowered"] = {s.name: s.error for s in seams}
            manifest.write(work, about(work, **more))
            seams = proved(work, params)
        done = about(work, seams, **more)
        manifest.write(work, done)
        if bundle is not None:
            bar.set_postfix_str(f"{bundle} bundle")
            done = bundles.add(model, work, done, bundle)
            bar.update()
    return done


def prove(
    model: Model,
    directory: str | Path,
    pictures: Sequence[np.ndarray] | None = None,
    params: dict | None = None,
    say: Callable[[str], object] = lambda seam: None,
) -> list[Seam]:
    """The proof of an exported folder, again: integers bit by bit, then every seam on `pictures` (composed screens if
    None). The integers are those of `params`, or follow from model and recipe; of 4 bits that samples chose it is
    proved that they are of this model and as the recipe says. `say` is told what is compared next.

    Raises `ManifestError` for a folder that is not whole, `ExportError` for one of another model.
    """
    files = Runtime(directory)
    say("integers")
    params = held(model, files) if params is None else params
    for name, part in make(model.config, params, files.branches, files.buckets, files.cache_length).items():
        pack.compare(files.directory / files.manifest.part(name).file.file, quantize.matrices(part.params))
    pictures = default_pictures(model.config, cache=files.cache_length) if pictures is None else pictures
    return verify.seams(model._replace(params=params), files, pictures, say)


def held(model: Model, files: Runtime) -> dict:
    """The parameters of the files that were exported from `model`: they follow from it and the recipe, and 4 bits that
    samples chose are read. Raises `ExportError` for another model."""
    m = files.manifest
    if m.model != model.config:
        raise ExportError(f"{files.directory}: made from a model of other settings; give the one it was made from")
    params = quantize.quantize(model.params, quantize.parse(m.recipe))
    return _chosen(model, params, files.directory / m.part("decoder").file.file) if m.calibrated else params


def _chosen(model: Model, params: dict, path: Path) -> dict:
    """`params` with the 4 bits of a decoder's file."""
    found, each = pack.read(path), []
    for i, layer in enumerate(calibrate.layers_of(params)):
        plain, layer = calibrate.at(model.params, i), dict(layer)
        for name, leaf in calibrate.narrow(layer).items():
            key, w = f"blocks.layers.{i}.{name}.weight", np.asarray(plain[name]["weight"])
            stored = found.get(key)
            if stored is None or stored.kind != leaf.kind or stored.q.shape != leaf.q.shape:
                raise ExportError(f"{path.name}: {key}: not kept as the manifest's recipe says; export again")
            if not np.linalg.norm(quantize.floats(stored) - w) <= _NEAR * np.linalg.norm(w):
                raise ExportError(
                    f"{path.name}: {key}: other integers than of this model; give the one it was made from"
                )
            layer[name] = {"weight": stored}
        each.append(layer)
    return calibrate.with_layers(params, each)


def check_narrow(recipe: Recipe, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises `ExportError` for a recipe that leaves nothing for samples to choose; `shapes` are of the whole model."""
    if not calibrate.chooses(recipe, shapes):
        raise ExportError("samples choose the decoder's 4 bits, and none of its matrices is in 4 bits")


def file_of(name: str) -> str:
    """The file of a part."""
    return f"{name}.tflite"


def described(
    work: Path, parity: Sequence[Seam] = (), *, model: Model, branches: Sequence[Branch], **more: Any
) -> Manifest:
    """The manifest of the files in `work`, which are those of `model`."""
    files, errors = {name: file_of(name) for name in names(branches)}, {s.name: s.error for s in parity}
    scale = float(model.info.get("vrc_scale", 1.0))
    return manifest.describe(work, model.config, files, TOKENIZER, errors, scale, **more)


def refuse(out: Path, seams: Sequence[Seam]) -> None:
    """Raises `ExportError` for the first seam that is too far from JAX."""
    for seam in seams:
        if not seam.ok:
            raise ExportError(f"{out}: not exported: {seam}")


def bits(parts: dict[str, Part]) -> dict[str, float]:
    """Bits a weight takes, by part, and those of the decoder's layers."""
    found = {name: quantize.bits_per_weight(part.params) for name, part in parts.items()}
    return found | {"layers": quantize.bits_per_weight(parts["decoder"].params["blocks"])}


def default_pictures(cfg: ModelConfig, n: int = 3, cache: int | None = None) -> list[np.ndarray]:
    """Held-out screens from one tile to as many as a plan, a cache and `SHOWN` allow."""
    from hypervl_jax.data import screens
    from hypervl_jax.data.assets import Assets

    policy = cfg.policy
    assets, t, wide = Assets.load(), max(policy.tile, 24), policy.max_tiles**0.5
    room = policy.max_tiles if cache is None else (cache - TEXT) // (policy.tokens_per_tile + 1) - policy.thumbnail
    if (room := min(room, SHOWN)) < policy.max_tiles:
        wide = math.isqrt(max(1, room))
    out = []
    for i in range(n):
        side = round(t * (1 + (wide - 1) * i / max(1, n - 1)))
        shape = ScreensConfig(min_side=max(16, side * 3 // 4), max_side=side, max_area=side * side)
        out.append(screens.record(assets, shape, "test_known", i).image)
    return out


def check_free(out: Path) -> None:
    if not out.exists():
        return
    ours = {manifest.NAME, TOKENIZER}
    if not out.is_dir() or any(p.name not in ours and p.suffix not in manifest.OURS for p in out.iterdir()):
        raise ExportError(f"{out}: exists and is not an exported model; remove it or name another folder")
    if any(out.iterdir()) and not (out / manifest.NAME).is_file():
        raise ExportError(f"{out}: not empty and without a {manifest.NAME}; remove it or name another folder")
    if any(out.iterdir()) and out.samefile(Path.cwd()):
        raise ExportError(f"{out}: an export is replaced by a new folder, and you are in this one; go to another first")
