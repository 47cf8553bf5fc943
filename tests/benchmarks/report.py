"""The figures of the benchmark as tables and as a picture."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ignite_ema.demo import AVERAGED, DPI, WIDTH, dress, headline

from .models import TARGETS, TITLES
from .operations import PARAMETERS
from .peers import FLOOR, LIMIT, OURS

_COSTS = ("update", "construction", "state_dict", "swapped")
_TICKS = (1, 3, 10, 30, 100, 300)


def console():
    """Where tables are printed: on 100 columns where it is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=100)


def show(figures):
    output = console()
    for cost in _COSTS:
        output.print(_table(cost, figures["models"]))
    output.print(_operations(figures["operations"]))
    output.print(origin(figures), highlight=False)
    missing = {peer: reason for model in figures["models"].values() for peer, reason in model["missing"].items()}
    for peer, reason in missing.items():
        output.print(f"Left out: {peer} ({reason}).", highlight=False)


def _table(cost, models):
    against = {"to_limit": "× limit", "to_floor": "× floor"} if cost == "update" else {}
    columns = ("", "ms", "× ours", "quartiles", *against.values())
    table = Table(*columns, title=cost, box=SIMPLE_HEAD, title_justify="left")
    for name, model in models.items():
        table.add_row(f"[bold]{TITLES[name]}[/]")
        for peer, figure in model[cost].items():
            ours = figure["to_ours"]
            spread = f"{multiple(ours['q1'])} to {multiple(ours['q3'])}"
            multiples = [multiple(figure[key]["median"]) if key in figure else "" for key in against]
            if "to_floor" in figure and peer == OURS and name in TARGETS:
                multiples[-1] += f" (at most {TARGETS[name]})"
            cells = (f"  {peer}", f"{figure['ms']['median']:.3g}", multiple(ours["median"]), spread, *multiples)
            table.add_row(*cells, style="green" if peer == OURS else "")
    return table


def _operations(counts):
    columns = ("", *(f"{number:,} parameters" for number in PARAMETERS))
    title = "operations of an update on an accelerator"
    table = Table(*columns, title=title, box=SIMPLE_HEAD, title_justify="left")
    for kind, row in counts.items():
        table.add_row(kind, *map(str, row))
    return table


def multiple(ratio):
    """Two digits, but three about 1."""
    digits = 3 if 0.9 < ratio < 1.1 else 2
    return f"{ratio:.{digits}g}" if ratio < 99.5 else f"{ratio:.0f}"


def origin(figures):
    """Where the figures come from, in one line."""
    packages = figures["packages"]
    threads = f", {figures['threads']} threads" if figures["device"] == "cpu" else ""
    versions = f"torch {packages['torch']}, pytorch-ignite {packages['pytorch-ignite']}"
    return f"{figures['device_name']}{threads}, {versions}, {figures['date'][:10]}"


def draw(figures, path):
    """Writes a PNG of 1,800 pixels across: a panel for each model, a dot for each peer."""
    from matplotlib.figure import Figure

    models = figures["models"]
    peers = list(dict.fromkeys(peer for model in models.values() for peer in model["update"]))
    peers = [peer for peer in peers if peer not in ("event", LIMIT, FLOOR)]
    rows = -(-len(models) // 2)
    figure = Figure(figsize=(WIDTH, 0.8 + rows * (0.6 + 0.2 * len(peers))), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, min(2, len(models)), sharey=True, squeeze=False).flatten()
    for panel in panels[len(models) :]:
        panel.set_axis_off()
    most = max(figure["to_limit"]["median"] for model in models.values() for figure in model["update"].values())
    for axes, (name, model) in zip(panels, models.items(), strict=False):
        update = model["update"]
        for row, peer in enumerate(peers):
            if peer not in update:
                axes.text(1.1, row, "not available", fontsize=8, va="center", color="0.45")
                continue
            time, color = update[peer]["to_limit"]["median"], AVERAGED if peer == OURS else "0.45"
            axes.plot(time, row, "o", color=color, ms=6)
            beside = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{multiple(time)}×", (time, row), (6, 0), **beside)
        dress(axes, f"{TITLES[name]}\nlimit {update[LIMIT]['ms']['median']:.2g} ms", xscale="log", xlim=(0.8, 4 * most))
        axes.set_xticks(ticks := [t for t in _TICKS if t <= 4 * most], [f"{t}×" for t in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(peers)), peers)
        axes.set_ylim(len(peers) - 0.4, -0.6)
    headline(figure, "Time of one update, as a multiple of the limit")
    note = "The limit is one lerp_ that moves as many bytes. Logarithmic scale; medians."
    figure.supxlabel(f"{note}\n{origin(figures)}", x=0.01, ha="left", fontsize=8, color="0.35")
    figure.savefig(path, pil_kwargs={"optimize": True})
