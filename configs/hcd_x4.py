"""The pair of the paper, IRN x4: the official code's network, losses, rates and schedule, on the 800 pictures of DIV2K.

hypervl rescale train configs/hcd_x4.py --data div2k --out runs/hcd_x4
"""

from hypervl_jax.rescale import train
from hypervl_jax.rescale.train import PairConfig


def get_config() -> PairConfig:
    return train.published(4)
