"""Rules that reset units, written slowly: one run, one unit at a time, Python's own numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Unit:
    """What is remembered of one unit."""

    age: int = 0
    alive: bool = False
    total: float = 0.0
    worth: float = 0.0
    mean: list[float] = field(default_factory=list)
    silent: int = 0
    threshold: int = 0
    silences: list[int] = field(default_factory=list)


class Slow:
    """The rule of a name over the units of one run; ``step`` gives the numbers of the units that are due."""

    def __init__(self, name: str, units: int, settings: dict[str, float]) -> None:
        self.name, self.settings, self.steps, self.earned, self.spent = name, settings, 0, 0, 0
        self.units = [self.fresh() for _ in range(units)]
        self.due: set[int] = set()

    def fresh(self) -> Unit:
        return Unit(threshold=int(self.settings.get("first", 0)))

    def renew(self, numbers: set[int]) -> None:
        for number in numbers:
            old, new = self.units[number], self.fresh()
            new.alive = old.alive
            if number in self.due:
                self.spent += 1
                new.threshold, new.silences = old.threshold, [*old.silences, old.silent]
            self.units[number] = new
        self.due -= numbers

    def step(self, seen: dict[str, Any]) -> set[int]:
        """``seen`` has ``alive`` [U], ``outputs`` [P][U][K], ``rows`` [U][I], ``columns`` [U][O] and ``slopes`` [U]."""
        self.renew({number for number, unit in enumerate(self.units) if seen["alive"][number] and not unit.alive})
        self.steps += 1
        for number, unit in enumerate(self.units):
            unit.alive = seen["alive"][number]
            unit.age = unit.age + 1 if unit.alive else 0
        rule = {"redo": self.dormant, "grama": self.dormant, "self-normalised": self.silent}.get(
            self.name, self.replaced
        )
        self.due = rule(seen)
        return self.due

    def dormant(self, seen: dict[str, Any]) -> set[int]:
        every, window = self.settings["every"], self.settings["window"]
        place = (self.steps - 1) % every
        for number, unit in enumerate(self.units):
            if place == every - window:
                unit.total = 0.0
            if place >= every - window:
                values = [abs(h) for example in seen["outputs"] for h in example[number]]
                unit.total += sum(values) / len(values) if self.name == "redo" else seen["slopes"][number]
        known = [number for number, unit in enumerate(self.units) if unit.alive and unit.age >= window]
        if place < every - 1 or not known:
            return set()
        mean = sum(self.units[number].total for number in known) / len(known)
        if mean == 0:
            return set(known) if self.name == "redo" else set()
        return {number for number in known if self.units[number].total / mean <= self.settings["threshold"]}

    def replaced(self, seen: dict[str, Any]) -> set[int]:
        utilities = {}
        decay = self.settings["decay"]
        for number, unit in enumerate(self.units):
            outputs = [example[number] for example in seen["outputs"]]
            positions, examples = range(len(outputs[0])), len(outputs)
            now = [sum(h[k] for h in outputs) / examples for k in positions]
            before = unit.mean or [0.0] * len(now)
            if not unit.alive:
                unit.worth, unit.mean = 0.0, [0.0] * len(now)
                continue
            unit.mean = [decay * old + (1 - decay) * new for old, new in zip(before, now, strict=True)]
            start = 1 - decay**unit.age
            strays = [abs(h[k] - unit.mean[k] / start) for h in outputs for k in positions]
            column = sum(map(abs, seen["columns"][number])) / len(seen["columns"][number])
            row = sum(map(abs, seen["rows"][number])) / len(seen["rows"][number])
            unit.worth = decay * unit.worth + (1 - decay) * sum(strays) / len(strays) * column / row
            utilities[number] = unit.worth / start
        mature = [n for n, unit in enumerate(self.units) if unit.alive and unit.age > self.settings["maturity"]]
        self.earned += len(mature)
        owed = math.floor(self.settings["rate"] * self.earned + 1e-9) - self.spent
        return set(sorted(mature, key=lambda n: utilities[n])[: max(min(owed, len(mature) - 1), 0)])

    def means(self) -> list[list[float]]:
        decay = self.settings["decay"]
        return [[m / (1 - decay**unit.age) if unit.age else 0.0 for m in unit.mean] for unit in self.units]

    def silent(self, seen: dict[str, Any]) -> set[int]:
        if self.steps > 1 and (self.steps - 1) % self.settings["window"] == 0:
            for unit in self.units:
                self.renew_threshold(unit)
        due = set()
        for number, unit in enumerate(self.units):
            fired = any(h > 0 for example in seen["outputs"] for h in example[number])
            if not unit.alive:
                unit.silent = 0
            elif not fired:
                unit.silent += 1
            else:
                unit.silences += [unit.silent] if unit.silent else []
                unit.silent = 0
            if unit.alive and unit.silent >= unit.threshold:
                due.add(number)
        return due

    def renew_threshold(self, unit: Unit) -> None:
        longest = int(self.settings["longest"])
        if unit.silences:
            lengths = sorted(min(length, longest) for length in unit.silences)
            at = lengths[math.ceil(self.settings["percentile"] * len(lengths) - 1e-9) - 1]
            wider = min(math.ceil(unit.threshold * self.settings["factor"]), longest)
            unit.threshold = at + 1 if at < unit.threshold else wider
        unit.silences = []
