"""Random models under random sequences of operations, against a slow plain model of what should hold.

The plain model knows nothing of the library: it lists tensors by their names, computes in float64, one tensor at a
time, and compares after each operation. 33 examples by default; ``--hypothesis-profile nightly`` runs 666.
"""

import copy
import warnings
from random import Random

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from ignite.engine import Engine
from torch import nn
from torch.nn.utils import parametrizations

from ignite_ema import EMAHandler
from tests.helpers.bits import bits, wide
from tests.helpers.files import reloaded

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
TYPES = [*FLOATS, torch.complex64, torch.complex128, torch.int8, torch.int64, torch.uint8, torch.bool]
SHAPES = [(), (0,), (1,), (3,), (2, 3), (2, 0, 3), (2, 1, 2)]
MOMENTA = [0.0, 1e-3, 0.1, 0.25, 0.5, 0.9, 1.0]


LAYERS = {
    "holder": nn.Module,
    "norm": lambda: nn.BatchNorm1d(3),
    "LSTM": lambda: nn.LSTM(2, 2),
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


def made_tensor(random, generator, is_parameter):
    dtype, trains = random.choice([*FLOATS[:3] * 4, *TYPES]), random.random() < 0.5
    infinite = random.random() < 0.5 and not (is_parameter and trains)
    tensor = values(random.choice(SHAPES), dtype, generator, infinite)
    if not is_parameter:
        return tensor
    return nn.Parameter(tensor, requires_grad=trains and (dtype.is_floating_point or dtype.is_complex))


def built(random, generator, known, modules, depth=2):
    """A random module: tensors of all types, some of them tied, layers, and modules that are there twice."""
    if modules and random.random() < 0.25:
        return random.choice(modules)
    module = LAYERS[random.choice(["holder", "holder", *LAYERS])]()
    for index in range(random.randint(0, 3)):
        kind = random.choice(["parameter", "parameter", "buffer", "non-persistent buffer"])
        others = known["parameter" if kind == "parameter" else "buffer"]
        is_tied = others and random.random() < 0.3
        tensor = random.choice(others) if is_tied else made_tensor(random, generator, kind == "parameter")
        others.append(tensor)
        if kind == "parameter":
            module.register_parameter(f"p{index}", tensor)
        else:
            module.register_buffer(f"b{index}", tensor, persistent=kind == "buffer")
    module.register_parameter("none", None)
    for index in range(random.randint(0, 3) if depth else 0):
        module.add_module(f"m{index}", built(random, generator, known, modules, depth - 1))
    modules.append(module)
    return module


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


def move(model, generator):
    """New values for three of four tensors; tied ones get the same."""
    for index, (name, *_) in enumerate(ties(model)):
        tensor = tensors(model)[name]
        if index % 4 != 3:
            tensor.data.copy_(values(tensor.shape, tensor.dtype, generator))


def assert_averaged(tensor, before, online, momentum, name, is_buffer):
    """(1 - λ) · average + λ · weights, within two roundings of the type that holds it, of the larger of the two."""
    step = torch.finfo(tensor.dtype)
    old, new, found = wide(before), wide(online.detach().to(before.dtype)), wide(tensor)
    expected = torch.where(old == new, old, old * (1 - momentum) + new * momentum)
    if is_buffer:  # copied until it is finite
        expected = torch.where(old.isfinite(), expected, new)
    size = torch.maximum(old.abs(), wide(online.detach()).abs()).nan_to_num(0, 0)
    same = (found == expected) | (found.isnan() & expected.isnan())
    apart = (found - expected).abs().nan_to_num(torch.inf)
    assert bool((same | (apart <= 2 * step.eps * size + step.smallest_normal)).all()), name


class Averaging(RuleBasedStateMachine):
    """A handler of a random model, attached to an engine of which each run is one iteration."""

    @initialize(
        seed=st.integers(0, 2**32),
        mode=st.sampled_from(["copy", "update", "statistics", "ema_train", "mapping"]),
        dtype=st.sampled_from([None, None, torch.float32, torch.float64, torch.bfloat16]),
        share_frozen=st.booleans(),
        stochastic_rounding=st.booleans(),
        own_twin=st.booleans(),
        treatments=st.lists(st.sampled_from(["copy", "update", "keep"]), min_size=1, max_size=4),
    )
    def begin(self, seed, mode, dtype, share_frozen, stochastic_rounding, own_twin, treatments):
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = built(Random(seed), self.generator, {"parameter": [], "buffer": []}, [])
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
        twin = None
        if self.brings_twin:
            twin = copy.deepcopy(self.model)
            move(twin, self.generator)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "stochastic_rounding should find|There is no finite value yet")
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
            warnings.filterwarnings("ignore", "A momentum of .* is too small|The model has other weights than")
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
                first = self.first_name(next(group for group in self.ties if name in group))
                assert_averaged(one, held[name], online, momentum, name, is_buffer(self.model, first))

    @rule(momentum=st.sampled_from(MOMENTA))
    def train_in_place(self, momentum):
        move(self.model, self.generator)
        self.update(momentum)

    @rule(fails=st.booleans())
    def swap(self, fails):
        before, held = identity(self.model), all_bits(self.twin)
        try:
            with self.handler.swapped():
                for name, one in tensors(self.model).items():
                    assert bits(one) == bits(tensors(self.twin)[name].to(one.dtype)), name
                    assert (id(one), one.requires_grad) == (before[name][0], before[name][3])
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert identity(self.model) == before
        assert all_bits(self.twin) == held

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
        held = all_bits(self.twin)
        saved = reloaded({"model": self.model.state_dict(), "ema_handler": self.handler.state_dict()})
        self.model = copy.deepcopy(self.model)
        move(self.model, self.generator)
        self.model.load_state_dict(saved["model"])
        self.make_handler(saved["ema_handler"], attach_first)
        assert self.trainer.state.ema_momentum == momentum
        assert self.handler.num_updates == self.count
        in_state = saved["ema_handler"]["averaged_tensors"].keys()
        kept = {name for group in self.ties for name in group if in_state & set(group)}
        assert kept >= self.model.state_dict().keys() - self.shared
        assert {name: all_bits(self.twin)[name] for name in kept} == {name: held[name] for name in kept}

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
