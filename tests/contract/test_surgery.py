"""Random surgery on a model and its twin between updates: averaged by name, or refused with nothing changed.

The oracle knows nothing of the library. It computes in float64, by name, and looks after every tensor that the model
has ever had: no update may write to one of them.
"""
# ruff: noqa: F401, the surgery uses these names

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from ignite_ema import ModelAverage
from tests.helpers.bits import bits
from tests.helpers.models import compiled, frozen


class Block(nn.Module):
    """Trained and frozen weights, and buffers."""

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
    model[1].inner.bias.data[0] = -torch.inf
    return model


# Surgery: a statement about the model, its twin, two of the first four blocks (a, b), and a number to choose by (n).

FOLLOWED = """
train(model)
a.inner.weight.data = torch.randn(2, 2)
restore_storage(b)
a.mean, a.count = torch.randn(2), a.count + 1
a.mean = torch.tensor(3.0).expand(2)
model[5] = compiled(nn.ReLU())
""".strip().splitlines()

OTHERS = """
model[n % 4], model[(n + 2) % 4] = model[(n + 2) % 4], model[n % 4]
model[n % 3], model[n % 3 + 1] = model[n % 3 + 1], model[n % 3]
a.inner, b.inner = b.inner, a.inner
a.inner.weight, b.inner.weight = b.inner.weight, a.inner.weight
model[n % 4] = Block(n % 2)
a.inner = nn.Linear(2, 2).requires_grad_(bool(n % 2))
a.inner.weight = nn.Parameter(torch.randn(2, 2), bool(n % 2))
a.inner.bias = nn.Parameter(torch.randn(2), a.inner.bias is not None and a.inner.bias.requires_grad)
a.inner.bias = b.inner.bias
a.inner.weight = nn.Parameter(b.inner.weight.detach(), a.inner.weight.requires_grad)
del a.inner.bias
a.inner.bias = None
a.inner._parameters["shift"] = a.inner._parameters.pop("bias")
a.requires_grad_(bool(n % 2) and bool(a.inner.bias.isfinite().all()))  # what trains is not exact if infinite
model.load_state_dict({k: torch.randn(v.shape).to(v.dtype) for k, v in named(model)}, False, True)
twin.load_state_dict(model.state_dict(), assign=True)
model.load_state_dict(twin.state_dict(), assign=True)
a.inner.weight.data = b.inner.weight.data
a.inner.bias.data = a.inner.bias.data[:1]
a.double()
b.bfloat16()
b.to("meta")
b.inner.weight.untyped_storage().resize_(0)
b.mean.untyped_storage().resize_(4)
b.inner.weight.untyped_storage().resize_(0), b.inner.weight.untyped_storage().resize_(4)
a.cache = torch.randn(4)
a.mean = b.inner.bias.detach()
del a.cache
parametrizations.weight_norm(a.inner)
prune.l1_unstructured(a.inner, "weight", 1)
twin[n % 4].inner.bias.data = torch.randn(2)
twin[n % 4].mean = twin[n % 4].mean.double()
twin[0].inner.bias = frozen(model[n % 4 & 2].inner.bias.detach())  # of a block without infinities
twin[0].mean.untyped_storage().resize_(0)
twin[n % 4].mean = made_in_inference_mode()
""".strip().splitlines()


def train(model):
    for tensor in model.parameters():
        if tensor.requires_grad and has_values(tensor):
            tensor.add_(0.1)


def restore_storage(block):
    for tensor in block.parameters():
        if not tensor.is_meta:
            size = tensor.untyped_storage().nbytes()
            tensor.untyped_storage().resize_(0)
            tensor.untyped_storage().resize_(size)
            tensor.fill_(1.0)


def made_in_inference_mode():
    with torch.inference_mode():
        return torch.randn(2)


OPTIONS = st.fixed_dictionaries(
    {
        "handle_buffers": st.sampled_from(["copy", "update", "ema_train", {"*cache": "keep", "*": "update"}]),
        "dtype": st.sampled_from([None, torch.float64]),
        "share_frozen": st.booleans(),
        "skip_nonfinite": st.booleans(),
    }
)
STEPS = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(FOLLOWED), st.sampled_from(OTHERS)),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=6,
)
USES = ["update", "update", "update", "reset", "state", "load", "swap"]


# The oracle.


def has_values(tensor):
    if tensor.is_meta:
        return False
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + reach) * tensor.element_size()


def named(module):
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def marks(tensors):
    return [bits(tensor) if has_values(tensor) else None for tensor in tensors]


def doubles(module):
    return {name: tensor.detach().double().clone() for name, tensor in named(module) if has_values(tensor)}


def treatment(average, name, tensor):
    """What an update does with a tensor of the twin."""
    if isinstance(tensor, nn.Parameter):
        return "average"
    modes = average.handle_buffers
    if isinstance(modes, dict):
        return "keep" if name.endswith("cache") else "average" if tensor.is_floating_point() else "copy"
    if modes == "ema_train":
        return "keep"
    return "average" if modes == "update" and tensor.is_floating_point() else "copy"


def due_after(average, momentum, before, online):
    due, model = {}, dict(named(average.model))
    for name, tensor in named(average.module):
        if tensor is model[name]:
            continue  # which is frozen, and shared
        how, old, new = treatment(average, name, tensor), before[name], online.get(name)
        if how == "keep":
            due[name] = old
        elif how == "copy" or momentum == 1:
            due[name] = new
        else:
            due[name] = (1 - momentum) * old + momentum * new if momentum else old
    return due


