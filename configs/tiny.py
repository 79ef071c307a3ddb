"""Everything at the size of a unit test: seconds on any machine."""

from hypervl_jax.config import Config
from hypervl_jax.presets import tiny


def get_config() -> Config:
    return tiny()
