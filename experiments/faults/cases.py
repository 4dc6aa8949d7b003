"""Runs and what befalls them: the same instances undisturbed, with one fault each, and with what a reference does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trimtab.inner_training.disturbances import DISTURBANCES, Event
from trimtab.inner_training.task import Instance, TaskFamily
from trimtab.inner_training.tasks import FAMILIES

STEPS, BATCH = 400, 16  # budget, and examples per step at most, of the runs that faults befall
EARLIEST, LATEST = 0.2, 0.6  # share of the budget at which a fault begins
LASTING = "data-shift"
HARMLESS = ("lost-steps", "slow-steps")  # nothing of them can be undone
RATES = {"sgd": 10.0 ** np.arange(-4, 0.5, 0.5), "adaptive": 10.0 ** np.arange(-5, -0.5, 0.5)}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        instance: what is learned.
        fault: what befalls it; None for nothing.
    """

    instance: Instance
    fault: Event | None = None

    @property
    def events(self) -> tuple[Event, ...]:
        """What the run goes through."""
        return () if self.fault is None else (self.fault,)

    @property
    def undone(self) -> tuple[Event, ...]:
        """What a perfect rollback makes of it: the moment before the fault comes back when it is over.

        Nothing is left of the fault but that its steps are lost, so this is the same run with lost steps in its place.
        """
        if self.fault is None or self.fault.kind == "slow-steps":
            return ()
        return (self.fault._replace(kind="lost-steps", severity=1.0),)

    @property
    def fresh_start(self) -> tuple[Event, ...]:
        """What starting afresh at the fault makes of it: all steps before are lost, and the budget goes on."""
        assert self.fault is not None
        return (Event("lost-steps", 0, self.fault.first, 1.0), self.fault)


def small_batches(name: str) -> TaskFamily:
    """A family of its own that trains on small batches, which is quick."""
    family = FAMILIES[name].factory()
    family.max_batch = min(family.max_batch, BATCH)
    return family


def seeds(runs: int, seed: int) -> list[int]:
    """Seeds of instances."""
    return [int(np.random.SeedSequence([seed, run]).generate_state(1)[0] >> 1) for run in range(runs)]


def shortened(instance: Instance, family: TaskFamily) -> Instance:
    """The instance with the budget of this study, in batches that the family holds."""
    return replace(instance, steps=STEPS, batch_size=min(instance.batch_size, family.max_batch))


def draw_fault(kind: str, run: int, seed: int, steps: int, *, to_the_end: bool = False) -> Event:
    """One fault at a random time, as long and as severe as the kind's own ranges have it.

    Args:
        kind: a name of ``DISTURBANCES``.
        run: which run it is for.
        seed: of the study.
        steps: the budget.
        to_the_end: it lasts.
    """
    rng, entry = np.random.default_rng([seed, run, list(DISTURBANCES).index(kind)]), DISTURBANCES[kind]
    first = int(rng.integers(int(EARLIEST * steps), int(LATEST * steps) + 1))
    length, severity = (float(np.exp(rng.uniform(*np.log(ends)))) for ends in (entry.steps, entry.severity))
    return Event(kind, first, steps - first if to_the_end else round(length), severity)


def faulty(instances: Sequence[Instance], kind: str, seed: int, *, to_the_end: bool = False) -> list[Case]:
    """Every instance with one fault of a kind."""
    return [
        Case(instance, draw_fault(kind, run, seed, instance.steps, to_the_end=to_the_end))
        for run, instance in enumerate(instances)
    ]
