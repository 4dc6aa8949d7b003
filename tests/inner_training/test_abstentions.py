"""Levers whose policy gives no answer: they hold, then return to null, at most at their rate, until it answers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inner_training.test_signals import reading
from trimtab.inner_training.guard import GuardConfig, Reason
from trimtab.inner_training.levers import LEVERS, resolve_levers
from trimtab.inner_training.signals import resolve_signals
from trimtab.inner_training.steering import Kind, Steering

NAMES = ("lr", "momentum", "weight_decay", "grad_clip")
OFF: dict[str, Any] = {"dead_band": 0.0, "hysteresis": 0.0, "damping": 0.0, "joint": False, "aftermath": 0}
SILENT = np.nan


def steering(runs: int = 1, names: tuple[str, ...] = NAMES, **config: Any) -> Steering:
    made = Steering(resolve_levers(names), (), GuardConfig(**{**OFF, **config}), runs)
    base = {LEVERS[name].hyperparameter: np.full(runs, 0.1) for name in names}
    made.reset(np.ones(runs, dtype=bool), base)
    return made


def course(made: Steering, actions: np.ndarray, kinds: dict[str, Kind]) -> np.ndarray:
    """Multipliers (T, N, L) after each of the decisions (T, N, L)."""
    return np.array([made.decide(one, kinds).after for one in actions])


def returned(multiplier: float, name: str, scale: float) -> float:
    """One lever's way back by one decision, step by step."""
    lever = LEVERS[name]
    start, most = max(multiplier, lever.low), np.exp(lever.rate * scale)
    if multiplier == 1 or 1 / most <= start <= most:
        return 1.0
    return float(start * most if start < 1 else start / most)


@settings(max_examples=60)
@given(
    most=st.sampled_from([1, 2, 3, None]),
    scale=st.sampled_from([0.3, 1.0]),
    starts=st.lists(st.floats(0, 1), min_size=8, max_size=8),
    silent=st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=12),
)
def test_every_lever_of_every_run_is_led_back_by_itself(
    most: int | None, scale: float, starts: list[float], silent: list[list[bool]]
) -> None:
    made = steering(2, abstentions=most, rate_scale=scale)
    low = np.array([max(LEVERS[name].target_low, 1e-6) for name in NAMES])
    high = np.array([LEVERS[name].high for name in NAMES])
    made.multipliers = low * (high / low) ** np.array(starts).reshape(2, 4)
    quiet = np.array(silent).reshape(-1, 2, 4)
    expected, row = made.multipliers.copy(), np.zeros((2, 4), dtype=int)
    for now in quiet:
        # A silent lever is a target that is no number; the others are told to stay where they are.
        made.decide(np.where(now, SILENT, expected), dict.fromkeys(NAMES, "targets"))
        row = np.where(now, row + 1, 0)
        for run, lever in zip(*np.nonzero(row > (most or np.inf)), strict=True):
            expected[run, lever] = returned(expected[run, lever], NAMES[lever], scale)
        np.testing.assert_allclose(made.multipliers, expected, rtol=1e-9)


def test_it_holds_three_times_then_returns_and_goes_on_where_it_stands() -> None:
    made = steering(names=("lr",))
    made.multipliers[:] = 100.0
    seen = course(made, np.array([SILENT] * 5 + [0.5])[:, None, None], {"lr": "moves"})[:, 0, 0]
    assert seen.tolist() == pytest.approx([100, 100, 100, 100 / np.e, 100 / np.e**2, 100 / np.e**1.5])
    assert made.guard.abstentions.row.tolist() == [[0]]
    again = course(made, np.array([SILENT] * 20)[:, None, None], {"lr": "moves"})[:, 0, 0]
    assert again[2] == again[0] and again[-1] == 1.0, "null is exactly 1"


def test_it_says_so_only_while_a_lever_moves() -> None:
    made = steering(names=("lr",), abstentions=1)
    made.multipliers[:] = np.e**1.5
    reasons = [int(made.abstain(Reason.LATE).reasons[0, 0]) for _ in range(4)]
    both = Reason.LATE | Reason.RETURNING
    assert reasons == [Reason.LATE, both, both, Reason.LATE]


