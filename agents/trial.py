"""One batch of inner runs under a policy, from their first step to their last, with a record that stops at each end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import numpy as np

from trimtab.envs.scenario import Scenario
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.levers import resolve_levers
from trimtab.inner_training.population import Population
from trimtab.inner_training.signals import resolve_signals
from trimtab.inner_training.steering import Steering
from trimtab.inner_training.task import Instance
from trimtab.inner_training.telemetry import Measured
from trimtab.policies.policy import Policy

Missing = Literal["none", "validation", "progress", "both"]


class Trial:
    """Runs advance in lock-step until the last has ended; the record of each is frozen at its own end.

    An interval that begins within the budget is finished. The guard acts before anything is recorded, so a run that
    is rolled back at its last decision ends with the parameters that it was rolled back to.

    Args:
        population: at least as many runs as there are instances; the others idle.
        instances: of the population's family.
        policy: it must fit the scenario.
        scenario: interval, levers and validation examples.
        guard: the same for every policy.
        missing: what the policy is not told.

    Attributes:
        final_loss, best_loss: (runs,) ln bounded test loss.
        curve: (runs, decisions) ln bounded validation loss; ``decisions`` covers the longest budget.
        diverged, lost_early: (runs,) bool.
        inner_steps, rollbacks: (runs,) int64.
        seconds: time on the clock, test losses not counted.
    """

    def __init__(
        self,
        population: Population,
        instances: Sequence[Instance],
        policy: Policy,
        scenario: Scenario,
        guard: GuardConfig,
        missing: Missing = "none",
    ) -> None:
        self.population, self.policy, self.scenario, self.missing = population, policy, scenario, missing
        self.instances = list(instances)
        self.steering = Steering(
            resolve_levers(scenario.levers), resolve_signals(policy.signals), guard, population.num_runs
        )
        runs = len(self.instances)
        self._budgets = np.array([instance.steps for instance in self.instances])
        self._cap = float(np.log(population.family.loss_cap))
        self._best_validation = np.full(runs, np.inf)
        self._ended = np.zeros(runs, dtype=bool)
        self.final_loss, self.best_loss = np.full(runs, self._cap), np.full(runs, self._cap)
        self.curve = np.full((runs, int(-(-self._budgets.max() // scenario.interval))), self._cap)
        self.diverged, self.lost_early = np.zeros(runs, dtype=bool), np.zeros(runs, dtype=bool)
        self.inner_steps, self.rollbacks = np.zeros(runs, dtype=np.int64), np.zeros(runs, dtype=np.int64)
        self.seconds = 0.0

    def play(self) -> None:
        """Trains every run to its end and fills in the record."""
        population, started = self.population, time.perf_counter()
        population.reset(range(len(self.instances)), self.instances)
        self.steering.reset(np.ones(population.num_runs, dtype=bool), population.base)
        state = self.policy.init(population.num_runs)
        validation = np.full(population.num_runs, np.nan)
        measured: Measured | None = None
        for decision in range(self.curve.shape[1] + 1):
            rolled_back = self._assess(measured, validation)
            if decision > 0:
                if rolled_back:
                    validation = self._validation()
                self._record(decision - 1, validation)
            if self._ended.all():
                break
            actions, state = self.policy.act(self._observation, state)
            self.steering.decide(actions, self.policy.levers)
            population.set_lr_multiplier(self.steering.lr_multiplier)
            population.set_hyperparameters(self.steering.hyperparameters(population.base))
            measured = population.advance(self.scenario.interval).to_host()
            validation = self._validation()
        self.seconds += time.perf_counter() - started

    def _assess(self, measured: Measured | None, validation: np.ndarray) -> bool:
        """Lets the guard act and the policy observe; says whether any run was rolled back."""
        reading = self.population.reading(measured, validation)
        if self.missing in ("validation", "both"):
            reading.val_loss = np.full_like(reading.val_loss, np.nan)
        if self.missing in ("progress", "both"):
            reading.total_steps = np.full_like(reading.total_steps, np.nan)
        health = self.steering.assess(reading)
        self.population.snapshot(health.stable)
        self.population.restore(health.rollback)
        self._lost = health.lost[: len(self.instances)]
        self._observation = self.steering.observe(reading)
        return bool(health.rollback.any())

    def _validation(self) -> np.ndarray:
        return self.population.evaluate("validation", self.scenario.val_examples).double().cpu().numpy()

    def _bounded(self, loss: np.ndarray) -> np.ndarray:
        return np.log(self.population.family.bounded(loss))

    def _record(self, decision: int, validation: np.ndarray) -> None:
        runs, steps = len(self.instances), self.population.steps_done
        live, lost = ~self._ended, ~self._ended & self._lost
        height = np.where(lost, self._cap, self._bounded(validation[:runs]))
        self.curve[live, decision:] = height[live, None]
        done = live & ~lost & (steps[:runs] >= self._budgets)
        better = live & ~lost & (height < self._best_validation)
        if (done | better).any():
            test = self._test()[:runs]
            self.best_loss[better] = self._bounded(test)[better]
            self._best_validation[better] = height[better]
            self.final_loss[done] = self._bounded(test)[done]
            self.diverged |= done & ~np.isfinite(test)
        self.diverged |= lost
        self.lost_early |= lost & (decision == 0)
        ending = done | lost
        self.inner_steps[ending] = steps[:runs][ending]
        self.rollbacks[ending] = self.steering.guard.rollbacks[:runs][ending]
        self._ended |= ending

    def _test(self) -> np.ndarray:
        """Test losses, off the clock: no policy pays for being judged."""
        started = time.perf_counter()
        losses = self.population.evaluate("test").double().cpu().numpy()
        self.seconds -= time.perf_counter() - started
        return losses
