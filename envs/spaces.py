"""Spaces of a scenario."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from trimtab.envs.scenario import Scenario
from trimtab.errors import MismatchError
from trimtab.inner_training.signals import resolve_signals
from trimtab.inner_training.steering import Steering


def observation_space(scenario: Scenario) -> spaces.Box:
    """(S,) float32, each signal in its range."""
    signals = resolve_signals(scenario.signals)
    low = np.array([signal.low for signal in signals], dtype=np.float32)
    return spaces.Box(low, np.array([signal.high for signal in signals], dtype=np.float32), dtype=np.float32)


def action_space(scenario: Scenario) -> spaces.Space[Any]:
    """(L,) moves in [-1, 1], or {0, 1, 2} for down, hold and up."""
    levers = len(scenario.levers)
    if scenario.action == "multi-discrete":
        return spaces.MultiDiscrete([3] * levers)
    return spaces.Box(-1.0, 1.0, (levers,), dtype=np.float32)


def action_masks(scenario: Scenario, steering: Steering) -> np.ndarray:
    """(N, 3 L) bool, which of down, hold and up is legal now, lever by lever (see ``Steering.legal``).

    Raises:
        MismatchError: the scenario's actions are not ``multi-discrete``.
    """
    if scenario.action != "multi-discrete":
        raise MismatchError(f"actions are {scenario.action!r}, which cannot be masked; set action: multi-discrete")
    return steering.legal(scenario.levers).reshape(steering.num_runs, -1)
