"""Averages are told from other state dicts by name, shape and value, in time that is linear in the file."""

import time

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ignite_ema.checkpoints import averaged_state_dict, read
from tests.helpers.peer_files import equal, prefixed

ONE = torch.ones(1)


def state(fill):
    return {"a.weight": torch.full((2, 2), fill), "a.bias": torch.full((2,), fill)}


# --- cost ---


def mapping(count, fill=1.0):
    return {f"n{index}": torch.full((1,), fill) for index in range(count)}


SHARED, BIG = mapping(3000), torch.zeros(2**20)
LATE = BIG.index_fill(0, torch.tensor([-1 % BIG.numel()]), 1.0)  # differs at the end alone
CROWDED = {
    "long names": lambda: {"x" * 4600 + f"{i}{end}": {"a": ONE} for i in range(400) for end in ("", "_ema")},
    "many twins": lambda: {f"h{i}{end}.w": ONE for i in range(10_000) for end in ("", "_ema")},
    "mmcv": lambda: {f"{head}a{i}": ONE for i in range(10_000) for head in ("", "ema_")},
    "one average under many names": lambda: {f"ema{i}": SHARED for i in range(3000)},
    "one state dict under many names": lambda: {f"k{i}": SHARED for i in range(3000)},
    "many averages": lambda: {f"ema{i}": mapping(100, i) for i in range(200)},
    "many means": lambda: {f"avg{i}": mapping(100, i) for i in range(200)},
    "many state dicts": lambda: {f"k{i}": mapping(100, i) for i in range(200)},
    "large tensors again and again": lambda: {"ema": {"w": LATE}} | {f"ema{i}": {"w": BIG} for i in range(9000)},
    "long words": lambda: {"A" * 10**5: state(1.0), "aA" * 10**5: state(2.0)},
}


@pytest.mark.parametrize("kind", CROWDED)
def test_time_is_linear_in_the_file(kind):
    content = CROWDED[kind]()
    start = time.process_time()
    try:
        read(content)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    assert time.process_time() - start < 4
    assert len(message) < 2500


# --- names ---


def test_a_name_that_ends_like_the_one_of_torch_compile_stays():
    names = ["_orig_mod.my_orig_mod.w", "a._orig_mod._orig_mod.b", "_orig_model.c"]
    assert list(read({"ema": dict.fromkeys(names, ONE)}).tensors) == ["my_orig_mod.w", "a.b", "_orig_model.c"]


FORGED = "a\n\x1b[2Jdistance  0.000e+00  all\u202e"


@pytest.mark.parametrize(
    "content",
    [
        {FORGED: 3},
        {FORGED: state(1.0), FORGED + "b": state(2.0)},
        {"ema": {FORGED: 3, "w": ONE}},
        {"ema": {FORGED: torch.zeros(1, device="meta")}},
        {"ema": {FORGED: torch.zeros(1).expand(10**9)}},
        {"ema_" + FORGED: state(1.0), "ema": state(2.0)},
    ],
)
def test_names_in_messages_are_quoted(content):
    with pytest.raises(ValueError, match=r"'(ema_)?a\\n\\x1b\[2Jdistance  0.000e\+00  all\\u202e") as info:
        read(content)
    assert str(info.value).isprintable()


def wrapped():
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    average = AveragedModel(nn.ModuleDict({"module": model}))  # the names of DDP(model)
    return model, {"average": average.state_dict(), "model": prefixed("module.", model.state_dict())}


def test_a_prefix_is_taken_off():
    model, file = wrapped()
    assert list(read(file).tensors) == ["module.weight", "module.bias"]
    found = read(file, strip_prefix="module.")
    assert equal(found.tensors, dict(model.state_dict()))
    assert list(found.online) == ["weight", "bias"]
    model.load_state_dict(averaged_state_dict(file, strip_prefix="module."))


@pytest.mark.parametrize("prefix", ["model.", "module.weight."])
def test_a_prefix_that_some_names_lack_is_refused(prefix):
    with pytest.raises(ValueError, match=f"strip_prefix should begin all names .*, got '{prefix}', which does not beg"):
        read(wrapped()[1], strip_prefix=prefix)


@pytest.mark.parametrize("prefix", ["", "module", "modul", "."])
def test_a_prefix_of_part_of_a_component_is_refused(prefix):
    with pytest.raises(ValueError, match=r"^strip_prefix should [^\n]*, got '.*; "):
        read(wrapped()[1], strip_prefix=prefix)


def test_a_prefix_that_is_no_text_is_refused():
    with pytest.raises(TypeError, match="strip_prefix should be text such as 'module.', got int; leave it out"):
        read(wrapped()[1], strip_prefix=3)


# --- values ---


def test_averages_with_nan_that_are_bit_for_bit_the_same_are_one():
    nan = {"w": torch.tensor([float("nan"), 1.0])}
    assert read({"ema_a": nan, "ema_b": {"w": nan["w"].clone()}}).system == "Ignite"


def test_repr_is_one_line_without_tensors():
    assert repr(read({"model": state(1.0), "ema": state(2.0)})) == (
        "Averaged(Ignite, 2 tensors, 0.000 MiB, raw weights, num_updates=unknown)"
    )


@pytest.mark.parametrize("count", [10**29, -1, torch.tensor(-3)])
def test_counts_that_cannot_be(count):
    with pytest.raises(ValueError, match="'n_averaged' should be a number of updates, from 0 to 2..63 - 1, got"):
        read({"module.w": ONE, "n_averaged": count})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_named(layout):
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=layout)
    with pytest.raises(ValueError, match="'w' of the weights in source should be a plain tensor, got a nested one"):
        read({"ema": {"w": nested}, "model": {"w": nested}})


def test_raw_weights_are_checked_as_the_average_is():
    huge = torch.zeros(1).expand(10**10)
    with pytest.raises(ValueError, match="should have memory for its shape"):
        read({"ema": {"w": huge}, "model": {"w": huge}})
    raw = {"w": torch.zeros(2), "_orig_mod.w": torch.zeros(2)}
    assert torch.equal(read({"ema": {"w": torch.ones(2)}, "model": raw}).tensors["w"], torch.ones(2))


def test_wrapped_averages_beside_one_plain_model():
    file = {"model": state(1.0), "ema_a": prefixed("module.", state(2.0)), "ema_b": prefixed("module.", state(3.0))}
    found = read(file, key="ema_b")
    assert equal(found.tensors, state(3.0))
    assert equal(found.online, state(1.0))
