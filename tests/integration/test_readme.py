"""The README is true: every Python block runs, in order, and every test that it names exists."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from math import log2
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ignite_ema import ModelAverage, posthoc
from tests.benchmarks import cost
from tests.benchmarks.fidelity import HELD, STOCHASTIC, percent
from tests.benchmarks.models import MODELS
from tests.benchmarks.peers import OURS
from tests.benchmarks.report import multiple

README = Path(__file__).parents[2] / "README.md"
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


(TRAIN,) = (block[1] for block in BLOCKS if block[1].startswith(SCRIPT))
PIDS = "import os, pathlib\npathlib.Path('rank-' + os.environ['RANK']).write_text(str(os.getpid()))\n"


@contextmanager
def torchrun(folder, ranks, epochs):
    """Starts the script for several ranks in `folder`, where it finds what a run before has left."""
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(PIDS + TRAIN)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "train.py", str(epochs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.terminate()  # which takes the ranks along, where it has not ended
        process.communicate(timeout=60)


def train(folder, ranks, epochs):
    with torchrun(folder, ranks, epochs) as process:
        # What it wrote counts, not its exit code: threads of torch's own may abort a process that has ended.
        said = process.communicate(timeout=120)[1].decode()
    assert (folder / "checkpoints" / f"checkpoint_{8 * epochs}.pt").exists(), said


def averaged(folder):
    """The averaged weights, from a plain model that has loaded them."""
    namespace = {}
    model = re.search(r"^class Net.*?(?=^def )", TRAIN, flags=re.DOTALL | re.MULTILINE)[0]
    exec(f"import torch\nfrom torch import nn\n{model}", namespace)
    net = namespace["Net"]()
    net.load_state_dict(torch.load(folder / "averaged.pt", weights_only=True))
    return net.state_dict()


def test_the_sharded_script_goes_on_with_another_number_of_ranks(tmp_path):
    for ranks, epochs in ((2, 2), (3, 4)):
        train(tmp_path, ranks, epochs)
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert saved == {f"checkpoint_{iteration}.pt" for iteration in (8, 16, 24, 32)}
    averaged(tmp_path)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The averaged weights of a run of so many epochs that was not killed."""

    @cache
    def run(epochs):
        folder = tmp_path_factory.mktemp("straight")
        train(folder, 2, epochs)
        return averaged(folder)

    return run


def iteration_of(checkpoint):
    return int(checkpoint.stem.partition("_")[2])


