"""Worlds of one to four processes: the contract, what an update costs, and checkpoints of all ranks.

A scenario is a function that each process of a world calls; the tests say which worlds.
"""

import errno
import os
import pickle
import re
import shutil
import signal
import socket
import time
import warnings
from functools import partial
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ignite_ema import EMAHandler, ModelAverage
from ignite_ema.distributed import ShardedSaver, gathered_state_dict, load_objects, sync_buffers
from ignite_ema.handlers.optimizer_steps import StepWatch
from tests.distributed.worker import (
    CASES,
    Net,
    Run,
    full,
    full_bits,
    full_tensors,
    is_sharded_case,
    local,
    local_bits,
    mesh,
    sharded,
    tensors,
)
from tests.helpers.worlds import run_world, start_world

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch gathers no weights on a CPU"
)

WORLDS = {
    "plain": [1],
    "compiled": [1],
    "DDP": [2],
    "compiled DDP": [2],
    "FSDP2": [2, 3],
    "FSDP2 in part": [3],
    "FSDP2 that keeps gathered weights": [2],
    "FSDP2 in mixed precision": [2],
    "FSDP2 with replicas": [4],
    "FSDP2 over several meshes": [4],
}
ALL_WORLDS = {**WORLDS, "DDP of a compiled model": [2], "compiled FSDP2": [2]}


def in_worlds(worlds):
    every = [pytest.param(n, case, id=f"{case} on {n}") for case, ranks in worlds.items() for n in ranks]
    return pytest.mark.parametrize(("ranks", "case"), every)


@pytest.fixture
def world(tmp_path):
    """Runs a scenario on all ranks of a world, and returns what it returns on each."""
    return partial(run_world, tmp_path)


# The contract.


def average_follows(folder, case):
    run = Run(case)
    due = {name: tensor.double() for name, tensor in full_tensors(run.handler.model).items()}
    trained = {name for name, _ in run.handler.model.named_parameters()}

    def follow():
        for name, tensor in full_tensors(run.handler.model).items():
            due[name] = torch.lerp(due[name], tensor.double(), 0.25) if name in trained else tensor.double()

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, follow)
    before = local_bits(run.handler.model)
    run.train(6)
    averaged = full_tensors(run.handler.ema_model)
    assert run.handler.num_updates == 6
    assert averaged.keys() == due.keys()
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor.double(), due[name], rtol=1e-6, atol=1e-6 if name in trained else 0)
    assert run.handler.ema_model.head.weight is run.handler.ema_model.embedding.weight
    changed = local_bits(run.handler.model)
    assert all(changed[name] != before[name] for name in trained if before[name][2])
    ours, theirs = (
        {local(t).untyped_storage().data_ptr() for t in tensors(m).values() if local(t).numel()}
        for m in (run.handler.ema_model, run.handler.model)
    )
    assert ours.isdisjoint(theirs)


@in_worlds(ALL_WORLDS)
def test_the_average_follows_a_float64_reference_on_full_tensors(world, ranks, case):
    world(ranks, average_follows, case)


def resumes(folder, case):
    straight = Run(case)
    straight.train(6)
    killed = Run(case)
    killed.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), killed.checkpoint(folder / "checkpoints"))
    killed.train(3)
    resumed = Run(case, seed=1)
    load_objects(resumed.objects(), folder / "checkpoints" / "checkpoint_3.pt")
    assert resumed.trainer.state.iteration == resumed.handler.num_updates == 3
    resumed.train(6)
    assert resumed.handler.num_updates == 6
    for due, got in (
        (straight.handler.model, resumed.handler.model),
        (straight.handler.ema_model, resumed.handler.ema_model),
    ):
        parameters = {name for name, _ in due.named_parameters()}
        due, got = local_bits(due), local_bits(got)
        # Buffers are saved from the first rank.
        wrong = {name for name in due if due[name] != got[name]}
        assert not (wrong & parameters if dist.get_rank() else wrong), wrong
    due, got = (run.optimizer.state_dict()["state"] for run in (straight, resumed))
    assert all(torch.equal(local(due[i][key]), local(got[i][key])) for i in due for key in due[i])


