"""The units of a population through time: begun, aged, snapshot, put back, and changed by edits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError, out_of_range, unknown
from trimtab.inner_training.feeding import examples, place_of
from trimtab.inner_training.population import Population
from trimtab.inner_training.snapshot import SnapshotRing
from trimtab.inner_training.stepping import Learner, renewal, served
from trimtab.inner_training.streams import draw_words
from trimtab.inner_training.structure.bit_masks import bits, chosen, cleared
from trimtab.inner_training.structure.collect import WEIGHTS
from trimtab.inner_training.structure.draft import Changed, Draft
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.flat import FlatGroup, FlatGroups
from trimtab.inner_training.structure.fresh_growth import random
from trimtab.inner_training.structure.groups import Group
from trimtab.inner_training.structure.stacked_edit import Before, StackedEdit
from trimtab.inner_training.structure.stacked_evidence import Gatherers
from trimtab.inner_training.structure.stacked_fields import Batch, Gathering, State
from trimtab.inner_training.structure.stacked_groups import stacked_groups
from trimtab.inner_training.structure.units import FOREVER, Units
from trimtab.inner_training.task import SPLITS

WORD = 0x7FFFFFFF


class StackedMoments:
    """What is common to all edits of a population's units (see ``Stacked``)."""

    def __init__(self, population: Population, groups: Iterable[Group] | None, compile: bool | None) -> None:
        if population.companion is not None:
            raise UserError("this population has a structure already; use population.companion")
        module = population.family.module
        offered, self.refused = stacked_groups(population.family, groups)
        if not offered:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.refused.items()) or "it has no hidden units"
            raise UserError(f"no units of {population.family.name!r} can be edited ({reasons})")
        self.population, self._num_runs = population, population.num_runs
        self._flat = FlatGroups(offered, population.layout, module, population.device)
        self._renewed = renewal(population.family, population.layout)
        self._given = {name: population._feed.buffers[name].clone() for one in self._flat for name in one.gates}
        self._number, self._masks = 0, False
        self._gatherers = Gatherers(population.mode == "compile" if compile is None else compile)
        self._units = self._begun()
        self._ring = SnapshotRing(self._units)
        population.companion = self

    # --- as the population goes -------------------------------------------------------------------------------------

    def _begun(self) -> Units:
        """Units as the gates of the instances leave them, with random values parked for the inactive ones."""
        learner, device = self.population._learner, self.population.device
        zero = torch.zeros(self._num_runs, dtype=torch.int64, device=device)
        active = self._first_active()
        born = torch.full(active.shape, FOREVER, device=device)
        nothing = torch.zeros(
            self._num_runs, learner.parameters.shape[1] if self._masks else 0, dtype=torch.bool, device=device
        )
        units = Units(active, born, zero, zero, zero, torch.zeros_like(learner.parameters), nothing)
        return units._replace(parked=self._parked(learner, units))

    def _first_active(self) -> Tensor:
        """(N, T) bool, the units that the instances begin with."""
        device = self.population.device
        found = torch.ones(self._num_runs, self._flat.total, dtype=torch.bool, device=device)
        for one in self._flat:
            for name, where in one.gates.items():
                found[:, one.span] = (self._given[name][:, where] != 0).any(2)
        return found

    def _parked(self, learner: Learner, units: Units) -> Tensor:
        """(N, P) values of units that were never active: like newborns of the growth method ``random``."""
        draft, seeds = Draft(self._flat, learner, units), self._seeds_of(units.edits)
        for place, one in enumerate(self._flat):
            known = draft.weights(one)
            draws = Draws((seeds + place) & WORD, (self._num_runs,), known.device)
            born = random(known, torch.ones_like(known.live), draws)
            begin = torch.nan_to_num(one.start, nan=0.0).expand(self._num_runs, one.units, -1)
            values = (born.rows, born.bias[..., None], born.columns, begin)
            for part, new in zip(one.parts(), values, strict=True):
                if part.width:
                    part.put(draft.values, torch.where(known.live[..., None], part.of(draft.values), new))
        return cleared(~self._flat.entries(~units.active), draft.values)[0]

    def started(self, runs: np.ndarray) -> None:
        """Begins the runs in ``runs`` (bool, (N,)) anew, with the widths of their instances."""
        begun = torch.as_tensor(runs, device=self.population.device)
        for name, given in self._given.items():
            mask = begun.view(-1, *[1] * (given.ndim - 1))
            self._given[name] = torch.where(mask, self.population._feed.buffers[name], given)
        self._units = self._units.merged(self._begun(), begun)
        self._ring.forget(self._units, begun)
        self._open_gates()
        self._forget_scores(begun)

    def _forget_scores(self, runs: Tensor) -> None:
        """The runs (N,) bool have new units."""

    def advanced(self, steps: int) -> None:
        """All runs have made steps."""
        self._units = self._units._replace(updates=self._units.updates + steps)

    def settle(self, mask: np.ndarray) -> None:
        """See ``Moments.settle``."""
        self._ring.forget(self._units, torch.as_tensor(mask, device=self.population.device))

    def snapshot(self, mask: np.ndarray) -> None:
        """See ``Moments.snapshot``."""
        self._ring.take(self._units, mask)

    def restore(self, mask: np.ndarray, keep: np.ndarray | None, sound: np.ndarray | None) -> None:
        """See ``Moments.restore``."""
        self._units = self._ring.restore(self._units, mask, keep, sound)
        self._open_gates()

    def resume(self, mask: np.ndarray) -> None:
        """See ``Moments.resume``."""
        self._units = self._ring.resume(self._units, mask)
        self._open_gates()

    def anchored(self, weights: Tensor) -> Tensor:
        """Weights (N, P) of the confirmed moment, NaN at units that are not now what they were then."""
        then, now = self._ring.stable, self._units
        same = then.active & now.active & (then.born == now.born)
        return torch.where(self._flat.entries(~same), torch.nan, weights)

    def _open_gates(self) -> None:
        """Makes the networks' own gates follow: those of a newborn are open, those of others as their instance has them.

        Masks of weights follow too.
        """
        buffers, live = self.population._feed.buffers, self.population._feed.live
        if live is not None:
            live.copy_(~self._units.masked)
        for one in self._flat:
            active, born = (values[:, one.span, None] for values in (self._units.active, self._units.born))
            for name, where in one.gates.items():
                given = self._given[name][:, where]
                gate = torch.where(active, torch.where(born == FOREVER, given, 1.0), 0.0)
                buffers[name].index_copy_(1, where.flatten(), gate.flatten(1).to(buffers[name].dtype))

    # --- edits ------------------------------------------------------------------------------------------------------

    def _done(self, kind: str, draft: Draft) -> StackedEdit:
        """Puts a draft into force."""
        return self._changed(kind, draft.finished)

    def _changed(self, kind: str, change: Callable[[int], Changed]) -> StackedEdit:
        """Puts a change into force, which is made for its number."""
        self._number += 1
        learner, units = self.population._learner, self._units
        after = change(self._number)
        before = Before(learner, units, after.entries, after.which, self._number)
        self._put(after.learner, after.units, after.entries)
        return StackedEdit(kind, self._flat.by_group(after.which), before, self._undo)

    def _put(self, learner: Learner, units: Units, entries: Tensor) -> None:
        self.population._learner, self._units = learner, units
        self.population._anchors.release(entries)
        self._open_gates()

    def _put_rows(self, runs: Tensor, draft: Draft) -> None:
        """Puts a draft of some runs (n,) into force, for good: no edit of before can be undone there."""
        self._number += 1
        after = draft.finished(self._number)
        learner, units = self.population._learner, self._units
        whole = (Learner(*(old.index_copy(0, runs, new) for old, new in zip(learner, after.learner, strict=True))),
                 Units(*(old.index_copy(0, runs, new) for old, new in zip(units, after.units, strict=True))))  # fmt: skip
        entries = torch.zeros_like(learner.parameters, dtype=torch.bool).index_copy(0, runs, after.entries)
        self._put(*whole, entries)

    def _undo(self, before: Before) -> Tensor:
        runs, now, units = self._units.last == before.number, self.population._learner, self._units
        entries, which = before.entries & runs[:, None], before.which & runs[:, None]
        fields = zip(before.learner[:3], now[:3], strict=True)
        marked = bits(entries)
        parameters, first, second = (chosen(marked, old, new) for old, new in fields)
        back = units._replace(
            active=torch.where(which, before.units.active, units.active),
            born=torch.where(which, before.units.born, units.born),
            last=torch.where(runs, before.units.last, units.last),
            parked=chosen(marked, before.units.parked, units.parked),
            masked=_masked_before(before, units, entries),
        )
        self._put(Learner(parameters, first, second, now.updates), back, entries)
        return runs

    # --- evidence ---------------------------------------------------------------------------------------------------

    def _seeds_of(self, edits: Tensor) -> Tensor:
        """(N,) int64 seeds from each run's stream, step, and number of edits."""
        feed = self.population._feed
        word = draw_words((feed.seed + 0x51ED270B) & WORD, feed.step) & WORD
        return draw_words(word, edits) & WORD

    def _seeds(self, one: FlatGroup, seeds: Tensor | None = None) -> Tensor:
        """(N,) int64, other ones for every group; ``seeds`` are those of the units as they are, if somebody has them."""
        seeds = self._seeds_of(self._units.edits) if seeds is None else seeds
        return (seeds + one.span.start) & WORD

    def _batches(self, count: int, split: str | None, slots: int | None) -> list[Batch]:
        runs = self.population
        family, feed, slots = runs.family, runs._feed, runs.family.max_batch if slots is None else slots
        if not 1 <= slots <= family.max_batch:
            raise out_of_range("examples", slots, 1, family.max_batch)
        if split is None:
            steps = (replace(feed, step=feed.step + place) for place in range(count))
            found = [Batch(*served(family, then, place_of(then), runs._inputs, None, slots)) for then in steps]
        else:
            found = self._first_of(split, count, slots)
        return [one._replace(weight=one.weight / one.weight.sum(1, keepdim=True).clamp(min=1e-9)) for one in found]

    def _first_of(self, split: str, count: int, slots: int) -> list[Batch]:
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        runs = self.population
        starts, sizes = (
            torch.from_numpy(one).to(runs.device) for one in runs._splits.spans(split, None, runs.steps_done)
        )
        found = []
        for begin in range(0, count * slots, slots):
            place = begin + torch.arange(slots, device=runs.device)[None]
            positions = starts[:, None] + torch.minimum(place, sizes[:, None] - 1)
            x, y = runs.family.present(*examples(runs._feed, runs._inputs, positions))
            found.append(Batch(x, y, (place < sizes[:, None]).float()))
        return found

    @staticmethod
    def _weights(draft: Draft, one: FlatGroup, needs: frozenset[str]) -> Evidence:
        return draft.weights(one) if needs & WEIGHTS or not needs else Evidence(alive=draft.active[:, one.span])

    @torch.no_grad()
    def _evidence(
        self, needs: frozenset[str], names: Sequence[str], data: tuple[int, str | None, int | None], why: str
    ) -> dict[str, Evidence]:
        runs = self.population
        draft = Draft(self._flat, runs._learner, self._units)
        seeds = self._seeds_of(self._units.edits) if "hess_in" in needs or "hess_out" in needs else runs._feed.seed
        weights = {name: self._weights(draft, self._flat[name], needs) for name in names}
        groups = tuple(one.group for one in self._flat)
        gathering = Gathering(runs.family, groups, tuple(names), needs, why)
        gathering.check()
        if not gathering.moving:
            return weights
        buffers = dict(runs._feed.buffers)
        for one in self._flat:
            idle, born = ~self._units.active[:, one.span, None], self._units.born[:, one.span, None]
            for name, where in one.gates.items():
                gate = torch.where(idle | (born != FOREVER), 1.0, self._given[name][:, where])
                buffers[name] = buffers[name].clone()
                buffers[name].index_copy_(1, where.flatten(), gate.flatten(1).to(buffers[name].dtype))
        views = runs.layout.views(self._renewed(draft.values, place_of(runs._feed)))
        active = self._flat.by_group(self._units.active)
        state = State(views, buffers, active, seeds)
        return self._gatherers.gather(gathering, state, weights, self._batches(*data))


def _masked_before(before: Before, units: Units, entries: Tensor) -> Tensor:
    """(N, P) masks of weights with those of before an edit where it changed them."""
    old = before.units.masked if before.units.masked.shape[1] else torch.zeros_like(units.masked)
    return torch.where(entries, old, units.masked) if units.masked.shape[1] else units.masked
