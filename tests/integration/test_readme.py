"""What README.md promises at its top, and what it points to. Its blocks run as tests of their own."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_it_has_the_two_commands():
    assert TEXT.count("\n") <= 150
    assert 'pip install -e ".[demo]" && python -m ignite_ema.demo\npip install -e ".[test]" && pytest' in TEXT


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./]+(?:#[\w-]+)?)\)", TEXT))
def test_what_it_points_to_exists(path):
    page, _, section = path.partition("#")
    assert (README.parent / page).exists()
    if section:
        headings = re.findall("^#+ (.+)$", (README.parent / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert section in {heading.lower().replace(" ", "-") for heading in headings}
