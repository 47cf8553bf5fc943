"""Averages held in 16 bits with `stochastic_rounding=True`: right in the mean, and the same bits again."""

from math import inf, nan

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import nn

from ignite_ema import EMAHandler, EMAWarning, ModelAverage
from ignite_ema.averaging import stochastic_rounding as rounding
from tests.helpers.models import module

NARROW = [torch.bfloat16, torch.float16]


def weights(values, dtype=torch.float32):
    """A model of one parameter."""
    return module(values=nn.Parameter(values.to(dtype)))


def magnitudes(count, seed=0):
    """Values of both signs, from 1e-3 to 10."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return sign * 10 ** (4 * torch.rand(count, generator=generator, dtype=torch.float64) - 3)


def spacing(values, dtype):
    """The distance between neighbours in `dtype`, in float64."""
    info = torch.finfo(dtype)
    return 2.0 ** values.double().abs().clamp_min(info.tiny).log2().floor() * info.eps


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("momentum", [0.01, 1e-5])
def test_small_updates_are_right_in_the_mean(dtype, momentum):
    """Weights 5 % away: 200 updates move a weight by less than 13 steps at .01, and by a fiftieth of one at 1e-5."""
    start = magnitudes(4096).to(dtype)
    model = weights(start, dtype)
    average = ModelAverage(model, stochastic_rounding=True)
    model.values.data = (start.double() * 1.05).to(dtype)
    target = model.values.detach().double()
    for _ in range(200):
        average.update(momentum)
    due = target + (1 - momentum) ** 200 * (start.double() - target)
    error = (average.module.values.double() - due) / spacing(start, dtype)
    assert error.square().mean().sqrt() < 0.9  # evenly spread, they cancel: with random thresholds it is up to 3.2,
    assert error.abs().max() < 4  # and this up to 17
    assert error.mean().abs() < 0.06
    if momentum < 1e-4:
        nearest = ModelAverage(weights(start, dtype))
        nearest.model.values.data = model.values.data
        with pytest.warns(EMAWarning, match="stochastic_rounding=True"):
            nearest.update(momentum)
        assert torch.equal(nearest.module.values, start)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    ("before", "after", "weight"),
    [
        *((0.99609375, 1.03125, 0.2), (0.6, 1.9, 0.9), (-0.5, 1.5, 0.8), (0.3, 1.5, 0.6)),  # to where steps are larger
        *((1.9, 0.3, 0.7), (-1.03125, -0.9921875, 0.3), (1.0, -1.0, 0.5), (2e-30, 5.0, 0.1), (3.0, 3.015625, 0.4)),
    ],
)
def test_the_mean_is_right_across_powers_of_two(before, after, weight, dtype):
    thresholds = (torch.arange(10_000) + 0.5) / 10_000
    start, target = (torch.full((10_000,), value).to(dtype) for value in (before, after))
    moved = rounding._moved(start.float(), target.float(), weight, thresholds, dtype)
    assert torch.equal(moved.to(dtype).float(), moved)  # no second rounding
    exact = torch.lerp(start.double(), target.double(), weight)
    error = (moved.double().mean() - exact[0]) / spacing(exact[:1].clamp_min(1e-6), dtype)
    assert error.abs() < 1e-3


@pytest.mark.parametrize("period", [13, 144])
def test_weights_with_a_period_are_right_in_the_mean(period):
    """With one golden ratio for all of them the mean would be off by a step at 13 and at 144."""
    generator = torch.Generator().manual_seed(0)
    cycle = [(1.5 + 0.05 * torch.randn(2048, generator=generator)).bfloat16() for _ in range(period)]
    held = cycle[0].clone()
    exact, errors = held.double(), []
    kernel = rounding.StochasticRounding()
    for kernel.num_updates in range(3000):
        online = cycle[kernel.num_updates % period]
        kernel.lerp([held], [online], 0.005)
        exact.lerp_(online.double(), 0.005)
        if kernel.num_updates >= 1000 and kernel.num_updates % 50 == 0:
            errors.append((held.double() - exact) / 2**-7)
    assert abs(torch.stack(errors).mean()) < 0.1
    assert torch.stack(errors).square().mean().sqrt() < 1.5


@pytest.mark.parametrize("dtype", NARROW)
def test_constant_weights_stay_bit_for_bit(dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)  # every value there is
    held = bits.view(dtype).clone()
    value = held.clone()
    kernel = rounding.StochasticRounding()
    for kernel.num_updates in range(10):
        kernel.lerp([held], [value], 0.01)
    assert torch.equal(held.nan_to_num(7.0, torch.inf, -torch.inf), value.nan_to_num(7.0, torch.inf, -torch.inf))


@pytest.mark.parametrize("dtype", NARROW)
def test_nans_and_infinities_come_in_as_they_do_without(dtype):
    held = torch.tensor([1, 1, 1, 1, inf, nan, 0, -inf], dtype=dtype)
    value = torch.tensor([inf, -inf, nan, 2, 1, 1, -inf, inf], dtype=dtype)
    plain = held.clone()
    rounding.StochasticRounding().lerp([held], [value], 0.25)
    torch._foreach_lerp_([plain], [value], 0.25)
    assert torch.equal(held.isnan(), plain.isnan())
    assert torch.equal(held[~held.isnan()], plain[~plain.isnan()])


@pytest.mark.parametrize("dtype", NARROW)
def test_weights_of_any_layout_and_size_are_treated_alike(dtype, monkeypatch):
    """Joined, in parts, transposed: a weight's result is one of two neighbours, and the mean is right."""
    starts, rates = rounding._sequences(torch.device("cpu"))
    monkeypatch.setattr(rounding, "_sequences", lambda device: (starts[:4], rates))
    shapes = [(), (3,), (0,), (40,), (9, 11), (5, 6, 7), (2, 200), (1, 1, 300)]
    held = [magnitudes(torch.Size(s).numel()).to(dtype).reshape(s) for s in shapes]
    held.append(magnitudes(2 * 3 * 8 * 8).to(dtype).reshape(2, 3, 8, 8).to(memory_format=torch.channels_last))
    held.append(magnitudes(12 * 11).to(dtype).reshape(12, 11).t())
    value = [(tensor.double() * 1.03).to(dtype) for tensor in held]
    start = [tensor.clone(memory_format=torch.preserve_format) for tensor in held]
    kernel = rounding.StochasticRounding()
    for kernel.num_updates in range(100):
        kernel.lerp(held, value, 1e-3)
    for tensor, before, after in zip(held, start, value, strict=True):
        assert tensor.stride() == before.stride()
        due = after.double() + 0.999**100 * (before.double() - after.double())
        assert ((tensor.double() - due).abs() < 2.1 * spacing(before, dtype)).all()


