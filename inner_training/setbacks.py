"""Setbacks: a loss that suddenly stands higher than before. Are the weights damaged, or are the data? For N runs at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FALLING, RISING = 0.5, 0.8  # decays per decision of the usual ln loss, which follows a loss down sooner than up
SPREAD = 0.9  # the same of its usual change from one decision to the next
FIRST = 0.05  # of the usual change, until it is known
WIDTHS = 4.0  # usual changes above the usual loss that are no chance
AFTER = 3  # intervals before a level is known
SHORTEST = 5  # steps; the losses of shorter intervals are too noisy to tell anything by
DATA = 0.75  # share of such a height, above which the first losses of a moment that is tried are those of other data
FALL = 0.5  # share of the way back to where it was that a loss falls at once when bad data are over
LEFT = 0.25  # share of the rise that is left when a setback ends by itself, above which the moment before is better
MOST = 3  # times that a setback of the validation loss alone is undone
MOST_DOUBT = 3
WARY = 8  # decisions per doubt, for which a moment is not tried
NEVER = 10**9
CALM, TRIED, OPEN = 0, 1, 2


class Verdict(NamedTuple):
    """What is to be done; bool arrays of shape (N,).

    Attributes:
        rollback: the last stable moment is to be tried; what is given up is kept where ``kept``.
        kept: see there.
        resumed: what was given up is to be taken up again.
        by_val: it was the validation loss alone that rose.
        again: the loss rose once more from the stable moment: the rate is to blame.
        unsure: this moment must not become a snapshot.
    """

    rollback: np.ndarray
    kept: np.ndarray
    resumed: np.ndarray
    by_val: np.ndarray
    again: np.ndarray
    unsure: np.ndarray


class Ill(NamedTuple):
    """Runs that have diverged; bool arrays of shape (N,).

    Attributes:
        diverged: all of them.
        put_back: those that are rolled back for it.
        finite: those again whose losses and weights are still numbers, so that they may be resumed.
    """

    diverged: np.ndarray
    put_back: np.ndarray
    finite: np.ndarray


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


class _Seen(NamedTuple):
    """What an interval shows, (N,) each.

    Attributes:
        ends, val: ln training loss of its second half, and ln validation loss.
        usable: bool, it says something about the run.
        high, worse: bool, the training loss and the validation loss are higher than chance explains.
        data: bool, the moment that is tried did no better before it had made a step.
        fallen: bool, the loss has fallen much of the way back at once.
        left: bool, more of the setback is left than the moment before would have.
    """

    ends: np.ndarray
    val: np.ndarray
    usable: np.ndarray
    high: np.ndarray
    worse: np.ndarray
    data: np.ndarray
    fallen: np.ndarray
    left: np.ndarray


class Setbacks:
    """Watches the loss of N runs, and tries the last stable moment when it suddenly stands higher.

    A rise is sudden when the ln loss of the second half of an interval, or the validation loss, lies ``rise`` above its
    usual level, and more than its usual changes explain. Then the last stable moment is tried for an interval. If its
    first losses are as they were before, the weights had been damaged: the run goes on from there. If they are high before
    it has made a step, the data are bad or have become others: what was given up is taken up again, and the stable moment
    is kept, to be tried when the loss falls as suddenly as it rose, when the setback is nearly over, and now and then. After
    ``patience`` decisions the new height is what is usual. A run whose data became others is tried less readily next time.
    Intervals of fewer than five steps are not watched.

    Args:
        rise: > 0; None watches nothing.
        patience: decisions, >= 1.
        num_runs: N.

    Attributes:
        train, val: what is usual.
        phase: (N,) int64, ``CALM``, ``TRIED`` or ``OPEN``.
        age, tries, wait: (N,) int64, decisions since the setback began, rollbacks in it, and the age from which the stable
            moment is tried again.
        doubt: (N,) int64, setbacks in a row that the stable moment did not help.
        peak: (N,) ln training loss of the interval before.
        kept: (N,) bool, what was given up is still there.
        by_val: (N,) bool, only the validation loss has risen; ``risen`` (N,) to what.
    """

    ARRAYS = ("phase", "age", "tries", "wait", "doubt", "peak", "kept", "by_val", "risen")

    def __init__(self, rise: float | None, patience: int, num_runs: int) -> None:
        self._rise, self._patience = np.inf if rise is None else rise, patience
        self.train, self.val = Usual(num_runs), Usual(num_runs)
        self.peak, self.risen = np.full(num_runs, np.nan), np.full(num_runs, np.nan)
        self.kept, self.by_val = np.zeros(num_runs, dtype=bool), np.zeros(num_runs, dtype=bool)
        self.phase, self.age, self.tries, self.wait, self.doubt = (np.zeros(num_runs, dtype=np.int64) for _ in range(5))

    def reset(self, mask: np.ndarray) -> None:
        """Forgets the runs in ``mask`` (bool, (N,))."""
        for one in (self.train, self.val):
            one.reset(mask)
        self.peak[mask] = self.risen[mask] = np.nan
        for name in ("phase", "age", "tries", "wait", "doubt", "kept", "by_val"):
            getattr(self, name)[mask] = 0

    def blames_data(self, losses: np.ndarray, live: np.ndarray) -> np.ndarray:
        """(N,) bool, runs whose restored moment did no better before it had made a step; ``losses`` as in ``judge``."""
        if len(losses) < SHORTEST:
            return np.zeros(len(live), dtype=bool)
        height = _first(losses) - self.train.before
        known = live & (self.phase == TRIED) & (self.train.seen >= AFTER)
        blamed: np.ndarray = known & (height > DATA * self.train.wide(self._rise))
        return blamed

    def confirms(self, losses: np.ndarray) -> np.ndarray:
        """(N,) bool, runs whose first losses since the newest snapshot are as usual, so that it is a stable moment."""
        height = _first(losses) - self.train.level
        known = (self.phase == CALM) & (self.train.seen >= AFTER) & np.isfinite(self._rise)
        usual: np.ndarray = known & (height < self.train.wide(self._rise) / 2) & (len(losses) >= SHORTEST)
        return usual

    def expect(self, losses: np.ndarray, val_loss: np.ndarray, runs: np.ndarray | None) -> None:
        """Makes a rise usual in those of the ``runs`` (bool, (N,)) that have no setback; losses as in ``judge``."""
        calm = np.zeros(len(val_loss), dtype=bool) if runs is None else runs & (self.phase == CALM)
        for one, value in ((self.train, _ln_mean(losses[len(losses) // 2 :])), (self.val, _ln_mean(val_loss[None]))):
            one.accept(value, calm & (value > one.level))

    def judge(
        self,
        losses: np.ndarray,
        val_loss: np.ndarray,
        live: np.ndarray,
        ill: Ill,
        possible: np.ndarray,
    ) -> Verdict:
        """Judges the interval just finished.

        Args:
            losses: (K, N) of its steps.
            val_loss: (N,) at its end, NaN where unknown.
            live: (N,) bool, runs to judge.
            ill: runs that have diverged.
            possible: (N,) bool, runs that may be rolled back for a setback.
        """
        if len(losses) < SHORTEST:
            nothing = np.zeros(len(live), dtype=bool)
            return Verdict(*[nothing] * len(Verdict._fields))
        seen, put_back = self._look(losses, val_loss, live, ill.diverged), ill.put_back
        calm, tried, still = (self.phase == one for one in (CALM, TRIED, OPEN))
        raised, doubted = seen.high | seen.worse, self.doubt > 0
        begun = possible & calm & raised
        again = possible & tried & ~seen.data & seen.high
        spared = possible & tried & ~seen.data & seen.worse & ~seen.high & (self.tries < MOST)
        closing = still & ~raised & seen.left & (self.wait < NEVER)
        sudden = (still & ~doubted & (seen.fallen | closing)) | (tried & seen.data & seen.fallen)
        peek = possible & (sudden | (still & raised & (self.age >= self.wait)))
        rollback = (begun & ~doubted) | again | spared | peek
        # The validation loss rose and has not been measured since: nothing speaks for the moment that was tried.
        unjudged = seen.usable & tried & self.by_val & np.isnan(seen.val) & ~rollback
        resumed = seen.usable & tried & (seen.data | unjudged) & ~rollback & self.kept
        kept = (begun & ~doubted) | (peek & still) | (calm & ill.finite & np.isfinite(self._rise))
        self._start(begun | (calm & put_back), begun & ~seen.high, seen.val)
        back, others = rollback | put_back, seen.usable & tried & seen.data
        opened = seen.usable & ~back & (others | (still & raised) | begun)
        worn = opened & (self.age > self._patience)
        # Nothing helped against a higher validation loss, or nothing is known of what was usual.
        worn |= seen.usable & tried & ~back & ((seen.worse & ~seen.data) | (self.train.seen < AFTER))
        worn |= unjudged
        self._doubt(still & ~back & (~opened | worn), seen.usable & tried & ~back & ~seen.data & ~worn)
        self.wait = np.where(others & (self.wait < NEVER), self.age + self.age // 2 + 2, self.wait)
        self.wait = np.where(begun & doubted, WARY * self.doubt, np.where(peek & closing, NEVER, self.wait))
        self.kept = np.where(back, self.kept | kept, False)
        self.phase = np.where(back, TRIED, np.where(opened & ~worn, OPEN, CALM))
        self.tries, self.age = self.tries + back, self.age + (self.phase != CALM)
        self._learn(seen, worn)
        self.val.accept(self.risen, unjudged)
        self.peak[back | resumed] = np.nan  # other weights than those of the next interval
        return Verdict(rollback, kept, resumed, rollback & self.by_val, again, raised | (self.phase == OPEN))

    def _look(self, losses: np.ndarray, val_loss: np.ndarray, live: np.ndarray, diverged: np.ndarray) -> _Seen:
        ends, val, calm = _ln_mean(losses[len(losses) // 2 :]), _ln_mean(val_loss[None]), self.phase == CALM
        usable, peak = live & ~diverged & np.isfinite(ends), np.fmax(self.peak, _first(losses))
        return _Seen(
            ends=ends,
            val=val,
            usable=usable,
            high=usable & self.train.high(ends, calm, self._rise),
            worse=usable & self.val.high(val, calm, self._rise),
            data=self.blames_data(losses, live),
            fallen=usable & (peak - ends > np.maximum(self._rise, FALL * (peak - self.train.before))),
            left=np.fmax(ends - self.train.before, val - self.val.before) > LEFT * self._rise,
        )

    def _start(self, begun: np.ndarray, by_val: np.ndarray, val: np.ndarray) -> None:
        self.by_val[begun], self.risen[begun] = by_val[begun], val[begun]
        for one in (self.train, self.val):
            one.before[begun] = one.level[begun]
        for name in ("age", "tries", "wait", "kept"):
            getattr(self, name)[begun] = 0

    def _doubt(self, in_vain: np.ndarray, helped: np.ndarray) -> None:
        self.doubt = np.where(helped, 0, np.minimum(self.doubt + in_vain, MOST_DOUBT))

    def _learn(self, seen: _Seen, worn: np.ndarray) -> None:
        self.peak = np.where(seen.usable, seen.ends, self.peak)
        for one, value in ((self.train, seen.ends), (self.val, seen.val)):
            one.learn(value, seen.usable & (self.phase == CALM) & ~worn)
            one.accept(value, worn)


def _ln_mean(losses: np.ndarray) -> np.ndarray:
    """ln of the mean (N,) of losses (K, N); NaN where it has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(losses.mean(0))
    return np.where(np.isfinite(value), value, np.nan)


def _first(losses: np.ndarray) -> np.ndarray:
    """ln of the mean (N,) of the first third of losses (K, N)."""
    return _ln_mean(losses[: max(len(losses) // 3, 1)])
