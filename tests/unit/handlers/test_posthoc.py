"""PostHocEMA: its averages against sums, its files, and what befalls a run that keeps them."""

import copy
import dataclasses
import hashlib
import io
import multiprocessing
import os
import signal
import time
import warnings

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn
from torch.utils._pytree import tree_map

from ignite_ema import EMAHandler, PostHocEMA, posthoc
from ignite_ema.posthoc import PowerProfile, reconstruct, snapshot_files, stored
from ignite_ema.schedules import PowerFunction
from tests.helpers.files import newest
from tests.helpers.models import Tied, module

LAST = 40
GAMMAS = [PowerProfile(sigma_rel).gamma for sigma_rel in (0.05, 0.10)]


def batches(count=LAST):
    """Their sizes change."""
    return [range(1 + (7 * k) % 5) for k in range(count)]


def size_of_batch(engine):
    """The same, also where a run is resumed inside of an epoch and Ignite starts its data anew."""
    return len(batches()[engine.state.iteration - 1])


EVERY_5 = Events.ITERATION_COMPLETED(every=5)


class Run:
    """A model whose weights walk, moved by nothing but themselves and the iteration, and a PostHocEMA beside."""

    def __init__(
        self,
        dirname,
        *,
        event=Events.ITERATION_COMPLETED,
        snapshot=EVERY_5,
        attach=True,
        seed=0,
        optimizer=None,
        scale=1,
        **options,
    ):
        torch.manual_seed(seed)
        self.scale = scale
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.trainer = Engine(self.step)
        self.ema = PostHocEMA(self.model, dirname=dirname, **options)
        self.history = []
        self.event, self.snapshot = event, snapshot
        if attach:
            self.attach()

    def attach(self):
        return self.ema.attach(self.trainer, event=self.event, snapshot_event=self.snapshot)

    def step(self, engine, batch):
        generator = torch.Generator().manual_seed(engine.state.iteration)
        for parameter in self.model.parameters():
            parameter.data.add_(self.scale * torch.randn(parameter.shape, generator=generator))
        self.model[1].running_mean += torch.randn(2, generator=generator)
        self.model[1].num_batches_tracked += 1
        self.history.append(copy.deepcopy(self.model.state_dict()))

    def train(self, until=LAST):
        stop = self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=until), self.trainer.terminate)
        self.trainer.run(batches(), max_epochs=100)
        stop.remove()
        return self

    def objects(self):
        return {"model": self.model, "ema": self.ema, "trainer": self.trainer}

    def saved(self):
        """What Ignite's Checkpoint would write, through a file's bytes and back, with nothing but plain values."""
        file = io.BytesIO()
        torch.save({name: one.state_dict() for name, one in self.objects().items()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)


def files(folder):
    """The bits of each, short enough to be shown; but for the name of the run, which is drawn."""
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix == ".pt"):
        one = dataclasses.replace(snapshot_files.read(path), run_id="the run", _file=None)
        file = io.BytesIO()
        torch.save(tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, vars(one)), file)
        found[path.name] = hashlib.sha256(file.getvalue()).hexdigest()[:8]
    return found


def sums(times, history, name, gamma):
    """Σ (tᵢ^(γ+1) - tᵢ₋₁^(γ+1)) / T^(γ+1) θᵢ in float64."""
    edges = torch.tensor([0, *times], dtype=torch.float64) ** (gamma + 1)
    weights = edges.diff() / edges[-1]
    return sum(weight * state[name].double() for weight, state in zip(weights, history, strict=True))


