"""swapped(): the averaged weights inside, and the model's own after every way out, bit for bit."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ignite_ema import EMAHandler, EMAWarning, ModelAverage
from tests.helpers.bits import assert_same_bits, contents, places
from tests.helpers.models import Tied, compiled, made_inside, move

MODES = {mode: mode for mode in ("copy", "update", "ema_train")} | {"mapping": {"*kept": "keep", "*": "update"}}


class Tensors(nn.Module):
    """Some parameters and buffers, and sums of them."""

    def __init__(self, **named):
        super().__init__()
        self.register_buffer("kept", torch.zeros(2))
        for name, tensor in named.items():
            register = self.register_parameter if isinstance(tensor, nn.Parameter) else self.register_buffer
            register(name, tensor)

    def forward(self, x):
        tensors = [*self.parameters(), *self.buffers()]
        return torch.stack([tensor.detach().to_dense().to(torch.complex128).sum() for tensor in tensors]) * x.sum()


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
    "expanded": lambda: Tensors(weight=parameter(2), expanded=torch.rand(1).expand(3), rows=torch.rand(3).expand(2, 3)),
    "empty and 0-d": lambda: Tensors(empty=parameter(0, 3), scalar=parameter(), none=torch.zeros(0)),
    "not contiguous": lambda: Tensors(turned=nn.Parameter(torch.rand(2, 3).T), every_other=torch.rand(8)[::2]),
    "channels last": lambda: Tensors(weight=nn.Parameter(torch.rand(2, 3, 2, 2).to(memory_format=torch.channels_last))),
    "views of one storage": views_of_one_storage,
    "made in inference_mode": lambda: made_inside(Tied),
}


def computed(model):
    model.eval()
    with torch.no_grad():
        return model(torch.ones(2, 3))


def averaged(model, *arguments, **options):
    """An average of ``model`` that is neither what it was at first, nor what it is now."""
    average = ModelAverage(model, *arguments, **options)
    move(model)
    average.update(0.25)
    move(model)
    return average


@contextlib.contextmanager
def given_back(model, average):
    """The model is before and after the block the same, in bits and places; the average too, and it goes on."""
    before, held_in, due = contents(model), places(model), contents(average.module)
    yield due
    assert contents(model) == before
    assert places(model) == held_in
    assert contents(average.module) == due
    assert average.update(0.0)


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, "update") for kind in MODELS), *(("tied weights", m) for m in MODES)]
)
def test_the_model_is_the_twin_in_the_block_and_itself_again_after_it(kind, mode):
    torch.manual_seed(0)
    model = MODELS[kind]()
    average = averaged(model, MODES[mode])
    held_in, output = places(model), computed(model)
    assert contents(model) != contents(average.module)
    with given_back(model, average) as due:
        for _ in range(2):
            with average.swapped():
                assert contents(model) == due
                assert torch.equal(computed(model), computed(average.module))
                if kind != "expanded":  # which cannot be written to
                    assert [place[:2] for place in places(model)] == [place[:2] for place in held_in]
            assert torch.equal(computed(model), output)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", ["tied weights", "expanded", "made in inference_mode"])
def test_gradient_modes_do_not_matter(kind, context):
    model = MODELS[kind]()
    average = averaged(model)
    with given_back(model, average) as due, context(), average.swapped():
        assert contents(model) == due
        model.kept = torch.ones(2)
        computed(model)
    assert not model.kept.is_inference() or kind == "made in inference_mode"
    if kind == "tied weights":
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


def compiled_ddp(model):
    ddp = DistributedDataParallel(model)
    ddp.broadcast_buffers = ddp.forward_sync_buffers = False  # else torch cannot compile it; the name differs
    return compiled(ddp)


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "compiled": compiled,
    "DDP in compiled": compiled_ddp,
    "compiled in DDP": lambda model: DistributedDataParallel(compiled(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_computes_the_averaged_weights(wrapper, process_group):
    torch._dynamo.reset()
    plain = Tied()
    model = WRAPPERS[wrapper](plain)
    handler = EMAHandler(model, 0.25)
    move(plain)
    x, output = torch.rand(2, 3).to(plain.kept.device), computed(model)
    with given_back(plain, handler.average), handler.swapped():
        assert torch.equal(computed(model), computed(handler.ema_model))
        assert not torch.equal(computed(model), output)
        model.train()(x).sum().backward()  # moves the statistics of the batch norm
    assert torch.equal(computed(model), output)


def test_a_compiled_model_is_not_compiled_again():
    torch._dynamo.reset()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    plain = Tied()
    model = torch.compile(plain, backend=backend, fullgraph=True)
    average = averaged(plain)
    output = computed(model)
    for _ in range(2):
        with average.swapped():
            assert torch.equal(computed(model), computed(average.module))
        assert torch.equal(computed(model), output)
        average.update(0.5)
    assert len(compilations) == 1


ACTIONS = {
    "update": lambda average: average.update(0.5),
    "reset": lambda average: average.reset(),
    "swapped": lambda average: average.swapped().__enter__(),
    "load_state_dict": lambda average: average.load_state_dict(average.state_dict()),
    "load_averaged": lambda average: average.load_averaged(average.module.state_dict()),
}


@pytest.mark.parametrize("whose", ["its own", "another", "that of a part", "that of the whole"])
@pytest.mark.parametrize("action", ACTIONS)
def test_nothing_moves_an_average_while_its_model_or_a_part_of_it_holds_averaged_weights(action, whose):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.BatchNorm1d(1))
    average = averaged(model[1] if whose == "that of the whole" else model)
    other = average if whose == "its own" else ModelAverage(model[1] if whose == "that of a part" else model)
    untouched = contents(other.module)
    with given_back(model, average), average.swapped():
        inside = contents(model)
        with pytest.raises(RuntimeError, match="holds averaged weights now. Leave the block"):
            ACTIONS[action](other)
        assert contents(model) == inside
        assert contents(other.module) == untouched
    assert other.update(0.5)


def test_averages_of_other_models_go_on_in_the_block():
    model, other = Tied(), Tied()
    average, second = averaged(model), averaged(other)
    with given_back(model, average) as due, average.swapped():
        assert second.update(0.5)
        with second.swapped():
            assert contents(other) == contents(second.module)
            assert contents(model) == due


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_of_the_average_taken_in_the_block_is_that_of_before(mode):
    model = Tensors(weight=parameter(3), buffer=torch.rand(2))
    handler = EMAHandler(model, 0.25, handle_buffers=MODES[mode])
    move(model)
    before, twin = copy.deepcopy(handler.state_dict()), contents(handler.ema_model)
    with handler.swapped():
        with pytest.warns(EMAWarning, match="is saved inside swapped.*a model that is saved beside it has averaged"):
            inside = handler.state_dict()
        assert contents(handler.ema_model) == twin
    assert_same_bits({**inside, "saved_while_swapped": False}, before)
    with pytest.warns(EMAWarning, match="was saved inside swapped"):
        handler.load_state_dict(inside)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, StopIteration])
def test_an_exception_reaches_the_caller_and_the_weights_are_back(error):
    model = Tied()
    average, raised = averaged(model), error("this one")
    with given_back(model, average):
        with pytest.raises(error) as caught, average.swapped():
            raise raised
        assert caught.value is raised
