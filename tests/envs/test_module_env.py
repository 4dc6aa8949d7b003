"""A training run of the user's own as an environment: checkers, rewards, rollback of an injected NaN, and agents."""

from __future__ import annotations

import gc
import itertools
import math
import re
import runpy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check
from torch import nn

from tests.envs.tiny import tiny
from trimtab.envs.episode import Episodes
from trimtab.envs.gymnasium_env import TrimtabEnv
from trimtab.envs.module_env import module_env, module_vec
from trimtab.envs.populations import Populations
from trimtab.envs.scenario import Scenario
from trimtab.envs.vector_env import TrimtabVectorEnv
from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.module_family import ModuleFamily
from trimtab.inner_training.module_parts import Parts
from trimtab.inner_training.module_run import ModuleRun
from trimtab.inner_training.population import Population
from trimtab.policies.registry import load_policy

ROOT = Path(__file__).resolve().parents[2]
STEPS = 25
SHOWN = {"missing": {"progress": 0, "validation": 0, "validation_every_max": 1}}


def small(
    steps: int = STEPS, poison: Callable[[int], bool] = lambda step: False, **changes: Any
) -> Callable[[int], Parts]:
    """A maker of regressions with batch norm and dropout; ``poison`` says at which steps the loss is NaN."""

    def make(seed: int) -> Parts:
        calls: list[int] = []
        inputs = torch.randn(160, 4)
        pairs = torch.utils.data.TensorDataset(inputs, torch.sin(inputs.sum(1, keepdim=True)))
        train, validation, test = torch.utils.data.random_split(pairs, [96, 32, 32])
        module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))

        def loss(module: nn.Module, batch: Any) -> torch.Tensor:
            value = (module(batch[0]) - batch[1]).square().mean()
            if module.training:
                calls.append(1)
                value = value * float("nan") if poison(len(calls)) else value
            return value

        values: dict[str, Any] = {
            "module": module,
            "optimizer": torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3),
            "train": torch.utils.data.DataLoader(train, batch_size=16, shuffle=True),
            "loss": loss,
            "total_steps": steps,
            "validation": torch.utils.data.DataLoader(validation, batch_size=32),
            "test": torch.utils.data.DataLoader(test, batch_size=32),
        }
        return Parts(**{**values, **changes})

    return make


def of(make: Callable[[int], Parts], name: str = "tried") -> ModuleFamily:
    return ModuleFamily(name=name, make=make, loss_cap=20.0)


def scenario(**changes: Any) -> Scenario:
    return Scenario.of(
        {"id": "tried", "families": ["digits-mlp"], "interval": 5, "val_examples": 64, **SHOWN, **changes}
    )


def finite(module: nn.Module) -> bool:
    return all(bool(torch.isfinite(one).all()) for one in (*module.parameters(), *module.buffers()))


def module_of(env: Any, run: int = 0) -> nn.Module:
    return env.episodes.populations.members[run].parts.module


# --- one environment --------------------------------------------------------------------------------------------------


def test_an_episode_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0.0, 0.5)
    monkeypatch.setattr("trimtab.inner_training.live_run.time.monotonic", lambda: next(now))
    shown = scenario(signals=["deadline_available", "deadline_left"])
    env = module_env(of(small(steps=10_000, deadline=3.0)), scenario=shown)
    seen = [env.reset(seed=0)[0]]
    while not (ended := env.step(np.zeros(4, dtype=np.float32)))[2]:
        seen.append(ended[0])
    left = [float(one[1]) for one in (*seen, ended[0])]
    assert all(one[0] == 1 for one in seen)
    assert left[0] == 1 and left[-1] == 0 and left == sorted(left, reverse=True) and 3 < len(left) < 12


def test_both_checkers_pass() -> None:
    env = module_env(of(small()))
    gymnasium_check(env, skip_render_check=True)
    sb3_check(env)


def test_an_episode_is_one_run() -> None:
    env = module_env(of(small()), scenario=scenario())
    env.action_space.seed(0)
    observation, info = env.reset(seed=5)
    assert (info["family"], info["instance"], info["step"]) == ("tried", "tried/train/5", 0)
    steps, total, terminated = [], 0.0, False
    while not terminated:
        assert observation in env.observation_space
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert not truncated and sum(info["reward_terms"].values()) == pytest.approx(reward, abs=1e-9)
        steps.append(info["step"])
        total += reward
    assert steps == [5, 10, 15, 20, 25]
    assert info["run"]["return"] == pytest.approx(total) and not info["run"]["diverged"]
    loss = env.episodes.test_loss()
    assert loss.shape == (1,) and np.isfinite(loss).all()


def played(env: TrimtabEnv, seed: int) -> list[np.ndarray]:
    observations = [env.reset(seed=seed)[0]]
    rng, terminated = np.random.default_rng(0), False
    while not terminated:
        observation, reward, terminated, _, _ = env.step(rng.uniform(-1, 1, 4).astype(np.float32))
        observations.append(np.append(observation, reward))
    return observations


