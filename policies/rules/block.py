"""Blocks: the parts that rules are composed of. Each governs one lever, and all of them coordinate through one shared state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from trimtab.inner_training.formulas import unsquash
from trimtab.policies.policy import Kind

Fields = dict[str, np.ndarray]
Seen = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class SharedField:
    """One field of the shared state of a composite.

    Attributes:
        doc: what it is.
        initial: value at the start of a run.
        per_decision: what is added to it at the start of every decision; it does not pass 0 from above.
    """

    doc: str
    initial: float
    per_decision: float = 0.0


SHARED: Mapping[str, SharedField] = MappingProxyType(
    {
        "since_shock": SharedField(doc="decisions since the last shock", initial=np.inf, per_decision=1),
        "loss_before": SharedField(doc="ln loss / first loss just before the last shock, NaN unknown", initial=np.nan),
        "conservatism": SharedField(doc="factor in (0, 1] on the step size, which recovers to 1", initial=1.0),
        "since_shift": SharedField(doc="decisions since the last response to a shift", initial=np.inf, per_decision=1),
        "exploring": SharedField(doc="decisions for which to explore still", initial=0.0, per_decision=-1),
        "since_rewind": SharedField(doc="decisions since a block asked to rewind", initial=np.inf, per_decision=1),
        "restarts": SharedField(doc="restarts so far that lower the rate", initial=0.0),
        "since_reset": SharedField(doc="decisions since the moments were reset", initial=np.inf, per_decision=1),
    }
)


def fresh_shared(num_runs: int) -> Fields:
    """The shared state (N,) of runs that have not started."""
    return {name: np.full(num_runs, one.initial) for name, one in SHARED.items()}


def advance_shared(shared: Mapping[str, np.ndarray]) -> Fields:
    """The shared state one decision later."""
    after = {}
    for name, value in shared.items():
        step = SHARED[name].per_decision
        after[name] = np.maximum(value + step, 0.0) if step < 0 else value + step
    return after


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a block decided for N runs.

    Attributes:
        contribution: (N,) float64 factor >= 0 on its lever's target, or bool, whether its event fires.
        memory: the block's own next state, the fields of ``init``.
        evidence: (N,) the number that decided, for the sentence of ``Block.because``.
        acted: (N,) bool, whether the evidence is why it decided as it did; a contribution that changes without is on
            its way back. None is wherever the contribution changes.
        shared: fields of the shared state that it sets, a subset of ``Block.writes``.
    """

    contribution: np.ndarray
    evidence: np.ndarray
    memory: Fields = field(default_factory=dict)
    acted: np.ndarray | None = None
    shared: Fields = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Block(ABC):
    """A part of a rule that governs one lever; its options are the fields of the dataclass.

    Attributes:
        name: lower-case words with hyphens.
        doc: one line for tables.
        source: the paper or the practice that it follows; empty for ours.
        lever: the one that it governs.
        kind: ``"targets"`` for a factor on the lever's multiplier, ``"events"`` for a lever that fires.
        signals: names of those that it reads.
        because: why it acted, with one place for the evidence.
        writes: fields of the shared state that it may set.
        follows: fields of the shared state without which it does nothing, so that another block must set them.
    """

    name: ClassVar[str]
    doc: ClassVar[str]
    source: ClassVar[str] = ""
    lever: ClassVar[str]
    kind: ClassVar[Kind] = "targets"
    signals: ClassVar[tuple[str, ...]]
    because: ClassVar[str]
    writes: ClassVar[tuple[str, ...]] = ()
    follows: ClassVar[tuple[str, ...]] = ()

    def init(self, num_runs: int) -> Fields:
        """The block's own state, arrays with a leading axis of runs; without memory there is none."""
        del num_runs
        return {}

    @abstractmethod
    def step(self, seen: Seen, memory: Fields, shared: Fields) -> Outcome:
        """Decides for N runs at once.

        Args:
            seen: each of ``signals``, (N,) float64.
            memory: as ``init`` or the last step gave it; not to be modified.
            shared: the shared state, with what earlier blocks have set at this decision; not to be modified.
        """


def raw(signal: np.ndarray, scale: float) -> np.ndarray:
    """What a signal ``tanh(value / scale)`` was made of, (N,)."""
    return unsquash(signal, scale)


def recovering(factor: np.ndarray, share: float) -> np.ndarray:
    """A factor (N,) on its way back to 1: its logarithm shrinks to ``share``; exactly 1 once within 1 %."""
    back = factor**share
    return np.where(np.abs(back - 1) < 0.01, 1.0, back)
