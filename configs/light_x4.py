"""The recipe of the light pair that ships, x4: a few hundred kB.

hypervl rescale train configs/light_x4.py --data FOLDER --out runs/light_x4
"""

from hypervl_jax.rescale import train
from hypervl_jax.rescale.train import PairConfig


def get_config() -> PairConfig:
    return train.light(4)
