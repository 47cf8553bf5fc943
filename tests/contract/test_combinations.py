"""One contract for every combination of buffers, momentum, types and wrappers; then what is special, one by one."""

import io
import warnings
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ignite_ema import EMAHandler, ModelAverage, schedules
from tests.helpers.bits import bits, contents, storages, tensors
from tests.helpers.models import compiled, frozen, module

UPDATES = 10

# Which buffer is treated how: running_mean and cache (not persistent) are of the model's type, mask bool, steps int64.
BUFFERS = {
    "copy": {"running_mean": "copy", "cache": "copy", "mask": "copy", "steps": "copy"},
    "update": {"running_mean": "average", "cache": "average", "mask": "copy", "steps": "copy"},
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
    "float16 in float32": (torch.float16, torch.float32, torch.float32),
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
    "compiled in DDP": lambda model: DistributedDataParallel(compiled(model)),
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


def tensors_themselves(module):
    return [*module.parameters(), *module.buffers()]


def snapshot(module):
    return {name: tensor.clone() for name, tensor in tensors(module).items()}


def wide(tensor):
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def relative_error(tensor, reference):
    return ((wide(tensor) - reference).abs() / reference.abs()).max().item()


def plain_loop(history, momenta):
    """The average of snapshots, the first of which is the initial one, in float64."""
    average = {name: wide(tensor) for name, tensor in history[0].items()}
    for momentum, model in zip(momenta, history[1:], strict=True):
        average = {name: (1 - momentum) * old + momentum * wide(model[name]) for name, old in average.items()}
    return average


@pytest.fixture(scope="module", params=BUFFERS)
def handle_buffers(request):
    return request.param


@pytest.fixture(scope="module", params=MOMENTA)
def momentum(request):
    return request.param


@pytest.fixture(scope="module", params=PRECISIONS)
def precision(request):
    return request.param


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapper(request):
    if "DDP" in request.param:
        request.getfixturevalue("process_group")
    return request.param


@pytest.fixture(scope="module")
def make(handle_buffers, momentum, precision, wrapper):
    """Makes a model, its handler and a trainer whose every step gives all tensors of the model new values."""
    dtype, held_in, _ = PRECISIONS[precision]

    def made(seed):
        torch.manual_seed(seed)
        plain = Typed(dtype)
        model = WRAPPERS[wrapper](plain)
        before = contents(plain)
        rule = MAPPING if handle_buffers == "mapping" else handle_buffers
        handler = EMAHandler(model, MOMENTA[momentum], handle_buffers=rule, dtype=held_in)

        def step(engine, batch):
            for tensor in tensors(plain).values():
                tensor.copy_(values(tensor.shape, tensor.dtype))

        return SimpleNamespace(plain=plain, model=model, before=before, handler=handler, trainer=Engine(step))

    return made


@pytest.fixture(scope="module")
def trained(make):
    """What ``make`` made, after ten updates; ``history`` has the model at first and at each of them."""
    case = make(0)
    case.history = [snapshot(case.plain)]
    case.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: case.history.append(snapshot(case.plain)))
    case.handler.attach(case.trainer)
    case.trainer.run(range(UPDATES))
    return case


def test_ten_updates_equal_a_plain_loop(trained, handle_buffers, momentum, precision):
    due = plain_loop(trained.history, DUE[momentum])
    averaged = tensors(trained.handler.ema_model)
    held_in = PRECISIONS[precision][2]
    rules = {f"body.{name}": rule for name, rule in BUFFERS[handle_buffers].items()}
    assert trained.handler.num_updates == UPDATES
    for name, tensor in averaged.items():
        rule = rules.get(name, "average")
        if rule == "average":
            assert tensor.dtype is held_in
            assert relative_error(tensor, due[name]) < TOLERANCES[held_in]
        else:
            source = trained.history[0 if rule == "keep" else -1][name]
            assert bits(tensor) == bits(source.to(tensor.dtype))


