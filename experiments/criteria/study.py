"""The whole study of one task, from a rate to raw figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.criteria import costs, looks
from experiments.criteria.arms import FIELDS, Job, Plan, Slots, Workshop
from experiments.criteria.dense import MOMENTS, Calibrator, Scores, trained, tuned
from experiments.criteria.tasks import Task, Widths

Say = Callable[[str], None]


def study(task: Task, plan: Plan, say: Say, keep: Path | None = None) -> dict[str, Any]:
    """Raw figures of a task, lists over seeds: JSON as it stands.

    Args:
        task: which one.
        plan: its ``rate`` is replaced by the best of the task's, and ``steps`` and ``tuning`` where they are 0.
        say: told what has been done.
        keep: file of what was played before, and for it.
    """
    if keep is not None and keep.exists():
        before: dict[str, Any] = json.loads(keep.read_text())
        return before
    begin = time.perf_counter()

    def tell(line: str) -> None:
        say(f"{task.name}: {line} ({time.perf_counter() - begin:.0f} s)")

    plan = replace(plan, steps=plan.steps or task.steps, tuning=plan.tuning or task.tuning)
    rates = tuned(task, plan.steps)
    plan = replace(plan, rate=min(rates, key=lambda rate: rates[rate]))
    tell(f"rate {plan.rate:g} of {rates}")
    calibrator = Calibrator(task, 2 * plan.seeds)
    dense = trained(task, calibrator, plan.seeds, plan.rate, plan.steps)
    tell("dense runs trained")
    calibrator.show(dense.instances, dense.parameters, 0)
    scores = Scores(calibrator, many=True)
    seeds, shares = plan.seeds, plan.sparsities
    found: dict[str, Any] = {
        "rates": {f"{rate:g}": round(loss, 4) for rate, loss in rates.items()},
        "rate": plan.rate,
        "steps": [plan.steps, plan.tuning],
        "history": {"share": list(MOMENTS), **{name: looks.listed(one) for name, one in dense.history.items()}},
        "ranges": looks.ranges(scores, seeds),
        "agf": looks.of_agf(scores, seeds, shares),
        "stability": looks.twins(scores, seeds, shares),
    }
    work = Workshop(task, plan, dense).jobs(scores)
    again = Calibrator(task, seeds)
    again.show(dense.instances[:seeds], dense.parameters[:seeds], 1)
    found["stability"]["calibration"] = looks.redrawn(scores, Scores(again, many=True), seeds, shares)
    tell("units scored and chosen")
    found["costs"] = {"times": costs.times(task), "work": costs.work(task)}
    tell(f"{len(work)} arms of {seeds} runs begin")
    found["arms"] = _played(task, plan, work, tell)
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.write_text(json.dumps(found))
    return found


def _played(task: Task, plan: Plan, work: Mapping[str, Sequence[Job]], tell: Say) -> dict[str, Any]:
    """The fields of every arm by its key; runs of one width and length go side by side."""
    alike: dict[Widths, dict[int, list[str]]] = {}
    for key, own in work.items():
        alike.setdefault(own[0].widths, {}).setdefault(own[0].instance.steps, []).append(key)
    found: dict[str, Any] = {}
    for widths, lengths in alike.items():
        for steps, keys in lengths.items():
            slots = Slots(task, widths, min(plan.slots, sum(len(work[key]) for key in keys)))
            rows = slots.play([job for key in keys for job in work[key]])
            for key, own in zip(keys, rows.reshape(len(keys), -1, len(FIELDS)), strict=True):
                found[key] = {name: looks.listed(own[:, place]) for place, name in enumerate(FIELDS)}
            tell(f"{len(rows)} runs of {steps} steps, units {widths}")
    return found
