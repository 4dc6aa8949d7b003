"""Trajectory averages at equal compute, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REPETITIONS = 2000


@dataclass(frozen=True)
class Played:
    """What became of the runs under one arm; both are (runs,).

    Attributes:
        work: share of the widest network's multiplications that active units did, averaged over a run's decisions.
        height: mean ln validation loss over a run's budget.
    """

    work: np.ndarray
    height: np.ndarray


@dataclass(frozen=True)
class Difference:
    """A policy minus a rule that does the same work.

    Attributes:
        estimate, low, high: mean over runs of the height, the policy's minus the rule's; below 0 the policy is better.
        within: whether the rule can do as much and as little work as the policy does; else its nearest size counts.
    """

    estimate: float
    low: float
    high: float
    within: bool


def frontier(works: np.ndarray, heights: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Heights (B,) at work ``at`` (B,), linear between the sizes of a rule, whose means are works and heights (B, J).

    Beyond the smallest and the largest work the height there counts.

    >>> frontier(np.array([[0.2, 0.6]]), np.array([[1.0, 0.0]]), np.array([0.3])).round(3).tolist()
    [0.75]
    """
    order = np.argsort(works, axis=1, kind="stable")
    works, heights = np.take_along_axis(works, order, 1), np.take_along_axis(heights, order, 1)
    right = np.clip((works < at[:, None]).sum(1), 1, works.shape[1] - 1)[:, None]
    low, high = (np.take_along_axis(works, right - shift, 1)[:, 0] for shift in (1, 0))
    first, second = (np.take_along_axis(heights, right - shift, 1)[:, 0] for shift in (1, 0))
    part = np.clip((at - low) / np.maximum(high - low, 1e-12), 0.0, 1.0)
    return np.asarray(first + part * (second - first))


def at_equal_work(policy: Played, sizes: Sequence[Played], rng: np.random.Generator) -> tuple[Difference, np.ndarray]:
    """The difference, and its bootstrap samples (``REPETITIONS``,). Runs are resampled, for all sizes alike.

    Work is equal on average over the runs, so that a policy may spend where it pays.
    """
    runs = len(policy.work)
    works, heights = (np.stack([getattr(one, name) for one in sizes], 1) for name in ("work", "height"))
    # The first row is every run once: the estimate itself.
    counts = np.concatenate([np.ones((1, runs)), rng.multinomial(runs, np.full(runs, 1 / runs), REPETITIONS)]) / runs
    at = counts @ policy.work
    found = counts @ policy.height - frontier(counts @ works, counts @ heights, at)
    least, most = works.mean(0).min(), works.mean(0).max()
    low, high = np.quantile(found[1:], [0.025, 0.975])
    inside = bool(least - 1e-9 <= at[0] <= most + 1e-9)
    return Difference(float(found[0]), float(low), float(high), inside), found


def over_families(samples: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean over families of what ``at_equal_work`` gave, each counting alike, with its 95 % interval."""
    mean = np.mean(samples, axis=0)
    low, high = np.quantile(mean[1:], [0.025, 0.975])
    return float(mean[0]), float(low), float(high)
