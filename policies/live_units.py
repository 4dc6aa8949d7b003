"""The units of one live run at its decisions: counted, measured, edited, saved. Without a structure nothing happens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trimtab.errors import MismatchError
from trimtab.inner_training.measurements import UNITS, needs_of
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.signals import Signal
from trimtab.inner_training.steering import Move, Steering
from trimtab.inner_training.structure.live_edits import Edited, LiveEdits
from trimtab.policies.attachment import MOST_STEPS, Attachment
from trimtab.policies.forms import Entries, Named, Text, Whole

WIDTH = "width"
FAILED = "an edit that was permitted could not be made, and the log says why"
Safely = Callable[[str, Callable[[], None]], None]


@dataclass(frozen=True, kw_only=True)
class Units:
    """What a decision did to units, or would do.

    Attributes:
        edited: by lever.
        before, after: the active share by the name of its lever; empty where the policy does not move that.
        active: active units by group, after it; None without a structure.
        failed: an edit that was permitted could not be made.
        done: it has been done, and was not only advised.
    """

    edited: Mapping[str, Edited] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    active: Mapping[str, int] | None = None
    failed: bool = False
    done: bool = False

    @property
    def words(self) -> str:
        """The edits in words."""
        return ", ".join(one.words() for one in self.edited.values())


class LiveUnits:
    """What decisions do with the units of one run.

    Args:
        settings: of the controller.
        steering: of the run.
        signals: that the policy reads.
        safely: does something that may fail without harm (see ``StepHooks.safely``).
    """

    def __init__(self, settings: Attachment, steering: Steering, signals: Sequence[Signal], safely: Safely) -> None:
        self.edits: LiveEdits | None = None if settings.editing is None else settings.editing.edits()
        self._acts, self._steering, self._safely = settings.mode == "act", steering, safely
        self._moves_width = self.edits is not None and WIDTH in settings.policy.levers
        self._read = UNITS in needs_of(signals)
        self._before: dict[str, float] = {}

    def describe(self, reading: Reading, measure: bool) -> None:
        """Tells a reading of the units, and, where an interval has ended, how they do."""
        edits = self.edits
        if edits is None:
            return
        self.count(reading)
        self._before = self.shares
        if measure and edits.due() and self._read:
            self._safely("measuring the units", lambda: self._measure(edits, reading))

    def _measure(self, edits: LiveEdits, reading: Reading) -> None:
        if reading.measured is not None:
            taken = {**reading.measured.probed, UNITS: edits.measured()}
            reading.measured = replace(reading.measured, probed=taken)

    def count(self, reading: Reading) -> None:
        """Tells a reading of the units as they are now."""
        if self.edits is not None:
            reading.units = self.edits.counts()

    @property
    def shares(self) -> dict[str, float]:
        """The active share now, where the policy moves it."""
        if self.edits is None or not self._moves_width:
            return {}
        return {WIDTH: float(self.edits.counts().share[0])}

    def carry_out(self, move: Move) -> Units:
        """Does the edits of a move, each of which may fail without harm; or says what would be done, in mode advise."""
        edits, done, failed = self.edits, dict[str, Edited](), list[str]()
        if edits is None:
            return Units()
        edits.settle()
        wanted = {name: float(shares[0]) for name, shares in move.edits.items() if shares[0] != 0}
        act = edits.edit if self._acts else edits.planned
        for name, share in wanted.items():
            failed.append(name)

            def one(name: str = name, share: float = share) -> None:
                done[name] = act(name, share, edits.counts())
                failed.remove(name)

            self._safely(f"the edit {name}", one)
        limits = self._steering.guard.edits
        if not self._acts and limits is not None:  # advice takes nothing of the budget, and no loss rises for it
            limits.done[:] = limits.settling[:] = 0
        active = edits.counts().active[0]
        return Units(
            edited=done,
            before=self._before,
            after=self.shares if self._acts else self._advised(wanted, done),
            active=dict(zip(edits.structure.groups, active.tolist(), strict=True)),
            failed=bool(failed),
            done=self._acts and bool(done),
        )

    def _advised(self, wanted: Mapping[str, float], told: Mapping[str, Edited]) -> dict[str, float]:
        """The active share as it would be."""
        assert self.edits is not None
        if not self._moves_width or WIDTH not in told:
            return self.shares
        change = np.sign(wanted[WIDTH]) * sum(told[WIDTH].units.values()) / sum(self.edits.structure.groups.values())
        return {WIDTH: self.shares[WIDTH] + float(change)}

    def take_back(self) -> None:
        """Undoes the edits of the last decision, if nothing has happened since: as where a run begins with a saved state."""
        if self.edits is not None:
            self.edits.take_back()

    # --- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a saved state says of the units: which are active, so that another structure is found out."""
        if self.edits is None:
            return {}
        return {"structure": {"intervals": self.edits.intervals, "active": self._digests(self.edits)}}

    def check_kind(self, state: Any) -> None:
        """Raises ``MismatchError`` where only one of controller and state has a structure."""
        saved = isinstance(state, Mapping) and "structure" in state
        if saved and self.edits is None:
            raise MismatchError(
                "the state was saved with a structure, but this controller has none; give attach(..., structure=...)"
            )
        if not saved and self.edits is not None and isinstance(state, Mapping):
            raise MismatchError("the state was saved without a structure; leave structure=... out of attach to load it")

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises ``MismatchError`` unless the units are those that a state was saved with."""
        if self.edits is None:
            return
        saved = state["structure"]
        Entries({"intervals": Whole(MOST_STEPS), "active": Named(Text())}, alone=True).check(saved, "structure")
        own = self._digests(self.edits)
        if own.keys() != saved["active"].keys():
            raise MismatchError(
                f"the state is of a structure with the groups {', '.join(saved['active'])}; this one has {', '.join(own)}"
            )
        for name, digest in saved["active"].items():
            if digest != own[name]:
                raise MismatchError(
                    f"other units of {name} were active when the state was saved; load the structure's own state "
                    "(structure.load_state_dict), after model and optimizer and before the controller's"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state that ``check`` has passed."""
        if self.edits is not None:
            self.edits.intervals = state["structure"]["intervals"]

    @staticmethod
    def _digests(edits: LiveEdits) -> dict[str, str]:
        return {
            name: f"{int(mask.sum())} of {len(mask)}, {hashlib.sha256(mask.numpy().tobytes()).hexdigest()[:16]}"
            for name, mask in edits.structure.active.items()
        }
