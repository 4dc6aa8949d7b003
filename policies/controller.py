"""The controller: signals, policy, guard and levers around a live training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.inner_training.attached import ATTACHED
from trimtab.inner_training.measurements import needs_of
from trimtab.inner_training.module_parts import check_deadline
from trimtab.inner_training.signals import Signal, resolve_signals
from trimtab.inner_training.steering import Move
from trimtab.policies import attachment, audit_header, optimizers, remarks, resuming
from trimtab.policies.attachment import Attachment
from trimtab.policies.audit import Audit
from trimtab.policies.deciding import Decider, Outcome, Parts, named
from trimtab.policies.listening import Listener
from trimtab.policies.ranks import Ranks
from trimtab.policies.together import RanksDecider
from trimtab.policies.trail import Decision, Trail

PATIENCE = 20  # calls without an optimizer step, at least, after which their losses are looked at


class Controller:
    """Steers one live run; made by ``attach``, which says what the arguments are.

    >>> from trimtab.policies.attach import attach
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> controller = attach(optimizer, policy="cosine", total_steps=100)
    >>> for _ in range(50):
    ...     optimizer.zero_grad()
    ...     loss = (weight**2).sum()
    ...     loss.backward()
    ...     optimizer.step()
    ...     decision = controller.step(loss)
    >>> round(decision.applied["lr"], 6), optimizer.param_groups[0]["lr"]
    (0.5, 0.1)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Attachment, ranks: Ranks | None = None) -> None:
        self._optimizer, self._settings, self._policy = optimizer, settings, settings.policy
        self._moved = attachment.moved_by(settings.policy)
        signals = resolve_signals(self._policy.signals)
        self._steering = attachment.steering_of(settings, signals, optimizer)
        self._decided_at, self._detached, self._enabled = 0, False, True
        self._switch_file = attachment.switch_file()
        self._patience = max(PATIENCE, 2 * settings.decide_every)
        self._window = attachment.measuring_window(signals, settings.decide_every)
        self._listener = Listener(self._policy)
        self._snapshots = attachment.snapshots_of(settings, optimizer)
        self._audit: Audit | None = None
        header = audit_header.header(optimizer, settings)
        self._run = optimizers.hooked(optimizer, self._window, self._before_first_step)
        try:  # from here on there is something to take back
            if settings.audit is not None:
                self._audit = Audit(settings.audit, header)
            self._trail = Trail(signals, self._audit, settings.mode)
            self._set_up(signals, ranks)
        except BaseException:
            self.withdraw()
            raise

    def _set_up(self, signals: Sequence[Signal], ranks: Ranks | None) -> None:
        settings, optimizer, run, steering = self._settings, self._optimizer, self._run, self._steering
        run.measure(needs_of(signals), settings.model)
        self._listener.say = run.hooks.say
        for what, said in remarks.remarks(settings, signals, optimizer).items():
            run.hooks.say(what, said)
        steering.reset(np.ones(1, dtype=bool), run.base(steering.levers))
        steering.available[0] = [run.available(lever) for lever in steering.levers]
        parts = Parts(settings=settings, steering=steering, run=run, snapshots=self._snapshots, listener=self._listener)
        self._decider = Decider(parts, optimizer) if ranks is None else RanksDecider(parts, optimizer, ranks)
        self._between = Decision(False, self.multipliers, "between decisions", False)
        ATTACHED.add(optimizer)

    def _before_first_step(self) -> None:
        if self._run.steps == 0 and (said := remarks.under_way(self._optimizer, self._settings.total_steps)):
            self._run.hooks.say("under way", said)
        if self._snapshots is not None and self._snapshots.empty:
            self._snapshots.take(self._run.steps)

    # --- what users call ----------------------------------------------------------------------------------------

    def step(self, loss: Tensor | float, val_loss: Tensor | float | None = None) -> Decision:
        """Notes the loss of the step just taken and, at the end of an interval, decides.

        Call it once after each ``optimizer.step()``; after ``scheduler.step()`` too, so that it sees the rate of the
        step to come. Between decisions nothing synchronises with the device. Trouble inside never reaches the
        training loop: it is logged, and the levers hold.

        Args:
            loss: training loss of the step's batch, before the step; a tensor on any device, or a number.
            val_loss: validation loss, whenever one was measured.

        Raises:
            UserError: a loss is neither a number nor a tensor, and none that is has been noted yet; later that is said
                once, and the interval counts as unmeasured.
        """
        if self._detached:
            return self._between
        if val_loss is not None:
            known = self._run.losses.readable("val_loss", val_loss)
            self._decider.val_loss = self._decider.val_loss if known is None else known
        if not self._run.record(loss):
            return self._between if len(self._run.losses.idle) < self._patience else self._idle()
        if self._run.steps - self._decided_at < self._settings.decide_every:
            return self._between
        return self._decide(measure=self._run.position >= self._window)

    def _idle(self) -> Decision:
        """Many calls without an optimizer step: a gradient scaler skips every step of a run whose weights are not finite."""
        if not self._decider.stalled():
            return self._between
        self._run.hooks.say("stalled", f"{self._patience} calls of controller.step came without an optimizer step, and no "
                            "loss among them was finite: the run counts as diverged, as it does whenever that happens "
                            "again")  # fmt: skip
        self._run.give_up()
        return self._decide(measure=True)

    @property
    def steps(self) -> int:
        """Optimizer steps done; those that a gradient scaler skipped are none."""
        return self._run.steps

    @property
    def lost(self) -> bool:
        """The run is not finite, and no rollback is left (or allowed): the controller stands back for good."""
        return bool(self._steering.guard.lost[0])

    @property
    def told(self) -> bool:
        """Whether the loss of a step has been noted yet."""
        return self._run.losses.step > 0

    @property
    def multipliers(self) -> dict[str, float]:
        """Multiplier in force for each lever from the next step on, the guard's caution included; 1 is null."""
        if self._settings.mode == "advise" or self._detached or self._run.released:
            return dict.fromkeys(self._moved, 1.0)
        now = named(self._moved, self._steering.multipliers[0])
        rate = float(self._steering.lr_multiplier[0])
        return {**now, "lr": rate} if "lr" in now or rate != 1 else now

    @property
    def enabled(self) -> bool:
        """False after ``switch_off``, while the environment variable ``TRIMTAB_OFF`` is set (to anything but 0), and while
        there is a file of the path that ``TRIMTAB_OFF_FILE`` held when the controller was attached.

        Variable and file take effect at the next decision; ``multipliers`` are those really in force. With several processes: whether it was on in all of them at the last decision.
        """
        return self._decider.enabled(self._wanted)

    @property
    def _wanted(self) -> bool:
        return self._enabled and not attachment.switched_off(self._switch_file)

    def switch_off(self) -> None:
        """From the next step on the run goes on by its own settings, as without a controller; nothing is forgotten.

        With several processes: from the next decision on, in all of them.
        """
        self._enabled = False
        if not self.enabled:
            self._run.release()

    def switch_on(self) -> None:
        """Takes the levers up again where they were, from the next step on; with several processes, the next decision."""
        self._enabled = True
        if self.enabled and self._settings.mode == "act":
            self._run.apply(self._steering)

    @property
    def time_limit(self) -> float | None:
        """Seconds that the policy may take for a decision; None for no limit. A later answer is not used, and after three
        of them the policy is not asked any more. It may be set at any time, and is not saved."""
        return self._listener.time_limit

    @time_limit.setter
    def time_limit(self, seconds: float | None) -> None:
        self._listener.time_limit = check_deadline("time_limit", seconds)

    @property
    def deadline(self) -> float | None:
        """Seconds that the run may take from the first step of this process on, for policies that read
        ``deadline_left``; None for no limit. It may be set at any time, and is not saved: a resumed run has its own."""
        return self._run.deadline

    @deadline.setter
    def deadline(self, seconds: float | None) -> None:
        self._run.deadline = check_deadline("deadline", seconds)

    def summary(self) -> str:
        """What changed, why, and what the loss did afterwards; several lines."""
        now = {**self.multipliers, **self._decider.units.shares}
        return self._trail.journal.text(self._policy.name, self._run.steps, self._settings.mode, now)

    def detach(self) -> None:
        """Leaves the optimizer as it was; the controller then does nothing any more, and can be detached again.

        ``step`` may still be called, and only says "detached"; ``summary`` and ``state_dict`` tell how it ended;
        ``load_state_dict`` is refused.
        """
        if self._detached:
            return
        self._decider.settle()
        self._run.detach()
        self._detached = True
        self._between = Decision(False, self.multipliers, "detached", False)
        ATTACHED.discard(self._optimizer)
        self._run.hooks.safely("the audit", lambda: self._trail.write("detached", step=self._run.steps))

    def withdraw(self) -> None:
        """Leaves everything as if it had never been attached: also an audit that was newly made is removed again."""
        self._detached = True
        ATTACHED.discard(self._optimizer)
        self._run.detach()
        if (decider := getattr(self, "_decider", None)) is not None:
            decider.units.take_back()
        if self._audit is not None:
            self._audit.withdraw()

    def not_resumed(self, done: int | None) -> None:
        """Says that a host has restored a checkpoint of so many steps (None: unknown) which holds no controller's state."""
        self._run.hooks.say("under way", remarks.not_resumed(done, self._settings))

    # --- deciding -----------------------------------------------------------------------------------------------

    def common(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return self._settings.common(self._optimizer)

    def begin(self) -> None:
        """Takes the first decision; ``attach`` calls it, and withdraws the controller where that is interrupted."""
        self._decide(measure=False)

    def _decide(self, *, measure: bool) -> Decision:
        """Takes a decision, all of it: Ctrl-C comes afterwards, or breaks the policy off and every lever holds."""
        decider = self._decider
        with decider.interrupts.held():
            decision = self._conclude(measure)
            broken, decider.interruption = decider.interruption, None
        if broken is not None:
            raise broken
        return decision

    def _conclude(self, measure: bool) -> Decision:
        before, step = self.multipliers, self._run.steps
        self._decided_at = step
        outcome = self._decider.decide(measure=measure, wanted=self._wanted)
        after = self._take_effect(outcome.move)
        decision = self._note(step, outcome, before, after)
        if said := remarks.no_validation(self._policy.name, self._steering.signals, self._trail.journal):
            self._run.hooks.say("no validation", said)
        if self._decider.left:
            self.detach()
        return decision

    def _take_effect(self, move: Move) -> dict[str, float]:
        """Applies a move, or takes it back where it is only advice; gives the multipliers that it decided on."""
        if not self.enabled:
            return self.multipliers
        if self._settings.mode == "act":
            self._decider.safely("applying multipliers", lambda: self._run.apply(self._steering))
            return self.multipliers
        advised = named(self._moved, move.after[0])
        self._steering.multipliers[:] = 1.0
        self._steering.hold()
        return advised

    def _note(self, step: int, outcome: Outcome, before: Mapping[str, float], after: Mapping[str, float]) -> Decision:
        applied = self.multipliers
        event = outcome.event(
            step=step, levers=self._moved, before=before, after=after, applied=applied, why=self._listener.why
        )
        self._between = Decision(False, applied, "between decisions", False)
        self._decider.safely("the audit", lambda: self._trail.note(event))
        reason = event.reason(self._settings.mode)
        acted = applied != before or event.rolled_back or outcome.units.done
        return Decision(acted, applied, reason, event.rolled_back)

    # --- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state (NaN included, as Python's ``json`` writes it). Snapshots are not part of it.

        Save it between steps, together with model, optimizer and scheduler. Saved between the two sampled steps of
        an interval, that interval's inner product of gradients is unknown after loading.
        """
        return resuming.state_of(self._decider, self._trail.journal, self._decided_at)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave; model, optimizer and scheduler must have been restored before.

        A run that was only advised may go on as one that is steered, and the other way round: from null multipliers.

        Raises:
            UserError: the controller was detached.
            MismatchError: the state is of another policy or setting, or damaged, or the scheduled learning rate is not
                the one that it was saved with; nothing has been changed then.
        """
        if self._detached:
            raise UserError("this controller was detached; call trimtab.attach again, and load the state there")
        with self._decider.interrupts.held():
            self._decided_at = resuming.take_over(state, self._decider, self._trail.journal)
            if self._settings.mode == "act" and self.enabled:
                self._run.apply(self._steering)
            if self._snapshots is not None:
                self._snapshots.clear()
                self._run.before_first(self._before_first_step)
            self._between = Decision(False, self.multipliers, "between decisions", False)
            self._run.hooks.safely("the audit", lambda: self._trail.write("resumed", step=self._run.steps))
