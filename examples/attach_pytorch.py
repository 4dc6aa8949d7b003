"""Steer an ordinary PyTorch loop: digits, a small network, and a learning rate that was chosen badly.

Run: python examples/attach_pytorch.py [POLICY]        POLICY: a rule, "default", or the path of a bundle
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import trimtab

STEPS, BATCH = 600, 32


def train(policy: str | None) -> float:
    """Trains with or without a controller and returns the test accuracy."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    controller = trimtab.attach(optimizer, model=model, policy=policy, total_steps=STEPS) if policy else None
    for _ in range(STEPS):
        rows = torch.randint(1200, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        if controller:
            controller.step(loss)
    if controller:
        print(controller.summary())
    return float((model(x[1200:]).argmax(1) == y[1200:]).float().mean())


def main(policy: str) -> None:
    """Prints the test accuracy without and with the controller."""
    alone, steered = train(None), train(policy)
    print(f"test accuracy: {alone:.3f} alone, {steered:.3f} with {policy}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "default")
