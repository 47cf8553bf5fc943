"""swapped() and swap_during(): the averaged weights inside, and the model's own after every way out, bit for bit."""

import contextlib
import copy
import gc
import sys
import weakref

import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ignite_ema import EMAHandler, ModelAverage
from ignite_ema.averaging import kernels, swap
from tests.helpers.bits import bits, contents, places, saved
from tests.helpers.models import Tied, move
from tests.helpers.runs import evaluator_of, scalar_handler

MODES = {
    "copy": "copy",
    "update": "update",
    "ema_train": "ema_train",
    "mapping": {"*kept": "keep", "*": "update"},
}
SPARSE = {**MODES, "update": "copy", "mapping": {"kept": "keep"}}  # sparse buffers cannot be averaged


class Tensors(nn.Module):
    """Some parameters and buffers, and sums of them."""

    def __init__(self, **named):
        super().__init__()
        self.register_buffer("kept", torch.zeros(2))
        for name, tensor in named.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x):
        tensors = [*self.parameters(), *self.buffers()]
        return torch.stack([tensor.detach().to_dense().to(torch.complex128).sum() for tensor in tensors]) * x.sum()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 2, num_layers=2)
        self.register_buffer("kept", torch.zeros(2))

    def forward(self, x):
        return self.lstm(x)[0] + self.kept


def move_all(model):
    move(model)
    if isinstance(model, Tensors) and hasattr(model, "sparse"):
        model.sparse = (torch.rand(3, 3) < 0.7).float().mul(torch.rand(())).to_sparse(layout=model.sparse.layout)


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.rand(shape).to(dtype))


def mixed():
    return Tensors(
        single=parameter(3),
        narrow=parameter(3, dtype=torch.bfloat16),
        imaginary=parameter(2, 2, dtype=torch.complex64),
        number=torch.tensor([1, 2]),
        flag=torch.tensor([True, False]),
        eight=torch.rand(4).to(torch.float8_e4m3fn),
    )


def views_of_one_storage():
    flat = torch.rand(7)
    return Tensors(a=nn.Parameter(flat[:4]), b=nn.Parameter(flat[4:]), c=flat.new_zeros(6)[::2])


MODELS = {
    "mixed types": mixed,
    "tied weights": Tied,
    "LSTM": Recurrent,
    "expanded": lambda: Tensors(weight=parameter(2), expanded=torch.rand(1).expand(3), rows=torch.rand(3).expand(2, 3)),
    "empty and 0-d": lambda: Tensors(empty=parameter(0, 3), scalar=parameter(), none=torch.zeros(0)),
    "not contiguous": lambda: Tensors(turned=nn.Parameter(torch.rand(2, 3).T), every_other=torch.rand(8)[::2]),
    "channels last": lambda: Tensors(weight=nn.Parameter(torch.rand(2, 3, 2, 2).to(memory_format=torch.channels_last))),
    "views of one storage": views_of_one_storage,
    "sparse": lambda: Tensors(weight=parameter(2), sparse=torch.eye(3).to_sparse()),
    "sparse rows": lambda: Tensors(weight=parameter(2), sparse=torch.eye(3).to_sparse_csr()),
    "made in inference_mode": lambda: made_inside_inference_mode(Tied),
}


def made_inside_inference_mode(make):
    with torch.inference_mode():
        return make()


def computed(model, x=None):
    model.eval()
    with torch.no_grad():
        return model(torch.ones(2, 3) if x is None else x)


def averaged(model, *arguments, **options):
    """An average of ``model`` that is neither what it was at first, nor what it is now."""
    average = ModelAverage(model, *arguments, **options)
    move_all(model)
    average.update(0.25)
    move_all(model)
    return average


# What is in the block


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_the_twin_in_the_block_and_itself_again_after_it(kind, mode):
    torch.manual_seed(0)
    model = MODELS[kind]()
    average = averaged(model, (SPARSE if "sparse" in kind else MODES)[mode])
    before, held_in, output, due = contents(model), places(model), computed(model), contents(average.module)
    assert due != before
    for _ in range(2):
        with average.swapped():
            assert contents(model) == due
            assert torch.equal(computed(model), computed(average.module))
            assert [place[:2] for place in places(model)] == [place[:2] for place in held_in]
        assert contents(model) == before
        assert places(model) == held_in
        assert torch.equal(computed(model), output)
        assert contents(average.module) == due


