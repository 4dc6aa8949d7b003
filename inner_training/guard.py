"""The guard: what may be done, when, and how it is undone. Vectorised over runs; the same in environments and live runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np

from trimtab.inner_training.envelope import curvature_ceiling, decay_ceiling
from trimtab.inner_training.levers import Lever
from trimtab.inner_training.reading import Reading


class Reason(IntFlag):
    """Why the guard changed what a policy proposed; several may hold at once."""

    NONE = 0
    NOT_FINITE = 1
    UNAVAILABLE = 2
    RATE = 4
    BOUND = 8
    ROLLED_BACK = 16
    LOST = 32
    FAULT = 64
    ENVELOPE = 128


REASON_WORDS: dict[Reason, str] = {
    Reason.NOT_FINITE: "the proposed action was not a finite number, so the lever holds",
    Reason.UNAVAILABLE: "the lever does not exist for this run, so it stays at null",
    Reason.RATE: "the proposed move was larger than the rate limit allows",
    Reason.BOUND: "the proposed multiplier was outside its absolute bounds",
    Reason.ROLLED_BACK: "the run diverged, so the last stable snapshot was restored and the learning rate lowered",
    Reason.LOST: "the run diverged and the rollback budget is spent, so the controller stands back",
    Reason.ENVELOPE: "the learning rate is held below the ceiling of the guard's envelope",
    Reason.FAULT: "the policy raised an error, so every lever holds",
}


def in_words(code: int) -> str:
    """The reasons in ``code`` as one sentence; empty for none.

    >>> in_words(Reason.BOUND)
    'the proposed multiplier was outside its absolute bounds'
    """
    return "; ".join(words for reason, words in REASON_WORDS.items() if code & reason)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Settings of the guard; defaults are ours, calibrated on the training scenarios (docs/decisions.md).

    Attributes:
        rate_scale: factor on every lever's rate limit, in (0, 10].
        rollback: restore the last stable snapshot when a run diverges.
        rollback_budget: rollbacks allowed per run, >= 0.
        backoff: factor on the learning rate after each rollback, in (0, 1].
        explosion: a run has diverged when the mean loss of an interval exceeds this factor times the larger of
            its first loss and its long-term average (of its magnitude, where that is negative); > 1.
        curvature_share: holds the learning rate of SGD below this share, in (0, 1], of what the measured curvature
            allows (``envelope.curvature_ceiling``); None is no such ceiling.
        decay_power: holds the learning rate below a ceiling that decays with this power, in (0.5, 1]
            (``envelope.decay_ceiling``); None is no such ceiling.
        decay_factor: where that ceiling begins, in initial learning rates; > 0.
        decay_after: steps until that ceiling has begun to fall, >= 1.
    """

    rate_scale: float = 1.0
    rollback: bool = True
    rollback_budget: int = 4
    backoff: float = 0.3
    explosion: float = 10.0
    curvature_share: float | None = None
    decay_power: float | None = None
    decay_factor: float = 10.0
    decay_after: int = 100

    @property
    def needs(self) -> tuple[str, ...]:
        """The measurements that the guard reads beside those of every interval."""
        return () if self.curvature_share is None else ("curvature_max",)


@dataclass(frozen=True)
class Health:
    """What the guard concluded from a reading; bool arrays of shape (N,).

    Attributes:
        stable: this moment may become a snapshot.
        rollback: the last stable snapshot must be restored now.
        lost: the run has diverged for good.
    """

    stable: np.ndarray
    rollback: np.ndarray
    lost: np.ndarray


_STATE = ("caution", "rollbacks", "lost", "ceiling", "_first_loss", "_usual_loss", "_curvature", "_exploded")