@in_worlds(WORLDS)
def test_resuming_is_exact(world, ranks, case):
    world(ranks, resumes, case)


def swaps(folder, case):
    run = Run(case)
    run.train(2)
    x = torch.arange(7)
    with torch.no_grad():
        run.model.eval()(x)  # which leaves the gathered weights with the root
    before = local_bits(run.handler.model)
    with run.handler.swapped(), torch.no_grad():
        got, due = run.model(x), run.handler.ema_model(x)
        assert torch.equal(got, due)
        assert local_bits(run.handler.model) == local_bits(run.handler.ema_model)
        got = run.model(x)
        saved = {name: tensor.clone() for name, tensor in run.handler.state_dict()["averaged_tensors"].items()}
    assert local_bits(run.handler.model) == before
    assert all(
        torch.equal(local(tensor), local(saved[name]))
        for name, tensor in run.handler.state_dict()["averaged_tensors"].items()
    )
    with torch.no_grad():
        assert not torch.equal(run.model(x), due)
    run.train(4)
    straight = Run(case)
    straight.train(4)
    assert local_bits(run.handler.model) == local_bits(straight.handler.model)
    assert local_bits(run.handler.ema_model) == local_bits(straight.handler.ema_model)


@in_worlds(WORLDS)
def test_swapping_is_exact(world, ranks, case):
    world(ranks, swaps, case)


# What an update costs.


def updates_without_communication(folder, case):
    run = Run(case, handle_buffers="update")
    run.train(1)
    average = ModelAverage(run.model, ema_model=run.handler.ema_model) if is_sharded_case(case) else None
    with CommDebugMode() as seen:
        for _ in range(3):
            run.handler._average.update(0.1)
            if average is not None:
                average.update(0.1)
    assert seen.get_total_counts() == 0
    with CommDebugMode() as seen:
        full_tensors(run.handler.model)
    assert (seen.get_total_counts() > 0) == is_sharded_case(case)  # it would have been seen


@pytest.mark.parametrize("case", ["DDP", "FSDP2", "FSDP2 in part", "FSDP2 over several meshes"])
def test_an_update_communicates_nothing(world, case):
    world(2, updates_without_communication, case)


class Even(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 12)

    def forward(self, x):
        return self.head(self.body(self.embedding(x)))


def bytes_held(folder):
    run = Run.__new__(Run)
    model = sharded(Even())
    with torch.device("meta"):
        twin = sharded(Even())
    run.handler = EMAHandler(model, ema_model=twin)
    return sum(local(tensor).untyped_storage().nbytes() for tensor in run.handler.ema_model.parameters())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_rank_holds_its_share_of_the_average(world, ranks):
    due = sum(parameter.nbytes for parameter in Even().parameters())
    assert world(ranks, bytes_held) == [due / ranks] * ranks


def compiles_once(folder, whole_step):
    torch.manual_seed(0)
    frames = torch._dynamo.testing.CompileCounter()
    plain = Net()
    model = torch.compile(plain, backend=frames, fullgraph=True)
    handler = EMAHandler(model, 0.25)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)

    def loss_of(x):
        return nn.functional.cross_entropy(plain(x), x)

    compiled_step = torch.compile(loss_of, backend=frames, fullgraph=True) if whole_step else None
    x = torch.arange(7)
    for _ in range(4):
        optimizer.zero_grad()
        (compiled_step(x) if whole_step else nn.functional.cross_entropy(model(x), x)).backward()
        optimizer.step()
        handler._average.update(0.25)
    assert frames.frame_count == 1  # a break would have raised
    forward = compiled_step if whole_step else model
    with torch.no_grad():
        forward(x)
    before = frames.frame_count
    with handler.swapped(), torch.no_grad():
        got = forward(x)
    assert frames.frame_count == before
    with torch.no_grad():
        handler.ema_model.train()
        due = handler.ema_model(x)
    assert torch.equal(got, nn.functional.cross_entropy(due, x) if whole_step else due)


@pytest.mark.parametrize("whole_step", [False, True], ids=["model", "step"])
def test_updates_and_swaps_compile_nothing_anew(world, whole_step):
    world(1, compiles_once, whole_step)


