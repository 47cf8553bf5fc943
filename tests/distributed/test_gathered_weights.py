"""Every entrance meets models and twins whose weights a pass has left gathered."""

import pytest
import torch
from ignite.engine import Engine
from torch import nn
from torch.distributed.fsdp import fully_shard

from ignite_ema import EMAHandler
from ignite_ema.averaging.sharding import fsdp_modules, reshard
from tests.distributed.worker import gathers_on_cpu, mesh

pytestmark = gathers_on_cpu


class Net(nn.Module):
    """Gives ``16 * w ** 3`` for ones where all its weights are w: a root with weights of its own, and two parts."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.second(self.first(x)) * self.scale


def sharded(value, policy):
    options = {} if policy == "default" else {"reshard_after_forward": policy}
    model = Net()
    for part in (model.first, model.second, model):
        fully_shard(part, mesh=mesh(), **options)
    object.__setattr__(model, "shards", list(model.parameters()))  # taken before any pass, as an optimizer does
    fill(model, value)
    return model


def fill(model, value):
    with torch.no_grad():
        for shard in model.shards:
            shard.fill_(value)


def output(model):
    with torch.no_grad():
        return set(model(torch.ones(1, 4)).flatten().tolist())


FIVES = {name: torch.full(parameter.shape, 5.0) for name, parameter in Net().named_parameters()}


def swap(handler):
    with handler.swapped():
        assert output(handler.model) == {16 * 3.0**3}


def attach(handler):
    handler.attach(Engine(lambda engine, batch: None), optimizer=torch.optim.SGD(handler.model.shards, lr=0.1))


def state(handler):
    assert all((tensor.to_local() == 3).all() for tensor in handler.state_dict()["averaged_tensors"].values())


def load(handler):
    state = handler.state_dict()
    fives = {path: torch.full_like(tensor, 5.0) for path, tensor in state["averaged_tensors"].items()}
    handler.load_state_dict({**state, "averaged_tensors": fives})


# Each is given a handler of a model of 1 everywhere with an average of 3, both gathered, and after that the model's
# shards became 2; and the average that is due.
ENTRANCES = {
    "construction": (lambda handler: EMAHandler(handler.model, ema_model=handler.ema_model), 2.0),
    "update": (lambda handler: handler.average.update(0.5), 2.5),
    "reset": (lambda handler: handler.reset(), 2.0),
    "swap": (swap, 3.0),
}
LOOKING_AT_ONE = {
    "attach": (attach, 3.0),
    "state": (state, 3.0),
    "load": (load, 5.0),
    "load of plain tensors": (lambda handler: handler.average.load_averaged(FIVES), 5.0),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("policy", ["default", False])
@pytest.mark.parametrize("entrance", [*ENTRANCES, *LOOKING_AT_ONE])
def test_every_entrance_meets_gathered_weights(entrance, policy):
    handler = EMAHandler(sharded(3.0, policy), 0.5, ema_model=sharded(0.0, policy))
    fill(handler.model, 1.0)
    for module in (handler.model, handler.ema_model):
        output(module)
    fill(handler.model, 2.0)
    enter, average = (ENTRANCES | LOOKING_AT_ONE)[entrance]
    enter(handler)
    if entrance in LOOKING_AT_ONE:
        reshard(fsdp_modules(handler.model) + fsdp_modules(handler.ema_model))
    assert output(handler.ema_model) == {16 * average**3}
    assert output(handler.model) == {16 * 2.0**3}
    optimizer = torch.optim.SGD(handler.model.shards, lr=2.0**-10)  # a step towards smaller weights, and an update
    handler.model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    handler.average.update(1.0)
    assert output(handler.model) == output(handler.ema_model) != {16 * 2.0**3}
