"""Has a run recovered, when, and what did it cost? Pure functions of what became of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from experiments.faults.cases import Case
from experiments.faults.play import INTERVAL, Played

TOLERANCE, LEAST = 0.05, 0.05  # share of the whole fall of the ln loss, and ln loss at least
WINDOW = 3  # decisions over which losses are averaged
REPETITIONS = 1000


@dataclass(frozen=True)
class Outcome:
    """What R faults did to runs under one policy; differences of the final ln test loss.

    Attributes:
        recovered: (R,) bool, the run is back where it would have been under the same policy.
        back: (R,) bool, it is back where it would have been without controller.
        perfect: (R,) bool, the one that was rolled back perfectly is.
        extra: (R,) steps from the end of the fault until then, infinite for never.
        lost: (R,) minus the same run, under the same policy, to which nothing happened.
        bare: (R,) minus the same run with the fault, without controller and guard.
        short: (R,) minus the run that was rolled back perfectly.
        diverged: (R,) bool.
        rollbacks: (R,).
    """

    recovered: np.ndarray
    back: np.ndarray
    perfect: np.ndarray
    extra: np.ndarray
    lost: np.ndarray
    bare: np.ndarray
    short: np.ndarray
    diverged: np.ndarray
    rollbacks: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Outcome]) -> Outcome:
        """All runs of several outcomes."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def among(self, chosen: np.ndarray) -> Outcome:
        """The runs where ``chosen`` (bool, (R,)) says so."""
        return Outcome(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


def tolerance(first: np.ndarray, undisturbed: np.ndarray) -> np.ndarray:
    """(R,) how far above the undisturbed run counts as back, ln loss.

    Args:
        first: (R,) ln loss before the first step.
        undisturbed: (R, T) ln loss of the run without controller to which nothing happens.
    """
    wide: np.ndarray = np.maximum(TOLERANCE * (first - smooth(undisturbed).min(1)), LEAST)
    return wide


def smooth(curve: np.ndarray) -> np.ndarray:
    """(R, T - 2) means of three decisions, each at the place of the first of them."""
    windows: np.ndarray = np.lib.stride_tricks.sliding_window_view(curve, WINDOW, axis=1).mean(-1)
    return windows


def ends(cases: Sequence[Case]) -> np.ndarray:
    """(R,) steps done when the fault is over."""
    return np.array([case.fault.first + case.fault.steps if case.fault else 0 for case in cases])


def recovery(hit: Played, undisturbed: Played, width: np.ndarray, over: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which runs are back within ``width`` (R,) of the same runs undisturbed, for three decisions on average, and when.

    Args:
        hit, undisturbed: what became of the runs with and without the fault.
        width: see ``tolerance``.
        over: (R,) step at which the fault ends.

    Returns:
        (R,) bool, False for a run that ends diverged; and (R,) steps from the end of the fault, infinite for never.
    """
    back = smooth(hit.curve) <= smooth(undisturbed.curve) + width[:, None]
    step = (np.arange(back.shape[1]) + 1) * INTERVAL
    back &= (step[None] >= over[:, None]) & ~hit.diverged[:, None] & ~undisturbed.diverged[:, None]
    extra = np.where(back.any(1), step[back.argmax(1)] - over, np.inf)
    return back.any(1), extra


def judged(cases: Sequence[Case], undisturbed: Played) -> np.ndarray:
    """(R,) bool, runs of which something can be said: without controller they end well when nothing happens, and three
    decisions follow the end of the fault within the budget."""
    last = np.array([case.instance.steps - WINDOW * INTERVAL for case in cases])
    return ~undisturbed.diverged & (ends(cases) <= last)


@dataclass(frozen=True)
class References:
    """Runs of one kind of fault that everybody is compared with, without controller and guard.

    Attributes:
        undisturbed: nothing happens.
        bare: the fault happens.
        perfect: it is undone when it is over.
    """

    undisturbed: Played
    bare: Played
    perfect: Played


def outcome(cases: Sequence[Case], hit: Played, calm: Played, against: References) -> Outcome:
    """What faults did to runs; ``calm`` are those under the same policy to which nothing happened."""
    width, over = tolerance(against.undisturbed.first, against.undisturbed.curve), ends(cases)
    recovered, extra = recovery(hit, calm, width, over)
    perfect, _ = recovery(against.perfect, against.undisturbed, width, over)
    return Outcome(
        recovered=recovered,
        back=recovery(hit, against.undisturbed, width, over)[0],
        perfect=perfect,
        extra=extra,
        lost=hit.final - calm.final,
        bare=hit.final - against.bare.final,
        short=hit.final - against.perfect.final,
        diverged=hit.diverged,
        rollbacks=hit.rollbacks,
    ).among(judged(cases, against.undisturbed))


def interval(values: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Mean and its 95 % bootstrap interval, three decimals."""
    values = np.asarray(values, dtype=np.float64)
    means = values[rng.integers(0, len(values), (REPETITIONS, len(values)))].mean(1)
    return _rounded(values.mean(), means)


def ratio(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Mean of ``one`` over mean of ``other``, of the same runs, and its 95 % bootstrap interval."""
    picks = rng.integers(0, len(one), (REPETITIONS, len(one)))
    ratios = one[picks].mean(1) / np.maximum(other[picks].mean(1), 1e-9)
    return _rounded(one.mean() / max(other.mean(), 1e-9), ratios)


def _rounded(estimate: float, samples: np.ndarray) -> list[float]:
    low, high = np.quantile(samples, [0.025, 0.975])
    return [round(float(value), 3) for value in (estimate, low, high)]


def figures(found: Outcome, seed: int) -> dict[str, Any]:
    """One row of a table."""
    rng = np.random.default_rng(seed)
    middle = np.sort(found.extra)[(len(found.extra) - 1) // 2]  # those that never recover included
    return {
        "faults": len(found.recovered),
        "recovered": interval(found.recovered, rng),
        "of_perfect": ratio(found.recovered, found.perfect, rng),
        "back": ratio(found.back, found.perfect, rng),
        "extra_steps": int(middle) if np.isfinite(middle) else None,
        "minus_undisturbed": interval(found.lost, rng),
        "minus_bare": interval(found.bare, rng),
        "minus_perfect": interval(found.short, rng),
        "diverged": int(found.diverged.sum()),
        "rollbacks": round(float(found.rollbacks.mean()), 2),
    }


def compared(one: np.ndarray, other: np.ndarray, seed: int) -> list[float]:
    """Mean paired difference and its interval."""
    return interval(one - other, np.random.default_rng(seed))


def above(cases: Sequence[Case], hit: Played, calm: Played, undisturbed: Played) -> np.ndarray:
    """(T,) mean ln validation loss above the same runs undisturbed, at each decision from the end of the fault on.

    NaN where fewer than half of the runs go on for so long.
    """
    chosen = judged(cases, undisturbed)
    first = -(-ends(cases) // INTERVAL) - 1  # the decision at which it is over
    over = hit.curve - calm.curve
    width = over.shape[1]
    later = first[:, None] + np.arange(width)
    held = np.where(later < width, np.take_along_axis(over, np.minimum(np.maximum(later, 0), width - 1), 1), np.nan)[
        chosen
    ]
    count = np.isfinite(held).sum(0)
    total = np.where(np.isfinite(held), held, 0.0).sum(0)
    return np.where(count >= max(len(held) / 2, 1), total / np.maximum(count, 1), np.nan)
