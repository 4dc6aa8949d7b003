"""Convolutional networks with channel gates: against plain ones, and their initial values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.errors import UserError
from trimtab.inner_training.networks import build_module
from trimtab.inner_training.networks.convnets import (
    ChannelNet,
    ConvNet,
    GatedGroupNorm,
    ResidualNet,
    initial_channels,
)

NETS = {
    "plain": lambda channels: ConvNet(1, 8, (channels // 2, channels), 5),
    "pooled": lambda channels: ConvNet(2, 9, (channels, channels // 2), 5, pooled=True),
    "residual": lambda channels: ResidualNet(1, channels, 5, blocks=2),
}
IMAGES = {"plain": (1, 8), "pooled": (2, 9), "residual": (1, 16)}
each_net = pytest.mark.parametrize("kind", NETS)


def images(kind: str, count: int = 12) -> Tensor:
    colours, size = IMAGES[kind]
    return torch.randn(count, colours, size, size, generator=torch.Generator().manual_seed(1))


def with_values(net: ChannelNet, width: int, seed: int = 0) -> ChannelNet:
    parameters, buffers = initial_channels(net, np.random.default_rng(seed), width, 1.5)
    net.load_state_dict({key: torch.tensor(value) for key, value in {**parameters, **buffers}.items()})
    return net


def narrowed(kind: str, wide: ChannelNet, width: int) -> ChannelNet:
    """A network that has only the first channels of ``wide``, with the same values."""
    narrow: ChannelNet = NETS[kind](width)
    values = {}
    for name, target in narrow.state_dict().items():
        source = wide.state_dict()[name]
        values[name] = source[tuple(slice(size) for size in target.shape)]
    narrow.load_state_dict(values)
    return narrow


@each_net
@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.AdamW])
def test_inactive_channels_have_no_effect(kind: str, rule: type[torch.optim.Optimizer]) -> None:
    width, wide = 8, with_values(NETS[kind](12), 8)
    narrow = narrowed(kind, wide, width)
    inputs, labels = images(kind), torch.arange(12) % 5
    optimizers = [rule(net.parameters(), lr=0.02, weight_decay=0.01) for net in (wide, narrow)]
    for _ in range(8):
        losses = [functional.cross_entropy(net(inputs), labels) for net in (wide, narrow)]
        torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in narrow.named_parameters():
        grown = wide.get_parameter(name)
        inside = tuple(slice(size) for size in value.shape)
        torch.testing.assert_close(grown[inside], value, atol=1e-5, rtol=1e-4)
        outside = torch.ones_like(grown, dtype=torch.bool)
        outside[inside] = False
        assert grown.grad is not None
        assert (grown.grad[outside] == 0).all(), name
        assert (grown[outside] == 0).all(), name


@each_net
def test_a_gate_silences_its_channels(kind: str) -> None:
    net = with_values(NETS[kind](8), 8)
    with torch.no_grad():
        for value in net.parameters():
            value += 0.1  # also shifts after a norm, which a gate must silence too
    inputs = images(kind)
    before = net(inputs)
    gates = [name for name, _ in net.named_buffers()]
    for name in gates:
        net.get_buffer(name)[3] = 0
        assert not torch.allclose(net(inputs), before), name
        net.get_buffer(name)[3] = 1
    for name in gates:
        net.get_buffer(name)[3] = 0
    silent = net(inputs)
    with torch.no_grad():
        for value in net.parameters():  # whatever the silenced channels compute, nobody sees it
            if value.ndim in (1, 4) and value.shape[0] != 5:
                value[3] = 7.0
    torch.testing.assert_close(net(inputs), silent)


class Reference(nn.Module):
    """`ResidualNet` in torch's own layers, which a network without gates must equal."""

    def __init__(self, net: ResidualNet) -> None:
        super().__init__()
        self.net = net

    def norm(self, x: Tensor, of: GatedGroupNorm) -> Tensor:
        return torch.relu(functional.group_norm(x, x.shape[1] // 4, of.weight, of.bias))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.net.stem
        x = functional.conv2d(x, stem.weight, stem.bias, stride=2, padding=1)
        for block in self.net.blocks:
            branch = self.norm(x, block.first_norm)
            branch = functional.conv2d(branch, block.first.weight, block.first.bias, stride=2, padding=1)
            branch = self.norm(branch, block.second_norm)
            branch = functional.conv2d(branch, block.second.weight, block.second.bias, padding=1)
            x = functional.avg_pool2d(x, 2) + branch
        return self.net.head(self.norm(x, self.net.norm).mean((2, 3)))


@pytest.mark.parametrize("pooled", [False, True])
def test_plain_network_is_the_usual_one(pooled: bool) -> None:
    net = build_module(lambda: ConvNet(2, 9, (4, 6), 3, pooled=pooled), seed=0)
    x = inputs = images("pooled")
    for layer in net.layers:
        x = torch.relu(functional.conv2d(x, layer.weight, layer.bias, stride=2, padding=1))
    torch.testing.assert_close(net(inputs), net.head(x.mean((2, 3)) if pooled else x.flatten(1)))


def test_residual_network_is_the_usual_one() -> None:
    net = build_module(lambda: ResidualNet(1, 8, 5), seed=0)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "norm" in name:
                value += torch.linspace(-0.5, 0.5, 8)
    torch.testing.assert_close(net(images("residual")), Reference(net)(images("residual")))


@pytest.mark.parametrize("width", [1, 3, 4, 6, 8])
def test_group_norm_of_any_width(width: int) -> None:
    norm = GatedGroupNorm(8)
    gate = (torch.arange(8) < width).float()[:, None, None]
    x = 2 + torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 8))
        norm.bias.copy_(torch.linspace(-1, 1, 8))
    found = norm(x, gate)
    assert (found[:, width:] == 0).all()
    for start in range(0, width, 4):  # each group by itself, of the channels that are there
        own = slice(start, min(start + 4, width))
        expected = functional.group_norm(x[:, own], 1, norm.weight[own], norm.bias[own])
        torch.testing.assert_close(found[:, own], expected)