def test_a_schedule_that_ended_at_zero_returns_too() -> None:
    made = steering(names=("lr",), abstentions=1)
    made.multipliers[:] = 0.0
    seen = [made.abstain(Reason.FAULT).after[0, 0] for _ in range(12)]
    assert seen[:2] == [0.0, pytest.approx(1e-4 * np.e)]
    assert max(np.diff(np.log(seen[1:]))) <= 1 + 1e-9 and seen[-1] == 1.0


def test_signals_out_of_range_are_no_answer_either() -> None:
    made = Steering(resolve_levers(["lr"]), resolve_signals(["loss_level"]), GuardConfig(**OFF), 2)
    made.reset(np.ones(2, dtype=bool), {"lr": np.ones(2)})
    made.ranges = np.array([-0.1]), np.array([0.1])
    made.multipliers[:] = 9.0
    made._seen = np.array([[0.9], [0.0]], dtype=np.float32)  # the first run's
    after = course(made, np.zeros((5, 2, 1)), {"lr": "moves"})
    assert after[:, 0, 0].tolist() == pytest.approx([9, 9, 9, 9 / np.e, 9 / np.e**2]) and (after[:, 1, 0] == 9).all()


def test_levers_return_no_faster_together_and_gently_after_a_rollback() -> None:
    made = Steering(resolve_levers(["lr", "momentum"]), (), GuardConfig(abstentions=1), 1)
    made.multipliers[:] = [[1e-3, 8.0]]  # the way back of both makes the step larger
    made.abstain(Reason.FAULT)
    both = made.abstain(Reason.FAULT)
    growth = np.log(both.after / both.before) @ np.array([1.0, -1.0])
    assert growth[0] == pytest.approx(1.0) and both.reasons[0, 0] & Reason.JOINT
    made.guard.moderation.shaken[:] = 5
    gentle = made.abstain(Reason.FAULT)
    assert 0 < np.log(gentle.after / gentle.before)[0, 0] < 1 / 6 + 1e-9 and gentle.reasons[0, 0] & Reason.AFTERMATH


def test_a_lost_run_and_one_whose_snapshot_is_tried_stay() -> None:
    made = steering(2, names=("lr",), abstentions=1)
    made.multipliers[:] = 9.0
    made.guard.divergence.lost[0], made.guard.trying[1] = True, True
    for _ in range(3):
        assert made.abstain(Reason.FAULT).after.tolist() == [[9.0], [9.0]]
    made.guard.trying[1] = False
    assert made.abstain(Reason.FAULT).after.tolist() == [[9.0], [pytest.approx(9 / np.e)]]


def test_a_trial_ends_where_levers_return() -> None:
    made = steering(names=("lr",), abstentions=1, trial=5)
    made.assess(reading(np.full((3, 1), 0.5)))
    made.multipliers[:] = 9.0
    made.guard.trials.left[:], made.guard.trials.kept[:] = 3, 50.0
    made.abstain(Reason.FAULT)
    assert made.guard.trials.left.tolist() == [3]
    made.abstain(Reason.FAULT)
    assert made.guard.trials.left.tolist() == [0]


def test_the_count_is_saved_and_begins_anew_with_a_run() -> None:
    one, other = steering(2), steering(2)
    for _ in range(3):
        one.abstain(Reason.LATE)
    one.multipliers[:] = 0.5
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.abstain(Reason.LATE).after.tolist() == one.abstain(Reason.LATE).after.tolist() != [[0.5] * 4] * 2
    one.reset(np.array([True, False]), {LEVERS[name].hyperparameter: np.full(2, 0.1) for name in NAMES})
    assert one.guard.abstentions.row.tolist() == [[0] * 4, [4] * 4]


def test_holding_without_asking_counts_for_nothing() -> None:
    made = steering(names=("lr",), abstentions=1)
    made.multipliers[:] = 9.0
    for _ in range(5):
        assert made.hold(Reason.SWITCHED_OFF).after.tolist() == [[9.0]]
    assert made.guard.abstentions.row.tolist() == [[0]]
