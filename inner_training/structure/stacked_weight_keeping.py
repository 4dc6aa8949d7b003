"""Keepers that hold the weights of runs of a population."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.streams import draw_words
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.maintenance import Method, checked_settings
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.structure.weight_rules import WeightRule, initial_bounds

STREAM, WORD = 0x2B7E1516, 0x7FFFFFFF  # of a run's random words, apart from those that its seed gives elsewhere


class StackedWeightKeeper:
    """Changes gradients of n runs at each step, and weights after it. What is said of ``WeightKeeper`` holds for each run.

    Attributes:
        method: its entry in the table.
        steps: (n,) int64 on the host, how many steps it has taken in of each run.
    """

    def __init__(self, structure: Stacked, method: Method, runs: Tensor, settings: Mapping[str, Any]) -> None:
        """Use ``stacked_keeping.maintain_runs``."""
        assert isinstance(method.rule, WeightRule)
        self.method, self._structure, self._runs = method, structure, runs
        self._rule, population = method.rule, structure.population
        self._bounds = initial_bounds(population.family.module)
        if not self._bounds:
            raise UserError(f"{population.family.name!r} has no weight of a linear layer or a convolution to maintain")
        exact = checked_settings(method, settings)
        for name, value in exact.items():
            if value.ndim and tuple(value.shape) != (len(runs),):
                raise MismatchError(f"{name} has the shape {tuple(value.shape)}; give one number, or ({len(runs)},)")
        self.steps = torch.zeros(len(runs), dtype=torch.int64)
        self._every = exact.pop("every", torch.tensor(1)).expand(len(runs))
        self._settings = {name: value.float().to(runs.device).expand(len(runs)) for name, value in exact.items()}
        self._memory = self._rule.begin(self._values(population._learner.parameters))
        self._before: Tensor | None = None
        if self._rule.steers:
            structure.steered()

    @property
    def rest(self) -> int:
        """Steps that the population may take between ``ahead`` and ``step``."""
        if self._rule.steers or not self._rule.moves:
            return 1
        return int((self._every - self.steps % self._every).min())

    def _values(self, flat: Tensor) -> dict[str, Tensor]:
        """(n, *shape) by name, of what is maintained."""
        views = self._structure.population.layout.views(flat[self._runs])
        return {name: views[name] for name in self._bounds}

    def _drawing(self) -> Draws:
        feed = self._structure.population._feed
        word = draw_words((feed.seed[self._runs] + STREAM) & WORD, feed.step[self._runs] & WORD) & WORD
        return Draws(word, (len(self._runs),), word.device)

    def _begin(self, begun: Tensor) -> None:
        """The runs (n,) bool have not made a step yet: what is remembered of them begins with their values."""
        if bool(begun.any()):
            self.steps[begun] = 0
            fresh = self._rule.begin(self._values(self._structure.population._learner.parameters))
            for name, old in self._memory.items():
                where = begun.to(old.device).view(-1, *[1] * (old.ndim - 1))
                self._memory[name] = torch.where(where, fresh[name], old)

    def _held(self) -> Tensor:
        """(n, P) bool, entries that are held at zero."""
        units = self._structure._units
        held = self._structure._flat.entries(~units.active[self._runs])
        return held | units.masked[self._runs] if units.masked.shape[1] else held

    def ahead(self) -> None:
        """Says how the next gradients are changed; to be called before each stretch of steps."""
        population = self._structure.population
        self._begin(torch.from_numpy(population.steps_done[self._runs.cpu().numpy()] == 0))
        if not self._rule.steers:
            return
        self._before = population._learner.parameters
        values = self._values(self._before)
        factors, terms = self._rule.ahead(values, self._memory, self._settings, self._drawing())
        feed, held = population._feed, self._held()
        for found, into, rest in ((factors, feed.factor, 1.0), (terms, feed.term, 0.0)):
            if found and into is not None:
                row = torch.full_like(into[self._runs], rest)
                for name, view in population.layout.views(row).items():
                    if name in found:
                        view.copy_(found[name])
                into[self._runs] = row.masked_fill_(held, rest)

    def step(self, steps: int = 1) -> None:
        """Takes in steps, and changes the weights if it is time; to be called after each stretch of ``rest`` or less.

        Args:
            steps: that were taken since.
        """
        self.steps = self.steps + steps
        population = self._structure.population
        if self._before is not None:
            slopes = self._values(population._last_gradient)
            self._memory = self._rule.seen(slopes, self._values(self._before), self._memory, self._settings)
            self._before = None
        now = (self.steps % self._every == 0).to(self._runs.device)
        if not self._rule.moves or not bool(now.any()):
            return
        own = population._learner.parameters[self._runs]
        values = {name: view for name, view in population.layout.views(own).items() if name in self._bounds}
        moved = self._rule.moved(values, self._bounds, self._memory, self._settings, self._drawing())
        after = own.clone()
        for name, view in population.layout.views(after).items():
            if name in moved:
                view.copy_(moved[name])
        after = torch.where(self._held() | ~now[:, None], own, after)
        whole = population._learner.parameters.index_copy(0, self._runs, after)
        population._learner = population._learner._replace(parameters=whole)