@each_net
def test_initial_values_are_those_of_torch(kind: str) -> None:
    make = NETS[kind]
    parameters, buffers = initial_channels(make(64), np.random.default_rng(0), width=64, scale=1.0)
    reference = build_module(lambda: make(64), seed=0)
    assert list(parameters) == [name for name, _ in reference.named_parameters()]
    assert list(buffers) == [name for name, _ in reference.named_buffers()]
    for name, value in reference.named_parameters():
        assert parameters[name].shape == value.shape
        if value.numel() > 100:
            assert parameters[name].std() == pytest.approx(value.std().item(), rel=0.15), name
            assert np.abs(parameters[name]).max() <= 1.05 * value.abs().max().item(), name


@pytest.mark.parametrize(("scale", "bias_scale"), [(0.5, 0.5), (2.0, 1.0)])
def test_scale_and_fan_in_of_initial_values(scale: float, bias_scale: float) -> None:
    net = ConvNet(1, 8, (32, 64), 5)
    plain, _ = initial_channels(net, np.random.default_rng(0), 7, 1.0)
    scaled, buffers = initial_channels(net, np.random.default_rng(0), 7, scale)
    assert [int(buffers[name].sum()) for name in ("gate0", "gate1")] == [4, 7]
    for name in plain:
        factor = scale if name.endswith("weight") else bias_scale
        np.testing.assert_allclose(scaled[name], factor * plain[name], rtol=1e-5)
    for name, fan_in in (("layers.0.weight", 9), ("layers.1.weight", 4 * 9), ("head.weight", 7 * 4)):
        bound = fan_in**-0.5
        assert 0.85 * bound < np.abs(plain[name]).max() <= bound, name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvNet(0, 8, (4,), 2), "colours is 0; it must be at least 1"),
        (lambda: ConvNet(1, 0, (4,), 2), "size is 0; it must be at least 1"),
        (lambda: ResidualNet(1, 6, 2), r"channels is 6; .*multiple of the group of 4"),
        (lambda: ResidualNet(1, 8, 2, blocks=0), "blocks is 0; it must be at least 1"),
        (lambda: initial_channels(ConvNet(1, 8, (4,), 2), np.random.default_rng(), 5, 1.0), "width is 5; .* 1 and 4"),
    ],
)
def test_network_errors(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(UserError, match=message):
        make()