def test_the_twin_is_a_plain_model_with_memory_of_its_own(trained, handle_buffers, wrapper, precision):
    twin = trained.handler.ema_model
    assert isinstance(twin, DataParallel) == (wrapper == "DataParallel")  # as Ignite has it
    plain = twin.module if wrapper == "DataParallel" else twin
    dtype, _, held_in = PRECISIONS[precision]
    assert list(plain.state_dict()) == list(Typed(dtype).state_dict())
    assert list(tensors(plain)) == list(tensors(trained.plain))
    assert all(tensor.dtype in (held_in, torch.bool, torch.int64) for tensor in tensors(plain).values())
    assert plain.head.weight is plain.body.weight
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert {module.training for module in plain.modules()} == {handle_buffers == "ema_train"}
    ours, theirs = list(storages(plain).values()), set(storages(trained.plain).values())
    assert len(set(ours)) == len(ours)
    assert theirs.isdisjoint(ours)


def test_the_online_model_is_left_alone(make):
    case = make(0)
    assert contents(case.plain) == case.before
    needed = [parameter.requires_grad for parameter in case.plain.parameters()]
    identities, before, after = list(map(id, tensors_themselves(case.plain))), [], []
    case.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: before.append(contents(case.plain)))
    case.handler.attach(case.trainer)
    case.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: after.append(contents(case.plain)))
    case.trainer.run(range(UPDATES))
    assert after == before
    assert list(map(id, tensors_themselves(case.plain))) == identities
    assert [parameter.requires_grad for parameter in case.plain.parameters()] == needed
    assert all(module.training for module in case.plain.modules())


def test_the_state_goes_through_a_file_bit_for_bit(trained, make):
    file = io.BytesIO()
    torch.save(trained.handler.state_dict(), file)
    file.seek(0)
    fresh = make(1).handler
    assert contents(fresh.ema_model) != contents(trained.handler.ema_model)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(fresh, trained.handler)


def test_a_checkpoint_of_ignite_brings_it_back_bit_for_bit(trained, make, tmp_path):
    saver = DiskSaver(str(tmp_path), require_empty=False)
    checkpoint = Checkpoint({"trainer": trained.trainer, "ema_handler": trained.handler}, saver)
    checkpoint(trained.trainer)
    fresh = make(1)
    fresh.handler.attach(fresh.trainer)
    to_load = {"trainer": fresh.trainer, "ema_handler": fresh.handler}
    Checkpoint.load_objects(to_load, tmp_path / checkpoint.last_checkpoint)
    assert_same_state(fresh.handler, trained.handler)
    assert fresh.trainer.state.iteration == UPDATES


def assert_same_state(handler, other):
    assert contents(handler.ema_model) == contents(other.ema_model)
    assert handler.num_updates == other.num_updates == UPDATES
    assert handler.state_dict()["current_momentum"] == other.state_dict()["current_momentum"]


# From here on: what is special, one by one, on the engine-free core.


ROLES = pytest.mark.parametrize("role", [frozen, torch.Tensor.clone], ids=["parameter", "buffer"])
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("wrapper_name", WRAPPERS)
def test_training_and_evaluating_through_a_wrapper(wrapper_name, process_group):
    torch.manual_seed(0)
    plain = Typed(torch.float32)
    model = WRAPPERS[wrapper_name](plain)
    handler = EMAHandler(model, 0.25)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=1e-3)
    history = [snapshot(plain)]

    def step(engine, batch):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        history.append(snapshot(plain))

    trainer = Engine(step)
    handler.attach(trainer)
    trainer.run(torch.rand(UPDATES, 2, 4))
    due = plain_loop(history, DUE["constant"])
    averaged = tensors(handler.ema_model)
    assert bits(history[0]["body.weight"]) != bits(history[-1]["body.weight"])
    assert relative_error(averaged["body.weight"], due["body.weight"]) < 1e-6
    weight = averaged["body.weight"]
    batch = torch.rand(2, 4).to(weight.device)
    assert torch.equal(handler.ema_model(batch), batch @ weight @ weight.T * averaged["scale"])


# Types.


@ROLES
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_and_booleans_are_copied(dtype, role):
    model = module(tensor=role(torch.tensor([0, 1, 1]).to(dtype)))
    average = ModelAverage(model, "update", dtype=torch.float64)
    model.tensor.copy_(torch.tensor([1, 0, 1]))
    average.update(0.25)
    assert bits(average.module.tensor) == bits(torch.tensor([1, 0, 1]).to(dtype))