# The averages


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("samples", [None, lambda engine: len(engine.state.batch)], ids=["updates", "samples"])
def test_streams_and_files_hold_the_sums_of_power_functions(samples, every, tmp_path):
    event = Events.ITERATION_COMPLETED(every=every)
    run = Run(tmp_path, samples=samples, event=event, snapshot=event, handle_buffers="update").train(39)
    seen = torch.tensor([len(batch) for batch in batches(39)]).cumsum(0)
    times = [(int(seen[k - 1]) if samples else k // every) for k in range(every, 40, every)]
    history = run.history[every - 1 :: every]
    snapshots = stored(tmp_path)
    assert [one.time for one in snapshots] == times
    assert [one.iteration for one in snapshots] == list(range(every, 40, every))
    assert [one.num_updates for one in snapshots] == list(range(1, 39 // every + 1))
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
        assert all(torch.equal(stream.ema_model.state_dict()[name], tensor) for name, tensor in averaged.items())


def test_an_online_average_in_samples_counts_each_update_by_its_batch(tmp_path):
    run = Run(tmp_path, samples=size_of_batch, sigma_rels=(0.15,)).train()
    seen = torch.tensor([len(batch) for batch in batches()]).cumsum(0)
    before, now = (seen[-2] / seen[-1]).item(), run.trainer.state.posthoc_momentum_0
    assert now == pytest.approx(1 - before ** (PowerProfile(0.15).gamma + 1), rel=1e-6)


def test_batches_of_one_size_are_as_updates(tmp_path):
    updates = Run(tmp_path / "updates").train()
    samples = Run(tmp_path / "samples", samples=lambda engine: 8).train()
    for one, other in zip(stored(tmp_path / "updates"), stored(tmp_path / "samples"), strict=True):
        assert other.time == 8 * one.time
        for ours, theirs in zip(one.averaged, other.averaged, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert updates.ema.num_updates == samples.ema.num_updates == LAST


@pytest.mark.parametrize("value", [0, -1, 2.0, None, True, torch.tensor(3)])
def test_samples_that_are_no_count_are_refused(value, tmp_path):
    run = Run(tmp_path, samples=lambda engine: value)
    run.trainer.logger.disabled = True  # it would print the traceback
    with pytest.raises(ValueError, match="samples should return the number of samples in the batch, an integer of at"):
        run.train()


def test_rebuilt_averages_load_into_a_fresh_model(tmp_path):
    run = Run(tmp_path, handle_buffers="update").train()
    got = reconstruct(tmp_path, 0.1)
    fresh = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    fresh.load_state_dict(got, strict=True)
    for name, tensor in run.ema.streams[1].ema_model.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)
    assert got["1.num_batches_tracked"] == LAST
    with pytest.warns(UserWarning, match="differs by"):
        wider = reconstruct(tmp_path, posthoc.ExponentialProfile(0.2))
    assert wider["1.running_mean"].ne(got["1.running_mean"]).all()  # averaged, too


def test_buffers_that_are_not_averaged_are_those_of_the_snapshot(tmp_path):
    run = Run(tmp_path, handle_buffers={"*.running_mean": "update", "*.running_var": "keep"})
    run.model[1].running_var.fill_(7)
    run.train()
    (one,) = stored(tmp_path)[3:4]
    assert list(one.copied) == ["1.running_var", "1.num_batches_tracked"]
    assert "1.running_mean" in one.averaged[0]
    got = reconstruct(tmp_path, 0.1, step=20, max_residual=1)
    assert got["1.running_var"].tolist() == [1, 1]
    assert got["1.num_batches_tracked"] == 20


def test_copied_buffers_go_with_the_newest_snapshot(tmp_path):
    run = Run(tmp_path, handle_buffers="copy").train()
    got = reconstruct(tmp_path, 0.1)
    assert torch.equal(got["1.running_mean"], run.history[-1]["1.running_mean"])


def kept(model, dirname, values=(1.0, 2.0, 3.0), **options):
    """A PostHocEMA after updates at which all parameters have these values; a snapshot at each."""

    def step(engine, batch):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(batch)

    trainer = Engine(step)
    ema = PostHocEMA(model, dirname=dirname, **options)
    ema.attach(trainer, snapshot_event=Events.ITERATION_COMPLETED)
    trainer.run(list(values))
    return ema


def test_tied_weights_are_stored_once_and_rebuilt_tied(tmp_path):
    kept(Tied(), tmp_path)
    one = stored(tmp_path)[0]
    assert {"first.weight", "cache"} <= one.averaged[0].keys()
    assert "second.weight" not in one.averaged[0]
    got = reconstruct(tmp_path, 0.1)
    assert got["second.weight"] is got["first.weight"]
    Tied().load_state_dict(got, strict=True)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_models_are_stored_under_plain_names(wrap, tmp_path):
    kept(wrap(Tied()), tmp_path)
    Tied().load_state_dict(reconstruct(tmp_path, 0.1), strict=True)


def test_a_bfloat16_model_is_averaged_in_float32(tmp_path):
    ema = kept(nn.Linear(1, 1).bfloat16(), tmp_path, [1.0, 1.0078125] * 10, dtype=torch.float32)
    due = ema.streams[1].ema_model.weight
    assert due.dtype == torch.float32
    assert due != due.bfloat16()
    torch.testing.assert_close(reconstruct(tmp_path, 0.1)["weight"], due, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_other_types_are_rebuilt(dtype, tmp_path):
    ema = kept(module(w=nn.Parameter(torch.zeros(2, dtype=dtype))), tmp_path, snapshot_dtype=torch.float64)
    got = reconstruct(tmp_path, 0.1)["w"]
    assert got.dtype == dtype
    torch.testing.assert_close(got, ema.streams[1].ema_model.w.data, rtol=1e-6, atol=0)


def test_float64_weights_are_stored_in_float32_unless_asked_for(tmp_path):
    kept(nn.Linear(1, 1).double(), tmp_path)
    assert stored(tmp_path)[0].averaged[0]["weight"].dtype == torch.float32


def test_twins_of_ones_own(tmp_path):
    twins = [nn.Linear(2, 2), nn.Linear(2, 2)]
    ema = kept(nn.Linear(2, 2), tmp_path, ema_models=twins)
    assert [stream.ema_model for stream in ema.streams] == twins
    assert twins[0].weight.unique().numel() == 1
    assert torch.equal(stored(tmp_path)[-1].averaged[1]["weight"], twins[1].weight)


def test_weights_that_are_a_part_of_a_larger_tensor_are_stored_alone(tmp_path):
    twins = [module(w=nn.Parameter(torch.zeros(1000, 100)[:2])) for _ in range(2)]
    kept(module(w=nn.Parameter(torch.zeros(2, 100))), tmp_path, ema_models=twins)
    assert twins[0].w.untyped_storage().nbytes() == 400_000
    assert (tmp_path / "snapshot_3.pt").stat().st_size < 10_000


def test_a_nan_leaves_both_averages_alone_and_time_stands_still(tmp_path):
    with pytest.warns(UserWarning, match="holds a NaN"):
        ema = kept(nn.Linear(1, 1), tmp_path, [1.0, 2.0, float("nan"), 3.0], skip_nonfinite=True)
    assert ema.num_updates == 3
    assert [one.time for one in stored(tmp_path)] == [1, 2, 3]
    due = sums([1, 2, 3], [{"w": torch.tensor(value)} for value in (1.0, 2.0, 3.0)], "w", GAMMAS[0])
    assert ema.streams[0].ema_model.weight.item() == pytest.approx(due.item(), rel=1e-6)


def test_in_samples_the_weights_after_a_nan_stand_for_the_batches_since_the_last_update(tmp_path):
    with pytest.warns(UserWarning, match="holds a NaN"):
        ema = kept(
            nn.Linear(1, 1), tmp_path, [1.0, 2.0, float("nan"), 3.0], skip_nonfinite=True, samples=lambda engine: 10
        )
    assert [one.time for one in stored(tmp_path)] == [10, 20, 40]
    due = sums([10, 20, 40], [{"w": torch.tensor(value)} for value in (1.0, 2.0, 3.0)], "w", GAMMAS[0])
    assert ema.streams[0].ema_model.weight.item() == pytest.approx(due.item(), rel=1e-6)


# 16 bits


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-24)]
)
@pytest.mark.parametrize("target", [PowerProfile(0.075), PowerProfile(0.15), PowerProfile(0.035)], ids=str)
def test_what_rounded_snapshots_cost(dtype, rounding, target, tmp_path):
    torch.manual_seed(0)
    model = module(w=nn.Parameter(torch.randn(3000, dtype=torch.float64)))
    trainer = Engine(lambda engine, batch: model.w.data.add_(0.01 * torch.randn(3000, dtype=torch.float64)))
    event = Events.ITERATION_COMPLETED(every=10)
    for name, kind in (("narrow", dtype), ("wide", torch.float64)):
        PostHocEMA(model, dirname=tmp_path / name, snapshot_dtype=kind).attach(trainer, name, snapshot_event=event)
    trainer.run(range(320))
    got, due = (reconstruct(tmp_path / name, target)["w"].double() for name in ("narrow", "wide"))
    known = [known for one in stored(tmp_path / "wide") for known in one.snapshots]
    norm = posthoc.coefficients(known, target).norm().item()
    # One rounding is 0.43 of the largest one, in the mean; more of them add up like independent ones at most, and
    # where the weights hardly move they are all the same one. The sum itself is rounded to float32.
    lost = ((got - due).norm() / due.norm()).item() / rounding
    assert 0.43 * min(norm, 1) * 0.9 < lost < 0.43 * max(norm, 1) * 1.1 + 2**-24 / rounding


def test_16_bits_halve_the_files(tmp_path):
    kept(nn.Linear(300, 300), tmp_path / "32")
    kept(nn.Linear(300, 300), tmp_path / "16", snapshot_dtype=torch.bfloat16)
    sizes = [(tmp_path / name / "snapshot_3.pt").stat().st_size for name in ("32", "16")]
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.02)
    assert sizes[0] == pytest.approx(2 * 4 * 90_300, rel=0.02)


@pytest.mark.parametrize(
    ("value", "dtype", "model_dtype"),
    [(1e5, torch.float16, None), (3.4e38, torch.bfloat16, None), (1e300, torch.float32, torch.float64)],
)
def test_a_weight_beyond_the_range_is_refused_and_nothing_is_written(value, dtype, model_dtype, tmp_path):
    model = nn.Linear(2, 2).to(model_dtype)
    ema = PostHocEMA(model, dirname=tmp_path, snapshot_dtype=dtype)
    trainer = Engine(lambda engine, batch: nn.init.constant_(model.bias, batch))
    trainer.logger.disabled = True
    ema.attach(trainer, snapshot_event=Events.ITERATION_COMPLETED)
    with pytest.raises(ValueError, match=rf"'bias' should be within .* to be stored in {dtype}, got .*; pass another"):
        trainer.run([1.0, value])
    assert list(files(tmp_path)) == ["snapshot_1.pt"]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_anyway_is_stored_as_it_is(value, tmp_path):
    kept(nn.Linear(1, 1), tmp_path, [value], snapshot_dtype=torch.float16)
    got = stored(tmp_path)[0].averaged[0]["weight"].item()
    assert got == value or got != got


# Resuming

OPTIONS = {
    "updates": {},
    "samples": {"samples": size_of_batch},
    "every 3": {"event": Events.ITERATION_COMPLETED(every=3), "snapshot": Events.ITERATION_COMPLETED(every=6)},
    "buffers and 16 bits": {"handle_buffers": "update", "snapshot_dtype": torch.float16},
    "samples every 3": {"samples": size_of_batch, "event": Events.ITERATION_COMPLETED(every=3)},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    runs = {}
    for name, options in OPTIONS.items():
        folder = tmp_path_factory.mktemp("uninterrupted")
        runs[name] = (Run(folder, **options).train().saved(), files(folder))
    return runs


def assert_same(one, other):
    tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0) if torch.is_tensor(a) else None, one, other)
    plain = [tree_map(lambda leaf: None if torch.is_tensor(leaf) else leaf, state) for state in (one, other)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("attach_first", [True, False], ids=["attached before", "attached after"])
@pytest.mark.parametrize("stop", [1, 8, 10, 24])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_that_is_stopped_and_resumed_writes_the_same_files(name, stop, attach_first, uninterrupted, tmp_path):
    first = Run(tmp_path, **OPTIONS[name])
    first.train(stop)
    second = Run(tmp_path, seed=1, attach=attach_first, **OPTIONS[name])
    Checkpoint.load_objects(second.objects(), first.saved())
    if not attach_first:
        second.attach()
    second.train()
    state, due = copy.deepcopy(uninterrupted[name])
    assert files(tmp_path) == due
    assert {one.run_id for one in stored(tmp_path)} == {first.ema.state_dict()["run_id"]}
    state["ema"]["run_id"] = first.ema.state_dict()["run_id"]
    assert_same(second.saved(), state)


@pytest.mark.parametrize("name", OPTIONS)
def test_snapshots_after_the_state_are_set_aside_and_written_again(name, uninterrupted, tmp_path):
    first = Run(tmp_path, **OPTIONS[name]).train(8)
    state = first.saved()
    first.train(27)
    before = files(tmp_path)
    time = state["ema"]["updated_at"]
    later = {file for file, at in snapshot_files.paths_in(tmp_path).items() if file > time}
    second = Run(tmp_path, **OPTIONS[name])
    Checkpoint.load_objects(second.objects(), state)
    message = rf"had snapshots that are later than the state that was loaded, of time {time}: {len(later)}, from 'snap"
    with pytest.warns(UserWarning, match=message) as record:
        second.train()
    assert len(record) == 1
    assert files(tmp_path) == uninterrupted[name][1]
    for at in later:
        (tmp_path / "superseded").mkdir(exist_ok=True)
        (tmp_path / f"snapshot_{at}.pt.superseded").rename(tmp_path / "superseded" / f"snapshot_{at}.pt")
        assert files(tmp_path / "superseded")[f"snapshot_{at}.pt"] == before[f"snapshot_{at}.pt"]


def test_a_run_that_goes_back_to_an_earlier_state_sets_its_snapshots_aside(uninterrupted, tmp_path):
    run = Run(tmp_path).train(8)
    state = run.saved()
    run.train(27)
    run.ema.load_state_dict(state["ema"])
    run.model.load_state_dict(state["model"])
    again = Engine(run.step)
    again.load_state_dict(state["trainer"])
    run.trainer = again
    run.attach()
    with pytest.warns(
        UserWarning, match="later than the state that was loaded, of time 8: 4, from 'snapshot_10.pt' on"
    ):
        run.train()
    assert files(tmp_path) == uninterrupted["updates"][1]


STARTED_ANEW = (
    "should have no snapshots when a run starts, got 8, up to time 40; to go on with their run load the PostHocEMA "
    "from its checkpoint, to start again a run that was killed before its first checkpoint delete '.*/snapshot_[*]"
    ".pt', and for another run choose another directory[.]$"
)


def test_a_fresh_run_into_a_folder_with_snapshots_is_refused_before_training(tmp_path):
    Run(tmp_path).train()
    before = files(tmp_path)
    second = Run(tmp_path)
    second.trainer.logger.disabled = True
    with pytest.raises(ValueError, match=STARTED_ANEW):
        second.train()
    assert second.history == []
    assert files(tmp_path) == before


def times_of(state):
    return state["snapshot_times"]


def test_a_foreign_snapshot_is_refused_before_training(tmp_path):
    Run(tmp_path / "one").train()
    first = Run(tmp_path / "other", seed=1).train(8)
    second = Run(tmp_path / "one", seed=1)
    second.trainer.logger.disabled = True
    Checkpoint.load_objects(second.objects(), first.saved())
    before = files(tmp_path / "one")
    with pytest.raises(ValueError, match="should be a snapshot of the run that goes on, but it is of another one"):
        second.train()
    assert second.history == []
    assert files(tmp_path / "one") == before


def test_a_snapshot_that_the_run_did_not_write_is_refused_before_training(tmp_path):
    # Of a run with the same start, which cannot be told by what is in the file.
    Run(tmp_path, snapshot=Events.ITERATION_COMPLETED(once=7)).train(7)
    state = Run(tmp_path / "other").train(8).saved()
    second = Run(tmp_path)
    second.trainer.logger.disabled = True
    Checkpoint.load_objects(second.objects(), state)
    with pytest.raises(ValueError, match="snapshot_7.pt' should be a snapshot of the run that goes on, but it is of"):
        second.train()


def test_a_run_that_starts_from_the_same_weights_is_another_run(tmp_path):
    Run(tmp_path / "one", scale=2).train()  # as with another learning rate
    state = Run(tmp_path / "other").train(8).saved()
    second = Run(tmp_path / "one")
    second.trainer.logger.disabled = True
    Checkpoint.load_objects(second.objects(), state)
    before = files(tmp_path / "one")
    with pytest.raises(ValueError, match="snapshot_5.pt' should be a snapshot of the run that goes on, but it is of"):
        second.train()
    assert files(tmp_path / "one") == before
    (tmp_path / "other" / "snapshot_5.pt").rename(tmp_path / "one" / "snapshot_5.pt")
    with pytest.raises(
        ValueError, match="snapshot_5.pt' should be of the run of 'snapshot_40.pt', but it is of another"
    ):
        stored(tmp_path / "one")


def test_a_state_from_before_the_first_update_sets_all_aside(uninterrupted, tmp_path):
    first = Run(tmp_path)
    state = first.saved()
    first.train(12)
    second = Run(tmp_path)
    Checkpoint.load_objects(second.objects(), state)
    with pytest.warns(UserWarning, match="later than the state that was loaded, of time 0: 2, from 'snapshot_5.pt'"):
        second.train()
    assert files(tmp_path) == uninterrupted["updates"][1]


def test_a_run_ends_with_a_snapshot(tmp_path):
    run = Run(tmp_path)
    run.trainer.run(batches(12), max_epochs=1)
    assert sorted(snapshot_files.paths_in(tmp_path)) == [5, 10, 12]


def test_a_run_that_is_terminated_writes_what_it_would_have_written(tmp_path):
    Run(tmp_path).train(12)
    assert sorted(snapshot_files.paths_in(tmp_path)) == [5, 10]


def test_two_on_a_trainer_need_names_and_folders_of_their_own(tmp_path):
    run = Run(tmp_path / "one")
    before = traces(run.trainer)
    other = PostHocEMA(nn.Linear(1, 1), dirname=tmp_path / "two")
    with pytest.raises(ValueError, match="name should be another than 'posthoc_momentum', which another PostHocEMA of"):
        other.attach(run.trainer)
    same = PostHocEMA(nn.Linear(1, 1), dirname=tmp_path / "two" / ".." / "one")
    with pytest.raises(ValueError, match="dirname should be another than '.*one', which another PostHocEMA of this"):
        same.attach(run.trainer, name="other")
    assert traces(run.trainer) == before
    other.attach(run.trainer, name="other")


def test_a_checkpoint_that_was_saved_just_before_a_snapshot_resumes(uninterrupted, tmp_path):
    first = Run(tmp_path, attach=False)
    states = []
    handle = first.ema.attach(first.trainer, snapshot_event=Events.ITERATION_COMPLETED(once=40))
    first.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=10), lambda: states.append(first.saved()))
    first.trainer.add_event_handler(EVERY_5, first.ema._save)
    first.train(10)
    handle.remove()
    assert times_of(states[0]["ema"]) == [5]
    assert sorted(files(tmp_path)) == ["snapshot_10.pt", "snapshot_5.pt"]
    second = Run(tmp_path)
    Checkpoint.load_objects(second.objects(), states[0])
    second.train()
    assert files(tmp_path) == uninterrupted["updates"][1]


