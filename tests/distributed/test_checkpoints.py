"""Checkpoints of all ranks: saved by some, loaded by others, with kills and failures in between."""

import math
from collections import Counter, deque
from datetime import datetime, timedelta, timezone
from threading import Event
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, EarlyStopping
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from ignite_ema import EMAHandler
from ignite_ema.distributed import ShardedSaver, gathered_state_dict, load_objects
from tests.distributed.worker import Net, Run, full, full_bits, gathers_on_cpu, in_worlds
from tests.helpers.bits import assert_same_bits
from tests.helpers.files import files_in
from tests.helpers.worlds import run_world

pytestmark = gathers_on_cpu


def contents(run):
    optimizer = run.optimizer.state_dict()["state"]
    return {
        "model": full_bits(run.handler.model),
        "average": full_bits(run.handler.ema_model),
        "optimizer": {(i, key): full(value).tolist() for i in optimizer for key, value in optimizer[i].items()},
        "count": run.handler.num_updates,
        "trainer": (run.trainer.state.iteration, run.trainer.state.epoch, run.trainer.state.ema_momentum),
    }


def saves(folder, case="FSDP2", until=5, every=2, n_saved=1, asynchronous=False):
    run = Run(case)
    checkpoint = run.checkpoint(folder / "checkpoints", n_saved, asynchronous=asynchronous)
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=every), checkpoint)
    kept = {}
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=every), lambda: kept.update(contents(run)))
    run.train(until)
    checkpoint.save_handler.wait()
    return kept


def loads(folder, case, name):
    run = Run(case, seed=1)
    load_objects(run.objects(), folder / "checkpoints" / name)
    return contents(run)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_world(folder, 2, saves)[0]


LOADING = {"plain": [1], "FSDP2": [1, 3], "DDP": [2], "FSDP2 over several meshes": [4]}


@in_worlds(LOADING)
def test_any_number_of_ranks_loads_what_two_have_saved(saved, ranks, case):
    folder, due = saved
    for got in run_world(folder, ranks, loads, case, "checkpoint_4.pt"):
        for kind in ("model", "average"):
            got[kind]["cache"] = due[kind]["cache"]  # which is in no checkpoint
        assert got == due


def test_saving_in_the_background_saves_what_was_there_then_and_the_last_n_stay(world, tmp_path):
    due = world(2, saves, "FSDP2", 6, 2, 2, True)[0]
    assert files_in(tmp_path / "checkpoints") == ["checkpoint_4.pt", "checkpoint_6.pt"]
    got = run_world(tmp_path, 1, loads, "plain", "checkpoint_6.pt")[0]
    assert {name for name in due["average"] if got["average"][name] != due["average"][name]} <= {"cache"}
    assert got["count"] == due["count"] == 6


def gathers(folder, case):
    run = Run(case)
    run.train(2)
    state = gathered_state_dict(run.handler)
    assert bool(state) == (dist.get_rank() == 0)
    due = full_bits(run.handler.ema_model)
    run.train(3)  # what was gathered is a copy
    if state:
        plain = Net()
        plain.load_state_dict(state)
        got = full_bits(plain)
        assert {name for name in due if name != "cache" and got[name] != due[name]} == set()


@in_worlds({"FSDP2": [1, 3], "FSDP2 over several meshes": [4]})
def test_the_whole_average_is_gathered_on_the_first_rank(world, ranks, case):
    world(ranks, gathers, case)


class Small:
    """A model, an optimizer with a parameter that no step has reached, and one step."""

    def __init__(self, width=2):
        self.model = nn.ModuleDict({"model": nn.Linear(width, 1), "unused": nn.Linear(1, 1)})
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.handler = EMAHandler(self.model, 0.5)
        self.objects = {"model": self.model, "optimizer": self.optimizer, "ema_handler": self.handler}

    def save(self, folder):
        self.model["model"](torch.ones(self.model["model"].in_features)).sum().backward()
        self.optimizer.step()
        self.handler.average.update(0.5)
        saver = ShardedSaver(folder)
        states = {name: value.state_dict() for name, value in self.objects.items()}
        saver(states if len(states) > 1 else next(iter(states.values())), "one.pt")
        return folder / "one.pt"


