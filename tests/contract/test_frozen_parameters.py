"""share_frozen: the twin holds what trains and shares the rest; reset of buffers alone; plain state dicts loaded."""

import copy
import io
import re

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ignite_ema import EMAHandler, ModelAverage
from tests.helpers.bits import bits, contents, copied
from tests.helpers.models import frozen, move


class Adapted(nn.Module):
    """A frozen linear layer, and what trains beside it, as LoRA has it."""

    def __init__(self, width=4, rank=2, base=torch.float32):
        super().__init__()
        self.base = nn.Linear(width, width).to(base).requires_grad_(False)
        self.down = nn.Parameter(torch.rand(rank, width))
        self.up = nn.Parameter(torch.rand(width, rank))
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.base(x.to(self.base.weight.dtype)).to(x) + x @ self.down.T @ self.up.T)


FROZEN = ["base.weight", "base.bias"]
HELD = ["down", "up", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


def named(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def sharing(model, *arguments, **options):
    average = ModelAverage(model, *arguments, share_frozen=True, **options)
    move(model)
    average.update(0.25)
    move(model)
    return average


def shared_names(model, twin):
    theirs = named(twin)
    return [name for name, tensor in named(model).items() if theirs[name] is tensor]


def bytes_of(tensors):
    """The memory of tensors, each storage once and whole."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


# What is shared


def test_frozen_parameters_are_the_same_in_both_and_nothing_else_is():
    model = Adapted()
    average = sharing(model)
    assert shared_names(model, average.module) == FROZEN
    ours = {tensor.untyped_storage().data_ptr() for tensor in named(model).values()}
    assert all(named(average.module)[name].untyped_storage().data_ptr() not in ours for name in HELD)


def test_without_it_nothing_is_shared():
    model = Adapted()
    assert shared_names(model, ModelAverage(model).module) == []


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
def test_the_twin_takes_the_bytes_of_what_trains_and_of_the_buffers(dtype):
    model = Adapted(width=64, base=torch.bfloat16)
    average = sharing(model, dtype=dtype)
    own = [tensor for name, tensor in named(average.module).items() if name not in FROZEN]
    wider = 1 if dtype is None else 2
    assert bytes_of(own) == (2 * 2 * 64 + 4 * 64) * 4 * wider + 8  # two adapters, four tensors and a count of the norm
    assert bytes_of(named(average.module).values()) == bytes_of(own) + bytes_of(model.base.parameters())
    both = bytes_of([*named(model).values(), *named(average.module).values()])
    assert both == bytes_of(named(model).values()) + bytes_of(own)


class Uncopyable(nn.Parameter):
    """A weight that nobody has the memory for twice."""

    def __deepcopy__(self, memo):
        raise MemoryError


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager")], ids=["plain", "compiled"])
def test_the_frozen_part_is_never_copied(wrap):
    adapted = Adapted()
    adapted.base.weight = Uncopyable(adapted.base.weight.detach(), requires_grad=False)
    model = nn.Sequential(wrap(adapted), nn.Linear(4, 4))
    average = sharing(model)
    assert average.module[0].base.weight is adapted.base.weight
    with average.swapped():
        pass
    average.load_averaged_tensors(copy.deepcopy(average.averaged_tensors()))
    average.reset()
    with pytest.raises(RuntimeError, match="copy.deepcopy can copy"):
        ModelAverage(model)


def test_an_update_moves_what_trains_and_leaves_the_base_alone():
    model, reference = Adapted(), Adapted()
    reference.load_state_dict(model.state_dict())
    base = contents(model.base)
    average, plain = ModelAverage(model, share_frozen=True), ModelAverage(reference)
    for _ in range(3):
        move(model)
        reference.load_state_dict(model.state_dict())
        average.update(0.25)
        plain.update(0.25)
    assert contents(average.module) == contents(plain.module)
    assert contents(model.base) == base
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == HELD[:4]


@pytest.mark.parametrize("handle_buffers", ["copy", "update", "ema_train"])
def test_buffers_are_never_shared(handle_buffers):
    model = Adapted()
    before = model.norm.running_mean.clone()  # 0
    average = ModelAverage(model, handle_buffers, share_frozen=True)
    move(model)
    average.update(0.5)
    due = {"copy": model.norm.running_mean, "update": model.norm.running_mean / 2, "ema_train": before}[handle_buffers]
    assert bits(average.module.norm.running_mean) == bits(due)
    assert shared_names(model, average.module) == FROZEN


@pytest.mark.parametrize(
    "wrap",
    [DataParallel, DistributedDataParallel, lambda model: torch.compile(model, backend="eager")],
    ids=["DataParallel", "DDP", "compiled"],
)
def test_wrapped_models_share_too(wrap, process_group):
    plain = Adapted()
    average = ModelAverage(wrap(plain), share_frozen=True)
    move(plain)
    average.update(0.5)
    assert len({id(p) for p in average.module.parameters()} & {id(p) for p in plain.parameters()}) == 2
    assert list(average.averaged_tensors()) == HELD


def test_a_model_that_is_frozen_throughout_can_be_averaged():
    model = nn.Linear(2, 2).requires_grad_(False)
    average = ModelAverage(model, share_frozen=True, skip_nonfinite=True)
    assert average.update(0.5)
    average.reset()
    with average.swapped():
        assert average.averaged_tensors() == {}
    average.load_averaged_tensors({})
    average.load_plain(model.state_dict())


@pytest.mark.parametrize("what", [None, 1, "yes"], ids=str)
def test_what_is_no_truth_value_raises(what):
    with pytest.raises(TypeError, match=f"share_frozen should be True or False, got {what!r}"):
        ModelAverage(Adapted(), share_frozen=what)


def test_a_twin_of_ones_own_cannot_share():
    twin = Adapted()
    before = contents(twin)
    with pytest.raises(ValueError, match="share_frozen should be False where ema_model.*leave ema_model out"):
        EMAHandler(Adapted(), 0.25, ema_model=twin, share_frozen=True)
    assert contents(twin) == before


# What is saved


def test_the_state_holds_what_is_held_and_nothing_else():
    model = Adapted(width=64)
    handler = EMAHandler(model, 0.25, share_frozen=True)
    state = handler.state_dict()
    assert list(state["averaged_tensors"]) == HELD
    assert set(state["state_dict_names"]) == {*FROZEN, *HELD}
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < bytes_of(model.base.parameters())


class Training:
    """Trains the adapters of a base that is made anew from its own seed."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Adapted()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=0.1)
        self.handler = EMAHandler(self.model, 0.25, handle_buffers="update", share_frozen=True)
        self.trainer = Engine(self.step)
        self.handler.attach(self.trainer)

    def step(self, engine, batch):
        torch.manual_seed(engine.state.iteration)
        self.optimizer.zero_grad()
        (self.model(torch.rand(4, 4)) * torch.rand(4, 4)).sum().backward()
        self.optimizer.step()

    def objects(self):
        names = ("model", "optimizer", "handler", "trainer")
        return {name: getattr(self, name) for name in names}

    def run(self, last=8):
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=last), self.trainer.terminate)
        self.trainer.run(max_epochs=1, epoch_length=20)
        return contents(self.model), contents(self.handler.ema_model), self.handler.num_updates


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    due = Training().run()
    killed = Training()
    checkpoint = Checkpoint(killed.objects(), DiskSaver(str(tmp_path)))
    killed.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), checkpoint)
    killed.run(5)
    resumed = Training()
    Checkpoint.load_objects(resumed.objects(), tmp_path / checkpoint.last_checkpoint)
    assert resumed.run() == due
    assert shared_names(resumed.model, resumed.handler.ema_model) == FROZEN


