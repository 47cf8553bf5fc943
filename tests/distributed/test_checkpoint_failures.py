"""Each step of saving and loading a sharded checkpoint fails on each rank: all say so, and the one before is whole."""

import re

import pytest
import torch
import torch.distributed as dist
from ignite.handlers.checkpoint import Checkpoint
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.optim import SGD

from ignite_ema import EMAHandler, distributed
from ignite_ema.checkpoints import directories
from ignite_ema.distributed import ShardedSaver, load_objects
from tests.distributed.worker import Net, sharded
from tests.helpers.bits import bits
from tests.helpers.worlds import run_world


class Fault(OSError):
    """What a step raises in these tests."""


def strike(*args, **options):
    raise Fault("the step failed")


def objects(value):
    torch.manual_seed(0)
    model = sharded(Net())
    with torch.device("meta"):
        twin = sharded(Net())
    handler = EMAHandler(model, ema_model=twin)
    with torch.no_grad():
        for parameter in [*model.parameters(), *twin.parameters()]:
            parameter.fill_(value)
    return {"model": model, "optimizer": SGD(model.parameters(), lr=0.1), "ema_handler": handler}


def states(these):
    return {name: one.state_dict() for name, one in these.items()}


def parameters(these):
    return [*these["model"].parameters(), *these["ema_handler"].ema_model.parameters()]


def weights(these):
    return [bits(parameter.to_local()) for parameter in parameters(these)]


def loaded(path):
    """The one value of all weights in a checkpoint; None if there is none."""
    these = objects(0.0)
    try:
        load_objects(these, path)
    except FileNotFoundError:
        return None
    (value,) = {parameter.full_tensor().unique().item() for parameter in parameters(these)}
    return value


def names(folder):
    dist.barrier()
    found = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    return found


# Steps: the attribute that is replaced on one rank.
SAVING = {
    "clears": (distributed._Writer, "clear"),
    "sees": (distributed._Writer, "check_seen"),
    "copies": (distributed, "_copied"),
    "plans": (FileSystemWriter, "prepare_local_plan"),
    "writes": (FileSystemWriter, "write_data"),
    "completes": (FileSystemWriter, "finish"),
    "synchronises": (distributed, "sync_directory"),
    "removes": (distributed, "_remove"),
}
LOADING = {
    "opens": (distributed, "DirectoryReader"),
    "prepares": (distributed, "_targets"),
    "checks": (directories, "verify"),
    "reads": (directories.DirectoryReader, "read_data"),
    "fills": (Checkpoint, "load_objects"),
}
ON_FIRST = ["clears", "completes", "synchronises", "removes"]
IN_TURN = [("plans", 0), ("plans", 1), ("writes", 0), ("writes", 1), ("sees", 0), ("sees", 1)]
SAVES = [
    *((step, 0, asynchronous) for step in ON_FIRST for asynchronous in (False, True)),
    *((step, rank, False) for step, rank in IN_TURN),
    *(("copies", rank, True) for rank in (0, 1)),
    ("writes", 1, True),
]


def fails_to_save(folder, step, rank, asynchronous):
    """Saves one checkpoint; the next, which drops it, fails at a step of one rank; the one after that is fine."""
    saver = ShardedSaver(folder / "checkpoints", asynchronous=asynchronous)
    saver(states(objects(1.0)), "1.pt")
    saver.wait()
    saver.remove("1.pt")
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(*SAVING[step], strike)
        with pytest.raises(RuntimeError, match=r"2.pt' should be saved by all ranks, but") as raised:
            save_and_wait(saver, 2.0)
    assert names(saver.dirname) == (["1.pt", "2.pt"] if step == "removes" else ["1.pt"])
    assert loaded(saver.dirname / "1.pt") == 1.0
    save_and_wait(saver, 3.0)
    assert names(saver.dirname) == ["2.pt"]
    assert loaded(saver.dirname / "2.pt") == 3.0
    return str(raised.value)


def save_and_wait(saver, value):
    saver(states(objects(value)), "2.pt")
    saver.wait()


