"""Masks of legal actions: they say beforehand what a step will do, in every environment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.envs.test_structural_levers import FREE, scenario, started
from trimtab.envs.gymnasium_env import TrimtabEnv
from trimtab.envs.sb3_vec_env import TrimtabVecEnv
from trimtab.envs.scenario import Scenario
from trimtab.envs.vector_env import TrimtabVectorEnv
from trimtab.errors import MismatchError

STRUCTURE = {**FREE, "rest": 2, "budget": 5, "least": 0.3, "most_active": 0.7}


def discrete(family: str = "relus", levers: tuple[str, ...] = ("lr", "width"), **structure: Any) -> Scenario:
    return scenario(family, action="multi-discrete", levers=list(levers), structure={**STRUCTURE, **structure})


@pytest.mark.parametrize("family", ["relus", "fragile"])
def test_a_mask_says_which_edits_a_step_will_do(family: str) -> None:
    config = discrete(family)
    episodes = started(config, 6)
    limits, draws = episodes.steering.guard.edits, np.random.default_rng(0)
    assert limits is not None
    seen = np.zeros(2)
    for _ in range(20):
        masks = episodes.steering.legal(config.levers)
        actions = draws.integers(0, 3, (6, 2))
        actions[0, 0] = 2  # its rate runs away, where it is fragile
        before = limits.done.copy()
        ended = episodes.step(actions).terminated
        chosen = masks[np.arange(6), 1, actions[:, 1]] & (actions[:, 1] != 1)
        np.testing.assert_array_equal(limits.done - before, chosen)
        seen += chosen.sum(), (~chosen).sum()
        if ended.any():
            episodes.reset(ended, draws.integers(0, 1000, 6))
    assert (seen > 10).all()


@pytest.mark.parametrize(
    ("structure", "down", "up"),
    [
        ({"least": 0.5}, False, True),  # half of the units are active, at the beginning
        ({"most_active": 0.5}, True, False),
        ({"budget": 0}, False, False),
        ({}, True, True),
    ],
)
def test_masks_at_the_beginning(structure: dict[str, Any], down: bool, up: bool) -> None:
    episodes = started(discrete(levers=("width", "reset", "weight_decay"), **structure))
    masks = episodes.steering.legal(episodes.scenario.levers)
    assert masks[:, :, 1].all()
    assert (masks[:, 0] == [down, True, up]).all()
    assert not masks[:, 1, 0].any() and (masks[:, 1, 2] == (structure.get("budget") != 0)).all()
    available = episodes.steering.available[:, 0]
    np.testing.assert_array_equal(masks[:, 2], np.stack([available, np.ones(4, dtype=bool), available], 1))


def test_every_environment_has_them() -> None:
    config = discrete()
    single = TrimtabEnv(config)
    single.reset(seed=3)
    vector = TrimtabVectorEnv(config, 3, mode="eager")
    vector.reset(seed=3)
    runs = TrimtabVecEnv(config, 3, seed=3, mode="eager")
    runs.reset()
    for _ in range(4):
        masks = runs.env_method("action_masks")
        assert np.shape(masks) == (3, 6) and runs.has_attr("action_masks")
        np.testing.assert_array_equal(masks, vector.action_masks())
        np.testing.assert_array_equal(masks[0], single.action_masks())
        np.testing.assert_array_equal(runs.env_method("action_masks", indices=[2])[0], runs.slots[2].action_masks())
        actions = np.array([[1, 0], [2, 2], [0, 1]])
        runs.step(actions)
        vector.step(actions)
        single.step(actions[0])
    with pytest.raises(MismatchError, match="actions are 'box', which cannot be masked; set action: multi-discrete"):
        TrimtabEnv(scenario()).action_masks()


def test_an_agent_that_masks_proposes_no_edit_that_would_be_refused() -> None:
    contrib = pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    env = TrimtabVecEnv(discrete(), 4, mode="eager")
    limits = env.episodes.steering.guard.edits
    assert limits is not None
    asked, step = [], env.episodes.step

    def watched(actions: np.ndarray, *given: Any) -> Any:
        wanted, done = np.asarray(actions)[:, 1] != 1, limits.done.copy()
        result = step(actions, *given)
        asked.append((wanted, limits.done - done))
        return result

    env.episodes.step = watched  # type: ignore[method-assign]
    contrib.MaskablePPO("MlpPolicy", env, n_steps=16, batch_size=64, n_epochs=1, seed=0, device="cpu").learn(128)
    wanted, made = (np.concatenate(part) for part in zip(*asked, strict=True))
    np.testing.assert_array_equal(wanted, made > 0)
    assert wanted.sum() > 10
