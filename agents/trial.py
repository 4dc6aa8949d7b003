"""Inner runs under a policy, from their first step to their last, with a record that stops at each end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trimtab.agents.diagnostics import STRUCTURE, DiagnosticRecord, diagnostics_of
from trimtab.agents.phases import PhaseRecord
from trimtab.envs.episode import Episodes, StepResult
from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.task import Instance
from trimtab.policies.network import ranges_of
from trimtab.policies.policy import Policy


def _rows(state: Any, runs: np.ndarray, policy: str) -> Any:
    """The part of a policy's state that belongs to ``runs``."""
    if isinstance(state, dict):
        return {key: _rows(value, runs, policy) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_rows(value, runs, policy) for value in state)
    if isinstance(state, np.ndarray) and state.ndim > 0:
        return state[runs]
    raise MismatchError(
        f"the state of policy {policy!r} holds a {type(state).__name__}; it must hold numpy arrays with a row per run"
    )


def _put(state: Any, runs: np.ndarray, part: Any) -> None:
    """Writes what ``_rows`` took, after a decision, back in place."""
    if isinstance(state, np.ndarray):
        state[runs] = part
        return
    for key in state if isinstance(state, dict) else range(len(state)):
        _put(state[key], runs, part[key])


def _ask(policy: Policy, observations: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
    """A policy's decision; whatever a user's own code raises becomes one sentence, its traceback stays chained."""
    try:
        actions, state = policy.act(observations, state)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"policy {policy.name!r} failed in a decision: {type(error).__name__}: {error}") from error
    return actions, state


