"""All runs of one network in one population, from the first step to the last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from experiments.plasticity.arms import ARMS, Run, end_width, widths
from experiments.plasticity.tasks import Continual, Network, Recipe
from torch import Tensor

from trimtab.inner_training.networks.plastic_mlp import PLASTIC_ACTIVATIONS, PlasticMLP
from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.maintenance import MAINTENANCE
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.structure.stacked_keeping import StackedKeeper, kept_on, maintain_runs

EXAMPLES = 160  # that the rank of hidden layers is taken of
DORMANT = 0.025  # of the layer's mean
PAUSE = 10  # steps from one time that units are reset to the next


@dataclass(frozen=True)
class Played:
    """What became of R runs.

    Attributes:
        online: (R, phases) mean accuracy of batches before their steps.
        final: (R,) accuracy on the training examples of the last phase, at its end.
        dormant: (R,) share of the active hidden units whose mean output is at most 0.025 of their layer's, at the end.
        rank: (R,) effective rank of the hidden layers' outputs at the end, mean over layers.
        active: (R,) share of the hidden units that are active at the end.
    """

    online: np.ndarray
    final: np.ndarray
    dormant: np.ndarray
    rank: np.ndarray
    active: np.ndarray


class Arena:
    """A population that plays as many runs as it has, again and again.

    Args:
        network: of all of them.
        phases, steps: phases of a run, and steps of a phase.
        places: runs that are played at once; what is left over is filled with the first of them.
        mode: of the population.
    """

    def __init__(self, network: Network, phases: int, steps: int, places: int, mode: str = "auto") -> None:
        self.family = Continual(phases, steps, network)
        self._runs = Population(self.family, places, mode=mode, clip=False, score=True)  # type: ignore[arg-type]
        self._structure: Stacked | None = None
        if not network.norm:  # whose units cannot be edited
            self._structure = Stacked(self._runs, compile=False)
        module = self.family.module
        self._end = end_width(module.units, module.inputs, module.outputs)

    def play(self, runs: Sequence[Run]) -> Played:
        """Plays the runs, at most as many as there are places."""
        self._given = [*runs, *[runs[0]] * (self._runs.num_runs - len(runs))]
        instances = [self.family.instance(self._recipe(run)) for run in self._given]
        self._runs.reset(range(len(instances)), instances)
        keepers = self._keepers()
        forgets = np.array([ARMS[run.arm].forgets for run in self._given])
        online = []
        for phase in range(self.family.max_phases):
            self._edit(phase)
            if phase:
                self._runs.fire("reset_moments", forgets)
            # The end is measured one step before it, when nobody has begun anew for a phase that never comes.
            scores = [self._advance(keepers, self.family.steps - 1)]
            if phase == self.family.max_phases - 1:
                found = self._measured()
            scores.append(self._advance(keepers, 1))
            online.append(torch.cat(scores).mean(0))
        curve = torch.stack(online, 1).double().numpy()
        return Played(*(one[: len(runs)] for one in (curve, *found)))

    def _recipe(self, run: Run) -> Recipe:
        arm, units = ARMS[run.arm], self.family.module.units
        width = widths(arm, units, self._end, run.edits)[0] if arm.operator else self._end if arm.narrow else None
        decay = run.knob if arm.decays else 0.0
        return Recipe(task=run.task, seed=run.seed, lr=run.rate, rule=arm.rule, weight_decay=decay, width=width)

    def _keepers(self) -> list[StackedKeeper]:
        found = []
        for name, arm in ARMS.items():
            mask = np.array([run.arm == name for run in self._given])
            if arm.settings is None or not mask.any():
                continue
            assert self._structure is not None
            knob = torch.tensor([run.knob for run in self._given if run.arm == name], dtype=torch.float64)
            settings, pause = arm.settings(knob, self.family.steps), 1
            if MAINTENANCE[arm.method].acts_on == "units":
                pause = math.gcd(PAUSE, self.family.steps // 2)
            found.append(maintain_runs(self._structure, arm.method, runs=mask, pause=pause, settings=settings))
        return found

    def _advance(self, keepers: list[StackedKeeper], steps: int) -> Tensor:
        scores = kept_on(self._runs, keepers, steps).scores
        assert scores is not None
        return scores

    # --- Grow and Prune ---------------------------------------------------------------------------------------------

    def _edit(self, phase: int) -> None:
        """The edits that are due before a phase: the first before the second phase, and then one in so many."""
        units, changes = self.family.module.units, np.zeros(len(self._given))
        operators = np.array([ARMS[run.arm].operator for run in self._given])
        for place, run in enumerate(self._given):
            if operators[place] and phase and (phase - 1) % int(run.knob) == 0:
                path, number = widths(ARMS[run.arm], units, self._end, run.edits), (phase - 1) // int(run.knob)
                if number < run.edits:
                    changes[place] = abs(path[number + 1] - path[number]) / (
                        units if operators[place] == "grow" else path[number]
                    )
        if not changes.any():
            return
        assert self._structure is not None
        grows = operators == "grow"
        if (changes * grows).any():
            self._structure.grow(changes * grows, "activation-frequency")
        if (changes * ~grows).any():
            self._structure.prune(changes * ~grows, self._structure.score("magnitude-l1"), scope="layer")
            self._rewind((operators == "prune-rewind") & (changes > 0))

    def _rewind(self, which: np.ndarray) -> None:
        """The active units of the runs get their first weights again, and the optimizer begins anew."""
        first = self._runs.layout.rows([self._first(run) for run in which.nonzero()[0]])
        self._runs.fire("reset_moments", which)
        assert self._structure is not None
        held = self._structure._flat.entries(~self._structure._units.active)
        parameters = self._runs._learner.parameters.clone()
        parameters[torch.from_numpy(which)] = torch.from_numpy(first)
        self._runs._learner = self._runs._learner._replace(parameters=parameters.masked_fill(held, 0.0))

    def _first(self, run: int) -> dict[str, np.ndarray]:
        instance = self._runs.instances[run]
        assert instance is not None
        return dict(instance.parameters)

    # --- at the end -------------------------------------------------------------------------------------------------

    def _measured(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What ``Played`` has of the end."""
        runs, family = self._runs, self.family
        final = runs.evaluate("train", score=True).numpy()
        x = np.stack([family.last_inputs(one, EXAMPLES) for one in runs.instances if one is not None])
        gates = [runs._feed.buffers[f"gate{index}"] for index in range(family.module.depth)]
        outputs = hidden(family.module, runs.layout.views(runs._learner.parameters), gates, torch.from_numpy(x))
        quiet = [one.abs().mean(1) <= DORMANT * _mean(one.abs().mean(1), gate) for one, gate in outputs]
        dormant = torch.stack([_mean(one.float(), gate)[:, 0] for one, (_, gate) in zip(quiet, outputs, strict=True)])
        rank = torch.stack([effective_rank(one) for one, _ in outputs])
        active = torch.stack([gate.mean(1) for gate in gates])
        return final, *(one.mean(0).numpy() for one in (dormant, rank, active))


