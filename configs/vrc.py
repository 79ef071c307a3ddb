"""The stage of VRC, after all others: the model stands still, labels pictures by its own losses, and VRC learns those.

    hypervl train configs/vrc.py --start runs/stage3/model --out runs/vrc

How labels come about is the paper's (HyperVL 3.2). Rate, weight decay, epochs and the number of pictures are inferred:
those its authors' later work has for the same network, begun from a public MobileNet (20 epochs of 500,000).
"""

from dataclasses import replace

from hypervl_jax import presets
from hypervl_jax.config import Config, VrcTrainConfig


def stage(cfg: Config) -> Config:
    return replace(cfg, name="vrc", train=replace(cfg.train, steps=0, stage0_steps=0))


def get_config() -> Config:
    cfg = presets.hypervl_1p7b()
    screens = replace(cfg.data.screens, label=500_000)
    vrc = VrcTrainConfig(steps=39_000, batch=256, lr=5e-5, weight_decay=1e-5)
    return replace(stage(cfg), data=replace(cfg.data, screens=screens), vrc=vrc)


def get_tiny() -> Config:
    """Seconds on any machine."""
    return stage(presets.tiny())
