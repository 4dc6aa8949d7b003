"""Blocks that answer shocks: caution after a spike, rewinding, restarting at a lower rate, forgetting moments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.inner_training.formulas import LEVEL_SCALE
from trimtab.policies.policy import Kind
from trimtab.policies.rules.block import Block, Fields, Outcome, Seen, raw, recovering
from trimtab.policies.rules.options import number, whole

EVENTS: Kind = "events"
SPIKE_SCALE = 4.0  # of the signal ``spike``
BEST_SCALE = 0.3  # of the signal ``loss_above_best``


@dataclass(frozen=True, kw_only=True)
class SpikeCare(Block):
    """Asks for smaller steps when the loss spikes or the guard has rolled back; ``conservatism`` takes them.

    Attributes:
        z: a spike is an interval whose worst ln loss is so many usual distances above its long-term average, > 0.
        factor: on the conservatism at each spike, in (0, 1].
        low: bound of the conservatism, in (0, 1].
    """

    z: float = 6.0
    factor: float = 0.5
    low: float = 0.1
    name = "spike-care"
    doc = "asks for smaller steps when the loss spikes"
    source = "z-score as in ZClip, arXiv 2504.02507"
    lever = "lr"
    signals = ("started", "spike", "loss_level", "rolled_back")
    because = "the worst loss is {:.1f} usual distances above its average"
    writes = ("since_shock", "loss_before", "conservatism")

    def __post_init__(self) -> None:
        number("z", self.z, 1e-3)
        number("factor", self.factor, 0.01, 1)
        number("low", self.low, 0.001, 1)

    def init(self, num_runs: int) -> Fields:
        return {"level": np.full(num_runs, np.nan)}

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        started, level = seen["started"] > 0, raw(seen["loss_level"], LEVEL_SCALE)
        height = raw(seen["spike"], SPIKE_SCALE)
        spike = started & (height > self.z)
        shock = spike | (started & (seen["rolled_back"] > 0))
        lower = np.maximum(shared["conservatism"] * self.factor, self.low)
        # A second spike before the first is over does not make its height the level to return to.
        begins = shock & ((shared["conservatism"] == 1) | np.isnan(shared["loss_before"]))
        return Outcome(
            contribution=np.ones(len(height)),
            evidence=height,
            memory={"level": np.where(started & ~shock, level, memory["level"])},
            acted=shock,
            shared={
                "since_shock": np.where(shock, 0.0, shared["since_shock"]),
                "loss_before": np.where(begins, memory["level"], shared["loss_before"]),
                "conservatism": np.where(spike, np.minimum(lower, shared["conservatism"]), shared["conservatism"]),
            },
        )


@dataclass(frozen=True, kw_only=True)
class Conservatism(Block):
    """Step-size conservatism as a mode: a shared factor on the rate that others set, and that goes back to 1.

    It goes back once the loss is back where it was before the shock, or after ``patience`` decisions.

    Attributes:
        recovery: share of the ln factor that is left after a calm decision, in [0, 1).
        margin: ln loss above that before the shock that counts as back, >= 0.
        patience: decisions, in [0, 100000].
    """

    recovery: float = 0.8
    margin: float = 0.05
    patience: int = 10
    name = "conservatism"
    doc = "a mode of smaller steps, asked for by other blocks and left gradually"
    lever = "lr"
    signals = ("started", "loss_level")
    because = "other blocks asked for a step size of {:.2f}"
    writes = ("conservatism",)
    follows = ("conservatism",)

    def __post_init__(self) -> None:
        number("recovery", self.recovery, 0, 0.999)
        number("margin", self.margin, 0)
        whole("patience", self.patience, 0, 100_000)

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del memory
        now, before = shared["conservatism"], shared["loss_before"]
        above = raw(seen["loss_level"], LEVEL_SCALE) - np.where(np.isnan(before), np.inf, before)
        calm = (shared["since_shock"] > 0) & ((above <= self.margin) | (shared["since_shock"] > self.patience))
        factor = np.where(calm, recovering(now, self.recovery), now)
        asked = (now < 1) & (shared["since_shock"] == 0)
        return Outcome(contribution=factor, evidence=now, shared={"conservatism": factor}, acted=asked)


@dataclass(frozen=True, kw_only=True)
class PalmRewind(Block):
    """Goes back to before a loss spike, and on with the data after it.

    PaLM was restarted from a checkpoint about 100 steps before a spike, and 200 to 500 batches were skipped. Here the
    last stable snapshot is restored, one or two decisions old, and the data go on, so what was seen since is skipped.

    Attributes:
        z: as in ``spike-care``, > 0.
        rise: the short-term ln loss must also be so far above its best, >= 0.
        cooldown: decisions between two rewinds, in [1, 100000].
    """

    z: float = 6.0
    rise: float = 0.3
    cooldown: int = 5
    name = "palm-rewind"
    doc = "goes back to before a loss spike, and on with the data after it"
    source = "Chowdhery et al., PaLM, arXiv 2204.02311, section 5.1"
    lever = "rollback"
    kind = EVENTS
    signals = ("started", "spike", "loss_above_best", "rolled_back")
    because = "the worst loss is {:.1f} usual distances above its average"
    writes = ("since_shock", "since_rewind")

    def __post_init__(self) -> None:
        number("z", self.z, 1e-3)
        number("rise", self.rise, 0)
        whole("cooldown", self.cooldown, 1, 100_000)

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del memory
        height, risen = raw(seen["spike"], SPIKE_SCALE), raw(seen["loss_above_best"], BEST_SCALE)
        ready = (seen["started"] > 0) & (seen["rolled_back"] <= 0) & (shared["since_rewind"] >= self.cooldown)
        fire = ready & (height > self.z) & (risen > self.rise)
        names = ("since_shock", "since_rewind")
        return Outcome(
            contribution=fire, evidence=height, shared={name: np.where(fire, 0.0, shared[name]) for name in names}
        )


@dataclass(frozen=True, kw_only=True)
class OptRestart(Block):
    """Goes back when the loss stays high; ``restart-rate`` then goes on at a lower rate, as OPT-175B was restarted.

    Attributes:
        rise: how far the short-term ln loss is above its best when it is high, > 0.
        patience: decisions in a row for which it is, in [1, 100000].
        cooldown: decisions between two restarts, in [1, 100000].
        most: restarts at most, in [1, 1000].
    """

    rise: float = 0.5
    patience: int = 3
    cooldown: int = 10
    most: int = 4
    name = "opt-restart"
    doc = "goes back when the loss stays high, to go on at a lower rate"
    source = "Zhang et al., OPT, arXiv 2205.01068, section 2.5"
    lever = "rollback"
    kind = EVENTS
    signals = ("started", "loss_above_best", "rolled_back")
    because = "the ln loss is {:.2f} above its best and stays there"
    writes = ("since_shock", "since_rewind", "restarts")

    def __post_init__(self) -> None:
        number("rise", self.rise, 1e-6)
        whole("patience", self.patience, 1, 100_000)
        whole("cooldown", self.cooldown, 1, 100_000)
        whole("most", self.most, 1, 1000)

    def init(self, num_runs: int) -> Fields:
        return {"high": np.zeros(num_runs), "fired": np.zeros(num_runs)}

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        risen = raw(seen["loss_above_best"], BEST_SCALE)
        above = (seen["started"] > 0) & (seen["rolled_back"] <= 0) & (risen > self.rise)
        high = np.where(above, memory["high"] + 1, 0)
        fire = (high >= self.patience) & (shared["since_rewind"] >= self.cooldown) & (memory["fired"] < self.most)
        names = ("since_shock", "since_rewind")
        return Outcome(
            contribution=fire,
            evidence=risen,
            memory={"high": np.where(fire, 0, high), "fired": memory["fired"] + fire},
            shared={
                **{name: np.where(fire, 0.0, shared[name]) for name in names},
                "restarts": shared["restarts"] + fire,
            },
        )


@dataclass(frozen=True, kw_only=True)
class RestartRate(Block):
    """A lower rate after each restart, for good.

    Attributes:
        factor: on the rate at each restart, in (0, 1].
        low: bound of their product, in (0, 1].
    """

    factor: float = 0.5
    low: float = 0.05
    name = "restart-rate"
    doc = "a lower rate after each restart, for good"
    source = "Zhang et al., OPT, arXiv 2205.01068, section 2.5"
    lever = "lr"
    signals = ("started",)
    because = "the run was restarted {:.0f} times"
    follows = ("restarts",)

    def __post_init__(self) -> None:
        number("factor", self.factor, 0.01, 1)
        number("low", self.low, 0.001, 1)

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del seen, memory
        restarts = shared["restarts"]
        lower = np.maximum(self.factor**restarts, self.low)
        return Outcome(contribution=lower, evidence=restarts)


@dataclass(frozen=True, kw_only=True)
class MomentReset(Block):
    """Sets the optimizer's moments to zero, at an interval and when gradients spike, as SPAM does.

    SPAM resets every 500 steps, and clips single spiked elements of the gradient, which no lever here can.

    Attributes:
        every: decisions between two resets without a spike, in [1, 1000000]; 50 are 500 steps at 10 a decision.
        rise: short-term ln gradient norm above the long-term one that is a spike, > 0.
        cooldown: decisions between two resets with one, in [1, 100000].
    """

    every: int = 50
    rise: float = 1.0
    cooldown: int = 5
    name = "moment-reset"
    doc = "sets the optimizer's moments to zero at an interval, and when gradients spike"
    source = "Huang et al., SPAM, arXiv 2501.06842"
    lever = "reset_moments"
    kind = EVENTS
    signals = ("started", "grad_trend")
    because = "the ln gradient norm is {:.2f} above its long-term average, or it was time to"
    writes = ("since_reset",)

    def __post_init__(self) -> None:
        whole("every", self.every, 1, 1_000_000)
        number("rise", self.rise, 1e-6)
        whole("cooldown", self.cooldown, 1, 100_000)

    def init(self, num_runs: int) -> Fields:
        return {"age": np.zeros(num_runs)}

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        started, risen = seen["started"] > 0, raw(seen["grad_trend"], 1.0)
        age = memory["age"] + started
        fire = started & ((age >= self.every) | ((age >= self.cooldown) & (risen > self.rise)))
        return Outcome(
            contribution=fire,
            evidence=risen,
            memory={"age": np.where(fire, 0.0, age)},
            shared={"since_reset": np.where(fire, 0.0, shared["since_reset"])},
        )


@dataclass(frozen=True, kw_only=True)
class WarmReturn(Block):
    """A cosine warm-up of the rate after the moments were reset.

    Attributes:
        span: decisions until the rate is back, in [1, 100000]; 15 are SPAM's 150 steps at 10 a decision.
    """

    span: int = 15
    name = "warm-return"
    doc = "a cosine warm-up after the moments were reset"
    source = "Huang et al., SPAM, arXiv 2501.06842"
    lever = "lr"
    signals = ("started",)
    because = "the moments were reset {:.0f} decisions ago"
    follows = ("since_reset",)

    def __post_init__(self) -> None:
        whole("span", self.span, 1, 100_000)

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del seen, memory
        since = shared["since_reset"]
        share = np.minimum((since + 1) / (self.span + 1), 1.0)
        return Outcome(contribution=(1 - np.cos(np.pi * share)) / 2, evidence=np.minimum(since, 1e9), acted=since == 0)
