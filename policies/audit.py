"""Writing the audit of a live run: hash-chained JSON lines, of every decision and of what came of each change."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trimtab.errors import OutputExistsError, UserError, check_whole
from trimtab.policies.audit_chain import FORMAT, read_audit, read_content, seal, trace_of, verify_audit
from trimtab.policies.strict_json import has_half_characters

__all__ = ["Audit", "AuditFile", "read_audit", "rounded", "rounded_all", "verify_audit"]

# A resumed run has these in common with the header of the audit that it goes on with.
IDENTITY = ("policy", "policy_sha256", "levers", "optimizer", "parameters", "decide_every")
LONGEST_LABEL = 200
MOST_EXAMPLES = 10**15


@dataclass(frozen=True)
class AuditFile:
    """Where an audit is written, and what only the user knows of the run; ``attach(audit=...)`` takes it as a path.

    Attributes:
        path: a new file, or the audit of the run that is resumed.
        data: name of the data, by which audits are compared, at most 200 characters; None for not said.
        examples: training examples, from 1 to 10^15; None for not said.
        project: name of the project, at most 200 characters; None for not said.

    >>> AuditFile("run.jsonl", data="digits", examples=1797).data
    'digits'
    """

    path: str | os.PathLike[str]
    data: str | None = None
    examples: int | None = None
    project: str | None = None

    def __post_init__(self) -> None:
        """Refuses what is no path, and labels that cannot be compared (``UserError``)."""
        _check_path(self.path)
        for name in ("data", "project"):
            label = getattr(self, name)
            if label is not None and not (isinstance(label, str) and 0 < len(label) <= LONGEST_LABEL):
                raise UserError(
                    f"{name} of an audit is {label!r}; it must be a text of 1 to {LONGEST_LABEL} characters, or None"
                )
            if label is not None and has_half_characters(label):
                raise UserError(f"{name} of an audit is {label!r}, which holds half a character; give whole ones")
        if self.examples is not None:
            check_whole("examples of an audit", self.examples, 1, "training examples, or None", MOST_EXAMPLES)

    def __fspath__(self) -> str:
        """The path."""
        return os.fspath(self.path)

    @property
    def labels(self) -> dict[str, Any]:
        """What the header says of it."""
        return {"project": self.project, "data": self.data, "examples": self.examples}


def _check_path(path: object) -> None:
    named = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(named, str) or "\0" in named:
        raise UserError(
            f"the path of an audit is {path!r}; it must be a text without null characters, or a pathlib.Path"
        )


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


def now() -> str:
    """The time in UTC, to the second.

    >>> len(now())
    20
    """
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Audit:
    """Writes an audit; each line has been handed to the operating system before training goes on.

    The file is opened for each append alone, and never made twice: a file that was removed or written to by someone
    else while the run went on is left alone, and every further append raises. Only bytes of a line that was never
    finished are cut off, and only while they are the very bytes that were found there, or failed to be written.

    Args:
        path: a file that does not exist yet, in a folder that does; or the audit of this very run, which goes on. It
            stays where it is when the process changes its working folder.
        header: what the first line says; a resumed run must agree with it in ``IDENTITY``.

    Raises:
        OutputExistsError: the file exists, and is not an audit of this run whose chain holds; nothing is overwritten.
        UserError: the file cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._last, self._end, self._lost = "", 0, 0
        self._torn = b""  # of a line that was never finished: what may lie behind the end
        self._feed = b""  # what the last line lacks
        self._resuming: dict[str, Any] | None = None
        self._turned: dict[str, Any] | None = None  # what a line says of a run that goes on in another mode
        self._held: list[Mapping[str, Any]] = []
        self._made = False
        header = {"kind": "header", "format": FORMAT, **header}
        first = {**header, "time": now()}
        try:
            self.path = self.path.absolute()
            self.path.open("xb").close()
        except FileExistsError:
            self._go_on(header)
        except (OSError, ValueError) as error:  # such as a character that the file system does not know
            raise self._unwritable(error) from error
        else:
            try:  # Ctrl-C may come before the first call
                self._made = True
                self.append([first])
            except BaseException as error:
                self.path.unlink(missing_ok=True)
                if not isinstance(error, OSError):
                    raise
                raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> UserError:
        why = getattr(error, "strerror", None) or error
        return UserError(f"audit file {str(self.path)!r} cannot be written: {why}")

    def _go_on(self, header: Mapping[str, Any]) -> None:
        refused = f"audit file {str(self.path)!r} exists and is not overwritten; give another path"
        try:
            content = read_content(self.path)
            trace = trace_of(self.path, content)
        except UserError as error:
            raise OutputExistsError(f"{refused} ({error})") from error
        for key in IDENTITY:
            if trace.header.get(key) != header.get(key):
                differs = f"its {key} is {trace.header.get(key)!r}, and not {header.get(key)!r}"
                raise OutputExistsError(f"{refused} (it is the audit of another run: {differs})")
        if not trace.verdict.holds:
            raise OutputExistsError(f"{refused} ({trace.verdict.text()})")
        self._last, self._end = trace.verdict.last, len(content) - trace.verdict.torn
        self._torn = content[self._end :]
        self._feed = b"" if self._torn or content.endswith(b"\n") else b"\n"
        before, mode = trace.modes[-1], str(header.get("mode"))
        if before != mode:
            self._turned = {"before": before, "mode": mode}
        self._resuming = {
            "torn": trace.verdict.torn,
            "differs": {key: value for key, value in header.items() if trace.header.get(key) != value},
        }

    def withdraw(self) -> None:
        """Takes the file away, if it was made for this audit and nobody else has written to it."""
        if self._made:
            with contextlib.suppress(OSError):  # somebody else has seen to it
                if self.path.stat().st_size == self._end:
                    self.path.unlink()

    def write(self, kind: str, **fields: Any) -> None:
        """Appends one line."""
        self.append([{"kind": kind, **fields}])

    def append(self, contents: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines, all of them in one write.

        A file that goes on is first said to: with the line ``resumed`` where the run's state was loaded, and the line
        ``mode`` where it goes on in another mode. Until then the
        first decision of the new controller is held back, since loading a state makes it void.

        Args:
            contents: each with its ``kind``.

        Raises:
            OSError: they cannot be written; how many were lost is said by a line of its own when writing works again.
            UserError: somebody else has written to the file.
        """
        if self._resuming is not None:
            resumed = contents[0]["kind"] == "resumed"
            if not resumed and not self._held and contents[0]["kind"] == "decision":
                self._held = list(contents)
                return
            first = contents[0] if resumed else {"kind": "resumed", "step": 0, "time": now()}
            told: list[Mapping[str, Any]] = [{**first, **self._resuming}]
            if self._turned is not None:
                told.append({"kind": "mode", "step": first["step"], "time": first["time"], **self._turned})
            contents = [*told, *contents[1:]] if resumed else [*told, *self._held, *contents]
            self._resuming, self._held = None, []
        pending = [{"kind": "lost", "lines": self._lost}, *contents] if self._lost else contents
        last, lines = self._last, []
        for content in pending:
            line, last = seal(last, content)
            lines.append(line)
        try:
            self._put(self._feed + b"".join(lines))
        except BaseException:
            self._lost += len(contents)
            raise
        self._last, self._lost, self._feed = last, 0, b""

    def _put(self, content: bytes) -> None:
        """Writes at the end of what is known to be there, or leaves the file as it was."""
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
        try:
            self._cut(file)
            done = 0
            try:
                while done < len(content):
                    done += os.write(file, content[done:])
            except BaseException:
                self._torn = content  # some of it, from its beginning
                raise
            self._end += done
        finally:
            os.close(file)

    def _cut(self, file: int) -> None:
        """Cuts off what a full disk or a crash left of a line, if nothing else lies there."""
        behind = os.fstat(file).st_size - self._end
        if 0 < behind <= len(self._torn):
            os.lseek(file, self._end, os.SEEK_SET)
            if os.read(file, behind) == self._torn[:behind]:
                os.ftruncate(file, self._end)
                behind = 0
        if behind:
            raise UserError(f"audit file {str(self.path)!r} was changed by someone else, and is left alone")
        self._torn = b""
