"""The guard and the steering: bounds, rates, faults, divergence, rollback, and the null action."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.inner_training.test_signals import reading
from trimtab.errors import ConfigError, RangeError, UnknownNameError
from trimtab.inner_training.guard import REASON_WORDS, Guard, GuardConfig, Reason, in_words
from trimtab.inner_training.guard_config import LIMITS
from trimtab.inner_training.levers import LEVERS, Lever, register_lever, resolve_levers
from trimtab.inner_training.signals import resolve_signals
from trimtab.inner_training.steering import Steering

WILD = st.floats(allow_nan=True, allow_infinity=True)


# Nothing but bounds and rates.
BARE = {"dead_band": 0.0, "hysteresis": 0.0, "damping": 0.0, "joint": False, "aftermath": 0, "recovery": 1.0}


def permitted(
    guard: Guard, actions: list[float], multipliers: list[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers and reasons (L,) of one run whose policy moves every lever."""
    count = len(guard.levers)
    now = np.ones((1, count)) if multipliers is None else np.array([multipliers])
    everything = np.ones((1, count), dtype=bool)
    after, reasons = guard.permit(np.array([actions]), np.zeros(count, dtype=bool), now, everything, everything)
    return after[0], reasons[0]


def limited(
    lever: Lever,
    action: float,
    *,
    multiplier: float = 1.0,
    target: bool = False,
    available: bool = True,
    **config: object,
) -> tuple[float, int]:
    """One run's permitted multiplier and reasons."""
    guard = Guard(GuardConfig(**{**BARE, **config}), [lever], 1)  # type: ignore[arg-type]
    one = np.ones((1, 1), dtype=bool)
    value, reason = guard.permit(
        np.array([[action]]), np.array([target]), np.array([[multiplier]]), one & available, one
    )
    return float(value[0, 0]), int(reason[0, 0])


@pytest.mark.parametrize("lever", LEVERS.values(), ids=LEVERS)
@given(action=WILD, start=st.floats(0, 1), target=st.booleans())
def test_no_action_leaves_the_bounds(lever: Lever, action: float, start: float, target: bool) -> None:
    multiplier = lever.low * (lever.high / lever.low) ** start
    value, reason = limited(lever, action, multiplier=multiplier, target=target)
    assert (lever.target_low if target else lever.low) * 0.999 <= value <= lever.high * 1.001
    if not target:
        assert abs(np.log(value / multiplier)) <= lever.rate * 1.001
    if not np.isfinite(action):
        assert value == multiplier
        assert reason & Reason.NOT_FINITE


@pytest.mark.parametrize("lever", LEVERS.values(), ids=LEVERS)
@given(base=st.floats(1e-6, 0.99), start=st.floats(0, 1))
def test_the_null_action_changes_nothing_bit_for_bit(lever: Lever, base: float, start: float) -> None:
    multiplier = lever.low * (lever.high / lever.low) ** start
    assert limited(lever, 0.0, multiplier=multiplier) == (min(max(multiplier, lever.low), lever.high), 0)
    null = lever.value(np.array([base]), np.array([1.0]))[0]
    assert null == (base if lever.null is None else lever.null)


def test_targets_know_no_rate_limit_and_may_reach_zero() -> None:
    assert limited(LEVERS["lr"], 1e-3, target=True) == (1e-3, 0)
    assert limited(LEVERS["lr"], 0.0, target=True) == (0.0, 0)
    assert limited(LEVERS["lr"], 1e9, target=True) == (LEVERS["lr"].high, int(Reason.BOUND))


def test_reasons_are_given_for_each_intervention() -> None:
    lever = LEVERS["lr"]
    assert limited(lever, 3.0)[1] == Reason.RATE
    assert limited(lever, 1.0, multiplier=lever.high)[1] == Reason.BOUND
    assert limited(lever, 1.0, available=False) == (1.0, int(Reason.UNAVAILABLE))
    assert set(REASON_WORDS) == set(Reason)
    assert in_words(int(Reason.RATE | Reason.BOUND)).count(";") == 1


def test_levers_move_what_they_say() -> None:
    one = np.array([0.5])
    assert LEVERS["momentum"].value(np.array([0.0]), one)[0] == pytest.approx(0.5)
    assert LEVERS["momentum"].value(np.array([0.9]), np.array([20.0]))[0] == 0
    assert LEVERS["grad_clip"].value(np.array([np.inf]), one)[0] == pytest.approx(5.0)
    assert not LEVERS["weight_decay"].available(np.array([0.0]))[0]
    assert LEVERS["weight_decay"].unavailable


