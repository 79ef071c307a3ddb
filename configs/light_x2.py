"""The recipe of the light pair that ships, x2: a few hundred kB.

hypervl rescale train configs/light_x2.py --data FOLDER --out runs/light_x2
"""

from hypervl_jax.rescale import train
from hypervl_jax.rescale.train import PairConfig


def get_config() -> PairConfig:
    return train.light(2)
