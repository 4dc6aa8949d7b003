"""Caution after rollbacks: who is blamed, what is given back, and how far."""

from __future__ import annotations

import numpy as np
import pytest

from tests.inner_training.test_signals import reading
from trimtab.inner_training.divergence import Divergence
from trimtab.inner_training.guard_config import GuardConfig

CALM, BURST, SUDDEN = [1.0] * 3, [1.0, 50.0, 90.0], [1.0, 1.0, np.nan]


def judged(config: GuardConfig, *intervals: list[float]) -> tuple[list[bool], list[float], Divergence]:
    """Rollbacks and caution of one run after each interval of losses."""
    made = Divergence(config, 1)
    rollbacks, caution = [], []
    for losses in intervals:
        rollbacks.append(bool(made.judge(reading(np.array(losses)[:, None])).rollback[0]))
        caution.append(float(made.caution[0]))
    return rollbacks, caution, made


def test_what_comes_out_of_the_blue_is_not_blamed_on_the_rate() -> None:
    _, caution, made = judged(GuardConfig(), CALM, CALM, SUDDEN, CALM, CALM)
    assert caution == [1.0] * 5 and made.rollbacks[0] == 1


def test_a_fault_of_a_few_steps_may_lie_across_two_intervals() -> None:
    _, caution, made = judged(GuardConfig(), CALM, CALM, SUDDEN, [1.0, np.nan, np.nan], CALM, CALM)
    assert caution == [1.0] * 6 and made.rollbacks[0] == 2


@pytest.mark.parametrize("start", [[], [CALM], [CALM, CALM, SUDDEN, SUDDEN], [CALM, CALM, BURST]])
def test_without_calm_before_it_is(start: list[list[float]]) -> None:
    _, caution, _ = judged(GuardConfig(), *start, SUDDEN)
    assert caution[-1] == pytest.approx((caution[-2] if start else 1.0) * 0.3)


def test_losses_that_were_high_before_they_were_lost_are_blamed_on_it() -> None:
    _, caution, _ = judged(GuardConfig(), CALM, CALM, [1.0, 80.0, np.nan])
    assert caution[-1] == 0.3


def test_caution_is_given_back_gradually_after_calm() -> None:
    config = GuardConfig(aftermath=2, recovery=1.5)
    _, caution, _ = judged(config, CALM, CALM, BURST, *[CALM] * 8)
    assert caution[2:] == pytest.approx([0.3, 0.3, 0.3, 0.45, 0.675, 1, 1, 1, 1])


def test_a_rate_that_failed_again_is_not_returned_to() -> None:
    config = GuardConfig(aftermath=1, recovery=2.0)
    rollbacks, caution, made = judged(config, CALM, CALM, BURST, CALM, CALM, BURST, *[CALM] * 6)
    assert rollbacks == [False, False, True, False, False, True, *[False] * 6]
    assert caution[4] == 0.6 and caution[5] == pytest.approx(0.18) and made.cap[0] == pytest.approx(0.18)
    assert caution[-1] == pytest.approx(0.18)


def test_without_recovery_caution_stays() -> None:
    _, caution, _ = judged(GuardConfig(recovery=1.0), CALM, CALM, BURST, *[CALM] * 20)
    assert caution[-1] == 0.3


def test_a_reset_starts_afresh() -> None:
    _, _, made = judged(GuardConfig(), CALM, CALM, BURST)
    fresh = Divergence(GuardConfig(), 1)
    made.reset(np.array([True]))
    for name in Divergence.ARRAYS:
        np.testing.assert_array_equal(getattr(made, name), getattr(fresh, name))


def test_a_rollback_of_what_is_not_finite_is_never_given_back() -> None:
    learning = [[5.0] * 6, [3.0] * 6, [2.0] * 6, [1.0] * 6, [1.0] * 6]
    dead, early = [np.nan] * 6, [5.0] * 6  # the moment that comes back is from early in the run, with losses as of then
    rolled, _, made = judged(GuardConfig(renewal=None), *learning, *[dead, early] * 6)
    assert rolled.count(True) == made.rollbacks[0] == 4 and made.lost[0]


def test_a_loss_that_lies_near_zero_by_chance_does_not_explode() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, (20, 6))
    noise[0, 0] = 1e-4
    rolled, _, _ = judged(GuardConfig(), *noise.tolist(), [0.6] * 6)
    assert rolled == [False] * 20 + [True]
