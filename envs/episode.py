"""The one loop of every environment: move levers, advance, judge, observe, reward, for N runs at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trimtab.envs.populations import Populations
from trimtab.envs.rewards import TERMS, Limits, Outcome, score
from trimtab.envs.scenario import Scenario
from trimtab.envs.step_result import StepResult
from trimtab.envs.visibility import Visibility
from trimtab.errors import MismatchError
from trimtab.inner_training.edits import EDITS, EditConfig, nudged
from trimtab.inner_training.energy import step_energy
from trimtab.inner_training.guard import Health
from trimtab.inner_training.levers import resolve_levers
from trimtab.inner_training.measurements import needs_of
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.signals import SIGNALS, resolve_signals
from trimtab.inner_training.steering import Kind, Move, Steering
from trimtab.inner_training.stepping import Mode
from trimtab.inner_training.task import Instance
from trimtab.inner_training.telemetry import Measured

__all__ = ["Episodes", "StepResult"]

SPIKE = np.tanh(1.0)  # the signal ``spike`` at a z-score of 4


class Episodes:
    """N runs of a scenario, observed and steered as reinforcement learning sees them.

    One decision is: the levers move, every run trains for ``scenario.interval`` steps, the guard judges, the
    observation and the reward follow. A run ends (``terminated``) when its budget is spent, its deadline has passed, or
    it is lost; it is stepped on with the others, without reward, until ``reset`` starts another episode in its place.

    Args:
        scenario: what to run.
        num_envs: N, at least the number of the scenario's families, between which the runs are split by share.
        device: a torch device.
        mode: ``"compile"``, ``"eager"`` or ``"auto"``, see ``Population``.
        held_out: take held-out instances, which are disjoint from the others.
        diagnostics: names of signals that nobody observes but that results record.
        populations: N runs to use in place of new ones, which may take a compilation; nobody else may be using them.

    Attributes:
        action_levers: names of the levers in the order of the action.
        multiplier_levers: those of them that have a multiplier, in the order of results.
        populations: the runs.
        steering: signals, guard and lever positions of all N runs.
        observations: (N, S) float32, the newest of each run.
        seeds: (N,) int64 seed of each run's episode.
        returns: (N,) undiscounted return of each episode so far.
        term_sums: contribution (N,) of each term so far.
        decisions: (N,) int64 decisions taken in each episode.
        disturbed_steps: by kind of disturbance, in how many steps of the episode it was active so far, (N,) int64.
        log_val_loss: (N,) natural log of the bounded validation loss now.
        ended: (N,) bool, waiting for a reset.
    """

    def __init__(
        self,
        scenario: Scenario,
        num_envs: int,
        *,
        device: str = "cpu",
        mode: Mode = "auto",
        held_out: bool = False,
        diagnostics: Sequence[str] = (),
        populations: Populations | None = None,
    ) -> None:
        levers, signals = resolve_levers(nudged(scenario.levers)), resolve_signals(scenario.signals)
        self._diagnostics, guard = resolve_signals(diagnostics), scenario.guard.config()
        self.scenario, self.num_envs, self.held_out = scenario, num_envs, held_out
        self.action_levers, self.multiplier_levers = scenario.levers, nudged(scenario.levers)
        edits = None if scenario.structure is None else scenario.structure.config()
        self.populations = self._runs(device, mode) if populations is None else populations
        self._check_runs(edits)
        needed = dict.fromkeys((*needs_of((*signals, *self._diagnostics)), *guard.needs))
        self.populations.measure(tuple(needed))
        self.steering = Steering(levers, signals, guard, num_envs, edits)
        self._kinds: dict[str, Kind] = dict.fromkeys(scenario.levers, "moves")
        self._weights = {name: scenario.reward[name] for name in TERMS if name in scenario.reward}
        self._visibility = Visibility(scenario.missing, num_envs)
        self._base: Mapping[str, np.ndarray] = self.populations.base
        floor, cap = np.log(self.populations.floor), np.log(self.populations.cap)
        self._limits = Limits(first=cap.copy(), floor=floor, cap=cap, decisions=np.ones(num_envs))
        self._last_move = np.zeros(num_envs)
        self.observations = np.zeros((num_envs, len(signals)), dtype=np.float32)
        self.seeds, self.decisions = np.zeros(num_envs, dtype=np.int64), np.zeros(num_envs, dtype=np.int64)
        self.returns, self.log_val_loss = np.zeros(num_envs), cap.copy()
        self.term_sums = {name: np.zeros(num_envs) for name in (*self._weights, "divergence")}
        self.term_sums = {name: held for name, held in self.term_sums.items() if self._weights.get(name, 1) > 0}
        self.disturbed_steps = {one.kind: np.zeros(num_envs, dtype=np.int64) for one in scenario.disturbance_settings}
        self._activity = np.zeros((2, num_envs))  # sums of the active share and of the active work
        self.ended, self._begun = np.ones(num_envs, dtype=bool), False

    def _runs(self, device: str, mode: Mode) -> Populations:
        """New runs, as the scenario has them."""
        scenario = self.scenario
        return Populations(
            scenario.families,
            self.num_envs,
            clip=any(lever.hyperparameter == "grad_clip" for lever in resolve_levers(self.multiplier_levers)),
            disturbances=scenario.disturbance_settings,
            structure=None if scenario.structure is None else scenario.structure.config(),
            device=device,
            mode=mode,
        )

    def _check_runs(self, edits: EditConfig | None) -> None:
        """Refuses runs that were made for another scenario."""
        given, wanted = self.populations.disturbances, self.scenario.disturbance_settings
        if given != wanted:
            raise MismatchError(
                f"scenario {self.scenario.id!r} has {len(wanted)} disturbances, the runs that were given "
                f"{len(given)}; they must be the same, and runs of one's own have none"
            )
        structures = self.populations.structures
        if (None if structures is None else structures.config) != edits:
            raise MismatchError(
                f"the runs that were given to scenario {self.scenario.id!r} were not made for its structural levers; runs "
                "of one's own have none, and others take the settings of their scenario"
            )

    def reset(self, mask: np.ndarray, seeds: np.ndarray, instances: Mapping[int, Instance] | None = None) -> np.ndarray:
        """Starts a new episode in the runs of ``mask``; the others are untouched, bit for bit.

        Args:
            mask: (N,) bool.
            seeds: (N,) whole numbers in [0, 2**31); those outside ``mask`` are not read.
            instances: by run, what to start in place of the instances that the seeds draw.

        Returns:
            ``observations`` (N, S); the first of an episode is made before its first step.
        """
        self.populations.reset(mask, seeds, held_out=self.held_out, instances=instances)
        self._visibility.reset(mask, seeds)
        if not self._begun:
            self.steering.energy = step_energy(self.steering.signals, self.populations.device)
        self.seeds = np.where(mask, seeds, self.seeds)
        sums = (*self.term_sums.values(), *self.disturbed_steps.values(), *self._activity)
        for held in (self.returns, self._last_move, self.decisions, *sums):
            held[mask] = 0
        self.ended, self._begun = self.ended & ~mask, True
        blank = self._reading(None, np.full(self.num_envs, np.nan))
        self._base = blank.base
        self.steering.reset(mask, blank.base)
        decisions = np.ceil(blank.total_steps / self.scenario.interval)
        blank.total_steps = self._visibility.total_steps(blank.total_steps)
        self.steering.assess(blank, active=mask)
        self.observations = np.where(mask[:, None], self.steering.observe(blank), self.observations)
        loss = self.populations.validation_loss(self.scenario.val_examples, mask)
        self.log_val_loss = np.where(mask, np.log(self.populations.bounded(loss)), self.log_val_loss)
        self._limits.first[mask], self._limits.decisions[mask] = self.log_val_loss[mask], decisions[mask]
        return self.observations

    def step(self, actions: np.ndarray, kinds: Mapping[str, Kind] | None = None) -> StepResult:
        """Takes one decision for every run and trains for one interval.

        Args:
            actions: (N, L) in the order of ``action_levers``: moves in [-1, 1], or {0, 1, 2} for a scenario of
                ``multi-discrete`` actions; with ``kinds``, (N, len(kinds)) moves or targets in its order.
            kinds: lever name to ``"moves"`` or ``"targets"``, for a policy that governs some levers only or sets
                targets; the other levers stay where they are.

        Raises:
            MismatchError: when ``actions`` are of another shape or no numbers, or before the first ``reset``.
        """
        if not self._begun:
            raise MismatchError("no episode has begun; call reset before the first step")
        move = self.steering.decide(self._moves(actions, kinds), self._kinds if kinds is None else kinds)
        for event, mask in move.fired.items():
            self.populations.fire(event, mask)
        if self.populations.structures is not None:
            self.populations.structures.edit(move.edits)
        self.populations.set_lr_multiplier(self.steering.lr_multiplier)
        self.populations.set_hyperparameters(self.steering.hyperparameters(self._base))
        measured, loss = self.populations.advance(self.scenario.interval, self.scenario.val_examples)
        self.decisions += ~self.ended
        reading = self._reading(measured, self._visibility.val_loss(loss, self.decisions))
        finished = (reading.step >= reading.total_steps) | (reading.clock >= reading.deadline)
        disturbed = self.populations.disturbed_steps(self.scenario.interval)
        for kind, steps in disturbed.items():
            self.disturbed_steps[kind] += np.where(self.ended, 0, steps)
        reading.total_steps = self._visibility.total_steps(reading.total_steps)
        self._base = reading.base
        health = self.steering.assess(reading)
        reading.measurable = self._visibility.measurements  # only now: the guard knows them always
        health.carry_out(self.populations)
        if health.rollback.any():
            loss = np.where(health.rollback, self._restored(health.rollback, reading), loss)
        self.observations = self.steering.observe(reading)
        before, self.log_val_loss = self.log_val_loss, np.log(self.populations.bounded(loss))
        structure = self._structure()
        self._activity += np.where(self.ended, 0.0, [structure["active_share"], structure["active_work"]])
        rewards, terms = self._reward(self._outcome(reading, health, move, before, finished))
        self.ended = self.ended | finished | health.lost
        return StepResult(
            observations=self.observations,
            rewards=rewards,
            terminated=self.ended,
            diverged=health.lost,
            rolled_back=health.rollback,
            terms=terms,
            log_val_loss=self.log_val_loss,
            step=reading.step.astype(np.int64),
            multipliers=move.after,
            reasons=self._reasons(move),
            **structure,
            losses=measured.losses,
            score=np.full(self.num_envs, np.nan) if measured.scores is None else measured.scores.mean(0),
            clock=reading.clock,
            disturbed=disturbed,
            diagnostics=self._diagnosed(reading),
        )

    def _restored(self, rollback: np.ndarray, reading: Reading) -> np.ndarray:
        """Validation loss (N,) of what was put back; the reading learns of its units."""
        if self.populations.structures is not None:
            self.populations.structures.recount()
            reading.units = self.populations.structures.units
        return self.populations.validation_loss(self.scenario.val_examples, rollback)

    def _reasons(self, move: Move) -> np.ndarray:
        """(N, L) codes in the order of the action."""
        nothing = np.zeros(self.num_envs, dtype=np.int64)
        by_name = dict(zip(self.multiplier_levers, move.reasons.T, strict=True))
        edits = {name: move.edit_reasons.get(name, nothing) for name in self.action_levers if name in EDITS}
        return np.stack([{**by_name, **edits}[name] for name in self.action_levers], axis=1)

    def _structure(self) -> dict[str, np.ndarray]:
        """What a result says of the structure."""
        structures, limits = self.populations.structures, self.steering.guard.edits
        if structures is None or limits is None:
            whole, none = np.ones(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)
            return {"active_share": whole, "active_work": whole, "edits": none}
        return {"active_share": structures.units.share, "active_work": structures.work, "edits": limits.done.copy()}

    @property
    def mean_activity(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean active share and mean active work (N,) over each episode's decisions so far."""
        share, work = self._activity / np.maximum(self.decisions, 1)
        return share, work

    def _diagnosed(self, reading: Reading) -> dict[str, np.ndarray]:
        with np.errstate(all="ignore"):
            values = {signal.name: signal.compute(reading, self.steering.memory) for signal in self._diagnostics}
        return {one.name: np.clip(values[one.name], one.low, one.high) for one in self._diagnostics}

    def _reading(self, measured: Measured | None, val_loss: np.ndarray) -> Reading:
        """A reading that knows the scenario's deadline, where there is one; module runs bring their own."""
        reading = self.populations.reading(measured, val_loss)
        if self.scenario.deadline is not None:
            reading.deadline = reading.total_steps * (1 + self.scenario.deadline)
        return reading

    def _moves(self, actions: np.ndarray, kinds: Mapping[str, Kind] | None) -> np.ndarray:
        wanted = (self.num_envs, len(self._kinds if kinds is None else kinds))
        try:
            actions = np.asarray(actions, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise MismatchError(f"actions are {actions!r}; they must be numbers of shape {wanted}") from error
        if actions.shape != wanted:
            raise MismatchError(f"actions have the shape {actions.shape}; it must be {wanted}, (runs, levers)")
        return actions - 1 if kinds is None and self.scenario.action == "multi-discrete" else actions

    def _outcome(
        self, reading: Reading, health: Health, move: Move, before: np.ndarray, finished: np.ndarray
    ) -> Outcome:
        assert reading.measured is not None
        with np.errstate(invalid="ignore", over="ignore"):
            spike = SIGNALS["spike"].compute(reading, self.steering.memory) > SPIKE
        spike |= (health.rollback & ~health.resumed) | ~np.isfinite(reading.measured.losses).all(0)
        return Outcome(
            limits=self._limits,
            before=before,
            after=self.log_val_loss,
            spike=spike.astype(np.float64),
            oscillation=self._reversed(move),
            rollback=(health.rollback & ~health.resumed) / max(self.scenario.guard.rollback_budget, 1),
            active=self._structure()["active_work"],
            finished=finished,
            lost=health.lost,
        )

    def _reversed(self, move: Move) -> np.ndarray:
        """(N,) in [0, 1]: the smaller of two successive opposite moves of the learning rate, in units of its rate."""
        for column, lever in enumerate(self.steering.levers):
            if lever.hyperparameter == "lr":
                change = np.log(np.maximum(move.after[:, column], 1e-30) / np.maximum(move.before[:, column], 1e-30))
                now = np.clip(change / (lever.rate * self.scenario.guard.rate_scale), -1, 1)
                last, self._last_move = self._last_move, now
                return np.where(now * last < 0, np.minimum(np.abs(now), np.abs(last)), 0.0)
        return np.zeros(self.num_envs)

    def _reward(self, outcome: Outcome) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rewards, terms = score(self._weights, outcome, self.returns)
        rewards = np.where(self.ended, 0.0, rewards)
        terms = {name: np.where(self.ended, 0.0, value) for name, value in terms.items()}
        self.returns += rewards
        for name, value in terms.items():
            self.term_sums[name] += value
        return rewards, terms

    def test_loss(self) -> np.ndarray:
        """Mean test loss (N,) of each run now; not finite for a diverged one (see ``Populations.bounded``)."""
        return self.populations.test_loss()
