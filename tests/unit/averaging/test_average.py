"""ModelAverage on modules that are unlike most: what it shares, copies, refuses."""

import copy

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from ignite_ema import EMAHandler, ModelAverage


def two_layers():
    return nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))


def test_a_twin_that_holds_a_tensor_of_the_model_raises_and_changes_nothing():
    model = two_layers()
    twin = copy.deepcopy(model)
    twin[1].weight = model[1].weight
    with pytest.raises(RuntimeError, match="'1.weight' is one and the same tensor in the model and in the twin"):
        ModelAverage(model, ema_model=twin)
    assert model[1].weight.requires_grad


def test_a_tensor_of_the_model_that_is_put_into_the_twin_raises():
    model = two_layers()
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
    assert all(map(torch.equal, average.module.parameters(), model.parameters()))


@pytest.mark.parametrize("other", [torch.int32, torch.complex64])
def test_another_kind_of_number_raises_and_names_the_path(other):
    model, twin = nn.Linear(1, 1), nn.Linear(1, 1)
    twin.weight = nn.Parameter(torch.zeros(1, 1, dtype=other), requires_grad=False)
    with pytest.raises(RuntimeError, match=f"'weight' has torch.float32 in the model and {other} in the twin"):
        ModelAverage(model, ema_model=twin)


def test_a_kept_buffer_may_change_its_shape():
    model = nn.Linear(1, 1)
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    average = ModelAverage(model, {"cache": "keep"})
    model.cache = torch.zeros(5)
    average.update(0.5)
    assert average.averaged_tensors()["cache"].shape == (2,)
    average.load_averaged_tensors(average.averaged_tensors())


def test_the_state_is_that_of_the_twin_whatever_became_of_the_model():
    model = two_layers()
    average = ModelAverage(model)
    state = copy.deepcopy(average.averaged_tensors())
    del model[1]
    assert set(average.averaged_tensors()) == {"0.weight", "1.weight"}
    average.module[0] = nn.Linear(1, 1, bias=False)
    average.load_averaged_tensors(state)
    assert torch.equal(average.module[0].weight, state["0.weight"])


def scripted(model):
    return torch.jit.script(model)


def traced(model):
    return torch.jit.trace(model, torch.ones(1, 1))


@pytest.mark.parametrize("convert", [scripted, traced])
def test_a_torchscript_module_is_averaged(convert):
    model = convert(nn.Linear(1, 1))
    model.weight.data.fill_(1.0)
    average = ModelAverage(model)
    model.weight.data.fill_(3.0)
    average.update(0.5)
    assert average.module.weight.item() == 2.0
    assert model.weight.item() == 3.0


def test_a_child_of_the_name_of_torchs_own_wrapper_is_no_wrapper():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod, self.extra = nn.Linear(1, 1), nn.Linear(1, 1)

    assert set(ModelAverage(Odd()).averaged_tensors()) == {
        "_orig_mod.weight",
        "_orig_mod.bias",
        "extra.weight",
        "extra.bias",
    }


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
    average = ModelAverage(model)
    assert (type(average.module.weight), average.module.weight.scale) == (Scaled, 3.0)
    assert not average.module.weight.requires_grad


def test_a_view_of_a_buffer_stays_one():
    model = nn.Module()
    model.register_buffer("table", torch.zeros(4))
    model.tail = model.table[2:]
    average = ModelAverage(model)
    model.table.fill_(1.0)
    average.update(1)
    assert average.module.tail.tolist() == [1.0, 1.0]


def test_methods_that_return_nothing_do_no_harm():
    class Quiet(nn.Linear):
        def train(self, mode=True):
            super().train(mode)

        def requires_grad_(self, requires_grad=True):
            super().requires_grad_(requires_grad)

    assert not ModelAverage(Quiet(1, 1)).module.training


def test_parameters_that_a_model_hides_are_held_in_the_type_too():
    class Hiding(nn.Linear):
        def parameters(self, recurse=True):
            return iter(())

    average = ModelAverage(Hiding(1, 1).bfloat16(), dtype=torch.float32)
    assert average.module.weight.dtype == torch.float32
    assert not average.module.weight.requires_grad


