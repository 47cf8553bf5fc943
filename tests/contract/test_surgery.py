"""Surgery on a model and its twin between updates: averaged by name, or refused with nothing changed.

The oracle knows nothing of the library. It computes in float64, by name, and looks after every tensor that the model
has ever had: no update may write to one of them.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune  # noqa: F401, the surgeries use these names

from ignite_ema import ModelAverage
from tests.helpers.bits import bits
from tests.helpers.models import compiled, frozen  # noqa: F401


class Block(nn.Module):
    """Trained or frozen weights, and buffers."""

    def __init__(self, is_frozen):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.requires_grad_(not is_frozen)
        self.register_buffer("mean", torch.randn(2))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("cache", torch.randn(3), persistent=False)


def base():
    model = nn.Sequential(Block(False), Block(True), Block(False), Block(True), nn.Linear(2, 2), nn.ReLU())
    model[3].inner.weight = model[1].inner.weight  # tied, frozen
    model[4].weight = model[0].inner.weight  # tied, trained
    return model


# Surgery: a statement about the model, its twin, two of its blocks (a, b), and a number to choose by (n).
FOLLOWED = """
a.inner.weight.data = torch.randn(2, 2)
a.mean, a.count = torch.randn(2), a.count + 1
a.mean = torch.tensor(3.0).expand(2)
model[5] = compiled(nn.ReLU())
""".strip().splitlines()

OTHERS = """
model[n], model[n + 2] = model[n + 2], model[n]
a.inner, b.inner = b.inner, a.inner
model[n] = Block(n % 2)
a.inner = nn.Linear(2, 2).requires_grad_(bool(n % 2))
a.inner.weight = nn.Parameter(torch.randn(2, 2), bool(n % 2))
a.inner.bias = b.inner.bias
a.inner.weight = nn.Parameter(b.inner.weight.detach(), a.inner.weight.requires_grad)
del a.inner.bias
a.inner._parameters["shift"] = a.inner._parameters.pop("bias")
a.requires_grad_(bool(n % 2))
model.load_state_dict({k: torch.randn(v.shape).to(v.dtype) for k, v in named(model)}, False, True)
twin.load_state_dict(model.state_dict(), assign=True)
model.load_state_dict(twin.state_dict(), assign=True)
a.inner.weight.data = b.inner.weight.data
a.inner.bias.data = a.inner.bias.data[:1]
a.double()
b.to("meta")
a.cache = torch.randn(4)
a.mean = b.inner.bias.detach()
del a.cache
parametrizations.weight_norm(a.inner)
prune.l1_unstructured(a.inner, "weight", 1)
twin[n].inner.bias.data = torch.randn(2)
twin[n].mean = twin[n].mean.double()
twin[0].inner.bias = frozen(model[2].inner.bias.detach())
""".strip().splitlines()


def named(module):
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def marks(tensors):
    return [None if tensor.is_meta else bits(tensor) for tensor in tensors]


def doubles(module):
    return {name: tensor.detach().double().clone() for name, tensor in named(module) if not tensor.is_meta}


class Program:
    """A model, its average, and everything that the model has ever held."""

    def __init__(self, share_frozen):
        torch.manual_seed(0)
        self.model = base()
        self.average = ModelAverage(self.model, "update", share_frozen=share_frozen)
        self.twin, self.shares, self.ever, self.kept = self.average.module, share_frozen, {}, []
        self.watch()

    def watch(self):
        twins = {id(tensor) for _, tensor in named(self.twin)}
        self.ever |= {id(t): t for _, t in named(self.model) if not (id(t) in twins and t.requires_grad)}
        self.kept += [tensor for _, tensor in named(self.twin)]  # so that no new one gets the id of an old one

    def operate(self, surgery, n):
        a, b = self.model[n], self.model[n + 1]
        with torch.no_grad():
            exec(surgery, {**globals(), "model": self.model, "twin": self.twin, "a": a, "b": b, "n": n})

    def use(self, how):
        """Whether it was accepted. If not, nothing has changed; the model never has."""
        self.watch()
        seen, own = [*self.ever.values()], [tensor for _, tensor in named(self.twin)]
        before, twin_before = marks(seen), marks(own)
        averages, online, refusal = doubles(self.twin), doubles(self.model), None
        try:
            if how == "load":
                self.average.load_state_dict(self.average.state_dict())
            else:
                self.average.update(0.5)
        except RuntimeError as error:
            refusal = str(error)
        assert marks(seen) == before
        if refusal is not None:
            assert "should keep the structure" in refusal
            assert marks(own) == twin_before
        elif how == "update":
            self.check(averages, online)
        return refusal is None

    def check(self, before, online):
        model = dict(named(self.model))
        memory = {tensor.untyped_storage().data_ptr() for tensor in model.values()}
        for name, tensor in named(self.twin):
            if tensor is model[name]:
                assert self.shares
                assert not tensor.requires_grad
                continue
            assert tensor.untyped_storage().data_ptr() not in memory
            due = (before[name] + online[name]) / 2 if tensor.is_floating_point() else online[name]
            torch.testing.assert_close(tensor.detach().double(), due, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("share_frozen", [False, True])
@pytest.mark.parametrize("surgery", [*FOLLOWED, *OTHERS])
def test_each_surgery_is_followed_or_refused(surgery, share_frozen):
    for n, first_use in enumerate(["update", "load"]):
        program = Program(share_frozen)
        assert program.use("update")
        program.operate(surgery, n)
        accepted = program.use(first_use)
        assert accepted or surgery not in FOLLOWED
        assert accepted or not program.use(first_use)  # it is refused each time
        program.use("update")
