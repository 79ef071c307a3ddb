"""The `hypervl` command: parse, call, print. Every verb is one function elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import secrets
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from hypervl_jax import __version__
from hypervl_jax.config import BRANCHES, SEEDS, SIDE, Branch, Config, ConfigError
from hypervl_jax.presets import PRESETS, preset

DEFAULT = "quickstart"  # weights that ship
EXTRAS = {  # what an extra brings -> the extra
    "tensorflow_datasets": "train",
    "grain": "train",
    "ai_edge_litert": "export",
}
LONGEST = 4096  # tokens an answer may have: the cache is as long


class UsageError(ValueError):
    """An argument that cannot be; the message says what can."""


def ask(
    picture: Annotated[Positional[Path], arg(metavar="PICTURE")],
    question: Annotated[Positional[str], arg(metavar="QUESTION")],
    /,
    model: Annotated[str, arg(metavar="MODEL")] = DEFAULT,
    branch: Branch = "base",
    vrc: bool = True,
    runtime: Literal["jax", "litert"] = "jax",
    temperature: float = 0.0,
    seed: int | None = None,
    max_tokens: int = 32,
) -> None:
    """Ask a question about a picture. The answer goes to stdout, how the picture was seen to stderr.

    For example:

    hypervl ask screen.png "what is at the top left?"

    hypervl ask screen.png "where is the anchor?" --model quickstart/model --branch large

    hypervl ask screen.png "what is the number?" --model quickstart/export --runtime litert

    Args:
        picture: an image file (PNG, JPEG, WebP, GIF, TIFF, BMP).
        question: e.g. "what is at the top left?", "where is the anchor?", "what is the number?"
        model: a model folder, or the name of weights that ship; with --runtime litert a folder written by `export`.
        branch: which vision encoder looks: base is small and fast, large sees better.
        vrc: let the Visual Resolution Compressor shrink the picture as far as it can bear.
        runtime: jax, or litert: the exported .tflite files alone.
        temperature: 0 is greedy: the same answer every time. Above 0 the answer is sampled.
        seed: what is sampled depends on it; drawn, and said on stderr, if not given.
        max_tokens: the longest answer.
    """
    from hypervl_jax import image

    if not question.strip():
        raise UsageError('the question is empty; ask for example "what is this?"')
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"--temperature {temperature}: 0 is greedy, 1 samples as the model predicts")
    if temperature and runtime == "litert":
        raise UsageError("--temperature is for --runtime jax: the exported files answer greedily")
    if seed is not None and not 0 <= seed < 1 << 32:
        raise UsageError(f"--seed {seed}: choose 0 to {(1 << 32) - 1}")
    if not 1 <= max_tokens <= LONGEST:
        raise UsageError(f"--max-tokens {max_tokens}: choose 1 to {LONGEST}")
    pixels, limit = image.load(picture), f"--max-tokens {max_tokens}"
    if runtime == "litert":
        from hypervl_jax.export.runtime import Runtime

        files = Runtime(_exported(model))
        if branch not in files.branches:
            raise UsageError(f"{model}: branch {branch} was not exported; give --branch {files.branches[0]}")
        answer, done = _say(files.stream(pixels, question, branch, vrc, max_tokens))
        plan, coords, ended = done.plan, files.config.text.coords, done.ended
        if len(done.ids) < max_tokens:
            limit = f"the exported cache of {files.cache_length} tokens"
    else:
        loaded = _load(model)
        from hypervl_jax import ask as path

        if temperature:
            seed = secrets.randbits(32) if seed is None else seed
            print(f"sampled with --seed {seed}", file=sys.stderr)
        seen, coords = path.see(loaded, pixels, branch, vrc), loaded.config.text.coords
        answer, ended = _say(path.answer(loaded, seen, question, max_tokens, temperature, seed))
        plan = seen.plan
    if not ended:
        print(f"the answer was cut off by {limit}", file=sys.stderr)
    words, (h, w) = answer.split(), plan.size
    at = [int(n) for n in words if n.isascii() and n.isdecimal() and int(n) < coords]
    if question.strip().lower().startswith("where") and len(words) == len(at) == 2:
        x, y = plan.to_pixels(at, coords)
        print(f"point x {x:.0f}, y {y:.0f} of {w} x {h} pixels", file=sys.stderr)
    tiles = "1 tile" if plan.n_tiles == 1 else f"{plan.n_tiles} tiles"
    print(f"{branch}: {w} x {h} px at ratio {plan.ratio:.2f}, {tiles}, {plan.tokens} visual tokens", file=sys.stderr)


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


VERBS = {"ask": ask, "quickstart": quickstart, "train": train, "eval": evaluate, "export": export, "convert": convert}
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
