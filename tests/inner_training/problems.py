"""A small family that the engine's tests share: digits through one gated hidden layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import Instance, OptimizerSettings, TaskFamily


class GatedNet(nn.Module):
    """Linear, ReLU, gate, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 10)
        self.register_buffer("gate", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) * self.gate)


class SmallDigits(TaskFamily):
    """Instances differ by seed only; settings are given by the test."""

    name, doc = "small-digits", "digits for tests"
    max_examples, max_batch, loss_cap = 300, 16, 4.6

    def __init__(self) -> None:
        images, self.classes = load_digits(return_X_y=True)
        self.inputs = torch.tensor(images / 16, dtype=torch.float32)
        self.module = GatedNet()

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return -torch.log_softmax(outputs, -1).gather(-1, labels[..., None])[..., 0]

    def draw(self, seed: int, *, held_out: bool = False) -> Instance:
        return self.instance(seed)

    def instance(
        self,
        seed: int,
        settings: OptimizerSettings | None = None,
        *,
        batch_size: int = 16,
        schedule: BaseSchedule | None = None,
        steps: int = 200,
    ) -> Instance:
        rng = np.random.default_rng(seed)
        rows = rng.permutation(len(self.classes))[:300]
        parameters = {
            name: rng.uniform(-0.125, 0.125, tuple(parameter.shape)).astype(np.float32)
            for name, parameter in self.module.named_parameters()
        }
        gate = (np.arange(16) < 12).astype(np.float32)
        return Instance(
            key=f"small-digits/{seed}",
            seed=seed,
            rows=rows,
            labels=self.classes[rows],
            sizes=(200, 40, 60),
            parameters=parameters,
            buffers={"gate": gate},
            batch_size=batch_size,
            steps=steps,
            optimizer=settings or OptimizerSettings(rule="sgd", lr=0.05),
            schedule=schedule or BaseSchedule(),
            input_scale=1.5,
        )


@lru_cache(maxsize=1)
def family() -> SmallDigits:
    return SmallDigits()


def plain_module(instance: Instance) -> GatedNet:
    """The same run as an ordinary module."""
    module = GatedNet()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(instance.parameters[name]))
        module.gate.copy_(torch.from_numpy(np.asarray(instance.buffers["gate"])))
    return module


class PlainLion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675, line by line."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for theta in group["params"]:
                g, m = theta.grad, self.state[theta].setdefault("m", torch.zeros_like(theta))
                c = beta1 * m + (1 - beta1) * g
                theta.sub_(group["lr"] * (torch.sign(c) + group["weight_decay"] * theta))
                m.copy_(beta2 * m + (1 - beta2) * g)


class Both:
    """Two optimizers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def plain_optimizer(module: nn.Module, settings: OptimizerSettings) -> Any:
    """The same optimizer from torch, or from its paper."""
    parameters = list(module.parameters())
    own: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    momentum: dict[str, Any] = {"momentum": settings.momentum, **own}
    betas: dict[str, Any] = {"betas": (settings.momentum, settings.beta2), **own}
    adam = {"eps": settings.eps, **betas}
    makers: dict[str, Callable[[], Any]] = {
        "sgd": lambda: torch.optim.SGD(parameters, nesterov=settings.nesterov, **momentum),
        "adam": lambda: torch.optim.Adam(parameters, **adam),
        "adamw": lambda: torch.optim.AdamW(parameters, **adam),
        "rmsprop": lambda: torch.optim.RMSprop(parameters, alpha=settings.beta2, eps=settings.eps, **momentum),
        "nadam": lambda: torch.optim.NAdam(parameters, **adam),
        "nadamw": lambda: torch.optim.NAdam(parameters, decoupled_weight_decay=True, **adam),
        "lion": lambda: PlainLion(parameters, **betas),
        "muon": lambda: Both(
            torch.optim.Muon([p for p in parameters if p.ndim == 2], adjust_lr_fn="match_rms_adamw", **momentum),
            torch.optim.AdamW([p for p in parameters if p.ndim != 2], **adam),
        ),
    }
    return makers[settings.rule]()
