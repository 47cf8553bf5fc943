"""Each step of saving and loading a sharded checkpoint, on each rank, fails in each way.

All ranks end within seconds, with one sentence, and the checkpoint before is whole.
"""

import os
import re
import signal
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ignite.handlers.checkpoint import Checkpoint
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.optim import SGD

from ignite_ema import EMAHandler
from ignite_ema.distributed import ShardedSaver, load_objects, loading, saver
from tests.distributed.worker import Net, sharded
from tests.helpers.bits import bits
from tests.helpers.worlds import outcomes, run_world

SECONDS = 20  # a fraction of the timeout of a group; two cores may be shared by many


class Fault(OSError):
    """What a step raises in these tests."""


def strike(how):
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
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


def weights(these):
    return [bits(p.to_local()) for name in ("model", "ema_handler") for p in parameters_of(these[name])]


def parameters_of(one):
    return (one.ema_model if isinstance(one, EMAHandler) else one).parameters()


# Steps: where on the path of a rank something fails; the attribute that is replaced there.
SAVING = {
    "agrees": (saver, "_description"),
    "clears": (ShardedSaver, "_clear"),
    "plans": (FileSystemWriter, "prepare_local_plan"),
    "writes": (FileSystemWriter, "write_data"),
    "completes": (FileSystemWriter, "finish"),
    "publishes": (ShardedSaver, "_publish"),
    "synchronises": (saver, "sync_directory"),
    "removes": (ShardedSaver, "_remove"),
}
COPYING = {"copies": (saver, "_copied")}  # in the background alone
FIRST_RANK_ALONE = {"clears", "completes", "publishes", "synchronises", "removes"}
LOADING = {
    "opens": (loading, "Reader"),
    "prepares": (loading, "_to_fill"),
    "plans": (loading.Planner, "create_local_plan"),
    "checks": (loading.Reader, "_check_chunk"),
    "reads": (loading.Reader, "read_data"),
    "fills": (Checkpoint, "load_objects"),
}


def saves_twice(folder, step, rank, how, asynchronous):
    """Publishes one checkpoint; the next, which replaces and drops, fails at a step of one rank."""
    saver_ = ShardedSaver(folder / "checkpoints", asynchronous=asynchronous)
    saver_(states(objects(1.0)), "1.pt")
    saver_.wait()
    dist.barrier()
    begin = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(*(SAVING | COPYING)[step], lambda *_, **__: strike(how))
        saver_.remove("1.pt")
        with pytest.raises((RuntimeError, OSError)) as raised:
            save_and_wait(saver_, objects(2.0), "2.pt")
    return str(raised.value), time.monotonic() - begin


def save_and_wait(saver_, these, filename):
    saver_(states(these), filename)
    saver_.wait()


SENTENCES = {
    "raises": r"should be saved by all ranks, but rank \d could not \(.*the step failed\); ",
    "is killed": "All ranks should answer, but one does not, and has probably ended; ",
}


def table(steps, first_rank_alone):
    rows = []
    for step in steps:
        for rank, how in product((0,) if step in first_rank_alone else (0, 1), ("raises", "is killed")):
            is_slow = how == "is killed" and (rank, step) not in {(1, "writes"), (0, "publishes"), (1, "checks")}
            marks = [pytest.mark.slow] if is_slow else []
            rows.append(pytest.param(step, rank, how, id=f"rank {rank} {how} when it {step}", marks=marks))
    return rows


BACKGROUND = table(["copies", *SAVING], FIRST_RANK_ALONE)
SAVES = [
    *(pytest.param(*row.values, False, id=row.id, marks=row.marks) for row in table(SAVING, FIRST_RANK_ALONE)),
    *(pytest.param(*row.values, True, id=f"{row.id} in the background", marks=pytest.mark.slow) for row in BACKGROUND),
    pytest.param("copies", 1, "raises", True, id="rank 1 raises when it copies in the background"),
]


@pytest.mark.parametrize(("step", "rank", "how", "asynchronous"), SAVES)
def test_a_rank_that_fails_to_save_is_reported_by_all(tmp_path, step, rank, how, asynchronous):
    found = outcomes(2, saves_twice, tmp_path, step, rank, how, asynchronous)
    assert_told(found, rank, how, SENTENCES[how] if step != "agrees" else "the step failed|" + SENTENCES["is killed"])
    assert whole_checkpoints(tmp_path) & {1.0, 2.0}
    run_world(tmp_path, 2, cleans_up)


def assert_told(found, rank, how, sentence):
    for index, outcome in enumerate(found):
        if index == rank and how == "is killed":
            assert "exit code -9" in outcome.error
            continue
        assert outcome.error is None, outcome.error
        text, seconds = outcome.result
        assert re.search(sentence, text), text
        assert "\n" not in text
        assert seconds < SECONDS


def whole_checkpoints(folder):
    """The values of the checkpoints that can be loaded under the names that they were saved under."""
    return {value for name, value in (("1.pt", 1.0), ("2.pt", 2.0)) if run_world(folder, 1, loads, name)[0] == value}


def loads(folder, name):
    these = objects(0.0)
    try:
        load_objects(these, folder / "checkpoints" / name)
    except FileNotFoundError:
        return None
    values = {p.full_tensor().unique().item() for one in ("model", "ema_handler") for p in parameters_of(these[one])}
    (value,) = values
    return value


def cleans_up(folder):
    ShardedSaver(folder / "checkpoints", require_empty=False)
    assert not [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]


def saves_one(folder):
    ShardedSaver(folder / "checkpoints")(states(objects(1.0)), "1.pt")


