"""What a unit costs, measured by cutting units out of a plain module, beside what AGF says that it is worth."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import numpy as np
import torch
from experiments.criteria.tasks import Task

from trimtab.inner_training.feeding import first_examples
from trimtab.inner_training.structure.entry import gates

CUT = 0.75  # of a group's units, whose saving is spread over them
EXAMPLES, REPEATS, CALLS = 64, 30, 5


def work(task: Task) -> dict[str, float]:
    """Share of the multiplications that the first unit to go from a group takes along."""
    whole = task.multiplications(task.widths)
    found = {}
    for place, group in enumerate(task.groups):
        widths = [width - (place == other) for other, width in enumerate(task.widths)]
        found[group] = 1 - task.multiplications(widths) / whole
    return found


def times(task: Task) -> dict[str, float]:
    """Seconds of a training step of the whole module (``""``), and without 75 % of the units of each group.

    The least of 30 times of five steps on 64 examples, taken in turn, on one thread.
    """
    variants = {"": _stepper(task, None), **{group: _stepper(task, group) for group in task.groups}}
    least = dict.fromkeys(variants, np.inf)
    for _ in range(REPEATS):
        for name, step in variants.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                step()
            least[name] = min(least[name], (time.perf_counter() - begin) / CALLS)
    return least


def _stepper(task: Task, group: str | None) -> Callable[[], None]:
    family = task.family()
    x, y = first_examples(family, EXAMPLES)
    module = copy.deepcopy(family.module)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    if group is not None:
        structure = gates(module, optimizer, x[:2])
        structure.prune(CUT, "magnitude", "layer", groups=[group])
        structure.compact()

    def step() -> None:
        optimizer.zero_grad()
        family.loss(module(x), y).mean().backward()
        optimizer.step()

    step()
    return step
