"""What is done to a model inside a swapped block is undone at its end, modules that were taken apart included."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ignite_ema import ModelAverage
from ignite_ema.averaging import swap
from tests.helpers.bits import contents, places

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
        self.layers[1].weight = self.body[2].weight  # tied
        self.named = nn.ModuleDict({"a": nn.Linear(2, 2)})
        self.conv, self.norm = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)
        self.lstm = nn.LSTM(2, 2)
        self.free = nn.ParameterList([torch.ones(2)])
        self.register_buffer("cache", torch.rand(2), persistent=False)
        self.register_buffer("expanded", torch.rand(1).expand(2))

    def forward(self, x):
        y = self.named["a"](self.body(x)) + self.free[0] + self.cache + self.expanded
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


def swap_two(model):
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def half_by_new_parameters(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.half()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@torch.enable_grad()
def train(model):
    optimizer = torch.optim.Adam(model.parameters())
    model.train()(torch.rand(4, 2)).square().sum().backward()
    optimizer.step()


def load(model, **options):
    state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items() if name != "expanded"}
    model.load_state_dict(state, strict=False, **options)


def load_and_run(model):
    load(model, assign=True)
    model(torch.rand(3, 2))


def point_elsewhere(model):
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = torch.zeros_like(tensor)


def register_anew(model):
    del model.cache
    model.register_buffer("cache", torch.ones(5), persistent=True)
    model.expanded = torch.ones(2)
    model.norm.running_mean = None


def set_data(change):
    return lambda m: setattr(m.conv.weight, "data", change(m.conv.weight.data))


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
    "a tie taken apart": lambda m: setattr(m.layers[1], "weight", nn.Parameter(torch.ones(2, 2))),
    "of an LSTM": lambda m: setattr(m.lstm, "weight_ih_l0", nn.Parameter(torch.ones(8, 2))),
    "buffers registered": register_anew,
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
    "half": nn.Module.half,
    "half by new parameters": half_by_new_parameters,
    "double": nn.Module.double,
    "no gradients": lambda m: m.requires_grad_(False),
    "other dictionaries": lambda m: m.body[2].__dict__.update(nn.Linear(2, 2).__dict__),
    "another class": lambda m: setattr(m.named["a"], "__class__", nn.Bilinear),
    "a plain attribute in the way": lambda m: vars(m.body[0]).update(weight=torch.ones(2, 2)),
    "load": load,
    "assign": lambda m: load(m, assign=True),
    "assign and run": load_and_run,
    "training": train,
    "batch norm in train mode": lambda m: m.train()(torch.rand(4, 2)),
    "other memory": point_elsewhere,
    "another shape of the same memory": set_data(lambda data: data[:1]),
    "another stride of the same memory": set_data(lambda data: data.transpose(0, 1)),
    "another type of the same memory": lambda m: setattr(m.cache, "data", m.cache.data.view(torch.int32)),
}


@pytest.fixture(autouse=True)
def no_mark_stays():
    """What one test leaves swapped would make others fail, whose objects come to live in the same places."""
    yield
    swap._swapped.clear()


def state(model):
    kinds = {name: (type(module), list(vars(module))) for name, module in model.named_modules()}
    return kinds, contents(model), sorted(places(model)), list(model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("surgery", SURGERY)
def test_what_is_done_in_the_block_is_undone(surgery):
    torch.manual_seed(0)
    model = Patient().eval()
    average = ModelAverage(model)
    for parameter in average.module.parameters():
        parameter.add_(1.0)
    x, due = torch.rand(3, 2), contents(average.module)
    before, output = state(model), model(x)
    with average.swapped():
        SURGERY[surgery](model)
    assert state(model) == before
    assert torch.equal(model.eval()(x), output)
    assert contents(average.module) == due
    assert average.update(0.5)


def test_modes_and_hooks_that_are_set_in_the_block_stay():
    model = Patient().eval()
    average, seen = ModelAverage(model), []
    with average.swapped():
        model.train()
        model.body[0].register_forward_hook(lambda *_: seen.append(1))
    assert model.body[0].training
    model(torch.rand(3, 2))
    assert seen == [1]


def test_shared_frozen_parameters_are_undone_but_what_is_written_into_them_stays_and_is_said():
    model = nn.Sequential(nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1))
    average = ModelAverage(model, share_frozen=True)
    for change in (nn.Module.half, lambda m: load(m, assign=True)):
        before = state(model)
        with average.swapped():
            change(model)
        assert state(model) == before
    with (
        pytest.warns(UserWarning, match="'0.weight' was changed while.*the change stays"),
        average.swapped(),
        torch.no_grad(),
    ):
        model[0].weight.fill_(3.0)
    assert model[0].weight.item() == 3.0
