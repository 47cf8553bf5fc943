"""ModelAverage on modules that are unlike most."""

import copy

import pytest
import torch
from torch import nn

from ignite_ema import ModelAverage
from tests.helpers.bits import contents
from tests.helpers.models import constant


def two_layers():
    return nn.Sequential(constant(), constant())


def test_a_tensor_that_both_would_own_raises_and_changes_nothing():
    model = two_layers()
    twin = copy.deepcopy(model)
    twin[1].weight = model[1].weight
    with pytest.raises(RuntimeError, match="'1.weight' is one and the same tensor in the model and in the twin"):
        ModelAverage(model, ema_model=twin)
    assert model[1].weight.requires_grad
    average = ModelAverage(model)
    average.module[0].weight = model[0].weight
    with pytest.raises(RuntimeError, match="'0.weight' is one and the same tensor"):
        average.update(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [2e-4, 1e-5])
def test_constant_weights_do_not_drift_in_100_000_updates(momentum):
    model = nn.Linear(64, 1)
    average = ModelAverage(model)
    for _ in range(100_000):
        average.update(momentum)
    assert contents(average.module) == contents(model)


def test_the_state_is_that_of_the_twin_whatever_became_of_the_model():
    model = two_layers()
    average = ModelAverage(model)
    state = copy.deepcopy(average.averaged_tensors())
    del model[1]
    assert set(average.averaged_tensors()) == {"0.weight", "1.weight"}
    average.module[0] = constant(1.0)
    average.load_averaged_tensors(state)
    assert torch.equal(average.module[0].weight, state["0.weight"])


CONVERSIONS = {
    "scripted": torch.jit.script,
    "traced": lambda model: torch.jit.trace(model, torch.ones(1, 1)),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_torchscript_module_is_averaged(conversion):
    model = CONVERSIONS[conversion](constant(1.0))
    average = ModelAverage(model)
    model.weight.data.fill_(3.0)
    average.update(0.5)
    assert (average.module.weight.item(), model.weight.item()) == (2.0, 3.0)


def test_a_child_of_the_name_of_torchs_own_wrapper_is_no_wrapper():
    model = nn.ModuleDict({"_orig_mod": constant(), "extra": constant()})
    assert set(ModelAverage(model).averaged_tensors()) == {"_orig_mod.weight", "extra.weight"}


class Scaled(nn.Parameter):
    """A parameter with an attribute, such as those of quantised layers."""

    scale = None

    def __deepcopy__(self, memo):
        result = Scaled(self.data.clone(), self.requires_grad)
        result.scale = self.scale
        return result


def test_a_subclass_of_parameter_is_copied_by_its_own_rule():
    model = nn.Linear(1, 1)
    model.weight = Scaled(torch.ones(1, 1))
    model.weight.scale = 3.0
    weight = ModelAverage(model).module.weight
    assert (type(weight), weight.scale, weight.requires_grad) == (Scaled, 3.0, False)


def test_a_view_of_a_buffer_stays_one():
    model = nn.Module()
    model.register_buffer("table", torch.zeros(4))
    model.tail = model.table[2:]
    average = ModelAverage(model)
    model.table.fill_(1.0)
    average.update(1)
    assert average.module.tail.tolist() == [1.0, 1.0]


class Odd(nn.Linear):
    """Hides its parameters, and methods return nothing."""

    def parameters(self, recurse=True):
        return iter(())

    def train(self, mode=True):
        super().train(mode)

    def requires_grad_(self, requires_grad=True):
        super().requires_grad_(requires_grad)


def test_a_model_of_odd_methods_is_held_in_the_type_too():
    average = ModelAverage(Odd(1, 1).bfloat16(), dtype=torch.float32)
    assert average.module.weight.dtype == torch.float32
    assert not average.module.weight.requires_grad
    assert not average.module.training


def test_a_pattern_that_matches_nothing_raises_before_the_twin_is_touched():
    twin = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="the buffers are 'running_mean', 'running_var', 'num_batches_tracked'"):
        ModelAverage(nn.BatchNorm1d(2), {"mean": "keep"}, ema_model=twin)
    assert twin.training
    assert twin.weight.requires_grad


def test_8_bit_floats_load_into_wider_types():
    average = ModelAverage(nn.Linear(2, 2))
    average.load_averaged_tensors({"weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "bias": torch.ones(2)})
    assert average.module.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]