@pytest.mark.parametrize("saved_with", [True, False])
def test_a_state_of_the_other_kind_is_refused(saved_with):
    model = Adapted()
    saved, loading = (ModelAverage(model, share_frozen=share) for share in (saved_with, not saved_with))
    what = "misses" if saved_with else "should not have"
    before = contents(loading.module)
    with pytest.raises(ValueError, match=f"the state {what} 'base.weight'"):
        loading.load_state_dict(saved.state_dict())
    assert contents(loading.module) == before


# What becomes of the frozen parameters


def test_unfreezing_raises_at_the_next_update_and_names_the_path():
    model = Adapted()
    average = sharing(model)
    before = contents(average.module)
    model.base.bias.requires_grad_(True)
    for action in (lambda: average.update(0.5), average.reset, lambda: average.swapped().__enter__()):
        with pytest.raises(RuntimeError, match="'base.bias' was frozen and is shared with the average, but requires"):
            action()
    assert contents(average.module) == before
    model.base.bias.requires_grad_(False)
    assert average.update(0.5)


def test_the_update_of_a_handler_raises_too_and_counts_nothing():
    model = Adapted()
    handler = EMAHandler(model, 0.25, share_frozen=True)
    trainer = Engine(lambda engine, batch: model.requires_grad_(engine.state.iteration == 2))
    handler.attach(trainer)
    with pytest.raises(RuntimeError, match="'base.weight' was frozen"):
        trainer.run([0] * 3)
    assert (handler.num_updates, trainer.state.iteration) == (1, 2)


