"""The guard: what may be done, when, and how it is undone. Vectorised over runs; the same in environments and live runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.inner_training.abstentions import Abstentions
from trimtab.inner_training.divergence import Divergence, Health
from trimtab.inner_training.edit_limits import EditLimits
from trimtab.inner_training.edits import EditConfig, UnitCounts
from trimtab.inner_training.envelope import curvature_ceiling, decay_ceiling
from trimtab.inner_training.events import REST, check_event
from trimtab.inner_training.guard_config import REASON_WORDS, GuardConfig, Reason, in_words
from trimtab.inner_training.lever_bounds import bounded, check_bounds
from trimtab.inner_training.levers import Lever
from trimtab.inner_training.moderation import Moderation
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.setbacks import Setbacks, Usual
from trimtab.inner_training.trials import Trials

__all__ = ["REASON_WORDS", "Guard", "GuardConfig", "Health", "Reason", "in_words"]


class Guard:
    """Vectorised safety layer between a policy and the levers of N runs.

    Attributes:
        levers: within the bounds that are set.
        divergence: judges the runs; its ``caution`` (N,) is the factor on the learning rate that rollbacks leave behind.
        moderation: what becomes of proposed moves.
        trials: moves that may yet be taken back.
        abstentions: how long levers have had no answer.
        edits: when structure may be edited; None where it cannot be.
        trying: (N,) bool, runs in which a stable moment is being tried after a setback, or has just been given up again.
        befell: (N,) ``Reason`` codes of what befell the runs themselves at the last decision.
        ceiling: (N,) the envelope's limit on the factor by which the scheduled learning rate is multiplied; infinite
            without an envelope.
    """

    def __init__(
        self, config: GuardConfig, levers: Sequence[Lever], num_runs: int, edits: EditConfig | None = None
    ) -> None:
        self.config, self.levers = config, bounded(levers, check_bounds(config.bounds))
        self.divergence = Divergence(config, num_runs)
        self.moderation = Moderation(config, self.levers, num_runs)
        self.trials = Trials(config.trial, config.trial_rise, num_runs, len(self.levers))
        self.abstentions = Abstentions(config.abstentions, self.levers, num_runs)
        self.edits = None if edits is None else EditLimits(edits, num_runs)
        self.ceiling = np.full(num_runs, np.inf)
        self._curvature = np.full(num_runs, np.nan)
        self.trying, self.befell = np.zeros(num_runs, dtype=bool), np.zeros(num_runs, dtype=np.int64)
        self._since: dict[str, np.ndarray] = {}  # decisions that each event still rests

    def reset(self, mask: np.ndarray) -> None:
        """Starts the runs in ``mask`` (bool, (N,)) afresh."""
        for part in self._parts.values():
            part.reset(mask)
        self._curvature[mask], self.ceiling[mask] = np.nan, np.inf
        self.trying[mask], self.befell[mask] = False, 0
        for rest in self._since.values():
            rest[mask] = 0

    @property
    def caution(self) -> np.ndarray:
        """(N,) factor on the learning rate."""
        return self.divergence.caution

    @property
    def rollbacks(self) -> np.ndarray:
        """(N,) rollbacks done."""
        return self.divergence.rollbacks

    @property
    def lost(self) -> np.ndarray:
        """(N,) bool, runs that diverged for good."""
        return self.divergence.lost

    @property
    def rollbacks_left(self) -> np.ndarray:
        """(N,) share of the rollback budget left, in [0, 1]; 0 without rollback."""
        budget = self.config.rollback_budget
        if not self.config.rollback or budget == 0:
            return np.zeros(len(self.rollbacks))
        return 1 - self.divergence.spent / budget

    def inspect(self, reading: Reading) -> Health:
        """Judges the interval just finished (see ``Divergence.judge``); before the first one there is nothing to judge."""
        nothing = np.zeros(reading.num_runs, dtype=bool)
        if reading.measured is None:
            return Health(~self.lost, nothing, nothing, nothing, nothing, nothing, nothing, self.lost.copy())
        health = self.divergence.judge(reading, self._settling)
        self.trying, self.befell = health.trying, health.reasons
        self.moderation.pass_on(health.rollback & ~self.trying)
        for rest in self._since.values():
            np.maximum(rest - 1, 0, out=rest)
        if self.edits is not None:
            self.edits.pass_on(health.rollback)
        self.trials.note(self.divergence.mean, health.stable, health.rollback)
        self._hold(reading, health.stable)
        return health

    def settle(self) -> None:
        """No moment is being tried any more, because what was given up for it is taken up again, or is lost."""
        self.divergence.setbacks.reset(self.divergence.setbacks.kept.copy())
        self.trying[:] = False

    def _hold(self, reading: Reading, calm: np.ndarray) -> None:
        """Sets the ceiling for the steps until the next decision; curvature is held between its measurements."""
        ceiling = np.full(reading.num_runs, np.inf)
        if self.config.curvature_share is not None:
            newest = np.abs(reading.probed("curvature_max"))
            fresh = calm & np.isfinite(newest)
            self._curvature[fresh] = newest[fresh]
            allowed = curvature_ceiling(self._curvature, self.config.curvature_share)
            ceiling = np.where(reading.adaptive > 0, ceiling, allowed)
        if self.config.decay_power is not None:
            first = self.config.decay_factor * reading.initial_lr
            decayed = decay_ceiling(first, reading.step, self.config.decay_power, self.config.decay_after)
            ceiling = np.minimum(ceiling, decayed)
        scheduled = reading.base["lr"]
        self.ceiling = np.divide(ceiling, scheduled, out=np.full(reading.num_runs, np.inf), where=scheduled > 0)

    def permit(
        self,
        actions: np.ndarray,
        targets: np.ndarray,
        multipliers: np.ndarray,
        available: np.ndarray,
        governed: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Turns what a policy proposes into permitted multipliers.

        Args:
            actions: (N, L) moves in [-1, 1] in units of each lever's rate, or target multipliers.
            targets: (L,) bool, levers whose action is a target; targets are held to the absolute bounds only.
            multipliers: (N, L) now.
            available: (N, L) bool.
            governed: (N, L) bool, levers that the policy moves in runs that listen to it; the others stay.

        Returns:
            The new multipliers (N, L) and the reasons (N, L) as ``Reason`` codes. A move of 0 returns the current
            multiplier bit for bit.
        """
        moving = governed & ~targets
        asked = np.where(moving & ~self.trying[:, None], actions, 0.0)
        moves, reasons = self.moderation.moderate(asked, available & ~self.lost[:, None])
        reasons |= np.where(moving & (actions != 0) & self.trying[:, None], Reason.TRYING, 0)
        after, lost = multipliers.copy(), self.lost
        for column, lever in enumerate(self.levers):
            after[:, column], reason = _limited(
                lever,
                moves[:, column] * self.config.rate_scale,
                np.where(targets[column], actions[:, column], np.nan),
                multipliers[:, column],
                available[:, column],
            )
            proposed, held = actions[:, column], governed[:, column]
            reason |= np.where(np.isfinite(proposed), 0, Reason.NOT_FINITE)
            null = 1.0 if targets[column] else 0.0
            reason |= np.where(~available[:, column] & (proposed != null), Reason.UNAVAILABLE, 0)
            after[:, column] = np.where(held & ~lost, after[:, column], multipliers[:, column])
            reasons[:, column] = np.where(held, reasons[:, column] | reason | np.where(lost, Reason.LOST, 0), 0)
        failed = self.trials.verdict()
        after = np.where(failed[:, None], self.within(self.trials.kept), after)
        reasons |= np.where(failed[:, None] & (after != multipliers), Reason.UNDONE, 0)
        self.trials.begin(multipliers, (moving & (after != multipliers)).any(1) & ~failed & ~self._settling)
        return after, reasons

    def fall_back(
        self, silent: np.ndarray, answered: np.ndarray, multipliers: np.ndarray, available: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Leads levers back towards null that have had no answer for too long; the others stay.

        Args:
            silent, answered: (N, L) bool, levers without an answer that could be used at this decision, and with one.
            multipliers: (N, L) now.
            available: (N, L) bool.

        Returns:
            The new multipliers (N, L) and the reasons (N, L) as ``Reason`` codes.
        """
        free = available & ~(self.lost | self.trying)[:, None]
        returning = self.abstentions.note(silent, answered) & free & (multipliers != 1)
        if not returning.any():
            return multipliers, np.zeros(multipliers.shape, dtype=np.int64)
        scale = self.config.rate_scale
        moves, reasons = self.moderation.ease(np.where(returning, self.abstentions.way(multipliers, scale), 0.0))
        after = np.where(returning, self.abstentions.moved(multipliers, moves, scale), multipliers)
        self.trials.left[returning.any(1)] = 0  # what a trial would take back would lead away again
        return after, np.where(returning, reasons | Reason.RETURNING, 0)

    def within(self, multipliers: np.ndarray) -> np.ndarray:
        """Multipliers (N, L) held to the bounds of targets, as where they come from a run that had wider ones."""
        low = [min(lever.low, lever.target_low) for lever in self.levers]
        return np.clip(multipliers, low, [lever.high for lever in self.levers])

    def permit_event(self, name: str, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the runs ``wanted`` (bool, (N,)) an event happens in, and the reasons (N,) where it does not.

        An event rests for some decisions after it has happened. A rollback that a policy asks for counts as one of the
        guard's own.
        """
        check_event(name)
        rest = self._since.setdefault(name, np.zeros(len(wanted), dtype=np.int64))
        possible = np.ones(len(wanted), dtype=bool)
        if name == "rollback":
            possible &= self.config.rollback & (self.divergence.spent < self.config.rollback_budget)
        permitted = wanted & possible & ~self.lost & (rest == 0)
        rest[permitted] = REST
        if name == "rollback":
            self.divergence.ask(permitted)
            self.moderation.shaken[permitted] = self.config.aftermath
            self.trials.left[permitted] = 0
        reason = np.where(wanted & (rest > 0) & ~permitted, Reason.RESTING, 0)
        reason |= np.where(wanted & ~possible, Reason.SPENT, 0) | np.where(wanted & self.lost, Reason.LOST, 0)
        return permitted, reason

    def permit_edit(
        self, name: str, action: np.ndarray, aimed: bool, units: UnitCounts | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What of a structural edit may be done (see ``EditLimits.permit``); nothing where there is no structure."""
        if self.edits is None or units is None:
            asked = action != (1.0 if aimed else 0.0)
            return np.zeros(len(action)), np.where(asked, Reason.UNAVAILABLE, 0)
        share, reasons = self.edits.permit(name, action, aimed, units, self._edits_refused())
        self.trials.left[share != 0] = 0  # the loss will tell of the edit, not of the moves
        return share, reasons

    def legal_edits(self, name: str, units: UnitCounts | None) -> np.ndarray:
        """(N, 2) bool: whether a whole move down and a whole move up of a structural lever would edit a run now."""
        if self.edits is None or units is None:
            return np.zeros((len(self.lost), 2), dtype=bool)
        return self.edits.legal(name, units, self._edits_refused())

    def _edits_refused(self) -> np.ndarray:
        """(N,) ``Reason`` codes for which a run may not be edited at this decision; 0 for none."""
        refused = np.where(self.lost, Reason.LOST, 0) | np.where(self.trying, Reason.TRYING, 0)
        refused |= np.where(self.moderation.shaken > 0, Reason.EDIT_AFTERMATH, 0)
        return refused

    @property
    def _settling(self) -> np.ndarray:
        """(N,) bool, runs whose loss may rise because they were edited."""
        edits = self.edits
        return np.zeros(len(self.befell), dtype=bool) if edits is None else edits.settling > 0

    @property
    def _parts(self) -> dict[str, Divergence | Setbacks | Usual | Moderation | Trials | Abstentions | EditLimits]:
        setbacks = self.divergence.setbacks
        return {
            **({} if self.edits is None else {"edits": self.edits}),
            "divergence": self.divergence,
            "setbacks": setbacks,
            "train_loss": setbacks.train,
            "val_loss": setbacks.val,
            "moderation": self.moderation,
            "trials": self.trials,
            "abstentions": self.abstentions,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain lists."""
        held = {part: {name: getattr(one, name).tolist() for name in one.ARRAYS} for part, one in self._parts.items()}
        events = {name: rest.tolist() for name, rest in self._since.items()}
        return {**held, "events": events, "ceiling": self.ceiling.tolist(), "curvature": self._curvature.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        for name, part in self._parts.items():
            held = state.get(name, {})  # earlier versions had fewer
            for array in (one for one in part.ARRAYS if one in held):
                setattr(part, array, np.asarray(held[array], dtype=getattr(part, array).dtype))
        self._since = {name: np.asarray(rest, dtype=np.int64) for name, rest in state["events"].items()}
        self.ceiling = np.asarray(state["ceiling"], dtype=np.float64)
        self._curvature = np.asarray(state["curvature"], dtype=np.float64)


def _limited(
    lever: Lever, moves: np.ndarray, targets: np.ndarray, multiplier: np.ndarray, available: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A lever's multiplier (N,) inside its bounds after a move, or at a target where that is a number."""
    aimed = np.isfinite(targets)
    # What holds stays where it is, also where a target has led it lower than moves may go.
    low = np.where(aimed | (moves == 0), min(lever.target_low, lever.low), lever.low)
    wanted = np.where(aimed, targets, np.where(moves == 0, multiplier, multiplier * np.exp(moves * lever.rate)))
    permitted = np.clip(wanted, low, lever.high)
    reason = np.where(permitted != wanted, Reason.BOUND, 0)
    return np.where(available, permitted, 1.0), reason
