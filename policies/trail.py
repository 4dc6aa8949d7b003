"""What is kept of each decision: a line of the audit, and the counts and reasons that the summary tells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.inner_training.reading import Reading
from trimtab.inner_training.signals import Signal
from trimtab.policies.audit import Audit, rounded, rounded_all
from trimtab.policies.summary import Journal

TELLING = ("progress", "loss", "validation", "gradient", "update")  # groups of signals that can be a reason


@dataclass(frozen=True)
class Decision:
    """What one call of ``Controller.step`` did.

    Attributes:
        acted: whether a lever moved or a snapshot was restored.
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
        log_loss: natural log of the interval's mean loss, NaN when unknown; None when no interval has ended.
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
    log_loss: float | None

    def reason(self, mode: str) -> str:
        """Why, in words."""
        told = "; ".join(filter(None, ["moved by the policy" if self.moved else "", self.guarded]))
        return ("advice only: " if mode == "advise" else "") + (told or "the policy holds")


def log_mean_loss(reading: Reading) -> float:
    """Natural log of the interval's mean loss of one run; NaN when it is unknown, not positive or was rolled back."""
    mean = float(reading.losses().mean())
    return math.log(mean) if mean > 0 and math.isfinite(mean) else math.nan


def evidence(signals: Sequence[Signal], observation: np.ndarray | None) -> str:
    """The three loudest observed signals that can be a reason, in words; empty for none."""
    if observation is None:
        return ""
    seen = [
        (signal.name, float(value))
        for signal, value in zip(signals, observation, strict=True)
        if signal.group in TELLING and value != 0 and not signal.name.endswith("available") and signal.name != "started"
    ]
    loudest = sorted(seen, key=lambda pair: -abs(pair[1]))[:3]
    return ", ".join(f"{name} {value:+.2f}" for name, value in loudest)


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
        """Keeps a decision, and what came of the one before."""
        settled = None if event.log_loss is None else self.journal.outcome(event.log_loss)
        self.journal.intervened(event.guarded, rolled_back=event.rolled_back)
        why, reason = evidence(self._signals, event.observation), event.reason(self._mode)
        told = f"{reason} ({why})" if why else reason
        log_loss = math.nan if event.log_loss is None else event.log_loss
        self.journal.decided(event.step, event.before, event.after, told, log_loss)
        if settled is not None:
            self.write("outcome", step=event.step, decided_at=settled[0], ln_loss_change=rounded(settled[1]))
        if self._audit is not None:
            self.write("decision", **self._line(event))

    def _line(self, event: Event) -> dict[str, Any]:
        names = [signal.name for signal in self._signals]
        seen = {} if event.observation is None else dict(zip(names, event.observation.tolist(), strict=True))
        line: dict[str, Any] = {
            "step": event.step,
            "signals": rounded_all(seen),
            "proposed": rounded_all(event.proposed),
            "applied": rounded_all(event.applied),
            "reason": event.reason(self._mode),
            "rolled_back": event.rolled_back,
        }
        return line if self._mode == "act" else {**line, "advised": rounded_all(event.after)}

    def write(self, kind: str, **fields: Any) -> None:
        """Appends a line to the audit, if there is one."""
        if self._audit is not None:
            self._audit.write(kind, **fields)
