"""How the averaged twin is made, and of what none can be made."""

import functools
import types

import pytest
import torch
from torch import nn

from ignite_ema import EMAWarning, ModelAverage
from tests.helpers.bits import contents, tensors

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


# A deep copy returns functions as they are: those that refer to the model are named.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.body(x))


class ToFloat32:
    """As accelerate wraps a forward."""

    def __init__(self, forward):
        self.model_forward = forward

    def __call__(self, *arguments):
        return self.model_forward(*arguments).float()


def to_float32(forward):
    converted = ToFloat32(forward)

    @functools.wraps(forward)
    def converting(*arguments):
        return converted(*arguments)

    return converting


def closing_hook(model):
    def keep(layer, inputs, output):
        model.tap = output

    model.body.register_forward_hook(keep)


TIED = {
    "forward": [
        lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")),
        lambda model: setattr(model, "forward", torch.autocast("cpu")(model.forward)),
        lambda model: setattr(model, "forward", to_float32(model.forward)),
        lambda model: setattr(model, "forward", lambda x, run=model.forward: run(x)),
    ],
    "body.forward": [lambda model: setattr(model.body, "forward", to_float32(model.body.forward))],
    "scale": [
        lambda model: setattr(model, "scale", lambda x: model.head.weight * x),
        lambda model: setattr(model, "scale", functools.partial(lambda x, by: model.head(x) * by, by=2.0)),
    ],
    "body.forward_hook": [closing_hook],
}


@pytest.mark.parametrize(("name", "change"), [(name, change) for name in TIED for change in TIED[name]])
def test_a_function_that_a_copy_leaves_tied_to_the_model_is_named(name, change):
    model, own = Net(), Net()
    change(model)
    with pytest.warns(EMAWarning, match=f"still calls '{name}' of the model.*ema_model="):
        ModelAverage(model)
    change(own)
    twin = ModelAverage(model, ema_model=own).module  # the way out, silently
    nn.init.zeros_(model.head.weight)
    x = torch.rand(3, 2)
    due = Net.forward(twin, x)
    torch.testing.assert_close(twin(x).float(), due, rtol=0, atol=0.05)  # autocast computes in bfloat16


def plain_hook(layer, inputs, output):
    layer.seen = True


UNTIED = {
    "method": lambda model: setattr(model, "forward", types.MethodType(Net.forward, model)),
    "partial": lambda model: setattr(model, "forward", functools.partial(Net.forward, model)),
    "object": lambda model: setattr(model, "forward", ToFloat32(model.forward)),
    "compile": lambda model: model.compile(backend="eager"),
    "lambda": lambda model: setattr(model, "scale", lambda x, by=2.0: by * x),
    "hook": lambda model: model.body.register_forward_hook(plain_hook),
    "parametrization": lambda model: nn.utils.parametrizations.weight_norm(model.body),
    "spectral norm": lambda model: nn.utils.spectral_norm(model.body),
}


@pytest.mark.parametrize("change", UNTIED)
def test_functions_that_a_copy_binds_anew_are_fine(change):
    model = Net()
    UNTIED[change](model)
    twin = ModelAverage(model).module
    x = torch.rand(3, 2)
    due = twin(x)
    nn.init.zeros_(model.head.weight)
    assert torch.equal(twin(x), due)


# train() and eval() with side effects.


class LoRA(nn.Linear):
    """Merges into the frozen weight in eval mode, as loralib does."""

    def __init__(self):
        super().__init__(2, 2)
        self.weight.requires_grad_(False)
        self.a, self.b, self.merged = nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(1, 2)), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.a @ self.b)
            self.merged = not mode
        return self


@pytest.mark.parametrize("options", [{}, {"share_frozen": True}, {"ema_model": True}])
def test_a_model_whose_eval_changes_weights_is_refused_and_stays_what_it_is(options):
    model = nn.Sequential(LoRA(), nn.Tanh())
    before = contents(model)
    if "ema_model" in options:
        options = {"ema_model": nn.Sequential(LoRA(), nn.Tanh())}
    with pytest.raises(RuntimeError, match=r"eval\(\) of '0' \(LoRA\) changes 'weight'.*merge_weights=False"):
        ModelAverage(model, **options)
    assert contents(model) == before
    assert model[0].training


def test_the_twin_is_put_into_eval_mode_by_eval():
    class YOLO(nn.Module):
        """Starts a training in train(), as ultralytics' does."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 1)

        def train(self, trainer=None):
            raise AssertionError("a training starts")

        def eval(self):
            self.inner.eval()
            return self

    assert not ModelAverage(YOLO()).module.inner.training
    assert not ModelAverage(YOLO(), ema_model=YOLO()).module.inner.training
