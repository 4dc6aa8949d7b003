"""What a signal may look at: one decision's reading of N runs, and a memory of earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.inner_training.edits import UnitCounts
from trimtab.inner_training.telemetry import Measured

Fold = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def _nan(num_runs: int) -> np.ndarray:
    return np.full(num_runs, np.nan)


@dataclass(kw_only=True)
class Reading:
    """Host-side state of N runs at a decision; every array is float64 of shape (N,) unless said otherwise.

    NaN means "not known here": a run that has not started, a user without a validation set or a budget.

    Attributes:
        measured: telemetry of the interval just finished, or None before the first one.
        fresh: bool (N,), True where no interval has finished since the run (re)started.
        step: optimizer steps done.
        total_steps: budget in steps, NaN when unknown.
        val_loss: validation loss measured since the last decision, NaN when there is none.
        parameters: number of trained parameters.
        batch_size: examples per step.
        depth: number of weight matrices.
        adaptive: 0 for SGD, 1 for update rules whose steps do not follow the size of the gradient.
        base: base value of each hyperparameter now (the scheduled learning rate, the user's momentum, ...).
        initial_lr: the learning rate that the run started with, before schedule and multipliers.
        multipliers: current multiplier of each lever.
        moves: natural log of the last change of each lever's multiplier.
        available: bool (N,) per lever: does it exist for this run?
        caution: the guard's own factor on the learning rate, in (0, 1].
        rollbacks_left: share of the rollback budget left, in [0, 1].
        rolled_back: bool (N,): the guard restored a snapshot at this decision.
        clock: time since the run started: seconds of a live run, in a population usual steps (see ``slow-steps``).
        deadline: the time that it may take, in the same unit.
        energy: joules per optimizer step of the interval just finished.
        units: of the runs; None where nobody counts them.
        edits_left: share of the budget of structural edits left.
        edit_rest: share of the rest after a structural edit that is left.
        measurable: bool (N,): whether signals may know of further measurements.
    """

    measured: Measured | None
    fresh: np.ndarray
    step: np.ndarray
    total_steps: np.ndarray
    val_loss: np.ndarray
    parameters: np.ndarray
    batch_size: np.ndarray
    depth: np.ndarray
    adaptive: np.ndarray
    base: Mapping[str, np.ndarray]
    initial_lr: np.ndarray
    multipliers: Mapping[str, np.ndarray] = field(default_factory=dict)
    moves: Mapping[str, np.ndarray] = field(default_factory=dict)
    available: Mapping[str, np.ndarray] = field(default_factory=dict)
    caution: np.ndarray = field(default_factory=lambda: np.ones(1))
    rollbacks_left: np.ndarray = field(default_factory=lambda: np.ones(1))
    rolled_back: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=bool))
    clock: np.ndarray = field(default_factory=lambda: _nan(1))
    deadline: np.ndarray = field(default_factory=lambda: _nan(1))
    energy: np.ndarray = field(default_factory=lambda: _nan(1))
    units: UnitCounts | None = None
    edits_left: np.ndarray = field(default_factory=lambda: _nan(1))
    edit_rest: np.ndarray = field(default_factory=lambda: _nan(1))
    measurable: np.ndarray = field(default_factory=lambda: np.ones(1, dtype=bool))

    @property
    def num_runs(self) -> int:
        """Number of runs N."""
        return len(self.step)

    def losses(self) -> np.ndarray:
        """(K, N) losses of the interval; NaN where a run is fresh, was rolled back, or the loss is not finite."""
        if self.measured is None:
            return np.full((1, self.num_runs), np.nan)
        hidden = (self.fresh | self.rolled_back)[None] | ~np.isfinite(self.measured.losses)
        return np.where(hidden, np.nan, self.measured.losses)

    def sampled(self, name: str) -> np.ndarray:
        """A sampled statistic of the interval ((N,), (S, N) or (3, N)), NaN where it is not known or not finite."""
        if self.measured is None:
            return _nan(self.num_runs)
        value: np.ndarray = getattr(self.measured, name)
        return self._shown(value)

    def total(self, name: str) -> np.ndarray:
        """L2 norm (N,) of the whole model from one by depth (``update_norm``, ``weight_norm``), NaN where unknown."""
        by_depth = self.sampled(name)
        return by_depth if by_depth.ndim == 1 else np.sqrt((by_depth**2).sum(0))

    def probed(self, name: str) -> np.ndarray:
        """A further measurement (N,) or (C, N) of the interval, NaN where not taken or not finite; (N,) if by nobody."""
        taken = None if self.measured is None else self.measured.probed.get(name)
        return _nan(self.num_runs) if taken is None else np.where(self.measurable, self._shown(taken), np.nan)

    def _shown(self, value: np.ndarray) -> np.ndarray:
        hidden = (self.fresh | self.rolled_back) | ~np.isfinite(value)
        return np.where(hidden, np.nan, value)


class Memory:
    """Running statistics of N runs that signals share, updated once per decision and forgotten on reset.

    Every statistic has a name; asking twice at one decision gives the same array. A NaN input leaves a
    statistic as it was, and a statistic that has seen nothing yet is NaN. All arrays are float64 (N,), but for the
    states of ``fold``.
    """

    def __init__(self, num_runs: int) -> None:
        self.num_runs = num_runs
        self._stored: dict[str, np.ndarray] = {}
        self._current: dict[tuple[str, str], np.ndarray] = {}
        self._active = np.ones(num_runs, dtype=bool)

    def begin(self, active: np.ndarray | None = None) -> None:
        """Starts a new decision: statistics may be updated once more, of the runs in ``active`` (bool, (N,)) only."""
        self._current = {}
        self._active = np.ones(self.num_runs, dtype=bool) if active is None else active

    def _slot(self, key: str, value: float) -> np.ndarray:
        if key not in self._stored:
            self._stored[key] = np.full(self.num_runs, value)
        return self._stored[key]

    def once(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """What several signals need at this decision, of any shape, computed the first time."""
        if (name, "once") not in self._current:
            self._current[name, "once"] = compute()
        return self._current[name, "once"]

    def ema(self, name: str, value: np.ndarray, decay: float) -> np.ndarray:
        """Exponential average with bias correction: weight ``1 - decay`` on the newest value."""
        if (name, "ema") not in self._current:
            mean, weight = self._slot(name + "/mean", 0.0), self._slot(name + "/weight", 0.0)
            seen = np.isfinite(value) & self._active
            np.copyto(mean, decay * mean + (1 - decay) * value, where=seen)
            np.copyto(weight, decay * weight + (1 - decay), where=seen)
            self._current[name, "ema"] = np.divide(mean, weight, out=_nan(self.num_runs), where=weight > 0)
        return self._current[name, "ema"]

    def first(self, name: str, value: np.ndarray) -> np.ndarray:
        """The first finite value ever seen."""
        if (name, "first") not in self._current:
            held = self._slot(name + "/first", np.nan)
            new = np.isnan(held) & np.isfinite(value) & self._active
            held[new] = value[new]
            self._current[name, "first"] = held.copy()
        return self._current[name, "first"]

    def best(self, name: str, value: np.ndarray) -> np.ndarray:
        """The smallest finite value up to now."""
        if (name, "best") not in self._current:
            held = self._slot(name + "/best", np.nan)
            np.fmin(held, value, out=held, where=self._active)
            self._current[name, "best"] = held.copy()
        return self._current[name, "best"]

    def latest(self, name: str, value: np.ndarray) -> np.ndarray:
        """The newest finite value (held while none arrives)."""
        if (name, "latest") not in self._current:
            held = self._slot(name + "/latest", np.nan)
            seen = np.isfinite(value) & self._active
            held[seen] = value[seen]
            self._current[name, "latest"] = held.copy()
        return self._current[name, "latest"]

    def previous(self, name: str, value: np.ndarray) -> np.ndarray:
        """The newest finite value of *earlier* decisions."""
        if (name, "previous") not in self._current:
            held = self._slot(name + "/previous", np.nan)
            self._current[name, "previous"] = held.copy()
            seen = np.isfinite(value) & self._active
            held[seen] = value[seen]
        return self._current[name, "previous"]

    def since(self, name: str, event: np.ndarray) -> np.ndarray:
        """Decisions since ``event`` (bool) was last True, or since the start."""
        if (name, "since") not in self._current:
            held = self._slot(name + "/since", 0.0)
            held += self._active
            held[event & self._active] = 0
            self._current[name, "since"] = held.copy()
        return self._current[name, "since"]

    def fold(self, name: str, width: int, update: Fold) -> np.ndarray:
        """A statistic of one's own: ``update`` takes the state (N, width) to the next one and a value (N,).

        It is called once per decision. The state is all zeros at the start of a run.
        """
        if (name, "fold") not in self._current:
            held = self._stored.setdefault(name + "/fold", np.zeros((self.num_runs, width)))
            after, self._current[name, "fold"] = update(held)
            held[self._active] = after[self._active]
        return self._current[name, "fold"]

    def reset(self, mask: np.ndarray) -> None:
        """Forgets the runs where ``mask`` (bool, (N,)) is True."""
        for key, held in self._stored.items():
            held[mask] = np.nan if key.endswith(("/first", "/best", "/latest", "/previous")) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, JSON-serialisable but for NaN (which Python's json reads and writes)."""
        return {key: held.tolist() for key, held in self._stored.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        self._stored = {key: np.asarray(held, dtype=np.float64) for key, held in state.items()}
        self._current = {}
