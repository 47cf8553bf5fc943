"""Modules that hold tensors and compute nothing."""

from torch import nn


def module(**named):
    """A module of these parameters and buffers; other tensors than parameters become buffers."""
    made = nn.Module()
    for name, tensor in named.items():
        if isinstance(tensor, nn.Parameter):
            made.register_parameter(name, tensor)
        else:
            made.register_buffer(name, tensor)
    return made
