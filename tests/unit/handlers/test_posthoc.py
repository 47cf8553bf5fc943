"""PostHocEMA: its averages against sums, its files, and what is attached to an engine."""

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.nn.parallel import DataParallel

from ignite_ema import EMAWarning, PostHocEMA
from ignite_ema.posthoc import PowerProfile, reconstruct, stored
from ignite_ema.schedules import PowerFunction
from tests.helpers.bits import assert_same_bits
from tests.helpers.models import Tied, compiled, constant, module
from tests.helpers.posthoc_runs import LAST, Run, batches, kept, size_of_batch, times_in

GAMMAS = [PowerProfile(sigma_rel).gamma for sigma_rel in (0.05, 0.10)]
EVENT = Events.ITERATION_COMPLETED


def sums(times, history, name, gamma):
    """Σ (tᵢ^(γ+1) - tᵢ₋₁^(γ+1)) / T^(γ+1) θᵢ in float64."""
    edges = torch.tensor([0, *times], dtype=torch.float64) ** (gamma + 1)
    weights = edges.diff() / edges[-1]
    return sum(weight * state[name].double() for weight, state in zip(weights, history, strict=True))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("samples", [None, lambda engine: len(engine.state.batch)], ids=["updates", "samples"])
def test_streams_and_files_hold_the_sums_of_power_functions(samples, every, tmp_path):
    event = EVENT(every=every)
    run = Run(tmp_path, samples=samples, event=event, snapshot=event, handle_buffers="update").train(21)
    seen = torch.tensor([len(batch) for batch in batches(21)]).cumsum(0)
    times = [(int(seen[k - 1]) if samples else k // every) for k in range(every, 22, every)]
    history = run.history[every - 1 :: every]
    snapshots = stored(tmp_path)
    assert [one.time for one in snapshots] == times
    assert [one.iteration for one in snapshots] == list(range(every, 22, every))
    assert [one.num_updates for one in snapshots] == list(range(1, 21 // every + 1))
    assert {one.time_unit for one in snapshots} == {"samples" if samples else "updates"}
    assert run.ema.time == times[-1]
    for index, one in enumerate(snapshots):
        for gamma, averaged in zip(GAMMAS, one.averaged, strict=True):
            assert list(averaged) == ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
            for name, tensor in averaged.items():
                due = sums(times[: index + 1], history[: index + 1], name, gamma)
                torch.testing.assert_close(tensor.double(), due, rtol=1e-5, atol=1e-5)  # float32 updates
        assert one.copied["1.num_batches_tracked"] == one.iteration
    for stream, averaged in zip(run.ema.streams, snapshots[-1].averaged, strict=True):
        assert all(torch.equal(stream.module.state_dict()[name], tensor) for name, tensor in averaged.items())


def test_the_momentum_is_published_and_counts_each_update_by_its_batch(tmp_path):
    updates, samples = Run(tmp_path / "updates"), Run(tmp_path / "samples", samples=size_of_batch)
    assert updates.trainer.state.posthoc_momentum_0 == 1
    updates.train(8)
    samples.train(8)
    seen = torch.tensor([len(batch) for batch in batches(8)]).cumsum(0)
    assert updates.trainer.state.posthoc_momentum_1 == PowerFunction(0.10)(7)
    due = 1 - (seen[-2] / seen[-1]).item() ** (GAMMAS[1] + 1)
    assert samples.trainer.state.posthoc_momentum_1 == pytest.approx(due, rel=1e-6)


def test_tied_weights_are_stored_once_under_plain_names_and_rebuilt_tied(tmp_path):
    kept(compiled(DataParallel(Tied())), tmp_path, handle_buffers="update")
    one = stored(tmp_path)[0]
    assert {"first.weight", "cache"} <= one.averaged[0].keys()
    assert "second.weight" not in one.averaged[0]
    got = reconstruct(tmp_path, 0.1)
    assert got["second.weight"] is got["first.weight"]
    Tied().load_state_dict(got, strict=True)


@pytest.mark.parametrize(
    ("dtype", "options", "stored_in", "rebuilt_in"),
    [
        (torch.bfloat16, {"dtype": torch.float32}, torch.float32, torch.float32),
        (torch.float64, {}, torch.float32, torch.float32),
        (torch.float64, {"snapshot_dtype": torch.float64}, torch.float64, torch.float64),
        (torch.complex128, {"snapshot_dtype": torch.float64}, torch.complex128, torch.complex128),
    ],
    ids=str,
)
def test_types_are_stored_as_asked_for_and_rebuilt(dtype, options, stored_in, rebuilt_in, tmp_path):
    model = module(w=nn.Parameter(torch.zeros(2, dtype=dtype)))
    ema = kept(model, tmp_path, [1.0, 1.0078125] * 5, **options)
    got, due = reconstruct(tmp_path, 0.1)["w"], ema.streams[1].module.w
    assert (stored(tmp_path)[0].averaged[0]["w"].dtype, got.dtype) == (stored_in, rebuilt_in)
    assert due.abs().ne(due.to(dtype).abs().bfloat16()).all()  # held in more than 16 bits
    torch.testing.assert_close(got.to(due.dtype), due.data, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("samples", "times"), [(None, [1, 2, 3]), (lambda engine: 10, [10, 20, 40])])
def test_a_nan_leaves_both_averages_alone(samples, times, tmp_path):
    """Time stands still; in samples the weights after it stand for the batches since the last update."""
    with pytest.warns(UserWarning, match="a NaN or an infinity"):
        ema = kept(constant(), tmp_path, [1.0, 2.0, float("nan"), 3.0], skip_nonfinite=True, samples=samples)
    assert ema.num_updates == 3
    assert [one.time for one in stored(tmp_path)] == times
    due = sums(times, [{"w": torch.tensor(value)} for value in (1.0, 2.0, 3.0)], "w", GAMMAS[0])
    assert ema.streams[0].module.weight.item() == pytest.approx(due.item(), rel=1e-6)


def test_the_statistics_of_normalization_layers_are_averaged_and_nothing_else(tmp_path):
    """An observer's infinities and a mask are no statistics (issue 21)."""
    model = nn.BatchNorm1d(2)
    model.register_buffer("min_val", torch.tensor(torch.inf))
    kept(model, tmp_path / "new" / "folder", sigma_rels=[0.1])
    one = stored(tmp_path / "new" / "folder")[0]
    assert list(one.averaged[0]) == ["weight", "bias", "running_mean", "running_var"]
    assert list(one.copied) == ["num_batches_tracked", "min_val"]
    kept(nn.Linear(1, 1), tmp_path / "without")  # a model without such buffers


def test_a_loop_without_an_engine_writes_what_an_engine_does(tmp_path):
    """It stops after 12 iterations, and another one goes on from its state."""
    for name, samples in (("updates", None), ("samples", size_of_batch)):
        run = Run(tmp_path / name, samples=samples).train(20)
        own = Run(tmp_path / f"own {name}", attach=False, samples=name == "samples")
        for k, batch in enumerate(batches(20), start=1):
            own.trainer.state.iteration = k
            own.step(own.trainer, batch)
            assert own.ema.update(len(batch)) if name == "samples" else own.ema.update()
            if k % 5 == 0:
                assert own.ema.save() == tmp_path / f"own {name}" / f"snapshot_{own.ema.time}.pt"
            if k == 12:
                first, own = own, Run(own.ema.dirname, attach=False, samples=name == "samples")
                own.model.load_state_dict(first.model.state_dict())
                own.ema.load_state_dict(first.ema.state_dict())
        assert (own.ema.time, own.ema.time_unit) == (run.ema.time, name)
        due, found = (
            [(one.time, one.averaged, one.copied) for one in stored(ema.dirname)] for ema in (run.ema, own.ema)
        )
        assert_same_bits(found, due)


@pytest.mark.parametrize(("ends", "due"), [("completed", [5, 10, 12]), ("terminated", [5, 10])])
def test_a_run_ends_with_a_snapshot_unless_it_is_terminated(ends, due, tmp_path):
    run = Run(tmp_path)
    run.train(12) if ends == "terminated" else run.trainer.run(batches(12), max_epochs=1)
    assert times_in(tmp_path) == due


def test_saving_by_hand(tmp_path):
    run = Run(tmp_path)
    assert run.ema.save() is None  # no update yet
    run.train(7)
    assert run.ema.save() == tmp_path / "snapshot_7.pt"
    assert run.ema.save() is None
    assert times_in(tmp_path) == [5, 7]
    said = f"PostHocEMA(Sequential: sigma_rel 0.05 and 0.1; at 7 updates; 2 snapshots in '{tmp_path}')"
    assert repr(run.ema) == said


@pytest.mark.parametrize("snapshot", [EVENT, EVENT(every=10) | Events.EPOCH_COMPLETED])
def test_snapshots_are_written_once_for_each_time_and_none_without_an_update(snapshot, tmp_path):
    Run(tmp_path, event=EVENT(every=10) | Events.EPOCH_COMPLETED, snapshot=snapshot).trainer.run(batches(20), 2)
    due = [(1, 10, 1), (2, 20, 1), (3, 30, 2), (4, 40, 2)]
    assert [(one.time, one.iteration, one.epoch) for one in stored(tmp_path)] == due


def test_an_update_needs_a_step_of_the_optimizer(tmp_path):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Engine(lambda engine, batch: batch % 4 == 3 and optimizer.step(lambda: None))
    ema = PostHocEMA(model, dirname=tmp_path)
    ema.attach(trainer, snapshot_event=EVENT, optimizer=optimizer)
    trainer.run(range(12))
    assert ema.num_updates == 3
    assert [one.iteration for one in stored(tmp_path)] == [4, 8, 12]


def test_remove_takes_everything_off(tmp_path):
    run = Run(tmp_path, attach=False, snapshot=Events.EPOCH_COMPLETED(every=2) | EVENT(every=3) | Events.COMPLETED)
    with run.attach() as handle:
        assert hasattr(run.trainer.state, "posthoc_momentum_1")
    handle.remove()
    assert not any(run.trainer._event_handlers.values())
    assert not hasattr(run.trainer.state, "posthoc_momentum_1")
    run.train(6)
    assert run.ema.num_updates == 0
    run.ema.reset()
    with run.attach():
        run.train(12)
    assert run.ema.num_updates == 6


def test_two_on_a_trainer_need_names_and_folders_of_their_own(tmp_path):
    run = Run(tmp_path / "one")
    other = PostHocEMA(run.model, (0.2,), dirname=tmp_path / "two")
    other.attach(run.trainer, "other", snapshot_event=EVENT(every=8))
    run.train(16)
    assert times_in(tmp_path / "two") == [8, 16]
    names = {name for name in vars(run.trainer.state) if "momentum" in name or "other" in name}
    assert names == {"posthoc_momentum_0", "posthoc_momentum_1", "other_0"}
    same = Run(tmp_path / "three")
    PostHocEMA(same.model, dirname=tmp_path / "three").attach(same.trainer, "other", snapshot_event=EVENT(every=5))
    with pytest.raises(FileExistsError, match="snapshot_5.pt' exists already, .* its own directory"):
        same.train(8)


def test_twins_of_ones_own_and_parts_of_a_larger_tensor_are_stored_alone(tmp_path):
    twins = [module(w=nn.Parameter(torch.zeros(1000, 100)[:2])) for _ in range(2)]
    ema = kept(module(w=nn.Parameter(torch.zeros(2, 100))), tmp_path, ema_models=twins)
    assert [stream.module for stream in ema.streams] == twins
    assert torch.equal(stored(tmp_path)[-1].averaged[1]["w"], twins[1].w)
    assert (tmp_path / "snapshot_3.pt").stat().st_size < 10_000


def test_averages_that_are_loaded_at_the_start_of_a_run_count_as_restored(tmp_path):
    """MONAI's CheckpointLoader loads at STARTED, when the handler is attached already (issue 23)."""
    state = Run(tmp_path).train(8).saved()
    second = Run(tmp_path)
    second.trainer.load_state_dict(state["trainer"])
    second.trainer.add_event_handler(Events.STARTED, lambda: second.ema.load_state_dict(state["ema"]))
    assert second.train().ema.num_updates == LAST


def test_a_state_that_is_saved_before_the_update_of_its_event_is_told(tmp_path):
    run = Run(tmp_path, attach=False)
    run.trainer.add_event_handler(EVENT(every=2), lambda: run.ema.state_dict())
    run.attach()
    with pytest.warns(EMAWarning, match="was saved or evaluated in iteration 2 before the update") as record:
        run.train(8)
    assert len(record) == 1


def test_reset_starts_again(tmp_path):
    run = Run(tmp_path / "one", samples=lambda engine: 8).train(8)
    run.ema.reset()
    assert (run.ema.num_updates, run.ema.time, run.ema.state_dict()["samples_seen"]) == (0, 0, 0)
    for stream in run.ema.streams:
        assert torch.equal(stream.module[0].weight, run.model[0].weight)
    run.ema.dirname = tmp_path / "two"
    run.ema.dirname.mkdir()
    run.train(20)
    assert [one.iteration for one in stored(tmp_path / "two")] == [10, 15, 20]
    assert times_in(tmp_path / "two") == [16, 56, 96]
    assert stored(tmp_path / "one")[0].run_id != stored(tmp_path / "two")[0].run_id
    run.ema.reset()
    with pytest.raises(ValueError, match="snapshots of this run alone"):
        run.train(24)
