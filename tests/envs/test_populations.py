"""Several populations as one row of runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.envs.tiny import scenario, sgd, tiny, wide
from trimtab.envs.populations import Populations, split_runs
from trimtab.errors import RangeError
from trimtab.inner_training.population import Population


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 60))
def test_splits_are_whole_positive_and_near_the_shares(shares: list[float], spare: int) -> None:
    num_runs = len(shares) + spare
    sizes = split_runs(num_runs, shares)
    assert sum(sizes) == num_runs
    assert min(sizes) >= 1
    exact = 1 + spare * np.array(shares) / sum(shares)
    assert np.abs(np.array(sizes) - exact).max() < 1 + 1e-6


def test_fewer_runs_than_families_are_refused() -> None:
    with pytest.raises(RangeError, match="num_envs is 2; it must be at least 3"):
        split_runs(2, [1, 1, 1])


def test_the_row_is_its_populations_side_by_side() -> None:
    families = scenario("tiny", "wide", "sgd").families
    row = Populations(families, 5, clip=True, mode="eager")
    alone = [Population(made(), size, mode="eager") for made, size in ((tiny, 2), (wide, 2), (sgd, 1))]
    seeds = np.arange(5)
    row.reset(np.ones(5, dtype=bool), seeds, held_out=False)
    starts = (0, 2, 4)
    for population, start in zip(alone, starts, strict=True):
        drawn = [population.family.draw(start + run, held_out=False) for run in range(population.num_runs)]
        population.reset(range(population.num_runs), drawn)
    factor = np.linspace(0.5, 2, 5)
    momentum = np.linspace(0.1, 0.5, 5)
    row.set_lr_multiplier(factor)
    row.set_hyperparameters({"momentum": momentum})
    for population, block in zip(alone, row.blocks, strict=True):
        population.set_lr_multiplier(factor[block])
        population.set_hyperparameters({"momentum": momentum[block]})

    measured, loss = row.advance(4, 64)
    telemetry = [population.advance(4).to_host() for population in alone]
    np.testing.assert_array_equal(measured.losses, np.concatenate([one.losses for one in telemetry], 1))
    np.testing.assert_array_equal(measured.grad_norm, np.concatenate([one.grad_norm for one in telemetry], 1))
    np.testing.assert_array_equal(measured.grad_dot, np.concatenate([one.grad_dot for one in telemetry]))
    expected = np.concatenate([one.evaluate("validation", 64).double().numpy() for one in alone])
    np.testing.assert_array_equal(loss, expected)
    np.testing.assert_array_equal(row.validation_loss(64, np.ones(5, dtype=bool)), expected)
    np.testing.assert_array_equal(
        row.test_loss(), np.concatenate([one.evaluate("test").double().numpy() for one in alone])
    )

    reading = row.reading(measured, loss)
    parts = [one.reading(None, np.zeros(one.num_runs)) for one in alone]
    for name in ("fresh", "step", "total_steps", "parameters", "batch_size", "depth", "adaptive", "initial_lr"):
        np.testing.assert_array_equal(getattr(reading, name), np.concatenate([getattr(part, name) for part in parts]))
    for name in ("lr", "momentum", "weight_decay"):
        np.testing.assert_array_equal(reading.base[name], np.concatenate([part.base[name] for part in parts]))
    assert [instance.key for instance in row.instances if instance] == [
        "tiny-6/train/0", "tiny-6/train/1", "tiny-9/train/2", "tiny-9/train/3", "tiny-6/train/4"
    ]  # fmt: skip


def test_only_populations_asked_for_are_evaluated() -> None:
    row = Populations(scenario("tiny", "wide").families, 4, clip=False, mode="eager")
    row.reset(np.ones(4, dtype=bool), np.arange(4), held_out=True)
    loss = row.validation_loss(64, np.array([False, False, True, False]))
    assert np.isnan(loss[:2]).all() and np.isfinite(loss[2:]).all()
    assert all(instance and "/held-out/" in instance.key for instance in row.instances)