def test_a_damaged_snapshot_is_refused_before_training(tmp_path):
    state = Run(tmp_path).train(8).saved()
    (tmp_path / "snapshot_5.pt").write_bytes(b"half")
    second = Run(tmp_path)
    second.trainer.logger.disabled = True
    Checkpoint.load_objects(second.objects(), state)
    with pytest.raises(ValueError, match="snapshot_5.pt' should be a file that torch.save"):
        second.train()
    assert second.history == []


def test_missing_snapshots_are_warned_about(tmp_path):
    state = Run(tmp_path).train(18).saved()
    (tmp_path / "snapshot_10.pt").unlink()
    second = Run(tmp_path)
    Checkpoint.load_objects(second.objects(), state)
    with pytest.warns(UserWarning, match="3 snapshots that this run has written, but lacks 1, the first of time"):
        second.train()
    assert sorted(files(tmp_path)) == [f"snapshot_{k}.pt" for k in (15, 20, 25, 30, 35, 40, 5)]


def test_a_resumed_run_may_go_on_elsewhere(tmp_path):
    state = Run(tmp_path / "one").train(8).saved()
    second = Run(tmp_path / "other")
    Checkpoint.load_objects(second.objects(), state)
    with pytest.warns(UserWarning, match="lacks 1, the first"):
        second.train()
    (tmp_path / "one" / "snapshot_5.pt").rename(tmp_path / "other" / "snapshot_5.pt")
    assert len(stored(tmp_path / "other")) == 8