@ROLES
@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_eight_bit_floats_are_averaged_through_float32(dtype, role):
    torch.manual_seed(0)
    model = module(tensor=role((100 * torch.randn(50)).to(dtype)))
    average = ModelAverage(model, "update")
    due = model.tensor.detach().clone()
    for _ in range(3):
        model.tensor.copy_(100 * torch.randn(50))
        average.update(0.3)
        due = torch.lerp(due.float(), model.tensor.detach().float(), 0.3).to(dtype)
    assert bits(average.module.tensor) == bits(due)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_eight_bit_floats_can_be_held_in_float32(dtype):
    model = module(weight=frozen(torch.tensor([1.0]).to(dtype)))
    average = ModelAverage(model, dtype=torch.float32)
    model.weight.fill_(2.0)
    average.update(0.125)
    assert bits(average.module.weight) == bits(torch.tensor([1.125]))


@ROLES
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_tensors_are_averaged(dtype, role):
    model = module(tensor=role(torch.tensor([1 + 2j], dtype=dtype)))
    average = ModelAverage(model, "update")
    model.tensor.fill_(3 + 6j)
    average.update(0.25)
    assert bits(average.module.tensor) == bits(torch.tensor([1.5 + 3j], dtype=dtype))


def test_conjugate_views_are_averaged_by_value():
    model = module(view=torch.tensor([1 + 2j]).conj())
    average = ModelAverage(model, "update")
    model.view = torch.tensor([3 + 6j]).conj()
    average.update(0.25)
    assert average.module.view.tolist() == [1.5 - 3j]


@pytest.mark.parametrize(
    ("dtype", "held_in"),
    [(torch.bfloat16, torch.complex64), (torch.float32, torch.complex64), (torch.float64, torch.complex128)],
    ids=str,
)
def test_complex_weights_are_held_in_the_complex_counterpart_of_dtype(dtype, held_in):
    model = module(weight=nn.Parameter(torch.tensor([1 + 2j])))
    assert ModelAverage(model, dtype=dtype).module.weight.dtype is held_in


@pytest.mark.filterwarnings("ignore:A momentum of .* is too small:UserWarning")
@pytest.mark.parametrize("momentum", [1e-5, 0.0002, 0.3, 0.7, 1])
@pytest.mark.parametrize("dtype", FLOATS + EIGHT_BITS, ids=str)
def test_constant_weights_stay_bit_for_bit_constant(dtype, momentum):
    torch.manual_seed(0)
    weight = torch.randn(20, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    average = ModelAverage(module(weight=frozen(weight), buffer=weight.clone()), "update")
    for _ in range(1_000):
        average.update(momentum)
    assert bits(average.module.weight) == bits(average.module.buffer) == bits(weight)


@pytest.mark.parametrize(
    ("dtype", "momenta", "warned"),
    [
        (torch.float32, [1e-8], True),
        (torch.float32, [0.1, 1e-8], False),  # the end of a schedule that goes to 0
        (torch.float32, [0.0], False),
        (torch.bfloat16, [0.1, 1e-3], True),  # the end of a warm-up
    ],
    ids=["float32", "float32, at the end", "not at all", "bfloat16, at the end"],
)
def test_a_momentum_that_moves_nothing_is_warned_about(dtype, momenta, warned):
    average = ModelAverage(module(weight=torch.ones(1, dtype=dtype)), "update")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for momentum in momenta:
            average.update(momentum)
    assert ["too small for the type" in str(one.message) for one in seen] == [True] * warned


@pytest.mark.parametrize("momentum", [0.5, 0.1, 0.01, 0.001])
def test_a_random_walk_of_10_000_steps_is_followed(momentum):
    torch.manual_seed(0)
    weight = torch.randn(100)
    average = ModelAverage(module(weight=frozen(weight)))
    due = weight.double()
    for step in 0.1 * torch.randn(10_000, 100):
        weight += step
        average.update(momentum)
        due = (1 - momentum) * due + momentum * weight.double()
    error = (average.module.weight.double() - due).norm() / due.norm()
    assert error < 1e-6


# Values.


@pytest.mark.parametrize("momentum", [0.3, 0.9, 1])
@pytest.mark.parametrize("dtype", FLOATS[:4] + EIGHT_BITS[1:], ids=str)
def test_masks_of_minus_infinity_stay_bit_for_bit(dtype, momentum):
    mask = torch.full((4, 4), -torch.inf).triu(1).to(dtype)
    average = ModelAverage(module(mask=mask), "update")
    for _ in range(3):
        average.update(momentum)
    assert bits(average.module.mask) == bits(mask)


@pytest.mark.parametrize("updates_before", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, 0.9])
def test_an_entry_that_becomes_infinite_is_infinite_in_the_average(momentum, updates_before):
    model = module(mask=torch.zeros(2))
    average = ModelAverage(model, "update")
    for _ in range(updates_before):
        average.update(momentum)
    model.mask = torch.tensor([0.0, -torch.inf])
    for _ in range(3):
        average.update(momentum)
    assert average.module.mask.tolist() == [0.0, -torch.inf]


