"""Friedman's functions against scikit-learn's, and what the instances of the regression family hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, make_friedman1, make_friedman2, make_friedman3

from tests.inner_training.learning import learned
from trimtab.inner_training.task import Instance
from trimtab.inner_training.tasks import make_family
from trimtab.inner_training.tasks.regression import DATA, FUNCTIONS, PATIENTS, POINTS


def draws(count: int, *, held_out: bool) -> list[Instance]:
    return [make_family("regression").draw(seed, held_out=held_out) for seed in range(count)]


CIRCUIT = np.array([[0, 40 * np.pi, 0, 1], [100, 560 * np.pi, 1, 11]])


@pytest.mark.parametrize(
    ("name", "maker"), [("friedman1", make_friedman1), ("friedman2", make_friedman2), ("friedman3", make_friedman3)]
)
def test_functions_are_those_of_scikit_learn(name: str, maker: object) -> None:
    inputs, targets = maker(200, noise=0.0, random_state=0)  # type: ignore[operator]
    uniform = inputs if name == "friedman1" else (inputs - CIRCUIT[0]) / (CIRCUIT[1] - CIRCUIT[0])
    np.testing.assert_allclose(FUNCTIONS[name](uniform), targets, rtol=1e-9)


def test_every_kind_of_data_is_drawn() -> None:
    for held_out in (False, True):
        kinds = [one.traits["data_set"] for one in draws(200, held_out=held_out)]
        assert min(kinds.count(kind) for kind in DATA) > 20
        assert set(kinds) == set(DATA)


def test_inputs_are_standardised() -> None:
    table = make_family("regression").inputs
    assert table.shape == (PATIENTS + POINTS, 16)
    for rows, used in ((table[:PATIENTS], 10), (table[PATIENTS:], 16)):
        np.testing.assert_allclose(rows[:, :used].mean(0), 0, atol=0.1)
        np.testing.assert_allclose(rows[:, :used].std(0), 1, atol=0.05)
        assert not rows[:, used:].any()
    measured = load_diabetes().data
    np.testing.assert_allclose(table[:PATIENTS, :10], measured * np.sqrt(PATIENTS), atol=1e-3)


def test_targets_are_standardised_and_noise_is_on_training_ones_only() -> None:
    patients = load_diabetes().target
    noisy = 0
    for instance in draws(120, held_out=False):
        train, noise = instance.split("train"), instance.traits["target_noise"]
        noisy += noise > 0
        assert 0 <= noise <= 0.5
        assert instance.labels[train].std() == pytest.approx(np.sqrt(1 + noise**2), rel=0.15 if noise else 1e-4)
        assert 100 <= instance.rows.size <= 800
        if instance.traits["data_set"] == "diabetes":
            true = patients[instance.rows]
            expected = (true - true[train].mean()) / true[train].std()
            kept = slice(0 if noise == 0 else train.stop, None)
            np.testing.assert_allclose(instance.labels[kept], expected[kept], atol=1e-5)
            assert instance.rows.max() < PATIENTS
            assert not instance.parameters["layers.0.weight"][:, 10:].any()
        else:
            assert instance.rows.min() >= PATIENTS
    assert 40 <= noisy <= 80


def test_roles_say_which_inputs_count() -> None:
    family = make_family("regression")
    seen = set()
    for instance in draws(120, held_out=True):
        name = instance.traits["data_set"]
        if name not in FUNCTIONS:
            continue
        inputs = family.inputs.numpy()[instance.rows].astype(np.float64) / np.sqrt(12) + 0.5
        targets = FUNCTIONS[name](inputs[:, instance.traits["roles"]])
        validation = instance.split("validation")
        assert np.corrcoef(targets[validation], instance.labels[validation])[0, 1] > 0.9999
        seen.add(tuple(instance.traits["roles"]))
    assert len(seen) > 40


def test_predicting_the_mean_costs_one() -> None:
    family = make_family("regression")
    losses = []
    for instance in draws(40, held_out=True):
        labels = torch.from_numpy(instance.labels[instance.split("test")])
        losses.append(float(family.loss(torch.zeros(len(labels), 1), labels).mean()))
    assert np.mean(losses) == pytest.approx(1, abs=0.1)
    assert family.loss_cap == 2


def test_it_learns_and_rates_matter() -> None:
    loss = learned("regression", "sgd", (1e-4, 1e-2, 1.0), steps=150)
    assert loss[1] < 0.35 * loss.initial
    assert 3 * loss[1] < min(loss[0], loss[2])