@pytest.mark.parametrize("held_in", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.float8_e5m2], ids=str)
def test_an_average_in_another_type_is_rounded_to_that_of_the_model(dtype, held_in):
    model = Tensors(weight=parameter(5, dtype=dtype), buffer=torch.rand(3).to(dtype))
    average = averaged(model, "update", dtype=held_in)
    twin = average.module
    before, due = contents(model), contents(twin)
    with average.swapped():
        assert bits(model.weight) == bits(twin.weight.to(dtype))
        assert bits(model.buffer) == bits(twin.buffer.to(dtype))
        assert bits(model.kept) == bits(twin.kept.to(torch.float32))
    assert contents(model) == before
    assert contents(twin) == due


def test_tied_weights_stay_tied_in_the_block():
    model = Tied()
    with averaged(model).swapped():
        assert model.first.weight is model.second.weight


def test_a_buffer_that_views_a_parameter_follows_it_in_the_block():
    model = nn.Linear(3, 2, bias=False)
    model.register_buffer("row", model.weight.detach()[0])
    average = averaged(model, "update")
    before, due = contents(model), contents(average.module)
    with average.swapped():
        assert contents(model) == due
    assert contents(model) == before


# Where the block is


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", ["tied weights", "expanded", "made in inference_mode", "sparse"])
def test_gradient_modes_do_not_matter(kind, context):
    model = MODELS[kind]()
    average = averaged(model)
    before, held_in, due = contents(model), places(model), contents(average.module)
    with context(), average.swapped():
        assert contents(model) == due
        model.kept = torch.ones(2)
    assert contents(model) == before
    assert places(model) == held_in
    assert not model.kept.is_inference() or kind == "made in inference_mode"
    assert average.update(0.5)


def test_a_model_goes_on_training_after_a_block_inside_inference_mode():
    model = Tied()
    average = averaged(model)
    with torch.inference_mode(), average.swapped():
        model(torch.ones(2, 3))
    model.train()(torch.rand(2, 3)).sum().backward()
    assert model.first.weight.grad is not None


