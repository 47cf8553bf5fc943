"""PostHocEMA in worlds of two processes: one of them writes, and what it writes is what a single process writes."""

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint

from ignite_ema import PostHocEMA
from ignite_ema.distributed import ShardedSaver, load_objects
from ignite_ema.handlers import posthoc as handler
from ignite_ema.posthoc import reconstruct, snapshots, stored
from tests.distributed.worker import CASES, Net, full, is_sharded_case

LAST = 8
WORLDS = [(2, "DDP"), (2, "FSDP2")]
in_worlds = pytest.mark.parametrize(("ranks", "case"), WORLDS, ids=lambda value: str(value))


class Run:
    """Weights that move by nothing but the iteration, alike on all ranks and in all cases."""

    def __init__(self, case, dirname, seed=0, **options):
        torch.manual_seed(seed)
        self.model = CASES[case](Net())
        if is_sharded_case(case):
            with torch.device("meta"):
                options["ema_models"] = [CASES[case](Net()) for _ in range(2)]
        self.ema = PostHocEMA(self.model, dirname=dirname, **options)
        self.trainer = Engine(self.step)
        self.ema.attach(self.trainer, snapshot_event=Events.ITERATION_COMPLETED(every=2))

    def step(self, engine, batch):
        for index, parameter in enumerate(self.ema.model.parameters()):
            parameter.data.add_(engine.state.iteration / (1 + index))
        self.ema.model.norm.running_mean.fill_(engine.state.iteration)

    def train(self, until=LAST):
        stop = self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=until), lambda: self.trainer.terminate())
        self.trainer.run(range(LAST), max_epochs=10)
        stop.remove()
        return self

    def objects(self):
        return {"model": self.ema.model, "ema": self.ema, "trainer": self.trainer}


@pytest.fixture(scope="module")
def due(tmp_path_factory):
    """What a single process writes, which knows nothing of others."""
    folder = tmp_path_factory.mktemp("alone")
    Run("plain", folder).train()
    return stored(folder)


def writes(folder, case):
    written = []

    def write(*args):
        written.append(args)
        return snapshots.write(*args)

    handler.write = write
    run = Run(case, folder / "snapshots").train()
    assert run.ema.time == LAST
    assert run.ema.state_dict()["snapshot_times"] == [2, 4, 6, 8]
    assert run.ema.save() is None
    return len(written), run.ema.state_dict()["run_id"]


def assert_same_contents(found, due):
    assert len(found) == len(due)
    for one, other in zip(found, due, strict=True):
        for key in ("time", "time_unit", "num_updates", "iteration", "epoch", "sigma_rels", "state_dict_names"):
            assert getattr(one, key) == getattr(other, key), key
        for ours, theirs in zip([*one.averaged, one.copied], [*other.averaged, other.copied], strict=True):
            assert list(ours) == list(theirs)
            for name, tensor in ours.items():
                assert tensor.dtype == theirs[name].dtype, name
                assert torch.equal(tensor, theirs[name]), name


@in_worlds
def test_the_first_rank_alone_writes_what_a_single_process_writes(world, ranks, case, due, tmp_path):
    counts, run_ids = zip(*world(ranks, writes, case), strict=True)
    assert counts == (4, *[0] * (ranks - 1))
    found = stored(tmp_path / "snapshots")
    assert {one.run_id for one in found} == set(run_ids)
    assert_same_contents(found, due)
    assert found[0].averaged[0]["embedding.weight"].shape == (7, 5)
    Net().load_state_dict(reconstruct(tmp_path / "snapshots", 0.1), strict=True)


def resumes(folder, case):
    run = Run(case, folder / "snapshots")
    checkpoint = Checkpoint(run.objects(), ShardedSaver(folder / "checkpoints"), n_saved=1)
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), checkpoint)
    run.train(3)
    resumed = Run(case, folder / "snapshots", seed=1)
    load_objects(resumed.objects(), folder / "checkpoints" / "checkpoint_3.pt")
    resumed.train()
    assert resumed.ema.state_dict()["snapshot_times"] == [2, 4, 6, 8]
    for stream in resumed.ema.streams:
        assert full(stream.module.body.weight).isfinite().all()


@in_worlds
def test_a_resumed_world_writes_what_a_single_process_writes(world, ranks, case, due, tmp_path):
    world(ranks, resumes, case)
    found = stored(tmp_path / "snapshots")
    assert_same_contents(found, due)


def refuses(folder, case):
    run = Run(case, folder / "snapshots")
    run.trainer.logger.disabled = True
    with pytest.raises(ValueError, match="should have snapshots of this run alone, got 'snapshot_2.pt'"):
        run.train()
    return run.ema.num_updates


@pytest.mark.parametrize("case", ["DDP", "FSDP2"])
def test_a_folder_with_snapshots_is_refused_on_all_ranks(case, world, tmp_path):
    Run("plain", tmp_path / "snapshots").train()
    assert world(2, refuses, case) == [0, 0]


def narrows_and_overflows(folder):
    run = Run("FSDP2", folder / "snapshots", snapshot_dtype=torch.float16).train(2)
    dist.barrier()
    dtypes = [one.dtype for one in stored(folder / "snapshots")[0].averaged[0].values()]
    assert (dtypes.count(torch.float16), dtypes.count(torch.float32)) == (7, 2)  # weights, and averaged statistics
    run.train(3)
    with torch.no_grad():
        for stream in run.ema.streams:
            for parameter in stream.module.parameters():
                parameter.fill_(1e6)
    with pytest.raises(ValueError, match="should be within ±65504 to be stored in torch.float16, got 1e.06"):
        run.ema.save()
    return True


def test_shards_are_stored_in_16_bits_and_what_cannot_be_is_told_on_all_ranks(world):
    assert world(2, narrows_and_overflows) == [True, True]
