"""Each statistic against a slow loop, against scipy where scipy has it, and against what must not matter."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from trimtab.agents import statistics
from trimtab.errors import MismatchError, RangeError

# Multiples of 1/8 in a small range: sums are exact, and ties happen.
VALUES = st.integers(-80, 80).map(lambda eighths: eighths / 8)
VECTORS = st.integers(1, 24).flatmap(lambda runs: arrays(np.float64, (runs,), elements=VALUES))
MATRICES = st.tuples(st.integers(1, 9), st.integers(1, 4)).flatmap(lambda s: arrays(np.float64, s, elements=VALUES))
PAIRS = st.tuples(st.integers(1, 9), st.integers(1, 4)).flatmap(
    lambda s: st.tuples(arrays(np.float64, s, elements=VALUES), arrays(np.float64, s, elements=VALUES))
)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- slow references --------------------------------------------------------------------------------------------


def slow_iqm(scores: np.ndarray) -> float:
    ordered = sorted(scores.ravel().tolist())
    cut = len(ordered) // 4
    middle = ordered[cut : len(ordered) - cut]
    return sum(middle) / len(middle)


def slow_improvement(first: np.ndarray, second: np.ndarray) -> float:
    total = 0.0
    for task in range(first.shape[1]):
        points = 0.0
        for a in first[:, task]:
            for b in second[:, task]:
                points += 1.0 if a < b else 0.5 if a == b else 0.0
        total += points / (len(first) * len(second))
    return total / first.shape[1]


def slow_holm(p_values: list[float]) -> list[float]:
    """Directly from the definition: the largest of the smaller scaled p-values, ties broken by position."""
    ranks = sorted(range(len(p_values)), key=lambda i: (p_values[i], i))
    adjusted = [0.0] * len(p_values)
    for place, index in enumerate(ranks):
        scaled = [(len(p_values) - j) * p_values[ranks[j]] for j in range(place + 1)]
        adjusted[index] = min(1.0, max(scaled))
    return adjusted


# --- agreement --------------------------------------------------------------------------------------------------


@given(MATRICES)
def test_iqm_equals_the_loop_and_scipy(scores: np.ndarray) -> None:
    assert statistics.iqm(scores) == pytest.approx(slow_iqm(scores), abs=1e-12)
    assert statistics.iqm(scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None), abs=1e-12)


@given(PAIRS)
def test_improvement_equals_the_loop(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert statistics.probability_of_improvement(*pair) == pytest.approx(slow_improvement(*pair), abs=1e-12)


@given(VECTORS, VECTORS)
def test_improvement_equals_mann_whitney(first: np.ndarray, second: np.ndarray) -> None:
    # scipy's U counts the pairs in which its first sample is the larger one.
    u = stats.mannwhitneyu(second, first, method="asymptotic").statistic
    assert statistics.probability_of_improvement(first, second) == pytest.approx(u / (len(first) * len(second)))


def test_improvement_of_rows_compares_each_instance_with_itself() -> None:
    first, second = generator(1).normal(size=(2, 50))
    expected = np.mean(first < second)
    assert statistics.probability_of_improvement(first[None], second[None]) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_equals_its_definition(p_values: list[float]) -> None:
    assert statistics.holm(np.array(p_values)) == pytest.approx(slow_holm(p_values))


@given(MATRICES)
def test_profile_counts_scores_at_or_below(scores: np.ndarray) -> None:
    thresholds = np.array([-10.0, -0.5, 0.0, 3.0, 10.0])
    expected = [float(np.mean(scores <= threshold)) for threshold in thresholds]
    assert statistics.performance_profile(scores, thresholds) == pytest.approx(expected)


def test_sign_flips_agree_with_every_flip() -> None:
    values = np.array([0.5, 1.25, -0.25, 2.0, 0.75, 1.0])
    flips = np.array(list(itertools.product([-1, 1], repeat=6)))
    exact = np.mean(np.abs(flips @ values) >= abs(values.sum()))
    assert statistics.sign_flip_test(values, generator(), 20_000) == pytest.approx(exact, abs=0.01)


# --- intervals --------------------------------------------------------------------------------------------------


def test_bootstrap_equals_a_slow_stratified_loop() -> None:
    scores = generator(3).normal(size=(7, 3))
    found = statistics.bootstrap_interval(statistics.iqm, scores, generator(5), repetitions=200, level=0.8)
    rng, values = generator(5), []
    for _ in range(200):
        columns = [[scores[i, task] for i in rng.integers(0, 7, 7)] for task in range(3)]
        values.append(slow_iqm(np.array(columns)))
    assert found.estimate == pytest.approx(slow_iqm(scores))
    assert (found.low, found.high) == pytest.approx((np.quantile(values, 0.1), np.quantile(values, 0.9)))


def test_strata_of_equal_size_are_columns() -> None:
    scores = generator(4).normal(size=(6, 2))
    labels = np.array(["left"] * 6 + ["right"] * 6)
    by_column = statistics.bootstrap_interval(statistics.iqm, scores, generator(), 50)
    by_label = statistics.bootstrap_interval(statistics.iqm, scores.T.ravel(), generator(), 50, strata=labels)
    assert by_label == pytest.approx(by_column)


def test_strata_keep_the_share_of_each_task() -> None:
    scores, labels = np.array([0.0, 0.0, 0.0, 10.0]), np.array(["easy", "easy", "easy", "hard"])
    assert statistics.bootstrap_interval(np.mean, scores, generator(), 50, strata=labels) == (2.5, 2.5, 2.5)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_interval_covers_the_truth_as_often_as_it_says(level: float) -> None:
    rng, hits, trials = generator(11), 0, 300
    for _ in range(trials):
        interval = statistics.bootstrap_interval(statistics.iqm, rng.normal(1.0, 2.0, (20, 3)), rng, 200, level)
        hits += interval.low <= 1.0 <= interval.high
    # Four standard errors, and the few percent by which percentile intervals of small samples are too short.
    slack = 4 * math.sqrt(level * (1 - level) / trials)
    assert level - 0.04 - slack <= hits / trials <= level + slack


def test_pairing_removes_the_hardness_of_an_instance() -> None:
    rng = generator(2)
    hardness = rng.normal(0, 10, 100)
    first, second = hardness - 0.3 + rng.normal(0, 0.1, 100), hardness + rng.normal(0, 0.1, 100)
    difference = statistics.paired_difference(first, second, rng, 500)
    assert difference.low < -0.3 < difference.high < -0.2
    assert statistics.sign_flip_test(first - second, rng, 999) == 1 / 1000


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_p_value_is_small_only_for_a_real_difference(shift: float) -> None:
    rng = generator(8)
    p_values = [statistics.sign_flip_test(rng.normal(shift, 1, 20), rng, 199) for _ in range(100)]
    rejected = np.mean(np.array(p_values) <= 0.05)
    assert rejected > 0.9 if shift else rejected < 0.15


# --- what must not matter ---------------------------------------------------------------------------------------


@given(MATRICES, st.integers(0, 2**31), st.integers(-8, 8))
def test_iqm_ignores_order_and_follows_shifts(scores: np.ndarray, seed: int, shift: int) -> None:
    shuffled = generator(seed).permutation(scores.ravel())
    assert statistics.iqm(shuffled) == pytest.approx(statistics.iqm(scores), abs=1e-12)
    assert statistics.iqm(scores + shift) == pytest.approx(statistics.iqm(scores) + shift, abs=1e-12)
    assert scores.min() <= statistics.iqm(scores) <= scores.max()


@given(PAIRS)
def test_improvement_of_the_other_side_is_the_rest(pair: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = pair
    there, back = (statistics.probability_of_improvement(*order) for order in ((first, second), (second, first)))
    assert there + back == pytest.approx(1.0)
    assert statistics.probability_of_improvement(np.exp(first), np.exp(second)) == pytest.approx(there)


def test_lower_is_better() -> None:
    low, high = np.array([0.0, 1.0]), np.array([2.0, 3.0])
    assert statistics.probability_of_improvement(low, high) == 1.0
    assert statistics.paired_difference(low, high, generator(), 20).estimate == -2.0
    assert statistics.performance_profile(low, np.array([1.5])) > statistics.performance_profile(high, np.array([1.5]))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_a_p_value_nor_swaps_two(p_values: list[float]) -> None:
    adjusted = statistics.holm(np.array(p_values))
    assert (adjusted >= np.array(p_values)).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p_values, kind="stable")]) >= 0).all()


def test_the_same_generator_gives_the_same_interval() -> None:
    scores = generator(9).normal(size=30)
    once, again = (statistics.bootstrap_interval(statistics.iqm, scores, generator(7), 50) for _ in range(2))
    other = statistics.bootstrap_interval(statistics.iqm, scores, generator(8), 50)
    assert once == again and once != other


# --- bad input --------------------------------------------------------------------------------------------------

BAD = {
    "no scores": (lambda: statistics.iqm(np.empty(0)), MismatchError, r"\(0,\)"),
    "three axes": (lambda: statistics.iqm(np.zeros((2, 2, 2))), MismatchError, r"\(2, 2, 2\)"),
    "NaN": (lambda: statistics.iqm(np.array([0.0, np.nan])), RangeError, "NaN or infinity"),
    "unequal pairs": (
        lambda: statistics.paired_difference(np.zeros(2), np.zeros(3), generator()),
        MismatchError,
        "same runs",
    ),
    "unequal tasks": (
        lambda: statistics.probability_of_improvement(np.zeros((2, 2)), np.zeros((2, 3))),
        MismatchError,
        "same tasks",
    ),
    "repetitions": (
        lambda: statistics.bootstrap_interval(np.mean, np.zeros(3), generator(), repetitions=0),
        RangeError,
        "repetitions is 0",
    ),
    "flips": (lambda: statistics.sign_flip_test(np.zeros(3), generator(), 0), RangeError, "repetitions is 0"),
    "level": (lambda: statistics.bootstrap_interval(np.mean, np.zeros(3), generator(), level=1.0), RangeError, "level"),
    "strata": (
        lambda: statistics.bootstrap_interval(np.mean, np.zeros(3), generator(), strata=np.zeros(2)),
        MismatchError,
        "one label a run",
    ),
    "p-values": (lambda: statistics.holm(np.array([0.5, 1.5])), RangeError, "between 0 and 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_scores_are_refused(case: str) -> None:
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