def test_what_autocast_has_cached_of_the_weights_is_not_used():
    model = Tied().eval()
    average = averaged(model)
    x = torch.rand(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output, due = model(x), average.module(x)
        assert not torch.equal(output, due)
        with average.swapped():
            assert torch.equal(model(x), due)
        assert torch.equal(model(x), output)


def without_broadcast(model):
    """A ``DistributedDataParallel`` that torch can compile; the argument for it has another name in each version."""
    model.broadcast_buffers = model.forward_sync_buffers = False
    return model


WRAPPERS = {
    "DataParallel": DataParallel,
    "DDP": DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DDP in compiled": lambda model: torch.compile(without_broadcast(DistributedDataParallel(model)), backend="eager"),
    "compiled in DDP": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_computes_the_averaged_weights(wrapper, process_group):
    torch._dynamo.reset()
    plain = Tied()
    model = WRAPPERS[wrapper](plain)
    handler = EMAHandler(model, 0.25)
    move(plain)
    x, before, output = torch.rand(2, 3).to(plain.kept.device), contents(plain), computed(model)
    with handler.swapped():
        assert torch.equal(computed(model), computed(handler.ema_model))
        assert not torch.equal(computed(model), output)
        model.train()(x).sum().backward()  # moves the statistics of the batch norm
    assert contents(plain) == before
    assert torch.equal(computed(model), output)


def test_a_compiled_model_is_not_compiled_again():
    torch._dynamo.reset()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    plain = Tied()
    model = torch.compile(plain, backend=backend)
    average = averaged(plain)
    output = computed(model)
    assert len(compilations) == 1
    for _ in range(2):
        with average.swapped():
            assert torch.equal(computed(model), computed(average.module))
        assert torch.equal(computed(model), output)
        average.update(0.5)
    assert len(compilations) == 1


# What is done in the block is undone after it


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.tied = Tied()
        self.lstm = nn.LSTM(3, 2)
        self.register_buffer("expanded", torch.rand(1).expand(2))
        self.register_buffer("cache", torch.rand(2), persistent=False)

    def forward(self, x):
        return self.lstm(self.tied(x))[0] + self.expanded + self.cache


def train(model):
    optimizer = torch.optim.Adam(model.parameters())
    model.train()(torch.rand(4, 3)).square().sum().backward()
    optimizer.step()


def register_anew(model):
    del model.cache
    model.register_buffer("cache", torch.ones(5), persistent=False)
    model.expanded = torch.ones(2)
    model.tied.norm.running_mean = None


def other_state(model):
    return {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}


def point_elsewhere(model):
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = torch.zeros_like(tensor)


def shorten(model):
    model.tied.first.weight.data = model.tied.first.weight.data[:1]


def turn(model):
    model.tied.first.weight.data = model.tied.first.weight.data.T


def read_as_integers(model):
    model.cache.data = model.cache.data.view(torch.int32)


def tie_to_another(model):
    model.tied.second.weight = nn.Parameter(torch.ones(3, 3))


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(other_state(model), strict=False),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(other_state(model), assign=True),
    "training": train,
    "batch norm in train mode": lambda model: model.train()(torch.rand(4, 3)),
    "half": nn.Module.half,
    "double": nn.Module.double,
    "buffers registered anew": register_anew,
    "other memory": point_elsewhere,
    "another shape of the same memory": shorten,
    "another stride of the same memory": turn,
    "another type of the same memory": read_as_integers,
    "ties taken apart": tie_to_another,
    "no gradients needed": lambda model: model.requires_grad_(False),
}


@pytest.fixture
def no_mark_stays():
    """What one test leaves swapped would make others fail, whose objects come to live in the same places."""
    yield
    swap._swapped.clear()


@pytest.mark.filterwarnings("ignore:.* and the change is dropped:UserWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_in_the_block_is_undone(change, no_mark_stays):
    torch.manual_seed(0)
    model = Everything()
    average = averaged(model)
    due, x = contents(average.module), torch.rand(2, 3)
    before, held_in, output, names = contents(model), places(model), computed(model, x), set(model.state_dict())
    with average.swapped():
        CHANGES[change](model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert contents(model) == before
    assert sorted(places(model)) == sorted(held_in)
    assert torch.equal(computed(model, x), output)
    assert set(model.state_dict()) == names
    assert contents(average.module) == due
    assert average.update(0.5)


@pytest.mark.parametrize("is_run", [True, False], ids=["and run", "and not run"])
def test_an_lstm_computes_its_own_weights_after_others_were_assigned(is_run):
    model = Recurrent()
    average = averaged(model)
    output = computed(model)
    with average.swapped():
        model.load_state_dict(other_state(model), assign=True)
        if is_run:
            computed(model)
    assert torch.equal(computed(model), output)


def test_shared_frozen_parameters_are_undone_too():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    average = ModelAverage(model, share_frozen=True)
    for change in (nn.Module.half, CHANGES["load_state_dict(assign=True)"]):
        before, held_in = contents(model), places(model)
        with average.swapped():
            change(model)
        assert contents(model) == before
        assert places(model) == held_in


# Swapping while swapped


ACTIONS = {
    "update": lambda average: average.update(0.5),
    "reset": lambda average: average.reset(),
    "reset of buffers": lambda average: average.reset(buffers_only=True),
    "swapped": lambda average: average.swapped().__enter__(),
    "load_state_dict": lambda average: average.load_averaged_tensors(average.averaged_tensors()),
    "load_plain": lambda average: average.load_plain(average.module.state_dict()),
}

SCOPES = {
    "the same average": lambda model: None,
    "another of the model": lambda model: model,
    "one of a part": lambda model: model[1],
    "one of a whole": lambda model: nn.Sequential(model),
    "one of a model of a common weight": lambda model: Tensors(weight=model[1].weight),
    "one of a model of a common buffer": lambda model: Tensors(weight=parameter(1), buffer=model[2].running_mean),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("action", ACTIONS)
def test_nothing_moves_an_average_while_its_model_holds_averaged_weights(action, scope):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.BatchNorm1d(1))
    average = averaged(model)
    other = ModelAverage(SCOPES[scope](model)) if scope != "the same average" else average
    before, due, untouched = contents(model), contents(average.module), contents(other.module)
    with average.swapped():
        with pytest.raises(RuntimeError, match="while the model holds its own weights.*leave the block of swapped"):
            ACTIONS[action](other)
        assert contents(model) == due
        assert contents(other.module) == untouched
        assert contents(average.module) == due
    assert contents(model) == before
    with contextlib.closing(contextlib.ExitStack()) as stack:
        if action == "swapped":
            stack.enter_context(other.swapped())
        else:
            ACTIONS[action](other)


@pytest.mark.parametrize("action", ACTIONS)
def test_replaced_tensors_do_not_hide_that_the_model_is_swapped(action):
    model = nn.BatchNorm1d(3)
    average = averaged(model)
    before, due = contents(model), contents(average.module)
    with average.swapped():
        model.load_state_dict(other_state(model), assign=True)
        with pytest.raises(RuntimeError, match="holds averaged ones now"):
            ACTIONS[action](average)
    assert (contents(model), contents(average.module)) == (before, due)
    average.update(0.0)


def test_averages_of_other_models_go_on_in_the_block():
    model, other = Tied(), Tied()
    average, second = averaged(model), averaged(other)
    before = contents(model), contents(other)
    with average.swapped():
        assert second.update(0.5)
        with second.swapped():
            assert contents(other) == contents(second.module)
            assert contents(model) == contents(average.module)
        assert contents(other) == before[1]
    assert (contents(model), contents(other)) == before


def test_a_handler_is_not_reset_or_loaded_in_the_block():
    handler = EMAHandler(Tied(), 0.25)
    handler.num_updates = 5
    state = copy.deepcopy({**handler.state_dict(), "num_updates": 7, "num_skipped": 3})
    with handler.swapped():
        for action in (handler.reset, lambda: handler.load_state_dict(state)):
            with pytest.raises(RuntimeError, match="holds averaged ones now"):
                action()
    assert (handler.num_updates, handler.num_skipped) == (5, 0)


def test_a_structure_that_no_longer_matches_raises_and_swaps_nothing():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    average = averaged(model)
    model[1].bias = None
    before = contents(model)
    with pytest.raises(RuntimeError, match="'1.bias' is in the twin but not in the model"), average.swapped():
        pass
    assert contents(model) == before
    assert not swap.any_swapped()


def test_a_kept_buffer_of_another_shape_cannot_be_swapped_in():
    model = nn.Linear(1, 1)
    model.register_buffer("cache", torch.zeros(2))
    average = averaged(model, {"cache": "keep"})
    model.cache = torch.zeros(5)
    before = contents(model)
    for action in (average.swapped().__enter__, average.reset):
        with pytest.raises(
            RuntimeError, match="should keep the structure.*'cache' has shape .5,. in the model and .2,."
        ):
            action()
    assert contents(model) == before
    assert average.update(0.5)


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_taken_in_the_block_is_that_of_before(mode):
    model = Tensors(weight=parameter(3), buffer=torch.rand(2))
    handler = EMAHandler(model, 0.25, handle_buffers=MODES[mode])
    move(model)
    before = saved(handler), saved(handler.ema_model)
    with handler.swapped():
        inside = handler.state_dict()
        assert saved(handler.ema_model) == before[1]
    assert inside.pop("saved_while_swapped")
    outside = handler.state_dict()
    assert not outside.pop("saved_while_swapped")
    assert str(inside) == str(outside)
    assert (saved(handler), saved(handler.ema_model)) == before


def test_a_state_that_was_saved_in_the_block_says_so_when_it_is_loaded():
    _, handler = scalar_handler()
    with handler.swapped():
        state = handler.state_dict()
    with pytest.warns(
        UserWarning, match="saved inside swapped.*a model that was saved beside it holds averaged weights"
    ):
        handler.load_state_dict(state)


def test_training_in_the_block_is_warned_about():
    model, handler = scalar_handler()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def train_in_the_block():
        with handler.swapped():
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="'weight' was changed while .* and the change is dropped"):
        train_in_the_block()
    with handler.swapped():  # nothing was
        model(torch.ones(1, 1)).sum().backward()


def test_a_swap_that_begins_within_a_run_raises():
    model, handler = scalar_handler()
    evaluator = evaluator_of(model)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: handler.swap_during(evaluator))
    with pytest.raises(RuntimeError, match="this run began before"):
        evaluator.run([0] * 3)


@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt], ids=["signal handler", "Ctrl-C"])
def test_memory_that_was_freed_in_the_block_is_there_again(error):
    model = nn.Linear(3, 2)
    average = ModelAverage(model)
    before = contents(model)

    def free():
        model.weight.untyped_storage().resize_(0)
        raise error

    with pytest.raises(error), average.swapped():
        free()
    assert contents(model) == before


