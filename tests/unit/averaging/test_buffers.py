"""What an update does with buffers: which are averaged, and those that are unlike others."""

import pytest
import torch
from torch import nn

from ignite_ema import EMAWarning, ModelAverage
from tests.helpers.models import frozen, module, net


def observed(**buffers):
    return module(weight=frozen(torch.zeros(1)), **buffers)


# "statistics".


def test_statistics_are_the_running_means_and_variances_of_normalisation_layers():
    model = nn.ModuleDict({"net": net(), "other": observed(scale=torch.ones(2))})
    average = ModelAverage(model, "statistics")
    before = {name: one.clone() for name, one in average.module.named_buffers()}
    model["net"](torch.randn(8, 3))
    model["other"].scale.fill_(3.0)
    average.update(0.5)
    after = dict(average.module.named_buffers())
    for name, online in model.named_buffers():
        is_statistic = name in ("net.1.running_mean", "net.1.running_var")
        assert torch.equal(after[name], torch.lerp(before[name], online, 0.5) if is_statistic else online), name
    assert average.treatments()["net.1.running_var"] == "average"
    assert average.treatments()["other.scale"] == "copy"


# Not finite under "update".


def test_the_range_of_an_observer_is_copied_until_it_is_finite_and_named_when_it_is_not():
    model = observed(min_val=torch.tensor([torch.inf, torch.inf]), scale=torch.zeros(2))
    with pytest.warns(EMAWarning, match="no finite value yet in 'min_val'.*handle_buffers=\"statistics\""):
        average = ModelAverage(model, "update")
    model.min_val.copy_(torch.tensor([-2.0, torch.inf]))
    average.update(0.25)
    assert average.module.min_val.tolist() == [-2.0, torch.inf]
    model.min_val.copy_(torch.tensor([-4.0, -1.0]))
    average.update(0.25)
    assert average.module.min_val.tolist() == [-2.5, -1.0]


# Other shapes and layouts; `test_pairing` has buffers that grow.


def test_tied_buffers_that_grow_stay_tied():
    layers = [observed(), observed()]
    for layer in layers:
        layer.register_buffer("table", torch.zeros(2) if layer is layers[0] else layers[0].table)
    model, other = nn.Sequential(*layers), nn.Sequential(observed(table=torch.ones(4)), observed(table=torch.ones(4)))
    average = ModelAverage(model)
    model[0].table = model[1].table = torch.ones(3)
    with average.swapped():
        assert model[0].table is model[1].table
    average.update(0.5)
    assert average.module[0].table is average.module[1].table
    assert average.module[0].table.tolist() == [1.0, 1.0, 1.0]
    average.load_averaged(other.state_dict())
    assert average.module[0].table is average.module[1].table
    assert average.module[0].table.tolist() == [1.0, 1.0, 1.0, 1.0]
    average.update(0.5)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_copied_buffer_of_another_layout_is_followed():
    model = observed(graph=torch.eye(3))
    average = ModelAverage(model)
    for after in (
        *(one.to_sparse() for one in (torch.eye(3), torch.ones(3, 3))),
        torch.eye(4).to_sparse_csr(),
        torch.eye(3),
    ):
        model.graph = after
        average.update(0.5)
        assert average.module.graph.layout is after.layout
        assert torch.equal(average.module.graph.to_dense(), after.to_dense())
