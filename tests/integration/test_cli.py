"""The command: its help, how it ends, and how it runs as a process."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from ignite_ema import __version__, cli
from ignite_ema.checkpoints import reading
from ignite_ema.cli import main

ROOT = Path(__file__).parents[2]
ONE = {"größe.w": torch.ones(1)}
FILE = {"model": ONE, "ema": {"größe.w": torch.zeros(1)}}


@pytest.mark.parametrize(
    "arguments", [[], ["inspect"], ["export", "file.pt"], ["inspect", "file.pt", "--force"], ["convert", "file.pt"]]
)
def test_wrong_usage(arguments, command):
    code, _, err = command(*arguments)
    assert code == 2
    assert err.startswith("usage: ignite-ema")


@pytest.mark.parametrize("name", [None, "inspect", "export", "reconstruct"])
def test_help(name, command):
    code, text, _ = command(*([name] if name else []), "--help")
    assert code == 0
    assert "Examples:\n  ignite-ema " in text
    assert "Exit codes:\n  0  done\n  1  a file cannot be read" in text
    assert text.isascii()  # or a terminal that is not UTF-8 could not show it
    assert max(map(len, text.splitlines())) <= 100
    for line in text.splitlines():
        if line.startswith("  ignite-ema ") and name:  # its examples are commands
            assert cli._parser().parse_args(shlex.split(line.partition("|")[0])[1:]).run


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"], ["reconstruct", "--help"]])
def test_help_does_not_import_torch(arguments, tmp_path):
    """From a checkout that is not installed."""
    without = "import sys; sys.modules['torch'] = sys.modules['ignite'] = None"
    code = f"{without}; from ignite_ema.cli import main; main({arguments})"
    shown = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert (shown.returncode, shown.stderr) == (0, b"")
    begin = b"usage: ignite-ema" if "--help" in arguments else f"ignite-ema {__version__}".encode()
    assert shown.stdout.startswith(begin)


@pytest.mark.parametrize(("encoding", "name"), [("ascii", r"gr\xf6\xdfe"), ("utf-8", "größe")])
def test_letters_suit_the_encoding(encoding, name, tmp_path, monkeypatch):
    torch.save(FILE, tmp_path / "file.pt")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["inspect", str(tmp_path / "file.pt")]) == 0
    assert f"  '{name}'  {'#' * 40}\n" in stdout.buffer.getvalue().decode(encoding)


def test_ctrl_c(command, monkeypatch):
    monkeypatch.setattr(reading, "read_part", Mock(side_effect=KeyboardInterrupt))
    assert command("inspect", "file.pt", file=FILE)[0] == 130


@pytest.mark.slow
def test_as_a_module_with_a_pipe_that_is_closed(tmp_path):
    names = [f"layer{i}.weight" for i in range(5000)]  # more than a pipe holds
    tensors = dict.fromkeys(names, torch.ones(1))
    torch.save({"model": tensors, "ema": tensors}, tmp_path / "file.pt")
    ours = f"'{sys.executable}' -m ignite_ema inspect"
    done = subprocess.run(
        ["bash", "-c", f"{ours} file.pt | head -n 1; echo ${{PIPESTATUS[0]}}; {ours} nowhere.pt; echo $?"],
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines() == [b"file      'file.pt'", b"141", b"1"]
    assert done.stderr.startswith(b"ignite-ema: 'nowhere.pt' should be a file, but there is none; check the path")
    assert done.stderr.count(b"\n") == 1
