"""A change of the units of a population in the making: what becomes of parameters, optimizer state, and units."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.inner_training.stepping import Learner
from trimtab.inner_training.structure.arithmetic import live_mean, rows_at
from trimtab.inner_training.structure.bit_masks import bits, chosen, cleared, kept_at, unset
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.flat import FlatGroup, FlatGroups, Part
from trimtab.inner_training.structure.gradient_growth import matched_donors
from trimtab.inner_training.structure.newborns import Newborns
from trimtab.inner_training.structure.units import Units


class Changed(NamedTuple):
    """What a change gives.

    Attributes:
        learner, units: after it.
        entries: (N, P) bool, those that it may have changed.
        which: (N, T) bool, units that it removed, made or reset.
    """

    learner: Learner
    units: Units
    entries: Tensor
    which: Tensor


class Draft:
    """Changes units of all runs at once; nothing given is written to.

    Entries of inactive units have the values that are parked for them here, so a unit begins to be by being active.

    Attributes:
        values: (N, P) parameters, with what is parked in its place.
        active: (N, T) bool.
        which: (N, T) bool, units removed, made or reset so far.
    """

    def __init__(self, groups: FlatGroups, learner: Learner, units: Units) -> None:
        self._groups, self._learner, self._units = groups, learner, units
        self.values = chosen(groups.live(units.active), learner.parameters, units.parked)
        self.active, self._born = units.active, units.born
        self.which = torch.zeros_like(units.active)
        self._altered: Tensor | None = None  # (N, P) bool
        self._only_born = True  # nothing happened but that inactive units became active
        self._moments: list[Tensor] | None = None  # (N, P) first and second; None for those of survivors, and zeros

    def weights(self, one: FlatGroup) -> Evidence:
        """The weights of a group as they are, until the draft is changed; inactive units have what they would have."""
        rows, bias, columns = (
            self._groups.own(one, part, self.values, self.active) for part in (one.incoming, one.bias, one.columns)
        )
        return Evidence(
            alive=self.active[:, one.span],
            weights_in=rows,
            bias=bias[..., 0] if one.bias.width else None,
            weights_out=columns,
        )

    def _held_by_others(self, one: FlatGroup) -> Tensor:
        others = ~self.active
        others[:, one.span] = False
        return self._groups.entries(others)

    def remove(self, gone: Tensor) -> None:
        """Makes units (N, T) bool inactive."""
        self.which = self.which | gone
        self.active = self.active & ~gone
        self._only_born = False

    def set_columns(self, one: FlatGroup, columns: Tensor, runs: Tensor) -> None:
        """Gives the active units of the runs (N,) bool other columns (N, U, O)."""
        self._alter(one.columns, columns, (self.active[:, one.span] & runs[:, None])[..., None])

    def _alter(self, where: Part, values: Tensor, which: Tensor) -> None:
        """Writes (N, U, K) for the entries ``which``, (N, U, 1) or more; their optimizer state stays."""
        which = which.expand_as(values)
        where.put(self.values, torch.where(which, values, where.of(self.values)))
        marked = torch.zeros_like(self.values, dtype=torch.bool)
        where.put(marked, which)
        self._alters(marked)

    def _alters(self, entries: Tensor) -> None:
        self._only_born = False
        self._altered = entries if self._altered is None else self._altered | entries

    def bear(self, one: FlatGroup, born: Newborns, *, copies: bool) -> None:
        """Puts newborns in, in the first inactive units or those that they chose.

        Args:
            one: their group.
            born: (N, k, ...) of them.
            copies: whether their optimizer state is that of their donors, or of the incumbents that are most alike.
        """
        active, donors = self.active[:, one.span], born.donors
        if copies and donors is None:
            donors = matched_donors(born.rows, born.columns, self.weights(one))
        slots = active.to(torch.int8).argsort(dim=1, stable=True)[:, : born.present.shape[1]]
        slots = slots if born.chosen is None else born.chosen.clamp(min=0)
        present = born.present & ~active.gather(1, slots)
        spread = _Spread(torch.where(present, slots, one.units), one.units)
        reborn = spread.of(present[..., None])[..., 0]
        if born.chosen is None:
            for part, new in zip(one.parts(), (born.rows, born.bias[..., None], born.columns), strict=False):
                if part.width:
                    part.put_at(self.values, slots, new, present)
            self._begin(one, reborn, None if born.donors is None else spread.numbers(born.donors))
        elif born.woken_columns != 1:
            columns = one.columns.of(self.values)
            one.columns.put(self.values, torch.where(reborn[..., None], born.woken_columns * columns, columns))
        if born.donor_columns is not None:
            shares = born.donor_columns[..., None]
            self._alter(one.columns, one.columns.of(self.values) * shares, active[..., None] & (shares != 1))
        if born.donor_rows is not None:
            self._alter(
                one.incoming,
                one.incoming.of(self.values) + born.donor_rows,
                active[..., None] & (born.donor_rows != 0),
            )
        self._awake(one, reborn)
        if copies and donors is not None:
            self._inherit(one, reborn, spread.numbers(donors))

    def _inherit(self, one: FlatGroup, reborn: Tensor, donors: Tensor) -> None:
        """Gives units (N, U) bool the optimizer state of their donors (N, U), -1 for none."""
        units = torch.zeros_like(self.which)
        units[:, one.span] = reborn
        entries, held = self._groups.entries(units), self._groups.entries(~self.active)
        moments = self._learner[1:3] if self._moments is None else self._moments
        self._moments = cleared(entries, *moments)
        for moment in self._moments:
            for part in (part for part in one.parts() if part.width):
                old = part.of(moment)
                part.put(moment, torch.where(reborn[..., None], rows_at(old, donors), old))
            moment.masked_fill_(held, 0.0)

    def renew(self, one: FlatGroup, units: Tensor, draws: Draws) -> None:
        """Makes active units (N, U) bool begin anew: rows as ``torch.nn.Linear`` draws them, biases and columns of zero.

        Uniform in +-1/sqrt(fan_in), where fan_in counts the inputs of a unit's row that are not held at zero.
        """
        held = one.incoming.of(self._held_by_others(one))
        rows = torch.zeros_like(held, dtype=torch.float32)
        for part, each in zip(one.incoming.slices(), one.rows, strict=True):
            if each:
                used = torch.unflatten((~held[..., part]).float(), -1, (each, -1))
                drawn = 2 * draws.uniform(*used.shape[1:]) - 1
                rows[..., part] = (drawn * used / used.sum(-1, keepdim=True).clamp(min=1).sqrt()).flatten(-2)
        nothing = [torch.zeros_like(part.of(self.values)) for part in (one.bias, one.columns)]
        self._only_born = False
        for own, new in zip((one.incoming, one.bias, one.columns), (rows, *nothing), strict=True):
            if own.width:
                own.put(self.values, torch.where(units[..., None], new, own.of(self.values)))
        self._begin(one, units, None)
        self._awake(one, units)

    def compensate(self, one: FlatGroup, units: Tensor, mean: Tensor) -> None:
        """Adds to the biases of what reads units (N, U) what these put out on average, times their columns.

        The average is (N, U), or (N, U, K) with one for each position of the columns, one column after the other.
        """
        columns, positions = self.weights(one).read("weights_out"), sum(each for each, _ in one.readers)
        means = torch.where(units[..., None], mean if mean.ndim > 2 else mean[..., None].expand(-1, -1, positions), 0.0)
        shares = means.split([each for each, _ in one.readers], 2)  # type: ignore[no-untyped-call]
        spread = [
            share.repeat_interleave((part.stop - part.start) // share.shape[2], 2)
            for part, share in zip(one.columns.slices(), shares, strict=True)
        ]
        lost = (columns * torch.cat(spread, 2)).sum(1)
        for part, (each, bias) in zip(one.columns.slices(), one.readers, strict=True):
            assert bias is not None
            share = lost[:, part].view(len(lost), each, len(bias), -1).sum((1, 3))
            marked = torch.zeros_like(self.values, dtype=torch.bool)
            self._alters(marked.index_copy_(1, bias, share != 0))
            self.values.index_add_(1, bias, share)

    def _begin(self, one: FlatGroup, which: Tensor, donors: Tensor | None) -> None:
        """What units have beside rows, bias and columns: their donor's, or what it begins with."""
        if not one.others.width:
            return
        held, live = one.others.of(self.values), self.active[:, one.span] & ~which
        mean = live_mean(held.mT, live[:, None]).mT
        begin = torch.where(one.start.isnan(), mean, one.start).expand_as(held)
        if donors is not None:
            begin = torch.where((donors >= 0)[..., None], rows_at(held, donors), begin)
        one.others.put(self.values, torch.where(which[..., None], begin, held))

    def _awake(self, one: FlatGroup, which: Tensor) -> None:
        now = torch.zeros_like(self.which)
        now[:, one.span] = which
        self.which, self.active = self.which | now, self.active | now
        self._born = torch.where(now, self._units.updates[:, None], self._born)

    def finished(self, number: int) -> Changed:
        """The change, as the edit of that number, which ends the draft."""
        live, entries = self._groups.live(self.active), self._groups.entries(self.which)
        moments = self._moments or list(self._learner[1:3])
        if not self._only_born and self._moments is None:  # what was held at zero has moments of zero already
            moments = cleared(entries, *moments)
        if self._units.masked.shape[1]:
            live, moments = live & unset(self._units.masked), cleared(self._units.masked, *moments)
        runs = self.which.any(1)
        units = self._units._replace(
            active=self.active,
            born=self._born,
            edits=self._units.edits + runs,
            last=torch.where(runs, number, self._units.last),
            parked=chosen(live, self._units.parked, self.values),
        )
        parameters = self.values.view(torch.int32).bitwise_and_(live).view(torch.float32)
        learner = Learner(parameters, moments[0], moments[1], self._learner.updates)
        return Changed(learner, units, entries if self._altered is None else entries | self._altered, self.which)


