"""Random surgery on a model and its twin between updates: averaged by name, or refused with nothing changed.

The oracle knows nothing of the library. It computes in float64, by name, and looks after every tensor that the model
has ever had: no update may write to one of them.
"""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from ignite_ema import ModelAverage
from tests.helpers.bits import bits
from tests.helpers.models import frozen


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


# Surgery. Each is given the model, its twin, two of the first four blocks, and a number to choose by.


def train(model, twin, a, b, n):
    for tensor in model.parameters():
        if tensor.requires_grad and has_values(tensor):
            tensor.add_(0.1)


def swap_blocks(model, twin, a, b, n):
    model[n % 4], model[(n + 2) % 4] = model[(n + 2) % 4], model[n % 4]


def swap_neighbours(model, twin, a, b, n):
    model[n % 3], model[n % 3 + 1] = model[n % 3 + 1], model[n % 3]


def swap_inner(model, twin, a, b, n):
    a.inner, b.inner = b.inner, a.inner


def swap_weights(model, twin, a, b, n):
    a.inner.weight, b.inner.weight = b.inner.weight, a.inner.weight


def new_block(model, twin, a, b, n):
    model[n % 4] = Block(n % 2)


def new_inner(model, twin, a, b, n):
    a.inner = nn.Linear(2, 2)
    a.inner.requires_grad_(bool(n % 2))


def new_weight(model, twin, a, b, n):
    a.inner.weight = nn.Parameter(torch.randn(2, 2), requires_grad=bool(n % 2))


def new_bias(model, twin, a, b, n):
    a.inner.bias = nn.Parameter(torch.randn(2), requires_grad=a.inner.bias is not None and a.inner.bias.requires_grad)


def tie_biases(model, twin, a, b, n):
    a.inner.bias = b.inner.bias


def alias_of_another(model, twin, a, b, n):
    a.inner.weight = nn.Parameter(b.inner.weight.detach(), requires_grad=a.inner.weight.requires_grad)


def delete_bias(model, twin, a, b, n):
    del a.inner.bias


def no_bias(model, twin, a, b, n):
    a.inner.bias = None


def rename_bias(model, twin, a, b, n):
    a.inner._parameters["shift"] = a.inner._parameters.pop("bias")


def freeze(model, twin, a, b, n):
    if a.inner.bias.isfinite().all():  # what trains is not exact where it is infinite
        a.requires_grad_(bool(n % 2))


def assign_new(model, twin, a, b, n):
    model.load_state_dict(
        {k: torch.randn_like(v) if v.is_floating_point() else v + 1 for k, v in named(model)}, assign=True
    )


def assign_model_to_twin(model, twin, a, b, n):
    twin.load_state_dict(model.state_dict(), assign=True)


def assign_twin_to_model(model, twin, a, b, n):
    model.load_state_dict(twin.state_dict(), assign=True)


def move_data(model, twin, a, b, n):
    a.inner.weight.data = torch.randn(2, 2)


def share_data(model, twin, a, b, n):
    a.inner.weight.data = b.inner.weight.data


def transpose_data(model, twin, a, b, n):
    a.inner.weight.data = a.inner.weight.data.t()


def cut_data(model, twin, a, b, n):
    a.inner.bias.data = a.inner.bias.data[:1]


def reshape_data(model, twin, a, b, n):
    a.inner.bias.data = a.inner.bias.data.view(1, 2)


def reinterpret_data(model, twin, a, b, n):
    a.inner.bias.data = a.inner.bias.data.view(torch.int32)


def to_double(model, twin, a, b, n):
    a.double()


def to_bfloat16(model, twin, a, b, n):
    b.bfloat16()


def to_meta(model, twin, a, b, n):
    b.to("meta")


def free_storage(model, twin, a, b, n):
    b.inner.weight.untyped_storage().resize_(0)


def shorten_storage(model, twin, a, b, n):
    b.mean.untyped_storage().resize_(4)


def shorten_storage_twice(model, twin, a, b, n):
    for size in (0, 4):
        b.inner.weight.untyped_storage().resize_(size)


def restore_storage(model, twin, a, b, n):
    for tensor in b.parameters():
        if not tensor.is_meta:
            size = tensor.untyped_storage().nbytes()
            tensor.untyped_storage().resize_(0)
            tensor.untyped_storage().resize_(size)
            tensor.fill_(1.0)


def take_dictionary(model, twin, a, b, n):
    other = copy.deepcopy(a.inner)
    for tensor in other.parameters():
        if has_values(tensor):
            tensor.add_(1)
    a.inner.__dict__.update(other.__dict__)


def set_state(model, twin, a, b, n):
    a.__setstate__(copy.deepcopy(a.__dict__))


