"""The file of all figures: what has to be in it, how it is read and written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from ignite_ema.checkpoints.saving import whole_file

from .peers import LIMIT, OURS

__all__ = ["check", "read", "write"]

Schema = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` has written.

    Raises:
        ValueError: where it is anything else; the text says what, and where in the file.
    """
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        check(figures)
    except (OSError, OverflowError, RecursionError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"should name a file that --json has written, got {path} ({reason})") from error
    return figures


def write(path: Path, figures: Mapping[str, Any], *, force: bool) -> None:
    """Writes beside ``path`` and moves it there, so that ``path`` is never half a file."""
    with whole_file(path, force=force) as partial:
        partial.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check(figures: object) -> None:
    """Raises ValueError where a table or the picture would miss something."""
    error = best_match(Draft202012Validator(_FIGURES).iter_errors(figures))
    if error is not None:
        place = ".".join(map(str, error.absolute_path))
        raise ValueError(f"{place and f'{place}: '}{error.message:.100}")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _record(**values: Schema) -> Schema:
    return {"type": "object", "properties": values, "required": list(values)}


def _each(value: Schema, *names: str) -> Schema:
    """Any names, with values of one kind; these ``names`` have to be there."""
    return {"type": "object", "additionalProperties": value, "required": list(names)}


def _quartiles(number: Schema) -> Schema:
    return _record(q1=number, median=number, q3=number)


_TEXT, _NUMBER, _POSITIVE = {"type": "string"}, {"type": "number"}, {"type": "number", "exclusiveMinimum": 0}
_TIMES = _quartiles(_POSITIVE)
_OTHER = _each(_record(ms=_TIMES, to_ours=_TIMES, peak=_NUMBER, left=_NUMBER), OURS)
_MODEL = _record(
    parameters=_POSITIVE,
    parameter_tensors=_POSITIVE,
    buffer_tensors=_NUMBER,
    missing=_each(_TEXT),
    update=_each(_record(ms=_TIMES, to_ours=_TIMES, to_limit=_TIMES), OURS, LIMIT),
    state_dict=_OTHER,
    swapped=_OTHER,
    construction=_OTHER,
)
_TRAINING = _record(
    parameters=_POSITIVE,
    iterations=_POSITIVE,
    threads=_POSITIVE,
    missing=_each(_TEXT),
    bare=_TIMES,
    peers=_each(_record(ms=_TIMES, percent=_quartiles(_NUMBER)), OURS),
)
_FIGURES = _record(
    date=_TEXT,
    device=_TEXT,
    device_name=_TEXT,
    threads=_POSITIVE,
    packages=_each(_TEXT, "torch", "pytorch-ignite", "ignite-ema"),
    rounds=_each(_POSITIVE, "update", "state_dict", "swapped", "construction", "training"),
    models={**_each(_MODEL), "minProperties": 1},
    training=_each(_TRAINING),
)
