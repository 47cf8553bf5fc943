"""The models that several test files use, and what a step of training does to one."""

import torch
from torch import nn


def module(**named):
    """A module that computes nothing, of these parameters and buffers; other tensors than parameters become buffers."""
    made = nn.Module()
    for name, tensor in named.items():
        if isinstance(tensor, nn.Parameter):
            made.register_parameter(name, tensor)
        else:
            made.register_buffer(name, tensor)
    return made


def constant(value=0.0, dtype=torch.float32):
    """A model of one weight, of this value."""
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, value)
    return model


def net(seed=0, width=4):
    """Two layers and a batch norm."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


class Tied(nn.Module):
    """Two layers of one weight, a batch norm, and two more buffers, of which no state dict has the one."""

    def __init__(self, width=3):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.second(self.norm(self.first(x))) + self.kept.sum() + self.cache.sum()


class Quantised(torch.Tensor):
    """A type of tensor that can be copied, but has neither norms nor an interpolation."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        if "lerp" in function.__name__ or function is torch._foreach_norm:
            raise NotImplementedError(f"no {function.__name__} for quantised tensors")
        return super().__torch_function__(function, types, arguments, named or {})

    def __deepcopy__(self, memo):
        return nn.Parameter(self.detach().clone().as_subclass(Quantised), self.requires_grad)


def made_inside(make):
    """What is made inside of inference_mode."""
    with torch.inference_mode():
        return make()


def frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


def compiled(model):
    """Compiled, but by no compiler, which would take seconds."""
    return torch.compile(model, backend="eager")


def move(model):
    """Gives other values to all buffers and to all parameters that train; sparse tensors stay as they are."""
    is_inference = any(tensor.is_inference() for tensor in model.parameters())  # to be written to inside of it alone
    with torch.inference_mode(is_inference), torch.no_grad():
        for tensor in [*(one for one in model.parameters() if one.requires_grad or is_inference), *model.buffers()]:
            if tensor.layout is torch.strided and tensor.numel():
                single = tensor[tuple(slice(1) if step == 0 else slice(None) for step in tensor.stride())]
                single.copy_(torch.rand(single.shape) + 1 + 2 * torch.rand(()))


def linear(seed=0):
    """One layer with one output."""
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5)
