"""Tiny populations of every network of ours, under every update rule, for the tests of stacked structures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.inner_training.networks import build_module
from trimtab.inner_training.networks.convnets import ConvNet, ResidualNet, initial_channels
from trimtab.inner_training.networks.graph import GraphConvolution, initial_graph_parameters, normalised_adjacency
from trimtab.inner_training.networks.mlp import MLP, initial_parameters
from trimtab.inner_training.networks.seeding import Arrays
from trimtab.inner_training.networks.transformer import LanguageModel, VisionTransformer, initial_transformer
from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.task import Instance, OptimizerSettings, TaskFamily
from trimtab.inner_training.update_rules import UPDATE_RULES

BATCH, SIZES = 6, (20, 5, 5)
RATES = {"sgd": 0.05, "lion": 0.002}


def graph() -> GraphConvolution:
    module = GraphConvolution(9, 4, 8, 3)
    draws = np.random.default_rng(3)
    edges = np.triu(draws.random((9, 9)) < 0.4, 1)
    module.adjacency.copy_(torch.from_numpy(normalised_adjacency(edges | edges.T)))
    module.features.copy_(torch.from_numpy(draws.normal(size=(9, 4))))
    return module


def images(colours: int, size: int) -> Tensor:
    return torch.randn(30, colours, size, size, generator=torch.Generator().manual_seed(1))


def numbers(*shape: int, below: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: MLP(5, 8, 3, depth=2), images(1, 5)[:, 0, 0]),
    "mlp-tanh": (lambda: MLP(5, 6, 3, depth=1, activation="tanh"), images(1, 5)[:, 0, 0]),
    "conv": (lambda: ConvNet(1, 8, (4, 6), 3), images(1, 8)),
    "conv-pooled": (lambda: ConvNet(2, 8, (4, 6), 3, pooled=True), images(2, 8)),
    "residual": (lambda: ResidualNet(1, 12, 3, blocks=1), images(1, 8)),
    "vit": (lambda: VisionTransformer((1, 8, 8), 4, 3, width=8, depth=1, heads=4, units=10), images(1, 8)),
    "language": (lambda: LanguageModel(11, 6, width=8, depth=1, heads=2, units=10), numbers(30, 6, below=11)),
    "graph": (graph, numbers(30, 1, below=9)),
}


class Tiny(TaskFamily):
    """Random examples for one network; instances differ by seed."""

    doc, max_examples, max_batch, loss_cap = "for tests", 30, BATCH, 5.0

    def __init__(self, name: str) -> None:
        make, self.inputs = NETWORKS[name]
        self.name, self.module = f"tiny-{name}", build_module(make, seed=0)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        outputs = outputs[:, None] if outputs.ndim == 2 else outputs
        chosen = labels[:, None, None].expand(*outputs.shape[:2], 1)
        return -outputs.log_softmax(-1).gather(-1, chosen)[..., 0].mean(1)

    def draw(self, seed: int, *, held_out: bool = False) -> Instance:
        return self.made(seed, "sgd")

    def made(self, seed: int, rule: str, width: float = 1.0, batch: int = BATCH, decay: float = 0.01) -> Instance:
        rng = np.random.default_rng(seed)
        parameters, buffers = self.initial(rng, width)
        usual = UPDATE_RULES[rule]
        settings = OptimizerSettings(
            rule=rule,
            lr=RATES.get(rule, 0.01),
            momentum=usual.usual_momentum,
            beta2=usual.usual_beta2,
            weight_decay=decay,
        )
        return Instance(
            key=f"{self.name}/train/{seed}", seed=seed, rows=rng.permutation(30), labels=rng.integers(0, 3, 30), sizes=SIZES,
            parameters=parameters, buffers=buffers, batch_size=batch, steps=200, optimizer=settings,
            schedule=BaseSchedule(kind="constant"),
        )  # fmt: skip

    def initial(self, rng: np.random.Generator, width: float) -> tuple[Arrays, Arrays]:
        """Initial values of a network of which a share of the units is active, with biases that are not zero."""
        module = self.module
        if isinstance(module, MLP):
            found = initial_parameters(module, rng, max(1, round(width * module.hidden)), 1.0)
        elif isinstance(module, ConvNet | ResidualNet):
            found = initial_channels(module, rng, max(1, round(width * module.channels)), 1.0)
        elif isinstance(module, LanguageModel | VisionTransformer):
            shares = (max(1, round(width * size)) for size in (module.heads, module.units))
            found = initial_transformer(module, rng, *shares, 1.0)
        else:
            assert isinstance(module, GraphConvolution)
            parameters, gate = initial_graph_parameters(module, rng, max(1, round(width * module.hidden)), 1.0)
            parameters["first.bias"] = (0.1 * rng.normal(size=8) * gate).astype(np.float32)
            found = (
                parameters,
                {"adjacency": module.adjacency.numpy(), "features": module.features.numpy(), "gate0": gate},
            )
        return found


CACHE: dict[str, Tiny] = {}


def family_of(name: str) -> Tiny:
    if name not in CACHE:
        CACHE[name] = Tiny(name)
    return CACHE[name]


def population(
    name: str, rules: tuple[str, ...] = ("adamw",), runs: int = 3, width: float = 1.0, steps: int = 2
) -> Population:
    """Runs of one network, the rules in turn, some steps into training; batches differ in size."""
    family = family_of(name)
    made = Population(family, runs, rules=rules, mode="eager")
    instances = [family.made(seed, rules[seed % len(rules)], width, BATCH - seed % 2) for seed in range(runs)]
    made.reset(range(runs), instances)
    if steps:
        made.advance(steps)
    return made


def stacked(
    name: str, rules: tuple[str, ...] = ("adamw",), runs: int = 3, width: float = 1.0, steps: int = 2
) -> Stacked:
    return Stacked(population(name, rules, runs, width, steps))


Picture = dict[str, Tensor]


def picture(structure: Stacked) -> Picture:
    """Everything that an edit may change, copied."""
    runs, units = structure.population, structure._units
    found = {name: value.clone() for name, value in runs._learner._asdict().items()}
    found |= {
        f"units.{name}": value.clone() for name, value in units._asdict().items() if name not in ("edits", "updates")
    }
    return found | {f"buffers.{name}": value.clone() for name, value in runs._feed.buffers.items()}


def differing(one: Picture, other: Picture, runs: Tensor | None = None) -> list[str]:
    """Names of what is not the same bit for bit, in some runs."""
    chosen = slice(None) if runs is None else runs
    return [name for name in one if not torch.equal(one[name][chosen], other[name][chosen])]


def held(structure: Stacked) -> Tensor:
    return structure._flat.entries(~structure._units.active)


def assert_held(structure: Stacked) -> None:
    """Entries of inactive units are exactly zero, in parameters and optimizer state."""
    learner = structure.population._learner
    for name, value in zip(learner._fields[:3], learner[:3], strict=True):
        assert not value[held(structure)].any(), name
    for active, one in zip(structure.active.values(), structure._flat, strict=True):
        assert bool((active.sum(1) >= one.group.minimum).all())


def with_batch(instance: Instance, size: int) -> Instance:
    return replace(instance, batch_size=size)
