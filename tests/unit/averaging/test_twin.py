"""How the averaged twin is made, and of what none can be made."""

import pytest
import torch
from torch import nn

from ignite_ema import ModelAverage
from tests.helpers.bits import tensors
from tests.helpers.models import module

# inference_mode.


@pytest.mark.parametrize("updated_inside", [False, True])
@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("model_inside", [False, True])
def test_inference_mode_does_not_matter(model_inside, made_inside, updated_inside):
    with torch.inference_mode(model_inside):
        model = nn.BatchNorm1d(2)
    with torch.inference_mode(made_inside):
        average = ModelAverage(model, "update")
    with torch.inference_mode(model_inside):
        model.weight.detach().fill_(3.0)
        model.running_mean = torch.full((2,), 2.0)
    for inside in (updated_inside, not updated_inside):
        with torch.inference_mode(inside):
            average.update(0.5)
    assert average.module.weight.tolist() == [2.5, 2.5]
    assert average.module.running_mean.tolist() == [1.5, 1.5]
    assert not any(tensor.is_inference() for tensor in tensors(average.module).values())


def test_memory_that_is_parted_inside_inference_mode_can_be_updated_outside():
    model = nn.BatchNorm1d(2)
    average = ModelAverage(model)
    average.update(0.5)
    average.module.load_state_dict(model.state_dict(), assign=True)
    with torch.inference_mode():
        average.update(0.5)
    assert not any(tensor.is_inference() for tensor in tensors(average.module).values())


def test_a_twin_of_inference_tensors_raises():
    with torch.inference_mode():
        twin = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"'weight' was made inside torch\.inference_mode\(\); build the twin outside"):
        ModelAverage(nn.Linear(1, 1), ema_model=twin)


# Lazy modules with a twin of one's own.


@pytest.mark.parametrize("lazy", ["model", "twin"])
def test_a_lazy_tensor_is_named(lazy):
    made = {"model": nn.Sequential(nn.Linear(1, 1)), "twin": nn.Sequential(nn.Linear(1, 1))}
    made[lazy] = nn.Sequential(nn.LazyLinear(1))
    with pytest.raises((RuntimeError, ValueError), match=r"'0\.weight'.*run it on one batch"):
        ModelAverage(made["model"], ema_model=made["twin"])


class Quantised(torch.Tensor):
    """A type of tensor that can be copied but not interpolated."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        if "lerp" in function.__name__:
            raise NotImplementedError("no lerp for quantised tensors")
        return super().__torch_function__(function, types, arguments, named or {})

    def __deepcopy__(self, memo):
        return nn.Parameter(self.detach().clone().as_subclass(Quantised), self.requires_grad)


def quantised():
    model = module(base=nn.Parameter(torch.ones(2).as_subclass(Quantised)), adapter=nn.Parameter(torch.ones(2)))
    model.base.requires_grad_(False)
    return model


def test_a_type_of_tensor_that_cannot_be_averaged_is_named_and_may_be_shared():
    with pytest.raises(TypeError, match="got 'base', a Quantised, for which lerp fails .no lerp.*share_frozen=True"):
        ModelAverage(quantised())
    model = quantised()
    average = ModelAverage(model, share_frozen=True)
    assert average.update(0.5)
    assert average.module.base is model.base
