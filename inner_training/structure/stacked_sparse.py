"""Sparse training of all runs of a population: which weights live, chosen at the start and changed while they train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.feeding import place_of
from trimtab.inner_training.population import Population
from trimtab.inner_training.stepping import renewal, served, stacked_gradients
from trimtab.inner_training.structure.densities import resolve_distribution
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.sparse_methods import (
    Layers,
    Masks,
    Timetable,
    first_masks,
    sparse_layers,
    updated_masks,
)
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.structure.stacked_choice import check_runs
from trimtab.inner_training.structure.stacked_edit import StackedEdit


def dense_gradient(population: Population) -> Masks:
    """(N, *shape) by parameter: gradient on the batch that each run trains on next, of masked weights too."""
    feed, family, layout = population._feed, population.family, population.layout
    place = place_of(feed)
    views = layout.views(renewal(family, layout)(population._learner.parameters, place))
    found: Masks
    found, _ = stacked_gradients(family)(views, feed.buffers, *served(family, feed, place, population._inputs, None))
    return found


class SparseTraining:
    """Keeps the runs of a population sparse, each by a method and with settings of its own.

    The first masks are set at once. Call ``update`` after each ``population.advance``, and ``begin`` for runs that have been
    reset. Nothing here waits for the device. What a run gets depends on its own stream alone.

    Args:
        structure: of the population. Weights of inactive units do not count.
        methods: name from the table of sparse training, one for all runs or one for each.
        distribution: name from the table of distributions: how the density is shared out among layers.
        layers: names of parameters; None for the weights of linear layers and convolutions.
        masks: bool (N, *shape) by layer, which weights live first; None draws them.
        settings: of the methods, by name, one value for all runs or (N,).

    Attributes:
        structure: whose masks are set.
        layers: names of the parameters.
        timetable: what the runs do when.

    Raises:
        UserError: an unknown name, or a value or mask that does not fit.
    """

    def __init__(
        self,
        structure: Stacked,
        methods: str | Sequence[str] = "rigl",
        *,
        distribution: str = "erk",
        layers: Iterable[str] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        **settings: Any,
    ) -> None:
        runs = structure.population
        names = [methods] * runs.num_runs if isinstance(methods, str) else list(methods)
        if len(names) != runs.num_runs:
            raise MismatchError(f"there are {len(names)} methods; give one, or one for each of {runs.num_runs} runs")
        self.structure, self.timetable = structure, Timetable(names, settings)
        self.layers = sparse_layers(runs.family.module, runs.layout.shapes, layers)
        resolve_distribution(distribution)
        self._distribution = distribution
        self._outputs = frozenset(
            member.parameter
            for one in structure._flat
            for member in one.group.of_role("row")
            if member.axis == 0 and member.parameter in self.layers
        )
        self._seen = np.zeros(runs.num_runs, dtype=np.int64)
        self.begin(masks=masks)

    def begin(self, runs: np.ndarray | None = None, masks: Mapping[str, Tensor] | None = None) -> StackedEdit:
        """Sets the first masks of runs: of the density that each is to have, or none where pruning comes gradually.

        Args:
            runs: mask (N,) bool; None for all.
            masks: bool (N, *shape) by layer; None draws them.

        Raises:
            UserError: masks that do not fit.
        """
        chosen, population = check_runs(runs, self.structure.population.num_runs), self.structure.population
        if masks is None:
            exists = self._exists()
            density = torch.from_numpy(self.timetable.begin_density.astype(np.float32)).to(population.device)
            drawn = first_masks(exists, density, self._distribution, self._draws())
            # Units of dense runs that wake later are dense too.
            masks = {name: one | (~exists[name] & _beside(density >= 1, one)) for name, one in drawn.items()}
        elif set(masks) != set(self.layers):
            raise MismatchError(f"the masks are of {', '.join(sorted(masks))}; give those of {', '.join(self.layers)}")
        edit = self.structure.mask(masks, runs=chosen)
        self._seen = np.where(chosen, population.steps_done, self._seen)
        return edit

    def update(self) -> StackedEdit | None:
        """Changes which weights live in the runs for which it is time; None where it is for none.

        The number of live weights of each layer stays exactly as it is, or falls to what the schedule of pruning says.
        Gradients are those of the batch that each run trains on next.

        Raises:
            UserError: a run has been reset and not begun anew.
        """
        population, structure = self.structure.population, self.structure
        before, now = self._seen, population.steps_done.copy()
        if (now < before).any():
            again = np.flatnonzero(now < before).tolist()
            raise UserError(f"runs {again} have been reset; call begin for them, right after the reset")
        self._seen = now
        plan = self.timetable.plan(before, now, population.total_steps)
        if plan is None:
            return None
        layers, masks = self._state()
        slopes = dense_gradient(population) if plan.share[plan.gradient].any() else None
        found = updated_masks(layers, plan, slopes, self._distribution, self._draws(), self._outputs)
        found = {name: torch.where(layers.exists[name], one, masks[name]) for name, one in found.items()}
        return structure.mask(found, runs=plan.due)

    @property
    def counts(self) -> dict[str, Tensor]:
        """(N,) int64 live weights by layer, without those of inactive units."""
        return {name: live.flatten(1).sum(1) for name, live in self._state()[0].live.items()}

    @property
    def density(self) -> Tensor:
        """(N,) float32 share of the weights of all layers that lives, of those that are not of inactive units."""
        exists = self._exists()
        live = torch.stack([*self.counts.values()]).sum(0)
        return live / torch.stack([one.flatten(1).sum(1) for one in exists.values()]).sum(0)

    def _draws(self) -> Draws:
        runs = self.structure.population
        return Draws(self.structure._seeds_of(self.structure._units.edits), (runs.num_runs,), runs.device)

    def _exists(self) -> Masks:
        structure = self.structure
        views = structure.population.layout.views(~structure._flat.entries(~structure._units.active))
        return {name: views[name] for name in self.layers}

    def _state(self) -> tuple[Layers, Masks]:
        """What there is, and the masks as they are set."""
        runs, exists, masks = self.structure.population, self._exists(), self.structure.masks
        weights = runs.layout.views(runs._learner.parameters)
        live = {name: masks[name] & one for name, one in exists.items()}
        return Layers(live, exists, {name: weights[name] for name in self.layers}), masks


def _beside(values: Tensor, other: Tensor) -> Tensor:
    return values.view(-1, *[1] * (other.ndim - 1))
