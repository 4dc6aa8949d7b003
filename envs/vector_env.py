"""N runs of a scenario as a native Gymnasium vector environment."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from trimtab.envs.episode import Episodes, StepResult
from trimtab.envs.infos import batched, run_values, start_values, step_values
from trimtab.envs.populations import Populations
from trimtab.envs.scenario import Scenario, load_scenario
from trimtab.envs.seeds import SEEDS, EpisodeSeeds
from trimtab.envs.spaces import action_masks, action_space, observation_space
from trimtab.errors import MismatchError, check_whole, unknown
from trimtab.inner_training.stepping import Mode

Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


class TrimtabVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N runs in lock-step, in one population for each task family of the scenario.

    Infos are those of ``TrimtabEnv`` as arrays, with a mask ``_key`` beside each ``key``; ``reasons`` are (N, L)
    ``Reason`` codes. Under ``SAME_STEP``, an ended run's last observation and info are in ``final_obs`` and
    ``final_info`` while the returned ones are of the next episode. Under ``NEXT_STEP``, the next step resets it,
    ignores its action and rewards 0. Under ``DISABLED``, call ``reset(options={"reset_mask": mask})``.

    Args:
        scenario: an id, a YAML file, or a scenario.
        num_envs: N, at least the number of the scenario's families.
        held_out: take held-out instances.
        device: a torch device.
        mode: ``"compile"``, ``"eager"`` or ``"auto"``, see ``Population``.
        autoreset_mode: an ``AutoresetMode`` or its value.
        render_mode: only None; there is nothing to render.
        populations: N runs to steer in place of new ones.
    """

    def __init__(
        self,
        scenario: str | Path | Scenario,
        num_envs: int = 1,
        *,
        held_out: bool = False,
        device: str = "cpu",
        mode: Mode = "auto",
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        populations: Populations | None = None,
    ) -> None:
        if autoreset_mode not in [*AutoresetMode, *(one.value for one in AutoresetMode)]:
            raise unknown("autoreset mode", autoreset_mode, [one.value for one in AutoresetMode])
        if render_mode is not None:
            raise MismatchError(f"render_mode is {render_mode!r}; it must be None, there is nothing to render")
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.scenario, self.num_envs = load_scenario(scenario), num_envs
        self.metadata = {"render_modes": [], "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = observation_space(self.scenario)
        self.single_action_space = action_space(self.scenario)
        self.episodes = Episodes(
            self.scenario, num_envs, held_out=held_out, device=device, mode=mode, populations=populations
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._seeds = EpisodeSeeds(num_envs, int(self.np_random.integers(SEEDS)))

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every environment, or in those of ``options["reset_mask"]``.

        Args:
            seed: environment i takes ``seed + i``; a sequence gives each its own, None goes on as it would have.
            options: ``reset_mask``, (N,) bool with at least one True.
        """
        if isinstance(seed, Integral):
            seed = check_whole("seed", seed, 0)
        super().reset(seed=seed if isinstance(seed, int) else None)
        mask = self._mask((options or {}).get("reset_mask"))
        if seed is not None:
            self._reseed(seed, mask)
        observations = self.episodes.reset(mask, self._seeds.take(mask))
        return observations.copy(), batched(start_values(self.episodes), mask)

    def _mask(self, given: Any) -> np.ndarray:
        if given is None:
            return np.ones(self.num_envs, dtype=bool)
        mask = np.asarray(given)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise MismatchError(
                f"reset_mask has the shape {mask.shape} and dtype {mask.dtype}; it must be ({self.num_envs},) bool with "
                "at least one True"
            )
        return mask

    def _reseed(self, seed: int | Sequence[int | None], mask: np.ndarray) -> None:
        if isinstance(seed, int):
            seeds: list[int | None] = [seed + slot for slot in range(self.num_envs)]
            roots: list[int | None] = [seed] * self.num_envs
        else:
            seeds = roots = list(seed)
        if len(seeds) != self.num_envs:
            raise MismatchError(
                f"seed holds {len(seeds)} seeds; it must hold {self.num_envs}, one for each environment"
            )
        for slot, (first, root) in enumerate(zip(seeds, roots, strict=True)):
            if first is not None and root is not None and mask[slot]:
                self._seeds.restart(slot, check_whole(f"seed[{slot}]", first, 0), root)

    def step(self, actions: np.ndarray) -> Step:
        """Takes one decision in every environment; see the class for what happens to runs that end."""
        before = self.episodes.ended
        result = self.episodes.step(actions)
        resets, ended = before, result.terminated & ~before
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            resets = ended
        elif self.autoreset_mode is AutoresetMode.DISABLED:
            resets = np.zeros(self.num_envs, dtype=bool)
        info = self._info(result, ended, resets)
        observations = result.observations
        if resets.any():
            observations = self.episodes.reset(resets, self._seeds.take(resets))
            _overlay(info, batched(start_values(self.episodes), resets), resets)
        terminated = ended if self.autoreset_mode is not AutoresetMode.DISABLED else result.terminated
        return observations.copy(), result.rewards, terminated.copy(), np.zeros(self.num_envs, dtype=bool), info

    def action_masks(self) -> np.ndarray:
        """(N, 3 L) bool of ``multi-discrete`` actions: which of down, hold and up is legal now, lever by lever.

        Raises:
            MismatchError: the scenario's actions are not ``multi-discrete``.
        """
        return action_masks(self.scenario, self.episodes.steering)

    def _info(self, result: StepResult, ended: np.ndarray, resets: np.ndarray) -> dict[str, Any]:
        values = {**step_values(self.episodes, result), "reasons": result.reasons}
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            info = batched(values, ~resets)
            if ended.any():
                info |= batched({"run": run_values(self.episodes, result)}, ended)
            return info
        info = batched(values, ~ended)
        if ended.any():
            last = np.full(self.num_envs, None, dtype=object)
            for run in np.flatnonzero(ended):
                last[run] = result.observations[run].copy()
            info |= {"final_obs": last, "_final_obs": ended.copy()}
            final = {**values, "run": run_values(self.episodes, result)}
            info |= {"final_info": batched(final, ended), "_final_info": ended.copy()}
        return info


def _overlay(info: dict[str, Any], fresh: dict[str, Any], mask: np.ndarray) -> None:
    """Puts the entries of restarted environments beside those of the others."""
    for name, value in fresh.items():
        if name in info and isinstance(value, np.ndarray):
            info[name] = np.where(mask, value, info[name])
        else:
            info[name] = value
