"""The command line of the benchmark, checked before anything is measured."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

import torch

from .figures import read
from .models import MODELS
from .peers import LIMIT, OURS
from .training_steps import TRAININGS

__all__ = ["Options", "check_target", "parsed"]

_ROUNDS = 100


@dataclass(frozen=True)
class Options:
    """What to measure, or the figures that were measured before, and where they go."""

    models: Sequence[str]
    training: Sequence[str]
    rounds: int
    device: str
    json: Path | None
    picture: Path | None
    force: bool
    figures: dict[str, Any] | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        way_out = "" if message.endswith(".") else "; see --help."
        self.exit(2, f"{self.prog}: {message}{way_out}\n")


def parsed(arguments: Sequence[str] | None) -> Options:
    """Ends the program with one sentence where the arguments are not as they should be."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        _check_targets(given)
        _check_names(given)
        if given.from_json is None:
            _check_device(given.device)
            _check_packages(given)
        figures = None if given.from_json is None else _read(given)
    except ValueError as problem:
        parser.error(str(problem))
    return Options(
        models=list(MODELS) if given.models is None else given.models,
        training=list(TRAININGS) if given.training is None else given.training,
        rounds=given.rounds or _ROUNDS,
        device=given.device or "cpu",
        json=given.json,
        picture=given.picture,
        force=given.force,
        figures=figures,
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m tests.benchmarks",
        description=f"Times averages: '{OURS}', those of other libraries, and '{LIMIT}', one lerp_ over as many "
        "contiguous bytes. All take turns: each update through an event of an Ignite engine, in batches of about "
        "10 ms; construction, state_dict and swap, with the memory that they take; and real training steps.",
    )
    models, training = ", ".join(MODELS), ", ".join(TRAININGS)
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {models} (default: all)")
    parser.add_argument(
        "--training",
        nargs="*",
        choices=TRAININGS,
        metavar="RUN",
        help=f"of {training}; with no RUN none (default: all)",
    )
    parser.add_argument(
        "--rounds", type=_number, metavar="N", help=f"of each, a fifth of swaps and constructions (default: {_ROUNDS})"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where the models are (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the updates into FILE, a PNG")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="measure nothing: show, and draw, what --json wrote"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the files of --json and --picture")
    return parser


def _number(given: str) -> int:
    if given.isascii() and given.isdigit() and int(given) >= 2:
        return int(given)
    raise argparse.ArgumentTypeError(
        f"should be a whole number from 2, since one round has no spread, got {given!r}; leave it out for {_ROUNDS}."
    )


def _check_targets(given: argparse.Namespace) -> None:
    targets = {f"--{name}": path for name in ("json", "picture") if (path := getattr(given, name)) is not None}
    if given.force and not targets:
        raise ValueError("--force should come with --json FILE or --picture FILE, got neither; leave it out.")
    for option, path in targets.items():
        check_target(option, path, given.force)
    if given.picture is None:
        return
    if given.picture.suffix != ".png":
        raise ValueError(f"--picture should name a file that ends in .png, got {given.picture}; choose another name.")
    if find_spec("matplotlib") is None:
        raise ValueError('--picture should find matplotlib, got none; pip install -e ".[bench]" brings it.')


def check_target(option: str, path: Path, force: bool) -> None:
    """Raises ValueError where ``path`` cannot be written, or may not be."""
    if path.is_dir():
        raise ValueError(f"{option} should name a file, got {path}, a directory; name a file in it.")
    if path.exists() and not force:
        raise ValueError(f"{option} should name a new file, but {path} exists; pass --force to overwrite it.")
    if not path.parent.is_dir():
        raise ValueError(f"{option} should name a file in a directory that exists, got {path}; make the directory.")
    try:
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"{option} should name a file that can be written, got {path} ({error.strerror}); choose another directory."
        ) from error


def _check_names(given: argparse.Namespace) -> None:
    for option in ("models", "training"):
        names = getattr(given, option) or []
        if len(set(names)) < len(names):
            raise ValueError(f"--{option} should name each once, got {' '.join(names)}; leave out what comes twice.")


def _check_device(device: str | None) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device should be one that torch finds here, got cuda, and it finds none; leave it out.")


def _check_packages(given: argparse.Namespace) -> None:
    if (given.training is None or "digits" in given.training) and find_spec("sklearn") is None:
        raise ValueError('--training digits should find scikit-learn, got none; pip install -e ".[demo]" brings it.')


def _read(given: argparse.Namespace) -> dict[str, Any]:
    measuring = ("models", "training", "rounds", "device", "json")
    if names := [f"--{name}" for name in measuring if getattr(given, name) is not None]:
        raise ValueError(f"--from-json should measure nothing, got {', '.join(names)} as well; leave it out.")
    try:
        return read(given.from_json)
    except ValueError as error:
        raise ValueError(f"--from-json {error}; measure again with --json.") from error
