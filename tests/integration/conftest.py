"""The command, in an empty folder."""

import pytest
import torch

from ignite_ema.cli import main


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs it, with what is given saved as file.pt, and returns its exit code and what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, file=None):
        if file is not None:
            torch.save(file, "file.pt")
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse ends by itself
            code = ended.code
        return code, *capsys.readouterr()

    return run
