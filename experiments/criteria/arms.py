"""Pruned networks: trained on, or trained anew, side by side in the slots of one population."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from experiments.criteria.dense import Choice, Dense, Scores, choices
from experiments.criteria.tasks import Task, Widths, begun, narrowed, reordered
from torch import Tensor

from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.task import Instance

SPARSITIES = (0.5, 0.75, 0.9, 0.97)
INTERVAL = 50  # steps between two looks of nobody: it bounds the memory of the telemetry
INHERITED, REWOUND, FRESH = "inherited", "rewound", "fresh"
REWINDERS = ("agf", "random")
FIELDS = ("accuracy before", "accuracy", "loss", "work")


@dataclass(frozen=True)
class Arm:
    """What is done to every dense run.

    Attributes:
        choice: of the units that go.
        sparsity: share of each group's units, or of all, that go.
        start: ``inherited`` weights of the dense run, its initial ones (``rewound``), or ``fresh`` ones.
        full: whether it has the steps of the dense training and of the fine-tuning, or those of the latter alone.
    """

    choice: Choice
    sparsity: float
    start: str = INHERITED
    full: bool = False

    @property
    def key(self) -> str:
        """Name in the results."""
        one = self.choice
        repaired = " repaired" if one.repaired else ""
        draw = f" {one.draw}" if one.draw else ""
        return f"{one.criterion}{draw}{repaired}|{one.scope}|{self.start}|{'full' if self.full else 'short'}|{self.sparsity:g}"


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        instance: what is learned, by a network of so many units in each group.
        widths: of the network.
        gone: units (U,) bool by group that are taken out of it before it begins, where layers have other widths.
    """

    instance: Instance
    widths: Widths
    gone: Mapping[str, Tensor] = field(default_factory=dict)


def arms_of(choice: Choice, sparsity: float) -> list[Arm]:
    """All arms whose units are those of one choice."""
    arms = [Arm(choice, sparsity)]
    if choice.scope != "layer" or choice.repaired or choice.draw:
        return arms
    if choice.criterion in REWINDERS:
        arms.append(Arm(choice, sparsity, REWOUND))
    if choice.criterion == "agf":
        arms += [Arm(choice, sparsity, FRESH), Arm(choice, sparsity, FRESH, True)]
    return arms


@dataclass(frozen=True)
class Plan:
    """How long runs are, and at which rate they begin.

    Attributes:
        seeds: dense runs.
        steps: of the dense training; 0 for those of the task.
        tuning: steps of the fine-tuning; 0 for those of the task.
        rate: learning rate, which falls like a cosine in each of the trainings.
        sparsities: shares of units.
        slots: runs side by side.
    """

    seeds: int
    steps: int
    tuning: int
    rate: float
    sparsities: tuple[float, ...]
    slots: int

    def widths(self, task: Task) -> list[Widths]:
        """Units of each group at every sparsity, where each layer loses its share."""
        return [tuple(max(units - round(share * units), 1) for units in task.widths) for share in self.sparsities]


