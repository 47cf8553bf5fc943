"""What a page shows as printed is what its block prints."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "guides" / "when.md", *sorted((DOCS / "recipes").glob("*.md"))]
BLOCKS = re.compile(r"^```(python|text)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def printed():
    """The blocks that print, whatever the order of code and output on the page, each with what it should print."""
    for page in PAGES:
        blocks = BLOCKS.findall(page.read_text(encoding="utf-8"))
        shown = [text for kind, text in blocks if kind == "text"]
        printing = [code for kind, code in blocks if kind == "python" and "print(" in code]
        for code, text in zip(printing, shown, strict=True):
            yield pytest.param(code, text, id=page.stem)


@pytest.mark.slow
@pytest.mark.parametrize(("code", "shown"), list(printed()))
def test_a_page_shows_what_is_printed(code, shown, capsys):
    exec(compile(code, "page", "exec"), {"__name__": "page"})
    output = capsys.readouterr().out
    assert NUMBER.sub("#", output).split() == NUMBER.sub("#", shown).split()
    # Between machines training differs a little.
    assert [float(one) for one in NUMBER.findall(output)] == pytest.approx(
        [float(one) for one in NUMBER.findall(shown)], rel=0.1
    )
