"""Environments whose signals need further measurements."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.envs.catalogue import SCENARIOS
from trimtab.envs.episode import Episodes
from trimtab.envs.populations import Populations
from trimtab.inner_training.probe_signals import PROBE_ROWS

SIGNALS = tuple(signal.name for signal in PROBE_ROWS)


def played(episodes: Episodes, decisions: int) -> np.ndarray:
    nothing = np.zeros((episodes.num_envs, len(episodes.action_levers)))
    return np.array([episodes.step(nothing).observations.copy() for _ in range(decisions)])


def test_an_episode_is_observed_alike_whatever_came_before() -> None:
    scenario = SCENARIOS["digits-mlp-tanh"].replace(signals=list(SIGNALS), families=["digits-mlp-tanh", "graph"])
    fresh, used = (Episodes(scenario, 4, mode="eager") for _ in range(2))
    seeds, everyone = np.arange(4), np.ones(4, dtype=bool)
    fresh.reset(everyone, seeds)
    used.reset(everyone, seeds + 7)
    played(used, 3)
    used.reset(everyone, seeds)
    expected, found = played(fresh, 7), played(used, 7)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for name, column in zip(SIGNALS, np.moveaxis(expected, 2, 0), strict=True):
        digits, graphs = column[:, :2], column[:, 2:]
        assert (digits != 0).any() or name in ("saturation", "dormant"), name
        # The graph network has two matrices, and no activation that saturates.
        assert (graphs != 0).any() == (name not in ("update_ratio_middle", "saturation")), name
        if not name.startswith("update_ratio"):
            assert np.array_equal(column[0], column[4]) or name in ("sharpness", "curvature_max", "curvature_trace")


def test_signals_that_need_nothing_measure_nothing() -> None:
    episodes = Episodes(SCENARIOS["digits-mlp"], 2, mode="eager")
    episodes.reset(np.ones(2, dtype=bool), np.arange(2))
    measured, _ = episodes.populations.advance(4, 64)
    assert not measured.probed


def test_energy_is_that_of_the_device_that_the_runs_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr("trimtab.inner_training.energy.open_meter", asked.append)
    scenario = SCENARIOS["digits-mlp"].replace(signals=["energy"])
    there = Populations(scenario.families, 2, clip=True, mode="eager")
    monkeypatch.setattr(Populations, "device", torch.device("cuda", 3))
    episodes = Episodes(scenario, 2, populations=there)
    for _ in range(2):
        episodes.reset(np.ones(2, dtype=bool), np.arange(2))
    assert asked == [torch.device("cuda", 3)]
