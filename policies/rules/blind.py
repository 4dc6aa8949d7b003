"""Rules that look at nothing: random moves, the control of every comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from trimtab.errors import UserError
from trimtab.inner_training.edits import movable
from trimtab.inner_training.levers import LEVERS
from trimtab.policies.policy import Kind
from trimtab.policies.rules.options import whole


@dataclass(frozen=True, kw_only=True)
class RandomRule:
    """Moves that are independent and uniform in [-1, 1].

    Each run has a stream of its own, counter-based (Philox; Salmon et al., SC 2011): the moves of decision k of
    stream r are a function of (seed, r, k), all three of them in the state.

    Attributes:
        levers: those that it moves.
        seed: key of all streams, in [0, 2**63).
    """

    levers: Mapping[str, Kind]
    seed: int
    name: ClassVar[str] = "random"
    signals: ClassVar[tuple[str, ...]] = ("started",)
    decide_every: ClassVar[int | None] = None

    def init(self, num_runs: int) -> dict[str, Any]:
        """Arrays of shape (num_runs,), int64; run r gets stream r."""
        return {
            "seed": np.full(num_runs, self.seed, dtype=np.int64),
            "stream": np.arange(num_runs, dtype=np.int64),
            "count": np.zeros(num_runs, dtype=np.int64),
        }

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Moves (N, L) float64 in [-1, 1]; see ``Policy.act``."""
        moves = np.empty((len(observations), len(self.levers)))
        rows = zip(state["seed"], state["stream"], state["count"], strict=True)
        for row, (seed, stream, count) in enumerate(rows):
            # The low word of the counter is left to the generator, for the numbers of one decision.
            bits = np.random.Philox(key=[seed, stream], counter=[0, count, 0, 0])
            moves[row] = np.random.Generator(bits).uniform(-1.0, 1.0, len(self.levers))
        return moves, {**state, "count": state["count"] + 1}


def random(*, seed: int = 0, levers: Sequence[str] | None = None) -> RandomRule:
    """Uniform moves on the named levers, or on every lever there is."""
    names = tuple(LEVERS) if levers is None else (levers,) if isinstance(levers, str) else tuple(levers)
    if not names or len(set(names)) < len(names):
        raise UserError(f"levers is {list(names)}; name each lever once, out of: {', '.join(LEVERS)}")
    return RandomRule(levers={lever.name: "moves" for lever in movable(names)}, seed=whole("seed", seed, 0, 2**63 - 1))
