"""What can be rebuilt from snapshots: the fit against its definition, the files, and the averages against sums."""

import builtins
import io
import math
import os
import pickle
import shutil
import sys
import warnings
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import EMAHandler, PostHocEMA, posthoc
from ignite_ema.cli import main
from ignite_ema.posthoc import (
    ExponentialProfile,
    PowerProfile,
    SampledProfile,
    Snapshot,
    UniformProfile,
    coefficients,
    fitting,
    gamma_from_sigma_rel,
    reconstruct,
    reconstruction,
    residual,
    sigma_rel_from_gamma,
    snapshot_files,
    stored,
)
from ignite_ema.posthoc.snapshot_files import StoredSnapshot
from ignite_ema.schedules import PowerFunction


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def evenly(count, sigma_rels=(0.05, 0.10)):
    """Snapshots of a run of the length ``count``."""
    return [Snapshot(PowerProfile(sigma_rel), k) for sigma_rel in sigma_rels for k in range(1, count + 1)]


# Widths and exponents


@pytest.mark.parametrize("hundredths", range(1, 29))
def test_gamma_is_the_root_of_the_cubic(hundredths):
    sigma_rel = hundredths / 100
    got = gamma_from_sigma_rel(sigma_rel)
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    assert got == pytest.approx(max(root.real for root in roots if abs(root.imag) < 1e-9), rel=1e-9)
    # Exactly: the cubic changes its sign within 1e-9 of it.
    low, high = (Fraction(got) * (1 + sign * Fraction(1, 10**9)) for sign in (-1, 1))
    squared = 1 / Fraction(sigma_rel) ** 2
    assert (
        low**3 + 7 * low**2 + (16 - squared) * low + 12 - squared
        < 0
        < high**3 + 7 * high**2 + (16 - squared) * high + 12 - squared
    )


@pytest.mark.parametrize("sigma_rel", [0.001, *(k / 100 for k in range(1, 29)), 0.2886])
def test_width_and_exponent_round_trip(sigma_rel):
    assert sigma_rel_from_gamma(gamma_from_sigma_rel(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.25])
def test_the_width_is_the_standard_deviation_of_the_profile(sigma_rel):
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    p = PowerProfile(sigma_rel).density(x) / 200_000
    mean = (p * x).sum()
    assert (p * (x - mean) ** 2).sum().sqrt().item() == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 0.3, math.nan, math.inf])
def test_widths_outside_of_the_range_are_refused(sigma_rel):
    with pytest.raises(ValueError, match="1/√12 = 0.2887.* got"):
        gamma_from_sigma_rel(sigma_rel)


@pytest.mark.parametrize("gamma", [0, -1.0, math.nan, math.inf])
def test_exponents_outside_of_the_range_are_refused(gamma):
    with pytest.raises(ValueError, match="gamma should be a number above 0, where the width is below 1/√12 .* got"):
        sigma_rel_from_gamma(gamma)


# The fit


@pytest.mark.parametrize(("count", "sigma_rel", "percent"), [(64, 0.15, 0.058), (64, 0.25, 1.46), (16, 0.15, 0.90)])
def test_residuals_are_those_of_the_paper(count, sigma_rel, percent):
    assert 100 * residual(evenly(count), sigma_rel) == pytest.approx(percent, rel=0.01)


TARGETS = [
    PowerProfile(0.03),
    PowerProfile(0.15),
    PowerProfile(0.28),
    ExponentialProfile(0.05),
    UniformProfile(0.2),
    UniformProfile(0.23),  # begins between snapshots
    SampledProfile((0, 0, 1, 2, 1)),
]
STREAMS = [(0.05,), (0.05, 0.10), (0.04, 0.1, 0.2)]
wanted = pytest.mark.parametrize("target", TARGETS, ids=str)
streamed = pytest.mark.parametrize("sigma_rels", STREAMS, ids=str)


def densities(snapshots, tau):
    """The profile of each at the times ``tau``, 0 after it was taken."""
    return torch.stack(
        [torch.where(tau <= s.time, s.profile.density((tau / s.time).clamp(max=1)), 0.0) / s.time for s in snapshots]
    )


@streamed
@wanted
def test_the_residual_is_the_distance_on_a_fine_grid(target, sigma_rels):
    snapshots = evenly(16, sigma_rels)
    tau = (torch.arange(160_000, dtype=torch.float64) + 0.5) / 10_000
    p = densities([Snapshot(target, 16)], tau)[0]
    q = coefficients(snapshots, target) @ densities(snapshots, tau)
    # The grid is good for 1e-4 of it, as long as it is not next to nothing.
    assert residual(snapshots, target) == pytest.approx(((p - q).norm() / p.norm()).item(), rel=2e-4, abs=1e-6)