# What does not fit says so.


def sharded_along(dimension):
    return fsdp.fully_shard(Even(), mesh=mesh(), shard_placement_fn=lambda parameter: Shard(parameter.ndim - dimension))


def sharded_over_other_ranks():
    return fsdp.fully_shard(Even(), mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")))


TWINS = {
    "not sharded": (Even, "and not sharded in the twin"),
    "along another dimension": (partial(sharded_along, 1), r"and sharded as \(Shard\(dim=1\),\) over .* in the twin"),
    "over another mesh": (sharded_over_other_ranks, r"and sharded as \(Replicate\(\), Shard\(dim=0\)\) .* in the twin"),
}


def refuses_twins(folder):
    model = sharded(Even())
    before = local_bits(model)
    for make, text in TWINS.values():
        with pytest.raises(
            RuntimeError, match=rf"ema_model should .* model, but 'embedding.weight' is .* {text}; build"
        ):
            EMAHandler(model, ema_model=make())
    with pytest.raises(RuntimeError, match="is not sharded in the model and sharded as .* in the twin; build"):
        EMAHandler(Even(), ema_model=sharded(Even()))
    with pytest.raises(
        RuntimeError,
        match="ema_model should be a twin that is sharded as the model is, got None .* pass it as ema_model=",
    ):
        EMAHandler(model)
    assert local_bits(model) == before


def test_a_twin_that_is_sharded_otherwise_is_refused(world):
    world(2, refuses_twins)


def is_sharded_too_late(folder):
    model = Even()
    average = ModelAverage(model)
    sharded(model)
    before = local_bits(average.module)
    text = (
        "The model should keep .* 'embedding.weight' is sharded .* and not sharded in the twin "
        r"\(call fully_shard before the handler is made\); make the change before"
    )
    with pytest.raises(RuntimeError, match=text):
        average.update(0.5)
    with pytest.raises(RuntimeError, match=text), average.swapped():
        pass
    assert local_bits(average.module) == before


def test_a_model_that_is_sharded_after_its_average_was_made_is_refused(world):
    world(2, is_sharded_too_late)


def skips_together(folder, rank, case):
    model = CASES[case](Net())
    with torch.device("meta"):
        twin = CASES[case](Net())
    average = ModelAverage(model, ema_model=twin, skip_nonfinite=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        if dist.get_rank() == rank:
            model.body.weight.data.to_local().fill_(torch.nan)
    before = local_bits(twin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not average.update(0.5)
    assert average.num_skipped == 1
    assert local_bits(twin) == before


@pytest.mark.parametrize(
    ("ranks", "rank", "case"),
    [(2, 0, "FSDP2"), (2, 1, "FSDP2"), (4, 3, "FSDP2 with replicas"), (4, 2, "FSDP2 over several meshes")],
)
def test_a_nan_in_one_shard_is_skipped_on_all_ranks(world, ranks, rank, case):
    world(ranks, skips_together, rank, case)


# Ignite's own way to several processes.


def trains_with_idist(folder, port):
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with idist.Parallel("gloo") as parallel:
        results = []
        parallel.run(_train_with_idist, results)
    return results


def _train_with_idist(local_rank, results):
    torch.manual_seed(idist.get_rank())  # DDP takes the weights of the first rank
    model = idist.auto_model(Net())
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    handler = EMAHandler(model, 0.25, handle_buffers="update")
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1))

    def step(engine, batch):
        x = torch.randint(7, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x).backward()
        optimizer.step()

    trainer = Engine(step)
    handler.attach(trainer)
    trainer.run(range(5))
    for sync in (lambda: None, lambda: sync_buffers(handler.ema_model), lambda: sync_buffers(model, source=1)):
        sync()
        results.append(full_bits(handler.ema_model) | {"model": full_bits(handler.model)})


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("ranks", [2, 4])
def test_averages_are_equal_on_all_ranks_and_statistics_once_they_are_synchronised(world, ranks):
    averages, synced, last = zip(*world(ranks, trains_with_idist, free_port()), strict=True)
    statistics = {"norm.running_mean", "norm.running_var"}
    models = [average.pop("model") for average in averages]
    for first, *others in (averages, models):
        assert {name for name in first if any(other[name] != first[name] for other in others)} == statistics
    assert [other.pop("model") for other in synced] == models
    assert all(other == averages[0] for other in synced)
    assert all(other["model"] == models[1] for other in last)


class Statistics(nn.Module):
    """Buffers that a broadcast does not take as they are, and one that is sharded."""

    def __init__(self):
        super().__init__()
        rank = dist.get_rank()
        self.weight = nn.Parameter(torch.full((2,), float(rank)))
        self.register_buffer("transposed", torch.full((2, 3), float(rank)).t())
        self.register_buffer("count", torch.tensor(rank))
        self.register_buffer("flags", torch.tensor([rank == 1, True]), persistent=False)
        self.register_buffer("narrow", torch.full((2,), float(rank), dtype=torch.bfloat16))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("sharded", distribute_tensor(torch.arange(4.0), mesh(), [Shard(0)]))


def synchronises(folder):
    module = Statistics()
    before = module.sharded.to_local().clone()
    sync_buffers(module, source=1)
    assert torch.equal(module.transposed, torch.ones(3, 2))
    assert module.count.item() == 1
    assert module.flags.tolist() == [True, True]
    assert module.narrow.tolist() == [1, 1]
    assert torch.equal(module.sharded.to_local(), before)
    assert module.weight.tolist() == [dist.get_rank()] * 2


def test_buffers_of_any_kind_are_synchronised(world):
    world(2, synchronises)


def test_one_process_has_nothing_to_synchronise():
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(3)
    sync_buffers(norm)
    assert norm.running_mean.tolist() == [3, 3]


# A handler that is not made as it should be.


def is_made_before_ddp(folder, same_seed):
    torch.manual_seed(0 if same_seed else dist.get_rank())
    model = Even()
    handler = EMAHandler(model, 0.25)
    nn.parallel.DistributedDataParallel(model)  # which gives all ranks the weights of the first
    trainer = Engine(lambda engine, batch: None)
    handler.attach(trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run(range(1))
    return [text for warning in caught if (text := str(warning.message)).startswith("The model has")]


def test_an_average_that_was_made_of_other_weights_than_ddp_trains_is_reported(world):
    assert world(2, is_made_before_ddp, True) == [[], []]
    first, second = world(2, is_made_before_ddp, False)
    assert first == []
    assert [text.partition(" when ")[0] for text in second] == ["The model has other weights than"]


def is_made_on_the_first_rank_alone(folder, case):
    run = Run(case)
    objects = run.objects()
    if dist.get_rank() == 1:
        del objects["ema_handler"]
    checkpoint = Checkpoint(objects, ShardedSaver(folder / "checkpoints"))
    run.train(2)  # each rank averages by itself, so nothing waits
    with pytest.raises(
        ValueError,
        match="should have the same objects on all ranks, got 'ema_handler' on rank 0 and not on rank 1; build them",
    ):
        checkpoint(run.trainer)
    assert names(folder) == []


@pytest.mark.parametrize("case", ["DDP", "FSDP2"])
def test_a_handler_on_the_first_rank_alone_is_refused_when_it_is_saved(world, case):
    world(2, is_made_on_the_first_rank_alone, case)


# Checkpoints.


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
    "FSDP2": [1, 2, 3],
    "DDP": [2],
    "FSDP2 with replicas": [4],
    "FSDP2 over several meshes": [4],
}


@in_worlds(LOADING)
def test_any_number_of_ranks_loads_what_two_have_saved(saved, ranks, case):
    assert_loads(*saved, ranks, case)


@pytest.mark.parametrize("case", ["FSDP2 with replicas", "FSDP2 over several meshes"])
def test_other_meshes_load_what_several_have_saved(world, tmp_path, case):
    assert_loads(tmp_path, world(4, saves, case)[0], 3, "FSDP2")


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


def test_the_last_n_stay(world, tmp_path):
    world(2, saves, "FSDP2", 6, 1, 2)
    assert names(tmp_path) == ["checkpoint_5.pt", "checkpoint_6.pt"]


def test_saving_in_the_background_saves_what_was_there_then(world, tmp_path):
    due = world(2, saves, "FSDP2", 6, 2, 1, True)[0]
    assert names(tmp_path) == ["checkpoint_6.pt"]
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


def test_a_kill_at_any_time_leaves_a_checkpoint_that_loads(tmp_path):
    names = [f"run{i}" for i in range(5)]
    for i, name in enumerate(names):
        running = start_world(tmp_path, 2, saves_until_killed, name)
        end = time.monotonic() + 30
        while not list((tmp_path / name).glob("checkpoint_*.pt")):
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.03 * i + 0.011)
        running.kill()
    assert set(run_world(tmp_path, 1, loads_all)[0]) == set(names)


