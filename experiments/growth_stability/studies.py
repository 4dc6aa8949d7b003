"""Which runs are played on which ground, at which learning rates, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from experiments.growth_stability import measure
from experiments.growth_stability.arena import Arena, Played, Run
from experiments.growth_stability.cells import (
    CONTROLS,
    CYCLES,
    EVENTS,
    GROW,
    INTERVENTIONS,
    MAIN,
    OTHER,
    PRUNE,
    SMOOTH,
    Cell,
)
from experiments.growth_stability.grounds import Ground, head, perceptron

RATES = (0.2, 0.1, 0.05, 0.02, 0.01)  # candidates of every treatment
SWEPT, AGAIN = 100, 1000  # first seed of the sweep's runs, and what retraining adds to a seed
SWEEP_AT = (20, 50, 100)  # compactness of the cells that a rate is chosen by


@dataclass(frozen=True)
class Setting:
    """How large the study is.

    Attributes:
        seeds: runs of each cell.
        swept: runs of each cell and rate of the sweep; twice as many of the dense cell, which is one.
        steps: budget of a run.
        points: accuracies on the way.
        size: runs at once.
        compiled: whether populations are.
        keep: folder of what has been played; None for none.
    """

    seeds: int = 5
    swept: int = 1
    steps: int = 3200
    points: int = 20
    size: int = 8
    compiled: bool = True
    keep: Path | None = None


@dataclass(frozen=True)
class Study:
    """One ground and its cells.

    Attributes:
        ground: makes it.
        cells: in order.
        retrained: whether final networks of the plain arms are trained again from the beginning.
    """

    ground: Callable[[], Ground]
    cells: Sequence[Cell]
    retrained: bool


STUDIES = {
    "head": Study(head, [*MAIN, *CONTROLS, *INTERVENTIONS, *EVENTS], True),
    "perceptron": Study(perceptron, OTHER, True),
    "smooth-leaky": Study(lambda: head("smooth-leaky"), SMOOTH, False),
}


class Arenas:
    """Plays runs of one ground; those with Two-Speed in a small population of their own, whose step has it."""

    def __init__(self, name: str, ground: Ground, setting: Setting) -> None:
        def arena(kind: str, size: int, compiled: bool) -> Arena:
            keep = None if setting.keep is None else setting.keep / f"{name}{kind}-{setting.steps}.jsonl"
            return Arena(ground, setting.steps, setting.points, size, "compile" if compiled else "eager", keep)

        self._usual = arena("", setting.size, setting.compiled)
        self._fast = arena("-fast", setting.seeds, False)

    def play(self, runs: Sequence[Run]) -> list[Played]:
        """What came of the runs, in their order."""
        found: dict[str, Played] = {}
        for arena, chosen in ((self._usual, [one for one in runs if one.cell.speed == 1]),
                              (self._fast, [one for one in runs if one.cell.speed != 1])):  # fmt: skip
            found |= {played.key: played for played in arena.play(chosen)}
        return [found[run.key] for run in runs]


def sweep(arenas: Arenas, cells: Sequence[Cell], setting: Setting) -> dict[str, dict[float, float]]:
    """Mean validation loss at the ends of the five cycles, bounded, by treatment and rate.

    The final loss alone would choose, for weights that are rewound, rates that ruin all cycles but the last, of low rates.
    """
    chosen = [cell for cell in cells if cell.percent in SWEEP_AT and cell.treatment == cell.rated]
    runs = [
        Run(cell, rate, SWEPT + seed)
        for cell in chosen
        for rate in RATES
        for seed in range(setting.swept * (2 if cell.arm == "dense" else 1))
    ]
    losses: dict[str, dict[float, list[float]]] = {}
    for run, played in zip(runs, arenas.play(runs), strict=True):
        loss = float(np.mean(played.val_curve[setting.points // CYCLES - 1 :: setting.points // CYCLES]))
        losses.setdefault(run.cell.treatment, {}).setdefault(run.rate, []).append(loss)
    return {name: {rate: float(np.mean(many)) for rate, many in one.items()} for name, one in losses.items()}


def study(name: str, setting: Setting) -> dict[str, Any]:
    """Plays one study and gives its figures."""
    chosen = STUDIES[name]
    arenas, seeds = Arenas(name, chosen.ground(), setting), range(setting.seeds)
    swept = sweep(arenas, chosen.cells, setting)
    best = {treatment: min(losses, key=losses.__getitem__) for treatment, losses in swept.items()}
    runs = [Run(cell, best[cell.rated], seed) for cell in chosen.cells for seed in seeds]
    played = arenas.play(runs)
    again: dict[str, list[Played]] = {}
    if chosen.retrained:
        plain = [(run, one) for run, one in zip(runs, played, strict=True) if run.cell in MAIN]
        fresh = [replace(run, rate=best["dense"], seed=run.seed + AGAIN, active=one.active) for run, one in plain]
        for run, one in zip(fresh, arenas.play(fresh), strict=True):
            again.setdefault(run.cell.name, []).append(one)
    by_cell: dict[str, list[Played]] = {}
    for run, one in zip(runs, played, strict=True):
        by_cell.setdefault(run.cell.name, []).append(one)
    return {
        "rates": {treatment: {f"{rate:g}": round(loss, 4) for rate, loss in one.items()} for treatment, one in swept.items()},
        "best": best,
        "cells": {cell: measure.figures(many, again.get(cell)) for cell, many in by_cell.items()},
        **compared(by_cell, chosen.cells),
    }  # fmt: skip


def compared(by_cell: Mapping[str, Sequence[Played]], cells: Sequence[Cell]) -> dict[str, Any]:
    """Differences between cells of the same seeds, correlations, and what the picture needs of single runs."""
    against: dict[str, Any] = {}
    for cell in cells:
        for other in _references(cell, by_cell):
            against[f"{cell.name} minus {other}"] = measure.difference(by_cell[cell.name], by_cell[other])
    grown = [cell for cell in cells if cell.arm == "grow"]
    groups = {
        "grow at all compactnesses": [cell for cell in grown if not cell.variant],
        "all of these and all variants": grown,
        "all at 50 %": [cell for cell in grown if cell.percent == 50],
    }
    runs = {name: {cell.name: by_cell[cell.name] for cell in group} for name, group in groups.items()}
    points = [
        [cell.name, round(measure.parity(run, "post"), 4), round(measure.average(run), 4)]
        for cell in grown
        for run in by_cell[cell.name]
    ]
    return {"differences": against, "correlations": measure.correlations(runs), "points": points}


def _references(cell: Cell, known: Mapping[str, Any]) -> list[str]:
    """What a cell is compared with: the dense network, growth for pruning, and the plain arm for its variants."""
    grown = replace(GROW, percent=cell.percent).name
    if cell.arm == "dense":
        return []
    if cell.arm == "prune":
        plain = [] if cell in MAIN else [replace(PRUNE, percent=cell.percent).name]
        return [name for name in ("dense", grown, *plain) if name in known]
    return ["dense"] if not cell.variant else [grown]
