"""Checkpoints of all ranks: saved by some, loaded by others, with kills and failures in between."""

import errno
import os
import shutil
import time

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from ignite.handlers import Checkpoint
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ignite_ema import EMAHandler
from ignite_ema.distributed import ShardedSaver, gathered_state_dict, load_objects
from ignite_ema.handlers.optimizer_steps import StepWatch
from tests.distributed.worker import Net, Run, full, full_bits, in_worlds
from tests.helpers.files import Evil
from tests.helpers.worlds import run_world, start_world

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch gathers no weights on a CPU"
)


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


LOADING = {
    "plain": [1],
    "FSDP2": [1, 3],
    "DDP": [2],
    "FSDP2 over several meshes": [4],
}


@in_worlds(LOADING)
def test_any_number_of_ranks_loads_what_two_have_saved(saved, ranks, case):
    assert_loads(*saved, ranks, case)


def test_other_meshes_load_what_several_have_saved(world, tmp_path):
    assert_loads(tmp_path, world(4, saves, "FSDP2 with replicas")[0], 3, "FSDP2")


def assert_loads(folder, due, ranks, case):
    for got in run_world(folder, ranks, loads, case, "checkpoint_4.pt"):
        for key, value in due.items():
            if isinstance(value, dict):
                assert got[key].keys() == value.keys()
                assert {name for name in value if name != "cache" and got[key][name] != value[name]} <= (
                    {"cache"} if key == "model" else set()
                )
            else:
                assert got[key] == value


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_saving_in_the_background_saves_what_was_there_then_and_the_last_n_stay(world, tmp_path):
    due = world(2, saves, "FSDP2", 6, 2, 2, True)[0]
    assert names(tmp_path) == ["checkpoint_4.pt", "checkpoint_6.pt"]
    got = run_world(tmp_path, 1, loads, "plain", "checkpoint_6.pt")[0]
    assert got["average"] == due["average"]
    assert got["count"] == due["count"] == 6


def saves_until_killed(folder, name):
    run = Run("FSDP2")
    checkpoint = Checkpoint(run.objects(), ShardedSaver(folder / name), n_saved=1)
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, checkpoint)
    run.train(10_000)


def loads_all(folder):
    counts = []
    for checkpoint in sorted(folder.glob("*/checkpoint_*.pt")):
        run = Run("plain", seed=1)
        load_objects(run.objects(), checkpoint)
        assert checkpoint.name == f"checkpoint_{run.handler.num_updates}.pt"
        assert run.trainer.state.iteration == run.handler.num_updates
        counts.append(checkpoint.parent.name)
    return counts


@pytest.mark.slow
def test_a_kill_at_any_time_leaves_a_checkpoint_that_loads(tmp_path):
    for i, name in enumerate(("one", "other")):
        running = start_world(tmp_path, 2, saves_until_killed, name)
        end = time.monotonic() + 30
        while not list((tmp_path / name).glob("checkpoint_*.pt")):
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.1 * i + 0.011)
        running.kill()
    assert set(run_world(tmp_path, 1, loads_all)[0]) == {"one", "other"}


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


GATHERED = {"FSDP2": [1, 3], "FSDP2 over several meshes": [4]}


@in_worlds(GATHERED)
def test_the_whole_average_is_gathered_on_the_first_rank(world, ranks, case):
    world(ranks, gathers, case)


NOT_SAVED = (
    r"checkpoints/checkpoint_3.pt' should be saved by all ranks, but rank 1 could not \(\w+Error: .*No space left on "
    r"device\); the checkpoint before it is still there"
)


def fails_in_between(folder):
    """Writes a checkpoint, then one that fails on the second rank, then another one, which says so."""
    run = Run("FSDP2")
    checkpoint = run.checkpoint(folder / "checkpoints", asynchronous=True)

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save(until):
        run.train(until)
        checkpoint(run.trainer)

    save(2)
    with pytest.MonkeyPatch.context() as patch:
        checkpoint.save_handler.wait()
        if dist.get_rank() == 1:
            patch.setattr(FileSystemWriter, "write_data", fail)
        save(3)
        with pytest.raises(RuntimeError, match=NOT_SAVED):
            save(4)
    checkpoint.save_handler.wait()  # it was said once
    dist.barrier()
    assert names(folder) == ["checkpoint_2.pt"]
    dist.barrier()
    save(5)
    checkpoint.save_handler.wait()
    dist.barrier()
    assert names(folder) == ["checkpoint_5.pt"]


def test_a_failure_in_the_background_is_raised_by_the_next_save_on_all_ranks(world):
    world(2, fails_in_between)


def fails_to_save(folder):
    (folder / "full").write_text("")
    with pytest.raises(OSError, match="full"):
        ShardedSaver(folder / "full")
    (folder / "used").mkdir(exist_ok=True)
    (folder / "used" / "file").write_text("")
    with pytest.raises(ValueError, match="should be empty, but has 'file' among 1 entries"):
        ShardedSaver(folder / "used")


def test_all_ranks_raise_what_goes_wrong_on_the_first(world):
    world(2, fails_to_save)


# From here on one process suffices, without a group.


