"""One decision of N runs, in the order that is the same everywhere: judge, observe, decide, limit, move the levers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from trimtab.inner_training.edits import EDITS, EditConfig, UnitCounts, check_targets
from trimtab.inner_training.energy import StepEnergy
from trimtab.inner_training.events import FIRES_FROM
from trimtab.inner_training.guard import Guard, GuardConfig, Health, Reason
from trimtab.inner_training.levers import Lever
from trimtab.inner_training.reading import Memory, Reading
from trimtab.inner_training.signals import Signal, observe

Kind = Literal["moves", "targets", "events"]


@dataclass(frozen=True)
class Move:
    """What one decision did; arrays are (N, L) in the order of the steering's levers.

    Attributes:
        proposed: the policy's action (moves or targets), 0 for levers that the policy does not govern.
        before, after: multipliers.
        reasons: ``Reason`` codes, 0 where the proposal was applied as it was.
        fired: by event, the runs (N,) bool in which it happens now.
        refused: (N,) ``Reason`` codes of events that were asked for and do not happen.
        asked: by structural lever, the policy's action (N,).
        edits: by structural lever, the share (N,) of units to edit now (see ``EditLimits.permit``).
        edit_reasons: by structural lever, (N,) ``Reason`` codes.
    """

    proposed: np.ndarray
    before: np.ndarray
    after: np.ndarray
    reasons: np.ndarray
    fired: Mapping[str, np.ndarray] = field(default_factory=dict)
    refused: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    asked: Mapping[str, np.ndarray] = field(default_factory=dict)
    edits: Mapping[str, np.ndarray] = field(default_factory=dict)
    edit_reasons: Mapping[str, np.ndarray] = field(default_factory=dict)


class Steering:
    """Signals, guard and lever positions of N runs: the shared half of every environment and every controller.

    Use at each decision: ``assess`` the reading, act on its ``Health`` (snapshot, restore), ``observe``, ask the
    policy, ``decide``, then write ``hyperparameters`` to the runs.

    Attributes:
        multipliers: (N, L) float64, 1 is null.
        available: (N, L) bool.
        energy: what measures the energy of steps, if anything does; see ``step_energy``.
        ranges: lowest and highest value (S,) of each signal that the policy met in training; None where it has none.
    """

    def __init__(
        self,
        levers: Sequence[Lever],
        signals: Sequence[Signal],
        guard: GuardConfig,
        num_runs: int,
        edits: EditConfig | None = None,
    ) -> None:
        self.levers, self.signals, self.num_runs = tuple(levers), tuple(signals), num_runs
        self.guard = Guard(guard, self.levers, num_runs, edits)
        self.memory = Memory(num_runs)
        self.multipliers = np.ones((num_runs, len(self.levers)))
        self.available = np.ones((num_runs, len(self.levers)), dtype=bool)
        self._moves = np.zeros((num_runs, len(self.levers)))
        self._grad_average = np.full(num_runs, np.nan)
        self.energy: StepEnergy | None = None
        self.ranges: tuple[np.ndarray, np.ndarray] | None = None
        self._seen: np.ndarray | None = None
        self._units: UnitCounts | None = None

    def reset(self, mask: np.ndarray, base: Mapping[str, np.ndarray]) -> None:
        """Starts the runs in ``mask`` (bool, (N,)) afresh; ``base`` holds each hyperparameter's base, (N,)."""
        self.guard.reset(mask)
        self.memory.reset(mask)
        self.multipliers[mask] = 1.0
        self._moves[mask] = 0.0
        self._grad_average[mask] = np.nan
        for column, lever in enumerate(self.levers):
            self.available[mask, column] = lever.available(base[lever.hyperparameter])[mask]

    def assess(self, reading: Reading, active: np.ndarray | None = None) -> Health:
        """Begins a decision: the guard judges the reading, which learns the state of levers and guard.

        With ``active`` (bool, (N,)) the decision is of those runs only, as where some start while others are under
        way: what is remembered of the others stays as it is.
        """
        self.memory.begin(active)
        health = self.guard.inspect(reading)
        reading.rolled_back = health.rollback
        # What was measured on the parameters that have just been given up says nothing about the restored ones.
        reading.val_loss = np.where(health.rollback, np.nan, reading.val_loss)
        norms = reading.sampled("grad_norm")
        # The scale that the gradient clip is relative to; rolled-back intervals do not count.
        self._grad_average = self.memory.ema("grad_average", norms if norms.ndim == 1 else norms.mean(0), 0.9)
        if self.energy is not None:
            steps = 0 if reading.measured is None else self.num_runs * len(reading.measured.losses)
            reading.energy = np.full(self.num_runs, self.energy.per_step(steps))
        reading.caution = self._caution()
        reading.rollbacks_left = self.guard.rollbacks_left
        if self.guard.edits is not None:
            reading.edits_left, reading.edit_rest = self.guard.edits.left, self.guard.edits.resting
        for column, lever in enumerate(self.levers):
            reading.multipliers = {**reading.multipliers, lever.name: self.multipliers[:, column].copy()}
            reading.moves = {**reading.moves, lever.name: self._moves[:, column].copy()}
            reading.available = {**reading.available, lever.name: self.available[:, column].copy()}
        return health

    def observe(self, reading: Reading) -> np.ndarray:
        """(N, S) float32 observation in [-1, 1], one column per signal."""
        self._units = reading.units
        self._seen = observe(self.signals, reading, self.memory)
        return self._seen

    def decide(self, actions: np.ndarray, kinds: Mapping[str, Kind]) -> Move:
        """Moves the levers that a policy governs.

        Args:
            actions: (N, len(kinds)) in the order of ``kinds``.
            kinds: lever name to ``"moves"`` or ``"targets"``, or event to ``"events"``; levers not named stay where
                they are. What is to be done to the structure is in ``Move.edits``, for the caller to do.
        """
        before = self.multipliers.copy()
        proposed, targets = np.zeros_like(before), np.zeros(len(self.levers), dtype=bool)
        governed, asked = np.zeros(before.shape, dtype=bool), np.zeros(before.shape, dtype=bool)
        names = [lever.name for lever in self.levers]
        listened = self._in_range()
        fired, refused = dict[str, np.ndarray](), np.zeros(self.num_runs, dtype=np.int64)
        for source, (name, kind) in enumerate(kinds.items()):
            if kind == "events":
                wanted = (actions[:, source] >= FIRES_FROM) & listened
                fired[name], reason = self.guard.permit_event(name, wanted)
                refused |= reason
                continue
            if name in EDITS:
                continue  # last, as an event may stand against them
            column = names.index(name)
            proposed[:, column] = actions[:, source]
            targets[column], governed[:, column], asked[:, column] = kind == "targets", listened, True
        after, reasons = self.guard.permit(proposed, targets, before, self.available, governed)
        reasons |= np.where(listened, 0, Reason.OUT_OF_RANGE)[:, None]
        for column, lever in enumerate(self.levers):
            if lever.hyperparameter == "lr":
                over = after[:, column] * self.guard.caution > self.guard.ceiling
                reasons[:, column] |= np.where(over & governed[:, column], Reason.ENVELOPE, 0)
        silent = asked & (~listened[:, None] | ~np.isfinite(proposed))
        after, returning = self.guard.fall_back(silent, asked & ~silent, after, self.available)
        self._move_to(after)
        edits, why = self._edits(actions, kinds, listened)
        asked_edits = {name: actions[:, source] for source, name in enumerate(kinds) if name in EDITS}
        return Move(proposed, before, after.copy(), reasons | returning, fired, refused, asked_edits, edits, why)

    def _edits(
        self, actions: np.ndarray, kinds: Mapping[str, Kind], listened: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Shares and reasons (N,) by structural lever; the first that edits a run makes the others rest."""
        shares, reasons = dict[str, np.ndarray](), dict[str, np.ndarray]()
        for source, (name, kind) in enumerate(kinds.items()):
            if name not in EDITS:
                continue
            check_targets("a policy", name, kind)
            heard = np.where(listened, actions[:, source], np.nan)
            shares[name], reason = self.guard.permit_edit(name, heard, kind == "targets", self._units)
            reasons[name] = np.where(listened, reason, Reason.OUT_OF_RANGE)
        return shares, reasons

    def legal(self, names: Sequence[str]) -> np.ndarray:
        """Which whole moves down, none at all, and up are legal, by what was observed last.

        Args:
            names: of levers and events, in the order of the result.

        Returns:
            (N, len(names), 3) bool. To hold is always legal, to move a lever where it is available, to edit the structure where the
            guard permits it now. Events are always legal: the guard says when they come.
        """
        found = np.ones((self.num_runs, len(names), 3), dtype=bool)
        columns = {lever.name: column for column, lever in enumerate(self.levers)}
        for place, name in enumerate(names):
            if name in EDITS:
                found[:, place, ::2] = self.guard.legal_edits(name, self._units)
            elif name in columns:
                found[:, place, ::2] = self.available[:, columns[name], None]
        return found

    def _move_to(self, after: np.ndarray) -> None:
        before, self.multipliers = self.multipliers, after
        self._moves = np.log(np.maximum(after, 1e-30)) - np.log(np.maximum(before, 1e-30))

    def _in_range(self) -> np.ndarray:
        """(N,) bool: the last observation is one that the policy may have met in training (see ``ranges``)."""
        margin, share = self.guard.config.range_margin, self.guard.config.range_share
        if self.ranges is None or margin is None or self._seen is None:
            return np.ones(self.num_runs, dtype=bool)
        low, high = self.ranges
        beyond = (self._seen < low - margin) | (self._seen > high + margin)
        inside: np.ndarray = beyond.mean(1) < share
        return inside

    def hold(self, reason: Reason = Reason.NONE) -> Move:
        """The identity decision: every lever stays where it is, and nobody was asked; see ``abstain``."""
        self._moves = np.zeros_like(self._moves)
        still = self.multipliers.copy()
        codes = np.full(still.shape, int(reason), dtype=np.int64)
        return Move(proposed=np.zeros_like(still), before=still, after=still, reasons=codes)

    def abstain(self, reason: Reason) -> Move:
        """A decision without an answer of the policy: levers hold, or return towards null where that goes on for too
        long (``GuardConfig.abstentions``)."""
        before, everything = self.multipliers.copy(), np.ones(self.multipliers.shape, dtype=bool)
        after, returning = self.guard.fall_back(everything, ~everything, before, self.available)
        self._move_to(after)
        return Move(np.zeros_like(before), before, after.copy(), int(reason) | returning)

    @property
    def lr_multiplier(self) -> np.ndarray:
        """(N,) factor on the scheduled learning rate at every step: the lever's multiplier times the guard's caution,
        at most the guard's ceiling."""
        return np.minimum(self._lr_position() * self.guard.caution, self.guard.ceiling)

    def _lr_position(self) -> np.ndarray:
        for column, lever in enumerate(self.levers):
            if lever.hyperparameter == "lr":
                return self.multipliers[:, column]
        return np.ones(self.num_runs)

    def _caution(self) -> np.ndarray:
        """(N,) what the guard makes of the lever's multiplier: its caution, or less under its ceiling."""
        position = self._lr_position()
        over = position * self.guard.caution > self.guard.ceiling
        held: np.ndarray = np.divide(self.guard.ceiling, position, out=self.guard.caution.copy(), where=over)
        return held

    def hyperparameters(self, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Effective value (N,) of each governed hyperparameter but the learning rate (see ``lr_multiplier``).

        ``grad_clip`` comes out as an absolute norm, ``inf`` for off.
        """
        values: dict[str, np.ndarray] = {}
        for column, lever in enumerate(self.levers):
            if lever.hyperparameter == "lr":
                continue
            value = lever.value(base[lever.hyperparameter], self.multipliers[:, column])
            if lever.per_grad_norm:
                known = np.isfinite(value) & np.isfinite(self._grad_average)
                value = np.multiply(value, self._grad_average, out=np.full(value.shape, np.inf), where=known)
            values[lever.hyperparameter] = value
        return values

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state: positions, guard, memory."""
        return {**self.standing(), "memory": self.memory.state_dict()}

    def standing(self) -> dict[str, Any]:
        """The state but for the memory: what the levers in force follow from, of the same size at every decision."""
        return {
            "levers": [lever.name for lever in self.levers],
            "multipliers": self.multipliers.tolist(),
            "available": self.available.tolist(),
            "moves": self._moves.tolist(),
            "grad_average": self._grad_average.tolist(),
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        self.adopt(state)
        self.memory.load_state_dict(state["memory"])

    def adopt(self, state: Mapping[str, Any]) -> None:
        """Restores what ``standing`` gave."""
        self.multipliers = self.guard.within(np.asarray(state["multipliers"], dtype=np.float64))
        self.available = np.asarray(state["available"], dtype=bool)
        self._moves = np.asarray(state["moves"], dtype=np.float64)
        self._grad_average = np.asarray(state["grad_average"], dtype=np.float64)
        self.guard.load_state_dict(state["guard"])
