"""Which checkpoint is the best: the same runs under every policy, on instances that training never draws."""

from __future__ import annotations

import numpy as np

from trimtab.agents.checkpoints import Score
from trimtab.envs.episode import Episodes
from trimtab.envs.scenario import Scenario
from trimtab.envs.seeds import SEEDS
from trimtab.inner_training.stepping import Mode
from trimtab.policies.policy import Policy

FIRST_SEED = SEEDS  # training draws its episodes from seeds below


class Selection:
    """The selection instances: of the training kind, from seeds that training never draws.

    They are not the held-out instances of benchmarks, which no choice may look at. Each environment plays two
    instances one after the other, a long one and a short one, so that all end at about the same time.

    Args:
        scenario: what is trained on.
        num_envs: half the number of instances; that of the training needs no compilation of its own.
        device, mode: as for ``Episodes``.

    Attributes:
        decisions: environment steps that one evaluation takes, over all environments.
    """

    def __init__(self, scenario: Scenario, num_envs: int, *, device: str = "cpu", mode: Mode = "auto") -> None:
        self.episodes = Episodes(scenario, num_envs, device=device, mode=mode)
        self._seeds = self._arrange(FIRST_SEED + np.arange(2 * num_envs).reshape(2, -1))

    def _arrange(self, seeds: np.ndarray) -> np.ndarray:
        """Seeds (2, N) of the first and the second instance of each environment: the longest with the shortest."""
        everyone = np.ones(self.episodes.num_envs, dtype=bool)
        lengths = np.zeros(seeds.shape)
        for turn in range(2):
            self.episodes.reset(everyone, seeds[turn])
            lengths[turn] = np.ceil(self.episodes.populations.total_steps / self.episodes.scenario.interval)
        for block in self.episodes.populations.blocks:  # the family of an instance is that of its environment
            order = np.argsort(lengths[:, block], axis=None, kind="stable")
            half = len(order) // 2
            order = np.stack([order[: half - 1 : -1], order[:half]])
            seeds[:, block] = seeds[:, block].ravel()[order]
            lengths[:, block] = lengths[:, block].ravel()[order]
        self.decisions = int(lengths.sum(0).max()) * self.episodes.num_envs
        return seeds

    def score(self, policy: Policy, steps: int) -> Score:
        """Means over the instances, of a policy that has had so many environment steps of training."""
        final, diverged = self.play(policy)
        return Score(steps=steps, final_loss=float(final.mean()), diverged=float(diverged.mean()))

    def play(self, policy: Policy) -> tuple[np.ndarray, np.ndarray]:
        """Plays every instance to its end, with the guard and the missing signals of training.

        Args:
            policy: what to judge; it reads what the scenario has, in the scenario's order.

        Returns:
            The final ln validation loss (2, N) of each instance, and whether it has diverged.
        """
        episodes = self.episodes
        slots = np.arange(episodes.num_envs)
        turn = np.zeros(episodes.num_envs, dtype=np.int64)
        final, diverged = np.zeros(self._seeds.shape), np.zeros(self._seeds.shape, dtype=bool)
        episodes.reset(np.ones(episodes.num_envs, dtype=bool), self._seeds[0])
        state, fresh = policy.init(episodes.num_envs), policy.init(episodes.num_envs)
        while not episodes.ended.all():
            running = ~episodes.ended
            actions, state = policy.act(episodes.observations, state)
            result = episodes.step(actions, policy.levers)
            final[turn[running], slots[running]] = result.log_val_loss[running]
            diverged[turn[running], slots[running]] = result.diverged[running]
            if (again := episodes.ended & (turn == 0)).any():
                turn[again] = 1
                for name, value in state.items():
                    value[again] = fresh[name][again]
                episodes.reset(again, self._seeds[1])
        return final, diverged
