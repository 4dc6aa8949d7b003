"""Blocks that react to how stable a run is: noise, drift, agreement of gradients, curvature, saturation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.policies.rules.block import Block, Fields, Outcome, Seen, raw, recovering
from trimtab.policies.rules.options import number, whole

MARGIN_SCALE = 8.0  # of the signal ``stability_margin``


@dataclass(frozen=True, kw_only=True)
class Staged(Block):
    """Goes down one stage of the rate on a lasting drift of the validation loss or of the gradient norm, and back later.

    Attributes:
        drift: rise of the short-term ln validation loss above its best, > 0.
        shift: rise of the short-term ln gradient norm above the long-term one, > 0.
        patience: decisions in a row with either before a stage down, in [1, 100000].
        calm: decisions in a row with neither half of it before a stage up, in [1, 100000].
        factor: from one stage to the next, in (0, 1).
        stages: how many there are, in [1, 20].
    """

    drift: float = 0.03
    shift: float = 1.0
    patience: int = 3
    calm: int = 10
    factor: float = 0.5
    stages: int = 3
    name = "staged"
    doc = "a stage down when the validation loss or the gradient norm drifts up, and back when they are calm"
    lever = "lr"
    signals = ("val_available", "val_drift", "started", "grad_trend")
    because = "the larger of two rises, of the validation loss and of the gradient norm, is {:.2f} of its threshold"

    def __post_init__(self) -> None:
        number("drift", self.drift, 1e-6)
        number("shift", self.shift, 1e-6)
        whole("patience", self.patience, 1, 100_000)
        whole("calm", self.calm, 1, 100_000)
        number("factor", self.factor, 0.01, 0.99)
        whole("stages", self.stages, 1, 20)

    def init(self, num_runs: int) -> Fields:
        return {name: np.zeros(num_runs) for name in ("stage", "drifting", "quiet")}

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del shared
        drift = raw(seen["val_drift"], 0.3) * (seen["val_available"] > 0) / self.drift
        shift = raw(seen["grad_trend"], 1.0) * (seen["started"] > 0) / self.shift
        rise = np.maximum(drift, shift)
        drifting = np.where(rise > 1, memory["drifting"] + 1, 0)
        quiet = np.where(rise < 0.5, memory["quiet"] + 1, 0)  # between the two counts neither way: hysteresis
        down = (drifting >= self.patience) & (memory["stage"] < self.stages)
        up = (quiet >= self.calm) & (memory["stage"] > 0)
        stage = memory["stage"] + down - up
        after = {"stage": stage, "drifting": np.where(down, 0, drifting), "quiet": np.where(up, 0, quiet)}
        return Outcome(contribution=self.factor**stage, evidence=rise, memory=after)


@dataclass(frozen=True, kw_only=True)
class VarianceCare(Block):
    """Takes smaller steps while the gradient is noisier than it usually was.

    Attributes:
        threshold: rise of the share of noise in the squared gradient above its long-term average, in (0, 1].
        factor: on the rate at each decision of such a rise, in (0, 1].
        low: bound of their product, in (0, 1].
        usual: weight per decision of the long-term average, in (0, 1).
        recovery: share of the ln factor that is left after a decision without, in [0, 1).
    """

    threshold: float = 0.2
    factor: float = 0.8
    low: float = 0.4
    usual: float = 0.9
    recovery: float = 0.8
    name = "variance-care"
    doc = "smaller steps while the gradient is noisier than usual"
    source = "the noise of McCandlish et al., arXiv 1812.06162; the rule is ours"
    lever = "lr"
    signals = ("started", "grad_variance")
    because = "the share of noise in the gradient is {:.2f} above its usual"

    def __post_init__(self) -> None:
        number("threshold", self.threshold, 1e-6, 1)
        number("factor", self.factor, 0.01, 1)
        number("low", self.low, 0.001, 1)
        number("usual", self.usual, 0.01, 0.999)
        number("recovery", self.recovery, 0, 0.999)

    def init(self, num_runs: int) -> Fields:
        return {"usual": np.full(num_runs, np.nan), "factor": np.ones(num_runs)}

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del shared
        started, share = seen["started"] > 0, (seen["grad_variance"] + 1) / 2
        before = np.where(np.isnan(memory["usual"]), share, memory["usual"])
        rise = share - before
        care = started & (rise > self.threshold)
        lower = np.maximum(memory["factor"] * self.factor, self.low)
        factor = np.where(care, lower, recovering(memory["factor"], self.recovery))
        usual = np.where(started, self.usual * before + (1 - self.usual) * share, memory["usual"])
        return Outcome(contribution=factor, evidence=rise, memory={"usual": usual, "factor": factor}, acted=care)


@dataclass(frozen=True, kw_only=True)
class Hypergradient(Block):
    """Raises the rate while successive gradients agree, and lowers it while they oppose each other.

    The derivative of the loss with respect to the last learning rate of SGD is minus the inner product of two
    successive gradients (Baydin et al., arXiv 1703.04782). Its sign decides here, once per decision, from the averaged
    cosine of the sampled pairs; a cosine within the dead band holds the rate.

    Attributes:
        rate: change of the ln rate per decision, in (0, 1].
        band: half width of the dead band, in [0, 1].
        low, high: bounds of the product, low in (0, 1], high >= 1.
    """

    rate: float = 0.1
    band: float = 0.05
    low: float = 0.05
    high: float = 20.0
    name = "hypergradient"
    doc = "raises the rate while successive gradients agree, lowers it while they oppose"
    source = "Baydin et al., arXiv 1703.04782, by sign"
    lever = "lr"
    signals = ("started", "grad_cosine")
    because = "the cosine of successive gradients is {:.2f}"

    def __post_init__(self) -> None:
        number("rate", self.rate, 1e-4, 1)
        number("band", self.band, 0, 1)
        number("low", self.low, 1e-4, 1)
        number("high", self.high, 1, 1e4)

    def init(self, num_runs: int) -> Fields:
        return {"factor": np.ones(num_runs)}

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del shared
        cosine = seen["grad_cosine"] * (seen["started"] > 0)
        direction = np.sign(cosine) * (np.abs(cosine) > self.band)
        moved = np.clip(memory["factor"] * np.exp(self.rate * direction), self.low, self.high)
        factor = np.where(direction == 0, memory["factor"], moved)
        return Outcome(contribution=factor, evidence=cosine, memory={"factor": factor})


@dataclass(frozen=True, kw_only=True)
class EdgeCap(Block):
    """Holds the rate below a share of the edge of stability, as far as curvature has been measured.

    For SGD the share is 2 to the power of minus the stability margin, for the adaptive rules what curvature takes back
    of a step's first-order descent; at the edge both are 1. Only populations measure curvature.

    Attributes:
        share: of the edge that is allowed, in (0, 10].
        low: bound of the factor, in (0, 1].
        most: largest cut of one decision, in (0, 1).
        recovery: share of the ln factor that is left after a decision at less than half the share, in [0, 1).
    """

    share: float = 1.0
    low: float = 0.01
    most: float = 0.5
    recovery: float = 0.9
    name = "edge-cap"
    doc = "holds the rate below a share of the edge of stability, where curvature is measured"
    source = "Cohen et al., arXiv 2103.00065"
    lever = "lr"
    signals = ("curvature_available", "adaptive", "stability_margin", "overshoot")
    because = "the step is at {:.2f} of the edge of stability"

    def __post_init__(self) -> None:
        number("share", self.share, 1e-3, 10)
        number("low", self.low, 1e-4, 1)
        number("most", self.most, 0.01, 0.99)
        number("recovery", self.recovery, 0, 0.999)

    def init(self, num_runs: int) -> Fields:
        return {"factor": np.ones(num_runs), "last": np.zeros(num_runs)}

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del shared
        reading = np.where(seen["adaptive"] > 0, seen["overshoot"], seen["stability_margin"])
        # Overshoot is held between its measurements, and knows nothing of what the rate has done since.
        fresh = (seen["curvature_available"] > 0) & (reading != memory["last"]) & (reading != 0)
        by_margin = 2.0 ** -np.clip(raw(seen["stability_margin"], MARGIN_SCALE), -20, 20)
        by_overshoot = 10.0 ** (raw(seen["overshoot"], 1.0) - 1)
        share = np.where(seen["adaptive"] > 0, by_overshoot, by_margin)
        cut = np.clip(self.share / np.maximum(share, 1e-12), self.most, 1.0)
        over = fresh & (share > self.share)
        factor = np.where(over, np.maximum(memory["factor"] * cut, self.low), memory["factor"])
        far = fresh & (share < self.share / 2)
        factor = np.where(far, recovering(factor, self.recovery), factor)
        after = {"factor": factor, "last": np.where(fresh, reading, memory["last"])}
        return Outcome(contribution=factor, evidence=share, memory=after, acted=over)


@dataclass(frozen=True, kw_only=True)
class SaturationMomentum(Block):
    """Takes momentum out for a moment when the share of saturated activations changes.

    A change of saturation means that the weights moved far along one direction; what momentum still carries that way
    was gathered before. ``1 - momentum`` is multiplied, and goes back to what it was over ``span`` decisions.

    Attributes:
        change: of the share of saturated outputs against its average, in either direction, in (0, 1].
        factor: on ``1 - momentum``, in [0.1, 10].
        span: decisions until it is back, in [1, 100000].
    """

    change: float = 0.05
    factor: float = 2.0
    span: int = 5
    name = "saturation-momentum"
    doc = "less momentum for a moment when the share of saturated activations changes"
    lever = "momentum"
    signals = ("activations_available", "saturation")
    because = "the share of saturated activations changed by {:+.2f}"

    def __post_init__(self) -> None:
        number("change", self.change, 1e-6, 1)
        number("factor", self.factor, 0.1, 10)
        whole("span", self.span, 1, 100_000)

    def init(self, num_runs: int) -> Fields:
        return {"usual": np.full(num_runs, np.nan), "left": np.zeros(num_runs)}

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del shared
        known, share = seen["activations_available"] > 0, seen["saturation"]
        usual = np.where(np.isnan(memory["usual"]), share, memory["usual"])
        change = np.where(known, share - usual, 0.0)
        moved = np.abs(change) > self.change
        left = np.where(moved, self.span, np.maximum(memory["left"] - 1, 0))
        # After a move the new share is the usual one: one change is answered once.
        after = np.where(moved, share, 0.8 * usual + 0.2 * share)
        memory = {"usual": np.where(known, after, memory["usual"]), "left": left}
        contribution = self.factor ** (left / self.span)
        return Outcome(contribution=contribution, evidence=change, memory=memory, acted=moved)
