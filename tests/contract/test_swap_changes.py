"""What is done to a model inside a swapped block is undone at its end; a layer that was replaced is named."""

import pytest
import torch
from torch import nn

from ignite_ema import EMAWarning, ModelAverage
from tests.helpers.bits import bits, contents, places

QUIET = pytest.mark.filterwarnings("ignore:.*and the change is dropped")


class Patient(nn.Module):
    """Something for every kind of surgery."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.layers[1].weight = self.body[2].weight  # tied
        self.lstm = nn.LSTM(2, 2)
        self.register_buffer("cache", torch.rand(2), persistent=False)
        self.register_buffer("expanded", torch.rand(1).expand(2))

    def forward(self, x):
        y = self.body(x) + self.cache + self.expanded
        for layer in self.layers:
            y = layer(y)
        return self.lstm(y)[0]


@torch.enable_grad()
def train(model):
    optimizer = torch.optim.Adam(model.parameters())
    model.train()(torch.rand(4, 2)).square().sum().backward()
    optimizer.step()


def load(model, **options):
    state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items() if name != "expanded"}
    model.load_state_dict(state, strict=False, **options)


def point_elsewhere(model):
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = torch.zeros_like(tensor)


def grow(model):
    model.cache, model.expanded, model.body[1].running_mean = torch.ones(5), torch.ones(2), torch.zeros(2)


UNDONE = {
    "half": nn.Module.half,
    "no gradients": lambda m: m.requires_grad_(False),
    "load": load,
    "assign": lambda m: load(m, assign=True),
    "training": train,
    "batch norm in train mode": lambda m: m.train()(torch.rand(4, 2)),
    "other memory": point_elsewhere,
    "other buffers": grow,
    "replace a parameter": lambda m: setattr(m.body[0], "weight", nn.Parameter(torch.ones(2, 2))),
    "a tie taken apart": lambda m: setattr(m.layers[1], "weight", nn.Parameter(torch.ones(2, 2))),
    "of an LSTM": lambda m: setattr(m.lstm, "weight_ih_l0", nn.Parameter(torch.ones(8, 2))),
}


def averaged_patient():
    torch.manual_seed(0)
    model = Patient().eval()
    average = ModelAverage(model)
    for parameter in average.module.parameters():
        parameter.add_(1.0)
    return model, average


def state(model):
    return contents(model), sorted(places(model)), list(model.state_dict())


@QUIET
@torch.no_grad()
@pytest.mark.parametrize("change", UNDONE)
def test_a_cast_a_load_and_a_step_in_the_block_are_undone(change):
    model, average = averaged_patient()
    x, due = torch.rand(3, 2), contents(average.module)
    before, output = state(model), model(x)
    with average.swapped():
        UNDONE[change](model)
    assert state(model) == before
    assert torch.equal(model.eval()(x), output)
    assert contents(average.module) == due
    assert average.update(0.5)


REPLACED = {
    "body.0": lambda m: setattr(m.body, "0", nn.Linear(2, 2)),
    "body": lambda m: setattr(m, "body", None),
    "layers.0": lambda m: m.layers.insert(0, nn.Linear(2, 2)),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_layer_that_is_replaced_in_the_block_is_named_and_the_rest_is_given_back(name):
    model, average = averaged_patient()
    tensors = list(model.parameters())
    before = [bits(tensor) for tensor in tensors]
    with pytest.raises(RuntimeError, match=f"'{name}' was replaced inside"), average.swapped():
        REPLACED[name](model)
    assert [bits(tensor) for tensor in tensors] == before
    assert not average.is_swapped()


@QUIET
def test_a_cast_of_shared_frozen_parameters_is_undone_and_what_is_written_into_them_stays():
    model = nn.Sequential(nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1))
    average = ModelAverage(model, share_frozen=True)
    before = state(model)
    with average.swapped():
        model.half()
    assert state(model) == before
    with average.swapped(), torch.no_grad():
        model[0].weight.fill_(3.0)
    assert model[0].weight.item() == 3.0


def test_a_layer_that_is_replaced_in_a_block_that_raises_is_named_in_a_warning():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average = ModelAverage(model)
    own = model[1].weight.clone()

    def replace_and_raise():
        with average.swapped():
            model[0] = nn.Linear(2, 2)
            raise KeyError("mine")

    with pytest.warns(EMAWarning, match="'0' was replaced inside"), pytest.raises(KeyError, match="mine"):
        replace_and_raise()
    assert torch.equal(model[1].weight, own)
