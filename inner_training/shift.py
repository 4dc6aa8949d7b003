"""Has the distribution of the losses shifted? Two sequential tests, vectorised over runs, as scores instead of alarms.

Both are pure functions of a state and new values. A state of zeros is one that has seen nothing, and values that are
NaN have not been seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SUSPICION = 0.5  # from this score on a jump is worth following


@dataclass(frozen=True, kw_only=True)
class PageHinkley:
    """Page's cumulative sum against the mean of all values so far, for increases.

    With the mean ``m`` of the values up to and including ``x``, the sum is ``s = fading * s + x - m - allowance`` and
    the statistic is ``s`` above its smallest value. An alarm (the statistic exceeds ``threshold``) starts afresh.
    Page, *Continuous inspection schemes*, Biometrika 41, 1954; alarms are those of ``river.drift.PageHinkley(mode="up")``.

    Attributes:
        allowance: increase of the mean that is tolerated, in units of the values, >= 0.
        threshold: the statistic that is an alarm, > 0.
        fading: factor on the sum at each value, in [0.99, 1].
        patience: values that must have been seen before the statistic counts.
    """

    allowance: float = 0.5
    threshold: float = 20.0
    fading: float = 1 - 1e-4
    patience: int = 20

    width = 4  # numbers in the state of a run: values seen, their mean, the sum, its smallest value

    def update(self, state: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes in the next values.

        Args:
            state: (N, 4).
            values: (K, N), in order.

        Returns:
            The next state, and the score (K, N) after each value: the statistic / threshold, in [0, 1]; 1 is an
            alarm, and a value that was not seen, or comes too early to count, has 0.
        """
        score = np.zeros(values.shape)
        seen = np.isfinite(values)
        while True:
            after, statistic = self._run(state, np.where(seen, values, 0.0), seen)
            alarm = statistic > self.threshold
            first = np.where(alarm.any(0), alarm.argmax(0), len(values))
            passed = seen & (np.arange(len(values))[:, None] <= first)
            score = np.where(passed, np.clip(statistic / self.threshold, 0.0, 1.0), score)
            if (first == len(values)).all():
                return after, score
            # The runs with an alarm start afresh with what comes after it; the others are as they were.
            state = np.where((first < len(values))[:, None], 0.0, state)
            seen = seen & ((first == len(values)) | (np.arange(len(values))[:, None] > first))

    def _run(self, state: np.ndarray, values: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next state and the statistic (K, N) without any alarm."""
        before, mean, total, low = state.T
        count = before + seen.cumsum(0)
        means = (before * mean + values.cumsum(0)) / np.maximum(count, 1)
        # s_k = f^k (s_0 + sum of d_j / f^j): the recurrence in one cumulative sum.
        fade = self.fading ** (count - before)
        sums = fade * (total + np.where(seen, (values - means - self.allowance) / fade, 0.0).cumsum(0))
        start = np.where(before > 0, low, np.inf)
        lows = np.minimum(start, np.minimum.accumulate(np.where(seen, sums, np.inf), axis=0))
        statistic = np.where(seen & (count >= self.patience), sums - lows, 0.0)
        known = count[-1] > 0
        after = np.stack([count[-1], means[-1], sums[-1], np.where(known, lows[-1], 0.0)], axis=1)
        return after, statistic


@dataclass(frozen=True, kw_only=True)
class AdaptiveWindow:
    """A window of past values that is cut where its older and its newer part differ in the mean.

    Cuts lie between intervals, of which the newest ``buckets - 1`` are kept apart; what is older is one bucket. A cut
    into parts of ``n0`` and ``n1`` values is significant when the means differ by more than
    ``sqrt(2 / m * variance * L) + 2 / (3 m) * L`` with ``1 / m = 1 / n0 + 1 / n1`` and
    ``L = ln(2 ln(n0 + n1) / confidence)``; then everything before the most significant cut is forgotten.
    Bifet & Gavalda, *Learning from time-changing data with adaptive windowing*, SDM 2007, section 3.2; values are
    taken to range over about 1.

    Attributes:
        buckets: B, buckets kept, >= 2.
        confidence: delta of the paper, in (0, 1).
        shortest: values in the shorter part, at least.
    """

    buckets: int = 32
    confidence: float = 0.002
    shortest: int = 5

    @property
    def width(self) -> int:
        """Numbers in the state of a run: values, their sum and the sum of their squares, per bucket, oldest first."""
        return 3 * self.buckets

    def update(self, state: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Takes in an interval.

        Args:
            state: (N, 3 B).
            values: (K, N).

        Returns:
            The next state; the score (N,) of an increase, the largest (newer - older mean) / bound of all cuts, in
            [0, 1]; and whether the window was cut (bool, (N,)), be it for an increase or for a decrease.
        """
        seen = np.isfinite(values)
        filled = np.where(seen, values, 0.0)
        newest = np.stack([seen.sum(0), filled.sum(0), (filled**2).sum(0)], axis=1)
        held = state.reshape(len(state), 3, self.buckets)
        pushed = np.concatenate([held[:, :, :1] + held[:, :, 1:2], held[:, :, 2:], newest[:, :, None]], axis=2)
        pushed = np.where(newest[:, :1, None] > 0, pushed, held)
        ratio = self._ratios(pushed)
        cut = np.abs(ratio).max(1) > 1
        forgotten = cut[:, None] & (np.arange(self.buckets) <= np.abs(ratio).argmax(1)[:, None])
        after = np.where(forgotten[:, None], 0.0, pushed)
        return after.reshape(state.shape), np.clip(ratio.max(1), 0.0, 1.0), cut

    def _ratios(self, held: np.ndarray) -> np.ndarray:
        """(N, B - 1) difference of the means over its bound, for the cut behind each bucket but the last."""
        older = held.cumsum(2)
        count, total, square = older[:, :, -1:].transpose(1, 0, 2)
        n0, n1 = older[:, 0, :-1], count - older[:, 0, :-1]
        valid = (n0 >= self.shortest) & (n1 >= self.shortest)
        size = np.maximum(count, 1)
        variance = np.maximum(square / size - (total / size) ** 2, 0.0)
        factor = 1 / np.maximum(n0, 1) + 1 / np.maximum(n1, 1)
        reach = np.log(2 * np.log(np.maximum(count, 3)) / self.confidence)
        bound = np.sqrt(2 * factor * variance * reach) + 2 / 3 * factor * reach
        means = (total - older[:, 1, :-1]) / np.maximum(n1, 1) - older[:, 1, :-1] / np.maximum(n0, 1)
        return np.where(valid, means / bound, 0.0)
