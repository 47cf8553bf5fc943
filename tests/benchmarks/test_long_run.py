import itertools
from contextlib import contextmanager

import pytest
import torch

from ignite_ema import ModelAverage
from tests.benchmarks.alternating import RUNS, Alternating
from tests.benchmarks.long_run import main, measure, verdicts

UNSURE = {"to fresh", "MiB"}  # depend on what else runs, and on when malloc gives memory back; the command judges them
UPDATES, BLOCKS = 20_000, 4


def wrong(figures):
    return {name: list(figures[name]) for name, right in verdicts(figures).items() if not right and name not in UNSURE}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_grows_and_the_error_stays_below_its_bound(name):
    make, part = RUNS[name]
    figures = measure(make, int(UPDATES * part), BLOCKS)
    assert wrong(figures) == {}
    assert min(figures["error"]) > 0  # it does round: what is compared is not the same average twice
    assert max(figures["bound"]) < 2e-4  # of the largest weight: less than by what one update moves the average


def leaking(update, leak):
    kept = []

    def leaky(self, *arguments):
        leak(kept)
        return update(self, *arguments)

    return leaky


@pytest.mark.parametrize(
    ("leak", "figures"),
    [
        (lambda kept: kept.append(torch.zeros(1)), {"objects", "allocations", "tensors", "tensor bytes"}),
        (lambda kept: kept.append([]), {"objects", "allocations"}),
        (lambda kept: kept.append(float(len(kept))), {"allocations"}),
    ],
    ids=["tensors", "objects", "numbers"],
)
def test_a_leak_is_seen(monkeypatch, leak, figures):
    monkeypatch.setattr(ModelAverage, "update", leaking(ModelAverage.update, leak))
    assert wrong(measure(RUNS["ModelAverage"][0], 2000, 2)).keys() == figures


@contextmanager
def left_out(every):
    """Has one update of so many do nothing, without a word."""
    turns, update = itertools.count(1), ModelAverage.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelAverage, "update", lambda self, m: True if next(turns) % every == 0 else update(self, m))
        yield


@pytest.mark.parametrize("name", RUNS)
def test_updates_that_are_left_out_are_seen(name):
    with left_out(every=50):
        assert "error" in wrong(measure(RUNS[name][0], 1000, 2))


def test_updates_that_are_not_counted_are_seen():
    def miscounted(alternating):
        run = RUNS["EMAHandler with a schedule"][0](alternating)
        return run._replace(num_updates=lambda: run.num_updates() - 1)

    assert wrong(measure(miscounted, 200, 2)).keys() == {"missed"}


def test_the_weights_alternate():
    alternating = Alternating()
    a, b = alternating.values
    for expected in (a, b, a, b):
        assert all(map(torch.equal, alternating.model.parameters(), expected))
        alternating.turn()


def test_each_figure_has_a_verdict(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    main(["--updates", "1000", "--blocks", "2"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in RUNS)
    assert printed.count("right") + printed.count("WRONG") == 8 * len(RUNS)


@pytest.mark.parametrize("arguments", [["--blocks", "1"], ["--updates", "999", "--blocks", "2"]])
def test_blocks_that_are_too_few_or_too_small_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--blocks should be at least 2 and --updates 500 times as many, got" in capsys.readouterr().err
