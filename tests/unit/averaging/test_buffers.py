"""Buffers that are not like others: sparse ones."""

import pytest
import torch
from torch import nn

from ignite_ema import ModelAverage
from tests.helpers.models import frozen, module

SPARSE = {"coo": torch.Tensor.to_sparse, "csr": torch.Tensor.to_sparse_csr}


@pytest.mark.parametrize("to_sparse", SPARSE.values(), ids=SPARSE)
def test_sparse_buffers_are_copied(to_sparse):
    model = module(weight=frozen(torch.zeros(1)), graph=to_sparse(torch.eye(3)))
    average = ModelAverage(model)
    average.update(0.5)
    model.graph = to_sparse(torch.ones(3, 3))  # with more values than before
    average.update(0.5)
    model.graph = None
    assert torch.equal(average.module.graph.to_dense(), torch.ones(3, 3))


@pytest.mark.parametrize("to_sparse", SPARSE.values(), ids=SPARSE)
def test_sparse_buffers_cannot_be_averaged(to_sparse):
    model = nn.Sequential(module(graph=to_sparse(torch.eye(3))))
    message = r"got '0\.graph' with layout torch\.sparse_\w+; .*: handle_buffers=\{\"0\.graph\": \"copy\""
    with pytest.raises(TypeError, match=message):
        ModelAverage(model, "update")
    ModelAverage(model, {"0.graph": "copy", "*": "update"})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.eye(3), torch.eye(3).to_sparse()),
        (torch.eye(3).to_sparse(), torch.eye(3)),
        (torch.eye(3).to_sparse(), torch.eye(4).to_sparse()),
    ],
    ids=["becomes sparse", "becomes dense", "other shape"],
)
def test_a_sparse_buffer_that_no_longer_matches_raises_and_names_the_path(before, after):
    model = module(weight=frozen(torch.zeros(1)), graph=before)
    average = ModelAverage(model)
    average.update(0.5)
    model.weight.fill_(1.0)
    model.graph = after
    with pytest.raises((RuntimeError, TypeError), match="'graph'"):
        average.update(0.5)
    assert average.module.weight.item() == 0.0
