"""The package as it is installed: its names, what it imports, what it needs."""

import importlib
import subprocess
import sys
from importlib.metadata import requires

import pytest

DOCUMENTED = ["ignite_ema", *(f"ignite_ema.{name}" for name in ("schedules", "posthoc", "checkpoints", "distributed"))]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_all_is_the_public_namespace(name):
    module = importlib.import_module(name)
    named = set(module.__all__)
    assert all(hasattr(module, key) for key in named)
    own = {key for key, value in vars(module).items() if str(getattr(value, "__module__", "")).startswith(name)}
    assert {key for key in own if not key.startswith("_")} <= named


def test_runtime_requirements_are_torch_and_ignite():
    needed = [line for line in requires("ignite-ema") if "extra ==" not in line]
    assert sorted(line.partition(">")[0] for line in needed) == ["pytorch-ignite", "torch"]


def test_import_needs_no_extra():
    extras = ["matplotlib", "sklearn", "rich", "tqdm", "safetensors", "hypothesis", "pytest"]
    code = f"import sys; sys.modules.update(dict.fromkeys({extras})); import ignite_ema; ignite_ema.EMAHandler"
    subprocess.run([sys.executable, "-c", code], check=True)