def test_a_momentum_of_1_copies_and_heals():
    model = module(weight=frozen(torch.ones(2)), mask=torch.tensor([0.0, -torch.inf]))
    average = ModelAverage(model, "update")
    average.module.weight.fill_(torch.nan)
    average.module.mask.fill_(torch.nan)
    average.update(1)
    assert contents(average.module) == contents(model)


def test_a_momentum_of_0_leaves_even_a_nan_out():
    model = module(weight=frozen(torch.ones(2)))
    average = ModelAverage(model)
    model.weight.fill_(torch.nan)
    average.update(0)
    assert average.module.weight.tolist() == [1.0, 1.0]


# Shapes and memory.


def test_empty_and_0_d_tensors():
    model = module(
        scale=frozen(torch.tensor(1.0)),
        nothing=frozen(torch.zeros(0, 3)),
        empty=torch.zeros(0),
        count=torch.tensor(1),
        none=None,
    )
    average = ModelAverage(model, "update")
    model.scale.fill_(3.0)
    model.count += 1
    average.update(0.5)
    assert average.module.scale.item() == 2.0
    assert average.module.count.item() == 2
    assert average.module.nothing.shape == (0, 3)
    assert average.module.none is None


def test_a_model_without_tensors():
    average = ModelAverage(nn.Identity())
    average.update(0.5)
    average.reset()
    average.load_state_dict(average.state_dict())
    assert average.state_dict() == {}


@pytest.mark.parametrize("mode", ["copy", "update"])
def test_expanded_and_strided_buffers(mode):
    grid = torch.arange(24.0).reshape(4, 6)
    model = module(
        expanded=torch.ones(3, 1).expand(3, 4),
        transposed=grid.T,
        every_other=grid[:, ::2],
        windows=torch.arange(5.0).unfold(0, 3, 1),
        channels_last=torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last),
    )
    average = ModelAverage(model, mode)
    before = snapshot(model)
    for name, tensor in before.items():
        setattr(model, name, (tensor + 2).as_strided(tensor.shape, tensor.stride()))
    average.update(0.5)
    for name, tensor in tensors(average.module).items():
        assert torch.equal(tensor, before[name] + (2 if mode == "copy" else 1))
    assert average.module.channels_last.is_contiguous(memory_format=torch.channels_last)
    assert set(storages(model).values()).isdisjoint(storages(average.module).values())


def overlapping():
    """Two buffers, of which one is a part of the other."""
    table = torch.zeros(4)
    return module(table=table, tail=table[2:])


@pytest.mark.parametrize("twin", [None, overlapping], ids=["copied", "brought"])
@pytest.mark.parametrize(("mode", "due"), [("copy", 4.0), ("update", 1.0)])
def test_overlapping_views_are_averaged_once(mode, due, twin):
    model = overlapping()
    average = ModelAverage(model, mode, ema_model=twin and twin())
    model.table.fill_(4.0)
    average.update(0.25)
    assert average.module.table.tolist() == [due] * 4
    assert average.module.tail.tolist() == [due] * 2


