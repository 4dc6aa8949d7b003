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
    scenario = SCENARIOS["digits-mlp-tanh"].replace(
        signals=list(SIGNALS), families=["digits-mlp-tanh", "graph"], missing={"measurements": 0}
    )
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


def test_measurements_are_missing_in_some_episodes_and_the_episode_is_the_same() -> None:
    names = ["activations_available", "curvature_available", "dormant", "overshoot", "grad_sparsity", "loss_level"]
    shown, hidden, some = (
        SCENARIOS["digits-mlp"].replace(signals=names, missing={"measurements": chance}) for chance in (0, 1, 0.5)
    )
    seen = []
    for one in (shown, hidden, some):
        episodes = Episodes(one, 8, mode="eager")
        episodes.reset(np.ones(8, dtype=bool), np.arange(8))
        assert not episodes.observations.any()
        seen.append(played(episodes, 2)[1])
    assert (seen[0][:, :2] == 1).all() and (seen[0][:, 4] != 0).all()
    assert not seen[1][:, :5].any()
    assert np.array_equal(seen[0][:, 5], seen[1][:, 5])
    there = seen[2][:, 0] == 1
    assert 0 < there.sum() < 8
    assert np.array_equal(seen[2], np.where(there[:, None], seen[0], seen[1]))


def test_what_nobody_measures_is_not_available() -> None:
    scenario = SCENARIOS["digits-mlp"].replace(signals=["activations_available", "curvature_available", "dormant"])
    episodes = Episodes(scenario.replace(missing={"measurements": 0}), 2, mode="eager")
    episodes.reset(np.ones(2, dtype=bool), np.arange(2))
    assert played(episodes, 1)[0][:, :2].tolist() == [[1, 0]] * 2


def test_the_guard_measures_what_the_signals_are_not_shown() -> None:
    scenario = SCENARIOS["digits-mlp"].replace(
        signals=["curvature_available"], missing={"measurements": 1}, guard={"curvature_share": 0.5}
    )
    episodes = Episodes(scenario, 12, mode="eager")
    episodes.reset(np.ones(12, dtype=bool), np.arange(12))
    assert not played(episodes, 1).any()
    adaptive = episodes.populations.reading(None, np.full(12, np.nan)).adaptive > 0
    assert adaptive.any() and (np.isfinite(episodes.steering.guard.ceiling) == ~adaptive).all()


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
