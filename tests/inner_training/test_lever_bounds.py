"""Bounds that users set on levers: what is refused, how they are kept, and that no lever leaves them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import RangeError, UnknownNameError
from trimtab.inner_training.guard import Guard, GuardConfig, Reason, in_words
from trimtab.inner_training.levers import LEVERS, resolve_levers
from trimtab.inner_training.steering import Steering

SET: dict[str, Any] = {"lr": (0.1, 3.0), "momentum": (0.5, 1.0), "weight_decay": (1.0, 1.0), "grad_clip": (0.2, 1.0)}
OFF: dict[str, Any] = {"dead_band": 0.0, "hysteresis": 0.0, "damping": 0.0, "joint": False, "aftermath": 0}


def bounds_of(name: str) -> tuple[float, float]:
    low, high = SET[name]
    return low, high


@pytest.mark.parametrize("name", SET)
@given(action=st.floats(allow_nan=True, allow_infinity=True), start=st.floats(0, 1), target=st.booleans())
def test_no_move_and_no_target_leaves_the_bounds(name: str, action: float, start: float, target: bool) -> None:
    low, high = bounds_of(name)
    guard = Guard(GuardConfig(bounds=SET, **OFF), [LEVERS[name]], 2)
    now, everything = np.full((2, 1), low * (high / low) ** start), np.ones((2, 1), dtype=bool)
    after, _ = guard.permit(np.full((2, 1), action), np.array([target]), now, everything, everything)
    assert (low <= after).all() and (after <= high).all()


@pytest.mark.parametrize("target", [False, True])
def test_at_a_bound_it_says_so_and_a_lever_without_one_goes_on(target: bool) -> None:
    guard = Guard(GuardConfig(bounds={"lr": (0.9, 1.5)}, **OFF), resolve_levers(["lr", "weight_decay"]), 1)
    everything, both = np.ones((1, 2), dtype=bool), np.array([target, target])
    actions = np.array([[2.0, 2.0]]) if target else np.array([[1.0, 1.0]])
    after, reasons = guard.permit(actions, both, np.ones((1, 2)), everything, everything)
    assert after[0, 0] == 1.5 and after[0, 1] == pytest.approx(2.0 if target else np.exp(0.5))
    assert "outside its absolute bounds" in in_words(int(reasons[0, 0])) and reasons[0, 1] == 0


def test_they_are_kept_as_a_value_that_can_be_hashed_and_written() -> None:
    config = GuardConfig(bounds=SET)
    assert GuardConfig(bounds=dict(reversed(SET.items()))) == config and hash(config) == hash(replace(config))
    assert config != GuardConfig() and GuardConfig().bounds == ()
    given = dict(SET)
    kept = GuardConfig(bounds=given)
    given["lr"] = (0.5, 0.6)
    assert kept == config, "what the user changes afterwards changes nothing"
    assert GuardConfig(**asdict(config)) == config
    plain = config.plain()
    assert plain["bounds"]["lr"] == [0.1, 3.0] and json.loads(json.dumps(plain)) == plain
    assert GuardConfig(**plain) == GuardConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"lr": (3.0, 0.1)}, r"'lr' are \(3.0, 0.1\); the lowest comes first, .*: give \(0.1, 3\)"),
        (
            {"lr": (1.5, 3.0)},
            r"'lr' are \(1.5, 3.0\), which leaves out 1, .* 0 <= lowest <= 1 <= highest <= 10000: .* change",
        ),
        ({"lr": (0.1, 0.5)}, "leaves out 1"),
        ({"lr": (0.1, 1e5)}, r"only narrow the lever's own: 0 <= .* <= 10000, so give \(0.1, 10000\)"),
        ({"momentum": (1e-4, 2)}, r"only narrow the lever's own: 0.001 <= .* <= 10, so give \(0.001, 2\)"),
        ({"grad_clip": (0.5, 2)}, r"give \(0.5, 1\)"),
        ({"lr": (0.1,)}, "must be two numbers"),
        ({"lr": 3.0}, "must be two numbers|must be a mapping"),
        ({"lr": (0.1, "3")}, "must be two numbers"),
        ({"lr": (float("nan"), 3)}, "must be two numbers"),
        ({"lr": (True, 3)}, "must be two numbers"),
        ({7: (0.1, 3)}, "must be a mapping of levers"),
        (3.0, r"bounds is 3.0; it must be a mapping of levers .*such as \{'lr': \(0.1, 3.0\)\}"),
        (None, "bounds is None"),
        ([["lr", [0.1, 3]], ["lr", [0.1, 2]]], "names a lever twice"),
    ],
)
def test_what_is_no_bound_is_refused_with_a_remedy(bounds: Any, said: str) -> None:
    with pytest.raises(RangeError, match=said):
        GuardConfig(bounds=bounds)


def test_a_lever_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown lever 'learning_rate'; .*allowed: lr, momentum"):
        GuardConfig(bounds={"learning_rate": (0.1, 3.0)})


def test_what_was_steered_under_wider_bounds_comes_within_them() -> None:
    wide, narrow = (Steering(resolve_levers(["lr"]), (), GuardConfig(bounds=one), 2) for one in ((), SET))
    wide.multipliers[:] = [[50.0], [0.01]]
    narrow.load_state_dict(wide.state_dict())
    assert narrow.multipliers.tolist() == [[3.0], [0.1]]


def test_moves_that_a_trial_takes_back_stay_within_them() -> None:
    guard = Guard(GuardConfig(bounds=SET, trial=1, **OFF), resolve_levers(["lr"]), 1)
    guard.trials.kept[:], guard.trials.left[:] = 50.0, 1
    guard.trials.before[:], guard.trials.level[:] = 0.0, 9.0
    one = np.ones((1, 1), dtype=bool)
    after, reasons = guard.permit(np.zeros((1, 1)), np.array([False]), np.ones((1, 1)), one, one)
    assert after[0, 0] == 3.0 and reasons[0, 0] & Reason.UNDONE
