"""Which checkpoint is the best: the same runs under every policy, on instances that training never draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.agents.checkpoints import Score
from trimtab.envs.episode import Episodes
from trimtab.envs.scenario import Scenario
from trimtab.envs.seeds import SEEDS
from trimtab.inner_training.stepping import Mode
from trimtab.policies.policy import Policy

FIRST_SEED = SEEDS  # training draws its episodes from seeds below


@dataclass(frozen=True)
class Played:
    """The selection instances under one policy; every array is (2, N).

    Attributes:
        final_loss: natural log of the bounded validation loss at the end.
        returns: undiscounted returns.
        diverged: bool, the run has diverged for good.
    """

    final_loss: np.ndarray
    returns: np.ndarray
    diverged: np.ndarray


class Selection:
    """The selection instances: of the training kind, from seeds that training never draws.

    They are not the held-out instances of benchmarks, which no choice may look at. Each environment plays two
    instances one after the other, a long one and a short one, so that all end at about the same time.

    The best checkpoint is the one with the lowest mean final loss, as far as the reward pays for it. Where only the way counts
    (the terms ``progress`` and ``terminal`` have no weight), it is the one with the highest mean return.

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
        played = self.play(policy)
        final, returned = float(played.final_loss.mean()), float(played.returns.mean())
        weights = self.episodes.scenario.reward
        ends_count = weights["progress"] > 0 or weights["terminal"] > 0
        return Score(
            steps=steps,
            final_loss=final,
            mean_return=returned,
            diverged=float(played.diverged.mean()),
            height=final if ends_count else -returned,
        )

    def play(self, policy: Policy) -> Played:
        """Plays every instance to its end, with the guard and the missing signals of training.

        Args:
            policy: what to judge; it reads what the scenario has, in the scenario's order.

        Returns:
            What became of each instance.
        """
        episodes = self.episodes
        slots = np.arange(episodes.num_envs)
        turn = np.zeros(episodes.num_envs, dtype=np.int64)
        final, returns = np.zeros(self._seeds.shape), np.zeros(self._seeds.shape)
        diverged = np.zeros(self._seeds.shape, dtype=bool)
        episodes.reset(np.ones(episodes.num_envs, dtype=bool), self._seeds[0])
        state, fresh = policy.init(episodes.num_envs), policy.init(episodes.num_envs)
        while not episodes.ended.all():
            running = ~episodes.ended
            actions, state = policy.act(episodes.observations, state)
            result = episodes.step(actions, policy.levers)
            final[turn[running], slots[running]] = result.log_val_loss[running]
            returns[turn[running], slots[running]] += result.rewards[running]
            diverged[turn[running], slots[running]] = result.diverged[running]
            if (again := episodes.ended & (turn == 0)).any():
                turn[again] = 1
                for name, value in state.items():
                    value[again] = fresh[name][again]
                episodes.reset(again, self._seeds[1])
        return Played(final, returns, diverged)