def test_replacing_a_shared_parameter_by_one_that_trains_raises():
    model = Adapted()
    average = sharing(model)
    before, old = contents(average.module), model.base.weight
    model.base.weight = nn.Parameter(torch.zeros(4, 4))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="'base.weight' was frozen and is shared"):
            average.update(0.5)
    assert contents(average.module) == before
    model.base.weight = old
    assert average.update(0.5)


@pytest.mark.parametrize("remove", [delattr, lambda module, name: setattr(module, name, None)], ids=["del", "None"])
def test_a_shared_parameter_that_is_removed_raises_and_changes_nothing(remove):
    model = Adapted()
    average = sharing(model)
    before, bias = contents(average.module), model.base.bias
    remove(model.base, "bias")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="'base.bias' is in the twin but not in the model"):
            average.update(0.5)
    assert contents(average.module) == before
    model.base.register_parameter("bias", bias)
    assert average.update(0.5)


def test_a_buffer_of_the_model_is_not_shared_even_if_it_is_put_into_the_twin():
    model = Adapted()
    average = sharing(model)
    average.module.norm.running_mean = model.norm.running_mean
    with pytest.raises(RuntimeError, match="'norm.running_mean' is one and the same tensor"):
        average.update(0.5)


def test_freezing_later_is_fine():
    model = Adapted()
    average = sharing(model)
    model.requires_grad_(False)
    weight = average.module.up.detach().clone()
    assert average.update(0.5)
    assert average.module.up is not model.up
    assert torch.equal(average.module.up, weight.lerp(model.up, 0.5))
    assert list(average.averaged_tensors()) == HELD
    model.requires_grad_(True).base.requires_grad_(False)
    assert average.update(0.5)


def assign_by_load_state_dict(model):
    state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def assign_a_parameter(model):
    model.base.weight = frozen(torch.ones(4, 4))


def assign_a_buffer_of_memory(model):
    model.base.weight.data = torch.ones(4, 4)


@pytest.mark.parametrize(
    "replace", [assign_by_load_state_dict, assign_a_parameter, assign_a_buffer_of_memory], ids=lambda f: f.__name__
)
def test_a_shared_parameter_that_is_replaced_is_followed(replace):
    model = Adapted()
    average = sharing(model)
    replace(model)
    for _ in range(2):
        assert average.update(1.0)
        assert shared_names(model, average.module) == FROZEN
        assert torch.equal(average.module.base.weight, torch.ones(4, 4))
        assert contents(average.module) == contents(model)


def test_a_swap_follows_what_was_replaced_too():
    model = Adapted()
    average = sharing(model)
    assign_a_parameter(model)
    with average.swapped():
        assert shared_names(model, average.module) == FROZEN


def tied_base():
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3)})
    model.embedding.requires_grad_(False)
    model.head.weight = model.embedding.weight
    return model


def test_tied_frozen_parameters_are_shared_and_stay_tied():
    model = tied_base()
    average = sharing(model)
    twin = average.module
    assert twin.head.weight is twin.embedding.weight is model.embedding.weight
    assert list(average.averaged_tensors()) == ["head.bias"]
    assert average.state_dict_names() == {"head.bias": "head.bias"}


