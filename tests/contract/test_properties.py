"""Random models under random sequences of operations, against a slow plain model of what should hold.

The plain model knows nothing of the library: it lists tensors by their names, computes in float64, one tensor at a
time, and compares after each operation. 33 examples by default; ``--hypothesis-profile nightly`` runs 666.
"""

import io
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ignite.engine import Engine
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from ignite_ema import EMAHandler
from ignite_ema.checkpoints import load_file, save_file
from tests.helpers.bits import bits, wide

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
TYPES = [*FLOATS, torch.complex64, torch.complex128, torch.int8, torch.int64, torch.uint8, torch.bool]
SHAPES = [(), (0,), (1,), (3,), (2, 3), (2, 0, 3), (2, 1, 2)]
LAYOUTS = ["plain", "transposed", "expanded", "part of a larger one"]
IN_SAFETENSORS = set(TYPES) - {torch.complex128}
MOMENTA = [0.0, 1e-3, 0.1, 0.25, 0.5, 0.9, 1.0]


# Random models


class TensorSpec(NamedTuple):
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str
    trains: bool
    tie: int | None  # which of the tensors of this kind that were made before it is
    value: str


class ModuleSpec(NamedTuple):
    kind: str
    tensors: list[TensorSpec]
    children: list["ModuleSpec"]
    same_as: int | None  # which of the modules that were made before it is


tensor_specs = st.builds(
    TensorSpec,
    kind=st.sampled_from(["parameter", "parameter", "buffer", "non-persistent buffer"]),
    dtype=st.one_of(st.sampled_from(FLOATS[:3]), st.sampled_from(TYPES)),
    shape=st.sampled_from(SHAPES),
    layout=st.one_of(st.just("plain"), st.sampled_from(LAYOUTS)),
    trains=st.booleans(),
    tie=st.one_of(st.none(), st.none(), st.integers(0, 3)),
    value=st.sampled_from(["normal", "normal", "zero", "infinite in part"]),
)


def module_specs(depth=2):
    return st.builds(
        ModuleSpec,
        kind=st.sampled_from(["holder"] * 4 + ["norm", "LSTM", "flat", "parametrised", "weight norm"]),
        tensors=st.lists(tensor_specs, max_size=3),
        children=st.lists(module_specs(depth - 1), max_size=3) if depth else st.just([]),
        same_as=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 3)),
    )


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


def parametrised():
    layer = nn.Linear(2, 3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def flat():
    """Parameters that lie in one memory beside each other."""
    memory, module = torch.arange(7.0), nn.Module()
    module.first, module.second = nn.Parameter(memory[:3]), nn.Parameter(memory[3:].view(2, 2))
    return module


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "holder": nn.Module,
    "flat": flat,
    "norm": lambda: nn.BatchNorm1d(3),
    "LSTM": lambda: nn.LSTM(2, 2),
    "parametrised": parametrised,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
}


def values(shape, dtype, generator, infinite=False):
    """Random values of a type, no negative zeros, none beyond what the narrowest type holds."""
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-8, 8)
    if dtype.is_complex:
        return torch.complex(drawn, drawn.flip(tuple(range(drawn.ndim)))).to(dtype)
    if infinite and dtype.is_floating_point and dtype.itemsize > 1:
        drawn = torch.where(drawn < 0, -torch.inf, drawn)
    return drawn > 0 if dtype is torch.bool else (drawn.abs() if dtype is torch.uint8 else drawn).to(dtype)


def laid_out(tensor, layout):
    """The values of a tensor, or some of them, otherwise in memory."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
    if layout == "expanded" and tensor.ndim and tensor.shape[-1]:
        return tensor[..., :1].expand(tensor.shape)
    if layout == "part of a larger one":
        return torch.stack([tensor, tensor])[1]
    return tensor


def made_tensor(spec, generator):
    infinite = spec.value == "infinite in part" and not (spec.kind == "parameter" and spec.trains)
    tensor = values(spec.shape, spec.dtype, generator, infinite)
    tensor = laid_out(torch.zeros_like(tensor) if spec.value == "zero" else tensor, spec.layout)
    if spec.kind != "parameter":
        return tensor
    can_train = spec.dtype.is_floating_point or spec.dtype.is_complex
    return nn.Parameter(tensor, requires_grad=spec.trains and can_train)


def build(spec, seed=0):
    """The model of a specification; the same bits each time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(spec, generator, {"parameter": [], "buffer": []}, [])


