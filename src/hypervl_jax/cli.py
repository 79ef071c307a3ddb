"""The `hypervl` command: parse, call, print. Every verb is one function elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from hypervl_jax import __version__
from hypervl_jax.config import BRANCHES, SEEDS, SIDE, Branch, Config, ConfigError
from hypervl_jax.presets import PRESETS, preset

DEFAULT = "nano"  # weights that ship
EXTRAS = {  # what an extra brings -> the extra
    "tensorflow_datasets": "train",
    "grain": "train",
    "ai_edge_litert": "export",
}
LONGEST = 4096  # tokens an answer may have: the cache is as long


class UsageError(ValueError):
    """An argument that cannot be; the message says what can."""


Stops = Annotated[tuple[str, ...], arg(metavar="TEXT"), UseAppendAction]
Weights = Literal["f32", "bf16", "int8", "int4"]
DTYPES = {"f32": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "int4"}
Pictures = Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE...")]


def ask(
    images: Pictures,
    question: Annotated[Positional[str], arg(metavar="QUESTION")],
    /,
    model: Annotated[str, arg(metavar="MODEL")] = DEFAULT,
    branch: Branch = "base",
    vrc: bool = True,
    weights: Weights = "f32",
    runtime: Literal["jax", "litert"] = "jax",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    penalty: float = 1.0,
    seed: int | None = None,
    stop: Stops = (),
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
        weights: kept in memory as f32, bf16, int8 (a quarter of it) or int4 (the decoder's projections: an eighth).
        runtime: jax, or litert: the exported .tflite files alone.
        temperature: 0 is greedy: the same answer every time. Above 0 the answer is sampled.
        top_k: sample from this many likeliest tokens only; 0: from all.
        top_p: sample from the likeliest tokens that together have this probability; 1: from all.
        penalty: of tokens that were said or asked already, above 1 against repetition; 1: none.
        seed: what is sampled depends on it; drawn, and said on stderr, if not given.
        stop: the answer ends before this text; may be given several times.
        max_tokens: the longest answer.
        explain_compile: list the programs that the answer needs, and why these.
    """
    from hypervl_jax import image

    if not images:
        raise UsageError(
            f'{question}: one argument only; give a picture and a question: hypervl ask {question} "what is this?"'
        )
    if not question.strip():
        raise UsageError('the question is empty; ask for example "what is this?"')
    if runtime == "litert" and (temperature, top_k, top_p, penalty, stop, explain_compile) != (0, 0, 1, 1, (), False):
        raise UsageError(
            "--temperature, --top-k, --top-p, --penalty, --stop and --explain-compile are for --runtime jax: the "
            "exported files answer greedily"
        )
    if runtime == "litert" and weights != "f32":
        raise UsageError("--weights is for --runtime jax: exported files have the weights they were written with")
    if runtime == "litert" and len(images) > 1:
        raise UsageError(f"{images[1]}: the exported files answer about one picture at a time; use --runtime jax")
    settings = _settings(temperature, top_k, top_p, penalty, seed, max_tokens) if runtime == "jax" else {}
    pixels = [image.load(path) for path in images]
    if runtime == "jax":
        from hypervl_jax import console
        from hypervl_jax.chat import Chat

        console.answer(
            Chat(_load(model, DTYPES[weights]), branch, vrc, stops=stop, **settings), pixels, question, explain_compile
        )
        return
    from hypervl_jax import text
    from hypervl_jax.export.runtime import Runtime

    if not 1 <= max_tokens <= LONGEST:
        raise UsageError(f"--max-tokens {max_tokens}: choose 1 to {LONGEST}")
    files = Runtime(_exported(model))
    if branch not in files.branches:
        raise UsageError(f"{model}: branch {branch} was not exported; give --branch {files.branches[0]}")
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
    model: Annotated[str, arg(metavar="MODEL")] = DEFAULT,
    branch: Branch = "base",
    vrc: bool = True,
    weights: Weights = "f32",
    system: str = "",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    penalty: float = 1.0,
    seed: int | None = None,
    stop: Stops = (),
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
        weights: kept in memory as f32, bf16, int8 (a quarter of it) or int4 (the decoder's projections: an eighth).
        system: an instruction that stands before the conversation.
        temperature: 0 is greedy: the same answer every time. Above 0 the answer is sampled.
        top_k: sample from this many likeliest tokens only; 0: from all.
        top_p: sample from the likeliest tokens that together have this probability; 1: from all.
        penalty: of tokens that were said or asked already, above 1 against repetition; 1: none.
        seed: what is sampled depends on it; drawn, and said on stderr, if not given.
        stop: an answer ends before this text; may be given several times.
        max_tokens: the longest answer.
        context: the longest conversation in tokens, beyond which the oldest turns are forgotten; default 40960.
        thinking: let the model think before it answers, if it was taught to.
        explain_compile: list the programs that each answer needs, and why these.
    """
    from hypervl_jax import console, image

    settings = _settings(temperature, top_k, top_p, penalty, seed, max_tokens)
    if context is not None and context <= max_tokens:
        raise UsageError(f"--context {context}: choose more than --max-tokens, {max_tokens}")
    pixels = [image.load(path) for path in images]
    loaded = _load(model, DTYPES[weights])
    from hypervl_jax.chat import CONTEXT, Chat

    def begin() -> Chat:
        return Chat(
            loaded, branch, vrc, system=system, stops=stop, thinking=thinking, context=context or CONTEXT, **settings
        )

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
    model: Annotated[str, arg(metavar="MODEL")] = DEFAULT,
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
        raise UsageError("no picture; give one or more: hypervl tokens IMAGE...")
    if config is not None and model != DEFAULT:
        raise UsageError("--model and --config: give one of them; --config needs no weights")
    pixels = [image.load(path) for path in images]
    loaded = _load(model) if config is None else None
    cfg = loaded.config if loaded is not None else load_config(config or "").model
    _keep_compiled()
    from hypervl_jax import ask as path
    from hypervl_jax import cost, plan, text

    encodings: dict[Branch, cost.Encoding] = {branch: cost.encoding(cfg, branch) for branch in BRANCHES}
    decoder = cost.decoder_bytes(cfg)
    for name, picture in zip(images, pixels, strict=True):
        h, w = picture.shape[:2]
        ratio = path.ratio_of(loaded, picture) if loaded is not None and vrc else 1.0
        p, whole = plan.make((h, w), ratio, cfg.policy), plan.make((h, w), 1.0, cfg.policy)
        n, most = (text.visual_tokens(each, cfg.text) for each in (p, whole))
        rows, cols = p.grid
        tiles = (
            f"{rows} x {cols} tiles and a thumbnail"
            if p.thumb
            else f"{rows} x {cols} tiles"
            if rows * cols > 1
            else "1 tile"
        )
        print(f"{name}: {w} x {h} px at ratio {p.ratio:.2f} is {p.resized[1]} x {p.resized[0]} px, {tiles}")
        print(f"  {n} tokens, {p.tokens} of them visual" + (f"; VRC spares {1 - n / most:.0%}" if ratio < 1 else ""))
        print("\n".join(cost.table(p, cfg, encodings, decoder)))


def _settings(
    temperature: float, top_k: int, top_p: float, penalty: float, seed: int | None, max_tokens: int
) -> dict[str, Any]:
    """How answers are made, as `Chat` takes it; a seed that has to be drawn is said."""
    from hypervl_jax.generate import Sampler, SamplerError

    if seed is not None and not 0 <= seed < 1 << 32:
        raise UsageError(f"--seed {seed}: choose 0 to {(1 << 32) - 1}")
    if not 1 <= max_tokens <= LONGEST:
        raise UsageError(f"--max-tokens {max_tokens}: choose 1 to {LONGEST}")
    try:
        sampler = Sampler(temperature, top_k, top_p, penalty)
    except SamplerError as e:
        raise UsageError(f"--{str(e).replace('_', '-', 1)}") from e
    if temperature:
        seed = secrets.randbits(32) if seed is None else seed
        print(f"sampled with --seed {seed}", file=sys.stderr)
    return {"sampler": sampler, "seed": seed, "max_tokens": max_tokens}


def train(config: Annotated[Positional[str], arg(metavar="CONFIG")], /, out: Path, steps: int | None = None) -> None:
    """Train a model: data, both branches under one decoder with DCL, then VRC on the model's own labels.

    Interrupted, the same command goes on where it stopped. The model is OUT/model. For example:

    hypervl train quickstart --out runs/mine

    hypervl train configs/nano.py --out runs/nano

    Args:
        config: a preset (tiny, quickstart, nano) or a file with `get_config()`, such as configs/nano.py.
        out: folder to write; a run that is there is resumed.
        steps: training steps, instead of the config's; a run is gone on with under the same number.
    """
    cfg = _prepared(config, steps, out)
    from hypervl_jax import quickstart as recipe

    recipe.make_model(cfg, out)
    print(f'ask it:    hypervl ask PICTURE "what is this?" --model {out / "model"}')
    print(f"judge it:  hypervl eval --model {out / 'model'}")
    print(f"export it: hypervl export {out / 'model'} --out {out / 'export'}")


def evaluate(
    model: Annotated[str, arg(metavar="MODEL")] = DEFAULT,
    branch: Branch = "base",
    vrc: bool = False,
    screens: int | None = None,
    data: Path | None = None,
) -> None:
    """Accuracy of a model on the held-out screens it was configured with, per task with 95 % intervals, as JSON.

    For example:

    hypervl eval --model quickstart/model --branch large --screens 100

    Args:
        model: a model folder, or the name of weights that ship.
        branch: which vision encoder looks.
        vrc: shrink every picture as VRC predicts.
        screens: how many of each test split; all if not given.
        data: where the data set is built, or found built; if not given, beside the model or under runs/data.
    """
    if screens is not None and screens < 1:
        raise UsageError(f"--screens {screens}: at least 1")
    _need("tensorflow_datasets")
    loaded = _load(model)
    from hypervl_jax import checkpoint, judge

    beside = checkpoint.find_model(model).parent / "data"
    data = data or (beside if beside.is_dir() else Path("runs/data"))
    print(json.dumps(judge.verdict(loaded, branch, vrc, screens, data), indent=1))


def export(
    model: Annotated[Positional[str], arg(metavar="MODEL")], /, out: Path, branch: Branch | Literal["both"] = "both"
) -> None:
    """Write a model as verified .tflite files with a manifest; nothing is left if a part does not match JAX.

    For example:

    hypervl export quickstart/model --out phone

    Args:
        model: a model folder, or the name of weights that ship.
        out: folder to write; an earlier export there is replaced, anything else is left alone.
        branch: which vision encoders to export.
    """
    from hypervl_jax.export import lower, parts

    lower.require()
    loaded = _load(model)
    made = parts.export(loaded, out, branches=BRANCHES if branch == "both" else (branch,))
    for name, error in made.parity.items():
        print(f"{name}: {error:.1e} from JAX")
    for part in made.parts:
        print(f"{part.name}: {part.file.bytes / 1e6:.2f} MB, {len(part.signatures)} signatures")
    print(f'ask it: hypervl ask PICTURE "what is this?" --runtime litert --model {out}')


def convert(
    model: Annotated[Positional[str | None], arg(metavar="[MODEL]")] = None,
    /,
    *,
    out: Path,
    part: Branch | Literal["llm"] | None = None,
    vision_base: Path | None = None,
    vision_large: Path | None = None,
    llm: Path | None = None,
    tile: int | None = None,
    seed: int = 0,
    dtype: Literal["f32", "f16", "bf16"] | None = None,
) -> None:
    """Put a model together from published weights, or write a part of one as transformers opens it.

    Projectors and VRC are drawn anew: train them before you ask. For example:

    hypervl convert --vision-base siglip2-base-patch16-512 --vision-large siglip2-large-patch16-512 --llm Qwen3-1.7B
    --out assembled

    hypervl convert assembled --part llm --out decoder

    Args:
        model: a model folder, or the name of weights that ship: what --part is taken from.
        out: folder to write; it must be new or empty.
        part: which part of MODEL: the decoder, or an encoder without its projector.
        vision_base: folder of the small encoder: SigLIP 2 of fixed resolution or NaFlex, as safetensors.
        vision_large: folder of the large one.
        llm: folder of the decoder: Qwen3 or Llama, with its tokenizer.json.
        tile: pixels a side of a tile; if not given, those both encoders were made for.
        seed: what is drawn anew depends on it.
        dtype: of the weights written; each as it is if not given.
    """
    folders = [folder for folder in (vision_base, vision_large, llm) if folder is not None]
    if model is not None and (part is None or folders or tile is not None):
        raise UsageError(f"{model}: a whole model; say with --part what to write of it, and leave out the rest")
    if model is None and (part is not None or len(folders) < 3):
        raise UsageError("give --vision-base, --vision-large and --llm, or MODEL and --part")
    if tile is not None and not 1 <= tile <= SIDE:
        raise UsageError(f"--tile {tile}: choose 1 to {SIDE}")
    if not 0 <= seed <= SEEDS:
        raise UsageError(f"--seed {seed}: choose 0 to {SEEDS}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: is there already; remove it, or choose another --out")
    from hypervl_jax import checkpoint
    from hypervl_jax import convert as parts

    kind = {None: None, "f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype]
    if model is not None and part is not None:
        loaded = _load(model, None)
        parts.save_llm(out, loaded, kind) if part == "llm" else parts.save_vit(out, loaded, part, kind)
        print(f"wrote {out}: {part} of {model}")
        return
    _keep_compiled()
    whole, lines = parts.assemble(*folders, tile=tile, seed=seed)
    checkpoint.save_model(out, whole.config, whole.params, whole.tokenizer, whole.info, kind)
    print("\n".join(lines))
    print(f"wrote {out}: tiles of {whole.config.policy.tile} px, {whole.config.policy.tokens_per_tile} tokens each")


def quickstart(
    config: Annotated[str, arg(metavar="CONFIG")] = "quickstart",
    out: Path = Path("quickstart"),
    steps: int | None = None,
) -> None:
    """The whole path from nothing: train, evaluate, export, answer from the exported files, write OUT/report.html.

    Interrupted, the same command goes on where it stopped. For example:

    hypervl quickstart

    hypervl quickstart --config tiny --out /tmp/tiny

    Args:
        config: a preset (tiny, quickstart, nano) or a file with `get_config()`.
        out: folder to write; a run that is there is resumed.
        steps: training steps, instead of the config's; a run is gone on with under the same number.
    """
    cfg = _prepared(config, steps, out)
    from hypervl_jax import quickstart as recipe

    recipe.run(cfg, out)
    print(f"open {out / 'report.html'}")


def load_config(name: str, steps: int | None = None) -> Config:
    """A preset by name, or `get_config()` of a Python file. Raises `ConfigError` saying what there is."""
    path = Path(name)
    cfg = _config_of(path) if name not in PRESETS and (path.suffix == ".py" or path.exists()) else preset(name)
    if steps is None:
        return cfg
    if steps < 1:
        raise UsageError(f"--steps {steps}: at least 1")
    early = cfg.train.stage0_steps
    if steps <= early:
        early = steps * early // cfg.train.steps
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=steps, stage0_steps=early))


def _config_of(path: Path) -> Config:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise ConfigError(f"{path}: {what}; give a preset ({', '.join(PRESETS)}) or a file such as configs/nano.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: a config is a Python file (.py) with `def get_config() -> Config`")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        cfg = module.get_config()
    except Exception as e:  # it is the user's program: anything may come out of it
        raise ConfigError(f"{path}: get_config() could not be had from this file ({type(e).__name__}: {e})") from e
    if not isinstance(cfg, Config):
        raise ConfigError(f"{path}: get_config() must return a Config, not {type(cfg).__name__}")
    return cfg


def _prepared(config: str, steps: int | None, out: Path) -> Config:
    """The config of a run, when what the run needs is there: found out now, not after an hour."""
    cfg = load_config(config, steps)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file is there; choose another --out")
    _need("tensorflow_datasets", "grain")
    _keep_compiled()
    return cfg


def _need(*modules: str) -> None:
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise UsageError(_missing(name))


def _missing(module: str) -> str:
    return f"{module} is not installed: pip install 'hypervl-jax[{EXTRAS[module]}]', or `make setup` in a clone"


def _load(name: str, dtype: Any = "float32") -> Any:
    """A model, or the one line that says how to come by one."""
    from hypervl_jax import checkpoint

    if not name.strip():
        raise UsageError("--model is empty; give a model folder, or leave it out")
    if name == DEFAULT and not Path(name).exists() and not (checkpoint.SHIPPED / name).exists():
        raise UsageError(
            f"no {DEFAULT} weights ship with this version; make a model with `make quickstart` (or `hypervl "
            "quickstart`), then give --model quickstart/model"
        )
    if (Path(name) / "manifest.json").is_file():
        raise UsageError(f"{name}: these are exported files; ask them with --runtime litert, or give the model folder")
    _keep_compiled()
    return checkpoint.load_model(name, dtype)


def _exported(name: str) -> Path:
    """A folder of exported files; the folder of a whole run will do."""
    for path in (Path(name), Path(name) / "export"):
        if (path / "manifest.json").is_file():
            return path
    if name != DEFAULT and not Path(name).exists():
        raise UsageError(f"{name}: does not exist; give a folder that hypervl export MODEL --out FOLDER wrote")
    raise UsageError(
        f"{name}: no exported files; write them: hypervl export {name} --out phone, then ask with --model phone"
    )


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


VERBS = {
    "ask": ask,
    "chat": chat,
    "tokens": tokens,
    "quickstart": quickstart,
    "train": train,
    "eval": evaluate,
    "export": export,
    "convert": convert,
}
ABOUT = """A vision-language model for phones, in JAX: ask it, train it, export it, make it of published weights.

`hypervl VERB --help` shows examples and defaults; --version the version; --debug, with any verb, where an error comes
from."""


def main(argv: list[str] | None = None) -> None:
    """Entry point: whatever goes wrong is one line on stderr and a non-zero exit; --debug shows where it comes from."""
    argv = sys.argv[1:] if argv is None else argv
    debug, argv = "--debug" in argv, [a for a in argv if a != "--debug"]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if argv in (["--version"], ["-V"]):
        print(f"hypervl {__version__}")
        return
    try:
        tyro.extras.subcommand_cli_from_dict(VERBS, prog="hypervl", description=ABOUT, args=argv or ["--help"])
    except KeyboardInterrupt:
        print("\nhypervl: interrupted; what is finished is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        if debug:
            raise
        print("hypervl: " + " ".join(_line(e).split()), file=sys.stderr)
        sys.exit(1)


def _line(e: Exception) -> str:
    """What to tell of an error: the message of our own, which names file and cure; of any other, where to look."""
    if type(e).__module__.startswith("hypervl_jax"):
        return str(e)
    if isinstance(e, ImportError):
        return _missing(e.name) if e.name in EXTRAS else str(e)
    if isinstance(e, OSError):
        return f"{e.filename}: {e.strerror}" if e.filename and e.strerror else str(e) or type(e).__name__
    first = (str(e).strip().splitlines() or [""])[0]
    return f"{type(e).__name__}: {first[:300]} (not expected; the same command with --debug shows where)"


def _keep_compiled() -> None:
    """Compiled programs are kept between calls, unless the environment says where and which."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "hypervl_jax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


if __name__ == "__main__":
    main()
