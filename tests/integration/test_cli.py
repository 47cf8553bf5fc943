"""The command: what it prints, what it writes, and how it ends."""

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events

from ignite_ema import PostHocEMA, posthoc
from ignite_ema.checkpoints import load_file
from ignite_ema.cli import checkpoints as cli_checkpoints
from ignite_ema.cli import main
from ignite_ema.cli import reconstruct as cli_reconstruct
from ignite_ema.cli.arguments import parser
from ignite_ema.posthoc import snapshot_files
from tests.helpers.files import files_in
from tests.helpers.peer_files import MAKERS, equal, made
from tests.helpers.snapshots import make_snapshot

EVERY = pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)


def arguments_for(peer, folder):
    """The file of a peer on the command line, with what else it takes to read it."""
    arguments = [str(peer.path)]
    if peer.key is not None:
        arguments += ["--key", peer.key]
    if peer.names is not None:
        torch.save(peer.names, folder / "names.pt")
        arguments += ["--names", str(folder / "names.pt")]
    return arguments


@pytest.fixture
def file(tmp_path):
    """A checkpoint with a distance of 0.5 in one layer, 0.25 in another, and none in a third."""
    model = {
        "a.weight": torch.tensor([2.0, 0.0]),
        "a.bias": torch.tensor([0.0]),
        "b.c.weight": torch.tensor([4.0, 0.0], dtype=torch.bfloat16),
        "d": torch.tensor([1.0 + 0.0j]),
        "e.count": torch.tensor(3),
    }
    ema = model | {
        "a.weight": torch.tensor([2.0, 1.0]),
        "b.c.weight": torch.tensor([4.0, 1.0], dtype=torch.bfloat16),
        "e.count": torch.tensor(99),
    }
    torch.save({"model": model, "ema_model": ema, "trainer": {"iteration": 3}}, tmp_path / "file.pt")
    return tmp_path / "file.pt"


@EVERY
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_bit_for_bit(maker, suffix, tmp_path, capsys):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    peer = made(maker)
    out = tmp_path / f"out{suffix}"
    assert main(["export", *arguments_for(peer, tmp_path), str(out)]) == 0
    assert equal(load_file(out), peer.tensors)
    printed = capsys.readouterr()
    assert printed.out.startswith(f"'{out}': {len(peer.tensors)} tensors, 0.0")
    assert printed.out.endswith(f" MiB, averaged by {peer.system}\n")
    assert printed.err == ""
    assert files_in(tmp_path) in ([out.name], ["names.pt", out.name])


