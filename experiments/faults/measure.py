"""Has a run recovered, when, and what did it cost? Pure functions of what became of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.faults.cases import Case
from experiments.faults.play import INTERVAL, Played
from trimtab.agents.statistics import Interval, bootstrap_interval, mean

TOLERANCE, LEAST = 0.05, 0.05  # share of the whole fall of the ln loss, and ln loss at least
WINDOW = 3  # decisions over which losses are averaged
REPETITIONS = 1000


@dataclass(frozen=True)
class Recovery:
    """Of R runs.

    Attributes:
        recovered: (R,) bool.
        extra: (R,) steps from the end of the fault until then, infinite for never.
    """

    recovered: np.ndarray
    extra: np.ndarray


def tolerance(first: np.ndarray, undisturbed: np.ndarray) -> np.ndarray:
    """(R,) how far above the undisturbed run counts as back, ln loss.

    Args:
        first: (R,) ln loss before the first step.
        undisturbed: (R, T) ln loss of the run without controller to which nothing happens.
    """
    fall = first - smooth(undisturbed).min(1)
    wide: np.ndarray = np.maximum(TOLERANCE * fall, LEAST)
    return wide


def smooth(curve: np.ndarray) -> np.ndarray:
    """(R, T - 2) means of three decisions, each at the place of the first of them."""
    windows: np.ndarray = np.lib.stride_tricks.sliding_window_view(curve, WINDOW, axis=1).mean(-1)
    return windows


def recovery(hit: Played, undisturbed: Played, width: np.ndarray, cases: Sequence[Case]) -> Recovery:
    """When runs are back within ``width`` (R,) of the same runs undisturbed, for three decisions on average.

    A run that ends diverged has not recovered.
    """
    over = np.array([case.fault.first + case.fault.steps if case.fault else 0 for case in cases])
    back = smooth(hit.curve) <= smooth(undisturbed.curve) + width[:, None]
    step = (np.arange(back.shape[1]) + 1) * INTERVAL
    back &= (step[None] >= over[:, None]) & ~hit.diverged[:, None] & ~undisturbed.diverged[:, None]
    extra = np.where(back.any(1), step[back.argmax(1)] - over, np.inf)
    return Recovery(back.any(1), extra)


def judged(cases: Sequence[Case], undisturbed: Played) -> np.ndarray:
    """(R,) bool, runs of which something can be said: they end well without controller when nothing happens, and three
    decisions follow the end of the fault within the budget."""
    last = np.array([case.instance.steps - WINDOW * INTERVAL for case in cases])
    over = np.array([case.fault.first + case.fault.steps if case.fault else 0 for case in cases])
    return ~undisturbed.diverged & (over <= last)


def interval(values: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Mean and its 95 % bootstrap interval, three decimals."""
    return rounded(bootstrap_interval(mean, values, rng, REPETITIONS))


def ratio_interval(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Mean of ``one`` over mean of ``other``, of the same runs, and its 95 % bootstrap interval."""
    both = np.stack([one, other], 1).astype(np.float64)
    picks = rng.integers(0, len(both), (REPETITIONS, len(both)))
    means = both[picks].mean(1)
    ratios = means[:, 0] / np.maximum(means[:, 1], 1e-9)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return rounded(Interval(both[:, 0].mean() / max(both[:, 1].mean(), 1e-9), float(low), float(high)))


def rounded(found: Interval) -> list[float]:
    """Estimate and interval as they are stored."""
    return [round(float(value), 3) for value in found]


def median_steps(extra: np.ndarray) -> int | None:
    """Median over runs, those that never recover included; None where that is never."""
    middle = np.sort(extra)[(len(extra) - 1) // 2]
    return int(middle) if np.isfinite(middle) else None