def dies_in_the_middle(folder, where):
    """Saves the same file twice and dies at a step of the second time."""
    run = Run("FSDP2")
    saver = ShardedSaver(folder / "checkpoints")
    checkpoint = Checkpoint(run.objects(), saver, filename_pattern="{name}.{ext}")
    run.train(1)
    checkpoint(run.trainer)
    run.train(2)
    rename, calls = Path.rename, []

    def dying(path, target):
        calls.append(path)
        if len(calls) == where:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(saver, "_publish", partial(_publish_dying, saver, saver._publish, dying))
        checkpoint(run.trainer)


def _publish_dying(saver, publish, dying, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        publish(*args)


@pytest.mark.parametrize("where", [1, 2], ids=["before the old one has moved", "before the new one has come"])
def test_a_kill_while_a_file_is_replaced_loses_nothing(world, tmp_path, where):
    with pytest.raises(AssertionError, match="exit code -9|dies_in_the_middle on rank 1 of 2"):
        world(2, dies_in_the_middle, where)
    got = world(1, loads, "plain", "checkpoint.pt")[0]
    assert got["count"] == 1
    run_world(tmp_path, 2, saves_again)
    assert names(tmp_path) == ["checkpoint.pt"]
    assert world(1, loads, "plain", "checkpoint.pt")[0]["count"] == 3


def saves_again(folder):
    run = Run("FSDP2")
    saver = ShardedSaver(folder / "checkpoints", require_empty=False)
    assert not list((folder / "checkpoints").glob(".*.partial"))
    load_objects(run.objects(), folder / "checkpoints" / "checkpoint.pt")
    checkpoint = Checkpoint(run.objects(), saver, filename_pattern="{name}.{ext}")
    for until in (2, 3):
        run.train(until)
        checkpoint(run.trainer)


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


GATHERED = {"FSDP2": [1, 2, 3], "FSDP2 with replicas": [4], "FSDP2 over several meshes": [4]}


@in_worlds(GATHERED)
def test_the_whole_average_is_gathered_on_the_first_rank(world, ranks, case):
    world(ranks, gathers, case)


FAILURES = {
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "anything else": RuntimeError("the writer fell over."),
}


def fails_in_between(folder, failure, rank, asynchronous, reported_by):
    """Writes a checkpoint, then one that fails on a rank, then another one."""
    run = Run("FSDP2")
    checkpoint = run.checkpoint(folder / "checkpoints", asynchronous=asynchronous)
    saver = checkpoint.save_handler

    def fail(*args):
        raise FAILURES[failure]

    def save(until):
        run.train(until)
        checkpoint(run.trainer)

    def save_and_report():
        save(3)
        saver.wait() if reported_by == "wait" else save(4)

    save(2)
    saver.wait()
    reason = re.escape(str(FAILURES[failure]).removesuffix("."))
    with pytest.MonkeyPatch.context() as patch:
        if rank == "publishing":
            patch.setattr(saver, "_publish", fail)
        elif rank == dist.get_rank():
            patch.setattr(FileSystemWriter, "write_data", fail)
        at = 0 if rank == "publishing" else rank
        with pytest.raises(RuntimeError, match=NOT_SAVED.format(at, reason)):
            save_and_report()
    saver.wait()  # it was said once
    dist.barrier()
    assert names(folder) == ["checkpoint_2.pt"]
    dist.barrier()
    save(5)
    saver.wait()
    dist.barrier()
    assert names(folder) == ["checkpoint_5.pt"]


NOT_SAVED = (
    r"checkpoints/checkpoint_3.pt' should be saved by all ranks, but rank {} could not \(\w+Error: .*{}\); the "
    "checkpoint before it is still there"
)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("reported_by", ["wait", "next"])
def test_a_failure_in_the_background_is_raised_on_all_ranks(world, failure, rank, reported_by):
    world(2, fails_in_between, failure, rank, True, reported_by)


def test_a_failure_to_publish_in_the_background_is_raised_on_all_ranks(world):
    world(2, fails_in_between, "a full disk", "publishing", True, "wait")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_is_raised_on_all_ranks(world, rank):
    world(2, fails_in_between, "a full disk", rank, False, "wait")


def loses_its_directory(folder, asynchronous):
    run = Run("FSDP2")
    checkpoint = run.checkpoint(folder / "checkpoints", asynchronous=asynchronous)
    run.train(3)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "checkpoints").rmdir()
        (folder / "checkpoints").write_text("a file")
    dist.barrier()

    def save():
        checkpoint(run.trainer)
        checkpoint.save_handler.wait()

    with pytest.raises(RuntimeError, match=NOT_SAVED.format(0, "'.*checkpoints.*'")):
        save()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_directory_that_cannot_be_written_is_raised_on_all_ranks(world, asynchronous):
    world(2, loses_its_directory, asynchronous)


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


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


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
        self.handler._average.update(0.5)
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


