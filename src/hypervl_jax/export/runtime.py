"""Answers from exported files alone: the loop a phone runs, with numpy and the LiteRT runtime. Imports no JAX.

Everything that is not a network is the library's own host code (`plan`, `image`, `text`, `ratio`), so what the files
see is what the model saw in training.

Axes: H W picture, N tiles, P patches, M tokens a tile, L prompt, S cache length, D decoder width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from hypervl_jax import image, plan, ratio, text, tokens
from hypervl_jax.config import BRANCHES, Branch
from hypervl_jax.export import lower, manifest
from hypervl_jax.export.manifest import Manifest, ManifestError
from hypervl_jax.lengths import chunks
from hypervl_jax.plan import VisionPlan

HIDDEN = np.float32(-0.7 * np.finfo(np.float32).max)  # in attention masks, as LiteRT-LM writes it; 0 is visible
SCALE = np.float32(1 / 255)  # of pixels; multiplied by, as in LiteRT-LM, for the last bit moves activations of 8 bits
PREFILL = "prefill_"  # + length
ENCODER = "encoder_"  # + branch
LONGEST = 1 << 20  # positions a cache may have: more is a slip or a trap
Caches = dict[str, np.ndarray]  # kv_cache_k_<layer>, kv_cache_v_<layer>: f32[1 K S d]


class AnswerError(ValueError):
    """A question the exported files cannot take; the message says what to change."""


class Answer(NamedTuple):
    text: str
    ids: tuple[int, ...]  # without the token that ended it
    plan: VisionPlan
    ratio: float  # area ratio the picture was shrunk to; 1 without VRC
    ended: bool  # by the model itself; False: cut at `max_new` tokens or by the cache
    seconds: dict[str, float]  # load (first use of a file), preprocess, vrc, encode, prefill, decode


class Runtime:
    """An exported folder, ready to answer. A file is loaded when it is first needed; `threads` as in `lower.Runner`.

    Raises `ManifestError` for a folder that is not whole or whose parts are not those of its model,
    `lower.ExportUnavailable` without the runtime.
    """

    def __init__(self, directory: str | Path, threads: int | None = None):
        self.directory, self._threads = Path(directory), threads
        self.manifest = manifest.check(directory)
        self.config = self.manifest.model
        try:
            self.buckets, self._cache = fit(self.manifest)
        except ManifestError as e:
            raise ManifestError(f"{self.directory / manifest.NAME}: {e}; export again") from e
        self.cache_length = next(iter(self._cache.values()))[2]
        self.tokenizer = tokens.Tokenizer.load(self.directory / self.manifest.tokenizer.file)
        self._forbidden = self.tokenizer.forbidden(self.config.llm.vocab)
        self._runners: dict[str, lower.Runner] = {}
        self._seconds: dict[str, float] = {}

    @property
    def branches(self) -> list[Branch]:
        names = {p.name for p in self.manifest.parts}
        return [branch for branch in BRANCHES if ENCODER + branch in names]

    # --- the whole way -----------------------------------------------------------------------------------------------

    def answer(
        self,
        pixels: UInt8[np.ndarray, "H W 3"],
        question: str,
        branch: Branch = "base",
        vrc: bool = True,
        max_new: int = 16,
    ) -> Answer:
        """The greedy answer to one question about one picture."""
        pieces = self.stream(pixels, question, branch, vrc, max_new)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value

    def stream(
        self,
        pixels: UInt8[np.ndarray, "H W 3"],
        question: str,
        branch: Branch = "base",
        vrc: bool = True,
        max_new: int = 16,
    ) -> Generator[str, None, Answer]:
        """Pieces of the answer as they are known; the generator returns the whole `Answer`.

        Raises `AnswerError` where the prompt has more tokens than the exported cache.
        """
        self._seconds = dict.fromkeys(("load", "preprocess", "vrc", "encode", "prefill", "decode"), 0.0)
        share = self.ratio(pixels) if vrc else 1.0
        p = plan.make(pixels.shape[:2], share, self.config.policy)
        prompt = self.prompt(p, question)
        features = self.encode(pixels, p, branch)
        x = self.embed(prompt.ids, prompt.slots, features)
        caches = self.prefill(x[:, :-1])
        stream, ids, at, x = text.Stream(self.tokenizer), [], x.shape[1] - 1, x[:, -1:]
        while len(ids) < max_new and at < self.cache_length:
            logits, caches = self.step(x, at, caches)
            token = int(np.where(self._forbidden, -np.inf, logits).argmax())
            piece = stream.push(token)
            if stream.done:
                break
            ids.append(token)
            at += 1
            x = self.embed(np.array([token], np.int32))
            if piece:
                yield piece
        if rest := stream.finish():
            yield rest
        return Answer(
            text.strip_answer(self.tokenizer, ids), tuple(ids), p, float(share), stream.done, dict(self._seconds)
        )

    # --- seam by seam ------------------------------------------------------------------------------------------------

    def alpha(self, pixels: UInt8[np.ndarray, "H W 3"]) -> float:
        """VRC's rescaled prediction alpha' for a picture."""
        with self._clock("preprocess"):
            proxy = image.proxy(pixels, self.config.vrc.side)[None]
        return float(self._run("vrc", "vrc", {"proxy": proxy}, "vrc")["alpha"][0])

    def ratio(self, pixels: UInt8[np.ndarray, "H W 3"]) -> float:
        """The area ratio in [min_ratio, 1] that VRC chooses for a picture."""
        alpha = self.alpha(pixels)
        return float(ratio.unrescale(alpha, pixels.shape[:2], self.config.vrc, self.manifest.vrc_scale))

    def prompt(self, p: VisionPlan, question: str) -> text.Prompt:
        """The row of tokens of one question. Raises `AnswerError` if it does not fit the exported cache."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        row = text.render([{"role": "user", "content": content}], [p], self.tokenizer, self.config.text)
        if len(row.ids) > self.cache_length:
            raise AnswerError(
                f"the prompt needs {len(row.ids)} tokens, {p.tokens} of them visual; {self.directory} was exported for "
                f"{self.cache_length}: ask a shorter question, shrink the picture or export with a larger cache"
            )
        return row

    def encode(self, pixels: UInt8[np.ndarray, "H W 3"], p: VisionPlan, branch: Branch) -> Float32[np.ndarray, "N M D"]:
        """Visual tokens, one tile after the other: peak memory does not grow with the picture."""
        with self._clock("preprocess"):
            tiles, masks = image.prepare(pixels, p), p.patch_mask().astype(np.float32)
        pairs = zip((t[None] * SCALE for t in tiles), masks[:, None], strict=True)
        inputs = ({"images": t, "mask": m} for t, m in pairs)
        return np.concatenate([self._run(ENCODER + branch, "vision", i, "encode")["features"] for i in inputs])

    def embed(
        self,
        ids: Int32[np.ndarray, " L"],
        slots: Int32[np.ndarray, " L"] | None = None,
        features: Float32[np.ndarray, "N M D"] | None = None,
    ) -> Float32[np.ndarray, "1 L D"]:
        """Token embeddings, with rows of `features` wherever a slot is not negative."""
        visual = np.zeros(len(ids), bool) if slots is None else slots >= 0
        x = np.empty((1, len(ids), self.config.llm.width), np.float32)
        for i in np.flatnonzero(~visual):
            x[0, i] = self._run("embedder", "embed", {"token_ids": ids[None, i : i + 1]}, "prefill")["embeddings"][0, 0]
        if slots is not None and features is not None:
            x[0, visual] = features.reshape(-1, x.shape[-1])[slots[visual]]
        return x

    def prefill(self, x: Float32[np.ndarray, "1 L D"]) -> Caches:
        """Caches that hold L positions."""
        caches = {name: np.zeros(shape, np.float32) for name, shape in self._cache.items()}
        for start, length in chunks(x.shape[1], self.buckets, self.cache_length):
            piece = x[:, start : start + length]
            fill = length - piece.shape[1]  # rows after the prompt: written over before anyone may see them
            piece = np.pad(piece, ((0, 0), (0, fill), (0, 0)))
            signature = f"{PREFILL}{length}" if length > 1 else "decode"
            caches = self._decoder(signature, piece, start, caches, "prefill")
            caches.pop("logits", None)
        return caches

    def step(
        self, x: Float32[np.ndarray, "1 1 D"], at: int, caches: Caches
    ) -> tuple[Float32[np.ndarray, " V"], Caches]:
        """Logits of the token after position `at`, whose embedding is `x`."""
        out = self._decoder("decode", x, at, caches, "decode")
        return out.pop("logits")[0, 0], out

    def _decoder(self, signature: str, x: np.ndarray, at: int, caches: Caches, clock: str) -> Caches:
        positions = np.arange(at, at + x.shape[1], dtype=np.int32)
        visible = np.arange(self.cache_length) <= positions[:, None]
        mask = np.where(visible, np.float32(0), HIDDEN)[None, None]
        inputs = {"embeddings": x, "input_pos": positions, "mask": mask, **caches}
        return self._run("decoder", signature, inputs, clock)

    def _run(self, part: str, signature: str, inputs: dict[str, np.ndarray], clock: str) -> dict[str, np.ndarray]:
        if part not in self._runners:
            with self._clock("load"):
                path = self.directory / self.manifest.part(part).file.file
                self._runners[part] = lower.Runner(path, self._threads)
        with self._clock(clock):
            return self._runners[part](signature, inputs)

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start


