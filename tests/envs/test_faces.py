"""The faces of the loop: Gymnasium's environment and vector environment, and Stable-Baselines3's."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

import trimtab.envs
from tests.envs.tiny import scenario
from trimtab.envs.gymnasium_env import TrimtabEnv
from trimtab.envs.names import gymnasium_id, scenarios
from trimtab.envs.sb3_vec_env import TrimtabVecEnv, make_vec
from trimtab.envs.seeds import later_seed
from trimtab.envs.vector_env import TrimtabVectorEnv
from trimtab.errors import MismatchError, RangeError, UnknownNameError, UserError

IDS = [gymnasium_id(name) for name in scenarios()]
UP = {"levers": ["lr"], "guard": {"rollback": False, "rate_scale": 10}}


# --- obligations of every registered environment ---------------------------------------------------------------


@pytest.mark.parametrize("name", IDS)
def test_both_checkers_pass(name: str) -> None:
    env = gymnasium.make(name).unwrapped
    gymnasium_check(env)
    sb3_check(env)


@pytest.mark.parametrize("name", scenarios())
@pytest.mark.parametrize("pushed", [False, True])
def test_whole_episodes_stay_in_their_spaces(name: str, pushed: bool) -> None:
    config = trimtab.envs.scenario.load_scenario(name)
    if pushed:
        config = config.replace(guard={"rollback": False, "rate_scale": 10}, interval=25)
    env = TrimtabEnv(config.replace(interval=25))
    env.action_space.seed(0)
    observation, info = env.reset(seed=5)
    assert observation in env.observation_space
    terminated, total = False, 0.0
    while not terminated:
        action = np.ones(env.action_space.shape, dtype=np.float32) if pushed else env.action_space.sample()
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation in env.observation_space
        assert not truncated and np.isfinite(reward)
        assert sum(info["reward_terms"].values()) == pytest.approx(reward, abs=1e-9)
        total += reward
    assert info["run"]["return"] == pytest.approx(total)
    assert info["run"]["diverged"] or info["step"] >= env.episodes.populations.total_steps[0]
    assert sum(info["run"]["terms"].values()) == pytest.approx(total)


def test_registration_is_complete_and_may_be_repeated() -> None:
    before = dict(gymnasium.registry)
    trimtab.envs.register_environments()
    assert dict(gymnasium.registry) == before
    assert set(IDS) == {name for name in gymnasium.registry if name.startswith("trimtab/")}


# --- one run ---------------------------------------------------------------------------------------------------


def test_a_seed_repeats_and_unseeded_resets_follow_from_it() -> None:
    env, twin = TrimtabEnv(scenario()), TrimtabEnv(scenario())
    first = [env.reset(seed=9)[1], env.reset()[1], env.reset()[1]]
    np.random.rand(3)
    second = [twin.reset(seed=9)[1], twin.reset()[1], twin.reset()[1]]
    assert first == second
    assert len({info["seed"] for info in first}) == 3
    assert first[0]["seed"] == 9 and env.reset(seed=2**31 + 9)[1]["seed"] == 9


def test_a_diverged_run_says_so() -> None:
    env = TrimtabEnv(scenario("sgd", **UP))
    env.reset(seed=0)
    terminated = False
    while not terminated:
        _, _, terminated, _, info = env.step(np.ones(1, dtype=np.float32))
    assert info["run"]["diverged"] and info["reward_terms"]["divergence"] < 0
    assert "the run diverged" in info["reasons"]["run"]


def test_reasons_are_given_in_words_where_there_are_any() -> None:
    env = TrimtabEnv(scenario())
    env.reset(seed=0)
    assert "reasons" not in env.step(np.zeros(4, dtype=np.float32))[4]
    info = env.step(np.array([0, 0, 0, 1], dtype=np.float32))[4]
    assert info["reasons"] == {"grad_clip": "the proposed multiplier was outside its absolute bounds"}
    assert info["multipliers"]["grad_clip"] == 1


def test_bounds_of_the_scenario_hold_in_an_environment() -> None:
    env = TrimtabEnv(scenario(guard={"bounds": {"lr": [0.5, 1.5]}}))
    env.reset(seed=0)
    for action, bound in ((1.0, 1.5), (-1.0, 0.5)):
        infos = [env.step(np.array([action, 0, 0, 0], dtype=np.float32))[4] for _ in range(4)]
        assert infos[-1]["multipliers"]["lr"] == bound
        assert "outside its absolute bounds" in infos[-1]["reasons"]["lr"]


def test_a_mixed_scenario_draws_its_family_from_the_seed() -> None:
    env = TrimtabEnv(scenario("tiny", "wide", action="multi-discrete"))
    drawn = [env.reset(seed=seed)[1]["family"].rpartition(":")[2] for seed in range(20)]
    assert set(drawn) == {"tiny", "wide"}
    assert drawn == [env.reset(seed=seed)[1]["family"].rpartition(":")[2] for seed in range(20)]
    chosen = env.scenario.families[1].name
    assert all(env.reset(seed=seed, options={"family": chosen})[1]["family"] == chosen for seed in range(3))
    with pytest.raises(UnknownNameError, match="did you mean"):
        env.reset(options={"family": chosen + "r"})


def test_there_is_nothing_to_render() -> None:
    for make in (TrimtabEnv, TrimtabVectorEnv):
        with pytest.raises(UserError, match="render_mode is 'human'"):
            make(scenario(), render_mode="human")


# --- many runs against one run each ----------------------------------------------------------------------------


def test_vector_environment_is_its_runs_one_by_one() -> None:
    config = scenario("tiny", "wide")
    vector = TrimtabVectorEnv(config, 4, mode="eager")
    observations, info = vector.reset(seed=30)
    families = info["family"].tolist()
    single = [TrimtabEnv(config) for _ in range(4)]
    for slot, env in enumerate(single):
        observation, start = env.reset(seed=30 + slot, options={"family": families[slot]})
        np.testing.assert_allclose(observation, observations[slot], atol=1e-5)
        assert start["instance"] == info["instance"][slot]
    rng, episodes = np.random.default_rng(0), 0
    for _ in range(12):
        actions = rng.uniform(-1, 1, (4, 4)).astype(np.float32)
        observations, rewards, terminated, truncated, info = vector.step(actions)
        for slot, env in enumerate(single):
            observation, reward, ended, _, last = env.step(actions[slot])
            assert (reward, ended) == (pytest.approx(rewards[slot], abs=1e-4), terminated[slot])
            if ended:
                episodes += 1
                np.testing.assert_allclose(info["final_obs"][slot], observation, atol=1e-3)
                assert info["final_info"]["run"]["return"][slot] == pytest.approx(last["run"]["return"], abs=1e-4)
                observation, last = env.reset(seed=int(info["seed"][slot]), options={"family": families[slot]})
            np.testing.assert_allclose(observations[slot], observation, atol=1e-3)
            assert info["log_val_loss"][slot] == pytest.approx(last["log_val_loss"], abs=1e-4)
            assert info["step"][slot] == last["step"]
        assert not truncated.any()
    assert episodes >= 4


def keys_of(info: dict[str, Any]) -> dict[str, Any]:
    return {key: keys_of(value) if isinstance(value, dict) else value.dtype.kind for key, value in info.items()}


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_infos_are_laid_out_as_gymnasium_does(mode: AutoresetMode) -> None:
    config = scenario(signals=["time"])
    ours = TrimtabVectorEnv(config, 3, mode="eager", autoreset_mode=mode)
    theirs = SyncVectorEnv([lambda: TrimtabEnv(config)] * 3, autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] is mode
    assert keys_of(ours.reset(seed=4)[1]) == keys_of(theirs.reset(seed=4)[1])
    ended = np.zeros(3, dtype=bool)
    for _ in range(12):
        one, other = (env.step(np.zeros((3, 4), dtype=np.float32)) for env in (ours, theirs))
        assert one[4].pop("reasons").shape == (3, 4) and one[4].pop("_reasons").shape == (3,)
        if "final_info" in one[4]:
            one[4]["final_info"].pop("reasons"), one[4]["final_info"].pop("_reasons")
        for info in (other[4], other[4].get("final_info", {})):  # one run says in words what the guard did, if anything
            info.pop("reasons", None), info.pop("_reasons", None)
        assert keys_of(one[4]) == keys_of(other[4])
        for mine, reference in zip(one[:4], other[:4], strict=True):
            assert (mine.shape, mine.dtype) == (reference.shape, reference.dtype)
        np.testing.assert_array_equal(one[2], other[2])
        np.testing.assert_allclose(one[1][~ended], other[1][~ended], atol=1e-4)
        for name in ("_step", "_reward_terms", "_seed", "_run", "_final_obs"):
            np.testing.assert_array_equal(one[4].get(name, 0), other[4].get(name, 0))
        if ended.any():
            break  # second episodes have seeds of their own
        ended = one[2]
    assert ended.any()


def test_next_step_autoreset_ignores_one_action() -> None:
    vector = TrimtabVectorEnv(scenario(), 2, mode="eager", autoreset_mode="NextStep")
    vector.reset(seed=1)
    ended = np.zeros(2, dtype=bool)
    for _ in range(11):
        _, rewards, terminated, _, info = vector.step(np.full((2, 4), 0.3))
        assert not rewards[ended].any() and not terminated[ended].any()
        assert (info["step"][ended] == 0).all()
        if ended.any():
            assert not info["_reward_terms"][ended].any() and info["_seed"][ended].all()
        ended = terminated
    assert vector.episodes.decisions.max() < 11


def test_disabled_autoreset_waits_for_a_mask() -> None:
    vector = TrimtabVectorEnv(scenario(), 3, mode="eager", autoreset_mode="Disabled")
    vector.reset(seed=[5, 6, 7])
    terminated = np.zeros(3, dtype=bool)
    while not terminated.all():
        _, _, terminated, _, _ = vector.step(np.zeros((3, 4)))
    _, info = vector.reset(seed=[None, 60, None], options={"reset_mask": np.array([True, True, False])})
    assert vector.episodes.ended.tolist() == [False, False, True]
    assert info["seed"].tolist() == [later_seed(5, 0, 1), 60, 0] and info["_seed"].tolist() == [True, True, False]
    for wrong in (np.zeros(3, dtype=bool), np.ones(2, dtype=bool), np.ones(3)):
        with pytest.raises(MismatchError, match="reset_mask has the shape"):
            vector.reset(options={"reset_mask": wrong})
    with pytest.raises(MismatchError, match="seed holds 2 seeds"):
        vector.reset(seed=[1, 2])
    with pytest.raises(UnknownNameError, match="autoreset mode 'Sometimes'"):
        TrimtabVectorEnv(scenario(), 2, autoreset_mode="Sometimes")


def test_gymnasium_makes_both_and_its_statistics_wrap_them() -> None:
    single = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make(IDS[0], held_out=True, scenario=scenario()))
    single.reset(seed=1)
    terminated = False
    while not terminated:
        _, _, terminated, _, info = single.step(np.zeros(4, dtype=np.float32))
    assert info["episode"]["r"] == pytest.approx(info["run"]["return"])
    vector = gymnasium.make_vec(IDS[0], num_envs=3, scenario=scenario(), mode="eager")
    assert isinstance(vector, TrimtabVectorEnv)
    wrapped = gymnasium.wrappers.vector.RecordEpisodeStatistics(vector)
    wrapped.reset(seed=1)
    info = {}
    while "episode" not in info:
        info = wrapped.step(np.zeros((3, 4), dtype=np.float32))[4]
    ended = info["_episode"]
    assert info["episode"]["r"][ended] == pytest.approx(info["final_info"]["run"]["return"][ended])


# --- Stable-Baselines3 -----------------------------------------------------------------------------------------


def run_to_end(env: TrimtabVecEnv) -> tuple[int, dict[str, Any], np.ndarray]:
    while True:
        observations, rewards, dones, infos = env.step(np.zeros((env.num_envs, 4), dtype=np.float32))
        assert rewards.dtype == np.float32 and dones.dtype == np.bool_ and len(infos) == env.num_envs
        assert all(("episode" in info) == done for info, done in zip(infos, dones, strict=True))
        assert all(info["TimeLimit.truncated"] is False for info in infos)
        if dones.any():
            slot = int(dones.argmax())
            return slot, infos[slot], observations


def test_sb3_environment_restarts_in_the_same_step() -> None:
    env = make_vec(scenario(), 3, seed=11, mode="eager")
    first = env.reset()
    assert env.get_attr("episode_seed") == [11, 12, 13]
    single = TrimtabEnv(scenario())
    assert np.allclose(first[0], single.reset(seed=11)[0], atol=1e-5)
    slot, info, observations = run_to_end(env)
    assert info["terminal_observation"] in env.observation_space
    assert not np.array_equal(info["terminal_observation"], observations[slot])
    assert info["episode"]["r"] == info["run"]["return"] and info["episode"]["l"] == info["run"]["decisions"]
    assert sum(info["run"]["terms"].values()) == pytest.approx(info["episode"]["r"])
    assert env.reset_infos[slot]["seed"] == later_seed(11, slot, 1) == env.get_attr("episode_seed", slot)[0]
    assert np.allclose(observations[slot], single.reset(seed=later_seed(11, slot, 1))[0], atol=1e-5)
    assert env.last_result is not None and env.last_multipliers.shape == (3, 4)
    assert set(env.last_terms) == {"progress", "trajectory", "instability", "divergence"}


def test_sb3_seeds() -> None:
    env, twin = make_vec(scenario(), 3, seed=5, mode="eager"), make_vec(scenario(), 3, seed=5, mode="eager")
    history = []
    for one in (env, twin):
        one.reset()
        seeds = [one.get_attr("episode_seed")]
        for _ in range(8):
            one.step(np.zeros((3, 4)))
            seeds.append(one.get_attr("episode_seed"))
        history.append(seeds)
    assert history[0] == history[1]
    ends = [seed for step in history[0] for seed in step]
    assert len({(at % 3, seed) for at, seed in enumerate(ends)}) == len(set(ends))  # slots share no seed
    assert env.seed(80) == [80, 81, 82]
    assert env.get_attr("episode_seed") == history[0][-1]  # not before the next reset
    env.reset()
    assert env.get_attr("episode_seed") == [80, 81, 82]
    env.reset()
    assert env.get_attr("episode_seed") == [later_seed(80, slot, 1) for slot in range(3)]
    state = np.random.get_state()[1].copy()
    env.seed()
    assert np.array_equal(np.random.get_state()[1], state)
    with pytest.raises(RangeError, match="seed is -1"):
        make_vec(scenario(), 2, seed=-1)
    with pytest.raises(RangeError, match="num_envs is 2.0; it must be a whole number of at least 1"):
        make_vec(scenario(), 2.0)  # type: ignore[arg-type]


def test_sb3_attributes_are_those_of_each_run() -> None:
    env = make_vec(scenario("tiny", "wide"), 4, mode="eager")
    env.set_options({"family": "tiny"})
    env.reset()
    assert [family.rpartition(":")[2] for family in env.get_attr("family")] == ["tiny", "tiny", "wide", "wide"]
    assert env.get_attr("instance", [3]) == ["tiny-9/train/3"]
    env.set_attr("note", "here", [1, 2])
    assert env.get_attr("note", indices=2) == ["here"]
    assert not env.has_attr("note") and env.has_attr("render_mode")
    env.set_attr("shout", lambda word, times=1: word.upper() * times)
    assert env.env_method("shout", "a", indices=[0, 3], times=2) == ["AA", "AA"]
    assert env.env_is_wrapped(Monitor) == [False] * 4 and env.env_is_wrapped(Monitor, indices=1) == [False]
    assert list(env.get_images()) == [None] * 4
    env.close()
    env.close()


@pytest.mark.parametrize("action", ["box", "multi-discrete"])
def test_ppo_learns_a_rollout(action: str) -> None:
    env = VecNormalize(VecMonitor(make_vec(scenario("tiny", "wide", action=action), 4, mode="eager")))
    model = PPO(
        "MlpPolicy", env, n_steps=12, batch_size=24, n_epochs=1, seed=3, policy_kwargs={"net_arch": [8]}, device="cpu"
    )
    before = model.policy.state_dict()["action_net.weight"].clone()
    model.learn(48)
    assert not (model.policy.state_dict()["action_net.weight"] == before).all()
    assert len(model.ep_info_buffer or ()) >= 4
    assert all(np.isfinite(info["r"]) for info in model.ep_info_buffer or ())
