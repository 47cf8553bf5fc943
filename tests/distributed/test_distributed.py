"""Worlds of one to four processes: the contract, what an update costs, and what is refused.

A scenario is a function that each process of a world calls; the tests say which worlds.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.distributed import fsdp
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode

from ignite_ema import EMAHandler, ModelAverage
from ignite_ema.distributed import load_objects
from tests.distributed import worker
from tests.distributed.worker import CASES, Net, Run, full_tensors, in_worlds, local, local_bits, sharded, tensors

pytestmark = worker.gathers_on_cpu

WORLDS = {"DDP": [2], "FSDP2": [3], "FSDP2 in part": [3], "FSDP2 that keeps gathered weights": [2]}
WORLDS |= {"FSDP2 in mixed precision": [2], "FSDP2 over several meshes": [4]}


def average_follows(folder, case):
    run = Run(case)
    due = {name: tensor.double() for name, tensor in full_tensors(run.handler.model).items()}
    trained = {name for name, _ in run.handler.model.named_parameters()}
    before = local_bits(run.handler.model)

    def follow():
        for name, tensor in full_tensors(run.handler.model).items():
            due[name] = torch.lerp(due[name], tensor.double(), 0.25) if name in trained else tensor.double()

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, follow)
    run.train(6)
    assert run.handler.num_updates == 6
    averaged = full_tensors(run.handler.ema_model)
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


@in_worlds({**WORLDS, "DDP of a compiled model": [2], "compiled FSDP2": [2]})
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
    for kind in ("model", "ema_model"):
        due, got = (getattr(run.handler, kind) for run in (straight, resumed))
        parameters = {name for name, _ in due.named_parameters()}
        due, got = local_bits(due), local_bits(got)
        wrong = {name for name in due if name != "cache" and due[name] != got[name]}
        assert not (wrong & parameters if dist.get_rank() else wrong), wrong  # buffers are saved from the first rank
    due, got = (run.optimizer.state_dict()["state"] for run in (straight, resumed))
    assert all(torch.equal(local(due[i][key]), local(got[i][key])) for i in due for key in due[i])


def swaps(folder, case):
    run = Run(case)
    run.train(2)
    x = torch.arange(7)
    with torch.no_grad():
        run.model.eval()(x)  # which leaves the gathered weights with the root
    before = local_bits(run.handler.model)
    averaged = local_bits(run.handler.ema_model)
    with run.handler.swapped(), torch.no_grad():
        due = run.handler.ema_model(x)
        assert torch.equal(run.model(x), due)
        assert local_bits(run.handler.model) == local_bits(run.handler.ema_model) == averaged
        run.model(x)
    assert local_bits(run.handler.model) == before
    assert local_bits(run.handler.ema_model) == averaged
    with torch.no_grad():
        assert not torch.equal(run.model(x), due)
    run.train(4)
    straight = Run(case)
    straight.train(4)
    assert local_bits(run.handler.model) == local_bits(straight.handler.model)
    assert local_bits(run.handler.ema_model) == local_bits(straight.handler.ema_model)


@pytest.mark.parametrize("scenario", [resumes, swaps])
@in_worlds(WORLDS)
def test_resuming_and_swapping_are_exact(world, ranks, case, scenario):
    world(ranks, scenario, case)


def updates_without_communication(folder, case):
    run = Run(case, handle_buffers="update")
    run.train(1)
    with CommDebugMode() as seen:
        for _ in range(3):
            run.handler.average.update(0.1)
    assert seen.get_total_counts() == 0
    with CommDebugMode() as seen:
        full_tensors(run.handler.model)
    assert (seen.get_total_counts() > 0) == ("FSDP2" in case)  # it would have been seen


@pytest.mark.parametrize("case", ["DDP", "FSDP2", "FSDP2 in part"])
def test_an_update_communicates_nothing(world, case):
    world(2, updates_without_communication, case)


class Even(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 12)


def refuses_twins(folder):
    model = sharded(Even())
    before = local_bits(model)
    along_columns = sharded(Even(), shard_placement_fn=lambda weight: Shard(weight.ndim - 1))
    over_another_mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    for online, twin, message in (
        (model, Even(), "'embedding.weight' is sharded .* and not sharded in the twin"),
        (model, along_columns, r"and sharded as \(Shard\(dim=1\),\) over .* in the twin"),
        (model, fsdp.fully_shard(Even(), mesh=over_another_mesh), r"\(Replicate\(\), Shard\(dim=0\)\) .* in the twin"),
        (model, None, "ema_model should be a twin that is sharded as the model is, got None"),
        (Even(), sharded(Even()), "is not sharded in the model and sharded as .* in the twin"),
    ):
        with pytest.raises(RuntimeError, match=message):
            EMAHandler(online, ema_model=twin)
    assert local_bits(model) == before


def test_a_twin_that_is_sharded_otherwise_is_refused(world):
    world(2, refuses_twins)


class FrozenStatistics(Even):
    """Has a train() of its own, as models do that keep their batch norms in eval mode."""

    def train(self, mode=True):
        return super().train(mode)


def takes_a_twin_with_modes_of_its_own(folder):
    assert ModelAverage(sharded(FrozenStatistics()), ema_model=sharded(FrozenStatistics())).update(0.5)


def test_a_sharded_twin_whose_eval_changes_no_weight_is_taken(world):
    world(2, takes_a_twin_with_modes_of_its_own)


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


@pytest.mark.parametrize(("ranks", "rank", "case"), [(2, 1, "FSDP2"), (4, 2, "FSDP2 over several meshes")])
def test_a_nan_in_one_shard_is_skipped_on_all_ranks(world, ranks, rank, case):
    world(ranks, skips_together, rank, case)


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


def train_on_uneven_data(folder):
    """Four steps on the first rank, twelve on the second; as docs/compatibility.md says."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 2))
    average = ModelAverage(model, momentum=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank())
    with Join([model]):
        for _ in range((4, 12)[dist.get_rank()]):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            average.update()
    return average.num_updates, model.module.weight.detach(), average.module.weight


def test_under_join_the_models_agree_and_the_averages_do_not(world):
    (few, model, shorter), (many, same, longer) = world(2, train_on_uneven_data)
    assert (few, many) == (4, 12)
    assert torch.equal(model, same)
    assert not torch.equal(shorter, longer)
