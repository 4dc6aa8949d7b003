"""The tests for shifts against river, against slow references, and as scores."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from river import drift

from trimtab.inner_training.reading import Memory
from trimtab.inner_training.shift import AdaptiveWindow, PageHinkley

STEPS, RUNS, INTERVAL = 600, 24, 10


def streams(seed: int, shifts: int = 3, size: float = 3.0) -> np.ndarray:
    """(STEPS, RUNS) of unit variance, with up to ``shifts`` jumps of the mean."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, (STEPS, RUNS))
    for run in range(RUNS):
        for at in rng.integers(60, STEPS - 40, rng.integers(0, shifts + 1)):
            values[at:, run] += rng.normal(0, size)
    return values


def page_hinkley(test: PageHinkley, values: np.ndarray, interval: int) -> np.ndarray:
    state, scores = np.zeros((values.shape[1], test.width)), []
    for start in range(0, len(values), interval):
        state, score = test.update(state, values[start : start + interval])
        scores.append(score)
    return np.concatenate(scores)


def river_page_hinkley(test: PageHinkley, values: np.ndarray) -> np.ndarray:
    """The same scores from river, one value of one run at a time."""
    scores = np.zeros(values.shape)
    for run in range(values.shape[1]):
        detector = drift.PageHinkley(test.patience, test.allowance, test.threshold, test.fading, mode="up")
        seen = 0
        for step in np.flatnonzero(np.isfinite(values[:, run])):
            seen = 1 if detector.drift_detected else seen + 1
            detector.update(float(values[step, run]))
            if seen >= test.patience:
                statistic = detector._sum_increase - detector._min_increase
                scores[step, run] = min(statistic / test.threshold, 1)
            assert detector.drift_detected == (scores[step, run] >= 1)
    return scores


@pytest.mark.parametrize("interval", [1, 7, 10, 200])
def test_page_hinkley_is_that_of_river_step_by_step(interval: int) -> None:
    test = PageHinkley(threshold=10.0)
    values = streams(0)
    values[np.random.default_rng(1).random(values.shape) < 0.1] = np.nan  # steps that were not seen
    score, expected = page_hinkley(test, values, interval), river_page_hinkley(test, values)
    np.testing.assert_allclose(score, expected, atol=1e-9)
    assert ((score >= 1).sum(0) > 1).any(), "some run has several alarms"
    assert ((score >= 1).sum(0) == 0).any(), "some run has none"


def slow_window(window: AdaptiveWindow, values: np.ndarray, interval: int) -> tuple[list[int], np.ndarray]:
    """Cuts and scores of one run by lists, with the bound written as in the paper."""
    held: list[list[float]] = []
    cuts, scores = [], []
    for index, start in enumerate(range(0, len(values), interval)):
        held.append([x for x in values[start : start + interval] if np.isfinite(x)])
        if not held[-1]:
            held.pop()
        if len(held) > window.buckets:
            held[:2] = [held[0] + held[1]]
        ratios = []
        for cut in range(1, len(held)):
            old, new = list(chain(*held[:cut])), list(chain(*held[cut:]))
            if min(len(old), len(new)) < window.shortest:
                ratios.append(0.0)
                continue
            everything = np.array(old + new)
            harmonic = 1 / (1 / len(old) + 1 / len(new))
            reach = np.log(2 * np.log(len(everything)) / window.confidence)
            bound = np.sqrt(2 / harmonic * everything.var() * reach) + 2 / (3 * harmonic) * reach
            ratios.append((np.mean(new) - np.mean(old)) / bound)
        scores.append(min(max([0.0, *ratios]), 1.0))
        if ratios and max(np.abs(ratios)) > 1:
            cuts.append(index)
            held = held[int(np.argmax(np.abs(ratios))) + 1 :]
    return cuts, np.array(scores)


def adaptive_window(window: AdaptiveWindow, values: np.ndarray, interval: int) -> tuple[np.ndarray, np.ndarray]:
    state, cuts, scores = np.zeros((values.shape[1], window.width)), [], []
    for start in range(0, len(values), interval):
        state, score, cut = window.update(state, values[start : start + interval])
        cuts.append(cut)
        scores.append(score)
    return np.array(cuts), np.array(scores)


