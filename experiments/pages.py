"""Tables of a page, made anew from the figures of a study: what the studies with a page have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
