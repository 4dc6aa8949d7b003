"""The tables of docs/criteria.md, made of docs/results/criteria.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from experiments import pages
from experiments.criteria.measure import interval
from experiments.pages import table

SIGNS = {1: " +", -1: " -", 0: ""}
CALIBRATIONS = ("none", "log", "mean", "max", "rank", "fisher")
Found = Mapping[str, Any]


def span(values: Sequence[float], form: str = ".3f") -> str:
    """An estimate with its interval."""
    return pages.span(values, form)


def _percent(sparsity: str) -> str:
    return f"{100 * float(sparsity):.0f} %"


def _sparsities(found: Found) -> list[str]:
    return [f"{one:g}" for one in found["plan"]["sparsities"]]


def _mean(values: Any) -> float:
    return float(np.mean(values))


def overview(found: Found) -> list[str]:
    """The dense runs, and what the same fine-tuning makes of them."""
    rows = []
    for name, one in found["tasks"].items():
        history = one["history"]
        rows.append(
            [
                f"`{name}`",
                f"{one['steps'][0]} + {one['steps'][1]}",
                f"{one['rate']:g}",
                span(one["dense"]["accuracy before"]),
                span(one["dense"]["accuracy"]),
                f"{_mean(history['train loss'][-1]):.3f}",
                f"{_mean(history['validation loss'][-1]):.3f}",
                ", ".join(f"{100 * one['layer'][share]['work']:.0f}" for share in _sparsities(found)),
            ]
        )
    head = (
        "task",
        "steps",
        "rate",
        "dense accuracy",
        "fine-tuned further",
        "train loss",
        "validation loss",
        "multiplications left, %",
    )
    return table(head, rows)  # fmt: skip


def criteria(found: Found, task: str, field: str) -> list[str]:
    """Every criterion in layer scope, with its difference to ``random`` and the verdict by Holm."""
    own, shares = found["tasks"][task]["layer"], _sparsities(found)
    names = [name for name in own[shares[0]][field] if name not in ("random", "spread")]
    rows = [["`random`", *(span(own[share][field]["random"]) for share in shares)]]
    for name in names:
        cells = [own[share][field][name] for share in shares]
        rows.append(
            [f"`{name}`", *(f"{one['value'][0]:.3f}, {span(one['minus_control'], '+.3f')}{SIGNS[one['verdict']]}"
                            for one in cells)]
        )  # fmt: skip
    return table(("criterion", *map(_percent, shares)), rows)


def verdicts(found: Found) -> list[str]:
    """How many criteria are above and below ``random`` after Holm's correction, and by their own intervals alone."""
    rows = []
    for task, one in found["tasks"].items():
        for field in ("accuracy before", "accuracy", "loss"):
            cells = []
            for share in _sparsities(found):
                every = [
                    row for row in one["layer"][share][field].values() if isinstance(row, dict) and "verdict" in row
                ]
                up, down = (-1, 1) if field.startswith("loss") else (1, -1)
                cells.append(f"{_count(every, up)} better, {_count(every, down)} worse, of {len(every)}")
            rows.append([f"`{task}`", field if "before" in field else f"{field} after", *cells])
    return table(("task", "of what", *map(_percent, _sparsities(found))), rows)


def _count(rows: Sequence[Mapping[str, Any]], sign: int) -> str:
    """How many differences have a sign after Holm's correction, and in parentheses by their own intervals."""
    alone = sum(min(sign * one["minus_control"][1], sign * one["minus_control"][2]) > 0 for one in rows)
    return f"{[one['verdict'] for one in rows].count(sign)} ({alone})"


def scratch(found: Found) -> list[str]:
    """The same pruned networks with inherited, rewound and fresh weights."""
    rows = []
    for task, one in found["tasks"].items():
        for name in one["scratch"][_sparsities(found)[0]]:
            cells = []
            for share in _sparsities(found):
                row = one["scratch"][share][name]
                less = "" if name == "inherited, agf" else f", {span(row['agf_minus'], '+.3f')}"
                cells.append(f"{row['value'][0]:.3f}{less}")
            rows.append([f"`{task}`", name, *cells])
    return table(("task", "weights", *map(_percent, _sparsities(found))), rows)


def stability(found: Found, share: str = "0.75") -> list[str]:
    """Jaccard indices of what a criterion keeps, at one sparsity."""
    tasks, kinds = list(found["tasks"]), ("calibration", "order", "initial")
    share = share if share in _sparsities(found) else _sparsities(found)[0]
    names = list(found["tasks"][tasks[0]]["stability"]["order"])
    rows = [
        [f"`{name}`", *(f"{_mean(found['tasks'][task]['stability'][kind][name][share]):.2f}" for task in tasks for kind in kinds)]
        for name in names
    ]  # fmt: skip
    return table(("criterion", *(f"{task}: {kind}" for task in tasks for kind in kinds)), rows)


def spread(found: Found) -> list[str]:
    """Standard deviation over seeds of the accuracy after fine-tuning."""
    names = ("random", "magnitude", "taylor", "wanda", "ria", "agf", "agf-100")
    tasks, shares = found["tasks"], _sparsities(found)
    rows = [
        [f"`{name}`", *(f"{tasks[task]['layer'][share]['accuracy']['spread'][name]:.3f}" for task in tasks for share in shares)]
        for name in names
    ]  # fmt: skip
    return table(("criterion", *(f"{task}, {_percent(share)}" for task in tasks for share in shares)), rows)


