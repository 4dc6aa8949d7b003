"""Small modules that trimtab did not write, and its own ones, with an example input and a training loss for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.inner_training.networks.convnets import ConvNet, ResidualNet
from trimtab.inner_training.networks.mlp import MLP
from trimtab.inner_training.networks.plastic_mlp import PlasticMLP
from trimtab.inner_training.networks.transformer import LanguageModel, VisionTransformer


class Residual(nn.Module):
    """A residual block with batch norm, and a flattening into the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.norm1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.norm2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm0(self.stem(x)))
        x = functional.relu(x + self.norm2(self.second(functional.relu(self.norm1(self.first(x))))))
        return self.head(functional.max_pool2d(x, 2).flatten(1))


class Dense(nn.Module):
    """Concatenations, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.c, self.d, self.head = nn.Conv2d(10, 8, 1), nn.Conv2d(18, 5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = functional.relu(self.a(x))
        both = torch.cat([a, functional.relu(self.b(a))], 1)
        both = torch.cat([both, functional.relu(self.c(both))], 1)
        return self.head(functional.relu(self.d(both)).mean((2, 3)))


class GroupNorms(nn.Module):
    """Group norms with four channels and with one channel in a group, and one without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm0 = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16)
        self.b, self.norm1 = nn.Conv2d(16, 8, 3, padding=1), nn.GroupNorm(8, 8)
        self.c, self.norm2 = nn.Conv2d(8, 6, 3), nn.GroupNorm(3, 6, affine=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm1(self.b(functional.relu(self.norm0(self.a(x))))))
        return self.head(functional.relu(self.norm2(self.c(x))).mean((2, 3)))


class Grouped(nn.Module):
    """A depthwise and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depthwise, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.b, self.grouped, self.c = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 6, 3, groups=3), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.depthwise(functional.relu(self.a(x)))))
        x = functional.relu(self.grouped(functional.relu(self.b(x))))
        return self.head(functional.relu(self.c(x)).mean((2, 3)))


class GatedLinear(nn.Module):
    """Two halves of one layer multiplied with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.a(x).chunk(2, -1)
        return self.b(value * gate.sigmoid())


class HandWrittenAttention(nn.Module):
    """Attention out of linear layers, without layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (one(x).unflatten(2, (2, 4)).transpose(1, 2) for one in (self.q, self.k, self.v))
        x = x + self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.head(x + self.down(functional.gelu(self.up(x))))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.1)
    return nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Sigmoid(), nn.Linear(7, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.PReLU(4),
        nn.Flatten(), nn.Linear(4 * 16, 3),
    )  # fmt: skip


def one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 3), nn.InstanceNorm1d(6), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 2)
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )


Made = tuple[nn.Module, Any]

ZOO: dict[str, Callable[[], Made]] = {
    "perceptron": lambda: (perceptron(), torch.randn(4, 5)),
    "convolutional": lambda: (convolutional(), torch.randn(4, 3, 8, 8)),
    "residual": lambda: (Residual(), torch.randn(4, 3, 4, 4)),
    "dense": lambda: (Dense(), torch.randn(4, 3, 5, 5)),
    "group-norms": lambda: (GroupNorms(), torch.randn(4, 3, 6, 6)),
    "grouped": lambda: (Grouped(), torch.randn(4, 3, 7, 7)),
    "gated-linear": lambda: (GatedLinear(), torch.randn(4, 6)),
    "one-dimensional": lambda: (one_dimensional(), torch.randn(4, 3, 9)),
    "transposed": lambda: (transposed(), torch.randn(4, 3, 5, 5)),
    "encoder": lambda: (encoder(), torch.randn(4, 5, 6)),
    "own-mlp": lambda: (MLP(5, 8, 3, depth=2), torch.randn(4, 5)),
    "own-crelu": lambda: (PlasticMLP(5, 8, 3, depth=2, activation="crelu"), torch.randn(4, 5)),
    "own-convnet": lambda: (ConvNet(1, 8, (4, 6), 3), torch.randn(4, 1, 8, 8)),
    "own-residual": lambda: (ResidualNet(1, 8, 3), torch.randn(4, 1, 8, 8)),
    "own-language": lambda: (LanguageModel(20, 9, 16, 2, 4, 12, tied=True), torch.randint(0, 20, (4, 9))),
    "own-vision": lambda: (VisionTransformer((2, 8, 12), 4, 5, 16, 1, 4, 12), torch.randn(4, 2, 8, 12)),
}


class Lion(torch.optim.Optimizer):
    """Signs of an interpolated momentum, with decoupled weight decay (Chen et al., arXiv 2302.06675)."""

    def __init__(self, parameters: Any, lr: float = 1e-2, weight_decay: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for one in group["params"]:
                if one.grad is None:
                    continue
                momentum = self.state[one].setdefault("momentum", torch.zeros_like(one))
                one.mul_(1 - group["lr"] * group["weight_decay"])
                one.sub_(group["lr"] * (first * momentum + (1 - first) * one.grad).sign())
                momentum.lerp_(one.grad, 1 - second)


class MuonOfMatrices(torch.optim.Muon):
    """Muon on the matrices of a model; the rest is not trained."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__([one for one in parameters if one.ndim == 2], lr=lr)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
    "lion": lambda p: Lion(p, lr=0.001),
    "muon": lambda p: MuonOfMatrices(p, lr=0.01),
}


def make(name: str, seed: int = 0) -> Made:
    """A module and its example input, by a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ZOO[name]()


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    """A loss for any output: the mean square of its distance from a fixed target."""
    outputs = model(batch)
    target = torch.linspace(-1, 1, outputs.shape[-1])
    return (outputs - target).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, steps: int) -> None:
    """Some steps in training mode, on batches that differ from step to step."""
    draws = torch.Generator().manual_seed(len(optimizer.state))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        moved = batch + 0.1 * torch.randn(batch.shape, generator=draws) if batch.is_floating_point() else batch.roll(1)
        mean_square(model, moved).backward()
        optimizer.step()
