"""Networks that are built to stay able to learn: what they compute, and their units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab
from trimtab.errors import RangeError, UnknownNameError, UserError
from trimtab.inner_training.networks import MLP, initial_parameters
from trimtab.inner_training.networks.plastic_mlp import (
    PLASTIC_ACTIVATIONS,
    GatedLayerNorm,
    PlasticMLP,
    initial_plastic_parameters,
    smooth_leaky,
)
from trimtab.inner_training.structure.known import known_groups

VARIANTS = [(activation, norm) for activation in PLASTIC_ACTIVATIONS for norm in (False, True)]


def initialised(net: PlasticMLP, width: int, seed: int = 0) -> PlasticMLP:
    parameters, buffers = initial_plastic_parameters(net, np.random.default_rng(seed), width, 1.3)
    assert list(parameters) == [name for name, _ in net.named_parameters()]
    net.load_state_dict({key: torch.tensor(value) for key, value in {**parameters, **buffers}.items()})
    return net


def narrow(net: PlasticMLP, width: int) -> PlasticMLP:
    """A network of the active units alone."""
    each = net.hidden // net.units
    small = PlasticMLP(net.inputs, width * each, net.outputs, net.depth, net.activation, net.norm)
    read = torch.cat([torch.arange(width) + part * net.units for part in range(each)])
    with torch.no_grad():
        for index, (layer, other) in enumerate(zip(small.layers, net.layers, strict=True)):
            assert isinstance(layer, nn.Linear) and isinstance(other, nn.Linear)
            columns = torch.arange(net.inputs) if index == 0 else read
            rows = slice(None) if index == net.depth else slice(width)
            layer.weight.copy_(other.weight[rows][:, columns])
            layer.bias.copy_(other.bias[rows])
    return small


@pytest.mark.parametrize(("activation", "norm"), VARIANTS)
def test_inactive_units_have_no_effect(activation: str, norm: bool) -> None:
    net = initialised(PlasticMLP(6, 16, 4, 2, activation, norm), width=3)
    small = narrow(net, 3)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(20) % 4
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.02) for one in (net, small)]
    for _ in range(10):
        losses = [nn.functional.cross_entropy(one(x), labels) for one in (net, small)]
        torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, one in small.named_parameters():
        assert net.get_parameter(name).detach().norm().item() == pytest.approx(one.detach().norm().item(), rel=1e-4)


def slow(net: PlasticMLP, x: list[float]) -> list[float]:
    """One example, unit by unit."""
    import math

    formulas = {"relu": lambda z: [max(z, 0.0)], "tanh": lambda z: [math.tanh(z)], "crelu": lambda z: [max(z, 0.0), max(-z, 0.0)],
                "smooth-leaky": lambda z: [0.229 * z + (1 - 0.229) * z / (1 + math.exp(-3 * z / 5))]}  # fmt: skip
    for index, layer in enumerate(net.layers):
        rows, biases = layer.weight.tolist(), layer.bias.tolist()  # type: ignore[union-attr,operator]
        z = [sum(w * value for w, value in zip(row, x, strict=True)) + b for row, b in zip(rows, biases, strict=True)]
        if index == net.depth:
            return z
        if net.norm:
            mean = sum(z) / len(z)
            spread = math.sqrt(sum((value - mean) ** 2 for value in z) / len(z) + 1e-5)
            z = [(value - mean) / spread for value in z]
        outputs = [formulas[net.activation](value) for value in z]
        x = [one[part] for part in range(len(outputs[0])) for one in outputs]
    return x


@pytest.mark.parametrize(("activation", "norm"), VARIANTS)
def test_against_a_network_unit_by_unit(activation: str, norm: bool) -> None:
    net = PlasticMLP(5, 8, 3, 2, activation, norm)
    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x[None])[0], torch.tensor(slow(net, x.tolist())), rtol=1e-4, atol=1e-5)


def test_gated_layer_norm_with_open_gates_is_torchs() -> None:
    ours, stock = GatedLayerNorm(7), nn.LayerNorm(7)
    x = torch.randn(4, 7)
    torch.testing.assert_close(ours(x, torch.ones(7)), stock(x))


def test_plain_variants_are_the_plain_network() -> None:
    plain, net = MLP(6, 8, 3, depth=2), PlasticMLP(6, 8, 3, depth=2)
    net.load_state_dict(plain.state_dict())
    x = torch.randn(4, 6)
    assert torch.equal(net(x), plain(x))
    first, gates = initial_parameters(plain, np.random.default_rng(0), 5, 0.7)
    second, others = initial_plastic_parameters(net, np.random.default_rng(0), 5, 0.7)
    assert all(np.array_equal(gates[key], others[key]) for key in gates)
    assert all(np.array_equal(value, second[key]) for key, value in first.items())


def test_smooth_leaky_has_slopes_everywhere() -> None:
    z = torch.linspace(-30, 30, 601, requires_grad=True)
    (slope,) = torch.autograd.grad(smooth_leaky(z).sum(), z)
    assert slope[0] == pytest.approx(0.229, abs=1e-3) and slope[-1] == pytest.approx(1, abs=1e-3)
    assert slope.min() > 0.1 and smooth_leaky(torch.zeros(1)) == 0


def test_units_of_crelu_have_two_columns() -> None:
    net = PlasticMLP(5, 8, 3, depth=2, activation="crelu", norm=True)
    first, _ = known_groups(net)
    assert first.units == 4 and first.of_role("column")[0].index.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert {member.parameter for member in first.of_role("vector")} == {
        "layers.0.bias",
        "norms.0.weight",
        "norms.0.bias",
    }
    sizes = [sum(one.numel() for one in PlasticMLP(5, 8, 3, 2, name).parameters()) for name in ("relu", "crelu")]
    assert sizes[1] < sizes[0]  # as many outputs of each layer, from half of the units


@pytest.mark.parametrize("activation", PLASTIC_ACTIVATIONS)
def test_units_can_be_edited_but_not_under_layer_norm(activation: str) -> None:
    def structure(norm: bool) -> tuple[nn.Module, trimtab.Structure]:
        net = initialised(PlasticMLP(5, 8, 3, 2, activation, norm), 8 // PLASTIC_ACTIVATIONS[activation].outputs)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        return net, trimtab.gates(net, optimizer, torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))

    net, free = structure(norm=False)
    free.prune(0.5, "magnitude", "layer")
    x = torch.randn(6, 5)
    before: Tensor = net(x)
    free.compact()
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-6)
    _, mixed = structure(norm=True)
    assert not mixed.groups
    assert set(mixed.refused.values()) == {"its units influence each other, so they cannot move one by one"}


def test_bad_sizes() -> None:
    with pytest.raises(UserError, match="hidden is 7; crelu has 2 outputs of each unit, so make it even"):
        PlasticMLP(4, 7, 2, activation="crelu")
    with pytest.raises(UnknownNameError, match="unknown activation 'creluu'; did you mean 'crelu'"):
        PlasticMLP(4, 8, 2, activation="creluu")
    with pytest.raises(RangeError, match="depth is 0"):
        PlasticMLP(4, 8, 2, depth=0)
    net = PlasticMLP(4, 8, 2, activation="crelu")
    for width, features, message in ((5, 4, "width is 5; it must be between 1 and 4"), (2, 9, "features is 9")):
        with pytest.raises(RangeError, match=message):
            initial_plastic_parameters(net, np.random.default_rng(0), width, 1.0, features)


def test_stacked_runs_are_runs_one_by_one() -> None:
    """As populations call it: parameters and gates of each run under vmap."""
    nets = [initialised(PlasticMLP(5, 8, 3, 2, "crelu", norm=True), width, seed) for width, seed in ((2, 0), (4, 1))]
    parameters, buffers = torch.func.stack_module_state(nets)  # type: ignore[arg-type]
    x = torch.randn(2, 6, 5)

    def call(weights: dict[str, Tensor], gates: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return torch.func.functional_call(nets[0], {**weights, **gates}, (inputs,))

    found = torch.vmap(call)(parameters, buffers, x)
    for run, net in enumerate(nets):
        torch.testing.assert_close(found[run], net(x[run]))
