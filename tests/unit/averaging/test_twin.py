"""How the averaged twin is made, and of what none can be made."""

from functools import partial

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


# Tensors without the memory for their values, and tensors without one shape.


def freed(size):
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight.untyped_storage().resize_(size)
    return model


@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("options", [{}, {"share_frozen": True}, {"dtype": torch.float64}])
def test_a_model_whose_memory_is_freed_is_refused(size, options):
    model = freed(size).requires_grad_(not options.get("share_frozen"))
    with pytest.raises(RuntimeError, match="'0.weight' has no memory for its values; load"):
        ModelAverage(model, **options)


def test_a_view_of_a_part_of_a_large_memory_is_no_matter():
    model = nn.Linear(3, 3, bias=False)
    model.weight = nn.Parameter(torch.arange(100.0)[91:].view(3, 3))
    assert ModelAverage(model).module.weight.tolist() == model.weight.tolist()


def nested(layout):
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("handle_buffers", ["copy", "update", {"*": "keep"}])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_buffer_is_refused(layout, handle_buffers):
    model = module(x=torch.ones(2))
    average = ModelAverage(model, handle_buffers)
    model.x = nested(layout)
    moves = [average.reset, average.swapped().__enter__, partial(average.update, 0.5)]
    for move in moves[: 3 if isinstance(handle_buffers, str) else 2]:  # no update looks at a buffer that is kept
        with pytest.raises(RuntimeError, match="'x' is a nested tensor in the model"):
            move()
    with pytest.raises(RuntimeError, match="'x', a nested tensor"):
        ModelAverage(model, handle_buffers)
