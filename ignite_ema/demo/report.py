"""What the demo shows of its runs: a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from .style import AVERAGED, DPI, ONLINE, WIDTH, dress, headline
from .training import Run

__all__ = ["draw", "percent", "print_table"]


def percent(values: Sequence[float]) -> str:
    """Mean and, of more than one value, standard deviation."""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _ends(runs: Mapping[int, Run]) -> tuple[list[float], list[float]]:
    return [run.online[-1] for run in runs.values()], [run.averaged[-1] for run in runs.values()]


def print_table(runs: Mapping[int, Run]) -> None:
    """Online against averaged test accuracy at the end, and the range of each over the last quarter."""
    from rich.console import Console
    from rich.table import Table

    table = Table("seed", title="Test accuracy (%) at the end, and its range over the last quarter")
    for column in ("online", "range", "averaged", "range", "gain"):
        table.add_column(column, justify="right")
    for seed, run in runs.items():
        row = [str(seed)]
        for curve in (run.online, run.averaged):
            tail = curve[-(len(curve) // 4) :]
            row += [percent(tail[-1:]), f"{100 * min(tail):.1f} to {100 * max(tail):.1f}"]
        table.add_row(*row, f"{100 * (run.averaged[-1] - run.online[-1]):+.1f}")
    if len(runs) > 1:
        online, averaged = _ends(runs)
        gain = f"{100 * (mean(averaged) - mean(online)):+.1f}"
        table.add_section()
        table.add_row("mean ± sd", percent(online), "", percent(averaged), "", gain, style="bold")
    Console().print(table)


def draw(runs: Mapping[int, Run], title: str, every: int, warmup: int, path: Path) -> None:
    """Draws both accuracies, one ``every`` so many iterations: the first seed strong, the others light."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    first, *others = runs
    iterations = [every * (i + 1) for i in range(len(runs[first].online))]
    axes.axvspan(0, min(warmup, iterations[-1]), color="0.95", lw=0, label="momentum warm-up")
    for name, color, width in (("online", ONLINE, 1.1), ("averaged", AVERAGED, 3.0)):
        for seed in [*others, first]:
            look = {"lw": width, "label": f"{name}, seed {seed}"} if seed == first else {"lw": width / 2, "alpha": 0.35}
            axes.plot(iterations, [100 * accuracy for accuracy in getattr(runs[seed], name)], color=color, **look)
    lowest = min(min(run.online[4:] + run.averaged[4:]) for run in runs.values())
    dress(axes, xlabel="iteration", ylabel="test accuracy (%)", xlim=(0, iterations[-1]))
    axes.set_ylim(max(0, 10 * int(10 * lowest) - 10), 100)  # room for the legend
    headline(figure, f"{title}\n{_result(runs)}")
    axes.legend(loc="lower right", ncols=3, fontsize=9, title="light: the other seeds" if others else None)
    unfinished = path.with_name(f".{path.name}.tmp")
    figure.savefig(unfinished, format="png", pil_kwargs={"optimize": True})
    unfinished.replace(path)


def _result(runs: Mapping[int, Run]) -> str:
    online, averaged = map(percent, _ends(runs))
    over = f"mean ± sd of {len(runs)} seeds" if len(runs) > 1 else "one seed"
    return f"Test accuracy at the end: averaged {averaged} %, online {online} % ({over})"
