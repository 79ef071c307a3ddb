"""One `.litertlm` file that the stock `litert-lm` runtime opens, and the proof that it says what the parts say.

It holds an encoder with its projector, the embedder and the decoder of an exported folder, the tokenizer, the chat
template and what the runtime must know of pictures. That runtime stretches a picture to one tile: VRC, tiles and the
choice of a branch are the reference loop's (`runtime.py`). What a bundle can be asked is a picture of tile size. The
writer and the runtime come with the `litertlm` extra.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hypervl_jax import plan, quantize, text, tokens
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import Branch, TextConfig
from hypervl_jax.export import lower, pack, parts, verify
from hypervl_jax.export.lower import ExportError
from hypervl_jax.export.runtime import Answer, Runtime

STEPS = 16  # tokens of an answer that are compared
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nTHINK{% endif %}"
)


def write(model: Model, folder: str | Path, out: str | Path, branch: Branch = "base") -> Path:
    """Write `out` from the parts of `folder`, an export of `model`, and ask it; the file appears proved or not at all.

    Raises `ExportError` where the stock runtime does not answer as the folder does, `ManifestError` for a folder that
    is not whole, `lower.ExportUnavailable` without the writer or the runtime.
    """
    builder = lower.extra("litert_lm_builder.litertlm_builder", "litertlm")
    lower.extra("litert_lm", "litertlm")
    files, out = Runtime(folder), Path(out)
    if branch not in files.branches:
        raise ExportError(f"{folder}: has no {branch} encoder; export it with that branch")
    out.parent.mkdir(parents=True, exist_ok=True)
    kinds = builder.TfLiteModelType
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        vision, about, done = (Path(work) / name for name in ("vision.tflite", "about.pb", out.name))
        params = quantize.quantize(model.params, quantize.parse(files.manifest.recipe))
        part = parts.encoder(model.config, params, branch, masked=False)
        lower.to_tflite(vision, quantize.restored(part.params), part.signatures)
        if files.manifest.recipe:
            pack.pack(vision, quantize.matrices(part.params))
            pack.compare(vision, quantize.matrices(part.params))
        about.write_bytes(_metadata(files).SerializeToString())
        file = builder.LitertLmFileBuilder()
        file.add_system_metadata(builder.Metadata(key="made_by", value="hypervl-jax", dtype=builder.DType.STRING))
        file.add_llm_metadata(str(about))
        file.add_hf_tokenizer(str(files.directory / files.manifest.tokenizer.file))
        file.add_tflite_model(str(vision), kinds.VISION_ENCODER)
        for name, kind in (("embedder", kinds.EMBEDDER), ("decoder", kinds.PREFILL_DECODE)):
            file.add_tflite_model(str(files.directory / files.manifest.part(name).file.file), kind)
        with done.open("wb") as f:
            file.build(f)
        prove(done, files, branch)
        os.replace(done, out)
    return out


def prove(bundle: Path, files: Runtime, branch: Branch, pictures: Sequence[np.ndarray] | None = None) -> None:
    """Raises `ExportError` unless the stock runtime gives the answers of `files` about pictures of tile size: the same
    tokens, up to one that `files` like as well within the limit of `verify` (1e-4, or 0.1 with 8-bit activations)."""
    side = files.config.policy.tile
    some = parts.default_pictures(files.config) if pictures is None else pictures
    with opened(bundle) as ask:
        for i, picture in enumerate(some):
            pixels = np.asarray(Image.fromarray(picture).resize((side, side)))
            want = files.answer(pixels, verify.QUESTION, branch, vrc=False, max_new=STEPS)
            got = ask(pixels, verify.QUESTION)
            if not _agree(files, pixels, branch, want, got):
                raise ExportError(f"{bundle.name}: picture {i}: says {got!r:.80}, the files say {want.text!r:.80}")


def _agree(files: Runtime, pixels: np.ndarray, branch: Branch, want: Answer, got: str) -> bool:
    """Whether `got` is `want` (as far as that goes), or leaves it at a token that is as good."""
    tok, limit = files.tokenizer, verify.DYNAMIC if files.manifest.recipe else verify.LIMIT
    forbidden, end = tok.forbidden(files.config.llm.vocab), tok.special(tokens.IM_END)
    prompt = files.prompt(want.plan, verify.QUESTION)
    x = files.embed(prompt.ids, prompt.slots, files.encode(pixels, want.plan, branch))
    caches, at, before = files.prefill(x[:, :-1]), x.shape[1] - 1, ""
    for n, chosen in enumerate((*want.ids, end) if want.ended else want.ids):
        logits, caches = files.step(x[:, -1:], at + n, caches)
        after = tok.decode(want.ids[: n + 1])
        if got == before if chosen == end else got.startswith(after):
            x, before = files.embed(np.array([chosen], np.int32)), after
            continue
        near = logits >= logits[~forbidden].max() - limit * np.abs(logits).max()
        others = [i for i in np.flatnonzero(near & ~forbidden) if i != chosen]
        told = any(got == before if i == end else got.startswith(before + tok.decode([i])) for i in others)
        return bool(near[chosen]) and told
    return True


@contextlib.contextmanager
def opened(bundle: Path, threads: int = 2) -> Iterator[Any]:
    """The stock runtime with a bundle in it: a function (pixels u8[T T 3], question) -> its greedy answer."""
    lm = lower.extra("litert_lm", "litertlm")
    backend = lm.Backend.CPU
    with tempfile.TemporaryDirectory() as work:  # the runtime keeps what it repacks there, as large as the weights
        engine = lm.Engine(str(bundle), backend=backend(thread_count=threads), vision_backend=backend(), cache_dir=work)

        def ask(pixels: np.ndarray, question: str) -> str:
            Image.fromarray(pixels).save(path := Path(work) / "picture.png")
            content = [{"type": "image", "path": str(path)}, {"type": "text", "text": question}]
            pieces = engine.create_conversation().send_message_async({"role": "user", "content": content})
            return "".join(part.text for piece in pieces for part in piece.contents)

        yield ask


def _metadata(files: Runtime) -> Any:
    proto = lower.extra("litert_lm_builder.runtime.proto.llm_metadata_pb2", "litertlm")
    said, cfg = proto.LlmMetadata(), files.config
    said.max_num_tokens = files.cache_length
    said.stop_tokens.add().token_str = tokens.IM_END
    said.jinja_prompt_template = template(cfg.text)
    sampler = said.sampler_params
    sampler.type, sampler.k, sampler.p, sampler.temperature = sampler.TOP_P, 1, 0.95, 1.0  # its GREEDY is not there yet
    pictures = said.llm_model_type.generic_model
    pictures.image_enabled = True
    pictures.image_tensor_height = pictures.image_tensor_width = cfg.policy.tile
    pictures.delimiter_regex, pictures.image_token_regex = r"(<\|image_pad\|>)", r"<\|image_pad\|>"
    pictures.image_prefix, pictures.image_suffix = around(files)
    return said


def template(cfg: TextConfig) -> str:
    """The prompts of `text.render` in the runtime's own Jinja, a placeholder where a picture is."""
    think = f"{tokens.THINK}\n\n{tokens.END_THINK}\n\n" if cfg.think else ""
    return _TEMPLATE.replace("THINK", think)


def around(files: Runtime) -> tuple[str, str]:
    """What stands before and after the visual tokens of one tile, out of `text.render` itself."""
    policy = files.config.policy
    p = plan.make((policy.tile, policy.tile), 1.0, policy)
    row = text.render([{"role": "user", "content": [{"type": "image"}]}], [p], files.tokenizer, files.config.text)
    visual = np.flatnonzero(row.slots >= 0)
    said = files.tokenizer.decode(row.ids[: visual[0]]), files.tokenizer.decode(row.ids[visual[-1] + 1 :])
    start, end = said[0].index(tokens.VISION_START), said[1].index(tokens.IM_END)
    return said[0][start:], said[1][:end]
