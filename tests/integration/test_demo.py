import re
import subprocess
import sys

import pytest
import torch
from matplotlib import image

from ignite_ema.demo import __main__ as command
from ignite_ema.demo import training as demo

QUICK = ["--epochs", "2", "--seeds", "1"]


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_the_command_trains_resumes_and_reports(tmp_path):
    command = [sys.executable, "-m", "ignite_ema.demo", *QUICK, "--out", "new/out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert "averaged" in done.stdout
    assert "has the bits of the run that never stopped" in done.stdout
    assert "ema_momentum=" in done.stderr

    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["best_seed0.pt", "demo.png", "resume_seed0.pt"]
    assert image.imread(out / "demo.png").shape[:2] == (900, 1800)

    best = demo.network()
    best.load_state_dict(torch.load(out / "best_seed0.pt", weights_only=True))
    _, (images, labels) = demo.load_data()
    with torch.no_grad():
        right = best.eval()(images).argmax(1) == labels
    assert f"{100 * right.float().mean():.1f} %" in done.stdout


def test_a_resumed_run_that_differs_by_one_bit_fails(tmp_path, capsys, monkeypatch):
    def perturbed(*arguments):
        run = original(*arguments)
        bias = run.handler.ema_model.get_parameter("7.bias")
        bias[0] = torch.nextafter(bias[0], bias[1])
        return run

    original = command.stopped_and_resumed
    monkeypatch.setattr(command, "stopped_and_resumed", perturbed)
    assert command.main([*QUICK, "--out", str(tmp_path)]) == 1
    assert re.search(r"should end with the bits.*\['ema_model'\]\['7.bias'\]", capsys.readouterr().err, re.DOTALL)


def test_a_bad_option_is_refused_and_what_is_there_is_not_written_over(tmp_path, capsys):
    assert "--epochs should be at least 2, got 1" in refusal(capsys, "--out", str(tmp_path / "new"), "--epochs", "1")
    (tmp_path / "file").write_text("mine")
    assert "holds files; pass --force" in refusal(capsys, "--out", str(tmp_path))
    below = str(tmp_path / "file" / "below")
    assert "--out should be a directory, got" in refusal(capsys, "--out", below, "--force")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_missing_extra_is_named_with_the_way_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = r'the demo needs matplotlib, not installed here.*pip install "ignite-ema\[demo\]"'
    assert re.search(words, refusal(capsys, "--out", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