def test_the_adaptive_window_is_that_of_a_slow_reference() -> None:
    values = streams(2)
    values[100:130] = np.nan  # whole intervals that were not seen
    values[np.random.default_rng(3).random(values.shape) < 0.1] = np.nan
    window = AdaptiveWindow(buckets=12)
    cuts, scores = adaptive_window(window, values, INTERVAL)
    for run in range(RUNS):
        where, expected = slow_window(window, values[:, run], INTERVAL)
        assert np.flatnonzero(cuts[:, run]).tolist() == where
        np.testing.assert_allclose(scores[:, run], expected, atol=1e-9)
    assert cuts.sum() > RUNS / 2


def test_the_adaptive_window_detects_what_river_detects() -> None:
    """River forgets the whole window after a detection, ours keeps what came after the cut; so it may see more later.

    All that river finds, ours finds too, within 4 intervals and less than one on average; where river finds nothing,
    ours finds nothing either, but in one run at most.
    """
    window, delays, quiet, extra = AdaptiveWindow(), [], 0, 0
    for seed in (4, 5, 6):
        values = streams(seed)
        cuts, _ = adaptive_window(window, values, INTERVAL)
        for run in range(RUNS):
            found, ours = river_adwin(window, values[:, run]), np.flatnonzero(cuts[:, run])
            delays += [int(np.abs(ours - one).min()) if len(ours) else STEPS for one in found]
            quiet += not found
            extra += not found and len(ours) > 0
    assert len(delays) > 50
    assert quiet > 15
    assert max(delays) <= 4, delays
    assert np.mean(delays) < 1
    assert extra <= 1


def river_adwin(window: AdaptiveWindow, values: np.ndarray) -> list[int]:
    """Intervals at whose end river finds a shift."""
    detector, found = drift.ADWIN(window.confidence, INTERVAL, 5, window.shortest, INTERVAL), []
    for step, value in enumerate(values):
        detector.update(float(value))
        if detector.drift_detected:
            found.append(step // INTERVAL)
    return found


def test_scores_tell_a_shift_from_noise_and_from_a_fall() -> None:
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.2, (200, 3))
    noise[100:, 1] += 1.0
    noise[:, 2] -= np.linspace(0, 3, 200)
    score = page_hinkley(PageHinkley(), np.maximum(noise / 0.2, 0), INTERVAL).max(0)
    assert score[0] < 0.3
    assert score[1] == 1
    assert score[2] < 0.3
    cuts, scores = adaptive_window(AdaptiveWindow(), noise, INTERVAL)
    assert scores.max(0)[0] < 0.9
    assert scores[:, 1].argmax() in (10, 11, 12)
    assert scores.max(0)[1] == 1
    assert scores.max(0)[2] < 0.3
    assert cuts.any(0).tolist() == [False, True, True], "a fall cuts the window, without a score"


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, (9, 2), elements=st.floats(-1e30, 1e30) | st.sampled_from([np.nan, np.inf, -np.inf, 0.0])))
def test_no_value_breaks_a_state(values: np.ndarray) -> None:
    values = np.clip(values, -30, 30)  # the logarithms of positive float64 numbers that can be observed
    for scores in (page_hinkley(PageHinkley(patience=2), values, 3), adaptive_window(AdaptiveWindow(), values, 3)[1]):
        assert np.isfinite(scores).all()
        assert (scores >= 0).all()
        assert (scores <= 1).all()


def test_a_fold_forgets_only_what_is_reset_and_survives_saving() -> None:
    def add(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return state + [1, 10], state.sum(1)

    memory = Memory(3)
    for _ in range(2):
        memory.begin(np.array([True, True, False]))
        first = memory.fold("x", 2, add)
        np.testing.assert_array_equal(memory.fold("x", 2, add), first)  # once per decision
    memory.reset(np.array([True, False, False]))
    copy = Memory(3)
    copy.load_state_dict(memory.state_dict())
    for one in (memory, copy):
        one.begin()
        assert one.fold("x", 2, add).tolist() == [0, 22, 0]
