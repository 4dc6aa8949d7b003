"""What came of each change: the loss of the interval after it against the interval before, and against what was usual."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trimtab.inner_training.reading import Reading

USUAL = 10  # intervals whose mean change is the usual one

Changes = dict[str, tuple[float, float]]  # lever -> multiplier before and after


class Losses(NamedTuple):
    """Natural logs of the losses that an interval ended with; NaN where unknown, not positive, or rolled back."""

    train: float
    validation: float


def _log(loss: float) -> float:
    return math.log(loss) if loss > 0 and math.isfinite(loss) else math.nan


def ln_losses(reading: Reading) -> Losses:
    """The losses of one run: the mean over the interval, and the validation loss that came with it."""
    return Losses(_log(float(reading.losses().mean())), _log(float(reading.val_loss[0])))


@dataclass(frozen=True, kw_only=True)
class Settled:
    """An interval that has ended, and what had been changed for it.

    Attributes:
        decided_at: step of the first change; None where nothing changed.
        changes: multipliers before and after, of each lever that ended up elsewhere.
        fired: event levers that fired.
        cause: who changed it: blocks of the policy, ``policy``, or ``guard``.
        ln_loss_change: change of the ln mean loss against the last interval whose loss is known; NaN when unknown.
        ln_loss_usual: mean of that change over up to ``USUAL`` intervals before; NaN when there were none.
        undone: the interval was rolled back, and so were its changes.
    """

    decided_at: int | None
    changes: Changes
    fired: tuple[str, ...]
    cause: str
    ln_loss_change: float
    ln_loss_usual: float
    undone: bool


@dataclass(frozen=True, kw_only=True)
class Validated:
    """A validation loss that came: when, since when, its natural log, and the change of that since the one before."""

    step: int
    since: int | None
    ln_val_loss: float
    ln_val_loss_change: float


@dataclass
class _Open:
    """What has been changed since the last interval ended."""

    first: int
    changes: Changes = field(default_factory=dict)
    fired: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)


class Ledger:
    """Follows changes until the interval after them has ended; constant memory.

    Attributes:
        loss: natural log of the mean loss of the last interval where it is known; NaN before.
    """

    def __init__(self) -> None:
        self.loss = math.nan
        self._trend: list[float] = []
        self._open: _Open | None = None
        self._validation: tuple[int, float] | None = None

    def changed(self, step: int, changes: Changes, fired: Sequence[str], cause: str) -> None:
        """Notes what a decision changed; several decisions within an interval are one change."""
        if not changes and not fired:
            return
        here = self._open = self._open or _Open(step)
        for name, (before, after) in changes.items():
            here.changes[name] = (here.changes.get(name, (before, after))[0], after)
        here.fired += [name for name in fired if name not in here.fired]
        here.causes += [cause] if cause not in here.causes else []

    def ended(self, ln_loss: float, *, undone: bool) -> Settled:
        """An interval has ended, with that natural log of its mean loss (NaN when unknown)."""
        change = ln_loss - self.loss
        usual = sum(self._trend) / len(self._trend) if self._trend else math.nan
        here, self._open = self._open or _Open(-1), None
        if math.isfinite(change):
            self._trend = [*self._trend, change][-USUAL:]
        if math.isfinite(ln_loss):
            self.loss = ln_loss
        moved = {name: both for name, both in here.changes.items() if both[0] != both[1]}
        return Settled(
            decided_at=here.first if moved or here.fired else None,
            changes=moved,
            fired=tuple(here.fired),
            cause=" + ".join(here.causes),
            ln_loss_change=change,
            ln_loss_usual=usual,
            undone=undone,
        )

    def turn(self) -> None:
        """The run goes on in another mode: advice is no change, and a change is no advice, so none is followed on."""
        self._open, self._validation = None, None

    @property
    def was_validated(self) -> bool:
        """Whether a validation loss has come yet."""
        return self._validation is not None

    def validated(self, step: int, ln_val_loss: float) -> Validated | None:
        """Notes a validation loss; None where it is unknown."""
        if not math.isfinite(ln_val_loss):
            return None
        since, before = self._validation or (None, math.nan)
        self._validation = (step, ln_val_loss)
        return Validated(step=step, since=since, ln_val_loss=ln_val_loss, ln_val_loss_change=ln_val_loss - before)

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "loss": self.loss,
            "trend": list(self._trend),
            "open": None if self._open is None else vars(self._open).copy(),
            "validation": self._validation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        self.loss, self._trend = float(state["loss"]), list(state["trend"])
        self._open = None
        if (here := state["open"]) is not None:
            changes = {name: (before, after) for name, (before, after) in here["changes"].items()}
            self._open = _Open(here["first"], changes, list(here["fired"]), list(here["causes"]))
        both = state["validation"]
        self._validation = None if both is None else (int(both[0]), float(both[1]))
