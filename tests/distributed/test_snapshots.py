"""PostHocEMA in worlds of two processes: one of them writes, and what it writes is what a single process writes."""

from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint

from ignite_ema import PostHocEMA
from ignite_ema.distributed import ShardedSaver, load_objects
from ignite_ema.handlers import posthoc as handler
from ignite_ema.posthoc import reconstruct, snapshots, stored
from tests.distributed.worker import CASES, Net
from tests.helpers.bits import assert_same_bits

LAST = 8
cases = pytest.mark.parametrize("case", ["DDP", "FSDP2"])


class Run:
    """Weights that move by nothing but the iteration, alike on all ranks and in all cases."""

    def __init__(self, case, dirname, seed=0, **options):
        torch.manual_seed(seed)
        self.model = CASES[case](Net())
        if "FSDP2" in case:
            with torch.device("meta"):
                options["ema_models"] = [CASES[case](Net()) for _ in range(2)]
        self.ema, self.trainer = PostHocEMA(self.model, dirname=dirname, **options), Engine(self.step)
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
    write = Mock(side_effect=snapshots.write)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handler, "write", write)
        run = Run(case, folder / "snapshots").train()
    assert run.ema.time == LAST
    assert run.ema.state_dict()["snapshot_times"] == [2, 4, 6, 8]
    assert run.ema.save() is None
    return write.call_count, run.ema.state_dict()["run_id"]


def assert_same_contents(found, due):
    assert len(found) == len(due)
    for one, other in zip(found, due, strict=True):
        for key in ("time", "time_unit", "num_updates", "iteration", "epoch", "sigma_rels", "state_dict_names"):
            assert getattr(one, key) == getattr(other, key), key
        assert_same_bits([one.averaged, one.copied], [other.averaged, other.copied])


@cases
def test_the_first_rank_alone_writes_what_a_single_process_writes(world, case, due, tmp_path):
    counts, run_ids = zip(*world(2, writes, case), strict=True)
    assert counts == (4, 0)
    found = stored(tmp_path / "snapshots")
    assert {one.run_id for one in found} == set(run_ids)
    assert_same_contents(found, due)
    assert found[0].averaged[0]["embedding.weight"].shape == (7, 5)
    Net().load_state_dict(reconstruct(tmp_path / "snapshots", 0.1), strict=True)


def resumes(folder, case):
    run = Run(case, folder / "snapshots").train(3)
    Checkpoint(run.objects(), ShardedSaver(folder / "checkpoints"), n_saved=1)(run.trainer)
    resumed = Run(case, folder / "snapshots", seed=1)
    load_objects(resumed.objects(), folder / "checkpoints" / "checkpoint_3.pt")
    resumed.train()
    assert resumed.ema.state_dict()["snapshot_times"] == [2, 4, 6, 8]


@cases
def test_a_resumed_world_writes_what_a_single_process_writes(world, case, due, tmp_path):
    world(2, resumes, case)
    assert_same_contents(stored(tmp_path / "snapshots"), due)


def refuses(folder):
    run = Run("DDP", folder / "snapshots")
    run.trainer.logger.disabled = True
    with pytest.raises(ValueError, match="snapshots of this run alone, got 'snapshot_2.pt'"):
        run.train()
    with pytest.raises(OSError, match="snapshot_2.pt"):
        PostHocEMA(Net(), dirname=folder / "snapshots" / "snapshot_2.pt")
    return run.ema.num_updates


def test_a_folder_that_cannot_be_used_is_refused_on_all_ranks(world, tmp_path):
    Run("plain", tmp_path / "snapshots").train()
    assert world(2, refuses) == [0, 0]


def cannot_write(folder, case):
    run = Run(case, folder / "snapshots").train(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handler, "write", Mock(side_effect=OSError("No space left on device")))
        with pytest.raises(OSError, match="No space left on device"):
            run.ema.save()
    assert run.ema.state_dict()["snapshot_times"] == [2]
    assert (run.ema.save() is None) == (dist.get_rank() > 0)  # when there is space again
    return run.ema.state_dict()["snapshot_times"]


@cases
def test_a_snapshot_that_cannot_be_written_is_told_on_all_ranks(world, case, tmp_path):
    assert world(2, cannot_write, case) == [[2, 3]] * 2
    assert [one.time for one in stored(tmp_path / "snapshots")] == [2, 3]


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