def fails_to_load(folder, step, rank, how):
    these = objects(3.0)
    before = weights(these)
    dist.barrier()
    begin = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(*LOADING[step], lambda *_, **__: strike(how))
        with pytest.raises((RuntimeError, OSError, ValueError)) as raised:
            load_objects(these, folder / "checkpoints" / "1.pt")
    if step not in ("reads", "fills"):
        assert weights(these) == before
    return str(raised.value), time.monotonic() - begin


@pytest.mark.parametrize(("step", "rank", "how"), table(LOADING, ()))
def test_a_rank_that_fails_to_load_is_reported_by_all(tmp_path, step, rank, how):
    run_world(tmp_path, 2, saves_one)
    found = outcomes(2, fails_to_load, tmp_path, step, rank, how)
    assert_told(found, rank, how, "the step failed" if how == "raises" else SENTENCES[how])
    assert whole_checkpoints(tmp_path) == {1.0}


def is_killed_among_four(folder, rank):
    saver_ = ShardedSaver(folder / "checkpoints")
    saver_(states(objects(1.0)), "1.pt")
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(FileSystemWriter, "write_data", lambda *_: strike("is killed"))
        with pytest.raises(RuntimeError) as raised:
            saver_(states(objects(2.0)), "2.pt")
    (folder / f"rank-{dist.get_rank()}").write_text(str(raised.value))
    os._exit(0)  # as a process does that this error ends; who is no neighbour of the killed one waits for its own


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_is_killed_ends_all_others_with_a_sentence(tmp_path, rank):
    found = outcomes(4, is_killed_among_four, tmp_path, rank)
    assert max(one.seconds for one in found) < SECONDS
    told = {path.name: path.read_text() for path in tmp_path.glob("rank-*")}
    assert told.keys() == {f"rank-{other}" for other in range(4) if other != rank}
    assert all(re.search(SENTENCES["is killed"], text) for text in told.values())


# Ranks that differ.


def saves_differently(folder, what):
    other = dist.get_rank() == 1
    saver_ = ShardedSaver(folder / "checkpoints")
    saver_(states(objects(1.0)), "1.pt")
    state, filename = states(objects(2.0)), "2.pt"
    if what == "file name" and other:
        filename = "3.pt"
    elif what == "object" and other:
        del state["ema_handler"]
    elif what == "parameter" and other:
        del state["model"]["body.weight"]
    elif what == "shape" and other:
        state["model"]["norm.running_mean"] = torch.zeros(6)
    elif what == "type" and other:
        state["model"]["norm.running_mean"] = torch.zeros(5, dtype=torch.float64)
    elif what == "sharding":
        whole = state["model"]["body.weight"].full_tensor()
        state["model"]["body.weight"] = whole if other else state["model"]["body.weight"]
    elif what == "what is dropped":
        saver_.remove("1.pt" if other else "0.pt")
    with pytest.raises(ValueError, match="A checkpoint should have the same") as raised:
        saver_(state, filename)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["1.pt"]
    return str(raised.value)


DIFFERENCES = {
    "file name": "should have the same name on all ranks, got the file name '2.pt' on rank 0 and '3.pt' on rank 1;",
    "object": "should have the same objects on all ranks, got 'ema_handler' on rank 0 and not on rank 1; ",
    "parameter": "should have the same objects on all ranks, got 'model.body.weight' on rank 0 and not on rank 1; ",
    "shape": "got 'model.norm.running_mean' (torch.float32, (5,), whole) on rank 0 and (torch.float32, (6,), whole)",
    "type": "(torch.float64, (5,), whole) on rank 1; ",
    "sharding": "over a mesh of (2,)) on rank 0 and (torch.float32, (5, 5), whole) on rank 1; ",
    "what is dropped": "what n_saved drops ['0.pt'] on rank 0 and ['1.pt'] on rank 1; take",
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_save_differently_are_refused_on_all(tmp_path, what):
    first, second = run_world(tmp_path, 2, saves_differently, what)
    assert first == second
    assert DIFFERENCES[what] in first


def loads_differently(folder, what):
    these = objects(3.0)
    other = dist.get_rank() == 1
    path = folder / "checkpoints" / "1.pt"
    if what == "path" and other:
        path = folder / "checkpoints" / "2.pt"
    elif what == "not seen" and other:
        path = folder / "elsewhere"
    elif what == "objects" and other:
        del these["optimizer"]
    before = weights(these)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_objects(these, path)
    assert weights(these) == before
    return str(raised.value)


LOADED = {
    "path": r"same objects from the same checkpoint, got the contents \w+ on rank 0 and \w+ on rank 1; ",
    "not seen": r"elsewhere' should be a directory that ShardedSaver wrote, .* '.metadata' in it \(on rank 1\); ",
    "objects": r"same checkpoint, got 'optimizer' on rank 0 and not on rank 1; ",
}


def saves_two(folder):
    saver_ = ShardedSaver(folder / "checkpoints")
    for value in (1.0, 2.0):
        saver_(states(objects(value)), f"{value:.0f}.pt")


@pytest.mark.parametrize("what", LOADED)
def test_ranks_that_load_differently_are_refused_on_all(tmp_path, what):
    run_world(tmp_path, 2, saves_two)
    first, second = run_world(tmp_path, 2, loads_differently, what)
    assert first == second
    assert re.search(LOADED[what], first), first


def is_made_differently(folder):
    where = Path(folder) / ("a" if dist.get_rank() == 0 else "b")
    with pytest.raises(ValueError, match="made alike on all ranks, got dirname '.*/a' on rank 0 and '.*/b' on rank 1;"):
        ShardedSaver(where)
    assert not where.exists()


def test_savers_that_are_made_differently_are_refused_on_all(tmp_path):
    run_world(tmp_path, 2, is_made_differently)
