"""What one decision of N runs led to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one decision of N runs led to.

    Attributes:
        observations: (N, S) float32, before any reset.
        rewards: (N,) float64, 0 for a run that had ended before.
        terminated: (N,) bool, the budget is spent, the deadline has passed, or the run has diverged for good.
        diverged: (N,) bool, the run has diverged for good.
        rolled_back: (N,) bool, the guard restored a snapshot.
        terms: contribution (N,) of each term; they sum to the rewards.
        log_val_loss: (N,) natural log of the bounded validation loss now.
        step: (N,) int64 optimizer steps done.
        multipliers: (N, M) of each lever that has one, after the guard.
        reasons: (N, L) ``Reason`` codes, 0 where an action was applied as it was.
        active_share, active_work: (N,) of units, and of the multiplications that they do, in the widest network; 1 without
            structural levers.
        edits: (N,) int64 structural edits done in each episode.
        losses: (K, N) training loss of each step of the interval.
        score: (N,) mean training score of the interval's steps, NaN unless the populations record one.
        clock: (N,) time since the run started, in usual steps, or in seconds where it is a module run.
        disturbed: by kind of disturbance, in how many of the interval's steps it was active, (N,) int64.
        diagnostics: by name, the signals (N,) that were asked for beside the observation, NaN where unknown.
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    diverged: np.ndarray
    rolled_back: np.ndarray
    terms: dict[str, np.ndarray]
    log_val_loss: np.ndarray
    step: np.ndarray
    multipliers: np.ndarray
    reasons: np.ndarray
    active_share: np.ndarray
    active_work: np.ndarray
    edits: np.ndarray
    losses: np.ndarray
    score: np.ndarray
    clock: np.ndarray
    disturbed: dict[str, np.ndarray]
    diagnostics: dict[str, np.ndarray]
