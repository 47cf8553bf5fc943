"""The library's main job on real data: ``python -m ignite_ema.demo``.

A small convolutional net learns scikit-learn's handwritten digits. 30 % of the training labels are random, and the
learning rate is constant: the net's test accuracy jumps from one iteration to the next, that of its average does not.
(A learning rate that decays to zero calms the net too, but needs a known end of the run.) Then a run is stopped in the
middle of an epoch, rebuilt from nothing and resumed from its checkpoint. It has to end with the bits of the run that
never stopped.

The colors and helpers here are the look of all pictures of the project.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AVERAGED", "COLORS", "DPI", "ONLINE", "WIDTH", "dress", "headline"]

ONLINE, AVERAGED = "#e69f00", "#0072b2"
COLORS = (AVERAGED, ONLINE, "#009e73", "#cc79a7")  # color-blind readers can tell them apart: Okabe and Ito
WIDTH, DPI = 9, 200  # inches; a picture is 1,800 pixels wide


def headline(figure: "Figure", text: str) -> None:
    """Sets the title of a figure, above all panels, on the left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)


def dress(axes: "Axes", title: str = "", **settings: Any) -> None:
    """Title on the left, a light grid, no frame at the top and on the right; ``settings`` are those of ``axes.set``."""
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.set(**settings)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
