"""The script of the documentation that trains a sharded model: it resumes on any number of ranks, also after a kill."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRAIN = (ROOT / "docs" / "guides" / "train_sharded.py").read_text(encoding="utf-8")
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


def iteration_of(checkpoint):
    return int(checkpoint.stem.partition("_")[2])


@pytest.mark.parametrize("victims", [["1"], ["0", "1"]], ids=["one rank", "all ranks"])
def test_the_sharded_script_is_killed_and_goes_on_to_the_same_average(tmp_path, victims):
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
    train(tmp_path / "straight", 2, epochs)
    got, due = averaged(tmp_path), averaged(tmp_path / "straight")
    for name in due:
        if name.endswith("in_proj_bias"):
            # A bias of keys changes nothing: its gradient is rounding noise, which AdamW scales up.
            got[name][16:32] = due[name][16:32]
        torch.testing.assert_close(got[name], due[name], rtol=1e-5, atol=1e-6)
