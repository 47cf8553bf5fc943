"""Averages are found by format, then by name; what is left to choose is asked for."""

import pytest
import torch
from torch import nn

from ignite_ema import EMAHandler
from ignite_ema.checkpoints import read
from tests.helpers.peer_files import equal, gan, prefixed, state

ONE = torch.ones(1)
A, B, C, D = (state(fill) for fill in (1, 2, 3, 4))
WRAPPED = prefixed("module.", B)
MOCO = prefixed("encoder.", A) | prefixed("encoder_ema.", B)
MOCO_AVERAGED = prefixed("encoder.", C) | prefixed("encoder_ema.", D)
THREE = {"state_dict": A, "state_dict_ema": B, "model_ema": C}
AVERAGES = (
    *("ema_model", "model_ema", "EMA", "ema", "ema2", "generator-ema.1", "modelEMA", "netEMA", "emaModel"),
    *("EMAModel", "swa_state_dict", "averaged", "model_avg"),
)
TWO = {"g": A, "d": B, "ema_g": C, "ema_d": D}
DRY = {"a.weight": torch.zeros(2, 2)}
META = {name: tensor.to("meta") for name, tensor in A.items()}

# A file, a key, and what is found: the system, the average, the raw weights.
FOUND = [
    ({"state_dict": gan()}, "d_ema", "mmagic", D, C),
    ({"state_dict": gan()}, "state_dict.d_ema", "mmagic", D, C),
    ({"state_dict_ema": B, "state_dict": A}, "timm", "timm", B, A),
    (THREE, None, "timm", B, A),  # a format comes before a name
    (THREE, "state_dict_ema", "timm", B, A),
    # Raw weights are those of the same name, or of a model's usual one, if they match.
    (TWO, "ema_d", "Ignite", D, B),
    ({"netG": A, "netD": B, "netGEma": C, "netDEma": D}, "netDEma", "Ignite", D, B),
    ({"one": A, "two": B, "ema": C}, None, "Ignite", C, None),
    ({"one": A, "model": B, "ema": C}, None, "Ignite", C, B),
    ({"state_dict_ema": A, "state_dict": DRY}, None, "timm", A, None),
    ({"state_dict_ema": A, "state_dict": META}, None, "timm", A, None),  # without values
    ({"state_dict_ema": A, "state_dict": A | {"a.bias": torch.zeros(3)}}, None, "timm", A, None),
    # A wrapper's prefix goes where the model beside it is not wrapped.
    ({"model": prefixed("_orig_mod.", A), "swa": B}, None, "Ignite", B, ...),
    ({"model": prefixed("module.", A), "swa": B}, None, "Ignite", B, ...),
    ({"model": A, "ema_a": WRAPPED, "ema_b": prefixed("module.", C)}, "ema_b", "Ignite", C, A),
    (WRAPPED, None, "plain", WRAPPED, None),
    ({"ema": WRAPPED, "optimizer": {}}, None, "Ignite", WRAPPED, None),
    ({"ema": WRAPPED, "model": prefixed("module.", A)}, None, "Ignite", WRAPPED, prefixed("module.", A)),
    ({"ema": WRAPPED, "model": A}, None, "Ignite", B, A),
    (prefixed("module.", WRAPPED) | {"n_averaged": torch.tensor(1)}, None, "torch AveragedModel", WRAPPED, None),
    # Parts of a model that are averages themselves, and twins under other names.
    ({"model": MOCO, "ema_model": MOCO_AVERAGED}, "ema_model", "Ignite", MOCO_AVERAGED, MOCO),
    ({"model": MOCO, "ema_model": MOCO_AVERAGED}, "ema_model.encoder_ema", "mmagic", D, ...),
    ({"state_dict": MOCO, "state_dict_ema": MOCO_AVERAGED}, None, "timm", MOCO_AVERAGED, MOCO),
    ({"model": A, "ema": {"decay": 0.9, "shadow": B}}, "shadow", ..., B, A),
    ({"model": A, "teacher": B}, "model", "plain", A, ...),
    ({"ema_model": B, "ema_handler": EMAHandler(nn.Linear(2, 2)).state_dict()}, "ema_model", "Ignite", B, None),
    # Names that are like those of a system.
    *(
        (file, None, "plain", file, None)
        for file in (
            {"module.weight": ONE, "n_averaged": torch.tensor(7), "head.weight": ONE},
            prefixed("g_ema.", A) | {"g.a.weight": torch.zeros(2, 2)},
            {"ema.x_ema": ONE, "ema.x": ONE},
            A | {"ema_decay": ONE},
            A | {"ema_a_bias": torch.zeros(3)},
        )
    ),
    ({"model": A, "statistics": {"mean": ONE}}, None, "plain", A, None),
    ({"model": A, "statistics": {"mean": ONE}}, "statistics", "plain", {"mean": ONE}, None),
    ({"epoch": 3, "weights": A, "optimizer": {"state": {0: {"step": 1}}}}, None, "plain", A, None),
    *(({name: B, "model": A, "trainer": {"iteration": 3}}, None, "Ignite", B, A) for name in AVERAGES),
    *(
        ({name: {"loss": ONE}, "model": A}, None, "plain", A, None)
        for name in ("schema", "remark", "cinema", "emanation", "avg_loss", "swap")
    ),
]


