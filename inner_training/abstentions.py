"""Levers whose policy gives no answer, again and again: they hold at first, and then return towards null."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trimtab.inner_training.levers import Lever

NEAR = 1e-9  # relative to the way to null: as good as there


class Abstentions:
    """How long each lever of N runs has had no answer, and its way back to null.

    Attributes:
        row: (N, L) int64, decisions in a row without an answer that could be used.
    """

    ARRAYS = ("row",)

    def __init__(self, most: int | None, levers: Sequence[Lever], num_runs: int) -> None:
        self._most, self._rates = most, np.array([lever.rate for lever in levers])
        self._lowest = np.array([lever.low for lever in levers])
        self.row = np.zeros((num_runs, len(levers)), dtype=np.int64)

    def reset(self, mask: np.ndarray) -> None:
        """Forgets the runs in ``mask`` (bool, (N,))."""
        self.row[mask] = 0

    def note(self, silent: np.ndarray, answered: np.ndarray) -> np.ndarray:
        """Counts a decision; (N, L) bool, the levers that have been without an answer for too long.

        Args:
            silent, answered: (N, L) bool; of levers that are neither nothing is known.
        """
        self.row = np.where(silent, self.row + 1, np.where(answered, 0, self.row))
        if self._most is None:
            return np.zeros(self.row.shape, dtype=bool)
        too_long: np.ndarray = silent & (self.row > self._most)
        return too_long

    def way(self, multipliers: np.ndarray, rate_scale: float) -> np.ndarray:
        """Moves (N, L) that lead to null, in units of each lever's rate, of any size."""
        moves: np.ndarray = -np.log(self._start(multipliers)) / (self._rates * rate_scale)
        return moves

    def moved(self, multipliers: np.ndarray, moves: np.ndarray, rate_scale: float) -> np.ndarray:
        """Multipliers (N, L) after such moves, exactly 1 where they lead all the way."""
        left = np.abs(self.way(multipliers, rate_scale) - moves)
        there = left <= NEAR * np.abs(moves)
        return np.where(there, 1.0, self._start(multipliers) * np.exp(moves * self._rates * rate_scale))

    def _start(self, multipliers: np.ndarray) -> np.ndarray:
        # A target may stand lower than moves may go, at 0 even, from which no factor leads back.
        return np.maximum(multipliers, self._lowest)
