"""Blocks that answer a lasting shift of the data: explore, rebalance regularisation, keep what was learned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.policies.policy import Kind
from trimtab.policies.rules.block import Block, Fields, Outcome, Seen
from trimtab.policies.rules.options import number, whole

EVENTS: Kind = "events"


@dataclass(frozen=True, kw_only=True)
class ShiftResponse(Block):
    """What the answers to a lasting shift have in common: they set ``exploring`` and fade with it.

    A shift lasts when ``persistence`` says that what the last jump added to the loss stays. Whichever block comes first
    begins the answer; the others join in.

    Attributes:
        persistence: of the jump from which on it is lasting, in (0, 1].
        span: decisions of the answer, in [1, 100000].
        cooldown: decisions between the beginnings of two answers, in [1, 100000].
    """

    persistence: float = 0.4
    span: int = 10
    cooldown: int = 25
    source = "the answer is ours; the test: Page, Biometrika 41, 1954"
    signals = ("started", "persistence")
    because = "a jump of the loss stays (persistence {:.2f})"
    writes = ("exploring", "since_shift", "conservatism")

    def __post_init__(self) -> None:
        number("persistence", self.persistence, 1e-6, 1)
        whole("span", self.span, 1, 100_000)
        whole("cooldown", self.cooldown, 1, 100_000)

    def answer(self, seen: Seen, shared: Fields, factor: float) -> Outcome:
        """``factor`` to the power of the share of the answer that is left."""
        ready = (shared["exploring"] == 0) & (shared["since_shift"] >= self.cooldown)
        begins = (seen["started"] > 0) & ready & (seen["persistence"] >= self.persistence)
        exploring = np.where(begins, self.span, shared["exploring"])
        return Outcome(
            contribution=factor ** np.minimum(exploring / self.span, 1.0),
            evidence=seen["persistence"],
            acted=(exploring > 0) & ((shared["since_shift"] == 0) | begins),
            shared={
                "exploring": exploring,
                "since_shift": np.where(begins, 0.0, shared["since_shift"]),
                # Caution that waits for the loss to come back would wait in vain.
                "conservatism": np.where(begins, 1.0, shared["conservatism"]),
            },
        )


@dataclass(frozen=True, kw_only=True)
class Explore(ShiftResponse):
    """Raises the rate after a lasting shift, and lets it go back.

    Attributes:
        persistence, span, cooldown: see ``ShiftResponse``.
        factor: on the rate at the start of the answer, in [1, 100].
    """

    factor: float = 2.0
    name = "explore"
    doc = "a higher rate for a while after a lasting shift"
    lever = "lr"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("factor", self.factor, 1, 100)

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del memory
        return self.answer(seen, shared, self.factor)


@dataclass(frozen=True, kw_only=True)
class Rebalance(ShiftResponse):
    """Changes the weight decay after a lasting shift, and lets it go back.

    Attributes:
        persistence, span, cooldown: see ``ShiftResponse``.
        factor: on the weight decay at the start of the answer, in [0.01, 100].
    """

    factor: float = 3.0
    name = "rebalance"
    doc = "more weight decay for a while after a lasting shift"
    lever = "weight_decay"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("factor", self.factor, 0.01, 100)

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del memory
        return self.answer(seen, shared, self.factor)


@dataclass(frozen=True, kw_only=True)
class ExploreMomentum(Block):
    """Less momentum while others explore, so that what was gathered before the shift is forgotten sooner.

    Attributes:
        factor: on ``1 - momentum`` at the start of the answer, in [0.1, 10].
        span: decisions that count as a whole answer, in [1, 100000].
    """

    factor: float = 1.5
    span: int = 10
    name = "explore-momentum"
    doc = "less momentum while other blocks answer a shift"
    lever = "momentum"
    signals = ("started",)
    because = "the answer to a shift has {:.0f} decisions to go"
    follows = ("exploring",)

    def __post_init__(self) -> None:
        number("factor", self.factor, 0.1, 10)
        whole("span", self.span, 1, 100_000)

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del seen, memory
        left = shared["exploring"]
        factor = self.factor ** np.minimum(left / self.span, 1.0)
        return Outcome(contribution=factor, evidence=left, acted=(left > 0) & (shared["since_shift"] == 0))


@dataclass(frozen=True, kw_only=True)
class Anchor(Block):
    """Keeps what was learned when a task boundary is detected: the last stable weights become an anchor.

    It does not wait to see whether the shift lasts, since by then the last stable weights are of the new task.

    Attributes:
        score: of the shift from which on there is a boundary, in (0, 1].
        cooldown: decisions between two anchors, in [1, 100000].
    """

    score: float = 0.5
    cooldown: int = 10
    name = "anchor"
    doc = "anchors the weights to the last stable ones when a task boundary is detected"
    source = "towards earlier weights: Kirkpatrick et al., arXiv 1612.00796, unweighted; the test: Page, 1954"
    lever = "anchor"
    kind = EVENTS
    signals = ("started", "shift")
    because = "the score of a shift is {:.2f}"

    def __post_init__(self) -> None:
        number("score", self.score, 1e-6, 1)
        whole("cooldown", self.cooldown, 1, 100_000)

    def init(self, num_runs: int) -> Fields:
        return {"since": np.full(num_runs, np.inf)}

    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        del shared
        since = memory["since"] + 1
        fire = (seen["started"] > 0) & (seen["shift"] >= self.score) & (since >= self.cooldown)
        return Outcome(contribution=fire, evidence=seen["shift"], memory={"since": np.where(fire, 0.0, since)})
