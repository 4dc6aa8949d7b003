"""Small live runs and scripted policies for the tests of the controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.policies.controller import Controller
from trimtab.policies.policy import Kind

ALL = {"lr": "moves", "momentum": "moves", "weight_decay": "moves", "grad_clip": "moves"}


@dataclass
class Scripted:
    """Gives row k of a table at decision k, and the last row from then on."""

    table: Sequence[Sequence[float]]
    levers: Mapping[str, Kind] = field(default_factory=lambda: {"lr": "targets"})
    signals: tuple[str, ...] = ("started", "loss_slope")
    name: str = "scripted"
    decide_every: int | None = 5
    fail_at: int | None = None
    seen: list[np.ndarray] = field(default_factory=list)

    def init(self, num_runs: int) -> dict[str, Any]:
        return {"count": np.zeros(num_runs, dtype=np.int64)}

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        count = state["count"]
        if self.fail_at is not None and int(count[0]) >= self.fail_at:
            raise FloatingPointError("scripted failure")
        self.seen.append(observations.copy())
        rows = [self.table[min(int(one), len(self.table) - 1)] for one in count]
        return np.array(rows, dtype=np.float64), {"count": count + 1}


def holding() -> Scripted:
    """Governs every lever and moves none."""
    return Scripted([[0.0] * 4], levers=dict(ALL))


class Loop:
    """A small regression on fixed data; ``step`` is one step of an ordinary training loop."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], *, norm: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(256, 4, generator=generator)
        self.targets = torch.sin(self.inputs.sum(1, keepdim=True))
        layers: list[nn.Module] = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)]
        self.model = nn.Sequential(*(layers[:1] + [nn.BatchNorm1d(8)] * norm + layers[1:]))
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
                elif not norm:
                    parameter.zero_()
        self.optimizer = make(self.model.parameters())
        self.scheduler: Any = None
        self.controller: Controller | None = None
        self.done = 0
        self.losses: list[float] = []
        self.decisions: list[Any] = []

    def loss(self) -> Tensor:
        first = self.done * 16 % 256
        return (self.model(self.inputs[first : first + 16]) - self.targets[first : first + 16]).square().mean()

    def step(self, *, spoil: float | None = None) -> float:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        if spoil is not None:
            next(self.model.parameters()).grad.fill_(spoil)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.done += 1
        if self.controller is not None:
            self.decisions.append(self.controller.step(loss))
        self.losses.append(loss.item())
        return self.losses[-1]

    def run(self, steps: int) -> Loop:
        for _ in range(steps):
            self.step()
        return self

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.model.parameters()])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=1e-2)


def inside(optimizer: torch.optim.Optimizer, read: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """What ``read`` finds in the first parameter group inside each step from now on."""
    found: list[Any] = []
    optimizer.register_step_pre_hook(lambda one, args, kwargs: found.append(read(one.param_groups[0])))
    return found
