"""Every family learns, and a wrong learning rate costs: losses of constant rates on each task family.

    python experiments/families.py [--families NAME ...] [--runs 8] [--out FILE.json]

Each instance is trained at 13 constant learning rates, half a decade apart, in one population: the four decades of the
recipes and one more at either end. The tuned rate is the one of the four decades with the lowest validation loss at
the end of the budget. Half of the instances are of training, half held out. Losses are bounded test losses, and the
table shows their means over the instances:

    initial    before the first step
    tuned      of the tuned rate, at the end of the budget
    best       the lowest of any rate at any evaluation (every 50 steps; of tasks with phases, in the last phase): an
               oracle's, which no constant rate reaches
    rate / 10  of a tenth of the tuned rate, at the end
    rate x 10  of ten times the tuned rate, at the end
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import Instance, TaskFamily
from trimtab.inner_training.tasks import FAMILIES, make_family
from trimtab.inner_training.update_rules import UPDATE_RULES

EVERY = 50  # steps from one evaluation to the next
DECADE = 2  # places of the grid
LOWEST = {False: 1e-5, True: 1e-6}  # of the grid, for rules without and with a second moment
GRID = 10.0 ** (np.arange(6 * DECADE + 1) / DECADE)  # times the lowest
WIDE = 110
COLUMNS = ("initial", "tuned", "best", "rate / 10", "rate x 10")


def at_every_rate(instance: Instance) -> list[Instance]:
    """The instance at each constant rate of the grid."""
    lowest = LOWEST[UPDATE_RULES[instance.optimizer.rule].adaptive]
    settings = [replace(instance.optimizer, lr=float(lowest * factor)) for factor in GRID]
    return [replace(instance, optimizer=one, schedule=BaseSchedule()) for one in settings]


def train(family: TaskFamily, runs: list[Instance]) -> dict[str, np.ndarray]:
    """Trains all runs to the longest budget.

    Returns:
        ``steps`` (T,), when evaluations took place, the first at 0; bounded losses ``validation`` and ``test`` (T, N);
        and ``score`` (T, N) of the test split, where the family has one.
    """
    population = Population(family, len(runs))
    population.reset(range(len(runs)), runs)
    budgets = {run.steps for run in runs}
    stops = sorted({0, *range(EVERY, max(budgets), EVERY), *budgets})
    taken: dict[str, list[np.ndarray]] = {"validation": [], "test": [], "score": []}
    for before, stop in zip([0, *stops], stops, strict=False):
        if stop > before:
            population.advance(stop - before)
        for split in ("validation", "test"):
            taken[split].append(family.bounded(population.evaluate(split).double().numpy()))
        if family.score_name:
            taken["score"].append(population.evaluate("test", score=True).double().numpy())
    return {"steps": np.array(stops), **{name: np.stack(rows) for name, rows in taken.items() if rows}}


def summary(instance: Instance, traces: dict[str, np.ndarray]) -> dict[str, Any]:
    """The figures of one instance from the traces (T, rates) of its runs."""
    steps, test = traces["steps"], traces["test"]
    end = int(np.flatnonzero(steps == instance.steps)[0])
    inside = slice(DECADE, GRID.size - DECADE)
    tuned = DECADE + int(traces["validation"][end, inside].argmin())
    comparable = (steps >= instance.all_phases[-1].first_step) & (steps <= instance.steps)
    losses = (
        test[0, 0],
        test[end, tuned],
        test[comparable].min(),
        test[end, tuned - DECADE],
        test[end, tuned + DECADE],
    )
    found = {"key": instance.key, "rule": instance.optimizer.rule, "steps": instance.steps}
    rate = LOWEST[UPDATE_RULES[instance.optimizer.rule].adaptive] * GRID[tuned]
    if "score" in traces:
        found["tuned_score"] = float(traces["score"][end, tuned])
    return {**found, "tuned_rate": float(rate), **dict(zip(COLUMNS, map(float, losses), strict=True))}


def study(name: str, count: int) -> dict[str, Any]:
    """Trains ``count`` instances of a family at every rate."""
    family = make_family(name)
    instances = [family.draw(seed, held_out=bool(seed % 2)) for seed in range(count)]
    traces = train(family, [run for instance in instances for run in at_every_rate(instance)])
    rows = []
    for place, instance in enumerate(instances):
        own = slice(place * GRID.size, (place + 1) * GRID.size)
        rows.append(summary(instance, {key: all[:, own] if key != "steps" else all for key, all in traces.items()}))
    means = {column: float(np.mean([row[column] for row in rows])) for column in COLUMNS}
    if family.score_name:
        means[family.score_name] = float(np.mean([row["tuned_score"] for row in rows]))
    return {"mean": means, "instances": rows}


def main() -> None:
    """Prints the figures of each family as it ends and a table of all, and writes everything to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=sorted(FAMILIES), metavar="NAME")
    parser.add_argument("--runs", type=int, default=8, help="instances of each family")
    parser.add_argument("--out", type=Path, help="JSON file for the figures of every instance")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("family", *COLUMNS, "tuned accuracy", title=f"test loss at constant rates, {options.runs} instances")
    console, results = Console(width=None if sys.stdout.isatty() else WIDE), {}  # a file has no width of its own
    for name in options.families:
        results[name] = study(name, options.runs)
        means = results[name]["mean"]
        accuracy = f"{means['accuracy']:.2f}" if "accuracy" in means else ""
        console.print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in means.items()), soft_wrap=True)
        table.add_row(name, *(f"{means[column]:.3g}" for column in COLUMNS), accuracy)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"runs": options.runs, "families": results}, indent=1) + "\n")
    console.print(table)


if __name__ == "__main__":
    main()
