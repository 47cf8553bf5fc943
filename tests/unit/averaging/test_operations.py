"""How many operations an update dispatches: on an accelerator each is a launch, and tensors are many."""

import pytest
import torch

from ignite_ema.averaging import kernels
from tests.benchmarks.operations import KINDS, Count, sending, updating


@pytest.mark.parametrize(("dtype", "options"), KINDS.values(), ids=KINDS)
def test_the_number_of_operations_does_not_grow_with_the_tensors(dtype, options):
    few, many = (updating(number, dtype, options, accelerated=True) for number in (10, 1000))
    most = 60 if options.keys() & {"handle_buffers", "stochastic_rounding"} else 10
    assert few.operations == many.operations <= most
    assert few.synchronisations == many.synchronisations == ("skip_nonfinite" in options)


@pytest.mark.parametrize("number", [10, 1000])
def test_the_copies_to_an_average_on_the_cpu_do_not_grow_with_the_tensors(number):
    assert sending([torch.zeros(8)] * number).operations <= 5


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
