"""Setbacks: damaged weights are given up for the moment before, bad data are waited out, other data are accepted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.inner_training.problems import SmallDigits
from tests.inner_training.test_signals import reading
from trimtab.inner_training.divergence import Divergence, Health
from trimtab.inner_training.guard import Guard, GuardConfig, Reason
from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.live_snapshot import LiveSnapshots
from trimtab.inner_training.population import Population

CALM, HIGH = [1.0] * 6, [5.0] * 6
STARTS = [CALM] * 5
Story = list[str]


def told(health: Health) -> str:
    """What the guard does with one run, in a word."""
    if health.resumed[0]:
        return "resumed"
    if health.rollback[0]:
        return "tried" if health.kept[0] else "back"
    return "stable" if health.stable[0] else "held"


def judged(
    intervals: Sequence[Sequence[float]], config: GuardConfig | None = None, val: Sequence[float] | None = None
) -> tuple[Story, Divergence]:
    """What is done after each interval of losses."""
    made = Divergence(config or GuardConfig(setback=0.4), 1)
    story = []
    for place, losses in enumerate(intervals):
        seen = reading(np.array(losses, dtype=float)[:, None])
        seen.val_loss = np.array([np.nan if val is None else val[place]])
        story.append(told(made.judge(seen)))
    return story, made


def test_damaged_weights_are_given_up_for_the_moment_before() -> None:
    story, made = judged([*STARTS, [1, 1, 1, 5, 5, 5], CALM, CALM])
    assert story == ["stable"] * 5 + ["tried", "stable", "stable"]
    assert (made.rollbacks[0], made.caution[0]) == (1, 1.0)


@pytest.mark.parametrize("rise", [1.2, 1.4])
def test_a_small_rise_is_none(rise: float) -> None:
    story, _ = judged([*STARTS, [rise] * 6, CALM])
    assert story == ["stable"] * 7


def test_a_rise_that_is_usual_is_none() -> None:
    wild = [[1.0] * 6, [2.0] * 6] * 8
    story, _ = judged([*wild, [3.0] * 6])
    assert set(story[6:]) == {"stable"}


def test_weights_that_are_damaged_again_are_blamed_on_the_rate() -> None:
    burst = [1, 1, 1, 5, 5, 5]
    story, made = judged([*STARTS, burst, burst, CALM])
    assert story[5:] == ["tried", "back", "stable"]
    assert made.caution[0] == 0.3


def test_bad_data_are_waited_out_and_what_they_taught_is_given_up() -> None:
    story, made = judged([*STARTS, HIGH, HIGH, HIGH, CALM, CALM])
    assert story[5:] == ["tried", "resumed", "held", "tried", "stable"]
    assert (made.rollbacks[0], made.spent[0], made.caution[0]) == (1, 1, 1.0)


def test_bad_data_that_end_within_the_interval_are_seen_to() -> None:
    story, _ = judged([*STARTS, HIGH, [5, 5, 5, 1, 1, 1], CALM])
    assert story[5:] == ["tried", "back", "stable"]


def test_other_data_are_accepted_in_the_end_and_cost_nothing_of_the_budget() -> None:
    story, made = judged([*STARTS, *[HIGH] * 25], GuardConfig(setback=0.4, patience=10))
    assert [one for one in story[5:] if one != "held"][:4] == ["tried", "resumed", "tried", "resumed"]
    assert story[-8:] == ["stable"] * 8
    assert (made.rollbacks[0], made.spent[0], made.caution[0]) == (0, 0, 1.0)


def test_who_met_other_data_before_is_not_tried_at_once() -> None:
    story, made = judged([*STARTS, *[HIGH] * 12, *STARTS, *[HIGH] * 12], GuardConfig(setback=0.4, patience=6))
    assert story[5] == "tried" and story[22:] == ["held"] * 8 + ["stable"] * 4
    assert made.setbacks.doubt[0] == 2


def test_what_is_left_of_a_setback_is_given_up_too() -> None:
    slowly = [[height] * 6 for height in (5, 5, 4, 3.5, 3, 2.5, 2.2, 1.9, 1.6, 1.45)]
    story, made = judged([*STARTS, *slowly, [1.3] * 6, CALM])
    assert story[-2:] == ["tried", "stable"] and made.setbacks.doubt[0] == 0


def test_a_validation_loss_tells_what_training_does_not() -> None:
    val = [1.0] * 5 + [2.0, 1.0]
    story, _ = judged([*STARTS, CALM, CALM], val=val)
    assert story[5:] == ["tried", "stable"]
    story, _ = judged([*STARTS, *[CALM] * 8], val=[1.0] * 5 + [2.0] * 8)
    assert story.count("back") == 1 and story[-4:] == ["stable"] * 4  # half of the budget, and then it is usual


def test_setbacks_leave_half_of_the_budget_and_calm_gives_it_back() -> None:
    burst = [1, 1, 1, 5, 5, 5]
    one = [burst, *[CALM] * 4]
    story, made = judged([*STARTS, *one * 3])
    assert story.count("tried") == 2 and made.spent[0] == 2
    story, made = judged([*STARTS, *one * 2, *[CALM] * 20], GuardConfig(setback=0.4, renewal=10))
    assert (made.rollbacks[0], made.spent[0]) == (2, 0)


def test_what_is_not_finite_needs_no_level() -> None:
    story, _ = judged([*STARTS, [1, 1, 1, np.nan, np.nan, np.nan], CALM])
    assert story[5:] == ["back", "stable"]


@pytest.mark.parametrize(
    "config", [GuardConfig(setback=None), GuardConfig(setback=0.4, rollback=False), GuardConfig.bare()]
)
def test_without_setbacks_nothing_is_tried(config: GuardConfig) -> None:
    story, _ = judged([*STARTS, HIGH, CALM, CALM], config)
    assert story == ["stable"] * 8


def test_short_intervals_say_too_little() -> None:
    story, _ = judged([[1.0] * 4] * 5 + [[9.0] * 4, [1.0] * 4])
    assert story == ["stable"] * 7


def test_losses_without_a_logarithm_are_left_alone() -> None:
    story, _ = judged([[-1.0] * 6] * 5 + [[-0.1] * 6] * 3)
    assert story == ["stable"] * 8


def test_first_losses_confirm_the_newest_snapshot() -> None:
    def sound(intervals: list[list[float]]) -> list[bool]:
        made = Divergence(GuardConfig(setback=0.4), 1)
        return [bool(made.judge(reading(np.array(one)[:, None])).sound[0]) for one in intervals]

    assert sound([*STARTS, [1, 1, 1, np.nan, np.nan, np.nan]])[-1]
    assert not sound([*STARTS, [5, 5, 5, np.nan, np.nan, np.nan]])[-1]
    assert not sound([*STARTS, [1, 1, 90, 99, 99, np.nan]])[-1]  # announced: the snapshot may be ruined already
    assert not sound([CALM, [1, 1, 1, np.nan, np.nan, np.nan]])[-1]


def test_the_state_survives_saving() -> None:
    story = [*STARTS, HIGH, HIGH, HIGH, CALM, CALM]
    for cut in range(1, len(story)):
        guard, other = (Guard(GuardConfig(setback=0.4), [LEVERS["lr"]], 1) for _ in range(2))
        for losses in story[:cut]:
            guard.inspect(reading(np.array(losses)[:, None]))
        other.load_state_dict(guard.state_dict())
        for losses in story[cut:]:
            one, two = (each.inspect(reading(np.array(losses)[:, None])) for each in (guard, other))
            assert told(one) == told(two)


def test_levers_hold_while_a_moment_is_tried() -> None:
    guard = Guard(GuardConfig(setback=0.4), [LEVERS["lr"]], 1)
    for losses in (*STARTS, HIGH):
        guard.inspect(reading(np.array(losses)[:, None]))
    one = np.ones((1, 1))
    everything = np.ones((1, 1), dtype=bool)
    after, reasons = guard.permit(one, np.array([False]), one, everything, everything)
    assert after[0, 0] == 1 and reasons[0, 0] > 0
    after, reasons = guard.permit(one / 2, np.array([True]), one, everything, everything)
    assert (after[0, 0], reasons[0, 0]) == (0.5, 0)  # a schedule stays exact


def test_a_population_gives_up_and_resumes() -> None:
    family = SmallDigits()
    runs = Population(family, 2, mode="eager")
    runs.reset([0, 1], [family.instance(seed, steps=100) for seed in (1, 2)])
    both, first, neither = (np.array(one) for one in ([True, True], [True, False], [False, False]))

    def weights() -> np.ndarray:
        return np.stack([np.concatenate([one.ravel() for one in runs.parameters_of(run).values()]) for run in (0, 1)])

    runs.snapshot(both)
    runs.advance(2)
    runs.snapshot(both)
    newest = weights()
    runs.advance(2)
    given_up = weights()
    runs.restore(first, first, first)
    np.testing.assert_array_equal(weights(), np.stack([newest[0], given_up[1]]))
    runs.advance(2)
    runs.resume(first)
    assert (weights()[0] == given_up[0]).all()
    runs.snapshot(both), runs.restore(first)
    assert (weights()[0] == newest[0]).all()  # what was given up is not confirmed by that
    runs.resume(both)
    assert (weights()[0] == newest[0]).all()
    runs.restore(neither, both, both)
    assert (weights()[0] == newest[0]).all()


def test_a_live_run_gives_up_and_resumes_bit_for_bit() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    snapshots = LiveSnapshots(optimizer, None, [schedule], spacing=0)

    def trained() -> list[float]:
        optimizer.zero_grad()
        (weight**2).sum().backward()
        optimizer.step()
        schedule.step()
        return present()

    def present() -> list[float]:
        held = optimizer.state[weight]
        numbers = torch.cat([weight.detach(), held["exp_avg"], held["exp_avg_sq"], held["step"].reshape(1)])
        return [*numbers.tolist(), optimizer.param_groups[0]["lr"], schedule.last_epoch]

    moments = []
    for step in range(3):
        moments.append(trained())
        snapshots.take(step)
    given_up = trained()
    snapshots.restore(keep=4)
    assert present() == moments[1]
    trained()
    snapshots.resume()
    assert present() == given_up
    snapshots.resume()  # nothing is left to resume
    assert present() == given_up
    snapshots.take(5), snapshots.restore()
    assert present() == moments[1]  # what was given up was not confirmed by that
    snapshots.restore(keep=6), trained(), snapshots.restore()
    assert present() == moments[1]
    snapshots.resume()
    trained(), snapshots.take(7), snapshots.restore(sound=True)
    assert present() != moments[1]


def test_an_explosion_that_other_data_explain_costs_nothing_however_often() -> None:
    phase = [*[[40.0] * 6] * 30, *[CALM] * 30]
    story, made = judged([*STARTS, *phase * 3], GuardConfig(setback=0.4, renewal=5))
    assert story[5:7] == ["tried", "resumed"]
    assert (made.caution[0], made.cap[0], made.lost[0]) == (1.0, 1.0, False)


def test_without_setbacks_other_data_cost_no_rate_either() -> None:
    phase = [*[[40.0] * 6] * 30, *[CALM] * 30]
    _, made = judged([*STARTS, *phase * 3], GuardConfig(setback=None, renewal=5))
    assert (made.caution[0], made.cap[0], made.lost[0]) == (1.0, 1.0, False)


def test_a_validation_loss_that_is_not_measured_again_speaks_for_nothing() -> None:
    val = [1.0] * 5 + [2.0, np.nan, np.nan, 2.0, 2.0]
    story, made = judged([*STARTS, *[CALM] * 5], val=val)
    assert story[5:] == ["tried", "resumed", "stable", "stable", "stable"]
    assert made.caution[0] == 1.0


def test_the_reason_says_which_loss_rose() -> None:
    made = Divergence(GuardConfig(), 1)
    reasons = []
    for losses, val in [*[(CALM, 1.0)] * 5, (CALM, 3.0), (CALM, 1.0), (HIGH, 1.0)]:
        seen = reading(np.array(losses, dtype=float)[:, None])
        seen.val_loss = np.array([val])
        reasons.append(int(made.judge(seen).reasons[0]))
    assert reasons == [0] * 5 + [Reason.SETBACK_VALIDATION, 0, Reason.SETBACK]


def test_nothing_is_tried_that_the_run_is_too_short_to_judge() -> None:
    made, stories = GuardConfig(), []
    for left in (12, 11):
        judge, story = Divergence(made, 1), []
        for losses in [*STARTS, HIGH]:
            seen = reading(np.array(losses, dtype=float)[:, None])
            seen.total_steps = seen.step + (left if losses is HIGH else 100)
            story.append(told(judge.judge(seen)))
        stories.append(story[-1])
    assert stories == ["tried", "held"]
