"""``inspect`` and ``export``: JSON, several averages, prefixes, names that would forge lines; help without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ignite_ema import EMAHandler, __version__
from ignite_ema.checkpoints import load_file
from ignite_ema.cli import main
from tests.helpers.peer_files import equal, prefixed

ROOT = Path(__file__).parents[2]


def state(fill):
    return {"a.weight": torch.full((2,), fill), "b.c.bias": torch.full((2,), fill)}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def save(content):
        torch.save(content, "file.pt")

    return save


def files():
    return sorted(path.name for path in Path().iterdir())


def gan():
    return (
        prefixed("g.", state(1.0))
        | prefixed("g_ema.", state(2.0))
        | prefixed("d.", state(3.0))
        | prefixed("d_ema.", state(4.0))
    )


# --- inspect ---


def test_inspect_as_json(file, capsys):
    file({"model": state(1.0) | {"n": torch.tensor(2)}, "ema": state(2.0) | {"n": torch.tensor(3)}})
    assert main(["inspect", "file.pt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "file": "file.pt",
        "format": "Ignite",
        "tensors": 3,
        "types": {"float32": 2, "int64": 1},
        "bytes": 24,
        "num_updates": None,
        "sparse": 0,
        "lacks": [],
        "distance": 1.0,
        "layers": {"a": 1.0, "b.c": 1.0},
    }


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_json_has_no_infinities(fill, file, capsys):
    file({"model": state(1.0), "ema": state(2.0) | {"a.weight": torch.full((2,), fill)}})
    assert main(["inspect", "file.pt", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["distance"], shown["layers"]) == (None, {"a": None, "b.c": 1.0})


def test_json_without_raw_weights(file, capsys):
    file(state(1.0))
    assert main(["inspect", "file.pt", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["format"], shown["distance"], shown["layers"]) == ("plain", None, None)


def test_several_averages_as_json(file, capsys):
    file({"state_dict": gan()})
    assert main(["inspect", "file.pt", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["file"] == "file.pt"
    assert [(one["key"], one["format"], one["tensors"]) for one in shown["averages"]] == [
        ("state_dict.g_ema", "mmagic", 2),
        ("state_dict.d_ema", "mmagic", 2),
    ]
    for one in shown["averages"]:
        assert main(["inspect", "file.pt", "--key", one["key"]]) == 0


FORGED = "x\ndistance  0.000e+00  all\x1b[31m"


def test_names_from_a_file_forge_no_lines(file, capsys):
    layer = {FORGED + ".w": torch.ones(1)}
    file({"model": layer, "ema": layer})
    assert main(["inspect", "file.pt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[-1] == r"distance  0.000e+00  'x\ndistance  0.000e+00  all\x1b[31m'"
    file({"ema " + FORGED: layer, "ema": {FORGED + ".w": torch.zeros(1)}})
    for arguments in (["inspect", "file.pt"], ["export", "file.pt", "out.pt"], ["inspect", "file.pt", "--key", FORGED]):
        main(arguments)
        printed = capsys.readouterr()
        assert all(line.isprintable() for line in (printed.out + printed.err).splitlines())
        assert r"x\ndistance" in printed.out + printed.err


def test_tied_tensors_are_compared_once(file, capsys, monkeypatch):
    from ignite_ema.cli import checkpoints

    compared, square = [], checkpoints._square
    monkeypatch.setattr(checkpoints, "_square", lambda *tensors: compared.append(tensors) or square(*tensors))
    one, other = torch.ones(4), torch.zeros(4)
    file({"model": {f"a{at}.w": one for at in range(9)}, "ema": {f"a{at}.w": other for at in range(9)}})
    assert main(["inspect", "file.pt"]) == 0
    assert capsys.readouterr().out.count("distance  1.000e+00") == 10
    assert len(compared) == 2


def test_a_layer_called_all_is_not_the_whole(file, capsys):
    file({"model": {"all.w": torch.ones(1)}, "ema": {"all.w": torch.ones(1)}})
    main(["inspect", "file.pt"])
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[-2:]] == ["all", "'all'"]


def test_letters_that_the_terminal_cannot_show(tmp_path):
    torch.save({"model": {"größe.w": torch.ones(1)}, "ema": {"größe.w": torch.ones(1)}}, tmp_path / "file.pt")
    shown = run("inspect", "file.pt", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert rb"'gr\xf6\xdfe'" in shown.stdout


def test_inspect_of_an_average_that_lacks_frozen_tensors(file, capsys):
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    model[0].requires_grad_(False)
    file(EMAHandler(model, share_frozen=True).state_dict())
    assert main(["inspect", "file.pt"]) == 0
    assert (
        "lacks     '0.weight', '0.bias': frozen, and shared with the model; --base has them\n"
        in capsys.readouterr().out
    )
    assert main(["inspect", "file.pt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lacks"] == ["0.weight", "0.bias"]
    torch.save(model.state_dict(), "base.pt")
    assert main(["inspect", "file.pt", "--base", "base.pt"]) == 0
    printed = capsys.readouterr().out
    assert "lacks" not in printed
    assert "tensors   4 (4 float32)\n" in printed


# --- export ---


def test_several_averages_in_one_export(file, capsys):
    file({"state_dict": gan()})
    assert main(["export", "file.pt", "out_{}.pt", "--key", "g_ema", "--key", "d_ema"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "'out_g_ema.pt'",
        "'out_d_ema.pt'",
    ]
    assert equal(load_file("out_g_ema.pt"), state(2.0))
    assert equal(load_file("out_d_ema.pt"), state(4.0))


def test_nothing_is_written_where_one_average_is_missing(file, capsys):
    file({"state_dict": gan()})
    assert main(["export", "file.pt", "out_{}.pt", "--key", "g_ema", "--key", "x_ema"]) == 1
    assert "key should be one of" in capsys.readouterr().err
    assert files() == ["file.pt"]
    Path("out_d_ema.pt").touch()
    assert main(["export", "file.pt", "out_{}.pt", "--key", "g_ema", "--key", "d_ema"]) == 1
    assert "'out_d_ema.pt' exists already" in capsys.readouterr().err
    assert files() == ["file.pt", "out_d_ema.pt"]


@pytest.mark.parametrize("keys", [["g_ema", "d_ema"], ["g_ema", "g_ema"]])
def test_several_averages_need_names_of_their_own(keys, file, capsys):
    file({"state_dict": gan()})
    out = "out.pt" if keys[0] != keys[1] else "out_{}.pt"
    with pytest.raises(SystemExit) as info:
        main(["export", "file.pt", out, "--key", keys[0], "--key", keys[1]])
    assert info.value.code == 2
    assert "OUT should have {} in its name for 2 keys" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("o_{}.pt", "OUT should give a file name for each key, but 'a/b.ema' cannot be in one; name OUT without {}"),
        (".", "OUT should name a file, got '.'."),
    ],
)
def test_what_is_no_name_of_a_file_is_wrong_usage(out, message, file, capsys):
    file({"a/b": {"ema": state(2.0)}})
    with pytest.raises(SystemExit) as info:
        main(["export", "file.pt", out, "--key", "a/b.ema"])
    assert info.value.code == 2
    assert message in capsys.readouterr().err
    assert main(["export", "file.pt", "o.pt", "--key", "a/b.ema"]) == 0


def test_the_name_of_what_is_written_forges_no_lines(file, capsys):
    file({"ema": state(2.0)})
    out = "a\nb\x1b[31m.pt"
    for code in (0, 1):
        assert main(["export", "file.pt", out]) == code
        printed = capsys.readouterr()
        assert all(line.isprintable() for line in (printed.out + printed.err).splitlines())
        assert r"'a\nb\x1b[31m.pt'" in printed.out + printed.err


def test_a_small_file_with_shared_memory_makes_no_large_one(file, capsys):
    pytest.importorskip("safetensors")
    shared = torch.ones(2**18)
    file({"ema": {f"w{at}": shared for at in range(40)}})
    assert main(["export", "file.pt", "out.safetensors"]) == 1
    assert capsys.readouterr().err == (
        "ignite-ema: 'out.safetensors' should be about as large as what its tensors have in memory, 1.000 MiB, but "
        "they share it, and safetensors has a copy for each name, 40.000 MiB in all; write a .pt file, which keeps "
        "them shared.\n"
    )
    assert files() == ["file.pt"]
    assert main(["export", "file.pt", "out.pt"]) == 0
    assert Path("out.pt").stat().st_size < 2**21
    file({"ema": {f"w{at}": shared for at in range(16)}})
    assert main(["export", "file.pt", "out.safetensors"]) == 0


def test_a_prefix_is_suggested_and_taken_off(file, capsys):
    file({"ema": prefixed("module.", state(2.0))})
    assert main(["export", "file.pt", "out.pt"]) == 0
    assert (
        "all names begin with 'module.', as a wrapped model's do; --strip-prefix module. takes"
        in capsys.readouterr().out
    )
    assert main(["export", "file.pt", "out.pt", "--strip-prefix", "module.", "--force"]) == 0
    assert "module." not in capsys.readouterr().out
    assert equal(load_file("out.pt"), state(2.0))


# --- the command ---


def run(*arguments, env, **kwargs):
    command = [sys.executable, "-m", "ignite_ema", *arguments]
    return subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)} | env, **kwargs)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"], ["reconstruct", "--help"]])
def test_help_does_not_import_torch(arguments, tmp_path):
    """From a checkout that is not installed."""
    without = "import sys; sys.modules['torch'] = sys.modules['ignite'] = None"
    code = f"{without}; from ignite_ema.cli import main; main({arguments})"
    shown = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert shown.stdout.startswith(
        b"usage: ignite-ema" if "--help" in arguments else f"ignite-ema {__version__}".encode()
    )
