"""Everything at the size of a unit test: seconds on any machine."""

from hypervl_jax.config import Config, tiny


def get_config() -> Config:
    return tiny()
