"""Averages of a model's weights while PyTorch-Ignite trains it: exact on buffers, ties, low precision and resume."""

from . import checkpoints, schedules
from .average import ModelAverage
from .handler import EMAHandler

__all__ = ["EMAHandler", "ModelAverage", "checkpoints", "schedules"]
