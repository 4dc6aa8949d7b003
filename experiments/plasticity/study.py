"""The study: all settings of all arms on tuning seeds, then the best of each on other seeds; and the grid of edits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from experiments.plasticity.arms import ARMS, EDITS, RESTS, Run
from experiments.plasticity.play import Arena, Played
from experiments.plasticity.tasks import TASKS, Network
from scipy import stats

PAIRS = (
    ("prune", "prune-stay"), ("prune", "fresh"), ("prune", "random-reset"), ("grow", "narrow"), ("continual-backprop", "fresh"),
    ("grama", "fresh"), ("crelu", "fresh"), ("continual-backprop", "grama"), ("none-sgd", "fresh"),
)  # fmt: skip
CHANGING = tuple(task for task in TASKS if task != "steady")
METRICS = ("online", "early", "late", "final", "dormant", "rank", "active")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the study is.

    Attributes:
        phases, steps: of a run, and of a phase.
        tuned, reported: seeds for tuning and for reporting; no seed is in both.
        keep: folder for what has been played.
        mode: of populations.
    """

    phases: int = 40
    steps: int = 60
    tuned: tuple[int, ...] = (0, 1)
    reported: tuple[int, ...] = (100, 101, 102, 103, 104)
    keep: Path | None = None
    mode: str = "auto"

    @property
    def ends(self) -> int:
        """Phases that count as early, and as many as late."""
        return max(1, self.phases // 8)


SMALL = Size(phases=8, steps=20, tuned=(0,), reported=(100, 101))
Choice = dict[str, dict[str, tuple[float, float]]]  # by task and arm: rate, knob


def tuning_runs(size: Size, names: Iterable[str]) -> list[Run]:
    """Every setting of some arms on every tuning seed."""
    return [
        Run(task=task, arm=name, seed=seed, rate=rate, knob=knob)
        for task in TASKS
        for name in names
        for rate, knob in ARMS[name].grid()
        for seed in size.tuned
    ]


def reported_runs(size: Size, names: Iterable[str], best: Choice) -> list[Run]:
    """The best setting of some arms on every other seed."""
    return [
        Run(task=task, arm=name, seed=seed, rate=best[task][name][0], knob=best[task][name][1])
        for task in TASKS
        for name in names
        for seed in size.reported
    ]


def edit_runs(size: Size, names: Iterable[str], best: Choice) -> list[Run]:
    """The grid of edits and rests that fit into a run, at the operator's best rate; but the one that is reported already.

    Not of the control, whose data do not change.
    """
    return [
        Run(task=task, arm=name, seed=seed, rate=best[task][name][0], knob=float(rest), edits=edits)
        for task in CHANGING
        for name in names
        if ARMS[name].operator
        for edits in EDITS
        for rest in RESTS
        if 1 + (edits - 1) * rest < size.phases and (edits, float(rest)) != (10, best[task][name][1])
        for seed in size.reported
    ]


def rows_of(runs: list[Run], played: Played, ends: int) -> list[dict[str, Any]]:
    """One row of numbers for each run."""
    found = []
    for place, run in enumerate(runs):
        curve = played.online[place]
        numbers = {
            "online": curve.mean(),
            "early": curve[:ends].mean(),
            "late": curve[-ends:].mean(),
            "final": played.final[place],
            "dormant": played.dormant[place],
            "rank": played.rank[place],
            "active": played.active[place],
        }
        numbers = {name: round(float(value), 4) for name, value in numbers.items()}
        found.append({**vars(run), **numbers, "curve": np.round(curve, 3).tolist()})
    return found


def best_of(rows: list[dict[str, Any]]) -> Choice:
    """The setting of the highest mean online accuracy, by task and arm."""
    found: Choice = {}
    for task in {row["task"] for row in rows}:
        found[task] = {}
        for name in {row["arm"] for row in rows}:
            own = [row for row in rows if row["task"] == task and row["arm"] == name]
            means = {
                (rate, knob): np.mean([row["online"] for row in own if (row["rate"], row["knob"]) == (rate, knob)])
                for rate, knob in ARMS[name].grid()
            }
            found[task][name] = max(means, key=lambda setting: means[setting])
    return found


def interval(values: Iterable[float]) -> list[float]:
    """Mean, and the ends of its 95 % interval by Student's t.

    >>> interval([1.0, 1.0, 1.0])
    [1.0, 1.0, 1.0]
    """
    given = np.array(list(values), dtype=float)
    width = 0.0
    if len(given) > 1 and given.std() > 0:
        width = float(stats.t.ppf(0.975, len(given) - 1) * given.std(ddof=1) / np.sqrt(len(given)))
    return [round(float(one), 4) for one in (given.mean(), given.mean() - width, given.mean() + width)]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Intervals of every metric, the change from early to late, and the mean curve, of the runs of one setting."""
    found: dict[str, Any] = {name: interval(row[name] for row in rows) for name in METRICS}
    found["change"] = interval(row["late"] - row["early"] for row in rows)
    found["curve"] = np.round(np.mean([row["curve"] for row in rows], 0), 3).tolist()
    return {"rate": rows[0]["rate"], "knob": rows[0]["knob"], "runs": len(rows), **found}


def compared(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[float]:
    """Difference of online accuracy to other runs of the same seeds, paired, with its interval."""
    of = {row["seed"]: row["online"] for row in others}
    return interval(row["online"] - of[row["seed"]] for row in rows)


def by_network() -> dict[Network, list[str]]:
    """Names of the arms of each network."""
    found: dict[Network, list[str]] = {}
    for name, arm in ARMS.items():
        found.setdefault(arm.network, []).append(name)
    return found


def played_rows(size: Size, say: Callable[[str], None] = print) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of tuning and of reported runs; runs that ``size.keep`` has already are not played again."""
    tuned: list[dict[str, Any]] = []
    reported: list[dict[str, Any]] = []
    for number, (network, names) in enumerate(by_network().items()):
        trials, kept = tuning_runs(size, names), _Kept(size, f"network-{number}")
        untuned = {task: dict.fromkeys(names, (1.0, 1.0)) for task in TASKS}
        count = len(reported_runs(size, names, untuned) + edit_runs(size, names, untuned))
        arena = cache(
            partial(Arena, network, size.phases, size.steps, max(len(kept.missing(trials)), count), size.mode)
        )
        say(f"{network}: {len(kept.missing(trials))} runs to tune {len(names)} arms")
        own = kept.rows(trials, arena)
        best = best_of(own)
        chosen = reported_runs(size, names, best) + edit_runs(size, names, best)
        say(f"{network}: {len(kept.missing(chosen))} runs to report")
        tuned, reported = tuned + own, reported + kept.rows(chosen, arena)
    return tuned, reported


class _Kept:
    """Rows of runs that have been played, in a file where there is a folder for it."""

    def __init__(self, size: Size, name: str) -> None:
        self._ends, self._rows = size.ends, dict[Run, dict[str, Any]]()
        self._file = None if size.keep is None else size.keep / f"{name}.json"
        if self._file is not None and self._file.exists():
            self._note(json.loads(self._file.read_text()))

    def _note(self, rows: list[dict[str, Any]]) -> None:
        fields = Run.__dataclass_fields__
        self._rows |= {Run(**{name: row[name] for name in fields}): row for row in rows}

    def missing(self, runs: list[Run]) -> list[Run]:
        return [run for run in runs if run not in self._rows]

    def rows(self, runs: list[Run], arena: Callable[[], Arena]) -> list[dict[str, Any]]:
        missing = self.missing(runs)
        if missing:
            self._note(rows_of(missing, arena().play(missing), self._ends))
        if missing and self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps([*self._rows.values()]))
        return [self._rows[run] for run in runs]


