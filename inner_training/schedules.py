"""Learning-rate schedules as pure, vectorised functions of progress: the base of a run, and the schedule rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Share = float | np.ndarray


@dataclass(frozen=True, kw_only=True)
class BaseSchedule:
    """The schedule that a user's run already has, before any controller.

    Attributes:
        kind: a name of ``SCHEDULES``.
        warmup: share of the budget spent in warm-up (kinds with warm-up), in [0, 1).
        floor: final factor of the decaying kinds, in [0, 1].
    """

    kind: str = "constant"
    warmup: float = 0.1
    floor: float = 0.0


def constant(progress: np.ndarray, warmup: Share, floor: Share) -> np.ndarray:
    """Factor 1 throughout."""
    del warmup, floor
    return np.ones_like(progress)


def cosine(progress: np.ndarray, warmup: Share, floor: Share) -> np.ndarray:
    """Half a cosine from 1 to ``floor`` (Loshchilov & Hutter, SGDR, arXiv 1608.03983, without restarts)."""
    del warmup
    return floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * progress))


def warmup_cosine(progress: np.ndarray, warmup: Share, floor: Share) -> np.ndarray:
    """Linear from 0 to 1 over ``warmup``, then half a cosine to ``floor`` (Goyal et al., arXiv 1706.02677)."""
    rising = progress / np.maximum(warmup, 1e-12)
    falling = cosine(np.clip((progress - warmup) / (1 - warmup), 0, 1), 0.0, floor)
    return np.where(progress < warmup, rising, falling)


def cosine_restarts(progress: np.ndarray, warmup: Share, floor: Share) -> np.ndarray:
    """Three cosine periods of 1/7, 2/7 and 4/7 of the budget (SGDR with T_mult = 2, arXiv 1608.03983)."""
    del warmup
    edges = np.array([0.0, 1 / 7, 3 / 7, 1.0])
    # A hair of tolerance, so that a restart at step k = T / 7 is not lost to rounding.
    period = np.clip(np.searchsorted(edges, progress + 1e-12, side="right") - 1, 0, 2)
    local = (progress - edges[period]) / (edges[period + 1] - edges[period])
    return cosine(np.clip(local, 0, 1), 0.0, floor)


def step_decay(progress: np.ndarray, warmup: Share, floor: Share) -> np.ndarray:
    """Factor 0.1 at half of the budget and again at three quarters (He et al., ResNet, arXiv 1512.03385)."""
    del warmup, floor
    return np.where(progress < 0.5, 1.0, np.where(progress < 0.75, 0.1, 0.01))


def exponential(progress: np.ndarray, warmup: Share, floor: Share) -> np.ndarray:
    """Exponential decay to 1 % of the initial rate at the end of the budget."""
    del warmup, floor
    return np.exp(np.log(0.01) * progress)


def wsd(progress: np.ndarray, warmup: Share, floor: Share) -> np.ndarray:
    """Warm-up, stable, linear decay over the last fifth (Hu et al., MiniCPM, arXiv 2404.06395)."""
    rising = progress / np.maximum(warmup, 1e-12)
    falling = floor + (1 - floor) * np.clip((1 - progress) / 0.2, 0, 1)
    return np.where(progress < warmup, rising, np.where(progress < 0.8, 1.0, falling))


def one_cycle(progress: np.ndarray, warmup: Share, floor: Share) -> np.ndarray:
    """Cosine from 1/25 up to 1 over 30 % of the budget, then down to 1/(25e4) (Smith & Topin, arXiv 1708.07120).

    The shares and divisors are the defaults of ``torch.optim.lr_scheduler.OneCycleLR``.
    """
    del warmup, floor
    start, end, peak = 1 / 25, 1 / 25e4, 0.3
    up = start + (1 - start) * 0.5 * (1 - np.cos(np.pi * progress / peak))
    down = end + (1 - end) * 0.5 * (1 + np.cos(np.pi * np.clip((progress - peak) / (1 - peak), 0, 1)))
    return np.where(progress < peak, up, down)


ScheduleFunction = Callable[[np.ndarray, Share, Share], np.ndarray]

SCHEDULES: dict[str, ScheduleFunction] = {
    "constant": constant,
    "step": step_decay,
    "exponential": exponential,
    "cosine": cosine,
    "warmup-cosine": warmup_cosine,
    "cosine-restarts": cosine_restarts,
    "wsd": wsd,
    "one-cycle": one_cycle,
}


def factor(schedule: BaseSchedule, step: np.ndarray, total: float) -> np.ndarray:
    """Factor of the initial learning rate at each step.

    Args:
        schedule: which one.
        step: steps done, any shape, >= 0.
        total: budget in steps, > 0.

    Returns:
        Factors in [0, 1], the shape of ``step``, float64.

    >>> factor(BaseSchedule(kind="cosine"), np.array([0, 50, 100]), 100).round(3).tolist()
    [1.0, 0.5, 0.0]
    """
    progress = np.clip(np.asarray(step, dtype=np.float64) / total, 0.0, 1.0)
    return SCHEDULES[schedule.kind](progress, schedule.warmup, schedule.floor)


def factors(schedules: Sequence[BaseSchedule], steps: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """``factor`` for many runs at once: steps (K, N) and totals (N,) give (K, N)."""
    progress = np.clip(steps / totals, 0.0, 1.0)
    kinds = np.array([schedule.kind for schedule in schedules])
    warmup = np.array([schedule.warmup for schedule in schedules])
    floor = np.array([schedule.floor for schedule in schedules])
    result = np.ones_like(progress)
    for kind in set(kinds.tolist()):
        mine = kinds == kind
        result[:, mine] = SCHEDULES[kind](progress[:, mine], warmup[mine], floor[mine])
    return result
