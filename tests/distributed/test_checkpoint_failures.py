"""Each step of saving and loading a sharded checkpoint fails on each rank: all say so, and the one before is whole."""

import pytest
import torch
import torch.distributed as dist
from ignite.handlers.checkpoint import Checkpoint
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.optim import SGD

from ignite_ema import EMAHandler, distributed
from ignite_ema.checkpoints import directories
from ignite_ema.distributed import ShardedSaver, load_objects
from tests.distributed.worker import Net, sharded
from tests.helpers.bits import bits


def strike(*args, **options):
    raise OSError("the step failed")


def objects(value):
    model = sharded(Net())
    with torch.device("meta"):
        twin = sharded(Net())
    handler = EMAHandler(model, ema_model=twin)
    these = {"model": model, "optimizer": SGD(model.parameters(), lr=0.1), "ema_handler": handler}
    with torch.no_grad():
        for parameter in parameters(these):
            parameter.fill_(value)
    return these


def states(value):
    return {name: one.state_dict() for name, one in objects(value).items()}


def parameters(these):
    return [*these["model"].parameters(), *these["ema_handler"].ema_model.parameters()]


def loaded(path):
    """The one value of all weights in a checkpoint."""
    these = objects(0.0)
    load_objects(these, path)
    (value,) = {parameter.full_tensor().unique().item() for parameter in parameters(these)}
    return value


def names(folder):
    dist.barrier()
    found = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    return found


# Steps: the attribute that is replaced on one rank.
SAVING = {
    "copies": (distributed, "_copied"),
    "writes": (FileSystemWriter, "write_data"),
    "completes": (FileSystemWriter, "finish"),
    "removes": (distributed, "_remove"),
}
LOADING = {
    "opens": (distributed, "read_contents"),
    "checks": (directories, "verify"),
    "reads": (FileSystemReader, "read_data"),
    "fills": (Checkpoint, "load_objects"),
}
SAVES = [
    *(("completes", 0, False), ("completes", 0, True), ("removes", 0, False), ("removes", 0, True)),
    *(("writes", 0, False), ("writes", 1, False), ("writes", 1, True), ("copies", 1, True)),
]


def fails_to_save(folder, step, rank, asynchronous):
    """Saves one checkpoint; the next, which drops it, fails at a step of one rank; the one after that is fine."""
    saver = ShardedSaver(folder / "checkpoints", asynchronous=asynchronous)
    saver(states(1.0), "1.pt")
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
    saver(states(value), "2.pt")
    saver.wait()


@pytest.mark.parametrize(("step", "rank", "asynchronous"), SAVES)
def test_a_rank_that_fails_to_save_is_named_by_the_others(world, step, rank, asynchronous):
    """An error on rank 1 was blamed on rank 0 (issue 21)."""
    said = world(2, fails_to_save, step, rank, asynchronous)
    assert all("the step failed" in text for text in said)
    assert f"rank {rank}" in said[1 - rank]
    assert f"rank {1 - rank}" not in said[1 - rank]


def fails_to_load(folder, step, rank):
    ShardedSaver(folder / "checkpoints")(states(1.0), "1.pt")
    these = objects(3.0)
    before = [bits(parameter.to_local()) for parameter in parameters(these)]
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(*LOADING[step], strike)
        with pytest.raises(OSError, match="the step failed") as raised:
            load_objects(these, folder / "checkpoints" / "1.pt")
    if step != "fills":
        assert [bits(parameter.to_local()) for parameter in parameters(these)] == before
    return str(raised.value)


@pytest.mark.parametrize(("step", "rank"), [*((step, 1) for step in LOADING), ("reads", 0)])
def test_a_rank_that_fails_to_load_is_named_by_the_others_and_nothing_is_loaded(world, step, rank):
    assert f"rank {rank}" in world(2, fails_to_load, step, rank)[1 - rank]


def saves_differently(folder, what):
    saver = ShardedSaver(folder / "checkpoints")
    saver(states(1.0), "1.pt")
    state = states(2.0)["model"]
    whole = state["body.weight"].full_tensor()
    if dist.get_rank() == 1:
        state |= {"norm.running_mean": torch.zeros(6)} if what == "shape" else {"body.weight": whole}
    with pytest.raises(ValueError, match="under one name should be alike on all ranks") as raised:
        saver({"model": state, "other": {"count": 1}}, "2.pt")
    assert names(saver.dirname) == ["1.pt"]
    return str(raised.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", "'model.norm.running_mean' (torch.float32, (5,)) on rank 0 and (torch.float32, (6,)) on rank 1; "),
        ("sharding", "on rank 0 and (torch.float32, (5, 5)) on rank 1; "),
    ],
)
def test_ranks_that_save_other_tensors_under_one_name_are_refused_on_all(world, what, message):
    first, second = world(2, saves_differently, what)
    assert first == second
    assert message in first


def cannot_use(folder):
    (folder / "used").mkdir(exist_ok=True)
    (folder / "used" / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ShardedSaver(folder / "used" / "file")
    with pytest.raises(ValueError, match="should be empty, but has 'file'"):
        ShardedSaver(folder / "used")
    saver = ShardedSaver(folder / "checkpoints")
    if dist.get_rank() == 1:
        saver.dirname = folder / "another machine's"
    with pytest.raises(RuntimeError, match="it does not see") as raised:
        saver(states(1.0), "1.pt")
    assert "rank 1" in str(raised.value) or dist.get_rank() == 1


def test_a_directory_that_cannot_be_used_is_refused_on_all_ranks(world):
    world(2, cannot_use)


def names_differently(folder):
    """As scores and clocks that differ between the ranks lead to."""
    rank = dist.get_rank()
    saver = ShardedSaver(folder / f"run_{rank}")
    saver(states(1.0), f"score={rank}.pt")
    saver.remove(f"score={rank}.pt")
    saver(states(2.0), f"score={rank + 2}.pt")
    assert names(folder) == ["run_0"]
    assert names(saver.dirname) == ["score=2.pt"]
    assert loaded(folder / f"run_{rank}" / f"score={rank + 2}.pt") == 2.0


def test_the_names_of_the_first_rank_count_for_all(world):
    world(2, names_differently)
