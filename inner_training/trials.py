"""Bounded experiments: moves are watched for a while, and taken back where the loss has risen."""

from __future__ import annotations

import numpy as np

DECAY = 0.5  # per decision, of the short-term ln loss


class Trials:
    """Moves of N runs that are on trial.

    A trial begins with a move while none is under way; later moves join it. After ``window`` decisions everything is kept,
    or taken back together, where the short-term ln loss lies more than ``rise`` above what it was before.

    Attributes:
        kept: (N, L) multipliers before the trial that is under way.
        left: (N,) int64, decisions until it is judged; 0 where there is none.
        before, level: (N,) short-term ln loss before the trial, and now; NaN where unknown.
    """

    ARRAYS = ("kept", "left", "before", "level")

    def __init__(self, window: int | None, rise: float, num_runs: int, num_levers: int) -> None:
        self._window, self._rise = window, rise
        self.kept = np.ones((num_runs, num_levers))
        self.left = np.zeros(num_runs, dtype=np.int64)
        self.before, self.level = np.full(num_runs, np.nan), np.full(num_runs, np.nan)

    def reset(self, mask: np.ndarray) -> None:
        """Forgets the runs in ``mask`` (bool, (N,))."""
        self.kept[mask], self.left[mask] = 1.0, 0
        self.before[mask] = self.level[mask] = np.nan

    def note(self, mean_loss: np.ndarray, calm: np.ndarray, rolled_back: np.ndarray) -> None:
        """Notes the mean loss (N,) of an interval of the runs in ``calm``; a rollback ends a trial without a verdict."""
        if self._window is None:
            return
        with np.errstate(divide="ignore", invalid="ignore"):
            now = np.log(mean_loss)
        usable = calm & np.isfinite(now)
        moved = np.where(np.isnan(self.level), now, DECAY * self.level + (1 - DECAY) * now)
        self.level[usable] = moved[usable]
        self.left[rolled_back] = 0

    def verdict(self) -> np.ndarray:
        """Passes on by one decision; (N,) bool, the runs whose trial has failed."""
        if self._window is None:
            return np.zeros(len(self.left), dtype=bool)
        ends = self.left == 1
        self.left = np.maximum(self.left - 1, 0)
        return ends & (self.level - self.before > self._rise)

    def begin(self, multipliers: np.ndarray, moved: np.ndarray) -> None:
        """Puts moves of the runs in ``moved`` (bool, (N,)) on trial; ``multipliers`` (N, L) are those before them."""
        if self._window is None:
            return
        fresh = moved & (self.left == 0) & np.isfinite(self.level)
        self.kept = np.where(fresh[:, None], multipliers, self.kept)
        self.before = np.where(fresh, self.level, self.before)
        self.left = np.where(fresh, self._window, self.left)
