"""Steer a Lightning training: digits, a small network, and a learning rate that was chosen badly.

Run: python examples/attach_lightning.py [POLICY]        POLICY: a rule, "default", or the path of a bundle
Needs: pip install "trimtab[lightning]"
"""

from __future__ import annotations

import logging
import sys
import warnings

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trimtab.policies.hosts.lightning import TrimtabCallback

STEPS, BATCH = 600, 32


class Digits(pl.LightningModule):
    """A small network, and a rate that is too low for it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def train(policy: str | None) -> float:
    """Trains with or without a controller and returns the test accuracy."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    loader = DataLoader(TensorDataset(x[:1200], y[:1200]), BATCH, shuffle=True, generator=generator)
    callbacks = [TrimtabCallback(policy)] if policy else []
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Digits()
    trainer.fit(model, loader)
    for callback in callbacks:
        print(callback.controller.summary())
    return float((model.net(x[1200:]).argmax(1) == y[1200:]).float().mean())


def main(policy: str) -> None:
    """Prints the test accuracy without and with the controller."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The 'train_dataloader' does not have many workers")
    alone, steered = train(None), train(policy)
    print(f"test accuracy: {alone:.3f} alone, {steered:.3f} with {policy}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "default")
