"""One run of a scenario as a Gymnasium environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from trimtab.envs.episode import Episodes
from trimtab.envs.infos import of_run, reasons_in_words, run_values, start_values, step_values
from trimtab.envs.populations import Populations
from trimtab.envs.scenario import Scenario, load_scenario
from trimtab.envs.seeds import SEEDS
from trimtab.envs.spaces import action_masks, action_space, observation_space
from trimtab.errors import UserError, unknown
from trimtab.inner_training.stepping import Mode

_EVERY = np.ones(1, dtype=bool)


class TrimtabEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A policy steers one inner training run; an episode is one run.

    ``reset(seed=s)`` starts the run of seed ``s``, the same as slot ``i`` of a vector environment whose seed for that
    slot is ``s``. Without a seed, the next run's is drawn from ``np_random``. In a scenario of several families the
    seed chooses the family by its share; ``options={"family": name}`` chooses it instead.

    Info of a step: ``reward_terms`` (they sum to the reward), ``log_val_loss``, ``step`` (optimizer steps done),
    ``multipliers`` of the levers, ``rolled_back``, and ``reasons`` in words, by lever where the guard changed an action
    and under ``run`` where it rolled the run back or gave it up. The
    last step adds ``run``, a summary of the episode.

    Args:
        scenario: an id, a YAML file, or a scenario.
        held_out: take held-out instances.
        device: a torch device.
        mode: ``"eager"`` (a single run is not worth compiling), ``"compile"`` or ``"auto"``.
        populations: one run to steer in place of a new one, of a scenario of one family (see ``module_env``).
        render_mode: only None; there is nothing to render.

    >>> env = TrimtabEnv("digits-mlp")
    >>> observation, info = env.reset(seed=3)
    >>> info["instance"]
    'digits-mlp/train/3'
    """

    def __init__(
        self,
        scenario: str | Path | Scenario,
        *,
        held_out: bool = False,
        device: str = "cpu",
        mode: Mode = "eager",
        populations: Populations | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode is not None:
            raise UserError(f"render_mode is {render_mode!r}; it must be None, there is nothing to render")
        self.scenario = load_scenario(scenario)
        self.render_mode = None
        self.observation_space = observation_space(self.scenario)
        self.action_space = action_space(self.scenario)
        self._settings: dict[str, Any] = {"held_out": held_out, "device": device, "mode": mode}
        # One population is one architecture, so each family has its own; it is made when it is first drawn.
        self._made: dict[str, Episodes] = {}
        if populations is not None:
            given = Episodes(self.scenario, 1, populations=populations, **self._settings)
            self._made[self.scenario.families[0].name] = given
        self.episodes = self._of_family(self.scenario.families[0].name)

    def _of_family(self, name: str) -> Episodes:
        if name not in self._made:
            alone = self.scenario.replace(families=[name])
            self._made[name] = Episodes(alone, 1, **self._settings)
        return self._made[name]

    def _family(self, seed: int, options: dict[str, Any]) -> str:
        names = [family.name for family in self.scenario.families]
        chosen = options.get("family")
        if chosen is not None and chosen not in names:
            raise unknown("task family of this scenario", chosen, names)
        shares = np.array([family.share for family in self.scenario.families])
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, len(names)], dtype=np.uint64)))
        drawn = names[int(rng.choice(len(names), p=shares / shares.sum()))]
        return drawn if chosen is None else str(chosen)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts a run and returns its first observation, made before its first step."""
        super().reset(seed=seed)
        chosen = int(self.np_random.integers(SEEDS)) if seed is None else seed % SEEDS
        self.episodes = self._of_family(self._family(chosen, options or {}))
        observations = self.episodes.reset(_EVERY, np.array([chosen]))
        return observations[0].copy(), of_run(start_values(self.episodes), 0)

    def action_masks(self) -> np.ndarray:
        """(3 L,) bool of ``multi-discrete`` actions: which of down, hold and up is legal now, lever by lever.

        Raises:
            MismatchError: the scenario's actions are not ``multi-discrete``.
        """
        return action_masks(self.scenario, self.episodes.steering)[0]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves the levers and trains for one interval; a spent budget and a diverged run are ``terminated``."""
        result = self.episodes.step(np.asarray(action)[None])
        info = of_run(step_values(self.episodes, result), 0)
        if reasons := reasons_in_words(self.episodes, result, 0):
            info["reasons"] = reasons
        terminated = bool(result.terminated[0])
        if terminated:
            info["run"] = of_run(run_values(self.episodes, result), 0)
        return result.observations[0].copy(), float(result.rewards[0]), terminated, False, info
