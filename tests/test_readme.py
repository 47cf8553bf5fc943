"""The README is true: every Python block runs, in order, and every test that it names exists."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()


def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = list(re.finditer(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE))
    assert len(blocks) >= 8
    namespace = {}
    for block in blocks:
        line = TEXT[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(README), "exec"), namespace)


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./]+)\)|`(tests/[\w/]+\.py)`", TEXT))
def test_what_it_points_to_exists(path):
    assert (README.parent / "".join(path)).exists()


def test_it_has_the_two_commands():
    assert 'pip install -e ".[demo]" && python -m ignite_ema.demo\npip install -e ".[test]" && pytest' in TEXT