class Workshop:
    """Makes the runs of arms out of dense ones.

    Args:
        task: of all of them.
        plan: how long runs are.
        dense: trained runs.
    """

    def __init__(self, task: Task, plan: Plan, dense: Dense) -> None:
        self._task, self._plan, self._dense = task, plan, dense
        self._family, self._narrow = task.family(), {widths: task.family(widths) for widths in plan.widths(task)}

    def jobs(self, scores: Scores) -> dict[str, list[Job]]:
        """A job for each seed, by the key of its arm; ``dense`` is the dense run trained on."""
        whole = [self._job(run, one, self._plan.tuning) for run, one in enumerate(self._trained())]
        found = {"dense": whole}
        for choice in choices():
            for sparsity in self._plan.sparsities:
                gone, parameters = scores.chosen(choice, sparsity)
                for arm in arms_of(choice, sparsity):
                    found[arm.key] = [
                        self._of(arm, run, {name: units[run] for name, units in gone.items()}, parameters[run])
                        for run in range(self._plan.seeds)
                    ]
        return found

    def _trained(self) -> list[Instance]:
        own = zip(self._dense.instances[: self._plan.seeds], self._dense.parameters, strict=False)
        return [replace(instance, parameters=arrays(values)) for instance, values in own]

    def _job(self, run: int, start: Instance, steps: int, gone: Mapping[str, Tensor] | None = None) -> Job:
        """A run from a start; its batches are those of the seed, and none of the dense training."""
        seed = reordered(self._dense.instances[run], 2).seed
        widths = tuple(int((~units).sum()) for units in gone.values()) if gone else self._task.widths
        return Job(replace(self._task.recipe(start, self._plan.rate, steps), seed=seed), widths)

    def _of(self, arm: Arm, run: int, gone: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> Job:
        steps = self._plan.tuning + (self._plan.steps if arm.full else 0)
        begin = self._dense.instances[run]
        inherited = replace(begin, parameters=arrays(pruned))
        if arm.choice.scope != "layer":
            return replace(self._job(run, inherited, steps), gone=gone)
        start = narrowed(self._family, begin if arm.start == REWOUND else inherited, gone)
        job = self._job(run, start, steps, gone)
        if arm.start != FRESH:
            return job
        return replace(job, instance=begun(self._narrow[job.widths], job.instance, 500_000 + run))


def arrays(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """On the host."""
    return {name: tensor.numpy() for name, tensor in values.items()}


class Slots:
    """A population of networks of some widths, whose slots play one job after another.

    Args:
        task: of the jobs.
        widths: units of each group.
        slots: runs side by side.
    """

    def __init__(self, task: Task, widths: Widths, slots: int) -> None:
        self._task, self._slots, self._widths = task, slots, widths
        self._population = Population(task.family(widths), slots, rules=(task.rule,), mode="eager", clip=False)
        self._structure = Stacked(self._population) if widths == task.widths else None
        self._work: dict[Widths, float] = {}

    def play(self, jobs: Sequence[Job]) -> np.ndarray:
        """(len(jobs), 4) the fields ``FIELDS`` of jobs of equal length."""
        parts = [self._wave(jobs[begin : begin + self._slots]) for begin in range(0, len(jobs), self._slots)]
        return np.concatenate(parts)

    def _wave(self, jobs: Sequence[Job]) -> np.ndarray:
        population, steps = self._population, jobs[0].instance.steps
        population.reset(range(len(jobs)), [job.instance for job in jobs])
        if self._structure is not None:
            self._structure.remove(self._gone(jobs, self._structure.groups))
        before = self._accuracy()
        for done in range(0, steps, INTERVAL):
            population.advance(min(INTERVAL, steps - done))
        loss = population.family.bounded(population.evaluate("test", self._task.judged).numpy())
        work = [self._share(job) for job in jobs]
        rows = [values[: len(jobs)] for values in (before, self._accuracy(), loss)]
        return np.stack([*rows, work], 1)

    def _gone(self, jobs: Sequence[Job], units: Mapping[str, int]) -> dict[str, Tensor]:
        gone = {name: torch.zeros(self._slots, units[name], dtype=torch.bool) for name in self._task.groups}
        for slot, job in enumerate(jobs):
            for name, own in job.gone.items():
                gone[name][slot] = own
        return gone

    def _share(self, job: Job) -> float:
        """Of the multiplications of the dense network."""
        lost = [int(job.gone[name].sum()) if job.gone else 0 for name in self._task.groups]
        widths = tuple(width - less for width, less in zip(self._widths, lost, strict=True))
        if widths not in self._work:
            self._work[widths] = self._task.multiplications(widths) / self._task.multiplications(self._task.widths)
        return self._work[widths]

    def _accuracy(self) -> np.ndarray:
        values: np.ndarray = self._population.evaluate("test", self._task.judged, score=True).numpy()
        return values
