"""``python -m ignite_ema`` is the command ``ignite-ema``."""

import sys

from .cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
