"""A pruned population is one of a module that is physically smaller."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.inner_training.structure.populations import Tiny, stacked
from trimtab.inner_training.networks.convnets import ConvNet, ResidualNet
from trimtab.inner_training.networks.graph import GraphConvolution
from trimtab.inner_training.networks.mlp import MLP
from trimtab.inner_training.networks.transformer import LanguageModel, TransformerBlock, VisionTransformer
from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.stacked import Stacked

# Muon lengthens steps by the larger side of a matrix, which counts units at zero too.
RULES = ("sgd", "adam", "adamw", "rmsprop", "nadam", "nadamw", "lion")


def smaller(module: nn.Module, left: dict[str, int]) -> nn.Module:
    """The same network with so many units in each group, without gates closed."""
    if isinstance(module, MLP):
        return MLP(module.inputs, left["layers.0"], module.outputs, module.depth, module.activation)
    if isinstance(module, ConvNet):
        channels = [left[f"layers.{place}"] for place in range(len(module.layers))]
        return ConvNet(module.colours, 8, channels, module.outputs, pooled=module.pooled)
    if isinstance(module, ResidualNet):
        return ResidualNet(module.colours, 4 * left["stem"], module.outputs, len(module.blocks))
    if isinstance(module, GraphConvolution):
        return GraphConvolution(module.nodes, module.inputs, left["first"], module.outputs)
    if isinstance(module, LanguageModel):
        made: nn.Module = LanguageModel(module.vocabulary, module.context, 8, 1, 2, 10)
    else:
        assert isinstance(module, VisionTransformer)
        made = VisionTransformer(module.image, module.patch, module.outputs, 8, 1, 4, 10)
    block = made.blocks[0]  # type: ignore[index]
    assert isinstance(block, TransformerBlock)
    made.blocks[0] = TransformerBlock(8, left["blocks.0.heads"], left["blocks.0.up"], block.head_width)  # type: ignore[index,operator]
    return made


def cut(structure: Stacked) -> Population:
    """A population of smaller modules, each with the survivors of a run."""
    runs, family = structure.population, Tiny(structure.population.family.name.removeprefix("tiny-"))
    family.module = smaller(family.module, {name: int(active[0].sum()) for name, active in structure.active.items()})
    live = runs.layout.views(~structure._flat.entries(~structure._units.active))
    shapes = dict(family.module.named_parameters())
    instances = []
    for run in range(runs.num_runs):
        own = runs.parameters_of(run)
        parameters = {name: own[name][live[name][run]].view(shape.shape).numpy() for name, shape in shapes.items()}
        given = runs.instances[run]
        buffers = {name: given.buffers.get(name) for name in ("adjacency", "features") if name in given.buffers}
        gates = {name: one.numpy() for name, one in family.module.named_buffers() if name not in buffers}
        instances.append(replace(given, parameters=parameters, buffers={**gates, **buffers}))
    made = Population(family, runs.num_runs, rules=tuple(runs._rules), mode="eager")
    made.reset(range(runs.num_runs), instances)
    return made


@pytest.mark.parametrize("name", ["mlp", "mlp-tanh", "conv", "conv-pooled", "residual", "vit", "language", "graph"])
def test_a_pruned_population_trains_as_a_smaller_one(name: str) -> None:
    structure = stacked(name, RULES, runs=len(RULES), steps=0)
    runs = structure.population
    structure.prune(0.5 if name != "residual" else 1 / 3, structure.score("agf"), scope="layer")
    counts = {group: active.sum(1) for group, active in structure.active.items()}
    assert all(len(count.unique()) == 1 and count[0] < structure.groups[group] for group, count in counts.items())
    other = cut(structure)
    torch.testing.assert_close(other.evaluate("train"), runs.evaluate("train"), rtol=0, atol=1e-5)
    losses, expected = runs.advance(12).losses, other.advance(12).losses
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    live = runs.layout.views(~structure._flat.entries(~structure._units.active))
    for run in range(len(RULES)):
        own, small = runs.parameters_of(run), other.parameters_of(run)
        small.pop("blocks.0.attend.bias", None)  # those of keys change nothing: their gradients are rounding errors
        for key, value in small.items():
            torch.testing.assert_close(own[key][live[key][run]], value.flatten(), rtol=0, atol=1e-4)
