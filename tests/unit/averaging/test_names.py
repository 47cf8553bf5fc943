"""Names are those of the model's state_dict(), whatever wraps a part of it, so that each loads into the other."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ignite_ema import ModelAverage
from tests.helpers.models import Tied, compiled, module, move


def build(wrap=lambda part: part):
    return nn.Sequential(nn.Linear(2, 3), wrap(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))), nn.Linear(3, 1))


class Fabric(nn.Module):
    """Holds a module twice and shows its state dict, as the wrapper of lightning.fabric does."""

    def __init__(self, inner):
        super().__init__()
        self._forward_module = self._original_module = inner

    def state_dict(self, *arguments, **options):
        return self._original_module.state_dict(*arguments, **options)

    def load_state_dict(self, *arguments, **options):
        return self._original_module.load_state_dict(*arguments, **options)


WRAPPERS = {
    "activation checkpointing of a part": lambda: build(checkpoint_wrapper),
    "Fabric of a part": lambda: build(Fabric),
    "Fabric over checkpointing": lambda: Fabric(build(checkpoint_wrapper)),
    "compiled": lambda: compiled(build()),
    "compiled inside checkpointing": lambda: build(lambda part: checkpoint_wrapper(compiled(part))),
    "DDP over compiled": lambda: DistributedDataParallel(compiled(build())),
    "DataParallel": lambda: DataParallel(build()),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_states_of_a_wrapped_and_of_a_plain_model_load_into_each_other(wrapper, process_group):
    plain = build()
    wrapped, average = ModelAverage(WRAPPERS[wrapper](), "update"), ModelAverage(plain, "update")
    assert list(average.averaged_tensors()) == list(plain.state_dict())
    assert sorted(wrapped.averaged_tensors()) == sorted(plain.state_dict())
    average.load_state_dict(wrapped.state_dict())
    for name, tensor in wrapped.averaged_tensors().items():
        assert torch.equal(average.averaged_tensors()[name], tensor)
    plain.load_state_dict(wrapped.averaged_tensors())
    move(average.module)
    wrapped.load_state_dict(average.state_dict())
    wrapped.load_averaged(average.module.state_dict())
    assert torch.equal(wrapped.averaged_tensors()["1.0.weight"], average.module[1][0].weight)


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, Fabric, compiled])
def test_a_wrapper_that_is_put_on_between_updates_is_followed(wrap):
    model = build()
    average = ModelAverage(model)
    average.update(0.5)
    model[1] = wrap(model[1])
    nn.init.zeros_(model[0].weight)
    average.update(1.0)
    assert not average.module[0].weight.any()


def test_a_state_dict_that_copies_leaves_the_paths():
    class Copying(nn.Linear):
        def state_dict(self, *arguments, **options):
            return {f"x.{name}": tensor.clone() for name, tensor in super().state_dict(*arguments, **options).items()}

    model = nn.Sequential(Copying(1, 1), nn.Linear(1, 1))
    assert list(ModelAverage(model).averaged_tensors()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert ModelAverage(Copying(1, 1)).update(0.5)


def test_a_tied_tensor_goes_by_its_first_name_and_its_state_says_the_others():
    average = ModelAverage(nn.Sequential(checkpoint_wrapper(Tied())))
    assert "0.second.weight" not in average.averaged_tensors()
    assert average.state_dict()["state_dict_names"]["0.second.weight"] == "0.first.weight"
    shared = nn.Linear(1, 1)
    assert list(ModelAverage(nn.Sequential(shared, nn.ReLU(), shared)).averaged_tensors()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("mode", "due"), [("copy", []), ("update", ["cache"]), ("ema_train", []), ({"cache": "update"}, ["cache"])]
)
def test_buffers_that_are_not_persistent_stand_in_a_state_only_if_they_are_averaged(mode, due):
    model = module(weight=nn.Parameter(torch.ones(1)))
    model.register_buffer("cache", torch.ones(2), persistent=False)
    average = ModelAverage(model, mode)
    assert list(average.averaged_tensors()) == ["weight", *due]
    average.load_state_dict(average.state_dict())
