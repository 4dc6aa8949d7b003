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

    def __init__(self, learner: Learner, fresh: Tensor) -> None:
        """Keeps moments from now on; ``fresh`` (P,) bool are the parameters that start every later phase at zero."""
        self._confirmed = self._candidate = learner
        self._fresh = fresh.to(learner.parameters.device)

    def forget(self, learner: Learner, runs: Tensor) -> None:
        """Makes the present both slots of the runs ``runs`` (bool, (N,)), at a reset."""
        self._confirmed = self._confirmed.merged(learner, runs)
        self._candidate = self._candidate.merged(learner, runs)

    def renew(self, mask: np.ndarray) -> None:
        """A later phase has begun in the runs of ``mask`` (bool, (N,), host), which no restored moment may undo."""
        if mask.any() and self._fresh.any():
            chosen = torch.as_tensor(mask, device=self._fresh.device)[:, None] & self._fresh[None]
            self._confirmed, self._candidate = (
                one._replace(parameters=torch.where(chosen, 0.0, one.parameters))
                for one in (self._confirmed, self._candidate)
            )

    def take(self, learner: Learner, mask: np.ndarray) -> None:
        """Confirms the candidate of the runs in ``mask`` (bool, (N,), host) and makes the present their candidate."""
        if mask.all():
            self._confirmed, self._candidate = self._candidate, learner
            return
        chosen = torch.as_tensor(mask, device=learner.updates.device)
        self._confirmed = self._confirmed.merged(self._candidate, chosen)
        self._candidate = self._candidate.merged(learner, chosen)

    @property
    def stable(self) -> Learner:
        """The confirmed moment of every run."""
        return self._confirmed

    def restore(self, learner: Learner, mask: np.ndarray) -> Learner:
        """The learner with the runs in ``mask`` (bool, (N,), host) back at their confirmed moment."""
        chosen = torch.as_tensor(mask, device=learner.updates.device)
        self._candidate = self._candidate.merged(self._confirmed, chosen)
        return learner.merged(self._confirmed, chosen)
