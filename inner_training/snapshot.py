"""Snapshots of a population for the guard: two slots, so that a moment is trusted only after the interval that follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from trimtab.inner_training.stepping import Learner


class Moment(Protocol):
    """What can be kept of N runs: a tuple of tensors that is never written to, with ``updates`` (N,) among them."""

    @property
    def updates(self) -> Tensor: ...

    def merged(self, other: Self, runs: Tensor) -> Self:
        """``other`` where ``runs`` (bool, (N,)) is True, and this one elsewhere."""
        ...


Kept = TypeVar("Kept", bound=Moment)


class Companion(Protocol):
    """What goes with a population wherever its runs go: back to a snapshot, and on from there."""

    def started(self, runs: np.ndarray) -> None:
        """The runs in ``runs`` (bool, (N,)) have been reset."""

    def advanced(self, steps: int) -> None:
        """All runs have made steps."""

    def settle(self, mask: np.ndarray) -> None:
        """See ``Moments.settle``."""

    def snapshot(self, mask: np.ndarray) -> None:
        """See ``Moments.snapshot``."""

    def restore(self, mask: np.ndarray, keep: np.ndarray | None, sound: np.ndarray | None) -> None:
        """See ``Moments.restore``."""

    def resume(self, mask: np.ndarray) -> None:
        """See ``Moments.resume``."""

    def anchored(self, weights: Tensor) -> Tensor:
        """Weights (N, P) of the last confirmed moment, NaN where nothing may pull towards them."""
        ...


class SnapshotRing(Generic[Kept]):
    """Keeps, per run, a candidate (the newest stable moment) and the confirmed moment before it.

    Weights can be ruined by the last step of an interval whose losses all looked sane; only the next interval
    shows it. So ``restore`` goes back to the confirmed slot. What it gives up may stay in the other one for a while.
    """

    def __init__(self, learner: Kept) -> None:
        self._confirmed = self._candidate = learner
        self._given_up = np.zeros(len(learner.updates), dtype=bool)  # runs whose candidate is what they gave up

    def forget(self, learner: Kept, runs: Tensor) -> None:
        """Makes the present both slots of the runs ``runs`` (bool, (N,)), at a reset."""
        self._confirmed = self._confirmed.merged(learner, runs)
        self._candidate = self._candidate.merged(learner, runs)
        self._given_up &= ~runs.cpu().numpy()

    def take(self, learner: Kept, mask: np.ndarray) -> None:
        """Confirms the candidate of the runs in ``mask`` (bool, (N,), host) and makes the present their candidate.

        Where the candidate is what was given up, it is forgotten instead.
        """
        if mask.all() and not self._given_up.any():
            self._confirmed, self._candidate = self._candidate, learner
            return
        self._confirmed = self._confirmed.merged(self._candidate, self._on_device(learner, mask & ~self._given_up))
        self._candidate = self._candidate.merged(learner, self._on_device(learner, mask))
        self._given_up &= ~mask

    def change(self, function: Callable[[Kept], Kept]) -> None:
        """Makes something else of both moments, such as one with another field."""
        self._confirmed, self._candidate = function(self._confirmed), function(self._candidate)

    @property
    def stable(self) -> Kept:
        """The confirmed moment of every run."""
        return self._confirmed

    def restore(
        self, learner: Kept, mask: np.ndarray, keep: np.ndarray | None = None, sound: np.ndarray | None = None
    ) -> Kept:
        """The learner with the runs in ``mask`` (bool, (N,), host) back at their confirmed moment.

        Args:
            learner: the present.
            mask: runs to put back.
            keep: those of them whose present stays, for ``resume``; of others what was given up before does.
            sound: those whose candidate is confirmed first, unless it is what was given up.
        """
        if sound is not None:
            chosen = self._on_device(learner, mask & sound & ~self._given_up)
            self._confirmed = self._confirmed.merged(self._candidate, chosen)
        kept = np.zeros_like(mask) if keep is None else mask & keep
        # Nobody may confirm what came after the confirmed moment, unless it is to be resumed.
        forgotten = mask & ~kept & ~self._given_up
        self._candidate = self._candidate.merged(self._confirmed, self._on_device(learner, forgotten))
        if kept.any():
            self._candidate = self._candidate.merged(learner, self._on_device(learner, kept))
            self._given_up |= kept
        return learner.merged(self._confirmed, self._on_device(learner, mask))

    def resume(self, learner: Kept, mask: np.ndarray) -> Kept:
        """The learner with the runs in ``mask`` (bool, (N,), host) at what they gave up, as far as it was kept."""
        chosen = self._on_device(learner, mask & self._given_up)
        resumed = learner.merged(self._candidate, chosen)
        self._candidate = self._candidate.merged(self._confirmed, chosen)
        self._given_up &= ~mask
        return resumed

    @staticmethod
    def _on_device(learner: Moment, mask: np.ndarray) -> Tensor:
        return torch.as_tensor(mask, device=learner.updates.device)


class LearnerRing(SnapshotRing[Learner]):
    """Snapshots of learners; ``fresh`` (P,) bool are the parameters that start every later phase at zero."""

    def __init__(self, learner: Learner, fresh: Tensor) -> None:
        super().__init__(learner)
        self._fresh = fresh.to(learner.parameters.device)

    def renew(self, mask: np.ndarray) -> None:
        """A later phase has begun in the runs of ``mask`` (bool, (N,), host), which no restored moment may undo."""
        if mask.any() and self._fresh.any():
            chosen = torch.as_tensor(mask, device=self._fresh.device)[:, None] & self._fresh[None]
            self._confirmed, self._candidate = (
                one._replace(parameters=torch.where(chosen, 0.0, one.parameters))
                for one in (self._confirmed, self._candidate)
            )


class Moments:
    """What a population does with its snapshots.

    Attributes:
        companion: what goes with the runs; None for nothing.
        _learner: the present.
        _ring: snapshots of it.
    """

    companion: Companion | None = None
    _learner: Learner
    _ring: LearnerRing

    def settle(self, mask: np.ndarray) -> None:
        """Makes the present of the runs in ``mask`` (bool, (N,)) the only moment that they can be put back to."""
        if mask.any():
            self._ring.forget(self._learner, torch.as_tensor(mask, device=self._learner.updates.device))
            if self.companion is not None:
                self.companion.settle(mask)

    def snapshot(self, mask: np.ndarray) -> None:
        """Notes the present of the runs in ``mask`` (bool, (N,)) as stable (see ``SnapshotRing``)."""
        if mask.any():
            self._ring.take(self._learner, mask)
            if self.companion is not None:
                self.companion.snapshot(mask)

    def restore(self, mask: np.ndarray, keep: np.ndarray | None = None, sound: np.ndarray | None = None) -> None:
        """Puts parameters and optimizer state of the runs in ``mask`` back to their last confirmed moment.

        What the runs in ``keep`` (bool, (N,)) give up by that is kept for ``resume``; of those in ``sound`` the newest snapshot
        counts as confirmed.
        """
        if mask.any():
            self._learner = self._ring.restore(self._learner, mask, keep, sound)
            if self.companion is not None:
                self.companion.restore(mask, keep, sound)

    def resume(self, mask: np.ndarray) -> None:
        """Puts the runs in ``mask`` to what they gave up by ``restore``."""
        if mask.any():
            self._learner = self._ring.resume(self._learner, mask)
            if self.companion is not None:
                self.companion.resume(mask)