def diverging(guard: Guard, losses: list[float], begins: float | None = None) -> list[tuple[bool, bool, bool]]:
    """Health after each interval of constant loss, but for its first step where ``begins`` is given."""
    verdicts = []
    for loss in losses:
        health = guard.inspect(reading(np.array([[loss if begins is None else begins], [loss], [loss], [loss]])))
        verdicts.append((bool(health.stable[0]), bool(health.rollback[0]), bool(health.lost[0])))
    return verdicts


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e4])
def test_divergence_rolls_back_until_the_budget_is_spent(bad: float) -> None:
    guard = Guard(GuardConfig(rollback_budget=2, backoff=0.5), resolve_levers(["lr"]), 1)
    verdicts = diverging(guard, [2.0, bad, 2.0, bad, bad, 2.0], begins=2.0)
    assert verdicts[:4] == [(True, False, False), (False, True, False), (True, False, False), (False, True, False)]
    assert guard.caution[0] == 0.25
    assert verdicts[4][2] is not np.isfinite(bad)
    assert guard.rollbacks_left[0] == 0


def test_a_loss_that_falls_below_zero_is_no_explosion() -> None:
    guard = Guard(GuardConfig(), resolve_levers(["lr"]), 1)
    falling = diverging(guard, [0.5, 0.1, -1.0, -6.0, -20.0])
    assert falling == [(True, False, False)] * 5
    assert diverging(guard, [60.0]) == [(False, True, False)]


def test_without_rollback_only_a_non_finite_run_is_lost() -> None:
    guard = Guard(GuardConfig(rollback=False), resolve_levers(["lr"]), 1)
    assert diverging(guard, [2.0, 1e4]) == [(True, False, False), (False, False, False)]
    assert diverging(guard, [np.nan])[0] == (False, False, True)
    value, reason = permitted(guard, [1.0], [0.7])
    assert (value[0], reason[0]) == (0.7, Reason.LOST)


def steering(runs: int = 2) -> Steering:
    made = Steering(
        resolve_levers(["lr", "grad_clip"]), resolve_signals(["loss_level", "lr_position"]), GuardConfig(), runs
    )
    base = {"lr": np.full(runs, 0.1), "grad_clip": np.full(runs, np.inf)}
    made.reset(np.ones(runs, dtype=bool), base)
    return made


def test_a_decision_moves_only_what_the_policy_governs() -> None:
    made = steering()
    move = made.decide(np.array([[0.5], [0.0]]), {"lr": "moves"})
    np.testing.assert_array_equal(move.after, [[np.exp(0.5), 1], [1, 1]])
    np.testing.assert_array_equal(made.lr_multiplier, move.after[:, 0])
    assert (made.hold().after == move.after).all()


def test_the_clip_follows_the_average_gradient_norm() -> None:
    made = steering()
    base = {"lr": np.full(2, 0.1), "grad_clip": np.full(2, np.inf)}
    made.decide(np.array([[0.1], [1.0]]), {"grad_clip": "targets"})
    assert np.isinf(made.hyperparameters(base)["grad_clip"]).all()  # no norm has been seen yet
    made.assess(reading(np.ones((3, 2)), grad_norm=np.full((2, 2), 3.0)))
    np.testing.assert_allclose(made.hyperparameters(base)["grad_clip"], [3.0, np.inf])


def test_state_survives_saving_as_json() -> None:
    import json

    made, copy = steering(), steering()
    for one in (made,):
        one.assess(reading(np.ones((3, 2))))
        one.decide(np.array([[0.5, -1.0], [0.1, 0.0]]), {"lr": "moves", "grad_clip": "moves"})
    copy.load_state_dict(json.loads(json.dumps(made.state_dict())))
    again = reading(np.full((3, 2), 0.7))
    made.assess(again), copy.assess(again)
    np.testing.assert_array_equal(made.observe(again), copy.observe(again))
    np.testing.assert_array_equal(made.lr_multiplier, copy.lr_multiplier)


def test_a_rate_of_zero_is_below_any_ceiling() -> None:
    made = Steering(resolve_levers(["lr"]), (), GuardConfig(decay_power=1.0), 2)
    made.reset(np.ones(2, dtype=bool), {"lr": np.full(2, 0.1)})
    made.decide(np.array([[0.0], [1.0]]), {"lr": "targets"})
    seen = reading(np.ones((3, 2)))
    made.assess(seen)
    assert made.lr_multiplier.tolist() == [0.0, 1.0] and seen.caution.tolist() == [1.0, 1.0]


