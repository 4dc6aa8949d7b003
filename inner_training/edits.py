"""Levers that edit the structure of a run: units are removed, born or renewed. One table, and what they are allowed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import numpy as np

from trimtab.errors import MismatchError, RangeError, check_whole, out_of_range, unknown
from trimtab.inner_training.levers import LEVERS, Lever


@dataclass(frozen=True, kw_only=True)
class EditLever:
    """One lever of the kind ``edits``.

    Attributes:
        name: lower-case words with underscores.
        doc: one line for tables.
        moves: what moves do, for tables.
        targets: what targets do, for tables; empty where it takes none.
        source: where the idea comes from; empty for ours.
        low, high, rate: what a bundle notes of it; a move is in units of ``EditConfig.most`` whatever the lever.
    """

    name: str
    doc: str
    moves: str
    targets: str = ""
    source: str = ""
    low: float = 1.0
    high: float = 1.0
    rate: float = 1.0


EDITS: dict[str, EditLever] = {
    one.name: one
    for one in (
        EditLever(
            name="width",
            doc="how many units are active: the worst are removed, or new ones are born",
            moves="below 0 removes, above 0 grows |move| x `most` of the units of every group",
            targets="the share of units that is to be active",
            source="Lillo & Cheney, arXiv 2605.15435",
        ),
        EditLever(
            name="reset",
            doc="the worst active units begin anew, with columns of zero",
            moves="above 0 resets move x `most` of the active units; below 0 does nothing",
            source="ReDo, arXiv 2302.12902",
        ),
    )
}


def nudged(levers: Iterable[str]) -> tuple[str, ...]:
    """The names of levers that are no edits, in order.

    >>> nudged(["lr", "width", "grad_clip"])
    ('lr', 'grad_clip')
    """
    return tuple(name for name in levers if name not in EDITS)


def movable(names: Iterable[str]) -> tuple[Lever | EditLever, ...]:
    """Levers of both tables that take moves, in order; ``UnknownNameError`` names the nearest match."""
    table: dict[str, Lever | EditLever] = {**LEVERS, **EDITS}
    given = tuple(names)
    for name in given:
        if name not in table:
            raise unknown("lever", name, table)
    return tuple(table[name] for name in given)


def check_targets(who: str, name: str, kind: str) -> None:
    """Raises ``MismatchError`` where a lever of this table is given targets and takes none."""
    if kind == "targets" and name in EDITS and not EDITS[name].targets:
        raise MismatchError(f"{who} gives targets for {name!r}, which has no position; give moves")


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Settings of structural edits; see ``Stacked`` for what they mean.

    Attributes:
        criterion: scores units; the lowest are removed.
        normalisation: of these scores, which makes groups comparable: raw ones may take nearly all units of one group.
        reset_criterion: the lowest by this one are reset.
        growth: the growth method.
        newborn_state: ``zero`` or ``transplant``.
        scale: factor on the columns of newborns, >= 0.
        scope: ``global`` compares units of all groups, ``layer`` takes the share of each.
        batches: of evidence, >= 1.
        start: active share of every group at the beginning of a run, in (0, 1]; None is as the instance has it, and what is
            narrower already stays.
        least, most_active: limits of the active share of all units, ``0 <= least <= most_active <= 1``.
        most: share of units that a move of 1 edits, in (0, 1].
        dead_band: moves smaller than this edit nothing, in [0, 1).
        rest: decisions from one edit to the next at least, >= 0.
        budget: edits per run, >= 0.

    Raises:
        RangeError, UnknownNameError: a value that is not allowed.
    """

    criterion: str = "agf"
    normalisation: str = "mean"
    reset_criterion: str = "redo"
    growth: str = "pairing"
    newborn_state: str = "zero"
    scale: float = 1.0
    scope: str = "global"
    batches: int = 1
    start: float | None = None
    least: float = 0.1
    most_active: float = 1.0
    most: float = 0.1
    dead_band: float = 0.1
    rest: int = 5
    budget: int = 20

    def __post_init__(self) -> None:
        from trimtab.inner_training.structure.criteria import CRITERIA
        from trimtab.inner_training.structure.growth import GROWTH
        from trimtab.inner_training.structure.normalisations import NORMALISATIONS
        from trimtab.inner_training.structure.stacked import SHARED_STATES
        from trimtab.inner_training.structure.stacked_choice import SCOPES

        for what, name, table in (
            ("criterion", self.criterion, CRITERIA),
            ("normalisation", self.normalisation, NORMALISATIONS),
            ("criterion", self.reset_criterion, CRITERIA),
            ("growth method", self.growth, GROWTH),
            ("newborn state", self.newborn_state, SHARED_STATES),
            ("scope", self.scope, SCOPES),
        ):
            if not isinstance(name, str) or name not in table:
                raise unknown(what, name, table)
        for name, low in (("batches", 1), ("rest", 0), ("budget", 0)):
            check_whole(name, getattr(self, name), low)
        for name, least, greatest in (
            ("scale", 0.0, 1e3),
            ("start", 1e-9, 1.0),
            ("least", 0.0, 1.0),
            ("most_active", 0.0, 1.0),
            ("most", 1e-9, 1.0),
            ("dead_band", 0.0, 1 - 1e-9),
        ):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not (name == "start" and value is None) and not (number and least <= value <= greatest):
                raise out_of_range(name, value, least, greatest)
        if self.least > self.most_active:
            raise RangeError(
                f"least is {self.least} and most_active {self.most_active}; the least active share must not lie above the most"
            )


@dataclass(frozen=True, eq=False)
class UnitCounts:
    """Units of N runs on the host; every array is (N, G), 0 where a run has fewer groups, as has one without units.

    Attributes:
        active: active units of each group.
        units: all of them: those of the widest network that the slots have.
        minimum: active ones that a group keeps.
    """

    active: np.ndarray
    units: np.ndarray
    minimum: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """(N,) bool, there are units to edit."""
        return self.units.sum(1) > 0

    @property
    def share(self) -> np.ndarray:
        """(N,) active units over all units; NaN without any."""
        return self.of_all(self.active.sum(1))

    def of_all(self, count: np.ndarray) -> np.ndarray:
        """(N,) counts of units as shares of all units."""
        total = self.units.sum(1)
        return np.divide(count, total, out=np.full(len(total), np.nan), where=total > 0)

    def pruned(self, share: np.ndarray, scope: str) -> np.ndarray:
        """(N,) units that go when a share of all units is to go (see ``Stacked.prune``)."""
        spare = np.maximum(self.active - self.minimum, 0)
        gone: np.ndarray
        if scope == "global":
            gone = np.minimum(np.round(share * self.units.sum(1)), spare.sum(1))
        else:
            gone = np.minimum(np.round(self.of_active(share)[:, None] * self.active), spare).sum(1)
        return gone

    def grown(self, share: np.ndarray) -> np.ndarray:
        """(N,) units that are born when a share of each group is to be born."""
        born: np.ndarray = np.minimum(np.round(share[:, None] * self.units), self.units - self.active).sum(1)
        return born

    def of_active(self, share: np.ndarray) -> np.ndarray:
        """(N,) a share of all units as a share of the active ones, at most 1; 0 without any."""
        active = self.active.sum(1)
        wanted = share * self.units.sum(1)
        return np.minimum(np.divide(wanted, active, out=np.zeros(len(active)), where=active > 0), 1.0)
