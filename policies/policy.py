"""The policy protocol: signals in, an action for each lever out, all state explicit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

Kind = Literal["moves", "targets", "events"]
MOST_EVERY = 10**9  # optimizer steps between decisions: more than any run has


@runtime_checkable
class Policy(Protocol):
    """What decides. A hand-written one is a rule, an exported network is a learned policy.

    Set in all (plain attributes will do):
        name: for tables and audits.
        signals: names of the signals it reads, in the order of the observation's columns.
        levers: lever name to the kind of its action, in the order of the action's columns. ``"moves"`` are
            relative, in [-1, 1] in units of the lever's rate limit per decision, 0 holds; ``"targets"`` are absolute
            multipliers, >= 0, held only to the lever's absolute bounds; ``"events"`` (a name of ``events.EVENTS``) happen
            once where the action is at least 0.5, in any run.
        decide_every: optimizer steps between decisions that it wants in a live run, 1 to ``MOST_EVERY``, or None for no
            preference.

    A policy never keeps state between calls: what it remembers is in ``state``, a pytree of numpy arrays with a
    leading axis of runs (so that single runs can be reset), or an empty dict.
    """

    @property
    def name(self) -> str: ...

    @property
    def signals(self) -> tuple[str, ...]: ...

    @property
    def levers(self) -> Mapping[str, Kind]: ...

    @property
    def decide_every(self) -> int | None: ...

    def init(self, num_runs: int) -> dict[str, Any]:
        """State of ``num_runs`` runs that have not started."""
        ...

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Decides for N runs.

        Args:
            observations: (N, len(signals)) float32, each in [-1, 1].
            state: as returned by ``init`` or by the last ``act``; it is not modified.

        Returns:
            Actions (N, len(levers)) float64 or float32, and the next state.
        """
        ...