@pytest.mark.parametrize(("file", "key", "system", "averaged", "online"), FOUND)
def test_what_is_found(file, key, system, averaged, online):
    found = read(file, key=key)
    assert system in (..., found.system)
    assert averaged is ... or equal(found.tensors, averaged)
    assert online is ... or (found.online is None if online is None else equal(found.online, online))


SEVERAL = [
    (gan(), None, r"got several.*'g_ema' \(mmagic\), 'd_ema' \(mmagic\)\.$"),
    ({"state_dict": gan()}, "x_ema", "key should be one of 'state_dict.g_ema'.*got 'x_ema'"),
    ({"state_dict_ema": B, "state_dict": A}, "state_dict", "key should be one of 'state_dict_ema'.*got 'state_dict'"),
    ({"shadow_params": [ONE], "num_updates": 3, "state_dict_ema": B}, None, "_ema' .timm., 'torch_ema' .torch_ema."),
    ({"model": A, "ema_a": B, "ema_b": C}, None, "'ema_a' .Ignite., 'ema_b' .Ignite."),
    (
        {"model": MOCO, "ema_model": MOCO_AVERAGED},
        None,
        "'model.encoder_ema' .mmagic., 'ema_model.encoder_ema' .*, 'ema_model' .Ignite",
    ),
    ({f"ema_{x}": EMAHandler(nn.Linear(2, 2)).state_dict() for x in "gd"}, None, "'ema_g' .ignite_ema., 'ema_d' .ign"),
    ({"model": A, "ema": {"shadow": B}}, None, "'model' .plain., 'ema.shadow' .plain."),
    ({"one": A, "two": {"mean": ONE}}, None, "got several.*'one' .plain., 'two' .plain."),
    *(
        ({"model": A, name: twin}, None, f"several.*'model' .plain., '{name}' .plain.")
        for name, twin in (("shadow", B), ("teacher", B), ("means", DRY), ("emamodel", B))
    ),
]


@pytest.mark.parametrize(("file", "key", "message"), SEVERAL)
def test_what_needs_another_key(file, key, message):
    with pytest.raises(ValueError, match=message):
        read(file, key=key)


def test_many_state_dicts_are_listed_in_part_and_soon():
    states = {f"{head}{i}": {f"n{j}": torch.ones(1) for j in range(100)} for i in range(200) for head in ("ema", "k")}
    with pytest.raises(ValueError, match=r"got several.*\(200 in all\)") as info:
        read(states)
    assert len(str(info.value)) < 500
