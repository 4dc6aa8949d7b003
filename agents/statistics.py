"""Statistics of benchmark scores as pure functions; losses everywhere, so lower is better.

Scores have shape ``(runs,)``, or ``(runs, tasks)`` with one column for each task. Where a function resamples, it
resamples runs within each task (a stratified bootstrap), with the generator that it is given. The choice of
measures follows Agarwal et al., *Deep Reinforcement Learning at the Edge of the Statistical Precipice*,
arXiv 2108.13264.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from trimtab.errors import MismatchError, RangeError, out_of_range

Statistic = Callable[[np.ndarray], float]


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float


def _scores(samples: np.ndarray) -> np.ndarray:
    scores = np.asarray(samples, dtype=np.float64)
    if scores.ndim not in (1, 2) or scores.size == 0:
        raise MismatchError(f"scores of shape {scores.shape}; give (runs,) or (runs, tasks), at least one of each")
    if not np.isfinite(scores).all():
        raise RangeError("scores hold NaN or infinity; bound them first, for example with a family's loss cap")
    return scores


def _pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one, two = _scores(first), _scores(second)
    if one.shape != two.shape:
        raise MismatchError(
            f"scores of shapes {one.shape} and {two.shape} cannot be paired; give the same runs of both"
        )
    return one, two


def iqm(samples: np.ndarray) -> float:
    """Interquartile mean: the mean of the middle half of all scores.

    A quarter of the scores, rounded down, is cut from each end, over runs and tasks together.

    Args:
        samples: (runs,) or (runs, tasks).

    >>> iqm(np.array([-9.0, 1.0, 3.0, 100.0]))
    2.0
    """
    ordered = np.sort(_scores(samples), axis=None)
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def bootstrap_interval(
    function: Statistic,
    samples: np.ndarray,
    rng: np.random.Generator,
    repetitions: int = 2000,
    level: float = 0.95,
    strata: np.ndarray | None = None,
) -> Interval:
    """Percentile interval of a statistic by the stratified bootstrap (Efron, 1979; strata as in rliable).

    Args:
        function: takes scores of the shape of ``samples`` and gives one number.
        samples: (runs,) or (runs, tasks); runs are resampled with replacement within each column.
        rng: source of the resampling.
        repetitions: resamplings, >= 1.
        level: confidence level, in (0, 1).
        strata: (runs,) labels of the tasks of a ``samples`` of shape (runs,), when tasks have unequal numbers of
            runs; None for a single task.

    Returns:
        The statistic of ``samples`` itself, and its interval.

    >>> bootstrap_interval(iqm, np.full((8, 2), 3.0), np.random.default_rng(0), repetitions=10)
    Interval(estimate=3.0, low=3.0, high=3.0)
    """
    scores = _scores(samples)
    if repetitions < 1:
        raise out_of_range("repetitions", repetitions, low=1)
    if not 0 < level < 1:
        raise RangeError(f"level is {level}; it must lie strictly between 0 and 1")
    groups = _groups(scores, strata)
    statistics = np.empty(repetitions)
    resampled = np.empty(scores.size)
    for repetition in range(repetitions):
        for group in groups:
            resampled[group] = scores.flat[group[rng.integers(0, len(group), len(group))]]
        statistics[repetition] = function(resampled.reshape(scores.shape))
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(function(scores)), float(low), float(high))


def _groups(scores: np.ndarray, strata: np.ndarray | None) -> list[np.ndarray]:
    """Flat positions that are resampled together: one group for each task."""
    if strata is None:
        return list(np.arange(scores.size).reshape(len(scores), -1).T)
    labels = np.asarray(strata)
    if scores.ndim != 1 or labels.shape != scores.shape:
        raise MismatchError(f"strata of shape {labels.shape} for scores of shape {scores.shape}; give one label a run")
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def mean(samples: np.ndarray) -> float:
    """Mean over everything; the statistic of paired differences and of shares."""
    return float(np.mean(samples))


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    rng: np.random.Generator,
    repetitions: int = 2000,
    level: float = 0.95,
    strata: np.ndarray | None = None,
) -> Interval:
    """Mean of ``first - second`` over the same runs, with its interval; below 0, ``first`` is better.

    Pairs are resampled whole, so that what makes an instance hard for both cancels.

    Args:
        first: (runs,) or (runs, tasks).
        second: the same shape; entry by entry the same instance.
        rng, repetitions, level, strata: as in ``bootstrap_interval``.
    """
    one, two = _pair(first, second)
    return bootstrap_interval(mean, one - two, rng, repetitions, level, strata)


def probability_of_improvement(first: np.ndarray, second: np.ndarray) -> float:
    """``P(first < second) + P(first = second) / 2``: how likely ``first`` is the better one; lower is better.

    Any run of one is compared with any run of the other within a task, and tasks are averaged (the Mann-Whitney U
    divided by the number of pairs). For *paired* runs, each its own instance, pass rows of shape (1, runs): every
    instance is then a task.

    Args:
        first: (runs,) or (runs, tasks).
        second: the same number of tasks; the number of runs may differ.

    Returns:
        A probability; 0.5 when neither is better.

    >>> probability_of_improvement(np.array([0.1, 0.2]), np.array([0.2, 0.3]))
    0.875
    """
    one, two = _scores(first), _scores(second)
    one, two = (scores[:, None] if scores.ndim == 1 else scores for scores in (one, two))
    if one.shape[1] != two.shape[1]:
        raise MismatchError(f"scores of {one.shape[1]} and of {two.shape[1]} tasks; give the same tasks for both")
    wins = [
        (np.searchsorted(np.sort(b), a, "left").mean() + np.searchsorted(np.sort(b), a, "right").mean()) / 2 / len(b)
        for a, b in zip(one.T, two.T, strict=True)
    ]
    return float(1 - np.mean(wins))


def sign_flip_test(differences: np.ndarray, rng: np.random.Generator, repetitions: int = 10_000) -> float:
    """Two-sided p-value of "paired differences are symmetric around 0" by random sign flips (Fisher, 1935).

    Args:
        differences: (runs,) or (runs, tasks).
        rng: source of the flips.
        repetitions: random flips, >= 1; the smallest p-value is ``1 / (repetitions + 1)``.

    >>> round(sign_flip_test(np.array([1.0, -1.0, 0.0]), np.random.default_rng(0), 100), 1)
    1.0
    """
    values = _scores(differences).ravel()
    if repetitions < 1:
        raise out_of_range("repetitions", repetitions, low=1)
    observed, larger = abs(values.sum()), 0
    for start in range(0, repetitions, 1000):  # in blocks, so that memory stays small
        count = min(1000, repetitions - start)
        signs = rng.integers(0, 2, (count, values.size)) * 2.0 - 1.0
        # A hair of tolerance, so that sums which are equal on paper count as ties.
        larger += int((np.abs(signs @ values) >= observed - 1e-12 * np.abs(values).sum()).sum())
    return (larger + 1) / (repetitions + 1)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction for several comparisons (Holm, 1979).

    Args:
        p_values: (comparisons,) each in [0, 1].

    Returns:
        Adjusted p-values in the same order; reject where they are below the level.

    >>> holm(np.array([0.01, 0.04, 0.03])).round(6).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    if ((p < 0) | (p > 1) | np.isnan(p)).any():
        raise RangeError("p-values must lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    scaled = np.minimum(p[order] * np.arange(len(p), 0, -1), 1.0)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(scaled) if len(p) else scaled
    return adjusted


def performance_profile(samples: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of scores at or below each threshold (Dolan & More, arXiv cs/0102001, for losses).

    Args:
        samples: (runs,) or (runs, tasks).
        thresholds: (points,).

    Returns:
        (points,) in [0, 1]; a curve that lies higher is better.

    >>> performance_profile(np.array([0.0, 1.0, 2.0, 3.0]), np.array([-1.0, 1.0, 9.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    ordered = np.sort(_scores(samples), axis=None)
    return np.searchsorted(ordered, np.asarray(thresholds, dtype=np.float64), side="right") / ordered.size
