"""The parts around a learner, each by itself: selection instances, normaliser, progress display, presets."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from stable_baselines3.common.vec_env import VecNormalize

from tests.agents.tiny import TINY, TWO
from trimtab.agents.normalize import Normalizer
from trimtab.agents.presets import PPOPreset
from trimtab.agents.progress import ProgressDisplay
from trimtab.agents.selection import FIRST_SEED, Selection
from trimtab.envs.sb3_vec_env import make_vec
from trimtab.errors import ConfigError, UnknownNameError
from trimtab.policies.policy import Kind

ENVS = 3


class Clock:
    """Turns every lever down early in a run, and up later."""

    name = "clock"
    signals = TWO.signals
    levers: Mapping[str, Kind] = dict.fromkeys(TWO.levers, "moves")
    decide_every = None

    def init(self, num_runs: int) -> dict[str, Any]:
        return {}

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        up = np.sign(observations[:, self.signals.index("time")] - 0.2)
        return np.repeat(0.3 * up[:, None], len(self.levers), 1), state


def test_selection_against_single_runs() -> None:
    """Two instances of each environment, one after the other, score as each would by itself."""
    selection = Selection(TWO, 4, mode="eager")
    score = selection.score(Clock(), 7)
    assert score == selection.score(Clock(), 7)
    finals = []
    for seeds in selection._seeds:
        selection.episodes.reset(np.ones(4, dtype=bool), seeds)
        ends = np.zeros(4)
        while not selection.episodes.ended.all():
            running = ~selection.episodes.ended
            result = selection.episodes.step(Clock().act(selection.episodes.observations, {})[0])
            ends[running] = result.log_val_loss[running]
        finals.append(ends)
    assert score.final_loss == pytest.approx(np.mean(finals), abs=1e-6)
    assert score.steps == 7 and 0 <= score.diverged <= 1
    assert sorted(selection._seeds.ravel()) == [FIRST_SEED + place for place in range(8)]


def test_selection_is_as_long_as_it_says() -> None:
    selection = Selection(TINY, 5, mode="eager")
    played = 0
    step = selection.episodes.step

    def counted(*args: Any) -> Any:
        nonlocal played
        played += 5
        return step(*args)

    selection.episodes.step = counted  # type: ignore[method-assign]
    selection.score(Clock(), 0)
    assert played == selection.decisions


def test_normalizer_is_vec_normalize() -> None:
    options = {"gamma": 1.0, "epsilon": 1e-3, "clip_obs": 3.0}
    ours = Normalizer(make_vec(TINY, ENVS, mode="eager"), **options)
    theirs = VecNormalize(make_vec(TINY, ENVS, mode="eager"), **options)
    assert (ours.reset() == theirs.reset()).all()
    low, high = np.asarray(ours.old_obs).min(0), np.asarray(ours.old_obs).max(0)
    action = np.full((ENVS, len(TINY.levers)), 0.5)
    for _ in range(12):
        for mine, other in zip(ours.step(action)[:3], theirs.step(action)[:3], strict=True):
            assert (mine == other).all()
        low, high = np.minimum(low, np.asarray(ours.old_obs).min(0)), np.maximum(high, np.asarray(ours.old_obs).max(0))
    assert (ours.obs_low == low).all() and (ours.obs_high == high).all()
    ours.training = False
    ours.old_obs = np.asarray(ours.old_obs)
    ours.step(-action)
    assert (ours.obs_low == low).all()


def display(terminal: bool) -> str:
    """What a display writes during a training of 4 steps of a fake agent."""

    class Fake:
        num_timesteps = 0
        ep_info_buffer = ({"r": 0.5}, {"r": 1.0})

    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, _environ={})
    shown = ProgressDisplay(4, lambda: "evaluation -0.250", console)
    shown.model = Fake()  # type: ignore[assignment]
    shown.on_training_start({}, {})
    for step in range(1, 5):
        shown.model.num_timesteps = step
        assert shown.on_step()
    shown.on_training_end()
    return text.getvalue()


def test_progress_without_a_terminal() -> None:
    lines = display(terminal=False).splitlines()
    assert len(lines) == 5
    for line in lines:
        assert re.fullmatch(r"\d/4  reward \+0\.750  \d+ steps/s  \d+:\d\d:\d\d left  evaluation -0\.250", line)
    assert lines[-1].startswith("4/4")


def test_progress_on_a_terminal() -> None:
    shown = display(terminal=True)
    assert "\x1b[?25l" in shown and shown.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again
    assert "100%" in shown and "reward +0.750" in shown


def test_preset_is_checked() -> None:
    with pytest.raises(UnknownNameError, match="unknown activation 'tahn'; did you mean 'tanh'"):
        PPOPreset(activation="tahn")
    for name, wrong in (("policy_layers", 3), ("n_epochs", "many"), ("n_epochs", 2.5), ("gamma", True)):
        with pytest.raises(ConfigError, match=f"setting {name} is {wrong!r}; it must be of type"):
            PPOPreset.from_dict({name: wrong})
    assert PPOPreset.from_dict({"gamma": 1}).gamma == 1


@pytest.mark.parametrize("timesteps", [1, 100, 1000, 5_000, 200_000, 3_000_000])
@pytest.mark.parametrize("num_envs", [1, 7, 64])
def test_rollouts_fit(timesteps: int, num_envs: int) -> None:
    settings = PPOPreset()
    n_steps, batch = settings.rollout(timesteps, num_envs)
    assert 2 <= n_steps <= settings.n_steps
    assert n_steps * num_envs % batch == 0 and 1 < batch <= settings.batch_size
    every = settings.evaluation_interval(timesteps, 500)
    assert min(3, timesteps) <= -(-timesteps // every) <= settings.evaluations


def test_what_the_reward_pays_chooses_the_checkpoint() -> None:
    """The final loss where it is paid for, and the return where only the way there counts."""
    policy = Clock()
    paid = Selection(TWO, 4, mode="eager").score(policy, 0)
    assert paid.height == paid.final_loss
    way = TWO.replace(reward={"progress": 0.0, "trajectory": 1.0})
    unpaid = Selection(way, 4, mode="eager").score(policy, 0)
    assert unpaid.final_loss == paid.final_loss
    assert unpaid.height == -unpaid.mean_return
    assert unpaid.mean_return != paid.mean_return