def assert_loaded(small, other):
    for name in small.objects:
        assert_same_bits(other.objects[name].state_dict(), small.objects[name].state_dict())


def test_an_optimizer_gets_its_state_where_it_had_some(tmp_path):
    small, fresh = Small(), Small()
    trainer = Engine(lambda engine, batch: None)  # is alive as long as the test
    fresh.handler.attach(trainer, optimizer=fresh.optimizer)
    path = small.save(tmp_path)
    assert sorted(small.optimizer.state_dict()["state"]) == [0, 1]
    weights = fresh.model["model"].weight.detach().clone()
    load_objects({"optimizer": fresh.optimizer}, path)
    assert torch.equal(fresh.model["model"].weight, weights)
    load_objects(fresh.objects, path)
    assert_loaded(small, fresh)
    assert all(parameter.grad is None for parameter in fresh.model.parameters())
    assert not fresh.handler.state_dict()["optimizer_stepped"]  # torch's own way steps for it


@pytest.mark.parametrize("name", ["model", "optimizer", "ema_handler"])
def test_a_single_object_is_loaded(tmp_path, name):
    small, fresh = Small(), Small()
    small.objects = {name: small.objects[name]}
    load_objects({name: fresh.objects[name]}, small.save(tmp_path))
    assert_loaded(small, fresh)


def test_a_checkpoint_of_other_objects_is_refused(tmp_path):
    path = Small().save(tmp_path)
    wide = Small(3)
    before = full_bits(wide.model)
    fewer = torch.optim.AdamW(list(Small().model.parameters())[:1])
    for objects, message in (
        (wide.objects, r"'model.weight' of shape \(1, 2\), which is \(1, 3\) here; load"),
        ({"other": nn.Linear(1, 1), **Small().objects}, "'other' in it is missing; load"),
        ({"model": nn.Linear(2, 1)}, "has no 'weight'"),
        ({"model": nn.ModuleDict({"model": nn.Linear(2, 1)})}, r"has 'unused\.\w+', which is not in the model"),
        ({"optimizer": fewer}, r"has 'state.1.\w+', and there are 1 parameters here"),
    ):
        with pytest.raises(ValueError, match=message):
            load_objects(objects, path)
    assert full_bits(wide.model) == before


@pytest.mark.usefixtures("process_group")
def test_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    model, goes_on, write = nn.Linear(2, 1), Event(), FileSystemWriter.write_data
    nn.init.constant_(model.weight, 1)
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *args: goes_on.wait(30) and write(*args))
    saver = ShardedSaver(tmp_path, asynchronous=True)
    saver({"model": model.state_dict(), "other": {"values": [torch.ones(1), (1, 2)]}}, "one.pt")
    nn.init.constant_(model.weight, 2)
    assert not (tmp_path / "one.pt").exists()
    goes_on.set()
    saver.wait()
    load_objects({"model": model}, tmp_path / "one.pt")
    assert model.weight.tolist() == [[1, 1]]


