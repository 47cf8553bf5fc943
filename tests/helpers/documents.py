"""A plugin: the Python blocks of README.md and of the documentation run as tests, each page in a directory of its own.

The blocks of a page build on each other: ``--dist loadfile`` lets one process run them all, in their order.
"""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


def _enter(namespace):
    namespace["_left"], namespace["_folder"] = Path.cwd(), tempfile.TemporaryDirectory()
    os.chdir(namespace["_folder"].name)
    namespace["missing"] = lambda package: find_spec(package) is None  # for blocks that need an extra: "skip: next if"


def _leave(namespace):
    os.chdir(namespace["_left"])
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    path=str(Path(__file__).parents[2]),
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=_enter,
    teardown=_leave,
).pytest()
