"""The `hypervl` command: its entry point, and the verbs that make something. Every verb is one function elsewhere."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from hypervl_jax import __version__, exporting, needs, picking, preparing, rescaling
from hypervl_jax.asking import ask, chat, tokens
from hypervl_jax.config import SEEDS, SIDE, Branch


def train(
    config: Annotated[Positional[str], arg(metavar="CONFIG")],
    /,
    out: Path,
    steps: int | None = None,
    start: Path | None = None,
    data: Path | None = None,
    splits: tuple[str, ...] = (),
    mesh: str | None = None,
    accumulate: int | None = None,
    max_hours: float | None = None,
    sample_every: int = 1_000,
    profile: int = 0,
) -> None:
    """Train a model: on composed screens both branches under one decoder with DCL, then VRC on the model's own labels;
    with --data on conversations of your own.

    Interrupted, the same command goes on where it stopped. On Ctrl-C, SIGTERM and --max-hours it saves first and exits
    with 75. The model is OUT/model. For example:

    hypervl train quickstart --out runs/mine

    hypervl train configs/nano.py --out runs/nano

    hypervl train configs/stage2_pretrain.py --start runs/stage1/model --out runs/stage2

    hypervl train configs/stage2_pretrain.py --start runs/stage1/model --data data/train --out runs/stage2 --mesh fsdp=8

    Args:
        config: a preset (tiny, quickstart, nano) or a file with `get_config()`, such as configs/nano.py.
        out: folder to write; a run that is there is resumed.
        steps: training steps, instead of the config's; a run is gone on with under the same number.
        start: a model folder to begin with, such as that of the stage before; if not given, from nothing.
        data: a folder that `hypervl data build` wrote; if not given, screens are composed.
        splits: which splits of --data; if not given, all.
        mesh: devices along data, fsdp and tensor, such as data=2,fsdp=4, of all processes together; one device if not
            given.
        accumulate: micro-batches a step, instead of the config's: `hypervl plan` says how many fit.
        max_hours: stop in time before so many hours are over.
        sample_every: training steps between answers to a few questions; 0 for none.
        profile: how many training steps to trace, to OUT/train/profile.
    """
    began = time.monotonic()
    if max_hours is not None and not max_hours > 0:
        raise needs.UsageError(f"--max-hours {max_hours:g}: above 0")
    if sample_every < 0 or profile < 0:
        raise needs.UsageError("--sample-every and --profile: at least 0")
    if splits and data is None:
        raise needs.UsageError("--splits: of a data set; give it as --data")
    if mesh is None and "JAX_COORDINATOR_ADDRESS" in os.environ:  # each would train alone, and all write to OUT
        raise needs.UsageError("JAX_COORDINATOR_ADDRESS is set: say with --mesh how several processes train together")
    from hypervl_jax import mesh as meshes

    on = meshes.ONE if mesh is None else meshes.parse(mesh)
    if mesh is not None:
        meshes.start()
    cfg = needs.prepared(config, steps, out, accumulate)
    from hypervl_jax import finetune, watch
    from hypervl_jax import quickstart as recipe

    stop_at = None if max_hours is None else began + 3600 * max_hours
    how = watch.Watch(True, stop_at, sample_every, profile)
    if data is None:
        recipe.make_model(cfg, out, start, watch=how, on=on)
    else:
        finetune.make_model(cfg, data, out, start, splits, how, on)
    if meshes.leads():
        print("\n".join(watch.commands(out, vrc=data is None or start is not None)))


def plan(
    topology: str,
    config: str,
    mesh: str | None = None,
    batch: int | None = None,
    accumulate: int | None = None,
    bucket: int = -1,
    json: bool = False,
) -> None:
    """What a training step takes on a TPU slice or on GPUs that are not here: memory, FLOPs, traffic, time.

    The step is compiled for them and not run, in minutes at the paper's sizes. A TPU slice is compiled for by the TPU's
    own compiler (`pip install 'hypervl-jax[plan]'`, Linux x86-64); GPUs are stood in for by devices of this CPU, and
    their memory is an upper figure. A step that does not fit is refused with its size and what to change first. Times
    are what products, memory and links take at the chip's published rates: all at once, and one after another. A real
    step lies between or above. For example:

    hypervl plan --topology v5e:16x16 --config configs/stage1_align.py

    hypervl plan --topology v5p:4x4x4 --config configs/stage3_dcl.py --mesh fsdp=64 --batch 256 --accumulate 4

    hypervl plan --topology h100:8 --config nano --batch 128

    Args:
        topology: a slice (v4:2x2x4, v5e:16x16, v5p:4x4x4, v6e:8x8) or simulated devices (h100:8, h200:8, a100:8,
            cpu:8).
        config: a preset or a file with `get_config()`.
        mesh: devices along data, fsdp and tensor, such as data=2,fsdp=8; if not given, all along fsdp.
        batch: rows a step, instead of the config's.
        accumulate: micro-batches a step, instead of the config's.
        bucket: rows of which of the config's lengths, counted from 0; the longest if not given.
        json: one line of JSON instead of text.
    """
    cfg = needs.load_config(config)
    from hypervl_jax import forecast
    from hypervl_jax import mesh as meshes

    on = None if mesh is None else meshes.parse(mesh)
    cfg = forecast.resized(cfg, batch, accumulate)
    if not -len(cfg.data.lengths) <= bucket < len(cfg.data.lengths):
        raise needs.UsageError(f"--bucket {bucket}: {config} has {len(cfg.data.lengths)}, counted from 0")
    where = forecast.topology(topology)
    needs.keep_compiled()
    found = forecast.forecast(cfg, where, on, bucket)
    print(forecast.to_json(found) if json else "\n".join(forecast.lines(found)))


def evaluate(
    model: Annotated[str, arg(metavar="MODEL")] = needs.DEFAULT,
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
        raise needs.UsageError(f"--screens {screens}: at least 1")
    needs.need("tensorflow_datasets")
    loaded = needs.load(model)
    from hypervl_jax import checkpoint, judge

    beside = checkpoint.find_model(model).parent / "data"
    data = data or (beside if beside.is_dir() else Path("runs/data"))
    print(json.dumps(judge.verdict(loaded, branch, vrc, screens, data), indent=1))


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
        raise needs.UsageError(f"{model}: a whole model; say with --part what to write of it, and leave out the rest")
    if model is None and (part is not None or len(folders) < 3):
        raise needs.UsageError("give --vision-base, --vision-large and --llm, or MODEL and --part")
    if tile is not None and not 1 <= tile <= SIDE:
        raise needs.UsageError(f"--tile {tile}: choose 1 to {SIDE}")
    if not 0 <= seed <= SEEDS:
        raise needs.UsageError(f"--seed {seed}: choose 0 to {SEEDS}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise needs.UsageError(f"{out}: is there already; remove it, or choose another --out")
    from hypervl_jax import checkpoint
    from hypervl_jax import convert as parts

    kind = {None: None, "f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype]
    if model is not None and part is not None:
        loaded = needs.load(model, None)
        parts.save_llm(out, loaded, kind) if part == "llm" else parts.save_vit(out, loaded, part, kind)
        print(f"wrote {out}: {part} of {model}")
        return
    needs.keep_compiled()
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
    cfg = needs.prepared(config, steps, out)
    from hypervl_jax import quickstart as recipe

    recipe.run(cfg, out)
    print(f"open {out / 'report.html'}")


VERBS = {
    "ask": ask,
    "chat": chat,
    "tokens": tokens,
    "quickstart": quickstart,
    "train": train,
    "plan": plan,
    "eval": evaluate,
    "recipe": picking.recipe,
    "export": exporting.export,
    "verify": exporting.verify,
    "doctor": exporting.doctor,
    "bench": exporting.bench,
    "convert": convert,
    "data": preparing.data,
    "rescale": rescaling.rescale,
}
GROUPS = {"data": (preparing.VERBS, preparing.data), "rescale": (rescaling.VERBS, rescaling.rescale)}
ABOUT = """A vision-language model for phones, in JAX: ask it, train it, export it, make it of published weights;
and its sibling, image rescaling.