def _mean(values: Tensor, gate: Tensor) -> Tensor:
    """(R, 1) mean over the open units of values (R, U)."""
    return (values * gate).sum(1, keepdim=True) / gate.sum(1, keepdim=True)


def hidden(module: PlasticMLP, views: dict[str, Tensor], gates: list[Tensor], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Outputs (R, B, U) of each hidden layer and their gates (R, U), with parameters of R runs on inputs (R, B, F)."""
    found, chosen = [], PLASTIC_ACTIVATIONS[module.activation]
    for index, gate in enumerate(gates):
        z = x @ views[f"layers.{index}.weight"].mT + views[f"layers.{index}.bias"][:, None]
        if module.norm:
            open_to = gate[:, None]
            count = open_to.sum(-1, keepdim=True)
            z = z - (z * open_to).sum(-1, keepdim=True) / count
            z = z * torch.rsqrt((z.square() * open_to).sum(-1, keepdim=True) / count + 1e-5)
            z = z * views[f"norms.{index}.weight"][:, None] + views[f"norms.{index}.bias"][:, None]
        both = gate.repeat(1, chosen.outputs)
        x = chosen.function(z) * both[:, None]
        found.append((x, both))
    return found


def effective_rank(outputs: Tensor) -> Tensor:
    """(R,) exp of the entropy of the singular values' shares, of outputs (R, B, U) (Roy & Vetterli, EUSIPCO 2007).

    >>> effective_rank(torch.eye(5)[None]).round().tolist()
    [5.0]
    """
    sizes = torch.linalg.svdvals(outputs)
    shares = sizes / sizes.sum(1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(shares).sum(1).exp()
