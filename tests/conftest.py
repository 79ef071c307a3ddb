"""What every test shares: eight simulated CPU devices, a compilation cache that outlives the run, a tiny config."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Read when JAX is imported, so before anything else. The cache makes a second run of the suite several times faster.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax" / version("jax")))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data (real photographs and small real weights); the test skips where it is absent."""
    path = Path(os.environ.get("HYPERVL_SHARED", ROOT.parent / "shared")) / "data"
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set HYPERVL_SHARED")
    return path.parent


@pytest.fixture(scope="session")
def tiny_config():
    """Everything at the size of a unit test."""
    from hypervl_jax import config  # not at the top: the jaxtyping hook must be installed first

    return config.preset("tiny")
