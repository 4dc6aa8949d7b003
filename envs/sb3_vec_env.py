"""N runs of a scenario as a native Stable-Baselines3 ``VecEnv``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from trimtab.envs.episode import Episodes, StepResult
from trimtab.envs.infos import of_run, run_values, start_values
from trimtab.envs.populations import Populations
from trimtab.envs.scenario import Scenario, load_scenario
from trimtab.envs.seeds import SEEDS, EpisodeSeeds
from trimtab.envs.spaces import action_masks, action_space, observation_space
from trimtab.errors import check_whole
from trimtab.inner_training.stepping import Mode


class RunSlot:
    """One environment of a ``TrimtabVecEnv``: what ``get_attr``, ``set_attr`` and ``env_method`` reach.

    Attributes:
        index: which one.
        render_mode, spec: None.
        scenario, observation_space, action_space: of all.
    """

    def __init__(self, episodes: Episodes, index: int) -> None:
        self._episodes, self.index = episodes, index
        self.render_mode, self.spec = None, None
        self.scenario = episodes.scenario
        self.observation_space, self.action_space = observation_space(self.scenario), action_space(self.scenario)

    @property
    def episode_seed(self) -> int:
        """Seed of the episode under way."""
        return int(self._episodes.seeds[self.index])

    @property
    def family(self) -> str:
        """Name of the task family; a slot keeps its family."""
        return self._episodes.populations.family_names[self.index]

    @property
    def instance(self) -> str:
        """Key of the instance under way; empty before the first reset."""
        held = self._episodes.populations.instances[self.index]
        return held.key if held else ""

    def action_masks(self) -> np.ndarray:
        """(3 L,) bool for agents that mask ``multi-discrete`` actions, such as sb3-contrib's ``MaskablePPO``."""
        return action_masks(self.scenario, self._episodes.steering)[self.index]


