"""What docs/compatibility.md says of ``Join``."""

import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from ignite_ema import ModelAverage


def train_on_uneven_data(folder):
    """Four steps on the first rank, twelve on the second."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 2))
    average = ModelAverage(model, momentum=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(torch.distributed.get_rank())
    with Join([model]):
        for _ in range((4, 12)[torch.distributed.get_rank()]):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            average.update()
    return average.num_updates, model.module.weight.detach(), average.module.weight


def test_under_join_the_models_agree_and_the_averages_do_not(world):
    (few, model, shorter), (many, same, longer) = world(2, train_on_uneven_data)
    assert (few, many) == (4, 12)
    assert torch.equal(model, same)
    assert not torch.equal(shorter, longer)