@streamed
@wanted
def test_coefficients_have_the_sum_1_and_no_others_come_closer(target, sigma_rels):
    snapshots = evenly(32, sigma_rels)
    found = coefficients(snapshots, target)
    assert found.dtype == torch.float64
    assert found.shape == (len(snapshots),)
    assert found.sum().item() == pytest.approx(1, abs=1e-12)
    gram = fitting._gram(snapshots, snapshots)
    mixed = fitting._gram(snapshots, [Snapshot(target, 32)])[:, 0]

    def distance(c):
        return (c @ gram @ c - 2 * c @ mixed).item()

    generator = torch.Generator().manual_seed(0)
    least = distance(found)
    for scale in (1e-1, 1e-3, 1e-5):
        for _ in range(50):
            step = scale * torch.randn(len(snapshots), generator=generator, dtype=torch.float64)
            assert distance(found + step - step.mean()) >= least - 1e-12


@wanted
def test_more_snapshots_and_more_streams_come_closer(target):
    assert residual(evenly(32), target) <= residual(evenly(16), target) + 1e-9
    assert residual(evenly(16, STREAMS[2]), target) < residual(evenly(16, (0.04, 0.1)), target) + 1e-9


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10])
def test_what_is_stored_is_had_exactly(sigma_rel):
    snapshots = evenly(64)
    found = coefficients(snapshots, sigma_rel)
    due = torch.tensor([float(s.time == 64 and s.profile.sigma_rel == sigma_rel) for s in snapshots])
    torch.testing.assert_close(found, due.double(), rtol=0, atol=1e-9)
    assert residual(snapshots, sigma_rel) < 1e-7  # the root of a rounding error


@pytest.mark.parametrize("target", [PowerProfile(0.075), PowerProfile(0.15), ExponentialProfile(0.05)], ids=str)
def test_the_residual_falls_with_the_square_of_the_number_of_snapshots(target):
    # Down to thousandths of a percent, which rounding in the inner products would hide.
    ratio = residual(evenly(50), target) / residual(evenly(200), target)
    assert ratio == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("target", [PowerProfile(0.15), UniformProfile(0.5)], ids=str)
def test_a_snapshot_that_is_there_twice_changes_nothing(target):
    snapshots = evenly(32)
    assert residual([*snapshots, *snapshots[20:]], target) == pytest.approx(residual(snapshots, target), rel=1e-6)
    close = [Snapshot(one.profile, one.time * (1 + 1e-12)) for one in snapshots[:-1]]
    found = coefficients([*snapshots, *close], target)
    assert residual([*snapshots, *close], target) == pytest.approx(residual(snapshots, target), rel=1e-4)
    assert found.abs().max() < 10  # no huge ones that cancel


def test_snapshots_that_are_the_same_share_what_one_would_count():
    snapshots = evenly(32)
    due = coefficients(snapshots, 0.15) / 2
    torch.testing.assert_close(coefficients(snapshots * 2, 0.15), torch.cat([due, due]), rtol=0, atol=1e-6)
    found = coefficients([Snapshot(PowerProfile(0.1), 5)] * 50 + evenly(8), 0.15)
    assert found.abs().max() < 1


def test_coefficients_stay_small_where_there_are_many_snapshots():
    # Their norm multiplies what rounding the snapshots has cost.
    assert coefficients(evenly(300), 0.15).norm() < 1
    assert coefficients(evenly(300), 0.02).norm() < 25


def test_one_snapshot_is_its_own_average():
    assert coefficients([Snapshot(PowerProfile(0.1), 5)], 0.2).tolist() == [1.0]
    assert residual([Snapshot(PowerProfile(0.1), 5)], 0.1) == 0


def test_the_order_of_snapshots_does_not_matter():
    snapshots = evenly(16)
    found = coefficients(snapshots[::-1], 0.15).flip(0)
    torch.testing.assert_close(found, coefficients(snapshots, 0.15), rtol=1e-9, atol=1e-9)


def test_the_unit_of_time_does_not_matter():
    updates = evenly(16)
    samples = [replace(one, time=one.time * 12_800) for one in updates]
    assert residual(samples, 0.15) == pytest.approx(residual(updates, 0.15), rel=1e-6)
    torch.testing.assert_close(coefficients(samples, 0.15), coefficients(updates, 0.15), rtol=1e-8, atol=1e-9)


