"""HyperVL, a vision-language model for phones, in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypervl_jax.chat import Chat
    from hypervl_jax.checkpoint import load_model

__version__ = "0.1.0"
__all__ = ["Chat", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    """`Chat` and `load_model`, imported when asked for: the host of exported files has no JAX."""
    if name == "Chat":
        from hypervl_jax.chat import Chat

        return Chat
    if name == "load_model":
        from hypervl_jax.checkpoint import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
