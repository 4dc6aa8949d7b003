"""Plays runs of the study, many at once: trains, edits at the ends of cycles, and notes accuracies and parities."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments.growth_stability.cells import FAST, Cell, plan
from experiments.growth_stability.grounds import Ground

from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule, factor
from trimtab.inner_training.stepping import Mode
from trimtab.inner_training.structure.stacked import Stacked

COSINE = BaseSchedule(kind="cosine")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        cell: how its units are treated.
        rate: initial learning rate.
        seed: of its initial values and of the order of its examples.
        active: by group, the units that it keeps from its first step on, without edits; None for the cell's edits.
    """

    cell: Cell
    rate: float
    seed: int
    active: dict[str, list[int]] | None = None

    @property
    def key(self) -> str:
        """Tells runs of one ground apart."""
        return f"{self.cell.name} | {self.rate:g} | {self.seed}{'' if self.active is None else ' | retrained'}"


@dataclass
class Played:
    """What came of a run.

    Attributes:
        key: of the run.
        curve: test accuracy at equal distances through the budget, the last one at its end.
        val_curve: validation loss at the same points, bounded.
        val_accuracy: at the end.
        units: active in a layer at the end.
        active: by group, the units that are active at the end.
        post, exit: at each edit and at the end of the cycle that it begins, log gradient and log activation parity; of the last
            edit's newborns ``exit`` is the end of the run.
        shock: rise of the validation loss at each edit.
    """

    key: str
    curve: list[float] = field(default_factory=list)
    val_curve: list[float] = field(default_factory=list)
    val_accuracy: float = np.nan
    units: int = 0
    active: dict[str, list[int]] = field(default_factory=dict)
    post: list[list[float]] = field(default_factory=list)
    exit: list[list[float]] = field(default_factory=list)
    shock: list[float] = field(default_factory=list)


class Arena:
    """One population on one ground, used again and again.

    Args:
        ground: what is learned.
        steps: budget of each run, in steps.
        points: accuracies noted on the way; a multiple of the cycles of every cell, and a divisor of ``steps``.
        size: runs at once.
        mode: of the population.
        keep: file of lines of JSON in which runs that were played are kept; None for none.
    """

    def __init__(
        self, ground: Ground, steps: int, points: int, size: int, mode: Mode = "compile", keep: Path | None = None
    ) -> None:
        self.ground, self.steps, self.points, self.size = ground, steps, points, size
        self._mode, self._keep = mode, keep
        self._made: tuple[Population, Stacked] | None = None
        self._known: dict[str, Played] = {}
        if keep is not None and keep.exists():
            self._known = {one["key"]: Played(**one) for one in map(json.loads, keep.read_text().splitlines())}

    def play(self, runs: Iterable[Run], note: Callable[[str], None] = print) -> list[Played]:
        """Plays the runs that are not known yet, and returns what came of all."""
        wanted = list(runs)
        missing = [run for run in dict.fromkeys(wanted_keys(wanted)) if run not in self._known]
        todo = {run.key: run for run in wanted if run.key in missing}
        for begin in range(0, len(todo), self.size):
            part = list(todo.values())[begin : begin + self.size]
            for played in self._play(part):
                self._known[played.key] = played
                if self._keep is not None:
                    self._keep.parent.mkdir(parents=True, exist_ok=True)
                    with self._keep.open("a") as file:
                        file.write(json.dumps(asdict(played)) + "\n")
            note(f"{self.ground.family.name}: {begin + len(part)} of {len(todo)} runs")
        return [self._known[run.key] for run in wanted]

    def _population(self) -> tuple[Population, Stacked]:
        if self._made is None:
            runs = Population(self.ground.family, self.size, rules=("sgd",), mode=self._mode, clip=False)
            self._made = runs, Stacked(runs, compile=False)
        return self._made

    def _play(self, part: list[Run]) -> list[Played]:
        population, structure = self._population()
        padded = [*part, *[part[-1]] * (self.size - len(part))]
        game = _Game(self, padded, population, structure)
        with torch.no_grad():
            game.begin()
            for point in range(self.points):
                game.train()
                game.edit(point + 1)
        return game.played[: len(part)]


def wanted_keys(runs: Iterable[Run]) -> Iterator[str]:
    """The keys of runs, in order."""
    return (run.key for run in runs)


