"""Whatever a refusal advises can be had: the nearest lengths, to the last digit that is printed."""

import random
import re

import pytest
import torch

from ignite_ema.posthoc import (
    GOOD,
    ExponentialProfile,
    PowerProfile,
    UniformProfile,
    planned,
    reconstruct,
    residual,
    residuals,
    snapshot_files,
)
from ignite_ema.posthoc.fitting import reach, windows_at_snapshots
from tests.helpers.snapshots import make_snapshot


def times_of(kind):
    chosen = random.Random(kind)
    if kind == "uneven":
        return sorted(chosen.sample(range(1, 3000), 40))
    if kind == "few":
        return [100, 200]
    return range(kind, 24 * 1000 + 1, 24 * 1000 // kind)[:kind] if isinstance(kind, int) else []


def advised(text):
    """All that a clause names, as targets."""
    if text.startswith("let its window"):
        named = re.sub(r" \(.*? off\)", "", text.partition("such as ")[2])
        return [UniformProfile(float(x)) for x in re.findall(r"\d\.?[\de.-]*", named)]
    half_lives = re.findall(r"half_life is .*? at ([\d.]+)", text)
    text = re.sub(r"half_life is .*? at [\d.]+", "", text)
    ranges = re.findall(r"from ([\d.]+) to ([\d.]+)", text)
    single = re.findall(r"at ([\d.]+)", text)
    steps = [x / 100 for low, high in ranges for x in range(round(100 * float(low)), round(100 * float(high)) + 1)]
    return [*map(PowerProfile, [*steps, *map(float, single)]), *map(ExponentialProfile, map(float, half_lives))]


UNREACHED = [
    *map(UniformProfile, (1.0, 0.5, 0.2, 0.013)),
    *map(ExponentialProfile, (0.001, 9.0)),
    *map(PowerProfile, (0.004, 0.28)),
]


@pytest.mark.parametrize(
    ("kind", "limit"),
    [(2, 0.1), (16, GOOD), (24, 0.1), (64, GOOD), (64, 0.001), ("uneven", GOOD), ("uneven", 0.001), ("few", 0.1)],
)
@pytest.mark.parametrize("target", UNREACHED, ids=str)
def test_what_is_advised_is_accepted(target, limit, kind):
    snapshots = planned(times_of(kind))
    text = reach(snapshots, target, max_residual=limit)
    targets = advised(text)
    assert targets or text == "take more snapshots next time"
    for one in targets:
        assert residual(snapshots, one) <= limit, one


def test_a_window_of_the_whole_run_is_not_told_to_take_one_that_is_refused(tmp_path):
    for time in range(1, 51):
        snapshot_files.write(make_snapshot(time), tmp_path)
    with pytest.raises(ValueError, match=r"by 1.*%; let its window begin at a snapshot, such as 0.96 \(") as info:
        reconstruct(tmp_path, UniformProfile(1.0))
    windows = advised(str(info.value).partition("; ")[2].partition(", or accept")[0].rstrip("."))
    assert len(windows) == 2
    for window in windows:
        with pytest.warns(UserWarning, match="roughly"):
            assert reconstruct(tmp_path, window)


def test_advice_counts_the_rounding_of_the_snapshots(tmp_path):
    narrow = [{"a": torch.ones(2, dtype=torch.bfloat16)} for _ in range(3)]
    for time in range(1, 65):
        changes = {"sigma_rels": [0.05, 0.1, 0.2], "averaged": narrow, "copied": {}, "state_dict_names": {"a": "a"}}
        snapshot_files.write(make_snapshot(time, **changes), tmp_path)
    with pytest.raises(ValueError, match=r"choose another length \(sigma_rel is good") as info:
        reconstruct(tmp_path, 0.001)
    for target in advised(str(info.value).partition("; ")[2].partition(")")[0]):
        assert reconstruct(tmp_path, target, max_residual=GOOD)


@pytest.mark.parametrize("limit", [0.5, 0.1, 0.05, GOOD])
@pytest.mark.parametrize("window", [1.0, 0.4, 0.02])
@pytest.mark.parametrize("count", [24, 40])
def test_the_nearest_windows_that_are_accepted_are_named_first(count, window, limit):
    snapshots = planned(range(1, count + 1))
    accepted = [k / count for k in range(1, count + 1) if residual(snapshots, UniformProfile(k / count)) <= limit]
    due = sorted(accepted, key=lambda one: abs(one - window))[:2]
    named = windows_at_snapshots(snapshots, window, lambda row: 0.0, limit)
    assert [*named] == pytest.approx(due, abs=1e-4)
    assert [*named.values()] == pytest.approx(residuals(snapshots, map(UniformProfile, named)))


def test_a_rough_window_says_how_rough_it_is():
    snapshots = planned(range(1, 25))
    assert reach(snapshots, UniformProfile(1.0), max_residual=0.1).endswith(
        "such as 0.875 (8.2% off) or 0.8333 (6.1% off)"
    )
    assert reach(snapshots, UniformProfile(1.0)).endswith("such as 0.208333 or 0.166667")


@pytest.mark.parametrize("limit", [0.1, GOOD])
@pytest.mark.parametrize("half_life", [0.004, 5.0])
def test_the_nearest_half_life_is_named(half_life, limit):
    snapshots = planned(range(1, 25))
    text = reach(snapshots, ExponentialProfile(half_life), max_residual=limit)
    *_, named = advised(text)
    off = residual(snapshots, named)
    assert off <= limit
    assert f"half_life is {'good' if off <= GOOD else f'{off:.1%} off'} at {named.half_life:g}, sigma_rel is" in text
    nearer = named.half_life * (1.2 if half_life > named.half_life else 1 / 1.2)
    assert residual(snapshots, ExponentialProfile(nearer)) > limit
