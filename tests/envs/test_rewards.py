"""Rewards: what the terms sum to, and that no diverged run beats a finished one, whatever the weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.envs.rewards import MARGIN, TERMS, Limits, Outcome, default_weights, lowest_return, score

unit = st.floats(0, 1)
weights_of_terms = st.fixed_dictionaries({name: st.floats(0, 1000) for name in default_weights()})


@st.composite
def runs(draw: st.DrawFn) -> tuple[Limits, np.ndarray, np.ndarray]:
    """Limits, a path of L inside them, and (T, 3) legal values of spike, oscillation and rollback share."""
    floor = draw(st.floats(-10, 0))
    cap = floor + draw(st.floats(0.1, 20))
    decisions = draw(st.integers(1, 12))
    path = floor + (cap - floor) * np.array(draw(st.lists(unit, min_size=decisions + 1, max_size=decisions + 1)))
    values = np.array([[draw(unit) for _ in range(3)] for _ in range(decisions)])
    values[:, 2] /= max(values[:, 2].sum(), 1.0)
    limits = Limits(
        first=path[:1], floor=np.array([floor]), cap=np.array([cap]), decisions=np.array([float(decisions)])
    )
    return limits, path, values


def rewards_of(
    weights: dict[str, float], limits: Limits, path: np.ndarray, values: np.ndarray, lost_at: int | None
) -> tuple[float, dict[str, float]]:
    """Return of a run, decision by decision, and the sum of each term."""
    total, sums = np.zeros(1), dict.fromkeys(TERMS, 0.0)
    for place, (spike, oscillation, rollback) in enumerate(values):
        lost = place == lost_at
        outcome = Outcome(
            limits=limits,
            before=path[place : place + 1],
            after=path[place + 1 : place + 2],
            spike=np.array([spike]),
            oscillation=np.array([oscillation]),
            rollback=np.array([rollback]),
            active=np.ones(1),
            finished=np.array([place == len(values) - 1]),
            lost=np.array([lost]),
        )
        reward, terms = score(weights, outcome, total)
        assert np.isclose(sum(value.item() for value in terms.values()), reward.item(), rtol=1e-12, atol=1e-9)
        total = total + reward
        for name, value in terms.items():
            sums[name] += value.item()
        if lost:
            break
    return total.item(), sums


@given(runs(), weights_of_terms)
@settings(deadline=None, max_examples=200)
def test_every_finished_run_returns_at_least_the_bound(
    run: tuple[Limits, np.ndarray, np.ndarray], weights: dict[str, float]
) -> None:
    limits, path, values = run
    bound = lowest_return(weights, limits).item()
    total, _ = rewards_of(weights, limits, path, values, None)
    assert total >= bound - 1e-9 * (1 + abs(bound))


@given(runs(), weights_of_terms, st.data())
@settings(deadline=None, max_examples=200)
def test_every_diverged_run_returns_less_by_the_margin(
    run: tuple[Limits, np.ndarray, np.ndarray], weights: dict[str, float], data: st.DataObject
) -> None:
    limits, path, values = run
    bound = lowest_return(weights, limits).item()
    total, _ = rewards_of(weights, limits, path, values, data.draw(st.integers(0, len(values) - 1)))
    assert total == pytest.approx(bound - MARGIN, abs=1e-9 * (1 + abs(bound)))


def test_the_bound_is_reached_by_the_worst_run() -> None:
    weights = {**default_weights(), "cost": 0.3, "terminal": 2.0}
    limits = Limits(first=np.array([0.5]), floor=np.array([-7.0]), cap=np.array([2.0]), decisions=np.array([4.0]))
    worst = np.array([[1, 1, 0.25]] * 4)
    total, _ = rewards_of(weights, limits, np.array([0.5, 2, 2, 2, 2]), worst, None)
    assert total == pytest.approx(lowest_return(weights, limits).item(), abs=1e-12)


def test_progress_telescopes_and_terminal_is_paid_once() -> None:
    weights = {"progress": 1.0, "terminal": 1.0, "trajectory": 1.0}
    limits = Limits(first=np.array([1.0]), floor=np.array([-5.0]), cap=np.array([3.0]), decisions=np.array([3.0]))
    path = np.array([1.0, 2.5, -1.0, -0.5])
    _, sums = rewards_of(weights, limits, path, np.zeros((3, 3)), None)
    assert sums["progress"] == pytest.approx(1.0 - -0.5)
    assert sums["terminal"] == pytest.approx(0.5)
    assert sums["trajectory"] == pytest.approx(-np.mean(path[1:] - -5.0))
    assert sums["divergence"] == 0


def test_terms_without_weight_are_left_out() -> None:
    limits = Limits(first=np.zeros(1), floor=-np.ones(1), cap=np.ones(1), decisions=np.ones(1))
    zero, no = np.zeros(1), np.zeros(1, dtype=bool)
    outcome = Outcome(
        limits=limits, before=zero, after=zero, spike=zero, oscillation=zero, rollback=zero, active=zero, finished=no, lost=no
    )  # fmt: skip
    assert list(score({"progress": 1.0, "cost": 0.0}, outcome, zero)[1]) == ["progress", "divergence"]
