"""What a policy sees of an episode: users may lack a budget, a validation set, measurements, or validate now and then."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trimtab.envs.parts import Missing

_STREAM = 0x7472696D746162  # second word of the key, so that no other stream of an episode's seed is this one


class Shown(NamedTuple):
    """What one episode shows.

    Attributes:
        budget: the budget is known.
        validation: there is a validation set.
        every: decisions between validations.
        measurements: further measurements can be taken.
    """

    budget: bool
    validation: bool
    every: int
    measurements: bool


def draw_visibility(seed: int, missing: Missing) -> Shown:
    """Draws what an episode shows, from a stream of the episode's seed alone.

    Args:
        seed: seed of the episode, in [0, 2**31).
        missing: the chances.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, _STREAM], dtype=np.uint64)))
    chances = rng.random(2)
    every = int(rng.integers(1, missing.validation_every_max + 1))
    measurements = bool(rng.random() >= missing.measurements)
    return Shown(bool(chances[0] >= missing.progress), bool(chances[1] >= missing.validation), every, measurements)


class Visibility:
    """The draws of N runs.

    Attributes:
        budget: (N,) bool, the budget is known.
        validation: (N,) bool, there is a validation set.
        every: (N,) decisions between validation losses.
        measurements: (N,) bool, further measurements can be taken.
    """

    def __init__(self, missing: Missing, num_runs: int) -> None:
        self._missing = missing
        self.budget = np.ones(num_runs, dtype=bool)
        self.validation = np.ones(num_runs, dtype=bool)
        self.every = np.ones(num_runs, dtype=np.int64)
        self.measurements = np.ones(num_runs, dtype=bool)

    def reset(self, mask: np.ndarray, seeds: np.ndarray) -> None:
        """Draws anew for the runs in ``mask`` (bool, (N,)) from their ``seeds`` (N,)."""
        for run in np.flatnonzero(mask):
            drawn = draw_visibility(int(seeds[run]), self._missing)
            self.budget[run], self.validation[run], self.every[run], self.measurements[run] = drawn

    def total_steps(self, total_steps: np.ndarray) -> np.ndarray:
        """(N,) budgets, NaN where they are not known."""
        return np.where(self.budget, total_steps, np.nan)

    def val_loss(self, val_loss: np.ndarray, decisions: np.ndarray) -> np.ndarray:
        """(N,) validation losses, NaN where a user would have none after ``decisions`` (N,)."""
        return np.where(self.validation & (decisions % self.every == 0), val_loss, np.nan)
