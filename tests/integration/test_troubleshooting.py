"""The headings of docs/troubleshooting.md are messages of the package, with … for what varies."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


@cache
def messages():
    """Every string of the package; values that are formatted into it are left out."""
    found = set()
    for path in sorted((ROOT / "ignite_ema").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            constants = [part.value for part in parts if isinstance(part, ast.Constant)]
            found.add("…".join(text for text in constants if isinstance(text, str)))
    return found


@pytest.mark.parametrize("heading", re.findall("^### (.+)$", PAGE, flags=re.MULTILINE))
def test_a_heading_is_what_is_printed(heading):
    words = ".*".join(re.escape(part.strip(" ,")) for part in heading.split("…"))
    words = words.removeprefix(r"engine\.state\.").replace(r"be\ a\ momentum", r".*a\ momentum")  # put together
    words = words.replace(r"the\ EMA\ handler\ of.*", ".*")
    assert any(re.search(words, message) for message in messages()), heading


def test_the_eight_most_common_come_first():
    first = PAGE.split("\n## ")[1]
    assert first.startswith("The eight most common")
    assert first.count("\n### ") == 8
