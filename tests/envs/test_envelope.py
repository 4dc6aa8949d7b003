"""The guard's envelope in an environment: it takes its measurement, and holds what a policy wants."""

from __future__ import annotations

import numpy as np

from trimtab.envs.catalogue import SCENARIOS
from trimtab.envs.episode import Episodes
from trimtab.inner_training.guard import Reason


def recklessly(share: float | None) -> tuple[Episodes, int]:
    """Four least-squares runs under a policy that always wants a higher learning rate; and how often the guard said no."""
    scenario = SCENARIOS["quadratic"].replace(levers=["lr"], signals=["caution"], guard={"curvature_share": share})
    episodes = Episodes(scenario, 4, mode="eager")
    episodes.reset(np.ones(4, dtype=bool), np.arange(4))
    held = 0
    for _ in range(20):
        result = episodes.step(np.ones((4, 1)))
        held += int((result.reasons & Reason.ENVELOPE).astype(bool).sum())
    return episodes, held


def test_a_scenario_may_hold_rates_below_what_the_curvature_allows() -> None:
    free, never = recklessly(None)
    safe, held = recklessly(0.25)
    sgd = safe.populations.reading(None, np.full(4, np.nan)).adaptive == 0
    assert sgd.any() and never == 0 and held > 0
    assert free.steering.guard.rollbacks[sgd].sum() > safe.steering.guard.rollbacks[sgd].sum() == 0
    assert np.isinf(free.steering.guard.ceiling).all()
    assert np.isfinite(safe.steering.guard.ceiling[sgd]).all() and np.isinf(safe.steering.guard.ceiling[~sgd]).all()
    assert (safe.observations[sgd, 0] < 0).all()  # the signal ``caution`` shows the ceiling
