"""What cutting inactive units out of a model saves: parameters, multiplications, and measured time.

    python benchmarks/compaction.py [--models mlp residual encoder] [--shares 0.5 0.75 0.9] [--rounds 30] [--out FILE]

A model is pruned at random by the same share of every group (but heads), and compacted. It and a copy of before compute
the same. They are timed turn by turn in one process on one thread, by process time, the best of all rounds: a forward pass
in evaluation mode, and a whole training step with Adam.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import trimtab


class Residual(nn.Module):
    """A convolution with batch norm, three residual blocks, and a linear head."""

    def __init__(self, channels: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = functional.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def perceptron() -> nn.Module:
    """784-800-400-10."""
    return nn.Sequential(nn.Linear(784, 800), nn.ReLU(), nn.Linear(800, 400), nn.ReLU(), nn.Linear(400, 10))


def encoder() -> nn.Module:
    """Two of torch's encoder layers, 128 wide; of its heads none is removed, as they could not be cut out."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(128, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (perceptron, (64, 784)),
    "residual": (Residual, (16, 3, 16, 16)),
    "encoder": (encoder, (8, 32, 128)),
}


@dataclass(frozen=True)
class Timed:
    """One model with what its two kinds of work are done on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor

    def forward(self) -> None:
        """Outputs only."""
        self.model.eval()
        with torch.no_grad():
            self.model(self.inputs)

    def step(self) -> None:
        """A training step."""
        self.model.train()
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()

    def multiplications(self) -> int:
        """Of one forward pass, without the fused ones of evaluation mode, which are not counted."""
        self.model.train()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.model(self.inputs)
        return int(counter.get_total_flops()) // 2


def pruned(name: str, share: float) -> tuple[Timed, Timed, float]:
    """The model with units at zero, the same without them, and the largest difference of outputs over the largest output."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, inputs = make(), torch.randn(shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    wide = Timed(model, optimizer, inputs)
    wide.step()
    structure = trimtab.gates(model, optimizer, inputs[:2])
    layers = [group for group in structure.groups if not group.endswith(".heads")]
    structure.prune(share, "random", "layer", groups=layers)
    model.eval()
    with torch.no_grad():
        before = model(inputs)
    # A copy without gates, so that neither side pays for their hooks on gradients.
    plain = copy.deepcopy(model)
    wide = Timed(plain, torch.optim.Adam(plain.parameters(), lr=1e-4), inputs)
    small = structure.compact()
    with torch.no_grad():
        gap = float((small(inputs) - before).abs().max() / before.abs().max())
    return wide, Timed(small, optimizer, inputs), gap


def quickest(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Smallest seconds of each piece of work, in alternating rounds after a warm-up."""
    found = dict.fromkeys(works, float("inf"))
    for place in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if place:
                found[name] = min(found[name], time.process_time() - start)
    return found


def measure(name: str, share: float, rounds: int) -> dict[str, object]:
    """One row of the table."""
    wide, small, gap = pruned(name, share)
    counts = [sum(one.numel() for one in part.model.parameters()) for part in (small, wide)]
    work = small.multiplications() / wide.multiplications()
    seconds = quickest(
        {"wide": wide.forward, "small": small.forward, "wide step": wide.step, "small step": small.step}, rounds
    )
    return {
        "model": name,
        "units removed": share,
        "parameters left": round(counts[0] / counts[1], 3),
        "multiplications left": round(work, 3),
        "forward, ms": round(seconds["wide"] * 1e3, 2),
        "forward, times as fast": round(seconds["wide"] / seconds["small"], 2),
        "training step, ms": round(seconds["wide step"] * 1e3, 2),
        "training step, times as fast": round(seconds["wide step"] / seconds["small step"], 2),
        "outputs differ by": float(f"{gap:.1e}"),
    }


def main() -> None:
    """Measures, prints the table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, share, given.rounds) for name in given.models for share in given.shares]
    table = Table(*rows[0], title="with units at zero, and without them")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
