"""Averaging profiles: densities, their integrals, and inner products against a quadrature that is not ours."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from scipy import integrate

from ignite_ema import posthoc
from ignite_ema.posthoc import ExponentialProfile, PowerProfile, Profile, SampledProfile, Snapshot, UniformProfile
from ignite_ema.posthoc.profiles import inner_products


@dataclass
class Triangle(Profile):
    """p(x) = 2 x: a profile of one's own, for which there is no closed form; an ordinary dataclass has no hash."""

    def density(self, x):
        return 2 * x

    def cumulative(self, x):
        return x**2


ALL = [
    PowerProfile(0.01),
    PowerProfile(0.2886),  # nearly the mean of the whole run
    ExponentialProfile(0.004),
    ExponentialProfile(30.0),  # longer than the run
    Triangle(),
    UniformProfile(1.0),
    UniformProfile(1 / 3),
    SampledProfile((0, 1, 0, 5, 2)),
]
named = pytest.mark.parametrize("profile", ALL, ids=str)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def kinks(profile):
    """Where a density may jump."""
    return profile._steps()[0].tolist() if hasattr(profile, "_steps") else []


def quadrature(function, low, high, points):
    """scipy's, piece by piece between the points, which are finer towards both ends."""
    inner = [edge + sign * (high - low) * 4.0**-k for edge, sign in ((low, 1), (high, -1)) for k in range(1, 17)]
    bounds = sorted({low, high, *(point for point in [*points, *inner] if low < point < high)})
    pieces = itertools.pairwise(bounds)
    return sum(integrate.fixed_quad(lambda x: function(torch.tensor(x)).numpy(), a, b, n=20)[0] for a, b in pieces)


def at(function, x):
    return function(times(x)).item()


PAIRS = [(one, other) for index, one in enumerate(ALL) for other in ALL[: index + 1]]
paired = pytest.mark.parametrize(("profile", "other"), PAIRS, ids=str)


@named
@pytest.mark.parametrize("x", [0.1, 0.81, 0.97])
def test_the_cumulative_is_the_integral_of_the_density(profile, x):
    due = quadrature(profile.density, 0.0, x, kinks(profile))
    assert at(profile.cumulative, x) == pytest.approx(due, rel=1e-9, abs=1e-12)


@named
def test_a_profile_has_the_integral_1_and_starts_from_0(profile):
    assert at(profile.cumulative, 0.0) == 0
    assert at(profile.cumulative, 1.0) == pytest.approx(1, rel=1e-14)
    x = torch.rand(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for function in (profile.density, profile.cumulative):
        got = function(x)
        assert (got.shape, got.dtype) == (x.shape, torch.float64)
        assert (got >= 0).all()


def test_steps_belong_to_the_moment_at_which_they_end():
    profile = SampledProfile((1, 3))
    assert profile.density(times(1e-9, 0.5, 0.5000001, 1.0)).tolist() == [0.5, 0.5, 1.5, 1.5]
    window = UniformProfile(0.25)
    assert window.density(times(0.1, 0.75, 0.7500001, 1.0)).tolist() == [0, 0, 4, 4]


@paired
def test_inner_products_are_those_of_a_quadrature(profile, other):
    s = 40.0
    for t in (0.8, 28.0, 40.0, 800.0):
        points = [s * edge for edge in kinks(profile)] + [t * edge for edge in kinks(other)]
        points += [s * (1 - 4.0**-k) for k in range(1, 9)] + [t * (1 - 4.0**-k) for k in range(1, 9)]
        due = quadrature(
            lambda tau, t=t: profile.density(tau / s) / s * other.density(tau / t) / t, 0.0, min(s, t), points
        )
        got = inner_products(profile, times(s), other, times(t)).item()
        # 1e-20: below that, the density of one is over where that of the other begins.
        assert got == pytest.approx(due, rel=1e-9, abs=1e-20), t
        assert inner_products(other, times(t), profile, times(s)).item() == pytest.approx(got, rel=1e-10, abs=1e-20)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.1, 0.28])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.0])
def test_inner_products_of_powers_are_exact_to_float64(sigma_rel, ratio):
    # A residual is a difference of these: 1e-8 of them, which float32 exponents cost once, was .01 % of an average.
    a, b = PowerProfile(sigma_rel).gamma, PowerProfile(0.1).gamma
    s, t = 3.0, 3.0 * ratio
    due = (a + 1) * (b + 1) / (a + b + 1) * (s / t) ** (b if s < t else -a) / max(s, t)
    got = inner_products(PowerProfile(sigma_rel), times(s), PowerProfile(0.1), times(t)).item()
    assert got == pytest.approx(due, rel=1e-14)


@pytest.mark.parametrize(("momentum", "num_updates"), [(0.5, 10), (0.0002, 20_000), (1e-7, 1_000)])
def test_the_profile_of_a_momentum_is_that_of_its_ema(momentum, num_updates):
    profile = ExponentialProfile.from_momentum(momentum, num_updates)
    edges = torch.linspace(0, 1, num_updates + 1, dtype=torch.float64)
    got = profile.cumulative(edges).diff()
    due = momentum * (1 - momentum) ** torch.arange(num_updates - 1, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(got, due / due.sum(), rtol=1e-8, atol=1e-15)


def test_samples_are_scaled_and_equal_ones_are_the_mean_of_the_run():
    assert SampledProfile((1, 3)) == SampledProfile([1.0, 3.0])
    assert SampledProfile(torch.tensor([1.0, 3.0])).weights == (1.0, 3.0)
    x = times(0.2, 0.6, 1.0)
    assert torch.equal(SampledProfile((2, 6)).cumulative(x), SampledProfile((1, 3)).cumulative(x))
    assert torch.allclose(SampledProfile((4, 4, 4)).cumulative(x), UniformProfile(1).cumulative(x), rtol=1e-15)


def test_a_profile_of_ones_own_fits_and_is_fitted():
    known = [Snapshot(PowerProfile(0.1), k) for k in range(1, 9)]
    assert posthoc.residual(known, Triangle()) > 0.01
    assert posthoc.residual([*known, Snapshot(Triangle(), 8)], Triangle()) == pytest.approx(0, abs=1e-7)
