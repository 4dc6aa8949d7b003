"""Curvature of a loss against its full Hessian, curvlinops, and quadratics that are known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.func import hessian as full_hessian
from torch.nn import functional

from trimtab.inner_training.activations import EXAMPLES
from trimtab.inner_training.curvature import hessian_times, hessian_trace, largest_curvature
from trimtab.inner_training.population import Population
from trimtab.inner_training.task import OptimizerSettings
from trimtab.inner_training.tasks import make_family
from trimtab.inner_training.tasks import quadratic as exact

# Forward mode, and curvlinops, import parts of torch that are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def smooth_problem() -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor], nn.Module, Any]:
    """A loss of a small network, where it is, and the network with its data."""
    rng = torch.Generator().manual_seed(5)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    x, y = torch.randn(9, 3, generator=rng, dtype=torch.float64), torch.randint(2, (9,), generator=rng)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(functional_call(module, parameters, (x,)), y)

    return loss, {name: one.detach() for name, one in module.named_parameters()}, module, (x, y)


def dense_hessian(loss: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor]) -> np.ndarray:
    blocks: Any = full_hessian(loss)(at)
    size = {name: one.numel() for name, one in at.items()}
    rows = [torch.cat([blocks[a][b].reshape(size[a], size[b]) for b in at], 1) for a in at]
    return torch.cat(rows).numpy()


def by_name(flat: np.ndarray, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.from_numpy(flat).split([one.numel() for one in like.values()], -1)
    return {
        name: part.reshape(*flat.shape[:-1], *one.shape) for (name, one), part in zip(like.items(), parts, strict=True)
    }


def product_and_vector() -> tuple[np.ndarray, np.ndarray]:
    loss, at, _, _ = smooth_problem()
    size = sum(one.numel() for one in at.values())
    vector = np.random.Generator(np.random.Philox(0)).normal(size=size)
    product = hessian_times(loss, at, by_name(vector, at))
    return torch.cat([one.reshape(-1) for one in product.values()]).numpy(), vector


def test_hessian_products_are_those_of_the_full_hessian() -> None:
    loss, at, _, _ = smooth_problem()
    product, vector = product_and_vector()
    np.testing.assert_allclose(product, dense_hessian(loss, at) @ vector, atol=1e-10)


def test_hessian_products_are_those_of_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    _, _, module, data = smooth_problem()
    product, vector = product_and_vector()
    operator = curvlinops.HessianLinearOperator(module, nn.CrossEntropyLoss(), list(module.parameters()), [data])
    np.testing.assert_allclose(product, (operator @ torch.from_numpy(vector)).detach().numpy(), atol=1e-10)


def test_power_iteration_finds_the_largest_eigenvalue_and_never_leaves_the_spectrum() -> None:
    loss, at, _, _ = smooth_problem()
    full = dense_hessian(loss, at)
    spectrum = np.linalg.eigvalsh(full)
    signs = by_name(np.sign(np.random.Generator(np.random.Philox(1)).normal(size=(1, len(full)))), at)
    largest = spectrum[np.abs(spectrum).argmax()]
    assert float(largest_curvature(loss, at, signs, rounds=200)) == pytest.approx(largest, rel=1e-6)
    few = float(largest_curvature(loss, at, signs))
    assert few == pytest.approx(largest, rel=0.05)
    assert spectrum[0] - 1e-9 <= few <= spectrum[-1] + 1e-9


def test_hutchinson_is_right_on_average_and_as_scattered_as_it_should_be() -> None:
    loss, at, _, _ = smooth_problem()
    full = dense_hessian(loss, at)
    count = 400
    signs = np.sign(np.random.Generator(np.random.Philox(2)).normal(size=(count, len(full))))
    found = float(hessian_trace(loss, at, by_name(signs, at)))
    assert found == pytest.approx(np.einsum("vi,ij,vj->v", signs, full, signs).mean(), abs=1e-9)
    variance = 2 * ((full**2).sum() - (np.diag(full) ** 2).sum()) / count
    assert abs(found - np.trace(full)) < 4 * np.sqrt(variance)


RULES = {
    "sgd": OptimizerSettings(rule="sgd", lr=0.01, momentum=0.0),
    "sgd-momentum": OptimizerSettings(rule="sgd", lr=0.01, momentum=0.9, weight_decay=1e-3),
    "adam": OptimizerSettings(rule="adam", lr=3e-3),
}


@pytest.mark.parametrize("rule", RULES)
def test_curvature_along_a_step_of_a_quadratic_is_exact(rule: str) -> None:
    family = make_family("quadratic")
    instances = [replace(family.draw(seed, held_out=False), optimizer=RULES[rule]) for seed in range(4)]
    made, twin = (Population(family, 4, mode="eager") for _ in range(2))
    for one in (made, twin):
        one.reset(range(4), instances)
    made.measure(("curvature", "overshoot"), every=1)
    probed = made.advance(6).to_host().probed
    twin.advance(5)
    for run, instance in enumerate(instances):
        before = twin.parameters_of(run)["linear.weight"][0].double().numpy()
        moved = made.parameters_of(run)["linear.weight"][0].double().numpy() - before
        x, y = made.batch(run, 5)
        a = x.double().numpy() @ instance.buffers["mixing"].astype(np.float64)
        curvature = moved @ (a.T @ a / len(a)) @ moved / (moved @ moved)
        assert probed["curvature"][run] == pytest.approx(curvature, rel=2e-3)
        descent = -((a @ before - y.double().numpy()) @ a / len(a)) @ moved
        expected = curvature * (moved @ moved) / 2 / descent
        assert probed["overshoot"][run] == pytest.approx(expected, rel=2e-3, nan_ok=True) if descent > 0 else np.nan
        if rule == "sgd" and instance.schedule.kind == "constant":
            assert probed["overshoot"][run] == pytest.approx(0.01 * curvature / 2, rel=1e-3)
        assert curvature <= exact.largest_eigenvalue(instance) * 20


def test_largest_eigenvalue_and_trace_of_a_quadratic_are_those_of_the_probed_examples() -> None:
    family = make_family("quadratic")
    instances = [family.draw(seed, held_out=False) for seed in range(5)]
    made = Population(family, 5, mode="eager")
    made.reset(range(5), instances)
    made.measure(("curvature_max", "curvature_trace"), every=1)
    probed = made.advance(2).to_host().probed
    for run, instance in enumerate(instances):
        a = made.batch(run, 1)[0][:EXAMPLES].double().numpy() @ instance.buffers["mixing"]
        second_moments = a.T @ a / len(a)
        largest = np.linalg.eigvalsh(second_moments)[-1]
        assert 0.7 * largest < probed["curvature_max"][run] <= largest * (1 + 1e-4)
        off_diagonal = (second_moments**2).sum() - (np.diag(second_moments) ** 2).sum()
        assert abs(probed["curvature_trace"][run] - np.trace(second_moments)) < 4 * np.sqrt(2 * off_diagonal / 4)
