"""DCL on small screens: copy this file and change one value to compare, for example `weight=0` for no KL term."""

from dataclasses import replace

from hypervl_jax.config import Config, DclConfig
from hypervl_jax.presets import quickstart


def get_config() -> Config:
    dcl = DclConfig(weight=1.0, temperature=2.0, schedule="alternate", llm_train="both")
    return replace(quickstart(), name="dcl", dcl=dcl)
