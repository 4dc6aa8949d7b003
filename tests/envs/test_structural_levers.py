"""Structural levers in whole episodes: edits, rollbacks and resets together, the null action, targets, faces, refusals."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_sb3
from torch import nn

from tests.envs.tiny import Tiny
from trimtab.envs.episode import Episodes
from trimtab.envs.gymnasium_env import TrimtabEnv
from trimtab.envs.populations import Populations
from trimtab.envs.sb3_vec_env import TrimtabVecEnv
from trimtab.envs.scenario import Scenario
from trimtab.envs.structures import Structures
from trimtab.errors import ConfigError, MismatchError, UserError
from trimtab.inner_training.guard import Reason, in_words
from trimtab.inner_training.population import Population
from trimtab.inner_training.task import Instance, OptimizerSettings, TaskFamily

FREE = {"rest": 0, "budget": 1000, "least": 0.0, "most": 0.2, "start": 0.5}
SEEN = {"progress": 0, "validation": 0, "validation_every_max": 1, "measurements": 0}


class Relus(Tiny):
    """The same regression through two layers of relu units."""

    def __init__(self, hidden: int = 20) -> None:
        super().__init__(hidden)
        layers = nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 10), nn.ReLU(), nn.Linear(10, 1)
        self.module = nn.Sequential(*layers)

    def draw(self, seed: int, *, held_out: bool) -> Instance:
        instance = super().draw(seed, held_out=held_out)
        object.__setattr__(instance, "steps", 60)
        return instance


class Fragile(Relus):
    """With plain gradient descent, which a high learning rate always breaks."""

    def draw(self, seed: int, *, held_out: bool) -> Instance:
        instance = super().draw(seed, held_out=held_out)
        object.__setattr__(instance, "optimizer", OptimizerSettings(rule="sgd", lr=0.1, momentum=0.0))
        return instance


def relus() -> TaskFamily:
    return Relus()


def fragile() -> TaskFamily:
    return Fragile()


def scenario(family: str = "relus", **changes: Any) -> Scenario:
    values = {"levers": ["lr", "width", "reset"], "structure": FREE, "missing": SEEN, "interval": 3, "val_examples": 64}
    return Scenario.of({"id": "units", "families": [f"{__name__}:{family}"], **values, **changes})


def started(config: Scenario, num_envs: int = 4, first: int = 0) -> Episodes:
    episodes = Episodes(config, num_envs, mode="eager")
    episodes.reset(np.ones(num_envs, dtype=bool), np.arange(first, first + num_envs))
    return episodes


def units_of(episodes: Episodes) -> Structures:
    assert episodes.populations.structures is not None
    return episodes.populations.structures


def column(episodes: Episodes, name: str) -> np.ndarray:
    return episodes.observations[:, episodes.scenario.signals.index(name)]


def check_invariants(episodes: Episodes) -> None:
    """What must hold whatever was done: idle units are exactly zero, host counts are right, signals agree, limits hold."""
    structures = units_of(episodes)
    part, config = structures._parts[0], structures.config
    structure, learner = part.structure, part.population._learner
    active = structure._units.active
    idle = structure._flat.entries(~active)
    for values in learner[:3]:
        assert not values[idle].any()
    groups = [active[:, one.span].sum(1).numpy() for one in structure._flat]
    np.testing.assert_array_equal(structures.units.active, np.stack(groups, 1))
    np.testing.assert_allclose(column(episodes, "active_share"), active.float().mean(1), atol=1e-6)
    limits = episodes.steering.guard.edits
    assert limits is not None and (limits.done <= config.budget).all() and (limits.rest <= config.rest).all()
    np.testing.assert_allclose(column(episodes, "edits_left"), 1 - limits.done / config.budget, atol=1e-6)
    assert np.isfinite(episodes.observations).all() and np.abs(episodes.observations).max() <= 1
    weights = {name: one for name, one in part.population.layout.views(~idle).items() if one.ndim > 2}
    work = sum(one.flatten(1).sum(1) for one in weights.values()).numpy() / sum(
        one[0].numel() for one in weights.values()
    )
    np.testing.assert_allclose(structures.work, work, rtol=1e-5)


def test_an_episode_of_edits_rollbacks_and_resets_keeps_every_invariant() -> None:
    structure = {**FREE, "rest": 1, "budget": 12, "least": 0.2, "most_active": 0.9}
    guard = {"rate_scale": 10, "aftermath": 1, "rollback_budget": 50, "recovery": 100}
    episodes = started(scenario("fragile", structure=structure, guard=guard), 5)
    np.testing.assert_array_equal(units_of(episodes).units.active, [[10, 5]] * 5)
    check_invariants(episodes)
    rng, rolled, reasons = np.random.default_rng(3), 0, 0
    for decision in range(30):
        actions = rng.uniform(-1, 1, (5, 3))
        actions[0, 0] = 1.0  # its rate runs away
        result = episodes.step(actions)
        rolled += int(result.rolled_back.sum())
        reasons |= int(np.bitwise_or.reduce(result.reasons[:, 1:].ravel()))
        check_invariants(episodes)
        assert (result.active_share >= 0.2 - 1e-9).all() and (result.active_share <= 0.9 + 1e-9).all()
        if decision % 7 == 6:
            ended = result.terminated | (np.arange(5) == decision % 5)
            episodes.reset(ended, np.full(5, 100 + decision))
            check_invariants(episodes)
            assert (units_of(episodes).units.active[ended] == [10, 5]).all()
    assert rolled > 0 and reasons & Reason.RESTING and reasons & Reason.EDIT_AFTERMATH
    assert "was rolled back a short while ago" in in_words(reasons)


def test_a_rollback_takes_an_edit_back() -> None:
    guard = {"rate_scale": 10, "setback": None}
    episodes = started(scenario("fragile", guard=guard), 2)
    for _ in range(4):
        episodes.step(np.zeros((2, 3)))
    before = units_of(episodes).units.active.copy()
    result = episodes.step(np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))
    wider = units_of(episodes).units.active.copy()
    assert (wider[1] > before[1]).any() and (result.edits == 1).all()
    for _ in range(10):
        result = episodes.step(np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        if result.rolled_back[0]:
            break
    assert result.rolled_back.tolist() == [True, False]
    now = units_of(episodes).units.active
    assert (now[1] == wider[1]).all() and (now[0] <= wider[0]).all()
    check_invariants(episodes)
    assert result.edits.tolist() == [1, 1]  # the budget is not given back


def test_the_null_action_changes_nothing() -> None:
    config = scenario(structure={**FREE, "start": None})
    episodes = started(config)
    alone = Population(Relus(), 4, mode="eager")
    alone.reset(range(4), [alone.family.draw(seed, held_out=False) for seed in range(4)])
    steered = episodes.populations.members[0]
    assert isinstance(steered, Population)
    for _ in range(4):
        result = episodes.step(np.zeros((4, 3)))
        alone.advance(3)
        assert not result.reasons.any() and not result.edits.any() and (result.active_share == 1).all()
    assert torch.equal(steered._learner.parameters, alone._learner.parameters)


def test_hold_of_discrete_actions_is_the_null_action() -> None:
    discrete, box = started(scenario(action="multi-discrete")), started(scenario())
    for index in (1, 2, 1, 0):
        a, b = discrete.step(np.full((4, 3), index)), box.step(np.full((4, 3), index - 1.0))
        np.testing.assert_array_equal(a.observations, b.observations)
        np.testing.assert_array_equal(a.active_share, b.active_share)
    assert (a.edits > 0).all()


def test_targets_follow_a_schedule_of_the_active_share() -> None:
    episodes = started(scenario(structure={**FREE, "rest": 0}))
    for target in (0.5, 0.7, 0.9, 0.4, 0.4, 0.1):
        result = episodes.step(np.full((4, 1), target), {"width": "targets"})
        # A reference for each group: grown by the same share; what goes is chosen over all groups.
        np.testing.assert_allclose(result.active_share, target, atol=0.5 / 30 + 1e-9)
    assert result.edits.tolist() == [4] * 4 or result.edits.tolist() == [5] * 4
    assert not result.reasons.any()


def test_a_run_is_what_it_is_whatever_others_edit() -> None:
    together, apart = started(scenario()), started(scenario())
    rng = np.random.default_rng(5)
    for _ in range(7):
        actions = rng.uniform(-1, 1, (4, 3))
        one = together.step(actions)
        actions[1:] = -actions[1:]
        other = apart.step(actions)
        np.testing.assert_array_equal(one.observations[0], other.observations[0])
        assert one.log_val_loss[0] == other.log_val_loss[0]


@pytest.mark.parametrize("normalisation", ["mean", "none"])
def test_units_go_by_normalised_scores(normalisation: str) -> None:
    structure = {**FREE, "start": 1.0, "most": 0.5, "criterion": "magnitude", "normalisation": normalisation}
    episodes = started(scenario(structure=structure))
    part = units_of(episodes)._parts[0]
    scores = part.structure.score("magnitude", normalisation=normalisation)
    before = {name: mask.clone() for name, mask in part.structure.active.items()}
    part.prune(np.full(4, 0.3))
    joined = {name: torch.where(before[name], one, torch.inf) for name, one in scores.items()}
    kept = torch.cat([one.masked_fill(~part.structure.active[name], -torch.inf) for name, one in joined.items()], 1)
    gone = torch.cat([one.masked_fill(part.structure.active[name], torch.inf) for name, one in joined.items()], 1)
    lowest_kept = torch.where(kept == -torch.inf, torch.inf, kept).min(1).values
    highest_gone = torch.where(gone == torch.inf, -torch.inf, gone).max(1).values
    assert (highest_gone <= lowest_kept).all() and torch.isfinite(highest_gone).all()


def test_resets_renew_units_and_keep_the_width() -> None:
    episodes = started(scenario())
    result = episodes.step(np.tile([0.0, 0.0, 1.0], (4, 1)))
    assert (result.edits == 1).all() and (result.active_share == 0.5).all()
    part = units_of(episodes)._parts[0]
    assert (sum(new.sum(1) for new in part.structure.newborn.values()) == 3).all()


def test_signals_of_structure() -> None:
    config = scenario(structure={**FREE, "rest": 2, "budget": 4})
    episodes = started(config)
    assert (column(episodes, "structure_available") == 1).all() and not column(episodes, "parity_available").any()
    episodes.step(np.tile([0.0, 1.0, 0.0], (4, 1)))
    assert (column(episodes, "edits_left") == 0.75).all() and (column(episodes, "edit_rest") == 0.5).all()
    assert (column(episodes, "scores_available") == 1).all() and (column(episodes, "utility_range") > 0).all()
    assert (column(episodes, "parity_available") == 1).all() and np.abs(column(episodes, "newborn_parity")).min() > 0
    held = column(episodes, "newborn_parity").copy()
    age = column(episodes, "newborn_age").copy()
    for _ in range(4):
        episodes.step(np.zeros((4, 3)))
        np.testing.assert_array_equal(column(episodes, "newborn_parity"), held)
    episodes.step(np.zeros((4, 3)))
    assert (column(episodes, "newborn_parity") != held).all() and (column(episodes, "newborn_age") > age).all()
    np.testing.assert_allclose(column(episodes, "newborn_age"), 1 + np.log10(19 / 60) / 2, atol=1e-6)
    assert (column(episodes, "selection_overlap") > 0).all()


def test_what_nobody_reads_is_not_measured() -> None:
    episodes = started(scenario(signals=["active_share", "edits_left"]))
    assert not units_of(episodes).measured
    hidden = started(scenario(missing={**SEEN, "measurements": 1}))
    hidden.step(np.tile([0.0, 1.0, 0.0], (4, 1)))
    assert not column(hidden, "parity_available").any() and (column(hidden, "active_share") > 0.5).all()


def test_cost_charges_the_work_of_active_units() -> None:
    reward = {"progress": 0, "trajectory": 0, "instability": 0, "cost": 1}
    episodes = started(scenario(reward=reward, structure={**FREE, "start": 0.2}))
    total = 0.0
    for _ in range(20):
        result = episodes.step(np.zeros((4, 3)))
        total = total + result.active_work
    assert result.terminated.all()
    np.testing.assert_allclose(episodes.returns, -total / 20)
    assert (result.active_work < 0.2).all()


# --- faces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["box", "multi-discrete"])
def test_gymnasium(action: str) -> None:
    env = TrimtabEnv(scenario(action=action), mode="eager")
    check_env(env, skip_render_check=True)
    check_sb3(env, warn=False)
    env.reset(seed=0)
    info: dict[str, Any] = {}
    for _ in range(20):
        given = np.array([0.0, 1.0, 0.0]) if action == "box" else np.array([1, 2, 1])
        _, _, terminated, _, info = env.step(given.astype(env.action_space.dtype))
    assert terminated and set(info["multipliers"]) == {"lr"}
    assert info["active_share"] == 1.0 and info["edits"] == 3 and info["reasons"]["width"]
    run = info["run"]
    assert run["edits"] == info["edits"] and 0.5 < run["active_share"] < 1 and 0.2 < run["active_work"] < 1


def test_stable_baselines() -> None:
    env = TrimtabVecEnv(scenario(), 3, seed=1, mode="eager")
    env.reset()
    rng = np.random.default_rng(0)
    for _ in range(22):
        observations, _, dones, infos = env.step(rng.uniform(-1, 1, (3, 3)).astype(np.float32))
        assert np.isfinite(observations).all() and env.last_multipliers.shape == (3, 1)
        if dones.any():
            assert all("active_share" in info["run"] for info in np.array(infos)[dones])
    assert isinstance(env.action_space, gymnasium.spaces.Box) and env.action_space.shape == (3,)


# --- what is refused --------------------------------------------------------------------------------------------


def test_scenarios() -> None:
    with pytest.raises(ConfigError, match="structure: no lever among levers edits it; add one of width, reset"):
        scenario(levers=["lr"])
    with pytest.raises(ConfigError, match="structure: unknown criterion 'agff'; did you mean 'agf'"):
        scenario(structure={"criterion": "agff"})
    with pytest.raises(ConfigError, match=r"structure\.rest is -1; it must be"):
        scenario(structure={"rest": -1})
    with pytest.raises(ConfigError, match=r"unknown key 'structure\.cooldown'"):
        scenario(structure={"cooldown": 1})
    plain = Scenario.of({"id": "x", "families": ["digits-mlp"]})
    assert plain.structure is None and "active_share" not in plain.signals
    config = Scenario.of({"id": "x", "families": ["digits-mlp"], "levers": ["width"]})
    assert config.structure is not None and "newborn_parity" in config.signals
    assert Scenario.of({"extends": "digits-mlp", "id": "x", "levers": ["lr"]}).structure is None


def test_families_and_runs_without_units() -> None:
    with pytest.raises(UserError, match="no units of 'quadratic' can be edited"):
        Episodes(Scenario.of({"id": "x", "families": ["quadratic"], "levers": ["width"]}), 1, mode="eager")
    with pytest.raises(UserError, match="growth method 'splitting' reads 'split', which populations do not gather"):
        Episodes(scenario(structure={"growth": "splitting"}), 1, mode="eager")
    config = scenario()
    given = Populations(config.families, 2, clip=False, mode="eager")
    with pytest.raises(MismatchError, match="were not made for its structural levers"):
        Episodes(config, 2, populations=given)


def test_resets_take_no_targets() -> None:
    with pytest.raises(MismatchError, match="a policy gives targets for 'reset'"):
        started(scenario()).step(np.ones((4, 1)), {"reset": "targets"})
