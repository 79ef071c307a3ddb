"""The verbs of exported files: export, verify, doctor, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from hypervl_jax import needs
from hypervl_jax.config import BRANCHES, Branch


def export(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    /,
    out: Path,
    branch: Branch | Literal["both"] = "both",
    recipe: Literal["f32", "int8", "w4a16"] = "f32",
    group: Literal["32", "64", "128", "row"] = "32",
    rules: tuple[str, ...] = (),
    calibrate: int = 0,
    data: Path | None = None,
    bundle: Branch | None = None,
    cache: int | None = None,
    portable: bool = False,
) -> None:
    """Write a model as verified .tflite files with a manifest; nothing is left if a part does not match JAX. A model of
    more than half a billion weights is made a part at a time, each in a process of its own.

    For example:

    hypervl export quickstart/model --out phone

    hypervl export nano --out phone --recipe w4a16 --calibrate 128

    hypervl export nano --out phone --recipe w4a16 --rules "llm.blocks.layers.down.weight=int8"

    hypervl export nano --out phone --recipe w4a16 --bundle base

    Args:
        model: a model folder, or the name of weights that ship.
        out: folder to write; an earlier export there is replaced, anything else is left alone.
        branch: which vision encoders to export.
        recipe: f32; int8, every matrix in 8 bits; w4a16, the decoder's projections in 4 bits and all other in 8.
        group: inputs that share a scale in 4 bits.
        rules: PATTERN=KIND, before those of the recipe: the pattern is of a whole path, the kind one of f32, int8,
            int4 (a scale a row), int4/32, int4/64, int4/128. Or files of them, as hypervl recipe writes.
        calibrate: choose the decoder's 4 bits by what it multiplies in so many samples (GPTQ); 0: the nearest.
        data: a folder that `hypervl data build` wrote, to take them from; if not given, screens are composed.
        bundle: with this branch also one .litertlm file for the stock LiteRT-LM runtime, which must answer alike; it
            holds the parts again and needs the litertlm extra.
        cache: tokens that pictures, question and answer may have together; if not given, room for the largest plan.
        portable: for servers: the same parts as portable StableHLO with safetensors beside them instead, in f32.
    """
    from hypervl_jax import checkpoint, quantize
    from hypervl_jax.export import apart, bench, lower, parts

    if calibrate < 0 or (data is not None and not calibrate):
        raise needs.UsageError("--calibrate: so many samples, at least 1; --data: where they come from")
    if cache is not None and not 2 <= cache <= 1 << 20:
        raise needs.UsageError("--cache: 2 to 1048576 tokens")
    recipes = {"f32": (), "w4a16": quantize.decoder4(None if group == "row" else int(group))} | quantize.RECIPES
    how = (*quantize.read(rules), *recipes[recipe])
    branches = BRANCHES if branch == "both" else (branch,)
    if portable:
        if how or calibrate or bundle:
            raise needs.UsageError("--portable: weights as they are, in f32; leave recipe, rules and bundle out")
        from hypervl_jax.export import portable as servers

        print("\n".join(servers.write(needs.load(model), out, branches=branches, cache=cache)))
        return
    lower.require()
    needs.check_model(model)
    options = {"recipe": how, "branches": branches, "source": model, "bundle": bundle, "cache": cache}
    large = apart.is_large(model)
    loaded = checkpoint.load_model(model, only=("vrc.",)) if large else needs.load(model)
    options["samples"] = needs.samples(loaded, calibrate, data) if calibrate else ()
    if large:
        needs.keep_compiled()
        made = apart.export(model, out, **options)
    else:
        made = parts.export(loaded, out, **options)
    try:
        made = bench.peaks(out)
    except bench.BenchError as e:
        print(f"memory of an answer: not measured: {e}")
    for name, error in made.parity.items():
        before = f", {made.lowered[name]:.1e} before rounding" if name in made.lowered else ""
        print(f"{name}: {error:.1e} from JAX{before}")
    for part in made.parts:
        print(
            f"{part.name}: {part.file.bytes / 1e6:.2f} MB, {made.bits[part.name]:.2f} bits a weight, "
            f"{len(part.signatures)} signatures"
        )
    print(f"decoder's layers: {made.bits['layers']:.2f} bits a weight")
    for b, n in made.peak_bytes.items():
        print(f"an answer by {b}: {n / 1e6:,.0f} MB of memory")
    for b in made.bundles:
        print(f"{b.file.file}: {b.file.bytes / 1e6:.2f} MB, opened and asked in the stock runtime")
    print(f'ask it: hypervl ask PICTURE "what is this?" --runtime litert --model {out}')


def verify(folder: Annotated[Positional[Path], arg(metavar="FOLDER")], /, model: str | None = None) -> None:
    """Prove exported files again: the integers they hold bit by bit, every seam against JAX on pictures, and bundles
    in the stock runtime.

    For example:

    hypervl verify phone

    Args:
        folder: what hypervl export wrote.
        model: the model it was made from; if not given, where it was then.
    """
    from tqdm import tqdm

    from hypervl_jax.export import bundle, lower, manifest, parts
    from hypervl_jax.export import doctor as examine

    lower.require()
    made = manifest.check(folder)
    if not (model or made.source):
        raise needs.UsageError(f"{folder}: does not say what it was made from; give --model")
    loaded = needs.load(model or made.source)
    with tqdm(desc="verify", bar_format="{desc}{postfix} [{elapsed}]") as bar:
        seams = parts.prove(loaded, folder, say=bar.set_postfix_str)
    for seam in seams:
        print(f"{seam.name}: {seam.error:.1e} from JAX, {seam.limit:g} is allowed")
    if wrong := [str(seam) for seam in seams if not seam.ok]:
        raise lower.ExportError(f"{folder}: {'; '.join(wrong)}")
    if made.bundles and not examine.opens():
        print("bundles: not asked, litert_lm is not installed: pip install 'hypervl-jax[litertlm]'")
    elif made.bundles:
        whose = "JAX, which rounds no activations" if made.recipe else "JAX"
        for name, alike in bundle.prove_again(loaded, folder).items():
            print(f"{name}: the stock runtime says what the files say; {alike} answers are those of {whose}")
    chosen = f", the decoder's 4 bits as {made.calibrated} samples chose them" if made.calibrated else ""
    print(f"{folder}: proved" + (f", the integers bit by bit{chosen}" if made.recipe else ""))


def doctor(folder: Annotated[Positional[Path], arg(metavar="FOLDER")], /, load: bool = True) -> None:
    """Say what is wrong with exported files: missing, truncated, tampered with, of another model.

    For example:

    hypervl doctor phone

    Args:
        folder: what hypervl export wrote.
        load: whole files are loaded too, each in a process of its own; a bundle in the stock runtime, where that is.
    """
    from hypervl_jax.export import doctor as of
    from hypervl_jax.export import lower, manifest

    lower.extra("ai_edge_litert.interpreter")
    found = of.examine(folder, load)
    for fault in found:
        print(fault)
    if found:
        raise lower.ExportError(f"{folder}: {len(found)} fault{'s' * (len(found) > 1)}, named above")
    print(f"{folder}: whole" + ("; every part loads" if load else ""))
    if (bundles := manifest.read(folder).bundles) and load:
        does = "opens in the stock runtime" if of.opens() else "not opened: litert_lm is not installed"
        print("\n".join(f"{b.file.file}: {does}" for b in bundles))


def bench(
    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="FOLDER...")],
    /,
    out: Path = Path("bench"),
    image: Path | None = None,
    repeats: int = 5,
    threads: int | None = None,
    device: Path | None = None,
    phone: Path | None = None,
) -> None:
    """Say what exported files cost here: time stage by stage, peak memory, operations and bytes moved; branches, VRC on
    and off, tiles and whole pictures, and, of several folders, recipes. Writes OUT/bench.json and OUT/bench.html.

    For example:

    hypervl bench phone --out bench

    hypervl bench phone_f32 phone_w4a16 --image examples/screen.png --device my-phone.json

    Args:
        folders: what hypervl export wrote.
        out: folder of both results.
        image: the picture that is asked about; if not given, noise of the largest plan.
        repeats: answers that are timed, of each way; the median counts.
        threads: of the runtime; all cores, 8 at most, if not given.
        device: JSON with "name", "ram_gb" and, if known, "ops": warns of what may not fit, and of operators that leave
            the accelerator.
        phone: a log of launch/android_bench.sh, whose figures go into OUT/bench.json beside those of here.
    """
    from hypervl_jax.export import bench as of
    from hypervl_jax.export import costs, lower

    if not folders:
        raise needs.UsageError("give a folder that hypervl export wrote")
    if not 1 <= repeats <= 1000 or not 1 <= (threads or 1) <= 1024:
        raise needs.UsageError("--repeats: 1 to 1000; --threads: 1 to 1024")
    if out.exists() and not out.is_dir():
        raise needs.UsageError(f"{out}: a file is there; choose another --out")
    if image is not None:
        from hypervl_jax.image import load

        load(image)
    of.check_folders(folders)
    profile, measured = device and of.device(device), phone and of.phone(phone)
    lower.extra("ai_edge_litert.interpreter")
    found = [of.run(folder, image, repeats, threads) for folder in folders]
    said = [line for f in found for line in of.warnings(f, profile)] if profile else []
    print("\n".join([*costs.table(found), *(f"warning: {line}" for line in said)]))
    print("wrote " + " and ".join(map(str, costs.write(out, found, said, measured or {}))))