def own_doubles(twin, model):
    """Without the frozen parameters that are the model's."""
    shared = {id(tensor) for tensor in model.parameters()}
    return {name: double for name, double in doubles(twin).items() if id(dict(named(twin))[name]) not in shared}


def assert_close(got, due):
    assert got.keys() >= due.keys()
    for name, value in due.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


class Program:
    """A model, its average, and everything that the model has ever held."""

    def __init__(self, options, seed):
        torch.manual_seed(seed)
        self.model = base()
        self.average = ModelAverage(self.model, **options)
        self.twin = self.average.module
        self.shares = options["share_frozen"]
        self.ever, self.kept = {}, []
        self.watch()

    def watch(self):
        theirs = {id(t) for _, t in named(self.twin)}
        ours = {id(t): t for _, t in named(self.model) if not (id(t) in theirs and t.requires_grad)}
        self.ever.update(ours)
        self.kept += [tensor for _, tensor in named(self.twin)]  # so that no other comes to lie where one was

    def use(self, how, momentum):
        """Whether it was accepted; nothing has changed where it was not, and the model never has."""
        self.watch()
        own = [tensor for _, tensor in named(self.twin)]
        seen = [*self.ever.values()]
        before, twin_before, averages = marks(seen), marks(own), doubles(self.twin)
        online = doubles(self.model)
        try:
            accepted = self.do(how, momentum)
        except RuntimeError as error:
            accepted, message = None, str(error)
        assert marks(seen) == before
        if accepted is None:
            assert "should keep the structure" in message
            assert marks(own) == twin_before
        else:
            self.check(how, momentum, averages, online, accepted)
        return accepted is not None

    def do(self, how, momentum):
        if how == "update":
            return self.average.update(momentum)
        if how == "reset":
            self.average.reset()
        elif how == "state":
            self.average.state_dict()
        elif how == "load":
            self.average.load_state_dict(self.average.state_dict())
        else:
            with self.average.swapped():
                pass
        return True

    def check(self, how, momentum, averages, online, accepted):
        if how == "update" and accepted:
            assert_close(doubles(self.twin), due_after(self.average, momentum, averages, online))
        elif how == "reset":
            assert_close(online, doubles(self.twin))
        elif has_all_values(self.twin):
            assert_close(averages, own_doubles(self.twin, self.model))
        if how in ("update", "reset") and accepted:
            self.check_memory()

    def check_memory(self):
        ours = {tensor.untyped_storage().data_ptr() for _, tensor in named(self.model)} - {0}
        for name, tensor in named(self.twin):
            online = dict(named(self.model))[name]
            if tensor is online:
                assert self.shares
                assert not tensor.requires_grad
            else:
                assert tensor.untyped_storage().data_ptr() not in ours


def has_all_values(module):
    return all(has_values(tensor) for _, tensor in named(module))


def run(options, steps, uses, momenta, seed):
    program = Program(options, seed)
    assert program.use("update", 0.5)
    for number, ((surgery, first, second, n), how, momentum) in enumerate(zip(steps, uses, momenta, strict=False)):
        if not (has_all_values(program.model) and has_all_values(program.twin)):
            return  # what has lost its memory cannot be operated on: torch would crash
        a, b = program.model[first], program.model[second]
        try:
            with torch.no_grad():
                exec(surgery, {**globals(), "model": program.model, "twin": program.twin, "a": a, "b": b, "n": n})
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError):
            if number == 0:
                raise
            return  # what an earlier one has left cannot be operated on
        accepted = program.use(how, momentum)
        if not accepted:
            assert not {one for one, *_ in steps[: number + 1]} <= {*FOLLOWED}
            assert how != "update" or not program.use("update", momentum)  # it is refused each time
            return


PROGRAMS = {
    "options": OPTIONS,
    "steps": STEPS,
    "uses": st.lists(st.sampled_from(USES), min_size=6, max_size=6),
    "momenta": st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=6, max_size=6),
    "seed": st.integers(0, 3),
}
QUIET = pytest.mark.filterwarnings("ignore:.* holds a NaN or an infinity", "ignore:A momentum of .* is too small")


@QUIET
@given(**PROGRAMS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_surgery_between_updates_is_followed_or_refused(options, steps, uses, momenta, seed):
    run(options, steps, uses, momenta, seed)


@QUIET
@pytest.mark.parametrize("share_frozen", [False, True])
@pytest.mark.parametrize("surgery", [*FOLLOWED, *OTHERS])
def test_each_surgery_is_followed_or_refused(surgery, share_frozen):
    options = {"handle_buffers": "update", "share_frozen": share_frozen}
    for n, uses in enumerate([["update", "update"], ["load", "update"]]):
        run(options, [(surgery, n, n + 1, n)] * 2, uses, [0.5] * 2, seed=0)


def test_loading_into_a_twin_that_was_assigned_the_weights_leaves_the_model_alone():
    model = nn.Linear(2, 2)
    average = ModelAverage(model)
    average.module.load_state_dict(model.state_dict(), assign=True)
    before = marks(model.parameters())
    average.load_averaged({path: tensor + 1 for path, tensor in average.averaged_tensors().items()})
    assert marks(model.parameters()) == before
    assert marks(average.module.parameters()) == marks([tensor + 1 for tensor in model.parameters()])
