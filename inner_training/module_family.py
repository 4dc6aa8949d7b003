"""Runs of a user's own maker, with what an environment asks of a task family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trimtab.errors import UserError, out_of_range
from trimtab.inner_training.module_parts import Parts

HELD_OUT = 2**31  # added to the seed of held-out runs


@dataclass(frozen=True)
class ModuleInstance:
    """One run of a maker.

    Attributes:
        key: ``name/train|held-out/seed``.
        seed: what ``make`` is called with, in [0, 2**32).
    """

    key: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class ModuleFamily:
    """Runs of one maker, with what an environment asks of a task family.

    Attributes:
        name: lower-case words with hyphens.
        make: ``make(seed)`` builds a fresh run; it may draw from the process-wide generators of torch, numpy and
            Python, which then start from ``seed``.
        loss_cap, loss_floor: range of the bounded loss, 0 < floor < cap; a run that starts above the cap earns nothing
            until it is below. Twice the loss of guessing is a good cap.
    """

    name: str
    make: Callable[[int], Parts]
    loss_cap: float
    loss_floor: float = 1e-4

    def __post_init__(self) -> None:
        if not callable(self.make):
            raise UserError(f"make is a {type(self.make).__name__}; give a function make(seed) that returns Parts")
        if not 0 < self.loss_floor < self.loss_cap < np.inf:
            raise out_of_range(
                "loss_cap", self.loss_cap, low=self.loss_floor, remedy="finite, and above loss_floor > 0"
            )

    def draw(self, seed: int, *, held_out: bool) -> ModuleInstance:
        """The run of ``seed``, in [0, 2**31); held-out runs have other seeds, all of them from 2**31 on."""
        kind = "held-out" if held_out else "train"
        return ModuleInstance(key=f"{self.name}/{kind}/{seed}", seed=seed + HELD_OUT * held_out)

    def bounded(self, loss: np.ndarray) -> np.ndarray:
        """Maps any mean loss to ``[loss_floor, loss_cap]``; NaN and infinity give the cap."""
        return np.clip(np.where(np.isfinite(loss), loss, self.loss_cap), self.loss_floor, self.loss_cap)
