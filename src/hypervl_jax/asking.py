"""The verbs of the `hypervl` command that answer: ask, chat, tokens."""

from __future__ import annotations

import dataclasses
import secrets
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from hypervl_jax import needs
from hypervl_jax.config import BRANCHES, SEEDS, Branch

LONGEST = 4096  # tokens an answer may have: the cache is as long

Stops = Annotated[tuple[str, ...], arg(metavar="TEXT"), UseAppendAction]
Weights = Literal["f32", "bf16", "int8", "int4"]
DTYPES = {"f32": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "int4"}
Pictures = Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE...")]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an answer is made."""

    temperature: float = 0.0
    """0 is greedy: the same answer every time. Above 0 the answer is sampled."""
    top_k: int = 0
    """sample from this many likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """sample from the likeliest tokens that together have this probability; 1: from all."""
    penalty: float = 1.0
    """of tokens that were said or asked already, above 1 against repetition; 1: none."""
    seed: int | None = None
    """what is sampled depends on it; drawn, and said on stderr, if not given."""
    stop: Stops = ()
    """the answer ends before this text; may be given several times."""


How = Annotated[Sampling, arg(name="")]


def ask(
    images: Pictures,
    question: Annotated[Positional[str], arg(metavar="QUESTION")],
    /,
    model: Annotated[str, arg(metavar="MODEL")] = needs.DEFAULT,
    branch: Branch = "base",
    vrc: bool = True,
    weights: Weights = "f32",
    runtime: Literal["jax", "litert"] = "jax",
    how: How = Sampling(),
    max_tokens: int = 32,
    explain_compile: bool = False,
) -> None:
    """Ask a question about a picture, or several. The answer goes to stdout, how the picture was seen to stderr.

    For example:

    hypervl ask screen.png "what is at the top left?"

    hypervl ask screen.png "where is the anchor?" --model quickstart/model --branch large

    hypervl ask before.png after.png "what is the number?"

    hypervl ask screen.png "what is the number?" --model quickstart/export --runtime litert

    Args:
        images: one image file or more (PNG, JPEG, WebP, GIF, TIFF, BMP).
        question: comes last, e.g. "what is at the top left?", "where is the anchor?", "what is the number?"
        model: a model folder, or the name of weights that ship; with --runtime litert a folder written by `export`.
        branch: which vision encoder looks: base is small and fast, large sees better.
        vrc: let the Visual Resolution Compressor shrink the picture as far as it can bear.
        weights: kept in memory as f32, bf16, int8 (a quarter of it) or int4 (the decoder's projections: a seventh).
        runtime: jax, or litert: the exported .tflite files alone.
        max_tokens: the longest answer.
        explain_compile: list the programs that the answer needs, and why these.
    """
    from hypervl_jax import image

    if not images:
        raise needs.UsageError(
            f'{question}: one argument only; give a picture and a question: hypervl ask {question} "what is this?"'
        )
    if not question.strip():
        raise needs.UsageError('the question is empty; ask for example "what is this?"')
    if runtime == "litert" and (dataclasses.replace(how, seed=None) != Sampling() or explain_compile):
        raise needs.UsageError(
            "--temperature, --top-k, --top-p, --penalty, --stop and --explain-compile are for --runtime jax: the "
            "exported files answer greedily"
        )
    if runtime == "litert" and weights != "f32":
        raise needs.UsageError("--weights is for --runtime jax: exported files have the weights they were written with")
    if runtime == "litert" and len(images) > 1:
        raise needs.UsageError(f"{images[1]}: the exported files answer about one picture at a time; use --runtime jax")
    settings = _settings(how, max_tokens) if runtime == "jax" else {}
    pixels = [image.load(path) for path in images]
    if runtime == "jax":
        from hypervl_jax import console
        from hypervl_jax.chat import Chat

        console.answer(
            Chat(needs.load(model, DTYPES[weights]), branch, vrc, **settings), pixels, question, explain_compile
        )
        return
    from hypervl_jax import text
    from hypervl_jax.export.runtime import Runtime

    if not 1 <= max_tokens <= LONGEST:
        raise needs.UsageError(f"--max-tokens {max_tokens}: choose 1 to {LONGEST}")
    files = Runtime(needs.exported(model))
    if branch not in files.branches:
        raise needs.UsageError(f"{model}: branch {branch} was not exported; give --branch {files.branches[0]}")
    said, done = _say(files.stream(pixels[0], question, branch, vrc, max_tokens))
    if not done.ended:
        full = len(done.ids) < max_tokens
        limit = f"the exported cache of {files.cache_length} tokens" if full else f"--max-tokens {max_tokens}"
        print(f"the answer was cut off by {limit}", file=sys.stderr)
    for line in [*text.places(said, done.plan, files.config.text.coords), f"{branch}: {done.plan.summary()}"]:
        print(line, file=sys.stderr)


def chat(
    images: Pictures = (),
    /,
    model: Annotated[str, arg(metavar="MODEL")] = needs.DEFAULT,
    branch: Branch = "base",
    vrc: bool = True,
    weights: Weights = "f32",
    system: str = "",
    how: How = Sampling(),
    max_tokens: int = 256,
    context: int | None = None,
    thinking: bool = False,
    explain_compile: bool = False,
) -> None:
    """Talk about pictures. A question a line, typed or piped in; answers go to stdout, everything else to stderr.

    Lines that begin with a slash are commands: /image FILE shows a picture with the next question, /new begins again,
    /help lists them. Ctrl-C stops an answer, Ctrl-D ends the chat. A picture is encoded once, and of each turn only
    what is new is read. For example:

    hypervl chat screen.png

    printf 'what is this?\\nand at the top left?\\n' | hypervl chat screen.png --branch large

    Args:
        images: image files to show with the first question.
        model: a model folder, or the name of weights that ship.
        branch: which vision encoder looks: base is small and fast, large sees better.
        vrc: let the Visual Resolution Compressor shrink pictures as far as they can bear.
        weights: kept in memory as f32, bf16, int8 (a quarter of it) or int4 (the decoder's projections: a seventh).
        system: an instruction that stands before the conversation.
        max_tokens: the longest answer.
        context: the longest conversation in tokens, beyond which the oldest turns are forgotten; default 40960.
        thinking: let the model think before it answers, if it was taught to.
        explain_compile: list the programs that each answer needs, and why these.
    """
    from hypervl_jax import console, image

    settings = _settings(how, max_tokens)
    if context is not None and context <= max_tokens:
        raise needs.UsageError(f"--context {context}: choose more than --max-tokens, {max_tokens}")
    pixels = [image.load(path) for path in images]
    loaded = needs.load(model, DTYPES[weights])
    from hypervl_jax.chat import CONTEXT, Chat

    def begin() -> Chat:
        return Chat(loaded, branch, vrc, system=system, thinking=thinking, context=context or CONTEXT, **settings)

    def told(e: Exception) -> str | None:
        return str(e) if type(e).__module__.startswith("hypervl_jax") else None

    at_a_terminal = sys.stdin.isatty()
    if at_a_terminal:
        console.note(console.HELP)
    lines = console.typed() if at_a_terminal else sys.stdin
    if console.talk(begin, lines, pixels, told, explain_compile):
        sys.exit(0 if at_a_terminal else 1)


def tokens(
    images: Pictures,
    /,
    model: Annotated[str, arg(metavar="MODEL")] = needs.DEFAULT,
    config: Annotated[str | None, arg(metavar="CONFIG")] = None,
    vrc: bool = True,
) -> None:
    """What pictures cost before any is encoded: size, VRC's ratio, tiles, tokens, FLOPs, memory of each branch.

    For example:

    hypervl tokens screen.png

    hypervl tokens photo.jpg page.png --config hypervl_1p7b

    Args:
        images: image files (PNG, JPEG, WebP, GIF, TIFF, BMP).
        model: a model folder, or the name of weights that ship; its VRC chooses the ratio.
        config: a preset or a file with `get_config()` instead of a model: no weights are needed, the ratio is 1.
        vrc: let the Visual Resolution Compressor of the model choose the ratio; otherwise it is 1.
    """
    from hypervl_jax import image

    if not images:
        raise needs.UsageError("no picture; give one or more: hypervl tokens IMAGE...")
    if config is not None and model != needs.DEFAULT:
        raise needs.UsageError("--model and --config: give one of them; --config needs no weights")
    pixels = [image.load(path) for path in images]
    loaded = needs.load(model) if config is None else None
    cfg = loaded.config if loaded is not None else needs.load_config(config or "").model
    needs.keep_compiled()
    from hypervl_jax import ask as path
    from hypervl_jax import cost, plan, text

    encodings: dict[Branch, cost.Encoding] = {branch: cost.encoding(cfg, branch) for branch in BRANCHES}
    decoder = cost.decoder_bytes(cfg)
    for name, picture in zip(images, pixels, strict=True):
        h, w = picture.shape[:2]
        ratio = path.ratio_of(loaded, picture) if loaded is not None and vrc else 1.0
        p, whole = plan.make((h, w), ratio, cfg.policy), plan.make((h, w), 1.0, cfg.policy)
        n, most = (text.visual_tokens(each, cfg.text) for each in (p, whole))
        print(f"{name}: {p.summary()}, resized to {p.resized[1]} x {p.resized[0]} px")
        print(f"  {n} tokens with markers" + (f"; VRC spares {1 - n / most:.0%}" if ratio < 1 else ""))
        print("\n".join(cost.table(p, cfg, encodings, decoder)))


def _settings(how: Sampling, max_tokens: int) -> dict[str, Any]:
    """How answers are made, as `Chat` takes it; a seed that has to be drawn is said."""
    from hypervl_jax.generate import Sampler, SamplerError

    if how.seed is not None and not 0 <= how.seed <= SEEDS:
        raise needs.UsageError(f"--seed {how.seed}: choose 0 to {SEEDS}")
    if not 1 <= max_tokens <= LONGEST:
        raise needs.UsageError(f"--max-tokens {max_tokens}: choose 1 to {LONGEST}")
    try:
        sampler = Sampler(how.temperature, how.top_k, how.top_p, how.penalty)
    except SamplerError as e:
        raise needs.UsageError(f"--{str(e).replace('_', '-', 1)}") from e
    seed = how.seed
    if how.temperature:
        seed = secrets.randbits(32) if seed is None else seed
        print(f"sampled with --seed {seed}", file=sys.stderr)
    return {"sampler": sampler, "seed": seed, "max_tokens": max_tokens, "stops": how.stop}


def _say(pieces: Any) -> tuple[str, Any]:
    """Prints pieces as they come; returns (the whole text, what the generator returned)."""

    def tee() -> Generator[str, None, Any]:
        return (yield from pieces)

    said, at = [], tee()
    while True:
        try:
            said.append(next(at))
        except StopIteration as end:
            print(flush=True)
            return "".join(said), end.value
        print(said[-1], end="", flush=True)
