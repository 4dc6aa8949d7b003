"""What a population remembers of the units of its runs: a moment of it, which snapshots keep."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FOREVER = -1  # `born` of a unit that was there when its run began


class Units(NamedTuple):
    """The units of N runs, T in all groups together. It is never written to: a change makes a new one.

    Attributes:
        active: (N, T) bool.
        born: (N, T) int64 value of ``updates`` when a unit was born or reset; ``FOREVER`` for one of the beginning.
        updates: (N,) int64 steps since the run began, without those that a rollback took back.
        edits: (N,) int64 edits that changed the run, without those taken back by a rollback.
        last: (N,) int64 number of the run's latest edit that is not undone; 0 for none.
        parked: (N, P) values of entries that are held at zero; elsewhere the last ones that were held.
        masked: (N, P) bool, weights that a mask holds at zero; (N, 0) where there never was one.
    """

    active: Tensor
    born: Tensor
    updates: Tensor
    edits: Tensor
    last: Tensor
    parked: Tensor
    masked: Tensor

    def merged(self, other: Units, runs: Tensor) -> Units:
        """``other`` where ``runs`` (bool, (N,)) is True, and these elsewhere."""

        def chosen(old: Tensor, new: Tensor) -> Tensor:
            return old if new is old else torch.where(runs.view(-1, *[1] * (old.ndim - 1)), new, old)

        return Units(*(chosen(old, new) for old, new in zip(self, other, strict=True)))

    def age(self) -> Tensor:
        """(N, T) int64 steps since a unit was born, or since its run began; -1 for inactive ones."""
        return torch.where(self.active, self.updates[:, None] - self.born.clamp(min=0), -1)