def test_a_pattern_that_matches_nothing_raises_before_the_twin_is_touched():
    twin = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="the buffers are 'running_mean', 'running_var', 'num_batches_tracked'"):
        ModelAverage(nn.BatchNorm1d(2), {"mean": "keep"}, ema_model=twin)
    assert twin.training
    assert twin.weight.requires_grad


@pytest.mark.parametrize(("momentum", "error"), [("x", TypeError), (True, TypeError), (2, ValueError)])
def test_update_refuses_what_is_no_momentum(momentum, error):
    with pytest.raises(error, match="momentum should be a momentum"):
        ModelAverage(nn.Linear(1, 1)).update(momentum)


def test_a_meta_model_is_told_to_be_materialised():
    with pytest.raises(RuntimeError, match="model should be initialised .* '0.weight' has no values; materialise it"):
        ModelAverage(nn.Sequential(nn.Linear(1, 1, device="meta")))


LOADED = [
    (torch.ones(2, 2).to_sparse(), "should be torch.strided and have values, got torch.sparse_coo"),
    (torch.ones(2, 2, device="meta"), "should be torch.strided and have values, got torch.strided on meta"),
    (torch.ones(2, 2, dtype=torch.float64), "should fit into torch.float32, got torch.float64; hold the average in"),
    (torch.ones(2, 2, dtype=torch.bool), "should fit into torch.float32, got torch.bool"),
]


@pytest.mark.parametrize(("tensor", "message"), LOADED, ids=range(len(LOADED)))
def test_a_tensor_that_cannot_be_held_raises_and_loads_nothing(tensor, message):
    average = ModelAverage(nn.Sequential(nn.Linear(1, 1), nn.Linear(2, 2)))
    before = copy.deepcopy(average.averaged_tensors())
    state = {path: torch.zeros_like(value) for path, value in before.items()} | {"1.weight": tensor}
    with pytest.raises(ValueError, match=f"'1.weight' of the averaged tensors {message}"):
        average.load_averaged_tensors(state)
    assert all(torch.equal(value, before[path]) for path, value in average.averaged_tensors().items())


def test_8_bit_floats_load_into_wider_types_only():
    narrow = {"weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "bias": torch.ones(2)}
    average = ModelAverage(nn.Linear(2, 2))
    average.load_averaged_tensors(narrow)
    assert average.module.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_a_restored_momentum_wins_over_an_existing_attribute():
    from ignite.engine import Engine

    trainer = Engine(lambda engine, batch: None)
    trainer.state.ema_momentum = 0.5
    handler = EMAHandler(nn.Linear(1, 1), 0.25)
    handler.load_state_dict({**handler.state_dict(), "current_momentum": 0.125})
    handler.attach(trainer, warn_if_exists=False)
    assert trainer.state.ema_momentum == 0.125


def masked(*values):
    model = nn.Linear(1, 1)
    model.mask = nn.Parameter(torch.tensor(values), requires_grad=False)
    return model


@pytest.mark.parametrize("twin_is_loaded", [True, False])
@pytest.mark.parametrize("how", ["load", "assign", "data"])
def test_infinities_that_a_frozen_parameter_gets_before_a_run_are_no_nan(how, twin_is_loaded):
    model, source = masked(0.0, 0.0), masked(0.0, -torch.inf)
    handler = EMAHandler(model, momentum=0.5)
    trainer = Engine(lambda engine, batch: None)
    handler.attach(trainer)
    trainer.run(range(2))
    if how == "data":
        model.mask.data = source.mask.data.clone()
    else:
        model.load_state_dict(source.state_dict(), assign=how == "assign")
    if twin_is_loaded:
        handler.ema_model.load_state_dict(source.state_dict())
    trainer.run(range(3))
    assert handler.ema_model.mask.tolist() == [0.0, -torch.inf]
