import json

import pytest
import torch

from tests.benchmarks.__main__ import main
from tests.benchmarks.models import MODELS
from tests.benchmarks.peers import EVENT, LIMIT, OURS, PEERS, Unavailable


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "buffers"),
    [
        ("mlp", 8_970, 6, 0),
        ("many", 984_000, 1_200, 0),
        ("resnet50", 25_557_032, 161, 159),
        ("gpt2", 124_439_808, 148, 0),
        ("gpt2-bfloat16", 124_439_808, 148, 0),
    ],
)
def test_models_have_the_published_numbers_of_tensors(name, parameters, tensors, buffers):
    with torch.device("meta"):
        model = MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors
    assert len(list(model.buffers())) == buffers
    dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
    assert all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("peer", sorted(PEERS.keys() - {LIMIT}))
def test_peers_leave_the_model_as_it_is(peer):
    model = MODELS["mlp"]()
    before = [p.clone() for p in model.parameters()]
    try:
        PEERS[peer](model)()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("peer", sorted(PEERS.keys() - {LIMIT, EVENT}))
def test_peers_hold_the_average_in_float32_or_say_that_they_cannot(peer):
    if peer in (OURS, "timm"):
        PEERS[peer](MODELS["mlp"]().bfloat16())()
        return
    with pytest.raises(Unavailable, match="is not installed|cannot hold the average in float32"):
        PEERS[peer](MODELS["mlp"]().bfloat16())


def test_figures_are_written(tmp_path):
    file = tmp_path / "figures.json"
    main(["--models", "mlp", "--rounds", "2", "--json", str(file)])
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert figures.keys() == {
        *("date", "machine", "cpu", "cores", "threads", "python", "torch", "ignite", "ignite_ema", "rounds", "models")
    }
    assert figures["models"].keys() == {"mlp"}
    mlp = figures["models"]["mlp"]
    assert (mlp["parameters"], mlp["parameter_tensors"], mlp["buffer_tensors"]) == (8_970, 6, 0)
    assert mlp["peers"].keys() | mlp["missing"].keys() == PEERS.keys()
    for figure in mlp["peers"].values():
        assert figure.keys() == {"batch", "ms", "to_ours", "to_limit"}
        assert all(figure[key].keys() == {"q1", "median", "q3"} for key in ("ms", "to_ours", "to_limit"))
    assert mlp["peers"][OURS]["to_ours"]["median"] == 1
    assert mlp["swap"]["ms"].keys() == {"q1", "median", "q3"}
    assert (mlp["swap"]["peak"], mlp["swap"]["left"]) == (1, 0)  # copies of the model
    assert list(tmp_path.iterdir()) == [file]


def test_figures_are_overwritten_on_demand_only(tmp_path, capsys):
    file = tmp_path / "figures.json"
    file.write_text("precious", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--models", "mlp", "--rounds", "2", "--json", str(file)])
    assert f"{file} exists; pass --force" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "precious"
    main(["--models", "mlp", "--rounds", "2", "--json", str(file), "--force"])
    assert json.loads(file.read_text(encoding="utf-8"))["rounds"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "--rounds should be at least 2, got 1"),
        (["--force"], "--force should come with --json FILE"),
        (["--json", "/does/not/exist/figures.json"], "--json should name a file in a directory that exists"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
