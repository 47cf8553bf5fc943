"""The command ``ignite-ema``, also ``python -m ignite_ema``."""

from .command import main

__all__ = ["main"]
