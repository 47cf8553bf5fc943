"""The figures of the documentation are those that were measured, or that are computed."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ignite_ema import ModelAverage, posthoc
from tests.benchmarks import cost
from tests.benchmarks.fidelity import HELD, STOCHASTIC, percent
from tests.benchmarks.models import MODELS
from tests.benchmarks.operations import markdown
from tests.benchmarks.peers import OURS
from tests.benchmarks.report import multiple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def test_the_cost_is_what_its_bytes_give():
    found = re.findall(r"^\| (\d+)B parameters \|(.*)\|$", TEXT, flags=re.MULTILINE)
    assert [billions for billions, _ in found] == ["1", "8", "70"]
    for billions, row in found:
        parameters = 1e9 * int(billions)
        for devices, cell in zip((1, 8, 1024), row.split("|"), strict=True):
            gibibytes = cost.held(parameters, devices) / 2**30
            milliseconds = cost.milliseconds(parameters, devices, bandwidth=4.8e12)
            assert cell.strip() == f"{gibibytes:.3g} GiB, {milliseconds:.3g} ms"


@pytest.mark.parametrize(
    ("held_by_model", "held", "due"),
    [(torch.float32, None, 12), (torch.bfloat16, None, 6), (torch.bfloat16, torch.float32, 18)],
)
def test_an_update_moves_as_many_bytes_as_it_says(held_by_model, held, due):
    model = torch.nn.Linear(512, 512, bias=False).to(held_by_model)
    average = ModelAverage(model, dtype=held)
    with Bytes() as seen:
        average.update(0.5)
    assert seen.moved == due * model.weight.numel()
    assert f"{due} bytes per parameter" in TEXT or f"({due} where" in TEXT or f"; {due} for" in TEXT
    assert average.module.weight.nbytes == model.weight.numel() * (held or held_by_model).itemsize


class Bytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations read and write."""

    moved = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        self.moved += sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
        if operation._schema.name.endswith("_"):
            self.moved += tensors[0].nbytes  # which is written as well as read
        return result


def test_the_table_of_residuals_is_what_is_computed():
    widths = [float(cell) for cell in re.search(r"^\| `sigma_rel` \|(.+)\|$", TEXT, flags=re.MULTILINE)[1].split("|")]
    rows = re.findall(r"^\| (\d+) snapshots \|(.+)\|$", TEXT, flags=re.MULTILINE)
    assert [int(count) for count, _ in rows] == [16, 32, 64]
    for count, cells in rows:
        residuals = posthoc.residuals(posthoc.planned(range(1, int(count) + 1)), widths)
        for cell, residual in zip(cells.split("|"), residuals, strict=True):
            shown = cell.strip().removesuffix(" %")
            assert round(100 * residual, len(shown.partition(".")[2])) == float(shown)


def rows_with(name):
    """The cells of the table in which a row of this name is, without its head, by the first cell."""
    for table in re.findall(r"(?:^\|.*\|\n)+", TEXT, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
        rows = {re.split(",| \\(", first.replace("`", ""))[0]: cells for first, *cells in rows}
        if name in rows:
            return rows
    raise LookupError(name)


def figures_of(name):
    return json.loads((ROOT / "tests" / "benchmarks" / name).read_text(encoding="utf-8"))


SPEED = {
    "Ignite's handler": "ignite",
    "torch AveragedModel": "AveragedModel",
    "timm ModelEmaV3": "timm",
    "ema-pytorch": "ema-pytorch",
    "diffusers EMAModel": "diffusers",
    "torch_ema": "torch_ema",
    "Lightning's averaging": "lightning",
}


def test_the_table_of_speeds_is_what_was_measured():
    models, rows = figures_of("speed.json")["models"], rows_with("ours to the limit")
    assert list(models) == list(MODELS)
    assert rows.keys() - {"ours to the floor"} == {*SPEED, "ours", "ours to the limit"}
    for row, peer in SPEED.items():
        ratios = [model["update"].get(peer, {}).get("to_ours", {}).get("median") for model in models.values()]
        assert rows[row] == ["–" if ratio is None else multiple(ratio) for ratio in ratios]
    ours = [model["update"][OURS] for model in models.values()]
    assert rows["ours"] == [f"{figure['ms']['median']:.2g} ms" for figure in ours]
    for row, key in (("ours to the limit", "to_limit"), ("ours to the floor", "to_floor")):
        measured = [multiple(figure[key]["median"]) if key in figure else "–" for figure in ours]
        assert rows.get(row, ["–"] * len(ours)) == measured


def test_the_table_of_operations_is_what_was_counted():
    assert markdown(figures_of("speed.json")["operations"]) in TEXT


def test_the_table_of_errors_is_what_was_measured():
    held, rows = figures_of("fidelity.json")["held"], rows_with("ours with stochastic_rounding=True")
    assert list(held) == list(HELD)
    assert rows.keys() == {*SPEED, "ours", "ours with stochastic_rounding=True"}
    peers = {**SPEED, "ours": OURS, "ours with stochastic_rounding=True": STOCHASTIC}
    for row, peer in peers.items():
        walks = [figures["0.0002"]["walk"]["peers"].get(peer) for figures in held.values()]
        assert rows[row] == ["–" if walk is None else percent(walk["error_of_way"]) for walk in walks]


@pytest.mark.parametrize("case", ["constant", "walk"])
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("momentum", ["0.01", "0.0002", "1e-05"])
def test_nobody_was_more_exact_at_the_same_memory(held, momentum, case):
    """But torch_ema, by 7 %, at a momentum of .01 in float32 of bfloat16 weights: it rounds once more than lerp_."""
    peers = figures_of("fidelity.json")["held"][held][momentum][case]["peers"]
    ours = min(figures["error"] for name, figures in peers.items() if name.startswith(OURS))
    known = 1.07 if (held, momentum) == ("float32 of bfloat16 weights", "0.01") else 1.02
    assert ours <= known * min(figures["error"] for figures in peers.values())