`hypervl VERB --help` shows examples and defaults; --version the version; --debug, with any verb, where an error comes
from."""


def main(argv: list[str] | None = None) -> None:
    """Entry point: whatever goes wrong is one line on stderr and a non-zero exit; --debug shows where it comes from."""
    argv = sys.argv[1:] if argv is None else argv
    debug, argv = "--debug" in argv, [a for a in argv if a != "--debug"]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    needs.keep_memory()
    if argv in (["--version"], ["-V"]):
        print(f"hypervl {__version__}")
        return
    verbs, prog, about = VERBS, "hypervl", ABOUT
    if argv and argv[0] in GROUPS:
        (verbs, group), prog, argv = GROUPS[argv[0]], f"hypervl {argv[0]}", argv[1:]
        about = group.__doc__
    try:
        tyro.extras.subcommand_cli_from_dict(verbs, prog=prog, description=about, args=argv or ["--help"])
    except KeyboardInterrupt:
        print("\nhypervl: interrupted; what is finished is kept, the same command goes on from there", file=sys.stderr)
        _leave(130)
    except Exception as e:
        if debug:
            raise
        print("hypervl: " + " ".join(_line(e).split()), file=sys.stderr)
        _leave(getattr(e, "exit_code", 1))


def _leave(code: int) -> None:
    if "jax" in sys.modules:
        from hypervl_jax import mesh, watch

        mesh.leave(code, alone=code != watch.RESUME)
    sys.exit(code)


def _line(e: Exception) -> str:
    """What to tell of an error: the message of our own, which names file and cure; of any other, where to look."""
    if type(e).__module__.startswith("hypervl_jax"):
        return str(e)
    if isinstance(e, ImportError):
        return needs.missing(e.name) if e.name in needs.EXTRAS else str(e)
    if isinstance(e, OSError):
        return f"{e.filename}: {e.strerror}" if e.filename and e.strerror else str(e) or type(e).__name__
    first = (str(e).strip().splitlines() or [""])[0]
    return f"{type(e).__name__}: {first[:300]} (not expected; the same command with --debug shows where)"


if __name__ == "__main__":
    main()