@pytest.mark.parametrize(
    "overlapping_itself",
    [torch.zeros(3, 1).expand(3, 3), torch.zeros(5).unfold(0, 3, 1)],
    ids=["expanded", "windows"],
)
@pytest.mark.parametrize(("mode", "due"), [("copy", 1.0), ("update", 0.25)])
def test_a_twin_that_overlaps_itself_is_given_memory(mode, due, overlapping_itself):
    model = module(table=torch.zeros(3, 3))
    average = ModelAverage(model, mode, ema_model=module(table=overlapping_itself))
    model.table.copy_(torch.arange(9.0).view(3, 3))
    average.update(0.25)
    assert torch.equal(average.module.table, due * model.table)


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


def test_a_shared_submodule_is_averaged_once():
    shared = nn.Linear(1, 1, bias=False)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    nn.init.zeros_(shared.weight)
    average = ModelAverage(model)
    nn.init.ones_(shared.weight)
    average.update(0.25)
    assert average.module[0] is average.module[2]
    assert average.module[0].weight.item() == 0.25
    assert list(average.state_dict()) == ["0.weight"]


def test_loading_never_ties_the_average_to_what_was_loaded():
    model = nn.BatchNorm1d(2)
    average, other = ModelAverage(model), ModelAverage(model)
    other.load_state_dict(average.state_dict())
    assert set(storages(other.module).values()).isdisjoint(storages(average.module).values())


# Rebinding: tensors are read afresh at each update.


def test_weights_assigned_by_load_state_dict_are_followed():
    model, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = ModelAverage(model)
    average.update(0.5)
    nn.init.constant_(other.weight, 4.0)
    model.load_state_dict(other.state_dict(), assign=True)
    average.update(0.25)
    nn.init.constant_(model.weight, 9.0)
    average.update(0.25)
    assert average.module.weight.item() == 3.0


@pytest.mark.parametrize("into_twin", [True, False], ids=["model into twin", "twin into model"])
def test_memory_that_was_assigned_from_one_to_the_other_is_parted_at_the_update(into_twin):
    model = nn.BatchNorm1d(2)
    average = ModelAverage(model, "update")
    average.update(0.5)
    source, target = (model, average.module) if into_twin else (average.module, model)
    target.load_state_dict(source.state_dict(), assign=True)
    before = contents(model)
    average.update(0.5)
    assert set(storages(model).values()).isdisjoint(storages(average.module).values())
    average.module.weight.fill_(7.0)
    assert contents(model) == before


def test_a_buffer_that_is_replaced_in_every_iteration_is_followed():
    model = module(buffer=torch.zeros(3))
    average, due = ModelAverage(model, "update"), torch.zeros(3)
    for n in range(5):
        model.buffer = torch.full((3,), float(n))
        average.update(0.5)
        due = (due + n) / 2
    assert torch.equal(average.module.buffer, due)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("swap", [False, True], ids=["data", "swapped tensors"])
def test_a_model_that_moves_to_another_type_is_followed(dtype, swap):
    model = nn.BatchNorm1d(2)
    average = ModelAverage(model, "update")
    average.update(0.5)
    old = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(old)
    nn.init.constant_(model.weight, 3.0)
    average.update(0.25)
    assert bits(average.module.weight) == bits(torch.full((2,), 1.5))
    assert {tensor.dtype for tensor in tensors(average.module).values()} == {torch.float32, torch.int64}


def test_a_submodule_that_is_replaced_by_its_like_is_followed():
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    average = ModelAverage(model)
    average.update(0.5)
    model[0] = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model[0].weight, 4.0)
    average.update(0.25)
    assert average.module[0].weight.item() == 1.0


def test_a_submodule_that_is_compiled_later_is_followed():
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    average = ModelAverage(model)
    average.update(0.5)
    model[0] = compiled(model[0])
    nn.init.constant_(model[0].weight, 4.0)
    average.update(0.25)
    assert average.module[0].weight.item() == 1.0


# Structures that no longer match.


def two_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model.tied = nn.Linear(2, 2)
    model.tied.weight = model[0].weight
    return model


def view_in_another_shape(model):
    model[0].bias.data = model[0].bias.data.view(1, 2)


def layer_added(model):
    model.extra = nn.Linear(2, 2)


def layer_removed(model):
    delattr(model, "2")


def layer_replaced(model):
    model[2] = nn.Linear(2, 3)


