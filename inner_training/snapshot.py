"""Snapshots of a population for the guard: two slots, so that a moment is trusted only after the interval that follows it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trimtab.inner_training.stepping import Learner


class SnapshotRing:
    """Keeps, per run, a candidate (the newest stable moment) and the confirmed moment before it.

    Weights can be ruined by the last step of an interval whose losses all looked sane; only the next interval
    shows it. So ``restore`` goes back to the confirmed slot.
    """

    def __init__(self, learner: Learner) -> None:
        self._confirmed = [tensor.clone() for tensor in learner.tensors()]
        self._candidate = [tensor.clone() for tensor in learner.tensors()]

    @staticmethod
    def _copy(source: list[Tensor], target: list[Tensor], mask: Tensor) -> None:
        for old, new in zip(target, source, strict=True):
            wide = mask.view(-1, *([1] * (new.ndim - 1)))
            torch.where(wide, new, old, out=old)

    def forget(self, learner: Learner, runs: Tensor) -> None:
        """Makes the present both slots of ``runs`` (indices), at a reset."""
        for present, confirmed, candidate in zip(learner.tensors(), self._confirmed, self._candidate, strict=True):
            confirmed[runs] = present[runs]
            candidate[runs] = present[runs]

    def take(self, learner: Learner, mask: np.ndarray) -> None:
        """Confirms the candidate of the runs in ``mask`` (bool, (N,), host) and makes the present their candidate."""
        present = list(learner.tensors())
        if mask.all():
            self._confirmed, self._candidate = self._candidate, self._confirmed
            for tensor, candidate in zip(present, self._candidate, strict=True):
                candidate.copy_(tensor)
            return
        chosen = torch.as_tensor(mask, device=learner.updates.device)
        self._copy(self._candidate, self._confirmed, chosen)
        self._copy(present, self._candidate, chosen)

    def restore(self, learner: Learner, mask: np.ndarray) -> None:
        """Puts the runs in ``mask`` (bool, (N,), host) back to their confirmed moment."""
        chosen = torch.as_tensor(mask, device=learner.updates.device)
        self._copy(self._confirmed, list(learner.tensors()), chosen)
        self._copy(self._confirmed, self._candidate, chosen)
