"""What is timed: the plain loop, and a population that does the same work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from speed.architectures import Architecture, ordinary
from torch import Tensor
from torch.nn import functional

from trimtab.inner_training.population import Population
from trimtab.inner_training.task import Instance, TaskFamily

INTERVAL, SAMPLED = 10, 2
SECONDS = 0.3  # that one measurement takes at the least
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class Loop:
    """Something that trains.

    Attributes:
        run: trains for as many intervals as it is given.
        runs: how many runs it trains at once.
    """

    run: Callable[[int], None]
    runs: int


def plain_loop(architecture: Architecture, family: TaskFamily, instance: Instance, device: str = "cpu") -> Loop:
    """An ordinary training loop, as a user would write it with the data in memory.

    It records the loss of every step, and the gradient norm of the last two of every ten.
    """
    module = ordinary(architecture, family, instance).to(device)
    place = instance.split("train")
    table = family.inputs[instance.rows[place]]
    x, y = family.present(
        table if table.is_floating_point() else table.long(), torch.from_numpy(instance.labels[place])
    )
    x, y = x.contiguous().to(device), y.contiguous().to(device)
    settings, batch = instance.optimizer, instance.batch_size
    momentum = {"momentum": settings.momentum} if settings.rule == "sgd" else {}
    optimizer = OPTIMIZERS[settings.rule](module.parameters(), lr=settings.lr, **momentum)

    def run(intervals: int) -> None:
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        order = torch.randperm(len(x), device=device)
        for step in range(intervals * INTERVAL):
            start = step * batch % (len(x) - batch + 1)
            rows = order[start : start + batch]
            optimizer.zero_grad()
            outputs = module(x[rows])
            loss = functional.cross_entropy(outputs.flatten(0, -2), y[rows].flatten())
            loss.backward()
            if step % INTERVAL >= INTERVAL - SAMPLED:
                norms.append(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))
            optimizer.step()
            losses.append(loss.detach())

    return Loop(run, 1)


def population_loop(population: Population) -> Loop:
    """The same work in every run of a population, with one transfer per interval."""

    def run(intervals: int) -> None:
        for _ in range(intervals):
            population.advance(INTERVAL).to_host()

    return Loop(run, population.num_runs)


def best(
    loops: Mapping[str, Loop], rounds: int, clock: Callable[[], float] = time.process_time, seconds: float = SECONDS
) -> dict[str, float]:
    """Smallest seconds per run and step of each loop, in alternating rounds after a warm-up.

    Args:
        loops: by name.
        rounds: how many.
        clock: process time is blind to what else a machine does; it is right for one thread on a CPU.
        seconds: that one measurement takes at the least.
    """
    intervals, found = {}, dict.fromkeys(loops, float("inf"))
    for name, loop in loops.items():
        loop.run(1)
        start = clock()
        loop.run(1)
        intervals[name] = max(1, round(seconds / max(clock() - start, 1e-9)))
    for _ in range(rounds):
        for name, loop in loops.items():
            start = clock()
            loop.run(intervals[name])
            taken = (clock() - start) / (intervals[name] * INTERVAL * loop.runs)
            found[name] = min(found[name], taken)
    return found
