"""Disturbances: the table of faults that may befall a run, the events drawn from it, and the faults of each step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trimtab.errors import ConfigError, RangeError, check_whole, out_of_range, unknown
from trimtab.inner_training.faults import FaultRows
from trimtab.inner_training.task import Instance

MOST_EVENTS = 1000.0  # expected number per run and entry, at most
MOST_STEPS = 10**9  # of an event, and before it
Acts = Callable[[np.ndarray], Mapping[str, np.ndarray | float]]


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """One kind of fault.

    Attributes:
        name: lower-case words with hyphens.
        doc: one line for tables.
        unit: what its severity is; empty when it has none (it is 1).
        severity: what a random event draws its severity from, log-uniformly; ``(1, 1)`` without a unit.
        steps: what a random event draws its duration from, in optimizer steps, log-uniformly.
        lowest, highest: the severities that may be asked for.
        acts: severities (K, N) to values of the columns of ``FaultRows`` where it is active.
    """

    name: str
    doc: str
    unit: str = ""
    severity: tuple[float, float] = (1.0, 1.0)
    steps: tuple[int, int]
    lowest: float = 1.0
    highest: float = 1.0
    acts: Acts


DISTURBANCES: dict[str, Disturbance] = {
    kind.name: kind
    for kind in (
        Disturbance(
            name="lr-spike",
            doc="the learning rate is multiplied",
            unit="factor on the learning rate",
            severity=(2.0, 100.0),
            steps=(1, 20),
            lowest=1e-6,
            highest=1e6,
            acts=lambda s: {"lr": s},
        ),
        Disturbance(
            name="label-noise",
            doc="labels of the batch are replaced by those of its other examples",
            unit="share of the labels",
            severity=(0.1, 1.0),
            steps=(5, 100),
            lowest=0.0,
            highest=1.0,
            acts=lambda s: {"label_share": s},
        ),
        Disturbance(
            name="corrupted-batches",
            doc="uniform noise is added to the inputs; inputs that are whole numbers are exchanged within the batch",
            unit="standard deviation of the noise; chance of each whole number to be exchanged",
            severity=(0.2, 5.0),
            steps=(1, 50),
            lowest=0.0,
            highest=1e6,
            acts=lambda s: {"input_noise": s},
        ),
        Disturbance(
            name="nan-gradient",
            doc="every element of the gradient is NaN",
            steps=(1, 3),
            acts=lambda s: {"gradient": np.nan},
        ),
        Disturbance(
            name="inf-gradient",
            doc="every element of the gradient is infinite",
            steps=(1, 3),
            acts=lambda s: {"gradient": np.inf},
        ),
        Disturbance(
            name="data-shift",
            doc="training inputs x become (1 + s) x + s; inputs that are whole numbers stay",
            unit="s",
            severity=(0.1, 2.0),
            steps=(50, 1000),
            lowest=0.0,
            highest=1e6,
            acts=lambda s: {"input_gain": 1 + s, "input_shift": s},
        ),
        Disturbance(
            name="frozen-layers",
            doc="the parameters of the first thirds of the depth stay as they are",
            unit="thirds, rounded",
            severity=(1.0, 3.0),
            steps=(5, 100),
            lowest=1.0,
            highest=3.0,
            acts=lambda s: {"frozen": 2 ** s.round() - 1},
        ),
        Disturbance(
            name="lost-steps",
            doc="steps change neither parameters nor optimizer state, as after an interruption",
            steps=(1, 30),
            acts=lambda s: {"lost": 1.0},
        ),
        Disturbance(
            name="slow-steps",
            doc="steps take longer on the run's clock, as on varying hardware",
            unit="time of a step over its usual",
            severity=(1.5, 10.0),
            steps=(10, 200),
            lowest=1.0,
            highest=1e6,
            acts=lambda s: {"time": s},
        ),
    )
}
_NUMBER = {name: number for number, name in enumerate(DISTURBANCES)}


@dataclass(frozen=True, kw_only=True)
class DisturbanceSettings:
    """When one kind of fault strikes; exactly one of ``at`` and ``rate`` is given.

    Attributes:
        kind: a name of ``DISTURBANCES``.
        at: when it begins: a share of the budget below 1, or the steps done before it, a whole number from 1 on.
        rate: expected number of events per run; each begins at a random step of the budget.
        steps: how many steps it lasts; None draws from the kind's range.
        severity: how severe it is; None draws from the kind's range.

    Raises:
        UserError: an unknown kind, a value out of range, or both or neither of ``at`` and ``rate``.
    """

    kind: str
    at: float | None = None
    rate: float | None = None
    steps: int | None = None
    severity: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in DISTURBANCES:
            raise unknown("disturbance", self.kind, DISTURBANCES)
        if (self.at is None) == (self.rate is None):
            raise ConfigError(f"disturbance {self.kind!r} has {'neither' if self.at is None else 'both'} of at and "
                              "rate; give at for one event at a known time, or rate for random ones")  # fmt: skip
        if self.at is not None and not (
            0 <= self.at < 1 or (1 <= self.at <= MOST_STEPS and float(self.at).is_integer())
        ):
            raise ConfigError(f"disturbance {self.kind!r}: at is {self.at:g}; give a share of the budget, from 0 to below "
                              f"1, or a whole number of steps, at most {MOST_STEPS}")  # fmt: skip
        if self.rate is not None and not 0 < self.rate <= MOST_EVENTS:
            raise RangeError(f"rate of disturbance {self.kind!r} is {self.rate:g}; it must be above 0 and at most "
                             f"{MOST_EVENTS:g}")  # fmt: skip
        if self.steps is not None and check_whole(f"steps of disturbance {self.kind!r}", self.steps, 1) > MOST_STEPS:
            raise out_of_range(f"steps of disturbance {self.kind!r}", self.steps, 1, MOST_STEPS)
        kind = DISTURBANCES[self.kind]
        if not kind.unit and self.severity not in (None, 1):
            raise ConfigError(f"disturbance {self.kind!r} has no severity, but it is {self.severity:g}; leave it out")
        if self.severity is not None and not kind.lowest <= self.severity <= kind.highest:
            raise out_of_range(f"severity of disturbance {self.kind!r}", self.severity, kind.lowest, kind.highest)


class Event(NamedTuple):
    """One fault of one run.

    Attributes:
        kind: a name of ``DISTURBANCES``.
        first: steps done before it begins.
        steps: how many steps it lasts.
        severity: in the unit of its kind.
    """

    kind: str
    first: int
    steps: int
    severity: float


def draw_events(settings: Sequence[DisturbanceSettings], seed: int, total_steps: int) -> tuple[Event, ...]:
    """The events of one run, in the order of their beginning.

    Every entry has a stream of its own, so that adding one changes none of the others.

    Args:
        settings: what may happen.
        seed: of the run's instance, >= 0.
        total_steps: its budget.

    >>> draw_events([DisturbanceSettings(kind="nan-gradient", at=0.5, steps=1)], seed=3, total_steps=200)
    (Event(kind='nan-gradient', first=100, steps=1, severity=1.0),)
    """
    events: list[Event] = []
    for place, one in enumerate(settings):
        kind, rng = DISTURBANCES[one.kind], _stream(f"disturbances/{place}/{one.kind}", seed)
        if one.rate is not None:
            begins = rng.integers(0, total_steps, rng.poisson(one.rate)).tolist()
        else:
            at = one.at or 0.0
            begins = [int(at * total_steps + 1e-6 if at < 1 else at)]  # 0.29 of 100 is 29
        for first in begins:
            steps, severity = round(_log_uniform(rng, *kind.steps)), _log_uniform(rng, *kind.severity)
            events.append(
                Event(
                    kind=one.kind,
                    first=first,
                    steps=steps if one.steps is None else one.steps,
                    severity=severity if one.severity is None else float(one.severity),
                )
            )
    return tuple(sorted(events, key=lambda event: event.first))


def _stream(name: str, seed: int) -> np.random.Generator:
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4").tolist()
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*words, seed])))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.clip(np.exp(rng.uniform(np.log(low), np.log(high))), low, high))


class Disturber:
    """The events of N runs, and the faults that they make of an interval, for all runs at once.

    Args:
        settings: what may happen to every run.
        num_runs: N.

    Attributes:
        events: the events of each run, () before its first start.
    """

    def __init__(self, settings: Sequence[DisturbanceSettings], num_runs: int) -> None:
        self.settings = tuple(settings)
        self.events: list[tuple[Event, ...]] = [()] * num_runs
        self._kind = np.zeros((num_runs, 0), dtype=np.int64)
        self._first, self._end = np.zeros_like(self._kind), np.zeros_like(self._kind)
        self._severity = np.zeros((num_runs, 0))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds that may happen, each once."""
        return tuple(dict.fromkeys(one.kind for one in self.settings))

    def write(self, runs: Sequence[int], instances: Sequence[Instance]) -> None:
        """Draws the events of ``instances``, which start in ``runs``."""
        self.plan(runs, [draw_events(self.settings, instance.seed, instance.steps) for instance in instances])

    def plan(self, runs: Sequence[int], events: Sequence[tuple[Event, ...]]) -> None:
        """Puts ``events[i]`` in the place of those that await run ``runs[i]``; their kinds must be among ``kinds``."""
        for run, planned in zip(runs, events, strict=True):
            self.events[run] = planned
        most = max(len(held) for held in self.events)
        table = np.zeros((4, len(self.events), most))
        for run, held in enumerate(self.events):
            rows = [(_NUMBER[one.kind], one.first, one.first + one.steps, one.severity) for one in held]
            table[:, run, : len(held)] = np.array(rows, dtype=np.float64).reshape(-1, 4).T
        self._kind, self._first, self._end = (part.astype(np.int64) for part in table[:3])
        self._severity = table[3]

    def _active(self, when: np.ndarray) -> np.ndarray:
        """(K, N, E) bool: which events are under way at the steps ``when`` (K, N); one of severity 0 never is."""
        return (self._first <= when[..., None]) & (when[..., None] < self._end) & (self._severity > 0)

    def __call__(self, steps_done: np.ndarray, steps: int) -> FaultRows:
        """What happens to the next ``steps`` of runs that have done ``steps_done`` (N,)."""
        rows = FaultRows.calm(steps, len(steps_done))
        active = self._active(steps_done + np.arange(steps)[:, None])
        if not active.any():
            return rows
        for kind in self.kinds:
            severity = np.where(active & (self._kind == _NUMBER[kind]), self._severity, 0.0).max(-1)
            hit = severity > 0
            for name, value in DISTURBANCES[kind].acts(severity).items():
                column = rows.column(name)
                column[hit] = np.broadcast_to(value, hit.shape)[hit]
        return rows

    def active_steps(self, steps_done: np.ndarray, steps: int) -> dict[str, np.ndarray]:
        """In how many of the last ``steps`` of runs that have done ``steps_done`` (N,) each kind was active, (N,)."""
        active = self._active(steps_done - 1 - np.arange(steps)[:, None])
        return {kind: (active & (self._kind == _NUMBER[kind])).any(-1).sum(0) for kind in self.kinds}
