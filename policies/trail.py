"""What is kept of each decision: a line of the audit, and the counts and reasons that the summary tells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.inner_training.signals import Signal
from trimtab.policies.audit import Audit, now, rounded, rounded_all
from trimtab.policies.live_units import Units
from trimtab.policies.outcomes import Changes, Losses, Settled, Validated
from trimtab.policies.summary import Journal

TELLING = ("progress", "loss", "validation", "gradient", "update")  # groups of signals that can be a reason


@dataclass(frozen=True)
class Decision:
    """What one call of ``Controller.step`` did.

    Attributes:
        acted: whether a lever moved, units were edited, or a snapshot was restored.
        applied: multiplier in force for each lever, the guard's caution included; 1 is null.
        reason: why, in words.
        rolled_back: whether the run was put back to its last stable snapshot.
    """

    acted: bool
    applied: Mapping[str, float]
    reason: str
    rolled_back: bool


@dataclass(frozen=True, kw_only=True)
class Event:
    """One decision.

    Attributes:
        step: optimizer steps done.
        observation: (S,) what the policy saw; None when it was not asked.
        proposed: the policy's action for each lever; empty when it gave none.
        before, after: multipliers before it, and after it (in mode ``advise``: as advised).
        applied: multipliers in force after it.
        moved: the policy moved a lever (the guard's caution is not one).
        guarded: what the guard did, in words; empty when it let everything through.
        rolled_back: a snapshot was restored.
        losses: those of the interval that has ended; None when none has.
        why: which parts of the policy moved what, on what evidence; empty where it does not say.
        fired: event levers that fired.
        undone: levers whose last change the guard took back.
        units: what was done to units; of ``before`` and ``after`` the lever ``width`` is the active share.
    """

    step: int
    observation: np.ndarray | None
    proposed: Mapping[str, float]
    before: Mapping[str, float]
    after: Mapping[str, float]
    applied: Mapping[str, float]
    moved: bool
    guarded: str
    rolled_back: bool
    losses: Losses | None
    why: str = ""
    fired: tuple[str, ...] = ()
    undone: tuple[str, ...] = ()
    units: Units = field(default_factory=Units)

    @property
    def changes(self) -> Changes:
        """Multipliers before and after, of each lever that changed."""
        return {
            name: (self.before.get(name, 1.0), new)
            for name, new in self.after.items()
            if new != self.before.get(name, 1.0)
        }

    @property
    def _acted(self) -> bool:
        return self.moved or bool(self.fired) or bool(self.units.edited)

    @property
    def cause(self) -> str:
        """Who changed something: blocks of the policy by name, or ``policy``; and ``guard``."""
        acted = self._acted
        own = (blocks_of(self.why) or ("policy",)) if acted else ()
        return " + ".join((*own, "guard") if self.rolled_back or not acted else own)

    def reason(self, mode: str) -> str:
        """Why, in words."""
        own = "moved by the policy" if self._acted else ""
        if self.why:
            own = f"{own or 'the policy holds'} ({self.why})"
        told = "; ".join(filter(None, [own, self.units.words, self.guarded]))
        return ("advice only: " if mode == "advise" else "") + (told or "the policy holds")


def blocks_of(why: str) -> tuple[str, ...]:
    """Names of the blocks in a policy's ``why``: clauses ``name: evidence``, separated by semicolons.

    >>> blocks_of("plateau: no better for 10 intervals; autoclip: norm 4.2")
    ('plateau', 'autoclip')
    """
    found = (re.match(r"([\w-]+):\s", clause.strip()) for clause in why.split(";"))
    return tuple(dict.fromkeys(match[1] for match in found if match))


def loudest(signals: Sequence[Signal], observation: np.ndarray | None) -> dict[str, float]:
    """The three loudest observed signals that can be a reason, by name."""
    if observation is None:
        return {}
    seen = [
        (signal.name, float(value))
        for signal, value in zip(signals, observation.tolist(), strict=True)
        if signal.group in TELLING and value != 0 and not signal.name.endswith("available") and signal.name != "started"
    ]
    return dict(sorted(seen, key=lambda pair: -abs(pair[1]))[:3])


class Trail:
    """Audit and journal of one controller.

    Args:
        signals: those of the policy.
        audit: the file to write, or None.
        mode: ``act`` or ``advise``.
    """

    def __init__(self, signals: Sequence[Signal], audit: Audit | None, mode: str) -> None:
        self._signals, self._audit, self._mode = tuple(signals), audit, mode
        self.journal = Journal()

    def note(self, event: Event) -> None:
        """Keeps a decision, and what came of those before."""
        lines = [] if event.losses is None else self._settle(event.step, event.losses, event.rolled_back)
        self.journal.intervened(event.guarded, rolled_back=event.rolled_back)
        loud, reason = loudest(self._signals, event.observation), event.reason(self._mode)
        seen = ", ".join(f"{name} {value:+.2f}" for name, value in loud.items())
        told = f"{reason} ({seen})" if seen else reason
        self.journal.decided(event.step, event.after, event.changes, event.fired, told, event.cause)
        if self._audit is not None:
            self._audit.append([*lines, self._decision(event, list(loud), reason)])

    def _settle(self, step: int, losses: Losses, rolled_back: bool) -> list[dict[str, Any]]:
        settled = self.journal.ended(losses.train, undone=rolled_back)
        validated = self.journal.ledger.validated(step, losses.validation)
        lines = [] if settled.decided_at is None else [_outcome(step, settled)]
        return lines if validated is None else [*lines, _validation(validated)]

    def _decision(self, event: Event, loud: list[str], reason: str) -> dict[str, Any]:
        names = [signal.name for signal in self._signals]
        seen = {} if event.observation is None else dict(zip(names, event.observation.tolist(), strict=True))
        advised = {"advised": rounded_all(event.after)} if self._mode == "advise" else {}
        return {
            "kind": "decision",
            "step": event.step,
            "ln_loss": None if event.losses is None else rounded(event.losses.train),
            "signals": rounded_all(seen),
            "loudest": loud,
            "proposed": rounded_all(event.proposed),
            "changed": _both(event.changes),
            "fired": list(event.fired),
            "applied": rounded_all(event.applied),
            **advised,
            "reason": reason,
            "guard": event.guarded,
            "why": event.why,
            "rolled_back": event.rolled_back,
            "undone": list(event.undone),
            **_edited(event.units),
        }

    def write(self, kind: str, *, step: int) -> None:
        """Appends a line about the controller itself to the audit, if there is one."""
        if self._audit is not None:
            self._audit.write(kind, step=step, time=now())


def _both(changes: Changes) -> dict[str, list[float | str]]:
    return {name: [rounded(before), rounded(after)] for name, (before, after) in changes.items()}


def _edited(units: Units) -> dict[str, Any]:
    if units.active is None:
        return {}
    done = {name: {"kind": one.kind, "units": dict(one.units)} for name, one in units.edited.items()}
    return {"edited": done, "active": dict(units.active)}


def _outcome(step: int, settled: Settled) -> dict[str, Any]:
    return {
        "kind": "outcome",
        "step": step,
        "decided_at": settled.decided_at,
        "changed": _both(settled.changes),
        "fired": list(settled.fired),
        "cause": settled.cause,
        "ln_loss_change": rounded(settled.ln_loss_change),
        "ln_loss_usual": rounded(settled.ln_loss_usual),
        "undone": settled.undone,
    }


def _validation(validated: Validated) -> dict[str, Any]:
    return {
        "kind": "validation",
        "step": validated.step,
        "since": validated.since,
        "ln_val_loss": rounded(validated.ln_val_loss),
        "ln_val_loss_change": rounded(validated.ln_val_loss_change),
    }
