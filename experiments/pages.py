"""Tables of a page, made anew from the figures of a study: what the studies with a page have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import UserError

END = "<!-- end -->"


def span(values: Sequence[float], form: str = "+.2f") -> str:
    """An estimate with its interval.

    >>> span([0.5, 0.25, 0.75], ".2f")
    '0.50 [0.25, 0.75]'
    """
    middle, low, high = values
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown.

    >>> table(["a", "b"], [["1", "2"]])
    ['| a | b |', '| --- | --- |', '| 1 | 2 |']
    """
    lines = [list(head), ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def filled(text: str, tables: Mapping[str, Sequence[str]]) -> str:
    """The page with each table that it has between ``<!-- table: NAME -->`` and ``<!-- end -->`` made anew.

    Raises:
        UserError: a table has no end.
    """
    for name, lines in tables.items():
        start = f"<!-- table: {name} -->"
        if start not in text:
            continue
        before, _, rest = text.partition(start)
        _, end, after = rest.partition(END)
        if not end or "<!-- table: " in rest[: rest.index(END)]:
            raise UserError(f"table {name!r} of the page has no end; put {END} behind it")
        text = before + start + "\n\n" + "\n".join(lines) + f"\n\n{END}" + after
    return text


def publish(
    content: Mapping[str, Any], tables: Mapping[str, Sequence[str]], out: Path | None, page: Path | None
) -> None:
    """Prints tables, and writes the figures as JSON to ``out`` and the tables into ``page``, where these are given."""
    for name, lines in tables.items():
        print(f"\n{name}", *lines, sep="\n")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n")
    if page:
        page.write_text(filled(page.read_text(), tables))