def fit(m: Manifest) -> tuple[list[int], dict[str, tuple[int, ...]]]:
    """(prefill lengths, shape of each cache). Raises `ManifestError` where parts are missing or their shapes are not
    those of the manifest's model."""
    c, policy, side = m.model.llm, m.model.policy, m.model.vrc.side
    found = {
        (p.name, e.name): {t.name: t.shape for t in (*e.inputs, *e.outputs)} for p in m.parts for e in p.signatures
    }
    caches = {k: v for k, v in found.get(("decoder", "decode"), {}).items() if k.startswith("kv_cache_")}
    room = next((shape[2] for shape in caches.values() if len(shape) == 4), 0)
    if {*caches.values()} != {(1, c.kv_heads, room, c.head_dim)} or len(caches) != 2 * c.depth or room > LONGEST:
        raise ManifestError(f"decode needs two caches a layer, f32[1 {c.kv_heads} C {c.head_dim}], C up to {LONGEST}")
    if c.vocab > m.part("embedder").file.bytes:
        raise ManifestError(f"a vocabulary of {c.vocab} rows is not in an embedder of this size")
    lengths = [name.removeprefix(PREFILL) for part, name in found if part == "decoder" and name.startswith(PREFILL)]
    if bad := [n for n in lengths if not (n.isdecimal() and len(n) < 8 and 2 <= int(n) <= room)]:
        raise ManifestError(f"{PREFILL}{bad[0]}: lengths lie in 2 .. {room}, the cache")

    def row(n: int) -> dict[str, tuple[int, ...]]:
        return {"embeddings": (1, n, c.width), "input_pos": (n,), "mask": (1, 1, n, room), **caches}

    tile = {"images": (1, policy.tile, policy.tile, 3), "mask": (1, policy.patches_per_side**2)}
    tile["features"] = (1, policy.tokens_per_tile, c.width)
    want = {("vrc", "vrc"): {"proxy": (1, side, side, 3), "alpha": (1,)}}
    want |= {(p.name, "vision"): tile for p in m.parts if p.name.startswith(ENCODER)}
    want["embedder", "embed"] = {"token_ids": (1, 1), "embeddings": (1, 1, c.width)}
    want |= {("decoder", PREFILL + n): row(int(n)) for n in lengths}
    want["decoder", "decode"] = row(1) | {"logits": (1, 1, c.vocab)}
    for key, shapes in want.items():
        for name, shape in shapes.items():
            if (given := found.get(key, {}).get(name)) != shape:
                raise ManifestError(f"{' '.join(key)}: {name} is {given}, its model needs {shape}")
    return sorted(map(int, lengths)), caches