def test_bad_levers_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="momentum"):
        resolve_levers(["momentun"])
    with pytest.raises(ConfigError, match="already"):
        register_lever(LEVERS["lr"])
    with pytest.raises(ConfigError, match="low"):
        register_lever(Lever(name="x", hyperparameter="lr", doc="x", low=2.0, high=3.0, rate=1.0))


# --- divergence and other data -------------------------------------------------------------------------------------


def judged(guard: Guard, *intervals: list[float]) -> list[tuple[bool, float, int]]:
    """Rollback, caution and count after each interval of one run's losses."""
    seen = []
    for losses in intervals:
        health = guard.inspect(reading(np.array(losses)[:, None]))
        seen.append((bool(health.rollback[0]), float(guard.caution[0]), int(guard.rollbacks[0])))
    return seen


def test_a_loss_that_stays_high_without_a_step_is_that_of_other_data() -> None:
    guard = Guard(GuardConfig(), [LEVERS["lr"]], 1)
    seen = judged(guard, [0.1] * 3, [0.1, 2.0, 2.5], [2.4, 2.2, 2.1], [2.0] * 3, [2.0, 60.0, 900.0], [2.0] * 3)
    assert seen == [
        (False, 1.0, 0),
        (True, 0.3, 1),  # it may be a divergence
        (False, 1.0, 0),  # but the restored weights do no better before any step
        (False, 1.0, 0),
        (True, 0.3, 1),
        (False, 0.3, 1),  # this time they did
    ]


def test_a_rate_that_is_too_large_is_lowered_again_and_again() -> None:
    guard = Guard(GuardConfig(), [LEVERS["lr"]], 1)
    seen = judged(guard, [0.1] * 3, *[[0.1, 5.0, 50.0]] * 5)
    assert [rollback for rollback, _, _ in seen] == [False, True, True, True, True, False]
    assert seen[-1][1:] == (pytest.approx(0.3**4), 4)


def test_a_gradient_that_is_not_finite_is_never_other_data() -> None:
    guard = Guard(GuardConfig(), [LEVERS["lr"]], 1)
    seen = judged(guard, [0.1] * 3, [0.1, np.nan, np.nan], [5.0] * 3, [5.0] * 3)
    assert seen[1:] == [(True, 0.3, 1), (True, pytest.approx(0.09), 2), (False, 0.3, 1)]


def test_after_a_rollback_a_target_is_exact_and_caution_alone_lowers_the_rate() -> None:
    made = Steering(resolve_levers(["lr"]), (), GuardConfig(), 2)
    made.reset(np.ones(2, dtype=bool), {"lr": np.ones(2)})
    for losses in ([0.1] * 3, [0.1, 5.0, 50.0]):
        health = made.assess(reading(np.tile(np.array(losses)[:, None], 2)))
    assert health.rollback.all()
    target = made.decide(np.full((2, 1), 8.0), {"lr": "targets"})
    assert target.after.tolist() == [[8.0], [8.0]] and not target.reasons.any()
    assert made.lr_multiplier.tolist() == pytest.approx([0.3 * 8.0] * 2)
    move = made.decide(np.ones((2, 1)), {"lr": "moves"})
    assert (move.reasons & Reason.AFTERMATH).all() and (np.log(move.after / 8.0) < 0.5).all()


@pytest.mark.parametrize("name", LIMITS)
def test_settings_out_of_range_are_refused(name: str) -> None:
    low, high = LIMITS[name]
    for value in (low - 1e-6 - abs(low) * 1e-3, high * 1.01 + 1, float("nan")):
        with pytest.raises(RangeError, match=name):
            GuardConfig(**{name: value})
    assert getattr(GuardConfig(**{name: high}), name) == high


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rollback_budget", None),
        ("rollback_budget", 2.5),
        ("rest", 1.5),
        ("trial", 2.5),
        ("backoff", None),
        ("explosion", "10"),
        ("explosion", math.nan),
        ("smoothing", [0]),
        ("joint", None),
        ("rollback", "yes"),
        ("recovery", True),
    ],
)
def test_settings_of_another_kind_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RangeError, match=f"^{name} is "):
        GuardConfig(**{name: value})
