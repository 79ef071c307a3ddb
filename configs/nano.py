"""The recipe of the weights that ship."""

from hypervl_jax.config import Config
from hypervl_jax.presets import nano


def get_config() -> Config:
    return nano()
