"""The library's main job on real data: ``python -m ignite_ema.demo``.

A small convolutional net learns scikit-learn's handwritten digits. 30 % of the training labels are random, and the
learning rate is constant: the net's test accuracy jumps from one iteration to the next, but its average's does not.
(A learning rate that decays to zero also calms the net, but needs a known end of the run.) Then a run is stopped in the
middle of an epoch, rebuilt from scratch and resumed from its checkpoint. It must end with the bits of the run that
never stopped.

The colors and helpers here define the look of all pictures of the project.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AVERAGED", "COLORS", "DPI", "ONLINE", "WIDTH", "dress", "headline", "name_lines"]

ONLINE, AVERAGED = "#e69f00", "#0072b2"
COLORS = (AVERAGED, ONLINE, "#009e73", "#cc79a7")  # color-blind readers can tell them apart: Okabe and Ito
WIDTH, DPI = 6, 300  # inches; a picture is 1,800 pixels wide, and on a phone its letters are 7 pixels high


def headline(figure: "Figure", text: str) -> None:
    """Sets the title of a figure, above all panels, on the left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=10)


def dress(axes: "Axes", title: str = "", **settings: Any) -> None:
    """Sets a title on the left, a light grid, and no frame at the top and right; ``settings`` go to ``axes.set``."""
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.set(**settings)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.spines[["top", "right"]].set_visible(False)


def name_lines(axes: "Axes", gap: float = 0.1) -> None:
    """Writes the label of each line beside its right end, in its color, at least ``gap`` of the height apart.

    Call it last: it uses the limits of the axes.
    """
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = {line: min(1.0, max(0.0, to_axes.transform(line.get_path().vertices)[-1, 1])) for line in lines}
    ordered = sorted(lines, key=ends.__getitem__)
    for below, above in pairwise(ordered):
        ends[above] = max(ends[above], ends[below] + gap)
    ends[ordered[-1]] = min(ends[ordered[-1]], 1.0)
    for above, below in pairwise(reversed(ordered)):
        ends[below] = min(ends[below], ends[above] - gap)
    for line in lines:
        text = axes.text(1.02, ends[line], str(line.get_label()), color=line.get_color(), transform=axes.transAxes)
        text.set(va="center", fontsize=8, fontweight="bold")
