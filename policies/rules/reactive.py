"""Rules that react to the loss: plateau and greedy. Their memory is in the state, one row for each run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from trimtab.inner_training.formulas import LEVEL_SCALE, unsquash
from trimtab.inner_training.levers import LEVERS
from trimtab.policies.policy import Kind
from trimtab.policies.rules.options import number, whole

LR_TARGET: Mapping[str, Kind] = MappingProxyType({"lr": "targets"})


def _level(signal: np.ndarray) -> np.ndarray:
    """ln(loss / first training loss), (N,) float64, from the bounded signal."""
    return unsquash(signal.astype(np.float64), LEVEL_SCALE)


@dataclass(frozen=True, kw_only=True)
class PlateauRule:
    """Lowers the rate when the loss stops falling, as ``torch.optim.lr_scheduler.ReduceLROnPlateau`` does.

    It watches the validation loss once there is one, the short-term training loss before. A validation loss that
    has not been measured anew since the last decision counts for nothing, so ``patience`` and ``cooldown`` count
    measurements. The targets are absolute: the multiplier so far is kept in the state.

    Attributes:
        factor: of the multiplier at each reduction, in (0, 1).
        patience: measurements without improvement that are let pass, >= 0.
        threshold: relative improvement that counts: loss < best x (1 - threshold), in [0, 1).
        cooldown: measurements after a reduction during which none counts as bad, >= 0.
        min_lr: smallest multiplier, in [0, 1].
    """

    factor: float
    patience: int
    threshold: float
    cooldown: int
    min_lr: float
    name: ClassVar[str] = "plateau"
    signals: ClassVar[tuple[str, ...]] = ("started", "loss_level", "val_available", "val_level")
    levers: ClassVar[Mapping[str, Kind]] = LR_TARGET
    decide_every: ClassVar[int | None] = None

    def init(self, num_runs: int) -> dict[str, Any]:
        """Arrays of shape (num_runs,)."""
        return {
            "multiplier": np.ones(num_runs),
            "best": np.full(num_runs, np.inf),
            "bad": np.zeros(num_runs, dtype=np.int64),
            "cooling": np.zeros(num_runs, dtype=np.int64),
            "on_validation": np.zeros(num_runs, dtype=bool),
            "last_validation": np.full(num_runs, np.nan, dtype=np.float32),
        }

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Targets (N, 1) float64; see ``Policy.act``."""
        started, loss, available, validation = observations.T
        on_validation = available > 0
        # The two losses are not comparable: a run that changes from one to the other starts to compare afresh.
        changed = on_validation != state["on_validation"]
        best = np.where(changed, np.inf, state["best"])
        bad = np.where(changed, 0, state["bad"])

        level = _level(np.where(on_validation, validation, loss))
        measured = np.where(on_validation, validation != state["last_validation"], started > 0)
        improved = measured & (level < best + np.log1p(-self.threshold))
        best = np.where(improved, level, best)
        cooling = np.where(measured, np.maximum(state["cooling"] - 1, 0), state["cooling"])
        bad = np.where(measured, np.where(improved | (state["cooling"] > 0), 0, bad + 1), bad)

        reduce = bad > self.patience
        multiplier = state["multiplier"]
        multiplier = np.where(reduce, np.maximum(multiplier * self.factor, self.min_lr), multiplier)
        return multiplier[:, None].copy(), {
            "multiplier": multiplier,
            "best": best,
            "bad": np.where(reduce, 0, bad),
            "cooling": np.where(reduce, self.cooldown, cooling),
            "on_validation": on_validation,
            "last_validation": np.where(on_validation, validation, state["last_validation"]),
        }