def test_a_seed_repeats_an_episode_and_held_out_ones_are_others() -> None:
    env = module_env(of(small()), scenario=scenario())
    first, again = played(env, 4), played(env, 4)
    torch.rand(3)
    assert all(map(np.array_equal, first, again))
    assert all(map(np.array_equal, first, played(module_env(of(small()), scenario=scenario()), 4)))
    kept = module_env(of(small()), scenario=scenario(), held_out=True)
    assert not np.array_equal(played(kept, 4)[-1], first[-1])
    assert kept.reset(seed=4)[1]["instance"] == "tried/held-out/4"


def test_levers_signals_and_interval_are_those_of_the_scenario() -> None:
    env = module_env(of(small()), scenario=scenario(levers=["lr"], signals=["progress", "log_lr"], interval=10))
    assert env.observation_space.shape == (2,) and env.action_space.shape == (1,)
    env.reset(seed=0)
    observation, _, _, _, info = env.step(np.ones(1, dtype=np.float32))
    assert info["step"] == 10 and observation[0] == pytest.approx(10 / STEPS)
    assert info["multipliers"] == {"lr": pytest.approx(np.e)}
    assert module_env(of(small()), scenario="digits-mlp").scenario.interval == 10


def test_a_rule_follows_its_schedule() -> None:
    policy = load_policy("cosine")
    shown = scenario(signals=list(policy.signals))
    episodes = module_env(of(small()), scenario=shown).episodes
    every = np.ones(1, dtype=bool)
    episodes.reset(every, np.array([2]))
    state, multipliers, ended = policy.init(1), [], False
    while not ended:
        actions, state = policy.act(episodes.observations, state)
        result = episodes.step(actions, policy.levers)
        multipliers.append(float(result.multipliers[0, 0]))
        ended = bool(result.terminated[0])
    expected = (1 + np.cos(np.pi * np.arange(5) / 5)) / 2
    np.testing.assert_allclose(multipliers, expected, atol=1e-6)


# --- divergence -------------------------------------------------------------------------------------------------------


def test_an_injected_nan_is_rolled_back() -> None:
    env = module_env(of(small(40, lambda step: step == 17)), scenario=scenario())
    env.reset(seed=1)
    hold = np.zeros(4, dtype=np.float32)
    outcomes, weights = [], []
    for _ in range(8):
        *_, terminated, _, info = env.step(hold)
        outcomes.append((info["rolled_back"], terminated))
        weights.append(nn.utils.parameters_to_vector(module_of(env).parameters()).detach().clone())
    assert [rolled for rolled, _ in outcomes] == [False, False, False, True] + [False] * 4
    assert [end for _, end in outcomes] == [False] * 7 + [True]
    assert torch.equal(weights[3], weights[2]), "the newest moment, which its first losses have confirmed"
    assert finite(module_of(env)) and "rolled" not in info["run"] and info["run"]["rollbacks"] == 1
    assert "the run diverged" in module_reason(env, of(small(40, lambda step: step == 2)))


def module_reason(env: TrimtabEnv, family: ModuleFamily) -> str:
    other = module_env(family, scenario=env.scenario)
    other.reset(seed=1)
    return str(other.step(np.zeros(4, dtype=np.float32))[4]["reasons"]["run"])


def test_a_run_without_rollback_is_lost_and_pays_for_it() -> None:
    shown = scenario(guard={"rollback": False})
    env = module_env(of(small(40, lambda step: step == 7)), scenario=shown)
    env.reset(seed=1)
    env.step(np.zeros(4, dtype=np.float32))
    observation, reward, terminated, _, info = env.step(np.zeros(4, dtype=np.float32))
    assert terminated and info["run"]["diverged"] and info["reward_terms"]["divergence"] < 0
    assert observation in env.observation_space and np.isfinite(reward)
    with pytest.raises(UserError, match="keeps no snapshots"):
        env.episodes.populations.restore(np.ones(1, dtype=bool))
    assert np.isfinite(env.reset(seed=2)[0]).all() and finite(module_of(env))


def test_a_lost_run_disturbs_nobody() -> None:
    shown = scenario(guard={"rollback": False})
    mixed = module_vec([of(small(poison=lambda step: step == 8)), of(small())], scenario=shown, seed=3)
    calm = module_vec([of(small()), of(small())], scenario=shown, seed=3)
    assert np.array_equal(mixed.reset(), calm.reset())
    hold = np.zeros((2, 4))
    for decision in range(4):
        (one, rewards, dones, infos), (other, expected, _, _) = mixed.step(hold), calm.step(hold)
        assert np.array_equal(one[1], other[1]) and rewards[1] == expected[1]
        assert dones.tolist() == [decision % 2 == 1, False]  # the next episode is poisoned too
        if dones[0]:
            assert infos[0]["run"]["diverged"]