def layer_replaced_by_another_kind(model):
    model[2] = nn.LayerNorm(2, bias=False)


def tie_made(model):
    model[2].weight = model[0].weight


def tie_broken(model):
    model.tied.weight = nn.Parameter(model.tied.weight.detach().clone())


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model[2])


def bias_dropped(model):
    model[0].bias = None


def buffer_registered(model):
    model[0].register_buffer("count", torch.zeros(()))


def buffer_dropped(model):
    del model[1].running_mean


def buffer_reshaped(model):
    model[1].running_mean = torch.zeros(3)


CHANGES = {
    view_in_another_shape: r"'0\.bias' has shape \(1, 2\) in the model and \(2,\) in the twin",
    layer_added: r"'extra' is in the model but not in the twin",
    layer_removed: r"'2' is in the twin but not in the model",
    layer_replaced: r"'2\.weight' has shape \(3, 2\) in the model and \(2, 2\) in the twin",
    layer_replaced_by_another_kind: r"'2\.bias' is in the twin but not in the model",
    tie_made: r"'2\.weight' is tied to '0\.weight' in the model but not in the twin",
    tie_broken: r"'tied\.weight' is tied to '0\.weight' in the twin but not in the model",
    parametrised: r"'2\.(weight|parametrizations)' is in the (twin|model) but not in the (model|twin)",
    bias_dropped: r"'0\.bias' is in the twin but not in the model",
    buffer_registered: r"'0\.count' is in the model but not in the twin",
    buffer_dropped: r"'1\.running_mean' is in the twin but not in the model",
    buffer_reshaped: r"'1\.running_mean' has shape \(3,\) in the model and \(2,\) in the twin",
}


