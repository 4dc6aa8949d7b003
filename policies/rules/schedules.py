"""Schedule rules: the learning-rate multiplier as a function of progress alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from trimtab.inner_training.schedules import SCHEDULES
from trimtab.policies.policy import Kind
from trimtab.policies.rules.options import number

# Where a schedule jumps. The signal is a float32, off by up to 3e-8: without snapping, a jump at step k of T steps
# would come one decision late whenever k / T happens to be rounded down.
JUMPS = (1 / 7, 3 / 7, 0.5, 0.75)
SNAP = 5e-8


def schedule_factor(
    name: str, progress: np.ndarray, available: np.ndarray, warmup: np.ndarray | float, floor: np.ndarray | float
) -> np.ndarray:
    """Multipliers (N,) float64 of a schedule, 1 where progress is unknown.

    Args:
        name: of ``SCHEDULES``.
        progress, available: (N,) as the signals ``progress`` and ``progress_available`` give them.
        warmup, floor: see ``BaseSchedule``.
    """
    snapped = progress.astype(np.float64)
    for jump in JUMPS:
        snapped[np.abs(snapped - jump) < SNAP] = jump
    return np.where(available > 0, SCHEDULES[name](snapped, warmup, floor), 1.0)


@dataclass(frozen=True, kw_only=True)
class ScheduleRule:
    """Targets for ``lr``: a function of progress (``trimtab.inner_training.schedules.SCHEDULES``).

    Exact at every decision, whatever came before, since a target is not rate-limited. Where progress is unknown
    (no budget was given) the multiplier is 1. On top of a schedule that the run already has, the two multiply.

    Attributes:
        name: a name of ``SCHEDULES``.
        warmup: share of the budget spent in warm-up (kinds with warm-up), in [0, 1).
        floor: final factor of the decaying kinds, in [0, 1].
    """

    name: str
    warmup: float = 0.1
    floor: float = 0.0
    signals: ClassVar[tuple[str, ...]] = ("progress", "progress_available")
    levers: ClassVar[Mapping[str, Kind]] = MappingProxyType({"lr": "targets"})
    decide_every: ClassVar[int | None] = 1

    def init(self, num_runs: int) -> dict[str, Any]:
        """No state."""
        del num_runs
        return {}

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Targets (N, 1) float64, in [0, 1]; see ``Policy.act``."""
        targets = schedule_factor(self.name, observations[:, 0], observations[:, 1], self.warmup, self.floor)
        return targets[:, None], state


def constant() -> ScheduleRule:
    """The identity: multiplier 1 throughout."""
    return ScheduleRule(name="constant")


def step() -> ScheduleRule:
    """Factor 0.1 at half of the budget and again at three quarters."""
    return ScheduleRule(name="step")


def exponential() -> ScheduleRule:
    """Exponential decay to 1 % at the end of the budget."""
    return ScheduleRule(name="exponential")


def cosine(*, floor: float = 0.0) -> ScheduleRule:
    """Half a cosine from 1 to ``floor`` in [0, 1]."""
    return ScheduleRule(name="cosine", floor=number("floor", floor, 0, 1))


def warmup_cosine(*, warmup: float = 0.1, floor: float = 0.0) -> ScheduleRule:
    """Linear over a share ``warmup`` in [0, 0.99] of the budget, then half a cosine to ``floor`` in [0, 1]."""
    return ScheduleRule(
        name="warmup-cosine", warmup=number("warmup", warmup, 0, 0.99), floor=number("floor", floor, 0, 1)
    )


def cosine_restarts(*, floor: float = 0.0) -> ScheduleRule:
    """Three cosine periods of 1/7, 2/7 and 4/7 of the budget, each down to ``floor`` in [0, 1]."""
    return ScheduleRule(name="cosine-restarts", floor=number("floor", floor, 0, 1))


def wsd(*, warmup: float = 0.1, floor: float = 0.0) -> ScheduleRule:
    """Linear over ``warmup`` in [0, 0.8], stable at 1, linear to ``floor`` in [0, 1] over the last fifth."""
    return ScheduleRule(name="wsd", warmup=number("warmup", warmup, 0, 0.8), floor=number("floor", floor, 0, 1))


def one_cycle() -> ScheduleRule:
    """Cosine from 1/25 up to 1 over 30 % of the budget, then down to 1/(25e4)."""
    return ScheduleRule(name="one-cycle")
