"""Blocks that pace the learning rate: schedules, plateaus of the validation loss, and a fast start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.errors import unknown
from trimtab.inner_training.formulas import LEVEL_SCALE
from trimtab.inner_training.schedules import SCHEDULES
from trimtab.policies.rules.block import Block, Fields, Outcome, Seen, raw, recovering
from trimtab.policies.rules.options import number, whole
from trimtab.policies.rules.schedules import schedule_factor


@dataclass(frozen=True, kw_only=True)
class Schedule(Block):
    """Any schedule. It follows progress decision by decision, not step by step as the schedule rules do.

    Attributes:
        schedule: a name of ``trimtab.inner_training.schedules.SCHEDULES``.
        warmup: share of the budget spent in warm-up (kinds with warm-up), in [0, 0.99].
        floor: final factor of the decaying kinds, in [0, 1].
    """

    schedule: str = "cosine"
    warmup: float = 0.1
    floor: float = 0.0
    name = "schedule"
    doc = "any schedule of the table, decision by decision"
    source = "Loshchilov & Hutter, arXiv 1608.03983"
    lever = "lr"
    signals = ("progress", "progress_available")
    because = "progress is {:.3f}"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        number("warmup", self.warmup, 0, 0.99)
        number("floor", self.floor, 0, 1)

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del memory, shared
        progress, known = seen["progress"], seen["progress_available"]
        factor = schedule_factor(self.schedule, progress, known, self.warmup, self.floor)
        return Outcome(contribution=np.maximum(factor, 0.0), evidence=progress)


@dataclass(frozen=True, kw_only=True)
class ScaleSchedule(Block):
    """Decays the rate the more, the larger the model is: half a cosine to the power of e, which grows with its size.

    e is 0 at ``small`` parameters and below, and 1 at ``large``; between and beyond it goes with the logarithm, to
    at most 2.

    Attributes:
        small, large: numbers of parameters, 1 <= small < large.
        floor: of the half cosine, in (0, 1].
    """

    small: float = 1e4
    large: float = 1e8
    floor: float = 0.01
    name = "scale-schedule"
    doc = "a cosine that falls the deeper, the more parameters the model has"
    source = "ours; smaller rates for larger models: Brown et al., arXiv 2005.14165, table 2.1"
    lever = "lr"
    signals = ("progress", "progress_available", "log_parameters")
    because = "the run is at {:.3f} of its budget"

    def __post_init__(self) -> None:
        number("small", self.small, 1)
        number("large", self.large, self.small * 1.001)
        number("floor", self.floor, 1e-6, 1)

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del memory, shared
        progress = seen["progress"]
        cosine = schedule_factor("cosine", progress, seen["progress_available"], 0.0, self.floor)
        decades = 10 * seen["log_parameters"] - np.log10(self.small)
        power = np.clip(decades / np.log10(self.large / self.small), 0.0, 2.0)
        return Outcome(contribution=np.clip(cosine, self.floor, 1.0) ** power, evidence=progress)


@dataclass(frozen=True, kw_only=True)
class PlateauNudge(Block):
    """Nudges the rate when the validation loss has stopped moving, judged against a window and not against its best.

    The median of the last ``window`` validation losses is compared with that of the ``window`` before. A recovery from
    a spike is movement, where a comparison with the best ever calls it a plateau. Where gradients are mostly noise the
    rate goes down, since the noise is what holds the loss up; where they agree it goes up. After a nudge the windows
    begin afresh. Before the first validation loss it watches the short-term training loss.

    Attributes:
        window: measurements in each window, in [1, 1000].
        threshold: change of the ln loss from window to window that is none, > 0.
        noise: share of noise in the squared gradient from which on the rate goes down, in [0, 1].
        down, up: factors of a nudge; down in (0, 1], up in [1, 10].
        low, high: bounds of the product of all nudges, low in (0, 1], high >= 1.
    """

    window: int = 4
    threshold: float = 0.01
    noise: float = 0.5
    down: float = 0.7
    up: float = 1.4
    low: float = 0.05
    high: float = 20.0
    name = "plateau-nudge"
    doc = "nudges the rate when the validation loss stops moving from one window to the next"
    source = "ours; after torch.optim.lr_scheduler.ReduceLROnPlateau"
    lever = "lr"
    signals = ("started", "loss_level", "val_available", "val_level", "grad_variance")
    because = "the ln loss moved by {:.4f} from one window to the next"

    def __post_init__(self) -> None:
        whole("window", self.window, 1, 1000)
        number("threshold", self.threshold, 1e-9)
        number("noise", self.noise, 0, 1)
        number("down", self.down, 0.001, 1)
        number("up", self.up, 1, 10)
        number("low", self.low, 1e-4, 1)
        number("high", self.high, 1, 1e4)

    def init(self, num_runs: int) -> Fields:
        return {
            "factor": np.ones(num_runs),
            "recent": np.full((num_runs, 2 * self.window), np.nan),
            "on_validation": np.zeros(num_runs, dtype=bool),
            "last_validation": np.full(num_runs, np.nan),
        }

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del shared
        validation, on_validation = seen["val_level"], np.greater(seen["val_available"], 0)
        fresh = np.not_equal(validation, memory["last_validation"])
        measured = np.where(on_validation, fresh, seen["started"] > 0)
        level = raw(np.where(on_validation, validation, seen["loss_level"]), LEVEL_SCALE)
        changed = np.not_equal(on_validation, memory["on_validation"])  # the two losses are not comparable
        recent = np.where(changed[:, None], np.nan, memory["recent"])
        shifted = np.concatenate([recent[:, 1:], level[:, None]], axis=1)
        recent = np.where(measured[:, None], shifted, recent)
        full = np.isfinite(recent.sum(1))
        windows = np.where(full[:, None], recent, 0.0).reshape(-1, 2, self.window)
        moved = np.median(windows[:, 1], axis=1) - np.median(windows[:, 0], axis=1)
        flat = full & measured & (np.abs(moved) < self.threshold)
        nudge = np.where((seen["grad_variance"] + 1) / 2 >= self.noise, self.down, self.up)
        factor = np.where(flat, np.clip(memory["factor"] * nudge, self.low, self.high), memory["factor"])
        after = {
            "factor": factor,
            "recent": np.where(flat[:, None], np.nan, recent),
            "on_validation": on_validation,
            "last_validation": np.where(on_validation, validation, memory["last_validation"]),
        }
        return Outcome(contribution=factor, evidence=moved, memory=after)


@dataclass(frozen=True, kw_only=True)
class Deceleration(Block):
    """Slows down a little while the loss falls very fast at the start, so that the run does not overshoot.

    Attributes:
        span: decisions from the start on in which it acts, in [1, 100000].
        threshold: how far the short-term ln loss is below the long-term one when it falls fast, > 0.
        factor: on the rate, in (0, 1].
        recovery: share of the ln factor that is left after a decision at which the loss falls slowly, in [0, 1).
    """

    span: int = 15
    threshold: float = 0.3
    factor: float = 0.8
    recovery: float = 0.7
    name = "deceleration"
    doc = "a slightly lower rate while the loss falls very fast at the start"
    lever = "lr"
    signals = ("started", "loss_slope")
    because = "the short-term ln loss is {:.2f} below the long-term one"

    def __post_init__(self) -> None:
        whole("span", self.span, 1, 100_000)
        number("threshold", self.threshold, 1e-6)
        number("factor", self.factor, 0.01, 1)
        number("recovery", self.recovery, 0, 0.999)

    def init(self, num_runs: int) -> Fields:
        return {"age": np.zeros(num_runs), "factor": np.ones(num_runs)}

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del shared
        age = memory["age"] + (seen["started"] > 0)
        fall = -raw(seen["loss_slope"], 0.3)
        fast = (seen["started"] > 0) & (age <= self.span) & (fall > self.threshold)
        factor = np.where(fast, self.factor, recovering(memory["factor"], self.recovery))
        return Outcome(contribution=factor, evidence=fall, memory={"age": age, "factor": factor}, acted=fast)
