"""A small average, and what moves it."""

import torch
from torch import nn

from ignite_ema import ModelAverage


def made(momentum=0.25, **options):
    torch.manual_seed(0)
    return ModelAverage(nn.Linear(2, 2), momentum=momentum, **options)


def moving(average, steps):
    for _ in range(steps):
        for parameter in average.model.parameters():
            parameter.data.add_(1)
        average.update()
    return average