class TrimtabVecEnv(VecEnv):
    """N runs in lock-step for Stable-Baselines3; an ended run restarts in the same step.

    Infos are short: at the end of an episode ``terminal_observation``, ``episode`` (``r``, ``l``, ``t``, as a
    ``Monitor`` would give) and ``run`` (see ``infos.run_values``); at every step ``TimeLimit.truncated``, which is
    always False. What the last step did to all runs is on the environment itself. Options have no effect.

    Args:
        scenario: an id, a YAML file, or a scenario.
        num_envs: N, at least the number of the scenario's families.
        seed: environment i takes ``seed + i`` for its first episode.
        held_out: take held-out instances.
        device: a torch device.
        mode: ``"compile"``, ``"eager"`` or ``"auto"``, see ``Population``.
        populations: N runs to steer in place of new ones.

    Attributes:
        episodes: the loop itself.
        last_terms: contribution (N,) of each reward term at the last step.
        last_multipliers: (N, M) multipliers after the last step, in the order of ``episodes.multiplier_levers``.
        last_result: everything about the last step, None before the first.
    """

    def __init__(
        self,
        scenario: str | Path | Scenario,
        num_envs: int,
        *,
        seed: int = 0,
        held_out: bool = False,
        device: str = "cpu",
        mode: Mode = "auto",
        populations: Populations | None = None,
    ) -> None:
        seed = check_whole("seed", seed, 0)
        self.scenario = load_scenario(scenario)
        self.episodes = Episodes(
            self.scenario, num_envs, held_out=held_out, device=device, mode=mode, populations=populations
        )
        self.slots = [RunSlot(self.episodes, index) for index in range(num_envs)]
        self._episode_seeds = EpisodeSeeds(num_envs, seed)
        self._root = seed
        self._actions: np.ndarray | None = None
        self._started = time.perf_counter()
        self.last_terms: dict[str, np.ndarray] = {}
        self.last_multipliers = self.episodes.steering.multipliers.copy()
        self.last_result: StepResult | None = None
        super().__init__(num_envs, observation_space(self.scenario), action_space(self.scenario))

    def reset(self) -> np.ndarray:
        """Starts an episode in every environment; the first observation of each is made before its first step."""
        for slot, given in enumerate(self._seeds):
            if given is not None:
                self._episode_seeds.restart(slot, given, self._root)
        self._reset_seeds()
        self._reset_options()
        self._actions = None
        return self._restart(np.ones(self.num_envs, dtype=bool))

    def _restart(self, mask: np.ndarray) -> np.ndarray:
        observations = self.episodes.reset(mask, self._episode_seeds.take(mask))
        values = start_values(self.episodes)
        for run in np.flatnonzero(mask).tolist():
            self.reset_infos[run] = of_run(values, run)
        return observations.copy()

    def step_async(self, actions: np.ndarray) -> None:
        """Takes the actions (N, L) of the next step."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Takes one decision in every environment.

        Returns:
            Observations (N, S) float32 (of the next episode where one ended), rewards (N,) float32, dones (N,) bool
            and infos.
        """
        assert self._actions is not None, "call step_async first"
        result = self.episodes.step(self._actions)
        self._actions = None
        self.last_terms, self.last_multipliers, self.last_result = result.terms, result.multipliers, result
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        observations = result.observations.copy()
        if result.terminated.any():
            self._close_episodes(result, infos)
            observations = self._restart(result.terminated)
        return observations, result.rewards.astype(np.float32), result.terminated.copy(), infos

    def _close_episodes(self, result: StepResult, infos: list[dict[str, Any]]) -> None:
        values = run_values(self.episodes, result)
        elapsed = round(time.perf_counter() - self._started, 6)
        for slot in np.flatnonzero(result.terminated).tolist():
            run = of_run(values, slot)
            infos[slot]["terminal_observation"] = result.observations[slot].copy()
            infos[slot]["episode"] = {"r": run["return"], "l": run["decisions"], "t": elapsed}
            infos[slot]["run"] = run

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Gives environment i the seed ``seed + i`` at the next ``reset``; without one, a fresh seed is drawn."""
        if seed is None:
            seed = int(np.random.default_rng().integers(SEEDS))
        self._root = seed = check_whole("seed", seed, 0)
        self._seeds = [seed + slot for slot in range(self.num_envs)]
        return self._seeds

    def close(self) -> None:
        """Does nothing: there are no processes and no files."""

    def get_images(self) -> Sequence[np.ndarray | None]:
        """None for each environment: there is nothing to render."""
        return [None] * self.num_envs

    def _chosen(self, indices: VecEnvIndices) -> list[RunSlot]:
        return [self.slots[index] for index in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of each environment (see ``RunSlot``)."""
        return [getattr(slot, attr_name) for slot in self._chosen(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of each environment."""
        for slot in self._chosen(indices):
            setattr(slot, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls a method of each environment."""
        if method_name == "action_masks":  # agents that mask ask at every step, so all at once
            masks = action_masks(self.scenario, self.episodes.steering)
            return [masks[index] for index in self._get_indices(indices)]
        return [getattr(slot, method_name)(*method_args, **method_kwargs) for slot in self._chosen(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """False for each environment: nothing is wrapped inside."""
        return [False for _ in self._chosen(indices)]


def make_vec(
    scenario: str | Path | Scenario,
    num_envs: int,
    *,
    device: str = "cpu",
    seed: int = 0,
    mode: Mode = "auto",
    held_out: bool = False,
) -> TrimtabVecEnv:
    """Makes a Stable-Baselines3 vector environment of a scenario.

    Args:
        scenario: an id, the path of a YAML file, or a ``Scenario``.
        num_envs: runs side by side, at least the number of the scenario's task families.
        device: a torch device.
        seed: environment i takes ``seed + i`` for its first episode; later ones follow from (seed, i).
        mode: ``"compile"``, ``"eager"``, or ``"auto"``, which compiles from 32 runs on.
        held_out: take held-out instances, which are disjoint from those of training.

    Raises:
        UserError: when the scenario is unknown or not valid, or a number is out of its range.

    >>> env = make_vec("digits-mlp", 2, mode="eager")
    >>> env.reset().shape == (2, len(env.scenario.signals))
    True
    """
    return TrimtabVecEnv(scenario, num_envs, device=device, seed=seed, mode=mode, held_out=held_out)
