"""The arithmetic of one update: every type of number, and the values that a formula gets wrong."""

import warnings

import pytest
import torch

from ignite_ema import ModelAverage
from ignite_ema.averaging import kernels
from tests.helpers.bits import bits
from tests.helpers.models import frozen, module

ROLES = pytest.mark.parametrize("role", [frozen, torch.Tensor.clone], ids=["parameter", "buffer"])
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


@ROLES
@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_eight_bit_floats_are_averaged_through_float32(dtype, role):
    torch.manual_seed(0)
    model = module(tensor=role((100 * torch.randn(50)).to(dtype)))
    average, wide = ModelAverage(model, "update"), ModelAverage(model, "update", dtype=torch.float32)
    due, due_wide = model.tensor.detach().clone(), model.tensor.detach().float()
    for _ in range(3):
        model.tensor.copy_(100 * torch.randn(50))
        average.update(0.3)
        wide.update(0.3)
        due = torch.lerp(due.float(), model.tensor.detach().float(), 0.3).to(dtype)
        due_wide.lerp_(model.tensor.detach().float(), 0.3)
    assert bits(average.module.tensor) == bits(due)
    assert bits(wide.module.tensor) == bits(due_wide)


@pytest.mark.filterwarnings("ignore:A momentum of .* is too small:ignite_ema.EMAWarning")
@pytest.mark.parametrize("momentum", [1e-5, 0.0002, 0.3, 0.7, 1])
@pytest.mark.parametrize("dtype", FLOATS + EIGHT_BITS, ids=str)
def test_constant_weights_stay_bit_for_bit_constant(dtype, momentum):
    torch.manual_seed(0)
    weight = torch.randn(200, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    average = ModelAverage(module(weight=frozen(weight), buffer=weight.clone()), "update")
    for _ in range(100):
        average.update(momentum)
    assert bits(average.module.weight) == bits(average.module.buffer) == bits(weight)


@pytest.mark.parametrize(
    ("dtype", "momenta", "warned"),
    [
        (torch.float32, [1e-8], True),
        (torch.float32, [0.1, 1e-8], False),  # the end of a schedule that goes to 0
        (torch.float32, [0.0], False),
        (torch.bfloat16, [0.1, 1e-3], True),  # the end of a warm-up
    ],
    ids=["float32", "float32, at the end", "not at all", "bfloat16, at the end"],
)
def test_a_momentum_that_moves_nothing_is_warned_about(dtype, momenta, warned):
    average = ModelAverage(module(weight=torch.ones(1, dtype=dtype)), "update")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for momentum in momenta:
            average.update(momentum)
    assert ["too small for the type" in str(one.message) for one in seen] == [True] * warned


def test_large_tensors_are_converted_in_parts(monkeypatch):
    """What is held wider than the weights are, in parts as a whole, bit for bit."""
    online = torch.randn(7, 50, 60, generator=torch.Generator().manual_seed(0)).bfloat16()
    online = [online, online.transpose(0, 2), online[:, ::2], online[0, 0, 0], online[:0]]
    start = [torch.ones_like(value, dtype=torch.float32) for value in online]
    due = [torch.lerp(one, value.float(), 0.1) for one, value in zip(start, online, strict=True)]
    sizes = []
    lerp = torch.Tensor.lerp_
    monkeypatch.setattr(kernels, "_CACHED", 500)
    monkeypatch.setattr(torch.Tensor, "lerp_", lambda a, b, w: (sizes.append(a.numel()), lerp(a, b, w))[1])
    kernels._lerp_converted(start, online, 0.1)
    assert all(map(torch.equal, start, due))
    assert 300 < max(sizes) <= 500
    assert sum(sizes) == sum(value.numel() for value in online)


def test_a_momentum_of_0_leaves_even_a_nan_out():
    model = module(weight=frozen(torch.ones(2)))
    average = ModelAverage(model)
    model.weight.fill_(torch.nan)
    average.update(0)
    assert average.module.weight.tolist() == [1.0, 1.0]
