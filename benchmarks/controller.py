"""What a controller adds to a training step on a CPU.

    python benchmarks/controller.py [--steps 3000] [--total-steps 10000] [--decide-every K] [--models mlp transformer]
                                    [--policies default cosine constant] [--threads 1]

Two copies of one model train on the same batches in one process, turn by turn, one with a controller and one without, and
each step is timed. The difference of every pair belongs to one of three kinds of step: those at whose end a decision is
taken, those that are sampled (the last two of an interval), and the others. The figure of a kind is the median of its
differences; what a controller adds per step is the mean of those medians, weighted by how common the kinds are. Decisions come at
the default interval of a run of so many steps unless one is given. A policy may clip gradients, which takes a pass over them at each
step whoever does it; so the time of ``torch.nn.utils.clip_grad_norm_`` on the same gradients stands beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from trimtab.inner_training.networks.transformer import LanguageModel
from trimtab.inner_training.telemetry import SAMPLED_STEPS
from trimtab.policies.attach import attach
from trimtab.policies.controller import Controller

KINDS = ("other", "sampled", "decision")
WARM_UP = 20  # steps that do not count


@dataclass(frozen=True)
class Case:
    """A model to train.

    Attributes:
        make: the module.
        batch: inputs and labels.
        optimizer: of its parameters.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def perceptron() -> nn.Module:
    """784-800-400-10: a million parameters."""
    return nn.Sequential(nn.Linear(784, 800), nn.ReLU(), nn.Linear(800, 400), nn.ReLU(), nn.Linear(400, 10))


def images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """64 of them."""
    return torch.randn(64, 784, generator=generator), torch.randint(10, (64,), generator=generator)


def text(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two windows of 128 bytes."""
    tokens = torch.randint(256, (2, 129), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


CASES = {
    "mlp": Case(perceptron, images, lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9)),
    "transformer": Case(
        lambda: LanguageModel(context=128, width=320, depth=8, heads=8, tied=True),
        text,
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
    ),
}


class Training:
    """One copy: its model, its optimizer, and perhaps a controller."""

    def __init__(self, case: Case, policy: str | None, total_steps: int, every: int | None = None) -> None:
        torch.manual_seed(0)
        self.model = case.make()
        self.optimizer = case.optimizer(list(self.model.parameters()))
        self.controller: Controller | None = None
        if policy is not None:
            self.controller = attach(
                self.optimizer, model=self.model, policy=policy, total_steps=total_steps, decide_every=every
            )

    def step(self, x: Tensor, y: Tensor, clips: list[float] | None = None) -> float:
        """Seconds of a step; with ``clips`` those of a clip are noted too, and do not count."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(x).flatten(0, -2), y.flatten())
        loss.backward()
        if clips is not None:
            clipping = time.perf_counter()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
            clips.append(time.perf_counter() - clipping)
            began += clips[-1]
        self.optimizer.step()
        if self.controller is not None:
            self.controller.step(loss)
        return time.perf_counter() - began


def kind_of(step: int, every: int, window: int) -> str:
    """The kind of a step, counted from 1, under decisions every so many steps and intervals of ``window`` steps."""
    if step % every == 0:
        return "decision"
    return "sampled" if (step - 1) % window >= window - SAMPLED_STEPS else "other"


def measure(name: str, policy: str, options: argparse.Namespace) -> dict[str, object]:
    """The row of one model and policy."""
    case, generator, steps = CASES[name], torch.Generator().manual_seed(0), options.steps
    plain, steered = (Training(case, one, options.total_steps, options.decide_every) for one in (None, policy))
    assert steered.controller is not None
    every, window = steered.controller._settings.decide_every, steered.controller._window
    alone, clips = list[float](), list[float]()
    added: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for step in range(1, steps + WARM_UP + 1):
        x, y = case.batch(generator)
        # Whoever goes second finds the data in the cache, so they take turns.
        if step % 10 == 5 and kind_of(step, every, window) == "other":
            plain.step(x, y, clips)
            steered.step(x, y)
            continue
        order = (plain, steered) if step % 2 else (steered, plain)
        taken = {id(one): one.step(x, y) for one in order}
        if step > WARM_UP:
            alone.append(taken[id(plain)])
            added[kind_of(step, every, window)].append(taken[id(steered)] - taken[id(plain)])
    medians = {kind: statistics.median(values) if values else 0.0 for kind, values in added.items()}
    kinds = [kind_of(step, every, window) for step in range(WARM_UP + 1, steps + WARM_UP + 1)]
    mean, usual = statistics.fmean(medians[kind] for kind in kinds), statistics.median(alone)
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in plain.model.parameters()),
        "policy": policy,
        "decide_every": every,
        "step_ms": usual * 1e3,
        **{f"{kind}_us": medians[kind] * 1e6 for kind in KINDS},
        "clip_us": statistics.median(clips or [0.0]) * 1e6,
        "added_us": mean * 1e6,
        "share": mean / usual,
    }


def main() -> None:
    """Measures, prints the table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--policies", nargs="+", default=["default", "cosine", "constant"])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--total-steps", type=int, default=10_000)
    parser.add_argument("--decide-every", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    titles = (
        "model",
        "policy",
        "decides every",
        "step, ms",
        "added, us: other steps",
        "sampled",
        "decisions",
        "per step",
        "share",
    )
    table = Table(*titles, "a clip, us")
    rows = []
    for name in options.models:
        for policy in options.policies:
            row = measure(name, policy, options)
            rows.append(row)
            cells = [f"{row[f'{kind}_us']:.0f}" for kind in (*KINDS, "added")]
            share = f"{100 * float(str(row['share'])):.2f} %"
            clip = f"{row['clip_us']:.0f}"
            table.add_row(name, policy, str(row["decide_every"]), f"{row['step_ms']:.2f}", *cells, share, clip)
    Console(width=130).print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"steps": options.steps, "threads": options.threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
