"""The paper's sizes. Traces, counts and compiles; training it takes an accelerator and true data."""

from hypervl_jax.config import Config
from hypervl_jax.presets import hypervl_1p7b


def get_config() -> Config:
    return hypervl_1p7b()