def few(found: Found) -> list[str]:
    """AGF of ten calibration batches against a hundred."""
    rows = []
    for task, one in found["tasks"].items():
        others, stable = one["agf"]["others"]["agf-100"], one["stability"]["calibration"]
        for label, cells in (
            ("accuracy, 10 minus 100", [span(one["layer"][share]["few against many"], "+.3f") for share in _sparsities(found)]),
            ("Jaccard of 10 and 100", [f"{_mean(others['jaccard'][share]):.2f}" for share in _sparsities(found)]),
            ("Jaccard of two draws of 10", [f"{_mean(stable['agf'][share]):.2f}" for share in _sparsities(found)]),
            ("Jaccard of two draws of 100", [f"{_mean(stable['agf-100'][share]):.2f}" for share in _sparsities(found)]),
        ):  # fmt: skip
            rows.append([f"`{task}`", label, *cells])
    return table(("task", "of what", *map(_percent, _sparsities(found))), rows)


def magnitude(found: Found) -> list[str]:
    """How far AGF agrees with other criteria, within layers."""
    tasks, shares = list(found["tasks"]), _sparsities(found)
    names = ("magnitude", "magnitude-l1", "taylor", "wanda", "ria", "obs", "activation-frequency", "random")
    rows = []
    for name in names:
        cells = []
        for task in tasks:
            one = found["tasks"][task]["agf"]["others"][name]
            overlaps = ", ".join(f"{_mean(one['jaccard'][share]):.2f}" for share in shares)
            cells += [span(interval(np.array(one["correlation"])), "+.2f"), overlaps]
        rows.append([f"`{name}`", *cells])
    head = [f"{task}: {what}" for task in tasks for what in ("rank correlation", "Jaccard, by sparsity")]
    return table(("agf against", *head), rows)


def scopes(found: Found) -> list[str]:
    """Criteria in global scope, under AGF's calibrations."""
    rows = []
    for task, one in found["tasks"].items():
        for name in one["global"][_sparsities(found)[0]]:
            cells = []
            for share in _sparsities(found):
                row = one["global"][share][name]
                cells.append(
                    f"{row['accuracy'][0]:.3f}, {span(row['minus_layer'], '+.3f')}; {100 * row['work'][0]:.0f} %"
                )
            rows.append([f"`{task}`", f"`{name.replace(' ', '` `')}`", *cells])
    return table(("task", "criterion, calibration", *map(_percent, _sparsities(found))), rows)


def calibrations(found: Found) -> list[str]:
    """What AGF's calibrations leave of each group, and how much of the uncalibrated selection they share."""
    rows = []
    for task, one in found["tasks"].items():
        for name in CALIBRATIONS:
            left = one["agf"]["left"].get(name)
            cells = []
            for share in _sparsities(found):
                kept = "" if left is None else "; " + ", ".join(f"{_mean(group[share]):.1f}" for group in left.values())
                cells.append(f"{_mean(one['agf']['calibrations'][name][share]):.2f}{kept}")
            rows.append([f"`{task}`", f"`{name}`", *cells])
    return table(("task", "calibration", *map(_percent, _sparsities(found))), rows)


def ranges(found: Found) -> list[str]:
    """AGF's dynamic range along the dense training."""
    rows = []
    for task, one in found["tasks"].items():
        history = one["history"]
        for name in ("range", "layer range", "correlation", "train loss"):
            rows.append([f"`{task}`", name, *(f"{_geometric(values, name):.3g}" for values in history[name])])
    shares = next(iter(found["tasks"].values()))["history"]["share"]
    return table(("task", "of what", *(f"{100 * share:.0f} %" for share in shares)), rows)


def _geometric(values: Sequence[float], name: str) -> float:
    """Mean over seeds; of ratios the geometric one."""
    if name in ("correlation", "train loss"):
        return _mean(values)
    return float(np.exp(np.mean(np.log(values))))


def costs(found: Found) -> list[str]:
    """What AGF says that a unit is worth, and what it costs."""
    rows = []
    for task, one in found["tasks"].items():
        means = {group: _mean(values) for group, values in one["agf"]["means"].items()}
        times, work = one["costs"]["times"], one["costs"]["work"]
        saved = {group: times[""] - times[group] for group in means}
        last = list(means)[-1]
        for group, value in means.items():
            shown = (value / means[last], work[group] / work[last], saved[group] / saved[last])
            rows.append(
                [f"`{task}`", f"`{group}`", f"{value:.3g}", f"{100 * work[group]:.2f} %",
                 f"{1e3 * saved[group]:.2f} of {1e3 * times['']:.2f}", *(f"{each:.2f}" for each in shown)]
            )  # fmt: skip
    head = ("task", "group", "AGF of a unit", "multiplications of a unit", "ms saved by 75 % of the group",
            "AGF, over the last group's", "multiplications, likewise", "time, likewise")  # fmt: skip
    return table(head, rows)


PARTS = {"before": "accuracy before", "after": "accuracy"}
GENERAL = {
    "overview": overview,
    "verdicts": verdicts,
    "scratch": scratch,
    "stability": stability,
    "spread": spread,
    "few": few,
    "magnitude": magnitude,
    "scopes": scopes,
    "calibrations": calibrations,
    "ranges": ranges,
    "costs": costs,
}


def tables_of(found: Found) -> dict[str, list[str]]:
    """The lines of every table, by name."""
    tables = {name: make(found) for name, make in GENERAL.items()}
    for task in found["tasks"]:
        for part, field in PARTS.items():
            tables[f"{task} {part}"] = criteria(found, task, field)
    return tables
