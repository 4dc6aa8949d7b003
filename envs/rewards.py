"""Rewards: named terms in natural-log units of the bounded validation loss, and the price of divergence.

``L`` is the natural log of the family's bounded validation loss; it lies in ``[floor, cap]``. A run takes ``T``
decisions; ``L_0`` is measured before its first step and ``L_t`` after decision ``t``.

**A diverged run returns less than any finished one.** Every term but ``divergence`` states the worst sum that it can
reach over a run of at most ``T`` decisions that begins at ``L_0``:

- ``progress`` telescopes to ``L_0 - L_T``, at least ``L_0 - cap``;
- ``trajectory`` adds at most ``T`` shares of ``-(L_t - floor) / T``, each at least ``-(cap - floor) / T``;
- ``instability`` adds at most ``T`` shares of ``-2 / T`` for spikes and oscillation, and at most ``budget`` rollbacks
  of ``-1 / budget``: at least -3;
- ``cost`` adds at most ``T`` shares of ``-1 / T``;
- ``terminal`` is paid once, ``-L_T``, at least ``-cap``.

Weights are not negative, so the weighted sum of these worst values, ``lowest_return``, is a lower bound on the
undiscounted return of every finished run that begins at ``L_0``. At divergence the term ``divergence`` pays what makes
the undiscounted return exactly ``lowest_return - 1``. (Return and bound are sums in float64: they hold to about
1e-12, which the margin of 1 covers in float32 as well.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

MARGIN = 1.0  # nats by which a diverged run falls short of the worst finished one


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds the return of N runs, known when they start; every array is float64 (N,).

    Attributes:
        first: ``L_0``, in nats.
        floor, cap: range of ``L``, in nats.
        decisions: ``T`` >= 1, decisions until the budget is spent.
    """

    first: np.ndarray
    floor: np.ndarray
    cap: np.ndarray
    decisions: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one decision of N runs led to; every array is (N,).

    Attributes:
        limits: of these runs.
        before, after: ``L`` before and after the interval, in nats, inside the limits.
        spike: in [0, 1], 1 where the interval's worst loss stood far above its usual, or was not finite.
        oscillation: in [0, 1], how far the learning-rate lever reversed its last move, in units of its rate.
        rollback: share of the rollback budget used up at this decision, summing to at most 1 over a run.
        active: share of the widest network's multiplications that active units do, in [0, 1].
        finished: bool, the budget is spent.
        lost: bool, the run has diverged for good.
    """

    limits: Limits
    before: np.ndarray
    after: np.ndarray
    spike: np.ndarray
    oscillation: np.ndarray
    rollback: np.ndarray
    active: np.ndarray
    finished: np.ndarray
    lost: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Term:
    """One summand of the reward.

    Attributes:
        doc: one line for tables.
        weight: default weight; None for the term that has none, ``divergence``.
        compute: ``outcome -> (N,)`` float64, before the weight.
        worst: ``limits -> (N,)``, a lower bound on its sum over a finished run.
    """

    doc: str
    weight: float | None
    compute: Callable[[Outcome], np.ndarray]
    worst: Callable[[Limits], np.ndarray]


def _instability(outcome: Outcome) -> np.ndarray:
    return 0.0 - (outcome.spike + outcome.oscillation) / outcome.limits.decisions - outcome.rollback


def _constant(value: float) -> Callable[[Limits], np.ndarray]:
    return lambda limits: np.full(limits.first.shape, value)


TERMS: dict[str, Term] = {
    "progress": Term(
        doc="decrease of L at this decision; sums to L_0 - L_T",
        weight=1.0,
        compute=lambda o: o.before - o.after,
        worst=lambda limits: limits.first - limits.cap,
    ),
    "trajectory": Term(
        doc="-(L - floor) / T; sums to minus the average height of L above its floor",
        weight=0.1,
        compute=lambda o: -(o.after - o.limits.floor) / o.limits.decisions,
        worst=lambda limits: limits.floor - limits.cap,
    ),
    "instability": Term(
        doc="minus the share of decisions with a spike, of reversed learning-rate moves, and of the rollback budget used",
        weight=0.1,
        compute=_instability,
        worst=_constant(-3.0),
    ),
    "cost": Term(
        doc="-(share of the widest network's multiplications that active units do) / T",
        weight=0.0,
        compute=lambda o: -o.active / o.limits.decisions,
        worst=_constant(-1.0),
    ),
    "terminal": Term(
        doc="-L_T when the budget is spent",
        weight=0.0,
        compute=lambda o: np.where(o.finished & ~o.lost, -o.after, 0.0),
        worst=lambda limits: -limits.cap,
    ),
    "divergence": Term(
        doc="paid once, at divergence: what makes the undiscounted return that of the worst finished run, minus 1",
        weight=None,
        compute=lambda o: o.lost.astype(np.float64),
        worst=_constant(0.0),
    ),
}


def default_weights() -> dict[str, float]:
    """The default weight of each term that has one.

    >>> default_weights()["progress"]
    1.0
    """
    return {name: term.weight for name, term in TERMS.items() if term.weight is not None}


def lowest_return(weights: Mapping[str, float], limits: Limits) -> np.ndarray:
    """Lower bound (N,) on the undiscounted return of a finished run; the module says why it holds.

    Args:
        weights: term name to weight >= 0.
        limits: of the runs.
    """
    bound = np.zeros(limits.first.shape)
    for name, weight in weights.items():
        bound += weight * TERMS[name].worst(limits)
    return bound


def score(
    weights: Mapping[str, float], outcome: Outcome, so_far: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rewards one decision of N runs.

    Args:
        weights: term name to weight >= 0; terms of weight 0 are left out.
        outcome: what the decision led to.
        so_far: (N,) undiscounted return of each run before this decision.

    Returns:
        Rewards (N,) float64, and the contribution (N,) of each term, which sum to the rewards.
    """
    terms = {name: weight * TERMS[name].compute(outcome) for name, weight in weights.items() if weight > 0}
    total = np.sum(list(terms.values()), axis=0)
    owed = lowest_return(weights, outcome.limits) - MARGIN - (so_far + total)
    terms["divergence"] = np.where(TERMS["divergence"].compute(outcome) > 0, owed, 0.0)
    return total + terms["divergence"], terms