SCORES = [
    *(np.float64(0.5), np.arange(3.0), torch.tensor(0.5), math.inf, None, (1, "two"), {1, 2}, deque([1, 2]), b"bytes"),
    *(datetime(2026, 11, 30, tzinfo=timezone.utc), timedelta(1)),
]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("score", SCORES, ids=lambda score: type(score).__name__)
@pytest.mark.usefixtures("process_group")
def test_any_score_of_early_stopping_comes_back(tmp_path, score, asynchronous):
    """Such a score was saved, the older checkpoint dropped, and the new one refused (issue 21)."""
    trainer = Engine(lambda engine, batch: None)
    stopping, fresh = (EarlyStopping(3, lambda engine: score, trainer) for _ in range(2))
    stopping.best_score = score
    saver = ShardedSaver(tmp_path, asynchronous=asynchronous)
    checkpoint = Checkpoint({"stopping": stopping, "model": nn.Linear(1, 1)}, saver, n_saved=1)
    for iteration in range(2):
        trainer.state.iteration = iteration
        checkpoint(trainer)
    saver.wait()
    assert files_in(tmp_path) == ["checkpoint_1.pt"]
    load_objects({"stopping": fresh}, tmp_path / "checkpoint_1.pt")
    assert type(fresh.best_score) is type(score)
    assert np.array_equal(fresh.best_score, score)


STATES = [
    ({"seen": [torch.ones(2), torch.zeros(1)]}, {"seen": []}),
    ({"seen": []}, {"seen": [torch.ones(2)]}),
    ({"streams": [{"a": 1}, {"a": torch.ones(1)}]}, {"streams": [{"a": 0}, {"a": None}]}),
    ({"milestones": Counter({5: 1, 8: 2})}, {"milestones": Counter({5: 1, 8: 1})}),
    ({"best": 0.5, "hooks": {}, "new": torch.ones(1)}, {"best": torch.ones(3), "hooks": {}}),
]


@pytest.mark.parametrize(("saved", "current"), STATES)
def test_a_state_comes_back_as_it_was_saved(tmp_path, saved, current):
    ShardedSaver(tmp_path)({"object": saved, "other": {"count": 1}}, "one.pt")
    some = Mock(**{"state_dict.return_value": current})
    load_objects({"object": some}, tmp_path / "one.pt")
    (loaded,) = some.load_state_dict.call_args.args
    assert_same_bits(loaded, saved)
    assert type(loaded.get("milestones")) is type(saved.get("milestones"))


def test_an_optimizer_that_has_stepped_goes_back_to_one_that_has_not(tmp_path):
    small, fresh = Small(), Small()
    ShardedSaver(tmp_path / "fresh")({"optimizer": fresh.optimizer.state_dict(), "other": {"count": 1}}, "one.pt")
    small.save(tmp_path / "other")
    load_objects({"optimizer": small.optimizer}, tmp_path / "fresh" / "one.pt")
    assert small.optimizer.state_dict()["state"] == {}


# The stages of a pipeline: a part of a model on each rank, with a handler and an optimizer of its own
def objects_of_stage(rank):
    model = nn.ModuleDict({f"stage{rank}": nn.Linear(2 + rank, 1)})
    return {"model": model, "handler": EMAHandler(model), f"optimizer{rank}": torch.optim.AdamW(model.parameters())}


def saves_and_loads_stages(folder):
    rank = dist.get_rank()
    stage, other = objects_of_stage(rank), objects_of_stage(rank)
    stage["model"][f"stage{rank}"](torch.ones(1, 2 + rank)).sum().backward()
    stage[f"optimizer{rank}"].step()
    stage["handler"].average.update(0.5)
    ShardedSaver(folder / "saved")({name: one.state_dict() for name, one in stage.items()}, "1.pt")
    load_objects(other, folder / "saved" / "1.pt")
    for name, one in stage.items():
        assert_same_bits(other[name].state_dict(), one.state_dict())
    return stage["handler"].ema_model[f"stage{rank}"].weight.tolist()


def test_the_stages_of_a_pipeline_are_saved_together(world, tmp_path):
    due = world(2, saves_and_loads_stages)
    whole = nn.ModuleDict({"stage0": nn.Linear(2, 1), "stage1": nn.Linear(3, 1)})
    handler = EMAHandler(whole)
    load_objects({"handler": handler}, tmp_path / "saved" / "1.pt")
    assert [part.weight.tolist() for part in handler.ema_model.values()] == due
    assert handler.num_updates == 1
