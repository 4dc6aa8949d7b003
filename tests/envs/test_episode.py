"""The one loop: exact seeds, the null action, what is hidden, ends, divergence, and independence of runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.envs.tiny import scenario, tiny
from trimtab.envs.episode import Episodes, StepResult
from trimtab.envs.parts import Missing
from trimtab.envs.rewards import MARGIN, Limits, lowest_return
from trimtab.envs.scenario import Scenario
from trimtab.envs.visibility import draw_visibility
from trimtab.errors import MismatchError, RangeError
from trimtab.inner_training.guard import Reason
from trimtab.inner_training.population import Population

ALL_SEEN = {"progress": 0, "validation": 0, "validation_every_max": 1}
UP = {"levers": ["lr"], "guard": {"rollback": False, "rate_scale": 10}}


def started(config: Scenario, num_envs: int, first: int = 0, **options: bool) -> Episodes:
    episodes = Episodes(config, num_envs, mode="eager", **options)
    episodes.reset(np.ones(num_envs, dtype=bool), np.arange(first, first + num_envs))
    return episodes


def played(episodes: Episodes, decisions: int, seed: int = 0) -> list[StepResult]:
    rng = np.random.default_rng(seed)
    shape = (episodes.num_envs, len(episodes.action_levers))
    return [episodes.step(rng.uniform(-1, 1, shape)) for _ in range(decisions)]


def same(one: list[StepResult], other: list[StepResult]) -> bool:
    return all(
        np.array_equal(a.observations, b.observations)
        and np.array_equal(a.rewards, b.rewards)
        and np.array_equal(a.log_val_loss, b.log_val_loss)
        and np.array_equal(a.terminated, b.terminated)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", ["digits-mlp", "mlp-mix"])
def test_a_seed_is_exact_whatever_else_happens(name: str) -> None:
    from trimtab.envs.catalogue import SCENARIOS

    config = SCENARIOS[name]
    first = started(config, 3, first=40)
    reference, results = first.observations, played(first, 3)
    np.random.rand(5), torch.rand(5)
    other = started(config, 3, first=7)
    twin = started(config, 3, first=40)
    for episodes in (twin, first):  # another environment, and a second reset of the same one
        if episodes is first:
            episodes.reset(np.ones(3, dtype=bool), np.arange(40, 43))
        assert np.array_equal(episodes.observations, reference)
        rng = np.random.default_rng(0)
        for expected in results:
            np.random.rand(3), torch.rand(3)
            other.step(np.ones((3, 4)))
            result = episodes.step(rng.uniform(-1, 1, (3, 4)))
            assert same([result], [expected])
    assert not np.array_equal(started(config, 3, first=41).observations, reference)


def test_resetting_one_run_leaves_the_others_alone() -> None:
    config = scenario("tiny", "wide")
    undisturbed, disturbed = started(config, 4), started(config, 4)
    keep = np.array([0, 1, 3])
    rng = np.random.default_rng(1)
    for decision in range(4):
        actions = rng.uniform(-1, 1, (4, 4))
        expected, result = undisturbed.step(actions), disturbed.step(actions)
        assert np.array_equal(result.observations[keep], expected.observations[keep])
        assert np.array_equal(result.rewards[keep], expected.rewards[keep])
        if decision % 2 == 0:
            before = disturbed.observations.copy()
            disturbed.reset(np.array([False, False, True, False]), np.full(4, 90 + decision))
            assert np.array_equal(disturbed.observations[keep], before[keep])


def test_a_reset_in_mid_life_gives_the_same_run_as_a_new_environment() -> None:
    config = scenario("tiny")
    late = started(config, 4)
    played(late, 3)
    late.reset(np.array([False, True, False, False]), np.full(4, 1))
    fresh = started(config, 4)
    assert np.array_equal(late.observations[1], fresh.observations[1])
    for _ in range(3):
        actions = np.tile(np.array([0.5, -0.2, 0.1, -0.9]), (4, 1))
        a, b = late.step(actions), fresh.step(actions)
        assert np.array_equal(a.observations[1], b.observations[1])
        assert a.rewards[1] == b.rewards[1]


@pytest.mark.parametrize("seed", range(3))
def test_the_number_of_runs_does_not_matter(seed: int) -> None:
    from trimtab.envs.catalogue import SCENARIOS

    config = SCENARIOS["digits-mlp"].replace(missing=ALL_SEEN)
    several, alone = started(config, 4, first=seed), started(config, 1, first=seed + 2)
    hold = np.zeros((4, 4))
    for _ in range(5):
        many, one = several.step(hold), alone.step(hold[:1])
        assert one.log_val_loss[0] == pytest.approx(many.log_val_loss[2], abs=1e-4)
    assert not one.rolled_back.any()


def test_the_null_action_changes_nothing() -> None:
    config = scenario("tiny")
    episodes = started(config, 5)
    alone = Population(tiny(), 5, mode="eager")
    alone.reset(range(5), [alone.family.draw(seed, held_out=False) for seed in range(5)])
    steered = episodes.populations.members[0]
    for _ in range(4):
        result = episodes.step(np.zeros((5, 4)))
        losses = alone.advance(3).losses
        assert (result.multipliers == 1).all() and not result.reasons.any() and not result.rolled_back.any()
        assert np.isfinite(losses.numpy()).all()
    for run in range(5):
        ours, theirs = steered.parameters_of(run), alone.parameters_of(run)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_holding_in_discrete_actions_is_the_null_action() -> None:
    discrete = started(scenario("tiny", action="multi-discrete"), 2)
    box = started(scenario("tiny"), 2)
    for index, move in ((1, 0.0), (2, 1.0), (0, -1.0)):
        a, b = discrete.step(np.full((2, 4), index)), box.step(np.full((2, 4), move))
        assert same([a], [b])
        assert np.array_equal(a.multipliers, b.multipliers)


def test_a_run_ends_with_its_budget() -> None:
    episodes = started(scenario("tiny"), 4)
    budgets = episodes.populations.total_steps
    ends = np.ceil(budgets / 3)
    rewards = np.zeros(4)
    for decision in range(1, int(ends.max()) + 2):
        result = episodes.step(np.zeros((4, 4)))
        rewards += result.rewards
        assert np.array_equal(result.terminated, decision >= ends)
        assert not result.rewards[decision > ends].any()
        assert all(not value[decision > ends].any() for value in result.terms.values())
    assert np.allclose(rewards, episodes.returns) and np.array_equal(episodes.decisions, ends)
    assert np.allclose(rewards, sum(episodes.term_sums.values()))


def test_progress_sums_to_the_fall_of_the_loss() -> None:
    episodes = started(scenario("tiny", reward={"trajectory": 0, "instability": 0}), 3)
    start = episodes.log_val_loss
    for _ in range(3):
        result = episodes.step(np.zeros((3, 4)))
    assert np.allclose(episodes.returns, start - result.log_val_loss)


def limits_of(episodes: Episodes, first: np.ndarray) -> Limits:
    return Limits(
        first=first,
        floor=np.log(episodes.populations.floor),
        cap=np.log(episodes.populations.cap),
        decisions=np.ceil(episodes.populations.total_steps / episodes.scenario.interval),
    )


def test_a_diverged_run_returns_less_than_the_worst_finished_one() -> None:
    episodes = started(scenario("sgd", **UP), 4)
    first = episodes.log_val_loss.copy()
    finished = started(scenario("sgd", levers=["lr"]), 4)
    for _ in range(20):
        pushed, held = episodes.step(np.ones((4, 1))), finished.step(np.zeros((4, 1)))
        assert np.isfinite(pushed.observations).all() and np.abs(pushed.observations).max() <= 1
        assert np.isfinite(pushed.rewards).all() and np.isfinite(pushed.log_val_loss).all()
    assert pushed.diverged.all() and pushed.terminated.all() and (pushed.reasons & Reason.LOST).all()
    assert held.terminated.all() and not held.diverged.any()
    bound = lowest_return(episodes.scenario.reward, limits_of(episodes, first))
    assert np.allclose(episodes.returns, bound - MARGIN, atol=1e-9, rtol=0)
    assert (episodes.returns < finished.returns).all()
    assert not np.isfinite(episodes.test_loss()).any()


def test_a_lost_run_disturbs_nobody() -> None:
    config = scenario("sgd", **UP)
    mixed, calm = started(config, 3), started(config, 3)
    for _ in range(8):
        a, b = mixed.step(np.array([[1.0], [0.0], [0.0]])), calm.step(np.zeros((3, 1)))
        assert np.array_equal(a.observations[1:], b.observations[1:])
        assert np.array_equal(a.log_val_loss[1:], b.log_val_loss[1:])
    assert a.diverged.tolist() == [True, False, False]
    mixed.reset(a.diverged, np.array([5, 0, 0]))
    assert np.isfinite(mixed.step(np.zeros((3, 1))).log_val_loss).all()
    assert not mixed.ended[0]


def test_a_rollback_is_rewarded_for_what_it_restores() -> None:
    episodes = started(scenario("sgd", levers=["lr"], guard={"rate_scale": 10}, reward={"trajectory": 0}), 4)
    start = episodes.log_val_loss.copy()
    history = [episodes.step(np.zeros((4, 1))).log_val_loss for _ in range(4)]
    for _ in range(6):
        result = episodes.step(np.ones((4, 1)))
        if result.rolled_back.any():
            break
        history.append(result.log_val_loss)
    restored = np.flatnonzero(result.rolled_back)
    assert restored.size and not result.diverged.any()
    for run in restored:
        # The confirmed snapshot is that of the decision before the last calm one.
        assert result.log_val_loss[run] in [level[run] for level in history[2:]]
    assert np.allclose(episodes.term_sums["progress"], start - result.log_val_loss)
    assert (result.terms["instability"][restored] <= -0.1 / 4).all()
    assert (episodes.steering.guard.rollbacks[restored] == 1).all()


def test_reversals_of_the_learning_rate_are_priced() -> None:
    episodes = started(scenario("tiny", levers=["lr"], reward={"progress": 0, "trajectory": 0, "instability": 1}), 2)
    share = 1 / np.ceil(episodes.populations.total_steps / 3)
    moves = np.array([[0.5, 0.5], [-0.2, 0.5], [1.0, 0.5]])
    expected = np.array([[0, 0], [0.2, 0], [0.2, 0]])
    for move, price in zip(moves, expected, strict=True):
        result = episodes.step(move[:, None])
        assert np.allclose(result.rewards, -price * share)


def test_hidden_budget_and_validation() -> None:
    names = ["progress", "progress_available", "val_available", "val_slope"]
    hidden = started(scenario(signals=names, missing={"progress": 1, "validation": 1}), 3)
    seen = started(scenario(signals=names, missing=ALL_SEEN), 3)
    assert seen.observations[:, :3].tolist() == [[0, 1, 0]] * 3
    for _ in range(3):
        dark, light = hidden.step(np.zeros((3, 4))), seen.step(np.zeros((3, 4)))
        assert not dark.observations.any()
        assert (light.observations[:, 1:3] == 1).all() and (light.observations[:, 0] > 0).all()
        assert np.array_equal(dark.rewards, light.rewards)  # rewards use what the policy cannot see


def test_validation_arrives_in_its_own_time() -> None:
    config = scenario(
        "tiny", signals=["val_available"], missing={"progress": 0, "validation": 0, "validation_every_max": 4}
    )
    episodes = started(config, 12)
    every = np.array([draw_visibility(seed, config.missing)[2] for seed in range(12)])
    assert set(every) == {1, 2, 3, 4}
    for decision in range(1, 5):
        result = episodes.step(np.zeros((12, 4)))
        assert np.array_equal(result.observations[:, 0] == 1, decision >= every)


def test_signals_are_missing_as_often_as_the_scenario_says() -> None:
    episodes = Episodes(scenario("tiny", signals=["progress_available"]), 250, mode="eager")
    seen = [
        episodes.reset(np.ones(250, dtype=bool), np.arange(at, at + 250))[:, 0].copy() for at in range(0, 1000, 250)
    ]
    assert 1 - np.mean(seen) == pytest.approx(0.2, abs=0.04)
    draws = np.array([draw_visibility(seed, Missing()) for seed in range(3000)])
    assert draws[:, 1].mean() == pytest.approx(0.75, abs=0.025)
    assert np.bincount(draws[:, 2])[1:] / 3000 == pytest.approx(0.25, abs=0.025)
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.06


def test_held_out_runs_are_others() -> None:
    kept = started(scenario(), 2, held_out=True)
    assert [instance.key for instance in kept.populations.instances if instance] == [
        "tiny-6/held-out/0",
        "tiny-6/held-out/1",
    ]
    assert not np.array_equal(kept.log_val_loss, started(scenario(), 2).log_val_loss)


def test_targets_and_part_of_the_levers() -> None:
    episodes = started(scenario(), 3)
    result = episodes.step(np.array([[0.5], [2.0], [1.0]]), {"lr": "targets"})
    assert result.multipliers[:, 0].tolist() == [0.5, 2.0, 1.0]
    assert (result.multipliers[:, 1:] == 1).all()


def test_actions_of_another_shape_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"shape \(3, 2\); it must be \(3, 4\)"):
        started(scenario(), 3).step(np.zeros((3, 2)))
    with pytest.raises(MismatchError, match=r"actions are 'up'; they must be numbers of shape \(3, 4\)"):
        started(scenario(), 3).step("up")  # type: ignore[arg-type]


def test_nothing_is_stepped_before_it_was_reset() -> None:
    with pytest.raises(MismatchError, match="no episode has begun; call reset"):
        Episodes(scenario(), 2, mode="eager").step(np.zeros((2, 4)))


def test_too_few_environments_for_the_families() -> None:
    with pytest.raises(RangeError, match="num_envs is 1; it must be at least 2"):
        Episodes(scenario("tiny", "wide"), 1, mode="eager")


def test_actions_that_are_no_numbers_hold() -> None:
    episodes = started(scenario(), 2)
    result = episodes.step(np.full((2, 4), np.nan))
    assert (result.multipliers == 1).all() and (result.reasons & Reason.NOT_FINITE).all()


def test_given_instances_take_the_place_of_drawn_ones() -> None:
    given, drawn = Episodes(scenario(), 3, mode="eager"), started(scenario(), 3)
    instances = {run: tiny().draw(run, held_out=False) for run in range(3)}
    given.reset(np.ones(3, dtype=bool), np.arange(3), instances)
    assert np.array_equal(given.observations, drawn.observations)
    again = Episodes(scenario(), 3, populations=given.populations)
    again.reset(np.ones(3, dtype=bool), np.arange(3))
    assert same(played(again, 3), played(drawn, 3))
