"""Compress a Vision Transformer without its training data."""

from vitkd_fast import ops

__version__ = "0.1.0"
__all__ = ["ops"]
