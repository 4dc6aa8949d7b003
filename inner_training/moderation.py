"""What becomes of proposed moves: smoothed, held, damped and limited together, for N runs and L levers at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trimtab.inner_training.guard_config import GuardConfig, Reason
from trimtab.inner_training.levers import Lever

MEMORY = 0.7  # decay per decision of how much a lever goes to and fro


class Moderation:
    """The memory of moves that the guard needs to moderate the next ones.

    Attributes:
        last: (N, L) the last move of each lever that was not 0, in units of its rate, 0 before the first one.
        wavering: (N, L) in [0, 1], how much of a lever's recent moves took the ones before them back.
        resting: (N, L) int64, decisions that a lever still rests.
        shaken: (N,) int64, decisions for which larger steps are still held back.
    """

    ARRAYS = ("last", "wavering", "resting", "shaken")

    def __init__(self, config: GuardConfig, levers: Sequence[Lever], num_runs: int) -> None:
        self.config = config
        self._step = np.array([lever.step for lever in levers])
        rates = np.array([lever.rate for lever in levers])
        self._growth = self._step * rates  # of the ln step, by a move of 1
        self._most = max((lever.rate for lever in levers if lever.hyperparameter == "lr"), default=np.inf)
        shape = (num_runs, len(levers))
        self.last, self.wavering = np.zeros(shape), np.zeros(shape)
        self.resting, self.shaken = np.zeros(shape, dtype=np.int64), np.zeros(num_runs, dtype=np.int64)

    def reset(self, mask: np.ndarray) -> None:
        """Forgets the runs in ``mask`` (bool, (N,))."""
        for name in self.ARRAYS:
            getattr(self, name)[mask] = 0

    def pass_on(self, rolled_back: np.ndarray) -> None:
        """Another decision begins; ``rolled_back`` (N,) are the runs that have just been shaken."""
        self.resting = np.maximum(self.resting - 1, 0)
        self.shaken = np.where(rolled_back, self.config.aftermath, np.maximum(self.shaken - 1, 0))

    def moderate(self, moves: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turns proposed moves into permitted ones.

        Args:
            moves: (N, L) in units of each lever's rate; 0 where a lever is not to move.
            usable: (N, L) bool: the move can take effect.

        Returns:
            Moves (N, L) in [-1, 1], exactly 0 where 0 was proposed, and the reasons (N, L).
        """
        config, asked = self.config, np.isfinite(moves) & (moves != 0) & usable
        reasons = np.zeros(moves.shape, dtype=np.int64)
        wanted = np.where(asked, moves, 0.0)
        if config.smoothing > 0:
            mixed = (1 - config.smoothing) * wanted + config.smoothing * self.last
            smoothed = np.where(asked, mixed, 0.0)
            reasons |= np.where(smoothed != wanted, Reason.SMOOTHED, 0)
            wanted = smoothed
        turning = np.sign(wanted) * np.sign(self.last) < 0  # a product of the two may be rounded to 0
        small = asked & (np.abs(wanted) < config.dead_band)
        timid = asked & ~small & turning & (np.abs(wanted) < config.dead_band + config.hysteresis)
        resting = asked & (self.resting > 0)
        reasons |= np.where(small, Reason.SMALL, 0) | np.where(timid, Reason.REVERSAL, 0)
        reasons |= np.where(resting, Reason.RESTING, 0) | np.where(np.abs(wanted) > 1, Reason.RATE, 0)
        allowed = np.where(small | timid | resting, 0.0, np.clip(wanted, -1.0, 1.0))
        calm = self._limited(self._gentle(self._damped(allowed, reasons), reasons), reasons)
        self._remember(calm)
        return calm, reasons

    def ease(self, moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is the guard's own move, of any size, is held to the rates, the aftermath and the joint limit alone.

        Returns:
            Moves (N, L) in [-1, 1], and the reasons (N, L); nothing is remembered of them.
        """
        reasons = np.zeros(moves.shape, dtype=np.int64)
        eased = self._limited(self._gentle(np.clip(moves, -1.0, 1.0), reasons), reasons)
        return eased, reasons

    def _damped(self, moves: np.ndarray, reasons: np.ndarray) -> np.ndarray:
        factor = 1 - self.config.damping * self.wavering
        # What is left of an average of reversals long ago is no reason to touch a move.
        damped = np.where(factor < 0.99, moves * factor, moves)
        reasons |= np.where(damped != moves, Reason.DAMPED, 0)
        return damped

    def _gentle(self, moves: np.ndarray, reasons: np.ndarray) -> np.ndarray:
        """Holds back what makes the step larger while a run recovers from a shock."""
        if not self.shaken.any():
            return moves
        left = np.minimum(self.shaken, self.config.aftermath)  # a resumed run may have had a longer one
        factor = 1 - left / (self.config.aftermath + 1)
        gentle = np.where(moves * self._step > 0, moves * factor[:, None], moves)
        reasons |= np.where(gentle != moves, Reason.AFTERMATH, 0)
        return gentle

    def _limited(self, moves: np.ndarray, reasons: np.ndarray) -> np.ndarray:
        """Scales what makes the step larger, so that all levers together do so no faster than the rate's lever alone."""
        if not self.config.joint:
            return moves
        growth = moves * self._growth
        up, down = np.maximum(growth, 0).sum(1), np.minimum(growth, 0).sum(1)
        over = up + down > self._most * (1 + 1e-12)
        share = np.divide(self._most - down, up, out=np.ones_like(up), where=over)
        limited = np.where((growth > 0) & over[:, None], moves * share[:, None], moves)
        reasons |= np.where(limited != moves, Reason.JOINT, 0)
        return limited

    def _remember(self, moves: np.ndarray) -> None:
        moved = moves != 0
        # 1 where a move takes the whole of the one before it back.
        before = np.abs(self.last)
        back = np.divide(np.minimum(np.abs(moves), before), before, out=np.zeros_like(before), where=before > 0)
        reversed_by = np.where(np.sign(moves) * np.sign(self.last) < 0, back, 0.0)
        self.wavering = MEMORY * self.wavering + (1 - MEMORY) * reversed_by
        self.last = np.where(moved, moves, self.last)
        self.resting = np.where(moved, self.config.rest + 1, self.resting) if self.config.rest else self.resting
