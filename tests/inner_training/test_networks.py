"""Gated networks against plain ones, and initial values that depend on the seed alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from tests.inner_training.families import Convolution
from trimtab.errors import UserError
from trimtab.inner_training.networks import MLP, build_module, initial_parameters, module_parameters


def plain_twin(mlp: MLP, parameters: dict[str, np.ndarray], width: int) -> nn.Sequential:
    """An ungated network of the active units alone."""
    sizes = [mlp.inputs, *[width] * mlp.depth, mlp.outputs]
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(itertools.pairwise(sizes)):
        layer = nn.Linear(before, after)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(parameters[f"layers.{index}.weight"][:after, :before]))
            layer.bias.copy_(torch.tensor(parameters[f"layers.{index}.bias"][:after]))
        layers += [layer, nn.ReLU() if mlp.activation == "relu" else nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(("depth", "activation"), [(1, "relu"), (3, "relu"), (2, "tanh")])
@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.AdamW])
def test_inactive_units_have_no_effect(depth: int, activation: str, rule: type[torch.optim.Optimizer]) -> None:
    width, mlp = 5, MLP(6, 16, 4, depth=depth, activation=activation)
    parameters, buffers = initial_parameters(mlp, np.random.default_rng(0), width, 1.5)
    mlp.load_state_dict({key: torch.tensor(value) for key, value in {**parameters, **buffers}.items()})
    twin = plain_twin(mlp, parameters, width)
    inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(20) % 4
    optimizers = [rule(network.parameters(), lr=0.02, weight_decay=0.01) for network in (mlp, twin)]
    for _ in range(10):
        losses = [nn.functional.cross_entropy(network(inputs), labels) for network in (mlp, twin)]
        torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    norms = [torch.cat([value.flatten() for value in network.parameters()]).norm() for network in (mlp, twin)]
    torch.testing.assert_close(norms[0], norms[1])
    for index, value in enumerate(mlp.parameters()):
        assert value.grad is not None
        inactive = torch.ones_like(value, dtype=torch.bool)
        rows = mlp.outputs if index >= 2 * depth else width
        columns = mlp.inputs if index == 0 else width
        inactive[(slice(rows), slice(columns))[: value.ndim]] = False
        assert (value.grad[inactive] == 0).all()
        assert (value[inactive] == 0).all()


def test_a_gate_silences_its_unit() -> None:
    mlp = build_module(lambda: MLP(6, 8, 4, depth=2), seed=0)
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    for index in range(2):
        gates = {f"gate{index}": torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 1])}
        weight = mlp.get_parameter(f"layers.{index + 1}.weight") * gates[f"gate{index}"]
        gated = functional_call(mlp, gates, (inputs,))
        torch.testing.assert_close(gated, functional_call(mlp, {f"layers.{index + 1}.weight": weight}, (inputs,)))
        assert not torch.allclose(gated, mlp(inputs))


def test_initial_parameters_are_those_of_linear() -> None:
    mlp = MLP(40, 300, 50)
    parameters, _ = initial_parameters(mlp, np.random.default_rng(0), width=300, scale=1.0)
    reference, _ = module_parameters(lambda: MLP(40, 300, 50), seed=0)
    for name, value in parameters.items():
        assert np.abs(value).max() <= np.abs(reference[name]).max() * 1.1
        assert value.std() == pytest.approx(reference[name].std(), rel=0.15), name


@pytest.mark.parametrize(("scale", "bias_scale"), [(0.5, 0.5), (2.0, 1.0)])
def test_scale_of_initial_parameters(scale: float, bias_scale: float) -> None:
    mlp = MLP(40, 64, 10, depth=2)
    plain, _ = initial_parameters(mlp, np.random.default_rng(0), 20, 1.0)
    scaled, _ = initial_parameters(mlp, np.random.default_rng(0), 20, scale)
    for name in plain:
        factor = scale if name.endswith("weight") else bias_scale
        np.testing.assert_allclose(scaled[name], factor * plain[name], rtol=1e-5)


def test_fan_in_counts_active_inputs() -> None:
    mlp = MLP(30, 64, 3, depth=2)
    parameters, _ = initial_parameters(mlp, np.random.default_rng(0), width=16, scale=1.0, features=4)
    first, second = parameters["layers.0.weight"], parameters["layers.1.weight"]
    assert 0.45 < np.abs(first).max() <= 0.5
    assert 0.22 < np.abs(second).max() <= 0.25
    assert (first[:, 4:] == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(4, 0, 2), "hidden is 0; it must be at least 1"),
        (lambda: MLP(4, 8, 2, activation="rleu"), "unknown activation 'rleu'; did you mean 'relu'"),
        (lambda: initial_parameters(MLP(4, 8, 2), np.random.default_rng(), 9, 1.0), "width is 9; .* between 1 and 8"),
        (lambda: initial_parameters(MLP(4, 8, 2), np.random.default_rng(), 8, 1.0, 5), "features is 5; .* 1 and 4"),
    ],
)
def test_network_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_module_parameters_are_the_modules_own() -> None:
    parameters, buffers = module_parameters(Convolution, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        reference = Convolution()
    assert list(parameters) == [name for name, _ in reference.named_parameters()]
    for name, value in reference.state_dict().items():
        np.testing.assert_array_equal({**parameters, **buffers}[name], value.numpy())
    assert not np.array_equal(parameters["head.weight"], module_parameters(Convolution, seed=6)[0]["head.weight"])


def test_generator_is_restored_when_a_factory_raises() -> None:
    def factory() -> nn.Module:
        torch.rand(3)
        raise RuntimeError("no")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        build_module(factory, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
