"""`trimtab report`: an audit as a page, alone or against those of another project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.agents.audit_compare import compare_traces
from trimtab.agents.audit_page import MARK, to_page
from trimtab.agents.files import write_atomically
from trimtab.errors import OutputExistsError
from trimtab.policies.audit_chain import load_trace
from trimtab.printing import printable


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What became of a report: a few lines, and of each audit whose chain is broken what is wrong with it."""

    text: str
    broken: tuple[str, ...]


def run_report(file: Path, against: Sequence[Path], out: Path) -> Reported:
    """Draws an audit.

    Args:
        file: the audit.
        against: audits of another project to compare it with; empty for none.
        out: the page; an earlier report is replaced (where a link leads to it, the link stays), anything else is not.

    Returns:
        A few lines: the chains' verdicts, the regression check, and where the page is, which is written in any case; and
        the broken chains. A last line that was never finished breaks none.

    Raises:
        UserError: nothing can be shown: a file cannot be read, is empty, is no audit, or is of another format version.
        OutputExistsError: there is something else at ``out``.
    """
    trace, others = load_trace(file), [load_trace(other) for other in against]
    _check_out(out)
    comparison = compare_traces([trace], others) if others else None
    write_atomically(out.resolve(), to_page(trace, comparison))
    read = list(zip([file, *against], [trace, *others], strict=True))
    told = [f"{path}: {one.verdict.text()}" for path, one in read]
    broken = tuple(said for said, (_, one) in zip(told, read, strict=True) if not one.verdict.holds)
    if comparison is not None:
        told += [*comparison.notes, *comparison.text().split("\n")]
    return Reported(text="\n".join(map(printable, [*told, f"report: {out}"])), broken=broken)


def _check_out(out: Path) -> None:
    shown = f"--out {str(out)!r}"
    if out.is_dir():
        raise OutputExistsError(f"{shown} is a folder; give a file, such as report.html")
    if not out.exists():
        if out.is_symlink():
            raise OutputExistsError(f"{shown} is a link that leads to no file; give a new file")
        return
    if not out.is_file():  # reading a pipe would wait for ever
        raise OutputExistsError(f"{shown} is not a regular file; give a new file")
    with out.open("rb") as file:
        if MARK.encode() not in file.read(100):
            raise OutputExistsError(f"{shown} exists and is no earlier report; give a new file")
