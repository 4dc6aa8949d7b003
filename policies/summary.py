"""What a controller did, in words: what changed, why, and what the loss did afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trimtab.policies.outcomes import Changes, Ledger, Settled
from trimtab.printing import printable

RECENT = 8  # changes that a summary lists


@dataclass
class Change:
    """One decision that changed a lever, and the change of the ln mean loss that followed, NaN when unknown."""

    step: int
    moved: Changes
    why: str
    fired: tuple[str, ...] = ()
    outcome: float = math.nan
    undone: bool = False

    def line(self) -> str:
        """One line for a person."""
        moved = (f"{name} {position(name, old)} -> {position(name, new)}" for name, (old, new) in self.moved.items())
        levers = ", ".join([*moved, *self.fired])
        told = f"; the loss then went {_percent(self.outcome)}" if math.isfinite(self.outcome) else ""
        told += "; it was undone" if self.undone else ""
        return f"  step {self.step}: {levers}; {self.why}{told}"


@dataclass
class Tally:
    """How often the loss of the next interval was lower, after decisions of one kind."""

    lower: int = 0
    known: int = 0

    def count(self, change: float) -> None:
        """Counts one outcome; an unknown one is left out."""
        if math.isfinite(change):
            self.known += 1
            self.lower += change < 0


def position(lever: str, value: float) -> str:
    """Where a lever stands: a multiplier, or of ``width`` the share of the units that is active.

    >>> position("lr", 0.5), position("width", 0.5)
    ('x0.5', '50 %')
    """
    return f"{100 * value:.3g} %" if lever == "width" else f"x{value:.3g}"


def _percent(log_change: float) -> str:
    """A change of a natural logarithm in words.

    >>> _percent(-0.1)
    'down 9.5 %'
    """
    share = 100 * math.expm1(min(log_change, 50.0))
    return f"{'up' if share > 0 else 'down'} {abs(share):.1f} %"


class Journal:
    """Counts and recent changes of one controller, in constant memory."""

    def __init__(self) -> None:
        self.decisions = self.changes = self.rollbacks = 0
        self.guarded: dict[str, int] = {}
        self.ranges: dict[str, list[float]] = {}
        self.moved, self.held = Tally(), Tally()
        self.recent: list[Change] = []
        self.ledger = Ledger()

    def ended(self, ln_loss: float, *, undone: bool) -> Settled:
        """Settles what was changed for the interval that has ended.

        Args:
            ln_loss: natural log of the interval's mean loss, NaN when unknown.
            undone: the interval was rolled back.
        """
        settled = self.ledger.ended(ln_loss, undone=undone)
        if settled.decided_at is None:
            self.held.count(settled.ln_loss_change)
            return settled
        self.moved.count(settled.ln_loss_change)
        for change in self.recent:
            if change.step >= settled.decided_at:
                change.outcome, change.undone = settled.ln_loss_change, undone
        return settled

    def decided(
        self, step: int, after: Mapping[str, float], changes: Changes, fired: tuple[str, ...], why: str, cause: str
    ) -> None:
        """Notes a decision: multipliers after it, what it changed, why in words, and who caused it."""
        self.decisions += 1
        for name, value in after.items():
            low, high = self.ranges.get(name, (value, value))
            self.ranges[name] = [min(low, value), max(high, value)]
        self.ledger.changed(step, changes, fired, cause)
        if changes or fired:
            self.changes += 1
            self.recent = [*self.recent, Change(step, changes, why, fired)][-RECENT:]

    def intervened(self, words: str, *, rolled_back: bool) -> None:
        """Counts what the guard did at a decision; ``words`` may hold several reasons."""
        self.rollbacks += rolled_back
        for reason in filter(None, words.split("; ")):
            self.guarded[reason] = self.guarded.get(reason, 0) + 1

    def text(self, policy: str, steps: int, mode: str, now: Mapping[str, float]) -> str:
        """The summary, several lines; control characters of names and reasons are escaped."""
        verb = "changed a lever" if mode == "act" else "would have changed a lever"
        counts = f"{self.decisions} decisions, {self.changes} of which {verb}, rollbacks: {self.rollbacks}"
        lines = [f"policy {policy}, mode {mode}: {steps} steps, {counts}"]
        for name, (low, high) in self.ranges.items():
            here, least, most = (position(name, value) for value in (now.get(name, 1.0), low, high))
            lines.append(f"  {name}: now {here}, between {least} and {most}{' of the units' * (name == 'width')}")
        if self.guarded:
            lines.append("the guard stepped in:")
            lines += [f"  {count} x {reason}" for reason, count in sorted(self.guarded.items())]
        if self.recent:
            lines.append(f"last {len(self.recent)} changes:" if mode == "act" else "last pieces of advice:")
            lines += [change.line() for change in self.recent]
        lines += self._helped(mode)
        return "\n".join(map(printable, lines))

    def _helped(self, mode: str) -> list[str]:
        told = [
            f"in {tally.lower} of {tally.known} intervals after a decision {kind}"
            for tally, kind in ((self.moved, "that changed a lever"), (self.held, "that held"))
            if tally.known
        ]
        if not told or mode != "act":
            return []
        return [f"the loss fell {' and '.join(told)} (an association: it does not show what caused it)"]

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "counts": [self.decisions, self.changes, self.rollbacks],
            "guarded": dict(self.guarded),
            "ranges": {name: list(both) for name, both in self.ranges.items()},
            "tallies": [asdict(self.moved), asdict(self.held)],
            "recent": [asdict(change) for change in self.recent],
            "ledger": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        self.decisions, self.changes, self.rollbacks = state["counts"]
        self.guarded = dict(state["guarded"])
        self.ranges = {name: list(both) for name, both in state["ranges"].items()}
        self.moved, self.held = (Tally(**tally) for tally in state["tallies"])
        self.recent = [
            Change(
                **{
                    **one,
                    "moved": {name: (old, new) for name, (old, new) in one["moved"].items()},
                    "fired": tuple(one["fired"]),
                }
            )
            for one in state["recent"]
        ]
        self.ledger.load_state_dict(state["ledger"])
