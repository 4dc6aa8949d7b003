"""Rules of structure: schedules of the active share of units, and rules that look at newborn and at dormant units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from trimtab.inner_training.formulas import unsquash
from trimtab.policies.policy import Kind
from trimtab.policies.rules.options import number, whole

State = dict[str, Any]
PARITY_SCALE = 2.0  # of the signal newborn_parity
SETTLE = 5  # decisions until parity is measured anew


@dataclass(frozen=True, kw_only=True)
class WidthRule(ABC):
    """Targets for ``width``: the share of units that is to be active.

    Where there is no structure the target is 1, the identity, and where the budget is unknown the share that there is.
    Every state knows ``base`` (N,), the active share that a run began with, NaN before it is known.

    Attributes:
        name: of the rule.
        begin, end: progress at which edits begin and end, ``0 <= begin < end <= 1``.
    """

    name: str
    begin: float = 0.0
    end: float = 1.0
    signals: ClassVar[tuple[str, ...]] = ("structure_available", "active_share", "progress_available", "progress")
    levers: ClassVar[Mapping[str, Kind]] = MappingProxyType({"width": "targets"})
    decide_every: ClassVar[int | None] = None

    def init(self, num_runs: int) -> State:
        """The share at the beginning, not known yet."""
        return {"base": np.full(num_runs, np.nan)}

    def act(self, observations: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        """Targets (N, 1) float64 in [0, 1]; see ``Policy.act``."""
        seen = dict(zip(self.signals, observations.astype(np.float64).T, strict=True))
        there, share = seen["structure_available"] > 0, np.clip(seen["active_share"], 0.0, 1.0)
        base = np.where(np.isnan(state["base"]) & there, share, state["base"])
        ready = there & (seen["progress_available"] > 0)
        wanted, after = self._wanted({**seen, "active_share": share, "ready": ready}, np.where(ready, base, 0.0), state)
        targets = np.where(ready, np.clip(wanted, 0.0, 1.0), np.where(there, share, 1.0))
        return targets[:, None], {**after, "base": base}

    def _part(self, progress: np.ndarray) -> np.ndarray:
        """(N,) how far progress is from ``begin`` to ``end``, in [0, 1]."""
        return np.clip((progress - self.begin) / (self.end - self.begin), 0.0, 1.0)

    def _passed(self, progress: np.ndarray, edits: int) -> np.ndarray:
        """(N,) how many of so many equal steps are due: the first at ``begin``, the last one step before ``end``."""
        part = self._part(progress)
        # Progress is a float32: a step that is due at it must not be missed by its rounding.
        due = np.minimum(np.floor(part * edits + 1e-6) + 1, edits)
        return np.where(progress + 1e-7 >= self.begin, due, 0.0)

    @abstractmethod
    def _wanted(self, seen: Mapping[str, np.ndarray], base: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        """Shares (N,) that are to be active, and the next state but for ``base``; ``seen["ready"]`` are the runs that count."""


@dataclass(frozen=True, kw_only=True)
class Schedule(WidthRule):
    """One of the schedules that follow from progress and from the share at the beginning alone.

    Attributes:
        final: active share at the end, of all units.
        edits: number of steps of the kinds with steps.
        share: of the remaining units that each round of ``prune-iterative`` removes.
    """

    final: float = 0.3
    edits: int = 5
    share: float = 0.2

    def _wanted(self, seen: Mapping[str, np.ndarray], base: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        progress, now = seen["progress"], seen["active_share"]
        if self.name == "prune-once":
            level = np.where(progress + 1e-7 >= self.begin, self.final, now)
        elif self.name == "prune-cubic":
            level = self.final + (base - self.final) * (1 - self._part(progress)) ** 3
        elif self.name == "prune-iterative":
            level = base * (1 - self.share) ** self._passed(progress, self.edits)
        else:
            level = base + (self.final - base) * self._passed(progress, self.edits) / self.edits
        return np.maximum(now, level) if self.name == "grow-steps" else np.minimum(now, level), {}


@dataclass(frozen=True, kw_only=True)
class Rewire(WidthRule):
    """Removes a share that falls by half a cosine, and grows as much again as soon as it may.

    Attributes:
        share: of the active units, at the beginning.
        every: decisions from one removal to the next, at least.
    """

    share: float = 0.3
    every: int = 10
    signals: ClassVar[tuple[str, ...]] = (*WidthRule.signals, "edit_rest", "edits_left")

    def init(self, num_runs: int) -> State:
        """``mark`` and ``low``: shares before and after the removal that is not made up for, 0 for none; and ``since``: decisions
        since one was asked for."""
        nothing = {"mark": np.zeros(num_runs), "low": np.zeros(num_runs)}
        return {**super().init(num_runs), **nothing, "since": np.full(num_runs, float(self.every))}

    def _wanted(self, seen: Mapping[str, np.ndarray], base: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        del base
        now, mark, low, since = seen["active_share"], state["mark"], state["low"], state["since"] + 1
        # The removal came to pass where units are missing, and is made up for once most of them are back.
        missing = (mark > 0) & (now < 0.5 * (mark + low))
        free = (seen["edit_rest"] <= 0) & (seen["edits_left"] > 0)
        due = seen["ready"] & ~missing & free & (since >= self.every)
        due &= (seen["progress"] + 1e-7 >= self.begin) & (seen["progress"] < self.end)
        falling = self.share * 0.5 * (1 + np.cos(np.pi * self._part(seen["progress"])))
        fewer = now * (1 - falling)
        wanted = np.where(missing, mark, np.where(due, fewer, now))
        after = {
            "mark": np.where(due, now, np.where(missing, mark, 0.0)),
            "low": np.where(due, fewer, np.where(missing, low, 0.0)),
            "since": np.where(due, 0.0, since),
        }
        return wanted, after


@dataclass(frozen=True, kw_only=True)
class NewbornAware(WidthRule):
    """The steps of ``grow-steps``, each only when the newborns of the last one have recovered, or a deadline has passed.

    Attributes:
        final: active share at the end, of all units.
        edits: number of steps.
        parity: gradient of newborns over that of incumbents from which they have recovered.
        deadline: share of the budget after which a step that is due is taken in any case.
    """

    final: float = 0.8
    edits: int = 5
    parity: float = 0.8
    deadline: float = 0.1
    signals: ClassVar[tuple[str, ...]] = (*WidthRule.signals, "parity_available", "newborn_parity")

    def init(self, num_runs: int) -> State:
        """``taken``: steps that were taken; ``since``: decisions since the last one."""
        return {**super().init(num_runs), "taken": np.zeros(num_runs), "since": np.zeros(num_runs)}

    def _wanted(self, seen: Mapping[str, np.ndarray], base: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        progress, taken, since = seen["progress"], state["taken"], state["since"] + 1
        late = self._passed(progress - self.deadline, self.edits) > taken
        recovered = (seen["parity_available"] > 0) & (since > SETTLE)
        recovered &= unsquash(seen["newborn_parity"], PARITY_SCALE) >= np.log(self.parity)
        due = seen["ready"] & (self._passed(progress, self.edits) > taken) & ((taken == 0) | recovered | late)
        after = taken + due
        level = base + (self.final - base) * after / self.edits
        wanted = np.where(after > 0, np.maximum(seen["active_share"], level), seen["active_share"])
        return wanted, {"taken": after, "since": np.where(due, 0.0, since)}


@dataclass(frozen=True, kw_only=True)
class DormantReset:
    """Moves of ``reset``: the most of a decision, wherever more units than a threshold are dormant.

    Attributes:
        threshold: share of the active units.
    """

    threshold: float = 0.1
    name: ClassVar[str] = "dormant-reset"
    signals: ClassVar[tuple[str, ...]] = ("structure_available", "dormant_share")
    levers: ClassVar[Mapping[str, Kind]] = MappingProxyType({"reset": "moves"})
    decide_every: ClassVar[int | None] = None

    def init(self, num_runs: int) -> State:
        """No state."""
        del num_runs
        return {}

    def act(self, observations: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        """Moves (N, 1) float64, 0 or 1; see ``Policy.act``."""
        moves = (observations[:, :1] > 0) & (observations[:, 1:] > self.threshold)
        return moves.astype(np.float64), state


def _span(begin: float, end: float) -> tuple[float, float]:
    first = number("begin", begin, 0, 0.999)
    return first, number("end", end, first + 1e-3, 1)


def prune_once(*, at: float = 0.3, final: float = 0.3) -> Schedule:
    """Down to the active share ``final`` in [0, 1] at progress ``at`` in [0, 0.999]."""
    return Schedule(name="prune-once", begin=number("at", at, 0, 0.999), final=number("final", final, 0, 1))


def prune_cubic(*, final: float = 0.3, begin: float = 0.1, end: float = 0.7) -> Schedule:
    """Along a cubic to ``final`` in [0, 1], fast at first, from progress ``begin`` to ``end``."""
    first, last = _span(begin, end)
    return Schedule(name="prune-cubic", final=number("final", final, 0, 1), begin=first, end=last)


def prune_iterative(*, share: float = 0.2, rounds: int = 5, begin: float = 0.1, end: float = 0.8) -> Schedule:
    """``share`` in [0, 1] of the remaining units goes in each of ``rounds`` >= 1, equally spaced from ``begin`` to ``end``."""
    rounds, (first, last) = whole("rounds", rounds, 1, 1000), _span(begin, end)
    return Schedule(name="prune-iterative", share=number("share", share, 0, 1), edits=rounds, begin=first, end=last)


def grow_steps(*, final: float = 0.8, edits: int = 5, begin: float = 0.0, end: float = 1.0) -> Schedule:
    """Up to ``final`` in [0, 1] in ``edits`` >= 1 equal steps, equally spaced from progress ``begin`` to ``end``."""
    edits, (first, last) = whole("edits", edits, 1, 1000), _span(begin, end)
    return Schedule(name="grow-steps", final=number("final", final, 0, 1), edits=edits, begin=first, end=last)


def prune_steps(*, final: float = 0.2, edits: int = 5, begin: float = 0.0, end: float = 1.0) -> Schedule:
    """Down to ``final`` in [0, 1] in ``edits`` >= 1 equal steps, equally spaced from progress ``begin`` to ``end``."""
    edits, (first, last) = whole("edits", edits, 1, 1000), _span(begin, end)
    return Schedule(name="prune-steps", final=number("final", final, 0, 1), edits=edits, begin=first, end=last)


def rewire(*, share: float = 0.3, every: int = 10, begin: float = 0.0, end: float = 0.75) -> Rewire:
    """``share`` in [0, 1] of the active units goes, and as many are born, each ``every`` >= 1 decisions, less and less."""
    share, every, (first, last) = number("share", share, 0, 1), whole("every", every, 1, 10**6), _span(begin, end)
    return Rewire(name="rewire", share=share, every=every, begin=first, end=last)


def dormant_reset(*, threshold: float = 0.1) -> DormantReset:
    """Resets where more than ``threshold`` in [0, 1] of the active units are dormant."""
    return DormantReset(threshold=number("threshold", threshold, 0, 1))


def newborn_aware(
    *,
    final: float = 0.8,
    edits: int = 5,
    parity: float = 0.8,
    deadline: float = 0.1,
    begin: float = 0.0,
    end: float = 1.0,
) -> NewbornAware:
    """As ``grow_steps``, but a step waits for a ``parity`` in [0.01, 10] of newborns, for ``deadline`` in [0, 1] at most."""
    first, last = _span(begin, end)
    return NewbornAware(
        name="newborn-aware",
        final=number("final", final, 0, 1),
        edits=whole("edits", edits, 1, 1000),
        parity=number("parity", parity, 0.01, 10),
        deadline=number("deadline", deadline, 0, 1),
        begin=first,
        end=last,
    )
