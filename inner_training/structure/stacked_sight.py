"""What units of some runs of a population put out at their next step, and what gradient they get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from trimtab.inner_training.feeding import feed_of, place_of
from trimtab.inner_training.population import Population
from trimtab.inner_training.stateless import stateless
from trimtab.inner_training.stepping import renewal, served
from trimtab.inner_training.structure.groups import Group, Member
from trimtab.inner_training.structure.stacked_fields import Batch, Gathering, RunFields, State
from trimtab.inner_training.structure.taps import Seen, Site, Taps, tapped

Outputs = dict[str, tuple[Tensor, ...]]


class StackedSight:
    """Looks at the batch that runs train on next, with the parameters that they have.

    Args:
        population: of the runs.
        groups: all groups of its module, see ``Stacked``.
        names: of those that are looked at.
        why: who looks, for messages.

    Raises:
        UserError: activations of a group cannot be seen.
    """

    def __init__(self, population: Population, groups: Sequence[Group], names: Sequence[str], why: str) -> None:
        self._runs = population
        self._gathering = Gathering(population.family, tuple(groups), tuple(names), frozenset(("pre_grad",)), why)
        self._gathering.check()
        self._renewed = renewal(population.family, population.layout)
        self._slopes: RunFields | None = None

    def outputs(self, runs: Tensor, active: dict[str, Tensor]) -> Outputs:
        """What is read of the units, (n, P, U, k) for each column, as ``Resetter.observe`` takes it.

        Args:
            runs: (n,) numbers.
            active: (n, U) bool by group.
        """
        state, batch = self._next(runs, active)
        # Slots beyond a run's own batch hold further examples: they see the batch's again.
        own = torch.arange(batch.x.shape[1], device=runs.device)[None] % self._runs._feed.batch[runs][:, None]
        x = batch.x[torch.arange(len(runs), device=runs.device)[:, None], own]
        sites: list[Site] = []
        module, call = self._runs.family.module, stateless(self._runs.family.module)

        def reads(parameters: Any, buffers: Any, active: Any, x: Tensor) -> list[Tensor]:
            seen = Seen()
            with tapped(module, self._gathering.groups, (), Taps(active, {}, seen)):
                call(parameters, buffers, x)
            sites[:] = seen.sites
            return seen.reads

        with torch.no_grad():
            found = vmap(reads)(state.parameters, state.buffers, state.active, x)
        of_column: dict[int, list[Tensor]] = {}
        for site, values in zip(sites, found, strict=True):
            of_column.setdefault(id(site.member), []).append(_of_units(values, site.member, site.axis))
        return {
            group.name: tuple(_together(of_column.get(id(one), []), one, x) for one in group.of_role("column"))
            for group in self._gathering.chosen
        }

    def slopes(self, runs: Tensor, active: dict[str, Tensor]) -> dict[str, Tensor]:
        """(n, U) E|dL/dz| by group; arguments as of ``outputs``."""
        state, batch = self._next(runs, active)
        if self._slopes is None:
            self._slopes = RunFields(self._gathering, batch)
        return {name: fields["pre_grad"] for name, fields in self._slopes.fields(state, batch).items()}

    def _next(self, runs: Tensor, active: dict[str, Tensor]) -> tuple[State, Batch]:
        population = self._runs
        feed = feed_of(population._feed, runs)
        place = place_of(feed)
        values = self._renewed(population._learner.parameters[runs], place)
        state = State(population.layout.views(values), feed.buffers, active, feed.seed)
        return state, Batch(*served(population.family, feed, place, population._inputs, None))


def _of_units(values: Tensor, member: Member, axis: int) -> Tensor:
    """(n, P, U, k) of what a column read, (n, ..., features, ...)."""
    index = member.index.to(values.device)
    flat = values.movedim(axis, -1).flatten(1, -2).index_select(-1, index.flatten())
    return flat.view(*flat.shape[:2], *index.shape)


def _together(found: list[Tensor], column: Member, x: Tensor) -> Tensor:
    if found:
        return found[0] if len(found) == 1 else torch.cat(found, 1)
    return torch.zeros(len(x), 1, *column.index.shape, device=x.device)
