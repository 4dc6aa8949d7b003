"""The audit trail of a live run: JSON lines, one for each decision and one for each measured outcome of a change."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import OutputExistsError, UserError


def rounded(value: float) -> float | str:
    """Six significant digits; what JSON cannot hold becomes ``"nan"``, ``"inf"`` or ``"-inf"``.

    >>> rounded(0.123456789), rounded(float("inf"))
    (0.123457, 'inf')
    """
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else str(number)


def rounded_all(values: Mapping[str, float]) -> dict[str, float | str]:
    """``rounded`` for every value of a mapping."""
    return {name: rounded(value) for name, value in values.items()}


class Audit:
    """Writes an audit file; each line is complete on the disk before training goes on.

    Lines are objects whose ``kind`` is ``header`` (once, first), ``decision``, ``outcome``, ``resumed`` or ``detached``.

    Args:
        path: a file that does not exist yet, in a folder that does.
        header: what to write first.

    Raises:
        OutputExistsError: the file exists; nothing is overwritten.
        UserError: the file cannot be made.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        try:
            self.path.open("x", encoding="utf-8").close()
        except FileExistsError as error:
            raise OutputExistsError(
                f"audit file {str(self.path)!r} exists already and is not overwritten; give another path"
            ) from error
        except OSError as error:
            raise UserError(f"audit file {str(self.path)!r} cannot be written: {error.strerror}") from error
        self.write("header", **header)

    def write(self, kind: str, **fields: Any) -> None:
        """Appends one line."""
        line = json.dumps({"kind": kind, **fields}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_audit(path: str | Path) -> list[dict[str, Any]]:
    """Reads an audit file; a torn last line (the process was killed while it wrote) is left out.

    Raises:
        UserError: there is no such file, or a line before the last is not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"audit file {str(path)!r} cannot be read: {error.strerror}") from error
    entries: list[dict[str, Any]] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line) if line else None
        except json.JSONDecodeError as error:
            if number == len(lines):  # a whole line ends in a newline, so only a torn one comes last
                break
            raise UserError(f"audit file {str(path)!r}: line {number} is damaged ({error.msg})") from error
        if isinstance(entry, dict):
            entries.append(entry)
    return entries
