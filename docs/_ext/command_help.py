"""The directive ``command-help``: what ``ignite-ema COMMAND --help`` prints, read when the page is built."""

import os
import subprocess
import sys
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive


class CommandHelp(Directive):
    """Runs the command with ``--help`` when the page is built."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "ignite_ema", *self.arguments, "--help"]
        environment = {**os.environ, "COLUMNS": "88"}
        text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout  # noqa: S603
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
