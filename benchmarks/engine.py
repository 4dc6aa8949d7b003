"""Steps per second of a population against the plain PyTorch loop that does the same work.

    python benchmarks/engine.py [--runs 64] [--threads 1] [--out results/engine.json]

Digits, MLP 64-64-10, batch 64. Both sides train the same recipe, record the training loss at every step, and measure
the gradient norm on the last two of every ten steps. The figure is a ratio taken within one process, the best of
several alternating rounds on each side, because timings on shared machines wander.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from trimtab.inner_training.networks import MLP
from trimtab.inner_training.population import Population
from trimtab.inner_training.task import Instance
from trimtab.inner_training.tasks.arrays import ArrayTask
from trimtab.inner_training.tasks.recipe import RecipeRange

INTERVAL, SAMPLED = 10, 2
RULES = {"sgd-momentum": "sgd", "adam": "adam"}


def digits(rule: str) -> ArrayTask:
    """The family: full width, batch 64, one kind of optimizer."""
    images, classes = load_digits(return_X_y=True)
    recipe = RecipeRange(kinds=(rule,), batch=(64, 64), sgd_lr=(0.05, 0.05), adam_lr=(1e-3, 1e-3), schedules=())
    return ArrayTask("digits-engine", lambda: MLP(64, 64, 10), images / 16, classes, recipe=recipe)


def plain_loop(family: ArrayTask, instance: Instance) -> Callable[[int], None]:
    """An ordinary training loop, as a user would write it with the data in memory and no gates."""
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    place = instance.split("train")
    inputs = family.inputs[instance.rows[place]]
    labels = torch.from_numpy(instance.labels[place])
    settings = instance.optimizer
    optimizer: torch.optim.Optimizer
    if settings.rule == "sgd":
        optimizer = torch.optim.SGD(module.parameters(), lr=settings.lr, momentum=settings.momentum)
    else:
        optimizer = torch.optim.Adam(module.parameters(), lr=settings.lr)
    loss_of = nn.CrossEntropyLoss()

    def run(steps: int) -> None:
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        order = torch.randperm(len(inputs))
        for step in range(steps):
            start = step * 64 % (len(inputs) - 64)
            rows = order[start : start + 64]
            optimizer.zero_grad()
            loss = loss_of(module(inputs[rows]), labels[rows])
            loss.backward()
            if step % INTERVAL >= INTERVAL - SAMPLED:
                norms.append(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))
            optimizer.step()
            losses.append(loss.detach())

    return run


def population_loop(
    family: ArrayTask, runs: int, rule: str, mode: str, clip: bool
) -> tuple[Population, Callable[[int], None]]:
    """The same recipe in ``runs`` runs at once; ``steps`` counts steps of each run."""
    made = Population(family, runs, rules=(rule,), mode=mode, clip=clip)  # type: ignore[arg-type]
    made.reset(range(runs), [family.draw(seed, held_out=False) for seed in range(runs)])

    def run(steps: int) -> None:
        for _ in range(steps // INTERVAL):
            made.advance(INTERVAL).to_host()

    return made, run


def best(loops: dict[str, tuple[Callable[[int], None], int, int]], rounds: int) -> dict[str, float]:
    """Smallest seconds per run-step of each loop, in alternating rounds; a loop is (function, steps, runs)."""
    seconds = dict.fromkeys(loops, float("inf"))
    for _ in range(rounds):
        for name, (run, steps, runs) in loops.items():
            start = time.perf_counter()
            run(steps)
            seconds[name] = min(seconds[name], (time.perf_counter() - start) / (steps * runs))
    return seconds


def bytes_per_run(population: Population) -> int:
    """Bytes of state per run: parameters, moments, snapshots, maps; the shared inputs are left out."""
    return population.state_bytes() // population.num_runs


def measure(rule_name: str, runs: int, rounds: int) -> list[dict[str, object]]:
    """One row per way of running."""
    rule = RULES[rule_name]
    family = digits(rule_name)
    plain = plain_loop(family, family.draw(0, held_out=False))
    eager, eager_run = population_loop(family, runs, rule, "eager", clip=False)
    fast, fast_run = population_loop(family, runs, rule, "compile", clip=False)
    _, clip_run = population_loop(family, runs, rule, "compile", clip=True)
    loops = {
        "plain PyTorch": (plain, 200, 1),
        f"population, {eager.mode}": (eager_run, 50, runs),
        f"population, {fast.mode}d": (fast_run, 100, runs),
        f"population, {fast.mode}d, clip lever": (clip_run, 100, runs),
    }
    for run, _, _ in loops.values():
        run(INTERVAL)
    seconds = best(loops, rounds)
    base = seconds["plain PyTorch"]
    return [
        {
            "optimizer": rule_name,
            "way": name,
            "us_per_run_step": round(value * 1e6, 2),
            "run_steps_per_second": round(1 / value),
            "ratio": round(base / value, 2),
            "bytes_per_run": 0 if name == "plain PyTorch" else bytes_per_run(fast),
        }
        for name, value in seconds.items()
    ]


def main() -> None:
    """Measures, prints the table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for name in RULES for row in measure(name, options.runs, options.rounds)]
    table = Table(title=f"digits, MLP 64-64-10, batch 64, {options.runs} runs, {options.threads} thread(s)")
    for column in ("optimizer", "way", "us per run-step", "run-steps/s", "ratio", "KiB per run"):
        table.add_column(column, justify="left" if column in ("optimizer", "way") else "right")
    for row in rows:
        kib = int(str(row["bytes_per_run"])) / 1024
        cells = (row["optimizer"], row["way"], row["us_per_run_step"], row["run_steps_per_second"], row["ratio"])
        table.add_row(*map(str, cells), f"{kib:.0f}" if kib else "")
    Console().print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"threads": options.threads, "runs": options.runs, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
