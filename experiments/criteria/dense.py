"""Dense runs: trained once for each seed, looked at on the way, and scored by every criterion at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from experiments.criteria.tasks import Task, reordered
from torch import Tensor

from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.criteria import CRITERIA
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.normalisations import NORMALISATIONS
from trimtab.inner_training.structure.selections import dynamic_range, jaccard, kept, rank_correlation
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.task import Instance

FEW, MANY = 10, 100  # calibration batches
SAME = {
    "agf-first": "agf",
    "lamp": "magnitude",
}  # the same selection in each layer, from these batches or by its formula
MOMENTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)  # shares of the dense training


def compared() -> list[str]:
    """Criteria whose selections in each layer differ, ``random`` first."""
    return [name for name in CRITERIA if name not in SAME]


def tuned(task: Task, steps: int, runs: int = 2) -> dict[float, float]:
    """Mean final validation loss of instances of training at every rate of the task."""
    family = task.family()
    instances = task.instances(family, runs, 0, held_out=False)
    given = [task.recipe(one, rate, steps) for rate in task.rates for one in instances]
    population = Population(family, len(given), rules=(task.rule,), mode="eager", clip=False)
    population.reset(range(len(given)), given)
    population.advance(steps)
    losses = population.evaluate("validation").numpy().reshape(len(task.rates), runs)
    means = np.where(np.isfinite(losses), losses, np.inf).mean(1)
    return dict(zip(task.rates, means.tolist(), strict=True))


class Calibrator:
    """Looks at networks with batches of their own, larger than those of the steps.

    Args:
        task: of the networks.
        count: networks at a time.
    """

    def __init__(self, task: Task, count: int) -> None:
        self.task, self.count = task, count
        self.family = task.family(batch=task.calibration)
        self.population = Population(self.family, count, rules=(task.rule,), mode="eager", clip=False)
        self.structure = Stacked(self.population, compile=False)

    def show(self, instances: Sequence[Instance], parameters: Sequence[Mapping[str, Tensor]], number: int) -> None:
        """Puts networks in; calibration draws of other numbers see other batches."""
        given = [
            replace(
                reordered(one, 10_000 + number),
                parameters={name: tensor.numpy() for name, tensor in values.items()},
                batch_size=min(self.task.calibration, one.sizes[0]),
            )
            for one, values in zip(instances, parameters, strict=True)
        ]
        self.population.reset(range(self.count), given)

    def evidence(self, needs: frozenset[str], batches: int = FEW) -> dict[str, Evidence]:
        """Evidence (N, ...) of the task's groups."""
        return self.structure.evidence(needs, batches=batches, groups=self.task.groups)

    def utilities(self) -> tuple[Tensor, Tensor]:
        """(N, T) scores of all units by ``agf`` and by ``magnitude``, group after group."""
        evidence = self.evidence(CRITERIA["agf"].needs | CRITERIA["magnitude"].needs)
        found = (self.structure.score(name, evidence=evidence) for name in ("agf", "magnitude"))
        one, two = (torch.cat(list(scores.values()), 1) for scores in found)
        return one, two

    def sizes(self) -> list[int]:
        """Units of each of the task's groups."""
        return [self.structure.groups[name] for name in self.task.groups]


@dataclass(frozen=True)
class Dense:
    """Dense runs after their training; the second half are the first ones with other batches, from the same initial values.

    Attributes:
        instances: (2 S) of them, with their initial values.
        parameters: trained ones.
        history: by name (M, S), along the training, of the first half.
    """

    instances: list[Instance]
    parameters: list[dict[str, Tensor]]
    history: dict[str, np.ndarray]


def trained(task: Task, calibrator: Calibrator, seeds: int, rate: float, steps: int) -> Dense:
    """Trains ``seeds`` dense runs and their twins."""
    family = task.family()
    own = [task.recipe(one, rate, steps) for one in task.instances(family, seeds, 0, held_out=True)]
    instances = [*own, *(reordered(one, 1) for one in own)]
    population = Population(family, len(instances), rules=(task.rule,), mode="eager", clip=False)
    population.reset(range(len(instances)), instances)
    rows, done = [], 0
    for share in MOMENTS:
        if round(share * steps) > done:
            population.advance(round(share * steps) - done)
            done = round(share * steps)
        now = [population.parameters_of(run) for run in range(len(instances))]
        calibrator.show(instances, now, 0)
        rows.append(_noted(calibrator, population, seeds))
    history = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Dense(instances, now, history)