def test_a_second_run_of_the_trainer_goes_on(tmp_path):
    run = Run(tmp_path)
    run.trainer.run(batches(20), max_epochs=1)
    run.trainer.run(batches(20), max_epochs=1)
    assert [one.time for one in stored(tmp_path)] == [5, 10, 15, 20, 25, 30, 35, 40]


def test_reset_starts_again(tmp_path):
    run = Run(tmp_path / "one").train(8)
    run.ema.reset()
    assert (run.ema.num_updates, run.ema.time) == (0, 0)
    for stream in run.ema.streams:
        assert torch.equal(stream.ema_model[0].weight, run.model[0].weight)
    run.ema.dirname = tmp_path / "two"
    run.ema.dirname.mkdir()
    run.train()
    assert [one.iteration for one in stored(tmp_path / "two")] == [10, 15, 20, 25, 30, 35, 40]
    assert [one.time for one in stored(tmp_path / "two")] == [2, 7, 12, 17, 22, 27, 32]
    assert stored(tmp_path / "one")[0].run_id != stored(tmp_path / "two")[0].run_id


def test_reset_in_samples_starts_time_again(tmp_path):
    run = Run(tmp_path / "one", samples=lambda engine: 8).train(8)
    run.ema.reset()
    assert run.ema.time == run.ema.state_dict()["samples_seen"] == 0
    run.ema.dirname = tmp_path
    run.train(10)
    assert [one.time for one in stored(tmp_path)] == [16]