@pytest.mark.parametrize("name", ["model", "optimizer", "ema_handler"])
def test_a_single_object_is_saved_and_loaded(tmp_path, name):
    small, fresh = Small(), Small()
    path = small.save(tmp_path, **{name: small.objects[name]})
    load_objects({name: fresh.objects[name]}, path)
    small.objects = {name: small.objects[name]}
    assert_loaded(small, fresh)


@pytest.mark.parametrize("name", ["model", "optimizer", "ema_handler"])
def test_a_part_of_the_objects_is_loaded(tmp_path, name):
    small, fresh = Small(), Small()
    path = small.save(tmp_path)
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


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "other", "attack", "attack inside"])
def test_a_damaged_or_hostile_table_of_contents_is_refused(tmp_path, damage):
    small = Small()
    path = small.save(tmp_path / "saved")
    file, target = path / ".metadata", tmp_path / "touched"
    whole = file.read_bytes()
    metadata = pickle.loads(whole)
    metadata.planner_data = Attack(target)
    file.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "noise": b"\x93noise" * 50,
            "empty": b"",
            "other": pickle.dumps({"a": 1}),
            "attack": pickle.dumps(Attack(target)),
            "attack inside": pickle.dumps(metadata),
        }[damage]
    )
    with pytest.raises(
        ValueError, match=r"should be a checkpoint of ShardedSaver, but its table of contents .*; take another one\.$"
    ):
        load_objects(small.objects, path)
    assert not target.exists()


def test_hostile_values_are_refused_and_nothing_is_run(tmp_path):
    target = tmp_path / "touched"
    saver = ShardedSaver(tmp_path / "saved")
    small = Small()
    state = {name: value.state_dict() for name, value in small.objects.items()}
    state["ema_handler"]["num_updates"] = Attack(target)
    saver(state, "one.pt")
    target.unlink(missing_ok=True)  # saving runs nothing, but let it be sure
    with pytest.raises(ValueError, match="'ema_handler.num_updates' holds something else than plain values") as raised:
        load_objects(small.objects, tmp_path / "saved" / "one.pt")
    assert "\n" not in str(raised.value)
    assert not target.exists()


def test_a_damaged_value_is_refused(tmp_path):
    small = Small()
    path = small.save(tmp_path)
    for file in path.glob("*.distcp"):
        file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(ValueError, match="should be a checkpoint of these objects, but: ") as raised:
        load_objects(Small().objects, path)
    assert "\n" not in str(raised.value)
    for file in path.glob("*.distcp"):
        file.unlink()
    with pytest.raises(ValueError, match="should be a checkpoint of ShardedSaver, but '__0_0.distcp' is missing"):
        load_objects(Small().objects, path)


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
