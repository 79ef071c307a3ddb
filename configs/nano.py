"""The recipe of the weights that ship."""

from hypervl_jax.config import Config, nano


def get_config() -> Config:
    return nano()
