"""The chain of an audit: every line carries a hash over the line before it and itself, so that a change is found."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.policies.audit_format import fits
from trimtab.regular_files import read_regular

FORMAT = 1  # of an audit, in its header
MOST_BYTES = 1 << 30  # of an audit that is read, about a million decisions
_SEAL = ', "sha256": "'
_SEAL_BYTES = len(_SEAL) + 64 + len('"}')


def seal(previous: str, content: Mapping[str, Any]) -> tuple[bytes, str]:
    """One line of an audit with its hash, the last member.

    The hash is the SHA-256 of the line before's hash (64 hexadecimal digits, nothing for the first line) followed by
    this line as it would be without its hash.

    Args:
        previous: hash of the line before; empty for the first line.
        content: what the line says, in order; NaN and infinity are not allowed.

    Returns:
        The line with its line feed, in ASCII, and its hash.

    >>> line, digest = seal("", {"kind": "lost", "lines": 2})
    >>> line == b'{"kind": "lost", "lines": 2, "sha256": "' + digest.encode() + b'"}\\n'
    True
    """
    body = json.dumps(content, allow_nan=False)
    digest = hashlib.sha256(f"{previous}{body}".encode()).hexdigest()
    return f'{body[:-1]}{_SEAL}{digest}"}}\n'.encode(), digest


def _digest(line: bytes, previous: str) -> str | None:
    """The hash of a line without its line feed, or None where it is not the one that the line carries."""
    body = line[:-_SEAL_BYTES] + b"}"
    digest = hashlib.sha256(previous.encode() + body).hexdigest()
    return digest if line.endswith(f'{_SEAL}{digest}"}}'.encode()) else None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the chain of an audit says.

    Attributes:
        lines: whole lines.
        broken_at: the first line, counted from 1, that is not what was written there; None where the chain holds.
        torn: bytes of a last line that was never finished; 0 for none.
        closed: whether the last line says that the controller was detached, so that no line can be missing at the end.
        last: hash of the last line; empty where the chain breaks.
    """

    lines: int
    broken_at: int | None
    torn: int
    closed: bool
    last: str

    @property
    def holds(self) -> bool:
        """Whether every whole line is the one that was written."""
        return self.broken_at is None

    def text(self) -> str:
        """The verdict in words."""
        lines = f"{self.lines} line{'s' if self.lines != 1 else ''}"
        if self.broken_at is not None:
            told = (
                f"the chain breaks at line {self.broken_at} of {self.lines}: that line was changed, or a line before "
                "it was removed or put there"
            )
        elif self.closed:
            told = f"the chain holds over all {lines}, from the header to the detached controller"
        else:
            told = (
                f"the chain holds over all {lines}; the last one is not 'detached', so the run goes on or was cut off"
            )
        return told + (f"; a torn last line of {self.torn} bytes is left out" if self.torn else "")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """An audit as it was read.

    Attributes:
        name: the file's name, without its folder.
        entries: every line that can be read, by its number; the first is the header.
        verdict: on the chain.
    """

    name: str
    entries: tuple[tuple[int, dict[str, Any]], ...]
    verdict: Verdict

    @property
    def header(self) -> dict[str, Any]:
        """The first line."""
        return self.entries[0][1]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines after the header that are of a known kind and have its fields."""
        return [entry for _, entry in self.entries[1:] if fits(entry)]

    @property
    def trusted(self) -> list[dict[str, Any]]:
        """Those of them that come before the chain breaks."""
        broken = self.verdict.broken_at
        return [entry for number, entry in self.entries[1:] if (broken is None or number < broken) and fits(entry)]

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that the run was in, in order: that of the header, and each that it went on in."""
        return (str(self.header.get("mode")), *(line["mode"] for line in self.lines if line["kind"] == "mode"))

    @property
    def acted(self) -> list[dict[str, Any]]:
        """The trusted lines, without the decisions and outcomes of mode ``advise``, in which nothing was changed."""
        found, mode = [], self.modes[0]
        for line in self.trusted:
            mode = line["mode"] if line["kind"] == "mode" else mode
            if mode == "act" or line["kind"] not in ("decision", "outcome", "validation"):
                found.append(line)
        return found


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Reads an audit and follows its chain; lines that cannot be read are left out, and said by the verdict.

    Raises:
        UserError: the file cannot be read, is empty, is no audit, or is one of another format version.
    """
    return trace_of(path, read_content(path))


def trace_of(path: str | os.PathLike[str], content: bytes) -> Trace:
    """The same as ``load_trace``, of an audit whose content has been read."""
    whole, torn = _split(content)
    header = _checked_header(path, whole)
    previous, broken_at = "", None
    entries: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(whole, 1):
        entry = header if number == 1 else _parsed(line)
        if broken_at is None:
            digest = None if entry is None else _digest(line, previous)
            broken_at, previous = (number, "") if digest is None else (None, digest)
        if entry is not None:
            entries.append((number, entry))
    closed = entries[-1][1].get("kind") == "detached" and not torn
    verdict = Verdict(lines=len(whole), broken_at=broken_at, torn=torn, closed=closed, last=previous)
    return Trace(name=Path(path).name, entries=tuple(entries), verdict=verdict)


def read_content(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an audit; ``UserError`` where it cannot be read, is larger than 1 GiB, or empty."""
    shown = repr(os.fspath(path))
    try:
        content = read_regular(path, MOST_BYTES)
    except OSError as error:
        raise UserError(
            f"audit {shown} cannot be read: {error.strerror}; give the file that attach(audit=...) wrote"
        ) from error
    if not content:
        raise UserError(f"audit {shown} is empty; give the file that attach(audit=...) wrote")
    return content


