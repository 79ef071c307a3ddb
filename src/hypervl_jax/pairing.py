"""The verbs that make pairs for rescaling: rescale train, rescale export."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from hypervl_jax import needs


def train(
    config: Annotated[Positional[str], arg(metavar="CONFIG")],
    /,
    out: Path,
    data: str,
    steps: int | None = None,
    max_hours: float | None = None,
    profile: int = 0,
) -> None:
    """Train a pair, an IRN, on crops of pictures. The weights are OUT/pair.npz, which every --pair takes.

    Interrupted, the same command goes on where it stopped. On Ctrl-C, SIGTERM and --max-hours it saves first and exits
    with 75. For example:

    hypervl rescale train tiny_x2 --data photos --out runs/tiny_x2

    hypervl rescale train configs/hcd_x4.py --data div2k --out runs/hcd_x4

    Args:
        config: a preset (tiny_x2, light_x2, light_x4, hcd_x2, hcd_x4) or a file with `get_config()`, such as
            configs/hcd_x2.py.
        out: folder to write; a run that is there is resumed.
        data: a folder of pictures, or a data set that tensorflow-datasets has prepared as array_record, such as div2k.
        steps: training steps, instead of the config's; a run is gone on with under any number.
        max_hours: stop in time before so many hours are over.
        profile: how many training steps to trace, to OUT/profile.
    """
    began = time.monotonic()
    if max_hours is not None and not max_hours > 0:
        raise needs.UsageError(f"--max-hours {max_hours:g}: above 0")
    if profile < 0:
        raise needs.UsageError(f"--profile {profile}: at least 0")
    if out.exists() and not out.is_dir():
        raise needs.UsageError(f"{out}: a file is there; choose another --out")
    needs.need("tensorflow_datasets", "grain", "array_record")
    cfg = needs.pair_config(config, steps)
    needs.keep_compiled()
    from hypervl_jax import watch
    from hypervl_jax.rescale import photographs
    from hypervl_jax.rescale import train as training

    source = photographs.found(data, out / "data")
    stop_at = None if max_hours is None else began + 3600 * max_hours
    training.run(cfg, source, out, watch.Watch(stop_at=stop_at, profile=profile), source.name)
    made = out / training.WEIGHTS
    print(f"wrote {made}: {made.stat().st_size / 1e3:.0f} kB")
    print(f"use it:     hypervl rescale down PICTURE --pair {made}")
    print(f"measure it: hypervl rescale eval FOLDER --pair {made} --eps-mode absolute")


def export(pair: Annotated[Positional[str], arg(metavar="PAIR")], /, out: Path, side: int = 96) -> None:
    """Write the upscaler of a pair as a verified .tflite file with a manifest; nothing is left if it differs from JAX.

    For example:

    hypervl rescale export irn_x2.pth --out phone --side 64

    Args:
        pair: light_x2 or light_x4, which ship, weights of IRN, FIRN, HCFlow or IMDN (.npz, .safetensors, .pth), or
            bicubic-x2, -x3, -x4.
        out: folder to write; an earlier export there is replaced, anything else is left alone.
        side: pixels a side of the small tile that the file restores.
    """
    from hypervl_jax import rescaling
    from hypervl_jax.export import lower, upscaler

    if not 1 <= side <= 1024:
        raise needs.UsageError(f"--side {side}: choose 1 to 1024")
    lower.require()
    made = upscaler.export(rescaling.pair_of(pair), out, side)
    (seam,) = made.parity.items()
    print(f"{seam[0]}: {seam[1]:.1e} from JAX")
    print(f"{made.part.file.file}: {made.part.file.bytes / 1e6:.2f} MB, {side} x {side} px to {made.scale} times that")
