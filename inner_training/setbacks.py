"""Setbacks: a loss that suddenly stands higher than before. Are the weights damaged, or are the data? For N runs at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FALLING, RISING = 0.5, 0.8  # decays per decision of the usual ln loss, which follows a loss down sooner than up
SPREAD = 0.9  # the same of its usual change from one decision to the next
FIRST = 0.05  # of the usual change, until it is known
WIDTHS = 4.0  # usual changes above the usual loss that are no chance
AFTER = 3  # intervals before a level is known
FALL = 0.5  # share of the way back to where it was that a loss falls when bad data are over
DATA = 0.75  # share of that, above which the first losses of a moment that is tried are those of other data
REST = 0.25  # share of the rise that is left when a setback ends by itself, above which the moment before is better
MOST = 3  # times that a setback of the validation loss alone is undone
MOST_DOUBT = 3
NEVER = 10**9
CALM, TRIED, OPEN = 0, 1, 2


class Verdict(NamedTuple):
    """What is to be done; bool arrays of shape (N,).

    Attributes:
        rollback: the last stable moment is to be tried; what is given up is kept where ``kept``.
        kept: see there.
        resumed: what was given up is to be taken up again.
        again: the loss rose once more from the stable moment: the rate is to blame.
        unsure: this moment must not become a snapshot.
        sound: the newest snapshot has been confirmed by the first losses after it.
    """

    rollback: np.ndarray
    kept: np.ndarray
    resumed: np.ndarray
    again: np.ndarray
    unsure: np.ndarray
    sound: np.ndarray


class Usual:
    """What is usual of a ln loss in each of N runs.

    Attributes:
        level, spread: (N,) short-term average, and usual change from one value to the next.
        last: (N,) newest value.
        seen: (N,) int64, values that these were learned from.
        before: (N,) level when the last setback began.
    """

    ARRAYS = ("level", "spread", "last", "seen", "before")

    def __init__(self, num_runs: int) -> None:
        self.level, self.last, self.before = (np.full(num_runs, np.nan) for _ in range(3))
        self.spread, self.seen = np.full(num_runs, FIRST), np.zeros(num_runs, dtype=np.int64)

    def reset(self, mask: np.ndarray) -> None:
        """Forgets the runs in ``mask`` (bool, (N,))."""
        self.level[mask] = self.last[mask] = self.before[mask] = np.nan
        self.spread[mask], self.seen[mask] = FIRST, 0

    def wide(self, rise: float) -> np.ndarray:
        """(N,) how far above its level a loss is no chance."""
        return np.maximum(rise, WIDTHS * self.spread)

    def high(self, value: np.ndarray, calm: np.ndarray, rise: float) -> np.ndarray:
        """(N,) bool, values that are no chance above the level, or outside of ``calm`` above that before the setback."""
        height = value - np.where(calm, self.level, self.before)
        found: np.ndarray = (self.seen >= AFTER) & (height > self.wide(rise))
        return found

    def learn(self, value: np.ndarray, where: np.ndarray) -> None:
        """Takes in the values of the runs in ``where`` (bool, (N,)), as far as they are finite."""
        where = where & np.isfinite(value)
        change = np.abs(value - self.last)
        known = where & np.isfinite(change)
        self.spread[known] = (SPREAD * self.spread + (1 - SPREAD) * change)[known]
        decay = np.where(value > self.level, RISING, FALLING)
        level = np.where(np.isnan(self.level), value, decay * self.level + (1 - decay) * value)
        self.level[where], self.last[where] = level[where], value[where]
        self.seen += where

    def accept(self, value: np.ndarray, where: np.ndarray) -> None:
        """Makes the finite values of the runs in ``where`` what is usual."""
        where = where & np.isfinite(value)
        self.level[where] = self.last[where] = value[where]


class Setbacks:
    """Watches the loss of N runs, and tries the last stable moment when it suddenly stands higher.

    A rise is sudden when the ln loss of the second half of an interval, or the validation loss, lies ``rise`` above its
    short-term average, and more than its usual changes explain. Then the last stable moment is tried for an interval. If its
    first losses are as they were before, the weights had been damaged: the run goes on from there. If they are high before
    it has made a step, the data are bad or have become others: what was given up is taken up again, and the stable moment
    is kept, to be tried when the loss falls as suddenly as it rose, and now and then. After ``patience`` decisions the
    new height is what is usual.

    Args:
        rise: > 0; None watches nothing.
        patience: decisions, >= 1.
        num_runs: N.

    Attributes:
        train, val: what is usual.
        phase: (N,) int64, ``CALM``, ``TRIED`` or ``OPEN``.
        age, tries, wait: (N,) int64, decisions since the setback began, rollbacks in it, and the age at which the stable
            moment is tried next.
        peak: (N,) ln training loss of the interval before.
        kept: (N,) bool, what was given up is still there.
    """

    ARRAYS = ("phase", "age", "tries", "wait", "peak", "kept", "doubt")

    def __init__(self, rise: float | None, patience: int, num_runs: int) -> None:
        self._rise, self._patience = np.inf if rise is None else rise, patience
        self.train, self.val = Usual(num_runs), Usual(num_runs)
        self.peak, self.kept = np.full(num_runs, np.nan), np.zeros(num_runs, dtype=bool)
        self.phase, self.age, self.tries, self.wait, self.doubt = (np.zeros(num_runs, dtype=np.int64) for _ in range(5))

    def reset(self, mask: np.ndarray) -> None:
        """Forgets the runs in ``mask`` (bool, (N,))."""
        for one in (self.train, self.val):
            one.reset(mask)
        self.peak[mask] = np.nan
        for name in ("phase", "age", "tries", "wait", "kept", "doubt"):
            getattr(self, name)[mask] = 0

    def blames_data(self, losses: np.ndarray, live: np.ndarray) -> np.ndarray:
        """(N,) bool, runs whose restored moment did no better before it had made a step; ``losses`` as in ``judge``."""
        height = _ln_mean(losses[: max(len(losses) // 3, 1)]) - self.train.before
        known = live & (self.phase == TRIED) & (self.train.seen >= AFTER)
        blamed: np.ndarray = known & (height > DATA * self.train.wide(self._rise))
        return blamed

    def judge(
        self,
        losses: np.ndarray,
        val_loss: np.ndarray,
        live: np.ndarray,
        put_back: np.ndarray,
        diverged: np.ndarray,
        possible: np.ndarray,
    ) -> Verdict:
        """Judges the interval just finished.

        Args:
            losses: (K, N) of its steps.
            val_loss: (N,) at its end, NaN where unknown.
            live: (N,) bool, runs to judge.
            put_back: (N,) bool, runs that are rolled back because they have diverged.
            diverged: (N,) bool, runs that have.
            possible: (N,) bool, runs that may be rolled back for a setback.
        """
        begins, ends = _ln_mean(losses[: max(len(losses) // 3, 1)]), _ln_mean(losses[len(losses) // 2 :])
        val, usable = _ln_mean(val_loss[None]), live & ~diverged & np.isfinite(ends)
        calm, tried, still = (self.phase == one for one in (CALM, TRIED, OPEN))
        data = self.blames_data(losses, live)
        high = usable & self.train.high(ends, calm, self._rise)
        worse = usable & self.val.high(val, calm, self._rise)
        peak = np.fmax(self.peak, begins)
        fallen = usable & (peak - ends > np.maximum(self._rise, FALL * (peak - self.train.before)))
        begun = possible & calm & (high | worse)
        again = possible & tried & ~data & high
        spared = possible & tried & ~data & worse & ~high & (self.tries < MOST)
        due = (high | worse) & (self.age >= self.wait)
        rest = np.fmax(ends - self.train.before, val - self.val.before) > REST * self._rise
        closing = ~(high | worse) & rest & (self.wait < NEVER)
        peek = possible & ((tried & data & fallen) | (still & (((fallen | closing) & (self.doubt == 0)) | due)))
        wary = begun & (self.doubt > 0)
        rollback = (begun & ~wary) | again | spared | peek
        resumed = usable & tried & data & ~rollback & self.kept
        kept = (begun & ~wary) | (peek & still)
        sound = calm & (self.train.seen >= AFTER) & (begins - self.train.level < self.train.wide(self._rise) / 2)
        self._start(begun | (calm & put_back))
        back = rollback | put_back
        opened = usable & ~back & ((tried & data) | (still & (high | worse)) | wary)
        worn = (opened & (self.age > self._patience)) | (usable & tried & worse & ~high & ~data & ~back)
        worn |= usable & tried & (self.train.seen < AFTER)
        self.tries += back
        self.wait[wary] = 2 ** (1 + self.doubt[wary])
        self.doubt = np.minimum(np.where(still & ~back & (~opened | worn), self.doubt + 1, self.doubt), MOST_DOUBT)
        self.doubt[usable & tried & ~back & ~data & ~worn] = 0
        self.wait = np.where(tried & opened & (self.wait < NEVER), self.age + self.age // 2 + 2, self.wait)
        self.wait[peek & closing] = NEVER
        self.kept = np.where(back, self.kept | kept, False)
        self.phase = np.where(back, TRIED, np.where(opened & ~worn, OPEN, CALM))
        self.age += self.phase != CALM
        self.peak = np.where(usable, ends, self.peak)
        for one, value in ((self.train, ends), (self.val, val)):
            one.learn(value, usable & (self.phase == CALM) & ~worn)
            one.accept(value, worn)
        return Verdict(rollback, kept, resumed, again, high | worse | (self.phase == OPEN), sound)

    def _start(self, begun: np.ndarray) -> None:
        for one in (self.train, self.val):
            one.before[begun] = one.level[begun]
        self.age[begun], self.tries[begun], self.wait[begun], self.kept[begun] = 0, 0, 0, False


def _ln_mean(losses: np.ndarray) -> np.ndarray:
    """ln of the mean (N,) of losses (K, N); NaN where it has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(losses.mean(0))
    return np.where(np.isfinite(value), value, np.nan)
