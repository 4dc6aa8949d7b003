"""What a constant learning rate makes of a family's held-out runs, for tests that a family can be learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import OptimizerSettings
from trimtab.inner_training.tasks import make_family


class Learned(tuple[float, ...]):
    """Geometric mean of the bounded test loss after training with each rate, and before it, as ``initial``."""

    initial: float


def learned(name: str, rule: str, rates: Sequence[float], *, steps: int, instances: int = 8) -> Learned:
    """Trains the same held-out instances with each rate, without a schedule or decay."""
    family = make_family(name)
    drawn = [family.draw(seed, held_out=True) for seed in range(instances)]
    runs = [
        replace(one, optimizer=OptimizerSettings(rule=rule, lr=rate), schedule=BaseSchedule())
        for rate in rates
        for one in drawn
    ]
    population = Population(family, len(runs), rules=(rule,), mode="eager")
    population.reset(range(len(runs)), runs)

    def means() -> np.ndarray:
        loss = family.bounded(population.evaluate("test").double().numpy())
        return np.exp(np.log(loss).reshape(len(rates), instances).mean(1))

    before = means()
    population.advance(steps)
    result = Learned(means().tolist())
    result.initial = float(before[0])
    return result
