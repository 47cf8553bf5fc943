"""The figures of the updates as a picture: a panel for each model, a bar for each peer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ignite_ema.checkpoints.saving import whole_file

from .models import TITLES
from .peers import EVENT, LIMIT, OURS
from .tables import multiple, origin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_COLUMNS = 3
_LEFT = 0.5  # end of the scale; a limit below it is given in words only
_TICKS = (1, 3, 10, 30, 100, 300)
_OUR_COLOUR, _COLOUR = "#d9480f", "#9fb3c8"
_BACKGROUND = {"facecolor": "white", "linewidth": 0, "pad": 1}
_FONT = 9  # points; 12 pixels where the picture is shown 800 pixels wide


def draw(figures: Mapping[str, Any], path: Path, *, force: bool) -> None:
    """Writes a PNG of 1,600 pixels across, to be shown at half of that."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = figures["models"]
    peers = _peers(models)
    columns = min(_COLUMNS, len(models))
    rows = -(-len(models) // columns)
    size = (8, 0.9 + rows * (0.7 + 0.23 * len(peers)))
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    right = 2.2 * max(figure["to_ours"]["q3"] for model in models.values() for figure in model["update"].values())
    for panel, (name, model) in zip(panels, models.items(), strict=False):
        panel.set_xlim(_LEFT, right)
        _draw_panel(panel, name, model, peers)
    for panel in panels[len(models) :]:
        panel.set_axis_off()
    figure.suptitle("Time of one update, as a multiple of ours", x=0.01, ha="left", fontsize=12, fontweight="bold")
    note = "Logarithmic. Bars: medians; whiskers: quartiles; dashes: the limit, one lerp_ that moves as many bytes,"
    note = f"{note}\nnot shown where it is below {_LEFT:g}×. {origin(figures)}"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color="0.35")
    with whole_file(path, force=force) as partial:
        figure.savefig(partial, format="png", pil_kwargs={"optimize": True})


def _peers(models: Mapping[str, Any]) -> list[str]:
    """Of all models, in the order in which they were measured, ours first."""
    names = dict.fromkeys(
        [OURS, *(peer for model in models.values() for peer in (*model["update"], *model["missing"]))]
    )
    return [name for name in names if name not in (EVENT, LIMIT)]


def _draw_panel(axes: "Axes", name: str, model: Mapping[str, Any], peers: Sequence[str]) -> None:
    update = model["update"]
    axes.set_xscale("log")
    for row, peer in enumerate(peers):
        if peer in update:
            _draw_bar(axes, row, update[peer]["to_ours"], ours=peer == OURS)
        else:
            axes.text(1.05, row, "not available", fontsize=8, va="center", color="0.45", bbox=_BACKGROUND)
    if (limit := update[LIMIT]["to_ours"]["median"]) > _LEFT:
        axes.axvline(limit, color="0.1", lw=1.2, ls=(0, (3, 2)), zorder=1.5)  # above bars, below text
    axes.set_yticks(range(len(peers)), peers, fontsize=_FONT)
    axes.set_ylim(len(peers) - 0.4, -0.6)
    ticks = [tick for tick in _TICKS if _LEFT < tick < axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.tick_params(length=0, labelbottom=True, colors="0.35")
    axes.tick_params(axis="y", colors="black")
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    _add_title(axes, name, update)


def _draw_bar(axes: "Axes", row: int, times: Mapping[str, float], ours: bool) -> None:
    median, first, third = times["median"], times["q1"], times["q3"]
    if ours:
        axes.plot(median, row, "o", color=_OUR_COLOUR, markersize=9)
    else:
        axes.barh(row, median - 1, left=1, height=0.68, color=_COLOUR)
    if third > first:
        error = [[median - first], [third - median]]
        axes.errorbar(median, row, xerr=error, color="0.25", elinewidth=1, capsize=2)
    label = f"{multiple(median)}×"
    axes.text(
        (1.3 if ours else 1.12) * max(third, _LEFT),
        row,
        label,
        va="center",
        fontsize=8,
        fontweight="bold" if ours else None,
    )


def _add_title(axes: "Axes", name: str, update: Mapping[str, Any]) -> None:
    ours, limit = (_short(update[peer]["ms"]["median"]) for peer in (OURS, LIMIT))
    axes.set_title(f"ours {ours} ms, limit {limit} ms", fontsize=8, loc="left", color="0.35")
    above: dict[str, Any] = {"xytext": (0, 17), "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(TITLES.get(name, name), (0, 1), xycoords="axes fraction", fontsize=_FONT, fontweight="bold", **above)


def _short(ms: float) -> str:
    return f"{ms:.2g}" if ms < 99.5 else f"{ms:.0f}"
