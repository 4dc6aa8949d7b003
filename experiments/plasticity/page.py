"""The tables of docs/plasticity.md, made of docs/results/plasticity.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from experiments import pages
from experiments.pages import table
from experiments.plasticity.arms import ARMS, EDITS, RESTS
from experiments.plasticity.tasks import TASKS

Found = Mapping[str, Any]
PLAIN = ("none", "none-sgd", "fresh")


def span(values: list[float], form: str = ".3f") -> str:
    """An estimate with its interval."""
    return pages.span(values, form)


def setting(name: str, rate: float, knob: float) -> str:
    """The tuned setting of an arm; a star at a value that is the first or the last of those that were tried."""
    arm = ARMS[name]
    parts = [f"{rate:g}{_star(rate, arm.rates)}"]
    if arm.values:
        parts.append(f"{arm.knob} {knob:g}{_star(knob, arm.values)}")
    return ", ".join(parts)


def _star(value: float, tried: tuple[float, ...]) -> str:
    return "*" if len(tried) > 2 and value in (min(tried), max(tried)) else ""


def arms(task: str, found: Found) -> list[str]:
    """Every arm at its tuned setting, the best first."""
    rows = found["tasks"][task]
    head = ("arm", "rate, knob", "online accuracy", "minus none", "minus random-reset", "early", "late", "late - early",
            "final", "dormant", "rank")  # fmt: skip
    lines = []
    for name in sorted(rows, key=lambda name: -rows[name]["online"][0]):
        row = rows[name]
        lines.append([
            f"`{name}`", setting(name, row["rate"], row["knob"]), span(row["online"]),
            *("" if name == against else span(row[f"minus_{key}"], "+.3f") for key, against in (("none", "none"), ("random", "random-reset"))),
            f"{row['early'][0]:.2f}", f"{row['late'][0]:.2f}", span(row["change"], "+.2f"),
            f"{row['final'][0]:.2f}", f"{row['dormant'][0]:.2f}", f"{row['rank'][0]:.1f}",
        ])  # fmt: skip
    return table(head, lines)


def check(found: Found) -> list[str]:
    """Early and late online accuracy of plain training at every rate that was tried, on the tuning seeds."""
    lines = []
    for task in TASKS:
        for name in PLAIN:
            tried = found["tuning"][task][name]
            cells = (f"{one['rate']:g}: {one['early']:.2f} / {one['late']:.2f}" for one in tried)
            lines.append([task, f"`{name}`", *cells])
    return table(("task", "arm", *(f"rate {place + 1}" for place in range(6))), lines)


def edits(task: str, found: Found) -> list[str]:
    """Online accuracy, and early and late, of the operators by number of edits and phases between them."""
    operators = found["edits"][task]
    lines = []
    for number in EDITS:
        for rest in RESTS:
            key = f"{number}/{rest}"
            if any(key in grid for grid in operators.values()):
                lines.append([str(number), str(rest), *(_cell(grid.get(key)) for grid in operators.values())])
    return table(("edits", "phases between", *(f"`{name}`" for name in operators)), lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{span(row['online'])}, {row['early'][0]:.2f} to {row['late'][0]:.2f}"


def pairs(found: Found) -> list[str]:
    """Paired differences of the online accuracy between arms."""
    tasks = list(found["pairs"])
    names = list(found["pairs"][tasks[0]])
    lines = [
        [
            " - ".join(f"`{one}`" for one in name.split(" - ")),
            *(span(found["pairs"][task][name], "+.3f") for task in tasks),
        ]
        for name in names
    ]
    return table(("difference", *tasks), lines)


def diagnostics(found: Found) -> list[str]:
    """How far dormant units and rank at the end go with the late accuracy, over arms."""
    lines = [
        [task, *(f"{row[name]:+.2f}" for name in ("dormant", "rank"))] for task, row in found["diagnostics"].items()
    ]
    return table(("task", "dormant share", "effective rank"), lines)


def tried(found: Found) -> list[str]:
    """What every arm was tuned over."""
    lines = []
    for name, arm in ARMS.items():
        knob = f"{arm.knob}: {', '.join(f'{value:g}' for value in arm.values)}" if arm.values else ""
        lines.append(
            [f"`{name}`", arm.doc.replace("|", chr(92) + "|"), ", ".join(f"{rate:g}" for rate in arm.rates), knob]
        )
    return table(("arm", "what it does", "rates", "knob"), lines)


TABLES: dict[str, Callable[[Found], list[str]]] = {
    "arms": tried,
    "check": check,
    **{task: partial(arms, task) for task in TASKS},
    "pairs": pairs,
    "diagnostics": diagnostics,
    **{f"edits-{task}": partial(edits, task) for task in TASKS if task != "steady"},
}


def tables_of(found: Found) -> dict[str, list[str]]:
    """The lines of every table."""
    return {name: lines(found) for name, lines in TABLES.items()}
