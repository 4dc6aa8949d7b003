"""One decision of a run on several ranks: the same on each of them, whatever happens on one.

Every decision is two exchanges: what each rank has measured, then what each rank has concluded, of which the first
rank's counts. A third one follows only where all have changed their weights, to hear whether all could.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from trimtab.inner_training.guard import Health, Reason
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.steering import Move
from trimtab.policies.deciding import Decider, Outcome, Parts, follow
from trimtab.policies.outcomes import Losses, ln_losses
from trimtab.policies.ranks import PartedError, Ranks, digest, named
from trimtab.policies.reports import Reports, each
from trimtab.policies.rows import Form, numbers, with_numbers

MOVE = ("proposed", "before", "after", "reasons")
HEALTH = tuple(one.name for one in fields(Health))


@dataclass(kw_only=True)
class Thought:
    """What one rank concludes from the reading that all share.

    Attributes:
        code: why it abstains; 0 where it does not.
        health: what the guard concluded; None where it was not asked.
        judged: where the steering stood then.
        observation, move, losses: as in ``Outcome``.
    """

    code: int = 0
    health: Health | None = None
    judged: np.ndarray
    observation: np.ndarray | None = None
    move: Move | None = None
    losses: Losses | None = None


class RanksDecider(Decider):
    """Decides for a run on several ranks.

    Args:
        parts: of this rank's controller.
        optimizer: this rank's.
        ranks: that decide together; the same settings on each of them.
    """

    def __init__(self, parts: Parts, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        super().__init__(parts, optimizer)
        self.ranks, self._on, self._failed = ranks, True, False
        self._fires = tuple(name for name, kind in self.settings.policy.levers.items() if kind == "events")
        self._reports = Reports(self.run.interval, self.run.hooks.say)
        standing = len(self._standing())
        self._form = Form(
            {"code": 1, "health": len(HEALTH), "judged": standing, "decided": standing, "refused": 1}
            | dict.fromkeys(MOVE, len(self.steering.levers))
            | {"fired": len(self._fires)}
        )

    def enabled(self, wanted: bool) -> bool:
        """Whether every rank was switched on at the last decision."""
        return self._on and not self.left

    def safely(self, what: str, act: Callable[[], None]) -> None:
        """As alone; remembers that something failed."""

        def noted() -> None:
            try:
                act()
            except Exception:
                self._failed = True
                raise

        super().safely(what, noted)

    def stalled(self) -> bool:
        """Whether they were on every rank; ranks skip the same steps, so they ask at the same time."""
        own = super().stalled()
        try:
            return bool(self.ranks.exchange([own]).all())
        except PartedError:
            return True  # the decision will say so

    def decide(self, *, measure: bool, wanted: bool) -> Outcome:
        """Takes a decision together with the other ranks; after the first that fails there are no more."""
        try:
            return self._together(measure, wanted)
        except PartedError as error:
            return self._leave(str(error))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the training must not stop for it
            if not isinstance(error, Exception):
                self.failed(error)
            self.ranks.lose()
            return self._leave(repr(error))

    def _together(self, measure: bool, wanted: bool) -> Outcome:
        reading, code = self._look(measure, wanted)
        reports = self.ranks.exchange(self._report(reading, code))
        code = self._reports.judge(reports)
        self._on = not code & Reason.SWITCHED_OFF
        if not self._on:
            self.run.release()
            self.settle()
        listened = self.listener.state
        shared = None if code or reading is None else self._reports.shared(reading, reports)
        thought = self._think(shared, measure)
        rows = self.ranks.exchange(self._conclusion(thought))
        found = self._reports.common(self._form.read(rows, "code")[:, 0], self.run.steps)
        code |= 0 if found == Reason.NOT_FINITE else found  # on all ranks alike it is the guard's to see to
        first, restorable = rows[:1], self._reports.restorable(reports)
        thought.health = Health(*(self._form.read(first, "health").T > 0))
        if shared is not None:  # also where the guard failed on one rank: levers must move alike on all of them
            self.steering.guard.trying = thought.health.trying
        if self.goes_back(thought.health) and not restorable:
            moments = each(self._reports.moments(reports))
            self.run.hooks.say("apart in snapshots", f"ranks could go back to different steps {moments}, so none does")
            thought.health, code = None, code | Reason.APART
        if code:
            self.listener.state = listened
        return self._act(thought, self._adopt(first, code), measure, restorable)

    # --- the first exchange: what each rank has measured --------------------------------------------------------

    def _look(self, measure: bool, wanted: bool) -> tuple[Reading | None, int]:
        """This rank's reading, or why there is none."""
        if not wanted:
            return None, int(Reason.SWITCHED_OFF)
        try:
            return self.reading(measure), 0
        except BaseException as error:  # noqa: BLE001 - whatever it is, the other ranks wait
            return None, int(self.failed(error))

    def _report(self, reading: Reading | None, code: int) -> np.ndarray:
        in_force = np.array([*self._standing(), self.run.lr_multiplier, self.run.clip])
        return self._reports.row(
            reading,
            code=code,
            step=self.run.steps,
            in_force=digest(in_force.tobytes()),
            scheduled=digest(repr(self.run.scheduled_lr)),
            moment=-1 if self.snapshots is None else self.snapshots.confirmed_step,
            moments=0 if self.snapshots is None else digest(repr(self.snapshots.steps)),
        )

    # --- the second exchange: what each rank has concluded ------------------------------------------------------

    def _think(self, reading: Reading | None, measure: bool) -> Thought:
        """As alone, but that nothing is done about it yet."""
        thought = Thought(judged=self._standing())
        if reading is None:
            return thought
        try:
            thought.health = self.steering.assess(reading)
            thought.judged = self._standing()
            thought.losses = ln_losses(reading) if measure else None
            thought.observation, thought.move = self.answer(reading)
            thought.code = int(np.bitwise_or.reduce(thought.move.reasons[0])) & int(Reason.LATE)
            if thought.observation is not None and not self.listener.finite:
                thought.code |= int(Reason.NOT_FINITE)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the other ranks wait
            thought.code = int(self.failed(error))
        return thought

    def _conclusion(self, thought: Thought) -> np.ndarray:
        move = thought.move or self.steering.hold()
        fired = [name in move.fired and bool(move.fired[name][0]) for name in self._fires]
        health = (
            [bool(getattr(thought.health, name)[0]) for name in HEALTH] if thought.health else [False] * len(HEALTH)
        )
        said = {
            "code": thought.code,
            "health": health,
            "judged": thought.judged,
            "decided": self._standing(),
            "fired": fired,
            "refused": move.refused,
        }
        return self._form.row(said | {name: getattr(move, name) for name in MOVE})

    def _standing(self) -> np.ndarray:
        found = np.array(numbers(self._tree()))
        return np.where(np.isnan(found), np.nan, found)  # of which there are several

    def _tree(self) -> dict[str, Any]:
        """What the steering stands at, with a place for every event."""
        tree = self.steering.standing()
        rests = {name: tree["guard"]["events"].get(name, [0]) for name in self._fires}
        return {**tree, "guard": {**tree["guard"], "events": rests}}

    def _adopt(self, first: np.ndarray, code: int) -> Move:
        """Makes the first rank's conclusion, or its standing before that, this rank's own."""

        def of(name: str) -> np.ndarray:
            return self._form.read(first, name)

        standing = of("judged" if code else "decided")[0]
        if self._standing().tobytes() != standing.tobytes():
            self.steering.adopt(with_numbers(self._tree(), iter(standing.tolist())))
        if code:
            off = code & Reason.SWITCHED_OFF  # which is no fault of the policy, whose levers are taken up again
            move = self.steering.hold(Reason(code)) if off else self.steering.abstain(Reason(code))
            return replace(move, refused=np.array([code]))
        fired = {name: of("fired")[:, place] > 0 for place, name in enumerate(self._fires)}
        reasons, refused = (of(name).astype(np.int64) for name in ("reasons", "refused"))
        return Move(of("proposed"), of("before"), of("after"), reasons, fired, refused[:, 0])

    # --- what follows -------------------------------------------------------------------------------------------

    def _act(self, thought: Thought, move: Move, measure: bool, restorable: bool) -> Outcome:
        """Goes back or notes the moment, then lets events happen: on every rank."""
        snapshots, health, self._failed = self.snapshots, thought.health, False
        goes_back = health is not None and self.goes_back(health)
        if snapshots is not None and health is not None:
            safely = self.safely if goes_back else super().safely  # without a snapshot all can go on
            safely(
                "going back" if goes_back else "taking a snapshot",
                lambda: follow(snapshots, health, self.run.steps, measure),
            )
        self.pass_on(measure)
        wanted = [name for name, runs in move.fired.items() if runs[0] and (restorable or name == "reset_moments")]
        fired = self.happen(wanted)
        if goes_back or wanted:
            failed = self.ranks.exchange([self._failed])[:, 0] > 0
            if failed.any() and not failed.all():
                raise PartedError(f"{named(np.flatnonzero(failed))} could not change its weights as the others did")
        return Outcome(
            observation=thought.observation,
            move=move,
            losses=thought.losses,
            rolled_back=goes_back and not self._failed,
            befell=int(self.steering.guard.befell[0]),
            fired=fired,
        )

    def _leave(self, trouble: str) -> Outcome:
        """The end of decisions: every rank goes on by its own settings, which are the same."""
        self.left = True
        self.run.release()
        self.run.hooks.say("parted", f"the ranks could not decide together at step {self.run.steps} ({trouble}), so the "
                           "controller leaves the run, which goes on by its own settings")  # fmt: skip
        move = replace(self.steering.hold(Reason.PARTED), refused=np.array([int(Reason.PARTED)]))
        return Outcome(observation=None, move=move, losses=None, rolled_back=False)
