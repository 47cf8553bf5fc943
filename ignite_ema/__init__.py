"""Averages a model's weights while PyTorch-Ignite trains it: exact on buffers, ties, low precision and resume."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import checkpoints, distributed, posthoc, schedules
    from .averaging.average import ModelAverage
    from .averaging.checks import EMAWarning
    from .handlers.ema import EMAHandler
    from .handlers.posthoc import PostHocEMA

__all__ = [
    "EMAHandler",
    "EMAWarning",
    "ModelAverage",
    "PostHocEMA",
    "__version__",
    "checkpoints",
    "distributed",
    "posthoc",
    "schedules",
]

__version__ = "0.1.0"

_HOMES = {
    "EMAHandler": ".handlers.ema",
    "EMAWarning": ".averaging.checks",
    "ModelAverage": ".averaging.average",
    "PostHocEMA": ".handlers.posthoc",
    "checkpoints": ".checkpoints",
    "distributed": ".distributed",
    "posthoc": ".posthoc",
    "schedules": ".schedules",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: the command answers ``--help`` without importing torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_HOMES[name], __name__)
    value = globals()[name] = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
