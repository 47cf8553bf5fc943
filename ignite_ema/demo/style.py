"""One look for every picture of the project: colours, titles, grids. Needs matplotlib."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AVERAGED", "COLORS", "DPI", "ONLINE", "REFERENCE", "WIDTH", "dress", "headline"]

ONLINE, AVERAGED, REFERENCE = "#e69f00", "#0072b2", "0.4"
COLORS = (AVERAGED, ONLINE, "#009e73", "#cc79a7")  # told apart by colour-blind readers, too: Okabe and Ito
WIDTH, DPI = 9, 200  # inches; a picture is 1,800 pixels wide


def headline(figure: "Figure", text: str) -> None:
    """The title of a figure, above all panels, on the left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)


def dress(axes: "Axes", title: str = "", **settings: Any) -> None:
    """Title on the left, a light grid, no frame at the top and on the right; ``settings`` are those of ``axes.set``."""
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.set(**settings)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