@pytest.mark.parametrize("victims", [["1"], ["0", "1"]], ids=["one rank", "all ranks"])
def test_the_sharded_script_is_killed_and_goes_on_to_the_same_average(tmp_path, straight, victims):
    with torchrun(tmp_path, 2, 10_000) as process:
        end = time.monotonic() + 60
        while not list(tmp_path.glob("checkpoints/checkpoint_*.pt")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        for rank in victims:
            os.kill(int((tmp_path / f"rank-{rank}").read_text()), signal.SIGKILL)
        process.communicate(timeout=60)
    assert process.returncode > 0
    last = max(tmp_path.glob("checkpoints/checkpoint_*.pt"), key=iteration_of)
    epochs, written = iteration_of(last) // 8 + 1, last.stat().st_mtime_ns
    train(tmp_path, 3, epochs)
    assert last.stat().st_mtime_ns == written  # it went on from there
    got, due = averaged(tmp_path), straight(epochs)
    for name in due:
        if name.endswith("in_proj_bias"):
            # A bias of keys changes nothing: its gradient is rounding noise, which AdamW scales up.
            got[name][16:32] = due[name][16:32]
        torch.testing.assert_close(got[name], due[name], rtol=1e-5, atol=1e-6)


def test_the_cost_is_what_its_bytes_give():
    found = re.findall(r"^\| (\d+)B parameters \|(.*)\|$", TEXT, flags=re.MULTILINE)
    assert [billions for billions, _ in found] == ["1", "8", "70"]
    for billions, row in found:
        parameters = 1e9 * int(billions)
        for devices, cell in zip((1, 8, 1024), row.split("|"), strict=True):
            gibibytes = cost.held(parameters, devices) / 2**30
            milliseconds = cost.milliseconds(parameters, devices, bandwidth=4.8e12)
            assert cell.strip() == f"{gibibytes:.3g} GiB, {milliseconds:.3g} ms"


@pytest.mark.parametrize(
    ("held_by_model", "held", "due"),
    [(torch.float32, None, 12), (torch.bfloat16, None, 6), (torch.bfloat16, torch.float32, 18)],
)
def test_an_update_moves_as_many_bytes_as_it_says(held_by_model, held, due):
    model = torch.nn.Linear(512, 512, bias=False).to(held_by_model)
    average = ModelAverage(model, dtype=held)
    with Bytes() as seen:
        average.update(0.5)
    assert seen.moved == due * model.weight.numel()
    assert f"{due} bytes per parameter" in TEXT or f"({due} where" in TEXT or f"; {due} for" in TEXT
    assert average.module.weight.nbytes == model.weight.numel() * (held or held_by_model).itemsize


class Bytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations read and write."""

    moved = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        self.moved += sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
        if operation._schema.name.endswith("_"):
            self.moved += tensors[0].nbytes  # which is written as well as read
        return result


def test_the_cost_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(cost, "CONTIGUOUS", 2**16)
    cost.main(["--parameters", "4e7", "--devices", "1", "1024", "--rounds", "2"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("33,554,432 of 4e+07 parameters on one of 1 devices, in 2 tensors: ")
    assert second.startswith("32,768 of 4e+07 parameters on one of 1,024 devices, in 2 tensors: ")


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
    return f"tests/integration/test_migration.py::{name}"


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./]+)\)|`(tests/[\w/]+\.py)`", TEXT))
def test_what_it_points_to_exists(path):
    assert (README.parent / "".join(path)).exists()


def test_it_has_the_two_commands():
    assert 'pip install -e ".[demo]" && python -m ignite_ema.demo\npip install -e ".[test]" && pytest' in TEXT


def test_the_table_of_residuals_is_what_is_computed():
    widths = [float(cell) for cell in re.search(r"^\| `sigma_rel` \|(.+)\|$", TEXT, flags=re.MULTILINE)[1].split("|")]
    rows = re.findall(r"^\| (\d+) snapshots \|(.+)\|$", TEXT, flags=re.MULTILINE)
    assert [int(count) for count, _ in rows] == [16, 32, 64]
    for count, cells in rows:
        residuals = posthoc.residuals(posthoc.planned(range(1, int(count) + 1)), widths)
        for cell, residual in zip(cells.split("|"), residuals, strict=True):
            shown = cell.strip().removesuffix(" %")
            assert round(100 * residual, len(shown.partition(".")[2])) == float(shown)


def rows_below(heading):
    """The cells of the first table under a heading, without its two first lines, by the first cell."""
    table = TEXT.partition(f"\n{heading}\n")[2].partition("\n|")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {re.split(",| \\(", name.replace("`", ""))[0]: cells for name, *cells in rows}


def figures_of(name):
    return json.loads((README.parent / "tests" / "benchmarks" / name).read_text(encoding="utf-8"))


SPEED = {
    "Ignite's handler": "ignite",
    "torch AveragedModel": "AveragedModel",
    "timm ModelEmaV3": "timm",
    "ema-pytorch": "ema-pytorch",
    "diffusers EMAModel": "diffusers",
    "torch_ema": "torch_ema",
    "Lightning's averaging": "lightning",
}


def test_the_table_of_speeds_is_what_was_measured():
    models, rows = figures_of("speed.json")["models"], rows_below("## Speed")
    assert list(models) == list(MODELS)
    assert rows.keys() == {*SPEED, "ours", "ours to the limit"}
    for row, peer in SPEED.items():
        ratios = [model["update"].get(peer, {}).get("to_ours", {}).get("median") for model in models.values()]
        assert rows[row] == ["–" if ratio is None else multiple(ratio) for ratio in ratios]
    ours = [model["update"][OURS] for model in models.values()]
    assert rows["ours"] == [f"{figure['ms']['median']:.2g} ms" for figure in ours]
    assert rows["ours to the limit"] == [multiple(figure["to_limit"]["median"]) for figure in ours]


def test_the_table_of_errors_is_what_was_measured():
    held, rows = figures_of("fidelity.json")["held"], rows_below("### Exactness")
    assert list(held) == list(HELD)
    assert rows.keys() == {*SPEED, "ours", "ours with stochastic_rounding=True"}
    peers = {**SPEED, "ours": OURS, "ours with stochastic_rounding=True": STOCHASTIC}
    for row, peer in peers.items():
        walks = [figures["0.0002"]["walk"]["peers"].get(peer) for figures in held.values()]
        assert rows[row] == ["–" if walk is None else percent(walk["error_of_way"]) for walk in walks]


@pytest.mark.parametrize("case", ["constant", "walk"])
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("momentum", ["0.01", "0.0002", "1e-05"])
def test_nobody_was_more_exact_at_the_same_memory(held, momentum, case):
    """But torch_ema, by 7 %, at a momentum of .01 in float32 of bfloat16 weights: it rounds once more than lerp_."""
    peers = figures_of("fidelity.json")["held"][held][momentum][case]["peers"]
    ours = min(figures["error"] for name, figures in peers.items() if name.startswith(OURS))
    known = 1.07 if (held, momentum) == ("float32 of bfloat16 weights", "0.01") else 1.02
    assert ours <= known * min(figures["error"] for figures in peers.values())