def test_after_reset_a_folder_with_snapshots_is_refused(tmp_path):
    run = Run(tmp_path).train(8)
    run.ema.reset()
    run.trainer.logger.disabled = True
    with pytest.raises(ValueError, match="should have no snapshots when a run starts"):
        run.train()


# SIGKILL

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pytest", "torch._dynamo", "ignite.handlers", "ignite_ema"])


def train(folder, kill_at=None, event=None):
    """From the newest checkpoint to the end, with a checkpoint every four iterations; kills itself where told to."""
    warnings.filterwarnings("ignore", ".* later than the state that was loaded")
    run = Run(folder / "snapshots", samples=size_of_batch)
    checkpoint = Checkpoint(run.objects(), DiskSaver(folder, require_empty=False), n_saved=2)
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=4), checkpoint)
    if kill_at is not None:
        run.trainer.add_event_handler(Events[event](once=kill_at), lambda: os.kill(os.getpid(), signal.SIGKILL))
    if saved := newest(folder):
        Checkpoint.load_objects(run.objects(), saved)
    run.train()


def killed(folder, *args):
    process = _CONTEXT.Process(target=train, args=(folder, *args))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_process_resumes_and_writes_the_same_files(uninterrupted, tmp_path):
    for iteration in (7, 14, 17, 26, 38):
        killed(tmp_path, iteration, "ITERATION_STARTED" if iteration % 2 else "ITERATION_COMPLETED")
    train(tmp_path)
    assert files(tmp_path / "snapshots") == uninterrupted["samples"][1]


def write_for_ever(folder, sender):
    weights = [{"a": torch.ones(500_000)}] * 2
    sender.send("begins")
    for at in range(1, 10_000):
        one = snapshot_files.StoredSnapshot(at, "updates", at, at, 0, [0.05, 0.1], weights, {}, {"a": "a"}, {}, "run")
        snapshot_files.write(one, folder)


@pytest.mark.parametrize("delay", [0.03, 0.05, 0.07])
def test_a_process_that_is_killed_while_it_writes_leaves_whole_files_alone(delay, tmp_path):
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=write_for_ever, args=(tmp_path, sender))
    process.start()
    assert receiver.recv() == "begins"
    while not snapshot_files.paths_in(tmp_path):
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.join()
    found = stored(tmp_path)
    assert [one.time for one in found] == list(range(1, len(found) + 1))
    assert all(one.averaged[1]["a"].min() == 1 for one in found)


# Writing