def result(size: Size, tuned: list[dict[str, Any]], reported: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written: sizes, every setting's tuning, every arm's report, and the grid of edits."""
    best = best_of(tuned)
    found: dict[str, Any] = {
        "phases": size.phases, "steps": size.steps, "ends": size.ends, "tuned": list(size.tuned),
        "reported": list(size.reported), "tuning": {}, "tasks": {}, "edits": {},
        "pairs": {}, "diagnostics": {},
    }  # fmt: skip
    for task in TASKS:
        own = [row for row in reported if row["task"] == task]
        main = {
            name: [
                row for row in own if row["arm"] == name and (row["edits"], row["knob"]) == (10, best[task][name][1])
            ]
            for name in ARMS
        }
        found["tasks"][task] = {
            name: {**summary(rows), "minus_none": compared(rows, main["none"]), "minus_random": compared(rows, main["random-reset"])}
            for name, rows in main.items()
        }  # fmt: skip
        found["pairs"][task] = {
            f"{one} - {other}": compared(main[one], main[other]) for one, other in PAIRS if {one, other} <= set(main)
        }
        found["diagnostics"][task] = _correlations(found["tasks"][task])
        found["tuning"][task] = {name: _settings(tuned, task, name) for name in ARMS}
    for task in CHANGING:
        own = [row for row in reported if row["task"] == task]
        found["edits"][task] = {name: _grid(own, name) for name, arm in ARMS.items() if arm.operator}
    return found


def _correlations(rows: dict[str, Any]) -> dict[str, float]:
    """Spearman's rank correlation over arms of what is measured at the end with the late online accuracy."""
    late = [row["late"][0] for row in rows.values()]
    found = {}
    for name in ("dormant", "rank"):
        values = [row[name][0] for row in rows.values()]
        known = len(set(values)) > 1 and len(set(late)) > 1
        found[name] = round(float(stats.spearmanr(values, late).statistic), 3) if known else 0.0
    return found


def _settings(rows: list[dict[str, Any]], task: str, name: str) -> list[dict[str, Any]]:
    found = []
    for rate, knob in ARMS[name].grid():
        one = [row for row in rows if (row["task"], row["arm"], row["rate"], row["knob"]) == (task, name, rate, knob)]
        means = {key: round(float(np.mean([row[key] for row in one])), 4) for key in ("online", "early", "late")}
        found.append({"rate": rate, "knob": knob, **means})
    return found


def _grid(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    found = {}
    for edits in EDITS:
        for rest in RESTS:
            own = [row for row in rows if (row["arm"], row["edits"], row["knob"]) == (name, edits, float(rest))]
            if own:
                numbers = summary(own)
                found[f"{edits}/{rest}"] = {key: numbers[key] for key in ("online", "early", "late", "final", "active")}
    return found
