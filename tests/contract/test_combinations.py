"""One contract for the combinations of buffers, momentum, types and wrappers: every two choices meet in one of them."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ignite_ema import EMAHandler, schedules
from tests.helpers.bits import assert_same_bits, bits, copied, storages, tensors, wide
from tests.helpers.models import compiled

UPDATES = 10

# Which buffer is treated how: running_mean and cache (not persistent) are of the model's type, mask bool, steps int64.
BUFFERS = {
    "copy": {"running_mean": "copy", "cache": "copy", "mask": "copy", "steps": "copy"},
    "update": {"running_mean": "average", "cache": "average", "mask": "copy", "steps": "copy"},
    "statistics": {"running_mean": "average", "cache": "copy", "mask": "copy", "steps": "copy"},
    "ema_train": {"running_mean": "keep", "cache": "keep", "mask": "keep", "steps": "keep"},
    "mapping": {"running_mean": "average", "cache": "copy", "mask": "keep", "steps": "copy"},
}
MAPPING = {"*.mask": "keep", "*.running_*": "update", "body.mask": "copy"}

MOMENTA = {"constant": 0.25, "warm-up": schedules.LinearWarmup(0.05, 0.9, 6)}
DUE = {"constant": [0.25] * UPDATES, "warm-up": [0.9, 0.73, 0.56, 0.39, 0.22] + [0.05] * 5}

# The type of the model, what is passed as dtype=, the type that holds the average.
PRECISIONS = {
    "float32": (torch.float32, None, torch.float32),
    "float64": (torch.float64, None, torch.float64),
    "bfloat16 in float32": (torch.bfloat16, torch.float32, torch.float32),
    "complex64": (torch.complex64, None, torch.complex64),
}
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12, torch.complex64: 1e-6}


def compiled_inside(model):
    model.body = compiled(model.body)
    return model


WRAPPERS = {
    "plain": lambda model: model,
    "DataParallel": DataParallel,
    "compiled": compiled,
    "DDP": DistributedDataParallel,
    "DDP in compiled": lambda model: compiled(DistributedDataParallel(model)),
    "compiled submodule": compiled_inside,
}


class Body(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(values((4, 3), dtype))
        self.register_buffer("running_mean", values((3,), dtype))
        self.register_buffer("cache", values((2, 2), dtype), persistent=False)
        self.register_buffer("mask", values((5,), torch.bool))
        self.register_buffer("steps", values((), torch.int64))


class Typed(nn.Module):
    """A body, a head whose weight is the body's, and a frozen scale."""

    def __init__(self, dtype):
        super().__init__()
        self.body = Body(dtype)
        self.head = nn.Module()
        self.head.weight = self.body.weight
        self.scale = nn.Parameter(values((), dtype), requires_grad=False)

    def forward(self, x):
        return x @ self.body.weight @ self.head.weight.T * self.scale


def values(shape, dtype):
    """Random values in [1, 2), away from 0, so that relative errors mean something."""
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    if dtype is torch.int64:
        return torch.randint(1_000, shape)
    if dtype.is_complex:
        return torch.complex(1 + torch.rand(shape), 1 + torch.rand(shape)).to(dtype)
    return (1 + torch.rand(shape, dtype=torch.float64)).to(dtype)


def relative_error(tensor, reference):
    return ((wide(tensor) - reference).abs() / reference.abs()).max().item()


def plain_loop(history, momenta):
    """The average of snapshots, the first of which is the initial one, in float64."""
    average = {name: wide(tensor) for name, tensor in history[0].items()}
    for momentum, model in zip(momenta, history[1:], strict=True):
        average = {name: (1 - momentum) * old + momentum * wide(model[name]) for name, old in average.items()}
    return average


def pairwise(*dimensions):
    """Combinations of one choice of each dimension, in which every two choices of different dimensions meet."""

    def pairs(row):
        return set(combinations(enumerate(row), 2))

    rows = list(product(*dimensions))
    missing, chosen = set().union(*map(pairs, rows)), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(missing & pairs(row))))
        missing -= pairs(chosen[-1])
    return chosen


