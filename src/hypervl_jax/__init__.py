"""HyperVL, a vision-language model for phones, in JAX."""

__version__ = "0.1.0"
