"""What can be rebuilt from snapshots: the fit against its definition, the files, and the averages against sums."""

import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from ignite_ema import EMAWarning, PostHocEMA, posthoc
from ignite_ema.posthoc import PowerProfile, Snapshot, UniformProfile, reconstruct, reconstruction, snapshots, stored
from tests.helpers.bits import assert_same_bits
from tests.helpers.snapshots import make_snapshot


@pytest.mark.parametrize("hundredths", [1, 10, 28])
def test_gamma_is_the_largest_root_of_the_cubic(hundredths):
    sigma_rel = hundredths / 100
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    due = max(root.real for root in roots if abs(root.imag) < 1e-9)
    assert posthoc.gamma_from_sigma_rel(sigma_rel) == pytest.approx(due, rel=1e-9)
    assert posthoc.sigma_rel_from_gamma(posthoc.gamma_from_sigma_rel(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)


# The truth: a run of 5,000 updates whose weights are known, and averages as sums over all of them
N = 5_000
EVERY = [1, 10]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Weights that walk, and weights that are noise; two PostHocEMA beside."""
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
        ema = PostHocEMA(model, dirname=dirname, snapshot_dtype=torch.float64)
        event, snapshot = (Events.ITERATION_COMPLETED(every=k) for k in (every, N // 50))
        ema.attach(trainer, f"every_{every}", event, snapshot)
    trainer.run(range(N))
    return dirs, history


LENGTHS = [
    *map(PowerProfile, (0.05, 0.075, 0.20)),
    posthoc.ExponentialProfile(0.05),
    UniformProfile(0.21),  # which begins between two snapshots
]


def exact(target, rows):
    """The average of all rows, each of which holds from one update to the next."""
    edges = torch.linspace(0, 1, len(rows) + 1, dtype=torch.float64)
    return target.cumulative(edges).diff() @ rows


def known_from(dirname):
    return [snapshot for one in stored(dirname) for snapshot in one.snapshots]


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.filterwarnings("ignore:The closest sum of snapshots differs")
@pytest.mark.parametrize("target", LENGTHS, ids=str)
def test_walks_and_independent_weights_are_rebuilt_as_well_as_predicted(long_run, target, every):
    dirs, history = long_run
    predicted, got = posthoc.residual(known_from(dirs[every]), target), reconstruct(dirs[every], target, max_residual=1)
    due = exact(target, history["walk"][every - 1 :: every])
    # 1e-7 of rounding in the residual of what is stored as it is
    assert (got["walk"] - due).norm() <= (2 * predicted + 1e-7) * due.norm()
    due = exact(target, history["noise"][every - 1 :: every])
    # Of 1000 weights a norm is known to 2.2 %, and a ratio of two to 3.2 %: three times that; and with 500 updates
    # (every=10) there are ten to a snapshot, over which the profiles are not smooth but averaged.
    if target != LENGTHS[0]:
        relative = (got["noise"] - due).norm() / due.norm()
        assert relative == pytest.approx(predicted, rel=0.1 if every == 1 else 0.2)


def test_an_average_is_the_sum_with_the_coefficients(folder):
    known = known_from(folder)
    assert [one.time for one in known] == [time for time in range(1, 65) for _ in range(2)]
    due = (posthoc.coefficients(known, 0.15) @ torch.tensor([float(one.time) for one in known]).double()).float()
    got = reconstruct(folder, 0.15)
    assert list(got) == ["a", "also_a", "b", "count"]
    torch.testing.assert_close(got["a"], due.expand(2, 3), rtol=1e-6, atol=0)
    torch.testing.assert_close(got["b"], -due, rtol=1e-6, atol=0)
    assert got["also_a"] is got["a"]
    assert got["count"].item() == 64


def test_several_targets_in_one_pass_are_those_of_single_ones(folder, monkeypatch):
    targets = [0.15, PowerProfile(0.04), UniformProfile(0.5)]
    singles, load = [reconstruct(folder, target) for target in targets], Mock(side_effect=snapshots.load_file)
    monkeypatch.setattr(snapshots, "load_file", load)
    together = reconstruct(folder, targets)
    assert_same_bits(together, singles)
    assert load.call_count == 64
    places = [state[name].data_ptr() for state in together for name in ("a", "b", "count")]
    assert len(set(places)) == len(places)  # nothing is shared between them


def test_an_earlier_step_uses_what_was_there_by_then(folder, tmp_path):
    early = reconstruct(folder, 0.15, step=32)
    for time in range(33, 65):
        (folder / f"snapshot_{time}.pt").unlink()
    assert all(torch.equal(early[name], tensor) for name, tensor in reconstruct(folder, 0.15).items())
    assert early["count"].item() == 32


@pytest.mark.parametrize(("step", "nearest"), [(7, "4 and 8"), (99, "60 and 64")])
def test_a_step_between_snapshots_is_refused_and_the_nearest_are_named(step, nearest, tmp_path):
    for time in (4, 8, 60, 64):
        snapshots.write(make_snapshot(time), tmp_path)
    with pytest.raises(ValueError, match=f"in updates, got {step}; nearest in '.*': {nearest}\\."):
        reconstruct(tmp_path, 0.15, step)


def test_a_rough_average_is_warned_about(folder):
    for target in (0.25, [0.15, 0.25]):
        with pytest.warns(EMAWarning, match=r"PowerProfile\(sigma_rel=0.25\) by 1.5%, .* store more") as record:
            reconstruct(folder, target)
        assert len(record) == 1
        assert sys.version_info < (3, 12) or record[0].filename == __file__


def test_what_is_out_of_reach_is_refused_unless_asked_for(folder):
    for targets in (UniformProfile(0.05), [0.15, UniformProfile(0.05)]):
        with pytest.raises(ValueError, match="differs from UniformProfile.* by 15.6%, .* accept .* max_residual=0.16"):
            reconstruct(folder, targets)
    with pytest.warns(EMAWarning, match="15.6%"):
        assert reconstruct(folder, UniformProfile(0.05), max_residual=0.16)
    with pytest.raises(ValueError, match="accept it with max_residual=0.01 "):
        reconstruct(folder, 0.15, max_residual=0.0001)


def test_planned_snapshots_and_many_targets_are_those_of_single_ones():
    known = posthoc.planned(times=iter(range(1, 33)), sigma_rels=(0.05, 0.2))
    assert known[:3] == [Snapshot(PowerProfile(sigma_rel), k) for k, sigma_rel in ((1, 0.05), (1, 0.2), (2, 0.05))]
    targets = [0.03, UniformProfile(0.3), 0.2]
    for got, target in zip(posthoc.residuals(known, targets, 30), targets, strict=True):
        assert got == pytest.approx(posthoc.residual(known, target, 30), rel=1e-9)


def test_a_bar_shows_the_weights_and_needs_tqdm(folder, capsys, monkeypatch):
    reconstruct(folder, 0.15, progress=True)
    assert "7.00/7.00" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="progress=True needs the package tqdm; pip install tqdm"):
        reconstruct(folder, 0.15, progress=True)


def test_tensors_larger_than_a_chunk_are_rebuilt_in_parts(folder, monkeypatch):
    whole = reconstruct(folder, 0.15)
    monkeypatch.setattr(reconstruction, "_CHUNK", 4 * 128)
    parts = reconstruct(folder, 0.15)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    monkeypatch.setattr(reconstruction, "_CHUNK", 1)  # fewer than there are snapshots
    assert torch.equal(whole["a"], reconstruct(folder, 0.15)["a"])


def test_a_sweep_scores_each_average_in_order(folder, capsys, monkeypatch):
    profiles = [0.2, posthoc.ExponentialProfile(0.05), PowerProfile(0.1)]
    states = []

    def score(state):
        states.append(state)
        return state["b"].item()

    scores = posthoc.sweep(folder, iter(profiles), score, 32)
    due = reconstruct(folder, profiles, 32)
    assert scores == [(profile, state["b"].item()) for profile, state in zip(profiles, due, strict=True)]
    assert_same_bits(states, due)
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setattr(reconstruction, "find_spec", lambda name: None)  # without tqdm
    assert len(posthoc.sweep(folder, profiles, score, 32)) == 3
    assert capsys.readouterr().err == ""


def test_a_sweep_refuses_before_it_scores(folder):
    scored = []
    with pytest.raises(ValueError, match=r"differs from UniformProfile.*max_residual=0.16"):
        posthoc.sweep(folder, [0.1, UniformProfile(0.05)], scored.append)
    with pytest.raises(ValueError, match="base should be left out"):
        posthoc.sweep(folder, [0.1], scored.append, base={})
    assert not scored