def copy_tables(model, twin, a, b, n):
    for part in a.modules():
        part._parameters, part._buffers, part._modules = map(dict, (part._parameters, part._buffers, part._modules))


def buffers_anew(model, twin, a, b, n):
    a.mean, a.count = torch.randn(2), a.count + 1


def buffer_of_another_shape(model, twin, a, b, n):
    a.cache = torch.randn(4)


def expanded_buffer(model, twin, a, b, n):
    a.mean = torch.tensor(3.0).expand(2)


def buffer_is_a_weight(model, twin, a, b, n):
    a.mean = b.inner.bias.detach()


def delete_buffer(model, twin, a, b, n):
    del a.cache


def parametrise(model, twin, a, b, n):
    parametrizations.weight_norm(a.inner)


def prune_weight(model, twin, a, b, n):
    prune.l1_unstructured(a.inner, "weight", 1)


def twin_moves(model, twin, a, b, n):
    twin[n % 4].inner.bias.data = torch.randn(2)


def twin_to_double(model, twin, a, b, n):
    twin[n % 4].mean = twin[n % 4].mean.double()


def twin_is_frozen_alias(model, twin, a, b, n):
    if model[n % 4].inner.bias.isfinite().all():
        twin[0].inner.bias = frozen(model[n % 4].inner.bias.detach())


def twin_in_inference_mode(model, twin, a, b, n):
    with torch.inference_mode():
        twin[n % 4].mean = torch.randn(2)


def twin_loses_memory(model, twin, a, b, n):
    twin[0].mean.untyped_storage().resize_(0)


def wrap(model, twin, a, b, n):
    model[5] = torch.compile(nn.ReLU(), backend="eager")


FOLLOWED = [train, move_data, transpose_data, restore_storage, copy_tables, buffers_anew, expanded_buffer, wrap]
OTHERS = [
    *(swap_blocks, swap_neighbours, swap_inner, swap_weights, new_block, new_inner, new_weight, new_bias, tie_biases),
    *(alias_of_another, delete_bias, no_bias, rename_bias, freeze, assign_new, assign_model_to_twin, share_data),
    *(assign_twin_to_model, cut_data, reshape_data, reinterpret_data, to_double, to_bfloat16, to_meta, free_storage),
    *(shorten_storage, shorten_storage_twice, take_dictionary, set_state, buffer_of_another_shape, buffer_is_a_weight),
    *(delete_buffer, parametrise, prune_weight, twin_moves, twin_to_double, twin_is_frozen_alias, twin_loses_memory),
    twin_in_inference_mode,
]
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
        self.ever = {}
        self.watch()

    def watch(self):
        theirs = {id(t) for _, t in named(self.twin)}
        ours = {id(t): t for _, t in named(self.model) if not (id(t) in theirs and t.requires_grad)}
        self.ever.update(ours)

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
    for number, ((surgery, a, b, n), how, momentum) in enumerate(zip(steps, uses, momenta, strict=False)):
        if not (has_all_values(program.model) and has_all_values(program.twin)):
            return  # what has lost its memory cannot be operated on: torch would crash
        blocks = [program.model[i] for i in (a, b)]
        try:
            with torch.no_grad():
                surgery(program.model, program.twin, *blocks, n)
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError):
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
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_surgery_between_updates_is_followed_or_refused(options, steps, uses, momenta, seed):
    run(options, steps, uses, momenta, seed)


@pytest.mark.slow
@QUIET
@given(**PROGRAMS)
@settings(max_examples=2_000, suppress_health_check=[HealthCheck.too_slow])
def test_more_surgery_between_updates_is_followed_or_refused(options, steps, uses, momenta, seed):
    run(options, steps, uses, momenta, seed)


@QUIET
@pytest.mark.parametrize("share_frozen", [False, True])
@pytest.mark.parametrize("surgery", [*FOLLOWED, *OTHERS], ids=lambda surgery: surgery.__name__)
def test_each_surgery_is_followed_or_refused(surgery, share_frozen):
    options = {"handle_buffers": "update", "dtype": None, "share_frozen": share_frozen, "skip_nonfinite": False}
    for n in range(2):
        for uses in (["update", "update"], ["load", "update"]):
            run(options, [(surgery, n % 4, (n + 1) % 4, n)] * len(uses), uses, [0.5] * 2, seed=0)


def test_loading_into_a_twin_that_was_assigned_the_weights_leaves_the_model_alone():
    model = nn.Linear(2, 2)
    average = ModelAverage(model)
    average.module.load_state_dict(model.state_dict(), assign=True)
    before = marks(model.parameters())
    average.load_averaged_tensors({path: tensor + 1 for path, tensor in average.averaged_tensors().items()})
    assert marks(model.parameters()) == before
    assert marks(average.module.parameters()) == marks([tensor + 1 for tensor in model.parameters()])