def test_tied_frozen_parameters_that_are_replaced_together_are_followed():
    model = tied_base()
    average = sharing(model)
    twin = average.module
    model.embedding.weight = model.head.weight = frozen(torch.zeros(3, 2))
    assert average.update(0.5)
    assert twin.head.weight is twin.embedding.weight is model.embedding.weight


def test_a_frozen_lstm_that_is_replaced_is_computed_with():
    model = nn.Sequential(nn.LSTM(3, 2).requires_grad_(False), nn.Identity())
    average = ModelAverage(model, share_frozen=True)
    x = torch.rand(2, 3)
    average.module(x)
    model[0].load_state_dict({n: torch.ones_like(t) for n, t in model[0].state_dict().items()}, assign=True)
    average.update(0.5)
    assert torch.equal(average.module(x)[0], model(x)[0])


@pytest.mark.parametrize("replaces", [False, True], ids=["in place", "by new parameters"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_that_moves_to_another_type_is_followed(dtype, replaces):
    model = Adapted()
    average = sharing(model)
    before = contents(average.module)
    torch.__future__.set_overwrite_module_params_on_conversion(replaces)
    try:
        model.to(dtype)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert average.update(0.0)
    assert shared_names(model, average.module) == FROZEN
    assert average.module.base.weight.dtype is dtype
    assert bits(average.module.up) == before["up"]


def test_dtype_concerns_what_is_held_alone():
    model = Adapted(base=torch.bfloat16)
    average = sharing(model, dtype=torch.float64)
    assert shared_names(model, average.module) == FROZEN
    assert average.module.base.weight.dtype is torch.bfloat16
    assert {average.module.up.dtype, average.module.norm.running_mean.dtype} == {torch.float64}


def test_a_low_precision_base_is_no_reason_for_a_warning():
    model = Adapted(base=torch.bfloat16)
    assert ModelAverage(model, share_frozen=True).update(1e-4)


def test_a_nan_in_the_base_is_nobodys_business():
    model = Adapted()
    average = ModelAverage(model, share_frozen=True, skip_nonfinite=True)
    model.base.weight.fill_(torch.nan)
    assert average.update(0.5)


def test_swapped_leaves_the_base_where_it_is():
    model = Adapted()
    average = sharing(model)
    before, weight, version = contents(model), model.base.weight, model.base.weight._version
    due = contents(average.module)
    with average.swapped():
        assert contents(model) == due
        assert model.base.weight is weight
    assert contents(model) == before
    assert model.base.weight._version == version


def test_the_rest_of_the_model_is_evaluated_on_the_average():
    torch.manual_seed(0)
    model = Adapted()
    handler = EMAHandler(model, 0.25, share_frozen=True)
    move(model)
    x = torch.rand(3, 4)
    model.eval()
    evaluator = Engine(lambda engine, batch: model(batch))
    with handler.swap_during(evaluator):
        assert torch.equal(evaluator.run([x]).output, handler.ema_model(x))
    assert not torch.equal(model(x), handler.ema_model(x))


# reset(buffers_only=True)


@pytest.mark.parametrize("mode", ["copy", "update", "ema_train", {"norm.*": "keep"}], ids=str)
def test_buffers_alone_can_be_reset(mode):
    model = Adapted()
    handler = EMAHandler(model, 0.25, handle_buffers=mode)
    handler.num_updates = 7
    move(model)
    weights = {name: bits(parameter) for name, parameter in handler.ema_model.named_parameters()}
    handler.reset(buffers_only=True)
    assert {name: bits(parameter) for name, parameter in handler.ema_model.named_parameters()} == weights
    assert contents(handler.ema_model.norm)["running_var"] == contents(model.norm)["running_var"]
    assert bits(handler.ema_model.norm.num_batches_tracked) == bits(model.norm.num_batches_tracked)
    assert handler.num_updates == 7
    handler.reset()
    assert contents(handler.ema_model) == contents(model)
    assert handler.num_updates == 0


def test_a_model_without_buffers_can_be_reset():
    model = nn.Linear(2, 2)
    average = ModelAverage(model)
    before = contents(average.module)
    move(model)
    average.reset(buffers_only=True)
    assert contents(average.module) == before


def test_reset_never_ties_the_average_to_the_model():
    model = Adapted()
    average = ModelAverage(model)
    average.reset(buffers_only=True)
    before = contents(average.module)
    move(model)
    assert contents(average.module) == before


# load_plain


class Plain(nn.Module):
    """A body and a head that share a weight, with buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.body.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("cache", torch.zeros(2), persistent=False)


@pytest.fixture
def pair():
    """An average, and another model of its kind, whose state can be loaded."""
    average, other = ModelAverage(Plain()), Plain()
    move(average.model)
    move(other)
    average.module.cache.fill_(7.0)
    return average, other


def test_a_plain_state_is_loaded_and_what_it_has_no_place_for_stays(pair):
    average, other = pair
    online = contents(average.model)
    average.load_plain(copied(other.state_dict()))
    assert contents(average.module) == {**contents(other), "cache": bits(torch.full((2,), 7.0))}
    assert average.module.head.weight is average.module.body.weight
    assert contents(average.model) == online


def test_parameters_alone_leave_the_buffers_alone(pair):
    average, other = pair
    buffers = {name: bits(tensor) for name, tensor in average.module.named_buffers()}
    average.load_plain(dict(other.named_parameters()))
    parameters = {name: bits(tensor) for name, tensor in other.named_parameters()}
    assert contents(average.module) == {**parameters, **buffers}


@pytest.mark.parametrize("left_out", ["head.weight", "body.weight"])
def test_a_tied_weight_may_have_either_name(pair, left_out):
    average, other = pair
    state = copied(other.state_dict())
    del state[left_out]
    average.load_plain(state)
    assert bits(average.module.head.weight) == bits(other.head.weight)


def drop(state, name):
    del state[name]


def rename(state, prefix, names=None):
    for name in names or list(state):
        state[f"{prefix}{name}"] = state.pop(name)


REFUSED = {
    "missing parameter": (lambda state: drop(state, "body.bias"), "'body.bias' is missing"),
    "missing buffer": (lambda state: drop(state, "norm.running_var"), "'norm.running_var' is missing"),
    "a tied weight that is missing": (
        lambda state: [drop(state, name) for name in ("body.weight", "head.weight")],
        "'body.weight' is missing",
    ),
    "unexpected": (lambda state: state.update(tail=torch.ones(1)), "it has no 'tail'"),
    "prefix": (lambda state: rename(state, "model."), "it has no 'model.body.weight'"),
    "prefix of some": (lambda state: rename(state, "module.", ["body.bias"]), "it has no 'module.body.bias'"),
    "prefix twice": (lambda state: rename(state, "module.module."), "it has no 'module.body.weight'"),
    "nothing": (dict.clear, "'body.weight' is missing"),
    "tied weights that differ": (
        lambda state: state["head.weight"].add_(1),
        "'head.weight' is tied to 'body.weight' in the model and should be equal to it",
    ),
    "another shape": (lambda state: state.update({"body.bias": torch.ones(4)}), "'body.bias' .* shape (3,), got (4,)"),
    "no tensor": (lambda state: state.update({"body.bias": [1.0]}), "'body.bias' .* should be a tensor, got list"),
    "wider type": (lambda state: state.update({"body.bias": torch.ones(3).double()}), "'body.bias' .*float32, got"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(pair, why):
    average, other = pair
    state, before = copied(other.state_dict()), contents(average.module)
    change, message = REFUSED[why]
    change(state)
    pattern = ".*".join(map(re.escape, message.split(".*"))) if ".*" in message else re.escape(message)
    with pytest.raises(ValueError, match=pattern):
        average.load_plain(state)
    assert contents(average.module) == before


def test_tied_weights_that_are_nan_at_the_same_places_are_equal(pair):
    average, other = pair
    state = copied(other.state_dict())
    state["body.weight"][0, 0] = state["head.weight"][0, 0] = torch.nan
    average.load_plain(state)
    assert contents(average.module)["body.weight"] == bits(state["body.weight"])


def test_the_prefix_of_a_wrapper_is_taken_off(pair):
    average, other = pair
    average.load_plain(DataParallel(other).state_dict())
    assert contents(average.module) == {**contents(other), "cache": bits(torch.full((2,), 7.0))}


def test_a_prefix_that_is_a_name_of_the_model_stays():
    model, other = (nn.ModuleDict({"module": Adapted()}) for _ in range(2))
    other.module.base.load_state_dict(model.module.base.state_dict())
    for average in (ModelAverage(model), ModelAverage(model, share_frozen=True)):
        average.load_plain(copied(other.state_dict()))
        assert contents(average.module) == contents(other)
    frozen_throughout = nn.ModuleDict({"module": nn.Linear(1, 1)}).requires_grad_(False)
    ModelAverage(frozen_throughout, share_frozen=True).load_plain(copied(frozen_throughout.state_dict()))


def test_a_narrower_type_is_loaded(pair):
    average, other = pair
    average.load_plain(copied(other.bfloat16().state_dict()))
    assert torch.equal(average.module.body.bias, other.body.bias.float())


def test_loading_does_not_tie_the_average_to_what_was_loaded(pair):
    average, other = pair
    average.load_plain(other.state_dict())
    before = contents(average.module)
    move(other)
    assert contents(average.module) == before


@pytest.mark.parametrize("has_base", [True, False], ids=["with the base", "without the base"])
def test_a_shared_base_may_be_in_the_state_if_it_is_equal(has_base):
    model = Adapted()
    average = sharing(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if has_base or name not in FROZEN}
    average.load_plain(state)
    assert contents(average.module) == contents(model)
    assert shared_names(model, average.module) == FROZEN


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_base_that_is_equal_in_the_type_of_the_state_is_equal(dtype):
    model = Adapted()
    average = sharing(model)
    base = contents(model.base)
    average.load_plain({**model.state_dict(), "base.weight": model.base.weight.to(dtype)})
    assert contents(model.base) == base


def test_a_base_that_differs_is_refused():
    model = Adapted()
    average = sharing(model)
    before = contents(average.module)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["base.bias"] += 1
    with pytest.raises(ValueError, match="'base.bias' is frozen and shared.*load the weights into the model first"):
        average.load_plain(state)
    assert contents(average.module) == before
    model.load_state_dict(state)
    average.load_plain(state)


@pytest.mark.parametrize("wrong", [torch.ones(5), [1.0], None], ids=["shape", "list", "None"])
def test_a_base_that_is_something_else_is_refused(wrong):
    model = Adapted()
    average = sharing(model)
    with pytest.raises(ValueError, match="'base.bias' is frozen and shared"):
        average.load_plain({**model.state_dict(), "base.bias": wrong})


def test_the_names_of_a_shared_base_may_be_tied():
    model = tied_base()
    average = sharing(model)
    average.load_plain(copied(model.state_dict()))
    assert contents(average.module) == contents(model)
    state = copied(model.state_dict())
    state["head.weight"] += 1
    with pytest.raises(ValueError, match="'head.weight' is frozen and shared"):
        average.load_plain(state)


@pytest.mark.parametrize("wrap", [DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["DP", "compiled"])
def test_the_names_are_those_of_the_model_without_wrappers(wrap):
    plain, other = Plain(), Plain()
    average = ModelAverage(wrap(plain))
    average.load_plain(copied(other.state_dict()))
    assert bits(average.averaged_tensors()["body.weight"]) == bits(other.body.weight)


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"note": "no tensor"}

    def set_extra_state(self, state):
        pass


def test_extra_state_is_no_weight():
    model = nn.Sequential(WithExtraState(1, 1), nn.Linear(1, 1))
    average = ModelAverage(model)
    move(model)
    average.load_plain(model.state_dict())
    assert contents(average.module) == contents(model)


def test_nothing_to_share_is_warned_about():
    with pytest.warns(UserWarning, match="share_frozen should find frozen parameters, but all require gradients"):
        ModelAverage(nn.Linear(1, 1), share_frozen=True)
