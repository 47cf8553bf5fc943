"""Modules that are taken apart inside a swapped block are put together again at its end, with their own weights."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ignite_ema import ModelAverage

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*and the change is dropped:UserWarning"),
]


class Patient(nn.Module):
    """Something for every kind of surgery."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.named = nn.ModuleDict({"a": nn.Linear(2, 2)})
        self.conv, self.norm = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)
        self.lstm = nn.LSTM(2, 2)
        self.free = nn.ParameterList([torch.ones(2)])
        self.register_buffer("cache", torch.rand(2), persistent=False)

    def forward(self, x):
        y = self.named["a"](self.body(x)) + self.free[0] + self.cache
        for layer in self.layers:
            y = layer(y)
        y = self.norm(self.conv(y.unsqueeze(-1))).squeeze(-1)
        return self.lstm(y)[0]


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Quantised(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().mul(8).round().char())

    def forward(self, x):
        return x @ self.weight.float().T / 8


def replace_dictionaries(module):
    module.__dict__.update(nn.Linear(2, 2).__dict__)


def swap_two(model):
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def under_future(name):
    def convert(model):
        set_it = getattr(torch.__future__, f"set_{name}")
        set_it(True)
        try:
            model.half()
        finally:
            set_it(False)

    return convert


SURGERY = {
    "a layer": lambda m: setattr(m.body, "0", nn.Linear(2, 2)),
    "a layer of a sequence": lambda m: m.body.__setitem__(0, nn.Linear(2, 2)),
    "no layer": lambda m: setattr(m, "named", None),
    "append": lambda m: m.layers.append(nn.Linear(2, 2)),
    "insert": lambda m: m.layers.insert(0, nn.Linear(2, 2)),
    "delete": lambda m: m.layers.__delitem__(0),
    "delete from a sequence": lambda m: m.body.__delitem__(1),
    "two layers exchanged": swap_two,
    "pop": lambda m: m.named.pop("a"),
    "whole list": lambda m: setattr(m, "layers", nn.ModuleList([nn.Linear(2, 2)])),
    "another parameter": lambda m: m.body[0].register_parameter("extra", nn.Parameter(torch.ones(1))),
    "no parameter": lambda m: m.body[0].register_parameter("bias", None),
    "delete a parameter": lambda m: delattr(m.body[0], "bias"),
    "replace a parameter": lambda m: setattr(m.conv, "weight", nn.Parameter(torch.ones(2, 2, 1))),
    "a buffer for a parameter": lambda m: (delattr(m.conv, "bias"), m.conv.register_buffer("bias", torch.ones(2))),
    "of an LSTM": lambda m: setattr(m.lstm, "weight_ih_l0", nn.Parameter(torch.ones(8, 2))),
    "buffers registered": lambda m: m.register_buffer("cache", torch.ones(2), persistent=True),
    "parametrize": lambda m: parametrize.register_parametrization(m.body[0], "weight", Doubled()),
    "orthogonal": lambda m: parametrizations.orthogonal(m.body[0]),
    "weight_norm": lambda m: parametrizations.weight_norm(m.body[0]),
    "old weight_norm": lambda m: nn.utils.weight_norm(m.body[0]),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.body[0]),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m.body[0]),
    "prune": lambda m: prune.l1_unstructured(m.body[0], "weight", 0.5),
    "fuse": lambda m: (m.body.__setitem__(0, fuse_linear_bn_eval(m.body[0], m.body[1])), m.body.__delitem__(1)),
    "fuse a convolution": lambda m: setattr(m, "conv", fuse_conv_bn_eval(m.conv, m.norm)),
    "quantise": lambda m: m.layers.__setitem__(0, Quantised(m.layers[0])),
    "half": lambda m: m.half(),
    "half by new parameters": under_future("overwrite_module_params_on_conversion"),
    "no gradients": lambda m: m.requires_grad_(False),
    "other dictionaries": lambda m: replace_dictionaries(m.body[2]),
    "another class": lambda m: setattr(m.named["a"], "__class__", nn.Bilinear),
    "a plain attribute in the way": lambda m: vars(m.body[0]).update(weight=torch.ones(2, 2)),
}


def state(model):
    kinds = {name: (type(module), list(vars(module))) for name, module in model.named_modules()}
    tensors = {name: (id(t), t.dtype, t.tolist(), t.requires_grad) for name, t in named_tensors(model)}
    return kinds, tensors, list(model.state_dict())


def named_tensors(model):
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


@torch.no_grad()
@pytest.mark.parametrize("surgery", SURGERY)
def test_surgery_in_the_block_is_undone(surgery):
    torch.manual_seed(0)
    model = Patient().eval()
    average = ModelAverage(model)
    for parameter in average.module.parameters():
        parameter.add_(1.0)
    x = torch.rand(3, 2)
    before, output = state(model), model(x)
    with average.swapped():
        SURGERY[surgery](model)
    assert state(model) == before
    assert torch.equal(model(x), output)
    assert average.update(0.5)


def test_modes_and_hooks_that_are_set_in_the_block_stay():
    model = Patient().eval()
    average = ModelAverage(model)
    seen = []
    with average.swapped():
        model.train()
        model.body[0].register_forward_hook(lambda *_: seen.append(1))
    assert model.body[0].training
    model(torch.rand(3, 2))
    assert seen == [1]


def test_a_frozen_shared_weight_that_is_changed_in_the_block_is_said_to_stay():
    model = nn.Sequential(nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1))
    average = ModelAverage(model, share_frozen=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with average.swapped(), torch.no_grad():
            model[0].weight.fill_(3.0)
    assert "'0.weight' was changed while" in str(caught[0].message)
    assert "the change stays" in str(caught[0].message)
    assert model[0].weight.item() == 3.0