class Trial:
    """Runs take turns in the slots of one population, the longest first; a slot that falls free takes the next one.

    The record of a run is frozen at its own end. An interval that begins within the budget is finished. The guard
    acts before anything is recorded, so a run that is rolled back at its last decision ends with the parameters that
    it was rolled back to.

    Args:
        episodes: of one family, at most as many slots as there are instances.
        instances: of that family.
        policy: it reads the signals of the episodes, in their order.
        tick: called with the number of runs that have just ended.
        best: whether ``best_loss`` is wanted, which takes a test loss at nearly every decision.

    Attributes:
        final_loss, best_loss: (runs,) ln bounded test loss.
        curve: (runs, decisions) ln bounded validation loss; ``decisions`` covers the longest budget.
        diverged, lost_early, late: (runs,) bool.
        inner_steps, rollbacks: (runs,) int64.
        disturbed: by kind of disturbance, in how many steps it was active, (runs,) int64.
        seconds: time on the clock: the policy's decisions, and training, validation and guard between them.
    """

    def __init__(
        self,
        episodes: Episodes,
        instances: Sequence[Instance],
        policy: Policy,
        tick: Callable[[int], object] = lambda ended: None,
        *,
        best: bool = True,
    ) -> None:
        self.episodes, self.policy, self.instances, self._tick = episodes, policy, list(instances), tick
        # Judged as it is deployed: where its signals leave what it met in training, it is not listened to.
        episodes.steering.ranges = ranges_of(policy)
        runs, budgets = len(self.instances), np.array([instance.steps for instance in self.instances])
        self._budgets = budgets
        self._cap = float(np.log(episodes.populations.cap[0]))
        self._waiting = np.argsort(budgets, kind="stable").tolist()  # the longest last, where ``pop`` takes it
        self._best_validation = np.full(runs, np.inf if best else -np.inf)
        self.final_loss, self.best_loss = np.full(runs, self._cap), np.full(runs, self._cap)
        self.curve = np.full((runs, int(-(-budgets.max() // episodes.scenario.interval))), self._cap)
        self.diverged, self.lost_early, self.late = (np.zeros(runs, dtype=bool) for _ in range(3))
        self.inner_steps, self.rollbacks = np.zeros(runs, dtype=np.int64), np.zeros(runs, dtype=np.int64)
        self.disturbed = {kind: np.zeros(runs, dtype=np.int64) for kind in episodes.disturbed_steps}
        self.seconds = 0.0
        phased = any(instance.phases for instance in self.instances)
        self._phases = PhaseRecord(episodes, self.instances) if phased else None
        self._structure = {name: np.full(runs, np.nan) for name in STRUCTURE} if episodes.scenario.structure else {}
        self._diagnostics = DiagnosticRecord(diagnostics_of(self.instances), runs)
        self._run_of = np.zeros(episodes.num_envs, dtype=np.int64)  # the run in each slot
        self._live = np.zeros(episodes.num_envs, dtype=bool)

    def play(self) -> None:
        """Trains every run to its end and fills in the record."""
        episodes, policy = self.episodes, self.policy
        state, width = policy.init(len(self.instances)), len(policy.signals)
        self._fill(np.ones(episodes.num_envs, dtype=bool))
        while self._live.any():
            started = time.perf_counter()
            part = _rows(state, self._run_of, policy.name)
            actions, part = _ask(policy, episodes.observations[:, :width], part)
            _put(state, self._run_of, part)
            result = episodes.step(actions, policy.levers)
            self.seconds += time.perf_counter() - started
            ended = self._record(result)
            self._tick(int(ended.sum()))
            self._fill(ended)

    def _fill(self, free: np.ndarray) -> None:
        """Starts waiting runs in free slots; a slot for which none is left idles."""
        started = np.flatnonzero(free)[: len(self._waiting)]
        if len(started) == 0:
            return
        mask = np.zeros_like(free)
        mask[started] = True
        self._run_of[started] = [self._waiting.pop() for _ in started]
        instances = {int(slot): self.instances[self._run_of[slot]] for slot in started}
        self.episodes.reset(mask, np.zeros(len(mask), dtype=np.int64), instances)
        self._live |= mask

    def _record(self, result: StepResult) -> np.ndarray:
        """Notes what the interval led to; returns the slots whose run has ended with it."""
        live, runs = self._live, self._run_of
        lost, ended = live & result.diverged, live & result.terminated
        height = np.where(lost, self._cap, result.log_val_loss)
        decisions = self.episodes.decisions - 1
        for slot in np.flatnonzero(live):
            self.curve[runs[slot], decisions[slot] :] = height[slot]
        done, ruined = ended & ~lost, lost
        better = live & ~lost & (height < self._best_validation[runs])
        if (done | better).any():
            test = self.episodes.test_loss()
            bounded = np.log(self.episodes.populations.bounded(test))
            self.best_loss[runs[better]], self._best_validation[runs[better]] = bounded[better], height[better]
            self.final_loss[runs[done]] = bounded[done]
            ruined = lost | (done & ~np.isfinite(test))  # the last step may ruin what all measurements found sane
        self.diverged[runs[ruined]] = True
        self.lost_early[runs[ruined & (decisions == 0)]] = True
        self.inner_steps[runs[ended]] = result.step[ended]
        self.late[runs[done]] = result.step[done] < self._budgets[runs[done]]
        self.rollbacks[runs[ended]] = self.episodes.steering.guard.rollbacks[ended]
        if self._structure:
            values = (*self.episodes.mean_activity, result.edits)
            for held, value in zip(self._structure.values(), values, strict=True):
                held[runs[ended]] = value[ended]
        for kind, steps in self.episodes.disturbed_steps.items():
            self.disturbed[kind][runs[ended]] = steps[ended]
        if self._phases is not None:
            self._phases.note(result, runs, live, ended)
        self._diagnostics.note(result.diagnostics, runs, live)
        self._live = live & ~ended
        return ended

    def measures(self) -> dict[str, np.ndarray]:
        """Further figures (runs,) by name, NaN where a run does not have one."""
        phases = {} if self._phases is None else self._phases.measures()
        return {**phases, **self._diagnostics.measures(), **self._structure}