class Guard:
    """Vectorised safety layer between a policy and the levers of N runs.

    Attributes:
        caution: (N,) factor on the learning rate, lowered by each rollback.
        rollbacks: (N,) rollbacks done.
        lost: (N,) bool, runs that diverged for good.
        ceiling: (N,) the envelope's limit on the factor by which the scheduled learning rate is multiplied; infinite
            without an envelope.
    """

    def __init__(self, config: GuardConfig, levers: Sequence[Lever], num_runs: int) -> None:
        self.config = config
        self.levers = tuple(levers)
        self.caution = np.ones(num_runs)
        self.rollbacks = np.zeros(num_runs, dtype=np.int64)
        self.lost = np.zeros(num_runs, dtype=bool)
        self.ceiling = np.full(num_runs, np.inf)
        self._first_loss = np.full(num_runs, np.nan)
        self._usual_loss = np.full(num_runs, np.nan)
        self._curvature = np.full(num_runs, np.nan)
        self._exploded = np.zeros(num_runs, dtype=bool)  # rolled back for a finite explosion at the last decision

    def reset(self, mask: np.ndarray) -> None:
        """Starts the runs in ``mask`` afresh."""
        self.caution[mask] = 1.0
        self.rollbacks[mask] = 0
        self.lost[mask] = False
        self._first_loss[mask] = np.nan
        self._usual_loss[mask] = np.nan
        self._curvature[mask] = np.nan
        self._exploded[mask] = False
        self.ceiling[mask] = np.inf

    @property
    def rollbacks_left(self) -> np.ndarray:
        """(N,) share of the rollback budget left, in [0, 1]; 0 without rollback."""
        budget = self.config.rollback_budget
        if not self.config.rollback or budget == 0:
            return np.zeros(len(self.rollbacks))
        return 1 - self.rollbacks / budget

    def inspect(self, reading: Reading) -> Health:
        """Judges the interval just finished: divergence is a non-finite statistic or an explosion of the loss.

        A loss that stands as high again after a rollback, before the restored weights have made a step, is that of other
        data: the run then goes on from there, and what the rollback cost it is given back.
        """
        num_runs = reading.num_runs
        nothing = np.zeros(num_runs, dtype=bool)
        if reading.measured is None:
            return Health(stable=~self.lost, rollback=nothing, lost=self.lost.copy())
        measured, live = reading.measured, ~reading.fresh & ~self.lost
        finite = np.isfinite(measured.losses).all(0) & np.isfinite(measured.grad_norm).all(0)
        finite &= np.isfinite(measured.update_norm).all(0) & np.isfinite(measured.weight_norm).all(0)
        mean = np.where(finite[None], measured.losses, np.nan).mean(0)
        first = np.where(np.isnan(self._first_loss), np.where(finite, measured.losses[0], np.nan), self._first_loss)
        limit = self.config.explosion * np.abs(np.fmax(first, self._usual_loss))
        exploded = finite & (mean > limit)  # upwards only: a loss that may be negative falls without bound
        shifted = live & exploded & self._exploded & (measured.losses[0] > limit)
        diverged = live & (~finite | exploded) & ~shifted
        self.rollbacks[shifted] -= 1
        self.caution[shifted] = np.minimum(self.caution[shifted] / self.config.backoff, 1.0)
        self._first_loss[live] = first[live]
        calm = live & ~diverged
        usual = np.where(np.isnan(self._usual_loss), mean, 0.9 * self._usual_loss + 0.1 * mean)
        self._usual_loss[calm] = np.where(shifted, mean, usual)[calm]
        rollback = diverged & self.config.rollback & (self.rollbacks < self.config.rollback_budget)
        self.rollbacks[rollback] += 1
        self.caution[rollback] *= self.config.backoff
        self._exploded = np.where(live, rollback & finite, self._exploded)
        # A loss that is high but finite may still come down: without a rollback only a non-finite run is lost.
        self.lost |= diverged & ~rollback & ~finite
        self._hold(reading, calm)
        return Health(stable=calm, rollback=rollback, lost=self.lost.copy())

    def _hold(self, reading: Reading, calm: np.ndarray) -> None:
        """Sets the ceiling for the steps until the next decision; curvature is held between its measurements."""
        ceiling = np.full(reading.num_runs, np.inf)
        if self.config.curvature_share is not None:
            newest = np.abs(reading.probed("curvature_max"))
            fresh = calm & np.isfinite(newest)
            self._curvature[fresh] = newest[fresh]
            allowed = curvature_ceiling(self._curvature, self.config.curvature_share)
            ceiling = np.where(reading.adaptive > 0, ceiling, allowed)
        if self.config.decay_power is not None:
            first = self.config.decay_factor * reading.initial_lr
            decayed = decay_ceiling(first, reading.step, self.config.decay_power, self.config.decay_after)
            ceiling = np.minimum(ceiling, decayed)
        scheduled = reading.base["lr"]
        self.ceiling = np.divide(ceiling, scheduled, out=np.full(reading.num_runs, np.inf), where=scheduled > 0)

    def limit(
        self, lever: Lever, action: np.ndarray, *, target: bool, multiplier: np.ndarray, available: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Turns a proposed action of one lever into a permitted multiplier.

        Args:
            lever: which lever.
            action: (N,) a move in [-1, 1] in units of the lever's rate, or a target multiplier.
            target: whether ``action`` is a target; targets are held to the absolute bounds only.
            multiplier: (N,) current multiplier.
            available: (N,) bool.

        Returns:
            The new multiplier (N,) and the reasons (N,) as ``Reason`` codes. A move of 0 returns the current
            multiplier bit for bit.
        """
        reason = np.zeros(len(action), dtype=np.int64)
        finite = np.isfinite(action)
        action = np.where(finite, action, 1.0 if target else 0.0)
        if target:
            low, wanted = lever.target_low, np.where(finite, action, multiplier)
        else:
            reason |= np.where(np.abs(action) > 1, Reason.RATE, 0)
            rate = lever.rate * self.config.rate_scale
            low, wanted = lever.low, multiplier * np.exp(np.clip(action, -1.0, 1.0) * rate)
        permitted = np.clip(wanted, low, lever.high)
        reason |= np.where(permitted != wanted, Reason.BOUND, 0)
        permitted = np.where(available, permitted, 1.0)
        reason |= np.where(available, 0, np.where(action != (1.0 if target else 0.0), Reason.UNAVAILABLE, 0))
        permitted = np.where(self.lost, multiplier, permitted)
        reason |= np.where(self.lost, Reason.LOST, 0) | np.where(finite, 0, Reason.NOT_FINITE)
        return permitted, reason

    def state_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return {name: getattr(self, name).tolist() for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave; what a state from before there was an envelope lacks starts afresh."""
        self.reset(np.ones(len(self.lost), dtype=bool))
        for name in _STATE:
            if name in state:
                setattr(self, name, np.asarray(state[name], dtype=getattr(self, name).dtype))
