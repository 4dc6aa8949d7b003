"""One reversible change of the structure of a population."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from trimtab.errors import UserError
from trimtab.inner_training.stepping import Learner
from trimtab.inner_training.structure.units import Units


class Before(NamedTuple):
    """What an edit found, and what it may have changed.

    Attributes:
        learner, units: before it; they are kept, not copied.
        entries: (N, P) bool.
        which: (N, T) bool, units removed, born or reset.
        number: of the edit.
    """

    learner: Learner
    units: Units
    entries: Tensor
    which: Tensor
    number: int


class StackedEdit:
    """One change of the units of all runs, and its undoing.

    Attributes:
        kind: ``prune``, ``grow``, ``reset``, ``mask`` or ``rewind``.
        units: (N, U) bool by group: units removed, born or reset.
    """

    def __init__(self, kind: str, units: dict[str, Tensor], before: Before, undo: Callable[[Before], Tensor]) -> None:
        self.kind, self.units = kind, units
        self._before: Before | None = before
        self._undo = undo

    @property
    def counts(self) -> Tensor:
        """(N,) int64 units that were changed."""
        total = [units.sum(1) for units in self.units.values()]
        return sum(total[1:], total[0])

    def undo(self) -> Tensor:
        """Takes the edit back, exactly: its entries return to their values and optimizer state from before it.

        Right after the edit everything is then as it was, bit for bit; after training, what the edit touched returns, and all
        else goes on from where it is.

        Returns:
            (N,) bool, the runs in which it was undone: those whose latest edit it is. In the others it changed nothing, a
            later edit is not undone, or the run has been reset or gone back to before it.

        Raises:
            UserError: it is undone already.
        """
        if self._before is None:
            raise UserError(f"this {self.kind} edit is already undone; each edit is undone once")
        before, self._before = self._before, None
        return self._undo(before)

    def __repr__(self) -> str:
        return f"StackedEdit({self.kind}; {', '.join(self.units)})"
