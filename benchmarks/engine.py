"""Steps per second of a population against the plain PyTorch loop that does the same work.

    python benchmarks/engine.py [--archs mlp-sgd transformer] [--runs 64] [--threads 1] [--out results/engine.json]

Every architecture trains at full width and the largest batch of its family. Both sides train the same recipe, record
the training loss at every step, and measure the gradient norm on the last two of every ten steps (the population also
update and weight norms). The plain loop runs the network written the ordinary way: ``torch.nn.Conv2d``, fused
attention, no gates. The figure is a ratio taken within one process, the best of several alternating rounds on each
side, because timings on shared machines wander; on one thread the time is that of the process alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from speed.architectures import ARCHITECTURES, family_of, full_size
from speed.loops import Loop, best, plain_loop, population_loop

from trimtab.inner_training.population import Population

COLUMNS = ("architecture", "way", "block", "us per run-step", "run-steps/s", "ratio", "target", "KiB per run")


def measure(name: str, runs: int, rounds: int, threads: int) -> list[dict[str, object]]:
    """One row per way of running an architecture."""
    architecture = ARCHITECTURES[name]
    family = family_of(architecture)
    instances = full_size(family, runs, architecture.rule, architecture.lr)
    populations = {}
    for way, mode, clip in (("eager", "eager", False), ("compiled", "compile", False), ("clip lever", "compile", True)):
        population = Population(family, runs, rules=(architecture.rule,), mode=mode, clip=clip)
        population.reset(range(runs), instances)
        populations[f"population, {way}" if population.mode == mode else f"population, {way}: failed, eager"] = (
            population
        )
    loops: dict[str, Loop] = {"plain PyTorch": plain_loop(architecture, family, instances[0])}
    loops |= {way: population_loop(population) for way, population in populations.items()}
    seconds = best(loops, rounds, time.process_time if threads == 1 else time.perf_counter)
    return [
        {
            "architecture": name,
            "parameters": sum(parameter.numel() for parameter in family.module.parameters()),
            "way": way,
            "block": populations[way].block if way in populations else 1,
            "us_per_run_step": round(taken * 1e6, 2),
            "run_steps_per_second": round(1 / taken),
            "ratio": round(seconds["plain PyTorch"] / taken, 2),
            "target": architecture.target,
            "bytes_per_run": populations[way].state_bytes() // runs if way in populations else 0,
        }
        for way, taken in seconds.items()
    ]


def show(rows: list[dict[str, object]], title: str) -> Table:
    """The table of all rows."""
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("architecture", "way") else "right")
    for row in rows:
        kib = round(int(str(row["bytes_per_run"])) / 1024) or ""
        cells = [
            row[key] for key in ("architecture", "way", "block", "us_per_run_step", "run_steps_per_second", "ratio")
        ]
        table.add_row(*map(str, (*cells, row["target"], kib)))
    return table


def main() -> None:
    """Measures, prints the table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.archs:
        rows += measure(name, options.runs, options.rounds, options.threads)
        print(f"{name}: {rows[-2]['ratio']} times the plain loop", file=sys.stderr, flush=True)
    Console(width=120).print(show(rows, f"{options.runs} runs, {options.threads} thread(s)"))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"threads": options.threads, "runs": options.runs, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
