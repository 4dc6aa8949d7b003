"""The exact quantities of a quadratic against autograd, finite differences and runs of gradient descent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.autograd.functional import hessian
from torch.func import functional_call

from tests.inner_training.learning import learned
from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import Instance, OptimizerSettings
from trimtab.inner_training.tasks import make_family
from trimtab.inner_training.tasks import quadratic as exact


def draws(count: int, *, held_out: bool = False) -> list[Instance]:
    return [make_family("quadratic").draw(seed, held_out=held_out) for seed in range(count)]


each_instance = pytest.mark.parametrize("seed", range(6))


def mean_loss(instance: Instance, theta: torch.Tensor, split: str = "train") -> torch.Tensor:
    """What a run minimises, through the family's own module and loss, in double precision."""
    family = make_family("quadratic")
    where = instance.split(split)
    inputs = family.inputs[torch.from_numpy(instance.rows[where])].double()
    state = {"linear.weight": theta[None], "mixing": torch.from_numpy(instance.buffers["mixing"]).double()}
    outputs = functional_call(family.module, state, (inputs,))
    return family.loss(outputs, torch.from_numpy(instance.labels[where]).double()).mean()


@each_instance
def test_hessian_is_that_of_autograd(seed: int) -> None:
    instance = make_family("quadratic").draw(seed, held_out=bool(seed % 2))
    for split in ("train", "test"):
        theta = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        expected = hessian(lambda one, split=split: mean_loss(instance, one, split), theta)
        np.testing.assert_allclose(exact.hessian(instance, split), expected, atol=1e-9)


@each_instance
def test_the_optimum_has_no_gradient_and_the_least_loss(seed: int) -> None:
    instance = make_family("quadratic").draw(seed, held_out=bool(seed % 2))
    theta = torch.from_numpy(exact.optimum(instance)).requires_grad_()
    loss = mean_loss(instance, theta)
    loss.backward()
    assert theta.grad is not None
    assert float(theta.grad.abs().max()) < 1e-6
    assert exact.least_loss(instance) == pytest.approx(loss.item(), abs=1e-12)
    size = instance.traits["dimensions"]
    assert not theta[size:].any()
    noise = instance.traits["target_noise"]
    expected = noise**2 / 2 * (1 - size / instance.sizes[0])
    assert exact.least_loss(instance) == pytest.approx(expected, rel=0.4, abs=1e-9)


def test_spectra_are_those_that_were_drawn() -> None:
    instances = draws(100)
    for instance in instances:
        traits = instance.traits
        values = np.linalg.eigvalsh(exact.hessian(instance))[::-1]
        assert exact.largest_eigenvalue(instance) == pytest.approx(traits["largest_eigenvalue"], rel=1e-4)
        size = traits["dimensions"]
        assert values[0] / values[size - 1] == pytest.approx(traits["condition_number"], rel=1e-2)
        np.testing.assert_allclose(values[size:], 0, atol=1e-9)
    for trait, low, high in (("largest_eigenvalue", 1, 30), ("condition_number", 1, 1000), ("dimensions", 16, 32)):
        values = np.array([instance.traits[trait] for instance in instances])
        assert low <= values.min() < low * 1.3
        assert high / 1.3 < values.max() <= high
    off = [np.abs(exact.hessian(one) - np.diag(np.diag(exact.hessian(one)))).max() for one in instances]
    assert np.median(off) > 0.05  # the directions are not those of the coordinates


def test_a_map_of_zeros_costs_half() -> None:
    for instance in draws(30, held_out=True):
        a, y = exact.points(instance)
        noise = instance.traits["target_noise"]
        assert (y**2).mean() == pytest.approx(1 + noise**2, rel=0.12 if noise else 1e-3)
        assert a.shape == (instance.sizes[0], 32)
        start = torch.from_numpy(instance.parameters["linear.weight"][0]).double()
        assert 0.2 < float(mean_loss(instance, start)) < 1.1


def test_gradient_descent_is_stable_below_two_over_the_largest_eigenvalue() -> None:
    """On the whole training split; with batches of all of it, a step is one of gradient descent."""
    instances = [one for one in draws(60) if one.traits["condition_number"] < 100][:4]
    for instance in instances:
        limit = 2 / exact.largest_eigenvalue(instance)
        theta = torch.from_numpy(instance.parameters["linear.weight"][0]).double()
        matrix, best = torch.from_numpy(exact.hessian(instance)), torch.from_numpy(exact.optimum(instance))
        for factor in (0.95, 1.05):
            now = theta
            for _ in range(300):
                now = now - factor * limit * (matrix @ (now - best))
            grown = float((now - best).norm() / (theta - best).norm())
            assert (grown < 1) == (factor < 1)


def test_a_run_reaches_the_optimum() -> None:
    instance = next(one for one in draws(60) if one.traits["condition_number"] < 20 and one.traits["target_noise"] == 0)
    rate = 0.05 / exact.largest_eigenvalue(instance)
    settings = OptimizerSettings(rule="sgd", lr=rate, momentum=0.9)
    population = Population(make_family("quadratic"), 1, rules=("sgd",), mode="eager")
    population.reset([0], [replace(instance, optimizer=settings, schedule=BaseSchedule(), batch_size=64)])
    population.advance(400)
    reached = population.parameters_of(0)["linear.weight"][0]
    np.testing.assert_allclose(reached, exact.optimum(instance), atol=0.02)
    assert float(population.evaluate("train")) == pytest.approx(exact.least_loss(instance), abs=1e-3)


def test_it_learns_and_rates_matter() -> None:
    loss = learned("quadratic", "sgd", (1e-4, 3e-3, 3e-1), steps=150)
    assert loss[1] < 0.05 * loss.initial
    assert 10 * loss[1] < min(loss[0], loss[2])