# --- several runs, and agents -----------------------------------------------------------------------------------------


def test_runs_of_ones_own_and_a_population_side_by_side() -> None:
    population = Population(tiny(), 2, mode="eager")
    populations = Populations.of([population, ModuleRun(of(small()))])
    assert populations.family_names == ("tiny", "tiny", "tried") and populations.cap.tolist() == [50, 50, 20]
    episodes = Episodes(scenario(), 3, populations=populations)
    episodes.reset(np.ones(3, dtype=bool), np.array([7, 8, 9]))
    alone = module_env(of(small()), scenario=scenario())
    alone.reset(seed=9)
    for _ in range(3):
        result = episodes.step(np.full((3, 4), 0.2))
        observation, reward, *_ = alone.step(np.full(4, 0.2, dtype=np.float32))
        np.testing.assert_allclose(result.observations[2], observation, atol=1e-6)
        assert result.rewards[2] == pytest.approx(reward, abs=1e-9)
        assert np.isfinite(result.observations).all()


def test_the_vector_face_of_gymnasium() -> None:
    populations = Populations.of([ModuleRun(of(small(), name)) for name in ("one", "two")])
    vector = TrimtabVectorEnv(scenario(), 2, populations=populations)
    _, info = vector.reset(seed=4)
    assert info["instance"].tolist() == ["one/train/4", "two/train/5"]
    for _ in range(STEPS // 5):
        *_, info = vector.step(np.zeros((2, 4), dtype=np.float32))
    assert info["_final_info"].all() and info["step"].tolist() == [0, 0]


def test_an_agent_trains_on_them() -> None:
    single = PPO("MlpPolicy", module_env(of(small()), scenario=scenario()), n_steps=8, batch_size=8, device="cpu")
    single.learn(8)
    several = module_vec([of(small())] * 2, scenario=scenario(action="multi-discrete"), seed=1)
    PPO("MlpPolicy", several, n_steps=4, batch_size=8, device="cpu").learn(8)
    assert several.get_attr("instance")[0].startswith("tried/train/")


def test_memory_stays_flat_over_many_episodes() -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def make(seed: int) -> Parts:
        made = small(5)(seed)
        alive.append(weakref.ref(made.module))
        return made

    env = module_env(of(make), scenario=scenario())
    gc.collect()
    gc.disable()
    try:
        for seed in range(30):
            env.reset(seed=seed)
            assert env.step(np.zeros(4, dtype=np.float32))[2]
        assert sum(one() is not None for one in alive[1:]) == 1
    finally:
        gc.enable()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_an_environment() -> None:
    with pytest.raises(UserError, match=r"run 'tried' has no validation data; give Parts\(validation=...\)"):
        module_env(of(small(validation=None))).reset(seed=0)
    with pytest.raises(UserError, match="unknown scenario 'digits-mpl'; did you mean 'digits-mlp'"):
        module_env(of(small()), scenario="digits-mpl")
    for change, key in (
        ({"disturbances": [{"kind": "nan-gradient", "rate": 1.0}]}, "disturbances"),
        ({"deadline": 0.5}, "a deadline"),
        ({"deadline": 0}, "a deadline"),
    ):
        with pytest.raises(MismatchError, match=f"scenario 'tried' has {key}, which only populations know"):
            module_env(of(small()), scenario=scenario(**change))
    with pytest.raises(MismatchError, match="guard.curvature_share of scenario 'tried' needs .* only a population"):
        module_env(of(small()), scenario=scenario(guard={"curvature_share": 0.5}))
    for families in ([], [small()]):
        with pytest.raises(UserError, match="give at least one ModuleFamily"):
            module_vec(families)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the loss of run 'tried' has the shape"):
        module_env(of(small(loss=lambda module, batch: module(batch[0])))).reset(seed=0)


# --- the page and the example -----------------------------------------------------------------------------------------


def test_the_page_runs(tmp_path: Path) -> None:
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "module_run.md").read_text(encoding="utf-8"), re.DOTALL
    )
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    names = runpy.run_path(str(script))
    assert len(blocks) == 3
    assert names["info"]["step"] == 60 and names["terminated"]
    assert names["result"].terminated[0] and names["vector"].num_envs == 2


@pytest.mark.parametrize("policy", ["cosine", "default"])
def test_the_example_trains(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "module_run.py"))
    small = example["Size"](width=16, depth=1, heads=2, context=16, batch=8, steps=40, lr=1e-2)
    example["SIZES"]["small"] = small
    example["main"](["--policy", policy, "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 42 and lines[0].startswith("11,760 parameters, 40 steps")
    bits = float(re.findall(r"validation ([\d.]+) bits", lines[1])[0]), float(re.findall(r"[\d.]+", lines[-1])[0])
    assert 8.2 > bits[0] > bits[1] + 1 and math.isfinite(bits[1])