class Small:
    """A model, an optimizer with a parameter that no step has reached, and one step."""

    def __init__(self, width=2):
        self.model = nn.ModuleDict({"model": nn.Linear(width, 1), "unused": nn.Linear(1, 1)})
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.handler = EMAHandler(self.model, 0.5)
        self.objects = {"model": self.model, "optimizer": self.optimizer, "ema_handler": self.handler}

    def save(self, folder, extra=None, **objects):
        self.model["model"](torch.ones(self.model["model"].in_features)).sum().backward()
        self.optimizer.step()
        self.handler.average.update(0.5)
        saver = ShardedSaver(folder)
        states = {name: value.state_dict() for name, value in (objects or self.objects).items()}
        saver(states if len(states) > 1 else next(iter(states.values())), "one.pt")
        return folder / "one.pt"


def assert_loaded(small, other):
    for name in small.objects:
        due, got = small.objects[name].state_dict(), other.objects[name].state_dict()
        assert torch.utils._pytree.tree_all(
            lambda same: same,
            torch.utils._pytree.tree_map(
                lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, due, got
            ),
        ), name


def test_an_optimizer_gets_its_state_where_it_had_some(tmp_path):
    small, fresh = Small(), Small()
    path = small.save(tmp_path)
    assert sorted(small.optimizer.state_dict()["state"]) == [0, 1]
    weights = fresh.model["model"].weight.detach().clone()
    load_objects({"optimizer": fresh.optimizer}, path)
    assert torch.equal(fresh.model["model"].weight, weights)
    load_objects(fresh.objects, path)
    assert_loaded(small, fresh)
    assert all(parameter.grad is None for parameter in fresh.model.parameters())


def test_making_that_state_is_no_step_for_those_who_watch(tmp_path):
    path, fresh, seen = Small().save(tmp_path), Small(), []
    watch = StepWatch(fresh.optimizer)
    handles = [
        fresh.optimizer.register_step_pre_hook(lambda *args: seen.append("before")),
        fresh.optimizer.register_step_post_hook(lambda *args: seen.append("after")),
        register_optimizer_step_pre_hook(lambda *args: seen.append("before any")),
        register_optimizer_step_post_hook(lambda *args: seen.append("after any")),
    ]
    try:
        load_objects(fresh.objects, path)
        assert not watch.has_stepped
        assert seen == []
        fresh.optimizer.step()
        assert watch.has_stepped
        assert sorted(seen) == ["after", "after any", "before", "before any"]
    finally:
        for handle in handles:
            handle.remove()
    fresh.optimizer.step()
    assert len(seen) == 4


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", ["model", "optimizer", "ema_handler"])
def test_one_of_the_objects_or_a_single_one_is_loaded(tmp_path, name, alone):
    small, fresh = Small(), Small()
    path = small.save(tmp_path, **({name: small.objects[name]} if alone else {}))
    load_objects({name: fresh.objects[name]}, path)
    small.objects = {name: small.objects[name]}
    assert_loaded(small, fresh)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    small = Small()
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "nothing" / "deeper"):
        with pytest.raises(FileNotFoundError, match="should be a directory that ShardedSaver wrote"):
            load_objects(small.objects, path)


def test_a_checkpoint_of_other_objects_is_refused(tmp_path):
    path = Small().save(tmp_path)
    before = full_bits(Small(3).model).keys()
    wide, other = Small(3), nn.Linear(1, 1)
    held = full_bits(wide.model)
    with pytest.raises(
        ValueError, match=r"should be a checkpoint of these objects, but: Size mismatch .*weight; load it"
    ):
        load_objects(wide.objects, path)
    assert full_bits(wide.model) == held
    assert before == held.keys()
    with pytest.raises(ValueError, match=r"but: Missing key in checkpoint state_dict: other\.\w+; load it"):
        load_objects({"other": other, **Small().objects}, path)


def test_hostile_values_are_refused_and_nothing_is_run(tmp_path):
    target = tmp_path / "touched"
    saver = ShardedSaver(tmp_path / "saved")
    small = Small()
    state = {name: value.state_dict() for name, value in small.objects.items()}
    state["ema_handler"]["num_updates"] = Evil(os.system, (f"touch {target}",))
    saver(state, "one.pt")
    target.unlink(missing_ok=True)  # saving runs nothing, but let it be sure
    with pytest.raises(ValueError, match="'ema_handler.num_updates' holds something else than plain values") as raised:
        load_objects(small.objects, tmp_path / "saved" / "one.pt")
    assert "\n" not in str(raised.value)
    assert not target.exists()


def test_nothing_that_can_be_seen_is_removed_by_halves(tmp_path, monkeypatch):
    removed, rmtree = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: (removed.append(path.name), rmtree(path, **options)))
    saver = ShardedSaver(tmp_path)
    for i in range(3):
        if i > 0:
            saver.remove(f"{i - 1}.pt")
        saver({"object": {"value": i}}, f"{i}.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["2.pt"]
    assert all(name.startswith(".") for name in removed)


def test_saving_in_the_background_needs_a_group(tmp_path):
    with pytest.raises(ValueError, match="asynchronous should be False where there is no process group, got True"):
        ShardedSaver(tmp_path, asynchronous=True)