# Ways out of a block


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration])
def test_an_exception_reaches_the_caller_and_the_weights_are_back(error):
    model = Tied()
    average = averaged(model)
    before = contents(model)
    raised = error("this one")
    with pytest.raises(error) as caught, average.swapped():
        raise raised
    assert caught.value is raised
    assert contents(model) == before
    assert average.update(0.5)


def test_leaving_a_generator_half_way_gives_the_weights_back():
    model = Tied()
    average = averaged(model)
    before = contents(model)

    def outputs():
        with average.swapped():
            yield contents(model)
            yield None

    running = outputs()
    assert next(running) == contents(average.module)
    running.close()
    assert contents(model) == before


def test_return_break_and_continue_are_ways_out():
    model = Tied()
    average = averaged(model)
    before = contents(model)

    def evaluate():
        with average.swapped():
            return contents(model)

    assert evaluate() == contents(average.module)
    for _ in range(2):
        with average.swapped():
            continue
    while True:
        with average.swapped():
            break
    assert contents(model) == before


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, TimeoutError]
)  # Control-C, handlers of SIGTERM and SIGALRM
@pytest.mark.parametrize("hit", [(1,), (2,), (1, 2), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_an_interrupt_while_weights_are_copied_leaves_no_half(part, hit, error, monkeypatch, no_mark_stays):
    model = Tied()
    average = averaged(model)
    before, held_in, plain_copy, calls = contents(model), places(model), kernels.copy, []

    def interrupted(averaged, online):
        calls.append(len(averaged))
        stop = int(part * len(averaged)) if len(calls) in hit else len(averaged)
        if stop:
            plain_copy(averaged[:stop], online[:stop])
        if len(calls) in hit:
            raise error

    monkeypatch.setattr(kernels, "copy", interrupted)
    with pytest.raises(error), average.swapped():
        model.half()
    monkeypatch.undo()
    assert contents(model) == before
    assert places(model) == held_in
    assert not swap.any_swapped()
    assert average.update(0.5)


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th line that the functions of the swap and the kernels run."""

    def __init__(self, n):
        self.left = n

    def __call__(self, frame, event, argument):
        is_ours = frame.f_code.co_filename in (swap.__file__, kernels.__file__) and frame.f_code.co_name != "swapped"
        if event == "line" and is_ours:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *exception):
        sys.settrace(self.before)


def test_an_interrupt_at_any_line_of_a_swap_leaves_no_half(no_mark_stays):
    model = Everything()
    average = averaged(model)
    before, held_in, line, interrupted = contents(model), places(model), 0, True
    while interrupted:
        line += 1
        with InterruptAt(line) as interrupt, contextlib.suppress(KeyboardInterrupt), average.swapped():
            model.half()
        interrupted = interrupt.left <= 0
        assert contents(model) == before, line
        assert places(model) == held_in, line
        assert not swap.any_swapped(), line
    assert line > 100
    assert average.update(0.5)


def test_an_interrupt_while_another_exception_is_on_its_way_wins(monkeypatch):
    model = Tied()
    average = averaged(model)
    before, plain_copy, calls = contents(model), kernels.copy, []

    def interrupted(averaged, online):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        plain_copy(averaged, online)

    monkeypatch.setattr(kernels, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught, average.swapped():
        raise ValueError("first")
    assert isinstance(caught.value.__context__, ValueError)
    assert contents(model) == before


# Memory


class Allocations(TorchDispatchMode):
    """Every tensor that is made while it is active, weakly, and how many bytes they took."""

    def __init__(self):
        super().__init__()
        self.made, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.made.append(weakref.ref(tensor))
                self.bytes += tensor.untyped_storage().nbytes()
        return result


def bytes_of(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["one type", "another type"])
def test_a_swap_takes_one_copy_at_most_and_gives_it_back(dtype):
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(5)], nn.BatchNorm1d(100))
    model = model if dtype is None else model.bfloat16()
    average = averaged(model, dtype=dtype)
    with Allocations() as allocations, average.swapped():
        pass
    assert 0 < allocations.bytes <= bytes_of(*model.parameters(), *model.buffers())
    gc.collect()
    assert not any(tensor() is not None for tensor in allocations.made)


def test_what_is_shared_is_not_copied_by_a_swap():
    model = nn.Sequential(nn.Linear(100, 100).requires_grad_(False), nn.Linear(3, 3))
    average = ModelAverage(model, share_frozen=True)
    with Allocations() as allocations, average.swapped():
        pass
    assert allocations.bytes == bytes_of(*model[1].parameters())