def _noted(calibrator: Calibrator, population: Population, seeds: int) -> dict[str, np.ndarray]:
    agf, size = calibrator.utilities()
    layers = list(zip(agf.split(calibrator.sizes(), 1), size.split(calibrator.sizes(), 1), strict=True))
    found = {
        "range": dynamic_range(agf),
        "layer range": torch.stack([dynamic_range(one) for one, _ in layers]).log().mean(0).exp(),
        "magnitude range": dynamic_range(size),
        "correlation": torch.stack([rank_correlation(one, two) for one, two in layers]).mean(0),
        "train loss": population.evaluate("train", 256),
        "validation loss": population.evaluate("validation"),
    }  # fmt: skip
    return {name: values[:seeds].double().numpy() for name, values in found.items()}


@dataclass(frozen=True)
class Choice:
    """How units are chosen.

    Attributes:
        criterion: name of a criterion, with ``agf-100`` for ``agf`` of a hundred batches.
        scope: ``layer``, or the normalisation under which all layers compare.
        draw: which draw of ``random``.
        repaired: whether what reads the units makes up for them by least squares.
    """

    criterion: str
    scope: str = "layer"
    draw: int = 0
    repaired: bool = False


GLOBAL = (("agf", "none"), ("agf", "mean"), ("agf", "fisher"), ("magnitude", "none"))
RANDOM_DRAWS = 3


def choices() -> list[Choice]:
    """Every way of choosing that is trained."""
    return [
        *(Choice(name) for name in compared()),
        Choice("agf-100"),
        *(Choice("random", draw=draw) for draw in range(1, RANDOM_DRAWS)),
        Choice("obs", repaired=True),
        Choice("random", repaired=True),
        *(Choice(name, scope) for name, scope in GLOBAL),
    ]


class Scores:
    """Scores of the networks in a calibrator by every criterion, from one calibration draw.

    Attributes:
        unavailable: by criterion, why a population cannot gather its evidence.
    """

    def __init__(self, calibrator: Calibrator, *, many: bool) -> None:
        self._calibrator, self._structure = calibrator, calibrator.structure
        needs = {need for name in compared() for need in CRITERIA[name].needs} | NORMALISATIONS["fisher"].needs
        self.evidence = calibrator.evidence(frozenset(needs | {"output_cov"}))
        self._many = calibrator.evidence(frozenset({"agf"}), MANY) if many else {}

    def of(self, choice: Choice) -> dict[str, Tensor]:
        """(N, U) by group."""
        normalisation = "none" if choice.scope == "layer" else choice.scope
        if choice.criterion == "random":
            draws = torch.Generator().manual_seed(7 + choice.draw + 100 * (choice.scope != "layer"))
            return {name: CRITERIA["random"].score(one, draws) for name, one in self.evidence.items()}
        if choice.criterion == "agf-100":
            return {name: one.read("agf") for name, one in self._many.items()}
        return self._structure.score(choice.criterion, normalisation=normalisation, evidence=self.evidence)

    def chosen(self, choice: Choice, sparsity: float) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Units (N, U) bool by group that go at a sparsity, and the parameters (N) of the networks without them."""
        structure, population = self._structure, self._calibrator.population
        scope = "layer" if choice.scope == "layer" else "global"
        evidence = self.evidence if choice.repaired else None
        edit = structure.prune(sparsity, self.of(choice), scope=scope, repair=evidence)
        gone = {name: ~structure.active[name] for name in self._calibrator.task.groups}
        parameters = [population.parameters_of(run) for run in range(population.num_runs)]
        edit.undo()
        return gone, parameters


def agreement(first: Mapping[str, Tensor], second: Mapping[str, Tensor], sparsity: float) -> Tensor:
    """(N,) mean over groups of the Jaccard index of the units that two scores keep in each layer."""
    found = []
    for name, scores in first.items():
        units = scores.shape[1]
        stay = max(units - round(sparsity * units), 1)
        found.append(jaccard(kept(scores, stay), kept(second[name], stay)))
    return torch.stack(found).mean(0)