@dataclass(frozen=True, kw_only=True)
class GreedyRule:
    """GreedyLR: raises the rate while the loss keeps improving, lowers it while it does not (arXiv 2512.14527).

    The counting is that of the authors' implementation in Hugging Face transformers: an improvement is a new best
    by more than ``threshold``. Losses are compared as ln(training loss / first loss), so that the threshold is
    relative, and the bounds are multipliers; there is no reset at the lower bound.

    Attributes:
        factor: divides the multiplier on a raise and multiplies it on a cut, in (0, 1).
        patience: decisions in a row, all better or all not, that are let pass before the rate changes, >= 0.
        threshold: smallest fall of the ln loss below its best that is an improvement, >= 0.
        cooldown: decisions without counting after a cut, >= 0.
        warmup: decisions without counting after a raise, >= 0.
        min_lr: smallest multiplier, in [0, 1].
        max_lr: largest multiplier, >= 1.
        window: decisions over which the ln loss is averaged, >= 1; 1 is no averaging.
    """

    factor: float
    patience: int
    threshold: float
    cooldown: int
    warmup: int
    min_lr: float
    max_lr: float
    window: int
    name: ClassVar[str] = "greedy"
    signals: ClassVar[tuple[str, ...]] = ("started", "loss_level")
    levers: ClassVar[Mapping[str, Kind]] = LR_TARGET
    decide_every: ClassVar[int | None] = None

    def init(self, num_runs: int) -> dict[str, Any]:
        """Arrays with a leading axis of ``num_runs``; ``recent`` holds the window, NaN where it is not full yet."""
        counters = ("good", "bad", "cooling", "warming")
        return {
            "multiplier": np.ones(num_runs),
            "best": np.full(num_runs, np.inf),
            "recent": np.full((num_runs, self.window), np.nan),
            **{name: np.zeros(num_runs, dtype=np.int64) for name in counters},
        }

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Targets (N, 1) float64; see ``Policy.act``."""
        seen = observations[:, 0] > 0
        shifted = np.concatenate([state["recent"][:, 1:], _level(observations[:, 1])[:, None]], axis=1)
        recent = np.where(seen[:, None], shifted, state["recent"])
        filled = np.isfinite(recent)
        level = np.where(filled, recent, 0.0).sum(1) / np.maximum(filled.sum(1), 1)

        # Cooling comes first, then warming; a run that does either forgets its counts.
        cooling, warming = seen & (state["cooling"] > 0), seen & (state["cooling"] == 0) & (state["warming"] > 0)
        counts = seen & ~cooling & ~warming
        better = counts & (level < state["best"] - self.threshold)
        good = np.where(seen, np.where(better, state["good"] + 1, 0), state["good"])
        bad = np.where(seen, np.where(counts & ~better, state["bad"] + 1, 0), state["bad"])

        lift, cut = good > self.patience, bad > self.patience
        multiplier = state["multiplier"]
        multiplier = np.where(lift, np.minimum(multiplier / self.factor, self.max_lr), multiplier)
        multiplier = np.where(cut, np.maximum(multiplier * self.factor, self.min_lr), multiplier)
        return multiplier[:, None].copy(), {
            "multiplier": multiplier,
            "best": np.where(better, level, state["best"]),
            "recent": recent,
            "good": np.where(lift, 0, good),
            "bad": np.where(cut, 0, bad),
            "cooling": np.where(cut, self.cooldown, state["cooling"] - cooling),
            "warming": np.where(lift, self.warmup, state["warming"] - warming),
        }


def plateau(
    *, factor: float = 0.5, patience: int = 5, threshold: float = 1e-4, cooldown: int = 0, min_lr: float = 0.0
) -> PlateauRule:
    """Halves the rate after more than 5 measurements without improvement.

    ``threshold``, ``cooldown`` and ``min_lr`` have torch's defaults. ``factor`` (torch: 0.1) and ``patience``
    (torch: 10 epochs) suit decisions that come every few steps, from losses that are noisy.
    """
    return PlateauRule(
        factor=number("factor", factor, 0.001, 0.999),
        patience=whole("patience", patience, 0),
        threshold=number("threshold", threshold, 0, 0.999),
        cooldown=whole("cooldown", cooldown, 0),
        min_lr=number("min_lr", min_lr, 0, 1),
    )


def greedy(
    *,
    factor: float = 0.8,
    patience: int = 0,
    threshold: float = 1e-6,
    cooldown: int = 0,
    warmup: int = 0,
    min_lr: float = LEVERS["lr"].low,
    max_lr: float = LEVERS["lr"].high,
    window: int = 1,
) -> GreedyRule:
    """Divides the rate by 0.8 when the loss is the best so far, else multiplies it by 0.8.

    ``threshold``, ``cooldown`` and ``warmup`` have the defaults of transformers. Those of ``factor`` (0.95) and
    ``patience`` (10) are for every step; ours are for decisions about every 10 steps. The signal is averaged
    already, hence a ``window`` of 1; ``min_lr`` and ``max_lr`` are the lever's own bounds.
    """
    return GreedyRule(
        factor=number("factor", factor, 0.001, 0.999),
        patience=whole("patience", patience, 0),
        threshold=number("threshold", threshold, 0),
        cooldown=whole("cooldown", cooldown, 0),
        warmup=whole("warmup", warmup, 0),
        min_lr=number("min_lr", min_lr, 0, 1),
        max_lr=number("max_lr", max_lr, 1),
        window=whole("window", window, 1, 10_000),
    )
