"""Has a run diverged, what is to be done about it, and how careful must it be afterwards? For N runs at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trimtab.inner_training.guard_config import GuardConfig, Reason
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.setbacks import Ill, Setbacks

SUDDEN_AFTER = 2  # calm intervals from which losses that are not finite, out of the blue, are no fault of the rate
SPARED = 2  # times in a row: a fault of a few steps may lie across two intervals
USUAL = 0.9  # decay per decision of the loss that is usual


class Restorable(Protocol):
    """Runs that can be put back; masks are bool arrays of shape (N,)."""

    def snapshot(self, mask: np.ndarray) -> None:
        """Notes the present as stable."""

    def restore(self, mask: np.ndarray, keep: np.ndarray | None = None, sound: np.ndarray | None = None) -> None:
        """Puts runs back to their last stable moment, which is the newest of ``sound`` runs.

        What runs in ``keep`` give up is kept.
        """

    def resume(self, mask: np.ndarray) -> None:
        """Puts runs to what they gave up."""


@dataclass(frozen=True)
class Health:
    """What the guard concluded from a reading; bool arrays of shape (N,).

    Attributes:
        stable: this moment may become a snapshot.
        rollback: the run must be put back now, to the last stable snapshot or, where ``resumed``, to what it was before
            that.
        setback: it is for a setback, and not because the run has diverged.
        by_val: that setback is one of the validation loss alone.
        sound: before it is put back its newest snapshot becomes the last stable one.
        kept: what is given up by that is to be kept, for it may be resumed.
        resumed: see there.
        lost: the run has diverged for good.
    """

    stable: np.ndarray
    rollback: np.ndarray
    setback: np.ndarray
    by_val: np.ndarray
    sound: np.ndarray
    kept: np.ndarray
    resumed: np.ndarray
    lost: np.ndarray

    @property
    def trying(self) -> np.ndarray:
        """(N,) bool, a stable moment is being tried after a setback, or has just been given up again: levers hold."""
        return (self.kept & self.setback) | self.resumed

    @property
    def reasons(self) -> np.ndarray:
        """(N,) ``Reason`` codes of what befell the runs."""
        code = np.where(self.setback, Reason.SETBACK, Reason.ROLLED_BACK)
        code = np.where(self.setback & self.by_val, Reason.SETBACK_VALIDATION, code)
        return np.where(self.resumed, Reason.RESUMED, np.where(self.rollback, code, 0))

    def carry_out(self, runs: Restorable) -> None:
        """Takes snapshots and puts runs back."""
        runs.snapshot(self.stable)
        runs.restore(self.rollback & ~self.resumed, self.kept, self.sound)
        runs.resume(self.resumed)


class Divergence:
    """Judges intervals, and keeps the caution that rollbacks leave behind.

    Attributes:
        caution: (N,) factor on the learning rate, lowered by rollbacks and given back by calm decisions.
        rollbacks: (N,) int64, those done.
        spent: (N,) int64, how much of the budget is spent; calm gives it back.
        lost: (N,) bool, runs that diverged for good.
        cap: (N,) the most that ``caution`` may return to.
        cap_before, backed_before: (N,) ``cap`` and ``backed_off`` before the last rollback, for when it is given back.
        calm: (N,) int64, calm intervals since the start or the last rollback.
        first, usual: (N,) loss of the first step, and a long-term average of the intervals' means.
        size: (N,) long-term average of the intervals' mean absolute losses.
        signed: (N,) bool, the loss has been negative, so that it may lie near 0 by chance.
        exploded: (N,) bool, rolled back for a finite explosion at the last decision.
        unsound: (N,) bool, the last rollback was for what is not finite, which no data explain.
        backed_off: (N,) bool, the rate has been lowered before.
        blamed: (N,) bool, the last rollback lowered it.
        spared: (N,) int64, rollbacks in a row that did not, because they came out of the blue.
        setbacks: what becomes of losses that rise suddenly and less than an explosion.
        mean: (N,) mean loss of the last interval, NaN where it was not finite.
    """

    ARRAYS = (
        "cap_before",
        "backed_before",
        "caution",
        "rollbacks",
        "lost",
        "cap",
        "calm",
        "first",
        "usual",
        "size",
        "signed",
        "exploded",
        "unsound",
        "backed_off",
        "blamed",
        "spared",
        "spent",
    )

    def __init__(self, config: GuardConfig, num_runs: int) -> None:
        self.config = config
        self.caution, self.cap, self.cap_before = (np.ones(num_runs) for _ in range(3))
        self.rollbacks, self.calm = np.zeros(num_runs, dtype=np.int64), np.zeros(num_runs, dtype=np.int64)
        self.spared, self.spent = np.zeros(num_runs, dtype=np.int64), np.zeros(num_runs, dtype=np.int64)
        self.lost, self.exploded, self.backed_off, self.blamed = (np.zeros(num_runs, dtype=bool) for _ in range(4))
        self.unsound, self.signed, self.backed_before = (np.zeros(num_runs, dtype=bool) for _ in range(3))
        self.setbacks = Setbacks(config.setback if config.rollback else None, config.patience, num_runs)
        self.first, self.usual, self.size, self.mean = (np.full(num_runs, np.nan) for _ in range(4))

    def reset(self, mask: np.ndarray) -> None:
        """Starts the runs in ``mask`` (bool, (N,)) afresh."""
        for name, value in (
            ("caution", 1.0),
            ("cap", 1.0),
            ("cap_before", 1.0),
            ("first", np.nan),
            ("usual", np.nan),
            ("size", np.nan),
        ):
            getattr(self, name)[mask] = value
        for name in (
            "rollbacks",
            "calm",
            "lost",
            "exploded",
            "backed_off",
            "blamed",
            "spared",
            "spent",
            "unsound",
            "signed",
            "backed_before",
        ):
            getattr(self, name)[mask] = 0

    def judge(self, reading: Reading, settling: np.ndarray | None = None) -> Health:
        """Judges the interval just finished: divergence is a non-finite statistic or an explosion of the loss.

        A loss that stands as high again after a rollback, before the restored weights have made a step, is that of other
        data: the run then goes on from there, and what the rollback cost it is given back. A rise in runs that are
        ``settling`` (bool, (N,)) after an edit of their structure is no setback.
        """
        assert reading.measured is not None
        measured, live, config = reading.measured, ~reading.fresh & ~self.lost, self.config
        finite = np.isfinite(measured.losses).all(0) & np.isfinite(measured.grad_norm).all(0)
        finite &= np.isfinite(measured.update_norm).all(0) & np.isfinite(measured.weight_norm).all(0)
        mean = self.mean = np.where(finite[None], measured.losses, np.nan).mean(0)
        first = np.where(np.isnan(self.first), np.where(finite, measured.losses[0], np.nan), self.first)
        signed = self.signed | (measured.losses < 0).any(0)
        limit = config.explosion * self._height(first, measured.losses, signed)
        exploded = finite & (mean > limit)  # upwards only: a loss that may be negative falls without bound
        shifted = live & exploded & self.exploded & (measured.losses[0] > limit)
        shifted |= finite & ~self.unsound & self.setbacks.blames_data(measured.losses, live)
        diverged = live & (~finite | exploded) & ~shifted
        possible = config.rollback & (self.spent < config.rollback_budget)
        # Half of the budget is for what cannot go on.
        spare = config.rollback & ~signed & (self.spent < config.rollback_budget // 2)
        # What is tried must be judged before the run ends.
        spare &= ~(reading.total_steps - reading.step < 2 * len(measured.losses))
        put_back = diverged & possible
        sound = self.setbacks.confirms(measured.losses)
        self.setbacks.expect(measured.losses, reading.val_loss, settling)
        setback = self.setbacks.judge(
            measured.losses, reading.val_loss, live, Ill(diverged, put_back, put_back & finite), spare
        )
        self._give_back(shifted)
        self.first[live] = first[live]
        calm = live & ~diverged & ~setback.rollback
        usual = np.where(np.isnan(self.usual), mean, USUAL * self.usual + (1 - USUAL) * mean)
        self.usual[calm] = np.where(shifted, np.fmax(mean, usual), usual)[calm]
        self._measure(measured.losses, calm, signed)
        rollback = put_back | setback.rollback
        high = np.where(np.isfinite(measured.losses), measured.losses, -np.inf).max(0) > limit
        sudden = diverged & ~finite & ~high
        sudden &= (self.calm >= SUDDEN_AFTER) | ((self.calm == 0) & (self.spared > 0) & (self.spared < SPARED))
        self.spared = np.where(sudden & possible, self.spared + 1, 0)
        self._back_off(rollback, sudden | (setback.rollback & ~setback.again))
        self._recover(calm)
        self.calm = np.where(calm, self.calm + 1, np.where(rollback, 0, self.calm))
        if config.renewal is not None:
            self.spent -= calm & (self.spent > 0) & (self.calm % config.renewal == 0)
        self.exploded = np.where(live, rollback & finite & diverged, self.exploded)
        self.unsound = np.where(rollback, ~finite, self.unsound)
        # A loss that is high but finite may still come down: without a rollback only a non-finite run is lost.
        self.lost = self.lost | (diverged & ~rollback & ~finite)
        return Health(
            stable=calm & ~setback.unsure & ~setback.resumed,
            rollback=rollback | setback.resumed,
            setback=setback.rollback,
            by_val=setback.by_val,
            sound=sound & rollback & (sudden | setback.rollback),
            kept=setback.kept,
            resumed=setback.resumed,
            lost=self.lost.copy(),
        )

    def _height(self, first: np.ndarray, losses: np.ndarray, signed: np.ndarray) -> np.ndarray:
        """(N,) how large a loss is: of its first step or usually; of one that may lie near 0 by chance, its usual size."""
        size = np.where(np.isnan(self.size), np.abs(losses[: max(len(losses) // 3, 1)]).mean(0), self.size)
        height: np.ndarray = np.abs(np.fmax(first, self.usual))
        return np.where(signed, np.fmax(height, size), height)

    def _measure(self, losses: np.ndarray, calm: np.ndarray, signed: np.ndarray) -> None:
        size = np.abs(losses).mean(0)
        usual = np.where(np.isnan(self.size), size, USUAL * self.size + (1 - USUAL) * size)
        self.size[calm] = usual[calm]
        self.signed |= calm & signed

    def ask(self, rollback: np.ndarray) -> None:
        """Counts rollbacks (N,) that somebody else asked for; the rate is theirs to lower."""
        self.rollbacks[rollback] += 1
        self.spent[rollback] += 1
        self.calm[rollback] = 0

    def _give_back(self, shifted: np.ndarray) -> None:
        self.rollbacks[shifted] -= 1
        self.spent[shifted] = np.maximum(self.spent[shifted] - 1, 0)
        back = shifted & self.blamed
        self.cap[back], self.backed_off[back] = self.cap_before[back], self.backed_before[back]
        self.caution[back] = np.minimum(self.caution[back] / self.config.backoff, 1.0)

    def _back_off(self, rollback: np.ndarray, sudden: np.ndarray) -> None:
        """Counts rollbacks and lowers the rate; out of the blue, when all was calm, the rate is not to blame."""
        self.rollbacks[rollback] += 1
        self.spent[rollback] += 1
        blamed = rollback & ~sudden
        self.cap_before = np.where(rollback, self.cap, self.cap_before)
        self.backed_before = np.where(rollback, self.backed_off, self.backed_before)
        self.caution[blamed] *= self.config.backoff
        again = blamed & self.backed_off  # the rate that it had come back to was too large
        self.cap[again] = self.caution[again]
        self.backed_off |= blamed
        self.blamed = np.where(rollback, blamed, self.blamed)

    def _recover(self, calm: np.ndarray) -> None:
        ready = calm & (self.calm >= self.config.aftermath)
        self.caution = np.where(ready, np.minimum(self.caution * self.config.recovery, self.cap), self.caution)
