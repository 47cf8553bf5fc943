"""How many operations an update dispatches: on an accelerator each is a launch, and tensors are many."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ignite_ema import ModelAverage
from ignite_ema.averaging import kernels


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = self.synchronisations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        self.synchronisations += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def counted(layers, dtype, options):
    """An update of a model with four floating-point tensors in each layer."""
    model = nn.ModuleList(nn.BatchNorm1d(8, dtype=dtype) for _ in range(layers))
    average = ModelAverage(model, **options)
    average.update(0.25)  # the first makes what later ones reuse
    with Count() as count:
        average.update(0.25)
    return count


KINDS = {
    "copy": (torch.float32, {}, 3),
    "update": (torch.float32, {"handle_buffers": "update"}, 40),
    "statistics": (torch.float32, {"handle_buffers": "statistics"}, 40),
    "stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}, 60),
    "skip_nonfinite": (torch.float32, {"skip_nonfinite": True}, 10),
}


@pytest.mark.parametrize(("dtype", "options", "most"), KINDS.values(), ids=KINDS)
def test_the_number_of_operations_does_not_grow_with_the_tensors(dtype, options, most):
    few, many = (counted(layers, dtype, options) for layers in (3, 250))
    assert few.operations == many.operations <= most
    assert few.synchronisations == many.synchronisations == ("skip_nonfinite" in options)


@pytest.mark.parametrize("online_dtype", [torch.bfloat16, torch.float16])
def test_a_wider_average_on_an_accelerator_goes_through_a_scratch_and_makes_the_same_bits(online_dtype):
    torch.manual_seed(0)
    counts = []
    for number in (10, 1000):
        online = [torch.randn(7).to(online_dtype) for _ in range(number)]
        expected = [torch.randn(7) for _ in range(number)]
        averaged = [tensor.clone() for tensor in expected]
        kernels._lerp_converted(expected, online, 0.3)
        with Count() as count:
            kernels._lerp_through_scratch(averaged, online, 0.3)
        assert all(map(torch.equal, averaged, expected))
        counts.append(count.operations)
    assert counts[0] == counts[1] <= 5


def test_the_scratch_is_bounded(monkeypatch):
    monkeypatch.setattr(kernels, "_LAUNCHED", 100)
    sizes = []
    gathered = kernels.gathered

    def noted(tensors, dtype, device):
        flat = gathered(tensors, dtype, device)
        sizes.append(flat.numel())
        return flat

    monkeypatch.setattr(kernels, "gathered", noted)
    averaged = [torch.zeros(30) for _ in range(10)] + [torch.zeros(350)]
    kernels._lerp_through_scratch(averaged, [torch.ones(one.shape, dtype=torch.bfloat16) for one in averaged], 0.5)
    assert max(sizes) <= 100
    assert all(torch.equal(one, torch.full_like(one, 0.5)) for one in averaged)