@pytest.fixture(scope="module", params=pairwise(BUFFERS, MOMENTA, PRECISIONS, WRAPPERS), ids=", ".join)
def options(request):
    names = "buffers", "momentum", "precision", "wrapper"
    options = SimpleNamespace(**dict(zip(names, request.param, strict=True)))
    if "DDP" in options.wrapper and options.precision == "complex64" and torch.__version__ < "2.7":
        pytest.skip("gloo of torch 2.6 sends no complex numbers")
    if "DDP" in options.wrapper:
        request.getfixturevalue("process_group")
    return options


@pytest.fixture(scope="module")
def make(options):
    """Makes a model, its handler and a trainer whose every step gives all tensors of the model new values."""
    dtype, held_in, _ = PRECISIONS[options.precision]

    def made(seed):
        torch.manual_seed(seed)
        plain = Typed(dtype)
        model = WRAPPERS[options.wrapper](plain)
        policy = MAPPING if options.buffers == "mapping" else options.buffers
        handler = EMAHandler(model, MOMENTA[options.momentum], handle_buffers=policy, dtype=held_in)

        def step(engine, batch):
            for tensor in tensors(plain).values():
                tensor.copy_(values(tensor.shape, tensor.dtype))

        return SimpleNamespace(plain=plain, model=model, handler=handler, trainer=Engine(step))

    return made


@pytest.fixture(scope="module")
def trained(make):
    """What ``make`` made, after ten updates; ``history`` has the model at first and at each of them."""
    case = make(0)
    case.history = [copied(tensors(case.plain))]
    case.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: case.history.append(copied(tensors(case.plain))))
    case.handler.attach(case.trainer)
    case.trainer.run(range(UPDATES))
    return case


def test_ten_updates_equal_a_plain_loop(trained, options):
    due = plain_loop(trained.history, DUE[options.momentum])
    averaged = tensors(trained.handler.ema_model)
    held_in = PRECISIONS[options.precision][2]
    treatments = {f"body.{name}": treatment for name, treatment in BUFFERS[options.buffers].items()}
    assert trained.handler.num_updates == UPDATES
    for name, tensor in averaged.items():
        treatment = treatments.get(name, "average")
        if treatment == "average":
            assert tensor.dtype is held_in
            assert relative_error(tensor, due[name]) < TOLERANCES[held_in]
        else:
            source = trained.history[0 if treatment == "keep" else -1][name]
            assert bits(tensor) == bits(source.to(tensor.dtype))


def test_the_twin_is_a_plain_model_with_memory_of_its_own(trained, options):
    twin = trained.handler.ema_model
    assert isinstance(twin, DataParallel) == (options.wrapper == "DataParallel")  # as Ignite has it
    plain = twin.module if options.wrapper == "DataParallel" else twin
    dtype, _, held_in = PRECISIONS[options.precision]
    assert list(plain.state_dict()) == list(Typed(dtype).state_dict())
    assert list(tensors(plain)) == list(tensors(trained.plain))
    assert all(tensor.dtype in (held_in, torch.bool, torch.int64) for tensor in tensors(plain).values())
    assert plain.head.weight is plain.body.weight
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert {module.training for module in plain.modules()} == {options.buffers == "ema_train"}
    ours, theirs = list(storages(plain).values()), set(storages(trained.plain).values())
    assert len(set(ours)) == len(ours)
    assert theirs.isdisjoint(ours)


def test_a_checkpoint_of_ignite_brings_it_back_bit_for_bit(trained, make, tmp_path):
    saver = DiskSaver(str(tmp_path), require_empty=False)
    checkpoint = Checkpoint({"trainer": trained.trainer, "ema_handler": trained.handler}, saver)
    checkpoint(trained.trainer)
    fresh = make(1)
    fresh.handler.attach(fresh.trainer)
    to_load = {"trainer": fresh.trainer, "ema_handler": fresh.handler}
    Checkpoint.load_objects(to_load, tmp_path / checkpoint.last_checkpoint)
    saved = trained.handler.state_dict()
    assert_same_bits(fresh.handler.state_dict(), saved)
    assert ("body.cache" in saved["averaged_tensors"]) == (fresh.handler.handle_buffers == "update")  # not persistent
    assert fresh.trainer.state.iteration == fresh.handler.num_updates == UPDATES
