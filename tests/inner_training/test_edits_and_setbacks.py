"""An edit tells the guard that the loss may rise: no setback in its rest, a setback before and after, NaN always."""

from __future__ import annotations

import numpy as np
import pytest

from tests.inner_training.test_edit_limits import counts
from tests.inner_training.test_setbacks import CALM, STARTS, told
from tests.inner_training.test_signals import reading
from trimtab.inner_training.edits import EditConfig
from trimtab.inner_training.guard import Guard, GuardConfig
from trimtab.inner_training.levers import resolve_levers

HIGH = [3.0] * 6


def guarded(intervals: list[list[float]], edit_before: int | None, **config: int) -> tuple[list[str], Guard]:
    """What becomes of one run after each interval; before interval number ``edit_before`` it is edited."""
    guard = Guard(GuardConfig(), resolve_levers(["lr"]), 1, EditConfig(**config))
    story = []
    for place, losses in enumerate(intervals):
        if place == edit_before:
            share, _ = guard.permit_edit("width", -np.ones(1), False, counts((10, 30)))
            assert share[0] < 0
        story.append(told(guard.inspect(reading(np.array(losses)[:, None]))))
    return story, guard


def test_a_rise_after_an_edit_is_no_setback_and_becomes_usual() -> None:
    stays = [*STARTS, *[HIGH] * 9]
    assert "tried" in guarded(stays, None)[0]
    story, guard = guarded(stays, len(STARTS))
    assert set(story) == {"stable"}
    assert np.exp(guard.divergence.setbacks.train.level[0]) == pytest.approx(3.0)
    assert guard.divergence.setbacks.train.spread[0] < 0.05  # what the edit did is no usual change


@pytest.mark.parametrize(
    ("rest", "late", "wanted"), [(5, 4, "stable"), (5, 5, "tried"), (0, 0, "stable"), (0, 1, "tried")]
)
def test_it_lasts_as_long_as_the_rest_and_one_interval_at_least(rest: int, late: int, wanted: str) -> None:
    story, _ = guarded([*STARTS, *[CALM] * late, HIGH], len(STARTS), rest=rest)
    assert story[-1] == wanted


def test_a_setback_of_the_validation_loss_is_excused_too() -> None:
    for edited, wanted in ((True, "stable"), (False, "tried")):
        guard = Guard(GuardConfig(), resolve_levers(["lr"]), 1, EditConfig())
        for place, val in enumerate((1.0, 1.0, 1.0, 1.0, 3.0)):
            if edited and place == 4:
                guard.permit_edit("width", -np.ones(1), False, counts((10, 30)))
            story = told(guard.inspect(reading(np.array(CALM)[:, None], val=val)))
        assert story == wanted


@pytest.mark.parametrize("bad", [np.nan, 500.0])
def test_what_is_not_finite_or_explodes_is_rolled_back_all_the_same(bad: float) -> None:
    story, guard = guarded([*STARTS, [1, 1, 1, 1, bad, bad]], len(STARTS))
    assert story[-1] in ("tried", "back")
    assert guard.edits is not None and guard.edits.settling[0] == 0


def test_an_edit_ends_a_trial_and_none_begins_while_it_settles() -> None:
    guard = Guard(GuardConfig(trial=3, dead_band=0, hysteresis=0), resolve_levers(["lr"]), 1, EditConfig(rest=2))
    one, yes = np.ones((1, 1)), np.ones((1, 1), dtype=bool)

    def move() -> None:
        guard.permit(0.5 * one, np.zeros(1, dtype=bool), one, yes, yes)

    guard.inspect(reading(np.array(CALM)[:, None]))
    move()
    assert guard.trials.left[0] == 3
    guard.permit_edit("width", -np.ones(1), False, counts((10, 30)))
    assert guard.trials.left[0] == 0
    for left in (0, 3):
        guard.inspect(reading(np.array(CALM)[:, None]))
        move()
        assert guard.trials.left[0] == left
