"""Blocks for clipping from the history of gradient norms, and for clip and weight decay by the size of the model.

The originals look at the norm of every step and clip that step. Here a decision looks at the average norm of the last
interval's sampled steps, and the threshold that it sets holds for the whole next interval.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from trimtab.inner_training.formulas import FAST
from trimtab.inner_training.levers import CLIP_OFF, LEVERS
from trimtab.policies.rules.block import Block, Fields, Outcome, Seen, raw
from trimtab.policies.rules.options import number, whole

LEVEL = 2.0  # scale of the signal ``grad_level``
UNIT = 0.9  # weight per decision of the average norm that the lever is relative to


def new_norm(level: np.ndarray, started: np.ndarray, memory: Fields) -> tuple[np.ndarray, Fields]:
    """The newest gradient norm behind the signal ``grad_level``, which shows a short-term average.

    Args:
        level: (N,) short-term ln norm above its first value.
        started: (N,) bool, whether an interval has been measured.
        memory: ``count``, ``level`` and ``unit`` (N,) of the last decision.

    Returns:
        The norm (N,) over the first one, NaN where none was measured (an average that did not change), and the next
        ``count``, ``level`` and ``unit``; the last is the average norm that the lever is relative to.
    """
    count = memory["count"]
    measured = started & ((level != memory["level"]) | (count == 0))
    weight, before = 1 - FAST ** (count + 1), 1 - FAST**count
    newest = np.clip((weight * level - FAST * before * memory["level"]) / (1 - FAST), -30.0, 30.0)
    norm = np.where(measured, np.exp(newest), np.nan)
    share = (1 - UNIT) / (1 - UNIT ** (count + 1))
    unit = np.where(measured, memory["unit"] + share * (np.exp(newest) - memory["unit"]), memory["unit"])
    return norm, {"count": count + measured, "level": np.where(measured, level, memory["level"]), "unit": unit}


@dataclass(frozen=True, kw_only=True)
class HistoryClip(Block):
    """A clip at a threshold from the norms so far; what such blocks have in common.

    Attributes:
        warmup: measured intervals before it begins to clip, in [1, 100000].
    """

    warmup: int = 5
    lever = "grad_clip"
    signals = ("started", "grad_level")
    because = "its history puts the threshold at {:.2f} average gradient norms"

    def init(self, num_runs: int) -> Fields:
        return {name: np.zeros(num_runs) for name in ("count", "level", "unit")}

    @abstractmethod
    def threshold(self, norm: np.ndarray, memory: Fields) -> tuple[np.ndarray, Fields]:
        """Takes in the newest norm over the first one (N,), NaN for none.

        Returns:
            The threshold (N,) in the unit of the norms, and what changed in the memory.
        """

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del shared
        norm, counted = new_norm(raw(seen["grad_level"], LEVEL), seen["started"] > 0, memory)
        threshold, changed = self.threshold(norm, memory)
        # Until the first interval is over the average is 0, and so is the threshold.
        averages = np.divide(threshold, counted["unit"], out=np.full(len(norm), CLIP_OFF), where=counted["unit"] > 0)
        averages = np.where(counted["count"] >= self.warmup, averages, CLIP_OFF)
        factor = np.clip(averages / CLIP_OFF, LEVERS["grad_clip"].low, 1.0)
        return Outcome(contribution=factor, evidence=averages, memory={**memory, **counted, **changed})


@dataclass(frozen=True, kw_only=True)
class AutoClip(HistoryClip):
    """Clips at a percentile of the gradient norms so far.

    Attributes:
        percentile: in [0, 100].
        window: measured intervals that are remembered, in [1, 10000]; the original remembers every step.
        warmup: measured intervals before it begins to clip, in [1, 100000].
    """

    percentile: float = 10.0
    window: int = 200
    name = "autoclip"
    doc = "clips at a percentile of the gradient norms so far"
    source = "Seetharaman et al., AutoClip, arXiv 2007.14469"

    def __post_init__(self) -> None:
        whole("warmup", self.warmup, 1, 100_000)
        number("percentile", self.percentile, 0, 100)
        whole("window", self.window, 1, 10_000)

    def init(self, num_runs: int) -> Fields:
        return {**super().init(num_runs), "history": np.full((num_runs, self.window), np.nan)}

    def threshold(self, norm: np.ndarray, memory: Fields) -> tuple[np.ndarray, Fields]:
        history = memory["history"]
        shifted = np.concatenate([history[:, 1:], norm[:, None]], axis=1)
        history = np.where(np.isnan(norm)[:, None], history, shifted)
        # NaN sorts last. Linear between neighbours, as np.percentile.
        ordered, filled = np.sort(history, axis=1), np.isfinite(history).sum(1)
        place = np.maximum(filled - 1, 0) * self.percentile / 100
        below = np.floor(place).astype(np.int64)
        above, rows = np.minimum(below + 1, np.maximum(filled - 1, 0)), np.arange(len(norm))
        value = ordered[rows, below] + (place - below) * (ordered[rows, above] - ordered[rows, below])
        return np.where(filled > 0, value, 0.0), {"history": history}


@dataclass(frozen=True, kw_only=True)
class ZClip(HistoryClip):
    """Clips where the norm would be an outlier: at the mean plus ``z`` standard deviations, by exponential averages.

    Mean and variance begin as those of the first ``warmup`` norms, and an outlier enters them clipped, as in the
    original. That shortens an outlier to less than the threshold, by how far out it is; a threshold that is set before
    the step cannot.

    Attributes:
        z: standard deviations, in (0, 100].
        alpha: weight of the past in the averages, in (0, 1).
        warmup: measured intervals before it begins to clip, in [1, 100000].
    """

    z: float = 2.5
    alpha: float = 0.97
    name = "zclip"
    doc = "clips at the mean gradient norm plus 2.5 standard deviations"
    source = "Kumar et al., ZClip, arXiv 2504.02507"

    def __post_init__(self) -> None:
        whole("warmup", self.warmup, 1, 100_000)
        number("z", self.z, 1e-3, 100)
        number("alpha", self.alpha, 0.01, 0.9999)

    def init(self, num_runs: int) -> Fields:
        return {**super().init(num_runs), "mean": np.zeros(num_runs), "variance": np.zeros(num_runs)}

    def threshold(self, norm: np.ndarray, memory: Fields) -> tuple[np.ndarray, Fields]:
        count, mean, variance = memory["count"], memory["mean"], memory["variance"]
        measured, value = np.isfinite(norm), np.where(np.isfinite(norm), norm, 0.0)
        warming = count < self.warmup
        value = np.where(warming, value, np.minimum(value, mean + self.z * np.sqrt(variance)))
        # Welford's mean and variance while it warms up, exponential averages from then on.
        share = np.where(warming, 1 / (count + 1), 1 - self.alpha)
        new_mean = mean + share * (value - mean)
        spread = np.where(warming, (value - mean) * (value - new_mean), (value - new_mean) ** 2)
        mean = np.where(measured, new_mean, mean)
        variance = np.where(measured, variance + share * (spread - variance), variance)
        return mean + self.z * np.sqrt(variance), {"mean": mean, "variance": variance}


@dataclass(frozen=True, kw_only=True)
class SigmaClip(HistoryClip):
    """Clips four standard deviations above the mean of the ln gradient norm, by exponential averages.

    The original leaves such a step out; no lever can, so here it is shortened to the threshold.

    Attributes:
        sigmas: standard deviations, in (0, 100].
        decay: weight of the past in the averages, in (0, 1).
        warmup: measured intervals before it begins to clip, in [1, 100000].
        least: smallest standard deviation of the ln norm that is believed, >= 0.
    """

    sigmas: float = 4.0
    decay: float = 0.9
    least: float = 0.05
    name = "sigma-clip"
    doc = "clips four standard deviations above the mean ln gradient norm"
    source = "Chen et al., arXiv 1804.09849, adaptive gradient clipping"

    def __post_init__(self) -> None:
        whole("warmup", self.warmup, 1, 100_000)
        number("sigmas", self.sigmas, 1e-3, 100)
        number("decay", self.decay, 0.01, 0.9999)
        number("least", self.least, 0, 10)

    def init(self, num_runs: int) -> Fields:
        return {**super().init(num_runs), "mean": np.zeros(num_runs), "square": np.zeros(num_runs)}

    def threshold(self, norm: np.ndarray, memory: Fields) -> tuple[np.ndarray, Fields]:
        count, mean, square = memory["count"], memory["mean"], memory["square"]
        measured, value = np.isfinite(norm), np.log(np.where(np.isfinite(norm), norm, 1.0))
        share = np.where(measured, (1 - self.decay) / (1 - self.decay ** (count + 1)), 0.0)
        mean, square = mean + share * (value - mean), square + share * (value**2 - square)
        deviation = np.maximum(np.sqrt(np.maximum(square - mean**2, 0.0)), self.least)
        return np.exp(np.minimum(mean + self.sigmas * deviation, 60.0)), {"mean": mean, "square": square}


@dataclass(frozen=True, kw_only=True)
class ScaledClip(Block):
    """Clips the tighter, the more parameters a model has: at 10 average norms up to ``reference``, less beyond.

    Attributes:
        reference: number of parameters up to which it does not clip, >= 1.
        power: the threshold falls as (reference / parameters) to this power, in [0, 2].
        low: bound of the factor, in [0.03, 1].
    """

    reference: float = 1e4
    power: float = 0.25
    low: float = 0.1
    name = "scaled-clip"
    doc = "a clip that is the tighter, the more parameters the model has"
    lever = "grad_clip"
    signals = ("log_parameters",)
    because = "the model has {:.3g} parameters"

    def __post_init__(self) -> None:
        number("reference", self.reference, 1)
        number("power", self.power, 0, 2)
        number("low", self.low, 0.03, 1)

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del memory, shared
        parameters = 10.0 ** (10 * np.maximum(seen["log_parameters"], 0.0))
        factor = np.clip((self.reference / parameters) ** self.power, self.low, 1.0)
        return Outcome(contribution=factor, evidence=parameters)


@dataclass(frozen=True, kw_only=True)
class ScaledDecay(Block):
    """More weight decay, the more parameters a model has.

    Attributes:
        reference: number of parameters at which the base stays as it is, >= 1.
        power: the decay grows as (parameters / reference) to this power, in [0, 2].
        high: bound of the factor and of its reciprocal, in [1, 100].
    """

    reference: float = 1e4
    power: float = 0.25
    high: float = 10.0
    name = "scaled-decay"
    doc = "more weight decay, the more parameters the model has"
    source = "direction: Wang & Aitchison, arXiv 2405.13698; power and reference are ours"
    lever = "weight_decay"
    signals = ("log_parameters",)
    because = "the model has {:.3g} parameters"

    def __post_init__(self) -> None:
        number("reference", self.reference, 1)
        number("power", self.power, 0, 2)
        number("high", self.high, 1, 100)

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del memory, shared
        parameters = 10.0 ** (10 * np.maximum(seen["log_parameters"], 0.0))
        factor = np.clip((parameters / self.reference) ** self.power, 1 / self.high, self.high)
        factor = np.where(seen["log_parameters"] > 0, factor, 1.0)  # a size that is not known
        return Outcome(contribution=factor, evidence=parameters)