def _split(content: bytes) -> tuple[list[bytes], int]:
    """Whole lines, and the length of a torn one at the end; a last line that lacks only its line feed is whole."""
    *whole, rest = content.split(b"\n")
    if rest and rest.endswith(b'"}') and _SEAL.encode() in rest and _parsed(rest) is not None:
        return [*whole, rest], 0
    return whole, len(rest)


def _checked_header(path: str | os.PathLike[str], whole: list[bytes]) -> dict[str, Any]:
    shown = repr(os.fspath(path))
    header = _parsed(whole[0]) if whole else None
    if header is None or header.get("kind") != "header":
        raise UserError(
            f"{shown} is not an audit: it does not begin with a whole header line; give the file that "
            "attach(audit=...) wrote"
        )
    if header.get("format") != FORMAT:
        raise UserError(
            f"audit {shown} is of format {header.get('format')!r}, and this version of trimtab reads format {FORMAT}; "
            f"read it with the version that wrote it ({header.get('trimtab', 'unknown')})"
        )
    return header


def verify_audit(path: str | os.PathLike[str]) -> Verdict:
    """Follows the chain of an audit from the header on.

    A chain that holds shows that no line was changed, added, removed or moved since it was written, but for whole
    lines cut off at the end. It is no signature: who can write the file can write a new chain. Keep the last hash
    elsewhere to rule both out.

    Args:
        path: the audit.

    Returns:
        The verdict; ``broken_at`` is the first line that is not the one that was written.

    Raises:
        UserError: the file cannot be read, is empty, is no audit, or is one of another format version.
    """
    return load_trace(path).verdict


def read_audit(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the lines of an audit; a torn last line (the process was killed while it wrote) is left out.

    Whether the lines are those that were written is what ``verify_audit`` says.

    Raises:
        UserError: as ``verify_audit``, and where a line before the last is not JSON.
    """
    trace = load_trace(path)
    missing = set(range(1, trace.verdict.lines + 1)) - {number for number, _ in trace.entries}
    if missing:
        raise UserError(f"audit {os.fspath(path)!r}: line {min(missing)} is damaged; it is not a JSON object")
    return [entry for _, entry in trace.entries]
