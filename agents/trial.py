"""One batch of inner runs under a policy, from their first step to their last, with a record that stops at each end."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from trimtab.envs.episode import Episodes, StepResult
from trimtab.inner_training.task import Instance
from trimtab.policies.policy import Policy


class Trial:
    """Runs advance in lock-step until the last has ended; the record of each is frozen at its own end.

    An interval that begins within the budget is finished. The guard acts before anything is recorded, so a run that
    is rolled back at its last decision ends with the parameters that it was rolled back to.

    Args:
        episodes: of one family, at least as many runs as there are instances; the others idle.
        instances: of that family.
        policy: it reads the signals of the episodes, in their order.

    Attributes:
        final_loss, best_loss: (runs,) ln bounded test loss.
        curve: (runs, decisions) ln bounded validation loss; ``decisions`` covers the longest budget.
        diverged, lost_early: (runs,) bool.
        inner_steps, rollbacks: (runs,) int64.
        seconds: time on the clock, test losses not counted.
    """

    def __init__(self, episodes: Episodes, instances: Sequence[Instance], policy: Policy) -> None:
        self.episodes, self.policy, self.instances = episodes, policy, list(instances)
        runs, interval = len(self.instances), episodes.scenario.interval
        longest = max(instance.steps for instance in self.instances)
        self._cap = np.log(episodes.populations.cap[:runs])
        self._best_validation = np.full(runs, np.inf)
        self._live = np.ones(runs, dtype=bool)
        self.final_loss, self.best_loss = self._cap.copy(), self._cap.copy()
        self.curve = np.repeat(self._cap[:, None], -(-longest // interval), axis=1)
        self.diverged, self.lost_early = np.zeros(runs, dtype=bool), np.zeros(runs, dtype=bool)
        self.inner_steps, self.rollbacks = np.zeros(runs, dtype=np.int64), np.zeros(runs, dtype=np.int64)
        self.seconds = 0.0

    def play(self) -> None:
        """Trains every run to its end and fills in the record."""
        episodes, started = self.episodes, time.perf_counter()
        mask = np.arange(episodes.num_envs) < len(self.instances)
        seeds = np.zeros(episodes.num_envs, dtype=np.int64)
        observations = episodes.reset(mask, seeds, dict(enumerate(self.instances)))
        state = self.policy.init(episodes.num_envs)
        width = len(self.policy.signals)
        decision = 0
        while self._live.any():
            actions, state = self.policy.act(observations[:, :width], state)
            result = episodes.step(actions, self.policy.levers)
            observations = result.observations
            self._record(decision, result)
            decision += 1
        self.seconds += time.perf_counter() - started

    def _record(self, decision: int, result: StepResult) -> None:
        runs, live = len(self.instances), self._live
        lost = live & result.diverged[:runs]
        ended = live & result.terminated[:runs]
        height = np.where(lost, self._cap, result.log_val_loss[:runs])
        self.curve[live, decision:] = height[live, None]
        done = ended & ~lost
        better = live & ~lost & (height < self._best_validation)
        if (done | better).any():
            test, bounded = self._test()
            self.best_loss[better], self._best_validation[better] = bounded[better], height[better]
            self.final_loss[done] = bounded[done]
            self.diverged |= done & ~np.isfinite(test)
        self.diverged |= lost
        self.lost_early |= lost & (decision == 0)
        self.inner_steps[ended] = result.step[:runs][ended]
        self.rollbacks[ended] = self.episodes.steering.guard.rollbacks[:runs][ended]
        self._live = live & ~ended

    def _test(self) -> tuple[np.ndarray, np.ndarray]:
        """Test losses (runs,) raw and as ln of bounded ones, off the clock: no policy pays for being judged."""
        started, runs = time.perf_counter(), len(self.instances)
        losses = self.episodes.test_loss()
        bounded = np.log(self.episodes.populations.bounded(losses))
        self.seconds -= time.perf_counter() - started
        return losses[:runs], bounded[:runs]