def test_a_failing_write_ends_the_run_and_leaves_nothing(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.trainer.logger.disabled = True

    def fail(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    run.train(8)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="No space left on device"):
            run.train(12)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot_5.pt"]
    assert times_of(run.ema.state_dict()) == [5]
    assert run.ema.save() == tmp_path / "snapshot_10.pt"  # when there is space again


def test_saving_by_hand(tmp_path):
    run = Run(tmp_path)
    assert run.ema.save() is None  # no update yet
    run.train(7)
    assert run.ema.save() == tmp_path / "snapshot_7.pt"
    assert run.ema.save() is None
    assert [one.time for one in stored(tmp_path)] == [5, 7]


def test_a_snapshot_that_someone_else_wrote_is_not_overwritten(tmp_path):
    run = Run(tmp_path)
    run.trainer.logger.disabled = True
    (tmp_path / "other").mkdir()
    run.train(4)
    (tmp_path / "snapshot_5.pt").write_text("precious")
    with pytest.raises(FileExistsError, match="snapshot_5.pt' is there already, and this run has not written it"):
        run.train(8)
    assert (tmp_path / "snapshot_5.pt").read_text() == "precious"


def test_events_without_an_update_write_nothing(tmp_path):
    Run(tmp_path, event=Events.ITERATION_COMPLETED(every=10), snapshot=Events.ITERATION_COMPLETED).train()
    assert [one.time for one in stored(tmp_path)] == [1, 2, 3, 4]
    assert [one.iteration for one in stored(tmp_path)] == [10, 20, 30, 40]


def test_an_events_list_writes_once_for_each_time(tmp_path):
    snapshot = Events.ITERATION_COMPLETED(every=20) | Events.EPOCH_COMPLETED
    run = Run(tmp_path, event=Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_COMPLETED, snapshot=snapshot)
    run.trainer.run(batches(20), max_epochs=2)
    assert [one.time for one in stored(tmp_path)] == [10, 20]
    assert [(one.iteration, one.epoch) for one in stored(tmp_path)] == [(20, 1), (40, 2)]


def test_an_update_needs_a_step_of_the_optimizer(tmp_path):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine, batch):
        model(torch.ones(1, 1)).sum().backward()
        if engine.state.iteration % 4 == 0:
            optimizer.step()

    trainer = Engine(step)
    ema = PostHocEMA(model, dirname=tmp_path)
    ema.attach(trainer, snapshot_event=Events.ITERATION_COMPLETED, optimizer=optimizer)
    trainer.run(range(12))
    assert ema.num_updates == 3
    assert [one.iteration for one in stored(tmp_path)] == [4, 8, 12]


# Attaching


def traces(engine):
    """What handlers and attributes an engine has."""
    handlers = {event: len(found) for event, found in engine._event_handlers.items() if found}
    return handlers, set(vars(engine.state)), len(vars(engine).get("_ignite_ema_attachments", []))


OPTIONS_OF_ATTACH = [
    {},
    {"samples": size_of_batch},
    {"snapshot": Events.EPOCH_COMPLETED(every=2) | Events.ITERATION_COMPLETED(every=3) | Events.COMPLETED},
]


@pytest.mark.parametrize("options", OPTIONS_OF_ATTACH)
def test_remove_takes_everything_off_and_attach_may_follow(options, tmp_path):
    run = Run(tmp_path, attach=False, **options)
    before = traces(run.trainer)
    handle = run.attach()
    assert traces(run.trainer) != before
    handle.remove()
    handle.remove()
    assert traces(run.trainer) == before
    run.train(6)
    assert run.ema.num_updates == 0
    run.ema.reset()
    with run.attach():
        run.train(12)
    assert traces(run.trainer) == before
    assert run.ema.num_updates == 6


@pytest.mark.parametrize("options", OPTIONS_OF_ATTACH)
def test_attaching_twice_is_refused_and_leaves_the_first(options, tmp_path):
    run = Run(tmp_path, **options)
    before = traces(run.trainer)
    with pytest.raises(RuntimeError, match="should be attached to an engine once"):
        run.attach()
    assert traces(run.trainer) == before
    run.train(10)
    assert run.ema.num_updates == 10


@pytest.mark.parametrize("options", OPTIONS_OF_ATTACH)
def test_attaching_that_fails_half_way_leaves_nothing(options, tmp_path):
    run = Run(tmp_path, attach=False, **options)
    EMAHandler(run.model, PowerFunction(0.1)).attach(run.trainer, "posthoc_momentum_1")
    before = traces(run.trainer)
    with pytest.raises(ValueError, match="name should be another than 'posthoc_momentum_1'"):
        run.attach()
    assert traces(run.trainer) == before