def test_momenta_of_0_and_1_and_wider_weights_are_as_without():
    model = nn.ModuleDict({"narrow": weights(magnitudes(100), torch.bfloat16), "wide": weights(magnitudes(100))})
    average, plain = ModelAverage(model, stochastic_rounding=True), ModelAverage(model)
    for momentum, is_same in ((0.0, True), (0.1, False), (1.0, True)):
        for parameter in model.parameters():
            parameter.data *= 2
        for one in (average, plain):
            one.update(momentum)
        assert torch.equal(average.module["wide"].values, plain.module["wide"].values)
        assert torch.equal(average.module["narrow"].values, plain.module["narrow"].values) == is_same


def test_a_resumed_average_goes_on_with_the_same_bits():
    def made():
        model = weights(magnitudes(1000), torch.bfloat16)
        handler = EMAHandler(model, momentum=1e-3, stochastic_rounding=True)

        def step(engine, batch):
            generator = torch.Generator().manual_seed(engine.state.iteration)
            model.values.data += 0.01 * torch.randn(1000, generator=generator).bfloat16()

        trainer = Engine(step)
        handler.attach(trainer, event=Events.ITERATION_COMPLETED(every=2))
        return {"model": model, "handler": handler, "trainer": trainer}

    whole = made()
    whole["trainer"].run([0] * 20, max_epochs=2)
    first, second = made(), made()
    first["trainer"].run([0] * 20, max_epochs=1)
    Checkpoint.load_objects(second, {name: thing.state_dict() for name, thing in first.items()})
    assert second["handler"].num_updates == 10
    second["trainer"].run([0] * 20, max_epochs=2)
    assert torch.equal(second["handler"].ema_model.values, whole["handler"].ema_model.values)


def test_a_layer_that_is_frozen_in_mid_run_is_averaged_on_with_the_same_bits():
    """Other kernels lose the updates: .0586 away instead of .0002. In a group of its own it would round differently."""
    twins = []
    for freezes in (False, True):
        model = nn.ModuleList([weights(magnitudes(1000), torch.bfloat16), weights(magnitudes(1000), torch.bfloat16)])
        average = ModelAverage(model, stochastic_rounding=True)
        model[1].values.data += 0.1
        for step in range(600):
            model[1].requires_grad_(not (freezes and 50 <= step < 400))
            if step in (100, 500):  # paired anew
                model[1].values.data = model[1].values.data.clone()
            average.update(0.01)
        twins.append(average.module[1].values)
    assert torch.equal(*twins)
    assert (twins[0].float() - model[1].values.float()).abs().mean() < 0.003