@pytest.mark.parametrize(("step", "rank", "asynchronous"), SAVES)
def test_a_rank_that_fails_to_save_is_named_by_the_others(tmp_path, step, rank, asynchronous):
    for index, text in enumerate(run_world(tmp_path, 2, fails_to_save, step, rank, asynchronous)):
        assert "the step failed" in text
        assert "\n" not in text
        if index != rank and step != "clears":  # that the first rank alone does
            assert re.search(f"rank {rank}", text)
            assert f"rank {1 - rank}" not in text


def fails_to_load(folder, step, rank):
    ShardedSaver(folder / "checkpoints")(states(objects(1.0)), "1.pt")
    these = objects(3.0)
    before = weights(these)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(*LOADING[step], strike)
        with pytest.raises(OSError, match="the step failed") as raised:
            load_objects(these, folder / "checkpoints" / "1.pt")
    if step != "fills":
        assert weights(these) == before
    return str(raised.value)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", LOADING)
def test_a_rank_that_fails_to_load_is_named_by_the_others_and_nothing_is_loaded(tmp_path, step, rank):
    said = run_world(tmp_path, 2, fails_to_load, step, rank)
    assert f"rank {rank}" in said[1 - rank]


# Ranks that differ


def saves_differently(folder, what):
    other = dist.get_rank() == 1
    saver = ShardedSaver(folder / "checkpoints")
    saver(states(objects(1.0)), "1.pt")
    state = states(objects(2.0))
    if what == "shape" and other:
        state["model"]["norm.running_mean"] = torch.zeros(6)
    elif what == "type" and other:
        state["model"]["norm.running_mean"] = torch.zeros(5, dtype=torch.float64)
    elif what == "sharding":
        whole = state["model"]["body.weight"].full_tensor()
        state["model"]["body.weight"] = whole if other else state["model"]["body.weight"]
    with pytest.raises(ValueError, match="under one name should be alike on all ranks") as raised:
        saver(state, "2.pt")
    assert names(saver.dirname) == ["1.pt"]
    return str(raised.value)


DIFFERENCES = {
    "shape": "'model.norm.running_mean' (torch.float32, (5,), whole) on rank 0 and (torch.float32, (6,), whole)",
    "type": "(torch.float64, (5,), whole) on rank 1; ",
    "sharding": "on rank 0 and (torch.float32, (5, 5), whole) on rank 1; ",
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_save_other_tensors_under_one_name_are_refused_on_all(tmp_path, what):
    first, second = run_world(tmp_path, 2, saves_differently, what)
    assert first == second
    assert DIFFERENCES[what] in first


def names_differently(folder):
    """As scores and clocks that differ between the ranks lead to."""
    rank = dist.get_rank()
    saver = ShardedSaver(folder / f"run_{rank}")
    saver(states(objects(1.0)), f"score={rank}.pt")
    saver.remove(f"score={rank}.pt")
    saver(states(objects(2.0)), f"score={rank + 2}.pt")
    assert names(folder) == ["run_0"]
    assert names(saver.dirname) == ["score=2.pt"]
    assert loaded(folder / f"run_{rank}" / f"score={rank + 2}.pt") == 2.0


def test_the_names_of_the_first_rank_count_for_all(tmp_path):
    run_world(tmp_path, 2, names_differently)


def does_not_see_it(folder):
    saver = ShardedSaver(folder / "checkpoints")
    if dist.get_rank() == 1:
        saver.dirname = folder / "another machine's"
    with pytest.raises(RuntimeError, match="it does not see") as raised:
        saver(states(objects(1.0)), "1.pt")
    return str(raised.value)


def test_a_rank_with_a_file_system_of_its_own_is_named(tmp_path):
    first, _ = run_world(tmp_path, 2, does_not_see_it)
    assert "rank 1" in first


def fails_on_the_first(folder):
    (folder / "full").write_text("")
    with pytest.raises(OSError, match="full"):
        ShardedSaver(folder / "full")
    (folder / "used").mkdir(exist_ok=True)
    (folder / "used" / "file").write_text("")
    with pytest.raises(ValueError, match="should be empty, but has 'file' among 1 entries"):
        ShardedSaver(folder / "used")


def test_a_directory_that_cannot_be_used_is_refused_on_all_ranks(tmp_path):
    run_world(tmp_path, 2, fails_on_the_first)