BAD_ATTACH = [
    ({"snapshot_event": "no_such_event"}, ValueError, "event should be one that the engine fires .*'no_such_event'"),
    ({"event": "no_such_event"}, ValueError, "event should be one that the engine fires .*'no_such_event'"),
    ({"name": "iteration"}, ValueError, "name should not be an attribute of the engine's own, got 'iteration'"),
    ({"name": 3}, TypeError, "name should be a string"),
    ({"optimizer": 3}, TypeError, "optimizer should be a torch.optim.Optimizer, got int"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ATTACH)
def test_bad_arguments_of_attach_are_refused(arguments, error, message, tmp_path):
    run = Run(tmp_path, attach=False, samples=size_of_batch)
    before = traces(run.trainer)
    with pytest.raises(error, match=message):
        run.ema.attach(run.trainer, **arguments)
    assert traces(run.trainer) == before
    with pytest.raises(TypeError, match="engine should be an ignite Engine"):
        run.ema.attach(run.model)


def test_several_on_one_trainer(tmp_path):
    run = Run(tmp_path / "one")
    other = PostHocEMA(run.model, (0.2,), dirname=tmp_path / "other")
    plain = EMAHandler(run.model, PowerFunction(0.05))
    other.attach(run.trainer, "other", snapshot_event=Events.ITERATION_COMPLETED(every=8))
    plain.attach(run.trainer)
    run.train()
    assert [one.time for one in stored(tmp_path / "other")] == [8, 16, 24, 32, 40]
    assert torch.equal(stored(tmp_path / "one")[-1].averaged[0]["0.weight"], plain.ema_model[0].weight)
    names = {name for name in vars(run.trainer.state) if "momentum" in name or "other" in name}
    assert names == {"posthoc_momentum_0", "posthoc_momentum_1", "other_0", "ema_momentum"}


def test_the_momentum_is_published(tmp_path):
    run = Run(tmp_path)
    assert run.trainer.state.posthoc_momentum_0 == 1
    run.train(8)
    for index, sigma_rel in enumerate((0.05, 0.10)):
        assert getattr(run.trainer.state, f"posthoc_momentum_{index}") == PowerFunction(sigma_rel)(7)


# The state


def test_the_state_is_not_shared(tmp_path):
    run = Run(tmp_path).train(8)
    state = run.ema.state_dict()
    other = Run(tmp_path, attach=False)
    other.ema.load_state_dict(state)
    other.ema.state_dict()["snapshot_times"].append(99)
    other.ema.streams[0].ema_model[0].weight.data.fill_(0)
    assert times_of(other.ema.state_dict()) == [5]
    other.ema.save()
    assert times_of(state) == [5]
    assert run.ema.streams[0].ema_model[0].weight.abs().min() > 0
    run.train(12)
    assert times_of(state) == [5]


def changed(**entries):
    def make(state):
        return {key: value for key, value in {**state, **entries}.items() if value is not ...}

    return make


def changed_in(stream, **entries):
    def make(state):
        return {**state, stream: {**state[stream], **entries}}

    return make


def without_a_tensor(state):
    tensors = dict(state["stream_1"]["averaged_tensors"])
    del tensors["1.bias"]
    return changed_in("stream_1", averaged_tensors=tensors)(state)


def of_another_shape(state):
    tensors = {**state["stream_1"]["averaged_tensors"], "1.bias": torch.zeros(3)}
    return changed_in("stream_1", averaged_tensors=tensors)(state)


BAD_STATES = [
    (
        lambda state: None,
        TypeError,
        "should be a mapping from its state_dict.., got NoneType",
    ),
    (lambda state: {}, ValueError, "but it misses 'ignite_ema_posthoc_version'"),
    (lambda state: state["stream_0"], ValueError, "but it misses 'ignite_ema_posthoc_version'"),
    (changed(ignite_ema_posthoc_version=1), ValueError, "'ignite_ema_posthoc_version' of the state should be 2, got 1"),
    (changed(ignite_ema_posthoc_version=torch.ones(2)), ValueError, "'ignite_ema_posthoc_version' of the state should"),
    (changed(sigma_rels=[torch.ones(2), 0.1]), ValueError, "'sigma_rels' of the state should be"),
    (
        changed(sigma_rels=[0.05, 0.2]),
        ValueError,
        r"'sigma_rels' of the state should be \[0.05, 0.1\], got \[0.05, 0.2\]",
    ),
    (changed(time_unit="samples"), ValueError, "'time_unit' of the state should be 'updates', got 'samples'; make the"),
    (changed(stream_1=...), ValueError, "but it misses 'stream_1'"),
    (changed(stream_2={}), ValueError, "but it should not have 'stream_2'"),
    (changed(more=1), ValueError, "but it should not have 'more'"),
    (changed(run_id=...), ValueError, "but it misses 'run_id'"),
    (changed(run_id=None), TypeError, "'run_id' of the state should be of type str, got NoneType"),
    (
        changed(run_id=""),
        ValueError,
        "'run_id' and 'snapshot_times' of the state should be a name and a list of rising",
    ),
    *(
        (changed(snapshot_times=times), TypeError, "'snapshot_times' of the state should be of type list")
        for times in (3, ())
    ),
    *(
        (changed(snapshot_times=times), ValueError, "a name and a list of rising times, got '.*; load what state_dict")
        for times in ([5.0], [0, 5], [5, 5], [7, 5], ["5"], [[5, "a"]], [True])
    ),
    (changed(snapshot_times=[5, 9]), ValueError, r"should be of one time, got \[8\] updates at 8; load"),
    (changed(updated_at=7), ValueError, r"should be of one time, got \[8\] updates at 7; load"),
    (changed_in("stream_1", num_updates=7), ValueError, r"should be of one time, got \[7, 8\] updates at 8; load"),
    (changed(samples_seen=-1), ValueError, "'samples_seen' of the state should be 0 or more, got -1"),
    (changed(samples_seen=1.5), TypeError, "'samples_seen' of the state should be of type int, got float"),
    (changed(updated_at=None), TypeError, "'updated_at' of the state should be of type int, got NoneType"),
    (changed(stream_1=None), TypeError, "'stream_1' of the state should be of type Mapping, got NoneType"),
    (changed(stream_1={}), ValueError, "The state of an EMAHandler should be .*, but it misses 'ignite_ema_version'"),
    (changed_in("stream_1", num_updates=-1), ValueError, "'num_updates' of the state should be 0 or more, got -1"),
    (without_a_tensor, ValueError, "but the state misses '1.bias'"),
    (of_another_shape, ValueError, r"'1.bias' .* shape \(2,\), got \(3,\)"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_STATES)
def test_a_bad_state_is_refused_and_changes_nothing(make, error, message, tmp_path):
    state = Run(tmp_path / "one").train(8).saved()["ema"]
    other = Run(tmp_path / "two", seed=1).train(7)
    before = copy.deepcopy(other.saved())
    with pytest.raises(error, match=message):
        other.ema.load_state_dict(make(state))
    assert_same(other.saved(), before)
    other.train()  # and it goes on as it was


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_rels": (0.10, 0.05)}, r"'sigma_rels' of the state should be \[0.1, 0.05\], got \[0.05, 0.1\]; make"),
        ({"sigma_rels": (0.05,)}, "'sigma_rels' of the state should be"),
        ({"samples": size_of_batch}, "'time_unit' of the state should be 'samples', got 'updates'"),
    ],
)
def test_a_state_of_other_options_is_refused(options, message, tmp_path):
    state = Run(tmp_path / "one").train(8).saved()["ema"]
    with pytest.raises(ValueError, match=message):
        Run(tmp_path / "two", **options).ema.load_state_dict(state)


