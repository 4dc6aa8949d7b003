"""What a benchmark found: summaries of evaluations, and the files that hold them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trimtab.agents.evaluation import Evaluation
from trimtab.agents.files import versions
from trimtab.agents.statistics import (
    Interval,
    bootstrap_interval,
    holm,
    iqm,
    mean,
    paired_difference,
    performance_profile,
    probability_of_improvement,
    sign_flip_test,
)

SCHEMA = 1
PROFILE_POINTS = 41


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant's evaluation on one scenario.

    Attributes:
        label: its name in tables.
        setting: ``"untuned"``, ``"tuned"`` or ``"oracle"`` (docs/benchmark.md).
        learned: whether it is a learned policy.
        evaluation: per-run results on held-out instances.
        tuning: how its learning rates were chosen; empty for untuned ones.
        training_steps: inner steps that a learned policy was trained on, as its bundle says; 0 for unknown and for rules.
    """

    label: str
    setting: str
    learned: bool
    evaluation: Evaluation
    tuning: Mapping[str, Any] = field(default_factory=dict)
    training_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Aggregates of one entry; losses are natural logs of bounded losses, so lower is better.

    Attributes:
        final: interquartile mean of the final test loss.
        difference: mean of its final test loss minus the reference's on the same instances; above 0 it is worse.
        better: probability that it ends below the reference on an instance.
        p_value: of the difference, two-sided, Holm-corrected over the table; 1 for the reference itself.
        best: interquartile mean of the test loss at the best validation checkpoint.
        trajectory: interquartile mean of the average validation loss over the whole budget.
        diverged, lost_early: runs that diverged after, and before, the first decision on measurements.
        steps_to_target: median inner steps to the target of the run, None where fewer than half reach it.
        reached: share of runs that reach it.
        rollbacks: rollbacks per run.
        wall_seconds: time on the clock for all runs.
        measures: interquartile mean of each further figure of the evaluation, over the runs that have it.
    """

    label: str
    setting: str
    learned: bool
    final: Interval
    difference: Interval
    better: Interval
    p_value: float
    best: float
    trajectory: float
    diverged: int
    lost_early: int
    steps_to_target: float | None
    reached: float
    rollbacks: float
    wall_seconds: float
    measures: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ScenarioResult:
    """All entries of one scenario.

    Attributes:
        scenario: its id.
        config: the scenario as plain values.
        reference: label of the entry that the others are compared with.
        target: label of the entry whose final validation loss, run by run, is the target.
        entries: as they competed.
        summaries: the same, best first.
    """

    scenario: str
    config: Mapping[str, Any]
    reference: str
    target: str
    entries: tuple[Entry, ...]
    summaries: tuple[Summary, ...]


def choose_reference(entries: Sequence[Entry]) -> Entry:
    """The first learned policy, or else the first entry."""
    return next((entry for entry in entries if entry.learned), entries[0])


def choose_target(entries: Sequence[Entry]) -> Entry:
    """Whose final validation loss is the target of each run.

    ``constant@tuned`` where it competes, or else the best untuned rule, or else the best entry of all.
    """
    by_label = {entry.label: entry for entry in entries}
    if "constant@tuned" in by_label:
        return by_label["constant@tuned"]
    rules = [entry for entry in entries if entry.setting == "untuned" and not entry.learned]
    return min(rules or entries, key=lambda entry: iqm(entry.evaluation.final_validation_loss))


def summarise(entries: Sequence[Entry], scenario: str, config: Mapping[str, Any], seed: int) -> ScenarioResult:
    """Compares entries that ran the same instances; the same arguments give the same numbers.

    Args:
        entries: at least one; run ``i`` of all is the same instance.
        scenario, config: what was run, for the record.
        seed: of the resampling.
    """
    reference, target = choose_reference(entries), choose_target(entries)
    rows = [_summary(entry, reference, target, seed) for entry in entries]
    others = [place for place, row in enumerate(rows) if row.label != reference.label]
    corrected = dict(zip(others, holm(np.array([rows[place].p_value for place in others])), strict=True))
    rows = [replace(row, p_value=float(corrected.get(place, 1.0))) for place, row in enumerate(rows)]
    return ScenarioResult(
        scenario=scenario,
        config=config,
        reference=reference.label,
        target=target.label,
        entries=tuple(entries),
        summaries=tuple(sorted(rows, key=lambda row: row.final.estimate)),
    )


def _summary(entry: Entry, reference: Entry, target: Entry, seed: int) -> Summary:
    evaluation, other = entry.evaluation, reference.evaluation
    tasks = np.array(evaluation.families)

    def fresh() -> np.random.Generator:  # one stream per number, so that no entry depends on the others
        return np.random.default_rng([seed, 0x7A])

    final, theirs = evaluation.final_loss, other.final_loss
    wins = (final < theirs) + 0.5 * (final == theirs)
    low, high = bootstrap_interval(mean, wins, fresh(), strata=tasks)[1:]
    steps = evaluation.steps_to_target(target.evaluation.final_validation_loss)
    median = float(np.median(steps))
    return Summary(
        label=entry.label,
        setting=entry.setting,
        learned=entry.learned,
        final=bootstrap_interval(iqm, final, fresh(), strata=tasks),
        difference=paired_difference(final, theirs, fresh(), strata=tasks),
        better=Interval(probability_of_improvement(final[None], theirs[None]), low, high),
        p_value=sign_flip_test(final - theirs, fresh()),
        best=iqm(evaluation.best_loss),
        trajectory=iqm(evaluation.trajectory),
        diverged=int((evaluation.diverged & ~evaluation.lost_early).sum()),
        lost_early=int(evaluation.lost_early.sum()),
        steps_to_target=median if np.isfinite(median) else None,
        reached=float(np.isfinite(steps).mean()),
        rollbacks=float(evaluation.rollbacks.mean()),
        wall_seconds=evaluation.wall_seconds,
        measures={name: _known_iqm(values) for name, values in evaluation.measures.items()},
    )


def _known_iqm(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return iqm(known) if len(known) else None


# --- files ------------------------------------------------------------------------------------------------------


def _plain(values: np.ndarray) -> list[Any]:
    """A list that JSON can hold: infinity ("never") becomes None; floats keep nine digits."""
    if values.dtype.kind != "f":
        return list(values.tolist())
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [float(f"{value:.9g}") if np.isfinite(value) else None for value in values]


def to_json(results: Sequence[ScenarioResult], about: Mapping[str, Any]) -> str:
    """Everything, per run and aggregated (docs/benchmark.md describes the schema).

    Args:
        results: one for each scenario.
        about: the command and its settings.
    """
    scenarios = {}
    for result in results:
        first = result.entries[0].evaluation
        every = np.concatenate([entry.evaluation.final_loss for entry in result.entries])
        thresholds = np.linspace(every.min(), every.max(), PROFILE_POINTS)
        target = next(entry for entry in result.entries if entry.label == result.target).evaluation
        goal = target.final_validation_loss
        scenarios[result.scenario] = {
            "config": result.config,
            "reference": result.reference,
            "target": {"policy": result.target, "validation_loss": _plain(goal)},
            "instances": {
                "keys": list(first.keys),
                "families": list(first.families),
                "budget": _plain(first.budgets),
            },
            "profile_thresholds": _plain(thresholds),
            "policies": {entry.label: _entry(entry, result, goal, thresholds) for entry in result.entries},
        }
    document = {"schema": SCHEMA, "versions": versions(), **about, "scenarios": scenarios}
    return json.dumps(document, allow_nan=False) + "\n"


def _entry(entry: Entry, result: ScenarioResult, goal: np.ndarray, thresholds: np.ndarray) -> dict[str, Any]:
    summary = next(row for row in result.summaries if row.label == entry.label)
    aggregates = {name: list(v) if isinstance(v, Interval) else v for name, v in vars(summary).items()}
    evaluation = entry.evaluation
    runs = {name: _plain(values) for name, values in evaluation.columns().items()}
    return {
        "summary": aggregates,
        "profile": _plain(performance_profile(evaluation.final_loss, thresholds)),
        "tuning": dict(entry.tuning),
        "training_steps": entry.training_steps,
        "runs": {
            **runs,
            "steps_to_target": _plain(evaluation.steps_to_target(goal)),
            "curve": _plain(evaluation.curve),
        },
    }


def to_csv(results: Sequence[ScenarioResult]) -> str:
    """One row for each policy, scenario and run; an empty ``steps_to_target`` is "never"."""
    rows: list[dict[str, Any]] = []
    for result in results:
        target = next(entry for entry in result.entries if entry.label == result.target)
        goal = target.evaluation.final_validation_loss
        for entry in result.entries:
            evaluation = entry.evaluation
            columns = {**evaluation.columns(), "steps_to_target": evaluation.steps_to_target(goal)}
            plain = {name: _plain(values) for name, values in columns.items()}
            for run, (key, family) in enumerate(zip(evaluation.keys, evaluation.families, strict=True)):
                row = {"scenario": result.scenario, "policy": entry.label, "setting": entry.setting, "run": run}
                row |= {"instance": key, "family": family}
                row |= {name: "" if values[run] is None else values[run] for name, values in plain.items()}
                rows.append(row)
    text = io.StringIO()
    # Scenarios may measure different things; what one does not have stays empty.
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
