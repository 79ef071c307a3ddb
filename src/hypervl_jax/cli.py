"""The `hypervl` command: parse, call, print. Every verb is one function elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from hypervl_jax.config import BRANCHES, Branch, Config, ConfigError, preset

Out = Annotated[Path, arg(help="Folder to write; a run that is there is resumed.")]


def ask(
    picture: Positional[Path],
    question: Positional[str],
    /,
    model: str = "nano",
    branch: Branch = "base",
    vrc: bool = True,
    runtime: Literal["jax", "litert"] = "jax",
    temperature: float = 0.0,
    max_tokens: int = 32,
) -> None:
    """Ask a question about a picture.

    Args:
        picture: an image file (PNG, JPEG, WebP, GIF, TIFF, BMP).
        question: e.g. "what is at the top left?", "where is the anchor?", "what is the number?"
        model: a model folder, or the name of weights that ship; with --runtime litert a folder written by `export`.
        branch: which vision encoder looks: base is small and fast, large sees better.
        vrc: let the Visual Resolution Compressor shrink the picture as far as it can bear.
        runtime: jax, or litert: the exported .tflite files alone.
        temperature: 0 is greedy.
        max_tokens: the longest answer.
    """
    from hypervl_jax import image

    pixels = image.load(picture)
    if runtime == "litert":
        from hypervl_jax.export.runtime import Runtime

        pieces, size, seen = Runtime(model).stream(pixels, question, branch, vrc, max_tokens), pixels.shape[:2], None
    else:
        from hypervl_jax import ask as path
        from hypervl_jax import checkpoint

        loaded = checkpoint.load_model(model)
        seen, size = path.see(loaded, pixels, branch, vrc), pixels.shape[:2]
        pieces = path.answer(loaded, seen, question, max_tokens, temperature)
        coords = loaded.config.text.coords
    said = []
    for piece in pieces:
        said.append(piece)
        print(piece, end="", flush=True)
    print()
    if seen is not None:
        from hypervl_jax.evaluate import point

        at = point("".join(said), size, coords)
        if at and question.strip().lower().startswith("where"):
            print(f"point x {at[0]:.0f}, y {at[1]:.0f} of {size[1]} x {size[0]} pixels", file=sys.stderr)
        p = seen.plan
        print(
            f"{branch}: {size[1]} x {size[0]} px at ratio {p.ratio:.2f}, {p.n_tiles} tiles, {p.tokens} visual tokens",
            file=sys.stderr,
        )


def train(config: Positional[str], /, out: Out, steps: int | None = None) -> None:
    """Train a model: data, both branches under one decoder with DCL, then VRC on the model's own labels.

    Args:
        config: a preset (tiny, quickstart, nano) or a file with `get_config()`, such as configs/nano.py.
        out: folder to write; a run that is there is resumed.
        steps: training steps, instead of the config's.
    """
    from hypervl_jax import quickstart as recipe

    recipe.make_model(load_config(config, steps), out)
    print(f'ask it:    hypervl ask PICTURE "what is this?" --model {out / "model"}')
    print(f"judge it:  hypervl eval --model {out / 'model'}")
    print(f"export it: hypervl export {out / 'model'} --out {out / 'export'}")


def evaluate(
    model: str = "nano",
    branch: Branch = "base",
    vrc: bool = False,
    screens: int | None = None,
    data: Path = Path("runs/data"),
) -> None:
    """Accuracy of a model on the held-out screens it was configured with, per task with 95 % intervals, as JSON.

    Args:
        model: a model folder, or the name of weights that ship.
        branch: which vision encoder looks.
        vrc: shrink every picture as VRC predicts.
        screens: how many of each test split; all if not given.
        data: where the data set is built, or found built.
    """
    from hypervl_jax import checkpoint
    from hypervl_jax import quickstart as recipe

    print(json.dumps(recipe.judge(checkpoint.load_model(model), branch, vrc, screens, data), indent=1))


def export(model: Positional[str], /, out: Path, branch: Literal["base", "large", "both"] = "both") -> None:
    """Write a model as verified .tflite files with a manifest; nothing is left if a part does not match JAX.

    Args:
        model: a model folder, or the name of weights that ship.
        out: folder to write.
        branch: which vision encoders to export.
    """
    from hypervl_jax import checkpoint
    from hypervl_jax.export import parts

    made = parts.export(checkpoint.load_model(model), out, branches=BRANCHES if branch == "both" else (branch,))
    for name, error in made.parity.items():
        print(f"{name}: {error:.1e} from JAX")
    for part in made.parts:
        print(f"{part.name}: {part.bytes / 1e6:.2f} MB, {len(part.signatures)} signatures")
    print(f'ask it: hypervl ask PICTURE "what is this?" --runtime litert --model {out}')


def quickstart(config: str = "quickstart", out: Out = Path("quickstart"), steps: int | None = None) -> None:
    """The whole path from nothing: train, evaluate, export, answer from the exported files, write OUT/report.html.

    Args:
        config: a preset or a file with `get_config()`.
        out: folder to write; a run that is there is resumed.
        steps: training steps, instead of the config's.
    """
    from hypervl_jax import quickstart as recipe

    recipe.run(load_config(config, steps), out)
    print(f"open {out / 'report.html'}")


def load_config(name: str, steps: int | None = None) -> Config:
    """A preset by name, or `get_config()` of a Python file. Raises `ConfigError` saying what there is."""
    import dataclasses

    path = Path(name)
    if path.suffix == ".py" or path.exists():
        if not path.is_file():
            raise ConfigError(f"{path}: no such config file; give a preset or a file such as configs/nano.py")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"{path}: a config is a Python file with `def get_config() -> Config`")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            cfg = module.get_config()
        except (AttributeError, SyntaxError, UnicodeDecodeError, ValueError) as e:
            raise ConfigError(f"{path}: not a config file, which is Python with `get_config()` ({e})") from e
        if not isinstance(cfg, Config):
            raise ConfigError(f"{path}: get_config() must return a Config, not {type(cfg).__name__}")
    else:
        cfg = preset(name)
    if steps is None:
        return cfg
    if steps <= cfg.train.stage0_steps:
        early = steps * cfg.train.stage0_steps // cfg.train.steps
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, stage0_steps=early))
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=steps))


VERBS = {"ask": ask, "quickstart": quickstart, "train": train, "eval": evaluate, "export": export}


def main(argv: list[str] | None = None) -> None:
    """Entry point: errors that a user can mend are one line and exit code 1; --debug shows where they come from."""
    argv = sys.argv[1:] if argv is None else argv
    debug, argv = "--debug" in argv, [a for a in argv if a != "--debug"]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        _cache()
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="hypervl",
            description="A vision-language model for phones, in JAX: ask it, train it, export it.",
            args=argv,
        )
    except KeyboardInterrupt:
        sys.exit("hypervl: interrupted; what was finished is kept, the same command goes on from there")
    except (ValueError, RuntimeError, OSError) as e:
        if debug:
            raise
        sys.exit(f"hypervl: {str(e).strip() or type(e).__name__}".replace("\n", " "))


def _cache() -> None:
    """Compiled programs are kept between calls."""
    import jax

    where = os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "hypervl_jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(where))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


if __name__ == "__main__":
    main()