def test_a_run_that_resumes_without_its_averages_is_warned_about(tmp_path):
    state = Run(tmp_path / "one").train(8).saved()
    second = Run(tmp_path / "two")
    Checkpoint.load_objects({"model": second.model, "trainer": second.trainer}, state)
    with pytest.warns(UserWarning, match="resumes at iteration 8, but its PostHocEMA was not restored") as record:
        second.train()
    assert len(record) == 1


def test_streams_swap_in_and_out(tmp_path):
    run = Run(tmp_path).train(8)
    weight = run.model[0].weight.clone()
    with run.ema.streams[0].swapped():
        assert torch.equal(run.model[0].weight, run.ema.streams[0].ema_model[0].weight)
        with pytest.raises(RuntimeError, match="while the model holds its own weights"):
            run.ema.load_state_dict(run.ema.state_dict())
        with pytest.raises(RuntimeError, match="while the model holds its own weights"):
            run.ema.reset()
    assert torch.equal(run.model[0].weight, weight)


# Arguments


BAD = [
    ({"sigma_rels": 0.05}, TypeError, r"sigma_rels should be a sequence of widths such as \(0.05, 0.10\), got 0.05"),
    ({"sigma_rels": ()}, TypeError, "sigma_rels should be a sequence of widths"),
    ({"sigma_rels": "0.05"}, TypeError, "sigma_rels should be a sequence of widths"),
    ({"sigma_rels": (0.05, 0.3)}, ValueError, "got 0.3"),
    ({"sigma_rels": (0.05, 0.05)}, ValueError, r"sigma_rels should be different widths, got \(0.05, 0.05\)"),
    ({"handle_buffers": "ema_train"}, ValueError, "'copy', 'update' or a mapping, got 'ema_train': an average that"),
    ({"handle_buffers": "nonsense"}, ValueError, "handle_buffers can only be one of"),
    ({"samples": 8}, TypeError, "samples should be a function of the engine, got 8; pass one such as"),
    ({"snapshot_dtype": torch.int8}, ValueError, "snapshot_dtype should be one of torch.float32, .*, got torch.int8"),
    ({"snapshot_dtype": "float32"}, ValueError, "got 'float32'"),
    ({"ema_models": [nn.Linear(1, 1)]}, ValueError, "ema_models should be one twin for each of 2 widths, got 1"),
    ({"ema_models": [twin := nn.Linear(1, 1), twin]}, ValueError, "ema_models should be different modules"),
    ({"ema_models": []}, ValueError, "ema_models should be one twin for each of 2 widths, got 0"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments_are_refused_and_no_folder_is_made(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        PostHocEMA(nn.Linear(1, 1), **{"dirname": tmp_path / "new", **options})
    assert not (tmp_path / "new").exists()


def test_the_folder_is_made_with_its_parents_and_has_to_be_one(tmp_path):
    ema = PostHocEMA(nn.Linear(1, 1), dirname=str(tmp_path / "a" / "b"))
    assert ema.dirname.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        PostHocEMA(nn.Linear(1, 1), dirname=tmp_path / "file")


def test_one_stream_is_enough(tmp_path):
    run = Run(tmp_path, sigma_rels=[0.1]).train()
    assert torch.equal(reconstruct(tmp_path, 0.1)["0.weight"], run.ema.streams[0].ema_model[0].weight)
    assert run.ema.sigma_rels == (0.1,)


# A state that is older than what the directory holds


def diverge(run):
    for parameter in run.model.parameters():
        parameter.data.fill_(100)


def test_a_rollback_in_the_middle_of_a_run_writes_its_own_snapshots(tmp_path):
    run = Run(tmp_path)
    states = []
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=18), lambda: states.append(copy.deepcopy(run.saved()))
    )

    def roll_back():
        run.ema.load_state_dict(states[0]["ema"])
        diverge(run)

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=32), roll_back)
    with pytest.warns(UserWarning, match="later than the state that was loaded, of time 18: 3, from 'snapshot_20.pt'"):
        run.train()
    found = stored(tmp_path)
    assert [one.time for one in found] == [5, 10, 15, 21, 26]  # at iterations 5, 10, 15, 35, 40
    assert found[-1].averaged[0]["0.weight"].max() > 50


def test_a_snapshot_of_another_attempt_at_the_same_time_is_written_anew(tmp_path):
    first = Run(tmp_path, attach=False)
    states = []
    first.ema.attach(first.trainer, snapshot_event=Events.ITERATION_COMPLETED(once=40))
    first.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=10), lambda: states.append(first.saved()))
    first.trainer.add_event_handler(EVERY_5, first.ema._save)
    first.train(12)
    due = files(tmp_path)
    (state,) = states
    assert times_of(state["ema"]) == [5]
    other = stored(tmp_path)[-1]
    (tmp_path / "snapshot_10.pt").unlink()
    weights = [{name: tensor + 1 for name, tensor in one.items()} for one in other.averaged]
    snapshot_files.write(dataclasses.replace(other, averaged=weights), tmp_path)  # of another attempt
    second = Run(tmp_path)
    Checkpoint.load_objects(second.objects(), state)
    second.train(12)
    assert files(tmp_path) == due
    assert (tmp_path / "snapshot_10.pt.superseded").exists()


def test_averages_of_different_times_are_not_written(tmp_path):
    run = Run(tmp_path).train(8)
    run.ema.streams[1].reset()
    run.train(9)
    with pytest.raises(RuntimeError, match=r"should be of one time, got \[1, 9\] updates; leave the counts of single"):
        run.ema.save()


def test_a_model_without_parameters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model should have parameters, got none"):
        PostHocEMA(nn.ReLU(), dirname=tmp_path)
