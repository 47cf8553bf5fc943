"""The README is true: every Python block runs, in order, and every test that it names exists."""

import os
import re
import subprocess
import sys
from math import log2
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
BLOCKS = list(re.finditer(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE))
SCRIPT = "# train.py"  # a script of its own


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the Python blocks define, run in order, and the directory that they wrote into."""
    folder = tmp_path_factory.mktemp("readme")
    blocks = [block for block in BLOCKS if not block[1].startswith(SCRIPT)]
    namespace = {"folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks:
            line = TEXT[: block.start()].count("\n") + 1
            exec(compile("\n" * line + block[1], str(README), "exec"), namespace)
    return namespace


def test_the_average_moves_as_often_as_the_optimizer_steps(names):
    skipped = log2(2**16 / names["scaler"].get_scale())  # the scale is halved at each step that is skipped
    assert names["amp_handler"].num_updates == 5 - skipped > 0


def test_the_evaluated_model_has_its_own_weights_again(names):
    before = {name: tensor.clone() for name, tensor in names["model"].state_dict().items()}
    names["evaluator"].run(names["data"])
    assert all(torch.equal(before[name], tensor) for name, tensor in names["model"].state_dict().items())


def test_the_best_averaged_weights_are_on_disk_under_the_names_of_the_model(names):
    (file,) = (names["folder"] / "best").iterdir()
    assert torch.load(file, weights_only=True).keys() == names["model"].state_dict().keys()
    (file,) = (names["folder"] / "deploy").iterdir()
    assert torch.load(file, weights_only=True)["model"].keys() == names["model"].state_dict().keys()


def test_the_teacher_has_statistics_of_its_own(names):
    teacher = names["teacher_handler"].ema_model
    assert teacher.training
    assert teacher[1].num_batches_tracked == 20
    assert not torch.equal(teacher[1].running_mean, names["student"][1].running_mean)


def test_the_mean_of_three_epochs_has_statistics_of_the_whole_data(names):
    assert names["swa_handler"].num_updates == 3
    assert names["swa_handler"].ema_model[1].num_batches_tracked == len(names["data"])


def test_the_sharded_script_goes_on_with_another_number_of_ranks(tmp_path):
    (script,) = (block[1] for block in BLOCKS if block[1].startswith(SCRIPT))
    (tmp_path / "train.py").write_text(script)
    for ranks, epochs in ((2, 2), (3, 4)):
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "train.py", str(epochs)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # What it wrote counts, not its exit code: threads of torch's own may abort a process that has ended.
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=False, timeout=120)
        assert (tmp_path / "checkpoints" / f"checkpoint_{8 * epochs}.pt").exists()
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert saved == {f"checkpoint_{iteration}.pt" for iteration in (8, 16, 24, 32)}
    namespace = {}
    model = re.search(r"^class Net.*?(?=^def )", script, flags=re.DOTALL | re.MULTILINE)[0]
    exec(f"import torch\nfrom torch import nn\n{model}", namespace)
    namespace["Net"]().load_state_dict(torch.load(tmp_path / "averaged.pt", weights_only=True))


def test_each_row_for_those_who_come_from_another_system_has_its_test():
    section = TEXT.partition("## Coming from another system")[2].partition("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 50
    named = {_node(name.strip().strip("`")) for *_, name in rows}
    files = sorted({node.partition("::")[0] for node in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", *files]
    collected = subprocess.run(command, cwd=README.parent, capture_output=True, text=True, check=True).stdout
    assert named <= set(collected.splitlines())


def _node(name):
    if "::" in name:
        return name
    name = name if name.startswith("test_") else f"test_the_average_is_theirs[{name}]"
    return f"tests/test_migration.py::{name}"


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./]+)\)|`(tests/[\w/]+\.py)`", TEXT))
def test_what_it_points_to_exists(path):
    assert (README.parent / "".join(path)).exists()


def test_it_has_the_two_commands():
    assert 'pip install -e ".[demo]" && python -m ignite_ema.demo\npip install -e ".[test]" && pytest' in TEXT
