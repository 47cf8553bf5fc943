"""Averages of a model's weights while PyTorch-Ignite trains it: exact on buffers, ties, low precision and resume."""

from . import checkpoints, posthoc, schedules
from .average import ModelAverage
from .handler import EMAHandler
from .snapshots import PostHocEMA

__all__ = ["EMAHandler", "ModelAverage", "PostHocEMA", "checkpoints", "posthoc", "schedules"]