def test_a_number_stands_for_a_power_function_and_the_end_for_the_last_snapshot():
    assert torch.equal(coefficients(evenly(8), 0.15), coefficients(evenly(8), PowerProfile(0.15), 8))
    assert 0.05 < residual(evenly(64), 0.05, end=63.5) < 0.3  # between snapshots


BAD_FITS = [
    (lambda: coefficients([], 0.1), ValueError, "snapshots should be one or more, got none"),
    (lambda: residual(evenly(2), 0.3), ValueError, "got 0.3"),
    (lambda: residual(evenly(2), 0.1, end=0), ValueError, "time of a Snapshot should be above 0, got 0"),
    (lambda: Snapshot(PowerProfile(0.1), math.inf), ValueError, "got inf"),
    (lambda: Snapshot(PowerProfile(0.1), math.nan), ValueError, "got nan"),
    (lambda: Snapshot(0.1, 1), TypeError, r"profile should be a Profile, such as PowerProfile\(0.05\), got 0.1"),
    (lambda: residual(evenly(2), UniformProfile(1e-17)), ValueError, "target should have a density that float64 can"),
    (lambda: residual(evenly(2), ExponentialProfile(1e-310)), ValueError, "choose a longer one"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_FITS)
def test_bad_input_of_a_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The truth: a run of 20,000 updates whose weights are known, and averages as sums over all of them

N = 20_000
EVERY = [1, 10, 100]
SNAPSHOTS = 50


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Weights that walk, and weights that are noise; three PostHocEMA beside, and one average as it is kept online."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(N, 1000, generator=generator, dtype=torch.float64)
    history = {"walk": noise[:, :200].cumsum(0), "noise": noise}
    model = nn.ParameterDict({name: torch.zeros(rows.shape[1], dtype=torch.float64) for name, rows in history.items()})

    def step(engine, batch):
        for name, rows in history.items():
            model[name].data.copy_(rows[engine.state.iteration - 1])

    trainer = Engine(step)
    dirs = {every: tmp_path_factory.mktemp(f"every_{every}") for every in EVERY}
    for every, dirname in dirs.items():
        PostHocEMA(model, dirname=dirname, snapshot_dtype=torch.float64).attach(
            trainer,
            f"every_{every}",
            Events.ITERATION_COMPLETED(every=every),
            Events.ITERATION_COMPLETED(every=N // SNAPSHOTS),
        )
    online = EMAHandler(model, PowerFunction(0.15))
    online.attach(trainer, event=Events.ITERATION_COMPLETED(every=10))
    trainer.run(range(N))
    return dirs, history, online


LENGTHS = [
    *map(PowerProfile, (0.05, 0.075, 0.15, 0.20)),
    ExponentialProfile(0.05),
    UniformProfile(0.2),
    UniformProfile(0.21),  # which begins between two snapshots
]


def exact(target, rows):
    """The average of all rows, each of which holds from one update to the next."""
    edges = torch.linspace(0, 1, len(rows) + 1, dtype=torch.float64)
    return target.cumulative(edges).diff() @ rows


def known_from(dirname):
    return [snapshot for one in stored(dirname) for snapshot in one.snapshots]


@pytest.fixture(scope="module")
def rebuilt(long_run):
    """All lengths from all three runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {every: reconstruct(dirname, LENGTHS, max_residual=1) for every, dirname in long_run[0].items()}


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("target", LENGTHS, ids=str)
def test_a_random_walk_is_rebuilt_within_twice_the_predicted_residual(long_run, rebuilt, target, every):
    dirs, history, _ = long_run
    due = exact(target, history["walk"][every - 1 :: every])
    got = rebuilt[every][LENGTHS.index(target)]["walk"]
    # 1e-7 of rounding in the residual of what is stored as it is
    assert (got - due).norm() <= (2 * residual(known_from(dirs[every]), target) + 1e-7) * due.norm()


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("target", LENGTHS[1:], ids=str)
def test_independent_weights_are_rebuilt_as_well_as_predicted(long_run, rebuilt, target, every):
    dirs, history, _ = long_run
    due = exact(target, history["noise"][every - 1 :: every])
    got = rebuilt[every][LENGTHS.index(target)]["noise"]
    predicted = residual(known_from(dirs[every]), target)
    # Of 1000 weights a norm is known to 2.2 %, and a ratio of two to 3.2 %: three times that; and with 200 updates
    # (every=100) there are four to a snapshot, over which the profiles are not smooth but averaged.
    assert (got - due).norm() / due.norm() == pytest.approx(predicted, rel=0.1 if every < 100 else 0.2)


def test_what_is_rebuilt_is_what_an_online_average_holds(long_run, rebuilt):
    dirs, _, online = long_run
    for name, parameter in online.ema_model.items():
        error = (rebuilt[10][2][name] - parameter).norm() / parameter.norm()
        assert error < 2 * residual(known_from(dirs[10]), 0.15), name


# Small runs whose files are written here


def make_snapshot(time, value=None, **changes):
    """With an average of two streams, a buffer, and a tied name."""
    value = float(time) if value is None else value
    averaged = [{"a": torch.full((2, 3), value), "b": torch.full((), -value)} for _ in range(2)]
    entries = {
        "time": time,
        "time_unit": "updates",
        "num_updates": time,
        "iteration": 2 * time,
        "epoch": 0,
        "sigma_rels": [0.05, 0.1],
        "averaged": averaged,
        "copied": {"count": torch.tensor(time)},
        "state_dict_names": {"a": "a", "also_a": "a", "b": "b", "count": "count"},
        "frozen_shapes": {},
        "run_id": "run",
    }
    return StoredSnapshot(**(entries | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for time in range(1, 65):
        snapshot_files.write(make_snapshot(time), folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """64 snapshots, each of which holds its own time."""
    return shutil.copytree(written, tmp_path, dirs_exist_ok=True)


def write_raw(folder, **changes):
    """A file as it should be, but for some entries."""
    content = {"ignite_ema_snapshot": 2, **vars(make_snapshot(65)), **changes}
    path = folder / "snapshot_65.pt"
    torch.save({key: value for key, value in content.items() if value is not ... and key != "_file"}, path)
    return path


def test_an_average_is_the_sum_with_the_coefficients(folder):
    known = known_from(folder)
    assert [one.time for one in known] == [time for time in range(1, 65) for _ in range(2)]
    due = (coefficients(known, 0.15) @ torch.tensor([float(one.time) for one in known]).double()).float()
    got = reconstruct(folder, 0.15)
    assert list(got) == ["a", "also_a", "b", "count"]
    torch.testing.assert_close(got["a"], due.expand(2, 3), rtol=1e-6, atol=0)
    torch.testing.assert_close(got["b"], -due, rtol=1e-6, atol=0)
    assert got["also_a"] is got["a"]
    assert got["count"].item() == 64


def test_several_targets_in_one_pass_are_those_of_single_ones(folder, monkeypatch):
    targets = [0.15, PowerProfile(0.04), ExponentialProfile(0.05), UniformProfile(0.5)]
    singles = [reconstruct(folder, target) for target in targets]
    reads = []

    def load(path, load=snapshot_files.open_file):
        reads.append(path)
        return load(path)

    monkeypatch.setattr(snapshot_files, "open_file", load)
    for given in (targets, tuple(targets)):
        together = reconstruct(folder, given)
        for one, other in zip(singles, together, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(reads) == 2 * 64
    places = [state[name].data_ptr() for state in together for name in ("a", "b", "count")]
    assert len(set(places)) == len(places)  # nothing is shared between them


def test_a_sequence_of_one_gives_a_list(folder):
    assert isinstance(reconstruct(folder, [0.15]), list)
    with pytest.raises(ValueError, match="target should be a profile or several, got none"):
        reconstruct(folder, [])


def test_an_earlier_step_uses_what_was_there_by_then(folder, tmp_path):
    early = reconstruct(folder, 0.15, step=32)
    for time in range(33, 65):
        (folder / f"snapshot_{time}.pt").unlink()
    assert all(torch.equal(early[name], tensor) for name, tensor in reconstruct(folder, 0.15).items())
    assert early["count"].item() == 32


@pytest.mark.parametrize(("step", "nearest"), [(5, "4 and 8"), (7, "4 and 8"), (1, "4 and 8"), (99, "60 and 64")])
def test_a_step_between_snapshots_is_refused_and_the_nearest_are_named(step, nearest, tmp_path):
    for time in range(4, 65, 4):
        snapshot_files.write(make_snapshot(time), tmp_path)
    with pytest.raises(ValueError, match=f"in updates, got {step}; nearest in '.*': {nearest}\\."):
        reconstruct(tmp_path, 0.15, step)


def test_a_rough_average_is_warned_about(folder):
    message = (
        r"give PowerProfile\(sigma_rel=0.25\) roughly: .* differs by 1.5%, where 1% is good; choose another length "
        r"\(sigma_rel is good from 0.03 to 0.24\)\.$"
    )
    for target in (0.25, [0.15, 0.25]):
        with pytest.warns(UserWarning, match=message) as record:
            reconstruct(folder, target)
        assert [warning.filename for warning in record] == [__file__]


def test_what_is_out_of_reach_is_refused_unless_asked_for(folder):
    with pytest.raises(ValueError, match=r"the reach of the snapshots, .* differs from UniformProfile.* by 15.6%"):
        reconstruct(folder, UniformProfile(0.05))
    with pytest.raises(ValueError, match=r"accept it with max_residual=0.16 \(--max-residual\)"):
        reconstruct(folder, [0.15, UniformProfile(0.05)])
    with pytest.warns(UserWarning, match="15.6%"):
        assert reconstruct(folder, UniformProfile(0.05), max_residual=0.16)
    with pytest.raises(ValueError, match="accept it with max_residual=0.01 "):
        reconstruct(folder, 0.15, max_residual=0.0001)
    with pytest.raises(ValueError, match=r"sigma_rel=1e-06\) by 100.0%; choose another length \(.* to 0.24\)\.$"):
        reconstruct(folder, 1e-6)


def test_a_window_between_snapshots_is_told_where_to_begin(folder):
    with pytest.warns(UserWarning, match=r"let its window begin at a snapshot, such as 0.1875 or 0.2031\.$"):
        reconstruct(folder, UniformProfile(0.2))
    assert reconstruct(folder, UniformProfile(0.1875))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, "32"), "step should be the time of a snapshot, an integer, got '32'"),
        (
            ("0.1",),
            "target should be a profile or a number, got '0.1'; pass a sigma_rel such as 0.15, or a profile such as Ex",
        ),
    ],
)
def test_text_is_no_number(arguments, message, folder):
    with pytest.raises(TypeError, match=message):
        reconstruct(folder, *arguments)


def test_times_are_no_snapshots():
    with pytest.raises(TypeError, match=r"should be of type Snapshot, got 20; posthoc.planned\(times=...\) makes them"):
        residual([20, 40], 0.15)


def test_what_is_planned_is_what_a_run_would_have():
    made = [Snapshot(PowerProfile(sigma_rel), time) for time in (1, 2, 3) for sigma_rel in (0.05, 0.2)]
    assert posthoc.planned(times=iter((1, 2, 3)), sigma_rels=(0.05, 0.2)) == made


def test_many_targets_are_fitted_as_one_by_one():
    known = posthoc.planned(range(1, 33))
    targets = [0.03, UniformProfile(0.3), 0.2]
    for got, target in zip(posthoc.residuals(known, targets, 30), targets, strict=True):
        assert got == pytest.approx(residual(known, target, 30), rel=1e-9)


@pytest.mark.parametrize("value", [math.nan, -0.1, "0.1", None, True])
def test_a_limit_that_is_none_is_refused(value, folder):
    with pytest.raises((TypeError, ValueError), match="max_residual should be a number of at least 0, got"):
        reconstruct(folder, 0.15, max_residual=value)


def test_types_wider_than_float32_are_kept(tmp_path):
    for time in range(1, 9):
        tensors = {
            "double": torch.full((3,), 1 + 1e-12, dtype=torch.float64),
            "complex": torch.full((3,), 2 - 1j),
            "wide_complex": torch.full((3,), 2 - 1e-12j, dtype=torch.complex128),
            "half": torch.full((3,), 0.1, dtype=torch.float16),
            "brain": torch.full((3,), 0.1, dtype=torch.bfloat16),
            "empty": torch.empty(0, 4),
            "transposed": torch.arange(6.0).view(2, 3).t(),
        }
        names = {name: name for name in tensors}
        one = make_snapshot(time, averaged=[tensors, tensors], copied={}, state_dict_names=names)
        snapshot_files.write(one, tmp_path)
    got = reconstruct(tmp_path, 0.1)
    wide = {"double": torch.float64, "complex": torch.complex64, "wide_complex": torch.complex128}
    for name, tensor in got.items():  # constant weights: nothing but the rounding of the sum
        assert tensor.dtype == wide.get(name, torch.float32), name
        due = tensors[name].to(tensor.dtype)
        torch.testing.assert_close(tensor, due, rtol=4 * torch.finfo(tensor.dtype).eps, atol=0)


def test_tensors_larger_than_a_chunk_are_rebuilt_in_parts(folder, monkeypatch):
    whole = reconstruct(folder, 0.15)
    monkeypatch.setattr(reconstruction, "_CHUNK", 4 * 128)
    parts = reconstruct(folder, 0.15)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    monkeypatch.setattr(reconstruction, "_CHUNK", 1)  # fewer than there are snapshots
    assert all(torch.equal(whole[name], tensor) for name, tensor in reconstruct(folder, 0.15).items())


def test_a_bar_shows_the_weights(folder, capsys):
    reconstruct(folder, 0.15)
    assert capsys.readouterr() == ("", "")
    reconstruct(folder, 0.15, progress=True)
    assert "7.00/7.00" in capsys.readouterr().err


def test_a_bar_needs_tqdm(folder, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    reconstruct(folder, 0.15)
    with pytest.raises(ImportError, match="progress=True needs the package tqdm; pip install tqdm"):
        reconstruct(folder, 0.15, progress=True)


def peak(folder, monkeypatch):
    """The most bytes that are allocated at a time while an average is rebuilt, beside what is mapped to files."""
    mapped = stored(folder)
    monkeypatch.setattr(reconstruction, "stored", lambda *arguments: mapped)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        reconstruct(folder, 0.1)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_memory_does_not_grow_with_the_number_of_snapshots(tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruction, "_CHUNK", 2**18)  # 2 MB in float64, so that it does not hide what is measured
    weights = [{"a": torch.ones(1_000_000)}] * 2  # 4 MB
    for count in (2, 30):
        (tmp_path / str(count)).mkdir()
        for time in range(1, count + 1):
            one = make_snapshot(time, averaged=weights, copied={}, state_dict_names={"a": "a"})
            snapshot_files.write(one, tmp_path / str(count))
    few, many = peak(tmp_path / "2", monkeypatch), peak(tmp_path / "30", monkeypatch)
    # The result is 4 MB, a chunk three times 2 and less; what the files hold is 240 MB.
    assert 4e6 < few < 12e6
    assert many < 12e6


# Files that are not as they should be, at every entrance


ENTRANCES = {
    "stored": lambda folder: stored(folder),
    "reconstruct": lambda folder: reconstruct(folder, 0.15),
    "--list": lambda folder: command(folder, "--list"),
    "--out": lambda folder: command(folder, "--sigma-rel", "0.15", "--out", str(folder.parent / "out.pt")),
}
entrance = pytest.mark.parametrize("enter", ENTRANCES.values(), ids=ENTRANCES.keys())


def command(folder, *arguments):
    """What it says on stderr is raised, as from the other entrances."""
    stderr, old = io.StringIO(), sys.stderr
    sys.stderr = stderr
    try:
        code = main(["reconstruct", str(folder), *arguments])
    finally:
        sys.stderr = old
    message = stderr.getvalue()
    assert code == 1
    assert message.startswith("ignite-ema: ")
    assert message.count("\n") == 1
    raise ValueError(message.removeprefix("ignite-ema: "))


class Evil:
    """Runs something where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def cut(folder):
    path = folder / "snapshot_65.pt"
    path.write_bytes((folder / "snapshot_64.pt").read_bytes()[:-300])


def damaged(folder):
    data = bytearray((folder / "snapshot_64.pt").read_bytes())
    start = data.index(b"data.pkl") + 64
    data[start : start + 200] = os.urandom(200)
    (folder / "snapshot_65.pt").write_bytes(data)


def empty(folder):
    (folder / "snapshot_65.pt").write_bytes(b"")


def text(folder):
    (folder / "snapshot_65.pt").write_text("not found")


def a_folder(folder):
    (folder / "snapshot_65.pt").mkdir()


def pickled_evil(folder):
    (folder / "snapshot_65.pt").write_bytes(pickle.dumps(Evil()))


def saved_evil(folder):
    torch.save({"ignite_ema_snapshot": 2, "evil": Evil()}, folder / "snapshot_65.pt")


def evil_average(folder):
    write_raw(folder, averaged=[{"a": Evil(), "b": torch.zeros(())}] * 2)


def model_file(folder):
    torch.save(nn.Linear(1, 1).state_dict(), folder / "snapshot_65.pt")


def renamed(folder):
    (folder / "snapshot_64.pt").rename(folder / "snapshot_65.pt")


def numbered_otherwise(folder):
    write_raw(folder).rename(folder / "snapshot_065.pt")


def entries(**changes):
    def make(folder):
        write_raw(folder, **changes)

    return make


GOOD = make_snapshot(65)
BAD_FILES = [
    (cut, "'.*snapshot_65.pt' should be a file that torch.save or safetensors wrote, but it is cut short"),
    (damaged, "snapshot_65.pt' should hold what was written, but its entry 'archive/data.pkl' has changed"),
    (empty, "snapshot_65.pt' should hold weights, but it is empty"),
    (text, "snapshot_65.pt' should be a file that torch.save or safetensors wrote, but it is text"),
    (a_folder, "snapshot_65.pt' should be a file, got a directory"),
    (pickled_evil, "snapshot_65.pt' should"),
    (saved_evil, "its entries are others"),
    (evil_average, "it has other things than tensors"),
    (model_file, "snapshot_65.pt' should be a snapshot of a PostHocEMA, but it is another file"),
    (renamed, "snapshot_65.pt' should be named 'snapshot_64.pt', after its time"),
    (numbered_otherwise, "snapshot_065.pt' should be named 'snapshot_65.pt', after its time"),
    (entries(ignite_ema_snapshot=1), "should be of version 2; read it with the ignite_ema that wrote it, or newer"),
    (entries(more=1), "its entries are others"),
    (entries(copied=...), "its entries are others"),
    (entries(time=65.0), "its entries are others"),
    (entries(num_updates=True), "its entries are others"),
    (entries(averaged=(1, 2)), "its entries are others"),
    (entries(averaged=[1, 2]), "its averages are not mappings"),
    (entries(averaged=[]), "it has no average"),
    (entries(averaged=GOOD.averaged[:1]), "its averages are not as many as their widths"),
    (entries(averaged=[{"a": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}]), "its averages differ in names or shapes"),
    (entries(averaged=[{}, {}]), "it has no average"),
    (entries(copied={"count": 3}), "it has other things than tensors"),
    (entries(state_dict_names={"a": "nowhere"}), "its names do not fit its tensors"),
    (entries(state_dict_names={"a": ["a"]}), "its names do not fit its tensors"),
    (entries(sigma_rels=[0.05, 5.0]), "its widths are outside of"),
    (entries(sigma_rels=[0.05, "0.1"]), "its widths are outside of"),
    (
        entries(averaged=[{"a": torch.zeros(1).expand(10**13)}] * 2, state_dict_names={"a": "a"}),
        "got 4 bytes that are repeated",
    ),
    (entries(copied={"count": torch.zeros(1).expand(10**13)}), "got 4 bytes that are repeated"),
    (
        entries(averaged=[{"a": torch.zeros(3, device="meta")}] * 2, state_dict_names={"a": "a"}),
        "it has tensors without memory of their own",
    ),
    (
        entries(averaged=[{"a": torch.eye(3).to_sparse()}] * 2, state_dict_names={"a": "a"}),
        "it has tensors without memory of their own",
    ),
    (entries(run_id="other"), "should be of the run of 'snapshot_65.pt', but it is of another one"),
    (entries(run_id=""), "but it is of no run"),
    (entries(run_id=3), "its entries are others"),
    (entries(frozen_shapes={"a": 3}), "the shapes of its frozen parameters are malformed"),
    (entries(frozen_shapes={"a": [3, -1]}), "the shapes of its frozen parameters are malformed"),
    (entries(frozen_shapes={"f": [3]}), "should have the frozen_shapes of 'snapshot_65.pt'"),
    (entries(time_unit="samples"), "should have the time_unit of 'snapshot_65.pt', but has others"),
    (entries(sigma_rels=[0.05, 0.2]), "should have the sigma_rels of 'snapshot_65.pt'"),
    (entries(state_dict_names={"a": "a", "b": "b"}), "should have the state_dict_names of 'snapshot_65.pt'"),
    (
        entries(averaged=[{"a": torch.zeros(3, 2), "b": torch.zeros(())}] * 2),
        "should have tensors of the names and shapes of 'snapshot_65.pt'",
    ),
]


@entrance
@pytest.mark.parametrize(("spoil", "message"), BAD_FILES, ids=[f"{k}" for k in range(len(BAD_FILES))])
def test_a_bad_file_is_refused_in_one_sentence(spoil, message, enter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for time in (1, 63, 64):
        snapshot_files.write(make_snapshot(time), tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        enter(tmp_path)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path.parent / "out.pt").exists()


@entrance
@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_snapshots_is_refused(name, enter, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "checkpoint_3.pt").touch()
    (tmp_path / "empty" / "snapshot_5.pt.superseded").touch()
    with pytest.raises((ValueError, FileNotFoundError), match="no file such as 'snapshot_1000.pt' in it; check the pa"):
        enter(tmp_path / name)


def test_other_files_in_the_folder_are_left_alone(folder):
    for name in ("snapshot_3.pt.superseded", ".abc.pt", "snapshot_.pt", "snapshot_3.safetensors", "Snapshot_3.pt"):
        (folder / name).write_text("mine")
    assert len(stored(folder)) == 64


def test_snapshots_are_in_the_order_of_their_times(tmp_path):
    for time in (100, 9, 20):
        snapshot_files.write(make_snapshot(time), tmp_path)
    assert [one.time for one in stored(tmp_path)] == [9, 20, 100]
    assert [one.time for one in stored(tmp_path, 20)] == [9, 20]
    assert stored(str(tmp_path))[0].sigma_rels == [0.05, 0.1]


# Writing


def test_the_same_snapshot_has_the_same_bytes(tmp_path):
    contents = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        contents.append(snapshot_files.write(make_snapshot(3), tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


def test_a_snapshot_that_is_there_is_not_overwritten(tmp_path):
    path = snapshot_files.write(make_snapshot(3), tmp_path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="snapshot_3.pt' is there already, and this run has not written it"):
        snapshot_files.write(make_snapshot(3, 7.0), tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("disk full"), OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(error, tmp_path, monkeypatch):
    def fail(content, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises((OSError, KeyboardInterrupt), match="disk full|No space left|^$"):
        snapshot_files.write(make_snapshot(3), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_infinities_stay_what_they_are(mean, tmp_path):
    model = nn.Linear(2, 1)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.inf]))
    model.frozen = nn.Parameter(torch.tensor([0.1, -torch.inf]), requires_grad=False)
    ema = PostHocEMA(model, dirname=tmp_path)
    trainer = Engine(lambda engine, batch: model.weight.data.normal_(mean))
    ema.attach(trainer, snapshot_event=Events.ITERATION_COMPLETED(every=4))
    trainer.run(range(80))
    got = reconstruct(tmp_path, 0.15)
    assert torch.equal(got["mask"], model.mask)
    assert torch.equal(got["frozen"], model.frozen)  # bit for bit, too
    assert got["weight"].isfinite().all()


def test_a_weight_that_becomes_infinite_is_that_of_the_last_snapshot(tmp_path):
    for time in range(1, 65):
        value = -torch.inf if time > 32 else float(time)
        snapshot_files.write(
            make_snapshot(
                time, averaged=[{"a": torch.tensor([value, time])}] * 2, copied={}, state_dict_names={"a": "a"}
            ),
            tmp_path,
        )
    got = reconstruct(tmp_path, 0.15)["a"]
    assert got[0] == -torch.inf
    assert got[1].isfinite()


@pytest.mark.parametrize(
    ("dtype", "sigma_rels", "length"),
    [(torch.bfloat16, (0.05, 0.1, 0.2), 0.02), (torch.float16, (0.05, 0.1, 0.2), 0.02)],
)
def test_rounding_that_a_sum_amplifies_is_told(dtype, sigma_rels, length, tmp_path):
    model = nn.Linear(8, 8)
    ema = PostHocEMA(model, sigma_rels, dirname=tmp_path, snapshot_dtype=dtype)
    trainer = Engine(lambda engine, batch: None)
    ema.attach(trainer, snapshot_event=Events.ITERATION_COMPLETED(every=4))
    trainer.run(range(256))
    reconstruct(tmp_path, 0.15)
    message = r"amplifies the rounding of the snapshots to \d+\.\d% of a weight; choose a longer average, or store"
    if dtype == torch.float16:
        with pytest.warns(UserWarning, match=message):
            reconstruct(tmp_path, length)
    else:
        with pytest.raises(ValueError, match=message):
            reconstruct(tmp_path, length)


def test_channels_last_weights_are_read_part_by_part(tmp_path):
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    ema = PostHocEMA(model, dirname=tmp_path)
    trainer = Engine(lambda engine, batch: None)
    ema.attach(trainer)
    trainer.run(range(3))
    assert stored(tmp_path)[0].averaged[0]["weight"].is_contiguous()
    assert torch.equal(reconstruct(tmp_path, 0.1)["weight"], model.weight)
