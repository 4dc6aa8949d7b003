"""The losses that a training loop tells of its steps, kept on their device until an interval has ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.signals import Signal

LOGARITHMIC = ("loss", "validation", "shift", "fit")  # groups of signals that read the logarithm of a loss


def as_scalar(name: str, value: Tensor | float) -> Tensor | float:
    """A number as it is, or the float32 mean of a tensor on its own device, detached and never an alias of the caller's."""
    if isinstance(value, Tensor):
        plain = value.detach()
        if plain.ndim > 0:
            plain = plain.float().mean()
        return plain.clone() if plain.dtype == torch.float32 else plain.float()
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{name} is {value!r}; it must be a number or a tensor") from error


def check_readable(reading: Reading, signals: Sequence[Signal]) -> None:
    """Raises ``ValueError`` where signals would take the logarithm of a loss that has none."""
    mean = float(reading.losses().mean())
    if mean <= 0 and any(signal.group in LOGARITHMIC for signal in signals):
        raise ValueError(f"the mean loss is {mean:g}; signals read the logarithm of the loss, which must be above 0")


class LiveLosses:
    """What was told since the last interval ended.

    Attributes:
        held: of each step whose loss is known.
        step: the one whose loss came last.
        unknown: a step of the interval was told of without a number, so the interval cannot be measured.
        idle: of calls in a row that came without an optimizer step; None where that was no number.
    """

    def __init__(self, say: Callable[[str, str], None]) -> None:
        self._say = say
        self.held: list[Tensor] = []
        self.step, self.unknown = 0, False
        self.idle: list[Tensor | float | None] = []

    @property
    def known(self) -> bool:
        """Whether the losses of the interval are."""
        return bool(self.held) and not self.unknown

    def clear(self) -> None:
        """Begins a new interval."""
        self.held.clear()
        self.idle.clear()
        self.unknown = False

    def readable(self, name: str, value: Tensor | float) -> Tensor | float | None:
        """``as_scalar``; once a loss was noted, what is no number is said and is None: it must not end a training.

        Raises:
            UserError: it is no number, and none has come yet.
        """
        try:
            return as_scalar(name, value)
        except UserError as error:
            if self.step == 0:
                raise
            self._say(f"no {name}", f"{error}; where it is not, it counts as unknown, and no lever moves for it")
            return None

    def note(self, value: Tensor | float | None, step: int, device: torch.device) -> None:
        """Notes the loss of a step, on the device of the run."""
        self.step = step
        if self.idle:
            self.idle.clear()
        if value is None:
            self.unknown = True
            return
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
        self.held.append(value if value.device == device else value.to(device, non_blocking=True))

    def stalled(self) -> bool:
        """Whether none of the losses without a step is finite, as when a gradient scaler skips every step of a run whose
        weights are not; waits for the device. They are then counted anew."""
        idle, self.idle = self.idle, []
        return all(loss is not None and not math.isfinite(float(loss)) for loss in reversed(idle))
