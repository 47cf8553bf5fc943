"""The script for a machine with a GPU, as far as it runs without one."""

import pytest
import torch
import torch.distributed as dist

from tests.benchmarks import gpu
from tests.distributed.worker import gathers_on_cpu

LAUNCHES = ["void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LerpFunctor>"] * 2


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """What the profiler would see of each call, which is made."""
    names = list(LAUNCHES)
    monkeypatch.setattr(gpu, "kernels_of", lambda call: [call(), *names][1:])
    return names


def test_without_a_gpu_it_says_so_and_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="find an NVIDIA GPU, but there is none") as raised:
        gpu.main([str(tmp_path / "table.md")])
    assert raised.value.code  # a text, which Python prints, and ends with status 1
    assert raised.value.code.count(".") == 1
    assert not list(tmp_path.iterdir())


PARTS = {
    "updates": lambda: gpu.updates("cpu", models=["mlp"], rounds=2),
    "fast paths": lambda: gpu.fast_paths("cpu", tensors=3),
    "graph": lambda: gpu.graph("cpu", model="mlp", rounds=2),
    "offload": lambda: gpu.offload("cpu", width=8, rounds=2),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_the_parts_that_run_on_a_cpu_find_nothing_wrong(part):
    rows = list(part())
    assert rows
    assert all(row.is_right for row in rows), rows


@gathers_on_cpu
@pytest.mark.filterwarnings("ignore:'0.weight' holds a NaN:ignite_ema.EMAWarning")
def test_an_average_of_shards_on_one_device_is_right():
    rows = list(gpu.sharded("cpu", width=8))
    assert [row.is_right for row in rows] == [True, True], rows
    assert not dist.is_initialized()


@pytest.mark.slow
def test_the_suite_counts_what_was_skipped():
    (tests,) = gpu.suite("cpu", ["tests/unit/test_schedules.py", "tests/integration/test_cuda.py", "-n0"])
    assert tests.is_right
    assert tests.found.endswith(" 0 skipped" if torch.cuda.is_available() else " 1 skipped")


def test_launches_off_the_fast_path_and_none_at_all_are_wrong(launches):
    launches.append("void at::native::vectorized_elementwise_kernel<4>")
    (*_, row) = gpu.fast_paths("cpu", tensors=3)
    assert not row.is_right
    assert "3 launches, 1 of them off the fast path, as void at::native::vectorized" in row.found
    launches.clear()
    (*_, row) = gpu.fast_paths("cpu", tensors=3)
    assert not row.is_right


def test_a_part_that_fails_is_a_line_of_the_table_and_the_others_go_on(tmp_path):
    file = tmp_path / "table.md"

    def fine(device):
        yield gpu.Row("it", "works")

    def broken(device):
        assert file.read_text(encoding="utf-8").endswith("The run is not over.\n")
        yield gpu.Row("a line", "before")
        raise ValueError("a | b")

    assert gpu.measured(file, "cpu", [fine])
    assert not gpu.measured(file, "cpu", [fine, broken, fine])
    rows = file.read_text(encoding="utf-8").splitlines()[4:]
    right = "| it | works | right |"
    assert rows == [right, "| a line | before | right |", "| broken | ValueError: a / b | wrong |", right]
    assert list(tmp_path.iterdir()) == [file]
