"""The fit of a profile by snapshots, and its residual."""

import pytest
import torch

from ignite_ema import posthoc
from ignite_ema.posthoc import ExponentialProfile, PowerProfile, SampledProfile, Snapshot, UniformProfile, fitting


def evenly(count, sigma_rels=(0.05, 0.10)):
    """Snapshots of a run of the length ``count``."""
    return [Snapshot(PowerProfile(sigma_rel), k) for sigma_rel in sigma_rels for k in range(1, count + 1)]


@pytest.mark.parametrize(("count", "sigma_rel", "percent"), [(64, 0.15, 0.058), (64, 0.25, 1.46), (16, 0.15, 0.90)])
def test_residuals_are_those_of_the_paper(count, sigma_rel, percent):
    assert 100 * posthoc.residual(evenly(count), sigma_rel) == pytest.approx(percent, rel=0.01)


TARGETS = [
    PowerProfile(0.03),
    PowerProfile(0.28),
    ExponentialProfile(0.05),
    UniformProfile(0.23),  # begins between snapshots
    SampledProfile((0, 0, 1, 2, 1)),
]
STREAMS = [(0.05,), (0.04, 0.1, 0.2)]
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
    q = posthoc.coefficients(snapshots, target) @ densities(snapshots, tau)
    # The grid is good for 1e-4 of it, as long as it is not next to nothing.
    assert posthoc.residual(snapshots, target) == pytest.approx(((p - q).norm() / p.norm()).item(), rel=2e-4, abs=1e-6)


@streamed
@wanted
def test_coefficients_have_the_sum_1_and_no_others_come_closer(target, sigma_rels):
    snapshots = evenly(32, sigma_rels)
    found = posthoc.coefficients(snapshots, target)
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


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10])
def test_what_is_stored_is_had_exactly(sigma_rel):
    snapshots = evenly(64)
    found = posthoc.coefficients(snapshots, sigma_rel)
    due = torch.tensor([float(s.time == 64 and s.profile.sigma_rel == sigma_rel) for s in snapshots])
    torch.testing.assert_close(found, due.double(), rtol=0, atol=1e-9)
    assert posthoc.residual(snapshots, sigma_rel) < 1e-7  # the root of a rounding error


def test_coefficients_stay_small_where_there_are_many_snapshots_or_the_same_ones():
    # Their norm multiplies what rounding the snapshots has cost.
    assert posthoc.coefficients(evenly(300), 0.15).norm() < 1
    assert posthoc.coefficients(evenly(300), 0.02).norm() < 25
    snapshots = evenly(32)
    close = [Snapshot(one.profile, one.time * (1 + 1e-12)) for one in snapshots[:-1]]
    assert posthoc.coefficients([*snapshots, *close], 0.15).abs().max() < 10  # no huge ones that cancel
    assert posthoc.residual([*snapshots, *close], 0.15) == pytest.approx(posthoc.residual(snapshots, 0.15), rel=1e-4)


def test_a_number_stands_for_a_power_function_and_the_end_for_the_last_snapshot():
    assert torch.equal(posthoc.coefficients(evenly(8), 0.15), posthoc.coefficients(evenly(8), PowerProfile(0.15), 8))
    assert 0.05 < posthoc.residual(evenly(64), 0.05, end=63.5) < 0.3  # between snapshots