def _build(spec, generator, tensors, modules):
    if spec.same_as is not None and modules:
        return modules[spec.same_as % len(modules)]
    module = LAYERS[spec.kind]()
    for index, one in enumerate(spec.tensors):
        known = tensors["parameter" if one.kind == "parameter" else "buffer"]
        tied = one.tie is not None and known
        tensor = known[one.tie % len(known)] if tied else made_tensor(one, generator)
        known.append(tensor)
        if one.kind == "parameter":
            module.register_parameter(f"p{index}", tensor)
        else:
            module.register_buffer(f"b{index}", tensor, persistent=one.kind == "buffer")
    module.register_parameter("none", None)
    for index, child in enumerate(spec.children):
        module.add_module(f"m{index}", _build(child, generator, tensors, modules))
    modules.append(module)
    return module


# The slow plain model


def named(module):
    """Every tensor by every name that it has, and the dictionary that holds it there."""
    found = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for owner in (part._parameters, part._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    found[f"{prefix}.{key}".lstrip(".")] = owner, key
    return found


def tensors(module):
    return {name: owner[key] for name, (owner, key) in named(module).items()}


def is_buffer(module, name):
    return isinstance(module.get_submodule(name.rpartition(".")[0])._buffers.get(name.rpartition(".")[2]), torch.Tensor)


def ties(module):
    groups = {}
    for name, tensor in tensors(module).items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(groups.values())


def all_bits(module):
    return {name: bits(tensor) for name, tensor in tensors(module).items()}


def identity(module):
    """What has to be the same after an update or a swap: objects, memory, flags, bits."""
    return {
        name: (id(one), one.data_ptr(), one.stride(), one.requires_grad, bits(one))
        for name, one in tensors(module).items()
    }


def storages(module):
    memory = {name: tensor.untyped_storage() for name, tensor in tensors(module).items()}
    return {storage.data_ptr(): name for name, storage in memory.items() if storage.nbytes()}


def is_expanded(tensor):
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def averaged(before, online, momentum):
    """(1 - λ) · average + λ · weights in float64; infinities follow the same rule."""
    old, new = wide(before), wide(online.detach().to(before.dtype))
    mixed = old * (1 - momentum) + new * momentum
    return torch.where(old == new, old, mixed)


def assert_close(tensor, expected, before, online, name):
    """Within two roundings of the type that holds the average, of the larger of the two values that are mixed."""
    step = torch.finfo(tensor.dtype)
    size = torch.maximum(wide(before).abs(), wide(online.detach()).abs()).nan_to_num(0, 0)
    found = wide(tensor)
    same = (found == expected) | (found.isnan() & expected.isnan())
    apart = (found - expected).abs().nan_to_num(torch.inf)
    assert bool((same | (apart <= 2 * step.eps * size + step.smallest_normal)).all()), name


def retied(module, groups, loaded=()):
    """Makes each group one tensor again, after some were replaced: the one that was loaded, or else the first."""
    places = named(module)
    for group in groups:
        owner, key = places[next((name for name in group if name in loaded), group[0])]
        tensor = owner[key]
        for owner, key in map(places.__getitem__, group):
            owner[key] = tensor


def changed(module, generator, chosen=lambda name: True):
    """New values for some tensors, by name; tied ones get the same."""
    new = {}
    for (first, *others), index in zip(ties(module), range(10**6), strict=False):
        tensor = tensors(module)[first]
        drawn = values(tensor.shape, tensor.dtype, generator)
        fresh = drawn if chosen(first) and index % 4 != 3 else tensor.detach().clone()
        new |= dict.fromkeys([first, *others], fresh)
    return new


class Averaging(RuleBasedStateMachine):
    """A handler of a random model, attached to an engine of which each run is one iteration."""

    @initialize(
        spec=module_specs(),
        seed=st.integers(0, 9),
        mode=st.sampled_from(["copy", "update", "statistics", "ema_train", "mapping"]),
        dtype=st.sampled_from([None, None, torch.float32, torch.float64, torch.bfloat16]),
        share_frozen=st.booleans(),
        stochastic_rounding=st.booleans(),
        own_twin=st.booleans(),
        treatments=st.lists(st.sampled_from(["copy", "update", "keep"]), min_size=1, max_size=4),
    )
    def begin(self, spec, seed, mode, dtype, share_frozen, stochastic_rounding, own_twin, treatments):
        self.generator = torch.Generator().manual_seed(seed)
        self.spec, self.seed = spec, seed
        self.model = build(spec, seed)
        buffers = [name for name in map(self.first_name, ties(self.model)) if is_buffer(self.model, name)]
        if mode == "mapping":
            mode = dict(zip(buffers, treatments, strict=False))
        frozen = [one for one in self.model.parameters() if not one.requires_grad]
        self.options = {
            "handle_buffers": mode,
            "dtype": dtype,
            "share_frozen": share_frozen and bool(frozen),
            "stochastic_rounding": stochastic_rounding,
        }
        self.brings_twin = own_twin and dtype is None and not self.options["share_frozen"]
        self.make_handler()
        self.count = 0
        self.types = {name: one.dtype for name, one in tensors(self.twin).items()}
        for name, tensor in tensors(self.model).items():
            expected = tensor.dtype
            if dtype is not None and name not in self.shared and tensor.is_floating_point():
                expected = dtype
            if dtype is not None and name not in self.shared and tensor.is_complex():
                expected = torch.complex128 if dtype is torch.float64 else torch.complex64
            assert self.types[name] == expected, name
            assert bits(tensors(self.twin)[name]) == bits(tensor.detach().to(expected)), name

    def make_handler(self, state=None, attach_first=True):
        before = identity(self.model)
        twin = build(self.spec, self.seed + 2) if self.brings_twin else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "stochastic_rounding should find|.* has no finite value yet")
            self.handler = EMAHandler(self.model, 0.25, ema_model=twin, **self.options)
        self.trainer = Engine(lambda engine, batch: None)
        if attach_first:
            self.handler.attach(self.trainer)
        if state is None:
            self.handler.num_updates = 0  # says that it starts here: the model may be changed before the first run
        else:
            self.handler.load_state_dict(state)
        if not attach_first:
            self.handler.attach(self.trainer)
        assert identity(self.model) == before
        self.ties = ties(self.model)
        shares = self.options["share_frozen"]
        self.shared = {name for name, one in self.model.named_parameters(remove_duplicate=False)} if shares else set()
        self.shared = {name for name in self.shared if not tensors(self.model)[name].requires_grad}

    @property
    def twin(self):
        return self.handler.ema_model

    def first_name(self, group):
        """Of tied tensors the first that ``state_dict()`` has."""
        return next((name for name in group if name in self.model.state_dict()), group[0])

    def treatment(self, name):
        """What an update does with a tensor; of a tied one its first name decides."""
        first = self.first_name(next(group for group in self.ties if name in group))
        mode = self.handler.handle_buffers
        if name in self.shared:
            return "share"
        if not is_buffer(self.model, first):
            treatment = "update"
        elif isinstance(mode, dict):
            treatment = mode.get(first, "copy")
        elif mode == "statistics":
            treatment = "update" if first.endswith(("running_mean", "running_var")) else "copy"
        else:
            treatment = "keep" if mode == "ema_train" else mode
        held = tensors(self.twin)[name]
        is_number = held.is_floating_point() or held.is_complex()
        return "copy" if treatment == "update" and not is_number else treatment

    @rule(momentum=st.sampled_from(MOMENTA))
    def update(self, momentum):
        before = identity(self.model)
        held = {name: one.detach().clone() for name, one in tensors(self.twin).items()}
        self.trainer.state.ema_momentum = momentum
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A momentum of .* is too small for the type|The model has other weights than")
            self.trainer.run([0])
        self.count += 1
        assert identity(self.model) == before
        for name, one in tensors(self.twin).items():
            online, treatment = tensors(self.model)[name], self.treatment(name)
            copied = bits(online.detach().to(one.dtype))
            if treatment == "share":
                assert one is online
            elif treatment == "copy" or (treatment == "update" and momentum == 1):
                assert bits(one) == copied, name
            elif treatment == "keep" or momentum == 0 or bits(held[name]) == copied:
                assert bits(one) == bits(held[name]), name  # weights that are constant stay so to the bit
            else:
                assert_close(one, averaged(held[name], online, momentum), held[name], online, name)

    @rule(momentum=st.sampled_from(MOMENTA))
    def train_in_place(self, momentum):
        new = changed(self.model, self.generator)
        for name, tensor in tensors(self.model).items():
            if not is_expanded(tensor):
                tensor.data.copy_(new[name])
        self.update(momentum)

    @rule(assign=st.booleans())
    def load_into_the_model(self, assign):
        held = all_bits(self.twin)
        new = changed(self.model, self.generator, lambda name: assign or not is_expanded(tensors(self.model)[name]))
        if not assign and any(map(is_expanded, tensors(self.model).values())):
            return  # torch cannot write to these
        new = {name: new[name] for name in self.model.state_dict()}
        self.model.load_state_dict(new, assign=assign)
        retied(self.model, self.ties, new)
        assert {n: b for n, b in all_bits(self.twin).items() if n not in self.shared} == {
            name: one for name, one in held.items() if name not in self.shared
        }
        self.update(0.5)

    @rule(index=st.integers(0, 50), layout=st.sampled_from(LAYOUTS), momentum=st.sampled_from(MOMENTA))
    def rebind_memory(self, index, layout, momentum):
        if self.ties:
            tensor = tensors(self.model)[self.ties[index % len(self.ties)][0]]
            tensor.data = laid_out(values(tensor.shape, tensor.dtype, self.generator), layout)
            self.update(momentum)

    @rule(index=st.integers(0, 50), dtype=st.sampled_from(FLOATS), momentum=st.sampled_from(MOMENTA))
    def cast_one(self, index, dtype, momentum):
        floats = [group[0] for group in self.ties if tensors(self.model)[group[0]].is_floating_point()]
        floats = [name for name in floats if name not in self.shared]  # the twin's type would change with them
        if floats:
            tensor = tensors(self.model)[floats[index % len(floats)]]
            tensor.data = values(tensor.shape, dtype, self.generator)
            self.update(momentum)

    @precondition(lambda self: not self.options["share_frozen"])
    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    def cast_all(self, dtype):
        if not any(tensor.is_complex() for tensor in tensors(self.model).values()):
            self.model.to(dtype)
            retied(self.model, self.ties)  # of buffers, which it replaces one by one
            self.update(0.5)

    @rule(index=st.integers(0, 50), momentum=st.sampled_from(MOMENTA))
    def register_a_buffer_again(self, index, momentum):
        buffers = [group for group in self.ties if is_buffer(self.model, group[0])]
        if buffers:
            chosen = buffers[index % len(buffers)]
            old = tensors(self.model)[chosen[0]]
            new = values(old.shape, old.dtype, self.generator)
            for name in chosen:
                path, _, key = name.rpartition(".")
                setattr(self.model.get_submodule(path), key, new)
            self.update(momentum)

    @rule(how=st.sampled_from(["in place", "memory of the model", "expanded memory"]))
    def load_into_the_twin(self, how):
        before = all_bits(self.model)
        if how != "in place" and not self.shared:  # the twin has memory of its own again after the update
            new = {name: one.detach().to(self.types[name]) for name, one in tensors(self.model).items()}
            if how == "expanded memory":
                new = {name: laid_out(one.clone(), "expanded") for name, one in new.items()}
            self.twin.load_state_dict({name: new[name] for name in self.twin.state_dict()}, assign=True)
            retied(self.twin, self.ties, self.twin.state_dict())
        else:
            new = self.loaded_anew()
        for name in self.twin.state_dict().keys() & new.keys():
            assert bits(tensors(self.twin)[name]) == bits(new[name])
        assert all_bits(self.model) == before
        self.update(0.25)

    def loaded_anew(self):
        """Random values into all of the twin that is its own and in its state_dict, in place."""
        names = self.twin.state_dict().keys() - self.shared
        new = {name: one for name, one in changed(self.twin, self.generator).items() if name in names}
        self.twin.load_state_dict(new, strict=False)
        return new

    @rule(spoilt=st.sampled_from([torch.nan, torch.inf]))
    def a_momentum_of_1_heals(self, spoilt):
        for name, tensor in tensors(self.twin).items():
            is_number = tensor.is_floating_point() or tensor.is_complex()
            if is_number and self.treatment(name) in ("update", "copy"):
                tensor.data.fill_(spoilt if tensor.dtype.itemsize > 1 else torch.nan)  # 8 bits may have no infinity
        self.update(1.0)

    @rule(fails=st.booleans())
    def swap(self, fails):
        before, held = identity(self.model), all_bits(self.twin)
        try:
            with self.handler.swapped():
                for name, one in tensors(self.model).items():
                    assert bits(one) == bits(tensors(self.twin)[name].to(one.dtype)), name
                    assert (id(one), one.requires_grad) == (before[name][0], before[name][3])
                for part, other in zip(self.model.modules(), self.twin.modules(), strict=True):
                    if parametrize.is_parametrized(part) and self.is_of_one_type(part, other):
                        assert torch.equal(part.weight, other.weight)
                if set(before) - self.shared:  # else there is nothing that could be marked
                    with pytest.raises(RuntimeError, match="holds averaged weights now"):
                        self.handler.reset()
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert identity(self.model) == before
        assert all_bits(self.twin) == held

    def is_of_one_type(self, *modules):
        return {one.dtype for module in modules for one in tensors(module).values()} == {torch.float32}

    @rule(buffers_only=st.booleans())
    def reset(self, buffers_only):
        before, held = identity(self.model), all_bits(self.twin)
        self.handler.reset(buffers_only=buffers_only)
        self.count = self.count if buffers_only else 0
        assert identity(self.model) == before
        for name, one in tensors(self.twin).items():
            is_reset = not buffers_only or is_buffer(self.model, next(g[0] for g in self.ties if name in g))
            online = tensors(self.model)[name]
            assert bits(one) == (bits(online.detach().to(one.dtype)) if is_reset else held[name]), name

    @rule(attach_first=st.booleans(), momentum=st.sampled_from(MOMENTA[1:]))
    def save_and_resume(self, attach_first, momentum):
        self.trainer.state.ema_momentum = momentum
        file, held = io.BytesIO(), all_bits(self.twin)
        torch.save({"model": self.model.state_dict(), "ema_handler": self.handler.state_dict()}, file)
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        model = build(self.spec, self.seed + 1)  # of other values
        model.load_state_dict(saved["model"], assign=True)
        retied(model, self.ties, saved["model"])
        for name, tensor in tensors(model).items():  # types as they were when the first handler was made
            if tensor.is_floating_point() and name not in self.shared:
                tensor.data = tensor.data.to(tensors(build(self.spec, self.seed))[name].dtype)
        self.model = model
        self.make_handler(saved["ema_handler"], attach_first)
        assert self.trainer.state.ema_momentum == momentum
        assert self.handler.num_updates == self.count
        in_state = saved["ema_handler"]["averaged_tensors"].keys()
        kept = {name for group in self.ties for name in group if in_state & set(group)}
        assert kept >= self.model.state_dict().keys() - self.shared
        assert {name: all_bits(self.twin)[name] for name in kept} == {name: held[name] for name in kept}

    @rule()
    def load_averaged(self):
        state = {name: tensor.clone() for name, tensor in self.twin.state_dict().items()}
        self.loaded_anew()
        held = all_bits(self.twin)
        if state:
            self.handler.load_averaged({"ema_model": state}, num_updates=self.count)
        for group in self.ties:
            saved = next((name for name in group if name in state), None)
            for name in group:
                assert bits(tensors(self.twin)[name]) == (held[name] if saved is None else bits(state[saved])), name

    @rule()
    def a_broken_tie_raises_and_changes_nothing(self):
        tied = [group for group in self.ties if not self.is_one_place(group) and group[0] not in self.shared]
        if not tied:
            return
        owner, key = named(self.model)[tied[0][-1]]
        tensor, held = owner[key], all_bits(self.twin)
        owner[key] = (
            tensor.clone() if not isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.data.clone(), False)
        )
        with pytest.raises(RuntimeError, match="is tied to|is in the model but|was frozen"):
            self.handler.average.update(0.5)
        assert all_bits(self.twin) == held
        owner[key] = tensor

    def is_one_place(self, group):
        return len({(id(owner), key) for owner, key in map(named(self.model).__getitem__, group)}) == 1

    @invariant()
    def what_always_holds(self):
        if not hasattr(self, "handler"):
            return
        twin, model = tensors(self.twin), tensors(self.model)
        assert twin.keys() == model.keys()
        assert ties(self.twin) == ties(self.model) == self.ties
        assert {name: one.dtype for name, one in twin.items()} == self.types
        assert not any(one.requires_grad for one in twin.values())
        assert {name for name, one in twin.items() if one is model[name]} == self.shared
        common = storages(self.twin).keys() & storages(self.model).keys()
        assert {storages(self.twin)[place] for place in common} <= self.shared
        assert self.twin.training == (self.handler.handle_buffers == "ema_train")
        assert self.handler.num_updates == self.count


TestAveraging = Averaging.TestCase
TestAveraging.settings = settings(max_examples=settings.default.max_examples // 3, stateful_step_count=12)


# Files


@given(spec=module_specs(depth=1), suffix=st.sampled_from([".pt", ".pth", ".safetensors"]))
@settings(max_examples=settings.default.max_examples // 3, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tensors_are_loaded_as_they_were_saved(spec, suffix, tmp_path):
    model = build(spec)
    kept = {
        name: one for name, one in tensors(model).items() if suffix != ".safetensors" or one.dtype in IN_SAFETENSORS
    }
    path = tmp_path / f"file{suffix}"
    save_file(kept, path, force=True)
    loaded = load_file(path)
    assert {name: bits(one) for name, one in loaded.items()} == {name: bits(one) for name, one in kept.items()}
    if suffix != ".safetensors":
        assert list(loaded) == list(kept)
