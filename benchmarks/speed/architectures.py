"""Networks whose speed is measured: a family, and the same network written the ordinary way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.inner_training.networks import MLP
from trimtab.inner_training.networks.convnets import ConvNet
from trimtab.inner_training.networks.graph import GraphConvolution
from trimtab.inner_training.networks.transformer import LanguageModel
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import Instance, OptimizerSettings, TaskFamily
from trimtab.inner_training.tasks import make_family

DRAWN = 20  # instances to choose full-sized ones from


def plain_mlp(module: MLP, instance: Instance) -> nn.Module:
    """The layers in a row."""
    sizes = [module.inputs, *[module.hidden] * module.depth, module.outputs]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def plain_convnet(module: ConvNet, instance: Instance) -> nn.Module:
    """``torch.nn.Conv2d`` in a row."""
    layers: list[nn.Module] = []
    for layer in module.layers:
        convolution = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(module.head.in_features, module.outputs))


class PlainGraph(nn.Module):
    """Two graph convolutions on a dense adjacency; maps node numbers to outputs."""

    def __init__(self, module: GraphConvolution, instance: Instance) -> None:
        super().__init__()
        self.first = nn.Linear(module.inputs, module.hidden)
        self.second = nn.Linear(module.hidden, module.outputs)
        for name in ("adjacency", "features"):
            self.register_buffer(name, torch.from_numpy(instance.buffers[name]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.adjacency @ (self.features @ self.first.weight.T) + self.first.bias)
        outputs = self.adjacency @ (hidden @ self.second.weight.T) + self.second.bias
        return outputs[x[:, 0]]


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP with fused attention."""

    def __init__(self, width: int, heads: int, units: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm0, self.attend, self.project = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.norm1, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, units), nn.Linear(units, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.attend(self.norm0(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(functional.gelu(self.up(self.norm1(x)), approximate="tanh"))


class PlainLanguage(nn.Module):
    """A decoder-only transformer with learned positions."""

    def __init__(self, module: LanguageModel, instance: Instance) -> None:
        super().__init__()
        context, width = module.place.shape
        self.embed, self.place = nn.Embedding(module.vocabulary, width), nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(PlainBlock(width, module.heads, module.units) for _ in module.blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, module.vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row of the speed tables.

    Attributes:
        family: id of the task family.
        rule: update rule.
        lr: its learning rate.
        plain: makes the network the ordinary way, of the family's module and an instance.
        target: ratio to the plain loop that 64 runs on one CPU thread must reach.
        gpu_target: the same for the population that fills a GPU.
    """

    family: str
    rule: str
    lr: float
    plain: Callable[..., nn.Module]
    target: float
    gpu_target: float


ARCHITECTURES = {
    "mlp-sgd": Architecture(family="digits-mlp", rule="sgd", lr=0.05, plain=plain_mlp, target=10, gpu_target=300),
    "mlp-adam": Architecture(family="digits-mlp", rule="adam", lr=1e-3, plain=plain_mlp, target=10, gpu_target=300),
    "transformer": Architecture(family="language", rule="adamw", lr=1e-3, plain=PlainLanguage, target=4, gpu_target=20),
    "graph": Architecture(family="graph", rule="adam", lr=1e-3, plain=PlainGraph, target=4, gpu_target=20),
    "convnet": Architecture(family="sprites-conv", rule="sgd", lr=0.05, plain=plain_convnet, target=3.5, gpu_target=20),
}


def full_size(family: TaskFamily, count: int, rule: str, lr: float) -> list[Instance]:
    """Instances at full width and the largest batch, so that as little as may be of what a population does is padding.

    They share the initial values of the family's module, and come from the first seeds with enough examples for the
    batch; it is smaller than the family's largest only where no instance has as many (a graph has few nodes).
    """
    parameters = {name: value.detach().numpy() for name, value in family.module.named_parameters()}
    drawn = [replace(family.draw(seed, held_out=False), parameters=parameters) for seed in range(DRAWN)]
    batch = min(family.max_batch, max(one.sizes[0] for one in drawn))
    settings = OptimizerSettings(rule=rule, lr=lr)
    fitting = [_full(one, batch, settings) for one in drawn if one.sizes[0] >= batch]
    return [replace(fitting[place % len(fitting)], seed=place) for place in range(count)]


def _full(drawn: Instance, batch: int, settings: OptimizerSettings) -> Instance:
    gates = {name: np.ones_like(value) for name, value in drawn.buffers.items() if "gate" in name}
    return replace(
        drawn,
        buffers={**drawn.buffers, **gates},
        batch_size=batch,
        optimizer=settings,
        schedule=BaseSchedule(),
        input_scale=1.0,
    )


def ordinary(architecture: Architecture, family: TaskFamily, instance: Instance) -> nn.Module:
    """The network as a user would write it, with the initial values of ``instance``."""
    module = architecture.plain(family.module, instance)
    with torch.no_grad():
        for ours, given in zip(module.parameters(), family.module.parameters(), strict=True):
            ours.copy_(given)
    return module


def family_of(architecture: Architecture) -> TaskFamily:
    """The family of an architecture."""
    return make_family(architecture.family)
