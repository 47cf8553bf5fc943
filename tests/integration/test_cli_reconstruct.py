"""``reconstruct``: what it lists, writes and refuses."""

import json
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events

from ignite_ema import PostHocEMA, posthoc
from ignite_ema.checkpoints import load_file
from ignite_ema.cli import main
from tests.helpers.files import files_in
from tests.helpers.peer_files import equal


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """16 snapshots of a run."""
    folder = tmp_path_factory.mktemp("snapshots")
    model = torch.nn.Linear(300, 300)
    trainer = Engine(lambda engine, batch: model.weight.data.fill_(engine.state.iteration))
    PostHocEMA(model, dirname=folder).attach(trainer, snapshot_event=Events.ITERATION_COMPLETED(every=4))
    trainer.run(range(64))
    return folder


@pytest.fixture
def command(written, tmp_path, monkeypatch):
    """Runs it with the snapshots as DIR, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: main(["reconstruct", str(written), *arguments])


def test_list(command, capsys):
    assert command("--list") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[:5] == [
        "16 snapshots of averages of sigma_rel 0.05 and 0.1",
        "2 averaged tensors in float32, 0.689 MiB in each snapshot",
        "",
        "updates  iteration  epoch",
        "4        4          1",
    ]
    assert lines[19:22] == ["64       64         1", "", "what can be rebuilt at 64 updates:"]
    assert lines[22] == "--sigma-rel 0.02   residual  11.956%    refused"
    assert lines[25] == "--sigma-rel 0.05   residual   0.000%"
    last = [line for line in lines if line.startswith("--last")]
    assert [float(line.split()[1]) for line in last] == [0.125, 0.1875, 0.5]
    assert len({line.index("residual") for line in lines[22:]}) == 1
    assert len(lines) == 22 + 13 + 5 + len(last)


def test_list_as_json(command, capsys):
    assert command("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert command("--list", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [shown[key] for key in ("time_unit", "sigma_rels", "tensors")] == ["updates", [0.05, 0.1], 2]
    assert shown["snapshots"][0] == {"time": 4, "iteration": 4, "epoch": 1}
    assert len(shown["snapshots"]) == 16
    rows = [line.split() for line in lines if line.startswith("--")]
    assert len(rows) == len(shown["lengths"])
    for row, one in zip(rows, shown["lengths"], strict=True):
        assert row[0] == f"--{one['length'].replace('_', '-')}"
        assert float(row[1]) == pytest.approx(one["value"])
        assert row[3] == f"{one['residual']:.3%}"
        assert (row[-1] if row[-1] in ("rough", "refused") else "good") == one["verdict"]


def test_what_the_list_promises_is_kept(command, capsys):
    command("--list")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("--")]
    assert rows
    for flag, x, _, percent, *verdict in rows[::3]:
        out = f"{flag.strip('-')}_{x}.pt"
        code = command(flag, x, "--out", out)
        printed = capsys.readouterr()
        assert (code, Path(out).exists()) == ((1, False) if verdict == ["refused"] else (0, True))
        assert ("differs" in printed.err) == bool(verdict)
        assert not verdict or f"by {float(percent[:-1]):.1f}%" in printed.err


def test_one_length(command, written, capsys):
    assert command("--sigma-rel", "0.1", "--out", "out.pt") == 0
    said = "'out.pt': PowerProfile(sigma_rel=0.1) at 64 updates (iteration 64, epoch 1), residual 0.00%"
    assert capsys.readouterr() == (f"{said}, 2 tensors, 0.344 MiB\n", "")
    assert equal(load_file("out.pt"), posthoc.reconstruct(written, 0.1))
    assert files_in(Path()) == ["out.pt"]


def test_several_lengths_have_names_of_their_own(command, written, capsys):
    arguments = ["--sigma-rel", "0.1", "0.075", "--half-life", "0.05", "--last", "0.5", "--step", "56"]
    assert command(*arguments, "--out", "run_{}.pt") == 0
    names = ["sigma_rel_0.1", "sigma_rel_0.075", "half_life_0.05", "last_0.5"]
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"'run_{name}.pt'" for name in names]
    assert "UniformProfile(window=0.5) at 56 updates (iteration 56, epoch 1), residual " in lines[3]
    said = "ignite-ema: warning: The closest sum of snapshots differs from UniformProfile(window=0.5)"
    assert printed.err.startswith(said)
    assert printed.err.count("\n") == 1
    targets = [0.1, 0.075, posthoc.ExponentialProfile(0.05)]
    for name, due in zip(names, posthoc.reconstruct(written, targets, 56), strict=False):
        assert equal(load_file(Path(f"run_{name}.pt")), due)


def test_no_snapshot_is_written_over(command, written, capsys):
    before = (written / "snapshot_64.pt").read_bytes()
    for name in ("snapshot_64.pt", "snapshot_65.pt", "snapshot_frozen.pt"):
        assert command("--sigma-rel", "0.1", "--out", str(written / name), "--force") == 1
        assert f"named like a snapshot in DIR, got '{written / name}'; choose another" in capsys.readouterr().err
    assert (written / "snapshot_64.pt").read_bytes() == before
    assert len(files_in(written)) == 16


def test_a_limit_of_ones_own(command, capsys):
    assert command("--sigma-rel", "0.02", "--out", "out.pt") == 1
    assert "accept it with max_residual=0.12 (--max-residual)" in capsys.readouterr().err
    assert command("--sigma-rel", "0.02", "--out", "out.pt", "--max-residual", "0.12") == 0
    assert "by 12.0%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sigma-rel"], "expected at least one argument"),
        ([], "one of the arguments --list --out is required"),
        (["--out", "out.pt"], "reconstruct should have --list, or --list --json, or --out and a length"),
        (["--sigma-rel", "0.1", "--out", "out.pt", "--json"], "reconstruct should have --list, or --list --json, or"),
        (
            ["--sigma-rel", "nan", "--out", "out.pt"],
            "error: sigma_rel of PowerProfile should be a number in (0, 1/√12 ",
        ),
        (["--last", "1.5", "--out", "out.pt"], "error: window of UniformProfile should be a number in (0, 1], as a"),
        (["--sigma-rel", "0.1", "0.2", "--out", "out.pt"], "OUT should have {} in it, for the key or length, got"),
    ],
)
def test_wrong_usage(arguments, message, command, capsys):
    with pytest.raises(SystemExit) as info:
        command(*arguments)
    assert info.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: ignite-ema reconstruct")
    assert message in said
    assert files_in(Path()) == []
