"""The package as it is installed: its names, what it imports, what it needs."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

import ignite_ema

MODULES = sorted(f"ignite_ema.{info.name}" for info in pkgutil.iter_modules(ignite_ema.__path__))
USES_IGNITE = {
    f"ignite_ema.{name}"
    for name in ("attachment", "demo", "distributed", "evaluation", "handler", "snapshots", "streams")
}
# which modules of ours each one may import
IMPORTS = {
    "schedules": set(),
    "staging": set(),
    "kernels": {"staging"},
    "rounding": {"kernels", "staging"},
    "ranks": set(),
    "sharding": set(),
    "steps": set(),
    "structure": {"sharding"},
    "pairing": {"kernels", "sharding", "structure"},
    "twin": {"sharding", "structure"},
    "buffers": {"pairing"},
    "loading": {"sharding"},
    "momentum": {"schedules"},
    "swap": {"kernels", "sharding", "structure"},
    "files": set(),
    "layouts": set(),
    "finding": {"layouts"},
    "checkpoints": {"files", "finding", "layouts"},
    "profiles": {"schedules"},
    "fitting": {"profiles"},
    "snapshot_files": {"files", "profiles"},
    "posthoc": {"fitting", "profiles", "schedules", "snapshot_files"},
    "streams": {"buffers", "files", "handler", "ranks", "schedules", "sharding"},
    "snapshots": {
        *("attachment", "buffers", "kernels", "loading", "ranks", "schedules", "sharding"),
        *("snapshot_files", "state", "streams"),
    },
    "cli_checkpoints": {"checkpoints", "files"},
    "cli_posthoc": {"checkpoints", "cli_checkpoints", "files", "posthoc", "snapshot_files"},
    "cli": {"cli_checkpoints", "cli_posthoc"},
    "__main__": {"cli"},
    "average": {
        *("buffers", "kernels", "loading", "momentum", "pairing", "rounding", "sharding", "state", "structure"),
        *("swap", "twin"),
    },
}


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_all_is_the_public_namespace(name):
    module = importlib.import_module(name)
    assert all(hasattr(module, key) for key in module.__all__)
    own = {key for key, value in vars(module).items() if getattr(value, "__module__", None) == name}
    assert {key for key in own if not key.startswith("_")} <= set(module.__all__)


def test_top_level_names():
    public = {key for key in vars(ignite_ema) if not key.startswith("_")}
    modules = {name.rpartition(".")[2] for name in MODULES}
    assert set(ignite_ema.__all__) == {key for key in public if key not in modules} | {
        "checkpoints",
        "posthoc",
        "schedules",
    }


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    short = name.rpartition(".")[2]
    tree = ast.parse((Path(ignite_ema.__file__).parent / f"{short}.py").read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {node.module or alias.name for node in froms if node.level for alias in node.names}
    assert short not in IMPORTS or ours <= IMPORTS[short]
    uses_ignite = any((node.module or "").partition(".")[0] == "ignite" for node in froms if not node.level)
    assert uses_ignite <= (name in USES_IGNITE)


def test_runtime_requirements_are_torch_and_ignite():
    needed = [line for line in requires("ignite-ema") if "extra ==" not in line]
    assert sorted(line.partition(">")[0] for line in needed) == ["pytorch-ignite", "torch"]


def test_import_needs_no_extra():
    extras = ["matplotlib", "sklearn", "rich", "tqdm", "safetensors", "hypothesis", "pytest"]
    code = f"import sys; sys.modules.update(dict.fromkeys({extras})); import ignite_ema; ignite_ema.EMAHandler"
    subprocess.run([sys.executable, "-c", code], check=True)