class _Game:
    """A population's worth of runs, from beginning to end."""

    def __init__(self, arena: Arena, runs: list[Run], population: Population, structure: Stacked) -> None:
        self.arena, self.runs, self.population, self.structure = arena, runs, population, structure
        self.played = [Played(run.key) for run in runs]
        self.plans = [plan(run.cell, *arena.ground.sizes) for run in runs]
        self.edited = np.zeros(len(runs), dtype=bool)  # those with newborns whose parity is to be noted

    def begin(self) -> None:
        """Starts all runs with the units that they begin with."""
        ground, size = self.arena.ground, len(self.runs)
        instances = [ground.instance(run.seed, run.rate, self.arena.steps) for run in self.runs]
        self.population.reset(range(size), instances)
        speeds = np.array([run.cell.speed for run in self.runs])
        if (speeds != 1).any():
            window = max(1, round(FAST * self.arena.steps / max(run.cell.cycles for run in self.runs)))
            self.structure.two_speed(speeds, window)
        gone = {}
        for name, units in self.structure.groups.items():
            stay = torch.zeros(size, units, dtype=torch.bool)
            for run, one in enumerate(self.runs):
                stay[run, range(self.plans[run][0]) if one.active is None else one.active[name]] = True
            gone[name] = ~stay
        self.structure.remove(gone)

    def train(self) -> None:
        """Trains to the next point, and notes losses and accuracies there."""
        self.population.set_lr_multiplier(self._factors(len(self.played[0].curve)))
        self.population.advance(self.arena.steps // self.arena.points)
        for one, value in zip(self.played, self.population.evaluate("test", score=True).tolist(), strict=True):
            one.curve.append(round(value, 5))
        losses = self.arena.ground.family.bounded(self.population.evaluate("validation").double().numpy())
        for one, value in zip(self.played, losses.tolist(), strict=True):
            one.val_curve.append(round(value, 5))

    def _factors(self, point: int) -> np.ndarray:
        """(N,) factors on the scheduled rate up to the next point, by its mean there; 1 where one cosine spans all cycles."""
        inside = (point + np.linspace(0, 1, 33)) / self.arena.points
        whole = factor(COSINE, inside, 1.0).mean()
        anew = [
            factor(COSINE, np.clip(inside * run.cell.cycles - point * run.cell.cycles // self.arena.points, 0, 1), 1.0)
            for run in self.runs
        ]
        wanted = [run.cell.anew and run.active is None for run in self.runs]
        return np.where(wanted, [one.mean() / whole for one in anew], 1.0)

    def edit(self, point: int) -> None:
        """Ends the cycles that end at a point, and begins the next ones."""
        passed = [point * run.cell.cycles / self.arena.points for run in self.runs]
        ends = np.array(
            [whole == int(whole) and run.active is None for whole, run in zip(passed, self.runs, strict=True)]
        )
        last = point == self.arena.points
        if (ends & self.edited).any():
            self._note("exit", ends & self.edited)
        if last:
            self._end()
            return
        due = ends & np.array([run.cell.arm != "dense" for run in self.runs])
        if not due.any():
            return
        before = self.population.evaluate("validation")
        wanted = np.array(
            [plan[min(int(whole), len(plan) - 1)] for whole, plan in zip(passed, self.plans, strict=True)]
        )
        self._prune(due, wanted)
        self._grow(due, wanted)
        rewound = due & np.array([run.cell.rewinds for run in self.runs])
        if rewound.any():
            self.structure.rewind(runs=rewound)
        rise = (self.population.evaluate("validation") - before).tolist()
        for run in np.flatnonzero(due):
            self.played[run].shock.append(round(rise[run], 5))
        self.edited |= due & np.array([run.cell.arm == "grow" for run in self.runs])
        if (due & self.edited).any():
            self._note("post", due & self.edited)

    def _active(self) -> np.ndarray:
        """(N,) units that are active in the first layer; all layers have as many."""
        return next(iter(self.structure.active.values())).sum(1).numpy()

    def _prune(self, due: np.ndarray, wanted: np.ndarray) -> None:
        runs = due & np.array([run.cell.arm == "prune" for run in self.runs])
        if runs.any():
            now = self._active()
            shares = np.where(runs, (now - wanted) / now, 0.0)
            self.structure.prune(shares, self.structure.score("magnitude-l1"), scope="layer", runs=runs)

    def _grow(self, due: np.ndarray, wanted: np.ndarray) -> None:
        ways = [(run.cell.method, run.cell.newborn_state, run.cell.scale) for run in self.runs]
        growing = due & np.array([run.cell.arm == "grow" for run in self.runs])
        shares = np.where(growing, (wanted - self._active()) / self.arena.ground.sizes[1], 0.0)
        for way in dict.fromkeys(way for way, now in zip(ways, growing, strict=True) if now):
            runs = growing & np.array([one == way for one in ways])
            method, state, scale = way
            self.structure.grow(shares, method, newborn_state=state, scale=scale, runs=runs)

    def _note(self, moment: str, runs: np.ndarray) -> None:
        found = self.structure.diagnostics()
        values = [found[f"log_{what}_parity"].tolist() for what in ("gradient", "activation")]
        for run in np.flatnonzero(runs):
            getattr(self.played[run], moment).append([round(one[run], 5) for one in values])

    def _end(self) -> None:
        scores = self.population.evaluate("validation", score=True).tolist()
        active: dict[str, Any] = {name: units.numpy() for name, units in self.structure.active.items()}
        for run, one in enumerate(self.played):
            one.val_accuracy = round(scores[run], 5)
            one.active = {name: np.flatnonzero(units[run]).tolist() for name, units in active.items()}
            one.units = len(next(iter(one.active.values())))
