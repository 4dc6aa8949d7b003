"""Edits that can still be taken back, as long as nothing has happened since."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.inner_training.structure.edit import Edit
from trimtab.inner_training.structure.editing import Editor

Values = list[tuple[str, Tensor, Tensor]]  # name of a tensor, flat positions, and what is there


class Unsettled:
    """The edits of one decision: undone together, or forgotten.

    Args:
        editor: that makes them.
    """

    def __init__(self, editor: Editor) -> None:
        self._editor, self._step = editor, -1
        self._made: list[tuple[Edit, Values]] = []

    def add(self, edit: Edit) -> None:
        """An edit has just been made."""
        self._step = self._editor.gates.steps
        if not self._made:
            self._editor.at_next_step(self.settle)
        self._made.append((edit, self._values(self._editor.touched(edit))))

    def settle(self) -> None:
        """From now on they count as training; what undoes them takes memory."""
        for edit, _ in self._made:
            self._editor.settle(edit)
        self._made.clear()

    def take_back(self) -> bool:
        """Undoes them, if no step was made and no weights were loaded since, and says so; they are settled otherwise."""
        undone = 0
        # Only the last one: those before it may have touched what it has touched since.
        if self._made and self._step == self._editor.gates.steps and self._unchanged(self._made[-1][1]):
            for edit, _ in reversed(self._made):
                try:
                    edit.undo()
                except UserError:  # the structure has been loaded since, or somebody else has edited it
                    break
                undone += 1
        self.settle()
        return undone > 0

    def _unchanged(self, found: Values) -> bool:
        now = self._values([(name, where) for name, where, _ in found])
        return all(torch.equal(one[2], other[2]) for one, other in zip(found, now, strict=True))

    def _values(self, touched: list[tuple[str, Tensor]]) -> Values:
        gates = self._editor.gates
        return [(name, where, gates.tensor(name).detach().reshape(-1)[where].clone()) for name, where in touched]
