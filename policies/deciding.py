"""One decision of a live run, up to its effect on the levers: judge, go back where the guard says so, ask the policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.inner_training.guard import Health, Reason, in_words
from trimtab.inner_training.live_events import LiveEvents
from trimtab.inner_training.live_losses import check_readable
from trimtab.inner_training.live_run import LiveRun
from trimtab.inner_training.live_snapshot import LiveSnapshots
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.steering import Move, Steering
from trimtab.policies.attachment import Attachment
from trimtab.policies.interrupts import Interrupts
from trimtab.policies.listening import Listener, PolicyFault
from trimtab.policies.live_units import FAILED, LiveUnits, Units
from trimtab.policies.outcomes import Losses, ln_losses
from trimtab.policies.ranks import initialized
from trimtab.policies.trail import Event

HELD = (
    Reason.FAULT
    | Reason.UNREAD
    | Reason.BROKEN_OFF
    | Reason.LOST
    | Reason.LATE
    | Reason.SWITCHED_OFF
    | Reason.ABSTAINED
    | Reason.APART
    | Reason.PARTED
)  # reasons for which the policy's answer, if there is one, is not used


def named(levers: Sequence[str], row: np.ndarray) -> dict[str, Any]:
    """Values by lever; levers that the policy only looks at come last in a row, and are left out."""
    return dict(zip(levers, row.tolist(), strict=False))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What takes part in the decisions of one live run."""

    settings: Attachment
    steering: Steering
    run: LiveRun
    snapshots: LiveSnapshots | None
    listener: Listener


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was decided.

    Attributes:
        observation: (1, S) what the policy saw; None when it was not asked.
        move: of the levers.
        losses: those of the interval that has ended; None when none has, or they are not known.
        rolled_back: the guard had the run put back.
        befell: ``Reason`` codes of that.
        fired: events that have happened.
        units: what was done to units.
    """

    observation: np.ndarray | None
    move: Move
    losses: Losses | None
    rolled_back: bool
    befell: int = 0
    fired: tuple[str, ...] = ()
    units: Units = field(default_factory=Units)

    def event(
        self,
        *,
        step: int,
        levers: Sequence[str],
        before: Mapping[str, float],
        after: Mapping[str, float],
        applied: Mapping[str, float],
        why: Callable[[], str],
    ) -> Event:
        """It as the audit tells it.

        Args:
            step: optimizer steps done.
            levers: those that the policy moves, which are the first of the move's.
            before, after, applied: as in ``Event``.
            why: what the policy says of its last decision.
        """
        move, units = self.move, self.units
        codes = int(np.bitwise_or.reduce(move.reasons[0])) | int(move.refused[0])
        for reasons in move.edit_reasons.values():
            codes |= int(reasons[0])
        codes |= self.befell if self.rolled_back else 0
        answered = not codes & HELD
        undone = named(levers, (move.reasons[0] & Reason.UNDONE) > 0)
        return Event(
            step=step,
            observation=None if self.observation is None else self.observation[0],
            proposed=named(levers, move.proposed[0]) | {name: float(asked[0]) for name, asked in move.asked.items()}
            if answered
            else {},
            before={**before, **units.before},
            after={**after, **units.after},
            applied=applied,
            moved=bool(((move.after != move.before) & ((move.reasons & Reason.RETURNING) == 0)).any()),
            guarded="; ".join(filter(None, (in_words(codes), FAILED if units.failed else ""))),
            rolled_back=(self.rolled_back and not self.befell & Reason.RESUMED) or "rollback" in self.fired,
            losses=self.losses,
            why=why() if answered and self.observation is not None else "",
            fired=(*self.fired, *(name for name in units.edited if units.done and name not in units.after)),
            units=units,
            undone=tuple(name for name, taken_back in undone.items() if taken_back),
        )


class Decider:
    """Decides for a run of one process.

    Attributes:
        val_loss: the validation loss that came since the last decision; NaN for none.
        left: decisions are over.
        anchored: an anchor was dropped.
        units: of the model.
        interrupts: Ctrl-C waits while they hold it: let through while the run is read and the policy is asked.
        interruption: what broke off a decision, in which every lever held then; raised when that is done with.
    """

    def __init__(self, parts: Parts, optimizer: torch.optim.Optimizer) -> None:
        self.settings, self.steering, self.run = parts.settings, parts.steering, parts.run
        self.snapshots, self.listener = parts.snapshots, parts.listener
        self.events = LiveEvents(optimizer, parts.snapshots, parts.settings.mode == "act", self.safely)
        self.units = LiveUnits(parts.settings, parts.steering, parts.steering.signals, self.safely)
        self.events.anchor.spared = None if self.units.edits is None else self.units.edits.spared
        self.val_loss: Tensor | float = math.nan
        self.left = self.anchored = False
        self.interrupts = Interrupts()
        self.interruption: BaseException | None = None
        self._by_choice = initialized()  # alone, although there are other processes

    def safely(self, what: str, act: Callable[[], None]) -> None:
        """Does something that the training goes on without (see ``StepHooks.safely``), and the decision without it too."""

        def all_of_it() -> None:
            try:
                act()
            except Exception:
                raise
            except BaseException as error:  # noqa: BLE001 - raised when the decision is done with
                self.failed(error)

        self.run.hooks.safely(what, all_of_it)

    def enabled(self, wanted: bool) -> bool:
        """Whether the controller is switched on; ``wanted`` is what this process was told."""
        return wanted

    def stalled(self) -> bool:
        """Whether all the losses that came without an optimizer step were not finite."""
        return self.run.losses.stalled()

    def decide(self, *, measure: bool, wanted: bool) -> Outcome:
        """Takes a decision.

        Args:
            measure: an interval has ended.
            wanted: the controller is not switched off.
        """
        observation, losses, rolled_back = None, None, False
        if initialized() and not self._by_choice:
            self.run.hooks.say("late ranks", "torch.distributed was initialised after trimtab.attach, so every process "
                               "decides alone, and their weights will differ; attach after init_process_group")  # fmt: skip
        try:
            if self.enabled(wanted):
                reading = self.reading(measure)
                rolled_back = self._follow(self.steering.assess(reading), reading)
                losses = ln_losses(reading) if measure else None
                observation, move = self.answer(reading)
            else:
                self.run.release()
                self.settle()
                move = self.steering.hold(Reason.SWITCHED_OFF)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the training must not stop for it
            move = self.steering.abstain(self.failed(error))
        self.pass_on(measure)
        fired = self.happen(event for event, runs in move.fired.items() if runs[0])
        units = self.units.carry_out(move)
        return Outcome(
            observation=observation,
            move=move,
            losses=losses,
            rolled_back=rolled_back,
            befell=int(self.steering.guard.befell[0]),
            fired=fired,
            units=units,
        )

    def reading(self, measure: bool) -> Reading:
        """Reads the run, with what the interval that has ended measured."""
        budget = self.settings.total_steps
        with self.interrupts.let_through():
            val_loss = float(self.val_loss) if measure else math.nan
            found = self.run.reading(self.steering.levers, budget, val_loss, measure=measure)
        if measure:
            self.val_loss = math.nan
        self.units.describe(found, measure)
        return found

    def goes_back(self, health: Health) -> bool:
        """Whether the run is to be put back now: also when it is lost, one last time."""
        if self.snapshots is None:
            return False
        return bool(health.rollback[0] or (health.lost[0] and not self.snapshots.empty))

    def _follow(self, health: Health, reading: Reading) -> bool:
        """Does what the guard concluded, and says whether the run was put back."""
        snapshots, goes_back = self.snapshots, self.goes_back(health)
        if snapshots is not None:
            what, measured = "going back" if goes_back else "taking a snapshot", reading.measured is not None
            self.safely(what, lambda: follow(snapshots, health, self.run.steps, measured))
        if goes_back:
            self.units.count(reading)
        return goes_back

    def answer(self, reading: Reading) -> tuple[np.ndarray | None, Move]:
        """What the policy saw and did; nothing, where it is not asked."""
        if self.steering.guard.lost[0]:
            return None, self._stand_back()
        check_readable(reading, self.steering.signals)
        observation = self.steering.observe(reading)
        with self.interrupts.let_through():
            actions = self.listener.ask(observation)
        if actions is None:
            return observation, self.steering.abstain(Reason.LATE)
        return observation, self.steering.decide(actions, self.settings.policy.levers)

    def _stand_back(self) -> Move:
        """A lost run is given back its base schedule."""
        self.steering.multipliers[:] = 1.0
        self.steering.guard.divergence.caution[:] = 1.0
        back = "its last stable weights are put back, and " if self.snapshots is not None else ""
        self.run.hooks.say("lost", f"the run has diverged at step {self.run.steps} with no rollback left: {back}the controller leaves it "
                           "to its own settings; stop it (controller.lost tells), and start again at a lower learning rate")  # fmt: skip
        return self.steering.hold(Reason.LOST)

    def happen(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """Lets events happen; gives those that could."""
        fired = self.events.happen(wanted)
        self.anchored |= "anchor" in fired
        return fired

    def settle(self) -> None:
        """Takes up again what was given up for a moment that is being tried, as nobody will judge that any more."""
        if self.snapshots is not None:
            self.safely("going on from where the run was", self.snapshots.resume)
        self.steering.guard.settle()

    def resume(self) -> None:
        """Another run is taken over: what was dropped in this one is taken away."""
        self.events.anchor.weigh()
        self.anchored = False
        self.steering.guard.settle()  # what it gave up is not in its state

    def failed(self, error: BaseException) -> Reason:
        """Says what went wrong in a decision, and whose fault it is; keeps what broke it off."""
        if not isinstance(error, Exception):
            self.interruption = self.interruption or error
            return Reason.BROKEN_OFF
        name = self.settings.policy.name
        if isinstance(error, PolicyFault):
            self.run.hooks.say("policy", f"policy {name!r} failed to answer, so every lever holds: {error}")
            return Reason.FAULT
        self.run.hooks.say("unread", "the run could not be measured or judged, which is no fault of policy "
                           f"{name!r}, so every lever holds: {error!r}")  # fmt: skip
        return Reason.UNREAD

    def pass_on(self, measure: bool) -> None:
        """An interval that has ended is done with."""
        if measure:
            self.run.next_interval()
            self.safely("pulling to the anchor", self.events.anchor.pull)


def follow(snapshots: LiveSnapshots, health: Health, step: int, measured: bool) -> None:
    """Does what the guard concluded; ``measured``, an interval has ended."""
    snapshots.follow(health, step, measured)
