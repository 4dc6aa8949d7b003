"""The tables of docs/growth.md, made of docs/results/growth_stability.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from experiments.growth_stability.cells import MAIN
from experiments.growth_stability.measure import interval
from experiments.pages import span, table

Found = Mapping[str, Any]
PLAIN = tuple(cell.name for cell in MAIN)


def per_cent(values: list[float], form: str = ".1f") -> str:
    """A share with its interval, in per cent."""
    return span([100 * value for value in values], form)


def _shown(cell: str) -> bool:
    """Whether a cell is in the tables of the plain arms: all but variants of growth are."""
    return cell in PLAIN or cell.startswith("prune")


def accuracies(found: Found, place: str) -> list[str]:
    """Final, average and retrained accuracy of the plain arms."""
    rows = []
    for name, row in found[place]["cells"].items():
        if _shown(name):
            again = [("retrained", ".1f"), ("retrained_minus_final", "+.1f"), ("retrained_average", ".1f")]
            rows.append([
                name, str(row["units"]), per_cent(row["final"]), per_cent(row["average"]),
                *(per_cent(row[key], form) if key in row else "" for key, form in again),
            ])  # fmt: skip
    return table(
        ("cell", "units", "final", "trajectory average", "retrained", "retrained - final", "average of that"), rows
    )


def smooth(found: Found) -> list[str]:
    """The head with smooth-leaky units, and against the same with relu, by seed."""
    rows = []
    for name, row in found["smooth-leaky"]["cells"].items():
        plain = found.get("head", found["smooth-leaky"])["cells"][name]
        pairs = zip(row["by_seed"], plain["by_seed"], strict=True)
        gains = [[one - other for one, other in zip(*pair, strict=True)] for pair in pairs]
        final, average = (interval(list(values)) for values in zip(*gains, strict=True))
        rows.append([
            name, per_cent(row["final"]), per_cent(final, "+.1f"), per_cent(row["average"]), per_cent(average, "+.1f"),
            *_parities(row),
        ])  # fmt: skip
    head = ("cell", "final", "minus relu", "trajectory average", "minus relu", "ln gradient parity, at birth",
            "at the cycle's end")  # fmt: skip
    return table(head, rows)


def _parities(row: Found) -> list[str]:
    return [span(row[moment]) if moment in row else "" for moment in ("post", "exit")]


def parities(found: Found, place: str) -> list[str]:
    """Newborns against incumbents, of all grown cells."""
    rows = [
        [name, *(span(row[key]) for key in ("post", "exit", "post_activation", "exit_activation", "shock"))]
        for name, row in found[place]["cells"].items()
        if "post" in row
    ]
    head = ("cell", "ln gradient parity, at birth", "at the cycle's end", "ln activation parity, at birth",
            "at the cycle's end", "rise of the validation loss by an edit")  # fmt: skip
    return table(head, rows)


def differences(found: Found, place: str) -> list[str]:
    """Differences of the same seeds between plain arms, in points."""
    rows = [
        [name, per_cent(row["final"], "+.1f"), per_cent(row["average"], "+.1f")]
        for name, row in found[place]["differences"].items()
        if _shown(name.partition(" minus ")[0])
    ]
    return table(("difference", "final", "trajectory average"), rows)


def interventions(found: Found, place: str) -> list[str]:
    """Variants of growth against the plain one."""
    rows = []
    for name, row in found[place]["differences"].items():
        cell = name.partition(" minus ")[0]
        if cell.startswith("grow, ") and cell.count(",") == 2:
            own = found[place]["cells"][cell]
            rows.append([
                cell, per_cent(own["final"]), per_cent(row["final"], "+.1f"), per_cent(row["average"], "+.1f"),
                *_parities(own), span(own["shock"]),
            ])  # fmt: skip
    head = ("cell", "final", "final minus grow", "average minus grow", "ln gradient parity, at birth",
            "at the cycle's end", "rise of the validation loss by an edit")  # fmt: skip
    return table(head, rows)


def correlated(found: Found, place: str) -> list[str]:
    """Rank correlations of parity with the trajectory average."""
    rows = []
    for name, row in found[place]["correlations"].items():
        for moment, label in (("post", "at birth"), ("exit", "at the cycle's end")):
            cells = row[moment].get("cells")
            rows.append([
                name, str(row["count"]), label, span(row[moment]["runs"]), span(cells) if cells else "",
                span(row[moment]["inside"]),
            ])  # fmt: skip
    return table(("cells", "runs", "parity", "over runs", "over means of cells", "inside cells"), rows)


def rates(found: Found, place: str) -> list[str]:
    """Mean validation losses at the ends of cycles in the sweep, the lowest in bold."""
    swept = found[place]["rates"]
    head = ("treatment", *next(iter(swept.values())))
    rows = []
    for name, losses in swept.items():
        lowest = min(losses.values())
        rows.append([name, *(f"**{one:.3f}**" if one == lowest else f"{one:.3f}" for one in losses.values())])
    return table(head, rows)


TABLES: dict[str, Callable[[Found], list[str]]] = {
    "accuracies": lambda found: accuracies(found, "head"),
    "differences": lambda found: differences(found, "head"),
    "parities": lambda found: parities(found, "head"),
    "interventions": lambda found: interventions(found, "head"),
    "correlations": lambda found: correlated(found, "head"),
    "rates": lambda found: rates(found, "head"),
    "smooth-leaky": smooth,
    "perceptron": lambda found: accuracies(found, "perceptron"),
    "perceptron parities": lambda found: parities(found, "perceptron"),
    "perceptron correlations": lambda found: correlated(found, "perceptron"),
}
NEEDS = {name: name if name == "smooth-leaky" else "perceptron" if "perceptron" in name else "head" for name in TABLES}


def tables_of(found: Found) -> dict[str, list[str]]:
    """The lines of every table whose study has been made, by name."""
    return {name: make(found) for name, make in TABLES.items() if NEEDS[name] in found}
