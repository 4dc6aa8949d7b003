"""Digits through two hidden layers, as an ordinary loop whose units may be edited."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import trimtab
from trimtab.inner_training.edits import EditConfig
from trimtab.inner_training.structure.structure import Structure
from trimtab.policies.controller import Controller
from trimtab.policies.editing import Editing


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10))


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


class Digits:
    """``step`` is one step of an ordinary training loop."""

    def __init__(self, *, adam: bool = True) -> None:
        images, classes = load_digits(return_X_y=True)
        self.inputs = torch.tensor(images / 16, dtype=torch.float32)
        self.labels = torch.tensor(classes)
        generator = torch.Generator().manual_seed(0)
        self.model = network()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        parameters = self.model.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, lr=5e-3) if adam else torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        )
        self.structure: Structure = trimtab.gates(self.model, self.optimizer, torch.zeros(1, 64))
        self.controller: Controller | None = None
        self.done = 0
        self.decisions: list[Any] = []

    def editing(self, **config: Any) -> Editing:
        batches = [(self.inputs[:128], self.labels[:128])]
        return Editing(self.structure, batches, mean_loss, EditConfig(**config))

    def attach(self, policy: Any, editing: Editing | Structure | None = None, **options: Any) -> Digits:
        options = {"model": self.model, "total_steps": 200, "decide_every": 5, **options}
        structure = self.editing() if editing is None else editing
        self.controller = trimtab.attach(self.optimizer, policy=policy, structure=structure, **options)
        return self

    def step(self, *, spoil: float | None = None) -> float:
        first = self.done * 32 % 1600
        self.optimizer.zero_grad()
        loss = mean_loss(self.model, (self.inputs[first : first + 32], self.labels[first : first + 32]))
        loss.backward()
        if spoil is not None:
            next(self.model.parameters()).grad.fill_(spoil)  # type: ignore[union-attr]
        self.optimizer.step()
        self.done += 1
        if self.controller is not None:
            self.decisions.append(self.controller.step(loss))
        return loss.item()

    def run(self, steps: int) -> Digits:
        for _ in range(steps):
            self.step()
        return self

    @property
    def active(self) -> dict[str, int]:
        return {name: int(mask.sum()) for name, mask in self.structure.active.items()}

    def everything(self) -> dict[str, Any]:
        """Copies of the weights, the optimizer's state and the units."""
        state = self.optimizer.state_dict()["state"]
        held = {f"{number}.{key}": value for number, one in state.items() for key, value in one.items()}
        units = self.structure.state_dict()
        tensors = {f"{part}.{name}": one for part in ("active", "born", "parked") for name, one in units[part].items()}
        return {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in {**self.model.state_dict(), **held, **tensors, "steps": units["steps"]}.items()
        }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bit for bit, NaN being NaN."""
    return one.keys() == other.keys() and all(
        np.array_equal(np.asarray(value), np.asarray(other[name]), equal_nan=True) for name, value in one.items()
    )
