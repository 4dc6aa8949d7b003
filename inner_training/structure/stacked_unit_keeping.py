"""Keepers that reset units of runs of a population."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.inner_training.stepping import Learner
from trimtab.inner_training.structure.collect import made
from trimtab.inner_training.structure.draft import Draft
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.maintenance import Method, checked_settings
from trimtab.inner_training.structure.resetter import Resetter
from trimtab.inner_training.structure.sight import mean_abs
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.structure.stacked_sight import Outputs, StackedSight
from trimtab.inner_training.structure.units import Units


class StackedUnitKeeper:
    """Resets units of n runs when a method says that they are due. What is said of ``UnitKeeper`` holds for each run.

    Attributes:
        method: its entry in the table.
        resets: (n,) int64 by group, how many units have been reset so far.
        rest: steps that the population may take between ``ahead`` and ``step``: each one counts.
    """

    rest = 1

    def __init__(
        self, structure: Stacked, method: Method, runs: Tensor, groups: list[str], options: Mapping[str, Any]
    ) -> None:  # fmt: skip
        """Use ``stacked_keeping.maintain_runs``."""
        self.method, self._structure, self._runs = method, structure, runs
        self._groups = {name: structure._flat[name] for name in groups}
        compensate, settings = options["compensate"], options["settings"]
        self._compensates = method.compensates if compensate is None else bool(compensate)
        self._steps, self._pause = 0, int(options["pause"])
        self._check(settings)
        population = structure.population
        seeds = population._feed.seed[runs]
        self._resetters = {
            name: Resetter(
                method.name, (len(runs), one.units), positions=sum(each for each, _ in one.readers),
                seeds=(seeds + place) % 2**31, device=population.device, settings=settings,
            )
            for place, (name, one) in enumerate(self._groups.items())
        }  # fmt: skip
        self._sight: StackedSight | None = None
        if method.sees_outputs or method.needs:
            every_group = [one.group for one in structure._flat]
            self._sight = StackedSight(population, every_group, groups, method.name)
        self.resets = {name: torch.zeros(len(runs), dtype=torch.int64, device=population.device) for name in groups}
        self._outputs: Outputs = {}
        self._slopes: dict[str, Tensor] = {}
        self._born, self._done = structure._units.born[runs], population.steps_done[runs.cpu().numpy()].copy()

    def _check(self, settings: Mapping[str, Any]) -> None:
        every = checked_settings(self.method, settings).get("every")
        if every is not None and bool((every % self._pause != 0).any()):
            raise UserError(
                f"pause is {self._pause}, but {self.method.name} checks each {int(every.max())} steps; give a divisor of that"
            )
        if self._compensates and not self.method.compensates:
            raise UserError(f"{self.method.name} does not know what units give on average; leave compensate out")
        for name, one in self._groups.items():
            if self._compensates and any(bias is None for _, bias in one.readers):
                raise UserError(f"something that reads {name} has no bias that could compensate; give compensate=False")

    def ahead(self) -> None:
        """Looks at what the units are about to put out, where the method reads that; to be called before each step."""
        self._outputs, self._slopes = {}, {}
        if self._sight is None or not any(one.looks for one in self._resetters.values()):
            return
        active = {name: value[self._runs] for name, value in self._structure.active.items()}
        if "pre_grad" in self.method.needs:
            self._slopes = self._sight.slopes(self._runs, active)
        else:
            self._outputs = self._sight.outputs(self._runs, active)

    def step(self, steps: int = 1) -> None:
        """Takes in the step, and resets the units that are due; to be called after each step.

        Args:
            steps: that were taken since, always 1.
        """
        if steps != 1:
            raise UserError(f"{self.method.name} was told of {steps} steps at once; it counts each one, so step by one")
        units, due = self._structure._units, {}
        born = units.born[self._runs]
        done = self._structure.population.steps_done[self._runs.cpu().numpy()]
        begun = torch.as_tensor(done != self._done + 1, device=born.device)
        for name, resetter in self._resetters.items():
            span = self._groups[name].span
            if bool(begun.any()):
                resetter.restart(begun)
            resetter.renew(born[:, span] != self._born[:, span])
            resetter.observe(self._evidence(name, units.active[self._runs][:, span]), self._outputs.get(name, ()))
            due[name] = resetter.due
        self._done = done.copy()
        self._steps += 1
        which = torch.stack([one.any(1) for one in due.values()]).any(0).nonzero()[:, 0]
        if len(which) and self._steps % self._pause == 0:
            self._renew(which, {name: one[which] for name, one in due.items()})
            for name, resetter in self._resetters.items():
                self.resets[name] += due[name].sum(1)
                resetter.renew()
        self._born = self._structure._units.born[self._runs]

    def _evidence(self, name: str, active: Tensor) -> Evidence:
        fields, one = {"alive": active}, self._groups[name]
        if name in self._slopes:
            fields["pre_grad"] = self._slopes[name]
        if "mean_abs" in self.method.needs and name in self._outputs:
            fields["mean_abs"] = mean_abs(self._outputs[name])
        if "weights_in" in self.method.needs:
            values = self._structure.population._learner.parameters[self._runs]
            fields |= {"weights_in": one.incoming.of(values), "weights_out": one.columns.of(values)}
        return made(fields)

    def _renew(self, which: Tensor, due: Mapping[str, Tensor]) -> None:
        """Units begin anew: of the runs ``which`` (m,) among the keeper's own, (m, U) bool by group."""
        structure, runs = self._structure, self._runs[which]
        learner, units = structure.population._learner, structure._units
        own, held = Learner(*(one[runs] for one in learner)), Units(*(one[runs] for one in units))
        draft = Draft(structure._flat, own, held)
        for name, chosen in due.items() if self._compensates else ():
            means = self._resetters[name].means
            assert means is not None
            draft.compensate(self._groups[name], chosen, means[which])
        for name, chosen in due.items():
            seeds = structure._seeds(self._groups[name])[runs]
            draft.renew(self._groups[name], chosen, Draws(seeds, (len(runs),), chosen.device))
        structure._put_rows(runs, draft)