@pytest.mark.parametrize("updates_before", [0, 1])
@pytest.mark.parametrize("mode", ["copy", "update"])
@pytest.mark.parametrize(("change", "message"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_a_changed_structure_raises_each_time_and_leaves_the_average_alone(change, message, mode, updates_before):
    model = two_layers()
    average = ModelAverage(model, mode)
    for _ in range(updates_before):
        average.update(0.5)
    before = contents(average.module)
    for tensor in tensors(model).values():
        tensor.fill_(5)
    change(model)
    for attempt in (lambda: average.update(0.5), lambda: average.update(0.5), average.reset):
        with pytest.raises(RuntimeError, match=rf"keep the structure that it had .*, but {message}; make the change"):
            attempt()
    assert contents(average.module) == before


@pytest.mark.parametrize(("change", "message"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_a_twin_of_another_structure_raises(change, message):
    model, twin = two_layers(), two_layers()
    change(model)
    before = contents(twin)
    with pytest.raises(RuntimeError, match=rf"ema_model should have the structure of the model, but {message}; build"):
        ModelAverage(model, ema_model=twin)
    assert contents(twin) == before


def test_a_twin_is_paired_by_name_and_not_by_position():
    def weights(*names):
        return nn.ModuleDict({name: module(**{name: frozen(torch.zeros(1)) for name in names}) for name in names})

    model, twin = weights("a", "b", "c"), weights("c", "a", "b")
    average = ModelAverage(model, ema_model=twin)
    for value, weight in enumerate(model.parameters()):
        weight.fill_(value)
    average.update(0.5)
    assert {name: tensor / 2 for name, tensor in tensors(model).items()} == tensors(twin)


@pytest.mark.parametrize("mode", ["copy", "ema_train"])
def test_a_twin_of_ones_own_is_filled_and_put_into_its_mode(mode):
    torch.manual_seed(0)
    model, twin = two_layers(), two_layers()
    assert contents(twin) != contents(model)
    average = ModelAverage(model, mode, ema_model=twin)
    assert average.module is twin
    assert contents(twin) == contents(model)
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {part.training for part in twin.modules()} == {mode == "ema_train"}


def test_a_structure_that_is_restored_goes_on():
    model = two_layers()
    average = ModelAverage(model)
    average.update(0.5)
    layer, model[2] = model[2], nn.Linear(2, 3)
    with pytest.raises(RuntimeError, match=r"'2\.weight' has shape"):
        average.update(0.5)
    model[2] = layer
    nn.init.zeros_(average.module[2].bias)
    nn.init.ones_(layer.bias)
    average.update(0.5)
    assert average.module[2].bias.tolist() == [0.5, 0.5]


def test_a_module_that_both_would_own_raises():
    model = two_layers()
    twin = two_layers()
    twin[1] = model[1]
    with pytest.raises(RuntimeError, match="'1' is one and the same module in the model and in the twin"):
        ModelAverage(model, ema_model=twin)
    with pytest.raises(RuntimeError, match="the root is one and the same module"):
        ModelAverage(model, ema_model=model)


# inference_mode.


@pytest.mark.parametrize("updated_inside", [False, True])
@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("model_inside", [False, True])
def test_inference_mode_does_not_matter(model_inside, made_inside, updated_inside):
    with torch.inference_mode(model_inside):
        model = nn.BatchNorm1d(2)
    with torch.inference_mode(made_inside):
        average = ModelAverage(model, "update")
    with torch.inference_mode(model_inside):
        model.weight.detach().fill_(3.0)
        model.running_mean = torch.full((2,), 2.0)
    for inside in (updated_inside, not updated_inside):
        with torch.inference_mode(inside):
            average.update(0.5)
    assert average.module.weight.tolist() == [2.5, 2.5]
    assert average.module.running_mean.tolist() == [1.5, 1.5]
    assert not any(tensor.is_inference() for tensor in tensors_themselves(average.module))


def test_memory_that_is_parted_inside_inference_mode_can_be_updated_outside():
    model = nn.BatchNorm1d(2)
    average = ModelAverage(model)
    average.update(0.5)
    average.module.load_state_dict(model.state_dict(), assign=True)
    with torch.inference_mode():
        average.update(0.5)
    assert not any(tensor.is_inference() for tensor in tensors_themselves(average.module))


def test_a_twin_of_inference_tensors_raises():
    with torch.inference_mode():
        twin = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"'weight' was made inside torch\.inference_mode\(\); build the twin outside"):
        ModelAverage(nn.Linear(1, 1), ema_model=twin)


# Lazy modules with a twin of one's own.


@pytest.mark.parametrize("lazy", ["model", "twin"])
def test_a_lazy_tensor_is_named(lazy):
    made = {"model": nn.Sequential(nn.Linear(1, 1)), "twin": nn.Sequential(nn.Linear(1, 1))}
    made[lazy] = nn.Sequential(nn.LazyLinear(1))
    with pytest.raises((RuntimeError, ValueError), match=r"'0\.weight'.*run it on one batch"):
        ModelAverage(made["model"], ema_model=made["twin"])


class Quantised(torch.Tensor):
    """A type of tensor that can be copied but not interpolated."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        if "lerp" in function.__name__:
            raise NotImplementedError("no lerp for quantised tensors")
        return super().__torch_function__(function, types, arguments, named or {})

    def __deepcopy__(self, memo):
        return nn.Parameter(self.detach().clone().as_subclass(Quantised), self.requires_grad)


def quantised():
    model = module(base=nn.Parameter(torch.ones(2).as_subclass(Quantised)), adapter=nn.Parameter(torch.ones(2)))
    model.base.requires_grad_(False)
    return model


def test_a_type_of_tensor_that_cannot_be_averaged_is_named_and_may_be_shared():
    with pytest.raises(TypeError, match="got 'base', a Quantised, for which lerp fails .no lerp.*share_frozen=True"):
        ModelAverage(quantised())
    model = quantised()
    average = ModelAverage(model, share_frozen=True)
    assert average.update(0.5)
    assert average.module.base is model.base


def test_a_parameter_of_zero_3_is_refused():
    model = nn.Linear(1, 1)
    model.weight.ds_id = 0
    with pytest.raises(RuntimeError, match="'weight' is partitioned by DeepSpeed ZeRO-3; use its stage 1 or 2"):
        ModelAverage(model)


def test_fsdp1_is_refused(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")))
        except Exception as error:  # it may want an accelerator
            pytest.skip(f"FullyShardedDataParallel cannot be made here: {error}")
    with pytest.raises(RuntimeError, match=r"got one with FullyShardedDataParallel \(FSDP1\).*; use fully_shard"):
        ModelAverage(model)
