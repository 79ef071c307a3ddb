"""One `.litertlm` file that the stock `litert-lm` runtime opens, and the proof that it says what the parts say.

It holds an encoder with its projector, the embedder and the decoder of an exported folder, the tokenizer, the chat
template and what the runtime must know of pictures. That runtime stretches a picture to one tile: VRC, tiles and the
choice of a branch are the reference loop's (`runtime.py`). What a bundle can be asked is a picture of tile size. The
writer and the runtime come with the `litertlm` extra.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hypervl_jax import evaluate, plan, quantize, text, tokens
from hypervl_jax.checkpoint import Model
from hypervl_jax.config import Branch, ModelConfig, TextConfig
from hypervl_jax.export import lower, manifest, pack, parts, verify
from hypervl_jax.export.lower import ExportError
from hypervl_jax.export.manifest import Manifest
from hypervl_jax.export.runtime import Runtime

SUFFIX = ".litertlm"
STEPS = 16  # tokens of an answer that are compared
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nTHINK{% endif %}"
)


def require() -> Any:
    """The writer. Raises `lower.ExportUnavailable` where it or the stock runtime is missing."""
    lower.extra("litert_lm", "litertlm")
    return lower.extra("litert_lm_builder.litertlm_builder", "litertlm")


def write(model: Model, folder: str | Path, out: str | Path, branch: Branch = "base") -> Path:
    """Write `out` from the parts of `folder`, an export of `model`, and ask it; the file appears proved or not at all.

    Raises `ExportError` where the stock runtime does not answer as the folder does, `ManifestError` for a folder that
    is not whole, `lower.ExportUnavailable` without the writer or the runtime.
    """
    builder = require()
    files, out = Runtime(folder), Path(out)
    if branch not in files.branches:
        raise ExportError(f"{folder}: has no {branch} encoder; export it with that branch")
    out.parent.mkdir(parents=True, exist_ok=True)
    kinds = builder.TfLiteModelType
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        vision, about, done = (Path(work) / name for name in ("vision.tflite", "about.pb", out.name))
        params = model.params
        if not quantize.is_quantized(params):
            params = quantize.quantize(params, quantize.parse(files.manifest.recipe))
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


def add(model: Model, folder: Path, made: Manifest, branch: Branch) -> Manifest:
    """`write` into an exported folder, and what its manifest then says."""
    file = write(model, folder, folder / f"{branch}{SUFFIX}", branch)
    made = dataclasses.replace(made, bundles=(manifest.bundle_of(file, branch),))
    manifest.write(folder, made)
    return made


def prove(bundle: Path, files: Runtime, branch: Branch) -> None:
    """Raises `ExportError` unless the stock runtime says of pictures of tile size what `files` say, to the letter."""
    with opened(bundle) as ask:
        for i, pixels in enumerate(pictures(files.config)):
            want = files.tokenizer.decode(files.answer(pixels, verify.QUESTION, branch, vrc=False, max_new=STEPS).ids)
            if (got := ask(pixels, verify.QUESTION, STEPS)) != want:
                raise ExportError(f"{bundle.name}: picture {i}: says {got!r:.80}, the files say {want!r:.80}")


def prove_again(model: Model, directory: str | Path) -> dict[str, str]:
    """The proof of a folder's bundles, again: file -> how many of its answers are those of JAX, "3 of 3".

    Raises `ExportError` for one that does not say what the folder's files say."""
    files, out = Runtime(directory), {}
    reference = model._replace(params=quantize.restored(parts.held(model, files)))
    jobs = [evaluate.Job(pixels, 1.0, (verify.QUESTION,)) for pixels in pictures(files.config)]
    for b in files.manifest.bundles:
        prove(files.directory / b.file.file, files, b.branch)
        said = beside_jax(files.directory / b.file.file, reference, b.branch, jobs)
        out[b.file.file] = f"{sum(got == want for got, want in said)} of {len(said)}"
    return out


def beside_jax(bundle: Path, model: Model, branch: Branch, jobs: Sequence[evaluate.Job]) -> list[tuple[str, str]]:
    """(what the stock runtime says, what JAX says) to each question about pictures of tile size, greedily.

    `model` has the weights that the bundle was made with, as floats."""
    asked = [(job.image, question) for job in jobs for question in job.questions]
    want = [answer for said in evaluate.answer(model, branch, jobs) for answer in said]
    with opened(bundle) as ask:
        return [(ask(*each, evaluate.NEW).strip(), answer) for each, answer in zip(asked, want, strict=True)]


def pictures(cfg: ModelConfig) -> list[np.ndarray]:
    """Held-out screens of tile size, u8[T T 3]: what the stock runtime shows as they are."""
    side = cfg.policy.tile
    return [np.asarray(Image.fromarray(p).resize((side, side))) for p in parts.default_pictures(cfg)]


@contextlib.contextmanager
def opened(bundle: Path, threads: int = 2) -> Iterator[Callable[[np.ndarray, str, int], str]]:
    """The stock runtime with a bundle in it: a function (pixels u8[T T 3], question, most tokens) -> greedy answer."""
    lm = lower.extra("litert_lm", "litertlm")
    cpu = lm.Backend.CPU
    lm.set_min_log_severity(lm.LogSeverity.ERROR)  # of what it tells when the process ends
    with (
        lower.without_chatter(),
        tempfile.TemporaryDirectory() as work,  # for what it repacks, as large as the weights
        lm.Engine(str(bundle), backend=cpu(thread_count=threads), vision_backend=cpu(), cache_dir=work) as engine,
    ):

        def ask(pixels: np.ndarray, question: str, most: int) -> str:
            Image.fromarray(pixels).save(path := Path(work) / "picture.png")
            content = [{"type": "image", "path": str(path)}, {"type": "text", "text": question}]
            with engine.create_conversation() as talk:  # closed here: it must not outlive the engine
                pieces = talk.send_message_async({"role": "user", "content": content}, max_output_tokens=most)
                return "".join(part.text for piece in pieces for part in piece.contents)

        yield ask


def _metadata(files: Runtime) -> Any:
    proto = lower.extra("litert_lm_builder.runtime.proto.llm_metadata_pb2", "litertlm")
    said, cfg = proto.LlmMetadata(), files.config
    said.max_num_tokens = files.cache_length
    said.stop_tokens.add().token_str = tokens.IM_END
    said.suppress_tokens.ids.extend(np.flatnonzero(files.tokenizer.forbidden(cfg.llm.vocab)).tolist())
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
