"""Maintenance of runs of a population: each keeper has runs of its own, and settings for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trimtab.errors import UserError, check_whole
from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.maintenance import resolve_maintenance
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.structure.stacked_choice import check_runs
from trimtab.inner_training.structure.stacked_unit_keeping import StackedUnitKeeper
from trimtab.inner_training.structure.stacked_weight_keeping import StackedWeightKeeper
from trimtab.inner_training.telemetry import Telemetry

StackedKeeper = StackedUnitKeeper | StackedWeightKeeper


def maintain_runs(
    structure: Stacked,
    name: str,
    *,
    runs: np.ndarray | None = None,
    groups: Iterable[str] | None = None,
    compensate: bool | None = None,
    pause: int = 1,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> StackedKeeper:
    """Keeps runs of a population able to learn, by a method of the table of maintenance; ``kept_on`` trains with it.

    A run may have several keepers, each of another method.

    Args:
        structure: of the population.
        name: of the method.
        runs: mask (N,) bool of the n runs that are maintained; None for all.
        groups: whose units are reset; None for all. For methods that act on units.
        compensate: whether biases make up for what units gave; None is what the method does. For methods that act on units.
        pause: steps from one time that units are reset to the next; what is due in between waits, as long as it is due. An
            edit of a few runs costs about as much as a step of all of them. For methods that act on units.
        settings, more: of the method, by name, instead of their defaults: numbers, or tensors (n,) with one for each run.

    Raises:
        UserError: a name is unknown, a setting is out of its range, or the method does not work on this population.
    """
    method = resolve_maintenance(name)
    chosen = torch.from_numpy(check_runs(runs, structure.population.num_runs).nonzero()[0])
    if not len(chosen):
        raise UserError("the mask of the runs is empty; name at least one run to maintain")
    index, given = chosen.to(structure.population.device), {**(settings or {}), **more}
    if method.acts_on == "weights":
        if groups is not None or compensate is not None or pause != 1:
            raise UserError(f"{name} acts on weights; leave groups, compensate and pause out")
        return StackedWeightKeeper(structure, method, index, given)
    check_whole("pause", pause, 1)
    options = {"compensate": compensate, "pause": pause, "settings": given}
    return StackedUnitKeeper(structure, method, index, structure._named(groups), options)


def kept_on(population: Population, keepers: Sequence[StackedKeeper], steps: int) -> Telemetry:
    """Trains every run for ``steps`` >= 1 steps, as ``Population.advance`` does, with the keepers at work.

    The population advances by stretches, at the end of which a keeper has something to do: by single steps for methods
    that look at units or change gradients. Losses and scores are of all steps, the rest of the last stretch.
    """
    check_whole("steps", steps, 1)
    parts: list[Telemetry] = []
    left = steps
    while left:
        stretch = min([left, *(keeper.rest for keeper in keepers)])
        for keeper in keepers:
            keeper.ahead()
        parts.append(population.advance(stretch))
        for keeper in keepers:
            keeper.step(stretch)
        left -= stretch
    scores = [part.scores for part in parts if part.scores is not None]
    losses = torch.cat([part.losses for part in parts])
    return replace(parts[-1], losses=losses, scores=torch.cat(scores) if scores else None)
