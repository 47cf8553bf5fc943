"""``inspect`` and ``export``: what they print, what they write, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch

from ignite_ema import EMAHandler
from ignite_ema.checkpoints import load_file
from tests.helpers.files import files_in
from tests.helpers.peer_files import diffusers, equal, gan, ignite_ema, made, mmagic, prefixed, state


def layers(fill):
    return dict.fromkeys(("a.weight", "b.c.bias"), torch.full((2,), float(fill)))


# A distance of 0.5 in one layer, 0.25 in another, and none in a third.
MODEL = {
    "a.weight": torch.tensor([2.0, 0.0]),
    "a.bias": torch.tensor([0.0]),
    "b.c.weight": torch.tensor([4.0, 0.0], dtype=torch.bfloat16),
    "d": torch.tensor([1.0 + 0.0j]),
    "e.count": torch.tensor(3),
}
AVERAGED = {
    "a.weight": torch.tensor([2.0, 1.0]),
    "b.c.weight": torch.tensor([4.0, 1.0], dtype=torch.bfloat16),
    "e.count": torch.tensor(99),
}
FILE = {"model": MODEL, "ema_model": MODEL | AVERAGED, "trainer": {"iteration": 3}}


@pytest.mark.parametrize("maker", [ignite_ema, diffusers, mmagic], ids=lambda maker: maker.__name__)
def test_files_of_other_systems(maker, command):
    peer = made(maker)
    options = [*(["--key", peer.key] if peer.key else []), *(["--names", "names.pt"] if peer.names else [])]
    arguments = [peer.path, *options]
    torch.save(peer.names, "names.pt")
    code, out, err = command("inspect", *arguments)
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if "distance" not in line)
    assert (code, err, lines["file"], lines["format"]) == (0, "", repr(str(peer.path)), peer.system)
    assert lines["tensors"].startswith(f"{len(peer.tensors)} (")
    assert lines["updates"] == ("not stated" if peer.num_updates is None else str(peer.num_updates))
    code, out, err = command("export", *arguments, "out.pt")
    assert (code, err) == (0, "")
    assert out.startswith(f"'out.pt': {len(peer.tensors)} tensors, 0.0")
    assert out.endswith(f" MiB, averaged by {peer.system}\n")
    assert equal(load_file("out.pt"), peer.tensors)
    assert files_in(Path()) == ["names.pt", "out.pt"]


def test_inspect(command):
    assert command("inspect", "file.pt", file=FILE)[1].splitlines() == [
        "file      'file.pt'",
        "format    Ignite",
        "tensors   5 (2 float32, 1 bfloat16, 1 complex64, 1 int64)",
        "size      0.000 MiB",
        "updates   not stated",
        "distance  3.086e-01  all",  # sqrt((1 + 1) / (4 + 16 + 1))
        f"distance  5.000e-01  'a'     {'#' * 40}",
        f"distance  2.500e-01  'b.c'   {'#' * 20}",
        "distance  0.000e+00  (root)",
    ]


def test_inspect_as_json(command):
    file = {"model": layers(1) | {"n": torch.tensor(2)}, "ema": layers(2) | {"n": torch.tensor(3)}}
    assert json.loads(command("inspect", "file.pt", "--json", file=file)[1]) == {
        "file": "file.pt",
        "format": "Ignite",
        "tensors": 3,
        "types": {"float32": 2, "int64": 1},
        "bytes": 24,
        "num_updates": None,
        "lacks": [],
        "distance": 1.0,
        "layers": {"a": 1.0, "b.c": 1.0},
    }


def test_distances_without_a_ratio(command):
    model = {"a.w": torch.zeros(1), "b.w": torch.ones(1), "c.w": torch.ones(1), "d.w": torch.zeros(1)}
    ema = {"a.w": torch.ones(1), "b.w": torch.tensor([float("nan")]), "c.w": torch.tensor([2.0]), "d.w": torch.zeros(1)}
    lines = command("inspect", "file.pt", file={"model": model, "ema": ema})[1].splitlines()[-5:]
    assert [line.split()[1] for line in lines] == ["nan", "inf", "nan", "1.000e+00", "0.000e+00"]
    assert [line.count("#") for line in lines] == [0, 0, 0, 40, 0]
    shown = json.loads(command("inspect", "file.pt", "--json")[1])
    assert (shown["distance"], shown["layers"]) == (None, {"a": None, "b": None, "c": 1.0, "d": 0.0})


def test_a_plain_file_has_no_average_and_is_exported_all_the_same(command):
    weights = {"w": torch.zeros(2**20)}
    out = command("inspect", "file.pt", file=weights)[1]
    assert "format    plain (no average)\n" in out
    assert "size      4.000 MiB\n" in out
    assert out.endswith("distance  not known: the file has no averaged and raw weights side by side\n")
    shown = json.loads(command("inspect", "file.pt", "--json")[1])
    assert (shown["format"], shown["distance"], shown["layers"]) == ("plain", None, None)
    said = "'out.pt': 1 tensors, 4.000 MiB, plain weights: the file has no average\n"
    assert command("export", "file.pt", "out.pt") == (0, said, "")
    assert equal(load_file("out.pt"), weights)


def test_inspect_lists_several_averages(command):
    file = {"model": layers(1), "ema_a": layers(1), "ema_b": layers(0), "shadow": layers(0)}
    assert command("inspect", "file.pt", file=file) == (
        0,
        "'file.pt' has several averages; choose one by its key: --key, or its last part\n"
        "'ema_a'  Ignite  2 tensors\n'ema_b'  Ignite  2 tensors\n",
        "",
    )
    shown = json.loads(command("inspect", "file.pt", "--json", file={"state_dict": gan()})[1])["averages"]
    keys = "state_dict.g_ema", "state_dict.d_ema"
    assert [(one["key"], one["format"], one["tensors"]) for one in shown] == [(key, "mmagic", 2) for key in keys]
    for key in keys:
        assert command("inspect", "file.pt", "--key", key)[0] == 0


def test_sparse_tensors(command):
    model = {"a": torch.eye(2).to_sparse(), "b": torch.ones(1)}
    out = command("inspect", "file.pt", file={"model": model, "ema": model | {"b": torch.zeros(1)}})[1]
    assert "distance  5.774e-01  all" in out  # sqrt(1 / 3)
    assert command("export", "file.pt", "out.pt")[0] == 0
    assert torch.equal(load_file("out.pt")["a"].to_dense(), torch.eye(2))


def test_inspect_of_an_average_that_lacks_frozen_tensors(command):
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    model[0].requires_grad_(False)
    out = command("inspect", "file.pt", file=EMAHandler(model, share_frozen=True).state_dict())[1]
    assert "lacks     '0.weight', '0.bias': frozen, and shared with the model; --base has them\n" in out
    assert json.loads(command("inspect", "file.pt", "--json")[1])["lacks"] == ["0.weight", "0.bias"]
    torch.save(model.state_dict(), "base.pt")
    out = command("inspect", "file.pt", "--base", "base.pt")[1]
    assert "lacks" not in out
    assert "tensors   4 (4 float32)\n" in out


def test_several_averages_in_one_export_or_none(command):
    torch.save({"state_dict": gan()}, "file.pt")
    code, _, err = command("export", "file.pt", "out_{}.pt", "--key", "g_ema", "--key", "x_ema")
    assert (code, "key should be one of" in err, files_in(Path())) == (1, True, ["file.pt"])
    Path("out_d_ema.pt").touch()
    arguments = ["export", "file.pt", "out_{}.pt", "--key", "g_ema", "--key", "d_ema"]
    code, _, err = command(*arguments)
    assert (code, "'out_d_ema.pt' exists already" in err, files_in(Path())) == (1, True, ["file.pt", "out_d_ema.pt"])
    _, out, _ = command(*arguments, "--force")
    assert [line.partition(":")[0] for line in out.splitlines()] == ["'out_g_ema.pt'", "'out_d_ema.pt'"]
    assert equal(load_file("out_g_ema.pt"), state(2))
    assert equal(load_file("out_d_ema.pt"), state(4))


@pytest.mark.parametrize(("out", "keys"), [("out.pt", ["g_ema", "d_ema"]), ("out_{}.pt", ["g_ema", "g_ema"])])
def test_one_name_for_two_averages_is_wrong_usage(out, keys, command):
    code, _, err = command("export", "file.pt", out, *(part for key in keys for part in ("--key", key)), file=gan())
    assert code == 2
    assert f"OUT should have {{}} in it, for the key or length, got '{out}' for {', '.join(keys)}." in err


def test_a_prefix_is_suggested_and_taken_off(command):
    out = command("export", "file.pt", "out.pt", file={"ema": prefixed("module.", state(2))})[1]
    assert "all names begin with 'module.', as a wrapped model's do; --strip-prefix module. takes" in out
    assert "module." not in command("export", "file.pt", "out.pt", "--strip-prefix", "module.", "--force")[1]
    assert equal(load_file("out.pt"), state(2))