@EVERY
def test_inspect_every_peer(maker, tmp_path, capsys):
    peer = made(maker)
    assert main(["inspect", *arguments_for(peer, tmp_path)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "distance" not in line)
    assert lines["file"] == repr(str(peer.path))
    assert lines["format"] == peer.system
    assert lines["tensors"].startswith(f"{len(peer.tensors)} (")
    assert lines["updates"] == ("not stated" if peer.num_updates is None else str(peer.num_updates))


def test_inspect(file, capsys):
    assert main(["inspect", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"file      '{file}'",
        "format    Ignite",
        "tensors   5 (2 float32, 1 bfloat16, 1 complex64, 1 int64)",
        "size      0.000 MiB",
        "updates   not stated",
        "distance  3.086e-01  all",  # sqrt((1 + 1) / (4 + 16 + 1))
        f"distance  5.000e-01  'a'     {'█' * 40}",
        f"distance  2.500e-01  'b.c'   {'█' * 20}",
        "distance  0.000e+00  (root)",
    ]


def test_inspect_size(tmp_path, capsys):
    torch.save({"ema": {"w": torch.zeros(2**20)}}, tmp_path / "file.pt")
    assert main(["inspect", str(tmp_path / "file.pt")]) == 0
    assert "size      4.000 MiB\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raw", "averaged", "shown"),
    [(0.0, 1.0, "inf"), (0.0, 0.0, "0.000e+00"), (1.0, float("nan"), "nan"), (1.0, 1e30, "1.000e+30")],
)
def test_distances_without_a_ratio(raw, averaged, shown, tmp_path, capsys):
    file = {"model": {"a.w": torch.tensor([raw])}, "ema": {"a.w": torch.tensor([averaged])}}
    torch.save(file, tmp_path / "file.pt")
    assert main(["inspect", str(tmp_path / "file.pt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"distance  {shown}  all"
    assert lines[-1].split()[:3] == ["distance", shown, "'a'"]
    assert ("█" in lines[-1]) == (shown == "1.000e+30")


def test_bars_beside_distances_without_a_ratio(tmp_path, capsys):
    model = {"a.w": torch.zeros(1), "b.w": torch.ones(1), "c.w": torch.ones(1)}
    ema = {"a.w": torch.ones(1), "b.w": torch.tensor([float("nan")]), "c.w": torch.tensor([2.0])}
    torch.save({"model": model, "ema": ema}, tmp_path / "file.pt")
    assert main(["inspect", str(tmp_path / "file.pt")]) == 0
    bars = [line.count("█") for line in capsys.readouterr().out.splitlines()]
    assert bars[-3:] == [0, 0, 40]


def test_distance_is_computed_in_float64(tmp_path, capsys):
    raw = {"a.w": torch.full((1000,), 300.0, dtype=torch.float16)}  # the square of 300 is no float16
    averaged = {"a.w": torch.full((1000,), 303.0, dtype=torch.float16)}
    torch.save({"model": raw, "ema": averaged}, tmp_path / "file.pt")
    main(["inspect", str(tmp_path / "file.pt")])
    assert "distance  1.000e-02  all" in capsys.readouterr().out


def test_inspect_a_plain_file(tmp_path, capsys):
    torch.save({"w": torch.zeros(1)}, tmp_path / "file.pt")
    assert main(["inspect", str(tmp_path / "file.pt")]) == 0
    out = capsys.readouterr().out
    assert "format    plain (no average)\n" in out
    assert out.endswith("distance  not known: the file has no averaged and raw weights side by side\n")


def test_export_of_a_plain_file_says_so(tmp_path, capsys):
    torch.save({"model": {"w": torch.zeros(1)}, "epoch": 3}, tmp_path / "file.pt")
    assert main(["export", str(tmp_path / "file.pt"), str(tmp_path / "out.pt")]) == 0
    said = f"'{tmp_path / 'out.pt'}': 1 tensors, 0.000 MiB, plain weights: the file has no average\n"
    assert capsys.readouterr() == (said, "")
    assert equal(load_file(tmp_path / "out.pt"), {"w": torch.zeros(1)})


def test_inspect_lists_several_averages(tmp_path, capsys):
    first, second = {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save({"model": first, "ema_a": first, "ema_b": second, "shadow": second}, tmp_path / "file.pt")
    assert main(["inspect", str(tmp_path / "file.pt")]) == 0
    lines = [
        f"file      '{tmp_path / 'file.pt'}'",
        "average   'ema_a'  (Ignite, 2 tensors)",
        "average   'ema_b'  (Ignite, 2 tensors)",
        "choose one by its key: --key, or its last part",
    ]
    assert capsys.readouterr() == ("\n".join(lines) + "\n", "")
    torch.save({"model": first, "shadow": second}, tmp_path / "file.pt")
    assert main(["inspect", str(tmp_path / "file.pt")]) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "average   'model'  (plain, 2 tensors)",
        "average   'shadow'  (plain, 2 tensors; of the names and shapes of 'model')",
    ]
    assert main(["inspect", str(tmp_path / "file.pt"), "--key", "shadow"]) == 0
    assert "distance  1.000e+00  all" in capsys.readouterr().out


def test_sparse_tensors_are_counted_and_not_measured(tmp_path, capsys):
    model = {"a": torch.eye(2).to_sparse(), "b": torch.ones(1)}
    torch.save({"model": model, "ema": model | {"b": torch.zeros(1)}}, tmp_path / "file.pt")
    assert main(["inspect", str(tmp_path / "file.pt")]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "tensors   2 (2 float32)",
        "size      0.000 MiB",
        "updates   not stated",
        "sparse    1 of the tensors, in neither the size nor the distance",
        "distance  1.000e+00  all",
        f"distance  1.000e+00  (root)  {'█' * 40}",
    ]
    assert main(["export", str(tmp_path / "file.pt"), str(tmp_path / "out.pt")]) == 0
    assert torch.equal(load_file(tmp_path / "out.pt")["a"].to_dense(), torch.eye(2))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.zeros(1).expand(10**13),
            "should have memory for its shape, (10000000000000,), got 4 bytes that are rep",
        ),
        (torch.zeros(1, device="meta"), "'w' of the weights in"),
    ],
)
@pytest.mark.parametrize("beside", [{}, {"model": {"w": torch.zeros(1)}}])
def test_tensors_without_memory_are_one_sentence(tensor, message, beside, tmp_path, capsys):
    torch.save({"ema": {"w": tensor}, "ema_too": {"w": tensor}} | beside, tmp_path / "file.pt")
    for arguments in (["inspect"], ["export", str(tmp_path / "out.pt")]):
        assert main([arguments[0], str(tmp_path / "file.pt"), *arguments[1:], "--key", "ema"]) == 1
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
    assert files_in(tmp_path) == ["file.pt"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(MemoryError(), "out of memory"), (RuntimeError("not implemented\nfor this"), "not implemented")],
)
def test_what_torch_cannot_compute_is_one_sentence(error, reason, file, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(cli_checkpoints, "_square", fail)
    assert main(["inspect", str(file)]) == 1
    assert capsys.readouterr().err == f"ignite-ema: '{file}' cannot be worked on: {reason}\n"


def test_no_overwriting_without_force(file, tmp_path, capsys):
    out = tmp_path / "out.pt"
    out.write_bytes(b"precious")
    assert main(["export", str(file), str(out)]) == 1
    assert (
        capsys.readouterr().err
        == f"ignite-ema: '{out}' exists already; choose another name, or overwrite it with force (--force).\n"
    )
    assert out.read_bytes() == b"precious"
    assert main(["export", str(file), str(out), "--force"]) == 0
    assert load_file(out)["e.count"] == 99


def test_failing_export_leaves_nothing_behind(file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.pt"
    out.write_bytes(b"precious")

    def fail(content, file):
        file.write(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    assert main(["export", str(file), str(out), "--force"]) == 1
    assert capsys.readouterr() == ("", f"ignite-ema: '{out}' should be written, but it could not be: disk full.\n")
    assert files_in(tmp_path) == ["file.pt", "out.pt"]
    assert out.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere.pt"], "'nowhere.pt' should be a file, but there is none"),
        (["inspect", "."], "should be a file, got a directory"),
        (["export", "file.pt", "out.bin"], "'out.bin' should end in .pt, .pth or .safetensors"),
        (["inspect", "file.pt", "--key", "x"], "key should be one of 'ema_model' (Ignite) in 'file.pt', got 'x'"),
        (["inspect", "list.pt"], "list of 1 tensors without names, as torch_ema saves them"),
        (["inspect", "list.pt", "--names", "file.safetensors"], "keep the order of the parameters, but .safetensors"),
        (["inspect", "list.pt", "--names", "number.pt"], "names should be a model, or a mapping"),
        (["inspect", "list.pt", "--names", "file.pt"], "names should be of 1 tensors"),
        (["inspect", "number.pt"], "'number.pt' should be, or hold, a mapping such as a state dict, got int"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(arguments, message, file, capsys, monkeypatch):
    monkeypatch.chdir(file.parent)
    torch.save({"shadow_params": [torch.zeros(1)], "num_updates": 2}, "list.pt")
    torch.save(3, "number.pt")
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ignite-ema: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["inspect"], ["export", "file.pt"], ["inspect", "file.pt", "--force"], ["convert", "file.pt"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ignite-ema")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["inspect", "--help"], ["export", "--help"], ["reconstruct", "--help"]]
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n  ignite-ema " in text
    assert "exit codes:\n  0  done\n  1  a file cannot be read" in text
    assert text.isascii()  # or a terminal that is not UTF-8 could not show it
    assert max(map(len, text.splitlines())) <= 100


def test_examples_of_the_help_are_commands(capsys):
    for command in ("inspect", "export"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("  ignite-ema "):
                assert parser().parse_args(line.partition("|")[0].split()[1:]).file


def test_version(capsys):
    with pytest.raises(SystemExit) as info:
        main(["--version"])
    assert info.value.code == 0
    assert capsys.readouterr().out.startswith("ignite-ema 0.")


@pytest.mark.parametrize(("encoding", "block"), [("ascii", "#"), ("latin-1", "#"), ("utf-8", "█")])
def test_bars_suit_the_encoding(encoding, block, file, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["inspect", str(file)]) == 0
    assert f"  'a'     {block * 40}\n" in stdout.buffer.getvalue().decode(encoding)


def test_ctrl_c(file, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_checkpoints, "read_part", stop)
    assert main(["inspect", str(file)]) == 130


def run(*arguments, **kwargs):
    return subprocess.run([sys.executable, "-m", "ignite_ema", *map(str, arguments)], capture_output=True, **kwargs)


def test_as_a_module(file, tmp_path):
    shown = run("inspect", file, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert b"distance  5.000e-01  'a'     " + b"#" * 40 in shown.stdout.splitlines()
    written = run("export", file, tmp_path / "out.pt")
    assert (written.returncode, written.stderr) == (0, b"")
    assert written.stdout.decode().startswith(f"'{tmp_path / 'out.pt'}': 5 tensors")
    assert len(load_file(tmp_path / "out.pt")) == 5


def test_exit_code_of_the_module(tmp_path):
    missing = run("inspect", "nowhere.pt", cwd=tmp_path)
    assert (missing.returncode, missing.stdout) == (1, b"")
    assert missing.stderr == b"ignite-ema: 'nowhere.pt' should be a file, but there is none; check the path.\n"


def test_closed_pipe(tmp_path):
    names = [f"layer{i}.weight" for i in range(5000)]  # more than a pipe holds
    tensors = dict.fromkeys(names, torch.ones(1))
    torch.save({"model": tensors, "ema": tensors}, tmp_path / "file.pt")
    command = f"'{sys.executable}' -m ignite_ema inspect '{tmp_path / 'file.pt'}'"
    piped = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}"], capture_output=True, check=True
    )
    assert piped.stderr == b""
    assert piped.stdout.splitlines()[1] == b"141"


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "forced"])
def test_a_checkpoint_is_never_written_over_itself(force, tmp_path, capsys):
    file = tmp_path / "checkpoint.pt"
    torch.save({"model": {"weight": torch.ones(1)}, "ema_model": {"weight": torch.zeros(1)}}, file)
    before = file.read_bytes()
    assert main(["export", str(file), str(tmp_path / "." / "checkpoint.pt"), *force]) == 1
    assert "OUT should be another file than FILE" in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """16 snapshots of a run."""
    folder = tmp_path_factory.mktemp("snapshots")
    model = torch.nn.Linear(300, 300)
    trainer = Engine(lambda engine, batch: model.weight.data.fill_(engine.state.iteration))
    PostHocEMA(model, dirname=folder).attach(trainer, snapshot_event=Events.ITERATION_COMPLETED(every=4))
    trainer.run(range(64))
    return folder


class TestReconstruct:
    """``ignite-ema reconstruct``."""

    @pytest.fixture
    def command(self, written, tmp_path, monkeypatch):
        """Runs it with the snapshots as DIR, in an empty folder."""
        monkeypatch.chdir(tmp_path)
        return lambda *arguments: main(["reconstruct", str(written), *arguments])

    def test_list(self, command, capsys):
        assert command("--list") == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        lines = printed.out.splitlines()
        assert lines[:5] == [
            "16 snapshots of averages of sigma_rel 0.05 and 0.1",
            "2 averaged tensors in float32, 0.689 MiB in each snapshot",
            "",
            "updates  iteration  epoch",
            "      4          4      1",
        ]
        assert lines[19:22] == ["     64         64      1", "", "what can be rebuilt at 64 updates:"]
        assert lines[22:27] == [
            "  --sigma-rel 0.02   residual  11.956%  refused",
            "  --sigma-rel 0.03   residual   3.864%  rough",
            "  --sigma-rel 0.04   residual   1.027%  rough",
            "  --sigma-rel 0.05   residual   0.000%",
            "  --sigma-rel 0.075  residual   0.348%",
        ]
        assert "  --half-life 0.05   residual   0.153%" in lines
        last = [line for line in lines if line.startswith("  --last")]
        assert [float(line.split()[1]) for line in last] == [0.125, 0.1875, 0.5]
        assert not any(line.endswith("refused") for line in last)
        assert len({line.index("residual") for line in lines[22:]}) == 1
        assert len(lines) == 22 + 13 + 5 + len(last)

    def test_list_names_the_windows_that_are_nearest_rough_ones_too(self, tmp_path, capsys):
        for time in range(1, 25):
            snapshot_files.write(make_snapshot(time), tmp_path)
        assert main(["reconstruct", str(tmp_path), "--list"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  --last")]
        assert [(line[1], line[4:]) for line in lines] == [("0.0833333", []), ("0.208333", []), ("0.5", ["rough"])]

    def test_list_as_json(self, command, capsys):
        assert command("--list") == 0
        lines = capsys.readouterr().out.splitlines()
        assert command("--list", "--json") == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["time_unit"], shown["sigma_rels"], shown["tensors"], shown["types"]) == (
            "updates",
            [0.05, 0.1],
            2,
            ["float32"],
        )
        assert shown["snapshots"][0] == {"time": 4, "iteration": 4, "epoch": 1}
        assert len(shown["snapshots"]) == 16
        rows = [line.split() for line in lines if line.startswith("  --")]
        assert len(rows) == len(shown["lengths"])
        for row, one in zip(rows, shown["lengths"], strict=True):
            assert row[0] == f"--{one['length'].replace('_', '-')}"
            assert float(row[1]) == pytest.approx(one["value"])
            assert row[3] == f"{one['residual']:.3%}"
            assert (row[-1] if row[-1] in ("rough", "refused") else "good") == one["verdict"]

    def test_list_at_a_step(self, command, capsys):
        assert command("--list", "--step", "32") == 0
        out = capsys.readouterr().out
        assert out.startswith("8 snapshots of")
        assert "what can be rebuilt at 32 updates:" in out

    def test_what_the_list_promises_is_kept(self, command, capsys):
        command("--list")
        rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
        assert rows
        for flag, x, _, percent, *verdict in rows:
            out = f"{flag.strip('-')}_{x}.pt"
            code = command(flag, x, "--out", out)
            printed = capsys.readouterr()
            assert (code, Path(out).exists()) == ((1, False) if verdict == ["refused"] else (0, True))
            assert ("differs" in printed.err) == bool(verdict)
            assert not verdict or f"by {float(percent[:-1]):.1f}%" in printed.err

    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
    def test_one_length(self, suffix, command, written, capsys):
        if suffix == ".safetensors":
            pytest.importorskip("safetensors")
        assert command("--sigma-rel", "0.1", "--out", f"out{suffix}") == 0
        said = f"'out{suffix}': PowerProfile(sigma_rel=0.1) at 64 updates (iteration 64, epoch 1), residual 0.00%"
        assert capsys.readouterr() == (f"{said}, 2 tensors, 0.344 MiB\n", "")
        assert equal(load_file(Path(f"out{suffix}")), posthoc.reconstruct(written, 0.1))
        assert files_in(Path()) == [f"out{suffix}"]

    def test_several_lengths_have_names_of_their_own(self, command, written, capsys):
        arguments = ["--sigma-rel", "0.1", "0.075", "--half-life", "0.05", "--last", "0.5", "--step", "56"]
        assert command(*arguments, "--out", "run_{}.pt") == 0
        names = ["sigma_rel_0.1", "sigma_rel_0.075", "half_life_0.05", "last_0.5"]
        printed = capsys.readouterr()
        lines = printed.out.splitlines()
        assert [line.partition(": ")[0] for line in lines] == [f"'run_{name}.pt'" for name in names]
        assert "UniformProfile(window=0.5) at 56 updates (iteration 56, epoch 1), residual " in lines[3]
        assert printed.err.startswith("ignite-ema: warning: The snapshots give UniformProfile(window=0.5) roughly")
        assert printed.err.count("\n") == 1
        targets = [0.1, 0.075, posthoc.ExponentialProfile(0.05)]
        for name, due in zip(names, posthoc.reconstruct(written, targets, 56), strict=False):
            assert equal(load_file(Path(f"run_{name}.pt")), due)

    def test_lengths_that_look_alike_are_both_written(self, command):
        assert command("--sigma-rel", "0.1", "0.1000000001", "--out", "{}.pt") == 0
        assert files_in(Path()) == ["sigma_rel_0.1.pt", "sigma_rel_0.1000000001.pt"]

    def test_a_limit_of_ones_own(self, command, capsys):
        assert command("--sigma-rel", "0.02", "--out", "out.pt") == 1
        assert "accept it with max_residual=0.12 (--max-residual)" in capsys.readouterr().err
        assert command("--sigma-rel", "0.02", "--out", "out.pt", "--max-residual", "0.12") == 0
        assert "differs by 12.0%" in capsys.readouterr().err

    def test_what_is_there_is_kept_without_force(self, command, capsys, monkeypatch):
        Path("run_last_0.5.pt").write_bytes(b"precious")
        arguments = ["--sigma-rel", "0.1", "--last", "0.5", "--out", "run_{}.pt"]
        with monkeypatch.context() as patch:
            patch.setattr(cli_reconstruct, "reconstruct_all", None)  # no work before
            assert command(*arguments) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("ignite-ema: 'run_last_0.5.pt' exists already; choose another name, or overwrite")
        assert files_in(Path()) == ["run_last_0.5.pt"]
        assert Path("run_last_0.5.pt").read_bytes() == b"precious"
        assert command(*arguments, "--force") == 0
        assert len(load_file(Path("run_last_0.5.pt"))) == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--list", "--step", "63"], "step should be the time of a snapshot, in updates, got 63; nearest in"),
            (["--sigma-rel", "0.1", "--step", "63", "--out", "out.pt"], ": 60 and 64."),
            (["--sigma-rel", "0.1", "--out", "out.bin"], "'out.bin' should end in .pt, .pth or .safetensors"),
            (
                ["--sigma-rel", "0.1", "--out", "nowhere/out.pt"],
                "'nowhere/out.pt' should be in a folder that exists, bu",
            ),
            (["--sigma-rel", "0.1", "--out", "out.pt", "--max-residual", "nan"], "max_residual should be a number of"),
        ],
    )
    def test_what_cannot_be_done_is_one_sentence(self, arguments, message, command, capsys):
        assert command(*arguments) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("ignite-ema: ")
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert files_in(Path()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--sigma-rel"], "expected at least one argument"),
            (["--sigma-rel", "wide"], "invalid float value: 'wide'"),
            (["--step", "1.5"], "invalid int value: '1.5'"),
            ([], "reconstruct should have a length, such as --sigma-rel 0.15, and --out; --list says"),
            (["--sigma-rel", "0.1"], "reconstruct should have a length, such as --sigma-rel 0.15, and --out"),
            (["--out", "out.pt"], "reconstruct should have a length, such as --sigma-rel 0.15, and --out"),
            (["--list", "--last", "0.1"], "--list should stand alone, or with --step or --json; leave it out to write"),
            (["--list", "--out", "out.pt"], "--list should stand alone"),
            (["--list", "--force"], "--list should stand alone"),
            (["--sigma-rel", "0.1", "--out", "out.pt", "--json"], "--json should stand with --list"),
            *(
                (
                    ["--sigma-rel", x, "--out", "out.pt"],
                    "--sigma-rel: sigma_rel should be a number in (0, 1/√12 ",
                )
                for x in ("nan", "0.4", "0.3", "0", "-1", "inf")
            ),
            *(
                (
                    ["--half-life", x, "--out", "out.pt"],
                    "--half-life: half_life of ExponentialProfile should be ",
                )
                for x in ("0", "nan", "inf")
            ),
            *(
                (["--last", x, "--out", "out.pt"], "--last: window of UniformProfile should be in (0, 1], the part of")
                for x in ("0", "nan", "1.5")
            ),
            (["--sigma-rel", "0.1", "--out", "."], "--out should name a file, got '.'"),
            (
                ["--sigma-rel", "0.1", "0.2", "--out", "out.pt"],
                "--out should have {} in its name for 2 lengths, got 'ou",
            ),
        ],
    )
    def test_wrong_usage(self, arguments, message, command, capsys):
        with pytest.raises(SystemExit) as info:
            command(*arguments)
        assert info.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("usage: ignite-ema reconstruct")
        assert message in said
        assert files_in(Path()) == []

    def test_a_snapshot_is_not_written_over(self, command, written, capsys):
        before = (written / "snapshot_64.pt").read_bytes()
        out = str(written / "snapshot_64.pt")
        assert command("--sigma-rel", "0.1", "--out", out, "--force") == 1
        assert "OUT should not be the name of a snapshot in DIR" in capsys.readouterr().err
        assert (written / "snapshot_64.pt").read_bytes() == before

    def test_examples_of_the_help_are_commands(self, capsys):
        with pytest.raises(SystemExit):
            main(["reconstruct", "--help"])
        examples = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ignite-ema ")]
        parsed = [parser().parse_args(shlex.split(line)[1:]) for line in examples]
        assert [one.list for one in parsed] == [True, False, False]
        assert [one.sigma_rel for one in parsed] == [[], [0.15], [0.1, 0.15]]

    @pytest.mark.slow
    def test_as_a_module(self, written, tmp_path):
        done = run("reconstruct", written, "--last", "0.5", "--out", "out.pt", cwd=tmp_path)
        assert done.returncode == 0
        assert done.stdout.startswith(b"'out.pt': UniformProfile(window=0.5) at 64 updates")
        assert done.stderr.startswith(b"ignite-ema: warning: The snapshots give UniformProfile")
        assert done.stderr.count(b"\n") == 1  # and no bar, where stderr is no terminal
        missing = run("reconstruct", "nowhere", "--list", cwd=tmp_path)
        assert (missing.returncode, missing.stdout) == (1, b"")
        assert missing.stderr.startswith(b"ignite-ema: 'nowhere' should be a directory with the snapshots of a PostHoc")