def without(groups: FlatGroups, learner: Learner, units: Units, gone: Tensor, number: int) -> Changed:
    """What a draft that does nothing but ``remove`` units (N, T) bool gives, in fewer passes."""
    entries, runs = groups.entries(gone), gone.any(1)
    active, live, marked = units.active & ~gone, groups.live(units.active), bits(entries)
    parked = chosen(marked.bitwise_and_(live), learner.parameters, units.parked)
    parameters, first, second = kept_at(marked.bitwise_not_(), *learner[:3])
    groups.know_live(active, marked.bitwise_and_(live))
    after = units._replace(
        active=active,
        edits=units.edits + runs,
        last=torch.where(runs, number, units.last),
        parked=parked,
    )
    return Changed(Learner(parameters, first, second, learner.updates), after, entries, gone)


class _Spread:
    """Puts what k newborns have into the units that they become; slots (N, k), ``units`` for none."""

    def __init__(self, slots: Tensor, units: int) -> None:
        self._slots, self._units = slots, units

    def of(self, values: Tensor) -> Tensor:
        """(N, U, K) from (N, k, K); zeros elsewhere."""
        runs, _, width = values.shape
        into = values.new_zeros(runs, self._units + 1, width)
        return into.scatter(1, self._slots[..., None].expand_as(values), values)[:, :-1]

    def numbers(self, values: Tensor) -> Tensor:
        """(N, U) from numbers (N, k) of at least -1; -1 elsewhere."""
        return self.of(values[..., None] + 1)[..., 0] - 1


def with_weights(evidence: Evidence, weights: Evidence) -> Evidence:
    """Evidence whose weights are those of another one."""
    values: dict[str, Any] = weights.given()
    return replace(evidence, **{"bias": None, **values})
